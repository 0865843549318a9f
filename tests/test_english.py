"""Names and docstrings: a class's name means one thing, and a docstring says what it stands for."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "srlm_lite").rglob("*.py"))
OURS = sorted([*PACKAGE, *(ROOT / "tests").glob("*.py"), *(ROOT / ".ci").glob("*.py")])


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Those of modules, classes and functions, and the texts below settings and fields."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for one in body if isinstance(body, list) else ():
            match one:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield one.lineno, text.strip()


def says_nothing(text: str) -> bool:
    """A word in place of a docstring, or the end of a sentence whose beginning is the name."""
    return bool(re.match(r"(None\b\.?$|Of\b)", text))


@pytest.mark.parametrize("text", ["None.", "None", "Of the reply.", "Of them,\nthe first."])
def test_what_says_nothing(text: str) -> None:
    assert says_nothing(text)
    assert not says_nothing("None where there is no reply.")
    assert not says_nothing("Often the same.")


def test_docstrings_say_what_they_stand_for() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text[:60]}"
        for file in OURS
        for line, text in docstrings(file.read_text(encoding="utf-8"))
        if says_nothing(text)
    ]
    assert not found, "\n".join(found)


def test_a_class_s_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for file in PACKAGE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 300
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, twice
