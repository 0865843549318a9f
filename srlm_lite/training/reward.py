"""A reward model in the slot: one more adapter and a scalar head on the base that is there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_callback import TrainerCallback

from srlm_lite.errors import ProofError, UserError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.renamed import checkpointing_name
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Optim
from srlm_lite.training.arguments import (
    Listener,
    OnStep,
    common_arguments,
    late_mean,
    one_adapter_in_training,
    run_training,
)
from srlm_lite.training.checkpoint import Checkpoints
from srlm_lite.training.dpo import PairExample, distinct_texts
from srlm_lite.training.sft import Example
from srlm_lite.training.steps import PROVEN, Batch, Shares, StepTrainer
from srlm_lite.training.tokens import Scored
from srlm_lite.training.trees import Forest

_HEAD = "score.weight"


@dataclass(frozen=True, slots=True)
class RewardModel:
    """What the reward model adds to the anchor: an adapter, and a head of shape (1, hidden).

    The reward of a reply is the head's product with the last hidden state of its last token, after
    the final norm.
    """

    adapter: Adapter
    head: Tensor

    def save(self, adapter: Path, head: Path, *, base_name: str) -> None:
        """Write both; the head last."""
        self.adapter.save(adapter, base_name=base_name)
        temporary = head.with_name(f".{head.name}.tmp")
        save_file({_HEAD: self.head.contiguous()}, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
        temporary.replace(head)

    @classmethod
    def load(cls, adapter: Path, head: Path) -> RewardModel:
        """Read what `save` has written.

        Raises:
            UserError: A file is missing or damaged.
        """
        found = Adapter.load(adapter)
        try:
            return cls(found, load_file(head)[_HEAD])
        except (OSError, KeyError, ValueError) as error:
            raise UserError("no head of a reward model", where=str(head)) from error


class Scorer(nn.Module):
    """The slot's model with a head in place of its output layer; the weights are the same ones.

    Args:
        head: Shape (1, hidden), float32.
    """

    def __init__(self, slot: Slot, head: Tensor) -> None:
        super().__init__()
        model: Any = slot.model.get_base_model()
        self.backbone: Any = model.base_model  # without the output layer; adapters are inside
        self.config = copy.deepcopy(model.config)
        self.config.num_labels = 1
        device = next(model.parameters()).device
        self.head = nn.Parameter(head.to(device, torch.float32).clone())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        use_cache: bool = False,
        position_ids: Tensor | None = None,
        scored: Scored | None = None,
    ) -> SequenceClassifierOutput:
        """Rewards as logits of shape (B, 1), from sequences padded on the right.

        Or, of shape (N,), those of the texts that end at the places that are given.
        """
        told = {} if position_ids is None else {"position_ids": position_ids}
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **told
        ).last_hidden_state
        if scored is not None:
            rows, columns, _ = scored
            rewards = (states[rows, columns].float() * self.head).sum(dim=1)
            return SequenceClassifierOutput(logits=rewards)
        last = attention_mask.sum(dim=1) - 1
        final = states[torch.arange(len(states), device=states.device), last]
        # A product and a sum stay in float32 where autocast would make a matrix product bfloat16.
        rewards = (final.float() * self.head).sum(dim=1, keepdim=True)
        return SequenceClassifierOutput(logits=rewards)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Asked for by Trainer."""
        getattr(self.backbone, checkpointing_name(self.backbone, "{}_enable"))(**settings)
        self.backbone.enable_input_require_grads()  # the embeddings are frozen

    activation_checkpointing_enable = gradient_checkpointing_enable


