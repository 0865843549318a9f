"""Keys and values as a tree: what several rows have in common is kept, and read, once.

    trunk      a prefix that all prompts share, such as the rubric       (1, H, S, D)
    branches   the rest of each prompt, shared by its samples            (P, H, S, D)
    leaves     what each sample has drawn itself                         (B, H, S, D)

A row attends to its leaf, its branch and the trunk. The three attentions are computed apart and
merged by their log-sum-exp, which is exact; so a rubric of 300 tokens is read from memory once a
step, and not once a row.

A layer whose mask has a window keeps of trunk and branches what the window can still reach, and a
bias hides from each row what lies behind its own. Which keys a row sees is asked of the mask
function that the model's code would make its own mask with, at the true positions.

Source: of the merge, Rabe and Staats 2021, arXiv:2112.05682; of sharing a prefix in this way,
Juravsky et al. 2024, arXiv:2402.05099.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from srlm_lite.rollout.attention import Attended, attention, hiding, merged
from srlm_lite.rollout.sizes import LEAST_ROOM

NAME = "srlm_tree"
"""Under which transformers knows the attention of a tree."""

BLOCK = 256
"""New tokens that attend at once where a window or a cap leaves no kernel for all of them."""

KeysValues = tuple[Tensor, Tensor]
How = tuple[float | None, float | None]
"""Scaling and soft cap of the scores."""


class UnsupportedAttention(Exception):
    """The model's attention is of a kind that a tree cannot compute."""


