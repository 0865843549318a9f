"""On-policy training of a delta against a frozen reward model, with the proofs of DPO's.

RLOO and not GRPO: TRL has both. RLOO's divergence is part of the reward of the whole reply, as in
RLHF's objective, and its baseline is the mean of the other replies to the prompt; GRPO divides by
the deviation within a prompt, which gives small differences between rewards the weight of large
ones, and that is where a learned reward model errs most.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import use_adapter

from srlm_lite.errors import ProofError, UserError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Dpo, Rollout
from srlm_lite.training.arguments import (
    NO_ROUTER_LOSS,
    Listener,
    OnStep,
    batches_of_trl,
    common_arguments,
    early_mean,
    late_mean,
    one_adapter_in_training,
    one_device,
    run_training,
)
from srlm_lite.training.checkpoint import Checkpoints, Resumable, digest
from srlm_lite.training.reward import RewardModel, Scorer, rewards
from srlm_lite.training.sft import Example

PROOF_TOLERANCE = 1e-3
"""Nats a token by which policy and reference may differ before the first step."""

# It prints every reply without a reward; we count them.
logging.getLogger("trl.trainer.rloo_trainer").setLevel(logging.ERROR)

_REFERENCE = "ref"  # TRL's name for the copy it takes of the adapter
_REWARD = "reward"


@dataclass(frozen=True, slots=True)
class DrawnReply:
    """A reply that was drawn in training: its step (from 0), prompt and ids, and its reward.

    `reply_ids` end before the stop token. `reward` is None where the reply ran into the limit.
    """

    step: int
    prompt: int
    reply_ids: tuple[int, ...]
    finished: bool
    reward: float | None


class _PolicyTrainer(Resumable, RLOOTrainer):
    """TRL's trainer on prompts that are ids already, with every id that ends a reply as an end."""

    stop_ids: tuple[int, ...] = ()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self.epochs_done):
            next(iter(sampler))  # each pass draws the order of the next one
        return sampler

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[Any], None, dict[str, Any]]:
        return prompts, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        replies = super()._generate_single_turn(*args, **kwargs)  # type: ignore[no-untyped-call]
        return [self._ended(list(reply)) for reply in replies]

    def _ended(self, reply: list[int]) -> list[int]:
        """Up to and including the first end; TRL knows the tokenizer's alone."""
        end = next((at for at, token in enumerate(reply) if token in self.stop_ids), len(reply))
        return reply[: end + 1]


class _Reward:
    """TRL's reward function: what the frozen reward model gives, and a record of it.

    Args:
        drop_truncated: A reply that ran into the limit has no reward; it neither teaches nor
            counts in a baseline. Nor has one whose thought never closes.

    The reward model sees the answer alone, as in the pairs that it has learned from.
    """

    __name__ = "reward_model"

    def __init__(
        self,
        slot: Slot,
        scorer: Scorer,
        chat: ChatFormat,
        *,
        drop_truncated: bool,
        batch_rows: int,
    ) -> None:
        self._slot, self._scorer, self._chat = slot, scorer, chat
        self._drop_truncated, self._batch_rows = drop_truncated, batch_rows
        self.drawn: list[DrawnReply] = []

    def __call__(
        self,
        *,
        prompts: list[list[int]],
        completion_ids: list[list[int]],
        number: list[int],
        trainer_state: Any,
        **others: Any,
    ) -> list[float | None]:
        shown = [self._shown(reply) for reply in completion_ids]
        examples = [
            Example(tuple(prompt), reply) for prompt, (reply, _) in zip(prompts, shown, strict=True)
        ]
        with use_adapter(self._slot.model, _REWARD):
            values = rewards(
                self._scorer, examples, pad_id=self._chat.pad_id, batch_rows=self._batch_rows
            )
        found: list[float | None] = []
        for place, reply, (_, finished), value in zip(
            number, completion_ids, shown, values, strict=True
        ):
            found.append(value if finished or not self._drop_truncated else None)
            ids = tuple(reply[:-1] if reply[-1] in self._chat.stop_ids else reply)
            self.drawn.append(
                DrawnReply(trainer_state.global_step, place, ids, finished, found[-1])
            )
        return found

    def _shown(self, reply: list[int]) -> tuple[tuple[int, ...], bool]:
        """What of a reply the reward model sees, and whether the reply came to its end."""
        ended = reply[-1] in self._chat.stop_ids
        if not self._chat.thinks:
            return tuple(reply), ended
        answer = self._chat.split(self._chat.decode(reply)).answer
        ids = self._chat.target_ids(answer or "")
        return tuple(ids if ended else ids[:-1]), ended and answer is not None


