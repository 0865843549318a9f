"""When a sample ends: one rule for all engines that see its tokens."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._pieces: dict[int, str] = {}

    def append(self, tokens: list[int], token: int, limits: Limits) -> FinishReason | None:
        """Append a drawn token, unless it is a stop token; the reason if the sample ends here."""
        if token in self._chat.stop_ids and not limits.ignore_end:
            return "stop"
        tokens.append(token)
        if limits.stop is not None and "\n" in self._piece(token):
            text = self._ruled(tokens) if limits.max_thought_tokens else self._chat.spell(tokens)
            if text is not None and limits.stop(text):
                return "stop"
        full = len(tokens) == limits.max_new_tokens or self._fills_its_part(tokens, limits)
        return "length" if full else None

    def _ruled(self, tokens: Sequence[int]) -> str | None:
        """The answer, its last line complete; None within a thought."""
        answer = self._answer(tokens)
        return None if answer is None else f"{answer}\n"

    def _fills_its_part(self, tokens: Sequence[int], limits: Limits) -> bool:
        """Whether the thought, or the answer behind it, is as long as it may be."""
        if not limits.max_thought_tokens:
            return False
        if len(tokens) == limits.max_thought_tokens and self._answer(tokens) is None:
            return True
        start = len(tokens) + limits.max_thought_tokens - limits.max_new_tokens
        if start <= 0:
            return start == 0 and self._chat.split(self._chat.decode(tokens)).thought is None
        # Only a token that may be the last of the mark is looked at closely.
        piece = self._piece(tokens[start - 1])
        if piece and self._chat.thought_close[-1:] not in piece:
            return False
        before, now = self._answer(tokens[: start - 1]), self._answer(tokens[:start])
        return before is None and now is not None

    def _answer(self, tokens: Sequence[int]) -> str | None:
        return self._chat.split(self._chat.decode(tokens)).answer

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._chat.spell([token])
        return self._pieces[token]
