"""DPO on a delta in the slot, with the proof that policy and reference start as the same model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
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
from srlm_lite.settings import Consistency, Dpo, LossName
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


def distinct_texts(pairs: Sequence[PairExample]) -> tuple[dict[Text, int], list[tuple[int, int]]]:
    """Each text of some pairs once, with its number, and of each pair those of chosen and rejected.

    A reply in several pairs of a prompt is computed once.
    """
    texts: dict[Text, int] = {}
    for pair in pairs:
        for reply in (pair.chosen_ids, pair.rejected_ids):
            texts.setdefault((pair.prompt_ids, reply), len(texts))
    examples = [
        (texts[pair.prompt_ids, pair.chosen_ids], texts[pair.prompt_ids, pair.rejected_ids])
        for pair in pairs
    ]
    return texts, examples


def sigmoid_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(r_w - r_l): DPO; of rewards per token its length-normalised form.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; per token, Lambert et al. 2024 (Tulu 3),
    arXiv:2411.15124, section 5.
    """
    return -F.logsigmoid(chosen - rejected)


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """((r_w - r_l) / beta - 1 / (2 beta))^2: the log-ratios are to differ by 1 / (2 beta).

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17, with tau = beta; per token as in TRL, whose
    comment says that its authors had it so.
    """
    return ((chosen - rejected) / beta - 1 / (2 * beta)).square()


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l): for chosen replies that are better than the model's.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7, and 1 more, as in TRL.
    """
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l): for chosen replies that are worse than the model's.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8, and 1 more, as in TRL.
    """
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(r_w - r_l - gamma), of rewards per token without a reference.

    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    return -F.logsigmoid(chosen - rejected - gamma)


def no_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """0: what is learned is the likelihood of the chosen reply alone, as a term of its own."""
    return 0.0 * (chosen + rejected)


@dataclass(frozen=True, slots=True)
class PairLoss:
    """What is minimised of a pair, as a function of its two rewards.

    A reward is beta times a reply's log-ratio to the reference, or its log-likelihood where there
    is none. All are (B,).
    """

    of: Callable[[Tensor, Tensor, float, float], Tensor]
    """Takes the chosen and the rejected reward, beta, and the gamma that SimPO has."""
    per_token: bool = False
    """Whether rewards are divided by the number of a reply's tokens."""
    has_reference: bool = True


LOSSES: dict[LossName, PairLoss] = {
    "sigmoid": PairLoss(sigmoid_loss),
    "sigmoid_norm": PairLoss(sigmoid_loss, per_token=True),
    "ipo": PairLoss(ipo_loss, per_token=True),
    "apo_zero": PairLoss(apo_zero_loss),
    "apo_down": PairLoss(apo_down_loss),
    "simpo": PairLoss(simpo_loss, per_token=True, has_reference=False),
    "sft": PairLoss(no_loss),
}


