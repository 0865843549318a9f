"""One step of a training: texts in rows, their likelihoods, gradients, whatever fits the memory.

transformers' Trainer has the optimiser, the schedule, the callbacks and the processes. A batch of
it is here a whole step, by the numbers of its examples. It is cut into rows of as many tokens as a
budget allows; where memory does not suffice, the budget is halved, and the step is done anew.

A row is made of trees (`trees.py`), with the attention of trees (`branching.py`). That this gives
the model's own likelihoods is shown before the first step. For a base whose layers cannot attend so
each text is a row, and rows are padded.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from srlm_lite.model.base import LoadedBase
from srlm_lite.model.heap import give_back, is_out_of_memory
from srlm_lite.model.stack import Slot
from srlm_lite.processes import place
from srlm_lite.rollout.tree import may_branch
from srlm_lite.settings import Optim
from srlm_lite.training.arguments import one_device, share_adapters
from srlm_lite.training.branching import Branches
from srlm_lite.training.checkpoint import Resumable
from srlm_lite.training.dealing import Share, StepOrder, cut, deal
from srlm_lite.training.layers import Layers
from srlm_lite.training.sizes import AT_ONCE_ON_A_CPU
from srlm_lite.training.tokens import TOLERANCE, Scored
from srlm_lite.training.trees import Forest, Part

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

PROVEN = 8
"""Texts at most whose likelihoods are held against the model's own before the first step."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts on the device, in trees of one row or padded to rows of their own.

    Args:
        texts: By their numbers in the forest.
        inputs: Of the model.
        scored: Places that are asked for, text by text.
        counts: How many of them each text has.
        parts: Of the row; empty where rows are padded.
        starts: Where each text's tokens are among all, row by row. Of no use where texts share any.
    """

    texts: list[int]
    inputs: dict[str, Tensor]
    scored: Scored
    counts: list[int]
    parts: tuple[Part, ...]
    starts: list[int]

    @property
    def of(self) -> Tensor:
        """(N,) the place in `texts` of the text that each score belongs to."""
        counts = torch.tensor(self.counts, device=self.scored[0].device)
        return torch.arange(len(self.counts), device=counts.device).repeat_interleave(counts)

    def summed(self, scores: Tensor) -> Tensor:
        """(texts,) sums of (N,) scores."""
        sums = torch.zeros(len(self.counts), dtype=scores.dtype, device=scores.device)
        return sums.index_add(0, self.of, scores)


@dataclass(frozen=True, slots=True)
class Shares:
    """By what an example's loss, or that of a token, is multiplied, so that the sum over all parts
    is the step's mean once DDP has divided by the processes; 0 counts nothing."""

    example: float
    token: float


