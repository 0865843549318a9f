"""`srlm-lite evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from srlm_lite.cli.evaluation_tables import evaluation_text
from srlm_lite.cli.progress import ConsoleReporter, summary
from srlm_lite.cli.wrapping import columns
from srlm_lite.errors import UserError
from srlm_lite.forms import FORMS, form_of
from srlm_lite.processes import Processes, place
from srlm_lite.recipe import Recipe, overridden
from srlm_lite.run.files import read_json
from srlm_lite.run.layout import StageDir
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session, follow, refuse_sharding
from srlm_lite.stages.evaluation import evaluation
from srlm_lite.stages.judges import Place

MEASURES = (
    *("data", "evaluate", "judge", "openai", "rollout", "vllm"),
    *(kind.section for kind in FORMS.values() if kind.section is not None),
)
"""The sections of a recipe that say how to measure; the others say what the model is."""


def run_evaluate(
    *,
    directory: Path,
    which: str,
    data_dir: Path | None,
    overrides: Sequence[str],
    as_json: bool,
) -> None:
    """Measure one model of a run, unless it has been measured in this way before."""
    processes = Processes(place())
    run = RunDir(directory)
    console = ConsoleReporter(quiet=not processes.place.leads)
    with processes.joined(cpu=False):
        if not processes.place.leads:
            follow(processes)
            return
        recipe = _recipe(run, data_dir, overrides)
        if processes.shards:
            refuse_sharding(recipe)
        where, number = _place(run, which)
        if recipe != _recipe(run, None, []):
            # By content: another data directory of the same name is another evaluation.
            label = "set" if data_dir is None else data_dir.resolve().name
            where = where.evaluation_on(f"{label}-{recipe.digest()[:8]}")
        run.hold_to_files()
        session = Session(recipe, run, console, processes)
        with session.leading():
            if not where.evaluation.is_file():
                session.reach("judge")
                with run.locked(), console:
                    policy = [] if number is None else session.stack(number)
                    judge = [] if number is None else session.stack(number, "judge")
                    evaluation(
                        session, where, policy, judge=judge, shared=_shared(recipe, run, where)
                    )
    result = read_json(where.evaluation, judge=dict, policy=dict)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    typer.echo(evaluation_text(result, width=columns()))
    console.say(f"{which}: {summary('evaluation', result)}; all of it in {where.evaluation}")


def _recipe(run: RunDir, data_dir: Path | None, overrides: Sequence[str]) -> Recipe:
    """The run's recipe, with another way to measure."""
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0].strip()
        if section not in MEASURES:
            raise UserError(
                "would make it another model, not another measurement",
                where=f"--set {override}",
                way_out=f"Set something of {', '.join(MEASURES)}",
            )
    raw = run.recipe().model_dump(mode="json")
    if data_dir is not None:
        raw = {**raw, "data": {"dir": str(data_dir.resolve())}}
    return overridden(raw, overrides, where=str(run.run_json))


def _shared(recipe: Recipe, run: RunDir, where: StageDir) -> Place | None:
    """Where files go that all judgings of a run share, unless this one asks in another way."""
    own = run.recipe()
    if recipe.judge.form == own.judge.form and form_of(recipe).own == form_of(own).own:
        return None
    return lambda name: where.evaluation_dir / f"{name}.jsonl"


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
