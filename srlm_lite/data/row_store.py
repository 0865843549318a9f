"""What was read, put by on disk: a million rows fit no memory, and a split has to know them all."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from srlm_lite.errors import UserError

CACHE_KIB = 64 << 10
BATCH = 2000
_ENCODER = json.JSONEncoder(separators=(",", ":"))


class RowStore:
    """A folder with a database that is gone with the context, whatever ends it.

    Args:
        near: The folder is made in this one, where what is written in the end has room too; else
            where temporary files are.
    """

    def __init__(self, near: Path | None = None) -> None:
        self._near = near
        self._waiting: dict[str, list[Sequence[Any]]] = {}

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix=".srlm-lite-", dir=self._near))
        # Nothing of it is to outlive a crash, so that nothing has to be safe on disk.
        self._base = sqlite3.connect(self._folder / "rows.sqlite", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
            self._base.execute(f"PRAGMA {pragma}")
        self._base.execute(f"PRAGMA temp_store_directory='{self._folder!s}'")
        self._base.execute("BEGIN")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._base.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def make(self, table: str) -> None:
        """Make a table or an index: the words behind CREATE."""
        self.run(f"CREATE {table}")

    def put(self, into: str, *values: Any) -> None:
        """Put a row into a table; a row whose key is there already is passed over."""
        waiting = self._waiting.setdefault(into, [])
        waiting.append(values)
        if len(waiting) >= BATCH:
            self._write(into)

    def run(self, statement: str, *values: Any) -> Iterator[Any]:
        """The rows that a statement gives, one by one; a single value each comes by itself."""
        for into in list(self._waiting):
            self._write(into)
        cursor = self._complain(self._base.execute, statement, values)
        return (row[0] if len(row) == 1 else row for row in cursor)

    def one(self, statement: str, *values: Any) -> Any:
        """The first of the rows that a statement gives, or None."""
        return next(self.run(statement, *values), None)

    def _write(self, into: str) -> None:
        rows = self._waiting.pop(into, [])
        if rows:
            places = ", ".join("?" * len(rows[0]))
            insert = f"INSERT OR IGNORE INTO {into} VALUES ({places})"
            self._complain(self._base.executemany, insert, rows)

    def _complain(self, run: Any, *arguments: Any) -> Any:
        try:
            return run(*arguments)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"what was read cannot be put by ({error})",
                where=str(self._folder.parent),
                way_out="Free some space there",
            ) from error


def packed(value: Any) -> str:
    """A value as the text of a row."""
    # Escaped: a lone surrogate, which a reply may hold until it is dropped, is no UTF-8.
    return _ENCODER.encode(value)


def unpacked(texts: Iterable[str]) -> Iterator[Any]:
    """The values of rows."""
    return map(json.loads, texts)
