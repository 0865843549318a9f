"""A plan held against the real thing: each phase in a process of its own, its peak measured.

Every phase gets what the plan counts with: prompts and answers as long as they can be, batches as
full, two optimiser steps, in the second of which the optimiser's states are there. Texts are random
ids; the adapters are fresh. What is measured on a CPU is the most the process has held, libraries
and mapped files included; on a GPU the most that torch has allocated, so there the plan's
libraries do not count; what they take there is told beside it. An export's memory is the machine's
everywhere. A base of random weights stands in for one whose files are not here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srlm_lite.bench.machine import apart, resident_peak, status_bytes
from srlm_lite.errors import UserError
from srlm_lite.hardware import device_name
from srlm_lite.methods.base import Trains
from srlm_lite.planning.lengths import longest
from srlm_lite.planning.machine import hardware_found, plan_for
from srlm_lite.planning.plan import Phase, Plan
from srlm_lite.planning.rates import rates_key, remember
from srlm_lite.progress import Reporter
from srlm_lite.recipe import Recipe
from srlm_lite.settings import Anchor, Base

if TYPE_CHECKING:
    from srlm_lite.model.base import LoadedBase

OF_FILES = ("export",)
"""What a base without files cannot do."""
NOT_HELD = ("rloo",)
"""Kinds of training that cannot be held to their longest: the policy ends its answers itself."""
STEPS = 2


@dataclass(frozen=True, slots=True)
class PhaseJob:
    """One phase, to be run in another process."""

    recipe: Recipe
    phase: Phase
    anchor_rank: int
    random: bool


def bench_plan(
    recipe: Recipe, *, phases: Sequence[str] | None, reporter: Reporter, random: bool = False
) -> dict[str, Any]:
    """Predicted and measured peaks of a recipe's phases, with the engine `transformers`.

    Args:
        phases: Their names; None: all.
        random: On a base of the recipe's shape and random weights, built where it is going to lie.
            What loading costs beside that, and the export, cannot be measured so.

    Raises:
        UserError: A phase that this recipe, or a base without files, does not have.
    """
    engines = {recipe.rollout.engine, recipe.judge.engine or recipe.rollout.engine}
    if engines != {"transformers"}:
        raise UserError(
            "only the engine transformers can be held against a plan", where="rollout.engine"
        )
    hardware = hardware_found(recipe)
    plan = plan_for(recipe, hardware, lengths=longest(recipe))
    known = [
        phase.name
        for phase in plan.phases
        if not (random and phase.name in OF_FILES)
        and not (phase.trains and phase.trains.kind in NOT_HELD)
    ]
    if unknown := set(phases or ()) - set(known):
        raise UserError(
            f"no phase named {min(unknown)}", where="--phases", way_out=f"Known: {', '.join(known)}"
        )
    chosen = [phase for phase in plan.phases if phase.name in (phases or known)]
    task = reporter.start("plan", len(chosen), "phases")
    rows, rates = {}, {}
    for phase in chosen:
        task.note(phase.name)
        job = PhaseJob(recipe, phase, plan.anchor_rank, random)
        measured = apart(_run, job)
        rows[phase.name] = _row(plan, phase, measured)
        if measured["tokens"]:
            rates[phase.name] = measured["tokens"] / measured["seconds"]
        task.advance()
    if rates:
        from srlm_lite.model.cache import cache_dir

        device = device_name(hardware.device)
        remember(cache_dir(), rates_key(recipe, device=device, itemsize=plan.itemsize), rates)
    return {
        "recipe": recipe.name,
        "base": recipe.base.name,
        "random": random,
        "quantization": recipe.base.quantization,
        "bits": 8 * plan.itemsize,
        "window": recipe.base.window,
        "device": str(hardware),
        "threads": torch.get_num_threads(),
        "tokens_per_s": rates,
        "phases": rows,
    }


def _row(plan: Plan, phase: Phase, measured: Mapping[str, Any]) -> dict[str, Any]:
    counted = {
        part: count
        for part, count in phase.parts.items()
        if not (plan.hardware.device == "cuda" and part == "libraries" and not phase.on_host)
    }
    predicted, peak = sum(counted.values()), measured["peak_bytes"]
    return {
        "predicted_bytes": predicted,
        "measured_bytes": peak,
        "error": None if peak is None else predicted / peak - 1,
        "parts": dict(phase.parts),
        "libraries_bytes": measured["libraries_bytes"],
        "reserved_bytes": measured["reserved_bytes"],
        "seconds": measured["seconds"],
        "shape": dict(phase.shape),
    }


def _run(job: PhaseJob) -> dict[str, Any]:
    if job.phase.trains is not None:
        return _train(job, job.phase.trains)
    return _export(job) if job.phase.name == "export" else _sample(job)


def _measured(libraries: int | None, begin: float, tokens: int, device: str) -> dict[str, Any]:
    seconds = time.monotonic() - begin
    reserved = None
    if device == "cuda":
        peak: int | None = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        # What torch's allocator knows nothing of: the context, and the libraries' own.
        libraries = total - free - torch.cuda.memory_reserved()
    else:
        peak = resident_peak()
    return {
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "libraries_bytes": libraries,
        "seconds": seconds,
        "tokens": tokens,
    }


def _stack(job: PhaseJob) -> tuple[Any, Any, list[Any]]:
    """Base, slot, and a stack of fresh adapters, as a session has them."""
    from srlm_lite.model.base import load_base
    from srlm_lite.model.stack import Slot

    recipe = job.recipe
    base = _random(recipe.base) if job.random else load_base(recipe.base)
    lora = recipe.anchor.lora.model_copy(update={"rank": job.anchor_rank})
    slot = Slot(
        base.model,
        targets=recipe.targets,
        rank=lora.rank + recipe.dpo.lora.rank,
        fold=recipe.rollout.fold,
    )
    return base, slot, [slot.fresh(lora, seed=1), slot.fresh(recipe.dpo.lora, seed=2)]


def _random(section: Base) -> LoadedBase:
    from srlm_lite.model.device import compute_device, compute_dtype
    from srlm_lite.model.random_base import random_base
    from srlm_lite.planning.probe import base_config

    return random_base(
        base_config(section),
        name=section.name,
        device=compute_device(section.device),
        dtype=compute_dtype(section),
        quantization=section.quantization,
    )


def _ids(generator: torch.Generator, vocabulary: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(vocabulary // 2, (count,), generator=generator).tolist())


def _sample(job: PhaseJob) -> dict[str, Any]:
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.rollout.protocol import Limits, Request
    from srlm_lite.rollout.transformers_engine import TransformersEngine

    libraries = status_bytes("VmRSS")
    base, slot, stack = _stack(job)
    section, shape = job.recipe.base, job.phase.shape
    chat = ChatFormat.of(
        base, template=section.chat_template, settings=section.chat_template_kwargs
    )
    engine = TransformersEngine(
        slot,
        chat,
        batch_rows=shape["batch_rows"],
        cuda_graphs=job.recipe.rollout.cuda_graphs,
    )
    generator, vocabulary = torch.Generator().manual_seed(0), base.model.config.vocab_size
    n = shape["samples"]
    requests = [
        # Every second one a token shorter, so that rows are padded.
        Request(_ids(generator, vocabulary, max(3, shape["prompt_tokens"] - i % 2)), seeds)
        for i in range(shape["prompts"])
        for seeds in [tuple(range(i * n, i * n + n))]
    ]
    sampling = job.recipe.judge if job.phase.like == "judge" else job.recipe.rollout
    limits = Limits(
        sampling.temperature, sampling.top_p, max_new_tokens=shape["new_tokens"], ignore_end=True
    )
    engine.load(stack)
    begin = time.monotonic()
    engine.sample(requests, limits)
    drawn = shape["prompts"] * n * shape["new_tokens"]
    tokens = 0 if job.phase.name == "load" else drawn
    return _measured(libraries, begin, tokens, base.device.type)


def _train(job: PhaseJob, one: Trains) -> dict[str, Any]:
    from srlm_lite.training.dpo import PairExample, train_dpo
    from srlm_lite.training.reward import train_reward
    from srlm_lite.training.sft import Example, train_sft

    libraries = status_bytes("VmRSS")
    base, slot, (anchor, delta) = _stack(job)
    generator, vocabulary = torch.Generator().manual_seed(0), base.model.config.vocab_size
    recipe, shape = job.recipe, job.phase.shape
    half = shape["tokens"] // 2
    # At most two micro-batches a step: more would only take longer.
    batches = min(2, shape["accumulated"])
    micro = shape["sequences"] // (1 if one.kind == "sft" else 2)
    count = batches * micro
    optim = attrgetter(one.section)(recipe).model_copy(
        update={"batch_size": count, "epochs": STEPS}
    )

    def ids(short: int = 0) -> tuple[int, ...]:
        return _ids(generator, vocabulary, half - short)

    def examples() -> list[Example]:
        return [Example(ids(), ids(i % 2)) for i in range(count)]

    def pairs() -> list[PairExample]:
        # What a pair's sequences share is computed once; the plan counts as if they shared nothing.
        def one(tokens: int) -> tuple[int, ...]:
            return _ids(generator, vocabulary, tokens)

        rest = shape["tokens"] - 1
        return [PairExample(one(1), one(rest - 1), one(rest)) for _ in range(count)]

    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="srlm-lite-bench-") as folder:
        scratch = Path(folder)
        if one.kind == "sft":
            is_anchor = one.section == Anchor.section
            train_sft(
                slot,
                base,
                anchor if is_anchor else delta,
                examples(),
                below=[] if is_anchor else [anchor],
                optim=optim,
                dropout=recipe.anchor.lora.dropout if is_anchor else 0.0,
                scratch=scratch,
                seed=0,
            )
        elif one.kind == "reward":
            train_reward(
                slot,
                base,
                anchor=[anchor],
                adapter=delta,
                pairs=pairs(),
                optim=optim,
                scratch=scratch,
                seed=0,
            )
        else:
            train_dpo(
                slot,
                base,
                anchor=[anchor],
                delta=delta,
                reference=[anchor, delta],
                pairs=pairs(),
                dpo=optim.model_copy(update={"nll_weight": 0.0}),
                scratch=scratch,
                seed=0,
            )
    trained = STEPS * batches * shape["sequences"] * shape["tokens"]
    return _measured(libraries, begin, trained, base.device.type)


def _export(job: PhaseJob) -> dict[str, Any]:
    from srlm_lite.model import parity
    from srlm_lite.model.base import base_files, empty_model
    from srlm_lite.model.checkpoint import Checkpoint
    from srlm_lite.model.layout import Layout
    from srlm_lite.model.merge import base_weights, plan, write

    libraries = status_bytes("VmRSS")
    recipe = job.recipe
    folder = base_files(recipe.base).folder
    model = empty_model(folder)
    stack = [
        _random_adapter(model, lora.targets, rank, lora.alpha)
        for lora, rank in (
            (recipe.anchor.lora, job.anchor_rank),
            (recipe.dpo.lora, recipe.dpo.lora.rank),
        )
    ]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="srlm-lite-bench-") as out:
        layout = Layout(Checkpoint(folder), model)
        weights = base_weights(layout, recipe.base, model, nf4=False)
        write(plan(layout, stack, dtype=None), weights, Path(out))
        export = Layout(Checkpoint(Path(out)), model)
        check = parity.TensorCheck(layout, stack, export)
        texts = [list(range(7 * i, 7 * i + 48)) for i in range(6)]
        ours, _ = parity.logits(
            model, check.reading(weights.read), texts, stacks=[stack, stack[:-1]]
        )
        check.rest(weights.read)
        (theirs,) = parity.logits(model, export.read, texts)
        parity.compare(ours, theirs)
    return _measured(libraries, begin, 0, "cpu")


def _random_adapter(model: Any, targets: Sequence[str], rank: int, alpha: float) -> Any:
    from srlm_lite.model.stack import Adapter

    generator = torch.Generator().manual_seed(0)
    factors = {
        name: (
            torch.randn(rank, module.in_features, generator=generator),
            torch.randn(module.out_features, rank, generator=generator) * 1e-3,
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets
    }
    return Adapter(rank=rank, alpha=alpha, factors=factors)
