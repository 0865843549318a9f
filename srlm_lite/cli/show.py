"""`srlm-lite show`: read a run without opening its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from srlm_lite.records import Record
    from srlm_lite.run_dir import IterationDir, RunDir

app = typer.Typer(help="Look into a run.", no_args_is_help=True)

Adapters = Annotated[Path, typer.Option("--adapters", help="The run directory.", metavar="DIR")]
Iteration = Annotated[
    int | None, typer.Option(help="Default: the last one.", metavar="T", show_default=False)
]
Limit = Annotated[int, typer.Option(help="At most so many; 0 for all.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="JSON lines instead of text.")]


@app.command()
def run(adapters: Adapters, json_: Json = False) -> None:
    """The table of the run's models."""
    import json

    from srlm_lite.cli.tables import closing_table
    from srlm_lite.config import recipe_from
    from srlm_lite.run_dir import RunDir

    run_dir = RunDir(adapters)
    facts = run_dir.facts()
    if json_:
        typer.echo(json.dumps({**facts, "stages": run_dir.read_metrics()}, ensure_ascii=False))
        return
    recipe = recipe_from(facts["recipe"], where=str(run_dir.run_json))
    typer.echo(f"{recipe.name}: {recipe.method}, seed {recipe.seed}, base {recipe.base.name}")
    typer.echo(closing_table(run_dir, recipe))


@app.command()
def pairs(
    adapters: Adapters, iteration: Iteration = None, limit: Limit = 3, json_: Json = False
) -> None:
    """Preference pairs: the prompt, both replies, and the judge's words on each."""
    from srlm_lite.records import Judgement, PreferencePair
    from srlm_lite.run_dir import read_records

    place = _iteration(adapters, iteration)
    rows = read_records(place.pairs, PreferencePair)
    if json_:
        _json(rows, limit)
        return
    votes: dict[str, list[Judgement]] = {}
    for row in read_records(place.judgements, Judgement):
        votes.setdefault(row.candidate_id, []).append(row)
    for pair in _first(rows, limit):
        _heading(f"{pair.prompt_id}   {pair.chosen_score:g} against {pair.rejected_score:g}")
        typer.echo(f"{pair.prompt}\n")
        for label, text, name in (
            ("chosen", pair.chosen, pair.chosen_id),
            ("rejected", pair.rejected, pair.rejected_id),
        ):
            scores = ", ".join(_score(vote.score) for vote in votes.get(name, []))
            typer.secho(f"{label} ({name}; votes {scores})", fg="cyan")
            typer.echo(_indented(text))
            if votes.get(name):
                typer.secho("  the judge:", dim=True)
                typer.echo(_indented(votes[name][0].text, by="    "))
            typer.echo("")
    _more(len(rows), limit)


@app.command()
def judgements(
    adapters: Adapters, iteration: Iteration = None, limit: Limit = 6, json_: Json = False
) -> None:
    """The judge's replies and the scores read from them."""
    from srlm_lite.records import Candidate, Judgement
    from srlm_lite.run_dir import read_records

    place = _iteration(adapters, iteration)
    rows = read_records(place.judgements, Judgement)
    if json_:
        _json(rows, limit)
        return
    texts = {
        row.candidate_id: row.text
        for path in place.judged_candidates
        for row in read_records(path, Candidate)
    }
    for row in _first(rows, limit):
        wrote = "" if row.sampled_score is None else f" (it wrote {_score(row.sampled_score)})"
        _heading(f"{row.candidate_id} vote {row.vote}   score {_score(row.score)}{wrote}")
        typer.echo(_indented(texts[row.candidate_id]))
        typer.secho("  the judge:", dim=True)
        typer.echo(_indented(row.text, by="    ") + "\n")
    _more(len(rows), limit)


@app.command()
def candidates(
    adapters: Adapters, iteration: Iteration = None, limit: Limit = 6, json_: Json = False
) -> None:
    """The policy's sampled answers."""
    from srlm_lite.records import Candidate
    from srlm_lite.run_dir import read_records

    rows = read_records(_iteration(adapters, iteration).candidates, Candidate)
    if json_:
        _json(rows, limit)
        return
    for row in _first(rows, limit):
        _heading(f"{row.candidate_id}   {row.n_tokens} tokens, ended by {row.finish_reason}")
        typer.echo(_indented(row.text) + "\n")
    _more(len(rows), limit)


def _iteration(adapters: Path, number: int | None) -> IterationDir:
    from srlm_lite.errors import UserError
    from srlm_lite.run_dir import RunDir

    run_dir: RunDir = RunDir(adapters)
    run_dir.facts()
    begun = [place.number for place in run_dir.iterations()]
    wanted = number if number is not None else max(begun, default=0)
    if wanted not in begun:
        raise UserError(
            f"has no iteration {wanted}" if begun else "has no iteration yet",
            where=str(adapters),
            way_out=f"It has: {', '.join(map(str, begun))}" if begun else None,
        )
    return run_dir.iteration(wanted)


def _first(rows: list[Any], limit: int) -> list[Any]:
    return rows[:limit] if limit else rows


def _json(rows: list[Any], limit: int) -> None:
    import json

    row: Record
    for row in _first(rows, limit):
        typer.echo(json.dumps(row.to_row(), ensure_ascii=False))


def _heading(text: str) -> None:
    typer.secho(f"--- {text}", bold=True)


def _indented(text: str, *, by: str = "  ") -> str:
    return "\n".join(by + line for line in text.splitlines())


def _score(score: float | None) -> str:
    return "unreadable" if score is None else f"{score:g}"


def _more(total: int, limit: int) -> None:
    if limit and total > limit:
        typer.echo(f"{limit} of {total}; --limit 0 shows all", err=True)
