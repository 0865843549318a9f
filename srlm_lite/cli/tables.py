"""The tables a person reads at the end."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

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
    heads = [(one.short or one.label).replace("accuracy", "acc.") for one in SHORT_FIGURES]
    columns += [*heads, "chars", "min"]
    places: list[tuple[str, StageDir]] = [("M1, anchor", run.anchor)]
    places += [(f"M{it.number + 1}, iteration {it.number}", it) for it in run.iterations()]
    rows = [[name, *_cells(place, gold=gold)] for name, place in places if place.is_done]
    lines = [
        "judge acc.: share of reply pairs that the model, as judge, puts in the right order",
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
    return plain_table(columns, rows) + "\n\n" + "\n".join(lines)


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows below a head; the first column to the left, the others to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=200, highlight=False, color_system=None).print(table)
    return out.getvalue().rstrip()


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
