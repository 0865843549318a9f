"""`srlm-lite compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from srlm_lite.cli.tables import plain_table
from srlm_lite.stages.annotations import compare_annotations


def run_annotations(*, path: Path, difficulty: Path | None, as_json: bool) -> None:
    """Win rates of comparisons that others have annotated."""
    result = compare_annotations(path, difficulty)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    typer.echo(f"{result['model']} against {result['baseline']}, {result['prompts']} annotations")
    typer.echo(head_to_head_text(result))


def head_to_head_text(result: dict[str, Any]) -> str:
    """The table of a head to head."""
    rows = [
        [name, str(part["count"]), _share(part["share"]), _interval(part, 100)]
        for name, part in ((name, result[name]) for name in ("wins", "ties", "losses"))
    ]
    rows.append(["win rate", "", *_rate(result["win_rate"])])
    controlled = result["length_controlled"]
    rows.append(["length-controlled", "", *_rate(controlled)])
    chars = result["mean_chars"]
    notes = [
        "win rate: a tie is half a win.  95%: Wilson's interval for shares, bootstrap for rates",
        _controlled_note(controlled),
        f"mean characters: {chars['model']:.0f}, the baseline's {chars['baseline']:.0f}",
    ]
    if result["unreadable"]:
        notes.append(f"left out, for the judge could not be read: {result['unreadable']}")
    return plain_table(["", "count", "%", "95%"], rows) + "\n\n" + "\n".join(notes)


def _controlled_note(controlled: dict[str, Any] | None) -> str:
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
