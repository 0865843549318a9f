"""How many rows a device has memory for."""

from __future__ import annotations

import os
from typing import Any

import torch

MOST_ROWS = 256
"""More rows at once gain nothing: the weights' share of the time is small by then."""

SHARE = 0.5
"""Of what the weights leave: the rest is for activations, fragments and everybody else."""


def rows_that_fit(model: Any, *, tokens: int) -> int:
    """Rows whose keys, values and logits fit beside the weights.

    It goes by the device's whole memory, not by what is free at the moment: a run that is resumed
    has to form the same batches.

    Args:
        tokens: That a row keeps keys and values of; its prompt is counted whole, as if it shared
            no prefix with others.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * tokens
    # Logits as the model writes them, and in float32 three times over while a token is drawn.
    drawn = config.vocab_size * (model.dtype.itemsize + 3 * 4)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = SHARE * (_memory(model.device) - weights)
    return max(1, min(MOST_ROWS, int(room / (kept + drawn))))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
