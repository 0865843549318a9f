"""Scores of ranked replies as the judge's replies that state them."""

from __future__ import annotations

import math
import re

from srlm_lite.errors import UserError

TARGET_END = re.compile(r"(?:^|\n)\s*Score:\s*-?\d+(?:\.\d+)?\s*$")


def score_target(
    score: float, *, score_range: tuple[float, float], target_range: tuple[int, int]
) -> str:
    """The judge's reply that states a known score, moved to the rubric's range and rounded.

    There is no rationale in it, so a judge that learns from it learns none: it will grade
    without reasons, which is quicker and usually worse.

    Raises:
        UserError: The score lies outside `score_range`.
    """
    low, high = score_range
    if not low <= score <= high:
        raise UserError(f"score {score:g} lies outside {low:g} to {high:g}", where="--score-range")
    bottom, top = target_range
    scaled = bottom + (top - bottom) * (score - low) / (high - low)
    return f"Score: {math.floor(scaled + 0.5)}"
