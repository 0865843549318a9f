"""The default engine: `generate` on the one base in memory, in this process."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from srlm_lite.model.chat import ChatFormat
from srlm_lite.rollout.attention import grouped_decoding
from srlm_lite.rollout.cache import roomy_cache
from srlm_lite.rollout.nucleus import SeededNucleus, uniforms
from srlm_lite.rollout.protocol import Limits, Request, Sample

logger = logging.getLogger(__name__)


class TransformersEngine:
    """Samples in batches from whatever the slot holds.

    A prompt is computed once, whatever the number of its samples. Requests of similar length
    share a batch. When memory runs out the batch is halved and the work goes on.

    Args:
        model: The base with its slot.
        batch_rows: Samples in one batch.
    """

    def __init__(self, model: Any, chat: ChatFormat, *, batch_rows: int) -> None:
        self._model, self._chat, self._batch_rows = model, chat, batch_rows

    def sample(
        self,
        requests: Sequence[Request],
        limits: Limits,
        *,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> list[list[Sample]]:
        """See `Engine.sample`."""
        results: list[list[Sample]] = [[] for _ in requests]
        # Longest first: if memory does not suffice, that shows at once.
        waiting = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        while waiting:
            batch = self._next_batch(waiting, requests)
            try:
                with grouped_decoding(self._model.get_base_model()):
                    samples = self._generate([requests[i] for i in batch], limits)
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not _is_out_of_memory(error):
                    raise
                self._batch_rows = max(1, self._batch_rows // 2)
                logger.warning("out of memory; sampling %d rows at a time now", self._batch_rows)
                self._free()
                continue
            for index, row in zip(batch, samples, strict=True):
                results[index] = row
                on_samples(len(row))
            waiting = waiting[len(batch) :]
        return results

    def _next_batch(self, waiting: Sequence[int], requests: Sequence[Request]) -> list[int]:
        batch: list[int] = []
        rows = 0
        for index in waiting:
            rows += len(requests[index].seeds)
            if batch and rows > self._batch_rows:
                break
            batch.append(index)
        return batch

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request], limits: Limits) -> list[list[Sample]]:
        counts = [len(request.seeds) for request in requests]
        prompt_ids, attention = self._left_padded([request.prompt_ids for request in requests])
        cache = self._prefill(prompt_ids, attention, counts, room=limits.max_new_tokens + 1)
        repeats = torch.tensor(counts, device=prompt_ids.device)
        prompt_ids = prompt_ids.repeat_interleave(repeats, dim=0)
        attention = attention.repeat_interleave(repeats, dim=0)
        processors = LogitsProcessorList()
        if limits.temperature > 0:
            seeds = tuple(seed for request in requests for seed in request.seeds)
            numbers = uniforms(seeds, limits.max_new_tokens)
            processors.append(
                SeededNucleus(numbers, temperature=limits.temperature, top_p=limits.top_p)
            )
        output = self._model.generate(
            input_ids=prompt_ids,
            attention_mask=attention,
            past_key_values=cache,
            logits_processor=processors,
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False,
                max_new_tokens=limits.max_new_tokens,
                eos_token_id=list(self._chat.stop_ids),
                pad_token_id=self._chat.pad_id,
                use_cache=True,
            ),
        )
        new_tokens = output[:, prompt_ids.shape[1] :].tolist()
        samples = [self._sample(row) for row in new_tokens]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return [samples[start : start + n] for start, n in zip(starts, counts, strict=True)]

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(row) for row in rows)
        device = self._model.device
        ids = torch.full((len(rows), longest), self._chat.pad_id, device=device)
        attention = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row, device=device)
            attention[i, longest - len(row) :] = 1
        return ids, attention

    def _prefill(
        self, ids: Tensor, attention: Tensor, counts: Sequence[int], *, room: int
    ) -> DynamicCache:
        # All but the last token: `generate` computes that one for every sample.
        cache = roomy_cache(self._model.config, room)
        if ids.shape[1] > 1:
            positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
            # The decoder alone: these positions' logits are of no use.
            self._model.get_base_model().get_decoder()(
                input_ids=ids[:, :-1],
                attention_mask=attention[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                use_cache=True,
            )
        if len(set(counts)) == 1:
            if counts[0] > 1:
                cache.batch_repeat_interleave(counts[0])
        else:
            index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            cache.batch_select_indices(index)
        return cache

    def _sample(self, token_ids: list[int]) -> Sample:
        stops = self._chat.stop_ids
        end = next((i for i, token in enumerate(token_ids) if token in stops), None)
        kept = tuple(token_ids if end is None else token_ids[:end])
        return Sample(
            text=self._chat.decode(kept),
            token_ids=kept,
            finish_reason="length" if end is None else "stop",
        )

    def _free(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch reports it as a bare RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(
        error
    )
