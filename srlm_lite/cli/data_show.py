"""`srlm-lite data show`."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.cli.report import refuse_foreign
from srlm_lite.cli.tables import plain_table
from srlm_lite.cli.wrapping import columns
from srlm_lite.dataview.figures import Figures, figures_of
from srlm_lite.dataview.languages import Languages, languages_of
from srlm_lite.dataview.page import GENERATOR, html
from srlm_lite.dataview.rows import files_of
from srlm_lite.dataview.standing import Standout, findings
from srlm_lite.dataview.text import FigureTable, one_line, tables
from srlm_lite.dataview.tokens import RecipeTokens
from srlm_lite.errors import UserError
from srlm_lite.recipe import Recipe, load_recipe, overridden
from srlm_lite.run.files import write_atomically
from srlm_lite.telling import for_terminal, json_for_terminal

WIDTH = 80
"""Columns that are used, where a terminal has as many."""


@dataclass(frozen=True, slots=True)
class ShowWish:
    """What to show, as the command line says it."""

    directory: Path
    base: str | None
    recipe: str | None
    overrides: Sequence[str]
    page: Path | None
    samples: int


def run_show(wish: ShowWish, *, as_json: bool) -> None:
    """Print what is in a data directory, and write its page where one is wanted."""
    if wish.page is not None:
        refuse_foreign(wish.page, GENERATOR, option="--html")
    files_of(wish.directory)
    recipe = _recipe(wish)
    console = ConsoleReporter()
    with console:
        tokens = None if recipe is None else RecipeTokens(recipe)
        figures = figures_of(wish.directory, tokens, console)
    languages = {one.file.name: languages_of(one.drawn) for one in figures.files if one.drawn}
    found = findings(figures, languages)
    if as_json:
        facts = _as_json(figures, languages, found)
        typer.echo(json_for_terminal(facts, indent=2))
    else:
        width = min(WIDTH, columns() or WIDTH)
        typer.echo(for_terminal(told(figures, languages, found, width=width)))
    if wish.page is not None:
        text = html(figures, languages, found, samples=wish.samples)
        write_atomically(wish.page, text)
        console.say(f"wrote {wish.page} ({len(text.encode()) / 1e6:.1f} MB); open it in a browser")


def _recipe(wish: ShowWish) -> Recipe | None:
    """By which tokens are counted; None: lengths are in characters."""
    if wish.base is not None and wish.recipe is not None:
        raise UserError("goes without --recipe, which names a base of its own", where="--base")
    if wish.recipe is not None:
        return load_recipe(wish.recipe, wish.overrides)
    if wish.base is not None:
        raw = {"name": "data", "base": {"name": wish.base}, "data": {"dir": str(wish.directory)}}
        return overridden(raw, wish.overrides, where="--base")
    if wish.overrides:
        raise UserError("goes with --recipe or --base", where="--set")
    return None


def told(
    figures: Figures,
    languages: Mapping[str, Languages],
    found: Sequence[Standout],
    *,
    width: int = WIDTH,
) -> str:
    """All of it for a terminal: what stands out first."""
    lines = [one_line(figures), ""]
    for one in found:
        mark = "a run refuses this" if one.level == "refused" else "warning"
        lines += _wrapped(f"{mark}: {one.text}.", "  ", width, hang="  ")
        lines += [*_wrapped(f"{one.way_out}.", "    ", width), ""]
    for table in tables(figures, languages):
        note = table.note and f"{table.note}."
        lines += [*_drawn(table, width).splitlines(), *_wrapped(note, " ", width), ""]
    if not found:
        lines += _wrapped("Nothing stands out.", "", width)
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _wrapped(text: str, indent: str, width: int, *, hang: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + hang,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _drawn(table: FigureTable, width: int) -> str:
    if not table.prose:
        drawn_whole = plain_table(table.head, table.rows, width=width)
        return "\n".join(line for line in drawn_whole.splitlines() if line.strip())
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    last = len(table.head) - 1
    for number, name in enumerate(table.head):
        prose = table.prose and number == last
        drawn.add_column(
            name, justify="left" if prose or not number else "right", no_wrap=not prose
        )
    for row in table.rows:
        drawn.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, color_system=None, markup=False).print(drawn)
    return "\n".join(line for line in out.getvalue().splitlines() if line.strip())


def _as_json(
    figures: Figures, languages: Mapping[str, Languages], found: Sequence[Standout]
) -> dict[str, Any]:
    """All figures, without the drawn rows."""
    whole = replace(figures, files=tuple(replace(one, drawn=()) for one in figures.files))
    return {
        **asdict(whole),
        "languages": {name: asdict(one) for name, one in languages.items()},
        "found": [asdict(one) for one in found],
    }
