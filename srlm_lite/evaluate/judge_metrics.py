"""How well a judge's scores agree with a human order over the replies of a prompt.

The five metrics of Yuan et al. 2024, arXiv:2401.10020, section 3.1.3. What the paper leaves open
is settled as follows. A prompt whose replies humans did not tell apart is left out of all five.
A reply's score is the mean of its readable votes; without any it is unreadable.

For `pairwise_accuracy` a tie of scores and a pair with an unreadable reply count as half right: a
judge that says nothing is as good as a coin. `exact_match` wants every two replies that humans
told apart in the human order, so a tie or an unreadable reply among them fails the prompt, while
replies that humans ranked equal may have any scores. Correlations are computed for each prompt
over its readable replies and averaged over prompts; a prompt where they are undefined, with all
scores equal or too few of them readable, counts as 0.

Expected scores (`judge.score: expected`) are hardly ever whole or equal. All that goes by order
takes them as they are. `score_histogram` rounds them to whole numbers, so that a judge that gives
nearly all replies the same still shows; `five_best` goes by the sampled scores beside them, for an
expected one never reaches the maximum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any

from scipy.stats import kendalltau, spearmanr

from srlm_lite.judging import mean_scores
from srlm_lite.records import Judgement, RankedReply

Scores = Mapping[str, float | None]
"""Mean score by reply; None is unreadable."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two replies of a prompt: the sign of the human order and of the judge's; 1, -1 or 0."""

    human: int
    judge: int | None


def judge_metrics(
    groups: Sequence[Sequence[RankedReply]], judgements: Sequence[Judgement], *, best_score: float
) -> dict[str, Any]:
    """All metrics of one judge.

    Args:
        groups: The replies of each prompt, with their human rank (0 is best).
        judgements: All votes on them.
        best_score: The rubric's maximum: the "perfect 5" of `five_best`.

    Returns:
        `pairwise_accuracy`, `five_best`, `exact_match`, `spearman`, `kendall`, `parse_rate`,
        `tie_rate`, `score_histogram` (single votes), `pairwise_accuracy_decided` (ties and
        unreadable pairs left out), and the counts behind them. A rate over nothing is None.
    """
    groups = [group for group in groups if len({row.rank for row in group}) > 1]
    scores = mean_scores(judgements, min_votes=1)
    sampled = mean_scores(map(as_sampled, judgements), min_votes=1)
    pairs = [pair for group in groups for pair in _pairs(group, scores) if pair.human]
    decided = [pair for pair in pairs if pair.judge]
    votes = [judgement.score for judgement in judgements]
    readable = [vote for vote in votes if vote is not None]
    return {
        "pairwise_accuracy": _rate([_credit(pair) for pair in pairs]),
        "pairwise_accuracy_decided": _rate([float(p.judge == p.human) for p in decided]),
        "five_best": five_best(groups, sampled, best_score=best_score),
        "exact_match": exact_match(groups, scores),
        "spearman": _mean_correlation(groups, scores, spearmanr),
        "kendall": _mean_correlation(groups, scores, kendalltau),
        "parse_rate": _rate([float(vote is not None) for vote in votes]),
        "tie_rate": _rate([float(pair.judge == 0) for pair in pairs]),
        "score_histogram": histogram([_binned(judgement) for judgement in judgements]),
        "mean_score": round(fmean(readable), 4) if readable else None,
        "prompts": len(groups),
        "pairs": len(pairs),
    }


def as_sampled(judgement: Judgement) -> Judgement:
    """The judgement with the score that it says, where its score is an expected one."""
    if judgement.sampled_score is None:
        return judgement
    return replace(judgement, score=judgement.sampled_score)


def _binned(judgement: Judgement) -> float | None:
    if judgement.score is None or judgement.sampled_score is None:
        return judgement.score
    return float(round(judgement.score))


def _pairs(group: Sequence[RankedReply], scores: Scores) -> list[_Pair]:
    return [
        _Pair(
            human=_sign(b.rank - a.rank),
            judge=_order(scores.get(a.response_id), scores.get(b.response_id)),
        )
        for a, b in combinations(group, 2)
    ]


def _order(a: float | None, b: float | None) -> int | None:
    return None if a is None or b is None else _sign(a - b)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _credit(pair: _Pair) -> float:
    return 0.5 if not pair.judge else float(pair.judge == pair.human)


def five_best(
    groups: Sequence[Sequence[RankedReply]], scores: Scores, *, best_score: float
) -> float | None:
    """Share of the replies with a perfect mean score that no human ranked below another."""
    perfect = [
        row for group in groups for row in group if scores.get(row.response_id) == best_score
    ]
    return _rate([float(row.rank == 0) for row in perfect])


def exact_match(groups: Sequence[Sequence[RankedReply]], scores: Scores) -> float | None:
    """Share of the prompts (each with a human order) whose whole order is the human one."""
    return _rate(
        [
            float(all(pair.judge == pair.human for pair in _pairs(group, scores) if pair.human))
            for group in groups
        ]
    )


def _mean_correlation(
    groups: Sequence[Sequence[RankedReply]], scores: Scores, correlation: Any
) -> float | None:
    values = []
    for group in groups:
        readable = [(row.rank, scores.get(row.response_id)) for row in group]
        both = [(-rank, score) for rank, score in readable if score is not None]
        human, judge = [h for h, _ in both], [j for _, j in both]
        defined = len(set(human)) > 1 and len(set(judge)) > 1
        values.append(float(correlation(human, judge).statistic) if defined else 0.0)
    return _rate(values)


def histogram(votes: Sequence[float | None]) -> dict[str, int]:
    """How often each score was given, in ascending order, and `unreadable` last."""
    result = Counter(f"{score:g}" for score in sorted(vote for vote in votes if vote is not None))
    return {**result, "unreadable": sum(vote is None for vote in votes)}


def _rate(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None


def collapsed_score(score_histogram: Mapping[str, int], *, share: float = 0.8) -> str | None:
    """The score that at least this share of the readable votes gives, if there is one."""
    readable = {score: n for score, n in score_histogram.items() if score != "unreadable"}
    total = sum(readable.values())
    return next((score for score, n in readable.items() if total and n / total >= share), None)
