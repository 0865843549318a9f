"""Training batches dealt out to several processes: together they learn what one alone would.

One process shuffles the examples, cuts them into micro-batches and takes `per_step` of them for an
optimiser step. Several do the same, with the same seed, and share each step's examples out, as
many as possible in whole micro-batches. What is left over at the end of an epoch is neither dropped
nor filled up with examples from its beginning: a process without a part of it computes a
micro-batch that counts nothing, so that all make as many backward passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset

from srlm_lite.processes import Place


class Drawn(NamedTuple):
    """An example in its micro-batch, of one process alone."""

    example: int
    mates: tuple[int, ...]
    """All examples of that micro-batch."""
    factor: float
    """By this, a mean over the micro-batch becomes its part of the step's mean, once Trainer has
    divided by the passes of the step and DDP by the processes; 0 counts nothing."""


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

    def share(self, step: Sequence[Sequence[int]]) -> Iterator[list[Drawn]]:
        """This process's passes of a step that is given as micro-batches."""
        examples = [(index, tuple(batch)) for batch in step for index in batch]
        parts = [
            examples[start : start + self.largest]
            for start in range(0, len(examples), self.largest)
        ]
        passes = self.passes(len(examples))
        factor = passes * self.at.world / len(step)
        for number in range(passes):
            place = number * self.at.world + self.at.rank
            if place < len(parts):
                yield [Drawn(index, mates, factor) for index, mates in parts[place]]
            else:
                yield [Drawn(*examples[0], 0.0)]


class _Dealt(Iterable[list[Drawn]]):
    """Epoch after epoch of one process's share, as a batch sampler."""

    def __init__(self, deal: Deal, n_examples: int, seed: int) -> None:
        self._deal, self._n_examples = deal, n_examples
        # The sampler that Trainer and accelerate use for one process, and its seed.
        self._order = SeedableRandomSampler(range(n_examples), data_seed=seed)
        self._epoch = 0

    def __len__(self) -> int:
        return self._deal.passes_of_epoch(self._n_examples)

    def __iter__(self) -> Iterator[list[Drawn]]:
        self._order.set_epoch(self._epoch)
        self._epoch += 1
        batches = iter(BatchSampler(self._order, self._deal.micro_batch, drop_last=False))
        while step := list(islice(batches, self._deal.per_step)):
            yield from self._deal.share(step)


class _Rows(Dataset[dict[str, Any]]):
    """The rows of a dataset, and how much each counts."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, drawn: Drawn) -> dict[str, Any]:
        row = dict(self._rows[drawn.example])
        if "chosen_ids" in row:
            tokens = sum(len(self._rows[mate]["chosen_ids"]) for mate in drawn.mates)
            row |= {"share": drawn.factor / len(drawn.mates), "nll_share": drawn.factor / tokens}
        elif not drawn.factor:
            row["labels"] = [-100] * len(row["labels"])
        return row


def dealt_loader(trainer: Any, deal: Deal) -> DataLoader[dict[str, Any]]:
    """The training batches of this process, as the trainer's own loader would shape them."""
    rows = trainer.train_dataset
    return DataLoader(
        _Rows(rows),
        batch_sampler=_Dealt(deal, len(rows), trainer.args.data_seed),
        collate_fn=trainer.data_collator,
        pin_memory=trainer.args.dataloader_pin_memory,
    )
