"""Clocks that jump, two commands in one directory, places that are read-only, runs that move."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from common import (
    Place,
    References,
    Try,
    command,
    copied,
    difference,
    end_of,
    iterate,
    methods,
    results,
    started,
)

JUMPING = """
import random, time
_seed, _draw = {seed!r}, random.Random({seed!r})
def _jumping(clock, back):
    def now():
        at = clock()
        if _draw.random() < 0.05:
            _jumping.off += _draw.uniform(-back, 86400.0)
        return at + _jumping.off
    return now
_jumping.off = 0.0
time.time = _jumping(time.time, 86400.0)
"""
"""The clock of the wall goes days ahead and back. `time.monotonic`, by its name, does not."""


def tries(place: Place, rng: Random) -> Iterator[Try]:
    references = References(place)
    kinds: dict[str, Callable[[Place, References, Random], tuple[str, str]]] = {
        "a clock that jumps": _clock,
        "two commands in one directory": _two,
        "a directory that is read-only": _read_only,
        "a run gone on with in another place": _moved,
    }
    kinds = {what: attempt for what, attempt in kinds.items() if place.wants(what)}
    for number in range(place.count(24)):
        what = list(kinds)[number % len(kinds)]
        seed, begin = f"{place.seed}/odds/{number}", time.monotonic()
        outcome, told = kinds[what](place, references, Random(seed))
        yield Try("odds", what, seed, outcome, told, time.monotonic() - begin)


def _reference(references: References) -> tuple[Path, str, tuple[str, ...]]:
    recipe, settings = methods()["self-rewarding"]
    return references.run("self-rewarding", recipe, *settings), recipe, settings


def _fresh(place: Place, name: str) -> Path:
    out = place(name)
    shutil.rmtree(out, ignore_errors=True)
    return out


def _same(reference: Path, out: Path, told: str = "") -> tuple[str, str]:
    differing = difference(results(reference), results(out))
    return ("failed", f"other bytes: {differing}") if differing else ("survived", told)


def _clock(place: Place, references: References, rng: Random) -> tuple[str, str]:
    reference, recipe, settings = _reference(references)
    out, words = _fresh(place, "clock"), []
    words = iterate(out, recipe, *settings)
    program = started(words, prelude=JUMPING.format(seed=rng.random()))
    time.sleep(rng.uniform(0, references.seconds["self-rewarding"]))
    program.kill()
    end_of(program)
    ended = command(*words, prelude=JUMPING.format(seed=rng.random()))
    return _same(reference, out) if ended.code == 0 else ("failed", ended.short)


def _two(place: Place, references: References, rng: Random) -> tuple[str, str]:
    reference, recipe, settings = _reference(references)
    out = _fresh(place, "two")
    words = iterate(out, recipe, *settings)
    first = started(words)
    time.sleep(rng.uniform(0, references.seconds["self-rewarding"]))
    there = ["--adapters", str(out)]
    others = (
        *(words, ["iterate", *there, "--dry-run"], ["show", "run", *there]),
        *(["report", *there, "--out", str(place("two.html"))], ["show", "pairs", *there]),
        *(["evaluate", *there, "--iteration", "1"], ["compare", *there, "1", "anchor"]),
        ["export", *there, "--out", str(_fresh(place, "two-export"))],
    )
    second = rng.choice(others)
    ended, one = command(*second), end_of(first)
    what = " ".join(second[: 2 if second[0] == "show" else 1])
    if one.code or (ended.code and ended.line is None and not ended.out):
        return "failed", f"{what}: {one.short} / {ended.short}"
    again = command(*words)
    if again.code:
        return "failed", again.short
    told = f"{what}: {ended.line or 'done'}"
    return _same(_with(reference, out, place), out, told[:160])


def _with(reference: Path, out: Path, place: Place) -> Path:
    """The undisturbed run with what another command has added to it."""
    both = copied(reference, place("both"))
    for name in ("compare", "base"):
        if (out / name).is_dir():
            copied(out / name, both / name)
    return both


def _read_only(place: Place, references: References, rng: Random) -> tuple[str, str]:
    reference, recipe, settings = _reference(references)
    mount = place("read-only")
    mount.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "tmpfs", mount]
    if subprocess.run(words, capture_output=True).returncode:
        return "survived", "not tried: no file system can be mounted here"
    try:
        out = copied(reference, mount / "out")
        (out / "report.html").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        there = ["--adapters", str(out)]
        commands = (
            (iterate(out, recipe, *settings), 0), (["report", *there], 2),
            (["show", "run", *there], 0),
            (iterate(mount / "new", recipe, *settings), 2), (["show", "pairs", *there], 0),
            (["evaluate", *there, "--iteration", "1"], 0), (["compare", *there, "1", "anchor"], 2),
            (["export", "--adapters", str(reference), "--out", str(mount / "export")], 2),
        )  # fmt: skip
        which, code = rng.choice(commands)
        ended = command(*which)
        told = f"{which[0]}: {ended.line or 'done'}"
        if "Traceback" in ended.err or (ended.code == 2 and ended.line is None):
            return "failed", ended.short
        if ended.code != code and not (code == 0 and ended.code == 2):
            return "failed", ended.short
        return ("named" if ended.code == 2 else "survived"), told[:200]
    finally:
        subprocess.run(["umount", "--lazy", mount], check=False)


def _moved(place: Place, references: References, rng: Random) -> tuple[str, str]:
    """Killed, copied elsewhere as to another machine, and gone on with there."""
    reference, recipe, settings = _reference(references)
    out, elsewhere = _fresh(place, "here"), _fresh(place, "elsewhere/of/another/name")
    program = started(iterate(out, recipe, *settings))
    time.sleep(rng.uniform(0, references.seconds["self-rewarding"]))
    program.kill()
    end_of(program)
    if not out.exists():
        return "survived", "killed before it wrote anything"
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    out.rename(elsewhere)
    named = iterate(elsewhere, recipe, *settings)
    begun = (elsewhere / "run.json").is_file() and rng.random() < 0.5
    ended = command(*(["iterate", "--adapters", str(elsewhere)] if begun else named))
    return _same(reference, elsewhere) if ended.code == 0 else ("failed", ended.short)
