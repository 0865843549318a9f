"""Columns of tables that others made: which one holds what, and what a cell says."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from srlm_lite.data.sources import DataSource, Row
from srlm_lite.errors import UserError


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table of replies, as the user names them. None: to be found by its name."""

    prompt: str | None = None
    response: str | None = None
    """One reply, or a list of them."""
    score: str | None = None
    """Higher is better."""
    rank: str | None = None
    """Lower is better; goes before the score."""
    id: str | None = None
    """The column with the reply's id."""
    prompt_id: str | None = None
    target: str | None = None
    """What the judge should have said of the reply, ending in a line `Score: <number>`."""
    system: str | None = None
    """The system message that goes before the prompt."""
    input: str | None = None
    """What the prompt is about; it goes below it."""
    chosen: str | None = None
    rejected: str | None = None
    better: str | None = None
    """Which of two replies is the better one, or whether the one reply is good."""


OPTIONS = {
    "prompt": "--prompt-column",
    "response": "--response-column",
    "score": "--score-column",
    "rank": "--rank-column",
    "id": "--id-column",
    "prompt_id": "--prompt-id-column",
    "target": "--target-column",
    "system": "--system-column",
    "input": "--input-column",
    "chosen": "--chosen-column",
    "rejected": "--rejected-column",
    "better": "--better-column",
}
NAMES = {
    # In this order; what stands after `input` holds a dialogue as often as a text.
    "prompt": (
        *("prompt", "instruction", "question", "query", "text", "input"),
        *("post", "info", "history", "context", "conversations", "messages", "conversation"),
    ),
    "response": ("response", "answer", "reply", "completion", "output"),
    "replies": (
        *("responses", "answers", "replies", "completions", "outputs", "generations"),
        *("candidates", "summaries", "all_generated_responses"),
    ),
    "score": ("score", "quality", "reward", "rating"),
    "scores": ("scores", "qualities", "rewards", "ratings", "rating", "all_rm_scores"),
    "rank": ("rank", "ranking"),
    "ranks": ("ranks", "rankings", "rank", "ranking"),
    "id": ("response_id", "reply_id", "completion_id"),
    "prompt_id": ("prompt_id", "question_id", "instruction_id"),
    "target": ("target",),
    "system": (
        *("system", "system_prompt", "system_message", "system_instruction"),
        "systemInstruction",
    ),
    "input": ("input", "context"),
    "past": ("history",),
    "chosen": (
        *("chosen", "response_j", "preferred_output", "chosen_response", "preferred", "accepted"),
        "response_chosen",
    ),
    "rejected": (
        *("rejected", "response_k", "non_preferred_output", "rejected_response", "dispreferred"),
        *("reject", "response_rejected"),
    ),
    "dialogue": (
        *("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "contents"),
    ),
    "transcript": ("text", "chat", "conversation", "dialogue", "transcript"),
    "good": ("label", "kto_tag", "desirable", "is_good"),
    "better": (
        *("better_response_id", "labels", "label", "winner", "preference", "preferred"),
        *("choice", "better", "overall_preference", "preference_strength"),
    ),
}
"""What others call a column, by what it holds."""

NO_SCORES = frozenset(
    {
        *("id", "idx", "index", "row", "turn", "turns", "num_turns", "n_turns", "length", "tokens"),
        *("n_tokens", "num_tokens", "token_count", "timestamp", "tstamp", "created", "created_at"),
        *("created_at_i", "date", "year", "seed", "num_responses", "__index_level_0__"),
    }
)
"""Names of columns whose numbers say nothing of how good a reply is."""


def no_such_column(name: str, columns: Iterable[str], *, where: str, option: str) -> UserError:
    """The error for a column that is not there: lists the columns, suggests a close one."""
    there = list(columns)
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"Did you mean {option} {close[0]}?" if close else f"Choose one with {option}"
    return UserError(f"no column {name!r}; there: {', '.join(there)}", where=where, way_out=hint)


def column_needed(source: DataSource, what: str, option: str) -> UserError:
    """The error for a column that could not be found."""
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
    if value is None or value == "":
        return None
    return str(value).encode("utf-8", "replace").decode("utf-8")  # half a character is no id's


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
