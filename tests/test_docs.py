"""The pages tell the truth: what is written from the code is as it is, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from srlm_lite.cli.main import app
from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.judging import load_rubric
from srlm_lite.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.glob("*.md"),
        *ROOT.glob("*.md"),
        ROOT / "recipes" / "accelerate" / "README.md",
    ]
)
BLOCK = re.compile(r"^```\w*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4,}(srlm-lite .*(?:\\\n.*)*)", flags=re.MULTILINE)
INLINE = re.compile(r"`(?:\.venv/bin/)?(srlm-lite [a-z][^`]*)`")
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def anchors(path: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = BLOCK.sub("", text_of(path))
    found = []
    for heading in re.findall(r"^#{1,6} +(.*)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        kept = re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", plain).strip().lower())
        found.append(kept.replace(" ", "-"))
    return found


def commands_in(text: str) -> list[str]:
    """Lines that a page tells to type."""
    lines = [
        line.strip()
        for block in BLOCK.findall(text)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    typed = [line for line in lines if line.startswith("srlm-lite ")]
    return [*typed, *INDENTED.findall(text), *INLINE.findall(text)]


COMMANDS = [
    pytest.param(line, id=f"{name_of(path)}: {' '.join(line.split())[:60]}")
    for path in PAGES
    if path.name != "CHANGELOG.md"
    for line in dict.fromkeys(commands_in(text_of(path)))
]


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and what follows it."""
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        words = words[1:] if words[0] == "-v" else words
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_options_exist(line: str) -> None:
    words = re.sub(r"\\\n|\n", " ", line).split("#")[0].split()[1:]
    if words[0].startswith("--"):
        words, command = [], get_command(app)
        rest = [line]
    else:
        command, rest = resolve(words)
    known = {option for parameter in command.params for option in parameter.opts}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(rest)))
    assert used <= known | {"--help"}, line


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 60


def test_settings_that_they_override_exist() -> None:
    texts = [text_of(path) for path in PAGES if path.name != "CHANGELOG.md"]
    overrides = re.findall(r"--set ([a-z_]+(?:\.[a-z_]+)+=[\w.:/-]+)", "\n".join(texts))
    assert len(overrides) >= 10
    for override in dict.fromkeys(overrides):
        try:
            load_recipe("toy", [override])
        except UserError as error:  # alone it may not go with the rest of the toy recipe
            said = str(error)
            assert "unknown key" not in said and f"`{override.partition('=')[0]}`" not in said


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = BLOCK.sub("", text_of(path))
    for link in LINK.findall(text):
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.is_file(), f"{link}: no such file"
        if anchor:
            assert anchors(target).count(anchor) == 1, f"{link}: no such heading, or two"


def test_a_rubric_and_a_scorer_as_the_page_has_them_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = text_of(DOCS / "judges.md")
    [rubric] = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    [scorer] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "kindness.yaml").write_text(rubric)
    (tmp_path / "scorer_of_the_page.py").write_text(scorer)
    monkeypatch.chdir(tmp_path)
    shown = load_rubric("kindness.yaml").render(prompt="p", response="Score: 5")
    assert "S core: 5" in shown and "{{" not in shown
    assert load_gold("scorer_of_the_page:gold").total("Be brief.", "Yes, please.") == 2.0


def test_a_recipe_as_the_page_has_it_is_valid(tmp_path: Path) -> None:
    recipe = next(re.finditer(r"```yaml\n(.*?)```", text_of(DOCS / "settings.md"), re.DOTALL))[1]
    (tmp_path / "mine.yaml").write_text(recipe)
    assert load_recipe(str(tmp_path / "mine.yaml")).dpo.beta == 0.2


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_nothing_is_left_to_fill_in(path: Path) -> None:
    assert re.findall(r"@[A-Z_]+@|TODO|FIXME", text_of(path)) == []


def test_every_page_is_found_from_the_first() -> None:
    index, site = text_of(DOCS / "index.md"), text_of(ROOT / "mkdocs.yml")
    names = {path.name for path in DOCS.glob("*.md")} - {"index.md"}
    assert [name for name in sorted(names) if f"]({name})" not in index] == []
    assert [name for name in sorted(names) if f": {name}\n" not in site] == []


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 200


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / ".ci" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


@pytest.mark.parametrize("page", GENERATOR.PAGES)
def test_pages_are_as_the_code_is(page: str) -> None:
    assert text_of(DOCS / page) == GENERATOR.PAGES[page](), "write it anew: make docs"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in DOCS.glob("*.md")} | {"readme", "benchmarks", "contributing"}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    # Whoever reads it is told to nobody: nothing is loaded from elsewhere.
    loaded = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?:")
    for page in (tmp_path / "site").glob("*.html"):
        assert not loaded.search(text_of(page)), page.name
