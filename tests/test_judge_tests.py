"""Figures of a judge on known pairs and on its own answers, by hand."""

from __future__ import annotations

import pytest

from srlm_lite.evaluate.intervals import interval_of, share_interval
from srlm_lite.evaluate.judge_tests import (
    GradedAnswer,
    KnownPair,
    accuracy_difference,
    all_above,
    best_credit,
    credit_of,
    pair_figures,
    prompt_shares,
    self_preference,
    style_figures,
)

PAIRS = [
    KnownPair("p", 1.0, 5, "math", consistent=True),
    KnownPair("p", 0.0, -3, "math", consistent=False),
    KnownPair("q", 0.5, 4, "chat", consistent=False),
    KnownPair("q", None, -2, "chat"),
    KnownPair("r", 0.0, 7, "chat", consistent=True),
    KnownPair("r", 0.0, 0, "chat", consistent=True),
    KnownPair("s", 1.0, -1, "chat", consistent=True),
    KnownPair("s", 1.0, 2, "chat", consistent=True),
]


def test_what_two_scores_are_worth() -> None:
    assert [credit_of(2, 1), credit_of(1, 2), credit_of(1, 1)] == [1, 0, 0.5]
    assert credit_of(None, 1) is None and credit_of(1, None) is None


def test_pair_figures() -> None:
    """Credits 1, 0, .5, (.5), 0, 0, 1, 1 of eight: accuracy .5; of the six decided 3.

    Three errors, one of them between replies of like length: of the other two the longer reply
    wins one. The better one is longer in p's first, q's first, r's first, s's second pair: 1, .5,
    0, 1; shorter in p's second, q's second, s's first: 0, .5, 1. Seven pairs were shown in both
    orders, five with the same verdict.
    """
    found = pair_figures(PAIRS)
    assert (found["accuracy"], found["decided"]) == (0.5, 0.5)
    assert (found["tie_rate"], found["unreadable"]) == (0.125, 0.125)
    assert found["position_consistency"] == 0.7143
    assert (found["errors"], found["longer_errors"]) == (3, 0.5)
    assert (found["accuracy_longer"], found["accuracy_shorter"]) == (0.625, 0.5)
    assert (found["pairs"], found["prompts"]) == (8, 4)
    assert found["subsets"]["math"] == {"accuracy": 0.5, "interval": None, "pairs": 2, "prompts": 1}
    assert found["subsets"]["chat"]["accuracy"] == 0.5 and found["subset_mean"] == 0.5
    terms = [(1.0, 2), (1.0, 2), (0.0, 2), (2.0, 2)]
    assert found["intervals"]["accuracy"] == share_interval(terms)


def test_figures_over_nothing() -> None:
    found = pair_figures([KnownPair("p", 1.0, 1)])
    assert found["position_consistency"] is found["longer_errors"] is None
    assert found["accuracy_shorter"] is None and found["accuracy"] == 1
    assert found["subsets"] == {} and found["subset_mean"] is None


def test_a_difference_is_of_the_same_pairs() -> None:
    """Credits of the one 1, 0 | .5, .5 and of the other 0, 0 | .5, 1: (1 - .5) / 4."""
    other = [
        KnownPair(pair.prompt, credit, 0)
        for pair, credit in zip(PAIRS[:4], (0, 0, 0.5, 1.0), strict=True)
    ]
    found = accuracy_difference(PAIRS[:4], other)
    assert found["difference"] == 0.125
    assert found["interval"] == [-0.25, 0.5]  # q alone, or p alone
    assert accuracy_difference(PAIRS, PAIRS) == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_styles() -> None:
    """Right reply plain against wrong ones of three styles: 1, 0, 0; fancy: 1, 1, 1; none between.

    Easy is below the diagonal: (2, 0) and (2, 1). Hard is above it: (0, 1) and (0, 2).
    """
    pairs = [
        KnownPair("p", credit, 0, styles=at)
        for at, credit in {
            (0, 0): 1,
            (0, 1): 0,
            (0, 2): 0.5,
            (2, 0): 1,
            (2, 1): 1,
            (2, 2): 0,
        }.items()
    ]
    found = style_figures(pairs)
    assert (found["easy"], found["normal"], found["hard"]) == (1.0, 0.5, 0.25)
    assert found["matrix"] == [[1, 0, 0.5], [None, None, None], [1, 1, 0]]
    assert style_figures(PAIRS) == {}


