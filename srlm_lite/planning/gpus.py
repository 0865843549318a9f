"""GPUs by name: memory, speed and bandwidth, as their makers' data sheets have them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TERA = 10**12
_GIGA = 10**9
_OF_A_NAME = frozenset(
    ("NVIDIA", "TESLA", "GEFORCE", "RTX", "HBM2", "HBM2E", "HBM3", "HBM3E", "SXM", "SXM4", "SXM5")
)
"""Words that a driver or a shop puts around a GPU's name, and that name no other GPU."""


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A kind of GPU.

    `memory` in bytes; `bandwidth` of it in bytes/s; `flops` of products in bfloat16 that are summed
    in float32, dense, in FLOP/s: 0 where the hardware knows no bfloat16, so that a base computes
    in float32 there.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float


GPUS: tuple[GpuModel, ...] = (
    GpuModel("T4", 16 * _GIGA, 0.0, 0.320 * _TERA),
    GpuModel("L4", 24 * _GIGA, 121 * _TERA, 0.300 * _TERA),
    GpuModel("L40S", 48 * _GIGA, 362 * _TERA, 0.864 * _TERA),
    GpuModel("A100-40GB", 40 * _GIGA, 312 * _TERA, 1.555 * _TERA),
    GpuModel("A100-80GB", 80 * _GIGA, 312 * _TERA, 2.039 * _TERA),
    GpuModel("H100", 80 * _GIGA, 989 * _TERA, 3.35 * _TERA),
    GpuModel("H200", 141 * _GIGA, 989 * _TERA, 4.8 * _TERA),
    GpuModel("B200", 180 * _GIGA, 2250 * _TERA, 8.0 * _TERA),
    GpuModel("A6000", 48 * _GIGA, 155 * _TERA, 0.768 * _TERA),
    GpuModel("RTX3090", 24 * _GIGA, 71 * _TERA, 0.936 * _TERA),
    GpuModel("RTX4090", 24 * _GIGA, 165 * _TERA, 1.008 * _TERA),
    GpuModel("RTX5090", 32 * _GIGA, 209 * _TERA, 1.792 * _TERA),
)
"""Data-center ones are the SXM kind, where there are several. Source: NVIDIA's data sheets of the
T4, L4, L40S, A100, H100, H200, HGX B200 and RTX A6000, and its white papers of the architectures
GA102, AD102 and GB202."""


def known_gpu(name: str) -> GpuModel | None:
    """A GPU by what people or its driver call it: `H100`, `4090`, `NVIDIA A100-SXM4-80GB`.

    None of one that is not in the table, which a kind of another speed is not either, such as
    `NVIDIA H100 PCIe`.
    """
    words = set(re.findall(r"[A-Z0-9]+", name.upper().replace("RTX", "RTX ")))
    for gpu in GPUS:
        size = f"{gpu.memory // _GIGA}GB"
        own = set(gpu.name.replace("RTX", "").split("-"))
        if own <= words and words - own <= _OF_A_NAME | {size}:
            return gpu
    return None


def gpu_names() -> str:
    """All names, for a message."""
    return ", ".join(gpu.name for gpu in GPUS)
