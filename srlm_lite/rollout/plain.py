"""Sampling with transformers' own `generate`, for models that no tree can serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from srlm_lite.model.chat import ChatFormat
from srlm_lite.rollout.nucleus import Alternatives, SeededNucleus
from srlm_lite.rollout.protocol import Limits


def generate(
    model: Any,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    numbers: Tensor,
    limits: Limits,
) -> list[list[tuple[int, Alternatives]]]:
    """Continue each prompt, padded on the left, in one call.

    Args:
        numbers: (rows, steps) in [0, 1), what each row's tokens are drawn with.

    Returns:
        Each row's tokens with their alternatives; behind an end of turn anything may follow.
    """
    sampler = SeededNucleus(numbers, limits)
    ends = () if limits.ignore_end else chat.stop_ids
    output = _generated(model, chat, prompts, sampler, tokens=limits.max_new_tokens, ends=ends)
    others = zip(*sampler.alternatives, strict=True)
    return [
        list(zip(tokens, alternatives, strict=True))
        for tokens, alternatives in zip(output.tolist(), others, strict=True)
    ]


def _generated(
    model: Any,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    chooser: LogitsProcessor,
    *,
    tokens: int,
    ends: Sequence[int] = (),
) -> Tensor:
    """(rows, new tokens) as the chooser leaves one possible at a time."""
    # Without an end of its own, `generate` takes the one of the model's generation config.
    never_drawn = model.get_input_embeddings().num_embeddings
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), chat.pad_id)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention[row, longest - len(prompt) :] = 1
    output: Tensor = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=attention.to(model.device),
        logits_processor=LogitsProcessorList([chooser]),
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=list(ends) or never_drawn,
            pad_token_id=chat.pad_id,
            use_cache=True,
        ),
    )
    return output[:, longest:]


PROOF_STEPS = 4
"""Tokens of the proof: of the prompt, and of steps that go on from a cache."""
LEAST_PADDING = 16
LIKE_ROUNDING = 4
"""Times what a model differs from itself, with a cache and without, that padding may change."""
LEAST_ROUNDING = 1e-5
"""The share of the spread of a token's logits that may change at any rate; in 16 bits, their
epsilon."""


@torch.inference_mode()
def hides_padding(model: Any, chat: ChatFormat, short: Sequence[int], long: Sequence[int]) -> bool:
    """Whether a prompt padded on the left is continued as it is alone, step after step.

    Not every model hides padding from its recurrent state, and some only while they read the
    prompt. A difference that its own rounding explains does not count.

    Args:
        short: The prompt that is padded, to the length of the other one and some tokens at least.
    """
    width = max(len(long), len(short) + LEAST_PADDING)
    beside = (list(long) * -(-width // len(long)))[:width]
    tokens = beside[:PROOF_STEPS]
    alone, padded = (
        _Dictated(tokens).read(model, chat, prompts) for prompts in ([short], [short, beside])
    )
    whole = torch.tensor([[*short, *tokens[:-1]]], device=model.device)
    own = model(input_ids=whole, use_cache=False).logits[0, len(short) - 1 :]
    least = max(LEAST_ROUNDING, torch.finfo(model.dtype).eps)
    return _apart(alone, padded) < max(least, LIKE_ROUNDING * _apart(own, alone))


def _apart(logits: Tensor, other: Tensor) -> float:
    """Root mean square of what two times (steps, V) differ in, of the step that differs most.

    In units of the spread of its logits. A constant added to all of a step's does not count. More
    sensitive than a divergence, which is quadratic in it.
    """
    spread, difference = logits.float().std(dim=-1), (logits.float() - other.float()).std(dim=-1)
    return float((difference / spread).max())


class _Dictated(LogitsProcessor):
    """Makes `generate` write given tokens, and keeps what the first row has them from."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens, self._logits = tokens, list[Tensor]()

    def read(self, model: Any, chat: ChatFormat, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(tokens, V) the first prompt's logits."""
        _generated(model, chat, prompts, self, tokens=len(self._tokens))
        return torch.stack(self._logits)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._tokens[len(self._logits)]
        self._logits.append(scores[0].clone())
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0.0
        return only
