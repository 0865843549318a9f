"""Supervised fine-tuning of an adapter in the slot, loss on the targets only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from srlm_lite.config import Optim
from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.training.arguments import (
    Listener,
    OnStep,
    common_arguments,
    deal_of,
    early_mean,
    late_mean,
    one_adapter_in_training,
    one_device,
    run_training,
    share_adapters,
)
from srlm_lite.training.dealing import Deal, dealt_loader


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: the prompt's ids carry no loss, the target's do."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


class _SftTrainer(SFTTrainer):
    """TRL's trainer, its steps shared by all processes."""

    deal: Deal | None = None

    def get_train_dataloader(self) -> Any:
        if self.deal is None or self.deal.at.world == 1:
            return super().get_train_dataloader()
        return dealt_loader(self, self.deal)


def train_sft(
    slot: Slot,
    base: LoadedBase,
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    below: Sequence[Adapter] = (),
    optim: Optim,
    dropout: float,
    scratch: Path,
    seed: int,
    on_step: OnStep = lambda step, steps, logs: None,
) -> tuple[Adapter, dict[str, float]]:
    """Train an adapter on examples that fit the window.

    Args:
        below: The frozen part of the stack under the adapter.

    Returns:
        The trained adapter, and the facts of the training: steps, and the loss of the first and the
        last quarter of them in nats per target token.

    Raises:
        ProofError: Training changed nothing, or what is below.
    """
    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*example.prompt_ids, *example.target_ids],
                "labels": [*[-100] * len(example.prompt_ids), *example.target_ids],
            }
            for example in examples
        ]
    )
    arguments: dict[str, Any] = common_arguments(
        optim, base, n_examples=len(examples), scratch=scratch, seed=seed
    )
    start = sum(each.rank for each in below)
    slot.load((*below, adapter), train=True)
    slot.set_dropout(dropout)
    listener = Listener(on_step)
    with one_adapter_in_training(slot.model), slot.training_only(start, adapter):
        trainer = _SftTrainer(
            model=slot.model,
            args=one_device(
                SFTConfig(
                    **arguments,
                    max_length=None,  # length is our caller's affair: nothing is cut here
                    packing=False,
                    # In random order: batches of equal length would be all IFT or all EFT.
                    train_sampling_strategy="random",
                )
            ),
            train_dataset=dataset,
            processing_class=base.tokenizer,
            callbacks=[listener],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.deal = deal_of(optim, len(examples))
        if slot.sharded:
            share_adapters(trainer)
        # TRL has cast a quantized base's adapters to bf16: what is below would not be what it was.
        slot.load((*below, adapter), train=True)
        run_training(trainer, optim)
    slot.set_dropout(0.0)
    trained = slot.read(start, adapter.rank, list(adapter.factors))
    slot.assert_unchanged(below)
    if not trained.differs_from(adapter):
        raise ProofError("SFT changed nothing: the adapter received no gradient")
    rows = listener.rows
    return trained, {
        "steps": len(rows),
        "first_loss": early_mean(rows, "loss"),
        "last_loss": late_mean(rows, "loss"),
    }
