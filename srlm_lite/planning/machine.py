"""A plan for this machine, or for another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.hardware import gpus, machine_memory
from srlm_lite.planning.gpus import known_gpu
from srlm_lite.planning.lengths import Lengths, lengths_of
from srlm_lite.planning.memory import LIBRARIES, Held, Shape, loading
from srlm_lite.planning.plan import (
    Hardware,
    Plan,
    advice,
    make_plan,
    needs_sharding,
)
from srlm_lite.planning.probe import probe, refuse_unknown, shape_in_table, shape_of_base
from srlm_lite.planning.shapes import SHAPES
from srlm_lite.recipe import Recipe
from srlm_lite.settings import Shared

SHARDING = "fsdp2-qlora.yaml"
"""The configuration of accelerate that spreads a base."""


def hardware_found(recipe: Shared) -> Hardware:
    """What the recipe would run on here: the GPUs, or the machine's memory."""
    found = [] if recipe.base.device == "cpu" else gpus()
    if found:
        smallest = min(found, key=lambda gpu: gpu.gigabytes)
        return Hardware("cuda", smallest.name, int(smallest.gigabytes * 1e9), len(found))
    return Hardware("cpu", "CPU", machine_memory())


def plan_for(
    recipe: Recipe,
    hardware: Hardware | None = None,
    *,
    shape: Shape | None = None,
    lengths: Lengths | None = None,
) -> Plan:
    """What a recipe needs on this machine, or on other hardware.

    Raises:
        UserError: Nothing is known of the base's shape, or a LoRA target is not of it.
    """
    if shape is None:
        from srlm_lite.model.layer_names import refuse_absent_layers, refuse_names_unknown_to

        refuse_unknown(recipe.base)
        if (known := shape_in_table(recipe.base)) is None:
            refuse_absent_layers(recipe.base, recipe.targets)
        else:
            refuse_names_unknown_to(SHAPES[known].get("model_type", "llama"), recipe.targets)
    hardware = hardware or hardware_found(recipe)
    return make_plan(
        recipe,
        shape or shape_of_base(recipe.base, recipe.targets),
        hardware,
        lengths or lengths_of(recipe),
        itemsize=_itemsize(recipe, hardware),
        anchor_rank=_shipped_rank(recipe),
    )


def spread(plan: Plan) -> Plan:
    """The same with the base spread over all devices there are (FSDP2)."""
    hardware = replace(plan.hardware, shards=plan.hardware.count)
    return plan_for(plan.recipe, hardware, shape=plan.shape, lengths=plan.lengths)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Why a recipe cannot run on its hardware, and what could be done about it."""

    phase: str
    what: str
    way_out: str


def shortfall(plan: Plan) -> Shortfall | None:
    """What stands in the way of a plan; None where every phase can be made to fit by itself."""
    impossible = plan.impossible()
    if not impossible:
        return None
    worst = max(impossible, key=lambda phase: phase.total)
    changes, suffice = settings_that_fit(plan)
    devices = needs_sharding(plan)
    if suffice:
        way_out = "Try " + " ".join(f"--set {change}" for change in changes)
    elif devices:
        way_out = (
            f"The base alone wants {devices} such devices, over which FSDP2 spreads it "
            f"(recipes/accelerate/{SHARDING})"
        )
    else:
        way_out = "Name a smaller base, or a machine with more memory"
    what = (
        f"the phase {worst.name} needs {worst.total / 1e9:.1f} GB at its longest, and there are "
        f"{plan.usable / 1e9:.1f} GB"
    )
    return Shortfall(worst.name, what, way_out)


def refuse_base(settings: Any, *, itemsize: int, where: str) -> None:
    """Stop before a base in NF4 fills this machine's memory: no error would come of that.

    Args:
        settings: The base's configuration.
        itemsize: Bytes of the compute dtype.
        where: What named the base.

    Raises:
        UserError: The base alone takes more than there is.
    """
    held = Held(probe(settings), nf4=True, itemsize=itemsize, device="cpu", targets=(), rank=0)
    needed = sum(loading(held).values()) + LIBRARIES["cpu"]["sampling"]
    there = machine_memory()
    if needed > there:
        raise UserError(
            f"the base in NF4 takes {needed / 1e9:.1f} GB while it is built, and this machine has "
            f"{there / 1e9:.1f} GB",
            where=where,
            way_out="Name a smaller shape",
        )


def settings_that_fit(plan: Plan) -> tuple[list[str], bool]:
    """Settings, as `key=value`, with which more fits this hardware, and whether all then does."""
    return advice(plan, lambda recipe: remade(plan, recipe))


def remade(plan: Plan, recipe: Recipe) -> Plan:
    """The plan of another recipe with the same base on the same hardware."""
    return plan_for(recipe, plan.hardware, shape=plan.shape)


def _itemsize(recipe: Shared, hardware: Hardware) -> int:
    if recipe.base.dtype != "auto":
        return 4 if recipe.base.dtype == "float32" else 2
    if hardware.device == "cuda":
        gpu = known_gpu(hardware.name)
        return 2 if gpu is None or gpu.flops else 4  # without bfloat16 in float32
    from srlm_lite.model.device import compute_dtype

    return compute_dtype(recipe.base.model_copy(update={"device": "cpu"})).itemsize


def _shipped_rank(recipe: Shared) -> int | None:
    if recipe.anchor.init == "base":
        return None
    try:
        path = Path(recipe.anchor.init) / "adapter_config.json"
        settings: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8"))
        return int(str(settings["r"]))
    except (OSError, ValueError, KeyError):
        return recipe.anchor.lora.rank  # what is wrong with it, its loading says
