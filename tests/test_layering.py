"""Imports point one way, the heavy ones stay where they belong, and the loop fits on a screen."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "srlm_lite"
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if "recipes" not in path.relative_to(PACKAGE).parts
)

ALLOWED: dict[str, set[str]] = {
    # plain values
    "telling": set(),
    "errors": {"telling"},
    "conversation": set(),
    "records": {"conversation"},
    "seeds": set(),
    "progress": set(),
    "hardware": set(),
    "tasks": set(),
    "window": set(),
    "stopping": {"errors"},
    "processes": {"errors", "stopping", "telling"},
    # what a run is to do
    "yaml_text": {"errors"},
    "shipped": {"errors"},
    "settings": {"errors", "shipped", "telling"},
    "recipe": {"errors", "forms", "methods", "settings", "shipped", "yaml_text"},
    "explain": {"errors", "forms", "methods", "recipe", "settings"},
    "engines": {"model", "progress", "recipe", "rollout", "run.run", "settings"},
    "planning": {
        "conversation",
        "data",
        "declared",
        "engines",
        "errors",
        "forms",
        "hardware",
        "judging",
        "methods",
        "model",
        "recipe",
        "records",
        "rollout",
        "settings",
        "training",
        "window",
    },
    # files
    "run": set(),
    "run.sums": {"errors"},
    "run.files": {"errors", "records", "run.sums"},
    "run.journal": {"records", "run.files", "run.sums"},
    "run.layout": {"errors", "run.files", "run.sums"},
    "run.run": {"errors", "recipe", "run.files", "run.layout", "run.sums", "telling"},
    "data": {"conversation", "errors", "progress", "records", "run.files"},
    # pure: from judgements to pairs and figures
    "quoting": set(),
    "judging": {"errors", "quoting", "records", "shipped", "yaml_text"},
    "questions": {"errors", "judging", "quoting", "records", "shipped"},
    "pairing": {"records", "settings"},
    "evaluate": {"errors", "judging", "questions", "records", "settings"},
    "principles": {"errors", "quoting", "shipped", "yaml_text"},
    # what methods and forms of judging say of themselves
    "declared": {"pairing", "settings", "window"},
    # the forms of judging: they know no recipe, no session, no run and no stage
    "forms": {
        "declared",
        "errors",
        "evaluate",
        "judging",
        "pairing",
        "questions",
        "quoting",
        "records",
        "settings",
        "shipped",
    },
    # what a method is: it knows no recipe, no session, no run and no stage
    "methods": {
        "conversation",
        "declared",
        "errors",
        "evaluate",
        "forms",
        "judging",
        "pairing",
        "principles",
        "questions",
        "quoting",
        "records",
        "seeds",
        "settings",
        "shipped",
        "window",
    },
    # torch
    "model": {"conversation", "errors", "settings", "shipped"},
    "rollout": {
        "conversation",
        "errors",
        "hardware",
        "model",
        "processes",
        "records",
        "settings",
        "telling",
    },
    "training": {
        "errors",
        "model",
        "processes",
        "rollout",
        "run.files",
        "run.layout",
        "seeds",
        "settings",
        "shipped",
        "stopping",
    },
    # the run
    "session": {
        "conversation",
        "engines",
        "errors",
        "judging",
        "methods",
        "model",
        "processes",
        "progress",
        "recipe",
        "rollout",
        "run.layout",
        "run.run",
        "settings",
        "window",
    },
    "stages": {
        "conversation",
        "data",
        "declared",
        "engines",
        "errors",
        "evaluate",
        "forms",
        "judging",
        "methods",
        "model",
        "pairing",
        "progress",
        "questions",
        "quoting",
        "recipe",
        "records",
        "rollout",
        "run.files",
        "run.journal",
        "run.layout",
        "run.run",
        "seeds",
        "session",
        "settings",
        "shipped",
        "stopping",
        "training",
        "window",
    },
    "compare": {
        "conversation",
        "data",
        "engines",
        "errors",
        "evaluate",
        "forms",
        "judging",
        "model",
        "questions",
        "quoting",
        "records",
        "rollout",
        "run.files",
        "run.journal",
        "run.layout",
        "seeds",
        "session",
        "settings",
        "stages",
        "window",
    },
    "report": {
        "conversation",
        "engines",
        "errors",
        "evaluate",
        "forms",
        "judging",
        "methods",
        "pairing",
        "recipe",
        "records",
        "run.files",
        "run.layout",
        "run.run",
        "settings",
        "shipped",
        "stages",
        "telling",
    },
    "export": {
        "errors",
        "hardware",
        "methods",
        "model",
        "progress",
        "recipe",
        "records",
        "report",
        "run.files",
        "run.layout",
        "run.run",
        "shipped",
        "stages",
    },
    "dataview": {
        "conversation",
        "data",
        "engines",
        "errors",
        "evaluate",
        "judging",
        "model",
        "progress",
        "recipe",
        "records",
        "report",
        "run.files",
    },
    "serve": {
        "conversation",
        "errors",
        "model",
        "records",
        "rollout",
        "seeds",
        "session",
        "settings",
        "stages",
        "telling",
        "window",
    },
    "tracking": {
        "errors",
        "progress",
        "recipe",
        "records",
        "report",
        "run.files",
        "run.run",
        "settings",
        "telling",
    },
    "loop": {"methods", "run.layout", "session", "stages"},
    "bench": {
        "data",
        "declared",
        "engines",
        "errors",
        "evaluate",
        "export",
        "forms",
        "hardware",
        "judging",
        "loop",
        "methods",
        "model",
        "pairing",
        "planning",
        "progress",
        "recipe",
        "records",
        "rollout",
        "run.files",
        "run.layout",
        "run.run",
        "seeds",
        "session",
        "settings",
        "shipped",
        "stages",
        "training",
    },
    "cli": {
        "bench",
        "compare",
        "conversation",
        "data",
        "dataview",
        "doctor",
        "engines",
        "errors",
        "evaluate",
        "explain",
        "export",
        "forms",
        "hardware",
        "loop",
        "planning",
        "preflight",
        "processes",
        "progress",
        "recipe",
        "records",
        "report",
        "run.files",
        "run.layout",
        "run.run",
        "serve",
        "session",
        "settings",
        "stages",
        "stopping",
        "telling",
        "tracking",
    },
    "preflight": {
        "engines",
        "errors",
        "evaluate",
        "forms",
        "hardware",
        "judging",
        "methods",
        "model",
        "planning",
        "questions",
        "recipe",
        "run.files",
        "run.run",
        "session",
        "settings",
        "shipped",
        "stages",
        "tracking",
        "window",
    },
    "doctor": {
        "engines",
        "errors",
        "hardware",
        "model",
        "planning",
        "recipe",
        "settings",
        "tracking",
        "training",
    },
    "__main__": {"cli"},
}
"""Part of the package to the parts it may import: the package's layers, from the bottom up."""

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "tensorboard",
    "wandb",
    "trackio",
}
MAY_BE_HEAVY = {"bench", "model", "rollout", "training"}
MAY_BE_HEAVY_WITHIN_A_FUNCTION = {"doctor", "hardware", "planning", "processes", "tracking"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def part_of(module: str) -> str:
    """`srlm_lite.model.base` belongs to `model`, `srlm_lite.loop` to `loop`.

    Of the run directory each module is a part: its files lie below recipes, `RunDir` above them.
    """
    _, part, *below = [*module.split("."), "", ""]
    return f"{part}.{below[0]}".rstrip(".") if part == "run" else part


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, and whether within a function; TYPE_CHECKING blocks included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    late = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, functions)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in late
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "srlm_lite":
                for alias in node.names:
                    yield f"srlm_lite.{alias.name}", node in late
            else:
                yield str(node.module), node in late


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    own = part_of(module_name(path))
    if not own:
        return
    for module, _ in imports(path):
        if module.split(".")[0] != "srlm_lite" or module == "srlm_lite.__version__":
            continue
        assert part_of(module) in ALLOWED[own] | {own}, f"{own} must not import {module}"


