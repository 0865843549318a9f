"""The answers of a preflight, for a person and for a program."""

from __future__ import annotations

from collections.abc import Sequence

from srlm_lite.cli.findings import findings_text
from srlm_lite.doctor.finding import Finding, State
from srlm_lite.preflight import checks
from srlm_lite.preflight.checks import Answer, can_start
from srlm_lite.preflight.launch import Launch
from srlm_lite.telling import json_for_terminal, without_secrets_in

STATES: dict[checks.State, State] = {
    "ok": "ok",
    "warning": "warning",
    "bad": "bad",
    "not asked": "absent",
}

NAMES = max(map(len, checks.CHECKS))
"""Columns that hold the name of every check."""


def as_findings(found: Sequence[Answer]) -> list[Finding]:
    """The answers as the doctor shows what it finds; a line for each warning."""
    return [
        Finding(STATES[one.state], one.check, line)
        for one in found
        for line in (one.warnings or [one.text])
    ]


def preflight_text(
    found: Sequence[Answer], *, width: int | None = None, names: int | None = None
) -> str:
    """A line for each check: its state, what was asked, what was found or what to do.

    Args:
        width: Columns of the terminal that it goes to, if it goes to one.
        names: Columns for the names of checks, where others follow; see `NAMES`.
    """
    return findings_text(as_findings(found), width=width, names=names)


def preflight_json(launch: Launch, found: Sequence[Answer]) -> str:
    """The same as JSON: the recipe's name, whether it can start, and every answer."""
    row = {
        "recipe": launch.recipe.name,
        "can_start": can_start(found),
        "checks": [
            {
                "check": one.check,
                "state": one.state,
                "text": one.text,
                "warnings": list(one.warnings),
            }
            for one in found
        ],
    }
    return json_for_terminal(without_secrets_in(row), indent=2)