def answers_of_epoch(n_prompts: int, optim: Dpo, rollout: Rollout) -> int:
    """Replies that are drawn in an epoch: TRL leaves out the prompts that do not fill a step."""
    return n_prompts * rollout.n // optim.batch_size * optim.batch_size


def train_rloo(
    slot: Slot,
    base: LoadedBase,
    chat: ChatFormat,
    *,
    anchor: Sequence[Adapter],
    delta: Adapter,
    reference: Sequence[Adapter],
    reward: RewardModel,
    prompts: Sequence[Sequence[int]],
    optim: Dpo,
    rollout: Rollout,
    kl_weight: float,
    drop_truncated: bool,
    scratch: Path,
    seed: int,
    thought_tokens: int = 0,
    on_step: OnStep = lambda step, steps, logs: None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Adapter, list[DrawnReply], dict[str, float]]:
    """Train a delta on top of a frozen anchor, on replies that it draws itself.

    Each step draws `optim.batch_size` replies, `rollout.n` to a prompt. The advantage of a reply is
    its reward, less `kl_weight` times its log-ratio to the reference, less the mean of that over
    the other replies to its prompt.

    Args:
        anchor: The part of the stack below the delta; the reward model's adapter stands on it too.
        delta: Where training starts.
        reference: The stack that the divergence is taken from.
        prompts: Ids; there are enough to fill a step.
        drop_truncated: Replies that ran into the limit have no reward.
        thought_tokens: What a reply may have beyond `rollout.max_new_tokens`, for its thought.
        optim: The section `dpo`: optimiser, steps and batches. An epoch is a pass over the prompts,
            less those that do not fill a step.
        checkpoints: Where it is kept while it goes on; None: nowhere.

    Returns:
        The trained delta; all replies that were drawn, in order; and the facts of the training:
        `step0_kl`, steps, the reward of the first and the last quarter of the steps, and of the
        last the divergence (nats a token) and the share of replies that ran into the limit.

    Raises:
        UserError: No reply had a reward.
        ProofError: Before the first step the reference slot does not reproduce the reference stack;
            or training touched the anchor or the reward model, or left the delta as it was.

    Source: Ahmadian et al. 2024, arXiv:2402.14740; RLHF as in Ouyang et al. 2022,
    arXiv:2203.02155, whose PPO has left TRL.
    """
    dataset = Dataset.from_list(
        [{"prompt": list(ids), "number": number} for number, ids in enumerate(prompts)]
    )
    answers = answers_of_epoch(len(prompts), optim, rollout)
    arguments = common_arguments(optim, base, n_examples=answers, scratch=scratch, seed=seed)
    arguments |= batches_of_trl(optim, answers)
    stack = [*anchor, delta]
    start = sum(adapter.rank for adapter in anchor)
    slot.load(reference, train=True)
    listener = Listener(on_step)
    try:
        with (
            slot.beside(_REWARD, [*anchor, reward.adapter]),
            one_adapter_in_training(slot.model),
            slot.training_only(start, delta),
        ):
            judge = _Reward(
                slot,
                Scorer(slot, reward.head),
                chat,
                drop_truncated=drop_truncated,
                batch_rows=2 * optim.micro_batch_size,
            )
            trainer = _PolicyTrainer(
                model=slot.model,
                reward_funcs=[judge],
                args=one_device(
                    RLOOConfig(
                        **arguments,
                        router_aux_loss_coef=NO_ROUTER_LOSS,
                        beta=kl_weight,
                        num_generations=rollout.n,
                        max_completion_length=rollout.max_new_tokens + thought_tokens,
                        temperature=rollout.temperature,
                        top_p=rollout.top_p,
                        generation_kwargs={"eos_token_id": list(chat.stop_ids)},
                    )
                ),
                train_dataset=dataset,
                processing_class=base.tokenizer,
                callbacks=[listener],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.stop_ids = chat.stop_ids
            proof = _RlooProof(trainer, slot, judge, reference=reference, stack=stack)
            trainer.add_callback(proof)
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
                    more=_Drawing(trainer, judge),
                    examples=prompts,
                    adapters=(*anchor, delta, *reference, reward.adapter),
                    head=digest(reward.head.flatten().tolist()),
                    rollout=rollout.model_dump(mode="json"),
                    kl_weight=kl_weight,
                    drop_truncated=drop_truncated,
                    thought_tokens=thought_tokens,
                ),
            )
            trained = slot.read(start, delta.rank, list(delta.factors))
            slot.assert_unchanged(anchor)
    finally:
        if _REFERENCE in slot.model.peft_config:
            slot.model.delete_adapter(_REFERENCE)
    if all(one.reward is None for one in judge.drawn):
        raise UserError(
            f"all {len(judge.drawn)} replies ran into the token limit, and none has a reward",
            where=f"rollout.max_new_tokens = {rollout.max_new_tokens}",
            way_out="Raise it, or set pairing.drop_truncated=false",
        )
    if not trained.differs_from(delta):
        raise ProofError("RLOO changed nothing: the delta received no gradient")
    rows = listener.rows
    return (
        trained,
        judge.drawn,
        {
            **proof.facts,
            "steps": len(rows),
            "first_reward": early_mean(rows, "reward"),
            "last_reward": late_mean(rows, "reward"),
            "kl": late_mean(rows, "kl"),
            "clipped": late_mean(rows, "completions/clipped_ratio"),
        },
    )


