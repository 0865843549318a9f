"""Supervised fine-tuning of an adapter in the slot, loss on the targets only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Optim
from srlm_lite.training.arguments import (
    Listener,
    OnStep,
    common_arguments,
    early_mean,
    late_mean,
    one_adapter_in_training,
    run_training,
)
from srlm_lite.training.checkpoint import Checkpoints
from srlm_lite.training.dropout import Masks, SequenceDropout
from srlm_lite.training.steps import PROVEN, Batch, Shares, StepTrainer
from srlm_lite.training.tokens import TargetTokens, prove_own
from srlm_lite.training.trees import Forest


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: the prompt's ids carry no loss, the target's do."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


class SftTrainer(StepTrainer):
    """Learns targets; the loss is the mean over the step's target tokens."""

    masks: Masks
    _width = 0

    def expect(self, batch: Batch) -> None:
        super().expect(batch)
        texts = []
        for text, start in zip(batch.texts, batch.starts, strict=True):
            texts.append((text, sum(map(len, self.forest.text(text))), start))
        self._width = batch.inputs["input_ids"].shape[1]
        self.masks.expect(self.state.global_step, texts, batch.inputs["input_ids"].numel())

    def picking(self, rows: Tensor, columns: Tensor) -> AbstractContextManager[None]:
        """While the head computes these tokens alone."""
        return self.masks.picking(rows * self._width + columns)

    def loss(
        self, model: Any, batch: Batch, examples: Sequence[int], shares: Shares
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The examples' negative log-likelihood; each is a text of its own."""
        return -shares.token * self.scores(model, batch).sum(), {}


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
    start = sum(each.rank for each in below)
    slot.load((*below, adapter), train=True)
    masks = Masks(dropout, seed)
    listener = Listener(on_step)
    texts = [(example.prompt_ids, example.target_ids) for example in examples]
    with (
        one_adapter_in_training(slot.model),
        slot.training_only(start, adapter),
        slot.dropping_out(lambda layer: SequenceDropout(masks, layer))
        if dropout
        else nullcontext(),
    ):
        trainer = SftTrainer(
            slot,
            base,
            # What is dropped is drawn for each text, so with dropout none can share its prompt.
            Forest(texts, shares=not dropout),
            [(text,) for text in range(len(texts))],
            tokens=[len(example.target_ids) for example in examples],
            optim=optim,
            arguments=common_arguments(
                optim, base, n_examples=len(examples), scratch=scratch, seed=seed
            ),
            callbacks=[listener],
        )
        trainer.masks = masks
        slot.model.eval()  # what drops out is new, and would drop out already
        scores = TargetTokens(
            slot.model, [*examples[0].prompt_ids, *examples[0].target_ids], trainer.picking
        )
        proof = _SftProof(trainer, scores)
        trainer.add_callback(proof)
        with scores.answering():
            run_training(
                trainer,
                optim,
                None
                if checkpoints is None
                else checkpoints.keep(
                    base,
                    slot,
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
        **trainer.facts,
    }


class _SftProof(TrainerCallback):
    """Before the first step, shows that its loss is the model's own likelihood of the targets.

    Without dropout, which is the training's affair and not the model's.
    """

    def __init__(self, trainer: SftTrainer, scores: TargetTokens) -> None:
        self._trainer, self._scores = trainer, scores
        self.facts: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.model.eval()
        step = trainer.first_step
        first = step[:PROVEN]
        own = [self._scores.own(trainer.model_wrapped, trainer.forest.text(text)) for text in first]
        found = trainer.read_as_trees(first, own)
        counted = sum(map(len, found))
        loss = -sum(float(tokens.sum()) for tokens in found) / counted
        prove_own(loss, -sum(own) / counted, trainer.base.dtype, what="SFT's loss")
        found += trainer.likelihoods(step[PROVEN:]).values() if step[PROVEN:] else []
        whole = -sum(float(tokens.sum()) for tokens in found) / sum(map(len, found))
        self.facts = {"step0_nll": whole}
        trainer.model.train()
