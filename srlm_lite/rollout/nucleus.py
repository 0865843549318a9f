"""Nucleus sampling with random numbers of one's own for every row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from srlm_lite.rollout.protocol import Limits
from srlm_lite.rollout.sizes import DRAWN

FIRST_CUT = 64
"""Candidates tried before a wider cut: nearly always enough, and far cheaper than a full sort."""

MOST_SORTED = 4096
"""Candidates beyond which a CPU does not sort: a nucleus of a flat distribution over 262,144 tokens
holds a third of them, and sorting took three quarters of the time of sampling."""
BINS = 4096
DEEPEST = 24.0
"""Nats below the best token that bins tell apart; all below are in the last one."""

BLOCK = 64
"""Neighbouring tokens that are compared as one when the most probable ones are looked for."""

Alternatives = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities, the most probable first."""


def uniforms(seeds: tuple[int, ...], steps: int) -> Tensor:
    """(rows, steps) numbers in [0, 1): row i is a function of its seed alone."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Each row's next token by inverse transform over its nucleus.

    The nucleus is the smallest set of most probable tokens whose probabilities reach `top_p`.
    It is found among the largest logits first; the cut is widened for rows whose nucleus it does
    not hold, so the distribution is exact.

    Args:
        logits: (B, V) unnormalised.
        uniform: (B,) in [0, 1).
        temperature: 0 takes the most probable token.
        top_p: In (0, 1].

    Returns:
        (B,) token ids.

    Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    uniform = uniform.to(logits.device, torch.float64)
    # On a CPU in parts that stay in its cache: several times as fast as all rows at once.
    rows = len(logits) if logits.is_cuda else max(1, DRAWN // logits.shape[-1])
    parts = [slice(start, start + rows) for start in range(0, len(logits), rows)]
    return torch.cat([_draw(logits[part], uniform[part], temperature, top_p) for part in parts])


def _draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    scaled = logits.float() / temperature
    normaliser = scaled.logsumexp(dim=-1, keepdim=True)
    vocabulary = scaled.shape[-1]
    tokens = torch.empty(len(scaled), dtype=torch.long, device=scaled.device)
    rows = torch.arange(len(scaled), device=scaled.device)
    may_bin = not scaled.is_cuda and vocabulary > MOST_SORTED
    width = min(FIRST_CUT, vocabulary) if top_p < 1 or may_bin else vocabulary
    left, left_normaliser = scaled, normaliser
    while len(rows):
        values, ids = largest(left, width)
        probabilities = (values - left_normaliser).exp().double()
        cumulative = probabilities.cumsum(dim=-1)
        held = (cumulative[:, -1] >= top_p) | (width == vocabulary)
        at = rows[held]
        tokens[at] = _inverse(cumulative[held], ids[held], uniform[at], top_p)
        most = cumulative[:, -1] + (MOST_SORTED - width) * probabilities[:, -1]
        wide = ~held & (most < top_p) if may_bin else torch.zeros_like(held)
        at = rows[wide]
        tokens[at] = _drawn_by_bins(left[wide], left_normaliser[wide], uniform[at], top_p)
        rows, width = rows[~held & ~wide], min(8 * width, vocabulary)
        left, left_normaliser = scaled[rows], normaliser[rows]
    return tokens


def _drawn_by_bins(scaled: Tensor, normaliser: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """What `_inverse` gives where a nucleus is wide: sorted are two bins, and not a vocabulary.

    Bins are of equal width in the logits. The first one sorted is where the nucleus ends, the other
    the one that the uniform number falls in. Of equal logits the lower id comes first.
    """
    probabilities = (scaled - normaliser).exp().double()
    depth = scaled.amax(dim=-1, keepdim=True) - scaled
    scale = BINS / depth.amax(dim=-1, keepdim=True).clamp(min=1e-6, max=DEEPEST)
    places = (depth * scale).clamp(max=BINS - 1).long()
    mass = probabilities.new_zeros(len(scaled), BINS).scatter_add_(1, places, probabilities)
    tokens = []
    for row, cumulative in enumerate(mass.cumsum(dim=-1)):

        def sorted_bin(place: int, row: int = row, cumulative: Tensor = cumulative) -> Any:
            ids = (places[row] == place).nonzero().squeeze(1)
            ids = ids[scaled[row, ids].argsort(descending=True, stable=True)]
            before = cumulative[place - 1] if place else 0.0
            return ids, before + probabilities[row, ids].cumsum(dim=0)

        # Sums of the same numbers, in another order: none may lead past the end of the nucleus.
        end = int(torch.searchsorted(cumulative, top_p).clamp(max=int(places[row].max())))
        ids, inside = sorted_bin(end)
        last = int(torch.searchsorted(inside, top_p).clamp(max=len(ids) - 1))
        target = uniform[row] * inside[last]
        place = min(int(torch.searchsorted(cumulative, target, right=True)), end)
        if place < end:
            ids, inside = sorted_bin(place)
            last = len(ids) - 1
        tokens.append(ids[min(int(torch.searchsorted(inside, target, right=True)), last)])
    return torch.stack(tokens) if tokens else uniform.new_zeros(0, dtype=torch.long)


def _inverse(cumulative: Tensor, ids: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """The token in whose share of the nucleus a uniform number falls.

    Args:
        cumulative: (B, W) of the probabilities in descending order.
    """
    last = (cumulative < top_p).sum(dim=-1, keepdim=True).clamp(max=ids.shape[1] - 1)
    target = uniform.unsqueeze(1) * cumulative.gather(1, last)
    place = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return ids.gather(1, place).squeeze(1)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `values.topk(count)` gives for (B, V), without sorting through all of a vocabulary.

    The `count` largest values lie in the `count` blocks with the largest maxima.
    """
    rows, vocabulary = values.shape
    if vocabulary % BLOCK or vocabulary // BLOCK <= 2 * count:
        return values.topk(count, dim=-1)
    blocks = values.view(rows, -1, BLOCK)
    best = blocks.amax(dim=-1).topk(count, dim=-1).indices
    inside = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    found, places = inside.topk(count, dim=-1)
    return found, best.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def most_probable(logits: Tensor, count: int, also: tuple[int, ...] = ()) -> list[Alternatives]:
    """Each row's most probable tokens with their log-probabilities at temperature 1.

    Args:
        logits: (B, V) unnormalised.
        count: How many; 0 computes nothing.
        also: Tokens that are told of as well, behind the others, wherever they rank.
    """
    if not count:
        return [()] * len(logits)
    scores = logits.float()
    values, tokens = largest(scores, min(count, logits.shape[-1]))
    if also:
        more = torch.tensor(also, device=scores.device).expand(len(scores), -1)
        values = torch.cat([values, scores.gather(1, more)], dim=1)
        tokens = torch.cat([tokens, more], dim=1)
    logs = values - scores.logsumexp(dim=-1, keepdim=True)
    # One that is among the most probable anyway is told of once.
    return [
        tuple(dict(zip(row, row_logs, strict=True)).items())
        for row, row_logs in zip(tokens.tolist(), logs.tolist(), strict=True)
    ]


class SeededNucleus(LogitsProcessor):
    """Makes `generate` sample with each row's own numbers.

    It draws the token itself and leaves it as the only possible one, so that greedy search, the
    simplest path through `generate`, picks it.

    Args:
        numbers: (rows, steps), one for each token that may be drawn.

    `alternatives` holds, for each step and row, what `Limits.alternatives` asks for.
    """

    def __init__(self, numbers: Tensor, limits: Limits) -> None:
        self._numbers, self._limits = numbers, limits
        self.alternatives: list[list[Alternatives]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.alternatives)
        tokens = draw(
            scores,
            self._numbers[:, step],
            temperature=self._limits.temperature,
            top_p=self._limits.top_p,
        )
        told = most_probable(scores, self._limits.alternatives, self._limits.also)
        self.alternatives.append(told)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, tokens.unsqueeze(1), 0.0)
