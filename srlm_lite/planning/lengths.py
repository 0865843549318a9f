"""How long a recipe's texts can be, in tokens, without a tokenizer.

No tokenizer of bytes, or with a fallback to bytes, makes more tokens of a text than it has bytes.
So the seed data gives bounds that hold, and the window bounds them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_lite.conversation import with_both_faces
from srlm_lite.errors import UserError
from srlm_lite.forms import form_of
from srlm_lite.planning.probe import thinks
from srlm_lite.records import Prompt
from srlm_lite.settings import DISTURBED_PROMPTS, Base, Shared

TEMPLATE = 64
"""Tokens that a chat template may put around a turn."""
_END = 4
"""Tokens that end a turn."""
_NAMES = ("text", "prompt", "instruction")
"""Columns that may hold a prompt."""
_LARGEST = 256 << 20
"""Bytes of a file up to which it is looked into."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens at most; counts are None where the data is not there.

    `prompt` is of candidates, `judge_prompt` of a judge's question, `example` of an SFT row,
    `pair` of a prompt with an answer of the policy's.
    """

    prompt: int
    judge_prompt: int
    example: int
    pair: int
    examples: int | None = None
    """Rows of the anchor's SFT, and of the one before it where that writes the EFT targets."""
    graded: int | None = None
    """Replies that each evaluation judges."""
    thought: int = 0
    """Before every answer; 0 where the base does not think, or that cannot be told here."""


def longest(recipe: Shared) -> Lengths:
    """As the window admits, whatever the data."""
    window = recipe.base.window
    thought = recipe.rollout.max_thought_tokens if thinks(recipe.base) else 0
    return Lengths(window, window, window, window, thought=thought)


def lengths_of(recipe: Shared) -> Lengths:
    """As the seed data admits, where it is there and small enough to look into."""
    window, bound = recipe.base.window, longest(recipe)
    if not Path(recipe.data.dir).is_dir():
        return bound
    try:
        rubric = _rubric_bytes(recipe)
        prompts = _rows(_prompt_file(recipe)) if recipe.prompts.source == "file" else None
        held_out = _rows(_held_out_file(recipe), missing=[])
        ift = _rows(Path(recipe.data.dir) / "ift.jsonl", missing=[])
        extra = _rows(Path(recipe.data.extra)) if recipe.data.extra else []
        eft = _rows(Path(recipe.data.dir) / "eft_train.jsonl", missing=[])
        graded = _rows(Path(recipe.data.dir) / "eft_eval.jsonl", missing=[])
    except (OSError, ValueError, UserError):
        return bound
    ift, eft = ift[: recipe.anchor.ift_limit], _of_prompts(eft, recipe.anchor.eft_prompts)
    graded = _of_prompts(graded, recipe.evaluate.eft_prompts)
    new, thought = recipe.rollout.max_new_tokens, bound.thought
    turns = around(recipe.base)
    prompt = window if prompts is None else turns + _most([*prompts, *held_out], *_NAMES)
    judged = rubric + TEMPLATE
    own = judged + prompt + 4 * new  # an answer, written out in the judge's question
    given = judged + _most([*eft, *graded], "prompt", "response")
    example = (
        TEMPLATE
        + turns
        + max(
            _most([*ift, *extra], "prompt", "response"),
            judged
            + _most(eft, "prompt", "response", "target")
            + recipe.judge.max_new_tokens
            + thought,
        )
    )
    anchor, shipped = recipe.anchor, recipe.anchor.init != "base"
    learned = len(ift) * anchor.use_ift + len(extra)
    count = learned + len(eft) * anchor.use_eft
    if anchor.use_eft and anchor.eft_targets == "self":
        count += len(ift) * anchor.use_ift  # the model that writes the targets learns them first
    elif anchor.use_eft and anchor.eft_targets == "disturbed":
        count = 2 * learned + 2 * (anchor.eft_prompts or DISTURBED_PROMPTS)
        example = max(example, own + recipe.judge.max_new_tokens + thought)
    if form_of(recipe).shown > 1:  # questions and lessons hold several replies
        own = example = window
    return Lengths(
        prompt=min(window, prompt),
        judge_prompt=min(window, max(own, given)),
        example=min(window, example),
        pair=min(window, prompt + thought + new + _END),
        examples=0 if shipped else count,
        graded=len(graded),
        thought=thought,
    )


def around(section: Base, turns: Sequence[object] = ()) -> int:
    """Tokens that a template may put around a prompt of so many turns, the system message's too."""
    system = 0 if section.system is None else TEMPLATE + len(section.system.encode())
    return system + TEMPLATE * max(1, len(turns))


def prompts_of(recipe: Shared) -> tuple[list[Prompt] | None, list[Prompt] | None]:
    """Prompts of a file that candidates answer, and held-out ones; None of those that are not here
    or cannot be read."""
    own = recipe.prompts.source == "file"
    return (
        _prompts(_prompt_file(recipe)) if own else None,
        _prompts(_held_out_file(recipe), limit=recipe.evaluate.policy_prompts),
    )


def _prompts(path: Path, *, limit: int | None = None) -> list[Prompt] | None:
    try:
        rows = _rows(path)
    except (OSError, ValueError):
        return None
    texts = [str(next((row[key] for key in _NAMES if row.get(key)), "")) for row in rows]
    found = {
        text: Prompt("", text, messages=row.get("messages"))
        for text, row in zip(texts, rows, strict=True)
    }
    return list(found.values())[:limit]


def _prompt_file(recipe: Shared) -> Path:
    named = recipe.prompts.file
    return Path(named) if named else Path(recipe.data.dir) / "prompts.jsonl"


def _held_out_file(recipe: Shared) -> Path:
    """What the evaluation takes its prompts from."""
    own = Path(recipe.data.dir) / "eval_prompts.jsonl"
    return own if own.is_file() else own.with_name("eft_eval.jsonl")


def _rows(path: Path, *, missing: list[Any] | None = None) -> list[Mapping[str, Any]]:
    if missing is not None and not path.is_file():
        return missing
    if path.stat().st_size > _LARGEST:
        raise ValueError("too large to look into")
    with path.open(encoding="utf-8") as file:
        try:
            rows = [json.loads(line) for line in file if line.strip()]
        except RecursionError as error:
            raise ValueError("too deep") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not as seed data is")  # which the run says with the line
    return [with_both_faces(row, _name_in(row)) for row in rows]


def _name_in(row: Mapping[str, Any]) -> str:
    return next((name for name in _NAMES if row.get(name) is not None), _NAMES[0])


def _of_prompts(rows: list[Mapping[str, Any]], limit: int | None) -> list[Mapping[str, Any]]:
    if limit is None:
        return rows
    kept = set(list(dict.fromkeys(row.get("prompt_id") for row in rows))[:limit])
    return [row for row in rows if row.get("prompt_id") in kept]


def _most(rows: Iterable[Mapping[str, Any]], *columns: str) -> int:
    """Bytes of the longest row's text columns, and what stands around its turns beyond one."""
    return max(
        (
            sum(len(str(row.get(key) or "").encode()) for key in columns)
            + TEMPLATE * len(row.get("messages") or ())
            for row in rows
        ),
        default=0,
    )


def _rubric_bytes(recipe: Shared) -> int:
    from srlm_lite.judging import load_rubric

    return len(load_rubric(recipe.judge.rubric).template.encode())
