"""`srlm-lite plan`, and what `iterate` asks of it before it writes anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import typer

from srlm_lite.cli.tables import plain_table
from srlm_lite.cli.wrapping import columns, fitted
from srlm_lite.hardware import Gpu, choose_recipe, pick_recipe
from srlm_lite.planning.machine import (
    SHARDING,
    plan_for,
    remade,
    settings_that_fit,
    spread,
)
from srlm_lite.planning.plan import PARTS, Hardware, Plan, needs_sharding, parse_gpus
from srlm_lite.planning.room import Room, room_for, unjudged
from srlm_lite.planning.times import (
    Known,
    Other,
    Time,
    by_devices,
    in_words,
    other_engines,
    times_of,
    total,
)
from srlm_lite.recipe import load_recipe

_HEADS = {
    "adapters": "adapt.",
    "optimizer": "optim.",
    "activations": "activ.",
    "kv_cache": "KV",
    "libraries": "libs.",
}
Advice = tuple[list[str], bool]
"""Settings with which more fits, and whether all then does."""

_WIDE = 120
"""Columns of a terminal that hold the whole table; in a narrower one it comes in two."""


def run_plan(
    *, recipe_name: str | None, overrides: Sequence[str], gpus: str | None, as_json: bool
) -> None:
    """Print what a recipe needs, phase by phase."""
    hardware = parse_gpus(gpus) if gpus is not None else None
    if recipe_name is None:
        recipe_name, why = pick_recipe() if hardware is None else recipe_for(hardware)
        typer.echo(f"recipe {recipe_name}: {why}", err=True)
    plan = plan_for(load_recipe(recipe_name, overrides), hardware)
    times, advice, room = times_of(plan), settings_that_fit(plan), room_for(plan.recipe)
    brings = Brings(by_devices(plan), other_engines(plan, lambda one: remade(plan, one)))
    if as_json:
        row = {**_row(plan, times, advice, brings), "room": _room_row(room)}
        typer.echo(json.dumps(row, indent=2, ensure_ascii=False))
        return
    typer.echo(plan_text(plan, times, advice, room, brings=brings, width=columns()))


def recipe_for(hardware: Hardware) -> tuple[str, str]:
    """The recipe for GPUs that are asked about, and why."""
    asked = Gpu(hardware.name, hardware.memory / 1e9)
    return choose_recipe([asked] * hardware.count, where="")


@dataclass(frozen=True, slots=True)
class Brings:
    """What more devices and other engines bring."""

    by_devices: Mapping[int, float]
    """Seconds by the number of devices."""
    others: Sequence[Other]


def _row(plan: Plan, times: Mapping[str, Time], advice: Advice, brings: Brings) -> dict[str, Any]:
    changes, suffice = advice
    return {
        "recipe": plan.recipe.name,
        "base": plan.recipe.base.name,
        "parameters": plan.shape.parameters,
        "hardware": {
            "device": plan.hardware.device,
            "name": plan.hardware.name,
            "count": plan.hardware.count,
            "memory_bytes": plan.hardware.memory,
        },
        "phases": {
            phase.name: {
                "bytes": phase.total,
                "parts": dict(phase.parts),
                "fits": plan.fits(phase),
                "on_host": phase.on_host,
                "tokens": phase.tokens,
                "seconds": times[phase.name].seconds if phase.name in times else None,
                "time": _time_row(times.get(phase.name)),
                "batch": dict(phase.shape),
            }
            for phase in plan.phases
        },
        "not_in_4_bits_bytes": dict(plan.not_in_4_bits),
        "disk_bytes": dict(plan.disk),
        "fits": all(plan.fits(phase) for phase in plan.phases),
        "change": list(changes),
        "change_suffices": suffice,
        "devices_for_the_base": needs_sharding(plan) or 1,
        "seconds_by_gpus": {str(count): s for count, s in brings.by_devices.items()},
        "other_engines": [asdict(one) for one in brings.others],
    }


def _time_row(time: Time | None) -> dict[str, Any] | None:
    return None if time is None else {"known": time.known, "source": time.source}


def _room_row(room: Room | None) -> dict[str, Any] | None:
    """Tokens of prompt and reply together, sampled and judged; None of a judge behind a server."""
    if room is None:
        return None
    return {
        "sampled": room.sampled,
        "judged": room.judged,
        "rubric": room.rubric,
        "counted": room.exact,
        "fits": not room.missing,
    }


def plan_text(
    plan: Plan,
    times: Mapping[str, Time],
    advice: Advice,
    room: Room | None = None,
    *,
    brings: Brings | None = None,
    width: int | None = None,
) -> str:
    """All of it for a person.

    Args:
        brings: What more devices and other engines bring.
        room: What the window leaves for prompt and reply, where that is known.
        width: Columns of the terminal; None: no line is broken.
    """
    changes, suffice = advice
    on_host = any(phase.on_host for phase in plan.phases)
    disk = ", ".join(f"{name} {count / 1e9:.1f}" for name, count in plan.disk.items())
    kind = "" if plan.recipe.base.quantization == "none" else f"{plan.recipe.base.quantization}, "
    size = f"{plan.shape.parameters / 1e9:.2f}B parameters"
    each = ", each process on one of them" if plan.hardware.count > 1 else ""
    head = (
        f"{plan.recipe.name}: {plan.recipe.base.name}, {size}, {kind}{8 * plan.itemsize} bit; on "
        f"{plan.hardware}{each}"
    )
    lines = [
        "GB at the longest that window and data admit, predicted from shapes; tokens at most, of "
        "the whole run, votes asked again apart",
        *_out_of_reach(plan),
        *_too_long_to_judge(room),
        *(["export runs on the machine, not on the device"] if on_host else []),
        *_about_times(plan, times),
        *([] if brings is None else _brought(plan, times, brings)),
        f"disk, GB: {disk}",
    ]
    if changes and suffice:
        lines.append("to make all of it fit: " + " ".join(f"--set {one}" for one in changes))
    elif not suffice:
        wanted = needs_sharding(plan)
        lines.append(
            f"one device cannot hold the base; spread over {wanted} or more it may fit"
            if wanted
            else "no setting makes all of it fit: take a smaller base or a larger device"
        )
        if wanted and plan.hardware.count > 1:
            lines.append(_sharding(plan))
    return "\n".join(
        [
            fitted(head, width),
            *_tables(plan, times, width=width),
            "",
            *(fitted(line, width) for line in lines),
        ]
    )


def _out_of_reach(plan: Plan) -> list[str]:
    """What of a base in NF4 stays in 16 bits or more, and what that costs."""
    parts = plan.not_in_4_bits
    if not parts:
        return []
    named = ", ".join(
        f"{name} {count / 1e9:.2f}{_WHY_NOT.get(name, '')}"
        for name, count in parts.items()
        if count
    )
    return [
        f"of the base, {sum(parts.values()) / 1e9:.2f} GB are out of NF4's reach and keep "
        f"{8 * plan.itemsize} bits: {named}"
    ]


_WHY_NOT = {
    "fused experts": " (transformers keeps all experts of a layer in one tensor, and bitsandbytes "
    "rounds linear layers alone)"
}


def _too_long_to_judge(room: Room | None) -> list[str]:
    found = None if room is None else unjudged(room)
    return [] if found is None else [". ".join(found)]


def _tables(plan: Plan, times: Mapping[str, Time], *, width: int | None) -> list[str]:
    """Bytes by part, tokens and time of each phase: one table, or two narrow ones."""
    names, memory, work = [], [], []
    for phase in plan.phases:
        names.append(phase.name)
        cells = [_gigabytes(phase.parts.get(part, 0)) for part in PARTS]
        verdict = "-" if phase.on_host else "yes" if plan.fits(phase) else "NO"
        memory.append([*cells, _gigabytes(phase.total), verdict])
        tokens = "-" if phase.tokens is None else f"{phase.tokens:,}" if phase.tokens else ""
        time = times.get(phase.name)
        work.append(
            [
                tokens,
                _duration(None if time is None else time.seconds),
                "" if time is None else time.known,
            ]
        )
    parts = [_HEADS.get(part, part) for part in PARTS]
    if width is not None and width < _WIDE:
        return [
            plain_table(
                ["phase, GB", *parts, "total", "fits"],
                [[name, *cells] for name, cells in zip(names, memory, strict=True)],
                width=width,
            ),
            plain_table(
                ["phase", "tokens", "time", "which is"],
                [[name, *cells] for name, cells in zip(names, work, strict=True)],
                width=width,
            ),
        ]
    rows = [[a, *b, *c] for a, b, c in zip(names, memory, work, strict=True)]
    heads = ["phase", *parts, "total GB", "fits", "tokens", "time", "which is"]
    return [plain_table(heads, rows, width=width)]


def _sharding(plan: Plan) -> str:
    """What becomes of the plan where the processes share one base."""
    spread_out = spread(plan)
    changes, suffice = settings_that_fit(spread_out)
    worst = max((p for p in spread_out.phases if not p.on_host), key=lambda phase: phase.total)
    peak = f"{worst.name} needs most, {worst.total / 1e9:.1f} GB on each"
    settings = "".join(f" --set {one}" for one in changes)
    if not suffice:
        verdict = f"does not fit either ({peak}): take more or larger GPUs, or a smaller base"
    else:
        verdict = f"fits with{settings}" if changes else f"fits ({peak})"
    return (
        f"spread over all {plan.hardware.count} (accelerate launch --config_file "
        f"recipes/accelerate/{SHARDING}) it {verdict}"
    )


def _about_times(plan: Plan, times: Mapping[str, Time]) -> list[str]:
    """Where the times are from, phases of one source together."""
    sources: dict[tuple[Known, str], list[str]] = {}
    for name, time in times.items():
        sources.setdefault((time.known, time.source), []).append(name)
    lines = [
        f"{', '.join(names)}: {known}{_JOINED[known]}{source}"
        for (known, source), names in sources.items()
    ]
    nothing = all(time.seconds is None for time in times.values())
    return [f"time of {line}" for line in lines] + ([_NO_RATES] if nothing else [])


_JOINED: Mapping[Known, str] = {"measured": ", ", "scaled": " from ", "unknown": ": "}

_NO_RATES = (
    "`srlm-lite bench plan` measures the rates of this machine; those of some GPUs are known by "
    "name, such as --gpus 8xH100"
)


def _brought(plan: Plan, times: Mapping[str, Time], brings: Brings) -> list[str]:
    """What the known phases take together: here, on more or fewer devices, with other engines."""
    now, missing = total(times)
    if not now:
        return []
    apart = f", {', '.join(missing)} apart" if missing else ""
    counts = ", ".join(
        f"{count}: {_duration(seconds)}" for count, seconds in brings.by_devices.items()
    )
    by_number = f"; by number of GPUs: {counts}" if counts else ""
    lines = [f"in all {_duration(now)}{apart}{by_number}"]
    for one in brings.others:
        said = one.why if one.seconds is None else f"{_duration(one.seconds)} in all"
        lines.append(f"with {one.setting}: {said}")
    return lines


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}" if count >= 5_000_000 else ""


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else in_words(seconds)
