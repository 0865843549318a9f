"""Ranked replies shared out: IFT takes best replies, EFT takes orders; no prompt serves both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from srlm_lite.data.ledger import Ledger
from srlm_lite.data.text import normalised
from srlm_lite.records import Instruction, RankedReply


@dataclass(frozen=True, slots=True)
class PlacedReply:
    """A reply with its place among the replies to its prompt.

    Attributes:
        place: Lower is better; equal places are ties. Only the order counts.
    """

    response_id: str
    text: str
    place: float
    quality: float | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class RankedPrompt:
    """A prompt with the replies that people placed.

    Attributes:
        has_best: Whether the best reply is one that IFT may learn from. False where the reply
            people ranked first has been taken out.
    """

    prompt_id: str
    text: str
    replies: tuple[PlacedReply, ...]
    has_best: bool = True

    @property
    def is_ordered(self) -> bool:
        """Whether at least two replies have different places, as EFT needs."""
        return len({reply.place for reply in self.replies}) > 1


@dataclass(slots=True)
class SplitData:
    """The seed data of a run."""

    ift: list[Instruction] = field(default_factory=list)
    eft_train: list[RankedReply] = field(default_factory=list)
    eft_eval: list[RankedReply] = field(default_factory=list)


def split(
    prompts: Iterable[RankedPrompt],
    *,
    ift_share: float,
    eval_share: float,
    replies: Ledger,
) -> SplitData:
    """Share prompts out between IFT, EFT for training and EFT for evaluation.

    A prompt whose replies are ordered can serve either part: `ift_share` of these go to IFT, the
    others to EFT, `eval_share` of them held out. A prompt without an order (a single reply, or
    ties throughout) can only go to IFT. Who goes where hangs on a hash of the prompt id, so the
    order of the source does not matter; the rows come out in the order of another such hash.

    Args:
        replies: Is told of the replies kept and dropped.
    """
    unique = _drop_duplicates(prompts, replies)
    unique.sort(key=lambda prompt: hash_order(prompt.prompt_id, "order"))
    ordered = [prompt for prompt in unique if prompt.is_ordered]
    for_ift = _draw([prompt for prompt in ordered if prompt.has_best], ift_share, "ift")
    eft = [prompt for prompt in ordered if prompt.prompt_id not in for_ift]
    for_eval = _draw(eft, eval_share, "eval", at_least=1 if len(eft) > 1 and eval_share else 0)
    data = SplitData()
    for prompt in unique:
        if prompt.is_ordered and prompt.prompt_id not in for_ift:
            part = data.eft_eval if prompt.prompt_id in for_eval else data.eft_train
            part.extend(_ranked(prompt))
        elif prompt.has_best and prompt.replies:
            best = min(prompt.replies, key=lambda reply: (reply.place, reply.response_id))
            data.ift.append(Instruction(prompt.prompt_id, prompt.text, best.text))
            replies.drop("not_best", len(prompt.replies) - 1)
        else:
            replies.drop("no_rank_0", len(prompt.replies))
    replies.kept = len(data.ift) + len(data.eft_train) + len(data.eft_eval)
    return data


def hash_order(prompt_id: str, purpose: str) -> str:
    """A sort key that shuffles prompts the same way wherever they come from."""
    return hashlib.sha256(f"{purpose}\0{prompt_id}".encode()).hexdigest()


def _draw(
    prompts: Sequence[RankedPrompt], share: float, purpose: str, *, at_least: int = 0
) -> set[str]:
    """Ids of a share of the prompts, rounded half up."""
    drawn = sorted(prompts, key=lambda prompt: hash_order(prompt.prompt_id, purpose))
    count = max(at_least, int(share * len(prompts) + 0.5))
    return {prompt.prompt_id for prompt in drawn[:count]}


def _drop_duplicates(prompts: Iterable[RankedPrompt], replies: Ledger) -> list[RankedPrompt]:
    """One prompt of each text, the one with most replies; one reply of each text, the best."""
    chosen: dict[str, RankedPrompt] = {}
    for prompt in sorted(prompts, key=lambda prompt: (-len(prompt.replies), prompt.prompt_id)):
        first = chosen.setdefault(normalised(prompt.text), prompt)
        if first is not prompt:
            replies.drop("duplicate", len(prompt.replies))
    unique = []
    for prompt in chosen.values():
        best_first = sorted(prompt.replies, key=lambda reply: (reply.place, reply.response_id))
        by_text: dict[str, PlacedReply] = {}
        for reply in best_first:
            by_text.setdefault(reply.text, reply)
        replies.drop("duplicate", len(best_first) - len(by_text))
        unique.append(
            RankedPrompt(prompt.prompt_id, prompt.text, tuple(by_text.values()), prompt.has_best)
        )
    return unique


def _ranked(prompt: RankedPrompt) -> list[RankedReply]:
    """Its replies, best first, with dense ranks from 0."""
    places = sorted({reply.place for reply in prompt.replies})
    rank = {place: number for number, place in enumerate(places)}
    return [
        RankedReply(
            prompt_id=prompt.prompt_id,
            prompt=prompt.text,
            response_id=reply.response_id,
            response=reply.text,
            rank=rank[reply.place],
            quality=reply.quality,
            target=reply.target,
        )
        for reply in prompt.replies
    ]
