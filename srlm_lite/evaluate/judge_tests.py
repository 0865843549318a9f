"""Figures of a judge on pairs of which the better reply is known, and on its model's own answers.

As in `judge_metrics`, a tie and an unreadable reply count as half right in an accuracy: a judge
that says nothing is as good as a coin. Pairs of one prompt hang together, so intervals go by
prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from srlm_lite.evaluate.intervals import Terms, interval, interval_of, intervals, ratio


@dataclass(frozen=True, slots=True)
class KnownPair:
    """What a judge made of two replies of which one is known to be better.

    Attributes:
        prompt: Pairs of the same one hang together.
        credit: 1 where the better one wins, 0 where the worse one does, .5 for a tie; None where
            the judge could not be read.
        longer: By how many characters the better reply is longer than the worse one.
        consistent: Whether the verdict is the same in both orders; None of a judge that sees one
            reply at a time.
        styles: Of the better and of the worse one, where the file has such.
    """

    prompt: str
    credit: float | None
    longer: int
    subset: str = ""
    consistent: bool | None = None
    styles: tuple[int, int] | None = None


def credit_of(better: float | None, worse: float | None) -> float | None:
    """What two scores are worth, that of the known better reply first."""
    if better is None or worse is None:
        return None
    return 0.5 if better == worse else float(better > worse)


def pair_figures(pairs: Sequence[KnownPair]) -> dict[str, Any]:
    """All that is said of a judge on known pairs.

    Returns:
        `accuracy`; `decided`: the same without ties and unreadable pairs; `tie_rate` and
        `unreadable`, shares of all pairs; `position_consistency`; of length `longer_errors`: of
        the wrong verdicts on replies of unlike length the share in which the longer one wins, and
        `accuracy_longer` and `accuracy_shorter`: where the better reply is the longer one, or the
        shorter; `pairs`, `prompts`, `errors`, and `intervals` of all rates. `subsets` has for each
        domain `accuracy`, its interval, `pairs` and `prompts`, and `subset_mean` is the mean over
        them; both are empty where the file has none. A rate over nothing is None.
    """
    terms = _pair_terms(pairs)
    subsets: dict[str, list[KnownPair]] = {}
    for pair in pairs:
        subsets.setdefault(pair.subset, []).append(pair)
    by_subset = {name: _subset(some) for name, some in subsets.items()} if any(subsets) else {}
    return {
        **{name: ratio(values) for name, values in terms.items()},
        "pairs": len(pairs),
        "prompts": len({pair.prompt for pair in pairs}),
        "errors": sum(pair.credit == 0 for pair in pairs),
        "subsets": by_subset,
        "subset_mean": _mean([one["accuracy"] for one in by_subset.values()]),
        "intervals": intervals(terms),
    }


def _pair_terms(pairs: Sequence[KnownPair]) -> dict[str, Terms]:
    by_prompt: dict[str, list[KnownPair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    groups = list(by_prompt.values())
    decided = [[pair for pair in some if pair.credit in (0, 1)] for some in groups]
    unlike = [[pair for pair in some if pair.credit == 0 and pair.longer] for some in groups]
    placed = [[pair for pair in some if pair.consistent is not None] for some in groups]
    longer = [[pair for pair in some if pair.longer > 0] for some in groups]
    shorter = [[pair for pair in some if pair.longer < 0] for some in groups]
    return {
        "accuracy": _credits(groups),
        "decided": _credits(decided),
        "tie_rate": [(sum(pair.credit == 0.5 for pair in some), len(some)) for some in groups],
        "unreadable": [(sum(pair.credit is None for pair in some), len(some)) for some in groups],
        "position_consistency": [
            (sum(bool(pair.consistent) for pair in some), len(some)) for some in placed
        ],
        "longer_errors": [(sum(pair.longer < 0 for pair in some), len(some)) for some in unlike],
        "accuracy_longer": _credits(longer),
        "accuracy_shorter": _credits(shorter),
    }


def _credits(groups: Sequence[Sequence[KnownPair]]) -> Terms:
    return [(sum(map(_credit, some)), len(some)) for some in groups]


def _credit(pair: KnownPair) -> float:
    return 0.5 if pair.credit is None else pair.credit


def _subset(pairs: Sequence[KnownPair]) -> dict[str, Any]:
    terms = _pair_terms(pairs)
    return {
        "accuracy": ratio(terms["accuracy"]),
        "interval": intervals({"accuracy": terms["accuracy"]})["accuracy"],
        "pairs": len(pairs),
        "prompts": len({pair.prompt for pair in pairs}),
    }


def accuracy_difference(
    one: Sequence[KnownPair], other: Sequence[KnownPair]
) -> dict[str, float | list[float] | None]:
    """By how much the first judge's accuracy is above the other's, on the same pairs in order.

    Returns:
        `difference`, and its 95% `interval` by draws of the prompts: what the two have in common
        is not in it.
    """
    by_prompt: dict[str, list[float]] = {}
    for a, b in zip(one, other, strict=True):
        by_prompt.setdefault(a.prompt, []).append(_credit(a) - _credit(b))
    terms = [(sum(some), float(len(some))) for some in by_prompt.values()]
    return {"difference": ratio(terms), "interval": interval(terms)}


def style_figures(pairs: Sequence[KnownPair]) -> dict[str, Any]:
    """How styles of right and wrong replies meet.

    Returns:
        `matrix`: the accuracy by the style of the right reply (rows) and of the wrong one
        (columns), from the plainest; `easy`, `normal` and `hard`: its means below, on and above
        the diagonal. Hard is a plain right reply against a wrong one that looks better. Nothing
        without styles.

    Source: Liu et al. 2024, RM-Bench, arXiv:2410.16184, section 3.3.
    """
    cells: dict[tuple[int, int], list[float]] = {}
    for pair in pairs:
        if pair.styles is not None:
            cells.setdefault(pair.styles, []).append(_credit(pair))
    if not cells:
        return {}
    count = 1 + max(max(styles) for styles in cells)
    places = range(count)
    mean = {styles: fmean(some) for styles, some in cells.items()}
    kinds = {
        "easy": [mean[at] for at in mean if at[0] > at[1]],
        "normal": [mean[at] for at in mean if at[0] == at[1]],
        "hard": [mean[at] for at in mean if at[0] < at[1]],
    }
    matrix = [[_mean([mean[a, b]] if (a, b) in mean else []) for b in places] for a in places]
    return {**{name: _mean(some) for name, some in kinds.items()}, "matrix": matrix}


def best_credit(right: Sequence[float | None], wrong: Sequence[float | None]) -> float:
    """Whether the one right reply of several comes out on top: 1, or 0.

    Tied with others at the top it is drawn from them; an unreadable reply is tied with all.
    """
    [best] = right
    if any(best is not None and score is not None and score > best for score in wrong):
        return 0.0
    level = sum(best is None or score is None or score == best for score in wrong)
    return 1 / (1 + level)


def all_above(right: Sequence[float | None], wrong: Sequence[float | None]) -> float:
    """Whether every right reply is above every wrong one: 1, or 0. One unreadable reply is not."""
    known = [score for score in (*right, *wrong) if score is not None]
    if len(known) < len(right) + len(wrong):
        return 0.0
    return float(min(known[: len(right)]) > max(known[len(right) :]))


def prompt_shares(tests: Mapping[str, Sequence[tuple[str, float]]]) -> dict[str, Any]:
    """Shares of prompts, such as of those whose best reply came out on top.

    Args:
        tests: By what is asked of a prompt (`best`, `all_above`): subset and credit of each.

    Returns:
        For each of them `share`, `prompts`, the 95% `interval`, and the share by `subsets`.
    """
    found = {}
    for name, some in tests.items():
        if not some:
            continue
        by_subset: dict[str, list[float]] = {}
        for subset, value in some:
            by_subset.setdefault(subset, []).append(value)
        terms = [(value, 1.0) for _, value in some]
        found[name] = {
            "share": ratio(terms),
            "interval": intervals({name: terms})[name],
            "prompts": len(some),
            "subsets": {
                subset: _mean(values) for subset, values in by_subset.items() if any(by_subset)
            },
        }
    return found


# --- self-preference, with quality held fixed -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """An answer with the judge's score and a reference grade, both from 0 to 1.

    Attributes:
        own: Whether the judge's own model wrote it.
        confidence: How likely that model finds it, in nats a token; None where it is not known.
    """

    prompt: str
    score: float
    reference: float
    own: bool
    confidence: float | None = None

    @property
    def error(self) -> float:
        """By how much the judge's score is above the reference."""
        return self.score - self.reference


