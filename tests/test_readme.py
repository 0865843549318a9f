"""The README tells the truth: its commands, recipes, files and targets exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from srlm_lite.cli.main import app
from srlm_lite.planning.machine import plan_for
from srlm_lite.planning.plan import Hardware
from srlm_lite.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("srlm-lite ")]
INLINE = re.findall(r"`(?:\.venv/bin/)?(srlm-lite [^`]+)`", README)


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and what follows it."""
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        # Usage lines write alternatives: run|pairs|judgements|candidates.
        names = words[0].split("|")
        assert all(name.split()[0] in command.commands for name in names), words
        command, words = command.commands[names[0]], words[1:]
    return command, words


@pytest.mark.parametrize("line", [*COMMANDS, *INLINE])
def test_commands_and_their_options_exist(line: str) -> None:
    words = re.sub(r"\\\n|\n", " ", line).split("#")[0].split()[1:]
    command, rest = resolve(words)
    known = {option for parameter in command.params for option in parameter.opts}
    used = set(re.findall(r"--[a-z][a-z-]*", " ".join(rest)))
    assert used <= known, line


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 8 and len(INLINE) >= 3


def test_settings_that_it_overrides_exist() -> None:
    overrides = re.findall(r"--set ([a-z_]+\.[a-z_]+=[\w.:/-]+)", README)
    assert overrides
    load_recipe("tiny", overrides)


def test_recipes_are_all_in_the_table() -> None:
    table = re.findall(r"^\| `([\w.-]+)` \|", README, flags=re.MULTILINE)
    assert sorted(table) == shipped_recipes()


def test_the_memory_in_the_table_holds_the_plan() -> None:
    """Of the recipes for CPUs, in bf16 where the recipe leaves that to the processor."""
    rows = re.findall(r"^\| `([\w.-]+)` \|[^|]*\| 2 cores, (\d+) GB \|", README, flags=re.MULTILINE)
    assert len(rows) == 5
    for name, said in rows:
        recipe = load_recipe(name)
        if recipe.base.dtype == "auto":
            recipe = load_recipe(name, ["base.dtype=bfloat16"])
        planned = plan_for(recipe, Hardware("cpu", "CPU", 24 * 10**9)).peak / 1e9
        assert int(said) - 1 < planned <= int(said), (name, planned)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    used = {word for line in LINES for word in re.findall(r"^make ([a-z]+)$", line)}
    assert used and used <= set(targets)


def test_the_file_tree_is_the_real_one() -> None:
    tree = next(block for block in BLOCKS if block.startswith("srlm_lite/\n"))
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:]}
    folders = {
        path.name
        for path in (ROOT / "srlm_lite").iterdir()
        if path.is_dir() and (path / "__init__.py").is_file()
    }
    assert folders <= named
    assert all((ROOT / "srlm_lite" / name).exists() for name in named)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"@[A-Z_]+@", README) == []
