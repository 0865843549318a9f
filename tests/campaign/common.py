"""What the parts share: commands in processes of their own, and what is compared of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from forked import Program

HERE = Path(__file__).resolve().parent
OUTCOMES = ("survived", "named", "mended", "failed")
LONGEST_S = 300.0
"""No command of the campaign takes so long: one that does hangs."""

MAIN = "import sys; sys.argv[0] = 'srlm-lite'\nfrom srlm_lite.cli.main import run\nrun()\n"

LORA = "{rank: 2, alpha: 8, targets: [q_proj, v_proj]}"
SMALL = (
    *("base.quantization=none", f"anchor.lora={LORA}", f"dpo.lora={LORA}", "base.device=cpu"),
    *("anchor.ift_limit=16", "anchor.eft_prompts=8", "anchor.batch_size=8", "anchor.epochs=1"),
    *("anchor.micro_batch_size=4", "dpo.batch_size=4", "dpo.micro_batch_size=2", "dpo.epochs=1"),
    *("prompts.per_iteration=6", "prompts.reuse=true", "rollout.n=3", "rollout.chunk_prompts=2"),
    *("rollout.max_new_tokens=32", "pairing.drop_truncated=false", "pairing.min_pairs=1"),
    *("judge.votes=2", "judge.min_votes=1", "judge.retry_max_new_tokens=64"),
    *("evaluate.eft_prompts=1", "evaluate.policy_prompts=2", "evaluate.votes=1"),
    "checkpoint_minutes=0.01",
)
"""A run of seconds, with several chunks and several steps in each training."""

LEFT_OUT = {"metrics.jsonl", ".metrics.jsonl.sums", "run.json", ".lock", "done.json", "report.html"}
"""Files in which seconds, a command line or the machine stand."""


@dataclass(frozen=True, slots=True)
class Try:
    """One try: what was done, with which seed, and how it ended."""

    part: str
    what: str
    seed: str
    outcome: str
    told: str = ""
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part works, and how much it is to do."""

    folder: Path
    name: str
    seed: int
    n: int | None
    what: str | None = None

    def count(self, usual: int) -> int:
        return usual if self.n is None else self.n

    def wants(self, what: str) -> bool:
        return self.what is None or self.what in what

    def __call__(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name


Part = Callable[[Place, Random], Iterator[Try]]


def show(one: Try) -> None:
    told = f": {one.told}" if one.told else ""
    line = f"{one.part} {one.seed} {one.what}: {one.outcome} ({one.seconds:.0f} s){told}"
    print(line[:400], file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended; code 137 where it was killed, 124 where it hung."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str | None:
        """The one line in which it refused; None where it has not done so."""
        lines = [one for one in self.err.strip().splitlines() if one.startswith("srlm-lite: ")]
        if self.code != 2 or "Traceback" in self.err or len(lines) != 1:
            return None
        return lines[0]

    @property
    def short(self) -> str:
        return f"exit {self.code}: {' / '.join(self.err.strip().splitlines()[-3:])[-300:]}"


def started(words: Sequence[str | Path], *, prelude: str = "", **env: str) -> Program:
    """A command in a process of its own."""
    told = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return Program("-c", prelude + MAIN, *words, env=told)


def end_of(program: Program, *, within: float = LONGEST_S) -> Ended:
    """Waits for a command; one that hangs is killed."""
    deadline = time.monotonic() + within
    while program.poll() is None:
        if time.monotonic() > deadline:
            program.kill()
            program.wait()
            return Ended(124, *program.communicate())
        time.sleep(0.01)
    code = program.returncode or 0
    return Ended(137 if code == -signal.SIGKILL else code, *program.communicate())


def command(*words: str | Path, prelude: str = "", **env: str) -> Ended:
    """A command that is waited for."""
    return end_of(started(words, prelude=prelude, **env))


def iterate(out: Path, recipe: str, *settings: str) -> list[str]:
    """The words of a run."""
    sets = [word for one in settings for word in ("--set", one)]
    return ["iterate", "--recipe", recipe, "--adapters", str(out), *sets]


def results(folder: Path) -> dict[str, str]:
    """Hashes of all that a command has computed: what it left for itself is no result."""
    found = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden and file.name not in LEFT_OUT:
            name = str(file.relative_to(folder))
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for done in sorted(folder.rglob("done.json")):
        known = json.loads(done.read_text())["sha256"]
        found[str(done.relative_to(folder))] = json.dumps(known, sort_keys=True)
    rows = folder / "metrics.jsonl"
    if rows.is_file():
        stages = [json.loads(line) for line in rows.read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if "seconds" not in k} for row in stages]
        found[rows.name] = json.dumps(kept, sort_keys=True)
    return found


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which files differ, in words; empty where none does."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(names[:6])


def copied(source: Path, to: Path) -> Path:
    if to.exists():
        shutil.rmtree(to)
    shutil.copytree(source, to, symlinks=True)
    return to


class References:
    """Undisturbed runs, each made once."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.seconds: dict[str, float] = {}

    def run(self, name: str, recipe: str, *settings: str) -> Path:
        # Parts share them, and so does the next campaign in the same folder.
        out = self._place(f"../reference-{name}")
        note = self._place(f"../reference-{name}.seconds")
        if not note.exists():
            begin = time.monotonic()
            ended = command(*iterate(out, recipe, *settings))
            assert ended.code == 0, f"{name}: {ended.short}"
            note.write_text(str(time.monotonic() - begin))
        self.seconds[name] = float(note.read_text())
        return out


def methods() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each method: a recipe of its own, and the settings with which a run takes seconds."""
    from srlm_lite.methods import METHODS
    from srlm_lite.shipped import recipes_dir

    found = {}
    for name, kind in METHODS.items():
        more = [*SMALL, f"data.ranked={recipes_dir() / 'toy' / 'ranked.jsonl'}"]
        more += [*OF_METHODS.get(name, ()), "iterations=2"]
        recipe = "toy" if name == "self-rewarding" else kind.shipped_recipe()
        found[name] = (recipe, tuple(more))
    return found


OF_METHODS: dict[str, tuple[str, ...]] = {
    "meta-rewarding": (
        "base.window=512",
        "judge.votes=3",
        "judge.temperature=1.0",
        "meta_rewarding.verdicts=['topic: 1', 'topic: 2']",
        "meta_rewarding.max_new_tokens=16",
        "data.extra=null",
    ),
    "rlaif": (
        "rollout.max_new_tokens=72",
        "anchor.ift_limit=48",
        "rlaif.max_new_tokens=72",
        "rlaif.rounds=1",
    ),
    "rlhf": ("dpo.batch_size=6", "dpo.micro_batch_size=3", "rollout.temperature=1"),
    "dno": ("dno.least_positive=1",),
    "scpo": (
        "rollout.n=8",
        "rollout.max_new_tokens=96",
        "prompts.per_iteration=12",
        "anchor.learning_rate=1e-5",
        "scpo.thresholds=[0.25, 0.25]",
    ),
}
"""What some of them need beside that, so that two iterations find something to learn."""
