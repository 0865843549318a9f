"""The pairs that a report's page carries: everything of them, packed to fit a file of bounded size.

JSON, gzip, base64: nothing in it can end a tag or become one. The page unpacks it and shows every
text as text.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from srlm_lite.conversation import last_turn, turns
from srlm_lite.pairing import is_of_judgements
from srlm_lite.records import Judgement
from srlm_lite.report.facts import Pair

TEXT_LIMITS = (None, 4000, 2000, 1200, 800, 500, 300, 200, 160, 120)
"""Characters of a single text, tried in this order until all pairs fit."""

GoldScores = Callable[[str, str], float]
"""Gold score of a reply to a prompt."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Pairs as base64 of gzipped JSON, and what was left out to make them fit."""

    data: str
    shown: int
    total: int
    text_limit: int | None
    """Longer texts are cut in the middle."""


def pack(
    pairs: Sequence[Pair],
    *,
    room: int,
    gold: GoldScores | None = None,
    told: Callable[[Judgement], Sequence[str]] = lambda judgement: (),
) -> Packed:
    """As much of the pairs as fits.

    Long texts are cut first, in the middle, all to the same length; when that is not enough, every
    second pair is left out, again and again.

    Args:
        room: Bytes that the data may have.
        told: What a judgement says beside its score and its text, a line each.
    """
    rows = [_row(pair, gold, told) for pair in pairs]
    longest = max((len(text) for row in rows for text in _texts(row)), default=0)
    limits = [limit for limit in TEXT_LIMITS if limit is None or limit < longest]
    for limit in limits:
        if limit != limits[-1] and _hopeless(rows, limit, room):
            continue
        data = _encoded([_cut(row, limit) for row in rows])
        if len(data) <= room:
            break
    while len(data) > room and len(rows) > 1:
        rows = rows[::2]
        data = _encoded([_cut(row, limit) for row in rows])
    return Packed(data, len(rows), len(pairs), limit)


def _row(
    pair: Pair, gold: GoldScores | None, told: Callable[[Judgement], Sequence[str]]
) -> dict[str, Any]:
    """What the page's script reads; short keys, for there are many rows.

    `m` are the turns of a conversation before the one that is answered, `p`.
    """
    record = pair.record
    scored = None
    if gold is not None and not is_of_judgements(record.origin):  # a judgement is no answer
        scored = [gold(record.prompt, record.chosen), gold(record.prompt, record.rejected)]
    return {
        "t": pair.iteration,
        "id": record.prompt_id,
        "from": record.origin,
        "m": turns(record.asked)[:-1],
        "p": last_turn(record.asked),
        "c": record.chosen,
        "r": record.rejected,
        "cs": _finite(record.chosen_score),
        "rs": _finite(record.rejected_score),
        "cl": len(record.chosen),
        "rl": len(record.rejected),
        "cv": [_vote(vote, told(vote)) for vote in pair.chosen_votes],
        "rv": [_vote(vote, told(vote)) for vote in pair.rejected_votes],
        "d": pair.disagreement,
        "w": [record.weight, record.smoothing],
        "g": scored,
        "by": pair.principle,
        **({"vs": pair.compared} if pair.compared else {}),
    }


def _vote(vote: Judgement, told: Sequence[str]) -> list[Any]:
    """Score, the score that the judge wrote where another one counts, its words, and what the form
    of judging tells beside them, if anything."""
    return [vote.score, vote.sampled_score, vote.text, *([list(told)] if told else [])]


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _hopeless(rows: Sequence[dict[str, Any]], limit: int | None, room: int) -> bool:
    """Whether every 25th row says that all of them, packed, are far too much: packing is slow."""
    some = rows[::25]
    if len(some) < 40:
        return False
    return len(_encoded([_cut(row, limit) for row in some])) * len(rows) / len(some) > 1.2 * room


def _texts(row: dict[str, Any]) -> list[str]:
    said = [text for _, text in row["m"]]
    votes = [vote[2] for key in ("cv", "rv") for vote in row[key]]
    return [*said, row["p"], row["c"], row["r"], *votes]


def _cut(row: dict[str, Any], limit: int | None) -> dict[str, Any]:
    if limit is None:
        return row
    votes = {
        key: [
            [score, wrote, shortened(text, limit), *more] for score, wrote, text, *more in row[key]
        ]
        for key in ("cv", "rv")
    }
    said = [[who, shortened(text, limit)] for who, text in row["m"]]
    replies = {key: shortened(row[key], limit) for key in ("p", "c", "r")}
    return {**row, "m": said, **replies, **votes}


def shortened(text: str, limit: int) -> str:
    """The text, or its beginning and its end: a judge's score stands at the end."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    head = limit - tail
    return f"{text[:head]} [... {len(text) - limit:,} characters ...] {text[-tail:]}"


def _encoded(rows: Sequence[dict[str, Any]]) -> str:
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    packed = gzip.compress(text.encode(), compresslevel=6, mtime=0)
    return base64.b64encode(packed).decode("ascii")
