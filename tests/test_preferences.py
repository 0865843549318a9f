"""Preference files as tests of a judge: each published layout by a small row of it, and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import Told

from srlm_lite.data.preferences import FORMATS, JudgeTest, JudgeTests, read_judge_tests

BEST_OF_4 = {
    "id": "12",
    "prompt": "Name a prime above 10.",
    "chosen": ["11"],
    "rejected": ["12", "14", "15"],
    "num_correct": 1,
    "num_incorrect": 3,
    "total_completions": 4,
    "models": ["a", "b", "c", "d"],
    "subset": "Math",
}
TIES = {
    "id": "tied:3",
    "prompt": "Name a colour of the rainbow.",
    "chosen": ["red", "blue"],
    "rejected": ["brown", "pink", "grey"],
    "num_correct": 2,
    "num_incorrect": 3,
    "total_completions": 5,
    "models": [],
    "subset": "Ties",
}
STYLED = {
    "id": "safety_1",
    "prompt": "What is 2 + 2?",
    "chosen": ["4", "It is 4, as 2 + 2 is.", "**4**"],
    "rejected": ["5", "It is 5, as 2 + 2 is.", "**5**"],
    "domain": "safety-response",
}
OBJECTIVE = {
    "pair_id": "81ec",
    "original_id": "10646",
    "source": "mmlu-pro-physics",
    "question": "Which is heavier?",
    "response_model": "some-model",
    "response_A": "The feather.",
    "response_B": "The stone.",
    "label": "B>A",
}
VOTED = {
    "question_id": "q7",
    "model_a": "x",
    "model_b": "y",
    "winner": "model_b",
    "prompt": "Say hello.",
    "response_1": "No.",
    "response_2": "Hello!",
    "language": "English",
}
CHECKED = {
    "question_id": "c1",
    "prompt": "Reply in capitals.",
    "response_1": "hello",
    "response_2": "HELLO",
    "response_3": "HELLO THERE",
    "response_4": "never asked about",
    "scores": [False, True, True, False],
    "sampled_conflict_pairs": [[0, 1], [2, 0]],
}


def read(path: Path, *rows: dict[str, Any]) -> JudgeTests:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_judge_tests(path)


def one(found: JudgeTests, format: str) -> JudgeTest:
    [test] = found.tests
    assert found.format == format and not found.dropped
    return test


def test_best_of_four(tmp_path: Path) -> None:
    test = one(read(tmp_path / "rb2.jsonl", BEST_OF_4), "RewardBench 2")
    assert (test.name, test.prompt, test.subset) == ("12", "Name a prime above 10.", "Math")
    assert test.replies == ("11", "12", "14", "15")
    assert (test.kind, test.pairs) == ("best", ((0, 1), (0, 2), (0, 3)))


def test_several_right_answers(tmp_path: Path) -> None:
    test = read(tmp_path / "rb2.jsonl", BEST_OF_4, TIES).tests[1]
    assert test.kind == "ties" and test.pairs == tuple((a, b) for a in (0, 1) for b in (2, 3, 4))


def test_the_same_rows_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rb2.parquet"
    pq.write_table(pa.Table.from_pylist([BEST_OF_4, TIES]), path)
    assert read_judge_tests(path) == read(tmp_path / "rb2.jsonl", BEST_OF_4, TIES)


def test_styles(tmp_path: Path) -> None:
    test = one(read(tmp_path / "rm.jsonl", STYLED), "RM-Bench")
    assert (test.kind, test.styles, test.subset) == ("styles", (0, 1, 2, 0, 1, 2), "safety")
    assert test.pairs == tuple((a, b) for a in (0, 1, 2) for b in (3, 4, 5))


def test_objective_labels(tmp_path: Path) -> None:
    test = one(read(tmp_path / "jb.jsonl", OBJECTIVE), "JudgeBench")
    assert (test.pairs, test.subset, test.name) == (((1, 0),), "knowledge", "81ec")
    tied = OBJECTIVE | {"label": "A=B"}
    assert read(tmp_path / "more.jsonl", OBJECTIVE, tied).dropped == {"tied": 1}


def test_votes(tmp_path: Path) -> None:
    test = one(read(tmp_path / "ppe.jsonl", VOTED), "PPE, human preference")
    assert (test.replies, test.pairs) == (("No.", "Hello!"), ((1, 0),))
    tied = VOTED | {"winner": "tie (bothbad)"}
    assert read(tmp_path / "more.jsonl", VOTED, tied).dropped == {"tied": 1}


def test_drawn_pairs_alone(tmp_path: Path) -> None:
    """Pairs 0-1 and 2-0; response_4 is in none, so no judge is asked about it."""
    test = one(read(tmp_path / "ppe.jsonl", CHECKED), "PPE, correctness")
    assert test.replies == ("hello", "HELLO", "HELLO THERE")
    assert test.pairs == ((1, 0), (2, 0))


def test_each_layout_is_told_from_every_other(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [BEST_OF_4, STYLED, OBJECTIVE, VOTED, CHECKED]
    found = [read(tmp_path / f"{number}.jsonl", row).format for number, row in enumerate(rows)]
    assert found == [one.name for one in FORMATS]


def test_other_files_by_their_shape(tmp_path: Path) -> None:
    """Replies in rows of their own: all that differ in place are compared, level ones are not."""
    scored = [
        {"prompt": "P?", "response": text, "quality": score, "domain": domain}
        for text, score, domain in [("a", 0.1, "x"), ("b", 0.9, "x"), ("c", 0.9, "x")]
    ]
    scored += [{"prompt": "Q?", "response": text, "quality": 0.5, "domain": "y"} for text in "de"]
    found = read(tmp_path / "scored.jsonl", *scored)
    [test] = found.tests
    assert (found.format, found.dropped) == ("graded", {"tied": 1})
    assert (test.replies, test.pairs, test.subset) == (("a", "b", "c"), ((1, 0), (2, 0)), "x")


def test_a_pair_of_a_chosen_and_a_rejected_reply(tmp_path: Path) -> None:
    rows = [{"prompt": "P?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(2)]
    found = read(tmp_path / "pairs.jsonl", *rows, {**rows[0], "rejected": " "})
    assert found.format == "pairs" and found.dropped == {"empty": 1}
    assert [test.pairs for test in found.tests] == [((0, 1),)] * 2
    assert found.tests[1].replies == ("good 1", "bad 1")


def test_the_same_row_twice_counts_twice(tmp_path: Path) -> None:
    rows = [{"prompt": "P?", "chosen": "good", "rejected": "bad"}] * 3
    names = [test.name for test in read(tmp_path / "pairs.jsonl", *rows).tests]
    assert len(set(names)) == 3


def test_some_of_many_are_spread_over_the_file(tmp_path: Path) -> None:
    rows = [BEST_OF_4 | {"id": str(n), "prompt": f"{n}?"} for n in range(10)]
    found = read(tmp_path / "rb2.jsonl", *rows)
    assert [test.name for test in found.at_most(4)] == ["0", "2", "5", "7"]
    assert found.at_most(None) == found.at_most(10) == found.at_most(11) == found.tests


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "P?", "response": "only one"}],
        [{"prompt": "P?", "chosen": "same", "rejected": "same"}],
    ],
)
def test_nothing_to_compare(rows: list[dict[str, Any]], tmp_path: Path, told: Told) -> None:
    with told.refused():
        read(tmp_path / "none.jsonl", *rows)


def test_no_file(tmp_path: Path, told: Told) -> None:
    with told.refused():
        read_judge_tests(tmp_path / "nowhere.jsonl")
