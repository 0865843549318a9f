"""Do the stack and its export answer alike? Measured with one layer in memory at a time.

Both sides compute in float32, so that what differs is what the export has rounded, and not how a
16-bit product was summed. The stack's side adds each adapter beside the weights, as training saw
it; it shares no code with the merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srlm_lite.errors import UserError
from srlm_lite.model.checkpoint import Checkpoint
from srlm_lite.model.merge import Merge, Plan
from srlm_lite.model.stack import Adapter

Read = Callable[[str], Tensor]

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.0125, torch.bfloat16: 0.1}
"""Of the largest logit: how far rounding the weights to a dtype may move any one of them.
On SmolLM2-135M it moves one by 3e-6, 0.0015 and 0.012 at most."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far two models are apart on the same texts, over all positions and the vocabulary."""

    max_abs_logit_diff: float
    mean_abs_logit_diff: float
    mean_kl: float
    """KL(stack || export) in nats, mean over positions."""
    top1_agreement: float
    """Share of positions at which both find the same token most probable."""
    positions: int

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def logits(
    model: PreTrainedModel,
    read: Read,
    texts: Sequence[Sequence[int]],
    *,
    stacks: Sequence[Sequence[Adapter]] = ((),),
    device: str = "cpu",
) -> list[Tensor]:
    """(P, V) float32 logits at the P positions of all texts, for each stack.

    Args:
        model: Without weights, from `skeleton`.
        read: Gives a tensor by its name in the checkpoint.
        stacks: Computed side by side on the same weights.
    """
    longest = max(len(ids) for ids in texts)
    # Padding on the right: no position sees what comes after it.
    rows = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=device)
    with _streaming(model, read, device), _beside(model, stacks, device):
        out: Tensor = model(input_ids=rows.repeat(len(stacks), 1), use_cache=False).logits
    real = torch.tensor([[i < len(ids) for i in range(longest)] for ids in texts], device=device)
    return [part[real].float().cpu() for part in out.chunk(len(stacks))]


def compare(stack: Tensor, export: Tensor) -> Parity:
    """The differences between (P, V) logits."""
    greatest = total = divergence = 0.0
    agreed = 0
    for start in range(0, len(stack), 32):
        ours, theirs = stack[start : start + 32], export[start : start + 32]
        apart = (ours - theirs).abs()
        greatest = max(greatest, float(apart.max()))
        total += float(apart.double().sum())
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    n = len(stack)
    return Parity(
        max_abs_logit_diff=greatest,
        mean_abs_logit_diff=total / stack.numel(),
        mean_kl=divergence / n,
        top1_agreement=agreed / n,
        positions=n,
    )


def tolerance(dtype: torch.dtype, stack: Tensor) -> float:
    """The largest `max_abs_logit_diff` that rounding to the dtype explains."""
    return RELATIVE_TOLERANCE[dtype] * float(stack.abs().max())


class TensorCheck:
    """Holds every exported tensor against W + sum of s·B·A, rounded, while the base is read.

    The logits alone cannot tell a forgotten delta from rounding, where a delta is small. This can:
    a tensor is right when it is the rounded sum itself, up to the order of summation.
    """

    def __init__(self, plan: Plan, stack: Sequence[Adapter], export: Checkpoint) -> None:
        self._stack, self._export = stack, export
        self._merges: dict[str, list[Merge]] = {}
        for merge in (merge for merges in plan.shards.values() for merge in merges):
            self._merges.setdefault(merge.source, []).append(merge)
        self.worst, self.error = "", -1.0
        """The tensor furthest from what it should be, and how far, as a share of its norm."""

    def reading(self, read: Read) -> Read:
        """The same reader of the base, with each tensor checked when it is first read."""

        def checked(name: str) -> Tensor:
            weight = read(name)
            for merge in self._merges.pop(name, []):
                self._check(merge, weight)
            return weight

        return checked

    def rest(self, read: Read) -> None:
        """Check what the model has not asked for."""
        for name in list(self._merges):
            self.reading(read)(name)

    def _check(self, merge: Merge, weight: Tensor) -> None:
        found = self._export.read(merge.info.name)
        if merge.update is None or weight.dim() != 2:
            apart = float((found != weight.to(found.dtype)).float().mean())
        else:
            module = merge.info.name.removesuffix(".weight")
            apart = relative_error(found, weight, module, self._stack)
        if not apart <= self.error:  # so that NaN counts as furthest
            self.worst, self.error = merge.info.name, apart


