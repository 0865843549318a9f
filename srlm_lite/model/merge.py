"""Merge a stack into the base's files: W + sum of s·B·A, in float32, rounded once.

NF4 is the trap. To quantize a merged weight again would delete what small updates change, so the
result always has 16 bits or more. Two bases can be merged onto:

    original     the weights as they were before NF4 rounded them
    dequantized  what NF4 made of them, expanded: the weights that the adapters were trained against

They differ by NF4's rounding error, which no adapter has learned to undo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srlm_lite.errors import UserError
from srlm_lite.model.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    ShardWriter,
    TensorInfo,
    write_index,
)
from srlm_lite.model.device import compute_dtype
from srlm_lite.model.layout import Layout, TensorGroup
from srlm_lite.model.nf4 import nf4_modules
from srlm_lite.model.stack import Adapter, Factors, fuse
from srlm_lite.model.targets import text_model
from srlm_lite.settings import Base

Onto = Literal["original", "dequantized"]

_BLOCK = 1 << 17
"""Elements summed at a time: the sum stays in the processor's cache."""

_PART = 1 << 22
"""Elements that one thread takes at a time."""

_THREADS = 8
"""More are of no use: the disk sets the pace."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The base's parameters as a stack stands on them, and what they are in its files.

    `nf4` names those that NF4 rounds; `dtype` is what they are expanded to.
    """

    layout: Layout
    nf4: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def read(self, name: str) -> Tensor:
        """One parameter, on the CPU; KeyError where the files do not have it."""
        weight = self.layout.read(name)
        if name not in self.nf4:
            return weight
        if not self.layout.is_transposed(name.removesuffix(".weight")):
            return nf4_rounded(weight, self.dtype, self.device)
        return nf4_rounded(weight.T.contiguous(), self.dtype, self.device).T.contiguous()

    def rounds(self, file: str) -> bool:
        """Whether NF4 rounds anything of a tensor of the files."""
        group = self.layout.group_of_file(file)
        return group is not None and not self.nf4.isdisjoint(group.parameters)

    def blocks(self, file: str, start: int, stop: int, *, size: int) -> Iterator[Tensor]:
        """Elements of a tensor of the files, as `Checkpoint.blocks`."""
        group = self.layout.group_of_file(file)
        if group is None or not self.rounds(file):
            return self.layout.checkpoint.blocks(file, start, stop, size=size)
        # What NF4 makes of a weight depends on all of it.
        read = {name: self.read(name) for name in group.parameters}
        one = group.converter is None
        whole = read[group.first] if one else self.layout.written(group, read)[file]
        return iter(torch.split(whole.view(-1)[start:stop], size))


def base_weights(layout: Layout, section: Base, model: PreTrainedModel, *, nf4: bool) -> Weights:
    """The base's weights as its files hold them; with `nf4`, as the section loads them.

    Of the text model: no adapter was trained against the rounding of a vision tower.
    """
    if not nf4 or section.quantization != "nf4":
        return Weights(layout)
    text = {module for part in text_model(model) for module in part.modules()}
    names = {f"{name}.weight" for name, module in model.named_modules() if module in text}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Weights(layout, nf4_modules(model) & names, compute_dtype(section), device)


@dataclass(frozen=True, slots=True)
class Merge:
    """One tensor of the result: a tensor of the base's files, with an update where there is one."""

    info: TensorInfo
    source: str
    """The tensor's name in the base's files."""
    update: Factors | None = None
    """A, and B times the scaling; their product is to be added."""
    rearranged: Callable[[], Tensor] | None = None
    """Computes what is to be added, where no such product is: several parameters are in it."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All that is to be written, file by file."""

    shards: Mapping[str, Sequence[Merge]]
    unties: bool
    """The embeddings are tied in the base, and an adapter on one side parts them."""

    @property
    def nbytes(self) -> int:
        return sum(merge.info.nbytes for merges in self.shards.values() for merge in merges)

    @property
    def infos(self) -> dict[str, list[TensorInfo]]:
        """The tensors of each file."""
        return {file: [merge.info for merge in merges] for file, merges in self.shards.items()}

    @property
    def is_sharded(self) -> bool:
        """Several files have an index beside them."""
        return set(self.shards) != {SINGLE}


def nf4_rounded(weight: Tensor, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A weight after NF4 with double quantization, expanded to the compute dtype."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.to(device=device, dtype=dtype), quant_type="nf4", compress_statistics=True
    )
    return functional.dequantize_4bit(packed, state).to("cpu")


def plan(layout: Layout, stack: Sequence[Adapter], *, dtype: torch.dtype | None) -> MergePlan:
    """What the merged checkpoint holds: the base's tensors under their names, in its files.

    Args:
        dtype: Of all floating-point tensors; None keeps each one's own.

    Raises:
        UserError: The stack has an update for a tensor that the base lacks, or of another shape.
    """
    checkpoint = layout.checkpoint
    updates = _updates(stack, layout)
    parted = False
    for alias, one in layout.tied.items():
        if updates.keys().isdisjoint((alias, one)):
            continue
        if layout.is_one_module(alias, one):  # what changes it changes it under both names
            updates[layout.held_as(one)] = updates.pop(alias if alias in updates else one)
        else:
            parted = True
    added: list[Merge] = []
    if parted:
        # Under both names, the base has one tensor; with an update on one side it needs two. The
        # setting that says so parts all that is tied.
        for alias, one in layout.tied.items():
            for other in (alias, one):
                if other not in layout:
                    (source,) = layout.group(layout.held_as(other)).files
                    info = replace(checkpoint.info(source), name=layout.name_in_files(other))
                    added.append(Merge(_typed(info, dtype), source, updates.pop(other, None)))
    changes: dict[str, dict[str, Any]] = {}
    for name, update in updates.items():
        group = layout.group(name)
        if group.converter is None:
            changes[group.files[0]] = {"update": update}
            continue
        together = {one: updates[one] for one in group.parameters if one in updates}
        for file in group.files:
            change = partial(_rearranged, layout, group, together, file)
            changes[file] = {"rearranged": change}
    shards = {
        file: [
            Merge(_typed(info, dtype), info.name, **changes.get(info.name, {})) for info in infos
        ]
        for file, infos in checkpoint.shards.items()
    }
    shards[list(shards)[-1]] += added
    return MergePlan(shards=shards, unties=parted)


