"""Attention that also tells its log-sum-exp, so that attentions over parts can be merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Attended = tuple[Tensor, Tensor]
"""Output (B, H, T, D), and the log-sum-exp of the scores (B, H, T) in float32."""

_HALF = (torch.float16, torch.bfloat16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Attended:
    """Scaled dot-product attention by torch's kernels, where they tell the log-sum-exp.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D), and `value` alike.
        scaling: Of the scores; default 1/sqrt(D).
        causal: Query t sees keys 0 to t; S is T.
        bias: Added to the scores; (B, 1, 1, S).
    """
    if query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scaling
        )
        return output, lse
    if bias is None and query.is_cuda and query.dtype in _HALF:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scaling
        )
        return output, lse
    return plain_attention(query, key, value, scaling, causal=causal, bias=bias)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Attended:
    """What `attention` computes, written out: for devices and cases without such a kernel."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if bias is not None:
        scores = scores + bias
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.unsqueeze(-1)).exp().to(value.dtype) @ value, lse


def merged(parts: Sequence[Attended]) -> Tensor:
    """Attention over all keys from attentions over parts of them: (B, H, T, D).

    With o_i the outputs and l_i their log-sum-exps, it is the sum of softmax(l)_i o_i.

    Source: Rabe and Staats 2021, arXiv:2112.05682, section 3.
    """
    if len(parts) == 1:
        return parts[0][0]
    weights = torch.stack([lse for _, lse in parts]).softmax(dim=0).unsqueeze(-1)
    total = sum(output * weight for (output, _), weight in zip(parts, weights, strict=True))
    rounded: Tensor = total.to(parts[0][0].dtype)
    return rounded
