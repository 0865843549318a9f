"""What is said of settings: in words, with a recipe's value, as a schema, to a shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Cli
from typer.main import get_command

from srlm_lite.cli import completion
from srlm_lite.cli.main import app
from srlm_lite.errors import UserError
from srlm_lite.explain import all_settings, find_setting, schema, value_in
from srlm_lite.recipe import Recipe, load_recipe, recipes_dir, shipped_recipes

SCHEMA = schema()


class Yaml12(yaml.SafeLoader):
    """As editors read YAML: there `5e-6` is a number, which YAML 1.1 takes for a text."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def problems(recipe: Any) -> list[str]:
    """What an editor marks in a recipe."""
    from jsonschema import Draft202012Validator

    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(recipe)]


def test_every_setting_says_what_it_means() -> None:
    assert [one.key for one in all_settings() if not one.meaning] == []


@pytest.mark.parametrize(
    ("key", "takes", "default"),
    [
        ("name", "text", None),
        ("base.name", "name or path", None),
        ("base.dtype", "`auto`, `bfloat16`, `float16` or `float32`", "auto"),
        ("base.chat_template", "shipped name or path or `null`", "null"),
        ("anchor.init", "path, or `base`", "base"),
        ("anchor.ift_limit", "whole number above 0 or `null`", "null"),
        ("dpo.learning_rate", "number above 0", "5e-6"),
        ("dpo.lora.dropout", "number from 0 to below 1", "0.0"),
        ("rollout.n", "whole number from 2 on", "4"),
        ("rollout.temperature", "number: 0, or from 0.001 to 100", "0.7"),
        ("rollout.batch_rows", "whole number above 0 or `auto`", "auto"),
        ("judge.top_p", "number above 0, to 1", "0.9"),
        ("pairing.rho", "number from 0 to 0.5 or list of numbers from 0 to 0.5", "0.0"),
        ("spin.lambdas", "list of numbers above 0", "[0.1, 0.1, 0.1, 5.0]"),
        ("dpo.lora", "section", None),
        ("openai.retries", "whole number from 0 on", "6"),
    ],
)
def test_what_a_setting_takes_is_said_in_words(key: str, takes: str, default: str | None) -> None:
    found = find_setting(key)
    assert found.takes == takes
    assert found.section is not None or found.default == default


def test_values_that_a_method_refuses_are_said_as_a_recipe_would_say_them() -> None:
    assert find_setting("pairing.accumulate").refused == {"rlhf": ("true",)}
    assert find_setting("dpo.loss").refused == {"cream": ("sft",), "scir": (), "rlhf": ()}


def test_whether_a_run_may_change_it_is_what_its_identity_says() -> None:
    recipe = load_recipe("toy", ["method=self-rewarding"])
    noted = recipe.identity()
    for one in all_settings():
        if one.section is not None or one.read_by is not None or one.before is not None:
            continue
        part: Any = noted
        for name in one.key.split("."):
            part = part.get(name, "missing") if isinstance(part, dict) else "missing"
        assert (part != "missing") == one.decides, one.key


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("dpo.bta", "`dpo.beta`"),
        ("rolout.n", "Did you mean `rollout.n`?"),
        ("beta", "Did you mean `dpo.beta`?"),
        ("dpo.rank", "`anchor.lora.rank` or `dpo.lora.rank`"),
        ("xyzzy", "`srlm-lite recipes explain` lists all"),
    ],
)
def test_a_typo_is_told_what_is_near(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=re.escape(near)):
        find_setting(wrong)


