"""Sampling with transformers' continuous batching: `generate_batch`, a paged cache, a scheduler.

It runs on the fused slot as it is, NF4 or not. It is measured and not an engine of a run: all its
rows are drawn from one generator, so what a sample is depends on those beside it, and a run that
is resumed would not end with the same bytes; and no rule can end a sample at a line.

Its prefix cache knows tokens alone, no adapter: keys that one stack has left there would be taken
for those of another. So each call makes a manager of its own, which takes its cache with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from srlm_lite.errors import SrlmError

CPU_BLOCKS = 1024
"""Blocks of the cache on a CPU, where transformers cannot tell how many there is room for."""
CPU_BLOCK_TOKENS = 32
CPU_STEP_TOKENS = 2048


class ContinuousBatching:
    """`generate_batch` on whatever the slot holds.

    Args:
        model: The base, with the slot around its layers or without.
        temperature: 0 is greedy.
        stop_ids: Tokens that end a sample; none: every sample has its full length.
    """

    def __init__(
        self,
        model: Any,
        *,
        pad_id: int,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self._model, self._pad_id, self._stop_ids = model, pad_id, list(stop_ids)
        self._drawing: dict[str, Any] = {"do_sample": False}
        if temperature:
            self._drawing = {
                "do_sample": True,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": 0,
            }

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        new_tokens: int,
        on_samples: Callable[[int], None],
    ) -> list[list[list[int]]]:
        """Draw n samples of each prompt: their new tokens, the one that ended it included.

        Raises:
            SrlmError: transformers gave up on one, which it says in its log alone.
        """
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=new_tokens,
            eos_token_id=self._stop_ids or -1,
            pad_token_id=self._pad_id,
            **self._drawing,
        )
        # In a row, so that a prompt's samples share its blocks.
        inputs = [list(prompt) for prompt in prompts for _ in range(n)]
        with _quiet():
            found = self._model.generate_batch(
                inputs,
                generation_config=settings,
                continuous_batching_config=self._cache(),
                persistent_manager=False,
            )
        samples = [list(output.generated_tokens) for output in found.values()]
        errors = [output.error for output in found.values() if output.error is not None]
        if len(samples) != len(inputs) or errors:
            raise SrlmError(f"continuous batching failed: {errors[0] if errors else 'it stopped'}")
        if not self._stop_ids and any(len(sample) != new_tokens for sample in samples):
            raise SrlmError("continuous batching ended a sample before it had its full length")
        on_samples(len(samples))
        return [samples[start : start + n] for start in range(0, len(samples), n)]

    def _cache(self) -> ContinuousBatchingConfig:
        if self._model.device.type == "cuda":
            return ContinuousBatchingConfig()
        return ContinuousBatchingConfig(
            block_size=CPU_BLOCK_TOKENS, num_blocks=CPU_BLOCKS, max_batch_tokens=CPU_STEP_TOKENS
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from advice on attention kernels; errors still show."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
