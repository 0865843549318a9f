"""What the machine has, and which shipped recipe fits it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says how much a container may have."""


def amount(count: float) -> str:
    """Bytes in words: in GB, or below one of them in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device."""

    name: str
    gigabytes: float


def gpus() -> list[Gpu]:
    """The CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(properties.name, round(properties.total_memory / 1e9, 1)))
    return found


def choose_recipe(devices: list[Gpu], where: str = " here") -> tuple[str, str]:
    """The shipped recipe to begin with on these devices, and why, in words.

    One GPU of 80 GB can hold 70B too, but a run takes days even on two: there it has to be named.
    """
    if not devices:
        return "smollm2-135m-demo", "no GPU here, and this one runs on a CPU"
    smallest = min(device.gigabytes for device in devices)
    total = sum(device.gigabytes for device in devices)
    there = f"{len(devices)} x {smallest:.0f} GB{where}"
    if total >= 150 and smallest >= 75:
        return "llama2-70b", f"{there}, enough for 70B in NF4"
    if smallest >= 22:
        return "llama3.1-8b", f"{there}, enough for 8B in NF4"
    return "smollm2-135m-demo", f"{there}, too little for 8B"


def pick_recipe() -> tuple[str, str]:
    """`choose_recipe` for this machine."""
    return choose_recipe(gpus())


def device_name(device: str) -> str:
    """The first GPU's name; or the processor's, with the number of its cores."""
    return gpus()[0].name if device == "cuda" else f"{processor()}, {os.cpu_count()} cores"


def machine_memory() -> int:
    """Bytes that this machine, or the group it limits us to, has."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole


def processor() -> str:
    """The model's name; Linux alone says it in a file."""
    import platform
    from pathlib import Path

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
