"""The judge metrics, with the arithmetic beside each expected number."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from srlm_lite.evaluate.judge_metrics import collapsed_score, histogram, judge_metrics
from srlm_lite.records import Judgement, RankedReply

Score = float | None | Sequence[float | None]


def metrics(*prompts: Mapping[str, tuple[int, Score]], best_score: float = 5.0) -> dict[str, Any]:
    """Metrics of prompts given as {reply: (human rank, score or votes)}."""
    groups, judgements = [], []
    for number, replies in enumerate(prompts):
        group = []
        for name, (rank, score) in replies.items():
            reply_id = f"{number}/{name}"
            group.append(RankedReply(f"p{number}", "q", reply_id, name, rank))
            votes = score if isinstance(score, Sequence) else [score]
            judgements += [Judgement(reply_id, v, "", vote) for v, vote in enumerate(votes)]
        groups.append(group)
    return judge_metrics(groups, judgements, best_score=best_score)


PERFECT = {"a": (0, 5.0), "b": (1, 3.0), "c": (2, 1.0)}
INVERTED = {"a": (0, 1.0), "b": (1, 3.0), "c": (2, 5.0)}
CONSTANT = {"a": (0, 4.0), "b": (1, 4.0), "c": (2, 4.0)}
SILENT = {"a": (0, None), "b": (1, None), "c": (2, None)}


# --- judges whose figures are known beforehand ------------------------------------------------


def test_a_perfect_judge() -> None:
    found = metrics(PERFECT, PERFECT)
    for name in ("pairwise_accuracy", "five_best", "exact_match", "spearman", "kendall"):
        assert found[name] == 1.0, name
    assert found["parse_rate"] == 1.0
    assert found["tie_rate"] == 0.0
    assert (found["prompts"], found["pairs"]) == (2, 6)


def test_an_inverted_judge() -> None:
    found = metrics(INVERTED)
    assert found["pairwise_accuracy"] == found["five_best"] == found["exact_match"] == 0.0
    assert found["spearman"] == found["kendall"] == -1.0


def test_a_judge_that_always_says_the_same() -> None:
    found = metrics(CONSTANT)
    assert found["pairwise_accuracy"] == 0.5
    assert found["pairwise_accuracy_decided"] is None
    assert found["exact_match"] == found["spearman"] == found["kendall"] == 0.0
    assert found["five_best"] is None  # it never gave a 5
    assert found["tie_rate"] == 1.0
    assert found["score_histogram"] == {"4": 3, "unreadable": 0}


def test_a_judge_that_cannot_be_read() -> None:
    found = metrics(SILENT)
    assert found["pairwise_accuracy"] == 0.5
    assert found["pairwise_accuracy_decided"] is None
    assert found["exact_match"] == found["spearman"] == found["kendall"] == 0.0
    assert found["five_best"] is None
    assert found["parse_rate"] == found["tie_rate"] == 0.0
    assert found["mean_score"] is None
    assert found["score_histogram"] == {"unreadable": 3}


def test_no_data_gives_no_rates() -> None:
    found = metrics()
    assert found["prompts"] == found["pairs"] == 0
    rates = {"pairwise_accuracy", "five_best", "exact_match", "spearman", "kendall"}
    assert all(found[name] is None for name in rates | {"parse_rate", "tie_rate", "mean_score"})


# --- each metric by hand ----------------------------------------------------------------------


def test_pairwise_accuracy() -> None:
    # a > b > c for humans. Scores 4, 2, 3: a>b right, a>c right, b>c wrong: 2 of 3.
    assert metrics({"a": (0, 4.0), "b": (1, 2.0), "c": (2, 3.0)})["pairwise_accuracy"] == 0.6667


def test_pairs_are_pooled_over_prompts_and_never_cross_them() -> None:
    # 3 pairs all right, and 1 pair wrong: 3 of 4, not the mean of 1 and 0.
    found = metrics(PERFECT, {"a": (0, 0.0), "b": (1, 5.0)})
    assert found["pairwise_accuracy"] == 0.75
    assert found["pairs"] == 4


def test_a_tie_of_scores_is_half_right() -> None:
    # a=b tie: 0.5; a>c right: 1; b>c right: 1. (0.5 + 1 + 1) / 3; of the two decided ones, 2.
    found = metrics({"a": (0, 4.0), "b": (1, 4.0), "c": (2, 3.0)})
    assert found["pairwise_accuracy"] == 0.8333
    assert found["pairwise_accuracy_decided"] == 1.0
    assert found["tie_rate"] == 0.3333


def test_an_unreadable_reply_makes_its_pairs_half_right() -> None:
    # a>b right: 1; a,c and b,c unreadable: 0.5 each. 2 of 3. They are no ties.
    found = metrics({"a": (0, 4.0), "b": (1, 3.0), "c": (2, None)})
    assert found["pairwise_accuracy"] == 0.6667
    assert found["pairwise_accuracy_decided"] == 1.0
    assert found["tie_rate"] == 0.0
    assert found["parse_rate"] == 0.6667


def test_replies_that_humans_ranked_equal_are_no_pair() -> None:
    # a and b share rank 0: two pairs are left, a>c right and b>c wrong.
    found = metrics({"a": (0, 4.0), "b": (0, 1.0), "c": (1, 2.0)})
    assert found["pairs"] == 2
    assert found["pairwise_accuracy"] == 0.5


def test_ranks_with_gaps_are_an_order_like_any_other() -> None:
    dense = metrics({"a": (0, 4.0), "b": (1, 2.0), "c": (2, 3.0)})
    assert metrics({"a": (0, 4.0), "b": (5, 2.0), "c": (9, 3.0)}) == dense


def test_five_best() -> None:
    # Three replies have a perfect 5; humans put one of them first.
    found = metrics({"a": (0, 5.0), "b": (1, 5.0), "c": (2, 4.0)}, {"a": (0, 4.0), "b": (1, 5.0)})
    assert found["five_best"] == 0.3333


def test_five_best_wants_all_votes_to_be_perfect() -> None:
    # Means: (5+5)/2 = 5 counts, (5+4)/2 = 4.5 does not.
    assert metrics({"a": (0, [5.0, 5.0]), "b": (1, [5.0, 4.0])})["five_best"] == 1.0


def test_five_best_counts_every_reply_that_shares_the_first_rank() -> None:
    assert metrics({"a": (0, 5.0), "b": (0, 5.0), "c": (1, 5.0)})["five_best"] == 0.6667


def test_five_best_goes_by_the_maximum_of_the_rubric() -> None:
    prompt = {"a": (0, 10.0), "b": (1, 5.0)}
    assert metrics(prompt, best_score=10.0)["five_best"] == 1.0
    assert metrics(prompt, best_score=5.0)["five_best"] == 0.0


def test_exact_match() -> None:
    # Right order, one swap, one tie, one unreadable: 1 of 4 prompts.
    found = metrics(
        PERFECT,
        {"a": (0, 5.0), "b": (1, 1.0), "c": (2, 3.0)},
        {"a": (0, 5.0), "b": (1, 3.0), "c": (2, 3.0)},
        {"a": (0, 5.0), "b": (1, 3.0), "c": (2, None)},
    )
    assert found["exact_match"] == 0.25


def test_exact_match_leaves_human_ties_to_the_judge() -> None:
    for b, c in itertools.permutations([1.0, 2.0, 3.0], 2):
        assert metrics({"a": (0, 5.0), "b": (1, b), "c": (1, c)})["exact_match"] == 1.0
    assert metrics({"a": (0, 2.0), "b": (1, 1.0), "c": (1, 3.0)})["exact_match"] == 0.0


def test_correlations_are_averaged_over_prompts() -> None:
    # Perfect: 1 and 1. Scores 4, 2, 3 for ranks 1, 2, 3: Spearman 1 - 6*(0+1+1)/(3*8) = 0.5;
    # Kendall (2 concordant - 1 discordant) / 3 = 1/3.
    found = metrics(PERFECT, {"a": (0, 4.0), "b": (1, 2.0), "c": (2, 3.0)})
    assert found["spearman"] == 0.75
    assert found["kendall"] == 0.6667


def test_correlations_use_the_readable_replies() -> None:
    # Of four replies c is unreadable; a, b, d are in the right order.
    found = metrics({"a": (0, 5.0), "b": (1, 4.0), "c": (2, None), "d": (3, 1.0)})
    assert found["spearman"] == found["kendall"] == 1.0


def test_a_prompt_without_a_correlation_counts_as_zero() -> None:
    # Perfect 1, constant 0, one readable reply 0, none readable 0: 1 of 4.
    found = metrics(PERFECT, CONSTANT, {"a": (0, 5.0), "b": (1, None)}, SILENT)
    assert found["spearman"] == found["kendall"] == 0.25


def test_correlations_are_scipys_with_ties() -> None:
    ranks, scores = [0, 1, 1, 3, 4], [4.0, 4.0, 2.0, 3.0, 1.0]
    found = metrics(
        {str(i): (rank, score) for i, (rank, score) in enumerate(zip(ranks, scores, strict=True))}
    )
    quality = [-rank for rank in ranks]
    assert found["spearman"] == round(float(spearmanr(quality, scores).statistic), 4)
    assert found["kendall"] == round(float(kendalltau(quality, scores).statistic), 4)
    # Tau-b by hand: pairs of 5 replies 10; human tie (b,c), judge tie (a,b); of the other eight
    # a>c a>d a>e b>d b>e c>e d>e are concordant and c>d is discordant: (7-1)/sqrt(9*9).
    assert found["kendall"] == 0.6667


@pytest.mark.parametrize(
    "prompt",
    [
        {"a": (0, 5.0), "b": (0, 1.0)},
        {"a": (0, 5.0)},
        {"a": (0, 5.0), "b": (0, 5.0), "c": (0, None)},
    ],
)
def test_prompts_without_a_human_order_change_no_metric(
    prompt: Mapping[str, tuple[int, Score]],
) -> None:
    left_out = {"parse_rate", "score_histogram", "mean_score"}  # these are of single votes
    alone, beside = metrics(PERFECT, INVERTED), metrics(PERFECT, prompt, INVERTED)
    for name in alone.keys() - left_out:
        assert beside[name] == alone[name], name


def test_a_score_is_the_mean_of_the_readable_votes() -> None:
    # a: (4+4)/2 = 4 beats b: (4+4+3)/3 = 3.67; counted as zero the unreadable vote makes it 2.67.
    found = metrics({"a": (0, [4.0, None, 4.0]), "b": (1, [4.0, 4.0, 3.0])})
    assert found["pairwise_accuracy"] == 1.0
    assert found["parse_rate"] == 0.8333
    # (4+4+4+4+3)/5
    assert found["mean_score"] == 3.8


def test_expected_scores_are_taken_by_order_rounded_for_the_histogram_and_never_perfect() -> None:
    """The best reply's votes say 5 and are expected to be 4.6 and 4.8; the other's 4, 4.4."""
    group = [RankedReply("p", "q", "a", "", 0), RankedReply("p", "q", "b", "", 1)]
    votes = [
        Judgement("a", 0, "", 4.6, sampled_score=5.0),
        Judgement("a", 1, "", 4.8, sampled_score=5.0),
        Judgement("b", 0, "", 4.4, sampled_score=4.0),
        Judgement("b", 1, "", None),
    ]
    found = judge_metrics([group], votes, best_score=5.0)
    assert found["score_histogram"] == {"4": 1, "5": 2, "unreadable": 1}
    assert found["five_best"] == 1.0
    assert found["exact_match"] == found["pairwise_accuracy"] == 1.0
    assert found["mean_score"] == 4.6  # (4.6 + 4.8 + 4.4) / 3
    votes[0] = Judgement("a", 0, "", 4.6, sampled_score=4.0)  # the mean is 4.5: not perfect
    assert judge_metrics([group], votes, best_score=5.0)["five_best"] is None


def test_the_histogram_counts_single_votes() -> None:
    votes = [4.0, 0.0, None, 4.0, 3.5, 10.0, None]
    assert list(histogram(votes).items()) == [
        ("0", 1),
        ("3.5", 1),
        ("4", 2),
        ("10", 1),
        ("unreadable", 2),
    ]


def test_the_histogram_loses_no_vote_to_rounding() -> None:
    assert histogram([3.3333333, 3.33333334, 3.0]) == {"3": 1, "3.33333": 2, "unreadable": 0}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"4": 8, "3": 2, "unreadable": 0}, "4"),
        ({"4": 79, "3": 21, "unreadable": 0}, None),
        ({"0": 10, "unreadable": 0}, "0"),
        ({"4": 4, "unreadable": 96}, "4"),  # of the readable ones
        ({"3": 4, "4": 4, "unreadable": 92}, None),
        ({"unreadable": 10}, None),
        ({}, None),
    ],
)
def test_collapse_is_one_score_for_four_fifths(
    counts: dict[str, int], expected: str | None
) -> None:
    assert collapsed_score(counts) == expected


# --- properties -------------------------------------------------------------------------------

replies = st.lists(
    st.tuples(st.integers(0, 3), st.none() | st.sampled_from([0.0, 1.0, 2.5, 4.0, 5.0])),
    min_size=1,
    max_size=5,
)


def grouped(
    prompts: list[list[tuple[int, float | None]]],
) -> tuple[list[list[RankedReply]], list[Judgement]]:
    groups = [
        [RankedReply(f"p{i}", "q", f"p{i}r{j}", "", rank) for j, (rank, _) in enumerate(rows)]
        for i, rows in enumerate(prompts)
    ]
    judgements = [
        Judgement(f"p{i}r{j}", 0, "", score)
        for i, rows in enumerate(prompts)
        for j, (_, score) in enumerate(rows)
    ]
    return groups, judgements


@settings(max_examples=60, deadline=None)
@given(st.lists(replies, max_size=4), st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(
    prompts: list[list[tuple[int, float | None]]], seed: int
) -> None:
    groups, judgements = grouped(prompts)
    before = judge_metrics(groups, judgements, best_score=5.0)
    rng = random.Random(seed)
    shuffled = [rng.sample(group, len(group)) for group in rng.sample(groups, len(groups))]
    votes = rng.sample(judgements, len(judgements))
    assert judge_metrics(shuffled, votes, best_score=5.0) == before


@settings(max_examples=60, deadline=None)
@given(st.lists(replies, min_size=1, max_size=4))
def test_rates_are_rates_and_a_mirrored_judge_has_the_mirrored_accuracy(
    prompts: list[list[tuple[int, float | None]]],
) -> None:
    groups, judgements = grouped(prompts)
    found = judge_metrics(groups, judgements, best_score=5.0)
    for name in ("pairwise_accuracy", "five_best", "exact_match", "parse_rate", "tie_rate"):
        assert found[name] is None or 0 <= found[name] <= 1
    for name in ("spearman", "kendall"):
        assert found[name] is None or -1 <= found[name] <= 1
    assert sum(found["score_histogram"].values()) == len(judgements)

    mirrored = [
        Judgement(row.candidate_id, 0, "", None if row.score is None else 5 - row.score)
        for row in judgements
    ]
    mirror = judge_metrics(groups, mirrored, best_score=5.0)
    if found["pairwise_accuracy"] is not None:
        total = found["pairwise_accuracy"] + mirror["pairwise_accuracy"]
        assert total == pytest.approx(1, abs=2e-4)  # both are rounded
        assert found["kendall"] == pytest.approx(-mirror["kendall"], abs=2e-4)
