"""`srlm-lite doctor`: one screen that says whether this machine is ready, and for what."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from srlm_lite import __version__
from srlm_lite.cli.findings import GLUE, WORDS, finding_line, name_width
from srlm_lite.cli.preflight import as_findings
from srlm_lite.doctor import machine, packages, proof, recipes
from srlm_lite.doctor.finding import Finding, State
from srlm_lite.preflight.checks import Answer, answers, can_start
from srlm_lite.preflight.launch import Launch
from srlm_lite.recipe import load_recipe
from srlm_lite.telling import (
    for_terminal,
    json_for_terminal,
    without_secrets,
    without_secrets_in,
)

SECTIONS_THAT_COUNT = ("machine", "packages", "proof of the stack")
"""A finding `bad` in one of these, and srlm-lite is of no use here."""

_PEAK = "peak_bytes"
"""The fact of a recipe that its plan gives."""

Sections = dict[str, list[Finding]]


def run_doctor(
    *,
    as_json: bool,
    folder: Path | None = None,
    recipe_name: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Look at everything; exit code 1 where srlm-lite is of no use.

    Args:
        recipe_name: Look at this recipe alone, as `iterate` does before it starts it; exit code 2
            where it cannot be started.
    """
    console = Console(highlight=False, soft_wrap=False)
    sections: Sections = {}
    asked: list[Answer] = []
    if recipe_name is not None:  # first: Unsloth comes before what is looked at below
        _note(f"recipe {recipe_name}")
        asked = list(answers(Launch(load_recipe(recipe_name, overrides))))
    # The libraries warn of what the findings say in words of ours.
    warnings.simplefilter("ignore")
    _note("versions")
    sections["packages"] = [packages.python_finding(), *packages.package_findings()]
    sections["extras"] = packages.extra_findings()
    torch_starts = all(each.name != "torch" for each in sections["packages"] if each.state == "bad")
    if torch_starts:
        _note("machine")
        sections["machine"] = machine.machine_findings(folder or Path.cwd())
        _note("proof of the stack")
        sections["proof of the stack"] = list(proof.proof_findings())
        if recipe_name is None:
            _note("recipes")
            sections["recipes"] = recipes.recipe_findings()
    if recipe_name is not None:
        sections[f"recipe {recipe_name}"] = as_findings(asked)
    _note("")
    usable = is_usable(sections)
    if as_json:
        row = without_secrets_in(_as_json(sections, usable))
        typer.echo(json_for_terminal(row, indent=2))
    else:
        show(console, sections, usable=usable)
    raise typer.Exit(1 if not usable else 0 if can_start(asked) else 2)


def is_usable(sections: Sections) -> bool:
    """Whether runs can start here: nothing that counts is bad."""
    return not any(
        finding.state == "bad" for name in SECTIONS_THAT_COUNT for finding in sections.get(name, ())
    )


def _as_json(sections: Sections, usable: bool) -> dict[str, object]:
    listed = {
        name: [
            {
                "state": finding.state,
                "name": finding.name,
                "text": finding.text,
                "way_out": finding.way_out,
                **({"facts": finding.facts} if finding.facts else {}),
            }
            for finding in findings
        ]
        for name, findings in sections.items()
    }
    return {"usable": usable, "version": __version__, **listed}


def show(console: Console, sections: Sections, *, usable: bool) -> None:
    """Print the report."""
    console.print(Text(f"srlm-lite {__version__}", style="bold"))
    for name, findings in sections.items():
        head = Text(f"\n{for_terminal(without_secrets(name))}", style="bold")
        console.print(head.append(_subtitle(findings), style="not bold"))
        lines = _together(findings) if name == "recipes" else findings
        width = name_width(lines)
        for finding in lines:
            finding_line(console, finding, width)
    verdict = ("ready", "green") if usable else ("not usable like this", "red")
    worst = {finding.state for findings in sections.values() for finding in findings}
    text = Text("\n").append(verdict[0], style=f"bold {verdict[1]}")
    if usable and worst & {"warning", "bad"}:
        text.append(" for what is marked ok; the rest says what it lacks")
    console.print(text)


def _subtitle(findings: Sequence[Finding]) -> str:
    """What the figures after the recipes' names are."""
    memory = next((f.facts["memory_bytes"] for f in findings if f.facts and _PEAK in f.facts), None)
    if memory is None:
        return ""
    return f", each with the GB that its largest phase takes, of {_gigabytes(memory)} here"


def _together(findings: Sequence[Finding]) -> list[Finding]:
    """Recipes that lack the same, in one line."""
    groups: dict[tuple[State, str, str | None], list[str]] = {}
    for finding in findings:
        key = (finding.state, finding.text, finding.way_out)
        peak = (finding.facts or {}).get(_PEAK)
        name = finding.name if peak is None else f"{finding.name}{GLUE}{_gigabytes(peak)}"
        groups.setdefault(key, []).append(name)
    merged = []
    for (state, text, way_out), names in groups.items():
        if len(names) == 1:
            merged.append(Finding(state, names[0], text, way_out))
        elif state == "ok":
            merged.append(Finding(state, text, ", ".join(names), way_out))
        else:
            several = f"{', '.join(names)}: {text}"
            merged.append(Finding(state, f"{len(names)} recipes", several, way_out))
    order = list(WORDS)
    return sorted(merged, key=lambda finding: order.index(finding.state))


def _gigabytes(count: object) -> str:
    return f"{int(str(count)) / 1e9:.1f}"


def _note(text: str) -> None:
    """What is being looked at, on a terminal: libraries take seconds to import."""
    if sys.stderr.isatty():
        shown = for_terminal(without_secrets(text))
        sys.stderr.write(f"\r\x1b[K{f'looking at: {shown} ...' if text else ''}")
        sys.stderr.flush()
