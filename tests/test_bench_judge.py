"""`srlm-lite bench judge`: ties, pairs and accuracy of one run by both kinds of score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import Cli

from srlm_lite.bench.judge import bench_judge
from srlm_lite.errors import UserError
from srlm_lite.recipe import recipe_from
from srlm_lite.records import Candidate, Judgement, Prompt
from srlm_lite.run.files import write_records
from srlm_lite.run.run import RunDir


def gold(prompt: str, response: str) -> float:
    """How many letters."""
    return float(len(response))


VOTES = {
    # sampled, expected
    "p#0": [(4.0, 4.2), (4.0, 4.1)],
    "p#1": [(4.0, 3.9), (4.0, 4.0)],
    "p#2": [(1.0, 1.5), (1.0, 1.0)],
    "q#0": [(3.0, 3.2), (3.0, 3.1)],
    "q#1": [(3.0, 2.9), (3.0, 3.3)],
    "q#2": [(None, None), (5.0, 4.9)],
}
TEXTS = {"p#0": "aaa", "p#1": "aa", "p#2": "a", "q#0": "aaa", "q#1": "aa", "q#2": "a"}


def make_run(path: Path) -> RunDir:
    run = RunDir(path)
    recipe = {
        "name": "by-hand",
        "base": {"name": "some/base"},
        "data": {"dir": "nowhere"},
        "judge": {"score": "expected", "votes": 2, "min_votes": 2},
        "evaluate": {"gold": f"{__name__}:gold"},
    }
    run.open(recipe_from(recipe, where="test"), {"versions": {}})
    place = run.iteration(1)
    write_records(place.prompts, [Prompt("p", "P?"), Prompt("q", "Q?")])
    write_records(
        place.candidates,
        [Candidate(name[0], name, text, len(text), "stop") for name, text in TEXTS.items()],
    )
    write_records(
        place.judgements,
        [
            Judgement(name, vote, "", expected, sampled_score=sampled)
            for name, votes in VOTES.items()
            for vote, (sampled, expected) in enumerate(votes)
        ],
    )
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "out")


def test_what_expected_scores_change(run: RunDir) -> None:
    """Mean scores, sampled: p 4, 4, 1 and q 3, 3; expected: p 4.15, 3.95, 1.25 and q 3.15, 3.1.

    q#2 has one readable vote and needs two. So there are 3 + 1 pairs of candidates; sampled, two
    of them tie. Gold orders by number: p right but for the tie, 2.5 of 3; in q, with one vote
    enough for this figure, q#2 has 5 and 4.9 and loses both its pairs, the tie is half.
    """
    found = bench_judge(run.path)
    assert (found["iteration"], found["votes"], found["unreadable"]) == (1, 12, 1)
    assert found["sampled"] == {
        "tie_rate": 0.5,
        "candidate_pairs": 4,
        "pairs": 1,
        "tied": 1,
        "gold_pairwise_accuracy": 0.5,  # (2.5 + 0.5) / 6
    }
    assert found["expected"] == {
        "tie_rate": 0.0,
        "candidate_pairs": 4,
        "pairs": 2,
        "tied": 0,
        "gold_pairwise_accuracy": 0.6667,  # (3 + 1) / 6
    }


def test_the_command(run: RunDir, cli: Cli) -> None:
    def command(*arguments: str) -> str:
        done = cli("bench", "judge", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(command("--adapters", str(run.path), "--json"))
    assert found["bench"] == "judge" and found["expected"]["pairs"] == 2
    table = command("--adapters", str(run.path), "--iteration", "1")
    assert "by-hand, iteration 1: 12 votes, 1 unreadable; 4 pairs" in table
    assert [line.split() for line in table.splitlines() if line.strip().startswith("sampled")] == [
        ["sampled", "0.500", "1", "1", "0.500"]
    ]


def test_a_run_without_expected_scores(run: RunDir) -> None:
    place = run.iteration(1)
    rows = [Judgement(name, 0, "", 4.0) for name in VOTES]
    place.judgements.unlink()
    write_records(place.judgements, [*rows, replace(rows[0], vote=1, score=None)])
    with pytest.raises(UserError, match=r"carry no expected scores.*judge\.score=expected"):
        bench_judge(run.path)


def test_an_iteration_that_is_not_there(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no judgements of iteration 3\. It has those of 1"):
        bench_judge(run.path, 3)
    run.iteration(1).judgements.unlink()
    with pytest.raises(UserError, match="has no judgements yet"):
        bench_judge(run.path)
    with pytest.raises(UserError, match="holds no run"):
        bench_judge(tmp_path / "nowhere")
