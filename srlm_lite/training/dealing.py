"""Training batches dealt out: what a step learns depends neither on its cut nor on who has a part.

The examples are shuffled and taken step by step. A step is cut into micro-batches, which the
processes share out; its loss is the mean over its examples (or over their tokens), so each example
carries how much it counts. What is left over at the end of an epoch is neither dropped nor filled
up with examples from its beginning: a process without a part of it computes a micro-batch that
counts nothing, so that all make as many backward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Dataset

from srlm_lite.processes import Place
from srlm_lite.training.checkpoint import Resumable

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


COLUMNS = ("example", "share", "token_share")
"""Columns of a row of a batch: its number in the data, and by what its loss, or the sum of those of
its tokens, is multiplied, so that a sum over the batch is what it adds to the step's mean, once
Trainer has divided by the passes of the step and DDP by the processes; 0 counts nothing."""


class DrawnExample(NamedTuple):
    """An example in its step."""

    example: int
    mates: tuple[int, ...]
    """All examples of that step."""
    factor: float
    """What Trainer and DDP divide by; 0 counts nothing."""


@dataclass(frozen=True, slots=True)
class Deal:
    """How one process's batches are shared out.

    Args:
        micro_batch: Examples in a micro-batch of one process alone.
        per_step: Micro-batches in an optimiser step of one process alone.
    """

    micro_batch: int
    per_step: int
    at: Place

    @property
    def largest(self) -> int:
        """Examples in memory at once: no more than alone, and fewer where all shall have some."""
        return min(self.micro_batch, math.ceil(self.micro_batch * self.per_step / self.at.world))

    def passes(self, n_examples: int) -> int:
        """Backward passes that each process makes for so many examples of a step."""
        return math.ceil(math.ceil(n_examples / self.largest) / self.at.world)

    def passes_of_epoch(self, n_examples: int) -> int:
        """The same for all steps of an epoch."""
        step = self.micro_batch * self.per_step
        whole, rest = divmod(n_examples, step)
        return whole * self.passes(step) + (self.passes(rest) if rest else 0)

    def parts(self, step: Sequence[int]) -> list[list[int]]:
        """A step as micro-batches, those of all processes."""
        return [list(step[at : at + self.largest]) for at in range(0, len(step), self.largest)]

    def share(self, step: Sequence[int]) -> Iterator[list[DrawnExample]]:
        """This process's passes of a step."""
        parts, mates = self.parts(step), tuple(step)
        passes = self.passes(len(step))
        for number in range(passes):
            place = number * self.at.world + self.at.rank
            if place < len(parts):
                factor = float(passes * self.at.world)
                yield [DrawnExample(index, mates, factor) for index in parts[place]]
            else:
                yield [DrawnExample(step[0], mates, 0.0)]


class _Dealt(Iterable[list[DrawnExample]]):
    """Epoch after epoch of one process's share, as a batch sampler."""

    def __init__(self, deal: Deal, n_examples: int, seed: int, epoch: int = 0) -> None:
        self._deal, self._n_examples = deal, n_examples
        # The sampler that Trainer and accelerate use for one process, and its seed.
        self._order = SeedableRandomSampler(range(n_examples), data_seed=seed)
        self._epoch = epoch

    def __len__(self) -> int:
        return self._deal.passes_of_epoch(self._n_examples)

    def __iter__(self) -> Iterator[list[DrawnExample]]:
        self._order.set_epoch(self._epoch)
        self._epoch += 1
        for step in _steps(self._order, self._deal):
            yield from self._deal.share(step)


def _steps(order: Iterable[int], deal: Deal) -> Iterator[list[int]]:
    examples = iter(order)
    while step := list(islice(examples, deal.micro_batch * deal.per_step)):
        yield step


class _Rows(Dataset[dict[str, Any]]):
    """The rows of a dataset, and how much each counts."""

    def __init__(self, rows: Any, tokens: Sequence[int]) -> None:
        self._rows, self._tokens = rows, tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, drawn: DrawnExample) -> dict[str, Any]:
        tokens = sum(self._tokens[mate] for mate in drawn.mates)
        counts = drawn.example, drawn.factor / len(drawn.mates), drawn.factor / tokens
        return {**self._rows[drawn.example], **dict(zip(COLUMNS, counts, strict=True))}


def carrying(collate: Collate, columns: Sequence[str]) -> Collate:
    """Let batches carry columns that a collator leaves behind."""

    def carried(examples: list[dict[str, Any]]) -> dict[str, Any]:
        kept = {key: torch.tensor([example[key] for example in examples]) for key in columns}
        return {**collate(examples), **kept}

    return carried


class Dealt(Resumable):
    """A trainer whose batches are dealt out, and carry `COLUMNS`; before TRL's in the bases.

    `deal` and `tokens`, what each example has of the tokens that a step's mean is taken over, are
    to be set before it trains.
    """

    deal: Deal
    tokens: Sequence[int]
    train_dataset: Any
    data_collator: Any
    args: Any

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The training batches of this process, as the trainer's own loader would shape them."""
        rows = self.train_dataset
        return DataLoader(
            _Rows(rows, self.tokens),
            batch_sampler=_Dealt(self.deal, len(rows), self.args.data_seed, self.epochs_done),
            collate_fn=carrying(self.data_collator, COLUMNS),
            pin_memory=self.args.dataloader_pin_memory,
        )

    def batches_of(self, step: Sequence[int]) -> Iterator[dict[str, Any]]:
        """A step, whole, in every process: a sum over its batches is the step's mean."""
        rows, collate = _Rows(self.train_dataset, self.tokens), self.data_collator
        for part in self.deal.parts(step):
            yield carrying(collate, COLUMNS)(
                [rows[DrawnExample(i, tuple(step), 1.0)] for i in part]
            )

    @property
    def first_step(self) -> list[int]:
        """The examples that are learned first."""
        order = SeedableRandomSampler(range(len(self.train_dataset)), data_seed=self.args.data_seed)
        order.set_epoch(0)
        return next(_steps(order, self.deal))
