"""`srlm-lite evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from srlm_lite.cli.progress import Console, summary
from srlm_lite.config import recipe_from
from srlm_lite.errors import UserError
from srlm_lite.run_dir import RunDir, StageDir, read_json
from srlm_lite.session import Session
from srlm_lite.stages.evaluation import evaluation


def run_evaluate(*, directory: Path, which: str, data_dir: Path | None, as_json: bool) -> None:
    """Measure one model of a run, unless it has been measured on this data before."""
    run = RunDir(directory)
    raw = run.facts()["recipe"]
    if data_dir is not None:
        raw = {**raw, "data": {"dir": str(data_dir.resolve())}}
    recipe = recipe_from(raw, where=str(run.run_json))
    place, number = _place(run, which)
    if data_dir is not None:
        place = StageDir(place.path / "eval_on" / data_dir.resolve().name)
    console = Console()
    if not place.evaluation.is_file():
        session = Session(recipe, run, console)
        with run.locked(), console:
            policy = [] if number is None else session.stack(number)
            judge = [] if number is None else session.stack(number, "judge")
            evaluation(session, place, policy, judge=judge)
    result = read_json(place.evaluation)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    typer.echo(_lines(result))
    console.say(f"{which}: {summary('evaluation', result)}; all of it in {place.evaluation}")


def _place(run: RunDir, which: str) -> tuple[StageDir, int | None]:
    """Where a model's evaluation goes, and its iteration: 0 for the anchor, None for the base."""
    if which == "base":
        return run.base_evaluation, None
    if which == "last":
        which = str(run.last_done() or "anchor")
    if which == "anchor":
        if not run.anchor.training.is_file():
            raise UserError("has no anchor yet", where=str(run.path))
        return run.anchor, 0
    if not which.isdecimal() or not run.iteration(int(which)).delta_place.training.is_file():
        done = ", ".join(
            str(it.number) for it in run.iterations() if it.delta_place.training.is_file()
        )
        raise UserError(
            f"has no iteration {which}",
            where=str(run.path),
            way_out=f"It has: base, anchor{', ' + done if done else ''}",
        )
    return run.iteration(int(which)), int(which)


def _lines(result: dict[str, Any]) -> str:
    rows = [
        (f"{part} {name}", value)
        for part in ("judge", "policy")
        for name, value in result[part].items()
        if not isinstance(value, dict)
    ]
    histogram = result["judge"]["score_histogram"]
    rows.append(("judge scores", "  ".join(f"{score}: {n}" for score, n in histogram.items())))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {'-' if value is None else value}" for name, value in rows)
