"""What `run.json` and the benchmarks say of the machine and its software."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from srlm_lite.hardware import gpus, processor

PACKAGES = (
    "srlm-lite",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
)


def versions() -> dict[str, str]:
    """Versions of what computes the run."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores and GPUs."""
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpus": [{"name": gpu.name, "gigabytes": gpu.gigabytes} for gpu in gpus()],
    }
