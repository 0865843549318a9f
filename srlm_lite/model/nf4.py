"""Linear layers in NF4: what they are asked to be, and one weight at a time on its way there."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

hf: Any = transformers  # only partly typed

_SETTINGS = ("blocksize", "compress_statistics", "quant_type", "quant_storage")


def nf4_settings(dtype: torch.dtype) -> Any:
    """The `BitsAndBytesConfig` of an NF4 base: 4 bits and double quantization."""
    return hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def expect_nf4(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace the linear layers by their 4-bit kind, as `from_pretrained` does before it loads."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(nf4_settings(dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def put_weight(model: nn.Module, path: str, value: Tensor, device: torch.device) -> None:
    """Give an empty model one of its weights, quantized where its place expects that."""
    owner, _, attribute = path.rpartition(".")
    module: Any = model.get_submodule(owner)
    parameter = getattr(module, attribute)
    if hasattr(parameter, "quant_type"):
        settings = {key: getattr(parameter, key) for key in _SETTINGS}
        kind: Any = type(parameter)  # bitsandbytes quantizes on the way to the device
        quantized = kind(value, requires_grad=False, module=module, **settings)
        setattr(module, attribute, quantized.to(device))
    else:
        setattr(module, attribute, nn.Parameter(value.to(device), requires_grad=False))
