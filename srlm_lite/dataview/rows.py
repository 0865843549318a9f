"""The rows of a data directory's files, one at a time, so that a file may be of any size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from srlm_lite.conversation import Asked, with_both_faces
from srlm_lite.errors import UserError
from srlm_lite.records import Instruction, Messages, Prompt, RankedReply, Record
from srlm_lite.run.files import checked, in_short, parsed_row

Kind = Literal["answers", "ranked", "prompts"]
OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that a data directory may have."""

    name: str
    kind: Kind
    held_out: bool = False
    """Whether models are measured on it, and may not learn its prompts."""
    needed: str = ""
    """When a run needs it, in words behind "needed"; empty: never."""

    @property
    def stem(self) -> str:
        """Its name where there is little room."""
        return self.name.removesuffix(".jsonl")


FILES = (
    DataFile("ift.jsonl", "answers", needed="unless anchor.use_ift is false"),
    DataFile(
        "eft_train.jsonl",
        "ranked",
        needed="unless anchor.use_eft is false, or anchor.eft_targets disturbed",
    ),
    DataFile("eft_eval.jsonl", "ranked", held_out=True, needed="by every run"),
    DataFile("prompts.jsonl", "prompts", needed="unless prompts.file names another list"),
    DataFile("eval_prompts.jsonl", "prompts", held_out=True),
)
"""In the order in which a run reads them."""

_KINDS: dict[Kind, type[Record]] = {
    "answers": Instruction,
    "ranked": RankedReply,
    "prompts": Prompt,
}
_PROMPT_KEYS = ("text", "prompt", "instruction")
"""Where a prompt list may have its texts, the first one that is there."""


@dataclass(frozen=True, slots=True)
class DataRow:
    """A row of any of the files; a prompt list has no reply."""

    line: int
    """In its file, from 1."""
    prompt_id: str
    prompt: str
    """What a reader sees: the user turn, or the transcript of a conversation."""
    messages: Messages | None
    response: str | None = None
    response_id: str | None = None
    rank: int = 0
    quality: float | None = None
    target: str | None = None

    @property
    def asked(self) -> Asked:
        """What is answered."""
        return self.messages or self.prompt


def files_of(directory: Path) -> list[DataFile]:
    """Those of the files that a directory has.

    Raises:
        UserError: There is no such directory, or it has none of them.
    """
    if not directory.is_dir():
        raise UserError(
            "is a file, not a directory" if directory.exists() else "no such directory",
            where=str(directory),
            way_out="Name one that `srlm-lite data prepare` has written",
        )
    found = [file for file in FILES if (directory / file.name).is_file()]
    if not found:
        raise UserError(
            f"has none of {', '.join(file.name for file in FILES)}",
            where=str(directory),
            way_out="Name a directory that `srlm-lite data prepare` has written, or give your "
            "files these names",
        )
    return found


def rows_of(path: Path, kind: Kind, on_bytes: OnBytes = lambda count: None) -> Iterator[DataRow]:
    """The rows of a file, in order.

    Args:
        on_bytes: Told how many bytes more of it have been read.

    Raises:
        UserError: A line cannot be read as such a row; names file and line.
    """
    check = checked(_KINDS[kind])
    for line, raw in _objects(path, on_bytes):
        where = f"{path}:{line}"
        key = "prompt"
        if kind == "prompts":
            key = next((key for key in _PROMPT_KEYS if key in raw), "text")
        try:
            raw = with_both_faces(raw, key)
        except ValueError as error:
            raise UserError(str(error), where=where) from error
        if kind == "prompts":
            raw = _as_prompt(raw, key, f"{path.stem}-{line}")
        try:
            record: Any = check.validate_python(_KINDS[kind].known(raw))
        except KeyError as error:
            raise UserError(f"lacks {error.args[0]}", where=where) from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            what = f"`{key}` is {in_short(first['input'])}: {first['msg']}"
            raise UserError(what, where=where) from error
        if (quality := getattr(record, "quality", None)) and not math.isfinite(quality):
            raise UserError(f"`quality` is {quality}", where=where)
        yield _row(line, record)


def _row(line: int, record: Any) -> DataRow:
    messages: Messages | None = record.messages
    if isinstance(record, Prompt):
        return DataRow(line, record.prompt_id, record.text, messages)
    if isinstance(record, Instruction):
        return DataRow(line, record.prompt_id, record.prompt, messages, record.response)
    return DataRow(
        line,
        record.prompt_id,
        record.prompt,
        messages,
        record.response,
        record.response_id,
        record.rank,
        record.quality,
        record.target,
    )


def _as_prompt(raw: dict[str, Any], key: str, default_id: str) -> dict[str, Any]:
    """A row of a prompt list as runs read it: under other names, or without an id."""
    text = {"text": raw[key]} if key in raw else {}
    named = raw.get("prompt_id")
    return {**raw, **text, "prompt_id": default_id if named is None else str(named), "source": ""}


def _objects(path: Path, on_bytes: OnBytes) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            on_bytes(len(raw))
            where = f"{path}:{line}"
            try:
                # Files from Windows may begin with a mark.
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError("not UTF-8 text", where=where) from error
            if text.strip():
                yield line, parsed_row(text, where=where)


def as_json(row: DataRow) -> str:
    """What is asked, by which two prompts are the same letter for letter."""
    asked = row.asked
    return asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
