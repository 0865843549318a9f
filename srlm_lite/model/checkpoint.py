"""Safetensors directories, tensor by tensor.

A checkpoint of any size is read and written with no more than one tensor in memory. The libraries'
own functions hold a shard, or all of them.

The format: eight bytes of header length, a JSON header with dtype, shape and offsets of each
tensor, then the tensors' bytes in that order. `safe_open` checks each file before it is trusted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srlm_lite.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMED = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""What weights can be written as."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Place:
    info: TensorInfo
    file: str
    start: int
    """Offset of the first byte in the file."""


class Checkpoint:
    """The weights of a directory as transformers would load them: an index, or one file.

    Raises:
        UserError: No weights, a file missing or damaged, or tensors of a dtype that nothing here
            can read, as quantized checkpoints have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        for file in _files(folder):
            for place in _header(folder / file):
                self._places[place.info.name] = place

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def shards(self) -> dict[str, list[TensorInfo]]:
        """The files and what lies in each, in the order of the bytes."""
        shards: dict[str, list[TensorInfo]] = {}
        for place in sorted(self._places.values(), key=lambda p: (p.file, p.start)):
            shards.setdefault(place.file, []).append(place.info)
        return shards

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype that most bytes of floating-point weights have."""
        sizes: dict[torch.dtype, int] = {}
        for place in self._places.values():
            if place.info.dtype.is_floating_point:
                sizes[place.info.dtype] = sizes.get(place.info.dtype, 0) + place.info.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape; KeyError where there is no such tensor."""
        return self._places[name].info

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        place = self._places[name]
        tensor = torch.empty(place.info.shape, dtype=place.info.dtype)
        if not place.info.nbytes:
            return tensor
        view, done = _bytes(tensor), 0
        with (self.folder / place.file).open("rb", buffering=0) as file:
            file.seek(place.start)
            while done < len(view):  # one call reads two gigabytes at most
                count = file.readinto(view[done:])
                if not count:
                    raise UserError("is shorter than it was", where=str(self.folder / place.file))
                done += count
        return tensor


def write_shard(path: Path, infos: Sequence[TensorInfo], tensors: Iterable[Tensor]) -> None:
    """Write one file from tensors that come one after the other; it is whole or absent.

    Raises:
        ValueError: A tensor is not what its info says.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in infos:
        end = offset + info.nbytes
        header[info.name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info, tensor in zip(infos, tensors, strict=True):
            if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
                raise ValueError(f"{info.name} is {tensor.dtype} {tuple(tensor.shape)}")
            _write(file, tensor)
        os.fsync(file.fileno())
    draft.replace(path)


def write_index(folder: Path, shards: Mapping[str, Sequence[TensorInfo]]) -> None:
    """The index of a checkpoint in several files."""
    index = {
        "metadata": {"total_size": sum(i.nbytes for infos in shards.values() for i in infos)},
        "weight_map": {i.name: file for file, infos in shards.items() for i in infos},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: RawIOBase, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    view, done = _bytes(tensor.contiguous()), 0
    while done < len(view):
        done += file.write(view[done:]) or 0


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise UserError(
        f"has neither {SINGLE} nor {INDEX}",
        where=str(folder),
        way_out="Save the base again with save_pretrained",
    )


def _header(path: Path) -> list[_Place]:
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise UserError("the index names it, but it is missing", where=str(path)) from error
    except SafetensorError as error:
        raise UserError(f"truncated or damaged ({error})", where=str(path)) from error
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{name} is stored as {entry['dtype']}: nothing can be merged into that",
                where=str(path),
                way_out="Export with --as adapter",
            )
        info = TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        places.append(_Place(info, path.name, 8 + length + entry["data_offsets"][0]))
    return places
