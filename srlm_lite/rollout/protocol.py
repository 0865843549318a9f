"""What every sampling engine takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from srlm_lite.conversation import Message
from srlm_lite.records import FinishReason

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

StopRule = Callable[[str], bool]
"""Asked with a sample's text so far whenever it has finished a line; True ends the sample there.
It may cross a process border, so it is a function of a module, or a `partial` of one."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued once for each seed.

    `prompt_ids` is what is continued; `messages` are the turns behind them, for servers that take
    those and know their own template.
    """

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    messages: Sequence[Message] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """How to draw, and when to stop. A temperature of 0 is greedy and ignores the seeds.

    `alternatives` asks for the log-probabilities of that many most probable tokens at every
    position, and `also` for those of more tokens, by id, wherever they rank; an engine in another
    process, or a server, tells of the most probable ones alone. `ignore_end` goes on after an end
    of turn, up to `max_new_tokens`: for benchmarks, and where an end is one of the alternatives.

    `max_thought_tokens` of the `max_new_tokens` are a thought's, where the model thinks before it
    answers: a thought that has not closed by then ends the sample, and the answer behind one that
    has may be as long as the others allow; an empty one counts with the answer. A stop rule is then
    asked of the answer alone.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: StopRule | None = None
    alternatives: int = 0
    also: tuple[int, ...] = ()
    ignore_end: bool = False
    max_thought_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """One drawn token's text and, most probable first, what could have stood in its place.

    The log-probabilities (natural, at temperature 1, before top-p) are those of the model itself.
    """

    text: str
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. `token_ids` end before the stop token; `text` is what they decode to, the
    thought included.

    `token_ids` are empty where an engine does not know them. `tokens` are as many as were drawn
    before the stop token, and empty unless `Limits.alternatives` asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    n_tokens: int
    tokens: tuple[Token, ...] = ()


class Engine(Protocol):
    """Samples from the base with a stack of adapters."""

    def load(self, stack: Sequence[Adapter]) -> None:
        """From here on, sample from the base with these adapters."""
        ...

    def sample(
        self,
        requests: Sequence[Request],
        limits: Limits,
        *,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> list[list[Sample]]:
        """One list a request, one sample a seed, in order.

        What a seed draws does not depend on the requests beside it, up to the rounding of the
        dtype. `on_samples` is told how many samples have just been finished.
        """
        ...

    def close(self) -> None:
        """Give back the memory; the next `load` or `sample` takes it again."""
        ...
