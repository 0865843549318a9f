"""Findings in lines of a terminal: a state, a name, and what was found."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from srlm_lite.doctor.finding import Finding, State
from srlm_lite.telling import for_terminal, without_secrets

WORDS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "bad": ("fails", "red"),
    "absent": ("-", "dim"),
}
"""What each state is called, and its colour."""

GLUE = "\N{NO-BREAK SPACE}"
"""Between a name and its figure, which stay on one line."""


WIDE = 100
"""Columns that are taken where there is no terminal."""
_BESIDE = 30
"""Columns that text has beside the names, or else it stands below them."""


def findings_text(
    findings: Sequence[Finding], *, width: int | None = None, names: int | None = None
) -> str:
    """A line or more for each, without colours.

    Args:
        width: Columns of the terminal, if there is one.
        names: Columns for the names; default: as the longest of these takes.
    """
    names = name_width(findings) if names is None else names
    out = io.StringIO()
    console = Console(
        file=out,
        width=width or WIDE,
        highlight=False,
        color_system=None,
        force_terminal=width is not None,
    )
    for finding in findings:
        finding_line(console, finding, names)
    return out.getvalue().rstrip()


def name_width(findings: Iterable[Finding]) -> int:
    """Columns that hold the names."""
    return min(24, max((len(finding.name) for finding in findings), default=0))


def finding_line(console: Console, finding: Finding, width: int) -> None:
    """Print one, broken between words where the terminal ends; it may quote anybody."""
    word, style = WORDS[finding.state]
    head = Text("  ").append(f"{word:<8}", style=style)
    name = for_terminal(without_secrets(finding.name))
    head.append(f"{name.replace(GLUE, ' '):<{width}}  ")
    body = finding.text if finding.way_out is None else f"{finding.text}. {finding.way_out}"
    body = for_terminal(without_secrets(body))
    indent, columns = len(head), console.width if console.is_terminal else WIDE
    if columns - indent < _BESIDE:
        console.print(head, no_wrap=True, overflow="ignore", crop=False)
        indent, head = 4, Text(" " * 4)
    for number, part in enumerate(_wrapped(body, max(_BESIDE, columns - indent))):
        line = head if number == 0 else Text(" " * indent)
        console.print(line + Text(part), no_wrap=True, overflow="ignore", crop=False)


def _wrapped(text: str, room: int) -> Iterable[str]:
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    return [line.replace(GLUE, " ") for line in lines]
