"""`srlm-lite bench train`: the same examples through our trainings and through TRL's trainers.

Each way trains one LoRA on the bare base, with the same optimiser steps, in a process of its own,
so that its peak of memory is its own. TRL is given what is best for it of micro-batches of 1, 2 and
4: each is tried on a few examples, and the fastest trains. Loading the base is not counted, nor is
a first pass that fetches its weights from the disk.
"""

from __future__ import annotations

import gc
import importlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch

from srlm_lite.bench.floor import Dimensions, PhaseWork, triangle
from srlm_lite.bench.machine import apart, peak_memory, resident
from srlm_lite.bench.named import named
from srlm_lite.bench.roofline import Rates, measure_rates, shape_of
from srlm_lite.judging import load_rubric
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.heap import give_back
from srlm_lite.model.stack import Slot
from srlm_lite.progress import Reporter
from srlm_lite.records import Instruction, RankedReply
from srlm_lite.run.files import read_records
from srlm_lite.settings import Anchor, Base, Dpo, Lora, Optim
from srlm_lite.shipped import recipes_dir
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.plain import train_plain_dpo, train_plain_sft
from srlm_lite.training.sft import Example, train_sft
from srlm_lite.training.trees import Forest, Text, TreeRow

Workload = Literal["short", "judgements", "many", "sft"]
WORKLOADS: tuple[Workload, ...] = ("short", "judgements", "many", "sft")
Way = Literal["ours", "trl"]
MICRO_BATCHES = (1, 2, 4)
"""TRL is given the best of these."""
TRIED = 8
"""Examples, in one step, on which each of them is tried."""
EPOCHS = 2
LORA = Lora(rank=16, alpha=32)
BATCH: Mapping[Workload, int] = {"short": 8, "judgements": 8, "many": 120, "sft": 16}
"""Examples in an optimiser step. Of `many` all pairs, so that a prompt's are in one step."""

Examples = Sequence[PairExample | Example]


@dataclass(frozen=True, slots=True)
class TrainBench:
    """What a user may choose."""

    workloads: tuple[Workload, ...] = WORKLOADS
    base: str = "smollm2-135m-instruct"
    trl: str | None = None
    """A folder with another TRL, which is measured as well."""
    only_ours: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    """One way on one workload, in a process of its own."""

    workload: Workload
    base: str
    way: Way
    micro_batch: int = 4
    tries: bool = False
    """On a few examples, in one step."""
    trl: str | None = None


@dataclass(frozen=True, slots=True)
class _Done:
    seconds: float
    peak: int | None
    loss: float
    trl: str


def workloads_of(text: str) -> tuple[Workload, ...]:
    """The workloads named in a list with commas.

    Raises:
        UserError: One that does not exist.
    """
    return named(text, WORKLOADS, what="workload", where="--workloads")


def bench_train(settings: TrainBench, reporter: Reporter) -> dict[str, Any]:
    """Measure the workloads, each by both ways.

    Returns:
        Under `workloads`, for each: `ours_s`, `trl_s`, `ratio_vs_trl` (how many times ours is
        faster), the peaks above the loaded base, `tokens_per_s` (of the texts as TRL has them, two
        sequences a pair), the least seconds that the machine would take (`floor_s`) and the share
        of ours that they are; `newest_trl` where another TRL was given. And what it was measured
        with.
    """
    base = load_base(Base(name=settings.base))
    shape = shape_of(base.model)
    before = measure_rates(base.model, rows=1024)
    found: dict[str, Any] = {}
    for workload in settings.workloads:
        examples = examples_of(workload, base)
        found[workload] = {**_measured(settings, workload, reporter), **_counts(workload, examples)}
    rates = before.or_better(measure_rates(base.model, rows=1024))
    for workload in settings.workloads:
        row = found[workload]
        least = _floor(shape, examples_of(workload, base), BATCH[workload], rates)
        tokens = row["tokens"] * EPOCHS
        row["tokens_per_s"] = {
            way: round(tokens / row[f"{way}_s"], 1) if row[f"{way}_s"] else None
            for way in ("ours", "trl")
        }
        row["floor_s"] = round(least, 3)
        row["floor_share"] = round(least / row["ours_s"], 3)
    return {
        "workloads": found,
        "epochs": EPOCHS,
        "rank": LORA.rank,
        "trl": version("trl"),
        "base": base.source,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "threads": torch.get_num_threads(),
    }


