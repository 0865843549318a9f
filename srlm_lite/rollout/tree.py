"""Keys and values as a tree: what several rows have in common is kept, and read, once.

    trunk      a prefix that all prompts share, such as the rubric       (1, H, S, D)
    branches   the rest of each prompt, shared by its samples            (P, H, S, D)
    leaves     what each sample has drawn itself                         (B, H, S, D)

A row attends to its leaf, its branch and the trunk. The three attentions are computed apart and
merged by their log-sum-exp, which is exact; so a rubric of 300 tokens is read from memory once a
step, and not once a row.

Source: of the merge, Rabe and Staats 2021, arXiv:2112.05682; of sharing a prefix in this way,
Juravsky et al. 2024, arXiv:2402.05099.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from srlm_lite.planning.memory import LEAST_ROOM
from srlm_lite.rollout.attention import Attended, attention, merged

NAME = "srlm_tree"
"""Under which transformers knows the attention of a tree."""

_ODD = ("softcap", "sliding_window", "s_aux", "position_bias")
"""Arguments of an attention that is more than a softmax over all of the past."""

KeysValues = tuple[Tensor, Tensor]


class UnsupportedAttention(Exception):
    """The model's attention is of a kind that a tree cannot compute."""


def may_branch(model: Any) -> bool:
    """Whether a model's layers, as far as its configuration tells, attend to all of the past."""
    if model.config._attn_implementation != "sdpa":
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@contextmanager
def attending(model: Any, tree: Tree) -> Iterator[None]:
    """Within this context the model's attention is that of the tree."""
    before = model.config._attn_implementation
    # No mask goes with it, so transformers makes none.
    AttentionInterface.register(NAME, tree.attend)
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
        self._branch_bias: Tensor | None = None
        self._leaf_bias: Tensor | None = None
        self._longest = 0
        self._held: int | None = None
        self._seat: Tensor | None = None
        self._seats = 1

    # What transformers' models ask of a cache.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysValues:
        """The new states as they are; `attend` puts them where they belong."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the trunk. Positions are always given, so no model computes them from this."""
        return self._trunk[0][0].shape[2] if self._trunk else 0

    # What the engine does with it.

    @contextmanager
    def growing_trunk(self) -> Iterator[None]:
        """A forward pass within becomes the trunk: one row, without padding.

        Raises:
            UnsupportedAttention: The model attends by code of its own and never asked the tree.
        """
        self._trunk, self._grows = [], "trunk"
        yield
        if not self._trunk:
            raise UnsupportedAttention("code of its own")

    @contextmanager
    def growing_branches(self, lengths: Tensor) -> Iterator[None]:
        """A forward pass within adds branches: (P, S) ids, padded on the right.

        Args:
            lengths: (P,) tokens of each branch, at least 1.
        """
        self._new, self._grows = [], "branches"
        yield
        width = max(int(lengths.max()), self._branch_width)
        old, self._branches = self._branches, self._new
        for layer in range(len(old)):
            keys, values = self._branches[layer]
            self._branches[layer] = (
                _joined(old[layer][0], keys, width),
                _joined(old[layer][1], values, width),
            )
            old[layer] = (keys[:0], values[:0])
        self._new = []
        self._branch_lengths = torch.cat([self._branch_lengths.to(lengths.device), lengths])
        self._bias_branches()

    @property
    def _branch_width(self) -> int:
        return self._branches[0][0].shape[2] if self._branches else 0

    def _bias_branches(self) -> None:
        self._branch_bias = None
        if bool((self._branch_lengths < self._branch_width).any()):
            self._branch_bias = _bias(
                self._branch_width, self._branch_lengths, self._branches[0][0].dtype
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
            trunk = self._trunk
            self.__init__()  # type: ignore[misc]
            self._trunk = trunk
            return
        _change(self._leaves, lambda states: states[rows])
        self._lengths = self._lengths[rows]
        needed, self._branch_of = torch.unique(self._branch_of[rows], return_inverse=True)
        if len(needed) < len(self._branch_lengths):
            self._branch_lengths = self._branch_lengths[needed]
            width = int(self._branch_lengths.max())
            _change(self._branches, lambda states: states[needed, :, :width])
            self._bias_branches()
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
        before = self.get_seq_length() + self._branch_lengths[self._branch_of]
        return (before + self._lengths).unsqueeze(1)

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
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer, in the place of transformers' own.

        Args:
            query: (B, Hq, T, D).
            key: (B, H, T, D) of the new tokens, and `value` alike; H divides Hq.

        Returns:
            (B, T, Hq, D), and None for the weights.

        Raises:
            UnsupportedAttention: Soft caps, sliding windows, sinks, biases, masks of its own, keys
                and values of different widths.
        """
        odd = [name for name in _ODD if kwargs.get(name) is not None]
        if odd or attention_mask is not None or kwargs.get("dropout"):
            raise UnsupportedAttention(", ".join(odd) or "a mask or dropout of its own")
        rows, heads, tokens, width = query.shape
        if value.shape[-1] != width:  # as in multi-head latent attention
            raise UnsupportedAttention("keys and values of different widths")
        shared = key.shape[1]
        # The query heads of one key-value head become query positions of it: keys are read once.
        grouped = query.reshape(rows, shared, heads // shared * tokens, width)
        layer: Any = module.layer_idx
        if self._grows == "leaves":
            parts = [
                self._in_leaf(grouped, key, value, scaling, layer),
                self._in_branch(grouped, scaling, layer),
            ]
        else:
            # Padding lies to the right of a branch, where none of its tokens looks.
            (self._trunk if self._grows == "trunk" else self._new).append((key, value))
            keys, values = (_repeated(part, heads // shared) for part in (key, value))
            output, lse = attention(query, keys, values, scaling, causal=True)
            parts = [(output.reshape(grouped.shape), lse.reshape(grouped.shape[:-1]))]
        if self._grows != "trunk" and self._trunk:
            parts.append(self._in_trunk(grouped, scaling, layer))
        return merged(parts).view(query.shape).transpose(1, 2), None

    def _in_leaf(
        self, grouped: Tensor, key: Tensor, value: Tensor, scaling: float | None, layer: int
    ) -> Attended:
        keys, values = self._leaves[layer]
        end = self._longest
        if self._leaf_bias is None:
            keys[:, :, end - 1 : end], values[:, :, end - 1 : end] = key, value
        else:
            rows = torch.arange(len(keys), device=keys.device)
            keys[rows, :, self._lengths] = key.squeeze(2)
            values[rows, :, self._lengths] = value.squeeze(2)
        return attention(
            grouped, keys[:, :, :end], values[:, :, :end], scaling, bias=self._leaf_bias
        )

    def _in_branch(self, grouped: Tensor, scaling: float | None, layer: int) -> Attended:
        _, shared, group, width = grouped.shape
        keys, values = self._branches[layer]
        seats = (len(keys), self._seats)
        if self._seat is not None:
            rows, grouped = grouped, grouped.new_zeros(seats[0] * seats[1], shared, group, width)
            grouped[self._seat] = rows
        query = grouped.view(*seats, shared, group, width).transpose(1, 2)
        output, lse = attention(
            query.reshape(seats[0], shared, seats[1] * group, width),
            keys,
            values,
            scaling,
            bias=self._branch_bias,
        )
        output = output.reshape(seats[0], shared, seats[1], group, width).transpose(1, 2)
        lse = lse.reshape(seats[0], shared, seats[1], group).transpose(1, 2)
        output, lse = output.flatten(0, 1), lse.flatten(0, 1)
        return (output, lse) if self._seat is None else (output[self._seat], lse[self._seat])

    def _in_trunk(self, grouped: Tensor, scaling: float | None, layer: int) -> Attended:
        rows, shared, group, width = grouped.shape
        query = grouped.transpose(0, 1).reshape(1, shared, rows * group, width)
        output, lse = attention(query, *self._trunk[layer], scaling)
        output = output.reshape(shared, rows, group, width).transpose(0, 1)
        return output, lse.reshape(shared, rows, group).transpose(0, 1)


def _change(layers: list[KeysValues], change: Callable[[Tensor], Tensor]) -> None:
    """Replace all layers one by one: no more than one layer is there twice."""
    for layer, (keys, values) in enumerate(layers):
        layers[layer] = (change(keys), change(values))


def _bias(width: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, S): 0 for the first `lengths` places of a row, minus infinity behind them."""
    behind = torch.arange(width, device=lengths.device) >= lengths.unsqueeze(1)
    zeros = torch.zeros(behind.shape, dtype=dtype, device=lengths.device)
    return zeros.masked_fill(behind, -torch.inf)[:, None, None]


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
