"""Files of a run that are harmed before a command: each is named, or makes no difference."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from common import (
    Ended,
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

HARMS = ("truncated", "bit flipped", "deleted", "emptied", "of another run")
COMMANDS = (
    *("iterate", "report", "show run", "show pairs", "show judgements", "show candidates"),
    *("evaluate", "export", "compare", "chat"),
)


@dataclass(frozen=True, slots=True)
class Stand:
    """A run, finished or killed on its way, and one of another seed as far."""

    run: Path
    other: Path
    finished: bool


def tries(place: Place, rng: Random) -> Iterator[Try]:
    recipe, settings = methods()["self-rewarding"]
    references = References(place)
    run = references.run("self-rewarding", recipe, *settings)
    other = references.run("other", recipe, *settings, "seed=1")
    stands = [Stand(run, other, True)]
    stands += [_on_its_way(place, other, number) for number in range(3)]
    expected: dict[tuple[str, int], tuple[Ended, dict[str, str]]] = {}
    combinations = [(h, c) for h in HARMS for c in COMMANDS if place.wants(f"{c}, {h}")]
    for number in range(place.count(200)):
        seed = f"{place.seed}/damage/{number}"
        draw = Random(seed)
        harm, which = combinations[number % len(combinations)]
        # What takes the whole run to make again is tried with a run on its way half of the time.
        at = draw.randrange(len(stands)) if which == "iterate" else 0 if draw.random() < 0.7 else 1
        base = 0 if which == "iterate" else at  # a run on its way ends as the one that was whole
        if (which, base) not in expected:
            out = copied(stands[base].run, place("work"))
            expected[which, base] = _ask(place, which, out, recipe, settings)
        begin = time.monotonic()
        out = copied(stands[at].run, place("work"))
        files = [one for one in sorted(out.rglob("*")) if one.is_file() and one.name != ".lock"]
        file = draw.choice([one for one in files if one.stat().st_size])
        name = file.relative_to(out)
        if harm == "of another run" and not (stands[at].other / name).is_file():
            continue
        _harm(file, harm, stands[at].other / name, draw)
        outcome, told = _judge(*expected[which, base], *_ask(place, which, out, recipe, settings))
        where = "finished" if stands[at].finished else "on its way"
        kind = f"{which}, {'finished' if stands[at].finished else 'under way'}"
        yield Try("damage", kind, seed, outcome, f"{harm}: {name} ({where}): {told}",
                  time.monotonic() - begin)  # fmt: skip


def _on_its_way(place: Place, other: Path, number: int) -> Stand:
    """A run without the last of what it has done: as if killed in its second iteration."""
    out, made = place(f"on-its-way-{number}"), place(f"on-its-way-{number}.made")
    if made.exists():
        return Stand(out, other, False)
    recipe, settings = methods()["self-rewarding"]
    begin = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    program = started(iterate(out, recipe, *settings))
    wanted = ("iter_001/judgements.jsonl", "iter_001/pairs.jsonl", "iter_002/candidates.jsonl")
    while program.poll() is None and not (out / wanted[number]).is_file():
        time.sleep(0.02)
        assert time.monotonic() - begin < 300
    time.sleep(0.3)
    program.kill()
    end_of(program)
    assert (out / "run.json").is_file() and not (out / "iter_002" / "done.json").exists()
    made.touch()
    return Stand(out, other, False)


def _harm(file: Path, harm: str, other: Path, rng: Random) -> None:
    data = file.read_bytes()
    if harm == "deleted":
        file.unlink()
    elif harm == "emptied":
        file.write_bytes(b"")
    elif harm == "truncated":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif harm == "of another run":
        shutil.copy(other, file)
    else:
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])


def _ask(
    place: Place, which: str, out: Path, recipe: str, settings: tuple[str, ...]
) -> tuple[Ended, dict[str, str]]:
    """A command on a run, and what it has made."""
    there, made = ["--adapters", str(out)], place("nothing")
    if which == "iterate":
        made = out
        ended = command(*iterate(out, recipe, *settings))
        ended = replace(ended, out="")  # the closing table has minutes; its figures are in files
    elif which == "export":
        made = place("exported")
        shutil.rmtree(made, ignore_errors=True)
        ended = command("export", *there, "--iteration", "1", "--out", made)
    elif which == "report":
        made = place("page")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        ended = command("report", *there, "--out", made / "page.html")
    elif which == "compare":
        ended = command("compare", *there, "1", "anchor", "--limit", "2", "--json")
    elif which == "evaluate":
        ended = command("evaluate", *there, "--iteration", "1", "--json")
    elif which == "chat":
        ended = command("chat", *there, "--iteration", "1", "--temperature", "0")
    else:
        ended = command(*which.split(), *there, *(["--limit", "0"] if which[5:] != "run" else []))
    return ended, results(made) if made.exists() else {}


def _judge(
    before: Ended, made_before: dict[str, str], now: Ended, made: dict[str, str]
) -> tuple[str, str]:
    if now.line is not None:
        return ("named", now.line[:160])
    if now.code != before.code or "Traceback" in now.err:
        return "failed", now.short
    if now.out != before.out:
        return "failed", f"another answer: {_first_difference(before.out, now.out)}"
    differing = difference(made_before, made)
    return ("failed", f"other bytes: {differing}") if differing else ("survived", "")


def _first_difference(before: str, now: str) -> str:
    pairs = zip(before.splitlines(), now.splitlines(), strict=False)
    return next((f"{one!r} -> {two!r}"[:200] for one, two in pairs if one != two), "its length")
