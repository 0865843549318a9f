"""Where rows come from: files, folders of them, what `datasets` has saved, or the Hub.

Text is read here, row by row, rather than by `datasets`, which guesses types: of JSON texts that
look like dates become dates and long integers are rounded; of CSV 007 becomes 7 and "NA" nothing,
and cells of a row with one too many move to other columns. Parquet and Arrow know their types.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from srlm_lite.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_TIMEOUT_SECONDS = 10.0
PACKED = (".gz", ".bz2", ".xz", ".zst")
TEXT = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather")
READ = "JSON, JSON Lines, CSV, TSV, Parquet, Arrow and .txt are read, also as .gz, .bz2, .xz, .zst"
SPLITS = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./0-9]|$)")
BATCH = 500
SAMPLES = 200
LOOKED_AT = 2000
LARGEST_CELL = 1 << 27
CHUNK = 1 << 16
MEGABYTE = 1 << 20

Row = dict[str, Any]
Watch = Callable[[int], None]


@dataclass(slots=True)
class Column:
    """What was seen of a column: cells of the first rows that say something, and how many do."""

    cells: list[Any] = field(default_factory=list)
    filled: int = 0

    def add(self, cell: Any) -> None:
        """See one more cell."""
        if cell is None or cell == "":
            return
        self.filled += 1
        if len(self.cells) < SAMPLES:
            self.cells.append(cell)


@dataclass(slots=True)
class DataSource:
    """The rows of a file or dataset; they are read anew whenever they are gone through.

    Attributes:
        where: As the user named it, for messages.
        label: Its short name, for the rows that come from it.
        rows: One after another, each a dict.
        is_lines: Whether it is plain text; each row then has the one key `text`.
        is_typed: Whether it says itself which columns there are, so that a part tells all.
        count: How many rows, where that is known without reading them.
        notes: What the user should know of how it is read.
    """

    where: str
    label: str
    rows: Iterable[Row]
    is_lines: bool = False
    is_typed: bool = False
    count: int | None = None
    notes: tuple[str, ...] = ()
    _profile: dict[str, Column] | None = None

    def profile(self) -> dict[str, Column]:
        """The columns, in the order they first appear, from one reading of all rows.

        Of a table that knows its columns the first rows are read alone.

        Raises:
            UserError: There is no row, or one cannot be read.
        """
        if self._profile is None:
            found: dict[str, Column] = {}
            number = 0
            for number, row in enumerate(self.rows, start=1):
                for name, cell in row.items():
                    found.setdefault(name, Column()).add(cell)
                if self.is_typed and number >= LOOKED_AT:
                    break
            if not number:
                raise UserError("holds no rows", where=self.where)
            if not self.is_typed:
                self.count = number
            self._profile = found
        return self._profile

    def columns(self) -> list[str]:
        """All keys of all rows, in the order they first appear."""
        return list(self.profile())


@dataclass(frozen=True, slots=True)
class _RowsAnew:
    """Rows that a function reads anew each time."""

    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def read_source(
    source: str, *, split: str = "train", config: str | None = None, watch: Watch | None = None
) -> DataSource:
    """A file, a folder, or else a dataset of the Hub; nothing but its first rows is read yet.

    Args:
        source: A path, or a Hub id such as `owner/name`.
        split: Of a dataset with several; `train+validation` joins two.
        config: Of a Hub dataset with several.
        watch: Is told how many bytes of a file were read, now and then.

    Raises:
        UserError: There is no such file; it is of no kind that is read; or the Hub is out of reach
            or does not have the dataset.
    """
    path = Path(source)
    if path.is_file():
        return _file(path, watch)
    if path.is_dir():
        return _folder(path, split, watch)
    if HUB_ID.fullmatch(source) and _kind(path.name) is None and path.suffix != ".zip":
        return _hub(source, split=split, config=config)
    raise UserError(
        "no such file", where=source, way_out="Give a file or a Hub id such as owner/name"
    )


# Files


def _file(path: Path, watch: Watch | None) -> DataSource:
    where, name = str(path), path.name
    if path.suffix.lower() == ".zip":
        return _zip(path, watch)
    kind = _kind(name)
    if kind in TABLES:
        if kind != path.suffix.lower():
            raise UserError(f"a packed {kind} is not read", where=where, way_out="Unpack it")
        return _table(path, kind)
    packing = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    if kind is None and path.suffix and not packing:
        raise UserError(f"{path.suffix} is not read", where=where, way_out=READ)

    @contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with _complaining(where), path.open("rb") as raw:
            yield _unpacked(_Watched(raw, watch) if watch else raw, packing)

    return _text(opened, where, _label(name), kind or ".jsonl")


def _kind(name: str) -> str | None:
    """What a name says of what is in a file, whatever it is packed with."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT + TABLES else None


