"""Where files are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Holds converted GGUF files, and what Unsloth compiles.

    `SRLM_LITE_CACHE`, else `srlm-lite` under `XDG_CACHE_HOME` or `~/.cache`. May be deleted.
    """
    if own := os.environ.get("SRLM_LITE_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "srlm-lite"
