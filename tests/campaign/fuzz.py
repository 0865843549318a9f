"""Recipes, data, rubrics and runs that somebody or something has garbled: one line, or it is read.

All commands of it run in one process, forked from one that has imported the libraries; each is
given its time by an alarm.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from random import Random
from types import FrameType

from common import Ended, Place, References, Try, copied, methods

PATIENCE_S = 10
BYTES = (
    *(b"\x00", b"\xff", b"\xf0\x9f", b"\xef\xbb\xbf", b"\r", b"\t", b"{", b"]", b'"', b":", b"- "),
    *(b"!!python/none ", b"&a *a", b"1e999", b"-1", b"NaN", b"\\ud800", b"9" * 5000, b"[" * 3000),
)
VALUES: tuple[object, ...] = (
    *(None, True, -1, 0, 10**30, 0.5, -0.0, float("inf"), float("nan"), "", " ", "x" * 10_000),
    *(
        "\u202e",
        "../..",
        "/",
        "nowhere:nothing",
        "a\nb",
        [],
        [[]],
        {},
        {"a": {"b": 1}},
        [None],
        "1",
    ),
)


class TooLong(Exception):
    """The alarm rang."""


def tries(place: Place, rng: Random) -> Iterator[Try]:
    kinds = {"recipe": _recipe, "data file": _data, "rubric": _rubric, "run directory": _run}
    kinds = {what: make for what, make in kinds.items() if place.wants(what)}
    references = References(place)
    asked(["iterate", "--dry-run", "--recipe", "tiny", "--adapters", str(place("x"))], within=600)
    for number in range(place.count(200)):
        what = list(kinds)[number % len(kinds)]
        seed = f"{place.seed}/fuzz/{number}"
        begin = time.monotonic()
        words = kinds[what](place, references, Random(seed))
        ended = asked(words)
        yield Try("fuzz", what, seed, *_outcome(ended), time.monotonic() - begin)


def _outcome(ended: Ended) -> tuple[str, str]:
    if ended.code == 124:
        return "failed", f"over {PATIENCE_S} s"
    if "Traceback" in ended.err or ended.code not in (0, 2):
        return "failed", ended.short
    if ended.code == 2 and ended.line is None:
        bad = _bad(ended.out)
        return ("named", bad) if bad and "\n" not in bad else ("failed", ended.short)
    return ("named", (ended.line or "")[:200]) if ended.code else ("survived", "")


def _bad(out: str) -> str | None:
    """What the first check of a dry run that is bad says; None where this is no dry run."""
    try:
        checks = json.loads(out)["checks"]
    except (ValueError, KeyError):
        return None
    return next((str(one["text"]) for one in checks if one["state"] == "bad"), None)


def asked(words: Sequence[str], *, within: int = PATIENCE_S) -> Ended:
    """A command in this process.

    Args:
        within: Seconds of a core; it may wait six times as long.
    """
    from srlm_lite.cli import main

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLong

    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["srlm-lite", *words]
    before = {one: signal.signal(one, ring) for one in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, within)
    signal.alarm(6 * within)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main.run()
            except SystemExit as end:
                code = int(end.code or 0)
            except TooLong:
                code = 124
            except BaseException:
                traceback.print_exc()
                code = 1
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for one, handler in before.items():
            signal.signal(one, handler)
        sys.argv = argv
    return Ended(code, out.getvalue(), err.getvalue())


# --- what is garbled


def garbled(data: bytes, rng: Random) -> bytes:
    """A few bytes of it put in, taken out, doubled or moved."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.randrange(1, 60))
        way = rng.randrange(5)
        if way == 0:
            data = data[:at] + rng.choice(BYTES) + data[at:]
        elif way == 1:
            data = data[:at] + data[to:]
        elif way == 2:
            data = data[:to] + data[at:]
        elif way == 3:
            most = 256 if rng.random() < 0.2 else 128  # what is no UTF-8 is refused at once
            drawn = bytes(rng.randrange(9, most) for _ in range(rng.randrange(1, 9)))
            data = data[:at] + drawn + data[to:]
        else:
            data = data[:at]
    return data


