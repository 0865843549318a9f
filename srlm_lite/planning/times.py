"""How long each phase takes, before the run: at rates measured on its device, or scaled from those.

What a user has measured with `srlm-lite bench plan` comes first. `measured.json` has what was
measured elsewhere, in tokens a second: text drawn after a prompt, prompts read, sequences trained
on. Where the device, the base or the batch is another one, the nearest of these is scaled by what
bounds the work at best (Williams et al. 2009, "Roofline"):

    drawing    by the memory's bandwidth and the size of the base
    reading    by FLOP/s and the size of the base
    training   by FLOP/s and the size of the base

and never upwards: sampling and single pairs are bound by the launching of kernels, which no
bandwidth hastens. (An H200 has 1.43 times the bandwidth of an H100, and drew 1.05 to 1.16 times as
fast.) A smaller batch takes as long as the one that was measured. Unknown are bases more than ten
times larger or smaller than any that was measured, other weights, engines and dtypes, and a base
that is spread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from srlm_lite.engines import ENGINES
from srlm_lite.planning.gpus import GpuModel, known_gpu
from srlm_lite.planning.plan import HERE, Phase, Plan, with_settings
from srlm_lite.planning.rates import rates_folder, rates_of
from srlm_lite.recipe import Recipe
from srlm_lite.rollout.sizes import PREFILL_TOKENS

Known = Literal["measured", "scaled", "unknown"]
Work = Literal["draw", "read", "train"]
FARTHEST = 10.0
"""Times as large, or as small, as a measured base one may be."""
_SHIPPED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True, slots=True)
class Time:
    """How long a phase takes, and how that is known."""

    seconds: float | None
    known: Known
    source: str
    """What was measured and by what it was scaled; of an unknown time, what is missing."""


@dataclass(frozen=True, slots=True)
class MeasuredRate:
    """Tokens a second of one kind of work, as measured somewhere.

    `at_once` are the sequences drawn at the same time, or the tokens in memory. `weights` are
    `nf4`, or `folded`: NF4 with a copy in 16 bits that has the stack in it.
    """

    gpu: str
    date: str
    base: str
    parameters: int
    weights: str
    work: Work
    at_once: int
    tokens_per_s: float
    source: str
    """Where the figure stands, and what was done."""

    def __str__(self) -> str:
        return f"{self.base} on {self.gpu}, {self.date}"


@lru_cache
def shipped_rates() -> tuple[MeasuredRate, ...]:
    """What comes with the package."""
    return tuple(MeasuredRate(**row) for row in json.loads(_SHIPPED.read_text(encoding="utf-8")))


def times_of(plan: Plan) -> dict[str, Time]:
    """The time of each phase that has one; loading and the export are not counted."""
    own = rates_of(rates_folder(), plan.recipe, device=_device(plan), itemsize=plan.itemsize)
    return {
        phase.name: _time(plan, phase, own)
        for phase in plan.phases
        if phase.tokens != 0 and phase.name != "export"
    }


def _device(plan: Plan) -> str:
    from srlm_lite.hardware import device_name

    return device_name("cpu") if plan.hardware.device == "cpu" else plan.hardware.name


def _time(plan: Plan, phase: Phase, own: tuple[Mapping[str, float], str] | None) -> Time:
    if phase.tokens is None:
        return _unknown("the data is not here to count its tokens")
    if not plan.fits(phase):
        return _unknown("does not fit")
    if plan.hardware.shards > 1:
        return _unknown("nothing was measured on a base that is spread")
    if phase.engine not in ("", HERE.name):
        return _unknown(f"no rate of the engine {phase.engine} was measured")
    # What a user's own measurement ran is the plan's batch, the reading of its prompts included.
    rate = None if own is None else own[0].get(phase.name, own[0].get(phase.like))
    if own is not None and rate:
        return _shared(plan, phase, phase.tokens / rate, "measured", [f"your own, {own[1]}"])
    gpu = known_gpu(plan.hardware.name)
    if gpu is None and own is not None:
        return _unknown("`srlm-lite bench plan` has not measured this phase here")
    if gpu is None:
        return _unknown("no rate was measured on this device, and it is none that is known by name")
    return _by_shipped_rates(plan, phase, gpu)


def _by_shipped_rates(plan: Plan, phase: Phase, gpu: GpuModel) -> Time:
    recipe = plan.recipe
    if recipe.base.quantization != "nf4" or plan.itemsize != 2:
        return _unknown("rates were measured in NF4 with 16 bits alone")
    if plan.shape.experts:
        return _unknown("no mixture of experts was measured")
    if phase.trains is not None and (phase.trains.kind not in ("sft", "dpo")):
        return _unknown("no rate of this training was measured")
    if phase.trains is not None and recipe.base.backend != HERE.name:
        return _unknown(f"no rate of {recipe.base.backend} was measured")
    works: Sequence[tuple[Work, int, int]]
    if phase.trains is not None:
        at_once = phase.shape["sequences"] * phase.shape["tokens"]
        works = [("train", phase.tokens or 0, at_once)]
    else:
        works = [
            ("draw", phase.tokens or 0, phase.shape["batch_rows"]),
            ("read", phase.read or 0, PREFILL_TOKENS),
        ]
    seconds, known, notes = 0.0, "measured", list[str]()
    for work, tokens, at_once in works:
        found = _nearest(plan, gpu, work, at_once)
        if found is None:
            return _unknown("no base of about this size was measured")
        factor, reasons = _scaled(plan, gpu, found, at_once)
        if phase.trains is not None and phase.trains.kind == "sft":
            reasons = [*reasons, "a token of SFT as one of DPO"]
        seconds += tokens / (found.tokens_per_s * factor)
        known = "scaled" if reasons else known
        note = f"{found}{': ' if reasons else ''}{', '.join(reasons)}"
        if note not in notes:
            notes.append(f"prompts read as {note}" if work == "read" else note)
    return _shared(plan, phase, seconds, "scaled" if known == "scaled" else "measured", notes)


def _nearest(plan: Plan, gpu: GpuModel, work: Work, at_once: int) -> MeasuredRate | None:
    """By base, then by device, then by batch."""
    folded = plan.recipe.rollout.fold and work == "draw"
    fit = [
        rate
        for rate in shipped_rates()
        if rate.work == work
        and rate.weights == ("folded" if folded else "nf4")
        and _apart(rate.parameters, plan.shape.parameters) <= math.log(FARTHEST)
    ]

    def distance(rate: MeasuredRate) -> tuple[float, float, float]:
        return (
            _apart(rate.parameters, plan.shape.parameters),
            _apart(_bound(rate, gpu, work), 1.0),
            _apart(rate.at_once, at_once),
        )

    return min(fit, key=distance, default=None)


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b)) if a and b else math.inf


def _bound(rate: MeasuredRate, gpu: GpuModel, work: Work) -> float:
    """How many times as fast a GPU is as that of a measurement, by what bounds the work."""
    measured = known_gpu(rate.gpu)
    if measured is None:
        raise ValueError(f"{rate.gpu} is not in the table of GPUs")
    if work == "draw":
        return gpu.bandwidth / measured.bandwidth
    return gpu.flops / measured.flops


def _scaled(plan: Plan, gpu: GpuModel, rate: MeasuredRate, at_once: int) -> tuple[float, list[str]]:
    """The factor from a measured rate to that of the plan, and by what in words."""
    factor, reasons = 1.0, []
    if gpu.name != rate.gpu:
        faster = _bound(rate, gpu, rate.work)
        factor *= min(1.0, faster)
        by = "bandwidth" if rate.work == "draw" else "FLOP/s"
        same = "of the same" if faster == 1 else "no faster for its"
        reasons.append(f"{by} x{faster:.2f}" if faster < 1 else f"{same} {by}")
    if plan.shape.parameters != rate.parameters:
        smaller = rate.parameters / plan.shape.parameters
        factor *= min(1.0, smaller)
        reasons.append(f"weights x{smaller:.2f}" if smaller < 1 else "no faster for fewer weights")
    if at_once < rate.at_once:
        factor *= at_once / rate.at_once
        reasons.append(f"batch x{at_once / rate.at_once:.2f}")
    return factor, reasons


def _shared(plan: Plan, phase: Phase, seconds: float, known: Known, notes: list[str]) -> Time:
    """The same where several processes share the phase."""
    faster = speedup(phase, plan.hardware.count)
    if faster > 1:
        known, notes = "scaled", [*notes, f"shared by {plan.hardware.count} GPUs x{faster:.1f}"]
    return Time(seconds / faster, known, "; ".join(notes))


def speedup(phase: Phase, devices: int) -> float:
    """How many times as fast a phase is on several devices, by how its work is dealt out."""
    return phase.shares / math.ceil(phase.shares / devices)


def _unknown(why: str) -> Time:
    return Time(None, "unknown", why)


def by_devices(plan: Plan) -> dict[int, float]:
    """Seconds of all phases whose time is known, by the number of devices; the plan's own included.

    Empty where none is known, or where the base has to be spread.
    """
    if plan.hardware.device == "cpu" or plan.hardware.shards > 1:
        return {}
    found = {}
    for count in sorted({*_COUNTS, plan.hardware.count}):
        hardware = replace(plan.hardware, count=count)
        found[count], _ = total(times_of(replace(plan, hardware=hardware)))
    return found if any(found.values()) else {}


_COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Other:
    """Another way to sample, and what it brings."""

    setting: str
    """`key=value`."""
    seconds: float | None
    """The sum over the phases whose time is known; None: unknown."""
    why: str = ""
    """Where it is unknown, or no way at all."""


def other_engines(plan: Plan, remake: Callable[[Recipe], Plan]) -> list[Other]:
    """What the other ways to sample would take, in all phases whose time is known."""
    if plan.hardware.device == "cpu" or plan.hardware.shards > 1:
        return []
    now, missing = total(times_of(plan))
    if not now:
        return []
    folds = not plan.recipe.rollout.fold
    setting = f"rollout.fold={str(folds).lower()}"
    tried = remake(with_settings(plan.recipe, {"rollout.fold": folds}))
    fitting = {phase.name for phase in plan.phases if plan.fits(phase)}
    tight = [phase for phase in tried.phases if not tried.fits(phase) and phase.name in fitting]
    then, unknown = total(times_of(tried))
    if tight:
        most = max(tight, key=lambda phase: phase.total)
        found = [Other(setting, None, f"does not fit: {most.name} needs {most.total / 1e9:.0f} GB")]
    elif set(unknown) != set(missing):
        found = [Other(setting, None, f"unknown, {times_of(tried)[unknown[0]].source}")]
    else:
        found = [Other(setting, then)]
    others = (
        kind
        for kind in ENGINES.values()
        if kind.name not in (HERE.name, plan.recipe.rollout.engine)
    )
    return found + [
        Other(f"rollout.engine={kind.name}", None, "unknown, no rate of it was measured")
        for kind in others
        if kind.holds_base
    ]


def total(times: Mapping[str, Time]) -> tuple[float, list[str]]:
    """Seconds of all phases that are known, and the names of the others."""
    missing = [name for name, time in times.items() if time.seconds is None]
    return sum(time.seconds or 0.0 for time in times.values()), missing


def in_words(seconds: float) -> str:
    """Hours, minutes or seconds, whichever fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
