"""What the machine has: processor, memory, disk, GPUs and their driver."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from srlm_lite.doctor.finding import Finding
from srlm_lite.hardware import gpus, machine_memory

LEAST_DISK = 2e9
LITTLE_DISK = 20e9
LITTLE_MEMORY = 4e9
_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def machine_findings(folder: Path) -> list[Finding]:
    """Processor, memory, disk and GPUs; `folder` is where runs are going to lie."""
    return [processor_finding(), memory_finding(), disk_finding(folder), *gpu_findings()]


def processor_finding() -> Finding:
    """Cores, and whether bfloat16 is fast on them."""
    from srlm_lite.model.device import compute_dtype
    from srlm_lite.settings import Base

    dtype = str(compute_dtype(Base(name="-", device="cpu"))).removeprefix("torch.")
    cores = os.cpu_count() or 1
    facts: dict[str, object] = {"cores": cores, "dtype": dtype}
    return Finding("ok", "processor", f"{cores} cores; computes in {dtype}", facts=facts)


def memory_finding() -> Finding:
    """Memory of the whole machine, or what a container may have of it; and what is free."""
    total, free = machine_memory(), _available()
    free = None if free is None else min(free, total)
    facts: dict[str, object] = {"total_bytes": total, "free_bytes": free}
    text = f"{total / 1e9:.0f} GB" + ("" if free is None else f", {free / 1e9:.0f} GB free")
    if free is not None and free < LITTLE_MEMORY:
        return Finding("warning", "memory", text, "the smallest real base wants 4 GB", facts)
    return Finding("ok", "memory", text, facts=facts)


def _available() -> int | None:
    """Bytes that could be had without swapping; None without /proc."""
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [row.split()[1] for row in rows if row.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def disk_finding(folder: Path) -> Finding:
    """Where runs lie and where the Hub's files go."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    free = shutil.disk_usage(folder).free
    cache_free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    text = f"{free / 1e9:.0f} GB free here"
    if cache_free != free:
        text += f", {cache_free / 1e9:.0f} GB for the Hub's files in {cache}"
    least = min(free, cache_free)
    facts: dict[str, object] = {"free_bytes": free, "hub_cache_free_bytes": cache_free}
    if least < LEAST_DISK:
        return Finding("bad", "disk", text, "make room, or set HF_HOME to another disk", facts)
    if least < LITTLE_DISK:
        return Finding("warning", "disk", text, "a base of 7B takes 13 GB", facts)
    return Finding("ok", "disk", text, facts=facts)


def gpu_findings() -> list[Finding]:
    """Each GPU, and whether torch and driver go together."""
    import torch

    driver = _driver()
    found = gpus()
    built: Any = torch.version.cuda
    facts: dict[str, object] = {"driver": driver, "torch_cuda": built, "gpus": len(found)}
    if not found:
        if driver is None:
            text = "none: small bases run on the CPU"
            return [Finding("warning", "GPU", text, facts=facts)]
        if built is None:
            text = f"driver {driver} is here, but torch {torch.__version__} is built without CUDA"
            way_out = "pip install --force-reinstall torch, from the index with CUDA builds"
        else:
            text = f"driver {driver} is here, but torch (CUDA {built}) finds no device"
            way_out = "the driver may be too old for this CUDA, or CUDA_VISIBLE_DEVICES hides it"
        return [Finding("bad", "GPU", text, way_out, facts)]
    findings = []
    for index, gpu in enumerate(found):
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{gpu.name}, {total / 1e9:.0f} GB, {free / 1e9:.0f} GB free; "
            f"CUDA {built}, driver {driver or 'unknown'}"
        )
        own = {**facts, "total_bytes": total, "free_bytes": free}
        if torch.cuda.get_device_capability(index) < (8, 0):
            way_out = "older than Ampere: computes in float16 or float32"
            findings.append(Finding("warning", f"GPU {index}", text, way_out, own))
        elif free < 0.8 * total:
            way_out = "somebody else holds memory there"
            findings.append(Finding("warning", f"GPU {index}", text, way_out, own))
        else:
            findings.append(Finding("ok", f"GPU {index}", text, facts=own))
    return findings


def _driver() -> str | None:
    """Version of NVIDIA's driver, or None where there is none."""
    if shutil.which(_QUERY[0]) is None:
        return None
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None