class _Drawing:
    """What a training that draws its own replies has beside its weights."""

    def __init__(self, trainer: Any, judge: _Reward) -> None:
        self._trainer, self._judge = trainer, judge

    def kept(self) -> Any:
        return {"passes": self._trainer._step, "drawn": [asdict(one) for one in self._judge.drawn]}

    def go_on(self, kept: Any) -> None:
        self._trainer._step = kept["passes"]
        self._judge.drawn[:] = [
            DrawnReply(**{**row, "reply_ids": tuple(row["reply_ids"])}) for row in kept["drawn"]
        ]


class _RlooProof(TrainerCallback):
    """Before the first step, shows that TRL's reference is the intended stack.

    With the reference stack in the slot too, the divergence that TRL's own code finds between the
    two on replies it draws must be 0. Then the slot gets what is to train.
    """

    def __init__(
        self,
        trainer: Any,
        slot: Slot,
        judge: _Reward,
        *,
        reference: Sequence[Adapter],
        stack: Sequence[Adapter],
    ) -> None:
        self._trainer, self._slot, self._judge = trainer, slot, judge
        self._reference, self._stack = reference, stack
        self.facts: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # TRL casts a quantized base's adapters to bf16, where small updates vanish, and copied
        # them before. Both copies are written anew, in float32.
        self._slot.load(self._reference, adapter=_REFERENCE, dtype=torch.float32)
        self._slot.load(self._reference, train=True)
        divergence = self._divergence()
        if not divergence <= PROOF_TOLERANCE:
            raise ProofError(
                f"before the first step policy and reference differ by {divergence:.6f} nats a "
                "token on the reference's own replies (must be 0): the reference is not the "
                "intended stack"
            )
        self.facts = {"step0_kl": divergence}
        self._slot.load(self._stack, train=True)
        self._trainer.model.train()

    def _divergence(self) -> float:
        trainer = self._trainer
        rows = [trainer.train_dataset[0]] * trainer.num_generations
        trainer.model.eval()
        batch = trainer._generate_and_score_completions(rows)
        mean = abs(float(trainer._metrics["eval"]["kl"][-1]))
        trainer._metrics["eval"].clear()
        self._judge.drawn.clear()
        # The mean of signed log-ratios could vanish by chance; the advantages tell of each reply.
        worst = self._worst_reply(batch)
        return larger(mean, worst)

    def _worst_reply(self, batch: dict[str, Any]) -> float:
        """The largest log-ratio of a whole reply, a token, through TRL's own code."""
        trainer = self._trainer
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        kept = batch["completion_ids"].size(1)
        with torch.no_grad(), use_adapter(trainer.model, _REFERENCE):
            tokens, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, kept
            )
        lengths = batch["completion_mask"].sum(dim=1).clamp(min=1)
        summed = (tokens * batch["completion_mask"]).sum(dim=1)
        return float(((batch["old_logps"] - summed).abs() / lengths).max())


def larger(a: float, b: float) -> float:
    """The larger of two; NaN where either is, unlike Python's `max`, which depends on the order."""
    return float(torch.tensor([a, b], dtype=torch.float64).max())
