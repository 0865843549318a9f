"""Nucleus sampling with random numbers of one's own for every row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

FIRST_CUT = 64
"""Candidates tried before a wider cut: nearly always enough, and far cheaper than a full sort."""


def uniforms(seeds: tuple[int, ...], steps: int) -> Tensor:
    """(rows, steps) numbers in [0, 1): row i is a function of its seed alone."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Each row's next token by inverse transform over its nucleus.

    The nucleus is the smallest set of most probable tokens whose probabilities reach `top_p`.
    It is found among the largest logits first; the cut is widened until it holds the nucleus of
    every row, so the distribution is exact.

    Args:
        logits: (B, V) unnormalised.
        uniform: (B,) in [0, 1).
        temperature: Above 0.
        top_p: In (0, 1].

    Returns:
        (B,) token ids.

    Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    scaled = logits.float() / temperature
    normaliser = scaled.logsumexp(dim=-1, keepdim=True)
    vocabulary = logits.shape[-1]
    width = vocabulary if top_p >= 1 else min(FIRST_CUT, vocabulary)
    while True:
        if width == vocabulary and top_p >= 1:
            values, tokens = scaled, None
        else:
            values, tokens = scaled.topk(width, dim=-1)
        probabilities = (values - normaliser).exp().double()
        cumulative = probabilities.cumsum(dim=-1)
        if width == vocabulary or bool((cumulative[:, -1] >= top_p).all()):
            break
        width = min(width * 8, vocabulary)
    if top_p < 1:
        outside = cumulative - probabilities >= top_p
        cumulative = probabilities.masked_fill(outside, 0).cumsum(dim=-1)
    target = uniform.to(cumulative.device, torch.float64).unsqueeze(1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=width - 1)
    return (index if tokens is None else tokens.gather(1, index)).squeeze(1)


class SeededNucleus(LogitsProcessor):
    """Makes `generate` sample with each row's own numbers.

    It draws the token itself and leaves it as the only possible one, so that greedy search, the
    simplest path through `generate`, picks it.

    Args:
        numbers: (rows, steps), one for each token that may be drawn.
    """

    def __init__(self, numbers: Tensor, *, temperature: float, top_p: float) -> None:
        self._numbers, self._temperature, self._top_p = numbers, temperature, top_p
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = draw(
            scores,
            self._numbers[:, self._step],
            temperature=self._temperature,
            top_p=self._top_p,
        )
        self._step += 1
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, tokens.unsqueeze(1), 0.0)
