"""What was read, put by on disk: a million rows fit no memory, and a split has to know them all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from srlm_lite.errors import UserError

CACHE_KIB = 64 << 10
BATCH = 2000
PREFIX = ".srlm-lite-rows-"
_LOCK = ".lock"
_ENCODER = json.JSONEncoder(separators=(",", ":"))


class RowStore:
    """A hidden folder with a database, which is gone with the context.

    Where the process is killed it stays, and goes when the next one is made beside it.

    Args:
        near: The folder is made in this one, where what is written in the end has room too; else
            where temporary files are.
    """

    def __init__(self, near: Path | None = None) -> None:
        self._near = near
        self._waiting: dict[str, list[Sequence[Any]]] = {}

    def __enter__(self) -> Self:
        near = Path(tempfile.gettempdir()) if self._near is None else self._near
        remove_left(near)
        self._folder, self._lock = _made(near)
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
        self._lock.close()

    @property
    def folder(self) -> Path:
        """For what else is to be gone with the rows."""
        return self._folder

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


def remove_left(near: Path) -> None:
    """Remove what killed processes have left in a folder; what a living one works in is locked."""
    for folder in near.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _made(near: Path) -> tuple[Path, IO[str]]:
    """A new folder, and its lock, which goes with the process, however that ends."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=near))
        except FileNotFoundError as error:  # it is there, but no place for files, as /proc is
            raise UserError(
                "no directory can be made here", where=str(near), way_out="Choose another"
            ) from error
        lock = (folder / _LOCK).open("w")
        with contextlib.suppress(
            OSError
        ):  # of a disk that knows no locks: nothing is removed there
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have found it before it was locked, and taken it for left.
        if os.fstat(lock.fileno()).st_nlink:
            return folder, lock
        lock.close()


def packed(value: Any) -> str:
    """A value as the text of a row."""
    # Escaped: a lone surrogate, which a reply may hold until it is dropped, is no UTF-8.
    return _ENCODER.encode(value)


def unpacked(texts: Iterable[str]) -> Iterator[Any]:
    """The values of rows."""
    return map(json.loads, texts)
