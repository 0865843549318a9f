"""MT-Bench: two turns a question, each answer graded by itself from 1 to 10.

Source: Zheng et al. 2023, arXiv:2306.05685: single-answer grading, section 3.1, with a reference
answer for math, coding and reasoning, section 3.4; temperatures by category as in its program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from srlm_lite.evaluate.intervals import interval, ratio
from srlm_lite.judging import plain_lines
from srlm_lite.records import FinishReason

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Temperatures of the answers to a category; others are greedy."""

WITH_REFERENCE = ("math", "coding", "reasoning")
"""Categories whose answers are graded beside a reference, where there is one."""

LOWEST, HIGHEST = 1.0, 10.0

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_MARKS = r"[\s*_`#]*+"
WRITTEN = (re.compile(rf"(?P<word>\[)\[{_MARKS}[\d.,\u2044]+{_MARKS}\]\]"),)
"""Ratings as the judge writes them, for `quote`."""


@dataclass(frozen=True, slots=True)
class Grade:
    """The judge's rating of one answer; None where it could not be read."""

    question_id: str
    category: str
    turn: int
    rating: float | None


def read_rating(reply: str, *, finish_reason: FinishReason = "stop") -> float | None:
    """The rating that a judge's reply ends in, or None when it cannot be read.

    It stands in the last line that says something, in double brackets, and only one does; a number
    off the scale does not count as one. Brackets before that line may be a quotation of the answer.
    """
    lines = plain_lines(reply) if finish_reason == "stop" else []
    found = _RATING.findall(lines[-1]) if lines else []
    if len(found) != 1:
        return None
    rating = float(found[0])
    return rating if LOWEST <= rating <= HIGHEST else None


def mt_bench(grades: Sequence[Grade]) -> dict[str, Any]:
    """The score of a model: the mean of all ratings that can be read.

    Returns:
        `score` with its 95% interval `low`, `high` (bootstrap over questions); `turns`,
        `categories`: the means of each; `grades` and `unreadable` counted.
    """
    read = [(grade, grade.rating) for grade in grades if grade.rating is not None]
    by_question: dict[str, list[float]] = {}
    for grade, rating in read:
        by_question.setdefault(grade.question_id, []).append(rating)
    turns = sorted({grade.turn for grade in grades})
    categories = list(dict.fromkeys(grade.category for grade in grades))
    terms = [(sum(ratings), float(len(ratings))) for ratings in by_question.values()]
    low, high = interval(terms) or (None, None)
    return {
        "score": ratio(terms),
        "low": low,
        "high": high,
        "turns": {
            str(turn): _mean([rating for grade, rating in read if grade.turn == turn])
            for turn in turns
        },
        "categories": {
            name: _mean([rating for grade, rating in read if grade.category == name])
            for name in categories
        },
        "grades": len(grades),
        "unreadable": len(grades) - len(read),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None