class StepTrainer(Resumable, Trainer):
    """transformers' trainer on steps.

    Args:
        forest: The texts.
        examples: The numbers of each example's texts.
        tokens: What each example has of the tokens that a step's mean is taken over.
        budget: Tokens in memory at once, in a training pass.
    """

    model: Any

    def __init__(
        self,
        slot: Slot,
        base: LoadedBase,
        forest: Forest,
        examples: Sequence[tuple[int, ...]],
        *,
        tokens: Sequence[int],
        optim: Optim,
        arguments: dict[str, Any],
        callbacks: Sequence[TrainerCallback],
        model: Any = None,
    ) -> None:
        super().__init__(
            model=model or slot.model,
            args=one_device(TrainingArguments(**arguments)),
            train_dataset=range(len(examples)),
            data_collator=lambda numbers: {"examples": torch.tensor(numbers)},
            processing_class=base.tokenizer,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self._numbers: Any = range(len(examples))
        self.forest, self.examples, self.counted = forest, examples, tokens
        self.slot, self.base = slot, base
        self.batch_size = optim.batch_size
        self.packs = may_pack(slot)
        """Whether a row holds trees; else each text is a row, and rows are padded."""
        self.budget = budget_of(forest, examples, optim, cpu=base.device.type == "cpu")
        self.branches = Branches()
        self.layers = Layers(slot)
        self.told: dict[str, float] = {}
        self._noted: dict[str, Tensor] = {}
        if slot.sharded:
            share_adapters(self)

    # What a training is, apart from how it is computed.

    def loss(
        self, model: Any, batch: Batch, examples: Sequence[int], shares: Shares
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What these examples add to the step's loss, and what of each of them to note."""
        raise NotImplementedError

    # Rows.

    def tokens_of(self, texts: Sequence[int]) -> int:
        """Tokens in memory for these texts."""
        if self.packs:
            return self.forest.tokens(texts)
        return len(texts) * max(self.forest.tokens([text]) for text in texts)

    def texts_of(self, examples: Sequence[int]) -> list[int]:
        """The texts of examples, each once."""
        return list(dict.fromkeys(text for one in examples for text in self.examples[one]))

    def parts_of(self, step: Sequence[int]) -> list[list[int]]:
        """A step in parts, those of all processes."""
        # Examples of one prompt side by side, in the order in which prompts come up.
        together: dict[tuple[int, ...], list[int]] = {}
        for one in step:
            together.setdefault(self.forest.tree(self.examples[one][0]), []).append(one)
        order = [one for of_prompt in together.values() for one in of_prompt]
        return cut(
            order,
            lambda examples: self.tokens_of(self.texts_of(examples)),
            budget=self.budget,
            least=place().world,
        )

    def batch(self, texts: Sequence[int]) -> Batch:
        """Texts on the device."""
        device, forest = self.args.device, self.forest
        texts = list(texts)

        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        if self.packs:
            row = forest.row(texts)
            ids = tensor([row.ids])
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "position_ids": tensor([row.positions]),
            }
            columns = tensor(row.sources)
            scored = torch.zeros_like(columns), columns, tensor(row.targets)
            return Batch(texts, inputs, scored, row.counts, row.parts, row.places)
        rows = [forest.row([text]) for text in texts]
        width = max(len(row.ids) for row in rows)
        pad = int(self.base.tokenizer.pad_token_id or 0)
        inputs = {
            "input_ids": tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows]),
            "attention_mask": tensor([[i < len(row.ids) for i in range(width)] for row in rows]),
        }
        numbers = tensor([n for n, row in enumerate(rows) for _ in row.sources])
        columns = tensor([place for row in rows for place in row.sources])
        targets = tensor([target for row in rows for target in row.targets])
        counts = [count for row in rows for count in row.counts]
        starts = [n * width for n in range(len(rows))]
        return Batch(texts, inputs, (numbers, columns, targets), counts, (), starts)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within this context the model reads batches: rows of trees where it can."""
        attending = self.branches.attending(self.base.model) if self.packs else nullcontext()
        with attending, self.layers.in_fewer_operations():
            yield

    def expect(self, batch: Batch) -> None:
        """Called before a batch is read."""
        if self.packs:
            self.branches.expect(batch.parts, batch.inputs["position_ids"][0])

    def scores(self, model: Any, batch: Batch) -> Tensor:
        """(N,) log-likelihoods of the texts' targets."""
        self.expect(batch)
        found: Tensor = model(**batch.inputs, scored=batch.scored, use_cache=False).logits
        return found

    # Steps.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps, by the numbers of their examples."""
        return DataLoader(
            self._numbers,
            batch_sampler=self.steps,
            collate_fn=self.data_collator,
        )

    @property
    def steps(self) -> StepOrder:
        """From the first one on."""
        seed = int(self.args.data_seed or 0)
        return StepOrder(len(self.examples), self.batch_size, seed, self.epochs_done)

    @property
    def first_step(self) -> list[int]:
        """The examples that are learned first."""
        return next(self.steps.of_epoch(0))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' trainer does.

        PEFT casts the input of every adapter to float32, which autocast rounds back: a copy for
        each where they could share one, and no other number.
        """
        with disable_input_dtype_casting(self.slot.model):
            return super().train(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers' estimate would want a batch."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A step's loss, its gradients left in place.

        Where memory does not suffice, it is done anew with half the budget, in a process that is
        the only one; the others would wait for it.
        """
        step = inputs["examples"].tolist()
        model.train()
        return self.within_memory(step, lambda: self._learned(model, step))

    def within_memory(self, step: Sequence[int], compute: Callable[[], Value]) -> Value:
        """What is computed of a step, in the parts that memory allows."""
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self.halve(step):
                    raise
            self.model.zero_grad(set_to_none=True)

    def halve(self, step: Sequence[int]) -> bool:
        """Make do with less memory; False where there is no less."""
        parts = self.parts_of(step)
        largest = max(self.tokens_of(self.texts_of(part)) for part in parts)
        if place().world > 1 or all(len(part) == 1 for part in parts):
            return False
        self.budget = min(self.budget, largest) // 2
        logger.warning("memory does not suffice; going on with %d tokens at once", self.budget)
        give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _learned(self, model: Any, step: Sequence[int]) -> Tensor:
        shares = deal(self.parts_of(step), place())
        self._noted = {}
        total = torch.zeros((), device=self.args.device)
        with self.reading():
            for number, share in enumerate(shares, 1):
                last = number == len(shares)
                with nullcontext() if last else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss = self.share_of(model, step, share)
                    self.accelerator.backward(loss)
                total += loss.detach()
        self.told = self._means()
        return total

    def share_of(self, model: Any, step: Sequence[int], share: Share) -> Tensor:
        """What a part adds to the step's loss."""
        factor = float(place().world) if share.counts else 0.0
        shares = Shares(factor / len(step), factor / sum(self.counted[one] for one in step))
        batch = self.batch(self.texts_of(share.examples))
        loss, told = self.loss(model, batch, share.examples, shares)
        for key, values in told.items():
            noted = shares.example * values.detach().float().sum()
            self._noted[key] = self._noted.get(key, torch.zeros_like(noted)) + noted
        return loss

    def _means(self) -> dict[str, float]:
        """What was noted, its mean over the step's examples, those of all processes."""
        if not self._noted:
            return {}
        table = torch.stack(list(self._noted.values()))
        means = self.accelerator.reduce(table, "mean").tolist()
        return dict(zip(self._noted, means, strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What was noted beside what Trainer logs of a step."""
        super().log({**logs, **self.told} if "loss" in logs else logs, start_time)

    # Without gradients.

    def likelihoods(self, texts: Sequence[int]) -> dict[int, Tensor]:
        """Log-likelihoods of each text's targets, token by token, on the CPU; all processes'.

        In rows of twice the budget: nothing is kept of them for a backward pass.
        """
        budget = 2 * self.budget
        # Those of a prompt side by side.
        order = sorted(texts, key=lambda text: (self.forest.tree(text), text))
        while True:
            try:
                return self.of_rows(cut(order, self.tokens_of, budget=budget))
            except (RuntimeError, MemoryError) as error:
                widest = max(self.tokens_of([text]) for text in texts)
                if not is_out_of_memory(error) or place().world > 1 or budget <= widest:
                    raise
            budget //= 2
            give_back()

    @torch.no_grad()
    def of_rows(self, rows: Sequence[list[int]]) -> dict[int, Tensor]:
        """The same of the texts of these rows, which are shared out; of a text in several rows,
        what the first one gives."""
        offsets, at = {}, 0
        for row in rows:
            offsets[tuple(row)] = at
            at += sum(map(self.forest.counted, row))
        table = torch.zeros(at, dtype=torch.float64)
        with self.reading(), self.compute_loss_context_manager():
            for share in deal(rows, place()):
                found = self.scores(self.model_wrapped, self.batch(share.examples)).double().cpu()
                if share.counts:
                    offset = offsets[tuple(share.examples)]
                    table[offset : offset + len(found)] = found
        if place().world > 1:
            table = self.accelerator.reduce(table.to(self.args.device), "sum").cpu()
        texts = [text for row in rows for text in row]
        pieces = torch.split(table.float(), [self.forest.counted(text) for text in texts])
        return dict(reversed(list(zip(texts, pieces, strict=True))))

    def of_reference(
        self,
        kept: Sequence[Tensor] | None,
        some: Sequence[int],
        sums: Sequence[float],
        step: Sequence[int],
    ) -> list[Tensor]:
        """Likelihoods of all texts by the stack that is in the slot.

        In 16 bits a text's likelihood is rounded otherwise in another row. Those of a step are read
        in the rows in which it learns them, so that its loss is what it has to be.

        Args:
            kept: What an earlier training had computed of them; taken where it agrees with the
                sums of some of them.
            step: The first one.
        """
        agrees = kept is not None and agree([kept[i] for i in some], sums, self.base.dtype)
        taken = kept if self._all_say(agrees) else None
        found = self.of_rows([self.texts_of(part) for part in self.parts_of(step)])
        rest = [text for text in range(len(self.forest)) if text not in found]
        if taken is not None:
            found |= {text: taken[text] for text in rest}
        elif rest:
            found |= self.likelihoods(rest)
        return [found[text] for text in range(len(self.forest))]

    @property
    def cut(self) -> dict[str, Any]:
        """See `Resumable`."""
        return {"packs": self.packs, "budget": self.budget}

    def cut_again(self, cut: Mapping[str, Any]) -> None:
        """See `Resumable`; a smaller budget may have been set meanwhile."""
        self.packs, self.budget = cut["packs"], min(self.budget, cut["budget"])

    @property
    def facts(self) -> dict[str, float]:
        """How rows were made: `packed`, and the budget at the end."""
        return {"packed": float(self.packs), "tokens_at_once": self.budget}

    def read_as_trees(self, texts: Sequence[int], own: Sequence[float]) -> list[Tensor]:
        """Likelihoods of texts, token by token, as the training will compute them, in one batch.

        Where they are not the model's own, rows are padded from here on, and all layers computed by
        their own code.

        Args:
            own: The likelihood of each of them, by a plain forward pass.
        """
        if self.packs or self.layers.some:
            try:
                found = self.read(texts)
                attended = self.branches.asked > 0 or not self.packs
                agrees = attended and agree(found, own, self.base.dtype)
                why = "its likelihoods would be others"
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise
                agrees, why = False, str(error)
            except Exception as error:  # any family's own code
                agrees, why = False, str(error)
            if self._all_say(agrees):
                return found
            if self.packs:
                logger.warning("texts are padded, not packed, for %s: %s", self.name_of_base, why)
            self.packs = False
            self.layers.leave()
        return self.read(texts)

    @torch.no_grad()
    def read(self, texts: Sequence[int]) -> list[Tensor]:
        """Log-likelihoods of each text's targets, token by token, on the CPU, from one batch."""
        with self.reading(), self.compute_loss_context_manager():
            batch = self.batch(texts)
            found = self.scores(self.model_wrapped, batch).float().cpu()
            return list(torch.split(found, batch.counts))

    @property
    def name_of_base(self) -> str:
        """As its code is called."""
        return type(self.base.model).__name__

    def _all_say(self, so: bool) -> bool:
        if place().world == 1:
            return so
        said = torch.tensor(float(so), device=self.args.device)
        return float(self.accelerator.reduce(said, "sum")) == place().world


def agree(found: Sequence[Tensor], own: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether each text's likelihood is the model's own, but for rounding."""
    near = TOLERANCE[dtype]
    return all(
        abs(float(tokens.sum()) - other) <= near * (4 + len(tokens) + abs(other))
        for tokens, other in zip(found, own, strict=True)
    )


def may_pack(slot: Slot) -> bool:
    """Whether a model's layers, as far as can be told beforehand, could attend within trees."""
    model: Any = slot.model.get_base_model()
    told = "position_ids" in inspect.signature(type(model).forward).parameters
    return told and not slot.has_own_attention and may_branch(model)


def budget_of(
    forest: Forest, examples: Sequence[tuple[int, ...]], optim: Optim, *, cpu: bool
) -> int:
    """Tokens in memory at once: as set, or what `micro_batch_size` examples can have at most.

    On a CPU no more than it gains by; an example alone may have more.
    """
    if optim.micro_batch_tokens != "auto":
        return optim.micro_batch_tokens
    rows = max(len(texts) for texts in examples)
    longest = max(forest.tokens([text]) for texts in examples for text in texts)
    most = min(optim.micro_batch_size, len(examples)) * rows * longest
    return min(most, AT_ONCE_ON_A_CPU) if cpu else most
