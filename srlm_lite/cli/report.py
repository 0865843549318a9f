"""`srlm-lite report`."""

from __future__ import annotations

from pathlib import Path

import typer

from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.errors import UserError
from srlm_lite.report.answer import answer
from srlm_lite.report.facts import gather
from srlm_lite.report.html import GENERATOR, html
from srlm_lite.report.markdown import markdown
from srlm_lite.run.files import write_atomically
from srlm_lite.run.run import RunDir


def run_report(*, directory: Path, out: Path | None, as_markdown: bool) -> None:
    """Print the summary, or write the page and print where it is."""
    run = RunDir(directory)
    run.facts()  # whether it is a run, before its files are looked at
    run.hold_to_files()
    if as_markdown:
        typer.echo(markdown(gather(run)), nl=False)
        return
    file = out or run.report
    facts = gather(run)
    refuse_foreign(file, GENERATOR)
    page = html(facts)
    write_atomically(file, page)
    console = ConsoleReporter()
    console.say(answer(facts).headline)
    console.say(f"wrote {len(page.encode()) / 1e6:.1f} MB; open it in a browser:")
    typer.echo(str(file))


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
