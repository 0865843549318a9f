"""Loading a base in NF4: the peak of memory, ours beside transformers' own way.

    ours           each 16-bit tensor is read into memory of its own, quantized, and let go
    transformers   `from_pretrained` on the folder, which maps all of its files

Each way has its own process. What a process holds is its own memory, and pages of files that it
has mapped; those the kernel may take back when it runs short, its own memory never.

A GGUF file is expanded to 16 bits before its first use: that conversion is measured too.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from srlm_lite.bench.export import LARGE, RANDOM, random_base
from srlm_lite.bench.machine import apart, resident_peak, status_bytes
from srlm_lite.errors import UserError
from srlm_lite.model import base as bases
from srlm_lite.model.checkpoint import Checkpoint
from srlm_lite.model.nf4 import nf4_settings
from srlm_lite.progress import Reporter
from srlm_lite.settings import Base

hf: Any = transformers  # only partly typed

DTYPE = torch.bfloat16
INTERVAL = 0.005
"""Seconds between two looks at the process's own memory."""


def bench_load(base: str, *, reporter: Reporter, shape: dict[str, Any] = LARGE) -> dict[str, Any]:
    """Measure every way on one base.

    Args:
        base: As in a recipe, or `random`.
        shape: Settings of the random base.
    """
    if not Path("/proc/self/status").is_file():
        raise UserError("memory is read from /proc, which this machine lacks", where="bench load")
    with tempfile.TemporaryDirectory(prefix="srlm-lite-bench-") as temporary:
        gguf = None
        if base == RANDOM:
            folder = random_base(Path(temporary) / "base", shape)
        else:
            files = bases.base_files(Base(name=base))
            folder = files.folder
            gguf = Path(files.source["location"]) if files.kind == "gguf" else None
        ways: dict[str, tuple[Callable[[Path], dict[str, Any]], Path]] = {
            "ours": (_ours, folder),
            "transformers": (_transformers, folder),
        }
        if gguf is not None:
            ways["GGUF to 16 bits"] = (_conversion, gguf)
        task = reporter.start("load", len(ways), "ways")
        measured = {}
        for name, (way, job) in ways.items():
            task.note(name)
            measured[name] = apart(way, job)
            task.advance()
        shards = Checkpoint(folder).shards
        infos = [info for each in shards.values() for info in each]
        return {
            "base": base,
            "bytes": sum(info.nbytes for info in infos),
            "largest_shard_bytes": max(sum(i.nbytes for i in each) for each in shards.values()),
            "largest_tensor_bytes": max(info.nbytes for info in infos),
            "ways": measured,
        }


def tensor_bytes(parameter: Any) -> int:
    """Bytes of a weight: for one in NF4, with the scales of its blocks and theirs."""
    size = int(parameter.numel() * parameter.element_size())
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return size
    scales = [state.absmax] + ([state.state2.absmax] if state.nested else [])
    return size + sum(int(scale.numel() * scale.element_size()) for scale in scales)


def _ours(folder: Path) -> dict[str, Any]:
    settings = hf.AutoConfig.from_pretrained(folder)
    with _watched() as row:
        model: Any = bases.load_files(folder, settings, torch.device("cpu"), DTYPE, nf4=True)[0]
    return {**row, "model_bytes": sum(tensor_bytes(p) for p in model.parameters())}


def _transformers(folder: Path) -> dict[str, Any]:
    settings = nf4_settings(DTYPE, bases.empty_model(folder))
    with _watched() as row:
        model = hf.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPE, device_map={"": "cpu"}, quantization_config=settings
        )
    return {**row, "model_bytes": sum(tensor_bytes(p) for p in model.parameters())}


def _conversion(file: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="srlm-lite-bench-") as temporary:
        os.environ["SRLM_LITE_CACHE"] = temporary  # this process is the measurement's own
        with _watched() as row:
            bases.base_files(Base(name=str(file)))
    return row


@contextmanager
def _watched() -> Iterator[dict[str, Any]]:
    """Seconds and bytes of what happens within; peaks are of the whole process."""
    import bitsandbytes  # noqa: F401  # before the clock, as in a run

    row: dict[str, Any] = {"before_bytes": status_bytes("VmRSS")}
    over, peak = threading.Event(), [0]

    def watch() -> None:
        while not over.wait(INTERVAL):
            peak[0] = max(peak[0], status_bytes("RssAnon") or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin = time.monotonic()
    try:
        yield row
    finally:
        row["seconds"] = time.monotonic() - begin
        over.set()
        watcher.join()
    gc.collect()
    row |= {
        "peak_bytes": resident_peak(),
        "own_peak_bytes": peak[0],
        "after_bytes": status_bytes("VmRSS"),
    }