def _measured(settings: TrainBench, workload: Workload, reporter: Reporter) -> dict[str, Any]:
    task = reporter.start(workload, 2 if settings.trl is None else 3, "ways")
    job = _Job(workload, settings.base, "ours")
    ours = apart(_train, job)
    task.advance()
    told: dict[str, Any] = {
        "ours_s": round(ours.seconds, 3),
        "ours_peak_bytes": ours.peak,
        "ours_loss": ours.loss,
        "trl_s": None,
        "trl_peak_bytes": None,
        "ratio_vs_trl": None,
    }
    if settings.only_ours:
        return told
    tries = {
        micro: apart(_train, replace(job, way="trl", micro_batch=micro, tries=True)).seconds
        for micro in MICRO_BATCHES
    }
    best = min(tries, key=lambda micro: tries[micro])
    trl = apart(_train, replace(job, way="trl", micro_batch=best))
    task.advance()
    told |= {
        "trl_s": round(trl.seconds, 3),
        "trl_peak_bytes": trl.peak,
        "trl_loss": trl.loss,
        "trl_micro_batch": best,
        "trl_tried_s": {str(micro): round(seconds, 3) for micro, seconds in tries.items()},
        "ratio_vs_trl": round(trl.seconds / ours.seconds, 3),
    }
    if settings.trl is not None:
        other = replace(job, way="trl", micro_batch=best, trl=settings.trl)
        newest = apart(_train, other)
        task.advance()
        told["newest_trl"] = {
            "version": newest.trl,
            "seconds": round(newest.seconds, 3),
            "peak_bytes": newest.peak,
            "ratio": round(newest.seconds / ours.seconds, 3),
        }
    return told


def _train(job: _Job) -> _Done:
    """A training, timed, with the most memory in use above the loaded base."""
    if job.trl is not None:
        _take_trl_from(job.trl)
    base = load_base(Base(name=job.base))
    examples = examples_of(job.workload, base)[: TRIED if job.tries else None]
    slot = Slot(base.model, targets=LORA.targets, rank=LORA.rank)
    with torch.no_grad():
        base.model(torch.arange(8, device=base.device)[None])
    rows: list[dict[str, float]] = []
    optim = _optim(job)
    gc.collect()
    give_back()
    held = torch.cuda.memory_allocated() if base.device.type == "cuda" else resident()
    with tempfile.TemporaryDirectory() as scratch, peak_memory(base.device) as peak:
        begin = time.perf_counter()
        _by(job.way, slot, base, examples, optim, Path(scratch), rows)
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    above = None if peak.bytes is None or held is None else peak.bytes - held
    return _Done(seconds, above, rows[-1]["loss"], version("trl"))


def _take_trl_from(folder: str) -> None:
    """Before anything imports TRL, let it be the one of a folder."""
    sys.path.insert(0, folder)
    for name in [one for one in sys.modules if one.partition(".")[0] == "trl"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    importlib.reload(importlib.import_module("srlm_lite.training.plain"))


def _optim(job: _Job) -> Optim:
    settings: dict[str, Any] = {
        "learning_rate": 1e-4,
        "epochs": 1 if job.tries else EPOCHS,
        "batch_size": TRIED if job.tries else BATCH[job.workload],
        "micro_batch_size": job.micro_batch,
    }
    return Anchor(**settings) if job.workload == "sft" else Dpo(**settings, lora=LORA)


def _by(
    way: Way, slot: Slot, base: LoadedBase, examples: Any, optim: Any, scratch: Path, rows: Any
) -> None:
    start = slot.fresh(LORA, seed=1)
    common: dict[str, Any] = {
        "scratch": scratch,
        "seed": 1,
        "on_step": lambda step, steps, logs: rows.append(logs),
    }
    if isinstance(optim, Anchor):
        if way == "ours":
            train_sft(slot, base, start, examples, optim=optim, dropout=0.0, **common)
        else:
            train_plain_sft(slot, base, stack=[start], examples=examples, optim=optim, **common)
    elif way == "ours":
        pairs = {"pairs": examples, "dpo": optim}
        train_dpo(slot, base, anchor=[], delta=start, reference=[], **pairs, **common)
    else:
        train_plain_dpo(slot, base, stack=[start], pairs=examples, dpo=optim, **common)


# --- what is learned ---------------------------------------------------------------------------


def examples_of(workload: Workload, base: LoadedBase) -> Examples:
    """The examples of a workload, as ids."""
    chat = ChatFormat.of(base)
    if workload == "sft":
        return _anchor_examples(chat)[:64]
    if workload == "short":
        return _short(chat)[:32]
    draw = Random(0)
    vocabulary = base.model.config.get_text_config().vocab_size

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, vocabulary) for _ in range(count))

    if workload == "judgements":
        rubric = ids(400)
        return [PairExample(rubric + ids(200), ids(100), ids(100)) for _ in range(16)]
    found = []
    for _ in range(8):
        prompt, replies = ids(60), [ids(50) for _ in range(6)]
        found += [PairExample(prompt, *two) for two in combinations(replies, 2)]
    return found


