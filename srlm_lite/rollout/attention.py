"""Attention for decoding where several query heads share one key-value head.

With a padding mask, transformers' sdpa attention first repeats keys and values for every query
head: for one new token it copies the whole cache several times over. Here the query heads that
share a key-value head become the query positions of one attention, which reads the cache once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "srlm_grouped_decode"


def grouped_decode(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token; everything else goes the way of transformers' sdpa.

    Args:
        query: (B, Hq, T, D); grouped when T is 1.
        key: (B, Hkv, S, D), and `value` alike; Hkv divides Hq.
        attention_mask: None, or (B, 1, T, S).

    Returns:
        (B, T, Hq, D), and None for the weights.
    """
    batch, query_heads, tokens, width = query.shape
    heads = key.shape[1]
    special = kwargs.get("position_bias") is not None or kwargs.get("dropout")
    if tokens != 1 or heads == query_heads or special or _per_head(attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    grouped = query.reshape(batch, heads, query_heads // heads, width)
    output = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling, is_causal=False
    )
    return output.reshape(batch, 1, query_heads, width), None


def _per_head(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.shape[1] != 1


@contextmanager
def grouped_decoding(model: Any) -> Iterator[None]:
    """Within this context the model decodes with grouped attention, if it uses sdpa at all."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    AttentionInterface.register(NAME, grouped_decode)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
