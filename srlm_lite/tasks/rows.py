"""Rows of a task's data files, for the scripts beside the recipes that make those. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def ranked_rows(
    prompt_id: str,
    prompt: str,
    replies: Sequence[str],
    *,
    score: Callable[[str, str], float],
    target: Callable[[str, str], str] | None = None,
) -> list[Row]:
    """A row for each reply to a prompt; those of the same score share a rank, 0 is the best.

    Args:
        score: The gold score of a prompt and a reply, higher is better.
        target: The judge's ideal reply to the two; None: the rows have none.
    """
    scores = [score(prompt, reply) for reply in replies]
    order = sorted(set(scores), reverse=True)
    return [
        {
            "prompt_id": prompt_id,
            "prompt": prompt,
            "response_id": f"{prompt_id}-{number}",
            "response": reply,
            "rank": order.index(points),
            "quality": float(points),
            "target": None if target is None else target(prompt, reply),
        }
        for number, (reply, points) in enumerate(zip(replies, scores, strict=True))
    ]


def prompt_rows(stem: str, texts: Iterable[str], source: str) -> list[Row]:
    """A row for each prompt, with ids that begin with `stem`."""
    return [
        {"prompt_id": f"{stem}-{number:04}", "text": text, "source": source}
        for number, text in enumerate(texts)
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as JSONL."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