def test_the_best_of_four() -> None:
    assert best_credit([3], [2, 1, 0]) == 1
    assert best_credit([2], [3, 1, 0]) == 0
    assert best_credit([2], [2, 2, 0]) == pytest.approx(1 / 3)
    assert best_credit([2], [None, 1, 0]) == 0.5
    assert best_credit([None], [3, 1, 0]) == 0.25
    assert best_credit([2], [3, None, 0]) == 0


def test_all_right_replies_above_all_wrong_ones() -> None:
    assert all_above([3, 2], [1, 0]) == 1
    assert all_above([3, 1], [1, 0]) == 0  # level is not above
    assert all_above([3, None], [1, 0]) == 0


def test_shares_of_prompts() -> None:
    found = prompt_shares({"best": [("math", 1.0), ("math", 0.0), ("chat", 0.25)], "all_above": []})
    assert set(found) == {"best"}
    assert found["best"]["share"] == 0.4167 and found["best"]["prompts"] == 3
    assert found["best"]["subsets"] == {"math": 0.5, "chat": 0.25}
    assert prompt_shares({"best": [("", 1.0)]})["best"]["subsets"] == {}


def graded(
    prompt: str, score: float, reference: float, confidence: float | None = None, own: bool = True
) -> GradedAnswer:
    return GradedAnswer(prompt, score, reference, own, confidence)


def test_self_preference() -> None:
    """Errors of own answers .2, -.2, .4, 0: noise .2; too much .6 and too little .2: skew .5.

    At reference .4 the confidences -1, -3 (-2 is their mean) have scores .6, .2 (mean .4), at .6
    they are -2, -2 with 1., .6: the products are 1 * .2 + -1 * -.2 = .4 and 0, the norms
    sqrt(2 * (.08 + .08)), so .4 / sqrt(.32). Others: at .4 one with .1, where own have .4 on
    average, weight 2 * 1 / 3; at .6 two with .9, where own have .8, weight 1; at .2 only others:
    (.3 * 2/3 - .1 * 1) / (5/3) = .06.
    """
    answers = [
        graded("p", 0.6, 0.4, -1),
        graded("p", 0.2, 0.4, -3),
        graded("q", 1.0, 0.6, -2),
        graded("q", 0.6, 0.6, -2),
        graded("p", 0.1, 0.4, own=False),
        graded("q", 0.8, 0.6, own=False),
        graded("q", 1.0, 0.6, own=False),
        graded("r", 0.9, 0.2, own=False),
    ]
    found = self_preference(answers)
    assert (found["noise"], found["skew"]) == (0.2, 0.5)
    assert found["self_bias"] == pytest.approx(0.4 / 0.32**0.5, abs=1e-4)
    assert found["kinder"] == 0.06
    assert (found["answers"], found["others"]) == (4, 4)
    low, high = found["intervals"]["noise"]
    assert low == 0.2 == high  # both prompts have it


def test_a_judge_that_looks_at_quality_alone() -> None:
    """Score is the reference: no noise, no coupling, no skew."""
    found = self_preference([graded(str(n), n / 4, n / 4, -n % 3) for n in range(5)])
    assert found["noise"] == 0 and found["skew"] is None and found["self_bias"] is None
    assert found["kinder"] is None and found["intervals"]["kinder"] is None


def test_a_judge_that_likes_what_its_model_finds_likely() -> None:
    """The same quality throughout, the score a line of the confidence."""
    found = self_preference([graded(str(n), 0.1 * n, 0.5, -4 + n) for n in range(6)])
    assert found["self_bias"] == 1.0


def test_an_interval_by_draws_of_prompts() -> None:
    assert interval_of([1.0], lambda drawn: drawn[0]) is None
    assert interval_of([2.0, 2.0, 2.0], lambda drawn: sum(drawn) / len(drawn)) == [2.0, 2.0]
    low, high = interval_of([0.0, 1.0] * 50, lambda drawn: sum(drawn) / len(drawn)) or (0, 0)
    assert 0.37 < low < 0.43 and 0.57 < high < 0.63  # .5 -+ 1.96 * .05
    assert interval_of([0.0, 1.0], lambda drawn: None) is None
