"""Do the stack and its export answer alike? Measured with one layer in memory at a time.

Both sides compute in float32, so that what differs is what the export has rounded, and not how a
16-bit product was summed. The stack's side adds each adapter beside the weights, as training saw
it; it shares no code with the merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srlm_lite.errors import UserError
from srlm_lite.model.layout import Layout, Read
from srlm_lite.model.stack import Adapter

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.0125, torch.bfloat16: 0.1}
"""How far rounding the weights to a dtype may move any logit, as a share of the largest one.
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
        read: Gives a parameter by its name in the model; KeyError where it has none of that name.
        stacks: Computed side by side on the same weights.
    """
    longest = max(len(ids) for ids in texts)
    # Padding on the right: no position sees what comes after it.
    rows = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=device)
    try:
        with _streaming(model, read, device), _beside(model, stacks, rows.numel(), device):
            out: Tensor = model(input_ids=rows.repeat(len(stacks), 1), use_cache=False).logits
    except _OutOfStep:
        return [logits(model, read, texts, stacks=[one], device=device)[0] for one in stacks]
    real = torch.tensor([[i < len(ids) for i in range(longest)] for ids in texts], device=device)
    return [part[real].float().cpu() for part in out.chunk(len(stacks))]


def compare(stack: Tensor, export: Tensor) -> Parity:
    """The differences between (P, V) logits."""
    greatest = torch.zeros(())  # of tensors, the larger of two is NaN where one is
    total = divergence = 0.0
    agreed = 0
    for start in range(0, len(stack), 32):
        ours, theirs = stack[start : start + 32], export[start : start + 32]
        apart = (ours - theirs).abs()
        greatest = torch.maximum(greatest, apart.max())
        total += float(apart.double().sum())
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    n = len(stack)
    return Parity(
        max_abs_logit_diff=float(greatest),
        mean_abs_logit_diff=total / stack.numel(),
        mean_kl=divergence / n,
        top1_agreement=agreed / n,
        positions=n,
    )


def beside(logits: Tensor, likely: Sequence[Sequence[tuple[int, float]]]) -> tuple[float, float]:
    """Mean KL, and share of agreement on the most probable token, of what another engine says.

    Args:
        logits: (P, V).
        likely: For each of the P places, tokens and their log-probabilities, the likeliest first.
    """
    divergence, agreed = 0.0, 0
    for row, said in zip(logits, likely, strict=True):
        ours = row.double().log_softmax(-1)
        theirs = torch.tensor([value for _, value in said], dtype=torch.float64)
        places = torch.tensor([token for token, _ in said])
        divergence += float((theirs.exp() * (theirs - ours[places])).sum())
        agreed += said[0][0] == int(ours.argmax())
    return divergence / len(logits), agreed / len(logits)


def spread(likely: Sequence[Sequence[tuple[int, float]]], size: int) -> Tensor:
    """The same log-probabilities as (P, V); of a token that is not among them, next to nothing."""
    rows = torch.full((len(likely), size), -100.0)
    for row, said in zip(rows, likely, strict=True):
        row[[token for token, _ in said]] = torch.tensor([value for _, value in said])
    return rows


def last_of(logits: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """The logits at the end of each text, from those of whole texts."""
    return torch.stack([part[-1] for part in torch.split(logits, [len(text) for text in texts])])


def tolerance(dtype: torch.dtype, stack: Tensor) -> float:
    """The largest `max_abs_logit_diff` that rounding to the dtype explains.

    Zero where the stack's own logits are not all finite: nothing can be told from those.
    """
    largest = float(stack.abs().max())
    return RELATIVE_TOLERANCE[dtype] * largest if math.isfinite(largest) else 0.0


class TensorCheck:
    """Holds every exported parameter against W + sum of s·B·A, rounded, while the base is read.

    The logits alone cannot tell a forgotten delta from rounding, where a delta is small. This can:
    a parameter is right when it is the rounded sum itself, up to the order of summation. Both sides
    are read as transformers reads them, so it also tells one that was written in another's place.
    """

    def __init__(self, base: Layout, stack: Sequence[Adapter], export: Layout) -> None:
        self._base, self._stack, self._export = base, stack, export
        self._left = dict.fromkeys(export.parameters)
        self.worst, self.error = "", -1.0
        """The parameter furthest from what it should be, and how far, as a share of its norm."""
        for name in {*base.parameters, *base.strays} - {*export.parameters, *export.strays}:
            self._note(name, math.inf)

    def reading(self, read: Read) -> Read:
        """The same reader of the base, with each parameter checked when it is first read."""

        def checked(name: str) -> Tensor:
            weight = read(name)
            if name in self._left:
                del self._left[name]
                self._check(name, weight)
            return weight

        return checked

    def rest(self, read: Read) -> None:
        """Check what the model has not asked for, and the files' tensors that it does not have."""
        for name in list(self._left):
            self._check(name, read(self._base.held_as(name)))
        for name in self._base.strays:
            if name in self._export.checkpoint:
                found = self._export.checkpoint.read(name)
                self._note(name, _share_of_others(found, self._base.checkpoint.read(name)))

    def _check(self, name: str, weight: Tensor) -> None:
        found, module = self._export.read(name), name.removesuffix(".weight")
        if any(module in adapter.factors for adapter in self._stack):
            if self._base.is_transposed(module):
                found, weight = found.T, weight.T
            self._note(name, relative_error(found, weight, module, self._stack))
        else:
            self._note(name, _share_of_others(found, weight))

    def _note(self, name: str, apart: float) -> None:
        if is_further(apart, self.error):
            self.worst, self.error = name, apart


