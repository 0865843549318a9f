"""Recipes: every shipped one loads, every mistake is one line that says the way out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from messages import Told

from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.hardware import Gpu, choose_recipe
from srlm_lite.judging import load_rubric
from srlm_lite.recipe import Recipe, find_recipe, load_recipe, recipe_from, shipped_recipes
from srlm_lite.settings import Before, IsPath, marked
from srlm_lite.shipped import (
    CHAT_TEMPLATES,
    RUBRICS,
    Shelf,
    recipes_dir,
    shipped_file,
    shipped_text,
)
from srlm_lite.stages.seed_data import data_file
from srlm_lite.yaml_text import parse_yaml

MINIMAL: dict[str, Any] = {"name": "t", "base": {"name": "some/base"}, "data": {"dir": "nowhere"}}


def recipe(**changes: Any) -> Recipe:
    return recipe_from({**MINIMAL, **changes}, where="r.yaml")


def refusal(**changes: Any) -> str:
    """The one line that says what is wrong with a recipe."""
    with pytest.raises(UserError) as caught:
        recipe(**changes)
    line = str(caught.value)
    assert line.startswith("r.yaml: ")
    assert "\n" not in line
    return line.removeprefix("r.yaml: ")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A recipe file with its data beside it."""
    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "ift.jsonl").write_text("{}\n")
    (folder / "rubric.yaml").write_text('template: "{{prompt}} {{response}}"\n')
    raw = {**MINIMAL, "data": {"dir": "data"}, "judge": {"rubric": "rubric.yaml"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


# --- shipped recipes --------------------------------------------------------------------------


def test_the_promised_recipes_are_shipped() -> None:
    promised = {"smollm2-135m-demo", "toy", "tiny", "llama3.1-8b", "llama2-7b", "llama2-70b"}
    promised |= {"qwen3-8b", "gemma3-4b", "mistral-7b", "smollm3-3b"}
    assert promised <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.name == name
    assert loaded.description.endswith(".")
    load_rubric(loaded.judge.rubric)
    if loaded.base.chat_template is not None:
        assert shipped_file(CHAT_TEMPLATES, name=loaded.base.chat_template).is_file()
    if loaded.evaluate.gold is not None:
        load_gold(loaded.evaluate.gold)
    assert len(loaded.digest()) == 64


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_have_their_data_or_say_how_to_make_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(name)
    if Path(loaded.data.dir).is_absolute():
        for file in ("ift.jsonl", "eft_train.jsonl", "eft_eval.jsonl", "prompts.jsonl"):
            assert data_file(loaded, file).is_file()
    else:
        assert "srlm-lite data prepare" in find_recipe(name).read_text()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_hold_a_window_for_prompt_answer_and_judgement(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.rollout.max_new_tokens < loaded.base.window
    assert loaded.judge.max_new_tokens <= loaded.judge.retry_max_new_tokens < loaded.base.window


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        ([], "smollm2-135m-demo"),
        ([Gpu("small", 8.0)], "smollm2-135m-demo"),
        ([Gpu("24 GB", 25.3)], "llama3.1-8b"),
        ([Gpu("80 GB", 85.0)], "llama3.1-8b"),
        ([Gpu("80 GB", 85.0)] * 2, "llama2-70b"),
        ([Gpu("80 GB", 85.0), Gpu("small", 8.0)], "smollm2-135m-demo"),
    ],
)
def test_the_hardware_chooses_a_shipped_recipe(devices: list[Gpu], name: str) -> None:
    chosen, why = choose_recipe(devices)
    assert chosen == name
    assert chosen in shipped_recipes()
    assert why


# --- unknown keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"iteration": 3}, "iteration"),
        ({"dpo": {"bta": 0.2}}, "dpo.bta"),
        ({"anchor": {"lora": {"rnk": 4}}}, "anchor.lora.rnk"),
        ({"beta": 0.2}, "beta"),
        ({"judge": {"min_gap": 1}}, "judge.min_gap"),
        ({"n": 8}, "n"),
        ({"rank": 8}, "rank"),
        ({"epochs": 1}, "epochs"),
        ({"dpo": {"lora": {"beta": 1}}}, "dpo.lora.beta"),
    ],
)
def test_an_unknown_key_suggests_the_right_one(
    told: Told, changes: dict[str, Any], key: str
) -> None:
    line = refusal(**changes)
    assert f"`{key}`" in line
    told(line)


