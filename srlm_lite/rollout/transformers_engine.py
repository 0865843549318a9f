"""The default engine: the one base in memory, in this process."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from srlm_lite.errors import UserError
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.heap import is_out_of_memory
from srlm_lite.model.renamed import cache_of, with_cache
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.records import FinishReason
from srlm_lite.rollout.ends import Ends
from srlm_lite.rollout.memory import rows_that_fit
from srlm_lite.rollout.nucleus import Alternatives, draw, most_probable, uniforms
from srlm_lite.rollout.plain import generate, hides_padding
from srlm_lite.rollout.protocol import Limits, Request, Sample, Token
from srlm_lite.rollout.sizes import PREFILL_TOKENS, PRUNE
from srlm_lite.rollout.steps import SAME, Steps, divergence
from srlm_lite.rollout.tree import (
    Tree,
    UnsupportedAttention,
    attending,
    may_branch,
    shared_prefix,
)

logger = logging.getLogger(__name__)

LEAST_TRUNK = 16
"""Tokens that prompts must share before a trunk is worth its own forward pass."""

LIKE_ITSELF = 30
"""Times what a model differs from itself, computed with its own cache. Seen on models that carry
roundings far: 0.5 to 20."""


@dataclass(slots=True)
class Row:
    """One sample in the making."""

    prompt_ids: tuple[int, ...]
    numbers: Sequence[float]
    """In [0, 1), one for each token that may be drawn."""
    tokens: list[int] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def last(self) -> int:
        """The token that the next one follows."""
        return self.tokens[-1] if self.tokens else self.prompt_ids[-1]

    @property
    def number(self) -> float:
        """What the next token is drawn with."""
        return self.numbers[min(len(self.tokens), len(self.numbers) - 1)]

    def restart(self) -> None:
        """Forget what has been drawn; drawn again, it is the same."""
        self.tokens.clear()
        self.alternatives.clear()


Group = Sequence[Row]
"""All rows of one request."""


class TransformersEngine:
    """Samples from whatever the slot holds, many rows at a time.

    A prompt is computed once, whatever the number of its samples, and a prefix that all prompts of
    a call share, such as the rubric, once for all of them; both are also read once a step. Rows
    that have ended leave the batch and waiting requests enter it. When memory runs out the batch
    is halved and the work goes on.

    Models whose attention a tree cannot compute are sampled with plain `generate`; which it is, is
    found out by computing one token in both ways, and again where a window begins to bind. Where
    such a model does not hide padding, prompts of equal length alone share a batch.

    Args:
        slot: Around the base.
        batch_rows: Samples in the batch at most; None goes by the device's memory.
        cuda_graphs: Replay steps from CUDA graphs, where there is CUDA and the base is whole.
    """

    def __init__(
        self,
        slot: Slot,
        chat: ChatFormat,
        *,
        batch_rows: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self._slot, self._chat = slot, chat
        self._most_rows, self._batch_rows = batch_rows, 0
        self._model: Any = slot.model.get_base_model()
        may = may_branch(self._model) and not slot.has_own_attention
        self._branches: bool | None = None if may else False
        self._pads: bool | None = None
        self._windows: set[int] = set()
        self._proven_window = 0
        self._captures = cuda_graphs and self._device.type == "cuda" and not slot.sharded
        self._tree, self._trunk = Tree(), tuple[int, ...]()
        self._ends = Ends(chat)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def load(self, stack: Sequence[Adapter]) -> None:
        """See `Engine.load`. Copies tensors into the slot; nothing is reloaded.

        Keys and values of earlier calls go, even if the slot holds this stack already: others load
        the slot too, and a run that is resumed has to start its chunks with the same tree.
        """
        self._tree, self._trunk = Tree(), ()
        self._slot.load(stack)

    def close(self) -> None:
        """See `Engine.close`. The base stays; only what sampling has kept is given back."""
        self._forget()

    @torch.inference_mode()
    def sample(
        self,
        requests: Sequence[Request],
        limits: Limits,
        *,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> list[list[Sample]]:
        """See `Engine.sample`."""
        groups: list[Group] = [
            [
                Row(request.prompt_ids, numbers)
                for numbers in uniforms(request.seeds, limits.max_new_tokens).tolist()
            ]
            for request in requests
        ]
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        tokens = longest + limits.max_new_tokens
        self._batch_rows = self._most_rows or rows_that_fit(self._model, tokens=tokens)
        # Longest first: if memory does not suffice, that shows at once.
        order = sorted(range(len(groups)), key=lambda i: (-len(requests[i].prompt_ids), i))
        while waiting := deque(groups[i] for i in order if _is_unfinished(groups[i])):
            try:
                if self._can_branch(waiting, limits):
                    self._run(waiting, limits, on_samples)
                else:
                    self._run_plain(waiting, limits, on_samples)
            except (RuntimeError, MemoryError) as error:
                if self._batch_rows == 1 or not is_out_of_memory(error):
                    raise
                if self._slot.sharded:  # the others are in the midst of the same pass
                    raise UserError(
                        f"memory does not suffice for {self._batch_rows} rows at once",
                        where=f"rollout.batch_rows = {self._most_rows or 'auto'}",
                        way_out=f"Set it to {self._batch_rows // 2}: a process of a sharded base "
                        "cannot halve it alone",
                    ) from error
                self._back_off()
                for row in (row for group in groups for row in group if not row.finish_reason):
                    row.restart()
        return [[self._sample(row) for row in group] for group in groups]

    def _run(
        self, waiting: deque[Group], limits: Limits, on_samples: Callable[[int], None]
    ) -> None:
        """Draw token after token for the rows in the batch, until none is left or waiting."""
        tree = self._rooted([group[0].prompt_ids for group in waiting])
        steps = Steps(self._model, tree, capture=self._captures)
        live: list[Row] = []
        with attending(self._model, tree):
            while waiting or live:
                live += self._admitted(tree, waiting, self._batch_rows - len(live))
                on_samples(self._step(steps, live, limits))
                going = [i for i, row in enumerate(live) if row.finish_reason is None]
                if not going or len(going) <= (1 - PRUNE) * len(live):
                    tree.keep(torch.tensor(going, dtype=torch.long, device=self._device))
                    live = [live[i] for i in going]
        self._captures = steps.captures

    def _rooted(self, prompts: Sequence[tuple[int, ...]]) -> Tree:
        """A tree whose trunk these prompts share: the one there is, or a new one.

        The old one only where a new one would be the same: with another trunk the same prompts
        would be rounded in another way, and a chunk must not depend on the one before it, which
        may have been another process's, or of a run that was killed.
        """
        shared = prompts[0][: shared_prefix(prompts)]
        if self._trunk and shared == self._trunk:
            return self._tree
        self._tree, self._trunk = Tree(), ()
        if len(shared) >= LEAST_TRUNK and len(prompts) > 1:
            ids = torch.tensor([shared], device=self._device)
            with attending(self._model, self._tree), self._tree.growing_trunk():
                self._prefill(self._tree, ids)
            self._trunk = shared
        return self._tree

    def _admitted(self, tree: Tree, waiting: deque[Group], room: int) -> list[Row]:
        """Requests that enter the batch: their prompts as branches, their samples as leaves."""
        entering: list[Group] = []
        alone = room == self._batch_rows  # then even a request larger than the batch
        while waiting and (len(waiting[0]) <= room or alone):
            entering.append(waiting.popleft())
            room, alone = room - len(entering[-1]), False
        start = tree.get_seq_length()
        # All but a prompt's last token, which its samples go on from.
        branches = [group[0].prompt_ids[start:-1] for group in entering]
        at_once = max(1, PREFILL_TOKENS // max(map(len, branches), default=1))
        for part in _chunks(len(branches), at_once):
            lengths = torch.tensor([len(branch) for branch in branches[part]], device=self._device)
            ids = torch.full((len(lengths), int(lengths.max())), self._chat.pad_id)
            for row, branch in zip(ids, branches[part], strict=True):
                row[: len(branch)] = torch.tensor(branch)
            with tree.growing_branches(lengths):
                self._prefill(tree, ids.to(self._device))
            counts = torch.tensor([len(group) for group in entering[part]], device=self._device)
            tree.add_leaves(counts)
        return [row for group in entering for row in group]

    def _prefill(self, tree: Tree, ids: Tensor) -> None:
        start = tree.get_seq_length()
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        # The decoder alone: the logits of these positions are of no use.
        decoder: Any = self._model.get_decoder()
        decoder(
            input_ids=ids,
            position_ids=positions.expand_as(ids),
            use_cache=True,
            **with_cache(decoder, tree),
        )

    def _step(self, steps: Steps, live: Sequence[Row], limits: Limits) -> int:
        """One more token for every row; returns how many rows have ended with it."""
        last = torch.tensor([row.last for row in live], device=self._device)
        logits = steps.next_logits(last.unsqueeze(1))
        numbers = torch.tensor([row.number for row in live], dtype=torch.float64)
        tokens = draw(logits, numbers, temperature=limits.temperature, top_p=limits.top_p)
        others = most_probable(logits, limits.alternatives, limits.also)
        ended = 0
        for row, token, alternatives in zip(live, tokens.tolist(), others, strict=True):
            if row.finish_reason is None:
                self._append(row, token, alternatives, limits)
                ended += row.finish_reason is not None
        return ended

    def _append(self, row: Row, token: int, alternatives: Alternatives, limits: Limits) -> None:
        row.finish_reason = self._ends.append(row.tokens, token, limits)
        if len(row.alternatives) < len(row.tokens):
            row.alternatives.append(alternatives)

    def _run_plain(
        self, waiting: deque[Group], limits: Limits, on_samples: Callable[[int], None]
    ) -> None:
        pads = self._may_pad(waiting)
        while waiting:
            rows = list(waiting.popleft())
            while waiting and len(rows) + len(waiting[0]) <= self._batch_rows:
                if not pads and len(waiting[0][0].prompt_ids) != len(rows[0].prompt_ids):
                    break
                rows += waiting.popleft()
            drawn = generate(
                self._model,
                self._chat,
                [row.prompt_ids for row in rows],
                torch.tensor([row.numbers for row in rows], dtype=torch.float64),
                limits,
            )
            for row, tokens in zip(rows, drawn, strict=True):
                for token, alternatives in tokens:
                    if row.finish_reason is None:
                        self._append(row, token, alternatives, limits)
            on_samples(len(rows))

    def _may_pad(self, waiting: Sequence[Group]) -> bool:
        """Whether prompts of several lengths may share a batch; two of them have to prove it."""
        prompts = sorted((group[0].prompt_ids for group in waiting), key=len)
        if self._pads is None and len(prompts[0]) < len(prompts[-1]):
            self._pads = hides_padding(self._model, self._chat, prompts[0], prompts[-1])
            if not self._pads:
                logger.warning(
                    "padding changes what this model samples; sampling prompts of equal length "
                    "together alone, slower"
                )
        return bool(self._pads)

    def _can_branch(self, waiting: Sequence[Group], limits: Limits) -> bool:
        """Whether these prompts can grow on a tree; one of them has to prove it.

        The shortest, and one that is longer than the largest window that binds in these samples.
        """
        prompts = sorted((group[0].prompt_ids for group in waiting), key=len)
        shortest, longest = prompts[0], prompts[-1]
        if self._branches is None and len(shortest) > 1:
            self._decide((shortest * 2)[: max(3, len(shortest))])
        reach = len(longest) + limits.max_new_tokens
        binding = max((size for size in self._windows if size < reach), default=0)
        if self._branches and binding > self._proven_window:
            tokens = min(reach, 2 * binding + 2)
            self._decide((longest * -(-tokens // len(longest)))[:tokens])
            self._proven_window = binding
        return bool(self._branches) and len(shortest) > 1

    def _decide(self, prompt: tuple[int, ...]) -> None:
        self._branches = self._branches_like_the_model(prompt)
        if not self._branches:
            logger.warning("this model's attention is its own; sampling with plain generate")

    def _branches_like_the_model(self, prompt: tuple[int, ...]) -> bool:
        """Whether trunk, branch and leaf give the next token the distribution the model gives it.

        Both are rounded in their own way; a model with positions or masks of its own would differ
        by far more. A deep base in 16 bits may carry roundings far as well (one of random weights
        does): what differs more is held against the model itself, with a cache and without.
        """
        ids = torch.tensor([prompt], device=self._device)
        half = len(prompt) // 2
        expected = self._last_logits(ids, use_cache=False)[0]
        tree = Tree()
        try:
            with attending(self._model, tree):
                with tree.growing_trunk():
                    self._prefill(tree, ids[:, :half])
                rest = torch.tensor([len(prompt) - 1 - half], device=self._device)
                with tree.growing_branches(rest):
                    self._prefill(tree, ids[:, half:-1])
                tree.add_leaves(torch.tensor([1], device=self._device))
                found = Steps(self._model, tree, capture=False).next_logits(ids[:, -1:])
        except UnsupportedAttention:
            return False
        except (AttributeError, IndexError):  # it reaches for the inside of a cache of its own
            return False
        self._windows |= tree.windows
        apart = divergence(expected, found)
        if apart < SAME:
            return True
        past = None
        for part in (ids[:, :half], ids[:, half:-1], ids[:, -1:]):
            own, past = self._last_logits(part, **with_cache(self._model, past), use_cache=True)
        return bool(apart < LIKE_ITSELF * divergence(expected, own))

    def _last_logits(self, ids: Tensor, **how: Any) -> tuple[Tensor, Any]:
        """(B, V) for the token after these, by the model's own code, and the cache if it has one.

        Without the logits of the others, which of a long prompt are more than the base.
        """
        decoded = self._model(input_ids=ids, logits_to_keep=1, **how)
        return decoded.logits[:, -1], cache_of(decoded)

    def _back_off(self) -> None:
        self._batch_rows = self._most_rows = max(1, self._batch_rows // 2)
        logger.warning("out of memory; sampling %d rows at a time now", self._batch_rows)
        self._forget()

    def _forget(self) -> None:
        self._tree, self._trunk = Tree(), ()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _sample(self, row: Row) -> Sample:
        pieces = [
            Token(
                self._chat.spell([token]),
                tuple((self._chat.spell([other]), p) for other, p in alternatives),
            )
            for token, alternatives in zip(row.tokens, row.alternatives, strict=True)
            if alternatives
        ]
        return Sample(
            text=self._chat.decode(row.tokens),
            token_ids=tuple(row.tokens),
            finish_reason=row.finish_reason or "length",
            n_tokens=len(row.tokens),
            tokens=tuple(pieces),
        )


def _is_unfinished(group: Group) -> bool:
    return any(row.finish_reason is None for row in group)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
