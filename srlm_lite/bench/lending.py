"""Work that runs have in common, done once: what M1 says and grades, in the bench of the methods.

Runs that begin with the same anchor evaluate the same M1, and many of them draw and grade the same
answers in their first iteration, or have that in common as a whole, and what M2 says and grades:
what a second delta starts from and learns makes no difference to the first. A run that finds such
files in its directory does not compute them, so they are copied there from a run that has them:
byte for byte what it would have written.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from srlm_lite.methods import METHODS, sections_of_others
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.recipe import Recipe
from srlm_lite.run.run import RunDir

GRADING = ("prompts", "candidates", "judgements")
"""Stages of an iteration whose results can be the same in several runs."""


LATER = (
    ("dpo", "init"),
    ("pairing", "accumulate"),
    ("pairing", "older_steps"),
    ("pairing", "older_order"),
    ("pairing", "replay"),
)
"""Settings that no first iteration reads."""


def same_evaluation(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes measure an anchor alike, given that it is the same."""
    return _measuring(one) == _measuring(other)


def same_reading(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes have the same texts read by the same bare base."""
    return _reading(one) == _reading(other)


def same_first_grades(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes draw and grade the same answers first, given the same anchor."""
    return (
        all(_is_plain(recipe) for recipe in (one, other))
        and one.prompts.source == "file"  # written ones come with files of their own
        and (one.prompts, one.pairing.drop_truncated)
        == (other.prompts, other.pairing.drop_truncated)
        and same_evaluation(one, other)
    )


def same_first_iteration(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes make the same M2, given the same anchor."""
    return (
        all(_is_plain(recipe) and recipe.dpo.reference == "anchor" for recipe in (one, other))
        and one.method == other.method
        and one.prompts.source == "file"
        and _at_first(one) == _at_first(other)
    )


def _at_first(recipe: Recipe) -> dict[str, Any]:
    """All settings but those that are of older pairs and of an older delta."""
    told = recipe.identity()
    for section, key in LATER:
        told[section].pop(key, None)
    return told


def _measuring(recipe: Recipe) -> dict[str, Any]:
    """All settings but those that an anchor's evaluation surely does not read."""
    told = recipe.identity()
    unread = ("method", "anchor", "prompts", "pairing", *sections_of_others(""))
    kept = {section: value for section, value in told.items() if section not in unread}
    # The rank is the slot's, and with it the rounding's.
    kept["dpo"] = kept["dpo"]["lora"]
    kept["data"] = {k: v for k, v in kept["data"].items() if k not in ("ranked", "extra")}
    return kept


def _reading(recipe: Recipe) -> dict[str, Any]:
    told = recipe.identity()
    told["anchor"].pop("init", None)
    return {section: told[section] for section in ("seed", "base", "data", "anchor")}


def _is_plain(recipe: Recipe) -> bool:
    method = METHODS[recipe.method]
    same = ("pool", *GRADING)
    return all(getattr(method, stage) is getattr(SelfRewarding, stage) for stage in same)


def lend_reading(lender: RunDir, borrower: RunDir) -> None:
    """Give a run what another one says of the bare base, if it does not say it yet."""
    if lender.anchor.reading.is_file() and not borrower.anchor.reading.is_file():
        _copy(lender.anchor.reading, borrower.anchor.reading)


def lend_evaluation(lender: RunDir, borrower: RunDir) -> None:
    """Give a run the evaluation of the anchor that another run has, if it has none yet."""
    if borrower.anchor.evaluation.is_file():
        return
    for file in sorted(lender.anchor.evaluation_dir.iterdir()):
        _copy(file, borrower.anchor.evaluation_dir / file.name)
    # Last: where it is, the evaluation is whole.
    _copy(lender.anchor.evaluation, borrower.anchor.evaluation)


def lend_grades(lender: RunDir, borrower: RunDir, t: int) -> None:
    """Give a run another one's answers and grades of iteration t, if that one has them all.

    With the seconds that they took there. What the iteration starts from is done; an iteration that
    has begun is left as it is.
    """
    place, mine = lender.iteration(t), borrower.iteration(t)
    if not place.judgements.is_file():
        return
    if not mine.prompts.is_file():
        _copy(place.candidates, mine.candidates)
        _copy(place.judgements, mine.judgements)
        _copy(place.prompts, mine.prompts)  # last: where they are, the others are
    _note(lender, borrower, t, GRADING)


def lend_first_iteration(lender: RunDir, borrower: RunDir) -> None:
    """Give a run the whole first iteration of another one, where that is done and its own is not.

    Its anchor is done. The seconds are those that it took there.
    """
    place, mine = lender.iteration(1), borrower.iteration(1)
    if not place.is_done or mine.is_done:
        return
    shutil.rmtree(mine.path, ignore_errors=True)  # of a bench that was stopped in it
    files = [file for file in sorted(place.path.rglob("*")) if file.is_file()]
    for file in files:
        if file != place.done and not file.name.startswith("."):
            _copy(file, mine.path / file.relative_to(place.path))
    _note(lender, borrower, 1)
    _copy(place.done, mine.done)  # last: where it is, the iteration is whole


def _note(lender: RunDir, borrower: RunDir, t: int, stages: Collection[str] | None = None) -> None:
    """What one run noted of the stages of an iteration, for another that noted nothing of them."""
    noted = {row["stage"] for row in borrower.read_metrics() if row["iteration"] == t}
    for row in lender.read_metrics():
        stage = row["stage"]
        if row["iteration"] == t and stage not in noted and (stages is None or stage in stages):
            borrower.add_metrics(row)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
