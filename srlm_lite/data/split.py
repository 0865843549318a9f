"""Ranked replies shared out: IFT takes best replies, EFT takes orders; no prompt serves both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from srlm_lite.data.ledger import Ledger
from srlm_lite.data.row_store import RowStore, packed, unpacked
from srlm_lite.data.text import normalised, words_of
from srlm_lite.records import Instruction, Messages, Prompt, RankedReply

Purpose = Literal["source", "ift", "ranked", "eval"]
"""What a source was given for: to be shared out, or for one part."""

Part = Literal["ift", "eft_train", "eft_eval", "eval_prompts"]


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
        text: Of a conversation, its transcript.
        has_best: Whether the best reply is one that IFT may learn from. False where the reply
            people ranked first has been taken out, or where they found none good.
    """

    prompt_id: str
    text: str
    replies: tuple[PlacedReply, ...]
    has_best: bool = True
    messages: Messages | None = None

    @property
    def is_ordered(self) -> bool:
        """Whether at least two replies have different places, as EFT needs."""
        return len({reply.place for reply in self.replies}) > 1


class Sharing:
    """Prompts of all sources, shared out between the parts of the seed data.

    A prompt whose replies are ordered can serve IFT or EFT: of those that have no part of their own
    `ift_share` go to IFT, the others to EFT, `eval_share` of them held out. A prompt without an
    order (a single reply, or ties throughout) can only go to IFT. Who goes where hangs on a hash of
    the prompt id, so the order of the source does not matter; the rows come out in the order of
    another such hash. What is held out is no part of what is learned, not in the same words either.

    Args:
        replies: Is told of the replies kept and dropped.
    """

    def __init__(self, store: RowStore, replies: Ledger) -> None:
        self._store, self._replies = store, replies
        self._purposes: set[Purpose] = set()
        self.qualities: tuple[float, float] | None = None
        """The lowest and the highest; None without any."""
        store.make(
            "TABLE facts (n INTEGER PRIMARY KEY, purpose TEXT, id TEXT, same BLOB, words BLOB, "
            "given INT, replies INT, ordered INT, best INT, by_order BLOB, by_ift BLOB, "
            "by_eval BLOB, part TEXT)"
        )
        store.make("TABLE bodies (n INTEGER PRIMARY KEY, body TEXT)")
        self._count = 0

    def add(
        self, prompts: Iterable[RankedPrompt], purpose: Purpose = "source", label: str = ""
    ) -> None:
        """Take the prompts of a source; of equal replies to one the best stays."""
        self._purposes.add(purpose)
        for prompt in prompts:
            self._count += 1
            best_first = sorted(prompt.replies, key=lambda reply: (reply.place, reply.response_id))
            by_text: dict[str, PlacedReply] = {}
            for reply in best_first:
                by_text.setdefault(reply.text, reply)
                self._see(reply.quality)
            places = {reply.place for reply in by_text.values()}
            self._store.put(
                "facts",
                self._count,
                purpose,
                prompt.prompt_id,
                short(normalised(prompt.text)),
                short(words_of(prompt.text)),
                len(prompt.replies),
                len(by_text),
                len(places) > 1,
                prompt.has_best and bool(by_text),
                *(_hashed(prompt.prompt_id, why) for why in ("order", "ift", "eval")),
                None,
            )
            body = [
                [one.response_id, one.text, one.place, one.quality, one.target]
                for one in by_text.values()
            ]
            whole = [prompt.prompt_id, prompt.text, prompt.messages, label, body]
            self._store.put("bodies", self._count, packed(whole))

    def _see(self, quality: float | None) -> None:
        if quality is not None:
            low, high = self.qualities or (quality, quality)
            self.qualities = min(low, quality), max(high, quality)

    def hold_out(self, prompts: Iterable[Prompt]) -> None:
        """Take prompts on which the policy is measured, and from which nothing is learned."""
        for prompt in prompts:
            self._count += 1
            key, words = short(normalised(prompt.text)), short(words_of(prompt.text))
            order = _hashed(prompt.prompt_id, "order")
            self._store.put(
                "facts",
                self._count,
                "eval",
                prompt.prompt_id,
                key,
                words,
                *(0, 0, 0, 0, order, order, order, "eval_prompts"),
            )
            body = packed([prompt.prompt_id, prompt.text, prompt.messages, prompt.source, []])
            self._store.put("bodies", self._count, body)

    def decide(self, *, ift_share: float, eval_share: float) -> None:
        """Say of every prompt which part it goes to, once all are there."""
        run = self._store.run
        self._store.make("INDEX facts_same ON facts (same)")
        self._store.make("INDEX facts_words ON facts (words)")
        self._drop_doubles("purpose")
        self._replies.drop("duplicate", self._sum("part IS NULL", "given - replies"))
        free = "part IS NULL AND ordered"
        seed = "purpose IN ('source')" if "ift" in self._purposes else "purpose <> 'eval'"
        to_ift = self._draw(f"{free} AND best AND {seed} AND purpose <> 'ift'", ift_share, "ift")
        run(f"UPDATE facts SET part = 'ift' WHERE n IN ({to_ift})")
        run("UPDATE facts SET part = 'ift' WHERE part IS NULL AND purpose = 'ift' AND best")
        run("UPDATE facts SET part = 'eft_eval' WHERE purpose = 'eval' AND " + free)
        held = 0.0 if "eval" in self._purposes else eval_share
        eft = f"{free} AND purpose IN ('source', 'ranked')"
        several = self._number(eft) > 1 and held > 0
        to_eval = self._draw(eft, held, "eval", at_least=int(several))
        run(f"UPDATE facts SET part = 'eft_eval' WHERE n IN ({to_eval})")
        run(f"UPDATE facts SET part = 'eft_train' WHERE {eft}")
        run(f"UPDATE facts SET part = 'ift' WHERE part IS NULL AND best AND {seed}")
        self._drop_doubles("part")
        self._drop_held_out()
        self._replies.drop("not_best", self._sum("part = 'ift'", "replies - 1"))
        for_order = "('ranked', 'eval')" if "ift" in self._purposes else "('eval')"
        self._drop("unordered", f"part IS NULL AND NOT ordered AND purpose IN {for_order}")
        self._drop("no_rank_0", "part IS NULL")
        self._replies.kept = self._number("part = 'ift'") + self._sum(
            "part IN ('eft_train', 'eft_eval')", "replies"
        )

    def _drop_doubles(self, within: str) -> None:
        """One prompt of each text, the one with most replies."""
        first = (
            f"SELECT n FROM (SELECT n, ROW_NUMBER() OVER (PARTITION BY {within}, same ORDER BY "
            "purpose = 'source', given DESC, id, n) AS place FROM facts WHERE part IS NOT "
            "'duplicate') WHERE place > 1"
        )
        where = f"n IN ({first}) AND part IS NOT 'duplicate' AND part IS NOT 'eval_prompts'"
        if within == "part":
            self._drop("duplicate", f"{where} AND part IS NOT NULL")
        else:
            self._drop("duplicate", where, "given")

    def _drop_held_out(self) -> None:
        held = "SELECT words FROM facts WHERE part IN ('eft_eval', 'eval_prompts')"
        where = f"part IN ('ift', 'eft_train') AND words IN ({held})"
        self._drop("held_out", where)

    def _drop(self, reason: str, where: str, count: str = "replies") -> None:
        self._replies.drop(reason, self._sum(where, count))
        self._store.run(f"UPDATE facts SET part = '{reason}' WHERE {where}")

    def _sum(self, where: str, of: str) -> int:
        return int(self._store.one(f"SELECT SUM({of}) FROM facts WHERE {where}") or 0)

    def _number(self, where: str) -> int:
        return int(self._store.one(f"SELECT COUNT(*) FROM facts WHERE {where}"))

    def _draw(self, where: str, share: float, purpose: str, *, at_least: int = 0) -> str:
        """What selects a share of the prompts, rounded half up."""
        count = max(at_least, int(share * self._number(where) + 0.5))
        return f"SELECT n FROM facts WHERE {where} ORDER BY by_{purpose} LIMIT {count}"

    def count(self, part: Part) -> int:
        """How many prompts a part has."""
        return self._number(f"part = '{part}'")

    def instructions(self) -> Iterator[Instruction]:
        """The rows of IFT: prompts with their best reply."""
        for prompt_id, text, messages, _, replies in self._bodies("ift"):
            yield Instruction(prompt_id, text, replies[0][1], _messages(messages))

    def ranked(self, part: Literal["eft_train", "eft_eval"]) -> Iterator[RankedReply]:
        """The rows of a part of EFT: by prompt, best first, with dense ranks from 0."""
        for prompt_id, text, messages, _, replies in self._bodies(part):
            places = sorted({reply[2] for reply in replies})
            rank = {place: number for number, place in enumerate(places)}
            for name, reply, place, quality, target in replies:
                yield RankedReply(
                    prompt_id,
                    text,
                    name,
                    reply,
                    rank[place],
                    quality,
                    target,
                    _messages(messages),
                )

    def held_out(self) -> Iterator[Prompt]:
        """The prompts on which the policy is measured, where a source gave such."""
        for prompt_id, text, messages, label, _ in self._bodies("eval_prompts"):
            yield Prompt(prompt_id, text, label, _messages(messages))

    def asked(self) -> Iterator[Prompt]:
        """All prompts with replies that no source gave to be held out."""
        rows = self._store.run(
            "SELECT body FROM facts JOIN bodies USING (n) WHERE purpose <> 'eval' ORDER BY n"
        )
        for prompt_id, text, messages, label, _ in unpacked(rows):
            yield Prompt(prompt_id, text, label, _messages(messages))

    def _bodies(self, part: Part) -> Iterator[Any]:
        return unpacked(
            self._store.run(
                "SELECT body FROM facts JOIN bodies USING (n) WHERE part = ? ORDER BY by_order, n",
                part,
            )
        )


def _messages(found: list[dict[str, str]] | None) -> Messages | None:
    return tuple(found) if found else None


def short(text: str) -> bytes:
    """What stands for a text where texts are compared."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]


def _hashed(prompt_id: str, purpose: str) -> bytes:
    return bytes.fromhex(hash_order(prompt_id, purpose))


def hash_order(prompt_id: str, purpose: str) -> str:
    """A sort key that shuffles prompts the same way wherever they come from."""
    return hashlib.sha256(f"{purpose}\0{prompt_id}".encode()).hexdigest()
