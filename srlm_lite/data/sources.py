"""Where rows come from: a file, plain or gzipped, or a dataset on the Hub."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_lite.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_SUFFIXES = {".jsonl", ".json", ".ndjson", ".txt", ".gz", ".csv", ".tsv", ".parquet", ".zip"}
UNREADABLE = {".csv", ".tsv", ".parquet", ".zip"}
HUB_TIMEOUT_SECONDS = 10.0

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DataSource:
    """The rows of a file or dataset.

    Attributes:
        where: As the user named it, for messages.
        label: Its short name, for the rows that come from it.
        is_lines: Whether it is plain text; each row then has the one key `text`.
    """

    where: str
    label: str
    rows: list[Row]
    is_lines: bool = False

    def columns(self) -> list[str]:
        """All keys of all rows, in the order they first appear."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def read_source(source: str, *, split: str = "train") -> DataSource:
    """Read a file, or else a dataset of the Hub.

    Args:
        source: A path (`.jsonl`, `.txt`, either with `.gz`), or a Hub id such as `owner/name`.
        split: Of a Hub dataset; `train+validation` joins two.

    Raises:
        UserError: There is no such file; it is not UTF-8, or not JSON at some line; or the Hub
            is out of reach or does not have the dataset.
    """
    path = Path(source)
    if path.is_file():
        found = _read_file(path)
    elif path.is_dir():
        raise UserError("is a directory", where=source, way_out="Name a file in it")
    elif HUB_ID.fullmatch(source) and path.suffix.lower() not in FILE_SUFFIXES:
        found = DataSource(source, source, _read_hub(source, split=split))
    else:
        raise UserError(
            "no such file", where=source, way_out="Give a file or a Hub id such as owner/name"
        )
    if not found.rows:
        raise UserError("holds no rows", where=source)
    return found


def _read_file(path: Path) -> DataSource:
    names = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(names) if suffix != ".gz"), "")
    if kind in UNREADABLE:
        raise UserError(f"{kind} is not read", where=str(path), way_out="Convert it to JSON Lines")
    text = _read_text(path)
    label = path.name.removesuffix(".gz").removesuffix(kind)
    if kind == ".txt":
        return DataSource(
            str(path), label, [{"text": line} for line in _lines(text)], is_lines=True
        )
    return DataSource(str(path), label, _parse_jsonl(text, where=str(path)))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=str(path)) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"not a whole gzip file ({error})", where=str(path)) from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from error


def _lines(text: str) -> list[str]:
    # Not splitlines: JSON text may hold U+2028 and its like inside a string.
    return text.removesuffix("\n").split("\n")


def _parse_jsonl(text: str, *, where: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # of which JSONDecodeError is one
            raise UserError(
                f"not JSON ({getattr(error, 'msg', str(error))})",
                where=f"{where}:{number}",
                way_out="JSON Lines is expected: one object a line",
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                "not a JSON object",
                where=f"{where}:{number}",
                way_out="JSON Lines is expected: one object a line",
            )
        rows.append(row)
    return rows


def _read_hub(name: str, *, split: str) -> list[Row]:
    import httpx
    from huggingface_hub import HfApi, constants

    way_out = "Check the name and the network, or give a file that was downloaded before"
    try:
        if not constants.HF_HUB_OFFLINE:
            # One short question first: `datasets` itself retries for half a minute.
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
        import datasets

        return [dict(row) for row in datasets.load_dataset(name, split=split)]
    except httpx.TransportError as error:
        raise UserError(
            f"no such file, and the Hub is out of reach ({error})", where=name, way_out=way_out
        ) from error
    except (httpx.HTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"no such file, and the Hub does not give it ({reason})", where=name, way_out=way_out
        ) from error
