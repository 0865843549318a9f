"""Supervised fine-tuning of an adapter in the slot, loss on the targets only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Optim
from srlm_lite.training.arguments import (
    NO_ROUTER_LOSS,
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
from srlm_lite.training.checkpoint import Checkpoints
from srlm_lite.training.dealing import Dealt
from srlm_lite.training.dropout import Masks, SequenceDropout
from srlm_lite.training.tokens import IGNORED, TargetTokens, prove_own


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: the prompt's ids carry no loss, the target's do."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


class _SftTrainer(Dealt, SFTTrainer):
    """TRL's trainer; its loss is the mean over the step's target tokens."""

    masks: Masks

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        self.masks.expect(
            self.state.global_step, inputs["example"].tolist(), inputs["attention_mask"]
        )
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            use_cache=False,
        )
        loss = -(inputs["token_share"] * output.logits.sum(dim=1)).sum()
        return (loss, {}) if return_outputs else loss


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
    checkpoints: Checkpoints | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Train an adapter on examples that fit the window.

    Args:
        below: The frozen part of the stack under the adapter.
        checkpoints: Where it is kept while it goes on; None: nowhere.

    Returns:
        The trained adapter, and the facts of the training: `step0_nll`, which is the first step's
        loss without dropout, steps, and the loss of the first and the last quarter of them, all in
        nats per target token.

    Raises:
        ProofError: Before the first step its loss is not the model's own negative log-likelihood of
            the targets; or training changed nothing, or what is below.
    """
    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*example.prompt_ids, *example.target_ids],
                "labels": [*[IGNORED] * len(example.prompt_ids), *example.target_ids],
            }
            for example in examples
        ]
    )
    arguments: dict[str, Any] = common_arguments(
        optim, base, n_examples=len(examples), scratch=scratch, seed=seed
    )
    start = sum(each.rank for each in below)
    slot.load((*below, adapter), train=True)
    masks = Masks(dropout, seed)
    listener = Listener(on_step)
    with (
        one_adapter_in_training(slot.model),
        slot.training_only(start, adapter),
        slot.dropping_out(lambda layer: SequenceDropout(masks, layer))
        if dropout
        else nullcontext(),
    ):
        trainer = _SftTrainer(
            model=slot.model,
            args=one_device(
                SFTConfig(
                    **arguments,
                    router_aux_loss_coef=NO_ROUTER_LOSS,
                    loss_type="nll",  # what TRL would put in its place multiplies with the head
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
        trainer.tokens = [len(example.target_ids) for example in examples]
        trainer.masks = masks
        trainer.model_accepts_loss_kwargs = False  # it divides by the passes of the step
        if slot.sharded:
            share_adapters(trainer)
        # TRL has cast a quantized base's adapters to bf16: what is below would not be what it was.
        slot.load((*below, adapter), train=True)
        scores = TargetTokens(slot.model, dataset[0]["input_ids"], masks.picking)
        proof = _SftProof(trainer, scores, base.dtype)
        trainer.add_callback(proof)
        with scores.answering():
            run_training(
                trainer,
                optim,
                None
                if checkpoints is None
                else checkpoints.keep(
                    base,
                    optim,
                    seed=seed,
                    keeper=listener,
                    proof=proof,
                    examples=examples,
                    adapters=(*below, adapter),
                    dropout=dropout,
                ),
            )
    trained = slot.read(start, adapter.rank, list(adapter.factors))
    slot.assert_unchanged(below)
    if not trained.differs_from(adapter):
        raise ProofError("SFT changed nothing: the adapter received no gradient")
    rows = listener.rows
    return trained, {
        **proof.facts,
        "steps": len(rows),
        "first_loss": early_mean(rows, "loss"),
        "last_loss": late_mean(rows, "loss"),
    }


class _SftProof(TrainerCallback):
    """Before the first step, shows that its loss is the model's own likelihood of the targets.

    Without dropout, which is the training's affair and not the model's.
    """

    def __init__(self, trainer: Any, scores: TargetTokens, dtype: torch.dtype) -> None:
        self._trainer, self._scores, self._dtype = trainer, scores, dtype
        self.facts: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.model.eval()
        loss, own, counted = 0.0, 0.0, 0
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for made in trainer.batches_of(trainer.first_step):
                batch = trainer._prepare_inputs(made)
                loss += float(trainer.compute_loss(trainer.model_wrapped, batch))
                own -= self._scores.own(trainer.model_wrapped, batch, batch["labels"])
                counted += int((batch["labels"] != IGNORED).sum())
        prove_own(loss, own / counted, self._dtype, what="SFT's loss")
        self.facts = {"step0_nll": loss}
        trainer.model.train()
