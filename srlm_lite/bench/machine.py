"""A machine while it is measured: waiting for it, and its memory in use."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

hf: Any = transformers  # only partly typed

Job = TypeVar("Job")
Result = TypeVar("Result")

INTERVAL = 0.05
"""Seconds between two looks at the memory in use."""


@dataclass(slots=True)
class Peak:
    """The most memory in use, in bytes; None where it cannot be found out."""

    bytes: int | None = None


def synchronise(device: torch.device) -> None:
    """Wait for what has been given to a GPU; a clock read before that shows too little."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The peak within this context: allocated on a GPU, else resident on the machine.

    Resident is what this process and all that it has started hold together, looked at twenty times
    a second. It includes what was there before, such as the base.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    over = threading.Event()

    def watch() -> None:
        while True:
            now = resident()
            if now is not None:
                peak.bytes = max(peak.bytes or 0, now)
            if over.wait(INTERVAL):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def resident() -> int | None:
    """Bytes of memory held by this process and its descendants; None without /proc."""
    parents, pages = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            statm = (folder / "statm").read_text()
        except OSError:  # it has just ended
            continue
        pid = int(folder.name)
        parents[pid] = int(stat.rpartition(")")[2].split()[1])  # a name may hold spaces
        pages[pid] = int(statm.split()[1])
    own = os.getpid()
    if own not in pages:
        return None
    family, newest = {own}, {own}
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest} - family
        family |= newest
    return sum(pages[pid] for pid in family) * os.sysconf("SC_PAGE_SIZE")


def apart(way: Callable[[Job], Result], job: Job) -> Result:
    """Run a way in a fresh process, so that its peak of memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet) as pool:
        return pool.submit(way, job).result()


def end_with_the_bench() -> None:
    """End this process when the one that started it has been killed.

    It would go on for nobody, with a device's memory, and then wait for its next job for ever.
    """

    def end() -> None:
        bench = multiprocessing.parent_process()
        if bench is not None:
            bench.join()
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _quiet() -> None:
    """Leave the terminal to the one bar of the benchmark."""
    end_with_the_bench()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def resident_peak() -> int | None:
    """The most memory this process has held, in bytes, mapped files included."""
    return status_bytes("VmHWM")


def status_bytes(key: str) -> int | None:
    """A line of this process's `/proc` status, in bytes; None where there is none."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next((row for row in status.read_text().splitlines() if row.startswith(key)), None)
    return None if line is None else int(line.split()[1]) * 1024
