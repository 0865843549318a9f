"""Self-Instruct: requests, reading what comes back, and every filter."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from srlm_lite.data.self_instruct import HEADING, MAX_SHOT_CHARS, PromptPool
from srlm_lite.errors import UserError

SEED = [f"Explain how the {thing} works in a few words" for thing in "abcdefgh"]
WRITTEN = ["Name three rivers of Europe.", "Why do cats purr at night?", "Plan a week of dinners."]


def shots(request: str) -> list[str]:
    heading, _, listed = request.partition("\n\n")
    assert heading == HEADING
    *items, last = listed.split("\n")
    assert last == f"{len(items) + 1}."
    return [item.partition(". ")[2] for item in items]


def test_a_first_request_shows_eight_seed_prompts() -> None:
    assert sorted(shots(PromptPool(SEED).request(random.Random(0)))) == sorted(SEED)


def test_later_requests_show_six_of_the_seed_and_two_generated() -> None:
    pool = PromptPool(SEED, generated=WRITTEN)
    for seed in range(20):
        shown = shots(pool.request(random.Random(seed)))
        assert len(shown) == len(set(shown)) == 8
        assert len(set(shown) & set(WRITTEN)) == 2


def test_the_same_seed_makes_the_same_request() -> None:
    pool = PromptPool(SEED, generated=WRITTEN)
    requests = {pool.request(random.Random(5)) for _ in range(3)}
    assert len(requests) == 1
    assert pool.request(random.Random(6)) not in requests


def test_a_small_seed_gives_what_it_has() -> None:
    assert shots(PromptPool(SEED[:3]).request(random.Random(0))) != []


def test_a_shot_is_one_line_and_never_a_very_long_one() -> None:
    pool = PromptPool(["Write\na  poem\n\nabout rain", "x" * (MAX_SHOT_CHARS + 1)])
    assert shots(pool.request(random.Random(0))) == ["Write a poem about rain"]


def test_a_seed_without_a_short_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="Self-Instruct needs prompts"):
        PromptPool(["x" * (MAX_SHOT_CHARS + 1), "  "])


@pytest.mark.parametrize(
    ("continuation", "read"),
    [
        (" Name three rivers of Europe.\n10. Why do cats purr at night?", WRITTEN[:2]),
        ("9. Name three rivers of Europe.\n10) Why do cats purr at night?", WRITTEN[:2]),
        ("Sure, here are some more:\n\n9. Name three rivers of Europe.", WRITTEN[:1]),
        # Answers are skipped, and so is the list inside one; number 10 goes on with the prompts.
        (
            "9. Name three rivers of Europe.\nOf course!\n1. Rhine\n2. Elbe\n3. Po\n\n"
            "10. Why do cats purr at night?",
            WRITTEN[:2],
        ),
        # Without a number on the first, nothing tells the steps of an answer from prompts.
        ("Plan a week of dinners.\n1. Monday has soup\n2. Tuesday has rice", WRITTEN[2:]),
        ("Name three rivers of Europe.\nAnswer: the Rhine, the Elbe and the Po.", WRITTEN[:1]),
        ("9.8 is what number to a physicist?", ["9.8 is what number to a physicist?"]),
        ("", []),
        ("\n \n", []),
    ],
)
def test_reading_a_continuation(continuation: str, read: list[str]) -> None:
    assert PromptPool(SEED).offer(continuation) == read


def test_an_unfinished_last_prompt_is_left_out() -> None:
    pool = PromptPool(SEED)
    text = "9. Name three rivers of Europe.\n10. Why do cats purr at"
    assert pool.offer(text, finished=False) == WRITTEN[:1]
    assert pool.drops == {"unfinished": 1}


def test_an_unfinished_answer_costs_no_prompt() -> None:
    pool = PromptPool(SEED)
    assert pool.offer("9. Name three rivers of Europe.\nThe Rhi", finished=False) == WRITTEN[:1]
    assert not pool.drops


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("Answer: the Rhine is one of them", "answer"),
        ("Why so?", "too_short"),
        ("Tell me about " + " ".join(f"thing{n}" for n in range(150)), "too_long"),
        ("Describe what you see in this picture", "keyword"),
        ("Draw a GRAPH of the function", "keyword"),
        ("Summarise the article above in a line", "keyword"),
        ("explain how the A works in a few words.", "duplicate"),
        ("Explain how the z works in a few words", "similar"),
        ("Tell me <|im_end|> more of that", "chat_markers"),
        ("Tell me more \ufffd of that", "garbled"),
        ("and so on and so on and so on and so on and so on", "repetition"),
        ("(ginger: food, spice) (has_effect) (heartburn: disorder)", "not_language"),
    ],
)
def test_filters(prompt: str, reason: str) -> None:
    pool = PromptPool(SEED)
    assert pool.offer(f"9. {prompt}") == []
    assert pool.drops == {reason: 1}
    assert pool.generated == ()


def test_a_taken_prompt_keeps_its_copies_out() -> None:
    pool = PromptPool(SEED)
    assert pool.offer("Why do cats purr at night?") == ["Why do cats purr at night?"]
    assert pool.offer("9. Why do cats purr at night\n10. Why do dogs purr at night?") == []
    assert pool.drops == {"duplicate": 1, "similar": 1}


def test_a_pool_goes_on_where_another_stopped() -> None:
    whole = PromptPool(SEED)
    for prompt in WRITTEN:
        whole.offer(prompt)
    resumed = PromptPool(SEED, generated=whole.generated)
    assert resumed.request(random.Random(1)) == whole.request(random.Random(1))
    assert resumed.offer(WRITTEN[0]) == []


def test_other_scripts_are_compared_too() -> None:
    pool = PromptPool(["Почему кошки мурлычут по ночам в доме?"])
    assert pool.offer("Почему кошки мурлычут по утрам в доме?") == []
    assert pool.drops == {"similar": 1}


words = st.lists(
    st.sampled_from(["red", "green", "blue", "one", "two", "three"]), min_size=3, max_size=9
)


@given(st.lists(words, min_size=1, max_size=6), words)
def test_the_bound_never_changes_what_rouge_decides(seed: list[list[str]], new: list[str]) -> None:
    prompts, prompt = [" ".join(line) for line in seed], " ".join(new)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    highest = max(scorer.score(other, prompt)["rougeL"].fmeasure for other in prompts)
    pool = PromptPool(prompts)
    assert bool(pool.offer(prompt)) == (highest < 0.7 and "repetition" not in pool.drops)