QUALITIES = 10
"""Steps of the reference grade within which quality counts as the same."""


def self_preference(answers: Sequence[GradedAnswer]) -> dict[str, Any]:
    """Three figures of a judge on its model's own answers, and how it takes to those of others.

    - `noise`: mean distance of score and reference, as a share of the scale.
    - `self_bias`: how closely the judge's score follows the model's own confidence among answers
      of the same quality: the correlation of the two, each less its mean over the answers with the
      same reference grade, from -1 to 1. A judge that looks at quality alone is at 0.
    - `skew`: what is given too much less what is given too little, over their sum, from -1 (all
      errors are too low) to 1 (all are too high).
    - `kinder`: mean score of own answers less that of others' of the same reference grade, as a
      share of the scale; qualities that only one side has say nothing. None without others'.

    Returns:
        The four, each with its 95% interval by draws of the prompts in `intervals`, and `answers`,
        `others`: how many.

    Source: Tan et al. 2025, arXiv:2510.08977, names noise, policy-reward coupling and
        over-/under-reward skew of a self-rewarding model (rho_noise, rho_selfbias, rho_symbias) for
        answers that are right or wrong; the formulas here, for grades, are ours. `kinder` holds
        quality fixed as in matched comparisons, by Mantel and Haenszel's weights.
    """
    by_prompt: dict[str, list[GradedAnswer]] = {}
    for row in answers:
        by_prompt.setdefault(row.prompt, []).append(row)
    groups = list(by_prompt.values())
    figures = {"noise": _noise, "self_bias": _self_bias, "skew": _skew, "kinder": _kinder}

    def of(figure: Any) -> Any:
        return lambda drawn: figure([row for group in drawn for row in group])

    values = {name: figure(answers) for name, figure in figures.items()}
    return {
        **{name: None if value is None else round(value, 4) for name, value in values.items()},
        "answers": sum(row.own for row in answers),
        "others": sum(not row.own for row in answers),
        "intervals": {
            name: None if values[name] is None else interval_of(groups, of(figure))
            for name, figure in figures.items()
        },
    }


