"""`srlm-lite show`: read a run without opening its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from srlm_lite.records import Record
from srlm_lite.telling import for_terminal, json_for_terminal, without_secrets_in

if TYPE_CHECKING:
    from srlm_lite.conversation import Asked
    from srlm_lite.report.facts import Pair
    from srlm_lite.report.words import Words
    from srlm_lite.run.layout import IterationDir
    from srlm_lite.run.run import RunDir

R = TypeVar("R", bound=Record)
T = TypeVar("T", bound="Record | Pair")

app = typer.Typer(help="Look into a run.", no_args_is_help=True)

Adapters = Annotated[Path, typer.Option("--adapters", help="The run directory.", metavar="DIR")]
Iteration = Annotated[
    str, typer.Option(help="Number of an iteration, or `last`: the last that is begun.")
]
Limit = Annotated[int, typer.Option(help="At most so many; 0 for all.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="JSON lines instead of text.")]


@app.command()
def run(adapters: Adapters, json_: Json = False) -> None:
    """The table of the run's models."""
    from srlm_lite.cli.tables import closing_table
    from srlm_lite.cli.wrapping import columns, fitted
    from srlm_lite.run.run import RunDir

    run_dir = RunDir(adapters)
    facts = run_dir.facts()
    run_dir.hold_to_rows()
    under_way = run_dir.under_way()
    if json_:
        told = {**facts, "stages": run_dir.read_metrics()}
        if under_way:
            told["checkpoint"] = under_way
        typer.echo(json_for_terminal(without_secrets_in(told)))
        return
    recipe = run_dir.recipe()
    table = closing_table(run_dir, recipe)
    head = f"{recipe.name}: {recipe.method}, seed {recipe.seed}, base {recipe.base.name}"
    _echo(fitted(head, columns()))
    _echo(table)
    if under_way:
        which = f" of iteration {under_way['iteration']}" if under_way["iteration"] else ""
        kept = (
            f"kept: the training of {under_way['name']}{which} after step {under_way['step']} of "
            f"{under_way['steps']}; iterate goes on from there"
        )
        _echo(fitted(kept, columns()))


@app.command()
def pairs(
    adapters: Adapters, iteration: Iteration = "last", limit: Limit = 3, json_: Json = False
) -> None:
    """Preference pairs: the prompt, both replies, and the judge's words on each."""
    from srlm_lite.errors import UserError
    from srlm_lite.forms import form_in
    from srlm_lite.report.facts import iteration_pairs

    run_dir, place, words = _opened(adapters, iteration)
    if not place.pairs.is_file():
        raise UserError(
            f"iteration {place.number} has no pairs yet",
            where=str(adapters),
            way_out="They follow its judgements; --iteration shows those of another one",
        )
    found = iteration_pairs(run_dir, place.number)
    form = form_in(run_dir.facts()["recipe"])

    def tell(pair: Pair) -> None:
        record = pair.record
        score = words.score_of(record.origin)
        name = "" if score == "score" else f"{score} "
        figures = f"{name}{_score(record.chosen_score)} against {_score(record.rejected_score)}"
        by = f"principle {pair.principle}" if pair.principle else ""
        known = filter(None, (figures if score else "", by, pair.source, pair.compared))
        _heading(record.prompt_id, ", ".join(known))
        _asked(record.asked)
        for label, text, name, said in (
            ("chosen", record.chosen, record.chosen_id, pair.chosen_votes),
            ("rejected", record.rejected, record.rejected_id, pair.rejected_votes),
        ):
            told = [line for vote in said for line in form.told(vote)]
            scores = f"; votes {', '.join(_score(vote.score) for vote in said)}" if said else ""
            scores = f"; {'; '.join(told)}" if told else scores
            _secho(f"{label} ({name}{scores})", fg="cyan")
            _echo(_indented(text))
            _words("the judge", said[0].text if said else "")
            _echo("")

    _tell(found, tell, limit, json_, none=_why_no_pairs(words, place))


@app.command()
def judgements(
    adapters: Adapters, iteration: Iteration = "last", limit: Limit = 6, json_: Json = False
) -> None:
    """The judge's replies and the scores read from them, or what a method has in their place."""
    from srlm_lite.forms import form_in
    from srlm_lite.records import Contest, Judgement, Label, Revision

    run_dir, place, words = _opened(adapters, iteration)
    draft, form = _texts(place), form_in(run_dir.facts()["recipe"])

    def tell(row: Judgement) -> None:
        wrote = "" if row.sampled_score is None else f" (it wrote {_score(row.sampled_score)})"
        vote = f" vote {row.vote}" if row.text else ""
        text = draft(row.candidate_id)
        _heading(f"{row.candidate_id}{vote}", f"{words.judgement} {_score(row.score)}{wrote}")
        _echo(_indented(text))
        _words("the judge's thought", row.thought or "")
        _words("the judge", "\n".join(filter(None, (row.text, *form.told(row)))))
        _echo("")

    def tell_contest(row: Contest) -> None:
        _heading(row.prompt_id, f"the first {row.told(row.first_id)}")
        for name, said in zip(row.ids, (row.said_first, row.said_last), strict=True):
            _secho(name, fg="cyan")
            _echo(_indented(draft(name)))
            _words("the judge, where this one is shown first", said or "")
            _echo("")

    def tell_revision(row: Revision) -> None:
        text = draft(row.candidate_id)
        _heading(f"{row.candidate_id} round {row.round}", f"principle {row.principle}")
        _echo(_indented(text))
        _words("the critique", row.critique)
        _words("the revision", "(unusable)" if row.text is None else row.text)
        _echo("")

    def tell_label(row: Label) -> None:
        p = "unknown" if row.p_first is None else f"{row.p_first:.2f}"
        _heading(row.prompt_id, f"principle {row.principle}, the first is better: {p}")
        for name in (row.first_id, row.second_id):
            _secho(name, fg="cyan")
            _echo(_indented(draft(name)) + "\n")

    if place.revisions.is_file():
        _tell(_read([place.revisions], Revision), tell_revision, limit, json_)
    elif place.labels.is_file():
        _tell(_read([place.labels], Label), tell_label, limit, json_)
    elif place.comparisons.is_file():
        _tell(_read([place.comparisons], Contest), tell_contest, limit, json_)
    else:
        rows = _read(place.all_judgements or [place.judgements], Judgement)
        none = words.why_no_votes and f"this run's candidates are not graded: {words.why_no_votes}"
        _tell(rows, tell, limit, json_, none=none or "no candidate was graded")


