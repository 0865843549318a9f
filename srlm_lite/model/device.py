"""What a base computes on, and in: told with torch alone, before the libraries that load it."""

from __future__ import annotations

import importlib.util

import torch

from srlm_lite.errors import UserError
from srlm_lite.settings import Base


def compute_device(wanted: str) -> torch.device:
    """The device that `base.device` names.

    Raises:
        UserError: As `refuse_absent_device`.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    refuse_absent_device(wanted)
    return torch.device("cuda", torch.cuda.current_device())


def refuse_absent_device(wanted: str) -> None:
    """Make sure that the device is there; what CUDA sets up in a process is left for later.

    Raises:
        UserError: CUDA is wanted, and no device has it.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda is not None
        raise UserError(
            "no CUDA device was found" if built else "this PyTorch is built without CUDA",
            where="base.device",
            way_out="Set base.device=auto or cpu",
        )


def compute_dtype(section: Base) -> torch.dtype:
    """What the section's `dtype` means on this machine."""
    return dtype_on(section.dtype, compute_device(section.device))


def dtype_on(wanted: str, device: torch.device) -> torch.dtype:
    """What `base.dtype` means on a device."""
    if wanted != "auto":
        return {
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
            "float32": torch.float32,
        }[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Without these instructions a CPU emulates bfloat16, slower than float32.
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32


def refuse_quantization(section: Base) -> None:
    """Make sure that what rounds the weights is installed.

    Raises:
        UserError: It is not.
    """
    if section.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "nf4 needs bitsandbytes, which is not installed",
            where="base.quantization",
            way_out="pip install bitsandbytes, or set base.quantization=none",
        )