def _noise(answers: Sequence[GradedAnswer]) -> float | None:
    own = [abs(row.error) for row in answers if row.own]
    return fmean(own) if own else None


def _skew(answers: Sequence[GradedAnswer]) -> float | None:
    over = sum(max(row.error, 0.0) for row in answers if row.own)
    under = sum(max(-row.error, 0.0) for row in answers if row.own)
    return (over - under) / (over + under) if over + under else None


def _strata(answers: Sequence[GradedAnswer]) -> list[list[GradedAnswer]]:
    strata: dict[int, list[GradedAnswer]] = {}
    for row in answers:
        strata.setdefault(round(row.reference * QUALITIES), []).append(row)
    return list(strata.values())


def _self_bias(answers: Sequence[GradedAnswer]) -> float | None:
    xs: list[float] = []
    ys: list[float] = []
    for stratum in _strata([row for row in answers if row.own]):
        known = [(row.confidence, row.score) for row in stratum if row.confidence is not None]
        if len(known) < 2:
            continue
        x_mean, y_mean = fmean(x for x, _ in known), fmean(y for _, y in known)
        xs += [x - x_mean for x, _ in known]
        ys += [y - y_mean for _, y in known]
    norm = math.sqrt(sum(x * x for x in xs) * sum(y * y for y in ys))
    if norm < 1e-12:
        return None
    return sum(x * y for x, y in zip(xs, ys, strict=True)) / norm


def _kinder(answers: Sequence[GradedAnswer]) -> float | None:
    total = weights = 0.0
    for stratum in _strata(answers):
        own = [row.score for row in stratum if row.own]
        others = [row.score for row in stratum if not row.own]
        if own and others:
            weight = len(own) * len(others) / (len(own) + len(others))
            total += weight * (fmean(own) - fmean(others))
            weights += weight
    return total / weights if weights else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 4) if known else None
