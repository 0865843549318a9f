"""What is told of a model as judge: the one list that tables, pages, cards and charts read.

Keys are those of `judge_metrics`, which says how each is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["agreement", "correlation", "votes"]
"""Shares of replies or prompts in the right order, rank correlations, or shares of pairs and votes
that say nothing; each is drawn in a chart of its own."""


@dataclass(frozen=True, slots=True)
class JudgeFigure:
    """One figure of a judge.

    Args:
        key: Its name in `eval.json`.
        label: What readers see.
        short: Its head in a narrow table; None: such tables leave it out.
        note: What it is, for those who read the table.
    """

    key: str
    label: str
    kind: Kind
    better: Literal["higher", "lower"]
    note: str
    short: str | None = None

    def of(self, judge: Mapping[str, Any]) -> float | None:
        """Its value in an evaluation's part `judge`; None where it was not measured."""
        value: float | None = judge.get(self.key)
        return value


ACCURACY = JudgeFigure(
    "pairwise_accuracy",
    "pairwise accuracy",
    "agreement",
    "higher",
    "pairs of replies in the right order, ties half",
    short="judge accuracy",
)
TIES = JudgeFigure(
    "tie_rate", "ties", "votes", "lower", "pairs of replies that it scores equal", short="ties"
)
READABLE = JudgeFigure(
    "parse_rate", "readable", "votes", "higher", "votes that could be read", short="readable"
)
JUDGE_FIGURES = (
    ACCURACY,
    JudgeFigure(
        "exact_match",
        "exact match",
        "agreement",
        "higher",
        "prompts whose whole order is right",
    ),
    JudgeFigure(
        "five_best",
        "5-best",
        "agreement",
        "higher",
        "replies with the top score that are best",
    ),
    JudgeFigure("spearman", "Spearman", "correlation", "higher", "of scores with the right order"),
    JudgeFigure("kendall", "Kendall", "correlation", "higher", "of scores with the right order"),
    TIES,
    READABLE,
)
"""In the order in which they are shown."""
SHORT_FIGURES = tuple(one for one in JUDGE_FIGURES if one.short is not None)
"""Those of narrow tables."""


def figures_of(kind: Kind) -> tuple[JudgeFigure, ...]:
    """Those of one kind."""
    return tuple(one for one in JUDGE_FIGURES if one.kind == kind)


def notes(kind: Kind) -> str:
    """What the figures of a kind are, in a sentence each."""
    told = (f"{one.label[0].upper()}{one.label[1:]}: {one.note}." for one in figures_of(kind))
    return " ".join(told)
