"""`srlm-lite bench judge --pairs` and `--disturbed`: a real judge on pairs that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Cli
from messages import Told
from toy_run import make_toy_run

from srlm_lite.bench.judge_pairs import Way, pairs_of, prompt_figures, reply_id
from srlm_lite.data.preferences import JudgeTest
from srlm_lite.records import Candidate
from srlm_lite.run.files import write_records
from srlm_lite.run.layout import StageDir
from srlm_lite.run.run import RunDir
from srlm_lite.stages.seed_data import policy_prompts

PROMPT = "show me facts about the {}"
GOOD = (
    "sure, happy to help.\n1. {} has history\n2. it has friends\n3. it needs care\n"
    "enjoy your facts!"
)
BAD = "not again.\n1. it has history\n2. it has history"

TESTS = [
    JudgeTest("p", "P?", ("right", "no", "wrong", "nay"), ((0, 1), (0, 2), (0, 3)), "best"),
    JudgeTest("q", "Q?", ("a", "bb", "c"), ((0, 2), (1, 2)), "ties", subset="Ties"),
]


def test_scores_become_pairs_and_shares_of_prompts() -> None:
    """p: 3 against 3, 4 and an unreadable one: a tie, a wrong verdict, and none; not on top.
    q: 2 and 1 against 0: both right replies above the wrong one."""
    scores = dict(zip([reply_id(TESTS[0], n) for n in range(4)], [3, 3, 4, None], strict=True))
    scores |= dict(zip([reply_id(TESTS[1], n) for n in range(3)], [2, 1, 0], strict=True))
    way = Way(scores, consistent={("p#0", "p#1"): False})
    pairs = pairs_of(TESTS, way)
    assert [pair.credit for pair in pairs] == [0.5, 0.0, None, 1.0, 1.0]
    assert [pair.longer for pair in pairs] == [3, 0, 2, 0, 1]
    assert [pair.consistent for pair in pairs] == [False, None, None, None, None]
    found = prompt_figures(TESTS, way)
    assert found["best"]["share"] == 0 and found["all_above"]["subsets"] == {"Ties": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A toy run whose models have answered held-out prompts."""
    made = make_toy_run(tmp_path_factory.mktemp("runs") / "toy", models=2)
    prompts = policy_prompts(made.recipe())
    places: list[StageDir] = [made.anchor, made.iteration(1)]
    for number, place in enumerate(places):
        texts = [(GOOD if at % (number + 2) else BAD).format("oak") for at in range(len(prompts))]
        write_records(
            place.evaluation_dir / "answers_sampled.jsonl",
            [
                Candidate(one.prompt_id, f"{one.prompt_id}#0", text, 20, "stop")
                for one, text in zip(prompts, texts, strict=True)
            ],
        )
        place.finish(iteration=number, seconds=0.0, counts={})
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RewardBench 2's layout in the toy's language: one good reply, three bad ones."""
    path = tmp_path_factory.mktemp("pairs") / "toy.jsonl"
    rows = [
        {
            "id": topic,
            "prompt": PROMPT.format(topic),
            "chosen": [GOOD.format(topic)],
            "rejected": [BAD, f"{BAD}\n3. it has history", f"{BAD}\nthat is all."],
            "num_correct": 1,
            "subset": "plants" if topic in ("oak", "rose") else "things",
        }
        for topic in ("oak", "rose", "boat", "clock")
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def figures(cli: Cli, *arguments: str | Path) -> dict[str, Any]:
    done = cli("bench", "judge", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.model
def test_a_run_s_judge_on_a_preference_file(cli: Cli, run: RunDir, pairs: Path) -> None:
    """The toy base was pretrained to review: it tells such replies apart."""
    found = figures(cli, "--adapters", run.path, "--pairs", pairs)
    assert (found["bench"], found["judge"], found["replies"]) == ("judge", "iteration 1", 16)
    assert found["source"]["format"] == "RewardBench 2" and found["source"]["tests"] == 4
    ways = [
        f"grade, {kind}{count}" for kind in ("", "expected, ") for count in ("1 vote", "2 votes")
    ]
    assert list(found["forms"])[:5] == [*ways, "grade, no rationale"]
    form = found["forms"]["grade, expected, 2 votes"]
    assert form["accuracy"] > 0.8 and form["pairs"] == 12 and form["prompts"] == 4
    assert form["best"]["share"] > 0.7 and set(form["subsets"]) == {"plants", "things"}
    assert form["cost"]["seconds"] > 0 and form["cost"]["read"] > 20 < form["cost"]["written"]
    assert form["to_first"]["interval"] is not None
    # To the toy's tokenizer both verdicts of the shipped question are words that it does not know.
    assert "go on with the same token" in found["not_asked"]["pairwise"]
    cheap = found["forms"]["grade, no rationale"]["cost"]
    assert cheap["written"] == 0 and cheap["read"] > 20
    assert form["position_consistency"] is None  # it sees one reply at a time
    own = found["self_preference"]
    assert own["reference"] == "srlm_lite.tasks.toy:gold" and own["answers_of_others"] == "anchor"
    assert own["answers"] == own["others"] == 12
    assert 0 <= own["noise"] <= 1 and own["intervals"]["noise"] is not None

    table = cli("bench", "judge", "--adapters", run.path, "--pairs", pairs, "--prompts", "2")
    assert table.returncode == 0, table.stderr
    assert "2 of 4 prompts; 6 pairs, 8 replies" in table.stdout
    assert "the best reply on top: grade, 1 vote" in table.stdout
    assert "its model's own 12 answers" in table.stdout


@pytest.mark.model
def test_the_anchor_asked_in_another_way(cli: Cli, run: RunDir, pairs: Path) -> None:
    options = ("--adapters", run.path, "--iteration", "0", "--set", "judge.votes=1")
    found = figures(cli, *options, "--set", "judge.min_votes=1", "--pairs", pairs)
    assert found["judge"] == "anchor"
    assert {"grade, 1 vote", "grade, expected, 1 vote"} <= set(found["forms"])
    assert found["self_preference"]["answers_of_others"] == "iteration 1"


@pytest.mark.model
def test_some_forms_alone(cli: Cli, run: RunDir, pairs: Path, told: Told) -> None:
    """In their order, whatever the order they are named in; not one that nobody named."""
    options = ("--adapters", run.path, "--pairs", pairs, "--prompts", "2")
    found = figures(
        cli, *options, "--forms", "steps,checklist", "--set", "steps.options=['yes', 'no']"
    )
    assert list(found["forms"]) == ["checklist", "steps"] and not found["not_asked"]
    assert found["forms"]["checklist"]["to_first"] is None
    assert found["forms"]["steps"]["to_first"] is not None
    # No way is left where the only one cannot be asked for.
    done = cli("bench", "judge", *options, "--forms", "pairwise")
    assert done.returncode == 2, done.stdout
    told(done.stderr.strip().splitlines()[-1])


@pytest.mark.model
def test_pairs_with_a_known_loser(cli: Cli, run: RunDir) -> None:
    """The toy base has not been taught the question: it writes some answer, and that is asked."""
    options = ("--adapters", run.path, "--set", "anchor.disturb_template=toy-disturb")
    found = figures(cli, *options, "--disturbed", "6")
    source = found["source"]
    assert source["disturbed"] == 6 == source["tests"] + sum(source["dropped"].values())
    assert 0 <= source["gold_agreement"] <= 1
    assert {"prompt", "disturbed", "winner", "loser"} == set(source["examples"][0])
    assert found["forms"]["grade, 1 vote"]["pairs"] == source["tests"] > 0


def test_what_does_not_go_together(cli: Cli, run: RunDir, pairs: Path, told: Told) -> None:
    for options in (
        ("--pairs", pairs),
        ("--adapters", run.path, "--recipe", "toy", "--pairs", pairs),
        ("--adapters", run.path, "--pairs", pairs, "--disturbed", "3"),
        ("--adapters", run.path, "--prompts", "3"),
        ("--adapters", run.path, "--forms", "grade"),
        ("--adapters", run.path, "--pairs", pairs, "--forms", "grade,pairwize"),
        ("--adapters", run.path, "--pairs", pairs, "--forms", "grade,"),
        ("--recipe", "toy", "--pairs", pairs),
        ("--adapters", run.path, "--pairs", pairs, "--iteration", "7"),
        ("--adapters", run.path, "--pairs", pairs, "--set", "base.window=5"),
        (),
    ):
        done = cli("bench", "judge", *options)
        assert done.returncode == 2, done.stdout
        told(done.stderr.strip())
