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
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import selective_log_softmax

from srlm_lite.config import Dpo, Scir
from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.training.arguments import (
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
from srlm_lite.training.dealing import Deal, dealt_loader

LN2 = math.log(2)
PROOF_TOLERANCE = 1e-3
"""Nats by which the loss before the first step may miss ln 2."""

_COLUMNS = ("weight", "smoothing", "share", "nll_share")
"""Of a pair, beside its ids; the last two where several processes share a step."""

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
    margin: Tensor, implicit: Tensor, weight: Tensor, smoothing: Tensor, scir: Scir
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
    # Before anything is learned the implicit reward has no opinion: rounding is none either.
    mask = ((implicit.detach() > -1e-4) & (1 - smoothing > scir.threshold)).to(margin.dtype)
    log_p, log_not_p = p.log(), (1 - p).log()
    divergence = (p - q) * (log_p - log_q) + (q - p) * (log_not_p - log_not_q)
    entropy = -(p * log_p + (1 - p) * log_not_p) - (q * log_q + (1 - q) * log_not_q)
    loss = mask * -F.logsigmoid(margin)
    loss = loss + scir.consistency_weight * divergence + scir.confidence_weight * entropy
    return weight * loss, mask


class _PairTrainer(DPOTrainer):
    """TRL's trainer on pairs that are ids already: rendered once, by the code that sampled them.

    Where a pair has a weight or smoothing, which TRL's sigmoid loss does not know, or where several
    processes share a step, the loss is `preference_loss` or `consistency_loss` on the same
    log-ratios; else it is TRL's own.
    """

    uses_own_loss = False
    consistency: Scir | None = None
    deal: Deal | None = None

    def get_train_dataloader(self) -> Any:
        if self.deal is None or self.deal.at.world == 1:
            return super().get_train_dataloader()
        return dealt_loader(self, self.deal)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def collate_with_columns(self) -> None:
        """Let batches carry the columns that TRL's collator leaves behind."""
        trl_collator = self.data_collator

        def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
            there = [key for key in _COLUMNS if key in examples[0]]
            columns = {key: torch.tensor([e[key] for e in examples]) for key in there}
            return {**trl_collator(examples), **columns}

        self.data_collator = collate

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        pairs = {key: value for key, value in inputs.items() if key not in _COLUMNS}
        if not self.uses_own_loss:
            return super()._compute_loss(model, pairs, return_outputs)  # type: ignore[no-untyped-call]
        mask = pairs["completion_mask"][..., 1:]
        output = model(
            input_ids=pairs["input_ids"], attention_mask=pairs["attention_mask"], use_cache=False
        )
        tokens = selective_log_softmax(
            output.logits[..., :-1, :], pairs["input_ids"][..., 1:], row_mask=mask
        )
        chosen, rejected = self._summed(tokens, mask).chunk(2)
        ref_chosen, ref_rejected = self.compute_ref_log_probs(model, pairs)  # type: ignore[no-untyped-call]
        rewards = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        margin = rewards[0] - rewards[1]
        losses, told = self._own_loss(margin, rewards, mask, inputs)
        loss = losses.mean() if "share" not in inputs else (inputs["share"] * losses).sum()
        if "sft" in self.loss_types:
            own, own_mask = tokens.chunk(2)[0], mask.chunk(2)[0]
            nll = -own.sum() / own_mask.sum()
            if "nll_share" in inputs:
                nll = -(inputs["nll_share"] * own.sum(dim=1)).sum()
            loss = loss + self.loss_weights[self.loss_types.index("sft")] * nll
        told |= {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        self._note(told, inputs.get("share"), training=margin.requires_grad)
        return (loss, output) if return_outputs else loss

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

    def _note(self, values: dict[str, Tensor], share: Tensor | None, *, training: bool) -> None:
        """Log the mean of each value over the pairs, those of all processes."""
        table = torch.stack([value.detach().float() for value in values.values()])
        if share is None:
            means = table.mean(dim=1)
        else:
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
    consistency: Scir | None = None,
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
        consistency: Terms that pull the implicit reward towards the judge's preference, which is
            1 - smoothing of each pair.

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
                "weight": pair.weight,
                "smoothing": pair.smoothing + (1 - 2 * pair.smoothing) * dpo.label_smoothing,
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
            trainer = _PairTrainer(
                model=slot.model,
                args=one_device(
                    DPOConfig(
                        **arguments,
                        **loss,
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
            trainer.collate_with_columns()
            trainer.consistency = consistency
            trainer.deal = deal_of(dpo, len(pairs))
            if slot.sharded:
                share_adapters(trainer)
            trainer.uses_own_loss = (
                consistency is not None
                or trainer.deal.at.world > 1
                or any(row["weight"] != 1 or row["smoothing"] != 0 for row in dataset)
            )
            slot.to_float32()  # before the trainer wraps it
            proof = _Proof(trainer, slot, reference=reference, stack=stack)
            trainer.add_callback(proof)
            run_training(trainer, dpo)
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
        # Asked so that NaN, which is above nothing, is refused too.
        if not (abs(loss - LN2) <= PROOF_TOLERANCE and abs(margin) <= 2 * PROOF_TOLERANCE):
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
        kinds, weights, own = trainer.loss_types, trainer.loss_weights, trainer.uses_own_loss
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
        trainer.uses_own_loss = False  # TRL's own, and unweighted
        trainer.model.eval()
        count, losses, margins = min(len(pairs), 8), 0.0, 0.0
        # No more at once than training holds: the logits of all of them may be too much.
        micro_batch = trainer.args.per_device_train_batch_size
        for start in range(0, count, micro_batch):
            rows = [pairs[i] for i in range(start, min(start + micro_batch, count))]
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            with torch.no_grad(), trainer.compute_loss_context_manager():
                losses += len(rows) * float(trainer.compute_loss(trainer.model_wrapped, batch))
            margins += len(rows) * float(trainer._metrics["eval"]["rewards/margins"][-1])
        loss, margin = losses / count, margins / count
        trainer._metrics["eval"].clear()
        trainer.loss_types, trainer.loss_weights, trainer.uses_own_loss = kinds, weights, own
        return loss, margin