def relative_error(found: Tensor, weight: Tensor, module: str, stack: Sequence[Adapter]) -> float:
    """Distance of a tensor from the rounded W + sum of s·B·A, as a share of the latter's norm."""
    squares, norm = 0.0, 1e-30
    rows = max(1, (1 << 20) // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        right = weight[part].to(torch.float32, copy=True)
        for adapter in stack:
            if module in adapter.factors:
                a, b = adapter.factors[module]
                right += adapter.scaling * (b[part] @ a)
        right = right.to(found.dtype).float()
        squares += float((found[part].float() - right).square().sum())
        norm += float(right.square().sum())
    return math.sqrt(squares / norm)


def most_different_module(found: Adapter, stack: Sequence[Adapter]) -> tuple[str, float]:
    """The module whose update in one adapter is furthest from the stack's, as `relative_error`."""
    worst, furthest = "", -1.0
    for module in dict.fromkeys(m for adapter in stack for m in adapter.factors):
        a, b = found.factors[module]
        zero = torch.zeros(b.shape[0], a.shape[1])
        apart = relative_error(found.scaling * (b @ a), zero, module, stack)
        if not apart <= furthest:
            worst, furthest = module, apart
    return worst, furthest


def tensor_tolerance(dtype: torch.dtype) -> float:
    """The largest error of a right tensor.

    Sums taken in another order differ by float32's rounding, which moves one element in some ten
    thousand over to the dtype's next number.
    """
    return max(torch.finfo(dtype).eps / 20, 1e-6)


@contextmanager
def _streaming(model: PreTrainedModel, read: Read, device: str) -> Iterator[None]:
    """Within this context a module holds its weights only while it computes."""
    names = _names(model)
    handles = []

    def fill(module: nn.Module, args: Any) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                weight = _first(read, names[id(parameter)])
                full = weight.to(device=device, dtype=torch.float32)
                module.__dict__.setdefault("_empty", {})[key] = parameter
                module._parameters[key] = nn.Parameter(full, requires_grad=False)

    def empty(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(module.__dict__.pop("_empty", {}))

    for module in model.modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            handles.append(module.register_forward_pre_hook(fill))
            handles.append(module.register_forward_hook(empty, always_call=True))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _names(model: PreTrainedModel) -> dict[int, list[str]]:
    """Every name of each parameter; tied ones have several, and a file has one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _first(read: Read, names: Sequence[str]) -> Tensor:
    for name in names:
        try:
            return read(name)
        except KeyError:
            continue
    raise UserError(
        f"the base's files have no {names[0]}; this architecture stores its weights under other "
        "names, and cannot be checked",
        where="base.name",
    )


@contextmanager
def _beside(
    model: PreTrainedModel, stacks: Sequence[Sequence[Adapter]], device: str
) -> Iterator[None]:
    """Within this context, each stack computes beside the weights for its part of the rows."""
    modules = dict(model.named_modules())
    handles = []
    for name in dict.fromkeys(m for stack in stacks for adapter in stack for m in adapter.factors):

        def add(module: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor:
            inputs, parts = args[0].chunk(len(stacks)), list(output.chunk(len(stacks)))
            for i, stack in enumerate(stacks):
                for adapter in stack:
                    if name in adapter.factors:
                        a, b = (factor.to(device) for factor in adapter.factors[name])
                        parts[i] = parts[i] + adapter.scaling * (inputs[i] @ a.T @ b.T)
            return torch.cat(parts)

        handles.append(modules[name].register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
