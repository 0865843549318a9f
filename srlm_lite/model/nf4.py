"""Linear layers in NF4: what they are asked to be, and one weight at a time on its way there."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from srlm_lite.model.targets import not_in_4_bits

hf: Any = transformers  # only partly typed

_SETTINGS = ("blocksize", "compress_statistics", "quant_type", "quant_storage")


def nf4_settings(dtype: torch.dtype, model: PreTrainedModel) -> Any:
    """The `BitsAndBytesConfig` of a model in NF4: 4 bits and double quantization."""
    return hf.BitsAndBytesConfig(
        llm_int8_skip_modules=_skipped(model),  # of 4 bits too, whatever it is called
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def expect_nf4(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace the linear layers by their 4-bit kind, as `from_pretrained` does before it loads."""
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = nf4_settings(dtype, model)
    quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def nf4_modules(model: PreTrainedModel) -> frozenset[str]:
    """Names of the weights that loading in NF4 quantizes."""
    kept: Any = model._keep_in_fp32_modules
    skipped = HfQuantizer.get_modules_to_not_convert(model, _skipped(model), kept)
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        # No kinds of linear layers either, such as that of an attention pool.
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, skipped)
    )


def _skipped(model: PreTrainedModel) -> list[str] | None:
    """Layers to leave as they are; None: those that transformers leaves by itself."""
    more = not_in_4_bits(model)
    return [*get_keys_to_not_convert(model), *more] if more else None


def put_weight(model: nn.Module, path: str, value: Tensor, device: torch.device) -> None:
    """Give an empty model one of its weights, quantized where its place expects that."""
    owner, _, attribute = path.rpartition(".")
    module: Any = model.get_submodule(owner)
    parameter = getattr(module, attribute)
    if hasattr(parameter, "quant_type"):
        if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):
            value = value.T  # bitsandbytes knows (out, in) alone
        settings = {key: getattr(parameter, key) for key in _SETTINGS}
        kind: Any = type(parameter)  # bitsandbytes quantizes on the way to the device
        quantized = kind(value, requires_grad=False, module=module, **settings)
        setattr(module, attribute, quantized.to(device))
    else:
        setattr(module, attribute, nn.Parameter(value.to(device), requires_grad=False))
