"""Whatever a file holds, reading it gives what it says or one line of what is wrong with it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srlm_lite.errors import UserError
from srlm_lite.judging import load_rubric
from srlm_lite.principles import load_principles
from srlm_lite.recipe import Recipe, load_recipe, recipe_from
from srlm_lite.records import Candidate, Judgement, PreferencePair, RankedReply
from srlm_lite.run.files import read_json, read_jsonl, read_records
from srlm_lite.run.run import RunDir
from srlm_lite.run.sums import is_harmed, sums_of
from srlm_lite.shipped import recipes_dir
from srlm_lite.stages.seed_data import read_prompts, read_ranked

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["", "auto", "none", "nowhere", "0", "1e999", "/", "a:b"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)

FEW = settings(max_examples=60, suppress_health_check=list(HealthCheck))


def held(read: Callable[[], Any]) -> Any:
    """What was read; None where it was refused, in one line."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


def a_file(name: str, content: bytes) -> Path:
    path = Path(tempfile.mkdtemp(dir=os.environ["PYTEST_GARBLED"])) / name
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_GARBLED", str(tmp_path))


def changed(value: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """The same with one of its values another one, wherever it stands."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(value[key], draw)}
    return draw(VALUES)


@st.composite
def recipes(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    return changed(load_recipe("tiny").model_dump(mode="json"), draw)


@FEW
@given(raw=recipes())
def test_any_value_in_any_setting(raw: Any) -> None:
    if isinstance(raw, dict):
        recipe = held(lambda: recipe_from(raw, where="r"))
        if isinstance(recipe, Recipe):
            recipe.identity()
    path = a_file("r.yaml", yaml.safe_dump(raw).encode())
    held(lambda: load_recipe(str(path)))


@FEW
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
def test_any_bytes_in_place_of_a_recipe_a_rubric_principles_or_rows(content: bytes) -> None:
    path = a_file("file.yaml", content)
    for read in (load_recipe, load_rubric, load_principles):
        held(lambda read=read: read(str(path)))  # type: ignore[misc]
    for rows in (read_jsonl, read_json, read_prompts, lambda path: read_ranked(path, None)):
        held(lambda rows=rows: rows(path))  # type: ignore[misc]
    sums_of(path).write_bytes(content)
    assert not is_harmed(path)


@FEW
@given(rows=st.lists(VALUES | st.dictionaries(
    st.sampled_from(["prompt_id", "candidate_id", "text", "score", "vote", "rank", "response",
                     "response_id", "prompt", "n_tokens", "finish_reason", "messages", "quality"]),
    VALUES, max_size=9), max_size=3))  # fmt: skip
def test_any_values_in_rows(rows: list[Any]) -> None:
    path = a_file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    for kind in (Candidate, Judgement, PreferencePair, RankedReply):
        held(lambda kind=kind: read_records(path, kind))  # type: ignore[misc]
    held(lambda: read_prompts(path))
    held(lambda: read_ranked(path, 5))


@st.composite
def rubrics(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    name = draw(
        st.sampled_from(sorted(path.stem for path in (recipes_dir() / "rubrics").iterdir()))
    )
    return changed(yaml.safe_load((recipes_dir() / "rubrics" / f"{name}.yaml").read_text()), draw)


@FEW
@given(raw=rubrics())
def test_any_value_in_a_rubric(raw: Any) -> None:
    path = a_file("rubric.yaml", yaml.safe_dump(raw).encode())
    rubric = held(lambda: load_rubric(str(path)))
    if rubric is not None:
        assert rubric.min < rubric.max
        assert "question" in rubric.render(prompt="question", response="answer")


@st.composite
def notes(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    recipe = load_recipe("tiny")
    facts = {"format": 1, "recipe": recipe.model_dump(mode="json"), "identity": recipe.identity()}
    return changed({**facts, "versions": {}, "seed": 0}, draw)


@FEW
@given(raw=notes())
def test_any_value_in_run_json(raw: Any) -> None:
    run = RunDir(a_file("run.json", json.dumps(raw).encode()).parent)
    held(run.facts)
    held(run.recipe)
    held(lambda: run.glance(load_recipe("tiny")))
    held(lambda: run.check(load_recipe("tiny")))
