"""What fits a window: prompt, thought and answer, to the token."""

from __future__ import annotations

import pytest

from srlm_lite.window import (
    admits_a_prompt,
    leaves_room,
    longest_prompt,
    room_for_answer,
    room_for_prompt,
)


def test_prompt_thought_and_answer_fill_the_window_to_the_token() -> None:
    assert room_for_prompt(100, answer=30, thought=20) == 50
    assert room_for_answer(100, prompt=50, thought=20) == 30
    assert leaves_room(50, 100, answer=30, thought=20)
    assert not leaves_room(51, 100, answer=30, thought=20)


@pytest.mark.parametrize(("answer", "admits"), [(98, True), (99, True), (100, False), (200, False)])
def test_a_window_full_of_the_answer_admits_no_prompt(answer: int, admits: bool) -> None:
    assert admits_a_prompt(100, answer=answer) is admits
    assert admits_a_prompt(110, answer=answer, thought=10) is admits


def test_a_plan_counts_a_prompt_of_a_token_at_least() -> None:
    assert longest_prompt(100, answer=30, bound=1000) == 70
    assert longest_prompt(100, answer=30, bound=40) == 40
    assert longest_prompt(100, answer=100, bound=40) == 1
