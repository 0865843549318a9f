"""What all trainers are told alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments

from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.heap import is_out_of_memory
from srlm_lite.model.renamed import checkpointing_name
from srlm_lite.settings import Optim
from srlm_lite.training.checkpoint import Kept

A = TypeVar("A", bound=Any)

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called after each optimiser step with the step, their number, and what the trainer logged."""


def total_steps(n_examples: int, optim: Optim) -> int:
    """Optimiser steps of a training, at least one.

    What does not fill a batch at the end of an epoch is a smaller step, so that an epoch is a pass
    over all examples.
    """
    of_epoch = math.ceil(n_examples / optim.batch_size)
    return max(1, math.ceil(round(of_epoch * optim.epochs, 6)))


def common_arguments(
    optim: Optim, base: LoadedBase, *, n_examples: int, scratch: Path, seed: int
) -> dict[str, Any]:
    """Keyword arguments for `TrainingArguments`, and for what TRL makes of them."""
    steps = total_steps(n_examples, optim)
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": 1,  # a batch of ours is a step
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": optim.learning_rate,
        "warmup_steps": round(steps * optim.warmup_ratio),
        "weight_decay": 0.0,  # decay would shrink the frozen rows of the slot
        "max_grad_norm": optim.max_grad_norm,
        checkpointing_name(TrainingArguments): optim.gradient_checkpointing,
        "bf16": base.dtype == torch.bfloat16,
        "fp16": base.dtype == torch.float16,
        "use_cpu": base.device.type == "cpu",
        "seed": seed % (1 << 32),
        "data_seed": seed % (1 << 32),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": base.device.type == "cuda",
        "remove_unused_columns": False,
        # Every trainable weight is in every forward pass.
        "ddp_find_unused_parameters": False,
        **schedule_of(optim),
    }


def batches_of_trl(optim: Optim, n_examples: int) -> dict[str, int]:
    """How a trainer of TRL's, in one process, cuts a step: into micro-batches of so many."""
    micro_batch = min(optim.micro_batch_size, n_examples)
    per_step = max(1, math.ceil(min(optim.batch_size, n_examples) / micro_batch))
    return {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": per_step,
    }


def schedule_of(optim: Optim) -> dict[str, Any]:
    """The section's schedule, in the arguments of transformers' trainer."""
    ratio = optim.final_learning_rate_ratio
    if optim.schedule == "constant" or ratio == 1:
        return {"lr_scheduler_type": "constant_with_warmup"}  # its `constant` knows no warmup
    if not ratio:
        return {"lr_scheduler_type": optim.schedule}
    if optim.schedule == "cosine":
        kind, settings = "cosine_with_min_lr", {"min_lr_rate": ratio}
    else:
        kind, settings = "polynomial", {"lr_end": ratio * optim.learning_rate, "power": 1.0}
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": settings}


def one_device(arguments: A) -> A:
    """Keep Trainer from spreading one process over all GPUs it sees: bitsandbytes cannot."""
    arguments._n_gpu = 1
    return arguments


def share_adapters(trainer: Any) -> None:
    """Let DDP train the adapters of a sharded base, which accelerate would not wrap in it.

    The base is no concern of DDP's: see `one_adapter_in_training`.
    """
    accelerator = trainer.accelerator
    prepare = accelerator.prepare_model

    def prepared(model: Any, **_: Any) -> DistributedDataParallel:
        options = accelerator.ddp_handler.to_kwargs() if accelerator.ddp_handler else {}
        # As if for evaluation: with mixed precision, but not wrapped.
        return DistributedDataParallel(prepare(model, evaluation_mode=True), **options)

    accelerator.prepare_model = prepared


class Listener(TrainerCallback):
    """Keeps what the trainer logs and passes it on; prints nothing."""

    def __init__(self, on_step: OnStep) -> None:
        self.rows: list[dict[str, float]] = []
        self._on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self._take(state.global_step, state.max_steps, logs)

    def replay(self, history: Sequence[Mapping[str, Any]], steps: int) -> None:
        """Pass on what was logged of the steps that are done (`TrainerState.log_history`)."""
        for logs in history:
            if "loss" in logs:
                told = {key: value for key, value in logs.items() if key != "step"}
                self._take(int(logs["step"]), steps, told)

    def _take(self, step: int, steps: int, logs: Mapping[str, Any]) -> None:
        row = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        self.rows.append(row)
        self._on_step(step, steps, row)


