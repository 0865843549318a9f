"""Confidence intervals: what a figure might have been on other prompts of the same kind.

Answers to one prompt hang together, so prompts are drawn anew, never single answers or pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Terms = Sequence[tuple[float, float]]
"""One (numerator, denominator) for each prompt: the figure is the ratio of their sums."""

LEVEL = 0.95
RESAMPLES = 2000


def ratio(terms: Terms) -> float | None:
    """Sum of the numerators over the sum of the denominators; None over nothing."""
    whole = sum(weight for _, weight in terms)
    return round(sum(value for value, _ in terms) / whole, 4) if whole else None


def interval(terms: Terms) -> list[float] | None:
    """The 95% percentile interval of `ratio`, by 2,000 draws of the prompts with replacement.

    Draws in which the figure is over nothing are left out. The same terms give the same interval.

    Returns:
        Its two ends; None with fewer than two prompts that count.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    from scipy.stats import bootstrap

    counted = np.array([term for term in terms if term[1]], dtype=float)
    if len(counted) < 2:
        return None
    values, weights = counted.T
    drawn = bootstrap(
        (values, weights),
        lambda v, w, axis: v.sum(axis=axis) / w.sum(axis=axis),
        n_resamples=RESAMPLES,
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [round(float(drawn.low), 4), round(float(drawn.high), 4)]


def intervals(terms: Mapping[str, Terms]) -> dict[str, list[float] | None]:
    """`interval` of each figure."""
    return {name: interval(values) for name, values in terms.items()}
