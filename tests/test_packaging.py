"""What an installed srlm-lite carries, and whether the pins fit the ranges."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parent.parent
CACHES = {"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"}

MUST_HAVE = (
    "smollm2-135m-demo.yaml",
    "toy.yaml",
    "toy-arithmetic.yaml",
    "tiny.yaml",
    "rubrics/additive-5.yaml",
    "rubrics/house-style.yaml",
    "rubrics/toy.yaml",
    "chat_templates/chatml.jinja",
    "chat_templates/llama-2.jinja",
    "arithmetic/base/config.json",
    "arithmetic/base/model.safetensors",
    "arithmetic/base/tokenizer.json",
    "arithmetic/steps.jsonl",
    "toy/base/config.json",
    "toy/base/model.safetensors",
    "toy/base/tokenizer.json",
    "house_style/anchor/adapter_config.json",
    "house_style/anchor/adapter_model.safetensors",
    *(
        f"{task}/data/{name}.jsonl"
        for task in ("toy", "house_style", "arithmetic")
        for name in ("ift", "eft_train", "eft_eval", "prompts", "eval_prompts")
    ),
)

# Run by a Python that finds the unpacked wheel before this checkout.
PROBE = """
import json
from srlm_lite.recipe import load_recipe, paths_in, shipped_recipes
from srlm_lite.shipped import recipes_dir
from srlm_lite.judging import load_rubric

paths = {}
for name in shipped_recipes():
    paths[name] = [section[key] for section, key, _ in paths_in(load_recipe(name).model_dump())]
rubrics = sorted(path.stem for path in (recipes_dir() / "rubrics").glob("*.yaml"))
print(json.dumps({
    "recipes_dir": str(recipes_dir()),
    "paths": paths,
    "rubrics": [load_rubric(name).name for name in rubrics],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution: so that one must be complete as well."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    built = subprocess.run([*command, str(REPOSITORY)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_carries_all_of_recipes(names: set[str]) -> None:
    recipes = REPOSITORY / "recipes"
    files = {
        f"srlm_lite/recipes/{path.relative_to(recipes).as_posix()}"
        for path in recipes.rglob("*")
        if path.is_file() and not CACHES.intersection(path.parts)
    }
    assert files <= names


@pytest.mark.parametrize("file", MUST_HAVE)
def test_the_wheel_carries(file: str, names: set[str]) -> None:
    assert f"srlm_lite/recipes/{file}" in names


def test_the_wheel_carries_the_templates_of_the_report(names: set[str]) -> None:
    folder = REPOSITORY / "srlm_lite" / "report" / "templates"
    files = {f"srlm_lite/report/templates/{path.name}" for path in folder.iterdir()}
    assert len(files) == 3 and files <= names


def test_the_wheel_carries_nothing_else(names: set[str]) -> None:
    paths = [PurePosixPath(name) for name in names]
    assert {path.parts[0].partition("-")[0] for path in paths} == {"srlm_lite"}
    assert [str(path) for path in paths if CACHES.intersection(path.parts)] == []
    assert [str(path) for path in paths if path.suffix in {".pyc", ".pyo"}] == []
    assert "srlm_lite/py.typed" in names


def test_the_source_distribution_carries_what_it_speaks_of(wheel: Path) -> None:
    """What its texts link to, what make runs, and what its tests read."""
    [file] = wheel.parent.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    texts = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
    linked = {
        (text.parent / link).resolve().relative_to(REPOSITORY).as_posix()
        for text in texts
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text.read_text(encoding="utf-8"))
    }
    run = set(re.findall(r"\.ci/\w+\.py", (REPOSITORY / "Makefile").read_text(encoding="utf-8")))
    assert {"BENCHMARKS.md", "docs/data.md", ".ci/gpu_report.py"} <= linked | run
    missing = [
        name
        for name in (*linked, *run, ".ci/run", "pyproject.toml", "LICENSE", "mkdocs.yml")
        if not any(path == name.rstrip("/") for path in carried)
    ]
    assert missing == []


def test_the_wheel_carries_the_tested_versions(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = archive.read("srlm_lite/constraints.txt")
    assert carried == (REPOSITORY / "constraints.txt").read_bytes()


def test_the_wheel_describes_itself(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"unsloth", "vllm", "eval", "tracking", "docs", "dev"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    assert "srlm-lite = srlm_lite.cli.main:run" in entry_points


def test_recipes_and_rubrics_load_from_an_installed_package(
    installed: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    recipes = installed / "srlm_lite" / "recipes"
    assert Path(found["recipes_dir"]) == recipes
    assert set(found["paths"]) == {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert len(found["rubrics"]) == len(list((REPOSITORY / "recipes" / "rubrics").glob("*.yaml")))
    # Whatever a recipe names beside itself travels with it: nothing points into the checkout.
    absolute = [Path(p) for paths in found["paths"].values() for p in paths if p.startswith("/")]
    assert absolute
    assert [path for path in absolute if not path.is_relative_to(recipes)] == []
    assert [path for path in absolute if not path.exists()] == []


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for line in (text.strip() for text in lines):
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, f"not an exact pin: {line}"
            pinned[canonicalize_name(name)] = version
    return pinned


def requirements(*groups: str) -> list[Requirement]:
    """What the package itself requires, and the extras named."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(line for group in groups for line in extras[group])]
    return [Requirement(line) for line in listed]


@pytest.mark.parametrize(
    "requirement", requirements("dev", "eval", "unsloth", "vllm", "tracking", "docs"), ids=str
)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, "constraints.txt does not pin it"
    assert requirement.specifier.contains(pinned)


def test_no_pin_asks_for_one_build_of_a_version() -> None:
    """`2.13.0` takes a CPU or a CUDA build, whichever pip is offered; `2.13.0+cpu` does not."""
    assert [name for name, version in pins().items() if Version(version).local] == []
