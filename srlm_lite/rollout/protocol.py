"""What every sampling engine takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from srlm_lite.records import FinishReason


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued once for each seed."""

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """How to draw, and when to stop. A temperature of 0 is greedy and ignores the seeds."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. `token_ids` end before the stop token; `text` is what they decode to."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class Engine(Protocol):
    """Samples from the role that is in the slot."""

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
