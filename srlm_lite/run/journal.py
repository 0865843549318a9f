"""A file that grows by whole chunks, and goes on after any stop with the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from srlm_lite.records import Record
from srlm_lite.run.files import R, checked, jsonl_line, write_atomically
from srlm_lite.run.sums import Sums, hold


class Journal:
    """A JSONL file that grows by chunks, each on disk before the next one starts.

    A chunk is known by the keys of its rows, in order. `stream` computes the chunks that the file
    does not hold whole yet, after cutting off whatever a killed run left behind them.
    """

    def __init__(self, path: Path, kind: type[R], key: Callable[[Any], str]) -> None:
        self.path, self._kind, self._key = path, kind, key

    def stream(
        self,
        chunks: Sequence[Sequence[str]],
        compute: Callable[[Sequence[int]], Iterable[Sequence[Record]]],
        *,
        on_chunk: Callable[[int, bool], None] = lambda index, computed: None,
    ) -> list[Any]:
        """Make the file hold all chunks; return all its rows as records.

        Args:
            chunks: The keys of each chunk's rows, in the order of the file.
            compute: Makes the rows of these chunks, in order. The next chunk is asked for when the
                last one is on disk.
            on_chunk: Told of each chunk as it becomes complete, and whether it was computed now.

        Raises:
            UserError: The file is not as it was written.
            RuntimeError: `compute` returned rows with other keys than announced.
        """
        hold(self.path)
        rows, sizes = self._whole_rows()
        records: list[Any] = []
        ends: list[int] = []
        for keys in chunks:
            found = rows[len(records) : len(records) + len(keys)]
            if [self._key(record) for record in found] != list(keys):
                break
            records.extend(found)
            ends.append(sum(sizes[: len(records)]))
        self._cut(ends[-1] if ends else 0)
        sums = Sums(self.path, ends)
        for index in range(len(ends)):
            on_chunk(index, False)
        missing = range(len(ends), len(chunks))
        for index, computed in zip(missing, compute(missing), strict=True):
            made: list[Any] = list(computed)
            if [self._key(record) for record in made] != list(chunks[index]):
                raise RuntimeError(f"{self.path}: chunk {index} came back with other rows")
            sums.add(self._append(made))
            records.extend(made)
            on_chunk(index, True)
        return records

    def _whole_rows(self) -> tuple[list[Any], list[int]]:
        if not self.path.exists():
            return [], []
        rows, sizes = [], []
        check = checked(self._kind)
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                rows.append(check.validate_python(self._kind.known(json.loads(line))))
            except (ValueError, KeyError, TypeError):  # a ValidationError is a ValueError
                break
            sizes.append(len(line))
        return rows, sizes

    def _cut(self, size: int) -> None:
        if not self.path.exists():
            write_atomically(self.path, "")
        elif self.path.stat().st_size != size:
            os.truncate(self.path, size)

    def _append(self, records: Sequence[Record]) -> bytes:
        data = "".join(jsonl_line(record) for record in records).encode()
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return data
