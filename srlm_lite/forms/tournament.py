"""From contests to scores: who meets whom, and what the verdicts come to. Pure.

A contest is two candidates of a prompt before the judge, in both orders. A candidate's score is its
share of the verdicts that it is part of, or its strength in the Bradley-Terry model. Where there
are few candidates all meet; where there are many a seeded bracket tells the best and the worst with
about 2.5 N contests in place of N (N - 1) / 2.

Source: Ou et al. 2025 (SERL), arXiv:2511.07922: share of won verdicts (Copeland), half in each
order, and its length control: a win counts |loser| / |winner|, among answers whose lengths are
within 20% of each other. ArenaRL 2026, arXiv:2601.06487, for seeds by contests with one reference
and single elimination after that, known to us from summaries alone; the elimination of the worst,
which pairs need as well, is our addition. Hunter 2004, Annals of Statistics 32, for the ratings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from random import Random
from statistics import fmean
from typing import Any, Protocol

from srlm_lite.records import Contest

PRIOR = 0.01
"""Wins that everybody is given over everybody else before the first contest: without, one that
never loses has no finite rating."""

Meeting = tuple[str, str]
"""Two candidates that are to meet, by name."""


def verdict(p: float) -> float:
    """1 where the first candidate wins, 0 where the second does, 0.5 where neither."""
    return 0.5 if p == 0.5 else float(p > 0.5)


def credits(
    contests: Iterable[Contest],
    *,
    soft: bool = False,
    lengths: Mapping[str, int] | None = None,
    within: float = 0.2,
) -> Iterator[tuple[str, str, float]]:
    """What each verdict that can be read gives: a candidate, the other one, and its credit.

    Every verdict gives two rows, one for either candidate.

    Args:
        soft: A verdict's probability counts, in place of who it names.
        lengths: Of the candidates: a win counts |loser| / |winner|, and contests of candidates
            whose lengths differ by more than `within` of the longer count for nothing.
    """
    for one in contests:
        a, b = one.first_id, one.second_id
        weights = 1.0, 1.0
        if lengths is not None:
            if not near(lengths[a], lengths[b], within):
                continue
            weights = lengths[b] / lengths[a], lengths[a] / lengths[b]
        for p in one.readable:
            won = p if soft else verdict(p)
            yield a, b, weights[0] * won
            yield b, a, weights[1] * (1 - won)


def near(one: int, other: int, within: float) -> bool:
    """Whether two lengths differ by at most a share of the longer one."""
    return abs(one - other) <= within * max(one, other)


def shares(
    names: Sequence[str], given: Iterable[tuple[str, str, float]]
) -> dict[str, float | None]:
    """Each candidate's mean credit over the verdicts that it is part of; None without any."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for name, _, credit in given:
        found[name].append(credit)
    return {name: fmean(some) if some else None for name, some in found.items()}


def strengths(
    names: Sequence[str], given: Sequence[tuple[str, str, float]]
) -> dict[str, float | None]:
    """How likely each candidate is to beat one of average strength, by Bradley-Terry; None for one
    without a verdict."""
    place = {name: i for i, name in enumerate(names)}
    matrix = [[0.0] * len(names) for _ in names]
    for name, other, credit in given:
        matrix[place[name]][place[other]] += credit
    met = {name for name, _, _ in given}
    ratings = elo(matrix)
    return {
        name: 1 / (1 + math.exp(-rating)) if name in met else None
        for name, rating in zip(names, ratings, strict=True)
    }


def elo(matrix: Sequence[Sequence[float]], *, prior: float = PRIOR) -> list[float]:
    """The ratings that maximise the sum of B[m][n] log sigmoid(e_m - e_n), with mean 0.

    Hunter's minorise-maximise steps for the Bradley-Terry model; `prior` is added to every entry.
    """
    n = len(matrix)
    wins = [sum(row) + prior * (n - 1) for row in matrix]
    strength = [1.0] * n
    for _ in range(500):
        new = []
        for i in range(n):
            met = sum(
                (matrix[i][j] + matrix[j][i] + 2 * prior) / (strength[i] + strength[j])
                for j in range(n)
                if j != i
            )
            new.append(wins[i] / met if met else strength[i])
        scale = math.exp(fmean(math.log(value) for value in new))
        strength = [value / scale for value in new]
    return [math.log(value) for value in strength]


class Field(Protocol):
    """The candidates of a prompt, round after round."""

    def meetings(self) -> list[Meeting]:
        """Who meets in the next round; nobody once all is told."""
        ...

    def take(self, contests: Sequence[Contest]) -> None:
        """What became of those meetings, in their order."""
        ...


class AllPairs:
    """Everybody meets everybody, in one round.

    Args:
        may_meet: Whether two of them do.
    """

    def __init__(
        self, names: Sequence[str], may_meet: Callable[[str, str], bool] = lambda a, b: True
    ) -> None:
        self._left = [meeting for meeting in combinations(names, 2) if may_meet(*meeting)]

    def meetings(self) -> list[Meeting]:
        """See `Field`."""
        return self._left

    def take(self, contests: Sequence[Contest]) -> None:
        """See `Field`."""
        self._left = []


