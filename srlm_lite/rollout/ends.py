"""When a sample ends: one rule for all engines that see its tokens."""

from __future__ import annotations

from srlm_lite.model.chat import ChatFormat
from srlm_lite.records import FinishReason
from srlm_lite.rollout.protocol import Limits


class Ends:
    """Grows samples token by token and says which one is the last.

    Args:
        chat: Knows the stop tokens, and which tokens finish a line.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._finishes_line: dict[int, bool] = {}

    def append(self, tokens: list[int], token: int, limits: Limits) -> FinishReason | None:
        """Append a drawn token, unless it is a stop token; the reason if the sample ends here."""
        if token in self._chat.stop_ids and not limits.ignore_end:
            return "stop"
        tokens.append(token)
        rule = limits.stop if self._ends_line(token) else None
        if rule is not None and rule(self._chat.spell(tokens)):
            return "stop"
        return "length" if len(tokens) == limits.max_new_tokens else None

    def _ends_line(self, token: int) -> bool:
        if token not in self._finishes_line:
            self._finishes_line[token] = "\n" in self._chat.spell([token])
        return self._finishes_line[token]
