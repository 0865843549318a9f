"""What a run warns of: a judge that gets worse or says one thing, a policy that falls."""

from __future__ import annotations

import random
from statistics import fmean, stdev
from typing import Any

import pytest

from srlm_lite.evaluate.gate import CHECKS, best_model, findings
from srlm_lite.settings import Gate
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
    # Two standard errors of the difference: 2 sqrt(.01 + .01) = .28.
    assert warnings(before, evaluation(gold=2.75, error=0.1)) == []


def test_a_run_whose_answers_stay_as_good_is_seldom_warned_of_a_fall() -> None:
    """Three iterations that change nothing: only what 64 answers vary by, standard deviation 1."""
    draw = random.Random(0)
    alarms = 0
    for _ in range(300):
        models = []
        for _ in range(4):
            scores = [draw.gauss(3, 1) for _ in range(64)]
            models.append(
                model(
                    anchor_score=fmean(scores), anchor_score_se=stdev(scores) / len(scores) ** 0.5
                )
            )
        alarms += any("anchor_score" in gates(*models[:last]) for last in (2, 3, 4))
    assert alarms / 300 < 0.15  # by the error of the last model alone it would be .32


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


# --- gates ------------------------------------------------------------------------------------


def model(accuracy: float = 0.8, **policy: Any) -> dict[str, Any]:
    result = evaluation(accuracy=accuracy)
    return {**result, "policy": {**result["policy"], "score_scale": [0.0, 5.0], **policy}}


def gates(*models: dict[str, Any], **settings: Any) -> list[str]:
    return [found.gate for found in findings(models, Gate(**settings))]


def test_a_slow_fall_is_held_against_the_best_model_so_far() -> None:
    # Each step of .02 is allowed, both together are not.
    slow = [model(0.80), model(0.78), model(0.76)]
    assert gates(*slow[:2]) == []
    assert gates(*slow) == ["judge_accuracy"]
    assert gates(*slow, judge_accuracy=0.05) == []


def test_own_grades_rise_while_the_anchor_s_fall() -> None:
    before = model(self_score=3.2, anchor_score=3.2, anchor_score_se=0.1)
    drifted = model(self_score=3.9, anchor_score=2.9, anchor_score_se=0.1)
    assert gates(before, drifted) == ["anchor_score"]
    [found] = findings([before, drifted], Gate())
    assert "own answers rose from 3.20 to 3.90" in found.text
    assert "fell from 3.20 to 2.90" in found.text
    # Both rise; a fall within two standard errors; a recipe that allows more.
    assert gates(before, model(self_score=3.9, anchor_score=3.7, anchor_score_se=0.1)) == []
    assert gates(before, model(self_score=3.9, anchor_score=3.05, anchor_score_se=0.1)) == []
    assert gates(before, drifted, anchor_score=0.5) == []


def test_length_may_grow_as_the_score_does() -> None:
    anchor = model(anchor_score=2.0, mean_length_chars=100.0)
    # 60% longer for 2 of 5 points, 40% of the scale: 20% too much, 30% are allowed.
    assert gates(anchor, model(anchor_score=4.0, mean_length_chars=160.0)) == []
    assert gates(anchor, model(anchor_score=2.5, mean_length_chars=160.0)) == ["length"]
    assert gates(anchor, model(anchor_score=2.5, mean_length_chars=160.0), length=1.0) == []
    # A score that falls makes a growth of 20% no longer: that it falls is for another gate.
    worse = model(anchor_score=1.0, anchor_score_se=1.0, mean_length_chars=120.0)
    assert gates(anchor, worse) == []
    # Two iterations of 20% each are one growth of 44%.
    steps = [model(anchor_score=2.0, mean_length_chars=chars) for chars in (100.0, 120.0, 144.0)]
    assert gates(*steps[:2]) == []
    assert gates(*steps) == ["length"]


def test_answers_that_no_longer_end() -> None:
    assert gates(model(truncated_rate=0.1), model(truncated_rate=0.5)) == ["truncated"]
    assert gates(model(truncated_rate=0.6), model(truncated_rate=0.7)) == []


def test_a_policy_far_from_the_anchor_whatever_the_grades_say() -> None:
    anchor = model(anchor_score=2.5, anchor_score_se=0.1, divergence=0.0)
    near = model(anchor_score=3.7, anchor_score_se=0.1, divergence=0.9)
    far = model(anchor_score=4.2, anchor_score_se=0.1, divergence=1.1)
    assert gates(anchor, near) == []
    assert gates(anchor, near, far) == ["divergence"]
    assert gates(anchor, near, far, divergence=2.0) == []
    assert "1.1 nats a token from the anchor" in findings([anchor, far], Gate())[0].text
    # Its high grades do not make it the best model.
    best = best_model([anchor, near, far])
    assert best is not None
    assert best.place == 1


def by_criterion(*values: float, total: float, error: float | None = 0.03) -> dict[str, Any]:
    """A model with these points by criterion; their sum is told apart, to leave it free."""
    names = "abcde"[: len(values)]
    return model(
        gold_mean=total,
        gold_se=0.05,
        gold_by_criterion=dict(zip(names, values, strict=True)),
        gold_by_criterion_se=dict.fromkeys(names, error),
    )