def test_an_unknown_key_like_no_other_lists_what_is_known_there(told: Told) -> None:
    told(refusal(pairing={"xyzzy": 1}))


def test_a_misspelt_required_key_is_called_unknown_and_not_missing(told: Told) -> None:
    with told.refused():
        recipe_from({"nmae": "t", "base": {"name": "b"}, "data": {"dir": "d"}}, where="r")


# --- wrong values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dpo": {"learning_rate": "fast"}}, "dpo.learning_rate"),
        ({"dpo": {"learning_rate": 0}}, "dpo.learning_rate"),
        ({"rollout": {"temperature": 1e-300}}, "rollout.temperature"),
        ({"compare": {"temperature": 101}}, "compare.temperature"),
        ({"judge": {"temperature": -1}}, "judge.temperature"),
        ({"evaluate": {"temperature": 0}}, "evaluate.temperature"),
        ({"iterations": -1}, "iterations"),
        ({"iterations": 1.5}, "iterations"),
        ({"rollout": {"n": 1}}, "rollout.n"),
        ({"rollout": {"top_p": 1.1}}, "rollout.top_p"),
        ({"base": {"name": 5}}, "base.name"),
        ({"base": {}}, "base.name"),
        ({"base": {"name": "b", "quantization": "int8"}}, "base.quantization"),
        ({"dpo": None}, "dpo"),
        ({"anchor": {"lora": {"targets": "q_proj"}}}, "anchor.lora.targets"),
        ({"anchor": {"micro_batch_size": 3}}, "anchor"),
        ({"judge": {"votes": 1}}, "judge"),
        ({"dpo": {"lora": {"dropout": 0.1}}}, "dpo"),
        ({"judge": {1: 2}}, "judge.1"),
        ({"pairing": {"alpha": float("nan")}}, "pairing.alpha"),
        ({"anchor": {"epochs": float("inf")}}, "anchor.epochs"),
        ({"dpo": {"beta": "1e999"}}, "dpo.beta"),
        ({"dpo": {"lora": {"targets": []}}}, "dpo.lora.targets"),
        ({"openai": {"url": "judge.example/v1"}}, "openai.url"),
        ({"openai": {"url": "ftp://a/v1"}}, "openai.url"),
        ({"openai": {"url": "http://a:b/v1"}}, "openai.url"),
        ({"openai": {"url": "http://[::1"}}, "openai.url"),
        ({"openai": {"url": "https:///v1"}}, "openai.url"),
        ({"name": "\ud800"}, "name"),
        ({"evaluate": {"tasks": ["a\0b"]}}, "evaluate.tasks"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_key(
    told: Told, changes: dict[str, Any], key: str
) -> None:
    line = refusal(**changes)
    assert line.startswith(f"`{key}`")
    told(line)


def test_a_section_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe().dpo.beta = 1.0  # type: ignore[misc]


# --- finding and reading ----------------------------------------------------------------------


def test_an_unknown_recipe_suggests_a_shipped_one(told: Told) -> None:
    with told.refused():
        load_recipe("smolm2-135m-demo")


def test_a_directory_and_two_recipes_in_a_file_are_no_recipe(told: Told, tmp_path: Path) -> None:
    with told.refused():
        load_recipe(str(tmp_path))
    both = (recipes_dir() / "toy.yaml").read_text() + "\n---\nname: other\n"
    (tmp_path / "two.yaml").write_text(both)
    with told.refused():
        load_recipe(str(tmp_path / "two.yaml"))


def test_a_recipe_like_no_other_lists_the_shipped_ones(told: Told) -> None:
    with told.refused():
        load_recipe("/nowhere/zzz.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2\n", "not readable as YAML (expected ',' or ']', but got"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"- a\n- b\n", "a recipe is a mapping of sections"),
        (b"", "a recipe is a mapping of sections"),
        (b"name: !!timestamp soon\n", "not readable as YAML"),
        (b"name: 2024-13-01\n", "not readable as YAML (month must be in 1..12"),
        (b"seed: " + 5000 * b"9", "not readable as YAML (Exceeds the limit"),
        (b"dpo: " + 900 * b"[" + 900 * b"]", "not readable as YAML (maximum recursion depth"),
        (b"dpo: {beta: 1}\nseed: 1\ndpo: {epochs: 1}\n", "not readable as YAML (the key `dpo`"),
        (b"dpo:\n  beta: 1\n  beta: 2\n", "not readable as YAML (the key `beta`"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_keys_may_be_merged_and_said_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "extends: toy\nanchor: &optim {lora: &lora {rank: 2, alpha: 4}}\n"
        "dpo:\n  lora:\n    <<: *lora\n    rank: 3\n"
    )
    assert load_recipe(str(path)).dpo.lora.rank == 3


# --- extending --------------------------------------------------------------------------------


def test_a_recipe_extends_another(written: Path) -> None:
    child = written.with_name("child.yaml")
    child.write_text("extends: recipe.yaml\nname: child\ndpo: {beta: 0.3}\n")
    grandchild = written.parent.parent / "grandchild.yaml"
    grandchild.write_text(f"extends: {child}\ndpo: {{epochs: 2}}\n")
    loaded = load_recipe(str(grandchild), ["seed=4"])
    assert (loaded.name, loaded.seed, loaded.dpo.beta, loaded.dpo.epochs) == ("child", 4, 0.3, 2)
    # Paths are the extended recipe's own.
    assert loaded.data.dir == str(written.parent / "data")
    plain = load_recipe(str(written), ["seed=4", "dpo.beta=0.3", "dpo.epochs=2"])
    assert loaded.digest() == plain.digest()
    child.write_text("extends: toy\nmethod: spin\n")
    assert load_recipe(str(child)).judge.rubric == "toy"


@pytest.mark.parametrize(
    "extended",
    ["child.yaml", "../mine/child.yaml", "toyy", "[a]"],  # the second is itself by another way
)
def test_what_cannot_be_extended_is_one_line(told: Told, written: Path, extended: str) -> None:
    child = written.with_name("child.yaml")
    child.write_text(f"extends: {extended}\n")
    with told.refused():
        load_recipe(str(child))


# --- overrides --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("dpo.beta=0.2", "dpo", "beta", 0.2),
        ("dpo.learning_rate=1e-4", "dpo", "learning_rate", 1e-4),  # YAML reads that as text
        ("rollout.n=8", "rollout", "n", 8),
        ("prompts.reuse=true", "prompts", "reuse", True),
        ("base.quantization=none", "base", "quantization", "none"),
        ("anchor.eft_prompts=null", "anchor", "eft_prompts", None),
        ("evaluate.gold=module:function", "evaluate", "gold", "module:function"),
        (" dpo.beta =0.3", "dpo", "beta", 0.3),
    ],
)
def test_overrides(written: Path, override: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(load_recipe(str(written), [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_an_override_leaves_the_rest_of_its_section(written: Path) -> None:
    loaded = load_recipe(
        str(written), ["judge.votes=5", "anchor.lora.rank=2", "anchor.lora.alpha=4", "seed=3"]
    )
    assert Path(loaded.judge.rubric).name == "rubric.yaml"
    assert (loaded.judge.votes, loaded.anchor.lora.rank, loaded.anchor.lora.alpha) == (5, 2, 4)
    assert loaded.anchor.lora.targets[0] == "q_proj"
    assert loaded.seed == 3


def test_the_last_of_two_overrides_counts(written: Path) -> None:
    assert load_recipe(str(written), ["dpo.beta=1", "dpo.beta=2"]).dpo.beta == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["dpo.beta"],
        ["=1"],
        [""],
        ["dpo.beta=[1"],
        ["name=2024-13-01"],
        ["dpo={beta: 1, beta: 2}"],
        ["dpo=1", "dpo.beta=1"],
        ["dpo.bta=1"],
        ["dpo..beta=1"],
        ["dpo=1"],
        ["iterations.x=1"],
        ["dpo.learning_rate=yes"],
        ["judge.votes=true"],
        ["pairing.source=on"],
        ["dpo.epochs=1e308"],
        ["rollout.batch_rows=0"],
        ["dpo.lora.targets=all-linear"],
        ["scpo.thresholds=[0.5, 2]"],
    ],
)
def test_a_wrong_override_is_one_line(told: Told, written: Path, overrides: list[str]) -> None:
    with told.refused():
        load_recipe(str(written), overrides)


def test_what_may_be_true_may_be_so() -> None:
    assert load_recipe("toy", ["pairing.accumulate=yes"]).pairing.accumulate is True
    kwargs = "base.chat_template_kwargs={enable_thinking: no}"
    assert load_recipe("toy", [kwargs]).base.chat_template_kwargs == {"enable_thinking": False}


def test_the_override_is_named_where_the_key_came_from(told: Told, written: Path) -> None:
    with told.refused():
        load_recipe(str(written), ["dpo.bta=1"])


# --- paths ------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_recipe(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    loaded = load_recipe(str(written))
    assert loaded.data.dir == str(written.parent / "data")
    assert loaded.judge.rubric == str(written.parent / "rubric.yaml")


def test_what_is_not_beside_the_recipe_is_looked_for_here(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written.write_text(yaml.safe_dump({**MINIMAL, "data": {"dir": "here"}}))
    monkeypatch.chdir(tmp_path)
    assert load_recipe(str(written)).data.dir == "here"  # in neither place: as it was
    (tmp_path / "here").mkdir()
    # Absolute, so that the run goes on from any other directory.
    assert load_recipe(str(written)).data.dir == str(tmp_path / "here")


def test_paths_of_overrides_are_relative_to_the_working_directory(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(str(written), ["data.dir=data"]).data.dir == str(tmp_path / "data")


def test_names_are_not_taken_for_paths(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "additive-5", "plain"):
        (written.parent / name).mkdir()
    raw = {
        **MINIMAL,
        "base": {"name": "some/base", "chat_template": "plain"},
        "judge": {"rubric": "additive-5"},
        "anchor": {"init": "base"},
    }
    written.write_text(yaml.safe_dump(raw))
    before = load_recipe(str(written)).digest()
    monkeypatch.chdir(written.parent)
    for loaded in (load_recipe(str(written)), load_recipe(str(written), ["anchor.init=base"])):
        assert loaded.anchor.init == "base"
        assert loaded.judge.rubric == "additive-5"
        assert loaded.base.chat_template == "plain"
        assert loaded.digest() == before


def test_a_link_keeps_its_name(written: Path) -> None:
    # As in a Hub cache, where snapshots/model.gguf is a link to blobs/<hash>.
    (written.parent / "blob").write_bytes(b"GGUF")
    (written.parent / "model.gguf").symlink_to(written.parent / "blob")
    loaded = load_recipe(str(written), [f"base.name={written.parent / 'model.gguf'}"])
    assert Path(loaded.base.name).name == "model.gguf"


def test_the_home_directory_is_found(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(str(written), ["data.dir=~/seed"]).data.dir == str(tmp_path / "seed")


def test_a_template_from_windows_reads_like_any_other(told: Told, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert shipped_text(CHAT_TEMPLATES, name=str(path)) == "hello"
    path.write_bytes(b"\xff")
    with told.refused():
        shipped_text(CHAT_TEMPLATES, name=str(path))


@pytest.mark.parametrize("shelf", [RUBRICS, CHAT_TEMPLATES])
def test_a_missing_shipped_file_lists_what_there_is(shelf: Shelf) -> None:
    names = sorted(path.stem for path in (recipes_dir() / shelf.folder).glob(f"*{shelf.suffix}"))
    assert names
    said = f"neither a file nor one of the shipped {shelf.folder} ({', '.join(names)})"
    with pytest.raises(UserError, match=re.escape(f"additive-6: {said}")):
        shipped_file(shelf, name="additive-6")


# --- identity ---------------------------------------------------------------------------------


def test_identity_leaves_out_what_changes_nothing() -> None:
    plain = recipe().digest()
    for changes in (
        {"iterations": 9, "name": "other", "description": "words"},
        {"evaluate": {"gate": {"action": "stop", "length": 0.1}}},
        {"tracking": {"report_to": "tensorboard"}},
        {"compare": {"temperature": 0.3}, "mt_bench": {"max_new_tokens": 9}},
        {"spin": {"answers": 2}},  # of another method
        {"pairing": {"min_pairs": 1}},
        # What is in memory at once: a run that was out of it goes on with less.
        {"rollout": {"batch_rows": 4}, "vllm": {"memory": 0.2}},
        {"anchor": {"micro_batch_size": 1, "gradient_checkpointing": True}},
        {"dpo": {"micro_batch_size": 1, "gradient_checkpointing": True}},
    ):
        assert recipe(**changes).digest() == plain, changes


def test_identity_leaves_out_the_memory_of_a_method_s_own_trainings() -> None:
    less = {"micro_batch_size": 1, "gradient_checkpointing": True}
    for method, changes in (("rlaif", {"sft": less}), ("rlhf", {"reward": less})):
        plain = recipe(method=method, dpo={"init": "previous"})
        changed = recipe(method=method, dpo={"init": "previous"}, **{method: changes})
        assert changed.digest() == plain.digest(), method


def test_identity_leaves_out_how_a_server_is_reached() -> None:
    """A run whose server was too slow goes on with more patience; another model is another run."""
    server = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    patient = {"timeout_s": 900, "retries": 9, "parallel": 1, "key_variable": "MY_KEY"}
    assert recipe(openai={**server, **patient}).digest() == recipe(openai=server).digest()
    assert recipe(openai={**server, "model": "n"}).digest() != recipe(openai=server).digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"dpo": {"beta": 0.2}},
        {"dpo": {"init": "previous"}},
        {"rollout": {"temperature": 0.8}},
        {"base": {"name": "other/base"}},
        {"base": {"name": "some/base", "quantization": "nf4"}},
        {"evaluate": {"gold": "module:function"}},
        {"pairing": {"source": "random"}},
    ],
)
def test_identity_holds_what_decides_the_result(changes: dict[str, Any]) -> None:
    assert recipe(**changes).digest() != recipe().digest()


def test_identity_leaves_out_a_file_that_came_later_by_its_name() -> None:
    """A shipped file that a setting names by default, whatever it holds: earlier runs have none."""
    later = dict(marked(Recipe, Before))
    names = [name for name, _ in marked(Recipe, IsPath) if later.get(name) and later[name].value]
    assert "anchor.disturb_template" in names
    identity = recipe().identity()
    for section, key in (name.split(".") for name in names):
        assert key not in identity.get(section, {}), key


def test_identity_has_older_pairs_as_they_come_to() -> None:
    """What `auto` comes to; that nothing is accumulated is what runs of before say."""
    chain, rebased = {"init": "previous"}, {"init": "anchor"}
    assert "accumulate" not in recipe(dpo=chain).identity()["pairing"]
    assert recipe(dpo=rebased).identity()["pairing"]["accumulate"] is True
    on, off = {"accumulate": True}, {"accumulate": False}
    assert recipe(dpo=rebased, pairing=on).digest() == recipe(dpo=rebased).digest()
    assert recipe(dpo=rebased, pairing=off).digest() != recipe(dpo=rebased).digest()
    assert recipe(dpo=chain, pairing=on).digest() != recipe(dpo=chain).digest()
    shares = {"replay": [0.5]}
    assert recipe(pairing={**shares, **off}).digest() == recipe(pairing=shares).digest()
    rlhf = recipe(method="rlhf", dpo=rebased)
    assert "accumulate" not in rlhf.identity()["pairing"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("pairing.accumulate=true", "pairing.replay=[1.0]"),
        ("dpo.init=previous", "pairing.older_order=drop"),
        ("pairing.accumulate=false", "pairing.older_steps=same"),
        ("pairing.source=random", "pairing.older_order=smooth"),
        ("method=rlhf", "pairing.accumulate=true"),
        ("pairing.source=random", "pairing.weight=gap"),
        ("pairing.older_order=smooth", "dpo.loss=sft"),
        ("dpo.loss=ipo", "dpo.ld_alpha=0.5"),
        ("dpo.loss=sft", "dpo.label_smoothing=0.1"),
        ("dpo.loss=apo_zero", "dpo.target_margin=1"),
        ("method=cream", "dpo.loss=sft"),
        ("method=scir", "dpo.init=previous", "dpo.reference=anchor", "dpo.loss=ipo"),
        ("method=rlhf", "dpo.loss=simpo"),
    ],
)
def test_settings_about_pairs_that_nothing_reads(told: Told, overrides: list[str]) -> None:
    with told.refused():
        load_recipe("tiny", overrides)


def test_identity_counts_a_default_like_the_same_value_written_down() -> None:
    assert recipe(dpo={"beta": 0.1}).digest() == recipe().digest()


def test_identity_follows_the_data_and_not_its_place(written: Path, tmp_path: Path) -> None:
    before = load_recipe(str(written)).digest()
    moved = written.parent.rename(tmp_path / "moved") / "recipe.yaml"
    assert load_recipe(str(moved)).digest() == before
    (moved.parent / "data" / ".DS_Store").write_text("no data")
    assert load_recipe(str(moved)).digest() == before

    ift = moved.parent / "data" / "ift.jsonl"
    ift.write_text("{} \n")
    edited = load_recipe(str(moved)).digest()
    assert edited != before
    ift.rename(ift.with_name("eft_train.jsonl"))
    assert load_recipe(str(moved)).digest() not in (before, edited)


@pytest.mark.parametrize(
    ("name", "known_by"),
    [("smollm2-135m-demo", "4369d240"), ("toy", "2df87c45"), ("toy-arithmetic", "2de18ed0")],
)
def test_shipped_data_are_what_earlier_runs_are_known_by(name: str, known_by: str) -> None:
    """A file more in such a folder, and each run of an earlier version would be refused."""
    identity = load_recipe(name).identity()
    assert identity["data"]["dir"].startswith(f"sha256:{known_by}")


def test_identity_follows_the_rubrics_text(written: Path) -> None:
    before = load_recipe(str(written)).digest()
    with (written.parent / "rubric.yaml").open("a") as file:
        file.write("max: 10\n")
    assert load_recipe(str(written)).digest() != before


def test_identity_survives_the_way_through_json(written: Path) -> None:
    loaded = load_recipe(str(written))
    there_and_back = recipe_from(
        json.loads(json.dumps(loaded.model_dump(mode="json"))), where="run.json"
    )
    assert there_and_back == loaded
    assert json.loads(json.dumps(loaded.identity())) == there_and_back.identity()


def test_the_digest_is_the_same_in_another_process(written: Path) -> None:
    code = (
        f"from srlm_lite.recipe import load_recipe; print(load_recipe({str(written)!r}).digest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert other.stdout.strip() == load_recipe(str(written)).digest()


def test_a_long_value_is_shown_in_part(told: Told, written: Path) -> None:
    with told.refused():
        load_recipe(str(written), ["rollout.n=" + "x" * 10_000])


def test_the_home_of_nobody_is_a_path_like_any_other(written: Path) -> None:
    assert load_recipe(str(written), ["data.dir=~nobody-here/x"]).data.dir == "~nobody-here/x"


def test_what_was_read_is_the_reader_s_own() -> None:
    """A text is parsed once; who changes what it says changes nothing for the next reader."""
    parse_yaml("a: {b: [1]}")["a"]["b"].append(2)
    assert parse_yaml("a: {b: [1]}") == {"a": {"b": [1]}}


def test_a_mark_at_the_start_of_a_file_from_windows_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8-sig")
    assert load_recipe(str(path)).name == MINIMAL["name"]
