"""The README tells the truth: its recipes, methods and targets exist, and take what it says."""

from __future__ import annotations

import re
from pathlib import Path

from srlm_lite.planning.machine import plan_for
from srlm_lite.planning.plan import Hardware
from srlm_lite.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.splitlines()]


def test_recipes_are_all_in_the_table() -> None:
    judges = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    of_forms = judges.split("<!-- parts:")[1]
    table = re.findall(r"^\| `([\w.-]+)` \|", README + of_forms, flags=re.MULTILINE)
    assert sorted(table) == shipped_recipes()


def test_the_memory_in_the_table_holds_the_plan() -> None:
    """For recipes for CPUs, in bf16 where the recipe leaves that to the processor."""
    rows = re.findall(r"^\| `([\w.-]+)` \|[^|]*\| 2 cores, (\d+) GB \|", README, flags=re.MULTILINE)
    assert len(rows) == 6
    for name, said in rows:
        recipe = load_recipe(name)
        if recipe.base.dtype == "auto":
            recipe = load_recipe(name, ["base.dtype=bfloat16"])
        planned = plan_for(recipe, Hardware("cpu", "CPU", 24 * 10**9)).peak / 1e9
        assert int(said) - 1 < planned <= int(said), (name, planned)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    used = re.findall(r"^make ([a-z]+)$", "\n".join(LINES), flags=re.MULTILINE)
    assert used == ["demo", "test"]  # whoever tries it types the first, and then the second
    assert set(used) <= set(targets)
