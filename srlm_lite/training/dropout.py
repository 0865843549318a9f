"""Dropout on an adapter's input, its mask drawn for each sequence by itself.

A mask belongs to (seed, step, sequence, layer). So a step drops the same whatever the sizes of its
micro-batches, in however many processes, and when gradient checkpointing computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from srlm_lite.errors import UserError
from srlm_lite.seeds import derive_seed


class Masks:
    """What is dropped of the batch that is being computed; told of each beforehand."""

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self._seed = probability, seed
        self._step = 0
        self._sequences: Sequence[int] = ()
        self._lengths: Sequence[int] = ()
        self._width = 0
        self._picked: tuple[Tensor, Tensor] | None = None

    def expect(self, step: int, sequences: Sequence[int], attention_mask: Tensor) -> None:
        """The next batch: numbers of its sequences in the data, and their tokens, (B, T).

        Padding is on the right.
        """
        self._step, self._sequences = step, sequences
        self._lengths = attention_mask.sum(dim=1).tolist()
        self._width = attention_mask.shape[1]

    @contextmanager
    def picking(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        """Within this context a layer's inputs are of these tokens of the batch alone."""
        self._picked = rows, columns
        try:
            yield
        finally:
            self._picked = None

    def of(self, layer: str, inputs: Tensor) -> Tensor:
        """What to drop of a layer's inputs.

        Raises:
            UserError: They are not those of the batch's tokens, each once.
        """
        tokens, features = inputs.shape[:-1].numel(), inputs.shape[-1]
        whole = len(self._lengths) * self._width
        if tokens != (whole if self._picked is None else len(self._picked[0])):
            raise UserError(
                f"{layer} does not compute each token once, so dropout has no mask for it",
                where="lora.dropout",
                way_out="Set it to 0, or leave the layer out of lora.targets",
            )
        shape = len(self._lengths), self._width, features
        dropped = torch.ones(shape, dtype=torch.bool, device=inputs.device)
        for row, (sequence, length) in enumerate(zip(self._sequences, self._lengths, strict=True)):
            seed = derive_seed(self._seed, "dropout", self._step, sequence, layer)
            generator = torch.Generator(inputs.device).manual_seed(seed)
            drawn = torch.rand(length, features, generator=generator, device=inputs.device)
            dropped[row, :length] = drawn < self.probability
        if self._picked is not None:
            dropped = dropped[self._picked]
        return dropped.view(inputs.shape)


class SequenceDropout(nn.Module):
    """Dropout of one layer; it acts in training mode only."""

    def __init__(self, masks: Masks, layer: str) -> None:
        super().__init__()
        self._masks, self._layer = masks, layer

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        dropped = self._masks.of(self._layer, inputs)
        return inputs.masked_fill(dropped, 0).div_(1 - self._masks.probability)
