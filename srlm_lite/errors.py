"""What can go wrong, as the user meets it."""

from __future__ import annotations

import os
import shutil
import sys

from srlm_lite.telling import for_terminal, without_secrets


class SrlmError(Exception):
    """Base of every error that srlm-lite raises on purpose; the command exits with 1.

    What it says holds no secret, and nothing that a terminal obeys, whoever is quoted.
    """

    def __init__(self, line: str = "") -> None:
        super().__init__(for_terminal(without_secrets(line)))


class UserError(SrlmError):
    """Something the user can put right: shown as one line, exit code 2, no traceback.

    Args:
        what: What is wrong, in a few words, without a closing full stop.
        where: The file, key or option it concerns.
        way_out: What to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, way_out: str | None = None) -> None:
        self.what, self.where, self.way_out = what, where, way_out
        line = what if where is None else f"{where}: {what}"
        if way_out is not None:
            line = f"{line}. {way_out}"
        super().__init__(" ".join(line.split()))


class TooFewPairs(UserError):
    """An iteration has found fewer pairs than the recipe wants: nothing is left to learn from."""


class ProofError(SrlmError):
    """An invariant of the adapter stack does not hold; the run stops before it does harm."""


class GateError(SrlmError):
    """A model does not pass the recipe's gates, and the recipe says to stop there."""


def program() -> str:
    """What starts srlm-lite in this shell: its name, or where this process was started from."""
    if shutil.which("srlm-lite") is None and os.path.basename(sys.argv[0]) == "srlm-lite":
        return os.path.relpath(sys.argv[0])
    return "srlm-lite"


def same_command() -> str:
    """What goes on with what this command has begun: with `--fresh` it would delete it."""
    return "the same command" + (" without --fresh" if "--fresh" in sys.argv else "")


def shorten(text: str) -> str:
    """What a message can show of a text."""
    return text if len(text) <= 200 else f"{text[:200]}…"
