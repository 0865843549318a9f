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
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from srlm_lite.evaluate.intervals import Terms, intervals, ratio
from srlm_lite.judging import as_sampled, by_candidate, mean_scores
from srlm_lite.records import Judgement, RankedReply

Scores = Mapping[str, float | None]
"""Mean score by reply; None is unreadable."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two replies of a prompt: the sign of the human order and of the judge's; 1, -1 or 0."""

    human: int
    judge: int | None


_MEANS = ("spearman", "kendall", "mean_score")
"""Figures that are no shares."""


def judge_metrics(
    groups: Sequence[Sequence[RankedReply]],
    judgements: Sequence[Judgement],
    *,
    best_score: float,
    with_intervals: bool = False,
) -> dict[str, Any]:
    """All metrics of one judge.

    Args:
        groups: The replies of each prompt, with their human rank (0 is best).
        judgements: All votes on them.
        best_score: The rubric's maximum: the "perfect 5" of `five_best`.
        with_intervals: Adds `intervals`: of each rate and mean, the ends of its 95% interval.

    Returns:
        `pairwise_accuracy`, `five_best`, `exact_match`, `spearman`, `kendall`, `parse_rate`,
        `tie_rate`, `score_histogram` (single votes), `pairwise_accuracy_decided` (ties and
        unreadable pairs left out), `order_consistency`, `length_correlation`, and the counts
        behind them. A rate over nothing is None.
    """
    every = groups
    groups = [group for group in groups if len({row.rank for row in group}) > 1]
    scores = mean_scores(judgements, min_votes=1)
    votes = by_candidate(judgements)
    terms = {
        **_order_terms(groups, scores),
        "five_best": _five_best_terms(
            groups, mean_scores(map(as_sampled, judgements), min_votes=1), best_score=best_score
        ),
        "parse_rate": [_parse_term(group, votes) for group in every],
        "order_consistency": [_consistency_term(group, votes) for group in groups],
        "mean_score": [_mean_term(group, votes) for group in every],
    }
    return {
        **{name: ratio(values) for name, values in terms.items()},
        "length_correlation": _length_correlation(groups, scores),
        "score_histogram": histogram(judgements),
        "prompts": len(groups),
        "pairs": sum(bool(pair.human) for group in groups for pair in _pairs(group, scores)),
        **({"intervals": intervals(terms, means=_MEANS)} if with_intervals else {}),
    }


def share_in_gold_order(scores: Scores, gold: Mapping[str, float]) -> float | None:
    """How often, of two answers with different gold, the better one has the higher score.

    The answers may be to different prompts: both scores are on a scale of their own, the same for
    all. Equal scores, and an unreadable one, count half.
    """
    credits = []
    for (one, score), (other, another) in combinations(scores.items(), 2):
        gap = gold[one] - gold[other]
        if gap:
            told = 0.0 if score is None or another is None else (score - another) * gap
            credits.append(0.5 if told == 0 else float(told > 0))
    return round(fmean(credits), 4) if credits else None


def _order_terms(groups: Sequence[Sequence[RankedReply]], scores: Scores) -> dict[str, Terms]:
    from scipy.stats import kendalltau, spearmanr

    pairs = [[pair for pair in _pairs(group, scores) if pair.human] for group in groups]
    decided = [[pair for pair in some if pair.judge] for some in pairs]
    return {
        "pairwise_accuracy": [(sum(map(_credit, some)), len(some)) for some in pairs],
        "pairwise_accuracy_decided": [
            (sum(pair.judge == pair.human for pair in some), len(some)) for some in decided
        ],
        "exact_match": [
            (float(all(pair.judge == pair.human for pair in some)), 1) for some in pairs
        ],
        "spearman": [(_correlation(group, scores, spearmanr), 1) for group in groups],
        "kendall": [(_correlation(group, scores, kendalltau), 1) for group in groups],
        "tie_rate": [(sum(pair.judge == 0 for pair in some), len(some)) for some in pairs],
    }


def _five_best_terms(
    groups: Sequence[Sequence[RankedReply]], scores: Scores, *, best_score: float
) -> Terms:
    perfect = [
        [row for row in group if scores.get(row.response_id) == best_score] for group in groups
    ]
    return [(sum(row.rank == 0 for row in some), len(some)) for some in perfect]


def _parse_term(
    group: Sequence[RankedReply], votes: Mapping[str, Sequence[Judgement]]
) -> tuple[float, float]:
    found = [vote.score for row in group for vote in votes.get(row.response_id, ())]
    return sum(score is not None for score in found), len(found)


def _mean_term(
    group: Sequence[RankedReply], votes: Mapping[str, Sequence[Judgement]]
) -> tuple[float, float]:
    found = [vote.score for row in group for vote in votes.get(row.response_id, ())]
    readable = [score for score in found if score is not None]
    return sum(readable), len(readable)


def _consistency_term(
    group: Sequence[RankedReply], votes: Mapping[str, Sequence[Judgement]]
) -> tuple[float, float]:
    """How many of two votes' verdicts on two replies are the same verdict, ties left out."""
    same = both = 0
    for a, b in combinations(group, 2):
        of_a, of_b = votes.get(a.response_id, ()), votes.get(b.response_id, ())
        verdicts = [_order(x.score, y.score) for x, y in zip(of_a, of_b, strict=False)]
        for one, other in combinations([verdict for verdict in verdicts if verdict], 2):
            both += 1
            same += one == other
    return same, both