def test_the_layers_have_no_circle() -> None:
    remaining = {part: set(below) for part, below in ALLOWED.items()}
    while remaining:
        free = {part for part, below in remaining.items() if not below}
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {part: below - free for part, below in remaining.items() if part not in free}


def test_every_part_has_its_layer() -> None:
    assert {part_of(module_name(path)) for path in FILES} - {""} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    own = part_of(module_name(path))
    for module, late in imports(path):
        if module.split(".")[0] in HEAVY:
            allowed = own in MAY_BE_HEAVY or (late and own in MAY_BE_HEAVY_WITHIN_A_FUNCTION)
            assert allowed, f"{own} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_library_neither_prints_nor_asserts(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert"
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path}: print"


def test_only_the_run_directory_knows_names_of_its_files() -> None:
    names = ("candidates.jsonl", "pairs.jsonl", "drops.json", "done.json", "run.json", "iter_")
    knowing = set()
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)
        }  # docstrings, and strings that describe an attribute
        knowing |= {
            part_of(module_name(path))
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and node not in documentation
            and isinstance(node.value, str)
            and node.value.startswith(names)
        }
    assert knowing == {"run.layout", "run.run"}


def test_the_loop_fits_on_a_screen() -> None:
    assert len((PACKAGE / "loop.py").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_imports_and_says_what_it_is(path: Path) -> None:
    name = module_name(path)
    if name.endswith("__main__"):  # starts the program
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    else:
        assert importlib.import_module(name).__doc__


def loaded_by(code: str) -> set[str]:
    """Top-level packages in memory after some code has run in a process of its own."""
    code = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize(
    "command",
    [["--help"], ["iterate", "--help"], ["show", "--help"], ["bench", "rollout", "--help"]],
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    loaded = loaded_by(
        f"sys.argv = ['srlm-lite', *{command}]\n"
        "from srlm_lite.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert "typer" in loaded
    assert loaded & (HEAVY | {"scipy", "numpy", "yaml", "datasets"}) == set()
    if len(command) == 1:  # of a command's options, typer itself imports pydantic
        assert "pydantic" not in loaded


def test_the_loop_imports_no_torch() -> None:
    loaded = loaded_by("import srlm_lite.loop, srlm_lite.cli.iterate, srlm_lite.cli.evaluate")
    assert "pydantic" in loaded
    assert loaded & {*HEAVY, "scipy", "sklearn", "nltk"} == set()
