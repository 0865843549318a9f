"""From pairs to an order: which replies of a prompt can be placed beside one another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

Pair = tuple[str, str]
"""The better reply and the worse one."""


def places_of(pairs: Iterable[Pair]) -> dict[str, int]:
    """Places of replies, best 0, that say no more than the pairs do.

    Where the pairs, and what follows from them, leave nothing open but ties, all replies have a
    place. Else that would be made up, and one reply is kept with those it was preferred to: the one
    that was preferred to most, of several the first in the order of the pairs. Replies without a
    place are left out; a pair that was also judged the other way round counts for neither.
    """
    given = dict.fromkeys(pairs)
    below: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for better, worse in given:
        if better != worse and (worse, better) not in given:
            below[better][worse] = None
    if not below:  # a reply beside itself has no order, and is a reply still
        return next(({better: 0} for better, worse in given if better == worse), {})
    beaten = {worse for each in below.values() for worse in each}
    if beaten.isdisjoint(below):  # no reply is both: the common case, and quick
        if len(below) == 1 or all(set(each) == beaten for each in below.values()):
            return {**dict.fromkeys(below, 0), **dict.fromkeys(beaten, 1)}
    elif (levels := _levels(below)) is not None:
        return levels
    best = max(below, key=lambda reply: len(below[reply]))  # the first of equals
    return {best: 0, **dict.fromkeys(below[best], 1)}


def _levels(below: dict[str, dict[str, None]]) -> dict[str, int] | None:
    """Levels such that a reply is over all of a lower level, as the pairs say; else None."""
    under: dict[str, set[str]] = {}

    def reach(reply: str, above: tuple[str, ...]) -> set[str] | None:
        if reply in above:
            return None  # a circle
        if reply not in under:
            found: set[str] = set()
            for worse in below.get(reply, ()):
                further = reach(worse, (*above, reply))
                if further is None:
                    return None
                found |= {worse, *further}
            under[reply] = found
        return under[reply]

    replies = dict.fromkeys([*below, *(worse for each in below.values() for worse in each)])
    if len(replies) > 100 or any(reach(reply, ()) is None for reply in replies):
        return None
    sizes = sorted({len(under[reply]) for reply in replies}, reverse=True)
    levels = {reply: sizes.index(len(under[reply])) for reply in replies}
    for reply, level in levels.items():
        if under[reply] != {other for other, lower in levels.items() if lower > level}:
            return None
    return levels