def _length_correlation(
    groups: Sequence[Sequence[RankedReply]], scores: Scores
) -> dict[str, float | None]:
    """Spearman correlation with the length in characters, of the judge and of the people.

    Within a prompt, over the replies that the judge could be read on; averaged over prompts.
    """
    from scipy.stats import spearmanr

    by_judge, by_people = [], []
    for group in groups:
        readable = [row for row in group if scores.get(row.response_id) is not None]
        lengths = [len(row.response) for row in readable]
        by_judge.append(_defined(spearmanr, [scores[row.response_id] for row in readable], lengths))
        by_people.append(_defined(spearmanr, [-row.rank for row in readable], lengths))
    return {"judge": _rate(by_judge), "people": _rate(by_people)}


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


def _correlation(group: Sequence[RankedReply], scores: Scores, correlation: Any) -> float:
    readable = [row for row in group if scores.get(row.response_id) is not None]
    judge = [scores[row.response_id] for row in readable]
    return _defined(correlation, [-row.rank for row in readable], judge)


def _defined(correlation: Any, one: Sequence[Any], other: Sequence[Any]) -> float:
    """The correlation, or 0 where one side has a single value."""
    defined = len(set(one)) > 1 and len(set(other)) > 1
    return float(correlation(one, other).statistic) if defined else 0.0


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two replies to a prompt that the judge puts in the other order than people do."""

    better: RankedReply
    """To people."""
    worse: RankedReply
    better_score: float
    worse_score: float

    @property
    def gap(self) -> float:
        """Points by which the judge prefers the worse one."""
        return self.worse_score - self.better_score


def disagreements(
    groups: Sequence[Sequence[RankedReply]], judgements: Sequence[Judgement]
) -> list[Disagreement]:
    """All of them, the widest gap first; ties and unreadable replies do not count."""
    scores = mean_scores(judgements, min_votes=1)
    found = []
    for group in groups:
        for a, b in combinations(group, 2):
            better, worse = sorted((a, b), key=lambda row: row.rank)
            low, high = scores.get(better.response_id), scores.get(worse.response_id)
            if better.rank == worse.rank or low is None or high is None:
                continue
            if high > low:
                found.append(Disagreement(better, worse, low, high))
    return sorted(found, key=lambda one: -one.gap)


def calibration(
    groups: Sequence[Sequence[RankedReply]],
    judgements: Sequence[Judgement],
    *,
    scale: tuple[float, float],
) -> dict[str, Any] | None:
    """The judge's score against the human quality of single replies, over all prompts.

    The human quality, from the lowest to the highest of these replies, becomes the rubric's
    scale, as in the anchor's targets (`anchor.eft_targets: human`).

    Args:
        scale: The rubric's lowest and highest score.

    Returns:
        `bins`: for each rounded score the number of `replies`, their mean `score`, and the mean
        `human` quality in points; `error`: mean distance of score and human over the bins, by
        their replies, in points; `pearson`, `spearman` and `replies`. None where the data has no
        quality or it is the same for all.
    """
    scores = mean_scores(judgements, min_votes=1)
    known = [
        (score, row.quality)
        for group in groups
        for row in group
        if row.quality is not None and (score := scores.get(row.response_id)) is not None
    ]
    qualities = [row.quality for group in groups for row in group if row.quality is not None]
    if not known or min(qualities) == max(qualities):
        return None
    from scipy.stats import pearsonr, spearmanr

    low, high = min(qualities), max(qualities)
    points = [scale[0] + (q - low) / (high - low) * (scale[1] - scale[0]) for _, q in known]
    bins: dict[int, list[tuple[float, float]]] = {}
    for (score, _), human in sorted(zip(known, points, strict=True)):
        bins.setdefault(round(score), []).append((score, human))
    means = {
        name: (len(some), fmean(s for s, _ in some), fmean(h for _, h in some))
        for name, some in bins.items()
    }
    return {
        "replies": len(known),
        "pearson": round(_defined(pearsonr, [s for s, _ in known], points), 4),
        "spearman": round(_defined(spearmanr, [s for s, _ in known], points), 4),
        "error": round(sum(n * abs(s - h) for n, s, h in means.values()) / len(known), 4),
        "bins": {
            f"{name:g}": {"replies": n, "score": round(s, 4), "human": round(h, 4)}
            for name, (n, s, h) in means.items()
        },
    }


def histogram(judgements: Sequence[Judgement]) -> dict[str, int]:
    """How often each score was given, in ascending order, and `unreadable` last.

    An expected score counts as the whole number that is next to it.
    """
    votes = [_binned(judgement) for judgement in judgements]
    result = Counter(f"{score:g}" for score in sorted(vote for vote in votes if vote is not None))
    return {**result, "unreadable": sum(vote is None for vote in votes)}


def _rate(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None


def collapsed_score(score_histogram: Mapping[str, int], *, share: float = 0.8) -> str | None:
    """The score that at least this share of the readable votes gives, if there is one."""
    readable = {score: n for score, n in score_histogram.items() if score != "unreadable"}
    total = sum(readable.values())
    return next((score for score, n in readable.items() if total and n / total >= share), None)
