"""Attention within trees, with gradients: no token is held against one that it does not see.

On a CPU a small tree attends in one piece under a mask, and so does each small branch of a large
one; a trunk attends by itself, and all that is below it attends to it at once, wholly. The pieces
of a query are merged by their log-sum-exp, which is exact. Backwards each piece is given the merged
output and the merged log-sum-exp: with P = exp(score - lse) and dS = P (dP - rowsum(dO O)) it then
gives its share of the gradients of the whole. That is written out, in float32 and in blocks of
queries: torch's own kernel for it took 4 ms for 50 tokens of 9 heads in bfloat16.

Where no kernel tells its log-sum-exp, or scores are capped or have sinks, or a window hides what
lies far back, a branch attends under a mask: one below the trunk at a time, so that trees do not
pay for each other.

Source: of the merge, Rabe and Staats 2021, arXiv:2112.05682; of the gradients, Dao et al. 2022,
arXiv:2205.14135, appendix B.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from srlm_lite.rollout.tree import UnsupportedAttention, Window
from srlm_lite.training.trees import Part

NAME = "srlm_branches"
"""Under which transformers knows this attention."""

DENSE = 192
"""Tokens of a tree, or of a branch, up to which it attends in one piece, under a mask."""

BLOCK = 128
"""Queries whose scores are there at once in a backward pass."""

aten: Any = torch.ops.aten


class Branches:
    """The attention of a model whose rows are trees; told of each row before it is computed.

    A backward pass that computes layers again finds the row that it was told of last, so between a
    row's two passes there is none of another row.
    """

    def __init__(self) -> None:
        self._parts: tuple[Part, ...] = ()
        self._positions = torch.zeros(0, dtype=torch.long)
        self._blocks: list[_Block] | None = None
        self._pieces: _Pieces | None = None
        self._longest = 0
        self.asked = 0
        """Layers that have attended by this."""

    def expect(self, parts: tuple[Part, ...], positions: Tensor) -> None:
        """The next row: its parts, and (T,) the position of each token in its text."""
        self._parts, self._positions = parts, positions
        self._longest = int(positions.max()) + 1
        self._blocks = self._pieces = None

    @contextmanager
    def attending(self, model: Any) -> Iterator[None]:
        """Within this context the model's attention is this one."""
        before = model.config._attn_implementation
        AttentionInterface.register(NAME, self.attend if before == "eager" else self._as_sdpa)
        AttentionMaskInterface.register(NAME, _mask)
        model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            model.set_attn_implementation(before)

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
            query: (1, Hq, T, D).
            key: (1, H, T, D), and `value` alike, whose D may differ; H divides Hq.
            softcap: Bounds the scores.
            s_aux: (Hq,) the score of each head's sink.

        Returns:
            (1, T, Hq, D), and None for the weights.

        Raises:
            UnsupportedAttention: Biases, dropout, masks of its own.
        """
        if kwargs.get("position_bias") is not None:
            raise UnsupportedAttention("position_bias")
        if isinstance(attention_mask, Tensor) or kwargs.get("dropout"):
            raise UnsupportedAttention("a mask or dropout of its own")
        if query.shape[2] != len(self._positions) or key.shape[2] != len(self._positions):
            raise UnsupportedAttention("other tokens than those of the row")
        self.asked += 1
        window = attention_mask
        if window is not None and self._longest <= window.size:
            window = None
        kernels = (
            query.device.type == "cpu"
            and window is None
            and softcap is None
            and s_aux is None
            and query.shape[-1] == value.shape[-1]
        )
        if kernels:
            if self._pieces is None:
                self._pieces = _pieces(self._parts)
            output: Tensor = _InPieces.apply(query, key, value, self._pieces, scaling)  # type: ignore[no-untyped-call]
            return output, None
        output = self._masked(query, key, value, window, scaling, softcap, s_aux)
        return output.transpose(1, 2), None

    def _as_sdpa(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """`attend`, as far as transformers' sdpa does: it drops caps and sinks without a word."""
        return self.attend(*args, **{**kwargs, "softcap": None, "s_aux": None})

    def _masked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Window | None,
        scaling: float | None,
        softcap: float | None,
        s_aux: Tensor | None,
    ) -> Tensor:
        """A branch after the other, under masks."""
        if self._blocks is None:
            self._blocks = _blocks(self._parts, self._positions)
        groups = query.shape[1] // key.shape[1]
        outputs = []
        for block in self._blocks:
            hidden = block.hidden(window)
            queries = query[:, :, block.first : block.last]
            keys, values = (_repeated(states[:, :, block.seen], groups) for states in (key, value))
            if softcap is None and s_aux is None:
                outputs.append(
                    scaled_dot_product_attention(
                        queries, keys, values, attn_mask=~hidden[None, None], scale=scaling
                    )
                )
            else:
                outputs.append(_written_out(queries, keys, values, hidden, scaling, softcap, s_aux))
        return torch.cat(outputs, dim=2)


