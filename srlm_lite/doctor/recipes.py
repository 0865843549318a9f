"""What each recipe lacks here, and whether its plan fits this machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from srlm_lite.doctor.finding import Finding, State
from srlm_lite.engines import engines_of
from srlm_lite.errors import UserError
from srlm_lite.planning.machine import plan_for, shortfall
from srlm_lite.planning.memory import Shape
from srlm_lite.planning.plan import Plan
from srlm_lite.planning.probe import shape_of_base
from srlm_lite.planning.room import room_for, unjudged
from srlm_lite.recipe import Recipe, load_recipe, shipped_recipes
from srlm_lite.settings import Base
from srlm_lite.tracking import missing

SLOW_ON_CPU = 1_000_000_000
"""Parameters from which a recipe's tokens take a CPU weeks."""


def recipe_findings(names: list[str] | None = None) -> list[Finding]:
    """One finding for each recipe; by default the shipped ones."""
    return [recipe_finding(load_recipe(name)) for name in names or shipped_recipes()]


def recipe_finding(recipe: Recipe) -> Finding:
    """Whether a recipe could start, and if not, what stands in its way."""
    lacks: list[tuple[State, str, str | None]] = []
    here, why, way_out = _base(recipe.base)
    if why is not None:  # in words that recipes share, which then stand in one line
        told = why.replace(recipe.base.name, "its base", 1)
        lacks.append(("bad", told, way_out))
    elif not here:
        lacks.append(("warning", "its base will be downloaded", None))
    for engine in engines_of(recipe):
        try:
            engine.check(recipe)
        except UserError as error:
            lacks.append(("bad", error.what, error.way_out))
    if trackers := missing(recipe.tracking.report_to):
        lacks.append(
            ("bad", f"not installed: {', '.join(trackers)}", "pip install 'srlm-lite[tracking]'")
        )
    room = room_for(recipe)
    long = None if room is None else unjudged(room)
    if long is not None:
        lacks.append(("warning", *long))
    if not Path(recipe.data.dir).is_dir():
        way_out = "srlm-lite data prepare makes it"
        lacks.append(("warning", f"its data directory, {recipe.data.dir}, is not here", way_out))
    plan = _plan(recipe)
    if plan is not None:
        short = shortfall(plan)
        if short is not None:
            lacks.append(("bad", f"its {short.phase} does not fit", short.way_out))
        elif plan.hardware.device == "cpu" and plan.shape.parameters > SLOW_ON_CPU:
            lacks.append(("warning", "a CPU is too slow for it", None))
    if long is not None and any(state == "bad" for state, _, _ in lacks):
        lacks.remove(("warning", *long))  # it is of a run, and there can be none
    facts = _facts(plan)
    if not lacks:
        return Finding("ok", recipe.name, "ready", facts=facts)
    worst: State = "bad" if any(state == "bad" for state, _, _ in lacks) else "warning"
    ways = [way for _, _, way in lacks if way]
    text = "; ".join(what for _, what, _ in lacks)
    return Finding(worst, recipe.name, text, ". ".join(ways) or None, facts)


def _plan(recipe: Recipe) -> Plan | None:
    """What the recipe takes here; None where nothing is known of its base."""
    shape = _shape(recipe.base)
    return None if shape is None else plan_for(recipe, shape=shape)


def _facts(plan: Plan | None) -> dict[str, object] | None:
    if plan is None:
        return None
    return {
        "peak_bytes": plan.peak,
        "memory_bytes": plan.hardware.memory,
        "device": plan.hardware.device,
        "fits": not plan.impossible(),
    }


@cache
def _shape(section: Base) -> Shape | None:
    try:
        return shape_of_base(section)
    except UserError:
        return None


@cache
def _base(section: Base) -> tuple[bool, str | None, str | None]:
    """Whether a base is here; what stands in its way, and the way out."""
    from srlm_lite.model.base import base_is_here

    try:
        return base_is_here(section), None, None
    except UserError as error:
        return False, error.what, error.way_out