def _rearranged(
    layout: Layout, group: TensorGroup, updates: Mapping[str, Factors], file: str
) -> Tensor:
    products = {name: b @ a for name, (a, b) in updates.items()}
    return layout.written(group, products)[file]


def write(
    plan: MergePlan,
    weights: Weights,
    folder: Path,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the merged checkpoint, part by part; files that are there already are kept.

    Args:
        on_bytes: Told how many bytes have just been written, or been found written.
    """
    for file, merges in plan.shards.items():
        if (folder / file).is_file():
            on_bytes(sum(merge.info.nbytes for merge in merges))
            continue
        with ShardWriter(folder / file, plan.infos[file]) as shard, _threads(weights) as pool:
            work = partial(_write_part, weights=weights, shard=shard)
            parts = [part for merge in merges for part in _parts(merge, weights)]
            for done in pool.map(work, parts):
                on_bytes(done)
    if plan.is_sharded:
        write_index(folder, plan.infos)
    else:
        with suppress(FileNotFoundError):
            (folder / INDEX).unlink()


@contextmanager
def _threads(weights: Weights) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, each of which computes by itself.

    Torch's own threads would wait for one another at every block, and where the machine has other
    work to do, that takes a hundred times as long. NF4 takes whole tensors: one at a time.
    """
    before = torch.get_num_threads()
    count = 1 if weights.nf4 else min(before, _THREADS)
    if not weights.nf4:
        torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


Part = tuple[Merge, int, int]
"""Elements of a tensor, from the first up to the last, counted flat."""


def _parts(merge: Merge, weights: Weights) -> Iterator[Part]:
    size = math.prod(merge.info.shape)
    whole = merge.rearranged is not None or weights.rounds(merge.source)
    step = size if whole else _whole_rows(merge, _PART)
    for start in range(0, size, max(1, step)):
        yield merge, start, min(start + step, size)


def _whole_rows(merge: Merge, size: int) -> int:
    width = 1 if merge.update is None else merge.info.shape[1]
    return max(1, size // width) * width


def _write_part(part: Part, *, weights: Weights, shard: ShardWriter) -> int:
    merge, start, stop = part
    for block in merged(merge, weights, start, stop):
        shard.write(merge.info.name, start, block)
        start += block.numel()
    return (part[2] - part[1]) * merge.info.dtype.itemsize


def merged(merge: Merge, weights: Weights, start: int, stop: int) -> Iterator[Tensor]:
    """Elements of round(W + B·A), flat, a block at a time; each overwrites the one before.

    Summed in float32, and rounded once to the dtype. Starts at the start of a row.
    """
    size, dtype = _whole_rows(merge, _BLOCK), merge.info.dtype
    blocks = weights.blocks(merge.source, start, stop, size=size)
    if merge.rearranged is not None:  # whole, see `_parts`
        total = merge.rearranged().view(-1)
        for block in blocks:
            yield total[start : start + block.numel()].add_(block).to(dtype)
            start += block.numel()
        return
    if merge.update is None:
        for block in blocks:
            yield block.to(dtype)
        return
    a, b = merge.update
    width = a.shape[1]
    total, rounded = torch.empty(size // width, width), torch.empty(size, dtype=dtype)
    row = start // width
    for block in blocks:
        weight = block.view(-1, width)
        n = len(weight)
        total[:n].copy_(weight)
        total[:n].addmm_(b[row : row + n], a)
        yield rounded[: block.numel()].copy_(total[:n].view(-1))
        row += n


def _updates(stack: Sequence[Adapter], layout: Layout) -> dict[str, Factors]:
    """By the name of the parameter that each one changes, and transposed where that is."""
    if not stack:
        return {}
    fused = fuse(stack)
    updates: dict[str, Factors] = {}
    for module, (a, b) in fused.factors.items():
        name, scaled = f"{module}.weight", b * fused.scaling
        if layout.held_as(name) not in layout:
            raise _unknown(name, layout.checkpoint)
        updates[name] = (scaled.T, a.T) if layout.is_transposed(module) else (a, scaled)
        _check_shape(name, layout.shape(name), updates[name])
    return updates


def _typed(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return replace(info, dtype=dtype) if dtype and info.dtype.is_floating_point else info


def _check_shape(name: str, there: tuple[int, ...], update: Factors) -> None:
    shape = (update[1].shape[0], update[0].shape[1])
    if there != shape:
        raise UserError(
            f"the adapter's update of {name} is {shape}, the base's weight {there}",
            where="adapters",
            way_out="Use the base that the adapter was trained on",
        )


def _unknown(name: str, checkpoint: Checkpoint) -> UserError:
    return UserError(
        f"the adapter changes {name}, which the base's files do not have under any name",
        where=str(checkpoint.folder),
        way_out="Use the base that the adapter was trained on",
    )
