"""What fits a window beside what is to be written: the one place of this arithmetic.

All lengths are in tokens. A base that thinks writes a thought before its answer; `thought` is the
longest one, 0 where none is written.
"""

from __future__ import annotations


def room_for_prompt(window: int, *, answer: int, thought: int = 0) -> int:
    """The longest prompt that leaves room for an answer; 0 or less where none does."""
    return window - answer - thought


def room_for_answer(window: int, *, prompt: int, thought: int = 0) -> int:
    """The longest answer behind a prompt; 0 or less where there is no room for any."""
    return window - prompt - thought


def leaves_room(prompt: int, window: int, *, answer: int, thought: int = 0) -> bool:
    """Whether a prompt leaves room for an answer."""
    return prompt <= room_for_prompt(window, answer=answer, thought=thought)


def admits_a_prompt(window: int, *, answer: int, thought: int = 0) -> bool:
    """Whether there is a prompt, of one token at least, that leaves room for an answer."""
    return room_for_prompt(window, answer=answer, thought=thought) >= 1


def longest_prompt(window: int, *, answer: int, bound: int, thought: int = 0) -> int:
    """What a plan counts as the longest prompt: no longer than `bound`, and at least one token."""
    return max(1, min(bound, room_for_prompt(window, answer=answer, thought=thought)))
