"""`srlm-lite iterate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from srlm_lite.cli.facts import hardware, versions
from srlm_lite.cli.preflight import NAMES, preflight_json, preflight_text
from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.cli.tables import closing_table
from srlm_lite.cli.wrapping import columns
from srlm_lite.errors import GateError, program
from srlm_lite.hardware import pick_recipe
from srlm_lite.loop import iterate
from srlm_lite.preflight.checks import Answer, answers, can_start, refuse
from srlm_lite.preflight.launch import Launch
from srlm_lite.processes import Processes, place, takes_sharding
from srlm_lite.recipe import Recipe, as_begun, load_recipe, overridden
from srlm_lite.report.answer import anchor_beside_best, best
from srlm_lite.report.facts import gather
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session, follow, refuse_several
from srlm_lite.tracking import tracked


@dataclass(frozen=True, slots=True)
class Wish:
    """A run as asked for; without a recipe it is that of the run which is there."""

    recipe: str | None
    directory: Path
    overrides: Sequence[str] = ()
    fresh: bool = False
    planned: bool = True

    def launch(self, processes: int, say: ConsoleReporter) -> tuple[Launch, RunDir]:
        """The run as it is about to be started, and its directory."""
        run = RunDir(self.directory)
        recipe = _recipe(self.recipe, self.overrides, None if self.fresh else run, say)
        return Launch(recipe, run, self.fresh, self.planned, processes), run


def run_iterate(wish: Wish) -> None:
    """Open or resume the run, go through the loop, and close with its table."""
    processes = Processes(place())
    console = ConsoleReporter(quiet=not processes.place.leads)
    launch, run = wish.launch(processes.world, console)
    recipe = launch.recipe
    refuse_several(recipe, processes.world)  # each of them knows, so none has to be told
    stopped: GateError | None = None
    with processes.joined(cpu=recipe.base.device == "cpu"):
        if not processes.place.leads:
            follow(processes)
            return
        warnings = refuse(replace(launch, sharded=processes.shards))
        facts = {
            "versions": versions(),
            "hardware": hardware(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **({"processes": processes.world} if processes.world > 1 else {}),
            **({"sharded": True} if processes.shards else {}),
        }
        with run.locked(), run.or_as_before():
            begins = "resuming" if launch.goes_on else "starting"
            run.open(recipe, facts, fresh=wish.fresh)
            console.say(f"{begins} {recipe.name} in {wish.directory}")
            with tracked(recipe, run, console) as tracker:
                session = Session(recipe, run, console, processes, tracker)
                with console, session.leading():
                    for line in warnings:
                        console.warn(line)
                    try:
                        iterate(session)
                    except GateError as error:  # told below, when other processes have gone home
                        stopped = error
    typer.echo(closing_table(run, recipe))
    if stopped is not None:
        raise stopped
    for command, what_for in next_steps(run):
        console.command(command, what_for)


def dry_run(wish: Wish, *, as_json: bool) -> None:
    """Ask all that can fail, show the answers, and write nothing; exit code 2 where one is bad."""
    at, console = place(), ConsoleReporter()
    if not at.leads:  # one of several processes answers for all
        return
    launch, _ = wish.launch(at.world, console)
    launch = replace(launch, sharded=takes_sharding() and at.world > 1)
    found = []
    for answer in answers(launch):
        found.append(answer)
        if not as_json:  # as they come: the last ones load what loads a base
            typer.echo(preflight_text([answer], width=columns(), names=NAMES))
    if as_json:
        typer.echo(preflight_json(launch, found))
    else:
        console.command(f"next: {_same_without_asking()}", _what_for(found))
    raise typer.Exit(0 if can_start(found) else 2)


def _same_without_asking() -> str:
    """This command as it starts the run."""
    return shlex.join([program(), *(word for word in sys.argv[1:] if word != "--dry-run")])


def _what_for(found: Sequence[Answer]) -> str:
    return "starts it" if can_start(found) else "once what is marked is put right"


def _recipe(
    name: str | None, overrides: Sequence[str], run: RunDir | None, say: ConsoleReporter
) -> Recipe:
    """The recipe that is named, or that of the run that is there, or one for this machine."""
    begun = run if run is not None and run.path.is_dir() and run.exists else None
    if name is not None:
        named = load_recipe(name, overrides)
        if begun is None or not begun.is_begun:
            return named
        return as_begun(named, begun.facts()["recipe"], where=name)
    if begun is not None:
        raw = begun.recipe().model_dump(mode="json")
        return overridden(raw, overrides, where=str(begun.run_json))
    name, why = pick_recipe()
    say.say(f"recipe {name}: {why}")
    return load_recipe(name, overrides)


_BESIDE_M1: dict[str | None, str] = {
    "ahead": "; M1 scored higher",
    "alike": "; by its score not told apart from M1",
}


def next_steps(run: RunDir) -> list[tuple[str, str]]:
    """What to type now, and what for; the export is of the best iteration."""
    there, last = f"--adapters {shlex.quote(str(run.path))}", run.last_done()
    if not last:
        return [(f"next: {program()} show run {there}", "how it stands")]
    facts = gather(run, texts=False)
    found = best(facts)
    number = last if found is None or found.number is None else found.number
    out = shlex.quote(f"{run.path}-m{number + 1}")
    rows = "judgements" if facts.words.why_no_pairs else "pairs"
    beside = _BESIDE_M1.get(anchor_beside_best(facts), "")
    steps = {
        f"report {there}": "one page: did it improve, and by what",
        f"show {rows} {there}": "what it learned from",
        f"export {there} --iteration {number} --out {out}": (
            f"its best iteration, as weights{beside}"
        ),
    }
    return [
        (f"{'     ' if i else 'next:'} {program()} {command}", what)
        for i, (command, what) in enumerate(steps.items())
    ]
