"""Confidence intervals: what a figure might have been on other prompts of the same kind.

Answers to one prompt hang together, so it is prompts that count, never single answers or pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import TypeVar

import numpy as np

Terms = Sequence[tuple[float, float]]
"""One (numerator, denominator) for each prompt: the figure is the ratio of their sums."""

T = TypeVar("T")

LEVEL = 0.95
RESAMPLES = 2000


def ratio(terms: Terms) -> float | None:
    """Sum of the numerators over the sum of the denominators; None over nothing."""
    whole = sum(weight for _, weight in terms)
    return round(sum(value for value, _ in terms) / whole, 4) if whole else None


def share_interval(terms: Terms) -> list[float] | None:
    """The 95% interval of a `ratio` from 0 to 1, whose numerators are parts of their denominators.

    Wilson's, with as many independent observations as there would be at the same standard error:
    the denominators' sum over the design effect. That effect is measured; few failures (or few
    successes) measure it badly, so it is drawn towards what it is where all observations of a
    prompt are alike, as if one more had been seen. Unlike a bootstrap it has a width where all
    prompts are alike, and holds the truth as often near 0 and 1 as elsewhere.

    Returns:
        Its two ends; None with fewer than two prompts that count.

    Source: Wilson 1927; Korn and Graubard 1998, Survey Methodology 24(2), for the effective number
    and Student's quantile; the drawing is ours.
    """
    from scipy.stats import t

    counted = np.array([term for term in terms if term[1]], dtype=float)
    n = len(counted)
    if n < 2:
        return None
    values, weights = counted.T
    whole = weights.sum()
    p = values.sum() / whole
    alike = float(weights @ weights) / whole
    effect, rarer = alike, whole * min(p, 1 - p)
    if 0 < p < 1:
        off = values - p * weights
        measured = float(off @ off) / (whole * p * (1 - p))
        effect = (rarer * max(1.0, measured) + alike) / (rarer + 1)
    z, seen = float(t.ppf((1 + LEVEL) / 2, n - 1)), whole / effect
    middle, stretch = p + z**2 / (2 * seen), 1 + z**2 / seen
    half = z * (p * (1 - p) / seen + z**2 / (4 * seen**2)) ** 0.5
    low, high = (middle - half) / stretch, (middle + half) / stretch
    return [round(float(max(low, 0.0)), 4), round(float(min(high, 1.0)), 4)]


def interval(terms: Terms) -> list[float] | None:
    """The 95% percentile interval of `ratio`, by 2,000 draws of the prompts with replacement.

    For means; a share has `share_interval`. Draws in which the figure is over nothing are left
    out. The same terms give the same interval.

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


def intervals(
    terms: Mapping[str, Terms], *, means: Container[str] = ()
) -> dict[str, list[float] | None]:
    """The interval of each figure: of a mean those named in `means`, of a share the others."""
    return {
        name: (interval if name in means else share_interval)(values)
        for name, values in terms.items()
    }


def interval_of(
    prompts: Sequence[T], figure: Callable[[Sequence[T]], float | None]
) -> list[float] | None:
    """As `interval`, of a figure that is no ratio of sums.

    Args:
        prompts: What is drawn with replacement: what is known of one prompt each.
        figure: Of the prompts of a draw; a draw of which it is None is left out.

    Returns:
        Its two ends; None with fewer than two prompts, or where most draws have no figure.
    """
    if len(prompts) < 2:
        return None
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, len(prompts), len(prompts)) for _ in range(RESAMPLES // 4))
    found = [figure([prompts[place] for place in places]) for places in drawn]
    known = [value for value in found if value is not None]
    if len(known) <= len(found) // 2:
        return None
    ends = (1 - LEVEL) / 2
    return [round(float(np.quantile(known, end)), 4) for end in (ends, 1 - ends)]
