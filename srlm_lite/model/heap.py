"""Memory that the C library keeps for later, and memory that has run out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch


def give_back() -> None:
    """Let the system have it again; nothing happens where the C library is not glibc.

    glibc gives back what lies at the end of its heap, and keeps free blocks that lie between used
    ones: many large tensors that were freed, with a small one left after each, cost what they cost
    when all of them were there. This looks at every free block, which takes a millisecond or so.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory, or the machine's, did not suffice."""
    # On a CPU torch reports it as a bare RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(
        error
    )


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no such function; no such library (Windows)
        return None
    return trim
