"""`srlm-lite evaluate` on the toy base: other data, other settings, and where results go."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from srlm_lite.cli.main import app
from srlm_lite.errors import UserError
from srlm_lite.recipe import load_recipe
from srlm_lite.run.run import RunDir
from srlm_lite.shipped import recipes_dir

Evaluate = Callable[..., Result]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has nothing but its recipe: enough to measure its base."""
    run = RunDir(tmp_path_factory.mktemp("evaluate") / "out")
    run.open(load_recipe("toy", ["evaluate.eft_prompts=3", "evaluate.policy_prompts=4"]), {})
    return run.path


@pytest.fixture
def evaluate(out: Path) -> Evaluate:
    def command(*args: str) -> Result:
        return CliRunner().invoke(
            app, ["evaluate", "--adapters", str(out), "--iteration", "base", *args]
        )

    return command


def ifeval_file(folder: Path) -> Path:
    path = folder / "input_data.jsonl"
    row = {
        "key": 7,
        "prompt": "give me facts about the whale",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    }
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def test_the_base_with_intervals(evaluate: Evaluate, out: Path) -> None:
    done = evaluate()
    assert done.exit_code == 0, done.output
    result = json.loads((out / "base" / "eval.json").read_text(encoding="utf-8"))
    low, high = result["judge"]["intervals"]["pairwise_accuracy"]
    assert low <= result["judge"]["pairwise_accuracy"] <= high
    assert len(result["policy"]["intervals"]["gold_mean"]) == 2
    assert result["judge"]["calibration"]["replies"] == 12  # four to a prompt
    shown = rf"^ pairwise accuracy +[.0-9]+ +{low:.2f} to {high:.2f}"
    assert re.search(shown, done.stdout, re.MULTILINE)
    assert "scores by people's quality" in done.stdout
    assert re.search(r"^Pearson [-.0-9]+, Spearman [-.0-9]+, mean difference", done.stdout, re.M)


def test_ifeval_on_an_existing_run(evaluate: Evaluate, out: Path, tmp_path: Path) -> None:
    path = ifeval_file(tmp_path)
    before = set((out / "base").glob("eval_on/*"))
    done = evaluate("--set", f"evaluate.ifeval={path}", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)["ifeval"]
    assert (result["prompts"], result["instructions"]) == (1, 2)
    assert result["max_new_tokens"] > 200  # the toy's window is 256, and its prompt short
    [place] = set((out / "base").glob("eval_on/set-*")) - before
    [answer] = (place / "eval" / "answers_ifeval.jsonl").read_text(encoding="utf-8").splitlines()
    text = json.loads(answer)["text"]
    assert result["instruction_strict"] == (("," not in text) + ("<<" in text)) / 2
    # Measured once: the second time no answer is sampled.
    (place / "eval" / "answers_ifeval.jsonl").unlink()
    assert evaluate("--set", f"evaluate.ifeval={path}", "--json").stdout == done.stdout


def test_an_answer_that_cannot_fit_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    path = ifeval_file(tmp_path)
    done = evaluate(
        *("--set", f"evaluate.ifeval={path}", "--set", "evaluate.ifeval_max_new_tokens=256")
    )
    assert isinstance(done.exception, UserError)
    assert "do not fit the window of 256" in str(done.exception)


def test_data_of_the_same_name_is_told_apart_by_content(
    evaluate: Evaluate, out: Path, tmp_path: Path
) -> None:
    rows = (recipes_dir() / "toy/data/eft_eval.jsonl").read_text(encoding="utf-8").splitlines()
    places = []
    for start in (0, 40):
        folder = tmp_path / str(start) / "data"
        folder.mkdir(parents=True)
        (folder / "eft_eval.jsonl").write_text("\n".join(rows[start : start + 12]), "utf-8")
        done = evaluate("--data", str(folder), "--set", "evaluate.policy_prompts=1")
        assert done.exit_code == 0, done.output
        places.append({place.name for place in (out / "base" / "eval_on").glob("data-*")})
    assert [len(found) for found in places] == [1, 2]


def test_a_capability_panel_on_an_existing_run(
    evaluate: Evaluate, out: Path, tmp_path: Path
) -> None:
    data = tmp_path / "whales.jsonl"
    row = {"question": "give me facts about the whale", "choices": ["facts", "moon"], "answer": 0}
    data.write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    (tmp_path / "whales.yaml").write_text(
        "task: whales\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "doc_to_choice: '{{choices}}'\n",
        encoding="utf-8",
    )
    done = evaluate("--set", "evaluate.tasks=[whales]", "--set", f"evaluate.tasks_dir={tmp_path}")
    assert done.exit_code == 0, done.output
    # Three times the same item: all right or all wrong.
    assert re.search(r"^ whales +acc\w* +(0|1)\.00", done.stdout, re.MULTILINE), done.stdout


def test_another_form_of_judging_leaves_the_run_s_files_alone(
    evaluate: Evaluate, out: Path
) -> None:
    """The settings of a form say how to measure; lists written for it are no part of the run."""
    settings = [
        "judge.form=checklist",
        "checklist.standing=[the ending is good.]",
        "checklist.max_new_tokens=8",
    ]
    done = evaluate(*(word for one in settings for word in ("--set", one)), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["judge"]["items"] >= 1
    (lists,) = (out / "base" / "eval_on").glob("*/eval/checklists.jsonl")
    items = [json.loads(line)["items"][-1]["item"] for line in lists.read_text().splitlines()]
    assert (
        items == ["the ending is good."] * 7
    )  # of three ranked replies' prompts, and four held-out ones
    assert not (out / "checklists.jsonl").exists()


def test_settings_that_make_another_model_are_refused(evaluate: Evaluate) -> None:
    done = evaluate("--set", "dpo.beta=0.2")
    assert isinstance(done.exception, UserError)
    assert "would make it another model" in str(done.exception)
