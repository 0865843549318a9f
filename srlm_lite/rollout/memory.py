"""How many rows a device has memory for."""

from __future__ import annotations

from typing import Any

import torch

from srlm_lite.hardware import machine_memory
from srlm_lite.model.sharding import held, is_sharded
from srlm_lite.rollout.sizes import GATHERED, attention_of, drawing_bytes, kv_bytes, rows_within


def rows_that_fit(model: Any, *, tokens: int) -> int:
    """Rows whose keys, values and logits fit beside the weights.

    It goes by the device's whole memory, not by what is free at the moment: a run that is resumed
    has to form the same batches.

    Args:
        tokens: That a row keeps keys and values of; its prompt is counted whole, as if it shared
            no prefix with others.
    """
    config, c = model.config.get_text_config(), model.dtype.itemsize
    _, _, width = attention_of(config)
    kept = kv_bytes(layers=config.num_hidden_layers, width=width, itemsize=c)
    weights = sum(held(p).nbytes for p in model.parameters())
    if is_sharded(model):
        spread = sum(p.nbytes for p in model.parameters() if held(p) is not p)
        weights += GATHERED * spread // config.num_hidden_layers
    return rows_within(
        memory_of(model.device),
        weights=weights,
        row=kept * tokens + drawing_bytes(config.vocab_size, c),
    )


def memory_of(device: torch.device) -> int:
    """All the memory of a GPU, or of the machine, as far as we may have it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory()
