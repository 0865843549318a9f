"""What a GGUF file says of itself, without its weights.

Layout: docs/gguf.md of https://github.com/ggml-org/ggml, versions 2 and 3. The reader of the
package `gguf` makes an array of each piece of a vocabulary, which takes ten seconds for a Gemma.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from srlm_lite.errors import UserError

WHERE = "base.name"

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Type of a value, by its number in the file, as `struct` names it."""
_STRING, _ARRAY = 8, 9
_F32 = 0


class GgufTensor(NamedTuple):
    """A tensor of the file."""

    shape: tuple[int, ...]
    """Rows first, as torch has it."""
    ggml_type: int
    offset: int
    """Bytes from the beginning of the file."""


@dataclass(frozen=True, slots=True)
class Header:
    """Keys and tensors of a file, and which keys have been asked for."""

    file: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    asked: set[str]

    @property
    def architecture(self) -> str:
        return str(self.fields["general.architecture"])

    def get(self, name: str, default: Any = None) -> Any:
        """What the file says under `ARCHITECTURE.name`; of one value a layer, the one of them all.

        Raises:
            UserError: The layers differ in it.
        """
        key = f"{self.architecture}.{name}"
        self.asked.add(key)
        value = self.fields.get(key, default)
        if not isinstance(value, list):
            return value
        if not value or any(one != value[0] for one in value):
            raise self.refusal(f"{key} differs from layer to layer")
        return value[0]

    def need(self, name: str) -> Any:
        """As `get`, of a key that has to be there."""
        value = self.get(name)
        if value is None:
            raise self.refusal(f"it lacks {self.architecture}.{name}")
        return value

    def vector(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A small tensor of the file, in float32."""
        info = self.tensors[name]
        if info.ggml_type != _F32:
            raise self.refusal(f"{name} is not in float32")
        return np.fromfile(self.file, "<f4", math.prod(info.shape), offset=info.offset)

    def refusal(self, what: str, way_out: str | None = None) -> UserError:
        return UserError(
            f"{self.file.name} cannot be converted: {what}", where=WHERE, way_out=way_out
        )


def read_header(file: Path) -> Header:
    """Read keys and the table of tensors.

    Raises:
        ValueError, struct.error: It is no GGUF file, or a torn one.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data).header(file)


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self, file: Path) -> Header:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format")
        tensors, keys = self._number("Q"), self._number("Q")
        fields = {self._string(): self._value(self._number("I")) for _ in range(keys)}
        if not isinstance(fields.get("general.architecture"), str):
            raise ValueError("it names no architecture")
        table = {}
        for _ in range(tensors):
            name = self._string()
            shape = self._numbers("Q", self._number("I"))
            table[name] = GgufTensor(tuple(reversed(shape)), self._number("I"), self._number("Q"))
        alignment = int(fields.get("general.alignment", 32))
        start = math.ceil(self._at / alignment) * alignment
        placed = {name: one._replace(offset=start + one.offset) for name, one in table.items()}
        return Header(file, fields, placed, set())

    def _bytes(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise ValueError("it ends in its header")
        self._at += count
        return self._data[self._at - count : self._at]

    def _numbers(self, kind: str, count: int) -> list[Any]:
        return list(struct.unpack(f"<{count}{kind}", self._bytes(count * struct.calcsize(kind))))

    def _number(self, kind: str) -> Any:
        return self._numbers(kind, 1)[0]

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        of, count = self._number("I"), self._number("Q")
        if of in _NUMBERS:
            return self._numbers(_NUMBERS[of], count)
        return [self._value(of) for _ in range(count)]
