"""The seed data of a recipe: what mixes up ids or teaches nothing is refused in advance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from messages import Told

from srlm_lite.conversation import transcript
from srlm_lite.errors import UserError
from srlm_lite.preflight.inputs import check_inputs
from srlm_lite.recipe import load_recipe
from srlm_lite.stages.seed_data import (
    nearly_held_out,
    read_human_answers,
    read_prompts,
    refuse_held_out_among_training,
    unmeasured,
)

Rows = list[dict[str, Any]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The toy world's data, to be damaged."""
    return shutil.copytree(load_recipe("tiny").data.dir, tmp_path / "data")


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def refusal(data: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_inputs(load_recipe("tiny", [f"data.dir={data}", *overrides]))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "way_out"), [("ift", "anchor.use_ift"), ("eft_train", "anchor.use_eft")]
)
def test_a_file_without_a_row(told: Told, data: Path, name: str, way_out: str) -> None:
    (data / f"{name}.jsonl").write_text("\n\n")
    told(refusal(data))
    check_inputs(load_recipe("tiny", [f"data.dir={data}", f"{way_out}=false"]))


@pytest.mark.parametrize("key", ["prompt", "response"])
def test_an_instruction_that_teaches_to_say_nothing(told: Told, data: Path, key: str) -> None:
    path = data / "ift.jsonl"
    rows = rows_of(path)
    rows[3][key] = " \n"
    write(path, rows)
    told(refusal(data))


@pytest.mark.parametrize("name", ["eft_train", "eft_eval"])
def test_one_id_of_two_prompts(told: Told, data: Path, name: str) -> None:
    """Their replies would be ranked against one another."""
    path = data / f"{name}.jsonl"
    rows = rows_of(path)
    rows[1] = {**rows[1], "prompt_id": rows[0]["prompt_id"], "prompt": "another"}
    write(path, rows)
    told(refusal(data))


@pytest.mark.parametrize("quality", [float("nan"), float("inf")])
def test_a_quality_that_is_no_number(told: Told, data: Path, quality: float) -> None:
    path = data / "eft_train.jsonl"
    rows = rows_of(path)
    rows[2]["quality"] = quality
    write(path, rows)
    told(refusal(data))


def test_two_human_answers_of_one_id(told: Told, data: Path) -> None:
    """SPIN would hold a prompt's answers against another prompt's."""
    path = data / "ift.jsonl"
    rows = rows_of(path)
    rows[1]["prompt_id"] = rows[0]["prompt_id"]
    write(path, rows)
    recipe = load_recipe("toy-spin", [f"data.dir={data}", "data.ranked=null"])
    with told.refused():
        read_human_answers(recipe)


def test_too_few_prompts_for_the_last_iteration(told: Told, data: Path) -> None:
    """tiny takes 12 an iteration; the run would find out after the anchor and an iteration."""
    path = data / "prompts.jsonl"
    write(path, rows_of(path)[:23])
    told(refusal(data))
    check_inputs(load_recipe("tiny", [f"data.dir={data}", "prompts.reuse=true"]))
    check_inputs(load_recipe("tiny", [f"data.dir={data}", "iterations=1"]))
    told(refusal(data, "prompts.per_iteration=8", "iterations=3"))


def test_prompts_of_the_methods_that_learn_from_human_replies(told: Told, tmp_path: Path) -> None:
    for method in ("dpo", "spin"):
        many = ["prompts.per_iteration=9999", "prompts.reuse=false", "iterations=3"]
        with told.refused():
            check_inputs(load_recipe(f"toy-{method}", many))
    with told.refused():
        check_inputs(load_recipe("toy-rlhf", [f"prompts.file={tmp_path}/absent.jsonl"]))


def test_a_prompt_without_an_id_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    write(path, [{"text": "a", "prompt_id": None}, {"text": "b"}, {"text": "c", "prompt_id": 0}])
    assert [row.prompt_id for row in read_prompts(path)] == ["list-1", "list-2", "0"]


def test_what_there_is_nothing_to_measure_on_is_said(data: Path) -> None:
    def lines(*overrides: str) -> list[str]:
        return list(unmeasured(load_recipe("tiny", [f"data.dir={data}", *overrides])))

    graded, held_out = data / "eft_eval.jsonl", data / "eval_prompts.jsonl"
    judge = f"{graded} is empty: the judge's accuracy is not measured"
    policy = "is empty: the policy's held-out answers are not measured"
    assert lines() == []
    graded.write_text("")
    assert lines() == [judge]
    held_out.write_text("\n")
    assert lines() == [judge, f"{held_out} {policy}"]
    assert lines("evaluate.policy_prompts=0") == [judge]
    held_out.unlink()
    assert lines() == [judge, f"{graded} {policy}"]