def run_training(trainer: Any, optim: Optim, kept: Kept | None = None) -> None:
    """`Trainer.train`.

    Args:
        kept: Keeps it on disk while it goes on, and goes on with what is there of it.

    Raises:
        UserError: Memory does not suffice; says with what the run may go on.
    """
    try:
        if kept is None:
            trainer.train()
        else:
            kept.train(trainer)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = [n for n in range(1, optim.micro_batch_size) if optim.batch_size % n == 0]
        ways = [f"{optim.section}.micro_batch_size={smaller[-1]}"] if smaller else []
        if not optim.gradient_checkpointing:
            ways.append(f"{optim.section}.gradient_checkpointing=true")
        go_on = f"The run goes on with --set {' or '.join(ways)}"
        raise UserError(
            f"memory does not suffice to train on {optim.micro_batch_size} sequences at once",
            where=f"{optim.section}.micro_batch_size",
            way_out=go_on if ways else "Another run with a smaller base.window may fit",
        ) from error


def early_mean(rows: Sequence[dict[str, float]], key: str) -> float:
    """Mean of a logged value over the first quarter of the steps: one step alone is noise."""
    return fmean(row[key] for row in rows[: max(1, len(rows) // 4)])


def late_mean(rows: Sequence[dict[str, float]], key: str) -> float:
    """The same over the last quarter."""
    return fmean(row[key] for row in rows[-max(1, len(rows) // 4) :])


NO_ROUTER_LOSS = 0.0
"""The coefficient that TRL's trainers (1.14) else take from a mixture's configuration. Its experts
are frozen here, and no loss of ours has such a term."""


@contextmanager
def _without_chance_and_routers(model: Any) -> Iterator[None]:
    """Within this context the base drops nothing out and collects no router's logits.

    In training mode families such as GPT-2 and OPT drop out by their configuration; that would make
    a loss depend on how a step is cut, and be none of the proofs'.
    """
    configs = {id(one): one for one in (model.config, model.config.get_text_config())}
    holders = [*(vars(one) for one in model.modules()), *(vars(one) for one in configs.values())]
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for holder in holders:
        for name, value in holder.items():
            drops = "drop" in name.lower() and isinstance(value, float)
            if (drops and value) or (name == "output_router_logits" and value):
                changed.append((holder, name, value))
    changed += [(vars(one), "p", one.p) for one in model.modules() if isinstance(one, _DropoutNd)]
    # TRL's SFT trainer writes what it was told of routers into the configuration.
    routers = ("router_aux_loss_coef", "output_router_logits")
    kept = [(one, {k: v for k, v in vars(one).items() if k in routers}) for one in configs.values()]
    for holder, name, value in changed:
        holder[name] = type(value)(0)
    try:
        yield
    finally:
        for holder, name, value in changed:
            holder[name] = value
        for one, values in kept:
            vars(one).update(values)


@contextmanager
def one_adapter_in_training(model: Any) -> Iterator[None]:
    """Train the adapter, and nothing by chance; undo what a trainer leaves behind on the model:
    training mode, gradients, checkpointing, settings.
    """
    # Every process has the base; DDP need not send it round.
    model._ddp_params_and_buffers_to_ignore = [
        *(name for name, parameter in model.named_parameters() if not parameter.requires_grad),
        *(name for name, _ in model.named_buffers()),
    ]
    try:
        with _without_chance_and_routers(model):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        if getattr(model, checkpointing_name(model, "is_{}")):
            getattr(model, checkpointing_name(model, "{}_disable"))()
        # accelerate wraps `forward` (mixed precision, float32 outputs) and marks the model as
        # wrapped, so that the next trainer would leave it as it finds it.
        for attribute in (
            "forward",
            "_original_forward",
            "_is_accelerate_prepared",
            "_ddp_params_and_buffers_to_ignore",
        ):
            model.__dict__.pop(attribute, None)
        model.eval()
