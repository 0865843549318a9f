"""Texts as trees in one row: what is there, and who sees whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_lite.training.trees import Forest, Part, Text, cuts

RUBRIC = tuple(range(100, 120))


def test_a_prompt_and_its_replies_are_one_tree() -> None:
    texts = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6, 7, 8)), ((9, 1), (4,))]
    forest = Forest(texts)
    row = forest.row([0, 1, 2])
    # The last token of a reply has nothing after it; the third reply has no other.
    assert row.ids == [1, 2, 3, 4, 6, 7, 9, 1]
    assert row.positions == [0, 1, 2, 3, 3, 4, 0, 1]
    assert row.parts == (Part(0, 3, 6), Part(3, 4, 4), Part(4, 6, 6), Part(6, 8, 8))
    assert row.targets == [4, 5, 6, 7, 8, 4] and row.counts == [2, 3, 1]
    assert row.sources == [2, 3, 2, 4, 5, 7]
    assert forest.tree(0) == forest.tree(1) != forest.tree(2)
    # By themselves, as where each has masks of its own.
    apart = Forest(texts, shares=False)
    assert apart.row([1, 0]).ids == [1, 2, 3, 4, 1, 2, 3, 6, 7]
    assert apart.tokens([0, 1]) == 9 and forest.tokens([0, 1]) == 6


def test_rewards_are_asked_of_last_tokens() -> None:
    row = Forest([((1, 2), (3, 4)), ((1, 2), (5,))], scored=False).row([1, 0])
    assert row.ids == [1, 2, 3, 4, 5]
    assert [row.ids[place] for place in row.sources] == [5, 4] and row.counts == [1, 1]


def test_prompts_are_cut_where_enough_of_them_is_the_same() -> None:
    one, two, three = (RUBRIC + tail for tail in ((1, 2), (1, 3), (4,)))
    assert cuts([one, two, three, (7, 8)]) == {one: (20,), two: (20,), three: (20,), (7, 8): ()}
    assert cuts([one, (7, 8)]) == {one: (), (7, 8): ()}  # in common with none
    below = [RUBRIC + RUBRIC + (1,), RUBRIC + RUBRIC + (2,), (*RUBRIC, 3)]
    assert cuts(below)[below[0]] == (20, 40) and cuts(below)[below[2]] == (20,)
    assert cuts([RUBRIC, (*RUBRIC, 1)]) == {RUBRIC: (), (*RUBRIC, 1): (20,)}


ids = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=8), st.booleans())
def test_every_token_sees_its_own_text_alone(texts: list[Text], shares: bool) -> None:
    """Whatever is shared, at whatever length prompts are cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srlm_lite.training.trees.LEAST_TRUNK", 2)
        forest = Forest(texts, shares=shares)
    row = forest.row(range(len(texts)))
    seen = visible(row.parts, len(row.ids))
    assert len(row.ids) == forest.tokens(range(len(texts)))
    sources = iter(row.sources)
    for prompt, target in texts:
        whole = (*prompt, *target)
        for at in range(len(prompt) - 1, len(whole) - 1):
            places = [i for i, sees in enumerate(seen[next(sources)]) if sees]
            assert tuple(row.ids[i] for i in places) == whole[: at + 1]
            assert [row.positions[i] for i in places] == list(range(at + 1))
    assert row.targets == [token for _, target in texts for token in target]


def visible(parts: tuple[Part, ...], tokens: int) -> list[list[bool]]:
    """Which token sees which."""
    seen = [[False] * tokens for _ in range(tokens)]
    for part in parts:
        for query in range(part.start, part.end):
            for key in range(part.start, min(query + 1, part.stop)):
                seen[query][key] = True
    return seen