class _Block:
    """Queries `first` to `last` of a row, and all keys that any of them sees."""

    def __init__(self, first: int, last: int, seen: Tensor, visible: Tensor, at: Tensor) -> None:
        self.first, self.last, self.seen = first, last, seen
        self._visible, self._at = visible, at
        self._hidden: dict[Window | None, Tensor] = {}

    def hidden(self, window: Window | None) -> Tensor:
        """(Q, S) keys that a query does not see; made once for all layers of a window."""
        if window not in self._hidden:
            hidden = ~self._visible
            if window is not None:
                queries, keys = self._at[self.first : self.last, None], self._at[self.seen][None]
                hidden = hidden | window.hidden(queries, keys).view(hidden.shape)
            self._hidden[window] = hidden
        return self._hidden[window]


def _blocks(parts: Sequence[Part], positions: Tensor) -> list[_Block]:
    """The trunks by themselves, and the branches right below each of them one by one."""
    device = positions.device
    places = torch.arange(len(positions), device=device)
    owner = torch.zeros_like(places)
    for number, part in enumerate(parts):
        owner[part.start : part.stop] = number
    starts, ends = (
        torch.tensor([getattr(part, name) for part in parts], device=device)
        for name in ("start", "end")
    )

    def block(first: int, last: int, seen: Tensor) -> _Block:
        queries, above = places[first:last, None], owner[seen][None]
        visible = (starts[above] <= queries) & (queries < ends[above]) & (seen[None] <= queries)
        return _Block(first, last, seen, visible, positions)

    found = []
    ends_at = 0
    trunk: Part | None = None
    for part in parts:
        if part.start >= ends_at:
            # A tree's first part; where nothing branches off it is all of the tree.
            trunk, ends_at = part, part.end
            found.append(block(part.start, part.stop, places[part.start : part.stop]))
            branch_ends = part.stop
        elif part.start >= branch_ends and trunk is not None:
            branch_ends = part.end
            seen = torch.cat([places[trunk.start : trunk.stop], places[part.start : part.end]])
            found.append(block(part.start, part.end, seen))
    return found


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def _repeated(states: Tensor, groups: int) -> Tensor:
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