def test_a_criterion_that_falls_while_the_whole_rises() -> None:
    # Of five criteria each is held to 0.05 / 5: 2.326 standard errors of the difference,
    # 2.326 sqrt(2) 0.03 = 0.099.
    anchor = by_criterion(0.5, 0.5, 0.7, 0.5, 0.5, total=2.7)
    better = [0.7, 0.7, 0.59, 0.7, 0.7]
    assert gates(anchor, by_criterion(*better, total=3.4)) == ["criterion"]
    [found] = findings([anchor, by_criterion(*better, total=3.4)], Gate())
    assert "`c` of the gold score fell from 0.70 at the anchor to 0.59" in found.text
    assert "the whole rose from 2.70 to 3.40" in found.text
    # Within chance; where the recipe allows it; a fall of all, which is the gold gate's affair.
    assert gates(anchor, by_criterion(0.7, 0.7, 0.61, 0.7, 0.7, total=3.4)) == []
    assert gates(anchor, by_criterion(*better, total=3.4), criterion=0.2) == []
    assert gates(anchor, by_criterion(*better, total=2.5)) == ["gold"]
    # Step by step: against the anchor, not against the model before.
    between = by_criterion(0.6, 0.6, 0.64, 0.6, 0.6, total=3.0)
    assert gates(anchor, between) == []
    assert gates(anchor, between, by_criterion(*better, total=3.4)) == ["criterion"]


def test_fewer_criteria_are_held_less_strictly() -> None:
    # Two: 1.960 sqrt(2) 0.03 = 0.083. One is the whole score itself.
    assert gates(by_criterion(0.5, 0.7, total=1.2), by_criterion(0.8, 0.61, total=1.4)) == [
        "criterion"
    ]
    assert gates(by_criterion(0.7, total=1.0), by_criterion(0.5, total=1.2)) == []


def test_a_criterion_without_its_error_is_not_compared() -> None:
    anchor, fallen = by_criterion(0.5, 0.7, total=1.2), by_criterion(0.9, 0.1, total=1.4)
    del anchor["policy"]["gold_by_criterion_se"]  # of a run from before it was kept
    assert gates(anchor, fallen) == []
    assert gates(by_criterion(0.5, 0.7, total=1.2, error=None), fallen) == []


def test_chance_alone_seldom_takes_a_criterion() -> None:
    # Models that differ by luck alone: 5 criteria of 0.5, 100 prompts. About half of them rise,
    # and of those fewer than 1 in 20 is told to have lost one.
    rng = random.Random(0)

    def drawn() -> dict[str, Any]:
        points = [[float(rng.random() < 0.5) for _ in "abcde"] for _ in range(100)]
        means = [fmean(column) for column in zip(*points, strict=True)]
        return by_criterion(*means, total=sum(means), error=0.05)

    told = [gates(drawn(), drawn()) for _ in range(1000)]
    assert 0 < sum("criterion" in found for found in told) < 50


def panel(value: float, se: float = 0.01) -> dict[str, Any]:
    task = {"metric": "acc", "value": value, "se": se}
    return {**model(), "capabilities": {"tasks": {"arc_easy": task}}}


def test_a_capability_that_falls_below_the_anchor() -> None:
    assert gates(panel(0.70), panel(0.66)) == []
    assert gates(panel(0.70), panel(0.64)) == ["capability"]
    assert gates(panel(0.70), panel(0.64, se=0.04)) == []  # within two standard errors
    assert gates(panel(0.70), panel(0.69), panel(0.64)) == ["capability"]
    assert gates(model(), panel(0.1)) == []


# --- the best model ---------------------------------------------------------------------------


def test_the_best_model_is_by_gold_where_there_is_gold() -> None:
    runs = [
        model(gold_mean=2.0, gold_se=0.1, anchor_score=1.0),
        model(gold_mean=4.0, gold_se=0.1, anchor_score=2.0),
        model(gold_mean=3.8, gold_se=0.1, anchor_score=3.0),
    ]
    best = best_model(runs)
    assert best is not None
    # 4.0 - 3.8 = .2 is below 2 sqrt(.01 + .01) = .28; 4.0 - 2.0 is not.
    assert (best.place, best.figure, best.alike) == (1, "gold_mean", (2,))


def test_without_gold_it_is_by_the_anchor_s_grades_and_without_those_there_is_none() -> None:
    runs = [model(anchor_score=3.0, anchor_score_se=0.1), model(anchor_score=2.0)]
    best = best_model(runs)
    assert best is not None
    assert (best.place, best.figure, best.alike) == (0, "anchor_score", ())
    assert best_model([model(anchor_score=3.0), model()]) is None
    assert best_model([]) is None


def test_a_broken_model_is_not_the_best_however_the_anchor_grades_it() -> None:
    sound = model(anchor_score=2.5, anchor_score_se=0.1, truncated_rate=0.0)
    endless = model(anchor_score=3.2, anchor_score_se=0.1, truncated_rate=0.9)
    best = best_model([sound, endless])
    assert best is not None
    assert (best.place, best.alike) == (0, ())
    # Gold is no judge that could be deceived.
    best = best_model(
        [
            {**sound, "policy": {**sound["policy"], "gold_mean": 1.0}},
            {**endless, "policy": {**endless["policy"], "gold_mean": 2.0}},
        ]
    )
    assert best is not None
    assert best.place == 1


def test_a_finding_is_named_as_its_setting_is() -> None:
    named = {check.__name__.lstrip("_") for check in CHECKS}
    # A figure that is no number is allowed by no setting.
    assert named - set(Gate.model_fields) == {"no_number"}