@app.command()
def candidates(
    adapters: Adapters, iteration: Iteration = "last", limit: Limit = 6, json_: Json = False
) -> None:
    """The answers that pairs are made of: the policy's, and others beside them."""
    from srlm_lite.records import Candidate

    def tell(row: Candidate) -> None:
        _heading(row.candidate_id, f"{row.n_tokens} tokens, ended by {row.finish_reason}")
        _words("the thought", row.thought or "")
        _echo(_indented(row.text) + "\n")

    _, place, _ = _opened(adapters, iteration)
    _tell(_read(place.all_candidates or [place.candidates], Candidate), tell, limit, json_)


def _opened(adapters: Path, which: str) -> tuple[RunDir, IterationDir, Words]:
    """The run, the iteration that is named, and the words of its method."""
    from srlm_lite.errors import UserError
    from srlm_lite.report.words import words
    from srlm_lite.run.run import RunDir

    run_dir = RunDir(adapters)
    facts = run_dir.facts()
    begun = {str(place.number): place for place in run_dir.iterations()}
    if which == "last":
        which = max(begun, key=int, default=which)
    if which not in begun:
        what = f"has no iteration {which}" if begun else "has no iteration yet"
        if which in ("anchor", "base"):
            what = f"the {which} has no pairs, judgements or candidates: they are of iterations"
        raise UserError(
            what,
            where=str(adapters),
            way_out=f"It has: {', '.join(begun)}" if begun else None,
        )
    place = begun[which]
    run_dir.hold_to_rows(place.number)
    return run_dir, place, words(facts["recipe"])


def _read(paths: Sequence[Path], kind: type[R]) -> list[R]:
    from srlm_lite.run.files import read_records

    return [row for path in paths for row in read_records(path, kind, growing=True)]


def _texts(place: IterationDir) -> Callable[[str], str]:
    """Gives a candidate's text by its name."""
    from srlm_lite.errors import UserError
    from srlm_lite.records import Candidate

    texts = {row.candidate_id: row.text for row in _read(place.all_candidates, Candidate)}

    def draft(name: str) -> str:
        if name not in texts:
            raise UserError(
                f"has no candidate {name}",
                where=str(place.candidates),
                way_out="Restore the file",
            )
        return texts[name]

    return draft


def _why_no_pairs(words: Words, place: IterationDir) -> str:
    learns = words.why_no_pairs
    if place.revisions.is_file():
        learns = "in its first iteration the policy learns from revisions"
    return f"this iteration has no preference pairs{f': {learns}' if learns else ''}"


def _tell(
    found: Sequence[T], tell: Callable[[T], None], limit: int, json_: bool, *, none: str = "none"
) -> None:
    """The first ones, as rows of JSON or each as it is told; what is left out goes to stderr."""
    from srlm_lite.cli.wrapping import fitted, of_stderr

    for one in found[:limit] if limit else found:
        if json_:
            typer.echo(json_for_terminal(one.to_row()))
        else:
            tell(one)
    if not found:
        typer.echo(fitted(none, of_stderr()), err=True)
    elif limit and len(found) > limit and not json_:
        typer.echo(f"{limit} of {len(found)}; --limit 0 shows all", err=True)


def _echo(text: str = "") -> None:
    """A line, of which a terminal obeys nothing."""
    typer.echo(for_terminal(text))


def _secho(text: str, **style: Any) -> None:
    typer.secho(for_terminal(text), **style)


def _asked(asked: Asked) -> None:
    """A prompt: its text, or its turns, each below who says it."""
    from srlm_lite.conversation import turns

    if isinstance(asked, str):
        _echo(f"{asked}\n")
        return
    for who, said in turns(asked):
        _secho(f"{who}:", dim=True)
        _echo(_indented(said) + "\n")


def _heading(name: str, rest: str) -> None:
    _secho(f"--- {name}   {rest}".rstrip(), bold=True)


def _words(whose: str, text: str) -> None:
    """What was said of a reply, below it; nothing where nothing was said."""
    if text:
        _secho(f"  {whose}:", dim=True)
        _echo(_indented(text, by="    "))


def _indented(text: str, *, by: str = "  ") -> str:
    return "\n".join(by + line for line in text.splitlines())


def _score(score: float | None) -> str:
    return "unreadable" if score is None else f"{score + 0.0:g}"  # minus rank 0 is no -0
