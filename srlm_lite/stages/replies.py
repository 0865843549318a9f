"""A sampled reply: what of it is read, and what of it is learned.

What is sampled, judged and trained on are the same ids. A record keeps the text, from which they
are mostly to be had again; where they are not (other merges of the same letters, whitespace around
them, a special token inside, no end of turn), it keeps the ids too, and those are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from srlm_lite.errors import ProofError
from srlm_lite.records import Candidate, Ids, RankedReply, Reply
from srlm_lite.rollout.protocol import Sample

if TYPE_CHECKING:
    from srlm_lite.model.chat import ChatFormat


def learned_ids(chat: ChatFormat, text: str, kept: Ids | None) -> Ids:
    """Ids of a reply as it is learned: those kept when it was sampled, else those of its text."""
    return tuple(chat.target_ids(text)) if kept is None else kept


def reply_of(chat: ChatFormat | None, name: str, sample: Sample, *, ruled: bool = False) -> Reply:
    """A sample as it is recorded, with its ids where they are to be kept.

    Args:
        chat: None of a server that has one of its own.
        ruled: A stop rule may have ended the sample. The line end that completed its last line is
            then no part of it.

    Raises:
        ProofError: The text is not what the ids say.
    """
    text, reason = sample.text.strip(), sample.finish_reason
    thought, answer = split(chat, text)
    if answer is None:
        return Reply(name, "", "length", thought)
    if chat is None:
        return Reply(name, answer, reason, thought)
    given = tuple(chat.target_ids(text))
    ids = sample.token_ids or given[:-1]  # a server knows none
    while ruled and ids and not chat.spell(ids[-1:]).strip():
        ids = ids[:-1]
    if reason == "stop":
        ids = (*ids, chat.end_id)
    if ids == given and thought is None:
        return Reply(name, answer, reason)
    if sample.token_ids and chat.decode(ids) != text:
        raise ProofError(
            "what was sampled and what would be learned differ: the engine's text is not what its "
            "token ids decode to"
        )
    return Reply(name, answer, reason, thought, ids)


def split(chat: ChatFormat | None, text: str) -> tuple[str | None, str | None]:
    """A reply's thought, None without one, and its answer, None where the thought never closes.

    Args:
        chat: None of a server that has one of its own: a thought that stands in what it sends is
            known by the marks that most models have.
    """
    if chat is not None:
        reply = chat.split(text)
        return reply.thought, reply.answer
    opening, closing = "<think>", "</think>"
    if not text.lstrip().startswith(opening) and closing not in text:
        return None, text
    thought, closed, answer = text.lstrip().removeprefix(opening).partition(closing)
    return thought.strip(), answer.strip() if closed else None


def candidate_of(chat: ChatFormat, prompt_id: str, name: str, sample: Sample) -> Candidate:
    """A sampled answer as a candidate of this name; see `reply_of`."""
    reply = reply_of(chat, name, sample)
    return Candidate(
        prompt_id, name, reply.text, sample.n_tokens, reply.finish_reason, reply.thought, reply.ids
    )


def read_as_reply(chat: ChatFormat, candidate: Candidate) -> Candidate:
    """A candidate that is a text of a file, taken apart as a sampled one of a base that thinks."""
    if not chat.thinks:
        return candidate
    sample = Sample(candidate.text, (), candidate.finish_reason, candidate.n_tokens)
    return candidate_of(chat, candidate.prompt_id, candidate.candidate_id, sample)


def without_thoughts(
    chat: ChatFormat | None, groups: Sequence[Sequence[RankedReply]]
) -> list[list[RankedReply]]:
    """Ranked replies as a judge is to see them: of those that begin with a thought the answer."""
    if chat is None or not chat.thinks:
        return [list(group) for group in groups]
    return [
        [replace(row, response=chat.split(row.response).answer or "") for row in group]
        for group in groups
    ]
