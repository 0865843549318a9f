"""A mistake in the call itself, such as an option that does not exist, as one line."""

from __future__ import annotations

import sys
from itertools import pairwise, takewhile
from typing import Any

import typer

from srlm_lite.errors import UserError, program

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for a wrong call. It exports the kinds alone, and of older versions they are
click's."""


def as_told(error: Any) -> UserError | None:
    """A wrong call as a user's error; None where all that is wrong is that help was asked for."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        if error.format_message():  # rich has shown it where this is empty
            error.show()
        return None
    command = _typed() if context is None else _command(context)
    message = error.format_message().replace("Value error, ", "")
    what, asks, instead = message.partition(" Did you ")
    what = what.rstrip(".").replace("': Input", f"'{_value(error)}: Input")
    told = (
        f"{asks.strip()} {instead}"
        if asks
        else f"See `{' '.join(filter(None, (program(), command)))} --help`"
    )
    return UserError(what[:1].lower() + what[1:], where=command or None, way_out=told)


def _command(context: Any) -> str:
    root = context.find_root().info_name or ""
    return str(context.command_path).removeprefix(root).strip()


def _typed() -> str:
    """The command that was typed: its words before any option."""
    return " ".join(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))


def _value(error: Any) -> str:
    """What was given to the option that is wrong, as settings tell it: typer's words lack it."""
    options = getattr(getattr(error, "param", None), "opts", ())
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    return next((f" (is {b})" for a, b in pairwise(words) if a in options), "")
