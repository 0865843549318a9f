"""DPO on a delta in the slot, with the proof that policy and reference start as the same model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import use_adapter

from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Consistency, Dpo
from srlm_lite.training.arguments import (
    NO_ROUTER_LOSS,
    Listener,
    OnStep,
    common_arguments,
    deal_of,
    late_mean,
    one_adapter_in_training,
    one_device,
    run_training,
    share_adapters,
)
from srlm_lite.training.checkpoint import Checkpoints
from srlm_lite.training.dealing import Dealt, carrying
from srlm_lite.training.tokens import IGNORED, TargetTokens, prove_own

LN2 = math.log(2)
PROOF_TOLERANCE = 1e-3
"""Nats by which the loss before the first step may miss ln 2."""

_COLUMNS = ("weight", "smoothing")
"""Columns of a pair, beside its ids."""

_REFERENCE = "ref"  # TRL's name for the copy it takes of the adapter


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


class _PairTrainer(Dealt, DPOTrainer):
    """TRL's trainer on pairs that are ids already: rendered once, by the code that sampled them.

    The loss is ours, which knows of weights, smoothing and the consistency terms, and is a mean
    over the step's pairs, that of the NLL term over the step's chosen tokens.
    """

    consistency: Consistency | None = None
    nll_weight = 0.0

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def carry_columns(self) -> None:
        """Let batches carry what TRL's collator leaves behind of a pair."""
        self.data_collator = carrying(self.data_collator, _COLUMNS)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mask = inputs["completion_mask"][..., 1:]
        tokens = self._token_scores(model, inputs)
        slot: Any = self.model
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(slot, self.args.gradient_checkpointing_kwargs),
            use_adapter(slot, _REFERENCE),
        ):
            reference = self._token_scores(slot, inputs)
        chosen, rejected = self._summed(tokens, mask).chunk(2)
        ref_chosen, ref_rejected = self._summed(reference, mask).chunk(2)
        rewards = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        margin = rewards[0] - rewards[1]
        losses, told = self._own_loss(margin, rewards, mask, inputs)
        loss = (inputs["share"] * losses).sum()
        if self.nll_weight:
            of_chosen = tokens.chunk(2)[0].sum(dim=1)
            loss = loss - self.nll_weight * (inputs["token_share"] * of_chosen).sum()
        told |= {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        self._note(told, inputs["share"], training=margin.requires_grad)
        return (loss, {}) if return_outputs else loss

    def _token_scores(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """(2B, T - 1) log-likelihoods of the replies' tokens, and 0 elsewhere."""
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels_of(inputs),
            use_cache=False,
        )
        scores: Tensor = output.logits
        return scores

    def _own_loss(
        self,
        margin: Tensor,
        rewards: tuple[Tensor, Tensor],
        mask: Tensor,
        inputs: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses, and what else of each pair to note."""
        weight, smoothing = inputs["weight"], inputs["smoothing"]
        if self.consistency is None:
            return preference_loss(margin, weight, smoothing), {}
        chosen, rejected = mask.sum(dim=1).chunk(2)
        per_token = (rewards[0] / chosen - rewards[1] / rejected) / self.beta
        implicit = self.consistency.sharpness * per_token
        loss, agreed = consistency_loss(margin, implicit, weight, smoothing, self.consistency)
        return loss, {"agreement": agreed}

    def _summed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(2B,) log-likelihoods; what one reply of a pair has more counts `ld_alpha` times."""
        if self.ld_alpha is None:
            return tokens.sum(dim=1)
        shared = torch.cat([torch.minimum(*mask.sum(dim=1).chunk(2))] * 2)
        tail = mask.cumsum(dim=1) > shared.unsqueeze(1)
        return torch.where(tail, self.ld_alpha * tokens, tokens).sum(dim=1)

    def _note(self, values: dict[str, Tensor], share: Tensor, *, training: bool) -> None:
        """Log the mean of each value over the step's pairs, those of all processes."""
        table = torch.stack([value.detach().float() for value in values.values()])
        means = self.accelerator.reduce(table @ share.float(), "mean")
        metrics = self._metrics["train" if training else "eval"]
        for key, mean in zip(values, means.tolist(), strict=True):
            metrics[key].append(mean)


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
        reference: The stack of DPO's reference model.
        pairs: Pairs that fit the window.
        consistency: Terms that pull the implicit reward towards the judge's preference, which is
            1 - smoothing of each pair.
        checkpoints: Where it is kept while it goes on; None: nowhere.

    Returns:
        The trained delta, and the facts of the training: `step0_loss`, `step0_margin`, steps, the
        first step's loss, and loss, reward accuracy and margin of the last quarter of the steps.

    Raises:
        ProofError: Before the first step the reference slot does not reproduce the reference
            stack (the loss is not ln 2 or the reward margin not 0 on it), or log-likelihoods are
            not the model's own; or training touched the anchor, or left the delta as it was.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    dataset = Dataset.from_list(
        [
            {
                "prompt_ids": list(pair.prompt_ids),
                "chosen_ids": list(pair.chosen_ids),
                "rejected_ids": list(pair.rejected_ids),
                "weight": pair.weight,
                "smoothing": pair.smoothing + (1 - 2 * pair.smoothing) * dpo.label_smoothing,
            }
            for pair in pairs
        ]
    )
    arguments = common_arguments(dpo, base, n_examples=len(pairs), scratch=scratch, seed=seed)
    stack = [*anchor, delta]
    start = sum(adapter.rank for adapter in anchor)
    slot.load(reference, train=True)
    listener = Listener(on_step)
    try:
        with one_adapter_in_training(slot.model), slot.training_only(start, delta):
            trainer = _PairTrainer(
                model=slot.model,
                args=one_device(
                    DPOConfig(
                        **arguments,
                        router_aux_loss_coef=NO_ROUTER_LOSS,
                        beta=dpo.beta,
                        ld_alpha=dpo.ld_alpha,
                        max_length=None,  # length is our caller's affair: nothing is cut here
                    )
                ),
                train_dataset=dataset,
                processing_class=base.tokenizer,
                callbacks=[listener],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.carry_columns()
            trainer.consistency, trainer.nll_weight = consistency, dpo.nll_weight
            trainer.deal = deal_of(dpo, len(pairs))
            trainer.tokens = [len(pair.chosen_ids) for pair in pairs]
            if slot.sharded:
                share_adapters(trainer)
            slot.to_float32()  # before the trainer wraps it
            scores = TargetTokens(slot.model, [*pairs[0].prompt_ids, *pairs[0].chosen_ids])
            proof = _DpoProof(trainer, slot, scores, base.dtype, reference=reference, stack=stack)
            trainer.add_callback(proof)
            with scores.answering():
                run_training(
                    trainer,
                    dpo,
                    None
                    if checkpoints is None
                    else checkpoints.keep(
                        base,
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
        **({"agreement": late_mean(rows, "agreement")} if consistency is not None else {}),
    }


class _DpoProof(TrainerCallback):
    """Before the first step, shows that the reference is the intended stack, and the loss DPO's.

    With the reference stack in the slot too, loss and margin through the code that trains must be
    what they are for a model compared with itself: ln 2 and 0. That holds for any log-likelihoods,
    so these are held against the model's own. Then the slot gets what is to train.
    """

    def __init__(
        self,
        trainer: Any,
        slot: Slot,
        scores: TargetTokens,
        dtype: torch.dtype,
        *,
        reference: Sequence[Adapter],
        stack: Sequence[Adapter],
    ) -> None:
        self._trainer, self._slot = trainer, slot
        self._scores, self._dtype = scores, dtype
        self._reference, self._stack = reference, stack
        self.facts: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # TRL casts a quantized base's adapters to bf16, where small updates vanish, and copied
        # them before. Both copies are written anew, in float32.
        self._slot.load(self._reference, adapter=_REFERENCE, dtype=torch.float32)
        self._slot.load(self._reference, train=True)
        loss, margin, nll, own = self._compare()
        # Asked so that NaN, which is above nothing, is refused too.
        if not (abs(loss - LN2) <= PROOF_TOLERANCE and abs(margin) <= 2 * PROOF_TOLERANCE):
            raise ProofError(
                f"before the first step DPO's loss is {loss:.6f} (must be ln 2 = {LN2:.6f}) and "
                f"the reward margin {margin:.6f} (must be 0): {_cause(loss, margin)}"
            )
        prove_own(nll, own, self._dtype, what="what is learned of the replies")
        self.facts = {"step0_loss": loss, "step0_margin": margin}
        self._slot.load(self._stack, train=True)
        self._trainer.model.train()

    def _compare(self) -> tuple[float, float, float, float]:
        """Loss, margin, and nats a token of the replies: of the loss, and the model's own."""
        trainer = self._trainer
        trained = trainer.nll_weight, trainer.consistency
        trainer.nll_weight, trainer.consistency = 0.0, None
        trainer.model.eval()
        step = range(min(len(trainer.train_dataset), 8))
        loss, nll, own, counted = 0.0, 0.0, 0.0, 0
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for made in trainer.batches_of(step):
                batch = trainer._prepare_inputs(made)
                batch["weight"], batch["smoothing"] = torch.ones_like(batch["weight"]), 0.0
                loss += float(trainer.compute_loss(trainer.model_wrapped, batch))
                labels = labels_of(batch)
                nll -= float(trainer._token_scores(trainer.model_wrapped, batch).sum())
                own -= self._scores.own(trainer.model_wrapped, batch, labels)
                counted += int((labels != IGNORED).sum())
        margin = sum(trainer._metrics["eval"]["rewards/margins"])
        trainer._metrics["eval"].clear()
        trainer.nll_weight, trainer.consistency = trained
        return loss, margin, nll / counted, own / counted


def _cause(loss: float, margin: float) -> str:
    if not math.isfinite(loss + margin):
        return "the model's likelihoods are no numbers"
    if abs(margin) <= 2 * PROOF_TOLERANCE:
        return "the reference is the policy, as it must be, but something is added to DPO's loss"
    return "the reference is not the intended stack"


def labels_of(inputs: dict[str, Any]) -> Tensor:
    """(2B, T) ids of the replies, and `IGNORED` elsewhere."""
    ids: Tensor = inputs["input_ids"]
    return ids.masked_fill(inputs["completion_mask"] == 0, IGNORED)
