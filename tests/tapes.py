"""Steps from a graph, on a CPU: the same operations on the same memory, once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srlm_lite.rollout import steps
from srlm_lite.rollout.protocol import Limits
from srlm_lite.rollout.steps import Steps
from srlm_lite.rollout.transformers_engine import Row, TransformersEngine

aten = torch.ops.aten
READS = (
    aten.item.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten._local_scalar_dense.default,
)
"""Operations that wait for the device; the first two are how inference mode has the last."""


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the same operations on the same memory, once more.

    Numbers that Python has read of a tensor are constants of it; a graph cannot even be captured
    where Python reads one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taped(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The graphs that this engine captures from now on."""
    made: list[Tape] = []

    def captured(work: Any, *, after: Tape | None) -> tuple[Tape, torch.Tensor]:
        assert after is (made[-1] if made else None)  # it keeps the memory of the one before
        with Tape() as tape:
            logits = work()
        engine._tree.step_back()  # a capture computes nothing
        made.append(tape)
        return tape, logits

    monkeypatch.setattr(steps, "captured", captured)
    monkeypatch.setattr(engine, "_captures", True)
    return made


def logits_by_prefix(
    call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[Any, ...], torch.Tensor]:
    """What a call draws each token from: by the prompt, the sample and the tokens before."""
    found: dict[tuple[Any, ...], torch.Tensor] = {}
    step = TransformersEngine._step

    def spied(self: TransformersEngine, steps: Steps, live: list[Row], limits: Limits) -> int:
        def kept(ids: torch.Tensor) -> torch.Tensor:
            logits = Steps.next_logits(steps, ids)
            for row, row_logits in zip(live, logits, strict=True):
                key = (row.prompt_ids, row.numbers[0], *row.tokens)
                found[key] = row_logits.clone()
            return logits

        monkeypatch.setattr(steps, "next_logits", kept)
        return step(self, steps, live, limits)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "_step", spied)
        call()
    return found
