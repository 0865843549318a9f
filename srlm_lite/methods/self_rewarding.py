"""Self-Rewarding Language Models: the model's own mean score orders its own answers.

Source: Yuan et al. 2024, arXiv:2401.10020.
"""

from __future__ import annotations

from collections.abc import Sequence

from srlm_lite.config import Recipe
from srlm_lite.pairing import Drops, make_pairs
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.seeds import derive_seed


def pairs(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
    *,
    seed_path: Sequence[object],
) -> tuple[list[PreferencePair], Drops]:
    """The best against the worst candidate of each prompt, by mean score."""
    return make_pairs(
        prompts,
        candidates,
        judgements,
        pairing=recipe.pairing,
        min_votes=recipe.judge.min_votes,
        seed=derive_seed(*seed_path),
    )
