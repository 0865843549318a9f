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

Message = Mapping[str, str]
"""A turn: `role` (system, user or assistant) and `content`."""

Asked = str | Sequence[Message]
"""One user turn's text, or messages of which the last is the user's."""

NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
"""The roles, and what a transcript calls them."""

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
    turns = (
        f"{NAMES[one['role']]}: {_FENCE.sub('< ', one['content'].strip())}" for one in messages
    )
    return "<conversation>\n" + "\n\n".join(turns) + "\n</conversation>"


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
    turns = list(messages)
    if strange := [one["role"] for one in turns if one["role"] not in NAMES]:
        return f"has a role {strange[0]!r}"
    if any(not one["content"].strip() for one in turns):
        return "has an empty message"
    if turns and turns[0]["role"] == "system":
        turns = turns[1:]
    if any(one["role"] == "system" for one in turns):
        return "has a system message behind its start"
    if not turns or turns[-1]["role"] != "user":
        return "does not end with a user's message"
    wanted = ["user", "assistant"] * len(turns)
    if [one["role"] for one in turns] != wanted[: len(turns)]:
        return "does not alternate between user and assistant"
    return None


def digest_of(messages: Sequence[Message], *, length: int = 16) -> str:
    """An id of a conversation, from roles and contents alone."""
    said = json.dumps([[one["role"], one["content"]] for one in messages], ensure_ascii=False)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:length]
