"""A model's layers as a training computes them: the same values in fewer operations.

What autograd makes of a layer with LoRA, and of a norm, is a dozen operations that each read and
write all tokens, and float32 copies of what is there in 16 bits. On a CPU they took longer than the
products. Here each layer is one operation with its gradients written out: an adapter's product is
added where the base's is computed, and a norm keeps its input and one number a token.

A layer of a kind that is not known here, or that does not give on trial what its own code gives, is
computed by its own code.

Source: Hu et al. 2021, arXiv:2106.09685, Eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.functional import linear

from srlm_lite.model.stack import Slot
from srlm_lite.training.norms import Forward, epsilon_of, normed


class Layers:
    """The layers of a model with adapters that can be computed so."""

    def __init__(self, slot: Slot) -> None:
        self._forwards: list[tuple[nn.Module, Forward]] = []
        for module in slot.model.modules():
            if "forward" in vars(module):  # another's, such as a backend's
                continue
            if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
                if not slot.sharded:
                    self._forwards.append((module, _adapted(module)))
            elif (epsilon := epsilon_of(module)) is not None:
                self._forwards.append((module, normed(module, epsilon)))

    @property
    def some(self) -> bool:
        """Whether there are any."""
        return bool(self._forwards)

    def leave(self) -> None:
        """Have all layers computed by their own code from here on."""
        self._forwards = []

    @contextmanager
    def in_fewer_operations(self) -> Iterator[None]:
        """Within this context they are computed so, and outside of it by their own code."""
        changed = list(self._forwards)
        for module, forward in changed:
            vars(module)["forward"] = forward
        try:
            yield
        finally:
            for module, _ in changed:
                vars(module).pop("forward", None)


def _adapted(layer: Any) -> Forward:
    """The forward pass of a linear layer that carries one adapter."""
    own: Forward = layer.forward
    base = layer.base_layer

    def forward(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = base.weight
        known = (
            inputs.dtype == weight.dtype
            and not weight.requires_grad
            and not args
            and not kwargs
            and not layer.disable_adapters
            and not layer.merged
            and not layer.lora_variant
            and len(layer.active_adapters) == 1
        )
        if not known:
            return own(inputs, *args, **kwargs)
        (name,) = layer.active_adapters
        a, b = layer.lora_A[name], layer.lora_B[name]
        if a.bias is not None or b.bias is not None:
            return own(inputs)
        dropped = layer.lora_dropout[name](inputs)
        found: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            inputs,
            None if dropped is inputs else dropped,
            weight,
            base.bias,
            a.weight,
            b.weight,
            layer.scaling[name],
        )
        return found

    return forward


class _Adapted(torch.autograd.Function):
    """x W' + bias + c (x A') B': (..., inputs) to (..., outputs); W and the bias are frozen.

    The adapter may be given another input than the base, one of which something is dropped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        given = inputs if dropped is None else dropped
        ctx.dtype = a.dtype
        a, b = a.to(inputs.dtype), b.to(inputs.dtype)
        rows = given.reshape(-1, given.shape[-1])
        down = rows @ a.t()
        output = linear(inputs, weight, bias)
        output.view(-1, output.shape[-1]).addmm_(down, b.t(), alpha=scaling)
        ctx.save_for_backward(rows, down, weight, a, b)
        ctx.shape, ctx.apart, ctx.scaling = inputs.shape, dropped is not None, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, weight, a, b = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        slopes = gradients[0].reshape(-1, weight.shape[0])
        up = slopes @ b * ctx.scaling
        of_inputs = of_dropped = None
        if wanted[0]:
            of_inputs = slopes @ weight
            if not ctx.apart:
                of_inputs.addmm_(up, a)
            of_inputs = of_inputs.view(ctx.shape)
        if wanted[1]:
            of_dropped = (up @ a).view(ctx.shape)
        of_a = (up.t() @ rows).to(ctx.dtype) if wanted[4] else None
        # The product whose rows are few is the fast one of the two.
        of_b = (down.t() @ slopes).t().to(ctx.dtype).mul_(ctx.scaling) if wanted[5] else None
        return of_inputs, of_dropped, None, None, of_a, of_b, None
