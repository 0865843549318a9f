"""`srlm-lite mt-bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from srlm_lite.cli.models import Models
from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.cli.tables import plain_table
from srlm_lite.cli.wrapping import columns, fitted
from srlm_lite.compare.mt_bench import read_questions, run_mt_bench
from srlm_lite.errors import UserError
from srlm_lite.telling import json_for_terminal


@dataclass(frozen=True, slots=True)
class MtBenchWish:
    """An MT-Bench as asked for."""

    directory: Path
    model: str
    questions: Path
    references: Path | None
    limit: int | None
    judge: str
    overrides: Sequence[str]


def run_command(wish: MtBenchWish, *, as_json: bool) -> None:
    """Let a model answer and a server grade, unless that has been done before."""
    console = ConsoleReporter()
    models = Models(wish.directory, wish.overrides, console)
    questions = read_questions(wish.questions, wish.references)
    judge, model = models.server(wish.judge), models.run_model(wish.model)
    if model.session.engine_kind("policy").remote:
        raise UserError(
            "the run's answers come from a server, which is asked single turns",
            where=str(wish.directory),
            way_out="Grade a run whose rollout.engine is transformers or vllm",
        )
    with models.session.run.locked(), console:
        result, folder = run_mt_bench(model, questions[: wish.limit], judge)
    if as_json:
        typer.echo(json_for_terminal(result, indent=2))
        return
    typer.echo(fitted(mt_bench_text(result), columns()))
    console.say(f"answers, grades and all figures: {folder}")


def mt_bench_text(result: dict[str, Any]) -> str:
    """The table of an MT-Bench."""
    interval = "-" if result["low"] is None else f"{result['low']:.2f} to {result['high']:.2f}"
    rows = [["all", _number(result["score"]), interval]]
    rows += [[f"turn {turn}", _number(score), ""] for turn, score in result["turns"].items()]
    rows += [[name, _number(score), ""] for name, score in result["categories"].items()]
    notes = [
        f"{result['model']}, {result['questions']} questions of two turns, "
        f"{result['with_reference']} with reference answers",
        f"judge: {result['judge']['name']}, single answers, template {result['judge']['template']}",
        plain_table(["", "rating", "95%"], rows),
        "",
        "rating: 1 to 10, the mean of all that can be read; 95%: bootstrap over questions",
    ]
    for count, text in (
        (result["unreadable"], f"left out, the judge unreadable: {result['unreadable']} grades"),
        (result["truncated"], f"answers cut off at the token limit: {result['truncated']}"),
        (result["did_not_fit"], f"answers left empty, no room for them: {result['did_not_fit']}"),
    ):
        if count:
            notes.append(text)
    return "\n".join(notes)


def _number(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"
