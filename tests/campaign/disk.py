"""A disk that fills: a file system in memory of a random size, which then grows.

Mounting one takes root, or a user namespace (`unshare --map-root-user --mount`), in which the whole
part starts itself anew. Where neither can be had the part says so and tries nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from common import Place, References, Try, command, copied, difference, iterate, methods, results

OUT_OF_ROOM = ("No space left on device", "are free")
"""What a command says in the midst of it, and before it begins."""
KINDS = ("iterate", "compare", "export --as merged", "data prepare", "report")


def tries(place: Place, rng: Random) -> Iterator[Try]:
    if not _can_mount(place):
        print("disk: no file system can be mounted here; try `unshare -rm make campaign`")
        return
    references = References(place)
    kinds = [kind for kind in KINDS if place.wants(kind)]
    for number in range(place.count(25)):
        what, seed = kinds[number % len(kinds)], f"{place.seed}/disk/{number}"
        begin = time.monotonic()
        outcome, told = _attempt(place, references, what, Random(seed))
        yield Try("disk", what, seed, outcome, told, time.monotonic() - begin)


def _attempt(place: Place, references: References, what: str, rng: Random) -> tuple[str, str]:
    recipe, settings = methods()["self-rewarding"]
    run = references.run("self-rewarding", recipe, *settings)
    mount = place("mount")
    out = mount / "out"
    start: Path | None = None
    if what == "iterate":
        words = iterate(out, recipe, *settings)
    elif what == "compare":
        words, start = ["compare", "1", "anchor", "--adapters", str(out)], run
    elif what == "report":
        words, start = ["report", "--adapters", str(out)], run
    elif what == "data prepare":
        source = place("source.jsonl")
        if not source.exists():
            row = '{"prompt": "Question %d?", "response": "It is %d, and so on.", "score": %d}\n'
            source.write_text("".join(row % (i, i, i % 5) for i in range(3000)))
        words = ["data", "prepare", "--source", str(source), "--out", str(out)]
    else:
        words = ["export", "--adapters", str(run), "--out", str(out)]
    reference = place(f"reference-{what.replace(' ', '-')}")
    if not reference.exists():
        if start is not None:
            copied(start, reference)
        ended = command(*[str(reference) if word == str(out) else word for word in words])
        assert ended.code == 0, ended.short
    before = _size(start) if start is not None else 0
    room = before + int(rng.uniform(0.02, 0.98) * max(4096, _size(reference) - before))
    mount.mkdir(exist_ok=True)
    _mount(mount, room)
    try:
        if start is not None:
            copied(start, out)
        first = command(*words)
        if first.code == 0:
            told = "it sufficed"
        elif first.line is None or not any(words in first.line for words in OUT_OF_ROOM):
            return "failed", f"{room} bytes: {first.short}"
        else:
            told = f"{room} bytes: {first.line[:120]}"
        subprocess.run(["mount", "-o", "remount,size=1g", mount], check=True)
        second = command(*words)
        if second.code:
            return "failed", f"{room} bytes, then room: {second.short}"
        differing = difference(results(reference), results(out))
        if differing:
            return "failed", f"{room} bytes, then room: other bytes: {differing}"
        return ("survived" if first.code == 0 else "mended"), told
    finally:
        subprocess.run(["umount", "--lazy", mount], check=False)


def _size(folder: Path) -> int:
    """Bytes on disk, as a file system of pages of 4096 counts them."""
    return sum(-(-file.stat().st_size // 4096) * 4096 + 4096 for file in folder.rglob("*"))


def _mount(mount: Path, size: int) -> None:
    options = f"size={max(16384, size)}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=True)


def _can_mount(place: Place) -> bool:
    mount = place("probe")
    mount.mkdir(exist_ok=True)
    if shutil.which("mount") is None:
        return False
    words = ["mount", "-t", "tmpfs", "-o", "size=16384", "tmpfs", mount]
    if subprocess.run(words, capture_output=True).returncode:
        return False
    subprocess.run(["umount", mount], check=True)
    return True