def _label(name: str) -> str:
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    kind = _kind(name)
    return name[: -len(kind)] if kind else name


def _unpacked(raw: IO[bytes], packing: str) -> IO[bytes]:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # readable is enough
    if packing == ".bz2":
        return bz2.open(raw)
    if packing == ".xz":
        return lzma.open(raw)
    if packing == ".zst":
        import pyarrow

        return io.BufferedReader(
            _PyarrowStream(pyarrow.CompressedInputStream(raw, "zstd")), 1 << 20
        )
    return raw


class _PyarrowStream(io.RawIOBase):
    """A stream of pyarrow's, as Python's own buffers want it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


class _Watched(io.BufferedReader):
    """A file that says how much of it was read."""

    def __init__(self, raw: Any, watch: Watch) -> None:
        super().__init__(raw, MEGABYTE)
        self._watch = watch

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self._watch(len(found))
        return found

    def read1(self, size: int = -1, /) -> bytes:
        found = super().read1(size)
        self._watch(len(found))
        return found


@contextmanager
def _complaining(where: str) -> Iterator[None]:
    """What is wrong with a file, in one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=where) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        kind = "compressed" if where.endswith((".xz", ".bz2", ".zip")) else "gzip"
        raise UserError(f"not a whole {kind} file ({error})", where=where) from error
    except (lzma.LZMAError, zipfile.BadZipFile) as error:
        raise UserError(f"not a whole file of its kind ({error})", where=where) from error
    except RuntimeError as error:  # zipfile's word for a member with a password
        raise UserError(f"cannot be read ({error})", where=where) from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=where) from error


Opened = Callable[[], Any]
"""Opens a file's bytes, as a context."""


def _text(opened: Opened, where: str, label: str, kind: str) -> DataSource:
    readers = {".txt": _lines, ".csv": _csv, ".tsv": _tsv, ".json": _json}
    reader = readers.get(kind, _jsonl)

    def read() -> Iterator[Row]:
        with _complaining(where), opened() as raw:
            newline = "" if kind in (".csv", ".tsv") else "\n"
            yield from reader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline), where)

    return DataSource(where, label, _RowsAnew(read), is_lines=kind == ".txt")


def _lines(text: IO[str], where: str) -> Iterator[Row]:
    # Not splitlines: a text may hold U+2028 and its like.
    return ({"text": line.removesuffix("\n")} for line in text)


def _jsonl(text: IO[str], where: str) -> Iterator[Row]:
    """JSON lines; or an array of objects under a name that is not its own."""
    number, first = _first_line(text)
    if re.match(r"\s*\[\s*(?:\{|$)", first):
        return _array(first, text, where)
    return _objects(chain([first + _rest_of_line(first, text)], text), where, number)


def _first_line(text: IO[str]) -> tuple[int, str]:
    """Number and beginning of the first line that is not blank: a line may be the whole file."""
    number = 1
    while (line := text.readline(CHUNK)) and not line.strip():
        number += 1
    return number, line


def _rest_of_line(line: str, text: IO[str]) -> str:
    return "" if line.endswith("\n") else text.readline()


def _objects(lines: Iterable[str], where: str, number: int) -> Iterator[Row]:
    for place, line in enumerate(lines, start=number):
        if line.strip():
            yield _object(line, f"{where}:{place}", "JSON Lines is expected: one object a line")


