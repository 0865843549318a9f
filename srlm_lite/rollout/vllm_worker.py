"""The process that holds vLLM; `vllm_engine` starts it, speaks to it, and ends it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from srlm_lite.model.chat import ChatFormat
from srlm_lite.records import FinishReason
from srlm_lite.rollout.ends import Ends
from srlm_lite.rollout.protocol import Limits, Request, Sample, Token

logger = logging.getLogger(__name__)

BITSANDBYTES = "bitsandbytes"

CPU_STEP_TOKENS = 4096
"""Tokens that vLLM computes in one step on a CPU, or one whole prompt where that is longer."""

CPU_ROWS = 256
"""vLLM's own limit on the batch there."""

CPU_BLOCK_TOKENS = 128
"""Tokens in one block of its cache there; a row takes whole blocks."""


@dataclass(frozen=True, slots=True)
class Start:
    """The first message to the worker; `Ready` or `Failed` answers it."""

    options: Mapping[str, Any]
    """Fields of vLLM's `EngineArgs`."""
    chat: ChatFormat
    cpu_memory: float
    """Share of the free memory that the key-value cache may take, where vLLM runs on a CPU."""
    token_bytes: int
    """Bytes of a token's keys and values; a CPU's cache takes no more than a full batch needs."""


@dataclass(frozen=True, slots=True)
class LoraFiles:
    """A LoRA directory. Neither number nor path ever comes again with other weights: vLLM keeps
    adapters by number, and its prefix cache by name and path."""

    number: int
    path: str


@dataclass(frozen=True, slots=True)
class SamplingWork:
    """Requests to sample; `Finished` for each sample, then `Done` or `Failed`, answer it."""

    requests: Sequence[Request]
    limits: Limits
    lora: LoraFiles | None


@dataclass(frozen=True, slots=True)
class Ready:
    """vLLM is loaded."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One sample, in the order in which they end."""

    request: int
    place: int
    sample: Sample


@dataclass(frozen=True, slots=True)
class Done:
    """All samples of a `SamplingWork` have been sent."""

    cached_tokens: int
    """Prompt tokens, summed over the samples, that the prefix cache had."""


@dataclass(frozen=True, slots=True)
class Failed:
    """What went wrong, in one line; the worker ends."""

    error: str


@dataclass(slots=True)
class _Row:
    """One sample in the making."""

    request: int
    place: int
    token_ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def main() -> None:
    """Serve the parent at the other end of the pipe whose descriptor is the first argument."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    parent: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        sampler = Sampler(parent.recv())
        parent.send(Ready())
        while True:
            for message in sampler.run(parent.recv()):
                parent.send(message)
    except EOFError:
        return
    except Exception as error:
        logger.exception("the worker fails")
        parent.send(Failed(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """End this process, and what it has started, when the parent is no more.

    The parent holds the other end of standard input and never writes to it.
    """
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


class Sampler:
    """vLLM's step loop, so that a stop rule can end a sample at any line."""

    def __init__(self, start: Start) -> None:
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        options = dict(start.options)
        if current_platform.is_cpu():
            rows = options["max_num_seqs"] or CPU_ROWS
            enough = start.token_bytes * rows * (options["max_model_len"] + CPU_BLOCK_TOKENS)
            options |= {
                "kv_cache_memory_bytes": min(int(start.cpu_memory * _free_memory()), enough),
                # With prompts in pieces vLLM 0.32 turns back the generators of seeded requests,
                # which those of a CPU cannot do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(CPU_STEP_TOKENS, options["max_model_len"]),
            }
        _check_quantization(options.get("quantization"))
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(**options), usage_context=UsageContext.LLM_CLASS
        )
        self._chat = start.chat
        self._ends = Ends(start.chat)
        self._added = 0

    def run(self, work: SamplingWork) -> Iterator[Finished | Done]:
        """Samples as they end, and then the end."""
        going = self._add(work)
        cached = 0
        while going:
            for output in self._engine.step():
                row = going.get(output.request_id)
                if row is None:
                    continue
                self._extend(row, output.outputs[0], work.limits)
                if output.finished and row.finish_reason is None:
                    row.finish_reason = "length"
                if row.finish_reason is None:
                    continue
                if not output.finished:
                    self._engine.abort_request([output.request_id])
                del going[output.request_id]
                cached += output.num_cached_tokens or 0
                yield Finished(row.request, row.place, self._sample(row, row.finish_reason))
        yield Done(cached)

    def _add(self, work: SamplingWork) -> dict[str, _Row]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        limits, lora = work.limits, work.lora
        kind = RequestOutputKind.DELTA if limits.stop else RequestOutputKind.FINAL_ONLY
        adapter = lora and LoRARequest(f"stack-{lora.number}", lora.number, lora.path)
        rows: dict[str, _Row] = {}
        for number, request in enumerate(work.requests):
            for place, seed in enumerate(request.seeds):
                self._added += 1
                name = str(self._added)
                rows[name] = _Row(number, place)
                parameters = SamplingParams(
                    temperature=limits.temperature,
                    top_p=limits.top_p if limits.temperature else 1.0,
                    seed=seed,
                    max_tokens=limits.max_new_tokens,
                    # The ends are ours alone: vLLM would add those of the checkpoint.
                    ignore_eos=True,
                    stop_token_ids=[] if limits.ignore_end else list(self._chat.stop_ids),
                    logprobs=limits.alternatives or None,
                    detokenize=False,
                    output_kind=kind,
                )
                prompt = {"prompt_token_ids": list(request.prompt_ids)}
                self._engine.add_request(name, prompt, parameters, lora_request=adapter)
        return rows

    def _extend(self, row: _Row, new: Any, limits: Limits) -> None:
        for at, token_id in enumerate(new.token_ids):
            row.finish_reason = self._ends.append(row.token_ids, token_id, limits)
            if limits.alternatives and len(row.tokens) < len(row.token_ids):
                row.tokens.append(self._token(token_id, new.logprobs[at], limits.alternatives))
            if row.finish_reason is not None:
                return

    def _token(self, token_id: int, logprobs: Mapping[int, Any], count: int) -> Token:
        # The token drawn is among them even where it is not one of the most probable.
        ranked = sorted(logprobs.items(), key=lambda item: item[1].rank)[:count]
        return Token(
            self._chat.spell([token_id]),
            tuple((self._chat.spell([other]), float(entry.logprob)) for other, entry in ranked),
        )

    def _sample(self, row: _Row, finish_reason: FinishReason) -> Sample:
        return Sample(
            text=self._chat.decode(row.token_ids),
            token_ids=tuple(row.token_ids),
            finish_reason=finish_reason,
            n_tokens=len(row.token_ids),
            tokens=tuple(row.tokens),
        )


def _check_quantization(method: str | None) -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if method is not None and method not in QUANTIZATION_METHODS:
        raise ValueError(f"this vLLM has no quantization {method}")


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
