"""`srlm-lite report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.errors import UserError
from srlm_lite.report.answer import answer
from srlm_lite.report.controls import comparisons, verdict
from srlm_lite.report.facts import gather
from srlm_lite.report.html import GENERATOR, html
from srlm_lite.report.markdown import markdown
from srlm_lite.run.files import write_atomically
from srlm_lite.run.run import RunDir


def run_report(
    *, directory: Path, out: Path | None, as_markdown: bool, controls: Sequence[Path] = ()
) -> None:
    """Print the summary, or write the page and print where it is.

    Args:
        controls: Directories of other runs to hold it against.
    """
    run = _whole(directory)
    beside = [gather(_control(control, directory), texts=False) for control in controls]
    if as_markdown:
        typer.echo(markdown(replace(gather(run), controls=tuple(beside))), nl=False)
        return
    file = out or run.report
    facts = replace(gather(run), controls=tuple(beside))
    refuse_foreign(file, GENERATOR)
    page = html(facts)
    write_atomically(file, page)
    console = ConsoleReporter()
    console.say(answer(facts).headline)
    if controls:
        console.say(verdict(comparisons(facts)))
    console.say(f"wrote {len(page.encode()) / 1e6:.1f} MB; open it in a browser:")
    typer.echo(str(file))


def _whole(directory: Path) -> RunDir:
    """A run whose files are as it has written them."""
    run = RunDir(directory)
    run.facts()  # whether it is a run, before its files are looked at
    run.hold_to_files()
    return run


def _control(directory: Path, of: Path) -> RunDir:
    if directory.resolve() == of.resolve():
        raise UserError(
            "is the run itself", where=f"--control {directory}", way_out="Name another run"
        )
    return _whole(directory)


def refuse_foreign(file: Path, generator: str, *, option: str = "--out") -> None:
    """A page replaces a page of its kind, and nothing else.

    Args:
        generator: By which such a page is known.
        option: That names the file.

    Raises:
        UserError: There is something else, or no directory for it.
    """
    if file.is_dir():
        raise UserError(
            "is a directory", where=f"{option} {file}", way_out=f"Name a file: {option} report.html"
        )
    if not file.parent.is_dir():
        raise UserError("its directory does not exist", where=f"{option} {file}")
    if file.exists():
        with file.open("rb") as found:
            if generator.encode() not in found.read(4096):
                raise UserError(
                    "exists, and is no page of `" + generator + "`: it is left as it is",
                    where=f"{option} {file}",
                    way_out="Name another file",
                )
