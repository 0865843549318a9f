"""Sampling with transformers' own `generate`, for models that no tree can serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

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
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), chat.pad_id)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention[row, longest - len(prompt) :] = 1
    sampler = SeededNucleus(numbers, limits)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=attention.to(model.device),
        logits_processor=LogitsProcessorList([sampler]),
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            max_new_tokens=limits.max_new_tokens,
            eos_token_id=None if limits.ignore_end else list(chat.stop_ids),
            pad_token_id=chat.pad_id,
            use_cache=True,
        ),
    )
    others = zip(*sampler.alternatives, strict=True)
    return [
        list(zip(tokens, alternatives, strict=True))
        for tokens, alternatives in zip(output[:, longest:].tolist(), others, strict=True)
    ]
