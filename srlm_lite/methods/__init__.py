"""A method turns candidates and judgements into preference pairs with weights: one file each."""

from __future__ import annotations

from collections.abc import Sequence

from srlm_lite.config import Recipe
from srlm_lite.methods import self_rewarding
from srlm_lite.pairing import Drops
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt


def pairs(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
    *,
    seed_path: Sequence[object],
) -> tuple[list[PreferencePair], Drops]:
    """The pairs of the recipe's method, and what was left out."""
    return self_rewarding.pairs(recipe, prompts, candidates, judgements, seed_path=seed_path)