def _house_style() -> Path:
    return recipes_dir() / "house_style" / "data"


def _short(chat: ChatFormat) -> list[PairExample]:
    """Pairs of the best and the worst reply of a prompt that have 40 to 60 tokens."""
    by_prompt: dict[str, list[RankedReply]] = {}
    for row in read_records(_house_style() / "eft_train.jsonl", RankedReply):
        by_prompt.setdefault(row.prompt_id, []).append(row)
    found = []
    for rows in by_prompt.values():
        replies = [(row.rank, tuple(chat.target_ids(row.response))) for row in rows]
        fitting = sorted(reply for reply in replies if 40 <= len(reply[1]) <= 60)
        if len(fitting) > 1 and fitting[0][0] < fitting[-1][0]:
            prompt = tuple(chat.prompt_ids(rows[0].prompt))
            found.append(PairExample(prompt, fitting[0][1], fitting[-1][1]))
    return found


def _anchor_examples(chat: ChatFormat) -> list[Example]:
    """What the demo's anchor learns: answers and judgements, shuffled."""
    rubric = load_rubric("house-style")
    found = [
        Example(tuple(chat.prompt_ids(row.prompt)), tuple(chat.target_ids(row.response)))
        for row in read_records(_house_style() / "ift.jsonl", Instruction)
    ]
    for row in read_records(_house_style() / "eft_train.jsonl", RankedReply):
        question = rubric.render(prompt=row.prompt, response=row.response)
        ids = tuple(chat.prompt_ids(question))
        found.append(Example(ids, tuple(chat.target_ids(row.target or ""))))
    Random(0).shuffle(found)
    return found


def _texts(examples: Sequence[PairExample | Example]) -> list[Text]:
    found: list[Text] = []
    for one in examples:
        if isinstance(one, Example):
            found.append((one.prompt_ids, one.target_ids))
        else:
            found += [(one.prompt_ids, one.chosen_ids), (one.prompt_ids, one.rejected_ids)]
    return found


def _counts(workload: Workload, examples: Examples) -> dict[str, int]:
    texts = _texts(examples)
    return {
        "examples": len(examples),
        "tokens": sum(len(prompt) + len(target) for prompt, target in texts),
        "tokens_as_trees": Forest(list(dict.fromkeys(texts))).tokens(range(len(set(texts)))),
        "batch_size": BATCH[workload],
    }


# --- the least time ----------------------------------------------------------------------------


def _floor(shape: Dimensions, examples: Examples, batch: int, rates: Rates) -> float:
    """Seconds that no way can beat which makes these steps: each text of a step computed once, what
    texts have in common too; and once for the reference."""
    seconds = 0.0
    best = max(rates.matmul.values())
    passes = [
        (list(examples[at : at + batch]), 3) for at in range(0, len(examples), batch)
    ] * EPOCHS
    if not isinstance(examples[0], Example):
        passes.append((list(examples), 1))
    for some, times in passes:
        texts = list(dict.fromkeys(_texts(some)))
        forest = Forest(texts)
        row = forest.row(range(len(texts)))
        work = row_work(shape, row, learns=times > 1)
        seconds += work.seconds(flops_rate=best, bandwidth=rates.copy)
    return seconds


def row_work(shape: Dimensions, row: TreeRow, *, learns: bool) -> PhaseWork:
    """Forward over a row of trees, and backward where it is learned from.

    Backwards frozen weights cost a forward pass again, for the gradient of what goes in, and
    attention two; so do the scores of the vocabulary. Adapters count for nothing.
    """
    linear = 2 * shape.linear * len(row.ids)
    seen = 0
    for part in row.parts:
        seen += triangle(part.stop - part.start)
        seen += (part.end - part.stop) * (part.stop - part.start)
    attended = 4 * shape.query_width * shape.layers * seen
    scores = 2 * shape.head * len(row.targets)
    times = (2, 3, 2) if learns else (1, 1, 1)
    flops = times[0] * linear + times[1] * attended + times[2] * scores
    return PhaseWork(flops=flops, bytes=times[0] * shape.weights)


def rows_of(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """A table of what `bench_train` has measured."""

    def number(value: Any, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    for name, row in result["workloads"].items():
        peaks = [row[key] and row[key] / 1e9 for key in ("ours_peak_bytes", "trl_peak_bytes")]
        yield [
            name,
            number(row["ours_s"], ".1f"),
            number(row["trl_s"], ".1f"),
            number(row["ratio_vs_trl"]),
            *map(number, peaks),
            number(row["tokens_per_s"]["ours"], ".0f"),
            number(row["floor_share"]),
        ]
