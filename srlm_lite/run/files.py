"""Files of a run: JSON and JSONL, written whole or not at all, read with the mistake's place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from srlm_lite.errors import UserError
from srlm_lite.records import Record
from srlm_lite.run.sums import hold, note

R = TypeVar("R", bound=Record)

_ENCODER = json.JSONEncoder(ensure_ascii=False)


def read_jsonl(path: Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """All rows of a JSONL file.

    Args:
        growing: Of a run that may be going on, or was killed: a last line without its end, of a
            chunk that is being written, is passed over.

    Raises:
        UserError: The file is missing, or a line is not a JSON object; names the line.
    """
    hold(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # files from Windows may begin with a mark
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path)) from error
    except IsADirectoryError as error:
        raise UserError("is a directory, not a file", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=str(path)) from error
    if growing:
        text = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        rows.append(parsed_row(line, where=f"{path}:{number}"))
    return rows


def parsed_row(line: str, *, where: str) -> dict[str, Any]:
    """The JSON object of a line of a JSONL file.

    Raises:
        UserError: It is none, or holds half a character.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        told = getattr(error, "msg", str(error))
        raise UserError(f"not JSON ({told})", where=where) from error
    if _has_lone_surrogate(line, row):
        raise UserError(
            "holds half a character (a lone surrogate)",
            where=where,
            way_out="Write the file again as UTF-8, or leave the row out",
        )
    if not isinstance(row, dict):
        raise UserError("expected a JSON object", where=where)
    return row


def read_records(path: Path, kind: type[R], *, growing: bool = False) -> list[R]:
    """All rows of a JSONL file as records.

    Args:
        growing: As for `read_jsonl`.

    Raises:
        UserError: As `read_jsonl`; or a row lacks a key or has a value of another type.
    """
    return records_of(read_jsonl(path, growing=growing), kind, path)


def records_of(rows: Iterable[dict[str, Any]], kind: type[R], path: Path) -> list[R]:
    """The rows of a JSONL file as records.

    Args:
        path: For messages.

    Raises:
        UserError: A row lacks a key or has a value of another type.
    """
    check = checked(kind)
    records = []
    for number, row in enumerate(rows, start=1):
        try:
            records.append(check.validate_python(kind.known(row)))
        except KeyError as error:
            raise UserError(f"row {number} lacks {error.args[0]}", where=str(path)) from error
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"row {number}: `{first['loc'][0]}` is {in_short(first['input'])}: {first['msg']}",
                where=str(path),
            ) from error
    return records


_CHECKS: dict[type[Record], TypeAdapter[Any]] = {}


def checked(kind: type[R]) -> TypeAdapter[R]:
    """What holds a row to the types of a kind of record."""
    if kind not in _CHECKS:
        _CHECKS[kind] = TypeAdapter(kind)
    return _CHECKS[kind]


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def draft_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def write_json(path: Path, value: Any, *, noted: bool = False) -> None:
    """Write JSON atomically: indented, keys in the order given.

    Args:
        noted: With its hash beside it, where no `done.json` is going to have that.
    """
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    if noted:
        note(path)


def read_json(path: Path, **wanted: type) -> dict[str, Any]:
    """A JSON object from a file of the run.

    Args:
        wanted: Keys that the reader needs, and what stands there.

    Raises:
        UserError: It is missing, or not what the run has written there.
    """
    way_out = "Restore it, or make the run again"
    hold(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("is missing", where=str(path), way_out=way_out) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), way_out=way_out) from error
    if not isinstance(found, dict):
        raise UserError("not a JSON object", where=str(path), way_out=way_out)
    for key, kind in wanted.items():
        if not isinstance(found.get(key), kind):
            raise UserError(f"not as written: no `{key}`", where=str(path), way_out=way_out)
    return found


def _has_lone_surrogate(line: str, row: Any) -> bool:
    """Whether a text of a row cannot be written: only an escape can spell such a one."""
    if "\\ud" not in line and "\\uD" not in line:
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a whole JSONL file atomically."""
    write_atomically(path, "".join(jsonl_line(record) for record in records))


def jsonl_line(record: Record) -> str:
    """A record as a row of a JSONL file, with its end."""
    return _ENCODER.encode(record.to_row()) + "\n"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def in_short(value: Any) -> str:
    """What a message can show of a value: its JSON, or the ends of that."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}…{text[-8:]}"
