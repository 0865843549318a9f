"""The prompts of an iteration: a slice of a list, or newly written ones."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.methods.base import MorePrompts, Pool, SeedData
from srlm_lite.records import Prompt
from srlm_lite.run.files import read_records, write_records
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages.seed_data import FilesOfRecipe, check_window
from srlm_lite.stages.self_instruct import write_prompts

ReadPool = Callable[[SeedData], Pool | None]
"""Gives the list that iterations take their prompts from, or None where they are written."""


def prompts(
    session: Session, iteration: IterationDir, pool: ReadPool, more: MorePrompts | None = None
) -> tuple[list[Prompt], dict[str, Any]]:
    """The iteration's prompts: the next slice of the shuffled list, or newly written ones.

    Args:
        more: Gives further ones; those that fit the window are taken.
    """
    if iteration.prompts.is_file():
        found = read_records(iteration.prompts, Prompt)
        return found, {"prompts": len(found)}
    listed = pool(FilesOfRecipe(session.recipe))
    if listed is None:
        chosen, facts = write_prompts(session, iteration)
    else:
        chosen, facts = _slice(session, listed, iteration.number)
    if more is not None:
        further, told = more(chosen)
        chosen = [*chosen, *(prompt for prompt in further if session.leaves_room(prompt))]
        facts = {**facts, **told}
    write_records(iteration.prompts, chosen)
    return chosen, {"prompts": len(chosen), **facts}


def check_prompts(session: Session, pool: ReadPool) -> None:
    """Find out before the anchor is trained whether the last iteration will have prompts.

    Raises:
        UserError: Too few of them fit the window, or none can beside a thought.
    """
    if not session.recipe.iterations:
        return
    check_window(session.recipe, thought=session.thought_tokens())
    found = pool(FilesOfRecipe(session.recipe))
    if found is not None:
        _fitting(session, found, session.recipe.iterations)


def _slice(session: Session, pool: Pool, number: int) -> tuple[list[Prompt], dict[str, Any]]:
    fitting = _fitting(session, pool, number)
    Random(f"{session.recipe.seed}/prompts").shuffle(fitting)
    count = session.recipe.prompts.per_iteration
    chosen = [fitting[i % len(fitting)] for i in range((number - 1) * count, number * count)]
    return chosen, {"too_long": len(pool[0]) - len(fitting)}


def in_another_directory(session: Session) -> str:
    """What to add to advice that makes another run: its anchor need not be trained again."""
    if not session.run.anchor.training.is_file():
        return ""
    place = session.run.anchor.adapter.absolute()
    return f", in another directory; anchor.init={place} keeps this anchor"


def _fitting(session: Session, pool: Pool, number: int) -> list[Prompt]:
    """The prompts that fit the window, enough of them for this iteration."""
    section, (prompts, path) = session.recipe.prompts, pool
    fitting = [prompt for prompt in prompts if session.leaves_room(prompt)]
    first, last = (number - 1) * section.per_iteration, number * section.per_iteration
    way_out = "Lower prompts.per_iteration"
    if session.thought_tokens():
        way_out += " or rollout.max_thought_tokens"
    kept = in_another_directory(session)
    if last > len(fitting) and not section.reuse:
        raise UserError(
            f"iteration {number} needs prompts {first + 1} to {last}, but the list has "
            f"{len(fitting)} that fit the window",
            where=str(path),
            way_out=f"{way_out}, or set prompts.reuse=true{kept}",
        )
    if len(fitting) < section.per_iteration:
        raise UserError(
            f"has {len(fitting)} prompts that fit the window, fewer than prompts.per_iteration "
            f"= {section.per_iteration}",
            where=str(path),
            way_out=f"{way_out}{kept}",
        )
    return fitting
