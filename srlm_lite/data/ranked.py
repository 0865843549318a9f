"""Ranked or scored replies in rows: one reply a row, or one pair (chosen, rejected) a row."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from srlm_lite.data.columns import (
    OPTIONS,
    Columns,
    column_needed,
    digest,
    id_of,
    is_foreign,
    number_of,
    reused_id,
    text_of,
)
from srlm_lite.data.ledger import Ledger
from srlm_lite.data.sources import DataSource, Row
from srlm_lite.data.split import PlacedReply, RankedPrompt
from srlm_lite.data.text import is_garbled
from srlm_lite.errors import UserError
from srlm_lite.records import Prompt

PAIR_COLUMNS = frozenset({"chosen", "rejected"})
TARGET_END = re.compile(r"(?:^|\n)\s*Score:\s*-?\d+(?:\.\d+)?\s*$")
DIALOGUE = re.compile(r"\s*Human: (?P<prompt>.*?)\n\nAssistant: (?P<response>.*)", re.DOTALL)
LATER_TURN = re.compile(r"\n\n(?:Human|Assistant):")


def is_pairs(there: Collection[str]) -> bool:
    """Whether rows with these columns are pairs."""
    return set(there) >= PAIR_COLUMNS


def is_ranked(columns: Columns) -> bool:
    """Whether these columns suffice to order replies."""
    has_order = columns.score is not None or columns.rank is not None
    return columns.prompt is not None and columns.response is not None and has_order


def read_replies(
    source: DataSource, columns: Columns, *, lang: str | None, replies: Ledger
) -> tuple[list[RankedPrompt], list[Prompt]]:
    """Prompts with placed replies, and prompts none of whose replies could be placed.

    Ids of replies are unique over the source, as whoever reads the data needs them: where a column
    counts them anew for each prompt, the prompt's id goes before them.

    Args:
        columns: As `guess_columns` found them.
        lang: Rows that have a column `lang` must agree with it; None takes every language.
        replies: Is told of every row.

    Raises:
        UserError: A column that is needed is missing; an id stands for two different prompts.
    """
    for needed in ("prompt", "response"):
        if getattr(columns, needed) is None:
            raise column_needed(source, f"no column for the {needed}", OPTIONS[needed])
    if columns.score is None and columns.rank is None:
        raise column_needed(
            source, "no column orders the replies", "--score-column or --rank-column"
        )
    texts: dict[str, str] = {}
    placed: dict[str, list[PlacedReply]] = {}
    for number, row in enumerate(source.rows, start=1):
        replies.seen += 1
        prompt = text_of(row, columns.prompt)
        problem = "other_language" if is_foreign(row, lang) else _text_problem(prompt)
        if problem is not None:
            replies.drop(problem)
            continue
        prompt_id = id_of(row, columns.prompt_id) or digest(prompt)
        if texts.setdefault(prompt_id, prompt) != prompt:
            raise reused_id(source, number, prompt_id)
        reply = _reply(row, columns, prompt_id)
        if isinstance(reply, str):
            replies.drop(reply)
        else:
            placed.setdefault(prompt_id, []).append(reply)
    named = _told_apart(placed)
    ranked = [RankedPrompt(key, texts[key], tuple(group)) for key, group in named.items()]
    spare = [Prompt(key, text, source.label) for key, text in texts.items() if key not in placed]
    return ranked, spare


def read_pairs(
    source: DataSource, columns: Columns, *, lang: str | None, replies: Ledger
) -> list[RankedPrompt]:
    """One prompt of two replies from each row with `chosen` and `rejected`.

    Either side is a reply, a dialogue as a list of messages (role, content), or a transcript of
    `Human:` and `Assistant:`; the prompt is a column or the dialogue's first turn. Two pairs of
    one prompt are not compared with each other, so they stay two prompts here.
    """
    pairs = []
    for row in source.rows:
        replies.seen += 2
        given = row.get(columns.prompt) if columns.prompt is not None else None
        chosen, rejected = (_exchange(given, row.get(side)) for side in ("chosen", "rejected"))
        if is_foreign(row, lang):
            replies.drop("other_language", 2)
            continue
        if chosen is None or rejected is None or chosen[0] != rejected[0]:
            replies.drop("multi_turn", 2)
            continue
        texts = (*chosen, rejected[1])
        problem = next(filter(None, map(_text_problem, texts)), None)
        if problem is not None:
            replies.drop(problem, 2)
            continue
        prompt_id = digest(*texts)
        sides = (chosen[1], rejected[1])
        pair = tuple(
            PlacedReply(f"{prompt_id}-{name}", text, float(place))
            for place, (name, text) in enumerate(zip(("chosen", "rejected"), sides, strict=True))
        )
        pairs.append(RankedPrompt(prompt_id, chosen[0], pair))
    return pairs


def _text_problem(text: str) -> str | None:
    if not text.strip():
        return "empty"
    return "garbled" if is_garbled(text) else None


def _reply(row: Row, columns: Columns, prompt_id: str) -> PlacedReply | str:
    """The reply of a row, or why it is dropped."""
    text = text_of(row, columns.response)
    problem = _text_problem(text)
    if problem is not None:
        return problem
    quality = number_of(row.get(columns.score)) if columns.score is not None else None
    if columns.rank is not None:
        place = number_of(row.get(columns.rank))
    else:
        place = None if quality is None else -quality
    if place is None:
        return "no_score"
    target = text_of(row, columns.target) or None
    if target is not None and not TARGET_END.search(target):
        return "bad_target"
    response_id = id_of(row, columns.id) or _id_by_text(prompt_id, text)
    return PlacedReply(response_id, text, place, quality, target)


def _id_by_text(prompt_id: str, text: str) -> str:
    return f"{prompt_id}-{digest(text)}"


def _told_apart(placed: Mapping[str, Sequence[PlacedReply]]) -> dict[str, list[PlacedReply]]:
    """The replies by prompt, with ids of which each is one reply's alone.

    All ids are made in the same way: as they are, else by prompt, else by text, which a column that
    is no id at all (a model's name) comes to.
    """
    by_prompt = {
        key: [replace(reply, response_id=f"{key}-{reply.response_id}") for reply in group]
        for key, group in placed.items()
    }
    for named in (placed, by_prompt):
        if _is_told_apart(named):
            return {key: list(group) for key, group in named.items()}
    return {
        key: [replace(reply, response_id=_id_by_text(key, reply.text)) for reply in group]
        for key, group in placed.items()
    }


def _is_told_apart(placed: Mapping[str, Sequence[PlacedReply]]) -> bool:
    """Whether no id stands for two replies; the same reply again is dropped later on."""
    known: dict[str, tuple[str, str]] = {}
    return all(
        known.setdefault(reply.response_id, (key, reply.text)) == (key, reply.text)
        for key, group in placed.items()
        for reply in group
    )


def _exchange(prompt: Any, side: Any) -> tuple[str, str] | None:
    """Prompt and reply of one side of a pair; None when it is not a single exchange."""
    before = _messages(prompt, role="user")
    after = _messages(side, role="assistant")
    if before is None or after is None:
        return None
    if isinstance(side, str) and not before:
        match = DIALOGUE.fullmatch(side)
        if match is None or LATER_TURN.search(match["response"]):
            return None
        return match["prompt"].strip(), match["response"].strip()
    # A list of messages on the chosen side may repeat the prompt that has a column of its own.
    dialogue = after if len(after) > 1 else [*before, *after]
    if [role for role, _ in dialogue] != ["user", "assistant"]:
        return None
    return dialogue[0][1].strip(), dialogue[1][1].strip()


def _messages(value: Any, *, role: str) -> list[tuple[str, str]] | None:
    """A text as one message, a list as its messages; None when it is neither."""
    if value is None:
        return []
    if isinstance(value, str):
        return [(role, value)]
    if not isinstance(value, list):
        return None
    if not all(isinstance(item, dict) for item in value):
        return None
    messages = [(item.get("role"), item.get("content")) for item in value]
    return [
        (speaker, content)
        for speaker, content in messages
        if isinstance(speaker, str) and isinstance(content, str)
    ]


def score_range(prompts: Iterable[RankedPrompt]) -> tuple[float, float] | None:
    """The lowest and highest score there is; None without scores."""
    scores = [
        reply.quality for prompt in prompts for reply in prompt.replies if reply.quality is not None
    ]
    return (min(scores), max(scores)) if scores else None


def score_target(
    score: float, *, score_range: tuple[float, float], target_range: tuple[int, int]
) -> str:
    """The judge's reply that states a known score, moved to the rubric's range and rounded.

    There is no rationale in it, so a judge that learns from it learns none: it will grade
    without reasons, which is quicker and usually worse.

    Raises:
        UserError: The score lies outside `score_range`.
    """
    low, high = score_range
    if not low <= score <= high:
        raise UserError(f"score {score:g} lies outside {low:g} to {high:g}", where="--score-range")
    bottom, top = target_range
    scaled = bottom + (top - bottom) * (score - low) / (high - low)
    return f"Score: {math.floor(scaled + 0.5)}"
