"""Accounts: every row that is seen is either kept or dropped for a reason that has a name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

REASONS = {
    "bad_target": "its judge target does not end in a line `Score: <number>`",
    "chat_markers": "holds markers of a chat template, such as <|user|> or [INST]",
    "deleted": "deleted by its site",
    "duplicate": "says the same as another one",
    "empty": "no text",
    "garbled": "holds control or replacement characters",
    "held_out": "its prompt is a held-out one, in the same words",
    "in_eft": "its prompt is EFT data",
    "later_turn": "not of the first turn",
    "no_rank_0": "the best reply of its prompt is gone, or none is good: nothing for IFT",
    "no_score": "no score or rank that can be read as a number",
    "not_approved": "its prompt was not approved by the reviewers",
    "not_best": "its prompt went to IFT, which takes the best reply alone",
    "not_text": "more than text, such as an image, or of another type",
    "not_language": "mostly symbols, or nothing but bracketed fragments",
    "orphan": "answers a message that is not in the source",
    "other_language": "in another language",
    "other_order": "nothing says how it compares with the kept replies of its prompt",
    "other_prompt": "its row has replies to different prompts",
    "repeated": "stands in several pairs of its prompt, and counts once",
    "repetition": "repeats a few words over and over",
    "tied": "neither was preferred",
    "too_long": "over the longest prompt allowed",
    "too_short": "under the shortest prompt allowed",
    "tools": "calls tools, or answers for them",
    "tree_not_ready": "its tree is not ready for export",
    "two_systems": "has two system messages, one of them in a column of its own",
    "unanswerable": "no dialogue in turns, with the user's turn before a reply",
    "unordered": "its prompt's replies have no order, which its source is for",
    "unranked": "people did not rank it",
}
"""What each reason means."""


@dataclass(slots=True)
class Ledger:
    """Counts of one kind of row. When a source has been read, seen = kept + dropped."""

    seen: int = 0
    kept: int = 0
    drops: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, count: int = 1) -> None:
        """Book rows as dropped; `reason` is a key of `REASONS`."""
        if count:
            self.drops[reason] += count

    @property
    def dropped(self) -> int:
        return self.drops.total()

    def summary(self) -> dict[str, Any]:
        """As JSON, the most common reason first."""
        ranked = sorted(self.drops.items(), key=lambda item: (-item[1], item[0]))
        return {"seen": self.seen, "kept": self.kept, "dropped": dict(ranked)}
