"""Dialogues in the cells of a table: lists of messages in their many dresses, and transcripts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from srlm_lite.conversation import Asked, Message, is_one_turn, problem_of
from srlm_lite.data.text import is_garbled

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""What others call the roles."""

TOOLS = frozenset({"tool", "function", "function_call", "observation", "tool_call", "ipython"})
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "message", "parts")
TEXT_PARTS = frozenset({"text", "input_text", "output_text", None})
WITHIN = ("messages", "conversation", "conversations", "full_text", "text", "content", "post")
"""Keys under which an object in a cell has what it says."""

_TURNS = {
    "\n\n": re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):"),
    "\n": re.compile(r"(?:\A|\n)\s*(Human|Assistant):"),
    "###": re.compile(r"\s*###\s*(Human|Assistant):"),
}
"""What stands before the speakers of a transcript; blank lines go before single ones."""


class Unusable(Exception):
    """A row that does not serve; `reason` is a key of `ledger.REASONS`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def parsed(cell: Any) -> Any:
    """A cell, or what it spells: tables of text have lists and objects as JSON."""
    if isinstance(cell, str) and cell[:1] in "[{" and cell.rstrip()[-1:] in ("]", "}"):
        try:
            found = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        if isinstance(found, dict | list) and _is_made_of_texts(found):
            return found
    return cell


def _is_made_of_texts(found: Any) -> bool:
    """Whether what a text spells is a dialogue or a list of replies, and not a text about JSON."""
    if isinstance(found, list):
        return bool(found) and all(isinstance(one, str) or is_message(one) for one in found)
    return is_dialogue(found)


def is_message(cell: Any) -> bool:
    """Whether it is one turn: an object with a role and what is said."""
    return (
        isinstance(cell, Mapping)
        and any(isinstance(cell.get(key), str) for key in ROLE_KEYS)
        and any(key in cell for key in CONTENT_KEYS)
    )


def is_dialogue(cell: Any) -> bool:
    """Whether it is a list of turns: of objects, an object of lists, or of exchanges."""
    if isinstance(cell, Mapping):
        if any(isinstance(cell.get(key), list) for key in ROLE_KEYS):
            return any(isinstance(cell.get(key), list) for key in CONTENT_KEYS)
        return is_dialogue(cell.get("messages"))
    if not isinstance(cell, list) or not cell:
        return False
    return all(is_message(one) or _is_exchange(one) for one in cell)


def _is_exchange(cell: Any) -> bool:
    return isinstance(cell, Mapping) and {"input", "output"} <= set(cell)


def is_transcript(cell: Any) -> bool:
    """Whether it is a text in which a human and an assistant speak in turns."""
    return isinstance(cell, str) and _speakers(cell) is not None


def _speakers(text: str) -> re.Pattern[str] | None:
    """What tells the speakers of a transcript; None for any other text."""
    if re.match(r"\s*(?:###\s*)?Human:", text) is None:
        return None
    for mark in _TURNS.values():
        found = mark.findall(text)
        if found[:1] == ["Human"] and "Assistant" in found:
            return mark
    return None


def turns_in(cell: Any, *, role: str) -> list[Message]:
    """The turns in a cell; a plain text is one of `role`.

    Raises:
        Unusable: It is neither text nor turns, or a turn is more than text.
    """
    if isinstance(cell, str) and is_dialogue(found := parsed(cell)):
        cell = found
    if cell is None:
        return []
    if isinstance(cell, str):
        if (mark := _speakers(cell)) is not None:
            return _transcribed(cell, mark)
        return [{"role": role, "content": cell.strip()}]
    if is_message(cell):
        return [_message(cell)]
    if isinstance(cell, Mapping) and not is_dialogue(cell):
        inner = next((cell[key] for key in WITHIN if cell.get(key)), None)
        if inner is None:
            raise Unusable("not_text")
        return turns_in(inner, role=role)
    if not is_dialogue(cell):
        if isinstance(cell, list) and not cell:
            return []
        raise Unusable("not_text")
    return [turn for one in _one_by_one(cell) for turn in _turns(one)]


def _one_by_one(cell: Any) -> Sequence[Any]:
    if isinstance(cell, list):
        return cell
    if isinstance(cell.get("messages"), list) and not any(
        isinstance(cell.get(key), list) for key in ROLE_KEYS
    ):
        return list(cell["messages"])
    lists = {key: value for key, value in cell.items() if isinstance(value, list)}
    role = next(key for key in ROLE_KEYS if key in lists)
    said = next(key for key in CONTENT_KEYS if key in lists)
    if len(lists[role]) != len(lists[said]):
        raise Unusable("unanswerable")
    return [{role: a, said: b} for a, b in zip(lists[role], lists[said], strict=True)]


def _turns(one: Mapping[str, Any]) -> list[Message]:
    if is_message(one):
        return [_message(one)]
    return [
        {"role": role, "content": text_in(one.get(key))}
        for role, key in (("user", "input"), ("assistant", "output"))
    ]


def _message(one: Mapping[str, Any]) -> Message:
    said = next(str(one[key]) for key in ROLE_KEYS if isinstance(one.get(key), str)).lower()
    if said in TOOLS or one.get("tool_calls") or one.get("function_call"):
        raise Unusable("tools")
    content = next((one[key] for key in CONTENT_KEYS if one.get(key) is not None), None)
    return {"role": ROLES.get(said, said), "content": text_in(content)}


def text_in(content: Any) -> str:
    """What is said: a text, or a list of parts that are texts.

    Raises:
        Unusable: A part is more than text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, Mapping):
        content = content.get("parts", [content])
    if not isinstance(content, list):
        raise Unusable("not_text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type") not in TEXT_PARTS:
            raise Unusable("tools" if "tool" in str(part.get("type")) else "not_text")
        if not isinstance(text, str):
            raise Unusable("not_text")
        texts.append(text.strip())
    return "\n\n".join(filter(None, texts))


def _transcribed(text: str, mark: re.Pattern[str]) -> list[Message]:
    """The turns of a text; a last one of the assistant that says nothing is what is to come."""
    marks = list(mark.finditer(text))
    ends = [*(one.start() for one in marks[1:]), len(text)]
    turns: list[Message] = [
        {"role": ROLES[one[1].lower()], "content": text[one.end() : end].strip()}
        for one, end in zip(marks, ends, strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def asked_of(turns: Sequence[Message]) -> Asked:
    """What is to be answered: one user turn's text, or the messages.

    Raises:
        Unusable: They cannot be answered, or hold what no one writes.
    """
    said = [one for one in turns if one["role"] != "system" or one["content"]]
    if any(is_garbled(one["content"]) for one in said):
        raise Unusable("garbled")
    if not any(one["content"] for one in said):
        raise Unusable("empty")
    if problem_of(said) is not None:
        raise Unusable("unanswerable")
    return said[0]["content"] if is_one_turn(said) else tuple(said)
