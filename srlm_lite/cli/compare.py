"""`srlm-lite compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from srlm_lite.cli.models import Models
from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.cli.tables import plain_table
from srlm_lite.cli.wrapping import columns, fitted
from srlm_lite.compare.annotations import compare_annotations
from srlm_lite.compare.comparison import Comparison, Judging, compare
from srlm_lite.errors import UserError
from srlm_lite.stages.seed_data import policy_prompts, read_prompts
from srlm_lite.telling import for_terminal, json_for_terminal


@dataclass(frozen=True, slots=True)
class ComparisonWish:
    """A head to head as asked for."""

    directory: Path
    model: str
    baseline: str
    prompts: Path | None
    limit: int | None
    judge: str
    judging: Judging | None
    overrides: Sequence[str]


def run_compare(wish: ComparisonWish, *, as_json: bool) -> None:
    """Let two models answer and a judge decide, unless that has been done before."""
    console = ConsoleReporter()
    models = Models(wish.directory, wish.overrides, console)
    run, recipe = models.session.run, models.session.recipe
    judge = models.judge(wish.judge, wish.judging)
    if wish.prompts is None:
        prompts, source = policy_prompts(recipe), "held-out prompts of the run"
    else:
        prompts, source = read_prompts(wish.prompts), str(wish.prompts)
    if not prompts:
        raise UserError(
            "the run has no held-out prompts", where=str(run.path), way_out="Name a list: --prompts"
        )
    comparison = Comparison(
        session=models.session,
        model=models.find(wish.model),
        baseline=models.find(wish.baseline),
        prompts=prompts[: wish.limit],
        source=source,
        judge=judge,
    )
    with run.locked(), console:
        result = compare(comparison)
    if as_json:
        typer.echo(json_for_terminal(result, indent=2))
        return
    width = columns()
    typer.echo(fitted(_head(result), width))
    typer.echo(head_to_head_text(result, width=width))
    if result["gold"] is not None:
        typer.echo(fitted(_gold_text(result), width))
    console.say(f"replies, verdicts and all figures: {comparison.place.path}")


def _head(result: dict[str, Any]) -> str:
    judge = result["judge"]
    if judge["judging"] == "pairwise":
        how = f"pairwise, template {judge['template']}: sees both replies, in both orders"
    else:
        how = f"pointwise, rubric {judge['rubric']}, {judge['votes']} votes on each reply alone"
    return (
        f"{result['model']} against {result['baseline']}, "
        f"{result['prompts']} prompts ({result['source']})\n"
        f"judge: {judge['name']}, {how}"
    )


def _gold_text(result: dict[str, Any]) -> str:
    gold, names = result["gold"], ("wins", "ties", "losses")
    counts = ", ".join(f"{gold[name]['count']} {name}" for name in names)
    agreement = (
        f"; where both decide ({gold['agreement_prompts']} prompts) the judge agrees in "
        f"{gold['agreement']:.0%}"
        if gold["agreement"] is not None
        else ""
    )
    return (
        f"gold: {gold['model']:.2f} against {gold['baseline']:.2f}; {counts}, "
        f"win rate {gold['win_rate']['value']:.1f} ({_interval(gold['win_rate'], 1)}){agreement}"
    )


def run_annotations(*, path: Path, difficulty: Path | None, as_json: bool) -> None:
    """Win rates of comparisons that others have annotated."""
    result = compare_annotations(path, difficulty)
    if as_json:
        typer.echo(json_for_terminal(result, indent=2))
        return
    width = columns()
    head = f"{result['model']} against {result['baseline']}, {result['prompts']} annotations"
    typer.echo(for_terminal(fitted(head, width)))
    typer.echo(head_to_head_text(result, width=width))
    if difficulty is None:
        note = "AlpacaEval's own figure needs its difficulty of each prompt: --difficulty FILE"
        typer.echo(fitted(note, width))


def head_to_head_text(result: dict[str, Any], *, width: int | None = None) -> str:
    """The table of a head to head, and what it comes to.

    Args:
        width: Columns of the terminal; None: no line is broken.
    """
    rows = [
        [name, str(part["count"]), _share(part["share"]), _interval(part, 100)]
        for name, part in ((name, result[name]) for name in ("wins", "ties", "losses"))
    ]
    rows.append(["win rate", "", *_rate(result["win_rate"])])
    controlled = result["length_controlled"]
    rows.append(["length-controlled", "", *_rate(controlled)])
    chars = result["mean_chars"]
    notes = [
        "win rate: a tie is half a win.  95%: Wilson's intervals; length-controlled: bootstrap",
        _controlled_note(controlled, result.get("lengths_do_not_tell")),
        f"mean characters: {chars['model']:.0f}, the baseline's {chars['baseline']:.0f}",
    ]
    notes += [text for count, text in _left_out(result) if count]
    notes.append(_verdict(result))
    table = plain_table(["", "count", "%", "95%"], rows, width=width)
    return table + "\n\n" + fitted("\n".join(notes), width)


def _verdict(result: dict[str, Any]) -> str:
    """Which of the two is better: only where no interval of a win rate has a tie in it."""
    model, baseline = result.get("model", "the model"), result.get("baseline", "the baseline")
    rates = {"win rate": result["win_rate"], "length-controlled": result["length_controlled"]}
    known = {name: rate for name, rate in rates.items() if rate and rate["low"] is not None}
    if not known:
        return f"{model} and {baseline} are not told apart: nothing was decided"
    if all(rate["low"] > 50 for rate in known.values()):
        return f"{model} is better than {baseline}: {_intervals(known)}"
    if all(rate["high"] < 50 for rate in known.values()):
        return f"{model} is worse than {baseline}: {_intervals(known)}"
    tied = {name: rate for name, rate in known.items() if rate["low"] <= 50 <= rate["high"]}
    why = f"a tie, 50, is within {_intervals(tied)}" if tied else _intervals(known)
    return f"{model} and {baseline} are not told apart: {why}"


def _intervals(rates: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_interval(rate, 1)}" for name, rate in rates.items())


def _left_out(result: dict[str, Any]) -> list[tuple[int, str]]:
    cut = result.get("truncated", {"model": 0, "baseline": 0})
    identical, inconsistent = result.get("identical", 0), result.get("inconsistent", 0)
    too_long = result.get("too_long", 0)
    return [
        (result["unreadable"], f"left out, the judge unreadable: {result['unreadable']}"),
        (too_long, f"left out, too long for a model's window: {too_long}"),
        (inconsistent, f"ties because the order decided: {inconsistent}"),
        (identical, f"ties because both replies are the same: {identical}"),
        (
            sum(cut.values()),
            f"cut off at the token limit: {cut['model']}, the baseline's {cut['baseline']}",
        ),
    ]


def _controlled_note(controlled: dict[str, Any] | None, why: str | None) -> str:
    if why:
        return f"length-controlled: lengths do not tell, for {why}"
    if controlled is None:
        return "length-controlled: too few prompts, or too one-sided, to fit"
    return (
        f"length-controlled: {controlled['variant']} variant, "
        f"weight of length {controlled['length_weight']:+.2f}"
    )


def _rate(rate: dict[str, Any] | None) -> list[str]:
    return ["-", "-"] if rate is None else [f"{rate['value']:.2f}", _interval(rate, 1)]


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _interval(part: dict[str, Any], scale: float) -> str:
    if part["low"] is None:
        return "-"
    return f"{scale * part['low']:.1f} to {scale * part['high']:.1f}"
