"""DPO and SFT as one runs them with TRL alone: for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Dpo, Optim
from srlm_lite.training.arguments import (
    Listener,
    OnStep,
    batches_of_trl,
    common_arguments,
    one_adapter_in_training,
    one_device,
)
from srlm_lite.training.dpo import PairExample
from srlm_lite.training.sft import Example


class _IdsTrainer(DPOTrainer):
    """TRL's trainer, told that its pairs are ids already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def train_plain_dpo(
    slot: Slot,
    base: LoadedBase,
    *,
    stack: Sequence[Adapter],
    pairs: Sequence[PairExample],
    dpo: Dpo,
    scratch: Path,
    seed: int,
    on_step: OnStep = lambda step, steps, logs: None,
) -> None:
    """Train the whole slot as one LoRA; no proof, no frozen rows, in the dtypes that TRL chooses.

    The reference is the copy of the adapter that TRL takes.
    """
    slot.load(stack, train=True)
    rows = [
        {
            "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids),
        }
        for pair in pairs
    ]
    arguments = common_arguments(dpo, base, n_examples=len(pairs), scratch=scratch, seed=seed)
    arguments |= batches_of_trl(dpo, len(pairs))
    with_nll: dict[str, Any] = {
        "loss_type": [dpo.loss, "sft"],
        "loss_weights": [1.0, dpo.nll_weight],
    }
    try:
        with one_adapter_in_training(slot.model):
            trainer = _IdsTrainer(
                model=slot.model,
                args=one_device(
                    DPOConfig(
                        **arguments,
                        beta=dpo.beta,
                        ld_alpha=dpo.ld_alpha,
                        max_length=None,
                        **(with_nll if dpo.nll_weight else {"loss_type": [dpo.loss]}),
                    )
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=base.tokenizer,
                callbacks=[Listener(on_step)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        if "ref" in slot.model.peft_config:
            slot.model.delete_adapter("ref")


def train_plain_sft(
    slot: Slot,
    base: LoadedBase,
    *,
    stack: Sequence[Adapter],
    examples: Sequence[Example],
    optim: Optim,
    scratch: Path,
    seed: int,
    on_step: OnStep = lambda step, steps, logs: None,
) -> None:
    """The same by SFT on the targets, with the loss that TRL chooses."""
    slot.load(stack, train=True)
    rows = [
        {
            "input_ids": [*one.prompt_ids, *one.target_ids],
            "labels": [*[-100] * len(one.prompt_ids), *one.target_ids],
        }
        for one in examples
    ]
    arguments = common_arguments(optim, base, n_examples=len(examples), scratch=scratch, seed=seed)
    arguments |= batches_of_trl(optim, len(examples))
    with one_adapter_in_training(slot.model):
        trainer = SFTTrainer(
            model=slot.model,
            args=one_device(SFTConfig(**arguments, max_length=None)),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            callbacks=[Listener(on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