class RewardTrainer(StepTrainer):
    """Learns which reply of a pair is better; the loss is the mean over the step's pairs."""

    def loss(
        self, model: Any, batch: Batch, examples: Sequence[int], shares: Shares
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-log sigmoid of the margins, and what of them to note."""
        place_of = {text: i for i, text in enumerate(batch.texts)}
        rewards = self.scores(model, batch)
        chosen, rejected = (
            rewards[[place_of[self.examples[one][side]] for one in examples]] for side in (0, 1)
        )
        margin = chosen - rejected
        told = {"accuracy": (margin > 0).float(), "margin": margin}
        return -(shares.example * F.logsigmoid(margin)).sum(), told


def train_reward(
    slot: Slot,
    base: LoadedBase,
    *,
    anchor: Sequence[Adapter],
    adapter: Adapter,
    pairs: Sequence[PairExample],
    optim: Optim,
    scratch: Path,
    seed: int,
    on_step: OnStep = lambda step, steps, logs: None,
    checkpoints: Checkpoints | None = None,
) -> tuple[RewardModel, dict[str, float]]:
    """Train a reward model on pairs: the loss is -log sigmoid(r(chosen) - r(rejected)).

    The head starts at zero, so that before the first step the loss is ln 2.

    Args:
        anchor: The frozen part of the stack below the adapter.
        adapter: Where training starts.
        pairs: Pairs that fit the window.
        checkpoints: Where it is kept while it goes on; None: nowhere.

    Returns:
        The reward model, and the facts of the training: steps, the first step's loss, and loss,
        accuracy and margin of the last quarter of the steps.

    Raises:
        ProofError: Training touched the anchor, or changed nothing.

    Source: the Bradley-Terry model, as in Ouyang et al. 2022, arXiv:2203.02155, Eq. 1.
    """
    texts, examples = distinct_texts(pairs)
    start = sum(each.rank for each in anchor)
    slot.load([*anchor, adapter], train=True)
    scorer: Any = Scorer(slot, torch.zeros(1, slot.model.config.hidden_size))
    listener = Listener(on_step)
    with one_adapter_in_training(slot.model), slot.training_only(start, adapter):
        trainer = RewardTrainer(
            slot,
            base,
            Forest(list(texts), scored=False),
            examples,
            tokens=[1] * len(pairs),  # no mean is over tokens
            optim=optim,
            arguments=common_arguments(
                optim, base, n_examples=len(pairs), scratch=scratch, seed=seed
            ),
            callbacks=[listener],
            model=scorer,
        )
        trainer.add_callback(_RewardProof(trainer))
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
                examples=pairs,
                adapters=(*anchor, adapter),
            ),
        )
        trained = slot.read(start, adapter.rank, list(adapter.factors))
        slot.assert_unchanged(anchor)
    if not trained.differs_from(adapter):
        raise ProofError("the reward model's training changed nothing")
    rows = listener.rows
    return RewardModel(trained, scorer.head.detach().float().cpu()), {
        "steps": len(rows),
        "first_loss": rows[0]["loss"],
        "last_loss": late_mean(rows, "loss"),
        "accuracy": late_mean(rows, "accuracy"),
        "margin": late_mean(rows, "margin"),
        **trainer.facts,
    }


class _RewardProof(TrainerCallback):
    """Before the first step, shows that rewards of texts in trees are those of texts by themselves.

    With a head of equal weights, since one of zeros makes any two models agree.
    """

    def __init__(self, trainer: RewardTrainer) -> None:
        self._trainer = trainer

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        scorer: Any = trainer.model
        scorer.eval()
        head = scorer.head.data
        scorer.head.data = torch.full_like(head, head.numel() ** -0.5)
        first = trainer.texts_of(range(min(len(trainer.examples), PROVEN // 2)))
        own = []
        for text in first:
            prompt, target = trainer.forest.text(text)
            ids = torch.tensor([[*prompt, *target]], device=head.device)
            logits = trainer.model_wrapped(ids, torch.ones_like(ids)).logits
            own.append(float(logits[0, 0]))
        trainer.read_as_trees(first, own)
        scorer.head.data = head
        scorer.train()


@torch.inference_mode()
def rewards(
    scorer: Scorer, examples: Sequence[Example], *, pad_id: int, batch_rows: int
) -> list[float]:
    """The reward of each target after its prompt, by whatever adapter is active in the model."""
    found = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i))
    device = scorer.head.device
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        width = len(examples[batch[0]])
        ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            whole = [*examples[i].prompt_ids, *examples[i].target_ids]
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
        values = scorer(ids.to(device), mask.to(device)).logits[:, 0]
        for i, value in zip(batch, values.tolist(), strict=True):
            found[i] = value
    return found


def reward_replies(
    slot: Slot,
    base: LoadedBase,
    anchor: Sequence[Adapter],
    model: RewardModel,
    examples: Sequence[Example],
    *,
    batch_rows: int,
    on_rows: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Rewards by a reward model that is put into the slot for it."""
    slot.load([*anchor, model.adapter])
    scorer = Scorer(slot, model.head)
    return rewards(
        scorer, examples, pad_id=int(base.tokenizer.pad_token_id or 0), batch_rows=batch_rows
    )
