"""DPO on a delta in the slot, with the proof that policy and reference start as the same model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.processes import place
from srlm_lite.settings import Consistency, Dpo
from srlm_lite.training.arguments import (
    Listener,
    OnStep,
    common_arguments,
    late_mean,
    one_adapter_in_training,
    run_training,
)
from srlm_lite.training.checkpoint import Checkpoints
from srlm_lite.training.steps import PROVEN, Batch, Shares, StepTrainer
from srlm_lite.training.tokens import TargetTokens, prove_own
from srlm_lite.training.trees import Forest, Text

LN2 = math.log(2)
PROOF_TOLERANCE = 1e-4
"""Nats by which the loss before the first step may miss ln 2, in 16 bits too: both of what is
compared are read in the same row. What is left is the order in which a GPU sums."""

REFERENCE = "reference.safetensors"
"""What the reference finds of a training's replies, in its scratch folder."""


@dataclass(frozen=True, slots=True)
class PairExample:
    """A preference pair as ids; chosen and rejected end with the end-of-turn token.

    `weight` and `smoothing` as in `PreferencePair`.
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    weight: float = 1.0
    smoothing: float = 0.0

    def __len__(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def preference_loss(margin: Tensor, weight: Tensor, smoothing: Tensor) -> Tensor:
    """w [(1 - s) -log sigmoid(m) + s -log sigmoid(-m)], for each pair; all of shape (B,).

    The margin is beta times the difference of the log-ratios, so with w = 1 and s = 0 this is
    DPO. With s = 1 - C it is CREAM's C L(w, l) + (1 - C) L(l, w), with one s for all conservative
    DPO.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; Wang et al. 2024, arXiv:2410.12735.
    """
    return weight * -((1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin))


def consistency_loss(
    margin: Tensor, implicit: Tensor, weight: Tensor, smoothing: Tensor, terms: Consistency
) -> tuple[Tensor, Tensor]:
    """mask L_DPO + a [KL(p||q) + KL(q||p)] + b [H(p) + H(q)] for each pair, and the mask; all (B,).

    p = 1 - smoothing is the judge's preference for the chosen reply, held within 0.05 and 0.95; q
    = sigmoid(implicit) is the implicit reward's at this very step. The mask is 1 where q does not
    contradict and p is above the threshold. No gradient flows through p and the mask.

    Source: our formulation of Zhou et al. 2025, arXiv:2502.08922, whose own equations we could
    not confirm.
    """
    p = (1 - smoothing).clamp(0.05, 0.95)
    log_q, log_not_q = F.logsigmoid(implicit), F.logsigmoid(-implicit)
    q = implicit.sigmoid()
    # Before anything is learned the implicit reward has no opinion: rounding is not one either.
    mask = ((implicit.detach() > -1e-4) & (1 - smoothing > terms.threshold)).to(margin.dtype)
    log_p, log_not_p = p.log(), (1 - p).log()
    divergence = (p - q) * (log_p - log_q) + (q - p) * (log_not_p - log_not_q)
    entropy = -(p * log_p + (1 - p) * log_not_p) - (q * log_q + (1 - q) * log_not_q)
    loss = mask * -F.logsigmoid(margin)
    loss = loss + terms.consistency_weight * divergence + terms.confidence_weight * entropy
    return weight * loss, mask


class PairTrainer(StepTrainer):
    """Learns from pairs; each reply is computed once, however many of them it is in.

    The loss is a mean over the step's pairs, that of the NLL term over the step's chosen tokens.
    """

    pairs: Sequence[PairExample]
    beta = 0.1
    ld_alpha: float | None = None
    label_smoothing = 0.0
    consistency: Consistency | None = None
    nll_weight = 0.0
    reference: list[Tensor]
    """By text, the log-likelihoods of its tokens by the reference."""

    def loss(
        self, model: Any, batch: Batch, examples: Sequence[int], shares: Shares
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What these pairs add to the step's loss, and the figures of each."""
        scores = self.scores(model, batch)
        reference = torch.cat([self.reference[text] for text in batch.texts]).to(scores)
        chosen, rejected = self._summed(scores, batch, examples)
        ref_chosen, ref_rejected = self._summed(reference, batch, examples)
        rewards = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        margin = rewards[0] - rewards[1]
        losses, told = self._own_loss(margin, rewards, examples)
        loss = (shares.example * losses).sum()
        if self.nll_weight:
            place_of = {text: i for i, text in enumerate(batch.texts)}
            sums = batch.summed(scores)
            of_chosen = sums[[place_of[self.examples[one][0]] for one in examples]]
            loss = loss - self.nll_weight * shares.token * of_chosen.sum()
        return loss, told | {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }

    def _summed(self, scores: Tensor, batch: Batch, examples: Sequence[int]) -> tuple[Any, ...]:
        """(B,) log-likelihoods of the chosen and of the rejected replies of these pairs.

        What one reply of a pair has more counts `ld_alpha` times.
        """
        place_of = {text: i for i, text in enumerate(batch.texts)}
        sides = [[place_of[self.examples[one][side]] for one in examples] for side in (0, 1)]
        if self.ld_alpha is None:
            sums = batch.summed(scores)
            return sums[sides[0]], sums[sides[1]]
        pieces = torch.split(scores, batch.counts)
        found: tuple[list[Tensor], list[Tensor]] = [], []
        for chosen, rejected in zip(*sides, strict=True):
            shared = min(batch.counts[chosen], batch.counts[rejected])
            for side, text in zip(found, (chosen, rejected), strict=True):
                tokens = pieces[text]
                side.append(tokens[:shared].sum() + self.ld_alpha * tokens[shared:].sum())
        return torch.stack(found[0]), torch.stack(found[1])

    def _own_loss(
        self, margin: Tensor, rewards: tuple[Tensor, Tensor], examples: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses, and what else of each pair to note."""
        pairs = [self.pairs[one] for one in examples]
        of_all = self.label_smoothing
        weight = margin.new_tensor([pair.weight for pair in pairs])
        smoothing = margin.new_tensor(
            [pair.smoothing + (1 - 2 * pair.smoothing) * of_all for pair in pairs]
        )
        if self.consistency is None:
            return preference_loss(margin, weight, smoothing), {}
        chosen, rejected = (
            margin.new_tensor([self.forest.counted(self.examples[one][side]) for one in examples])
            for side in (0, 1)
        )
        per_token = (rewards[0] / chosen - rewards[1] / rejected) / self.beta
        implicit = self.consistency.sharpness * per_token
        loss, agreed = consistency_loss(margin, implicit, weight, smoothing, self.consistency)
        return loss, {"agreement": agreed}


def train_dpo(
    slot: Slot,
    base: LoadedBase,
    *,
    anchor: Sequence[Adapter],
    delta: Adapter,
    reference: Sequence[Adapter],
    pairs: Sequence[PairExample],
    dpo: Dpo,
    consistency: Consistency | None = None,
    scratch: Path,
    seed: int,
    on_step: OnStep = lambda step, steps, logs: None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Train a delta on top of a frozen anchor.

    Args:
        anchor: The part of the stack below the delta, empty for a delta on the bare base.
        delta: Where training starts; with B = 0 the policy starts as the anchor.
        reference: The stack of DPO's reference model. What it finds of the replies is computed
            once, and kept in the scratch folder for a training that is begun anew.
        pairs: Pairs that fit the window.
        consistency: Terms that pull the implicit reward towards the judge's preference, which is
            1 - smoothing of each pair.
        checkpoints: Where it is kept while it goes on; None: nowhere.

    Returns:
        The trained delta, and the facts of the training: `step0_loss`, `step0_margin`, steps, the
        first step's loss, and loss, reward accuracy and margin of the last quarter of the steps;
        `packed`, 1 where texts were computed as trees and 0 where they were padded, and
        `tokens_at_once`.

    Raises:
        ProofError: Before the first step the reference's likelihoods are not those of the reference
            stack (the loss is not ln 2 or the reward margin not 0 on it), or log-likelihoods are
            not the model's own; or training touched the anchor, or left the delta as it was.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    texts: dict[Text, int] = {}
    for pair in pairs:
        for reply in (pair.chosen_ids, pair.rejected_ids):
            texts.setdefault((pair.prompt_ids, reply), len(texts))
    examples = [
        (texts[pair.prompt_ids, pair.chosen_ids], texts[pair.prompt_ids, pair.rejected_ids])
        for pair in pairs
    ]
    stack = [*anchor, delta]
    start = sum(adapter.rank for adapter in anchor)
    slot.load(reference, train=True)
    listener = Listener(on_step)
    with one_adapter_in_training(slot.model), slot.training_only(start, delta):
        trainer = PairTrainer(
            slot,
            base,
            Forest(list(texts)),
            examples,
            tokens=[len(pair.chosen_ids) for pair in pairs],
            optim=dpo,
            arguments=common_arguments(
                dpo, base, n_examples=len(pairs), scratch=scratch, seed=seed
            ),
            callbacks=[listener],
        )
        trainer.pairs, trainer.beta, trainer.ld_alpha = pairs, dpo.beta, dpo.ld_alpha
        trainer.label_smoothing = dpo.label_smoothing
        trainer.consistency, trainer.nll_weight = consistency, dpo.nll_weight
        scores = TargetTokens(slot.model, [*pairs[0].prompt_ids, *pairs[0].chosen_ids])
        kept = _Kept(scratch / REFERENCE, base, reference, list(texts))
        proof = _DpoProof(trainer, scores, kept, reference=reference, stack=stack)
        trainer.add_callback(proof)
        with scores.answering():
            run_training(
                trainer,
                dpo,
                None
                if checkpoints is None
                else checkpoints.keep(
                    base,
                    slot,
                    dpo,
                    seed=seed,
                    keeper=listener,
                    proof=proof,
                    examples=pairs,
                    adapters=(*anchor, delta, *reference),
                    consistency=consistency and consistency.model_dump(mode="json"),
                ),
            )
        trained = slot.read(start, delta.rank, list(delta.factors))
        slot.assert_unchanged(anchor)
    if not trained.differs_from(delta):
        raise ProofError("DPO changed nothing: the delta received no gradient")
    kept.forget()
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
        **({"agreement": late_mean(rows, "agreement")} if consistency is not None else {}),
        **trainer.facts,
    }


class _Kept:
    """The reference's likelihoods as a file, for a training that was stopped and begins anew."""

    def __init__(
        self, path: Path, base: LoadedBase, reference: Sequence[Adapter], texts: Sequence[Text]
    ) -> None:
        self._path = path
        told = [str(base.model.name_or_path), str(base.dtype), str(base.model.config.to_dict())]
        told += [adapter.digest() for adapter in reference]
        digest = hashlib.sha256(json.dumps([told, list(texts)]).encode())
        self._name = digest.hexdigest()
        self._counts = [len(target) for _, target in texts]

    def load(self) -> list[Tensor] | None:
        """What was kept of these very texts by this very reference."""
        try:
            table = load_file(self._path).get(self._name)
        except (OSError, SafetensorError, ValueError):
            return None
        if table is None or len(table) != sum(self._counts):
            return None
        return list(torch.split(table, self._counts))

    def save(self, found: Sequence[Tensor]) -> None:
        """Keep it, whole or not at all."""
        if not place().leads:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        save_file({self._name: torch.cat(list(found))}, temporary)
        temporary.replace(self._path)

    def forget(self) -> None:
        """Its training is done."""
        if place().leads:
            self._path.unlink(missing_ok=True)


class _DpoProof(TrainerCallback):
    """Before the first step, shows that the reference is the intended stack, and the loss DPO's.

    With the reference stack in the slot, loss and margin through the code that trains, against the
    likelihoods that were kept of the reference, must be what they are for a model compared with
    itself: ln 2 and 0. That holds for any log-likelihoods, so these are held against the model's
    own, by plain forward passes. Then the slot gets what is to train.
    """

    def __init__(
        self,
        trainer: PairTrainer,
        scores: TargetTokens,
        kept: _Kept,
        *,
        reference: Sequence[Adapter],
        stack: Sequence[Adapter],
    ) -> None:
        self._trainer, self._scores, self._kept = trainer, scores, kept
        self._reference, self._stack = reference, stack
        self.facts: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.slot.load(self._reference, train=True)
        trainer.model.eval()
        step = trainer.first_step
        texts = trainer.texts_of(trainer.parts_of(step)[0])[:PROVEN]
        own = [self._scores.own(trainer.model_wrapped, trainer.forest.text(text)) for text in texts]
        found = trainer.read_as_trees(texts, own)
        sums = [float(tokens.sum()) for tokens in found]

        def compared() -> tuple[float, float]:
            trainer.reference = trainer.of_reference(self._kept.load(), texts, sums, step)
            return self._compare(trainer.parts_of(step)[0])

        loss, margin = trainer.within_memory(step, compared)
        # Asked so that NaN, which is above nothing, is refused too.
        if not (abs(loss - LN2) <= PROOF_TOLERANCE and abs(margin) <= 2 * PROOF_TOLERANCE):
            raise ProofError(
                f"before the first step DPO's loss is {loss:.6f} (must be ln 2 = {LN2:.6f}) and "
                f"the reward margin {margin:.6f} (must be 0): {_cause(loss, margin)}"
            )
        counted = sum(map(len, found))
        what = "what is learned of the replies"
        nll, of_model = -sum(sums) / counted, -sum(own) / counted
        prove_own(nll, of_model, trainer.base.dtype, what=what)
        self._kept.save(trainer.reference)
        self.facts = {"step0_loss": loss, "step0_margin": margin}
        trainer.slot.load(self._stack, train=True)
        trainer.model.train()

    @torch.no_grad()
    def _compare(self, pairs: Sequence[int]) -> tuple[float, float]:
        """Loss and margin of these pairs, whatever their weights are."""
        trainer = self._trainer
        before = trainer.nll_weight, trainer.consistency, trainer.label_smoothing, trainer.pairs
        trainer.nll_weight, trainer.consistency, trainer.label_smoothing = 0.0, None, 0.0
        trainer.pairs = [replace(pair, weight=1.0, smoothing=0.0) for pair in trainer.pairs]
        with trainer.reading(), trainer.compute_loss_context_manager():
            loss, told = trainer.loss(
                trainer.model_wrapped,
                trainer.batch(trainer.texts_of(pairs)),
                pairs,
                Shares(1 / len(pairs), 0.0),
            )
        trainer.nll_weight, trainer.consistency, trainer.label_smoothing, trainer.pairs = before
        return float(loss), float(told["rewards/margins"].mean())


def _cause(loss: float, margin: float) -> str:
    if not math.isfinite(loss + margin):
        return "the model's likelihoods are no numbers"
    if abs(margin) <= 2 * PROOF_TOLERANCE:
        return "the reference is the policy, as it must be, but something is added to DPO's loss"
    return "the reference is not the intended stack"
