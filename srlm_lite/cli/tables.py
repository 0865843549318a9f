"""The tables a person reads at the end."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from srlm_lite.cli.wrapping import columns as terminal
from srlm_lite.cli.wrapping import fitted
from srlm_lite.evaluate.judge_figures import SHORT_FIGURES
from srlm_lite.recipe import Recipe
from srlm_lite.run.files import read_json
from srlm_lite.run.layout import StageDir
from srlm_lite.run.run import RunDir
from srlm_lite.stages.evaluation import best_line


def closing_table(run: RunDir, recipe: Recipe) -> str:
    """One row for each model of the run, and below it what the columns mean."""
    gold = recipe.evaluate.gold is not None
    columns = ["model", "pairs"]
    if gold:
        columns += ["gold", "greedy"]
    heads = [(one.short or one.label).replace(" accuracy", "") for one in SHORT_FIGURES]
    columns += [*heads, "chars", "min"]
    places: list[tuple[str, StageDir]] = [("M1, anchor", run.anchor)]
    places += [(f"M{it.number + 1}, iteration {it.number}", it) for it in run.iterations()]
    rows = [[name, *_cells(place, gold=gold)] for name, place in places if place.is_done]
    lines = [
        "judge: share of reply pairs that the model, as judge, puts in the right order",
        "ties, readable: pairs it scores equal; votes that could be read.  chars: mean length",
    ]
    if gold:
        lines.insert(
            0,
            f"gold: {recipe.evaluate.gold} on sampled answers to held-out prompts, ± standard "
            "error; greedy: on greedy ones",
        )
    best = best_line(run, recipe.evaluate.gate)
    if best is not None:
        lines.append(best)
    return plain_table(columns, rows) + "\n\n" + fitted("\n".join(lines), terminal())


def plain_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None
) -> str:
    """Rows below a head; the first column to the left, the others to the right.

    Args:
        width: Columns of the terminal. A table that is wider comes in several, each with the first
            column; default: of the terminal that stdout is, if it is one.
    """
    rows = list(rows)
    width = terminal() if width is None else width
    whole = _drawn(columns, rows, range(len(columns)))
    if width is None or _widest(whole) <= width or len(columns) < 3:
        return whole
    tables, taken = [], [1]
    for number in range(2, len(columns) + 1):
        if number < len(columns) and _widest(_drawn(columns, rows, [0, *taken, number])) <= width:
            taken.append(number)
            continue
        tables.append(_drawn(columns, rows, [0, *taken]))
        taken = [number]
    return "\n".join(tables)


def _drawn(columns: Sequence[str], rows: Sequence[Sequence[str]], places: Iterable[int]) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    places = list(places)
    for place in places:
        table.add_column(columns[place], justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in places))
    out = io.StringIO()
    Console(file=out, width=1000, highlight=False, color_system=None, markup=False).print(table)
    return out.getvalue().rstrip()


def _widest(text: str) -> int:
    return max(len(line.rstrip()) for line in text.splitlines())


def _cells(place: StageDir, *, gold: bool) -> list[str]:
    result = read_json(place.evaluation, judge=dict, policy=dict)
    done = read_json(place.done, counts=dict, seconds=float)
    judge, policy = result["judge"], result["policy"]
    cells = [str(done["counts"].get("pairs", {}).get("pairs", ""))]
    if gold:
        error = policy.get("gold_se")
        cells += [
            _number(policy.get("gold_mean")) + (f" ±{error:.2f}" if error is not None else ""),
            _number(policy.get("greedy", {}).get("gold_mean")),
        ]
    return [
        *cells,
        *(_number(one.of(judge)) for one in SHORT_FIGURES),
        _number(policy.get("mean_length_chars"), digits=0),
        _number(done["seconds"] / 60, digits=1),
    ]


def _number(value: Any, *, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
