"""The base held by Unsloth: its loader, its kernels, one adapter, the same slot around it.

Unsloth rewrites classes of transformers, PEFT and TRL when it is imported, so it comes first, in a
process that has none of them yet. Its kernels compute one active adapter; the fused slot is one.
Nothing here is believed: every DPO run proves its reference and its anchor as on any base.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from srlm_lite.errors import UserError
from srlm_lite.model.cache import cache_dir
from srlm_lite.settings import Base

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_WHERE = "base.backend"
_BEFORE = ("transformers", "peft", "trl")


def import_first() -> None:
    """Import Unsloth, before what it rewrites.

    Raises:
        UserError: It is not installed, does not start, or comes too late.
    """
    if "unsloth" in sys.modules:
        return
    if importlib.util.find_spec("unsloth") is None:
        raise UserError(
            "Unsloth is not installed",
            where=_WHERE,
            way_out="pip install 'srlm-lite[unsloth]', or set base.backend=transformers",
        )
    if late := [name for name in _BEFORE if name in sys.modules]:
        raise UserError(
            f"Unsloth has to be imported before {late[0]}, which is in this process already",
            where=_WHERE,
            way_out="Start it in a process of its own, as the command does",
        )
    # What it compiles would lie in the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth"))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        with _silent():
            importlib.import_module("unsloth")
    except Exception as error:  # it refuses a machine with any of half a dozen types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Unsloth does not start: {first[:200]}",
            where=_WHERE,
            way_out="Set base.backend=transformers",
        ) from error


def load(folder: str, section: Base, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The base's model, without adapters.

    Raises:
        UserError: Unsloth gave something else than was asked for.
    """
    from unsloth import FastLanguageModel

    with _silent():
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=section.window,
            dtype=dtype,
            load_in_4bit=section.quantization == "nf4",
            device_map={"": device},
            revision=section.revision,
            # Ours is told to the trainer, for each training by itself.
            use_gradient_checkpointing=False,
            trust_remote_code=False,
            use_exact_model_name=True,
        )
    # Where 4 bits fail it says so on the terminal and goes on in 16.
    if (section.quantization == "nf4") != bool(getattr(model, "is_loaded_in_4bit", False)):
        raise UserError(
            f"Unsloth did not load {section.name} with quantization {section.quantization}",
            where="base.quantization",
            way_out="Set base.backend=transformers",
        )
    return model


def wrap(model: PreTrainedModel, *, targets: Sequence[str], rank: int) -> PeftModel:
    """The base with one LoRA around its layers, computed by Unsloth's kernels where it has any."""
    from unsloth import FastLanguageModel

    with _silent():
        wrapped: PeftModel = FastLanguageModel.get_peft_model(
            model,
            r=rank,
            lora_alpha=rank,
            target_modules=list(targets),
            lora_dropout=0.0,
            bias="none",
            use_gradient_checkpointing=False,
            random_state=0,
        )
    model.config.use_cache = True  # off for training; a trainer sees to that itself
    return wrapped


def prepare(model: PeftModel, *, training: bool) -> None:
    """Switch Unsloth's own paths between sampling and training."""
    from unsloth import FastLanguageModel

    with _silent():
        if training:
            FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
        else:
            FastLanguageModel.for_inference(model)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Unsloth prints on stdout, where data goes; what it says is logged."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            if line.strip():
                logger.info("unsloth: %s", line.strip())
