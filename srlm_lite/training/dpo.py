"""DPO on a delta in the slot, with the proof that policy and reference start as the same model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from srlm_lite.config import Dpo
from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.training.arguments import (
    Listener,
    OnStep,
    common_arguments,
    late_mean,
    one_adapter_in_training,
    one_device,
)

LN2 = math.log(2)
PROOF_TOLERANCE = 1e-3
"""Nats by which the loss before the first step may miss ln 2."""

_REFERENCE = "ref"  # TRL's name for the copy it takes of the adapter


@dataclass(frozen=True, slots=True)
class PairExample:
    """A preference pair as ids; chosen and rejected end with the end-of-turn token."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    def __len__(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


class _IdsDPOTrainer(DPOTrainer):
    """TRL's trainer on pairs that are ids already: rendered once, by the code that sampled them."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def train_dpo(
    slot: Slot,
    base: LoadedBase,
    *,
    anchor: Sequence[Adapter],
    delta: Adapter,
    reference: Sequence[Adapter],
    pairs: Sequence[PairExample],
    dpo: Dpo,
    scratch: Path,
    seed: int,
    on_step: OnStep = lambda step, steps, logs: None,
) -> tuple[Adapter, dict[str, float]]:
    """Train a delta on top of a frozen anchor.

    Args:
        anchor: The part of the stack below the delta, empty for a delta on the bare base.
        delta: Where training starts; with B = 0 the policy starts as the anchor.
        reference: The stack of DPO's reference model.
        pairs: Pairs that fit the window.

    Returns:
        The trained delta, and the facts of the training: `step0_loss`, `step0_margin`, steps, the
        first step's loss, and loss, reward accuracy and margin of the last quarter of the steps.

    Raises:
        ProofError: Before the first step the reference slot does not reproduce the reference
            stack (the loss is not ln 2 or the reward margin not 0 on it); or training touched
            the anchor, or left the delta as it was.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    dataset = Dataset.from_list(
        [
            {
                "prompt_ids": list(pair.prompt_ids),
                "chosen_ids": list(pair.chosen_ids),
                "rejected_ids": list(pair.rejected_ids),
            }
            for pair in pairs
        ]
    )
    arguments = common_arguments(dpo, base, n_examples=len(pairs), scratch=scratch, seed=seed)
    loss: dict[str, Any] = {"loss_type": ["sigmoid"]}
    if dpo.nll_weight:
        loss = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, dpo.nll_weight]}
    stack = [*anchor, delta]
    start = sum(adapter.rank for adapter in anchor)
    slot.load(reference, train=True)
    listener = Listener(on_step)
    try:
        with one_adapter_in_training(slot.model), slot.training_only(start, delta):
            trainer = _IdsDPOTrainer(
                model=slot.model,
                args=one_device(
                    DPOConfig(
                        **arguments,
                        **loss,
                        beta=dpo.beta,
                        max_length=None,  # length is our caller's affair: nothing is cut here
                    )
                ),
                train_dataset=dataset,
                processing_class=base.tokenizer,
                callbacks=[listener],
            )
            trainer.remove_callback(PrinterCallback)
            proof = _Proof(trainer, slot, reference=reference, stack=stack)
            trainer.add_callback(proof)
            trainer.train()
            slot.assert_unchanged(anchor)
            trained = slot.read(start, delta.rank, list(delta.factors))
    finally:
        if _REFERENCE in slot.model.peft_config:
            slot.model.delete_adapter(_REFERENCE)
    if not trained.differs_from(delta):
        raise ProofError("DPO changed nothing: the delta received no gradient")
    rows = listener.rows
    return trained, {
        **proof.facts,
        "steps": len(rows),
        "first_loss": rows[0]["loss"],
        "last_loss": late_mean(rows, "loss"),
        "reward_accuracy": late_mean(rows, "rewards/accuracies"),
        "reward_margin": late_mean(rows, "rewards/margins"),
        "logps_chosen": late_mean(rows, "logps/chosen"),
        "logps_rejected": late_mean(rows, "logps/rejected"),
    }


class _Proof(TrainerCallback):
    """Before the first step, shows that TRL's reference is the intended stack.

    With the reference stack in the slot too, loss and margin through TRL's own code must be what
    they are for a model compared with itself: ln 2 and 0. Then the slot gets what is to train.
    """

    def __init__(
        self,
        trainer: Any,
        slot: Slot,
        *,
        reference: Sequence[Adapter],
        stack: Sequence[Adapter],
    ) -> None:
        self._trainer, self._slot = trainer, slot
        self._reference, self._stack = reference, stack
        self.facts: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # TRL casts a quantized base's adapters to bf16, where small updates vanish, and copied
        # them before. Both copies are written anew, in float32.
        self._slot.load(self._reference, adapter=_REFERENCE, dtype=torch.float32)
        self._slot.load(self._reference, train=True)
        loss, margin = self._compare()
        if abs(loss - LN2) > PROOF_TOLERANCE or abs(margin) > 2 * PROOF_TOLERANCE:
            raise ProofError(
                f"before the first step DPO's loss is {loss:.6f} (must be ln 2 = {LN2:.6f}) and "
                f"the reward margin {margin:.6f} (must be 0): the reference is not the intended "
                "stack"
            )
        self.facts = {"step0_loss": loss, "step0_margin": margin}
        self._slot.load(self._stack, train=True)
        self._trainer.model.train()

    def _compare(self) -> tuple[float, float]:
        trainer = self._trainer
        pairs = trainer.train_dataset
        batch = trainer.data_collator([pairs[i] for i in range(min(len(pairs), 8))])
        batch = trainer._prepare_inputs(batch)
        kinds, weights = trainer.loss_types, trainer.loss_weights
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
        trainer.model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = float(trainer.compute_loss(trainer.model_wrapped, batch))
        margin = float(trainer._metrics["eval"]["rewards/margins"][-1])
        trainer._metrics["eval"].clear()
        trainer.loss_types, trainer.loss_weights = kinds, weights
        return loss, margin
