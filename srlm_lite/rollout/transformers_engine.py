"""The default engine: `generate` on the one base in memory, in this process."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from srlm_lite.model.chat import ChatFormat
from srlm_lite.rollout.attention import grouped_decoding
from srlm_lite.rollout.cache import is_roomy, roomy_cache
from srlm_lite.rollout.nucleus import SeededNucleus, uniforms
from srlm_lite.rollout.protocol import Limits, Request, Sample

logger = logging.getLogger(__name__)


class TransformersEngine:
    """Samples in batches from whatever the slot holds.

    A prompt is computed once, whatever the number of its samples, and a prefix that all prompts of
    a batch share, such as the rubric, once for all of them. Requests of similar length share a
    batch. When memory runs out the batch is halved and the work goes on.

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
        cache = roomy_cache(self._model.config, room=limits.max_new_tokens + 1)
        prompts = [request.prompt_ids for request in requests]
        shared = _shared_prefix(prompts) if is_roomy(cache) else 0
        ids, attention = self._padded(prompts, shared)
        self._prefill(cache, ids, attention, shared)
        index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        if len(index) > len(counts):
            cache.batch_select_indices(index.to(ids.device))
        ids, attention = ids[index], attention[index]
        seeds = tuple(seed for request in requests for seed in request.seeds)
        samples = self._decode(ids, attention, cache, seeds, limits)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return [samples[start : start + n] for start, n in zip(starts, counts, strict=True)]

    def _decode(
        self,
        ids: Tensor,
        attention: Tensor,
        cache: DynamicCache,
        seeds: tuple[int, ...],
        limits: Limits,
    ) -> list[Sample]:
        """Continue every row to its end; rows that have ended leave the batch in between."""
        numbers = uniforms(seeds, limits.max_new_tokens)
        tokens: list[list[int]] = [[] for _ in seeds]
        alive = torch.arange(len(seeds))
        done = 0
        while len(alive) and done < limits.max_new_tokens:
            processors = LogitsProcessorList()
            if limits.temperature > 0:
                processors.append(
                    SeededNucleus(
                        numbers[alive, done:], temperature=limits.temperature, top_p=limits.top_p
                    )
                )
            ended = EnoughEnded(self._chat.stop_ids, rows=len(alive), device=ids.device)
            output = self._model.generate(
                input_ids=ids,
                attention_mask=attention,
                past_key_values=cache,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([ended]),
                generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                    do_sample=False,
                    max_new_tokens=limits.max_new_tokens - done,
                    eos_token_id=list(self._chat.stop_ids),
                    pad_token_id=self._chat.pad_id,
                    use_cache=True,
                ),
            )
            new = output[:, ids.shape[1] :]
            for row, row_tokens in zip(alive.tolist(), new.tolist(), strict=True):
                tokens[row].extend(row_tokens)
            done += new.shape[1]
            going = (~ended.rows).nonzero().squeeze(1)
            ids = output[going]
            attention = torch.cat([attention, torch.ones_like(new)], dim=1)[going]
            cache.batch_select_indices(going)
            alive = alive[going.cpu()]
        return [self._sample(row) for row in tokens]

    def _padded(self, rows: Sequence[Sequence[int]], shared: int) -> tuple[Tensor, Tensor]:
        """(B, T) ids and attention mask: the shared prefix, padding, the rest of each prompt.

        Where the padding lies makes no difference: it is masked, and positions skip it.
        """
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self._chat.pad_id)
        attention = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, :shared] = torch.tensor(row[:shared])
            ids[i, longest - len(row) + shared :] = torch.tensor(row[shared:])
            attention[i, :shared] = 1
            attention[i, longest - len(row) + shared :] = 1
        return ids.to(self._model.device), attention.to(self._model.device)

    def _prefill(self, cache: DynamicCache, ids: Tensor, attention: Tensor, shared: int) -> None:
        """Fill the cache for every prompt but its last token, which `generate` starts from."""
        # The decoder alone: the logits of these positions are of no use.
        decoder = self._model.get_base_model().get_decoder()
        if shared:
            decoder(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(ids))
        if ids.shape[1] - 1 > shared:
            positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
            decoder(
                input_ids=ids[:, shared:-1],
                attention_mask=attention[:, :-1],
                position_ids=positions[:, shared:-1],
                past_key_values=cache,
                use_cache=True,
            )

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


class EnoughEnded(StoppingCriteria):
    """Interrupts `generate` when half of the rows have ended, so that the rest can go on alone.

    `rows` (B,) says which have.
    """

    def __init__(self, stop_ids: Sequence[int], *, rows: int, device: torch.device) -> None:
        self._stop_ids = torch.tensor(stop_ids, device=device)
        self.rows = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.rows |= torch.isin(input_ids[:, -1], self._stop_ids)
        # A few rows are not worth the interruption.
        enough = len(self.rows) >= 8 and 2 * int(self.rows.sum()) >= len(self.rows)
        return torch.full_like(self.rows, enough)


def _shared_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Length of the longest prefix of all rows; 0 for a single row, and never a whole row."""
    if len(rows) < 2:
        return 0
    first, last = min(rows), max(rows)  # of a sorted list, these two differ earliest
    length = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return min(length, min(len(row) for row in rows) - 1)


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch reports it as a bare RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(
        error
    )
