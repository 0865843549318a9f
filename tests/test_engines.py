"""The table of engines: one row for each that a recipe can name, and what the row says."""

from __future__ import annotations

from typing import get_args

import pytest

from srlm_lite.engines import ENGINES, engines_of, kind_of
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.settings import EngineName

SERVER = ("openai.url=http://127.0.0.1:1/v1", "openai.model=m")


def recipe(*settings: str) -> Recipe:
    return load_recipe("tiny", [*SERVER, *settings])


def test_every_engine_has_a_row_of_its_name() -> None:
    assert set(ENGINES) == set(get_args(EngineName))
    assert all(kind.name == name for name, kind in ENGINES.items())


def test_an_engine_is_remote_or_here_or_holds_the_base_itself() -> None:
    for kind in ENGINES.values():
        assert [kind.remote, kind.samples_here, kind.holds_base].count(True) == 1


@pytest.mark.parametrize(
    ("settings", "policy", "judge", "needed"),
    [
        ((), "transformers", "transformers", ["transformers"]),
        (("rollout.engine=vllm",), "vllm", "vllm", ["vllm"]),
        (("judge.engine=openai",), "transformers", "openai", ["transformers", "openai"]),
        (
            ("rollout.engine=vllm", "judge.engine=transformers"),
            "vllm",
            "transformers",
            ["vllm", "transformers"],
        ),
    ],
)
def test_the_engine_of_a_role(
    settings: tuple[str, ...], policy: str, judge: str, needed: list[str]
) -> None:
    told = recipe(*settings)
    assert kind_of(told, "policy").name == policy
    assert kind_of(told, "judge").name == judge
    assert kind_of(told, "teacher").remote
    assert [kind.name for kind in engines_of(told)] == needed


def test_a_teacher_s_server_is_an_engine_of_the_run() -> None:
    told = load_recipe("toy-dno", [*SERVER, "dno.teacher=server"])
    assert [kind.name for kind in engines_of(told)] == ["transformers", "openai"]


def test_what_an_engine_takes_for_itself() -> None:
    assert ENGINES["vllm"].share(recipe("vllm.memory=0.3")) == 0.3
    assert ENGINES["transformers"].share(recipe()) == ENGINES["openai"].share(recipe()) == 0
