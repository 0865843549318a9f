"""Which self-written judgements become EFT targets: those that agree with the human order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srlm_lite.records import Judgement, RankedReply
from srlm_lite.stages.anchor import agreeing_targets, thin_most_common

Votes = Sequence[float | None]


def prompt(
    name: str, replies: Mapping[str, tuple[int, Votes]]
) -> tuple[list[RankedReply], list[Judgement]]:
    """A prompt's replies as {id: (human rank, votes)}, with their judgements."""
    group = [RankedReply(name, "q", key, "answer", rank) for key, (rank, _) in replies.items()]
    judgements = [
        Judgement(key, vote, f"{key} vote {vote}\nScore: {score}", score)
        for key, (_, votes) in replies.items()
        for vote, score in enumerate(votes)
    ]
    return group, judgements


def kept(*prompts: tuple[list[RankedReply], list[Judgement]]) -> list[tuple[str, str, float]]:
    """(response id, first line of its target, score) of each row that is kept."""
    rows, _ = agreeing_targets(
        [group for group, _ in prompts], [row for _, rows in prompts for row in rows]
    )
    return [(row.response_id, str(row.target).split("\n")[0], score) for row, score in rows]


def drops(*prompts: tuple[list[RankedReply], list[Judgement]]) -> dict[str, int]:
    _, found = agreeing_targets(
        [group for group, _ in prompts], [row for _, rows in prompts for row in rows]
    )
    return found


# --- agreement --------------------------------------------------------------------------------


def test_the_first_try_that_agrees_gives_all_targets_of_a_prompt() -> None:
    # Vote 0: 3 against 4, wrong. Vote 1: 5 against 2, right. Vote 2: right too, but later.
    case = prompt("p", {"good": (0, [3, 5, 4]), "bad": (1, [4, 2, 1])})
    assert kept(case) == [("good", "good vote 1", 5), ("bad", "bad vote 1", 2)]
    assert drops(case) == {"unreadable": 0, "disagreeing": 0}


def test_votes_of_different_tries_are_not_mixed() -> None:
    # good's 5 and bad's 1 would agree, but they belong to different tries.
    case = prompt("p", {"good": (0, [5, 1]), "bad": (1, [5, 1])})
    assert kept(case) == []
    assert drops(case) == {"unreadable": 0, "disagreeing": 1}


def test_a_tie_of_scores_does_not_agree_with_an_order() -> None:
    assert kept(prompt("p", {"good": (0, [3]), "bad": (1, [3])})) == []


def test_every_two_replies_must_agree_and_not_only_neighbours() -> None:
    assert kept(prompt("p", {"a": (0, [4]), "b": (1, [5]), "c": (2, [1])})) == []
    assert len(kept(prompt("p", {"a": (0, [5]), "b": (1, [4]), "c": (2, [1])}))) == 3


@pytest.mark.parametrize(("b", "c"), [(1, 2), (2, 1), (2, 2)])
def test_replies_that_humans_ranked_equal_may_have_any_scores(b: int, c: int) -> None:
    assert len(kept(prompt("p", {"a": (0, [5]), "b": (1, [b]), "c": (1, [c])}))) == 3


def test_the_order_of_rows_is_not_the_order_of_ranks() -> None:
    assert len(kept(prompt("p", {"worst": (2, [1]), "best": (0, [5]), "middle": (1, [3])}))) == 3


def test_a_try_with_an_unreadable_vote_is_none() -> None:
    # Try 0 lacks a score; as a zero it would have agreed. Try 1 agrees.
    case = prompt("p", {"good": (0, [4, 3]), "bad": (1, [None, 1])})
    assert kept(case) == [("good", "good vote 1", 3), ("bad", "bad vote 1", 1)]


def test_a_score_of_zero_is_a_score() -> None:
    assert kept(prompt("p", {"good": (0, [1]), "bad": (1, [0])})) == [
        ("good", "good vote 0", 1),
        ("bad", "bad vote 0", 0),
    ]