def test_a_value_is_told_with_the_file_that_says_so(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: toy-paper\nname: own\ndpo: {beta: 0.3}\n")
    shipped = recipes_dir()
    assert value_in("dpo.beta", str(own)) == (0.3, own)
    assert value_in("dpo.reference", str(own)) == ("init", shipped / "toy-paper.yaml")
    assert value_in("dpo.lora.rank", str(own)) == (16, shipped / "toy.yaml")
    assert value_in("dpo.lora.dropout", str(own)) == (0.0, None)


def test_explain_prints_it(cli: Cli) -> None:
    said = cli("recipes", "explain", "dpo.beta", "--recipe", "toy-paper")
    assert said.stdout.splitlines()[0] == "dpo.beta"
    assert "  takes: number above 0\n  default: 0.1\n" in said.stdout
    assert "  in toy-paper: 0.1 (the default)" in said.stdout
    listed = cli("recipes", "explain", "dpo")
    assert all(f"dpo.{name} " in listed.stdout for name in ("beta", "init", "lora"))
    assert "dpo " in cli("recipes", "explain").stdout
    wrong = cli("recipes", "explain", "dpo.bta")
    assert wrong.returncode == 2 and "Did you mean `dpo.beta`" in wrong.stderr


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_keep_to_the_schema(name: str) -> None:
    text = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    assert problems(yaml.load(text, Loader=Yaml12)) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("extends: toy\ndpo: {bta: 0.2}", "'bta' was unexpected"),
        ("extends: toy\nrolout: {n: 4}", "'rolout' was unexpected"),
        ("extends: toy\ndpo: {beta: high}", "'high' is not of type 'number'"),
        ("extends: toy\ndpo: {beta: 0}", "0 is less than or equal to the minimum of 0"),
        ("extends: toy\nmethod: spinn", "'spinn' is not one of"),
        ("extends: toy\nrollout: {temperature: 0.0001}", "is not valid under any"),
        ("name: mine", "'base' is a required property"),
        ("name: mine\nbase: {}\ndata: {dir: d}", "'name' is a required property"),
    ],
)
def test_a_slip_does_not_keep_to_the_schema(text: str, told: str) -> None:
    assert any(told in problem for problem in problems(yaml.load(text, Loader=Yaml12)))


def test_what_a_recipe_may_say_keeps_to_the_schema() -> None:
    """One name for a list of trackers, and all that a recipe says with its defaults filled in."""
    assert problems({"extends": "toy", "tracking": {"report_to": "wandb"}}) == []
    for name in ("toy", "smollm2-135m-demo", "llama2-70b"):
        assert problems(load_recipe(name).model_dump(mode="json")) == []


def test_the_schema_says_the_meaning_of_each_setting() -> None:
    properties = SCHEMA["properties"]
    assert set(properties) == {"extends", *Recipe.model_fields}
    assert SCHEMA["$defs"]["Dpo"]["properties"]["beta"]["description"]


def test_schema_writes_a_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "recipe.schema.json"
    assert cli("recipes", "schema", "--out", str(file)).stdout == ""
    assert json.loads(file.read_text()) == SCHEMA
    assert json.loads(cli("recipes", "schema").stdout) == SCHEMA
    lost = cli("recipes", "schema", "--out", str(tmp_path / "no" / "folder.json"))
    assert (lost.returncode, lost.stderr.count("\n")) == (2, 1)


def test_a_shell_is_offered_recipes_and_settings() -> None:
    assert completion.recipe_names("toy-d") == ["toy-dno", "toy-dpo"]
    assert completion.setting_keys("dpo.lora.r") == ["dpo.lora.rank"]
    assert completion.overrides("dpo.be") == ["dpo.beta="]
    assert completion.overrides("method=s") == [
        f"method={name}" for name in ("self-rewarding", "spin", "scir", "scpo")
    ]
    assert completion.overrides("rollout.fold=") == ["rollout.fold=true", "rollout.fold=false"]
    assert completion.overrides("judge.engine=v") == ["judge.engine=vllm"]
    assert completion.overrides("nothing=") == []


def test_every_option_for_a_recipe_or_a_setting_is_completed() -> None:
    waiting, found = [get_command(app)], 0
    while waiting:
        command: Any = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for one in command.params:
            if {"--recipe", "--set"} & set(one.opts):
                found += 1
                assert one._custom_shell_complete is not None, (command.name, one.opts)
    assert found >= 12


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("srlm-lite iterate --recipe toy-r", "toy-rlaif\ntoy-rlhf"),
        ("srlm-lite recipes show tin", "tiny"),
        ("srlm-lite iterate --set dpo.bet", "dpo.beta="),
        ("srlm-lite recipes expl", "explain"),
    ],
)
def test_bash_asks_the_program(typed: str, offered: str) -> None:
    words = typed.split()
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['srlm-lite']; "
         "from srlm_lite.cli.main import run; run()"],
        env={
            **os.environ,
            "_SRLM_LITE_COMPLETE": "complete_bash",
            "COMP_WORDS": "\n".join(words),
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == offered, done.stderr
