"""Open Assistant message trees, nested as in the released files or flat as on the Hub."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from srlm_lite.data.columns import number_of
from srlm_lite.data.ledger import Ledger
from srlm_lite.data.sources import DataSource, Row
from srlm_lite.data.split import PlacedReply, RankedPrompt
from srlm_lite.data.text import is_garbled
from srlm_lite.errors import UserError
from srlm_lite.records import Prompt

FLAT_COLUMNS = frozenset({"message_id", "parent_id", "text", "role"})
READY = "ready_for_export"
ABANDONED = frozenset({"aborted_low_grade", "halted_by_moderator"})


@dataclass(frozen=True, slots=True)
class Message:
    """One message; a root has no parent, and its tree's state is its own."""

    message_id: str
    parent_id: str | None
    text: str
    lang: str
    rank: float | None
    deleted: bool
    approved: bool
    tree_state: str


def is_nested(row: Row) -> bool:
    """Whether a row is a tree with its replies inside."""
    root = row.get("prompt")
    return isinstance(root, dict) and "replies" in root


def is_flat(columns: Iterable[str]) -> bool:
    """Whether rows with these columns are single messages."""
    return set(columns) >= FLAT_COLUMNS


def read_trees(
    source: DataSource, *, lang: str | None, replies: Ledger, prompts: Ledger
) -> tuple[list[RankedPrompt], list[Prompt]]:
    """Prompts with ranked first-turn replies, and prompts that have none.

    As in the paper: trees that are ready for export, in one language, first turn only, nothing
    that was deleted. The prompts without ranked replies come from trees in any state, so long
    as reviewers approved the prompt and the tree was not abandoned.

    Args:
        lang: Such as `en`; None takes every language.
        replies: Is told of every message that answers another.
        prompts: Is told of the prompts that serve for nothing.

    Raises:
        UserError: A row is not a tree or message, a message lacks its id or text, or what joins
            them is of another type.
    """
    messages = _unique(_messages(source), replies=replies, prompts=prompts)
    answers: defaultdict[str, list[Message]] = defaultdict(list)
    for message in messages.values():
        if message.parent_id is None:
            continue
        parent = messages.get(message.parent_id)
        if parent is None:
            replies.drop("orphan")
        elif parent.parent_id is not None:
            replies.drop("later_turn")
        else:
            answers[message.parent_id].append(message)

    ranked, spare = [], []
    for root in messages.values():
        if root.parent_id is not None:
            continue
        problem = _prompt_problem(root, lang)
        if problem is not None:
            prompts.seen += 1
            prompts.drop(problem)
            replies.drop(problem, len(answers[root.message_id]))
        elif root.tree_state != READY:
            spare.append(Prompt(root.message_id, root.text.strip(), source.label))
            replies.drop("tree_not_ready", len(answers[root.message_id]))
        else:
            kept = [reply for reply in answers[root.message_id] if _keep(reply, lang, replies)]
            ranked.append(_ranked_prompt(root, kept))
    return ranked, spare


def _messages(source: DataSource) -> Iterator[Message]:
    for number, row in enumerate(source.rows, start=1):
        where = f"{source.where}, row {number}"
        if is_nested(row):
            state = row.get("tree_state")
            todo: list[tuple[Any, str | None]] = [(row["prompt"], None)]
            while todo:
                raw, parent_id = todo.pop()
                message = _message(raw, parent_id=parent_id, tree_state=state, where=where)
                replies = raw.get("replies") or []
                if not isinstance(replies, list):
                    raise UserError("`replies` is not a list", where=where)
                todo.extend((reply, message.message_id) for reply in replies)
                yield message
        elif is_flat(row):
            yield _message(
                row, parent_id=row["parent_id"], tree_state=row.get("tree_state"), where=where
            )
        else:
            raise UserError(
                f"neither a message tree nor a message; its keys: {', '.join(row)}",
                where=where,
                way_out="Trees have prompt.replies; messages message_id, parent_id, text, role",
            )


def _message(raw: Any, *, parent_id: Any, tree_state: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise UserError("a message is not a JSON object", where=where)
    for key in ("message_id", "text"):
        if not isinstance(raw.get(key), str):
            raise UserError(f"a message lacks {key!r}", where=where)
    for key, value in (("parent_id", parent_id), ("tree_state", tree_state)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"`{key}` is {value!r}, not a text", where=where)
    return Message(
        message_id=raw["message_id"],
        parent_id=parent_id,
        text=raw["text"],
        lang=raw.get("lang") or "",
        rank=number_of(raw.get("rank")),
        deleted=bool(raw.get("deleted")),
        approved=raw.get("review_result") is True,
        tree_state=tree_state or "",
    )


def _unique(messages: Iterable[Message], *, replies: Ledger, prompts: Ledger) -> dict[str, Message]:
    """Messages by id; one that comes again is dropped. Every reply is told as seen."""
    by_id: dict[str, Message] = {}
    for message in messages:
        is_reply = message.parent_id is not None
        replies.seen += is_reply
        if message.message_id not in by_id:
            by_id[message.message_id] = message
        elif is_reply:
            replies.drop("duplicate")
        else:
            prompts.seen += 1
            prompts.drop("duplicate")
    return by_id


def _prompt_problem(root: Message, lang: str | None) -> str | None:
    if root.deleted:
        return "deleted"
    if lang is not None and root.lang != lang:
        return "other_language"
    if root.tree_state != READY and (not root.approved or root.tree_state in ABANDONED):
        return "not_approved"
    if not root.text.strip():
        return "empty"
    return "garbled" if is_garbled(root.text) else None


def _keep(reply: Message, lang: str | None, replies: Ledger) -> bool:
    problem = None
    if reply.deleted:
        problem = "deleted"
    elif lang is not None and reply.lang != lang:
        problem = "other_language"
    elif reply.rank is None:
        problem = "unranked"
    elif not reply.text.strip():
        problem = "empty"
    elif is_garbled(reply.text):
        problem = "garbled"
    if problem is not None:
        replies.drop(problem)
    return problem is None


def _ranked_prompt(root: Message, replies: Iterable[Message]) -> RankedPrompt:
    placed = tuple(
        PlacedReply(reply.message_id, reply.text.strip(), reply.rank)
        for reply in replies
        if reply.rank is not None
    )
    return RankedPrompt(
        root.message_id,
        root.text.strip(),
        placed,
        has_best=any(reply.place == 0 for reply in placed),
    )
