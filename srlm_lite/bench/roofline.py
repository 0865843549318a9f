"""What this machine can do, measured, and the floor that follows from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import DynamicCache

from srlm_lite.bench.floor import Dimensions, PhaseWork
from srlm_lite.bench.machine import synchronise

LARGE = (2048, 2048, 2048)
"""Rows, inputs and outputs of a product that keeps any machine busy."""
COPIED = 1 << 28
"""Bytes; far more than any cache holds."""
SECONDS = 0.3
"""For as long each product and the copy are tried; the best one counts."""


def shape_of(model: Any) -> Dimensions:
    """The sizes of a decoder-only model that the floor depends on.

    A bfloat16 base keeps its weights and its cache in 2 bytes a number, an NF4 base its linear
    layers in half a byte and what the scales take. Adapters do not count.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    scored = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    layers = [
        weight
        for name, weight in model.get_decoder().named_parameters()
        if "lora_" not in name and weight.dim() == 2 and id(weight) not in scored
    ]
    numbers = [_numbers_and_bytes(weight) for weight in layers]
    linear = sum(count for count, _ in numbers)
    quantized = any(hasattr(weight, "quant_state") for weight in layers)
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    kept = DynamicCache(config=config).layers
    windows = [window for layer in kept if (window := getattr(layer, "sliding_window", None))]
    return Dimensions(
        linear=linear,
        head=head,
        layers=config.num_hidden_layers,
        query_width=heads * width,
        cache_width=(getattr(config, "num_key_value_heads", None) or heads) * width,
        number_bytes=model.dtype.itemsize,
        linear_bytes=sum(size for _, size in numbers) / linear if quantized else None,
        windowed=len(windows),
        window=max(windows, default=None),
    )


def _numbers_and_bytes(weight: Any) -> tuple[int, int]:
    """How many numbers a weight matrix stands for, and the bytes they take."""
    stored = weight.numel() * weight.element_size()
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.numel(), stored
    # The scales, and where those are quantized as well, their own.
    parts = [state.absmax] + ([state.state2.absmax] if state.nested else [])
    return math.prod(state.shape), stored + sum(p.numel() * p.element_size() for p in parts)


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine was seen to do: FLOP/s by shape of the product, and bytes/s."""

    matmul: dict[str, float]
    copy: float

    def or_better(self, other: Rates) -> Rates:
        """The higher of two measurements, each: a machine with other work seems slower."""
        matmul = {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()}
        return Rates(matmul, max(self.copy, other.copy))


def measure_rates(model: Any, *, rows: int) -> Rates:
    """Products as the model has them with so many samples under way, a large one, and a copy."""
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    vocabulary = model.get_output_embeddings().weight.shape[0]
    shapes = [(rows, width, inner), (rows, width, vocabulary), LARGE]
    return Rates(
        matmul_rates(shapes, dtype=model.dtype, device=model.device), copy_bandwidth(model.device)
    )


def roofline(rates: Rates, phases: Mapping[str, PhaseWork]) -> dict[str, Any]:
    """The least seconds of each phase at the best of the rates.

    Returns:
        `floor_s`, `floor` by phase, `machine_rates`.
    """
    best = max(rates.matmul.values())
    seconds = {
        name: work.seconds(flops_rate=best, bandwidth=rates.copy) for name, work in phases.items()
    }
    return {
        "floor_s": round(sum(seconds.values()), 6),
        "floor": {
            name: {"seconds": round(seconds[name], 6), **asdict(work)}
            for name, work in phases.items()
        },
        "machine_rates": {
            "matmul_flops_per_s": {name: round(rate) for name, rate in rates.matmul.items()},
            "copy_bytes_per_s": round(rates.copy),
        },
    }


def matmul_rates(
    shapes: Sequence[tuple[int, int, int]], *, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """FLOP/s of (rows, inputs) times (inputs, outputs), by "rows x inputs x outputs"."""
    rates = {}
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        seconds = _best(partial(linear, x, weight), device)
        rates[f"{rows}x{inputs}x{outputs}"] = 2 * rows * inputs * outputs / seconds
    return rates


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s that a plain copy moves, read and written counted both."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPIED / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of the runs that fit into `SECONDS`, after one that does not count."""
    best, end = float("inf"), 0.0
    work()
    synchronise(device)
    while not end or time.perf_counter() < end:
        start = time.perf_counter()
        end = end or start + SECONDS
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best
