"""`srlm-lite` in the test's own process: what it prints, and what it ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer.main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Cli = Callable[..., Done]

_built = cache(typer.main.get_command)
"""All commands with their options, of which a process needs one set, however many it runs."""


def in_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command itself, as `srlm-lite ARGS` would start it."""
    from srlm_lite.cli import main

    def command(*args: str | Path) -> Done:
        monkeypatch.setattr(typer.main, "get_command", _built)
        monkeypatch.setattr(sys, "argv", ["srlm-lite", *map(str, args)])
        capfd.readouterr()
        try:
            main.run()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capfd.readouterr())

    return command
