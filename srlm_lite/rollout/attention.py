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
    softcap: float | None = None,
) -> Attended:
    """Scaled dot-product attention by torch's kernels, where they tell the log-sum-exp.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D), and `value` alike.
        scaling: Of the scores; default 1/sqrt(D).
        causal: Query t sees keys 0 to t; S is T.
        bias: Added to the scores; (B, 1, T, S), B and T may be 1.
        softcap: Bounds the scores before the bias: c tanh(score / c). No kernel of torch's has it.
    """
    if softcap is not None:
        return plain_attention(
            query, key, value, scaling, causal=causal, bias=bias, softcap=softcap
        )
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
    softcap: float | None = None,
) -> Attended:
    """What `attention` computes, written out: for devices and cases without such a kernel."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        scores = scores + bias
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.unsqueeze(-1)).exp().to(value.dtype) @ value, lse


def hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias that hides what is true in a mask: the lowest number, else 0.

    Not minus infinity: a query from which all of a part is hidden then has a finite output there,
    and a log-sum-exp so low that `merged` gives the part no weight.
    """
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill(hidden, torch.finfo(dtype).min)


def merged(parts: Sequence[Attended], sinks: Tensor | None = None) -> Tensor:
    """Attention over all keys from attentions over parts of them: (B, H, T, D).

    With o_i the outputs and l_i their log-sum-exps, it is the sum of softmax(l)_i o_i. A sink is a
    score of its own that takes its share of the softmax and gives nothing: one part more, of
    output 0.

    Args:
        sinks: (H, T), of each head and query.

    Source: Rabe and Staats 2021, arXiv:2112.05682, section 3; of sinks, Xiao et al. 2023,
    arXiv:2309.17453, and gpt-oss's model card, arXiv:2508.10925.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0][0]
    scores = [lse for _, lse in parts]
    if sinks is not None:
        scores.append(sinks.float().expand_as(scores[0]))
    weights = torch.stack(scores).softmax(dim=0).unsqueeze(-1)
    total = sum(output * weight for (output, _), weight in zip(parts, weights, strict=False))
    rounded: Tensor = total.to(parts[0][0].dtype)
    return rounded
