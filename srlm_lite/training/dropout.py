"""Dropout on an adapter's input, its mask drawn for each text by itself.

A mask belongs to (seed, step, text, layer). So a step drops the same however it is cut and put in
rows, in however many processes, and when gradient checkpointing computes it again.
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
        self._texts: Sequence[tuple[int, int, int]] = ()
        self._tokens = 0
        self._picked: Tensor | None = None

    def expect(self, step: int, texts: Sequence[tuple[int, int, int]], tokens: int) -> None:
        """The next batch.

        Args:
            texts: Of each its number in the data, its tokens, and where its first one is among all
                of the batch, row by row. The last token of a text may be missing from the batch.
            tokens: Of the batch, padding included.
        """
        self._step, self._texts, self._tokens = step, texts, tokens

    @contextmanager
    def picking(self, places: Tensor) -> Iterator[None]:
        """Within this context a layer's inputs are of these tokens of the batch alone."""
        self._picked = places
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
        if tokens != (self._tokens if self._picked is None else len(self._picked)):
            raise UserError(
                f"{layer} does not compute each token once, so dropout has no mask for it",
                where="lora.dropout",
                way_out="Set it to 0, or leave the layer out of lora.targets",
            )
        shape = self._tokens, features
        dropped = torch.ones(shape, dtype=torch.bool, device=inputs.device)
        for text, length, start in self._texts:
            seed = derive_seed(self._seed, "dropout", self._step, text, layer)
            generator = torch.Generator(inputs.device).manual_seed(seed)
            # Of the whole text: with or without its last token it drops the same.
            drawn = torch.rand(length, features, generator=generator, device=inputs.device)
            own = dropped[start : start + length - 1]
            own.copy_(drawn[:-1] < self.probability)
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