def test_a_gap_that_no_two_scores_can_have(data: Path) -> None:
    assert refusal(data, "pairing.min_gap=5") == (
        "pairing.min_gap: no two scores of the rubric toy differ by more than 5: it goes from 0 "
        "to 5. Lower it"
    )
    check_inputs(load_recipe("tiny", [f"data.dir={data}", "pairing.min_gap=4.9"]))
    # Likelihood ratios and ranks are on no rubric's scale.
    gap = "pairing.min_gap=5"
    check_inputs(load_recipe("tiny", [f"data.dir={data}", gap, "method=cream"]))
    check_inputs(load_recipe("tiny", [f"data.dir={data}", gap, "method=dpo"]))


@pytest.mark.parametrize("name", ["ift", "eft_train", "prompts"])
@pytest.mark.parametrize("held_out", ["eval_prompts", "eft_eval"])
def test_a_held_out_prompt_that_is_learned_from(
    told: Told, data: Path, name: str, held_out: str
) -> None:
    recipe = load_recipe("tiny", [f"data.dir={data}"])
    refuse_held_out_among_training(recipe)
    assert list(nearly_held_out(recipe)) == []
    [first, *rest] = rows_of(data / f"{name}.jsonl")
    key = "text" if name == "prompts" else "prompt"
    held_key = "text" if held_out == "eval_prompts" else "prompt"
    text = rows_of(data / f"{held_out}.jsonl")[0][held_key]
    write(data / f"{name}.jsonl", [{**first, "prompt_id": "mine", key: text}, *rest])
    with told.refused() as caught:
        refuse_held_out_among_training(recipe)
    assert caught.value.where == f"{data}/{held_out}.jsonl"
    # The same words otherwise: told, and no mistake.
    again = f"  {text.upper()} !?"
    write(data / f"{name}.jsonl", [{**first, "prompt_id": "mine", key: again}, *rest])
    refuse_held_out_among_training(recipe)
    [warning] = nearly_held_out(recipe)
    told(warning)


def test_ranked_replies_are_learned_from(told: Told, data: Path) -> None:
    text = rows_of(data / "eval_prompts.jsonl")[0]["text"]
    row = {"prompt_id": "p", "prompt": text, "response_id": "r", "response": "a", "rank": 0}
    write(data / "mine.jsonl", [row])
    with told.refused():
        refuse_held_out_among_training(
            load_recipe("tiny", [f"data.dir={data}", f"data.ranked={data}/mine.jsonl"])
        )


TURNS = [
    {"role": "user", "content": "name a fruit"},
    {"role": "assistant", "content": "a rose"},
    {"role": "user", "content": "a fruit, please"},
]
NOT_TURNS = {"a": [*TURNS[:2]], "b": [TURNS[0], TURNS[2]], "c": [{"role": "user"}]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "a") for n in ("ift", "eft_train", "eft_eval", "prompts", "eval_prompts")]
    + [("prompts", "b"), ("prompts", "c")],
)
def test_messages_that_cannot_be_answered(told: Told, data: Path, name: str, kind: str) -> None:
    path = data / f"{name}.jsonl"
    rows = rows_of(path)
    row = {key: value for key, value in rows[2].items() if key not in ("text", "prompt")}
    rows[2] = {**row, "prompt_id": "mine", "messages": NOT_TURNS[kind]}
    write(path, rows)
    told(refusal(data))


@pytest.mark.parametrize("name", ["ift", "prompts"])
def test_a_text_that_its_messages_do_not_say(told: Told, data: Path, name: str) -> None:
    path = data / f"{name}.jsonl"
    rows = rows_of(path)
    rows[2]["messages"] = TURNS
    write(path, rows)
    told(refusal(data))


def test_a_conversation_may_stand_in_each_file_without_its_text(data: Path) -> None:
    for name in ("ift", "eft_train", "eft_eval", "prompts", "eval_prompts"):
        rows = [
            {key: value for key, value in row.items() if key not in ("text", "prompt")}
            for row in rows_of(data / f"{name}.jsonl")[:1]
        ]
        messages = [*TURNS, {"role": "assistant", "content": "oak"}, user(f"no, for {name}")]
        extra = [{**rows[0], "prompt_id": "mine", "response_id": "mine", "messages": messages}]
        write(data / f"{name}.jsonl", [*rows_of(data / f"{name}.jsonl"), *extra])
    recipe = load_recipe("tiny", [f"data.dir={data}"])
    check_inputs(recipe)
    refuse_held_out_among_training(recipe)
    [last] = read_prompts(data / "prompts.jsonl")[-1:]
    assert last.messages and last.text == transcript(last.messages)
    assert last.text.endswith("The user: no, for prompts\n</conversation>")
    [best] = read_human_answers(load_recipe("toy-spin", [f"data.dir={data}", "data.ranked=null"]))[
        0
    ][-1:]
    assert best.messages and best.messages[-1]["content"] == "no, for ift"


def test_one_id_of_two_conversations(told: Told, data: Path) -> None:
    path = data / "eft_train.jsonl"
    rows = rows_of(path)
    for row, last in zip(rows, ("one", "two"), strict=False):
        del row["prompt"]
        row.update(prompt_id="mine", messages=[*TURNS[:2], user(last)])
    write(path, rows)
    told(refusal(data))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