class Bracket:
    """Seeds by contests with one reference, then two eliminations: for the best and for the worst.

    In each round the strongest seed that is left meets the weakest one; of an odd number the
    strongest goes on without a contest. Whoever loses in the first round goes on among the weak, of
    whom the loser stays: the one that has lost to the end is the worst. Verdicts that contradict
    each other, and contests that cannot be read, leave it to the seeds.

    Args:
        rng: Draws the reference.
    """

    def __init__(self, names: Sequence[str], rng: Random) -> None:
        self.reference = rng.choice(list(names))
        self._others = [name for name in names if name != self.reference]
        self._seeds: dict[str, float] = {}
        self._strong: list[str] = []
        self._weak: list[str] = []
        self._rounds = 0
        self._place: dict[str, int] = {}
        """By candidate that is out: rounds survived among the strong, or lost among the weak."""

    def meetings(self) -> list[Meeting]:
        """See `Field`."""
        if not self._seeds:
            return [(name, self.reference) for name in self._others]
        return [*_by_seed(self._strong), *_by_seed(self._weak)]

    def take(self, contests: Sequence[Contest]) -> None:
        """See `Field`."""
        if not self._seeds:
            against = {one.first_id: _first_wins(one) for one in contests}
            self._seeds = {**against, self.reference: 1 - fmean(against.values())}
            names = [self.reference, *self._others]
            self._strong = sorted(names, key=lambda name: -self._seeds[name])
            return
        self._rounds += 1
        of_strong = len(_by_seed(self._strong))
        lost = [one.ids[_first_wins(one) >= 0.5] for one in contests[:of_strong]]
        won = {one.ids[_first_wins(one) < 0.5] for one in contests[of_strong:]}
        for name in won:
            self._place[name] = -self._rounds
        self._weak = [name for name in self._weak if name not in won]
        if self._rounds == 1:
            self._weak = sorted(lost, key=lambda name: -self._seeds[name])
        else:
            self._place |= dict.fromkeys(lost, self._rounds)
        self._strong = [name for name in self._strong if name not in lost]

    @property
    def scores(self) -> dict[str, float]:
        """From 0 to 1, by rank: how far a candidate came, then its seed; the mean of equal ranks.

        The last one among the weak is below all, the last one among the strong above all.
        """
        ends = {
            **dict.fromkeys(self._weak, -self._rounds - 1),
            **dict.fromkeys(self._strong, self._rounds + 1),
        }
        place = {**self._place, **ends}
        ranked = sorted(place, key=lambda name: (place[name], self._seeds[name]))
        last = max(1, len(ranked) - 1)
        found: dict[tuple[int, float], list[int]] = {}
        for at, name in enumerate(ranked):
            found.setdefault((place[name], self._seeds[name]), []).append(at)
        return {name: fmean(found[place[name], self._seeds[name]]) / last for name in ranked}


def _by_seed(names: Sequence[str]) -> list[Meeting]:
    """The strongest against the weakest, and so on; of an odd number the strongest against none."""
    playing = names[len(names) % 2 :]
    return [(playing[i], playing[-1 - i]) for i in range(len(playing) // 2)]


def _first_wins(one: Contest) -> float:
    """The mean of both orders; 0.5 where neither can be read."""
    return fmean(one.readable) if one.readable else 0.5


def contest_facts(
    contests: Sequence[Contest], *, lengths: Mapping[str, int], mass: Sequence[float] = ()
) -> dict[str, Any]:
    """How far verdicts can be trusted.

    Args:
        lengths: Of the candidates.
        mass: The probability that the judge gave one of the verdicts at all, of each question.

    Returns:
        `comparisons` and how many of their `verdicts` could be read; `position_consistency`: of
        the contests read in both orders, those whose verdicts name the same candidate;
        `first_wins`: of all verdicts for somebody, those for the one shown first; `intransitive`:
        of the triples of candidates with three winners told, those that go round in a circle
        (chance: a quarter), and the number of those `triples`; `longer_wins`: of the contests
        won, those won by the longer one. A rate over nothing is None.
    """
    both = [one for one in contests if len(one.readable) == 2]
    same = [verdict(one.p_shown_first) == verdict(one.p_shown_last) for one in both]  # type: ignore[arg-type]
    shown: list[bool] = []
    for one in contests:
        for p, is_first in ((one.p_shown_first, True), (one.p_shown_last, False)):
            if p is not None and p != 0.5:
                shown.append((p > 0.5) == is_first)
    won = {
        (one.first_id, one.second_id): _first_wins(one) > 0.5
        for one in contests
        if one.readable and _first_wins(one) != 0.5
    }
    longer = [
        (lengths[a] > lengths[b]) == first
        for (a, b), first in won.items()
        if lengths[a] != lengths[b]
    ]
    circles = list(_circles(won))
    return {
        "comparisons": len(contests),
        "verdicts": sum(len(one.readable) for one in contests),
        "position_consistency": _share(same),
        "first_wins": _share(shown),
        "intransitive": _share(circles),
        "triples": len(circles),
        "longer_wins": _share(longer),
        **({"verdict_mass": round(fmean(mass), 4)} if mass else {}),
    }


def _circles(won: Mapping[Meeting, bool]) -> Iterator[bool]:
    """Whether three candidates beat each other in a circle, for all three that have met."""
    beats = {meeting if first else meeting[::-1] for meeting, first in won.items()}
    met: dict[str, set[str]] = {}
    for a, b in beats:
        met.setdefault(a, set()).add(b)
        met.setdefault(b, set()).add(a)
    for a in sorted(met):
        for b, c in combinations(sorted(name for name in met[a] if name > a), 2):
            if c in met[b]:
                wins = [sum((x, y) in beats for y in (a, b, c)) for x in (a, b, c)]
                yield wins == [1, 1, 1]


def _share(values: Sequence[bool]) -> float | None:
    return round(fmean(values), 4) if values else None
