"""The engine `vllm`: vLLM in a process of its own, which gives all its memory back when closed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, fuse
from srlm_lite.processes import of_one_process
from srlm_lite.rollout.installed import check_vllm
from srlm_lite.rollout.protocol import Limits, Request, Sample
from srlm_lite.rollout.vllm_worker import (
    BITSANDBYTES,
    Done,
    Failed,
    Finished,
    LoraFiles,
    Ready,
    SamplingWork,
    Start,
)
from srlm_lite.settings import Base

logger = logging.getLogger(__name__)

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank`; an adapter may have any rank up to it."""

_COMMAND = "from srlm_lite.rollout.vllm_worker import main; main()"
_WHERE = "engine vllm"


@dataclass(frozen=True, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    lora_rank: int
    folder: tempfile.TemporaryDirectory[str]
    """Holds the LoRA directories."""


class VllmEngine:
    """Samples with vLLM, which runs from the first `sample` until `close`.

    The stack goes in as one LoRA, fused along the rank. What vLLM says goes to the log file.

    Args:
        base: In this process it only says which weights to load; vLLM reads them itself.
        section: The recipe's base.
        memory: Share of the GPU's memory for vLLM; on a CPU, share of the free memory for its
            key-value cache.
        batch_rows: Samples in the batch at most; None leaves it to vLLM.
        rank: Of the largest stack to come; one of a higher rank starts vLLM anew.
        scratch: A directory for adapters.
        log: A file, appended to.

    Raises:
        UserError: NF4 weights on a CPU.
    """

    def __init__(
        self,
        base: LoadedBase,
        chat: ChatFormat,
        section: Base,
        *,
        memory: float,
        batch_rows: int | None,
        rank: int,
        scratch: Path,
        log: Path,
    ) -> None:
        if section.quantization == "nf4" and base.device.type == "cpu":
            raise UserError(
                "vLLM has no 4-bit weights on a CPU",
                where="base.quantization",
                way_out="Set base.quantization=none, or the engine to transformers",
            )
        self._chat, self._memory, self._rank = chat, memory, rank
        self._scratch, self._log = scratch, log
        self._token_bytes = _token_bytes(base)
        self._options: dict[str, Any] = {
            "model": base.folder,
            "revision": base.source.get("revision"),
            "dtype": str(base.dtype).removeprefix("torch."),
            "quantization": BITSANDBYTES if section.quantization == "nf4" else None,
            "max_model_len": _window(base, section.window),
            "max_num_seqs": batch_rows,
            "gpu_memory_utilization": memory,
            "enable_prefix_caching": True,
            "max_logprobs": -1,
            "generation_config": "vllm",
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "disable_log_stats": True,
        }
        self._stack: tuple[Adapter, ...] = ()
        self._number = 0
        self._lora: LoraFiles | None = None
        self._worker: _Worker | None = None

    def load(self, stack: Sequence[Adapter]) -> None:
        """See `Engine.load`. Takes effect with the next `sample`.

        Raises:
            UserError: The stack's rank exceeds what vLLM can run.
        """
        if _same(self._stack, stack):
            return
        rank = sum(adapter.rank for adapter in stack)
        if rank > RANKS[-1]:
            raise UserError(
                f"the stack's rank {rank} exceeds {RANKS[-1]}, the highest that vLLM runs",
                where=_WHERE,
                way_out="Take the engine transformers, or lower lora.rank",
            )
        self._stack, self._lora = tuple(stack), None

    def sample(
        self,
        requests: Sequence[Request],
        limits: Limits,
        *,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> list[list[Sample]]:
        """See `Engine.sample`.

        Raises:
            UserError: vLLM is not installed, does not start, or fails.
        """
        found: dict[tuple[int, int], Sample] = {}
        try:
            worker = self._running()
            self._send(worker, SamplingWork(requests, limits, self._written(worker)))
            while isinstance(message := self._receive(worker), Finished):
                found[message.request, message.place] = message.sample
                on_samples(1)
            if isinstance(message, Done):
                logger.info("vLLM had %d prompt tokens in its cache", message.cached_tokens)
        except BaseException:
            self.close()  # what it would still send belongs to nobody
            raise
        return [
            [found[number, place] for place in range(len(request.seeds))]
            for number, request in enumerate(requests)
        ]

    def close(self) -> None:
        """See `Engine.close`. The process has ended when this returns."""
        worker, self._worker, self._lora = self._worker, None, None
        if worker is not None:
            _end(worker)

    def _running(self) -> _Worker:
        rank = sum(adapter.rank for adapter in self._stack)
        if self._worker is not None and self._worker.lora_rank < rank:
            self.close()
        if self._worker is None:
            # The bare base alone runs faster without room for adapters.
            self._worker = self._start(max(self._rank, rank) if rank else 0)
            self._receive(self._worker)
        return self._worker

    def _start(self, rank: int) -> _Worker:
        check_vllm()
        options = dict(self._options)
        if rank:
            rank = next(allowed for allowed in RANKS if allowed >= rank)
            options |= {"enable_lora": True, "max_lora_rank": rank}
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = Pipe()
        with self._log.open("ab") as log, theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env={**of_one_process(), **_environment()},
                start_new_session=True,  # an interruption from the keyboard is for us alone
            )
        folder = tempfile.TemporaryDirectory(prefix="vllm-", dir=self._scratch)
        worker = _Worker(process, ours, rank, folder)
        self._send(worker, Start(options, self._chat, self._memory, self._token_bytes))
        return worker

    def _written(self, worker: _Worker) -> LoraFiles | None:
        """The stack as a LoRA directory that this process has not used before."""
        if not self._stack:
            return None
        if self._lora is None:
            self._number += 1
            path = Path(worker.folder.name) / f"stack-{self._number}"
            fuse(self._stack).save(path, base_name=str(self._options["model"]))
            self._lora = LoraFiles(self._number, str(path))
        return self._lora

    def _send(self, worker: _Worker, message: Start | SamplingWork) -> None:
        # What cannot be delivered shows when the answer is read.
        with contextlib.suppress(ConnectionError):
            worker.connection.send(message)

    def _receive(self, worker: _Worker) -> Ready | Finished | Done:
        try:
            message: Ready | Finished | Done | Failed = worker.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._failure(_ending(worker.process.wait())) from error
        if isinstance(message, Failed):
            raise self._failure(message.error)
        return message

    def _failure(self, what: str) -> UserError:
        hints = {
            "killed": "Lower vllm.memory",
            "memory": "Lower vllm.memory, rollout.batch_rows or base.window",
            "quantization": "Take the engine transformers, or set base.quantization=none",
        }
        hint = next((hint for word, hint in hints.items() if word in what.lower()), None)
        log = f"Its log: {self._log}"
        return UserError(
            f"vLLM failed: {' '.join(what.split())[:300]}",
            where=_WHERE,
            way_out=f"{hint}. {log}" if hint else log,
        )


def _window(base: LoadedBase, window: int) -> int:
    """The recipe's window, but no more positions than the base was made for: vLLM refuses those."""
    positions = getattr(base.model.config, "max_position_embeddings", None)
    return min(window, positions) if isinstance(positions, int) else window


def _token_bytes(base: LoadedBase) -> int:
    """Bytes of the keys and values of one token in all layers."""
    shape: Any = base.model.config
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return int(2 * shape.num_hidden_layers * heads * width * base.dtype.itemsize)


def _environment() -> dict[str, str]:
    places = [place or os.getcwd() for place in sys.path]
    return {
        "PYTHONPATH": os.pathsep.join(places),
        # In the worker itself: one process to end, and on a CPU no core set aside for another.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _end(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    worker.connection.close()
    if worker.process.stdin is not None:
        worker.process.stdin.close()
    worker.folder.cleanup()


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, most likely for lack of memory"
    return f"its process ended with code {code}"


def _same(held: Sequence[Adapter], stack: Sequence[Adapter]) -> bool:
    return len(held) == len(stack) and all(a is b for a, b in zip(held, stack, strict=True))
