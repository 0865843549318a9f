"""What sampling holds in memory: the sampler's own constants, and the bytes that follow from them.

Nothing here imports torch, so that a plan can read what the sampler does by these.
"""

from __future__ import annotations

import math
from typing import Any

MOST_ROWS = 256
"""The most rows of a batch that is sized by memory. More at once gain nothing: the weights' share
of the time is small by then."""
SHARE = 0.5
"""The share of what the weights leave that such a batch takes: the rest is for activations and
everybody else."""
PREFILL_TOKENS = 4096
"""Prompt tokens computed in one forward pass; it bounds the memory of activations."""
PRUNE = 1 / 8
"""Share of ended rows at which they leave the batch, and waiting ones enter it."""
LEAST_ROOM = 32
"""Tokens that a sample's keys and values have room for at first; doubled when that is used up."""
DRAWN = 2**19
"""Logits that a CPU draws from at once: 2 MB of them stay in its cache."""
DRAWING = 44
"""Bytes of each while it is sorted whole, as a flat distribution wants."""
GATHERED = 3
"""Decoder layers that FSDP2 has whole at a time, counted from its code: the one that computes, in
one piece and in its tensors, and the next one, on its way."""


def kv_bytes(*, layers: int, width: int, itemsize: int) -> int:
    """Keys and values of one token in all layers; `width`: those of one layer."""
    return layers * width * itemsize


def attention_of(text: Any) -> tuple[int, int, int]:
    """Query heads of a layer, the width of one, and the keys and values kept of a token.

    Where layers differ, the widest; zeros where nothing attends, as in Mamba.

    Args:
        text: The configuration of the text model, as transformers has it.
    """
    if getattr(text, "is_heterogeneous", False):  # as Gemma 4: it says these layer by layer
        found = [attention_of(text.per_layer_config[at]) for at in range(text.num_hidden_layers)]
        return max(a for a, _, _ in found), max(b for _, b, _ in found), max(c for *_, c in found)
    heads = widest(text, "num_attention_heads")
    if not heads:
        return 0, 0, 0
    if widest(text, "kv_lora_rank"):  # the latent is expanded before it is kept
        width = widest(text, "qk_nope_head_dim") + widest(text, "qk_rope_head_dim")
        return heads, width, heads * (width + widest(text, "v_head_dim"))
    width = widest(text, "head_dim") or text.hidden_size // heads
    return heads, width, 2 * widest(text, "num_key_value_heads", "num_attention_heads") * width


def widest(text: Any, *names: str) -> int:
    """A size by the first of these names that a configuration has; 0 where it has none of them.

    Where layers differ, the largest.
    """
    for name in names:
        try:
            found = getattr(text, name, None)
        except RuntimeError:  # transformers 5.17 does not say it for all layers together
            found = [getattr(layer, name, None) or 0 for layer in text.per_layer_config]
        if found:
            return int(max(found) if isinstance(found, list | tuple) else found)
    return 0


def drawing_bytes(vocabulary: int, itemsize: int) -> int:
    """Logits of one row as the model writes them, and in float32 three times while it is drawn."""
    return vocabulary * (itemsize + 3 * 4)


def rows_within(memory: int, *, weights: int, row: int) -> int:
    """Rows of so many bytes that fit beside the weights."""
    return max(1, min(MOST_ROWS, int(SHARE * (memory - weights) / max(1, row))))


def leaf_room(new_tokens: int) -> int:
    """Tokens that a sample's keys and values have room for at its end."""
    return LEAST_ROOM << max(0, math.ceil(math.log2(new_tokens / LEAST_ROOM)))
