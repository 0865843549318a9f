"""Commands killed at random moments, and gone on with: to the results of undisturbed ones."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from common import (
    SMALL,
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
from forked import Program

MOST_KILLS = 3
"""Of one run."""
LEFT_S = 150.0
"""How long the other process of two may take to notice: see PATIENCE_S in processes.py."""

HUB = """
import os
from huggingface_hub import constants
constants.ENDPOINT = hub = os.environ["HUB"]
constants.HUGGINGFACE_CO_URL_TEMPLATE = hub + "/{repo_id}/resolve/{revision}/{filename}"
constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
"""
TOKEN = "hf_thistokenisnobodysbusiness"


def tries(place: Place, rng: Random) -> Iterator[Try]:
    """By turns, so that few tries see a little of everything."""
    command("--version")  # what processes are forked from imports its libraries with the first one
    references = References(place)
    kinds: list[tuple[str, Callable[[Place, References, Random, str], tuple[str, str]]]] = []
    for method in methods():
        kinds.append((f"iterate, {method}", _iterate(method)))
    for method in ("self-rewarding", "spin"):
        kinds.append((f"iterate, {method}, two processes", _iterate(method, two=True)))
    for form in ("merged", "adapter"):  # the toy's tokenizer has no place in a GGUF file
        kinds.append((f"export --as {form}", _export(form)))
    kinds += [("compare", _compare), ("data prepare", _prepare), ("export --push-to-hub", _upload)]
    kinds = [kind for kind in kinds if place.wants(kind[0])]
    for number in range(place.count(50)):
        what, attempt = kinds[number % len(kinds)]
        seed = f"{place.seed}/kills/{number}"
        begin = time.monotonic()
        outcome, told = attempt(place, references, Random(seed), f"{number}")
        yield Try("kills", what, seed, outcome, told, time.monotonic() - begin)


def _iterate(method: str, *, two: bool = False) -> Callable[..., tuple[str, str]]:
    def attempt(place: Place, references: References, rng: Random, name: str) -> tuple[str, str]:
        recipe, settings = methods()[method]
        reference = references.run(method, recipe, *settings)
        seconds = references.seconds[method] * (1.3 if two else 1.0)
        if two:  # what two train differs from what one does, within rounding
            reference = place(f"../reference-{method}-two")
            if not (reference / "iter_002" / "done.json").is_file():
                whole = _to_the_end(iterate(reference, recipe, *settings), two=True)
                assert whole.code == 0, whole.short
        words = iterate(place(f"run-{name}"), recipe, *settings)
        return _killed(words, place(f"run-{name}"), reference, seconds, rng, two=two)

    return attempt


def _export(form: str) -> Callable[..., tuple[str, str]]:
    def attempt(place: Place, references: References, rng: Random, name: str) -> tuple[str, str]:
        words = ["export", "--adapters", str(_finished(references)), "--as", form, "--out"]
        reference = place(f"reference-{form}")
        begin = time.monotonic()
        if form not in references.seconds:
            shutil.rmtree(reference, ignore_errors=True)
            ended = command(*words, reference)
            assert ended.code == 0, ended.short
            references.seconds[form] = time.monotonic() - begin
        out = place(f"export-{name}")
        return _killed([*words, str(out)], out, reference, references.seconds[form], rng)

    return attempt


def _compare(place: Place, references: References, rng: Random, name: str) -> tuple[str, str]:
    run = _finished(references)
    reference = place("reference-compare")
    words = ["compare", "1", "anchor", "--set", "rollout.chunk_prompts=1", "--adapters"]
    if "compare" not in references.seconds:
        copied(run, reference)
        begin = time.monotonic()
        ended = command(*words, reference)
        assert ended.code == 0, ended.short
        references.seconds["compare"] = time.monotonic() - begin
    out = copied(run, place(f"compare-{name}"))
    return _killed([*words, str(out)], out, reference, references.seconds["compare"], rng)


def _prepare(place: Place, references: References, rng: Random, name: str) -> tuple[str, str]:
    source = place("source.jsonl")
    if not source.exists():
        rows = (
            {"prompt": f"Question {i} of {i * i}?", "response": f"It is {i}. " * 20, "score": i % 5}
            for i in range(20_000)
        )
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "prepare", "--source", str(source), "--out"]
    reference = place("reference-prepare")
    place(f"prepared-{name}").mkdir(exist_ok=True)
    if "prepare" not in references.seconds:
        shutil.rmtree(reference, ignore_errors=True)
        begin = time.monotonic()
        ended = command(*words, reference)
        assert ended.code == 0, ended.short
        references.seconds["prepare"] = time.monotonic() - begin
    out = place(f"prepared-{name}/below")
    words += [str(out), *(["--force"] if rng.random() < 0.5 else [])]
    kills = _kill(words, references.seconds["prepare"], rng)
    ended = command(*words)
    # Killed when all was in its place, or not at all: it says so, and lets it be.
    if ended.code and not (ended.line is not None and ended.line.count("already")):
        return "failed", f"after {kills} kills: {ended.short}"
    differing = difference(results(reference), results(out))
    left = [file.name for folder in (out, out.parent) for file in folder.glob(".*")]
    shutil.rmtree(out.parent)
    if differing or left:
        return "failed", f"after {kills} kills other bytes: {differing}; left: {left}"
    return "survived", f"{kills} kills"


def _upload(place: Place, references: References, rng: Random, name: str) -> tuple[str, str]:
    from hub_server import serving

    words = ["export", "--adapters", str(_finished(references)), "--push-to-hub", "me/model"]
    words += ["--out", str(place("uploaded"))]
    with serving(TOKEN) as hub:
        env = {"HUB": hub.address, "HF_TOKEN": TOKEN}
        begin = time.monotonic()
        if "upload" not in references.seconds:
            ended = command(*words, prelude=HUB, **env)
            assert ended.code == 0, ended.short
            references.seconds["upload"] = time.monotonic() - begin
            hub.repos.clear()
            hub.blobs.clear()
        kills = _kill(words, references.seconds["upload"], rng, prelude=HUB, env=env)
        ended = command(*words, prelude=HUB, **env)
        held = {file: len(data) for file, data in hub.repos["me/model"].files.items()}
    there = {
        str(file.relative_to(place("uploaded"))): file.stat().st_size
        for file in place("uploaded").rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    missing = there.keys() - held.keys()
    if ended.code or missing or any(held[one] != there[one] for one in there):
        return "failed", f"after {kills} kills: {missing} {ended.short}"
    return "survived", f"{kills} kills"


def _finished(references: References) -> Path:
    recipe, settings = methods()["self-rewarding"]
    return references.run("self-rewarding", recipe, *settings)


def _killed(
    words: Sequence[str],
    out: Path,
    reference: Path,
    seconds: float,
    rng: Random,
    *,
    two: bool = False,
) -> tuple[str, str]:
    kills = _kill(words, seconds, rng, two=two)
    ended = _to_the_end(words, two=two)
    if ended.code:
        return "failed", f"after {kills} kills: {ended.short}"
    differing = difference(results(reference), results(out))
    shutil.rmtree(out)
    if differing:
        return "failed", f"after {kills} kills other bytes: {differing}"
    return "survived", f"{kills} kills"


def _kill(
    words: Sequence[str],
    seconds: float,
    rng: Random,
    *,
    two: bool = False,
    prelude: str = "",
    env: dict[str, str] | None = None,
) -> int:
    """Start and kill a few times; how often something was there to kill."""
    kills = 0
    for _ in range(rng.randint(1, MOST_KILLS)):
        programs = _started(words, two=two, prelude=prelude, env=env or {})
        time.sleep(rng.uniform(0.0, seconds))
        victims = programs if rng.random() < 0.5 else [rng.choice(programs)]
        alive = [one for one in victims if one.poll() is None]
        for one in alive:
            one.send_signal(signal.SIGKILL)
        kills += bool(alive)
        for one in programs:  # whoever is left ends by itself
            ended = end_of(one, within=LEFT_S)
            assert ended.code != 124, f"a process was left hanging: {ended.short}"
        if not alive:
            break
    return kills


def _to_the_end(words: Sequence[str], *, two: bool) -> Ended:
    first, *others = [end_of(one) for one in _started(words, two=two, prelude="", env={})]
    return next((one for one in others if one.code), first)


def _started(
    words: Sequence[str], *, two: bool, prelude: str, env: dict[str, str]
) -> list[Program]:
    if not two:
        return [started(words, prelude=prelude, **env)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": port}
    return [started(words, **place, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]


__all__ = ["SMALL", "tries"]
