"""Whether what is to be trained can be exported: told from names and shapes, without a weight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from srlm_lite.errors import UserError
from srlm_lite.model.base import empty_model
from srlm_lite.model.checkpoint import Checkpoint
from srlm_lite.model.layout import Layout
from srlm_lite.model.targets import targeted

_PREFIX = "base_model.model."


def refuse_unexportable(folder: Path, targets: Iterable[str]) -> None:
    """Make sure that an adapter on every target can be merged into the files of a base.

    Raises:
        UserError: Says which tensor of the files, or which layer, stands in the way.
    """
    checkpoint = Checkpoint(folder)
    try:
        model = empty_model(folder)
    except Exception:  # loading the base will say what is wrong with it
        return
    try:
        layout = Layout(checkpoint, model)
    except UserError as error:
        raise UserError(
            f"what is trained on it could not be exported: {error.what}",
            where=error.where,
            way_out=error.way_out,
        ) from error
    for name in targeted(model, targets):
        if layout.held_as(f"{name}.weight") not in layout:
            raise UserError(
                f"an adapter on {name} could not be exported: its weight is in none of the files",
                where=str(folder),
                way_out="Get the files again",
            )


def placing(model: PreTrainedModel, modules: Sequence[str]) -> dict[str, Any]:
    """What a LoRA's settings say so that PEFT puts it on these modules and on no others.

    Their short names, where these are enough; else their full ones, as where a vision tower has
    layers of the same name. Of mixtures of experts PEFT 0.21 takes names such as `gate_proj` for
    the fused experts, and those of dense layers are told to it as parameters.

    Args:
        model: The base, on the meta device.

    Raises:
        UserError: There is no such way to say it.
    """
    transposed: dict[str, Any] = {"fan_in_fan_out": True} if _are_transposed(model, modules) else {}
    short = {"target_modules": sorted({name.rpartition(".")[2] for name in modules}), **transposed}
    if _placed(model, short) == set(modules):
        return short
    full: dict[str, Any] = {"target_modules": sorted(modules), **transposed}
    there = _placed(model, full)
    if there == set(modules):
        return full
    others = sorted(set(modules) - there)
    split = {
        "target_modules": [name for name in full["target_modules"] if name in there],
        "target_parameters": [f"{name}.weight" for name in others],
    }
    if _placed(model, split) == set(modules):
        return split
    raise UserError(
        f"PEFT puts an adapter that is for {others[0] if others else modules[0]} elsewhere",
        where="--as adapter",
        way_out="Export with --as merged",
    )


def _are_transposed(model: PreTrainedModel, modules: Sequence[str]) -> bool:
    return any(isinstance(model.get_submodule(name), Conv1D) for name in modules)


def _placed(model: PreTrainedModel, settings: dict[str, Any]) -> set[str]:
    """The modules that PEFT puts a LoRA of these settings on, under the names that it has itself.

    None of them where PEFT refuses the settings.
    """
    given = {key: value for key, value in settings.items() if value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = LoraConfig(r=1, task_type="CAUSAL_LM", **given)
            wrapped: Any = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
        except Exception:  # it refuses a layer with whatever it trips over
            return set()
        found = {
            name.removeprefix(_PREFIX)
            for name, module in wrapped.named_modules()
            if isinstance(module, LoraLayer)
        }
        keys = {f"{_PREFIX}{name}.lora_A.weight": torch.empty(0) for name in found}
        read = convert_peft_adapter_state_dict_for_transformers(wrapped, config, keys)
    return found if read.keys() == keys.keys() else set()
