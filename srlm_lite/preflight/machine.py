"""The machine and what lies on it: the run's directory, processes, memory, disk, packages."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from srlm_lite.engines import engines_of, kind_of
from srlm_lite.errors import UserError
from srlm_lite.forms import form_of
from srlm_lite.hardware import amount
from srlm_lite.planning.machine import shortfall
from srlm_lite.planning.times import in_words, times_of, total
from srlm_lite.preflight.launch import Launch, Seen
from srlm_lite.session import refuse_several, refuse_sharding
from srlm_lite.settings import LORA_TARGETS
from srlm_lite.tracking import check_installed


def glance(launch: Launch) -> Seen:
    """What of `directory` shows at once."""
    if launch.run is None:
        return Seen("none named", asked=False)
    launch.run.glance(launch.recipe, fresh=launch.fresh)
    return Seen("can be written")


def directory(launch: Launch) -> Seen:
    """That the run can begin in its directory, or go on there."""
    if launch.run is None:
        return Seen("none named", asked=False)
    glance(launch)
    launch.run.check(launch.recipe, fresh=launch.fresh)
    if launch.begun is None:
        return Seen("a new run")
    done = launch.begun.last_done()
    return Seen(f"goes on after iteration {done}" if done else "goes on")


def processes(launch: Launch) -> Seen:
    """That the method and the engines can do with so many processes, or with a spread base."""
    recipe, world = launch.recipe, launch.processes
    refuse_several(recipe, world)
    if launch.sharded:
        refuse_sharding(recipe)
    chunks = -(-recipe.prompts.per_iteration // recipe.rollout.chunk_prompts)
    if world > 1 and chunks < world:
        idle = (
            f"{world} processes, but an iteration's prompts are {chunks} chunks of "
            f"rollout.chunk_prompts = {recipe.rollout.chunk_prompts}: lower it to employ all"
        )
        return Seen(str(world), (idle,))
    return Seen(str(world))


def tracking(launch: Launch) -> Seen:
    """That every tracker is installed."""
    named = launch.recipe.tracking.report_to
    check_installed(named)
    return Seen(", ".join(named) or "none named", asked=bool(named))


def server(launch: Launch) -> Seen:
    """That the servers of the run's engines are there, and tell probabilities if it needs them."""
    recipe = launch.recipe
    asked = [kind.reach for kind in engines_of(recipe) if kind.reach is not None]
    if not asked:
        return Seen("none is asked", asked=False)
    found = ", ".join(reach(recipe) for reach in asked)
    tells = kind_of(recipe, "judge").tells_probabilities
    if form_of(recipe).weighs and tells is not None:
        tells(recipe)
        found += ", and tells probabilities"
    return Seen(found)


def memory(launch: Launch) -> Seen:
    """That the plan's phases fit the memory; says nothing where the base's shape is not known."""
    if not launch.planned:
        return Seen("not asked (--no-plan)", asked=False)
    try:
        plan = launch.plan
    except UserError as error:
        if error.where == LORA_TARGETS:
            raise
        return Seen("not known before the base is loaded", asked=False)
    missing = shortfall(plan)
    if missing is not None:
        raise UserError(
            missing.what,
            where=f"recipe {launch.recipe.name}",
            way_out=f"{missing.way_out}; --no-plan runs it all the same",
        )
    text = f"{plan.peak / 1e9:.1f} GB at most, of {plan.usable / 1e9:.1f} GB"
    tight = [phase.name for phase in plan.phases if not plan.fits(phase)]
    warnings = (f"smaller batches than planned make these fit: {', '.join(tight)}",)
    return Seen(text, warnings if tight else ())


def time(launch: Launch) -> Seen:
    """How long the run takes at most, as far as rates of this device, or of others, are known."""
    try:
        plan = launch.plan
    except UserError:
        return Seen("not known before the base is loaded", asked=False)
    times = times_of(replace(plan, hardware=replace(plan.hardware, count=launch.processes)))
    seconds, missing = total(times)
    if not seconds:
        return Seen("unknown: no rate of this device is known", asked=False)
    apart = f", {', '.join(missing)} apart" if missing else ""
    scaled = any(one.known == "scaled" for one in times.values())
    how = (
        "scaled from what was measured elsewhere" if scaled else "at rates measured on this device"
    )
    return Seen(f"{in_words(seconds)} at most{apart}, {how} (srlm-lite plan says by what)")


def disk(launch: Launch) -> Seen:
    """That the adapters that are to come find room where the run lies."""
    try:
        plan = launch.plan
    except UserError:
        return Seen("not known before the base is loaded", asked=False)
    recipe, place = launch.recipe, Path.cwd() if launch.run is None else launch.run.path.absolute()
    free = shutil.disk_usage(next(one for one in (place, *place.parents) if one.is_dir())).free
    there = 0 if launch.begun is None else launch.begun.last_done()
    rank = plan.anchor_rank + recipe.dpo.lora.rank
    adapters = 4 * plan.shape.adapter_parameters(recipe.targets, rank)
    wanted = (recipe.iterations + 1 - there) * adapters
    if there < recipe.iterations and free < wanted:
        raise UserError(
            f"{amount(free)} are free, and the adapters take {amount(wanted)}",
            where=str(place),
            way_out="Make room, or choose another directory for --adapters",
        )
    text = f"{free / 1e9:.1f} GB free, {plan.disk['run'] / 1e9:.1f} GB for the run"
    if free < plan.disk["run"]:
        return Seen(text, (f"{text}: it may not suffice",))
    return Seen(text)