@dataclass(frozen=True, slots=True)
class Window:
    """The mask of a layer that does not see all of the past: a window that slides, or chunks."""

    size: int
    """A token sees itself and at most so many, less one, of those right before it."""
    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """transformers' mask function: by row, head, position of the query and of the key."""

    def hidden(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which keys are hidden from which queries, by their positions, which broadcast."""
        # Its row and head are of no matter without padding. Not 0-dimensional: an index of that
        # kind is read by Python.
        first = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=queries.device)
        return ~self.sees(first, first, queries, keys)


def _mask(
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Window | None:
    """Stands where transformers makes the mask of a layer type; None: all of the past is seen."""
    if mask_function is causal_mask_function and attention_mask is None:
        return None
    if local_size is None or use_vmap or attention_mask is not None:
        raise UnsupportedAttention("a mask of its own")
    return Window(local_size, mask_function)


def may_branch(model: Any) -> bool:
    """Whether a model's layers, as far as its configuration tells, attend to the past alone."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    layers = DynamicCache(config=model.config).layers
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return bool(layers) and all(type(layer) in kinds for layer in layers)


@contextmanager
def attending(model: Any, tree: Tree) -> Iterator[None]:
    """Within this context the model's attention is that of the tree."""
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, tree.attend if before == "eager" else tree.attend_as_sdpa)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class Tree(Cache):
    """The keys and values of a batch whose rows grow at its leaves.

    In a model's forward pass it stands in for transformers' cache; which part grows is said by
    the context around the pass.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._grows: Literal["trunk", "branches", "leaves"] = "trunk"
        self._trunk: list[KeysValues] = []
        self._branches: list[KeysValues] = []
        self._leaves: list[KeysValues] = []
        self._new: list[KeysValues] = []
        none = torch.zeros(0, dtype=torch.long)
        self._branch_lengths, self._lengths, self._branch_of = none, none, none
        self._new_lengths, self._new_tokens = none, 0
        self._trunk_length, self._shortest, self._widest = 0, 0, 0
        self._branch_bias: Tensor | None = None
        self._leaf_bias: Tensor | None = None
        self._longest = 0
        self._hidden: dict[tuple[Window, str], Tensor] = {}
        self.windows: set[int] = set()
        """Sizes of the windows that layers have told of."""
        self._held: int | None = None
        self._seat: Tensor | None = None
        self._seats = 1

    # What transformers' models ask of a cache.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysValues:
        """The new states as they are; `attend` puts them where they belong."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Tokens in the trunk. Positions are always given, so no model computes them from this.

        Raises:
            UnsupportedAttention: A layer does, as Llama 4's, and rows at leaves differ in it.
        """
        if layer_idx is not None and self._grows == "leaves":
            raise UnsupportedAttention("positions counted by a layer")
        return self._trunk_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The sizes of a mask that nobody makes: a `Window` is asked at the true positions."""
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """See `get_mask_sizes`."""
        return 0

    # What the engine does with it.

    @contextmanager
    def growing_trunk(self) -> Iterator[None]:
        """A forward pass within becomes the trunk: one row, without padding.

        Raises:
            UnsupportedAttention: The model attends by code of its own and never asked the tree.
        """
        self._trunk, self._grows, self._trunk_length = [], "trunk", 0
        yield
        if not self._trunk:
            raise UnsupportedAttention("code of its own")
        self._trunk_length = self._new_tokens

    @contextmanager
    def growing_branches(self, lengths: Tensor) -> Iterator[None]:
        """A forward pass within adds branches: (P, S) ids, padded on the right.

        Args:
            lengths: (P,) tokens of each branch, at least 1.
        """
        self._new, self._grows, self._new_lengths = [], "branches", lengths
        yield
        old, self._branches = self._branches, self._new
        for layer in range(len(old)):
            keys, values = self._branches[layer]
            width = max(keys.shape[2], old[layer][0].shape[2])
            self._branches[layer] = (
                _joined(old[layer][0], keys, width),
                _joined(old[layer][1], values, width),
            )
            old[layer] = (keys[:0], values[:0])
        self._new = []
        self._branch_lengths = torch.cat([self._branch_lengths.to(lengths.device), lengths])
        self._bias_branches()

    def _bias_branches(self) -> None:
        self._branch_bias = None
        self._shortest = int(self._branch_lengths.min())
        self._widest = int(self._branch_lengths.max())
        if self._shortest < self._widest:
            self._branch_bias = _bias(
                self._widest, self._branch_lengths, self._branches[0][0].dtype
            )

    def add_leaves(self, counts: Tensor) -> None:
        """New, empty leaves for the newest branches, as the last rows.

        Args:
            counts: (P,) leaves of each of the last P branches.
        """
        first = len(self._branch_lengths) - len(counts)
        branches = torch.arange(first, first + len(counts), device=counts.device)
        branch_of = branches.repeat_interleave(counts)
        if not self._leaves:
            self._leaves = [
                (_empty_leaves(keys), _empty_leaves(values)) for keys, values in self._branches
            ]
        added = len(branch_of)
        _change(self._leaves, lambda states: _with_rows(states, added))
        self._lengths = torch.cat([self._lengths.to(counts.device), torch.zeros_like(branch_of)])
        self._branch_of = torch.cat([self._branch_of.to(counts.device), branch_of])
        self._take_seats()

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows, and the branches that no row needs any more.

        Args:
            rows: (B',) indices of the rows that stay, ascending.
        """
        if not len(rows):
            trunk, length = self._trunk, self._trunk_length
            self.__init__()  # type: ignore[misc]
            self._trunk, self._trunk_length = trunk, length
            return
        _change(self._leaves, lambda states: states[rows])
        self._lengths = self._lengths[rows]
        needed, self._branch_of = torch.unique(self._branch_of[rows], return_inverse=True)
        if len(needed) < len(self._branch_lengths):
            self._branch_lengths = self._branch_lengths[needed]
            self._bias_branches()
            # Of a layer with a window less is kept, and this takes nothing of it.
            _change(self._branches, lambda states: states[needed, :, : self._widest])
        self._take_seats()

    def _take_seats(self) -> None:
        """Seat each row beside the others of its branch, for one attention a branch."""
        self._held = None
        counts = self._branch_of.bincount(minlength=len(self._branch_lengths))
        self._seat, self._seats = None, int(counts.max())
        if self._seats * len(counts) != len(self._branch_of):
            first = counts.cumsum(0) - counts
            rows = torch.arange(len(self._branch_of), device=counts.device)
            self._seat = self._branch_of * self._seats + rows - first[self._branch_of]

    @property
    def positions(self) -> Tensor:
        """(B, 1) position of each row's next token."""
        return (self._leaf_starts + self._lengths).unsqueeze(1)

    @property
    def _leaf_starts(self) -> Tensor:
        """(B,) position of the first token of each leaf."""
        return self._trunk_length + self._branch_lengths[self._branch_of]

    @property
    def is_held(self) -> bool:
        """Whether `hold` still holds: a change of the rows ends it."""
        return self._held is not None

    def hold(self, steps: int) -> int:
        """Let the next passes be the same operations on the same memory, whatever has grown.

        They attend to a fixed number of places of every leaf, and a bias hides those that are not
        written yet.

        Args:
            steps: Passes at most.

        Returns:
            Passes that may follow before it has to be called again, at least 1.
        """
        longest = int(self._lengths.max())
        self._make_room(longest + 1)
        self._held = min(self._leaf_room, longest + steps)
        return self._held - longest

    def release(self) -> None:
        """Undo `hold`."""
        self._held = None

    @property
    def _leaf_room(self) -> int:
        return self._leaves[0][0].shape[2]

    def _make_room(self, tokens: int) -> None:
        room = self._leaf_room
        if tokens > room:
            _change(self._leaves, lambda states: _widened(states, 2 * room))

    @contextmanager
    def growing_leaves(self) -> Iterator[None]:
        """A forward pass within adds one token to every leaf."""
        self._grows, even = "leaves", False
        self._hidden.clear()
        if self._held is None:
            self._longest = int(self._lengths.max()) + 1
            self._make_room(self._longest)
            even = bool((self._lengths == self._longest - 1).all())
        else:
            self._longest = self._held
        dtype = self._leaves[0][0].dtype
        self._leaf_bias = None if even else _bias(self._longest, self._lengths + 1, dtype)
        yield
        self._lengths += 1  # in place: a pass that is captured goes on from itself

    def step_back(self) -> None:
        """Take every leaf's newest token away."""
        self._lengths -= 1

    # What the model's attention does with it.

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | Window | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer, in the place of transformers' own.

        Args:
            query: (B, Hq, T, D).
            key: (B, H, T, D) of the new tokens, and `value` alike; H divides Hq.
            softcap: Bounds the scores.
            s_aux: (Hq,) the score of each head's sink.

        Returns:
            (B, T, Hq, D), and None for the weights.

        Raises:
            UnsupportedAttention: Biases, masks of its own, keys and values of different widths.
        """
        if kwargs.get("position_bias") is not None:
            raise UnsupportedAttention("position_bias")
        if isinstance(attention_mask, Tensor) or kwargs.get("dropout"):
            raise UnsupportedAttention("a mask or dropout of its own")
        rows, heads, tokens, width = query.shape
        if value.shape[-1] != width:  # as in multi-head latent attention
            raise UnsupportedAttention("keys and values of different widths")
        window = attention_mask
        told = window.size if window else kwargs.get("sliding_window")
        self.windows |= {told} if told else set()
        shared = key.shape[1]
        # The query heads of one key-value head become query positions of it: keys are read once.
        grouped = query.reshape(rows, shared, heads // shared * tokens, width)
        layer: Any = module.layer_idx
        how = (scaling, softcap)
        if self._grows == "leaves":
            binds = window if window and self._reach > window.size else None
            parts = [
                self._in_leaf(grouped, key, value, how, layer, binds),
                self._in_branch(grouped, how, layer, binds),
                *self._in_trunk(grouped, how, layer, binds),
            ]
        else:
            output, lse = self._in_itself(query, key, value, how, layer, window)
            parts = [(output.reshape(grouped.shape), lse.reshape(grouped.shape[:-1]))]
            if window is None or self._trunk_length + tokens <= window.size:
                parts += self._in_trunk(grouped, how, layer, None)
        sinks = None if s_aux is None else s_aux.reshape(shared, -1).repeat_interleave(tokens, 1)
        return merged(parts, sinks).view(query.shape).transpose(1, 2), None

    def attend_as_sdpa(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """`attend`, as far as transformers' sdpa does: it drops caps and sinks without a word."""
        return self.attend(*args, **{**kwargs, "softcap": None, "s_aux": None})

    @property
    def _reach(self) -> int:
        """Tokens of the longest row, at most, its newest included."""
        return self._trunk_length + self._widest + self._longest

    def _in_itself(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        how: How,
        layer: int,
        window: Window | None,
    ) -> Attended:
        """New tokens of trunk or branches among themselves, and in the trunk if a window binds.

        Padding lies to the right of a branch, where none of its tokens looks.
        """
        tokens, start = key.shape[2], self._trunk_length
        if self._grows == "trunk":
            self._new_tokens = tokens
            kept = slice(None if window is None else -max(1, window.size - 1), None)
            self._trunk.append((key[:, :, kept], value[:, :, kept]))
        else:
            self._new.append((self._kept(key, window), self._kept(value, window)))
        scaling, softcap = how
        binds = window is not None and start + tokens > window.size
        if binds and self._grows == "branches" and start:
            key, value = (
                torch.cat([trunk.expand(len(new), -1, -1, -1), new], dim=2)
                for trunk, new in zip(self._trunk[layer], (key, value), strict=True)
            )
        keys, values = (
            _repeated(states, query.shape[1] // key.shape[1]) for states in (key, value)
        )
        if not binds and softcap is None:
            return attention(query, keys, values, scaling, causal=True)
        before = keys.shape[2] - tokens
        positions = torch.arange(start - before, start + tokens, device=query.device)
        parts = []
        for first in range(0, tokens, BLOCK):
            last = min(first + BLOCK, tokens)
            least = max(0, before + first + 1 - window.size) if window and binds else 0
            queries = positions[before + first : before + last, None]
            seen = positions[None, least : before + last]
            hidden = window.hidden(queries, seen) if window and binds else seen > queries
            parts.append(
                attention(
                    query[:, :, first:last],
                    keys[:, :, least : before + last],
                    values[:, :, least : before + last],
                    scaling,
                    bias=hiding(hidden.view(1, 1, *hidden.shape[-2:]), query.dtype),
                    softcap=softcap,
                )
            )
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)

    def _kept(self, states: Tensor, window: Window | None) -> Tensor:
        """(P, H, S', D): of branches' new states what a leaf can see, from the left."""
        if window is None or states.shape[2] < window.size:
            return states
        width = max(1, window.size - 1)
        starts = (self._new_lengths - width).clamp(min=0)
        places = starts.unsqueeze(1) + torch.arange(width, device=states.device)
        rows = torch.arange(len(states), device=states.device).unsqueeze(1)
        return states[rows, :, places].transpose(1, 2)

    def _in_leaf(
        self,
        grouped: Tensor,
        key: Tensor,
        value: Tensor,
        how: How,
        layer: int,
        window: Window | None,
    ) -> Attended:
        keys, values = self._leaves[layer]
        end = self._longest
        if self._leaf_bias is None:
            keys[:, :, end - 1 : end], values[:, :, end - 1 : end] = key, value
        else:
            rows = torch.arange(len(keys), device=keys.device)
            keys[rows, :, self._lengths] = key.squeeze(2)
            values[rows, :, self._lengths] = value.squeeze(2)
        bias = self._leaf_bias
        if window is not None:
            bias = self._biased(window, "leaves", self._hidden_leaf, keys.dtype)
        return _attended(grouped, keys[:, :, :end], values[:, :, :end], how, bias)

    def _hidden_leaf(self, window: Window) -> Tensor:
        places = torch.arange(self._longest, device=self._lengths.device)
        positions = self._leaf_starts.unsqueeze(1) + places
        return window.hidden(self.positions[:, None, None], positions[:, None, None])

    def _in_branch(self, grouped: Tensor, how: How, layer: int, window: Window | None) -> Attended:
        _, shared, group, width = grouped.shape
        keys, values = self._branches[layer]
        seats = (len(keys), self._seats)
        if self._seat is not None:
            grouped = self._seated(grouped)
        query = grouped.view(*seats, shared, group, width).transpose(1, 2)
        bias = self._branch_bias
        if window is not None:
            bias = self._biased(window, "branches", self._hidden_branch, keys.dtype)
            bias = bias.repeat_interleave(group, dim=2)
        output, lse = _attended(
            query.reshape(seats[0], shared, seats[1] * group, width), keys, values, how, bias
        )
        output = output.reshape(seats[0], shared, seats[1], group, width).transpose(1, 2)
        lse = lse.reshape(seats[0], shared, seats[1], group).transpose(1, 2)
        output, lse = output.flatten(0, 1), lse.flatten(0, 1)
        return (output, lse) if self._seat is None else (output[self._seat], lse[self._seat])

    def _seated(self, rows: Tensor) -> Tensor:
        """What the rows have, by seat; nothing sits on the others."""
        seats = rows.new_zeros(len(self._branch_lengths) * self._seats, *rows.shape[1:])
        seats[slice(None) if self._seat is None else self._seat] = rows
        return seats

    def _hidden_branch(self, window: Window) -> Tensor:
        lengths = self._branch_lengths
        width = min(self._widest, max(1, window.size - 1))
        starts = (lengths - width).clamp(min=0)
        places = starts.unsqueeze(1) + torch.arange(width, device=lengths.device)
        queries = self._seated(self.positions).view(len(lengths), 1, self._seats, 1)
        hidden = window.hidden(queries, (self._trunk_length + places)[:, None, None])
        return hidden | (places >= lengths.unsqueeze(1))[:, None, None]

    def _in_trunk(
        self, grouped: Tensor, how: How, layer: int, window: Window | None
    ) -> list[Attended]:
        """One part, or none where there is no trunk, or no row's window reaches it."""
        if self._grows == "trunk" or not self._trunk:
            return []
        keys, values = self._trunk[layer]
        rows, shared, group, width = grouped.shape
        bias = None
        if window is not None:
            first = self._first_in_trunk(window)
            if first >= self._trunk_length:
                return []
            keys, values = (states[:, :, first - self._trunk_length :] for states in (keys, values))
            bias = self._biased(window, "trunk", self._hidden_trunk, keys.dtype)
            bias = bias.repeat_interleave(group, dim=2)
        query = grouped.transpose(0, 1).reshape(1, shared, rows * group, width)
        output, lse = _attended(query, keys, values, how, bias)
        output = output.reshape(shared, rows, group, width).transpose(0, 1)
        return [(output, lse.reshape(shared, rows, group).transpose(0, 1))]

    def _first_in_trunk(self, window: Window) -> int:
        """The first position that any leaf of any branch can still see."""
        return max(0, self._trunk_length + self._shortest + 1 - window.size)

    def _hidden_trunk(self, window: Window) -> Tensor:
        places = torch.arange(
            self._first_in_trunk(window), self._trunk_length, device=self._lengths.device
        )
        return window.hidden(self.positions[None, None], places[None, None, None])

    def _biased(
        self, window: Window, part: str, hidden: Callable[[Window], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The bias of a part, made once a pass for all layers of one window."""
        if (window, part) not in self._hidden:
            self._hidden[window, part] = hiding(hidden(window), dtype)
        return self._hidden[window, part]


def _attended(
    query: Tensor, keys: Tensor, values: Tensor, how: How, bias: Tensor | None
) -> Attended:
    scaling, softcap = how
    return attention(query, keys, values, scaling, bias=bias, softcap=softcap)


def _change(layers: list[KeysValues], change: Callable[[Tensor], Tensor]) -> None:
    """Replace all layers one by one: no more than one layer is there twice."""
    for layer, (keys, values) in enumerate(layers):
        layers[layer] = (change(keys), change(values))


def _bias(width: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, S): 0 for the first `lengths` places of a row, and it hides those behind them."""
    behind = torch.arange(width, device=lengths.device) >= lengths.unsqueeze(1)
    return hiding(behind, dtype)[:, None, None]


def _repeated(states: Tensor, times: int) -> Tensor:
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def _widened(states: Tensor, width: int) -> Tensor:
    return pad(states, (0, 0, 0, width - states.shape[2]))


def _joined(first: Tensor, second: Tensor, width: int) -> Tensor:
    return torch.cat([_widened(first, width), _widened(second, width)])


def _empty_leaves(branch: Tensor) -> Tensor:
    return branch.new_zeros((0, branch.shape[1], LEAST_ROOM, branch.shape[3]))


def _with_rows(states: Tensor, count: int) -> Tensor:
    return torch.cat([states, states.new_zeros((count, *states.shape[1:]))])


def shared_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Length of the longest prefix of all rows; at least two tokens of each row remain after it."""
    first, last = min(rows), max(rows)  # of a sorted list, these two differ earliest
    length = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return max(0, min(length, min(len(row) for row in rows) - 2))
