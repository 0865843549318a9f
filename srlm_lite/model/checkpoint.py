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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srlm_lite.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ENDING = ".safetensors"

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

_FLUSH = 64 << 20
"""Bytes written before the disk is set to work on them."""


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
class _TensorPlace:
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
        self._places: dict[str, _TensorPlace] = {}
        for file in weight_files(folder):
            for place in _header(folder / file):
                self._places[place.info.name] = place

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._places)

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
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        with self._opened(name) as file:
            self._fill(file, name, 0, tensor.view(-1))
        return tensor

    def blocks(self, name: str, start: int, stop: int, *, size: int) -> Iterator[Tensor]:
        """Elements of one tensor, flat, a block at a time; each overwrites the one before.

        Memory that is used again costs no page faults: they take longer than the copying.
        """
        buffer = torch.empty(min(size, stop - start), dtype=self.info(name).dtype)
        with self._opened(name) as file:
            for first in range(start, stop, size):
                block = buffer[: stop - first]
                self._fill(file, name, first, block)
                yield block

    def _opened(self, name: str) -> FileIO:
        """The file that a tensor lies in."""
        return (self.folder / self._places[name].file).open("rb", buffering=0)

    def _fill(self, file: FileIO, name: str, start: int, flat: Tensor) -> None:
        """Read the elements from `start` on that a flat tensor has room for."""
        if not flat.numel():
            return
        view, done = _bytes(flat), 0
        file.seek(self._places[name].start + start * flat.itemsize)
        while done < len(view):  # one call reads two gigabytes at most
            count = file.readinto(view[done:])
            if not count:
                raise UserError("is shorter than it was", where=str(file.name))
            done += count


class ShardWriter:
    """One file of weights, filled in any order, by several threads if need be.

    It gets its name when the context ends without an error, and has it then for good: its bytes are
    on the disk. The disk works on them while more come.

    Raises:
        ValueError: At the end, a tensor is not whole; or `write` got what is not the tensor's.
    """

    def __init__(self, path: Path, infos: Sequence[TensorInfo]) -> None:
        self._path, self._draft = path, path.with_name(f".{path.name}.tmp")
        self._head = _head(infos)
        self._places: dict[str, tuple[TensorInfo, int]] = {}
        offset = len(self._head)
        for info in infos:
            self._places[info.name] = info, offset
            offset += info.nbytes
        self._size, self._written, self._unflushed = offset, 0, 0
        self._lock = Lock()
        self._disk = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None

    def __enter__(self) -> Self:
        self._file = self._draft.open("wb", buffering=0)
        self._put(memoryview(self._head), 0)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            self._disk.shutdown()
            if error is not None:
                return
            if self._written != self._size:
                raise ValueError(f"{self._path} lacks {self._size - self._written} bytes")
            if self._flush is not None:
                self._flush.result()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        self._draft.replace(self._path)

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        """Put elements of a tensor from its element `start` on, counted flat."""
        info, offset = self._places[name]
        if tensor.dtype != info.dtype or start + tensor.numel() > math.prod(info.shape):
            raise ValueError(f"{name} is {info.dtype} {info.shape}, given {tensor.dtype}")
        if tensor.numel():
            self._put(_bytes(tensor.contiguous()), offset + start * tensor.itemsize)

    def _put(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):  # one call writes two gigabytes at most
            done += os.pwrite(self._file.fileno(), view[done:], offset + done)
        with self._lock:
            self._written += len(view)
            self._unflushed += len(view)
            if self._unflushed >= _FLUSH and (self._flush is None or self._flush.done()):
                if self._flush is not None:
                    self._flush.result()  # a disk tells of its failure once
                self._flush = self._disk.submit(os.fdatasync, self._file.fileno())
                self._unflushed = 0


def shard_bytes(infos: Sequence[TensorInfo]) -> int:
    """How large a file with these tensors is."""
    return len(_head(infos)) + sum(info.nbytes for info in infos)


def _head(infos: Sequence[TensorInfo]) -> bytes:
    """What comes before the tensors of a file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        start, end = end, end + info.nbytes
        header[info.name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, infos: Sequence[TensorInfo], tensors: Iterable[Tensor]) -> None:
    """Write one file from tensors that come one after the other; it is whole or absent."""
    with ShardWriter(path, infos) as shard:
        for info, tensor in zip(infos, tensors, strict=True):
            shard.write(info.name, 0, tensor)


def write_index(folder: Path, shards: Mapping[str, Sequence[TensorInfo]]) -> None:
    """The index of a checkpoint in several files."""
    index = {
        "metadata": {"total_size": sum(i.nbytes for infos in shards.values() for i in infos)},
        "weight_map": {i.name: file for file, infos in shards.items() for i in infos},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a directory's weights.

    Raises:
        UserError: Neither an index nor a single file; or the index is damaged, or names what is no
            safetensors file in the directory.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise UserError(
        f"has neither {SINGLE} nor {INDEX}",
        where=str(folder),
        way_out="Save the base again with save_pretrained",
    )


def _indexed(folder: Path) -> list[str]:
    where = str(folder / INDEX)
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError("damaged", where=where, way_out="Get the file again") from error
    for name in names:
        # Another file would be read as pickled weights, which can run code.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(_ENDING):
            raise UserError(f"names {name!r}, which is no *{_ENDING} file beside it", where=where)
        if not (folder / name).is_file():
            raise UserError("the index names it, but it is missing", where=str(folder / name))
    return sorted(names)


def _header(path: Path) -> list[_TensorPlace]:
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise UserError("the index names it, but it is missing", where=str(path)) from error
    except SafetensorError as error:
        raise UserError(
            f"truncated or damaged weights ({error})", where=str(path), way_out="Get the file again"
        ) from error
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{name} is stored as {entry['dtype']}: nothing can be merged into that, nor held "
                "against it",
                where=str(path),
                way_out="Name the checkpoint in 16 or 32 bits that it was made from",
            )
        info = TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        places.append(_TensorPlace(info, path.name, 8 + length + entry["data_offsets"][0]))
    return places
