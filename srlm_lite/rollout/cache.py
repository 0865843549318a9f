"""A key-value cache with room to grow.

transformers' own cache makes a copy of all keys and values for every new token, which at a
hundred rows and more takes longer than the model itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, as views of buffers that are larger than they are.

    Args:
        room: Tokens to make room for whenever the buffers are full.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new states; return all of them. Shapes are (B, H, T, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        keys, values = self._buffers_for(key_states, end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _buffers_for(self, new: Tensor, end: int) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        held = self._buffers
        # Repeating or selecting rows puts other tensors in place of the views.
        is_view = held and self.keys is not None and self.keys.data_ptr() == held[0].data_ptr()
        if held and is_view and held[0].shape[-2] >= end:
            return held
        shape = (*new.shape[:2], end + self._room, new.shape[-1])
        keys = torch.empty(shape, dtype=new.dtype, device=new.device)
        values = torch.empty_like(keys)
        if start and self.keys is not None and self.values is not None:
            keys[:, :, :start] = self.keys
            values[:, :, :start] = self.values
        self._buffers = (keys, values)
        return self._buffers


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """transformers' cache for a model, its plain layers replaced by roomy ones.

    Layers of other kinds, such as sliding windows, stay what they are.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def is_roomy(cache: DynamicCache) -> bool:
    """Whether every layer attends to all of the past, so that padding may lie anywhere in it."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)