def other_values(value: object, rng: Random) -> object:
    """The same with one of its values another one, or under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.1:
            changed[f"{key}s"] = changed.pop(key)
        elif rng.random() < 0.1:
            del changed[key]
        else:
            changed[key] = other_values(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [other_values(one, rng) if i == at else one for i, one in enumerate(value)]
    return rng.choice(VALUES)


def _recipe(place: Place, references: References, rng: Random) -> list[str]:
    import yaml

    from srlm_lite.recipe import load_recipe, shipped_recipes
    from srlm_lite.shipped import recipes_dir

    name, path = rng.choice(shipped_recipes()), place("garbled.yaml")
    if rng.random() < 0.5:
        path.write_bytes(garbled((recipes_dir() / f"{name}.yaml").read_bytes(), rng))
    else:
        settings = load_recipe(name).model_dump(mode="json")
        for _ in range(rng.randint(1, 3)):
            changed = other_values(settings, rng)
            settings = changed if isinstance(changed, dict) else settings
        path.write_text(yaml.safe_dump(settings))
    which = rng.choice(("recipes check", "plan", "dry run"))
    if which == "recipes check":
        return ["recipes", "check", str(path)]
    if which == "plan":
        return ["plan", "--gpus", "24GB", "--recipe", str(path)]
    return [
        "iterate",
        "--dry-run",
        "--json",
        "--recipe",
        str(path),
        "--adapters",
        str(place("not-there")),
    ]


def _data(place: Place, references: References, rng: Random) -> list[str]:
    from srlm_lite.shipped import recipes_dir

    source = recipes_dir() / "toy" / "data"
    folder = place("data")
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(source, folder)
    file = rng.choice(sorted(folder.glob("*.jsonl")))
    lines = file.read_bytes().splitlines(keepends=True)[:60]
    if rng.random() < 0.5:
        file.write_bytes(garbled(b"".join(lines), rng))
    else:
        at = rng.randrange(len(lines))
        lines[at] = (json.dumps(other_values(json.loads(lines[at]), rng)) + "\n").encode()
        file.write_bytes(b"".join(lines))
    which = rng.choice(("show", "prepare", "iterate"))
    if which == "show":
        return ["data", "show", str(folder)]
    if which == "prepare":
        made = place("prepared")
        shutil.rmtree(made, ignore_errors=True)
        return ["data", "prepare", "--source", str(file), "--out", str(made)]
    words = ["iterate", "--dry-run", "--json", "--recipe", "tiny", "--set", f"data.dir={folder}"]
    return [*words, "--set", "prompts.reuse=true", "--adapters", str(place("not-there"))]


def _rubric(place: Place, references: References, rng: Random) -> list[str]:
    from srlm_lite.shipped import recipes_dir

    files = sorted((recipes_dir() / "rubrics").glob("*.yaml"))
    path = place("rubric.yaml")
    path.write_bytes(garbled(rng.choice(files).read_bytes(), rng))
    words = ["iterate", "--dry-run", "--json", "--recipe", "tiny", "--set", f"judge.rubric={path}"]
    return [*words, "--adapters", str(place("not-there"))]


def _run(place: Place, references: References, rng: Random) -> list[str]:
    recipe, settings = methods()["self-rewarding"]
    run = references.run("self-rewarding", recipe, *settings)
    out = copied(run, place("garbled-run"))
    files = [one for one in sorted(out.rglob("*")) if one.is_file() and one.name != ".lock"]
    for file in rng.sample(files, rng.randint(1, 3)):
        file.write_bytes(garbled(file.read_bytes(), rng))
    commands = (
        *(["report"], ["show", "run"], ["show", "pairs"], ["show", "judgements"], ["evaluate"]),
        *(["report", "--markdown"], ["iterate", "--dry-run", "--json"], ["show", "run", "--json"]),
    )
    words = rng.choice(commands)
    more = ["--out", str(place("page.html"))] if words == ["report"] else []
    return [*words, "--adapters", str(out), *more]