def preference_loss(
    rewards: tuple[Tensor, Tensor],
    weight: Tensor,
    smoothing: Tensor,
    *,
    loss: PairLoss = LOSSES["sigmoid"],
    beta: float = 0.1,
    gamma: float = 0.0,
) -> Tensor:
    """w [(1 - s) L(w, l) + s L(l, w)], for each pair; all of shape (B,).

    With s = 1 - C this is CREAM's C L(w, l) + (1 - C) L(l, w), with one s for all conservative
    DPO.

    Args:
        rewards: Of the chosen and of the rejected replies.

    Source: Wang et al. 2024, arXiv:2410.12735.
    """
    chosen, rejected = rewards
    right, turned = (loss.of(*two, beta, gamma) for two in ((chosen, rejected), (rejected, chosen)))
    return weight * ((1 - smoothing) * right + smoothing * turned)


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

    The loss is a mean over the step's pairs, that of the NLL term over the step's chosen tokens;
    in either a pair counts as its weight says.
    """

    pairs: Sequence[PairExample]
    pair_loss = LOSSES["sigmoid"]
    gamma = 0.0
    beta = 0.1
    ld_alpha: float | None = None
    label_smoothing = 0.0
    consistency: Consistency | None = None
    nll_weight = 0.0
    reference: list[Tensor]
    """By text, the log-likelihoods of its tokens by the reference; zeros where it has none."""

    def loss(
        self, model: Any, batch: Batch, examples: Sequence[int], shares: Shares
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What these pairs add to the step's loss, and the figures of each."""
        scores = self.scores(model, batch)
        reference = torch.cat([self.reference[text] for text in batch.texts]).to(scores)
        chosen, rejected = self._summed(scores, batch, examples)
        ref_chosen, ref_rejected = self._summed(reference, batch, examples)
        rewards = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        losses, told = self._own_loss(rewards, examples)
        if not self.pair_loss.has_reference:  # TRL logs SimPO's per token too
            rewards = self._per_token(rewards, examples)
        margin = rewards[0] - rewards[1]
        loss = (shares.example * losses).sum()
        if self.nll_weight:
            place_of = {text: i for i, text in enumerate(batch.texts)}
            sums = batch.summed(scores)
            of_chosen = sums[[place_of[self.examples[one][0]] for one in examples]]
            weight = of_chosen.new_tensor([self.pairs[one].weight for one in examples])
            loss = loss - self.nll_weight * shares.token * (weight * of_chosen).sum()
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

    def _per_token(
        self, rewards: tuple[Tensor, Tensor], examples: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        chosen, rejected = (
            reward.new_tensor([self.forest.counted(self.examples[one][side]) for one in examples])
            for side, reward in enumerate(rewards)
        )
        return rewards[0] / chosen, rewards[1] / rejected

    def _own_loss(
        self, rewards: tuple[Tensor, Tensor], examples: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses, and what else of each pair to note."""
        pairs = [self.pairs[one] for one in examples]
        of_all, margin = self.label_smoothing, rewards[0] - rewards[1]
        weight = margin.new_tensor([pair.weight for pair in pairs])
        smoothing = margin.new_tensor(
            [pair.smoothing + (1 - 2 * pair.smoothing) * of_all for pair in pairs]
        )
        if self.consistency is None:
            kind = self.pair_loss
            own = self._per_token(rewards, examples) if kind.per_token else rewards
            losses = preference_loss(
                own, weight, smoothing, loss=kind, beta=self.beta, gamma=self.gamma
            )
            return losses, {}
        chosen, rejected = self._per_token(rewards, examples)
        implicit = self.consistency.sharpness * ((chosen - rejected) / self.beta)
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
        The trained delta, and the facts of the training: `step0_loss`, `step0_margin` (less what
        it must be), steps, the first step's loss, and loss, reward accuracy and margin of the last
        quarter of the steps; `packed`, 1 where texts were computed as trees and 0 where they were
        padded, and `tokens_at_once`.

    Raises:
        ProofError: Before the first step the reference's likelihoods are not those of the reference
            stack (DPO's loss is not ln 2, or another's not its own value, or the reward margin not
            0 on it), or log-likelihoods are not the model's own; or training touched the anchor,
            or left the delta as it was.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    texts, examples = distinct_texts(pairs)
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
        trainer.pair_loss, trainer.gamma = LOSSES[dpo.loss], dpo.target_margin
        of_chosen = 1.0 if dpo.loss == "sft" else dpo.nll_weight
        trainer.consistency, trainer.nll_weight = consistency, of_chosen
        scores = TargetTokens(slot.model, [*pairs[0].prompt_ids, *pairs[0].chosen_ids])
        kept = _Kept(scratch / REFERENCE, base, reference, list(texts))
        proof = _DpoProof(trainer, scores, kept, dpo, reference=reference, stack=stack)
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
    """Before the first step, shows that the reference is the intended stack, and the loss its own.

    With the reference stack in the slot, loss and margin through the code that trains, against the
    likelihoods that were kept of the reference, must be what they are for a model compared with
    itself: for DPO ln 2 and 0. That holds for any log-likelihoods, so these are held against the
    model's own, by plain forward passes. A loss without a reference must be what these very
    likelihoods make it. Then the slot gets what is to train.
    """

    def __init__(
        self,
        trainer: PairTrainer,
        scores: TargetTokens,
        kept: _Kept,
        dpo: Dpo,
        *,
        reference: Sequence[Adapter],
        stack: Sequence[Adapter],
    ) -> None:
        self._trainer, self._scores, self._kept, self._dpo = trainer, scores, kept, dpo
        self._reference, self._stack = reference, stack
        self.facts: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.slot.load(self._reference, train=True)
        trainer.model.eval()
        step = trainer.first_step
        some = trainer.parts_of(step)[0][: PROVEN // 2]
        texts = trainer.texts_of(some)
        own = [self._scores.own(trainer.model_wrapped, trainer.forest.text(text)) for text in texts]
        found = trainer.read_as_trees(texts, own)
        sums = [float(tokens.sum()) for tokens in found]

        def compared() -> tuple[float, float]:
            if not trainer.pair_loss.has_reference:
                forest = trainer.forest
                trainer.reference = [torch.zeros(forest.counted(i)) for i in range(len(forest))]
                return self._compare(some)
            trainer.reference = trainer.of_reference(self._kept.load(), texts, sums, step)
            return self._compare(trainer.parts_of(step)[0])

        loss, margin = trainer.within_memory(step, compared)
        must = self._must_be(some, dict(zip(texts, sums, strict=True)))
        off = loss - must[0], margin - must[1]
        # Asked so that NaN, which is above nothing, is refused too.
        near = PROOF_TOLERANCE * max(1.0, must[0])
        if not (abs(off[0]) <= near and abs(off[1]) <= 2 * PROOF_TOLERANCE):
            value = "ln 2 = " if self._dpo.loss_of_equals == LN2 else ""
            raise ProofError(
                f"before the first step {self._name} loss is {loss:.6f} (must be {value}"
                f"{must[0]:.6f}) and the reward margin {margin:.6f} (must be {must[1]:.6g}): "
                f"{self._cause(*off)}"
            )
        counted = sum(map(len, found))
        what = "what is learned of the replies"
        nll, of_model = -sum(sums) / counted, -sum(own) / counted
        prove_own(nll, of_model, trainer.base.dtype, what=what)
        if trainer.pair_loss.has_reference:
            self._kept.save(trainer.reference)
        self.facts = {"step0_loss": loss, "step0_margin": off[1]}
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

    def _must_be(self, pairs: Sequence[int], sums: Mapping[int, float]) -> tuple[float, float]:
        """The mean loss and margin of these pairs where the policy is the reference; where there
        is none, by the likelihoods of their texts."""
        trainer, dpo = self._trainer, self._dpo
        if trainer.pair_loss.has_reference:
            return dpo.loss_of_equals or 0.0, 0.0
        sides = [trainer.examples[one] for one in pairs]
        chosen, rejected = (
            torch.tensor(
                [dpo.beta * sums[two[side]] / trainer.forest.counted(two[side]) for two in sides]
            )
            for side in (0, 1)
        )
        losses = trainer.pair_loss.of(chosen, rejected, dpo.beta, dpo.target_margin)
        return float(losses.mean()), float((chosen - rejected).mean())

    @property
    def _name(self) -> str:
        return "DPO's" if self._dpo.loss == "sigmoid" else f"the {self._dpo.loss}"

    def _cause(self, loss: float, margin: float) -> str:
        """Why they are off by so much."""
        if not math.isfinite(loss + margin):
            return "the model's likelihoods are no numbers"
        if not self._trainer.pair_loss.has_reference:
            return "it is not what the model's likelihoods make it"
        if abs(margin) <= 2 * PROOF_TOLERANCE:
            return (
                f"the reference is the policy, as it must be, but something is added to "
                f"{self._name} loss"
            )
        return "the reference is not the intended stack"