def is_further(apart: float, furthest: float) -> bool:
    """Whether one distance is larger than another; what is no number is larger than any."""
    return not math.isnan(furthest) and not apart <= furthest


def _share_of_others(found: Tensor, weight: Tensor) -> float:
    """The share of elements that are not the weight's, rounded."""
    if found.shape != weight.shape:
        return math.inf
    return float((found != weight.to(found.dtype)).float().mean()) if found.numel() else 0.0


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
        if is_further(apart, furthest):
            worst, furthest = module, apart
    return worst, furthest


def tensor_tolerance(dtype: torch.dtype) -> float:
    """The largest error of a right tensor.

    Sums taken in another order differ by float32's rounding, which moves one element in some ten
    thousand over to the dtype's next number.
    """
    return max(torch.finfo(dtype).eps / 20, 1e-6)


class _OnDemand(dict[str, Any]):
    """A module's parameters, each of them read when code asks the module for it.

    Whichever way the code goes: a convolution whose weight is read by the layer around it is never
    called itself. To go through all of them reads none, and finds NaN in the place of each.
    """

    def __init__(self, empty: dict[str, Any], fill: Callable[[nn.Parameter], Tensor]) -> None:
        super().__init__(
            {
                key: None if one is None else torch.full((), torch.nan).expand(one.shape)
                for key, one in empty.items()
            }
        )
        self.empty, self._fill = empty, fill
        self._held: dict[str, nn.Parameter] = {}

    def __getitem__(self, key: str) -> Any:
        if self.empty[key] is None:
            return None
        if key not in self._held:
            weight = self._fill(self.empty[key])
            self._held[key] = nn.Parameter(weight, requires_grad=False)
        return self._held[key]

    def release(self) -> None:
        """Give up what has been read."""
        self._held.clear()


@contextmanager
def _streaming(model: PreTrainedModel, read: Read, device: str) -> Iterator[None]:
    """Within this context a module holds its weights only while it, or one around it, computes."""
    names = _names(model)
    on_demand: dict[nn.Module, _OnDemand] = {}
    handles = []

    def fill(empty: nn.Parameter) -> Tensor:
        return _first(read, names[id(empty)]).to(device=device, dtype=torch.float32)

    def release(module: nn.Module, args: Any, output: Any) -> None:
        for inner in module.modules():
            if inner in on_demand:
                on_demand[inner].release()

    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = _kept(read, names.get(id(buffer), []), buffer).to(device)
    for module in model.modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            on_demand[module] = _OnDemand(module._parameters, fill)
            vars(module)["_parameters"] = on_demand[module]
        handles.append(module.register_forward_hook(release, always_call=True))
    try:
        yield
    finally:
        for module, parameters in on_demand.items():
            vars(module)["_parameters"] = parameters.empty
        for handle in handles:
            handle.remove()


def _kept(read: Read, names: Sequence[str], buffer: Tensor) -> Tensor:
    """A buffer as the files have it, where they do: a router's bias is one of those."""
    for name in names:
        with suppress(KeyError):
            return read(name).to(buffer.dtype)
    return buffer


def _names(model: PreTrainedModel) -> dict[int, list[str]]:
    """Every name of each parameter and persistent buffer, by its id; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        names.setdefault(id(parameter), []).append(name)
    return names


def _first(read: Read, names: Sequence[str]) -> Tensor:
    for name in names:
        try:
            return read(name)
        except KeyError:
            continue
    raise UserError(
        f"the base's files have no {names[0]}, which its forward pass reads",
        where="base.name",
        way_out="Get the files again",
    )


class _OutOfStep(Exception):
    """A layer gets other rows than the texts', as a chosen expert does."""


@contextmanager
def _beside(
    model: PreTrainedModel, stacks: Sequence[Sequence[Adapter]], tokens: int, device: str
) -> Iterator[None]:
    """Within this context, each stack computes beside the weights for its part of the rows.

    Args:
        tokens: That each stack gets; `_OutOfStep` where a layer gets others, and there are several
            stacks.
    """
    modules = dict(model.named_modules())
    handles = []
    for name in dict.fromkeys(m for stack in stacks for adapter in stack for m in adapter.factors):

        def add(module: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor:
            if len(stacks) > 1 and args[0][..., 0].numel() != tokens * len(stacks):
                raise _OutOfStep
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
