"""Which candidates of a prompt need more votes: those that may yet be its best or worst. Pure.

Votes are drawn in rounds. What a candidate's mean will be, once all its votes are in, is bounded by
the rubric's scale: where the bounds leave the best and the worst no other choice nothing more is
drawn; of equals the first one stands, as where pairs are made. Long before that it is hardly in
doubt. The votes to come are taken to be normal around the mean of those that are there, with a
variance that is the candidate's own, shrunk towards that of all candidates; a prompt is done once
the chance that any other candidate would end up best, or worst, is below `RISK` in all. Until then
one candidate gets a vote: the leader, or whoever may best overtake it, whichever is less sure.

Source: Aggarwal et al. 2023 (Adaptive-Consistency), arXiv:2305.11860, which stops sampling answers
once the majority is unlikely to change, at 5% as here; of grades in place of a majority, the rule
is our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from srlm_lite.records import Candidate

RISK = 0.05
"""Chance, summed over a prompt's candidates, that more votes would put another one first or last.
"""

START = 2
"""Votes on every candidate, before any can be called needless."""

PRIOR_VOTES = 1.0
"""How many votes' worth of deviations the variance of all candidates counts among one's own."""

TELLING = 3
"""Votes of a candidate from which on the spread of its own says something."""

LEAST_VARIANCE = 1e-6

Votes = Sequence[float | None]
"""Scores of a candidate so far; None is a vote that could not be read."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When more votes matter.

    Args:
        total: Votes that a candidate may have.
        least: Readable votes that it must have to count.
        scale: The lowest and the highest score.
        variance: Of single votes around the mean of their candidate, over all of them.
        step: Between two neighbouring scores.
    """

    total: int
    least: int
    scale: tuple[float, float]
    variance: float
    step: float = 1.0

    @property
    def at_once(self) -> int:
        """Votes that are drawn on a candidate in a round: each round reads its question anew."""
        return max(1, self.total // 5)

    def wanting(self, votes: Mapping[str, Votes]) -> list[str]:
        """The candidates of a prompt that are to get another vote, in their order."""
        unread = [
            name
            for name, some in votes.items()
            if len(some) < self.total and sum(one is not None for one in some) < self.least
        ]
        ends = {
            name: self._end(some)
            for name, some in votes.items()
            if sum(one is not None for one in some) >= self.least
        }
        wanted = set(unread)
        for sign in (1.0, -1.0):
            wanted |= self._in_doubt(ends, sign)
        return [name for name in votes if name in wanted and len(votes[name]) < self.total]

    def _in_doubt(self, ends: Mapping[str, _End], sign: float) -> set[str]:
        """The candidates between which the best one, by scores times the sign, is in doubt."""
        if len(ends) < 2:
            return set()
        names = list(ends)
        first = max(names, key=lambda name: sign * ends[name].mean)
        # Of equals the first one stands: one behind it has to be better, one before it as good.
        behind = names[names.index(first) + 1 :]
        chances = {
            name: self._overtakes(ends[name], ends[first], sign, strictly=name in behind)
            for name in names
            if name != first
        }
        if sum(chances.values()) <= RISK:
            return set()
        # One vote may tell enough: that of the leader, or of whoever may best overtake it.
        other = max(chances, key=chances.__getitem__)
        one = first if ends[first].variance >= ends[other].variance else other
        return {one}

    def _overtakes(self, one: _End, first: _End, sign: float, *, strictly: bool) -> float:
        """How likely one ends up beyond the first, or level with it where that is enough.

        Means of so many votes lie on a grid, and half a step of it is between the two; but not
        before each has `TELLING` votes. With fewer, that two are level says little.
        """
        one_most = one.high if sign > 0 else -one.low
        first_least = first.low if sign > 0 else -first.high
        if one_most < first_least or (strictly and one_most <= first_least):
            return 0.0
        gap = sign * (first.mean - one.mean)
        if min(one.votes, first.votes) >= TELLING:
            half = self.step / (2 * self.total)
            gap += half if strictly else -half
        spread = math.sqrt(one.variance + first.variance)
        if spread == 0:
            return 0.0 if gap > 0 or strictly else 1.0
        return NormalDist().cdf(-gap / spread)

    def _end(self, votes: Votes) -> _End:
        """Where the mean of a candidate's votes may end."""
        read = [one for one in votes if one is not None]
        n, left = len(read), self.total - len(votes)
        mean = fmean(read)
        own = sum((one - mean) ** 2 for one in read)
        variance = (PRIOR_VOTES * self.variance + own) / (PRIOR_VOTES + n - 1)
        share = left / (n + left)
        return _End(
            n,
            mean,
            (n * mean + left * self.scale[0]) / (n + left),
            (n * mean + left * self.scale[1]) / (n + left),
            share**2 * variance * (1 / n + 1 / left) if left else 0.0,
        )


@dataclass(frozen=True, slots=True)
class _End:
    """The votes and their mean so far, its bounds once all are in, and the variance of what it will
    be."""

    votes: int
    mean: float
    low: float
    high: float
    variance: float


def wanted(rule: Rule, candidates: Sequence[Candidate], votes: Mapping[str, Votes]) -> list[str]:
    """The candidates of all prompts that are to get another vote."""
    groups: dict[str, dict[str, Votes]] = {}
    for row in candidates:
        groups.setdefault(row.prompt_id, {})[row.candidate_id] = votes[row.candidate_id]
    return [name for group in groups.values() for name in rule.wanting(group)]


def pooled_variance(votes: Mapping[str, Votes]) -> float:
    """The variance of single votes around the mean of their candidate, of all candidates."""
    squares, freedom = 0.0, 0
    for some in votes.values():
        read = [one for one in some if one is not None]
        if len(read) > 1:
            mean = fmean(read)
            squares += sum((one - mean) ** 2 for one in read)
            freedom += len(read) - 1
    return max(LEAST_VARIANCE, squares / freedom) if freedom else 1.0
