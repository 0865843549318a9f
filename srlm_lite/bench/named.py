"""Options that name some of what there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from srlm_lite.errors import UserError

N = TypeVar("N", bound=str)


def named(text: str, known: Iterable[N], *, what: str, where: str) -> tuple[N, ...]:
    """Those of the known names that stand in a list with commas, in the order of the known.

    Args:
        what: One of them, in words.
        where: The option.

    Raises:
        UserError: One that does not exist.
    """
    there = tuple(known)
    asked = [name.strip() for name in text.split(",")]
    unknown = [name for name in asked if name not in there]
    if unknown:
        raise UserError(
            f"no such {what}: {unknown[0] or 'an empty name'}",
            where=where,
            way_out=f"There are {', '.join(there)}",
        )
    return tuple(name for name in there if name in asked)
