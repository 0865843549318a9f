"""What a run warns of: a judge that gets worse or says one thing, a policy that falls."""

from __future__ import annotations

from typing import Any

import pytest

from srlm_lite.stages.evaluation import warnings


def evaluation(
    *,
    accuracy: float | None = 0.8,
    pairs: int = 10_000,
    histogram: dict[str, int] | None = None,
    gold: float | None = None,
    error: float | None = None,
) -> dict[str, Any]:
    policy: dict[str, Any] = {"mean_length_chars": 100.0}
    if gold is not None:
        policy.update(gold_mean=gold, gold_se=error)
    return {
        "judge": {
            "pairwise_accuracy": accuracy,
            "pairs": pairs,
            "score_histogram": histogram or {"1": 30, "3": 40, "5": 30, "unreadable": 0},
        },
        "policy": policy,
    }


def test_a_healthy_run_is_quiet() -> None:
    good = evaluation(gold=3.0, error=0.1)
    assert warnings(None, good) == []
    assert warnings(good, good) == []
    assert warnings(good, evaluation(accuracy=0.9, gold=4.0, error=0.1)) == []


def test_a_fall_of_judge_accuracy() -> None:
    [text] = warnings(evaluation(accuracy=0.80), evaluation(accuracy=0.70))
    assert "pairwise accuracy fell from 0.80 to 0.70" in text
    assert warnings(evaluation(accuracy=0.80), evaluation(accuracy=0.78)) == []
    assert warnings(None, evaluation(accuracy=0.1)) == []


def test_a_fall_within_chance_is_none() -> None:
    # 100 pairs: 1 / sqrt(100) = 0.10 is within chance, 0.11 is not.
    before = evaluation(accuracy=0.80, pairs=100)
    assert warnings(before, evaluation(accuracy=0.71, pairs=100)) == []
    assert len(warnings(before, evaluation(accuracy=0.69, pairs=100))) == 1


def test_scores_that_collapse_onto_one_value() -> None:
    collapsed = evaluation(histogram={"3": 5, "4": 90, "5": 5, "unreadable": 0})
    [text] = warnings(None, collapsed)
    assert "nearly every reply the score 4" in text
    assert "srlm-lite show judgements" in text
    assert warnings(None, evaluation(histogram={"3": 30, "4": 70, "unreadable": 0})) == []


def test_unreadable_votes_do_not_hide_a_collapse() -> None:
    assert len(warnings(None, evaluation(histogram={"4": 10, "unreadable": 90}))) == 1


def test_a_fall_of_gold_beyond_its_error() -> None:
    before = evaluation(gold=3.0, error=0.1)
    [text] = warnings(before, evaluation(gold=2.7, error=0.1))
    assert "gold score fell from 3.00 to 2.70" in text
    assert warnings(before, evaluation(gold=2.9, error=0.1)) == []


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (evaluation(accuracy=None, pairs=0), evaluation()),
        (evaluation(), evaluation(accuracy=None, pairs=0)),
        (evaluation(gold=3.0), evaluation()),
        (evaluation(), evaluation(gold=3.0)),
        (evaluation(gold=3.0), evaluation(gold=3.0)),  # one prompt: no standard error
    ],
)
def test_what_was_not_measured_is_not_compared(before: Any, now: Any) -> None:
    assert warnings(before, now) == []


def test_several_ills_are_all_told() -> None:
    found = warnings(
        evaluation(accuracy=0.9, gold=4.0, error=0.1),
        evaluation(accuracy=0.5, gold=1.0, error=0.1, histogram={"5": 100, "unreadable": 0}),
    )
    assert len(found) == 3
    assert all("\n" not in text for text in found)


def test_a_judge_that_cannot_be_read_is_told() -> None:
    now = evaluation()
    now["judge"]["parse_rate"] = 0.2
    assert any("only 20% of the judge's votes" in text for text in warnings(None, now))
    now["judge"]["parse_rate"] = 0.9
    assert warnings(None, now) == []
