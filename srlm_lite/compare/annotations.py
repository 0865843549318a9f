"""Comparisons that others have annotated, in AlpacaEval's format."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from srlm_lite.data.columns import number_of
from srlm_lite.errors import UserError
from srlm_lite.evaluate.head_to_head import Outcome, head_to_head
from srlm_lite.evaluate.length_control import GamedRow
from srlm_lite.run.files import read_jsonl

TIE = 1.5


def compare_annotations(path: Path, difficulty: Path | None = None) -> dict[str, Any]:
    """Win rates of the model that a file of annotations is about, against its baseline.

    Args:
        path: JSON array or JSON lines with `output_1` (the baseline's), `output_2` (the model's)
            and `preference`, from 1 (the baseline wins) to 2; 0 is an old way to write a tie.
        difficulty: CSV with the prompts' difficulty, and maybe rows of gamed baselines, as
            AlpacaEval publishes them (`instruction_difficulty.csv`, `df_gamed.csv`).

    Raises:
        UserError: A row lacks a key, or a value is not what it should be.
    """
    rows = _rows(path)
    outcomes = [_outcome(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    gamed: list[GamedRow] = []
    if difficulty is not None:
        known, gamed = read_difficulties(difficulty)
        places = [
            _place(row.get("index", number), f"{path}, row {number + 1}")
            for number, row in enumerate(rows)
        ]
        missing = [place for place in places if place not in known]
        if missing:
            raise UserError(
                f"has no difficulty of prompt {missing[0]} ({len(missing)} are missing)",
                where=str(difficulty),
            )
        outcomes = [
            replace(one, difficulty=known[place])
            for one, place in zip(outcomes, places, strict=True)
        ]
    first = rows[0]
    return {
        "model": str(first.get("generator_2", "output_2")),
        "baseline": str(first.get("generator_1", "output_1")),
        "annotations": str(path),
        **head_to_head(outcomes, gamed),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: Any = None
    if path.is_file():
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            rows = None  # JSON lines, or an error that says in which line
    if not isinstance(rows, list):
        rows = read_jsonl(path)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError("holds no annotations", where=str(path))
    for key in ("generator_1", "generator_2"):
        for number, row in enumerate(rows, start=1):
            if isinstance(row.get(key), list | dict):
                raise UserError(
                    f"`{key}` is {row[key]!r}, not a model's name", where=f"{path}, row {number}"
                )
        if len({row.get(key) for row in rows}) > 1:
            raise UserError(f"is about several models ({key})", where=str(path))
    return list(rows)


def _place(value: Any, where: str) -> int:
    """The prompt's place in the evaluation set; a whole number, also one written as text."""
    whole = not isinstance(value, bool) and (not isinstance(value, float) or value.is_integer())
    try:
        if whole:
            return int(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"`index` is {value!r}, not a prompt's place", where=where)


def _outcome(row: dict[str, Any], where: str) -> Outcome:
    model, baseline = row.get("output_2"), row.get("output_1")
    if not isinstance(model, str) or not isinstance(baseline, str) or "preference" not in row:
        raise UserError("lacks output_1, output_2 or preference", where=where)
    return Outcome(_preference(row["preference"], where), len(model), len(baseline))


def _preference(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
    number = TIE if number == 0 else number
    if not 1 <= number <= 2:
        raise UserError(f"`preference` is {value!r}, not a number from 1 to 2", where=where)
    return float(number) - 1


def read_difficulties(path: Path) -> tuple[dict[int, float], list[GamedRow]]:
    """Difficulty by the prompt's place in the evaluation set, and the rows of gamed baselines.

    Raises:
        UserError: There is no such file, or no such column, or a value is no number.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"is no CSV file ({error})", where=str(path)) from error
    columns = set(rows[0]) if rows else set()
    if not columns >= {"index", "instruction_difficulty"}:
        raise UserError("needs the columns index and instruction_difficulty", where=str(path))
    known: dict[int, float] = {}
    gamed = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        place, hard = _place(row["index"], where), _number(row, "instruction_difficulty", where)
        known[place] = hard
        is_baseline = row.get("preference") and row.get("not_gamed_baseline", "False") != "True"
        if columns >= {"preference", "std_delta_len"} and is_baseline:
            gamed.append(
                GamedRow(
                    preference=_number(row, "preference", where),
                    gap=_number(row, "std_delta_len", where),
                    difficulty=hard,
                )
            )
    return known, gamed


def _number(row: Mapping[str, Any], column: str, where: str) -> float:
    number = number_of(row[column])
    if number is None:
        raise UserError(f"`{column}` is {row[column]!r}, no number", where=where)
    return number
