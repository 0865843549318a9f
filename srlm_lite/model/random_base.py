"""A base of random weights and a given shape, built where it is going to lie.

For measurements: what a base of 70 billion weights costs does not depend on what it has learned.
One tensor at a time is drawn in 16 bits and quantized at once, so the peak of memory is the
finished base and one tensor; no weights are read or written.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers

from srlm_lite.model.bare import bare_model
from srlm_lite.model.base import LoadedBase, keep_differentiable
from srlm_lite.model.nf4 import expect_nf4, put_weight
from srlm_lite.shipped import recipes_dir

hf: Any = transformers  # only partly typed

_SPREAD = 0.02
_ROLES = ("bos", "eos", "pad")


def random_base(
    shape: Any,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Literal["none", "nf4"],
    seed: int = 0,
) -> LoadedBase:
    """Build it.

    Its tokenizer is the toy base's, whose ids any vocabulary of this size has: what it decodes to
    means nothing.

    Args:
        shape: A `LlamaConfig`, or another decoder-only configuration.
    """
    model = bare_model(shape, dtype=dtype)
    if quantization == "nf4":
        expect_nf4(model, dtype)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    for path, parameter in list(model.named_parameters()):
        drawn = _drawn(parameter, device, dtype, generator)
        put_weight(model, path, drawn, device)
        del drawn
    model.tie_weights()
    for buffer_owner in model.modules():
        for key, buffer in buffer_owner.named_buffers(recurse=False):
            setattr(buffer_owner, key, buffer.to(device))
    keep_differentiable(model)
    model.requires_grad_(False)
    model.train(False)
    tokenizer: Any = hf.AutoTokenizer.from_pretrained(str(recipes_dir() / "toy" / "base"))
    ends = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    model.generation_config = hf.GenerationConfig(**ends)
    for key, token_id in ends.items():
        setattr(model.config, key, token_id)
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        folder=name,
        source={"name": name, "kind": "random", "seed": seed},
    )


def _drawn(
    parameter: torch.nn.Parameter,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> torch.Tensor:
    shape = parameter.shape
    if len(shape) == 1:  # of a norm
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=_SPREAD, generator=generator)
