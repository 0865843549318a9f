"""What a reply answers: one user turn, as a rule, or a conversation that ends with one.

A conversation has two faces. Its messages are what a policy is given and learns after, by the
base's own chat template. Its transcript is one text, fenced, which a judge and other readers see in
the place where the user turn stands.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = Mapping[str, str]
"""A turn: `role` (system, user or assistant) and `content`."""

Asked = str | Sequence[Message]
"""One user turn's text, or messages of which the last is the user's."""


class Answerable(Protocol):
    """A row that a policy answers, or has answered: a prompt, a pair, an instruction."""

    @property
    def asked(self) -> Asked: ...


NAMES = {"system": "System message", "user": "The user", "assistant": "The assistant"}
"""The roles, and what a transcript calls them: no line of it may begin as templates begin turns, or
a judge would see it broken (`judging.quote`)."""

_FENCE = re.compile(r"<(?=\s*/?\s*conversation\s*>)", re.IGNORECASE)


def messages_of(asked: Asked) -> list[Message]:
    """The turns before the reply."""
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)


def is_one_turn(messages: Sequence[Message]) -> bool:
    """Whether they are a single user turn, which is told by its text alone."""
    return len(messages) == 1 and messages[0]["role"] == "user"


def transcript(asked: Asked) -> str:
    """What is asked as one text: a single user turn as it is, more of them fenced.

    No turn can end the fence: what looks like it within one is set apart by a space.
    """
    messages = messages_of(asked)
    if is_one_turn(messages):
        return messages[0]["content"]
    told = (f"{who}: {_FENCE.sub('< ', said)}" for who, said in turns(messages))
    return "<conversation>\n" + "\n\n".join(told) + "\n</conversation>"


def turns(asked: Asked) -> list[tuple[str, str]]:
    """Who says what, for a reader."""
    return [(NAMES[one["role"]], one["content"].strip()) for one in messages_of(asked)]


def last_turn(asked: Asked) -> str:
    """The text of the user turn that is answered."""
    return asked if isinstance(asked, str) else asked[-1]["content"]


def with_system(asked: Asked, system: str | None) -> Asked:
    """What is asked under a system message, unless it has one of its own."""
    messages = messages_of(asked)
    if system is None or messages[0]["role"] == "system":
        return asked
    return [{"role": "system", "content": system}, *messages]


def problem_of(messages: Sequence[Message]) -> str | None:
    """Why messages cannot be answered, in words that follow "the conversation"; None if they can.

    At most one system message, at the start; then user and assistant in turns; the user's last.
    """
    rest = list(messages)
    if strange := [one["role"] for one in rest if one["role"] not in NAMES]:
        return f"has a role {strange[0]!r}"
    if any(not one["content"].strip() for one in rest):
        return "has an empty message"
    if rest and rest[0]["role"] == "system":
        rest = rest[1:]
    if any(one["role"] == "system" for one in rest):
        return "has a system message behind its start"
    if not rest or rest[-1]["role"] != "user":
        return "does not end with a user's message"
    wanted = ["user", "assistant"] * len(rest)
    if [one["role"] for one in rest] != wanted[: len(rest)]:
        return "does not alternate between user and assistant"
    return None


def digest_of(messages: Sequence[Message], *, length: int = 16) -> str:
    """An id of a conversation, from roles and contents alone."""
    said = json.dumps([[one["role"], one["content"]] for one in messages], ensure_ascii=False)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def key_of(asked: Asked) -> Asked | tuple[tuple[str, str], ...]:
    """What tells apart all that can be asked, to be looked up by."""
    if isinstance(asked, str):
        return asked
    return tuple((one["role"], one["content"]) for one in asked)


def with_both_faces(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A row of a file as records have it: the text of what is asked, and messages beyond one turn.

    A row with `messages` need not say their text; of a message its role and content count.

    Args:
        key: Where the text stands.

    Raises:
        ValueError: The messages cannot be answered, or the text is not theirs; in words that follow
            "row n".
    """
    given = row.get("messages")
    if given is None:
        return dict(row)
    if not isinstance(given, list) or not all(map(_is_message, given)):
        raise ValueError("has `messages` that are no list of turns, each with a role and a content")
    messages = [{"role": one["role"], "content": one["content"]} for one in given]
    if problem := problem_of(messages):
        raise ValueError(f"holds a conversation that {problem}")
    text = transcript(messages)
    said = row.get(key)
    if said is not None and (not isinstance(said, str) or said.strip() != text.strip()):
        raise ValueError(f"has a `{key}` that is not the transcript of its `messages`")
    rest = {name: value for name, value in row.items() if name != "messages"}
    both = {**rest, key: text if said is None else said}
    return both if is_one_turn(messages) else {**both, "messages": messages}


def _is_message(one: Any) -> bool:
    is_object = isinstance(one, dict)
    return is_object and all(isinstance(one.get(key), str) for key in ("role", "content"))