def test_prompts_left_out_are_counted_by_reason() -> None:
    never_read = prompt("p", {"a": (0, [5, None]), "b": (1, [None, 1])})
    never_right = prompt("q", {"c": (0, [1, None]), "d": (1, [5, 1])})
    right = prompt("r", {"e": (0, [5, 5]), "f": (1, [1, 1])})
    assert drops(never_read, never_right, right) == {"unreadable": 1, "disagreeing": 1}
    assert [row[0] for row in kept(never_read, never_right, right)] == ["e", "f"]


def test_rows_keep_all_but_their_target() -> None:
    group, judgements = prompt("p", {"a": (0, [5]), "b": (1, [1])})
    rows, _ = agreeing_targets([group], judgements)
    assert rows[0][0].target == "a vote 0\nScore: 5"
    assert (rows[0][0].prompt_id, rows[0][0].rank, rows[0][0].response) == ("p", 0, "answer")
    assert group[0].target is None


def test_what_counts_is_the_score_that_the_target_says() -> None:
    group, judgements = prompt("p", {"a": (0, [4, 5]), "b": (1, [4, 3])})
    # Expected scores put a before b in vote 0 already, but both of its targets say 4.
    expected = {("a", 0): 4.2, ("b", 0): 3.8, ("a", 1): 4.9, ("b", 1): 3.1}
    judgements = [
        replace(row, score=expected[row.candidate_id, row.vote], sampled_score=row.score)
        for row in judgements
    ]
    assert kept((group, judgements)) == [("a", "a vote 1", 5.0), ("b", "b vote 1", 3.0)]


# --- thinning ---------------------------------------------------------------------------------


def scored(counts: Mapping[float, int]) -> list[tuple[RankedReply, float]]:
    scores = [score for score, count in counts.items() for _ in range(count)]
    Random(0).shuffle(scores)
    return [
        (RankedReply("p", "q", f"r{i}", "answer", 0, target="t"), score)
        for i, score in enumerate(scores)
    ]


def thinned(counts: Mapping[float, int], max_share: float, *, seed: int = 0) -> dict[float, int]:
    rows = thin_most_common(scored(counts), max_share=max_share, rng=Random(seed))
    return dict(Counter(score for _, score in rows))


def test_the_most_common_score_is_thinned_to_its_share() -> None:
    # 40 others; 40 of 80 is one half.
    assert thinned({4: 100, 3: 30, 5: 10}, 0.5) == {4: 40, 3: 30, 5: 10}
    # 60 others; 20 of 80 would be one quarter, but that is fewer than the next score has.
    assert thinned({4: 100, 3: 30, 5: 30}, 0.25) == {4: 30, 3: 30, 5: 30}
    assert thinned({4: 100, 3: 2}, 0.35) == {4: 2, 3: 2}
    assert thinned({4: 100}, 0.35) == {4: 100}


def test_nothing_is_thinned_below_the_share() -> None:
    counts = {4.0: 30, 3.0: 30, 2.0: 40}
    assert thinned(counts, 0.4) == counts
    assert thinned({4: 100, 3: 1}, 1.0) == {4: 100, 3: 1}
    assert thin_most_common([], max_share=0.5, rng=Random(0)) == []


def test_thinning_keeps_the_order_and_is_fixed_by_its_seed() -> None:
    rows = scored({4: 50, 3: 10, 2: 5})
    first = thin_most_common(rows, max_share=0.5, rng=Random("a"))
    assert first == thin_most_common(rows, max_share=0.5, rng=Random("a"))
    assert first != thin_most_common(rows, max_share=0.5, rng=Random("b"))
    places = [rows.index(row) for row in first]
    assert places == sorted(places)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([0.0, 1.0, 2.0, 3.5, 4.0, 5.0]), st.integers(1, 60), min_size=2
    ),
    st.sampled_from([0.2, 0.35, 0.5, 0.6, 0.9]),
)
def test_the_share_holds_and_no_other_score_is_touched(
    counts: dict[float, int], max_share: float
) -> None:
    found = thinned(counts, max_share)
    changed = [score for score in counts if found.get(score) != counts[score]]
    assert len(changed) <= 1
    for score in changed:
        assert counts[score] == max(counts.values())
        share = found[score] / sum(found.values())
        # As large as it may be, but no smaller than what the next score has.
        next_most = max(count for other, count in counts.items() if other != score)
        assert share <= max_share or found[score] == next_most
        assert (found[score] + 2) / (sum(found.values()) + 2) > max_share
