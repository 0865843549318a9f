"""Columns of tables that others made: which one holds what, and what a cell says."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any

from srlm_lite.data.sources import DataSource, Row
from srlm_lite.errors import UserError


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table of replies. None: to be guessed, or after guessing, not there."""

    prompt: str | None = None
    response: str | None = None
    score: str | None = None
    """Higher is better."""
    rank: str | None = None
    """Lower is better; goes before the score."""
    id: str | None = None
    """The column with the reply's id."""
    prompt_id: str | None = None
    target: str | None = None
    """What the judge should have said of the reply, ending in a line `Score: <number>`."""


OPTIONS = {
    "prompt": "--prompt-column",
    "response": "--response-column",
    "score": "--score-column",
    "rank": "--rank-column",
    "id": "--id-column",
    "prompt_id": "--prompt-id-column",
    "target": "--target-column",
}
COMMON_NAMES = {
    "prompt": ("prompt", "instruction", "question", "query", "text", "input"),
    "response": ("response", "answer", "reply", "completion", "output"),
    "score": ("score", "quality", "reward", "rating"),
    "rank": ("rank", "ranking"),
    "id": ("response_id", "reply_id", "completion_id"),
    "prompt_id": ("prompt_id", "question_id", "instruction_id"),
    "target": ("target",),
}


def guess_columns(given: Columns, there: Collection[str], *, where: str) -> Columns:
    """The columns given, and for the others a common name that is there.

    An order that is given is the only one: with `score` given, `rank` is not guessed.

    Raises:
        UserError: A column that was given is not there.
    """
    found: dict[str, str | None] = {}
    for field in fields(Columns):
        name = getattr(given, field.name)
        if name is not None and name not in there:
            raise no_such_column(name, there, where=where, option=OPTIONS[field.name])
        common = (common for common in COMMON_NAMES[field.name] if common in there)
        found[field.name] = name or next(common, None)
    if given.score is not None and given.rank is None:
        found["rank"] = None
    return Columns(**found)


def no_such_column(name: str, columns: Iterable[str], *, where: str, option: str) -> UserError:
    """The error for a column that is not there: lists the columns, suggests a close one."""
    there = list(columns)
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"Did you mean {option} {close[0]}?" if close else f"Choose one with {option}"
    return UserError(f"no column {name!r}; there: {', '.join(there)}", where=where, way_out=hint)


def column_needed(source: DataSource, what: str, option: str) -> UserError:
    """The error for a column that could not be guessed."""
    there = ", ".join(source.columns())
    return UserError(
        f"{what}; there: {there}", where=source.where, way_out=f"Name it with {option}"
    )


def reused_id(source: DataSource, number: int, prompt_id: str) -> UserError:
    """The error for an id that row `number` gives to another prompt than an earlier row."""
    return UserError(
        f"prompt id {prompt_id!r} stands for another prompt than before",
        where=f"{source.where}, row {number}",
        way_out="Name the right column with --prompt-id-column",
    )


def is_foreign(row: Row, lang: str | None) -> bool:
    """Whether a row says that it is in another language; a row that says nothing is not."""
    said = row.get("lang")
    return lang is not None and said not in (None, "") and said != lang


def text_of(row: Row, column: str | None) -> str:
    """The stripped text of a column; empty where there is none."""
    value = row.get(column) if column is not None else None
    return value.strip() if isinstance(value, str) else ""


def id_of(row: Row, column: str | None) -> str | None:
    """The id in a column, as text."""
    value = row.get(column) if column is not None else None
    return None if value is None or value == "" else str(value)


def digest(*texts: str) -> str:
    """An id for what has none."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()[:16]


def number_of(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
