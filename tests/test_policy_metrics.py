"""The policy's figures and the gold scorers behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import Gold, load_gold
from srlm_lite.evaluate.policy_metrics import best_graded, means_by_prompt, policy_metrics
from srlm_lite.records import Candidate, FinishReason

PROMPTS = {"p": "question p", "q": "question q"}


def answer(prompt_id: str, text: str, end: FinishReason = "stop") -> Candidate:
    return Candidate(prompt_id, f"{prompt_id}#0", text, 2 * len(text), end)


def gold(function: Callable[[str, str], Any]) -> Gold:
    return Gold("test:gold", function)


def test_length_and_endings() -> None:
    # Characters (2 + 4 + 0) / 3, tokens twice that; one of three ran into the limit.
    found = policy_metrics(
        PROMPTS, [answer("p", "ab"), answer("p", "abcd", "length"), answer("q", "")], None
    )
    del found["intervals"]
    assert found == {
        "mean_length_chars": 2.0,
        "median_length_chars": 2,
        "mean_length_tokens": 4.0,
        "truncated_rate": 0.3333,
        "answers": 3,
    }


def test_intervals_are_over_prompts() -> None:
    # Twenty prompts with ten equal answers each: were answers drawn, the interval would be
    # sqrt(10) times narrower. Gold 0 or 1, half of each: the standard error of a share of 20
    # is sqrt(.25 / 20) = .112, so the interval is about .5 - .22 to .5 + .22.
    answers = [answer(f"p{i}", "ab"[i % 2]) for i in range(20) for _ in range(10)]
    prompts = {f"p{i}": "question" for i in range(20)}
    found = policy_metrics(prompts, answers, gold(lambda prompt, response: response == "b"))
    low, high = found["intervals"]["gold_mean"]
    assert low == pytest.approx(0.28, abs=0.05)
    assert high == pytest.approx(0.72, abs=0.05)
    assert found["intervals"]["mean_length_chars"] == [1.0, 1.0]


def test_gold_is_averaged_over_prompts() -> None:
    # p: (1 + 3) / 2 = 2; q: 6. Mean (2 + 6) / 2 = 4.
    # Standard error: deviations -2 and 2, variance (4 + 4) / 1 = 8, sqrt(8 / 2) = 2.
    found = policy_metrics(
        PROMPTS,
        [answer("p", "a"), answer("p", "abc"), answer("q", "abcdef")],
        gold(lambda prompt, response: len(response)),
    )
    assert found["gold_mean"] == 4.0
    assert found["gold_se"] == 2.0
    assert found["gold_by_criterion"] == {"score": 4.0}  # as the whole score
    assert found["gold_by_criterion_se"] == {"score": 2.0}


def test_scores_are_averaged_over_prompts_too() -> None:
    rows = [Candidate(prompt, f"{prompt}#{i}", "a", 1, "stop") for prompt in "pq" for i in (0, 1)]
    scores = {"p#0": 1.0, "p#1": 4.0, "q#0": 5.0, "q#1": None, "r#0": 9.0}
    assert means_by_prompt(rows, scores) == [2.5, 5.0]
    assert means_by_prompt(rows, {}) == []


def test_the_best_graded_answer_of_each_prompt() -> None:
    answers = [numbered("p", i) for i in range(3)] + [numbered("q", i) for i in range(2)]
    scores = {"p#0": None, "p#1": 2.0, "p#2": 2.0, "q#0": None, "q#1": None}
    # The first of equal ones; one that nobody could grade where there is no other.
    assert [one.candidate_id for one in best_graded(answers, scores)] == ["p#1", "q#0"]
    assert best_graded([], {}) == []


def numbered(prompt_id: str, i: int) -> Candidate:
    return Candidate(prompt_id, f"{prompt_id}#{i}", "text", 1, "stop")


def test_one_prompt_has_no_standard_error() -> None:
    found = policy_metrics(PROMPTS, [answer("p", "a"), answer("p", "b")], gold(lambda p, r: 1))
    assert (found["gold_mean"], found["gold_se"]) == (1.0, None)
    assert found["gold_by_criterion_se"] == {"score": None}


def test_criteria_are_summed_and_told_apart() -> None:
    def points(prompt: str, response: str) -> dict[str, float]:
        named = {"names the prompt": float(prompt[-1] in response)}
        return named if response == "" else {**named, "short": 0.5}

    # p: 1 + 0.5; q: 0 and no word of "short", which counts as 0.
    found = policy_metrics(PROMPTS, [answer("p", "p!"), answer("q", "")], gold(points))
    assert found["gold_mean"] == 0.75
    assert found["gold_by_criterion"] == {"names the prompt": 0.5, "short": 0.25}
    # Deviations 0.5 and 0.25 to either side: sqrt(2 x^2 / 1 / 2) = x.
    assert found["gold_by_criterion_se"] == {"names the prompt": 0.5, "short": 0.25}
    assert json.loads(json.dumps(found)) == found


def test_the_scorer_gets_the_prompt_of_the_answer() -> None:
    seen: list[tuple[str, str]] = []

    def spy(prompt: str, response: str) -> float:
        seen.append((prompt, response))
        return 0.0

    policy_metrics(PROMPTS, [answer("q", "x"), answer("p", "y")], gold(spy))
    assert seen == [("question q", "x"), ("question p", "y")]


@pytest.mark.parametrize("given", [2, 2.0, True, {"a": 1, "b": 1.0}])
def test_what_counts_as_points(given: Any) -> None:
    assert gold(lambda p, r: given).total("p", "r") in (1.0, 2.0)


@pytest.mark.parametrize(
    "given", [None, "good", float("nan"), float("inf"), {"a": float("nan")}, {"a": None}, [1]]
)
def test_what_is_no_number_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match="test:gold: the gold scorer"):
        gold(lambda p, r: given).points("p", "r")


def test_a_scorer_that_fails_is_named_with_its_error() -> None:
    def broken(prompt: str, response: str) -> float:
        raise IndexError("list index\nout of range")

    with pytest.raises(UserError) as caught:
        gold(broken).points("p", "r")
    assert str(caught.value) == (
        "test:gold: the gold scorer failed on a response (IndexError: list index out of range)"
    )


# --- loading ----------------------------------------------------------------------------------


def test_a_scorer_beside_the_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gold_of_mine_1.py").write_text("def points(prompt, response):\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert load_gold("gold_of_mine_1:points").total("p", "r") == 3.0


@pytest.mark.parametrize("name", ["srlm_lite.tasks.toy:gold", "srlm_lite.tasks.house_style:gold"])
def test_shipped_scorers_load_and_score_anything(name: str) -> None:
    scorer = load_gold(name)
    for response in ("", " ", "- a\n- b\n- c", "½ \u2028 字", "x" * 5000):
        assert scorer.total("How do I look after a bicycle?", response) >= 0


@pytest.mark.parametrize("name", ["", "module", "module:", ":function", ":"])
def test_a_scorer_is_named_by_module_and_function(name: str) -> None:
    with pytest.raises(UserError, match="expected module:function"):
        load_gold(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_at_all:gold", "cannot be imported (No module named"),
        ("json:no_such_function", "cannot be used (AttributeError"),
        ("..json:loads", "cannot be used (TypeError"),
        ("json:decoder", "is not a function"),
        ("secrets:token_hex", "cannot be called with a prompt and a response (too many"),
        ("gold_broken_syntax:gold", "cannot be used (SyntaxError"),
        ("gold_broken_import:gold", "cannot be imported (No module named 'absent_library')"),
        ("gold_broken_start:gold", "cannot be used (ZeroDivisionError"),
    ],
)
def test_a_scorer_that_cannot_be_used_is_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gold_broken_syntax.py").write_text("def gold(:\n")
    (tmp_path / "gold_broken_import.py").write_text("import absent_library\n")
    (tmp_path / "gold_broken_start.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_gold(name)
    assert f"evaluate.gold = {name}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)