def _object(line: str, where: str, way_out: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # of which JSONDecodeError is one
        told = getattr(error, "msg", str(error))
        raise UserError(f"not JSON ({told})", where=where, way_out=way_out) from error
    if not isinstance(row, dict):
        raise UserError("not a JSON object", where=where, way_out=way_out)
    return row


def _json(text: IO[str], where: str) -> Iterator[Row]:
    """JSON lines, an array of objects, or an object that holds the rows as its one list."""
    number, first = _first_line(text)
    if first.lstrip().startswith("["):
        yield from _array(first, text, where)
        return
    first += _rest_of_line(first, text)
    second = text.readline()
    if second.strip() and not second.lstrip().startswith("{"):  # one object over many lines
        yield from _rows_within(_object(first + second + text.read(), where, READ))
        return
    found = _objects(chain([first, second], text), where, number)
    row = next(found, None)
    following = next(found, None)
    if following is None:
        yield from _rows_within(row) if row else ()
        return
    yield from chain([row or {}, following], found)


def _rows_within(document: Row) -> Sequence[Row]:
    """The rows of an object that holds nothing else, such as {"data": [...]}; else itself."""
    lists = [value for value in document.values() if isinstance(value, list)]
    if len(lists) == 1 and len(document) <= 4 and lists[0]:
        rows = lists[0]
        plain = all(isinstance(v, str | int | float) or v is rows for v in document.values())
        said = any(set(row) & {"role", "from"} for row in rows if isinstance(row, dict))
        if plain and all(isinstance(row, dict) for row in rows) and not said:
            return rows
    return [document]


def _array(first: str, text: IO[str], where: str) -> Iterator[Row]:
    """The objects of an array, one after another: it may be larger than memory."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    buffer, place, number, size = first, first.index("[") + 1, 1, CHUNK
    while True:
        if (found := between.match(buffer, place)) is not None:
            place = found.end()
        if buffer.startswith("]", place):
            return
        at = f"{where}, item {number}"
        try:
            row, place = decoder.raw_decode(buffer, place)
        except RecursionError as error:
            raise UserError(f"not JSON ({error})", where=at) from error
        except json.JSONDecodeError as error:
            # Is it wrong, or does it only go on? An open string is told of by where it begins.
            cut = error.pos >= len(buffer) - 64 or error.msg.startswith("Unterminated string")
            more = text.read(size) if cut else ""
            if not more:
                ended = not buffer[place:].strip()
                what = "the array does not end" if ended else f"not JSON ({error.msg})"
                raise UserError(what, where=at) from error
            buffer, place, size = buffer[place:] + more, 0, 2 * size
            continue
        if not isinstance(row, dict):
            raise UserError("not a JSON object", where=at)
        yield row
        number, size = number + 1, CHUNK


def _csv(text: IO[str], where: str, delimiter: str = "") -> Iterator[Row]:
    csv.field_size_limit(LARGEST_CELL)
    first = text.readline()
    if not delimiter:  # where the comma is a decimal one, spreadsheets write semicolons
        delimiter = ";" if ";" in first and "," not in first else ","
    rows = csv.reader(chain([first], text), delimiter=delimiter)
    try:
        head = next(rows, [])
        if len(set(head)) < len(head):
            twice = next(name for name in head if head.count(name) > 1)
            raise UserError(f"two columns are named {twice!r}", where=where)
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(head):
                raise UserError(
                    f"has {len(cells)} cells, the head has {len(head)}",
                    where=f"{where}:{rows.line_num}",
                    way_out="Put cells with a separator in quotation marks",
                )
            yield dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"not CSV ({error})", where=f"{where}:{rows.line_num}") from error


def _tsv(text: IO[str], where: str) -> Iterator[Row]:
    return _csv(text, where, delimiter="\t")


def _table(path: Path, kind: str) -> DataSource:
    """A Parquet or Arrow file, by batches of its rows."""
    from pyarrow import ArrowException, ArrowInvalid, ipc, parquet

    where = str(path)

    def batches() -> Iterator[Any]:
        if kind == ".parquet":
            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches(BATCH)
            return
        with path.open("rb") as raw:
            try:
                file = ipc.open_file(raw)
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
            except ArrowInvalid:  # a stream, as `datasets` writes it
                raw.seek(0)
                yield from ipc.open_stream(raw)

    def read() -> Iterator[Row]:
        try:
            for batch in batches():
                for start in range(0, batch.num_rows, BATCH):
                    yield from batch.slice(start, BATCH).to_pylist()
        except (ArrowException, OSError) as error:
            raise UserError(f"not a whole {kind} file ({error})", where=where) from error

    count = None
    if kind == ".parquet":
        try:
            count = parquet.read_metadata(path).num_rows
        except (ArrowException, OSError) as error:
            raise UserError(f"not a whole {kind} file ({error})", where=where) from error
    return DataSource(where, _label(path.name), _RowsAnew(read), is_typed=True, count=count)


# Folders


def _zip(path: Path, watch: Watch | None) -> DataSource:
    where = str(path)
    with _complaining(where), zipfile.ZipFile(path) as packed:
        names = [
            name
            for name in packed.namelist()
            if _kind(name) in TEXT and not name.startswith("__MACOSX")
        ]

    def part(name: str) -> DataSource:
        @contextmanager
        def opened() -> Iterator[IO[bytes]]:
            inside = f"{where}/{name}"
            with (
                _complaining(inside),
                zipfile.ZipFile(path) as packed,
                packed.open(name) as raw,
            ):
                packing = Path(name).suffix.lower()
                yield _unpacked(raw, packing if packing in PACKED else "")

        return _text(opened, f"{where}/{name}", _label(Path(name).name), _kind(name) or "")

    return _joined(where, path.stem, names, "train", part)


def _folder(path: Path, split: str, watch: Watch | None) -> DataSource:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    names = sorted(
        one.relative_to(path).as_posix()
        for one in path.rglob("*")
        if one.is_file()
        and _kind(one.name) is not None
        and not any(part.startswith((".", "_")) for part in one.relative_to(path).parts)
        and not re.match(r"(?i)readme|license|dataset_infos?\.json|requirements", one.name)
    )
    if not names:
        raise UserError("a directory without a file that is read", where=str(path), way_out=READ)
    return _joined(str(path), path.resolve().name, names, split, lambda n: _file(path / n, watch))


def _joined(
    where: str,
    label: str,
    names: Sequence[str],
    split: str,
    part: Callable[[str], DataSource],
) -> DataSource:
    """Files of one kind as one source; of those that name splits the ones asked for."""
    kinds = Counter(_kind(name) for name in names)
    if len(kinds) != 1:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        raise UserError(
            f"holds files of several kinds ({found})" if kinds else "holds no file that is read",
            where=where,
            way_out="Name one of them" if kinds else READ,
        )
    told = {name: {_split(one) for one in SPLITS.findall(name)} for name in names}
    every = sorted(set().union(*told.values()))
    chosen, notes = list(names), []
    if every:
        wanted = {_split(one) for one in split.split("+")}
        chosen = [name for name in names if told[name] & wanted]
        if not chosen:
            raise UserError(
                f"no file of split {split}; there: {', '.join(every)}",
                where=where,
                way_out=f"Choose with --split {every[0]}",
            )
        if len(chosen) < len(names):
            notes.append(f"{len(chosen)} of {len(names)} files read: those of split {split}")
    parts = [part(name) for name in chosen]

    def read() -> Iterator[Row]:
        for one in parts:
            yield from one.rows

    counts = [one.count for one in parts]
    return DataSource(
        where,
        label,
        _RowsAnew(read),
        is_lines=parts[0].is_lines,
        # Files of a table need not have the same columns.
        is_typed=parts[0].is_typed and len(parts) == 1,
        count=None if None in counts else sum(filter(None, counts)),
        notes=tuple(notes),
    )


def _split(name: str) -> str:
    return {"valid": "validation", "val": "validation", "dev": "validation"}.get(name, name)


def _saved(path: Path, split: str) -> DataSource:
    """What `save_to_disk` wrote: a dataset, or several by split."""
    import datasets

    where = str(path)
    try:
        found = datasets.load_from_disk(where)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"not a whole saved dataset ({error})", where=where) from error
    if isinstance(found, datasets.DatasetDict):
        names = split.split("+")
        if missing := [name for name in names if name not in found]:
            raise UserError(
                f"no split {missing[0]}; there: {', '.join(found)}",
                where=where,
                way_out=f"Choose with --split {next(iter(found), 'NAME')}",
            )
        chosen = [found[name] for name in names]
    else:
        chosen = [found]

    def read() -> Iterator[Row]:
        for one in chosen:
            for batch in one.data.to_batches(BATCH):
                yield from batch.to_pylist()

    count = sum(one.num_rows for one in chosen)
    return DataSource(where, path.resolve().name, _RowsAnew(read), is_typed=True, count=count)


# The Hub


def _hub(name: str, *, split: str, config: str | None) -> DataSource:
    """A dataset of the Hub, streamed, so that nothing of it is kept; offline from the cache."""
    import httpx
    from huggingface_hub import HfApi, constants

    offline = constants.HF_HUB_OFFLINE

    @contextmanager
    def complaining() -> Iterator[None]:
        way_out = "Check the name and the network, or give a file that was downloaded before"
        try:
            yield
        except UserError:
            raise
        except httpx.TransportError as error:
            raise UserError(
                f"no such file, and the Hub is out of reach ({error})", where=name, way_out=way_out
            ) from error
        except (httpx.HTTPError, OSError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if "Config name is missing" in reason:
                there = str(error).partition("['")[2].partition("']")[0].replace("', '", ", ")
                raise UserError(
                    f"has several configurations: {there}",
                    where=name,
                    way_out="Choose one with --config",
                ) from error
            if "Bad split" in reason or "Unknown split" in reason:
                way_out = "Choose one with --split"
            raise UserError(
                f"no such file, and the Hub does not give it ({reason})",
                where=name,
                way_out=way_out,
            ) from error

    with complaining():
        if not offline:
            # One short question first: `datasets` itself retries for half a minute.
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
        import datasets

        parts = split.split("+")
        how: dict[str, Any] = {}
        folder = tempfile.TemporaryDirectory(prefix="srlm-lite-") if "[" in split else None
        if folder is not None and not offline:  # a part of a split cannot be streamed
            parts, how = [split], {"cache_dir": folder.name}
        elif not offline:
            how = {"streaming": True}
        chosen = [datasets.load_dataset(name, config, split=part, **how) for part in parts]

    def read(_kept: Any = folder) -> Iterator[Row]:  # the folder goes when nobody reads any more
        with complaining():
            for one in chosen:
                yield from (dict(row) for row in one)

    return DataSource(name, name, _RowsAnew(read), is_typed=True)