@dataclass(frozen=True, slots=True)
class _Dense:
    """Tokens `start` to `stop` of a row that attend to each other in one piece.

    Args:
        hidden: (Q, Q) keys that a query does not see; None: those after it.
        mask: The same, to be added to scores.
    """

    start: int
    stop: int
    hidden: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A row in pieces for the kernels of a CPU; each query is in one that is dense.

    Args:
        above: Queries, and the keys of a part above theirs, all of which they see.
    """

    dense: list[_Dense]
    above: list[tuple[slice, slice]]


def _pieces(parts: Sequence[Part]) -> _Pieces:
    """Small trees, and small branches of large ones, are dense: few and wide operations."""
    found = _Pieces([], [])
    reached = 0
    for number, part in enumerate(parts):
        if part.start < reached:  # in a dense piece already
            continue
        if part.stop == part.end:
            found.dense.append(_Dense(part.start, part.stop))
        elif part.end - part.start > DENSE:
            found.dense.append(_Dense(part.start, part.stop))
            found.above.append((slice(part.stop, part.end), slice(part.start, part.stop)))
            continue
        else:
            found.dense.append(_dense(parts, number))
        reached = part.end
    return found


def _dense(parts: Sequence[Part], number: int) -> _Dense:
    """A part with all that is below it."""
    first, last = parts[number].start, parts[number].end
    hidden = torch.ones(last - first, last - first, dtype=torch.bool)
    for part in parts[number:]:
        if part.start >= last:
            break
        hidden[part.start - first : part.end - first, part.start - first : part.stop - first] = (
            False
        )
    hidden |= torch.ones_like(hidden).triu_(1)
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return _Dense(first, last, hidden, mask)


class _InPieces(torch.autograd.Function):
    """Attention piece by piece on a CPU: (1, T, Hq, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pieces: _Pieces,
        scaling: float | None,
    ) -> Tensor:
        key, value = key.to(query.dtype), value.to(query.dtype)
        groups = query.shape[1] // key.shape[1]
        keys, values = _repeated(key, groups), _repeated(value, groups)
        output = torch.empty_like(query, dtype=torch.float32 if pieces.above else query.dtype)
        lse = torch.empty(query.shape[:3], dtype=torch.float32)
        for piece in pieces.dense:
            rows = slice(piece.start, piece.stop)
            output[:, :, rows], lse[:, :, rows] = aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows], keys[:, :, rows], values[:, :, rows], 0.0, piece.mask is None,
                attn_mask=piece.mask, scale=scaling,
            )  # fmt: skip
        for rows, seen in pieces.above:
            found, scores = aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows], keys[:, :, seen], values[:, :, seen], 0.0, False, scale=scaling
            )
            before = lse[:, :, rows]
            both = torch.logaddexp(before, scores)
            output[:, :, rows].lerp_(found.float(), (scores - both).exp().unsqueeze(-1))
            before.copy_(both)
        # As the next layer reads it, so that it keeps no copy.
        merged = output.transpose(1, 2).to(query.dtype).contiguous()
        ctx.save_for_backward(query, key, value, merged, lse)
        ctx.pieces = pieces
        ctx.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        # (H, groups, T, D) and (H, T, D), in float32: no gradient is rounded on the way.
        split = heads, groups, *query.shape[2:]
        of_output = gradients[0].transpose(1, 2).float().reshape(split)
        delta = (of_output * output.transpose(1, 2).reshape(split)).sum(dim=-1)
        queries, keys, values = query.float().view(split), key[0].float(), value[0].float()
        lse = lse.view(split[:3])
        of_queries = torch.zeros(split)
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)

        def attended(rows: slice, seen: slice, hidden: Tensor | None) -> None:
            shape = heads, groups * (rows.stop - rows.start), -1
            asked, slopes = (x[:, :, rows].reshape(shape) for x in (queries, of_output))
            known, told = keys[:, seen], values[:, seen]
            scores = torch.baddbmm(
                lse[:, :, rows].reshape(shape), asked, known.mT, beta=-1, alpha=ctx.scaling
            )
            weights = scores.exp_()
            if hidden is not None:
                weights.view(heads, groups, *hidden.shape).masked_fill_(hidden, 0)
            of_values[:, seen] += weights.mT @ slopes
            down = torch.baddbmm(delta[:, :, rows].reshape(shape), slopes, told.mT, beta=-1)
            down.mul_(weights)
            of_queries[:, :, rows] += (down @ known).view(heads, groups, -1, known.shape[-1])
            of_keys[:, seen] += down.mT @ asked

        for piece in ctx.pieces.dense:
            if piece.hidden is not None:
                attended(
                    slice(piece.start, piece.stop), slice(piece.start, piece.stop), piece.hidden
                )
                continue
            for first in range(piece.start, piece.stop, BLOCK):
                last = min(first + BLOCK, piece.stop)
                hidden = torch.ones(last - first, last - piece.start, dtype=torch.bool)
                seen = slice(piece.start, last)
                attended(slice(first, last), seen, hidden.triu_(1 + first - piece.start))
        for rows, seen in ctx.pieces.above:
            for first in range(rows.start, rows.stop, BLOCK):
                attended(slice(first, min(first + BLOCK, rows.stop)), seen, None)
        return (
            of_queries.mul_(ctx.scaling).view(query.shape).to(query.dtype),
            of_keys.mul_(ctx.scaling)[None].to(key.dtype),
            of_values[None].to(value.dtype),
            None,
            None,
        )


def _mask(
    *,
    mask_function: Any,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Window | None:
    """Stands where transformers makes the mask of a layer type; None: all of the past is seen.

    The attention mask that it is given says that nothing is padding, and no more.
    """
    if mask_function is causal_mask_function:
        return None
    if local_size is None or use_vmap:
        raise UnsupportedAttention("a mask of its own")
    return Window(local_size, mask_function)
