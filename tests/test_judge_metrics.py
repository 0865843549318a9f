"""The judge metrics, with the arithmetic beside each expected number."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from srlm_lite.evaluate.intervals import Terms, interval, ratio, share_interval
from srlm_lite.evaluate.judge_metrics import (
    calibration,
    collapsed_score,
    disagreements,
    histogram,
    judge_metrics,
    share_in_gold_order,
)
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
    assert list(histogram([Judgement("a", i, "", v) for i, v in enumerate(votes)]).items()) == [
        ("0", 1),
        ("3.5", 1),
        ("4", 2),
        ("10", 1),
        ("unreadable", 2),
    ]


def test_the_histogram_loses_no_vote_to_rounding() -> None:
    votes = [Judgement("a", i, "", v) for i, v in enumerate((3.3333333, 3.33333334, 3.0))]
    assert histogram(votes) == {"3": 1, "3.33333": 2, "unreadable": 0}


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


# --- intervals ----------------------------------------------------------------------------------


def test_wilson_s_interval_by_hand() -> None:
    """One observation a prompt, so no design effect: p = .9 of n = 20, t(19) = 2.0930.

    Centre (p + z^2/2n) / (1 + z^2/n), half-width z sqrt(pq/n + z^2/4n^2) / (1 + z^2/n).
    """
    z, n, p = 2.0930, 20, 0.9
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    found = share_interval([(float(i > 1), 1.0) for i in range(20)])
    assert found == pytest.approx([centre - half, centre + half], abs=1e-4)


def draw(rng: np.random.Generator, prompts: int, pairs: int, p: float, alike: float) -> Terms:
    """Right and all pairs of each prompt; `alike` is the correlation within a prompt."""
    chances = np.full(prompts, p)
    if alike:
        a = (1 - alike) / alike
        chances = rng.beta(p * a, (1 - p) * a, prompts)
    sizes = rng.integers(max(1, pairs // 2), pairs + 1, prompts)
    return list(zip(rng.binomial(sizes, chances).tolist(), sizes.tolist(), strict=True))


@pytest.mark.parametrize(("prompts", "pairs", "alike"), [(40, 1, 0), (40, 6, 0.2), (20, 15, 0.3)])
@pytest.mark.parametrize("p", [0.5, 0.97])
def test_an_interval_of_a_share_holds_the_truth_as_often_as_it_says(
    prompts: int, pairs: int, alike: float, p: float
) -> None:
    """1,500 repetitions: 95% of them is 1,425, give or take 8; below 93% the figure is a lie."""
    rng = np.random.default_rng(7)
    hits = [
        low <= p <= high
        for _ in range(1500)
        for low, high in [share_interval(draw(rng, prompts, pairs, p, alike)) or (1.0, 0.0)]
    ]
    assert np.mean(hits) > 0.93
    if (prompts, p, pairs) == (40, 0.97, 1):  # where resampling does not: that is what it was
        drawn = [interval(draw(rng, prompts, pairs, p, alike)) or [1.0, 0.0] for _ in range(100)]
        assert np.mean([low <= p <= high for low, high in drawn]) < 0.85


def test_a_share_has_a_width_where_all_prompts_agree() -> None:
    low, high = share_interval([(6.0, 6.0)] * 40) or (0.0, 0.0)
    # All of a prompt alike, so 40 observations: 1 / (1 + t(39)^2 / 40), t(39) = 2.0227.
    assert (low, high) == (pytest.approx(1 / (1 + 2.0227**2 / 40), abs=1e-4), 1.0)
    assert share_interval([(1, 1), (0, 0)]) is None


def test_an_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    # 100 prompts, half of them right: standard error sqrt(.25 / 100) = .05, times 1.96 is .098.
    terms = [(float(i % 2), 1.0) for i in range(100)]
    low, high = interval(terms) or (0.0, 0.0)
    assert low == pytest.approx(0.402, abs=0.015)
    assert high == pytest.approx(0.598, abs=0.015)
    assert interval(terms) == [low, high]  # drawn with a fixed seed


def test_prompts_are_drawn_with_all_their_pairs() -> None:
    # Of 2 and 6 pairs: (2 + 0) / (2 + 6) = .25. Drawn twice, the first gives 4 / 4, the other 0.
    assert ratio([(2, 2), (0, 6)]) == 0.25
    assert interval([(2, 2), (0, 6)]) == [0.0, 1.0]
    # A prompt's numerator stays with its denominator: the ratio of each is one half.
    assert interval([(1, 2), (10, 20), (3, 6), (40, 80)]) == [0.5, 0.5]


def test_what_does_not_count_is_not_drawn_and_one_prompt_has_no_interval() -> None:
    assert interval([(1, 1), (0, 0)]) is None
    assert interval([(1, 1), (0, 0), (1, 1)]) == [1.0, 1.0]


def test_judge_metrics_have_intervals_on_request() -> None:
    groups = [
        [RankedReply(f"p{i}", "q", f"{i}/{r}", "text", r) for r in range(2)] for i in range(10)
    ]
    # Right on even prompts, wrong on odd ones.
    votes = [
        Judgement(f"{i}/{r}", 0, "", float(1 + (r + i + 1) % 2)) for i in range(10) for r in (0, 1)
    ]
    found = judge_metrics(groups, votes, best_score=2.0, with_intervals=True)
    assert found["pairwise_accuracy"] == 0.5
    # Wilson of 5 of 10 with t(9) = 2.2622: .5 -+ 2.2622 sqrt(.025 + .0128) / (1 + .5118).
    assert found["intervals"]["pairwise_accuracy"] == pytest.approx([0.2092, 0.7908], abs=1e-3)
    assert found["intervals"]["parse_rate"][1] == 1.0
    assert found["intervals"]["order_consistency"] is None
    assert "intervals" not in judge_metrics(groups, votes, best_score=2.0)


# --- order consistency, length, calibration -----------------------------------------------------


def test_order_consistency_is_between_votes() -> None:
    # Votes on a: 4, 4, 1; on b: 2, 3, 3. Verdicts a, a, b: of the three pairs of votes one agrees.
    assert metrics({"a": (0, [4, 4, 1]), "b": (1, [2, 3, 3])})["order_consistency"] == 0.3333
    # A tie or an unreadable vote is no verdict.
    assert metrics({"a": (0, [4, 3, 4]), "b": (1, [2, 3, 3])})["order_consistency"] == 1.0
    assert metrics({"a": (0, [4, None, 4]), "b": (1, [2, 3, 5])})["order_consistency"] == 0.0
    assert metrics({"a": (0, [4]), "b": (1, [2])})["order_consistency"] is None


def test_length_correlation_of_judge_and_people() -> None:
    # The judge scores by length (names are the texts), people the other way round.
    found = metrics({"a": (0, 1.0), "bb": (1, 2.0), "ccc": (2, 5.0)})
    assert found["length_correlation"] == {"judge": 1.0, "people": -1.0}


def quality(*replies: tuple[float | None, float | None]) -> dict[str, Any] | None:
    """Calibration of replies given as (human quality, judge's score), on a scale of 0 to 5."""
    group = [RankedReply("p", "q", f"r{i}", "x", 0, human) for i, (human, _) in enumerate(replies)]
    votes = [Judgement(f"r{i}", 0, "", score) for i, (_, score) in enumerate(replies)]
    return calibration([group], votes, scale=(0.0, 5.0))


def test_calibration_is_by_score_in_points() -> None:
    # The human scale from .2 to .8 becomes 0 to 5: .2 -> 0, .5 -> 2.5, .8 -> 5.
    found = quality((0.2, 1.0), (0.5, 1.0), (0.8, 4.0), (0.5, None))
    assert found is not None
    assert found["bins"] == {
        "1": {"replies": 2, "score": 1.0, "human": 1.25},
        "4": {"replies": 1, "score": 4.0, "human": 5.0},
    }
    assert found["error"] == 0.5  # (2 * .25 + 1 * 1) / 3
    assert found["replies"] == 3
    # Scores 1, 1, 4 and points 0, 2.5, 5: deviations -1, -1, 2 and -2.5, 0, 2.5;
    # 7.5 / sqrt(6 * 12.5) = .866.
    assert found["pearson"] == 0.866


def test_without_a_quality_there_is_no_calibration() -> None:
    assert quality((None, 3.0), (None, 4.0)) is None
    assert quality((0.5, 3.0), (0.5, 4.0)) is None
    assert quality((0.1, None), (0.5, None)) is None


def test_a_judge_s_grades_of_answers_to_different_prompts_beside_gold() -> None:
    gold = {"a": 5.0, "b": 3.0, "c": 3.0, "d": 1.0}
    # Gold tells five pairs apart: a above b, c and d; b above d; the tie of c and d is half.
    scores = {"a": 4.0, "b": 3.5, "c": 2.0, "d": 2.0}
    assert share_in_gold_order(scores, gold) == 0.9
    # Unreadable: half right against each of the three others.
    assert share_in_gold_order({**scores, "a": None}, gold) == 0.6
    assert share_in_gold_order({"b": 1.0, "c": 2.0}, gold) is None


def test_disagreements_are_pairs_in_the_other_order_the_widest_first() -> None:
    ranks = {"a": 0, "b": 1, "c": 1, "d": 2}
    group = [RankedReply("p", "q", name, name, rank) for name, rank in ranks.items()]
    scores = {"a": 2.0, "b": 5.0, "c": 3.0, "d": None}
    votes = [Judgement(name, 0, "", score) for name, score in scores.items()]
    found = disagreements([group], votes)
    # b and c are alike to people, d cannot be read.
    assert [(one.better.response_id, one.worse.response_id, one.gap) for one in found] == [
        ("a", "b", 3.0),
        ("a", "c", 1.0),
    ]
    assert (found[0].better_score, found[0].worse_score) == (2.0, 5.0)
