"""Text for a terminal of any width, broken between words; a pipe gets every line whole."""

from __future__ import annotations

import shutil
import sys
import textwrap

LEAST = 30
"""Columns below which nothing is broken: a narrower terminal breaks lines itself."""


def columns() -> int | None:
    """Columns of the terminal that stdout is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def of_stderr() -> int | None:
    """The same of stderr."""
    return shutil.get_terminal_size().columns if sys.stderr.isatty() else None


def fitted(text: str, width: int | None) -> str:
    """Lines that are too long, broken between words; what follows is set in.

    Args:
        width: Columns; None: as they are.
    """
    if width is None or width < LEAST:
        return text
    return "\n".join(_broken(line, width) for line in text.split("\n"))


def hung(head: str, text: str, width: int | None) -> str:
    """A head and what is to be said beside it, below one another where the terminal ends."""
    if width is None or width < LEAST or len(head) + len(text) <= width:
        return head + text
    indent = " " * min(len(head), width - LEAST)
    return textwrap.fill(
        text,
        width,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def after_name(line: str) -> str:
    """What stderr gets behind the program's name: one line, which a terminal gets in several."""
    name = "srlm-lite: "
    width = of_stderr()
    return fitted(name + line, width).removeprefix(name)


def _broken(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
