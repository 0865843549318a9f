"""Counts the bytes of all tensors alive, operation by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within this context, `peak` is the most bytes that tensors met in it have held at once.

    Tensors made before count from the moment an operation returns a view of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.at_peak: list[tuple[int, str, tuple[int, ...], str]] = []
        self._now = 0
        self._live: dict[int, tuple[StorageWeakRef, tuple[int, str, tuple[int, ...], str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage._cdata not in self._live:
                    row = (storage.nbytes(), str(func), tuple(tensor.shape), str(tensor.dtype))
                    self._live[storage._cdata] = (StorageWeakRef(storage), row)
                    self._now += storage.nbytes()
        if self._now > self.peak:
            self._forget_dead()
            if self._now > self.peak:
                self.peak = self._now
                self.at_peak = [row for _, row in self._live.values()]
        return out

    def _forget_dead(self) -> None:
        for key in [key for key, (ref, _) in self._live.items() if ref.expired()]:
            self._now -= self._live.pop(key)[1][0]
