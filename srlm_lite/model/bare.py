"""A model without weights: what a configuration describes, on the meta device."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

hf: Any = transformers  # only partly typed


def bare_model(settings: Any, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a configuration, its shared weights not yet tied.

    Nothing is drawn for weights that hold nothing: of a base of 70B that took two seconds. Buffers
    are real, as their modules make them.
    """
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = hf.AutoModelForCausalLM.from_config(
            settings, dtype=dtype, trust_remote_code=False
        )
    return model
