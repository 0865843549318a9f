"""A step cut and dealt out: what it learns depends neither on its cut nor on who has a part.

The examples are shuffled and taken step by step. A step is cut into parts that fit a budget of
tokens, which the processes share out; its loss is the mean over its examples (or over their
tokens), so each example carries how much it counts. What is left over at the end of an epoch is
neither dropped nor filled up with examples from its beginning: a process without a part of it
computes one that counts nothing, so that all make as many passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

from accelerate.data_loader import SeedableRandomSampler

from srlm_lite.processes import Place

Size = Callable[[Sequence[int]], int]
"""Tokens in memory for these examples together."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a step for one process.

    Args:
        counts: False: it is computed so that every process makes as many passes, for nothing.
    """

    examples: list[int]
    counts: bool = True


class StepOrder(Iterable[list[int]]):
    """Epoch after epoch of steps, as a batch sampler: the numbers of their examples."""

    def __init__(self, n_examples: int, batch_size: int, seed: int, epoch: int = 0) -> None:
        self._n_examples, self._batch_size = n_examples, batch_size
        # The sampler that Trainer and accelerate use for one process, and its seed.
        self._order = SeedableRandomSampler(range(n_examples), data_seed=seed)
        self._epoch = epoch

    def __len__(self) -> int:
        return ceil(self._n_examples / self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # Counted at once: who takes as many steps as there are never comes to the end of this.
        epoch, self._epoch = self._epoch, self._epoch + 1
        yield from self.of_epoch(epoch)

    def of_epoch(self, epoch: int) -> Iterator[list[int]]:
        """The steps of one epoch, whichever comes next."""
        self._order.set_epoch(epoch)
        examples = iter(self._order)
        while step := list(islice(examples, self._batch_size)):
            yield step


def cut(step: Sequence[int], size: Size, *, budget: int, least: int = 1) -> list[list[int]]:
    """A step in parts that each fit a budget, or hold one example.

    Args:
        step: In the order in which examples may stand together.
        budget: Of `size`.
        least: Parts that there shall be at least, where there are as many examples.
    """
    most = max(1, len(step) // least)
    parts: list[list[int]] = []
    for example in step:
        fits = parts and len(parts[-1]) < most and size([*parts[-1], example]) <= budget
        if fits:
            parts[-1].append(example)
        else:
            parts.append([example])
    return parts


def deal(parts: Sequence[list[int]], at: Place) -> list[Share]:
    """The passes of one process: every so many-th part, and one for nothing where there is none."""
    own = []
    for first in range(0, len(parts), at.world):
        place = first + at.rank
        own.append(Share(parts[place]) if place < len(parts) else Share(parts[0][:1], counts=False))
    return own
