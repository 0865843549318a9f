"""Sampling as one writes it first: transformers' `generate`, nothing shared, nothing reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from srlm_lite.bench.workload import Workload
from srlm_lite.errors import SrlmError


class PlainGenerate:
    """`generate` on the bare base, one sequence a call or in batches.

    Batched, prompts are padded on the left and `num_return_sequences` makes the samples of each.
    Temperature and top-p are the workload's and there is no top-k, so that the distribution is the
    same as in every other way.

    Args:
        model: The bare base.
        batch_prompts: Prompts in one call, each with all its samples; 0 for one sequence a call.
    """

    def __init__(self, model: Any, *, pad_id: int, batch_prompts: int, workload: Workload) -> None:
        self._model, self._pad_id, self._batch_prompts = model, pad_id, batch_prompts
        self._workload = workload

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        new_tokens: int,
        on_samples: Callable[[int], None],
    ) -> None:
        """Draw n samples of each prompt.

        Raises:
            SrlmError: `generate` gave another number of tokens than it was asked for.
        """
        size = self._batch_prompts or 1
        calls, together = (1, n) if self._batch_prompts else (n, 1)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            for _ in range(calls):
                self._call(batch, n=together, new_tokens=new_tokens)
                on_samples(len(batch) * together)

    @torch.inference_mode()
    def _call(self, prompts: Sequence[Sequence[int]], *, n: int, new_tokens: int) -> None:
        longest = max(map(len, prompts))
        rows = [[self._pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self._model.device
        never_drawn = self._model.get_input_embeddings().num_embeddings
        output = self._model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=True,
                temperature=self._workload.temperature,
                top_p=self._workload.top_p,
                top_k=0,
                num_return_sequences=n,
                max_new_tokens=new_tokens,
                eos_token_id=never_drawn,
                pad_token_id=self._pad_id,
                use_cache=True,
            ),
        )
        if output.shape != (len(prompts) * n, longest + new_tokens):
            raise SrlmError(f"generate gave {tuple(output.shape)}, not {new_tokens} new tokens")
