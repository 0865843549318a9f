"""Scores become preference pairs, by hand-worked examples; nothing is left out uncounted."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srlm_lite.errors import UserError
from srlm_lite.judging import mean_scores, unasked, votes_by_candidate
from srlm_lite.methods import method_of
from srlm_lite.pairing import (
    CANDIDATE_REASONS,
    JUDGE,
    PROMPT_REASONS,
    Drops,
    Regraded,
    accumulated,
    as_newest_judge_has_it,
    at_iteration,
    flipped,
    is_of_judgements,
    length_penalty,
    mean_length_gap,
    pairs_of,
    replay_age,
    replayed,
    usable_candidates,
    weighted_by_gap,
)
from srlm_lite.recipe import Recipe, recipe_from
from srlm_lite.records import Candidate, FinishReason, Judgement, PreferencePair, Prompt
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Dpo, Pairing
from srlm_lite.stages.at_work import AtWork
from srlm_lite.stages.learning import beside_new_ones

DEFAULT = Pairing()

Votes = Sequence[float | None]


def case(
    *answers: tuple[str, Votes] | tuple[str, Votes, FinishReason], prompt_id: str = "p"
) -> tuple[Prompt, list[Candidate], list[Judgement]]:
    """A prompt with its answers: text, votes, and how it ended ("stop" unless said)."""
    candidates, judgements = [], []
    for i, (text, votes, *end) in enumerate(answers):
        name = f"{prompt_id}#{i}"
        candidates.append(Candidate(prompt_id, name, text, len(text), end[0] if end else "stop"))
        judgements += [Judgement(name, k, "", score) for k, score in enumerate(votes)]
    return Prompt(prompt_id, f"question {prompt_id}"), candidates, judgements


def make_pairs(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
    *,
    pairing: Pairing,
    min_votes: int,
    seed: int,
    iteration: int = 1,
) -> tuple[list[PreferencePair], Drops]:
    usable, drops = usable_candidates(
        prompts,
        candidates,
        mean_scores(judgements, min_votes=min_votes),
        votes=votes_by_candidate(judgements),
        drop_truncated=pairing.drop_truncated,
    )
    return pairs_of(prompts, usable, drops, pairing=pairing, seed=seed, iteration=iteration)


def made(
    *cases: tuple[Prompt, list[Candidate], list[Judgement]],
    pairing: Pairing = DEFAULT,
    min_votes: int = 2,
    seed: int = 0,
    iteration: int = 1,
) -> tuple[list[PreferencePair], Drops]:
    return make_pairs(
        [prompt for prompt, _, _ in cases],
        [row for _, candidates, _ in cases for row in candidates],
        [row for _, _, judgements in cases for row in judgements],
        pairing=pairing,
        min_votes=min_votes,
        seed=seed,
        iteration=iteration,
    )


def reasons(drops: Drops) -> dict[str, int]:
    return {reason: count for reason, count in drops.prompts.items() if count}


def candidate_reasons(drops: Drops) -> dict[str, int]:
    return {reason: count for reason, count in drops.candidates.items() if count}


# --- highest against lowest -------------------------------------------------------------------


def test_the_highest_mean_is_chosen_and_the_lowest_rejected() -> None:
    # Means: (3+3+3)/3 = 3, (5+4+3)/3 = 4, (1+2+0)/3 = 1, (2+2+5)/3 = 3.
    found, drops = made(
        case(("a", (3, 3, 3)), ("b", (5, 4, 3)), ("c", (1, 2, 0)), ("d", (2, 2, 5)))
    )
    assert found == [
        PreferencePair(
            prompt_id="p",
            prompt="question p",
            chosen_id="p#1",
            rejected_id="p#2",
            chosen="b",
            rejected="c",
            chosen_score=4.0,
            rejected_score=1.0,
        )
    ]
    assert reasons(drops) == candidate_reasons(drops) == {}


def test_the_mean_decides_and_not_a_single_vote() -> None:
    # (5+0+0)/3 = 1.67 has the highest vote and loses against (2+2+2)/3 = 2.
    [pair], _ = made(case(("spiky", (5, 0, 0)), ("steady", (2, 2, 2))))
    assert (pair.chosen, pair.rejected) == ("steady", "spiky")


def test_unreadable_votes_do_not_pull_a_mean() -> None:
    # (4+4)/2 = 4 with one vote unreadable beats (4+4+3)/3 = 3.67; as a zero it would be 2.67.
    [pair], _ = made(case(("a", (4, None, 4)), ("b", (4, 4, 3))))
    assert (pair.chosen, pair.chosen_score) == ("a", 4.0)


def test_a_score_of_zero_is_a_score() -> None:
    [pair], drops = made(case(("a", (0, 0)), ("b", (1, 1))))
    assert (pair.chosen, pair.rejected, pair.rejected_score) == ("b", "a", 0.0)
    assert reasons(drops) == {}


def test_negative_scores_keep_their_order() -> None:
    [pair], _ = made(case(("a", (-2, -2)), ("b", (-1, -1))))
    assert (pair.chosen, pair.rejected) == ("b", "a")


def test_among_equal_scores_the_earlier_candidate_counts() -> None:
    [pair], _ = made(case(("a", (1, 1)), ("b", (4, 4)), ("c", (4, 4)), ("d", (1, 1))))
    assert (pair.chosen_id, pair.rejected_id) == ("p#1", "p#0")


def test_the_order_of_votes_does_not_matter() -> None:
    # The same three tenths in another order must not differ by a rounding error and make a pair.
    found, drops = made(case(("a", (0.1, 0.2, 0.3)), ("b", (0.3, 0.2, 0.1))))
    assert found == []
    assert reasons(drops) == {"tied": 1}


def test_judgements_belong_to_candidates_by_id_not_by_place() -> None:
    prompt, candidates, judgements = case(("a", (1, 2)), ("b", (4, 5)))
    [pair], _ = make_pairs(
        [prompt], candidates, judgements[::-1], pairing=Pairing(), min_votes=2, seed=0
    )
    assert (pair.chosen, pair.chosen_score) == ("b", 4.5)


def test_prompts_keep_to_their_own_candidates_and_order() -> None:
    first = case(("a", (1, 1)), ("b", (2, 2)), prompt_id="p")
    second = case(("c", (5, 5)), ("d", (4, 4)), prompt_id="q")
    found, _ = made(second, first)
    assert [(pair.prompt_id, pair.chosen, pair.rejected) for pair in found] == [
        ("q", "c", "d"),
        ("p", "b", "a"),
    ]


# --- ties and gaps ----------------------------------------------------------------------------


def test_equal_scores_give_no_pair() -> None:
    found, drops = made(case(("a", (3, 3)), ("b", (2, 4)), ("c", (4, 2))))
    assert found == []
    assert reasons(drops) == {"tied": 1}


@pytest.mark.parametrize(("gap", "expected"), [(0.0, 1), (0.4, 1), (0.5, 0), (0.6, 0)])
def test_scores_must_differ_by_more_than_the_gap(gap: float, expected: int) -> None:
    # Means 3.5 and 3.0: they differ by 0.5, which is not more than 0.5.
    found, drops = made(case(("a", (3, 4)), ("b", (3, 3))), pairing=Pairing(min_gap=gap))
    assert len(found) == expected
    assert reasons(drops) == ({} if expected else {"narrow": 1})


# --- candidates that cannot be used -----------------------------------------------------------


def test_truncated_candidates_are_left_out() -> None:
    found, drops = made(case(("a", (5, 5), "length"), ("b", (4, 4)), ("c", (1, 1))))
    assert [pair.chosen for pair in found] == ["b"]
    assert candidate_reasons(drops) == {"truncated": 1}


def test_truncated_candidates_stay_where_the_recipe_keeps_them() -> None:
    found, drops = made(
        case(("a", (5, 5), "length"), ("b", (4, 4)), ("c", (1, 1))),
        pairing=Pairing(drop_truncated=False),
    )
    assert [pair.chosen for pair in found] == ["a"]
    assert candidate_reasons(drops) == {}


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000"])
def test_empty_answers_are_never_in_a_pair(text: str) -> None:
    found, drops = made(case((text, (5, 5)), ("b", (1, 1))))
    assert found == []
    assert reasons(drops) == candidate_reasons(drops) == {"empty": 1}


def test_the_same_text_counts_once_with_its_first_scores() -> None:
    # The twins are scored 4 and 0: without this, one text would be chosen and rejected at once.
    found, drops = made(case(("twin", (4, 4)), ("twin", (0, 0)), ("b", (2, 2))))
    assert [(pair.chosen_id, pair.rejected_id) for pair in found] == [("p#0", "p#2")]
    assert candidate_reasons(drops) == {"duplicate": 1}


def test_only_copies_of_one_text_give_no_pair() -> None:
    found, drops = made(case(*[("same", (k, k)) for k in range(4)]))
    assert found == []
    assert reasons(drops) == {"duplicate": 1}
    assert candidate_reasons(drops) == {"duplicate": 3}


def test_a_copy_of_an_unreadable_candidate_stands_in_for_it() -> None:
    found, drops = made(case(("twin", (None, None)), ("twin", (4, 4)), ("b", (2, 2))))
    assert [(pair.chosen_id, pair.rejected_id) for pair in found] == [("p#1", "p#2")]
    assert candidate_reasons(drops) == {"unreadable": 1}


def test_the_same_text_under_two_prompts_is_no_duplicate() -> None:
    found, _ = made(
        case(("yes", (4, 4)), ("no", (1, 1)), prompt_id="p"),
        case(("yes", (1, 1)), ("no", (4, 4)), prompt_id="q"),
    )
    assert [pair.chosen for pair in found] == ["yes", "no"]


def test_no_readable_vote_and_too_few_of_them_are_told_apart() -> None:
    found, drops = made(
        case(("a", (None, None, None)), ("b", (3, None, None)), ("c", (3, None, 3)))
    )
    assert found == []
    assert candidate_reasons(drops) == {"unreadable": 1, "too_few_votes": 1}


@pytest.mark.parametrize(("min_votes", "expected"), [(1, 1), (2, 0), (3, 0)])
def test_the_recipe_says_how_many_votes_are_enough(min_votes: int, expected: int) -> None:
    found, _ = made(case(("a", (5, None, None)), ("b", (1, 1, 1))), min_votes=min_votes)
    assert len(found) == expected


def test_a_candidate_that_was_never_judged_is_unreadable() -> None:
    found, drops = made(case(("a", ()), ("b", (1, 1))))
    assert found == []
    assert reasons(drops) == {"unreadable": 1}


@pytest.mark.parametrize(
    ("answers", "main"),
    [
        # The most frequent reason among the candidates is the prompt's.
        ([("a", (), "length"), ("b", (), "length"), ("", ()), ("c", (1, 1))], "truncated"),
        ([("a", (), "length"), ("", ()), ("", ()), ("c", (1, 1))], "empty"),
        ([("a", (), "length"), ("c", (1, 1)), ("c", (1, 1)), ("c", (2, 2))], "duplicate"),
        ([("a", (None,)), ("b", (None,)), ("c", (1, None)), ("d", (1, 1))], "unreadable"),
        ([("a", (None,)), ("b", (1, None)), ("c", (1, None)), ("d", (1, 1))], "too_few_votes"),
        # Equally frequent: the one that is asked first.
        ([("", (), "length"), ("", ()), ("c", (1, 1))], "truncated"),
        ([("a", (1, None)), ("b", (None, None)), ("c", (1, 1))], "unreadable"),
    ],
)
def test_a_prompt_is_counted_under_its_main_reason(
    answers: list[tuple[str, Votes]], main: str
) -> None:
    found, drops = made(case(*answers))
    assert found == []
    assert reasons(drops) == {main: 1}


# --- what is told of drops --------------------------------------------------------------------


def test_drops_json_carries_every_reason() -> None:
    _, drops = made(case(("a", (3, 3)), ("b", (3, 3))), case(("a", (1, 1)), prompt_id="q"))
    told = json.loads(json.dumps(drops.to_json()))
    for reason in ("tied", "unreadable", "too_few_votes", "duplicate", "truncated", "too_long"):
        assert isinstance(told[reason], int)
    assert set(told) == {*PROMPT_REASONS, "candidates"}
    assert set(told["candidates"]) == set(CANDIDATE_REASONS)
    assert told["tied"] == 1


def test_the_summary_names_reasons_by_frequency_and_no_zeros() -> None:
    drops = Drops()
    assert drops.summary() == ""
    drops.prompts.update({"too_long": 0, "tied": 3, "duplicate": 5})
    assert drops.summary() == "5 duplicate, 3 tied"


# --- the random control -----------------------------------------------------------------------

RANDOM = Pairing(source="random")


def crowd(prompt_id: str) -> tuple[Prompt, list[Candidate], list[Judgement]]:
    return case(*[(f"{prompt_id} {k}", (k, k)) for k in range(5)], prompt_id=prompt_id)


def test_random_pairs_are_fixed_by_the_seed() -> None:
    cases = [crowd(f"p{i}") for i in range(30)]
    first, _ = made(*cases, pairing=RANDOM, seed=1)
    assert made(*cases, pairing=RANDOM, seed=1)[0] == first
    assert made(*cases, pairing=RANDOM, seed=2)[0] != first


def test_random_pairs_do_not_depend_on_the_prompts_beside_them() -> None:
    cases = [crowd(f"p{i}") for i in range(10)]
    every = {pair.prompt_id: pair for pair in made(*cases, pairing=RANDOM)[0]}
    backwards = made(*cases[::-1], pairing=RANDOM)[0]
    assert {pair.prompt_id: pair for pair in backwards} == every
    [alone], _ = made(cases[7], pairing=RANDOM)
    assert alone == every["p7"]


def test_random_pairs_are_blind_to_the_score() -> None:
    # 400 prompts: the better one is chosen in half of them, give or take 4 sigma (40).
    found, _ = made(*[crowd(f"p{i}") for i in range(400)], pairing=RANDOM)
    better = sum(pair.chosen_score > pair.rejected_score for pair in found)
    assert 160 < better < 240
    assert all(pair.chosen_id != pair.rejected_id for pair in found)


def test_random_pairs_take_usable_candidates_only() -> None:
    cases = [
        case(
            ("long", (5, 5), "length"),
            ("", (5, 5)),
            ("mute", (None, None)),
            ("a", (1, 1)),
            ("a", (2, 2)),
            ("b", (1, 1)),
            prompt_id=f"p{i}",
        )
        for i in range(20)
    ]
    found, drops = made(*cases, pairing=RANDOM)
    assert len(found) == 20  # equal scores are no tie to the control
    assert {frozenset((pair.chosen, pair.rejected)) for pair in found} == {frozenset("ab")}
    assert reasons(drops) == {}


def test_random_pairs_are_dropped_for_the_same_reasons() -> None:
    found, drops = made(case(("a", (1, 1)), ("b", (1, None))), pairing=RANDOM)
    assert found == []
    assert reasons(drops) == {"too_few_votes": 1}


# --- properties -------------------------------------------------------------------------------

answers = st.lists(
    st.tuples(
        st.sampled_from(["", " ", "a", "b", "c", "d"]),
        st.lists(st.none() | st.sampled_from([0.0, 1.0, 2.5, 5.0]), max_size=4),
        st.sampled_from(["stop", "length"]),
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(answers, max_size=4),
    st.builds(
        Pairing,
        source=st.sampled_from(["judge", "random"]),
        min_gap=st.sampled_from([0.0, 1.0]),
        drop_truncated=st.booleans(),
    ),
    st.integers(1, 3),
)
def test_every_prompt_gives_a_pair_or_exactly_one_reason(
    prompts: list[list[tuple[str, Votes, FinishReason]]], pairing: Pairing, min_votes: int
) -> None:
    cases = [case(*rows, prompt_id=f"p{i}") for i, rows in enumerate(prompts)]
    found, drops = made(*cases, pairing=pairing, min_votes=min_votes)
    assert len(found) + sum(drops.prompts.values()) == len(prompts)
    assert set(drops.prompts) <= set(PROMPT_REASONS)
    assert len({pair.prompt_id for pair in found}) == len(found)

    votes = {c.candidate_id: [] for _, candidates, _ in cases for c in candidates}
    for _, _, judgements in cases:
        for judgement in judgements:
            votes[judgement.candidate_id].append(judgement.score)
    rows = {c.candidate_id: c for _, candidates, _ in cases for c in candidates}
    for pair in found:
        chosen, rejected = rows[pair.chosen_id], rows[pair.rejected_id]
        assert chosen.prompt_id == rejected.prompt_id == pair.prompt_id
        assert (pair.chosen, pair.rejected) == (chosen.text, rejected.text)
        assert pair.chosen != pair.rejected
        for row, score in ((chosen, pair.chosen_score), (rejected, pair.rejected_score)):
            assert row.text.strip()
            assert not (pairing.drop_truncated and row.finish_reason == "length")
            readable = [vote for vote in votes[row.candidate_id] if vote is not None]
            assert len(readable) >= min_votes
            assert min(readable) <= score <= max(readable)
        if pairing.source == "judge":
            assert pair.chosen_score - pair.rejected_score > pairing.min_gap


# --- the method -------------------------------------------------------------------------------


def method_pairs(
    recipe: Recipe, t: int, case: tuple[Prompt, list[Candidate], list[Judgement]]
) -> Sequence[PreferencePair]:
    """What the recipe's method makes of a case; neither files nor a base are needed for it."""
    prompt, candidates, judgements = case
    run = RunDir(Path("nowhere"))
    session, place = Session(recipe, run), run.iteration(t)
    it = AtWork(session, place)
    pairs, _, _ = method_of(recipe).make_pairs(it, [prompt], candidates, judgements)
    return pairs


def test_the_self_rewarding_method_follows_the_recipe() -> None:
    raw = {"name": "t", "base": {"name": "b"}, "data": {"dir": "d"}}
    rows = case(("a", (1, None)), ("b", (3, 3)), ("c", (2, 2)))
    for min_votes, rejected in ((1, "a"), (2, "c")):
        recipe = recipe_from({**raw, "judge": {"min_votes": min_votes}}, where="t")
        [pair] = method_pairs(recipe, 1, rows)
        assert (pair.chosen, pair.rejected) == ("b", rejected)


def test_the_control_draws_anew_in_every_iteration() -> None:
    raw = {"name": "t", "base": {"name": "b"}, "data": {"dir": "d"}}
    recipe = recipe_from({**raw, "pairing": {"source": "random"}}, where="t")
    drawn = {method_pairs(recipe, t, crowd("p"))[0].chosen_id for t in range(20)}
    assert len(drawn) > 1


def test_gold_pairs_take_the_scorer_in_the_judge_s_place() -> None:
    raw = {"name": "t", "base": {"name": "b"}, "data": {"dir": "d"}}
    rows = case(("a", (5, 5)), ("b\nb", (0, 0)), ("c c c", (3, 3)))
    recipe = recipe_from(
        {**raw, "pairing": {"source": "gold"}, "evaluate": {"gold": f"{__name__}:words_in"}},
        where="t",
    )
    [pair] = method_pairs(recipe, 1, rows)
    assert (pair.chosen, pair.rejected, pair.chosen_score) == ("c c c", "a", 3.0)
    with pytest.raises(UserError, match=r"pairing\.source=gold needs evaluate\.gold"):
        method_pairs(recipe_from({**raw, "pairing": {"source": "gold"}}, where="t"), 1, rows)


def words_in(prompt: str, response: str) -> float:
    return float(len(response.split()))


# --- length control ---------------------------------------------------------------------------


def test_rho_takes_the_shortest_good_and_the_longest_bad() -> None:
    # Scores 0 to 5, rho 0.2: chosen from 4 on, rejected up to 1.
    rows = case(
        ("long best " * 9, (5, 5)),
        ("good", (4, 4)),
        ("short", (3, 3)),
        ("bad and rather long", (1, 1)),
        ("worst", (0, 0)),
    )
    [plain], _ = made(rows)
    assert (plain.chosen_score, plain.rejected_score) == (5, 0)
    [pair], _ = made(rows, pairing=Pairing(rho=0.2))
    assert (pair.chosen, pair.rejected) == ("good", "bad and rather long")
    assert (pair.chosen_score, pair.rejected_score) == (4, 1)
    # 0.19: chosen from 4.05 on, rejected up to 0.95.
    [pair], _ = made(rows, pairing=Pairing(rho=0.19))
    assert (pair.chosen_score, pair.rejected_score) == (5, 0)


def test_rho_may_differ_between_iterations() -> None:
    rows = case(("long best " * 9, (5, 5)), ("good", (4, 4)), ("worst", (0, 0)))
    pairing = Pairing(rho=(0, 0.2))
    chosen = [made(rows, pairing=pairing, iteration=t)[0][0].chosen for t in (1, 2, 3)]
    assert chosen == [("long best " * 9), "good", "good"]


def test_alpha_lowers_scores_by_length_for_the_choice_only() -> None:
    # 5 - 0.1 * 20 = 3 < 4 - 0.1 * 4 = 3.6; the worst: 1 - 0.1 * 3 = 0.7, 2 - 0.1 * 15 = 0.5.
    rows = case(("b" * 20, (5, 5)), ("good", (4, 4)), ("bad", (1, 1)), ("d" * 15, (2, 2)))
    [pair], _ = made(rows, pairing=Pairing(alpha=0.1))
    assert (pair.chosen_score, pair.rejected_score) == (4, 2)


def test_alpha_is_found_where_the_mean_length_gap_vanishes() -> None:
    # Each prompt: a 5 of 30 characters, a 4 of 10, a 1 of 10, a 0 of 5. Chosen minus rejected is
    # 25 without a penalty. From 5 - 30 a < 4 - 10 a on, a > 0.05, the 4 is chosen: gap 5. The 0
    # stays the worst until -5 a > 1 - 10 a, a > 0.2; from there on the gap is 0. But also
    # 1 - 10 a > 5 - 30 a from 0.2 on: the long 5 is the worst then, and the gap is 10 - 30 = -20.
    rows = [
        case(
            ("a" * 30, (5, 5)), ("b" * 10, (4, 4)), ("c" * 10, (1, 1)), ("d" * 5, (0, 0)),
            prompt_id=name,
        )
        for name in "pq"
    ]  # fmt: skip
    found, _ = made(*rows, pairing=Pairing(alpha="auto"))
    assert [(len(pair.chosen), len(pair.rejected)) for pair in found] == [(10, 5), (10, 5)]
    groups = [
        [(Candidate("p", str(i), "x" * n, n, "stop"), s) for i, (n, s) in enumerate(shape)]
        for shape in (((30, 5.0), (10, 4.0), (5, 0.0)), ((5, 5.0), (10, 1.0)))
    ]
    # 25 - 5 = 20, mean 10, without; with alpha > 0.05 it is 5 - 5 = 0.
    alpha = length_penalty(groups, Pairing(alpha="auto"))
    assert alpha == pytest.approx(0.05, abs=1e-6)
    assert mean_length_gap(groups, 0.0) == 10
    assert mean_length_gap(groups, alpha) == 0
    assert length_penalty(groups[1:], Pairing(alpha="auto")) == 0.0  # chosen is shorter anyway


def test_a_pair_that_the_penalty_turns_round_is_one() -> None:
    # 5 - 0.1 * 40 = 1 against 4 - 0.1 * 10 = 3: DICE learns the short one over the long one.
    rows = case(("long" * 10, (5, 5)), ("s" * 10, (4, 4)))
    [pair], drops = made(rows, pairing=Pairing(alpha=0.1))
    assert (pair.chosen_score, pair.rejected_score) == (4, 5)
    assert reasons(drops) == {}
    # The gap of what ranks is 2, and that is what `min_gap` asks for.
    assert made(rows, pairing=Pairing(alpha=0.1, min_gap=1.9))[0] == [pair]
    none, drops = made(rows, pairing=Pairing(alpha=0.1, min_gap=2))
    assert (none, reasons(drops)) == ([], {"narrow": 1})


def test_length_alone_makes_no_pair() -> None:
    none, drops = made(case(("a" * 9, (3, 3)), ("b", (3, 3))), pairing=Pairing(alpha=0.1))
    assert (none, reasons(drops)) == ([], {"tied": 1})


def test_alpha_is_found_for_the_pairs_that_are_made() -> None:
    """A judge that likes length, with noise: 500 prompts, 4 replies, half of a point a unit."""
    rng = Random(0)
    cases = []
    for i in range(500):
        lengths = [rng.randint(20, 400) for _ in range(4)]
        scores = [round(min(5, max(0, n / 100 + rng.gauss(0, 1)))) for n in lengths]
        rows = [(f"{j}" * n, (s, s)) for j, (n, s) in enumerate(zip(lengths, scores, strict=True))]
        cases.append(case(*rows, prompt_id=f"p{i}"))

    def gap(**settings: Any) -> tuple[float, int]:
        found, _ = made(*cases, pairing=Pairing(**settings))
        return fmean(len(one.chosen) - len(one.rejected) for one in found), len(found)

    plain, kept = gap()
    assert plain > 100
    without, still = gap(alpha="auto")
    assert abs(without) < 3
    assert still == kept  # the same prompts: none is lost to the penalty


def test_a_reply_too_long_to_be_judged_is_a_reason_of_its_own() -> None:
    """Its question did not fit the judge's window: no vote was drawn, so none can be read."""
    prompt, candidates, _ = case(("long", ()), ("also long", ()), ("noise", ()), ("fine", (3,)))
    rows = [
        Judgement("p#0", 0, "", None, "length"),
        Judgement("p#1", 0, "", None, "length"),
        Judgement("p#2", 0, "I see no way to", None, "length", retried=True),
        Judgement("p#3", 0, "Score: 3", 3.0),
    ]
    assert unasked(rows) == {"p#0", "p#1"}
    found, drops = usable_candidates(
        [prompt], candidates, {"p#3": 3.0}, unasked=unasked(rows), drop_truncated=True
    )
    assert found == {} and reasons(drops) == {"too_long_to_judge": 1}
    assert candidate_reasons(drops) == {"too_long_to_judge": 2, "unreadable": 1}
    # A thought that ran into the limit is one that was asked for.
    assert not unasked([Judgement("p#0", 0, "", None, "length", thought="hm")])


# --- replay -----------------------------------------------------------------------------------


def numbered(prefix: str, n: int, origin: str = "") -> list[PreferencePair]:
    return [
        PreferencePair(f"{prefix}{i}", "p", "a", "b", "x", "y", 1, 0, origin=origin)
        for i in range(n)
    ]


def test_replay_takes_shares_of_the_new_pairs_from_each_iteration_back() -> None:
    # 20 new pairs: 0.3 of them is 6 of the last iteration, 0.15 is 3 of the one before.
    older = [numbered("last", 20) + numbered("r", 5, "replay, 1 back"), numbered("before", 20)]
    found = replayed(older, new=20, shares=(0.3, 0.15), seed=1)
    assert Counter(pair.origin for pair in found) == {"replay, 1 back": 6, "replay, 2 back": 3}
    assert {pair.prompt_id.rstrip("0123456789") for pair in found} == {"last", "before"}
    assert len({pair.prompt_id for pair in found}) == 9
    assert found == replayed(older, new=20, shares=(0.3, 0.15), seed=1)
    assert found != replayed(older, new=20, shares=(0.3, 0.15), seed=2)


def test_replay_takes_no_more_than_there_is() -> None:
    assert len(replayed([numbered("a", 4)], new=20, shares=(1.0, 1.0), seed=0)) == 4
    assert replayed([], new=20, shares=(1.0,), seed=0) == []


def test_all_pairs_so_far_are_those_that_were_new_once() -> None:
    # The last iteration had learned the first one's again: those come from the first one itself.
    last = [*numbered("new", 2), *numbered("q", 1, JUDGE), *numbered("first", 3, "replay, 1 back")]
    found = accumulated([last, numbered("first", 3)])
    assert [(one.prompt_id, one.origin) for one in found] == [
        ("new0", "replay, 1 back"),
        ("new1", "replay, 1 back"),
        ("q0", "judge, replay, 1 back"),
        *((f"first{i}", "replay, 2 back") for i in range(3)),
    ]
    assert [replay_age(one) for one in found] == [1, 1, 1, 2, 2, 2]
    assert [is_of_judgements(one.origin) for one in found] == [False, False, True, *[False] * 3]
    assert accumulated([found]) == accumulated([]) == []


def test_a_flipped_pair_is_the_other_way_round_in_all_that_it_has() -> None:
    one = PreferencePair("p", "text", "a", "b", "x", "y", 4, 1, chosen_ids=(1,), rejected_ids=(2,))
    turned = PreferencePair(
        "p", "text", "b", "a", "y", "x", 1, 4, chosen_ids=(2,), rejected_ids=(1,)
    )
    assert flipped(one) == turned and flipped(turned) == one


def test_pairs_count_by_their_gap() -> None:
    # Gaps 1, 1 and 4: a mean of 2. What a pair weighed before counts too.
    pairs = [*numbered("p", 2), replace(numbered("q", 1)[0], chosen_score=4, weight=0.5)]
    found = weighted_by_gap(pairs)
    assert [one.weight for one in found] == [0.5, 0.5, 1.0]
    assert [replace(one, weight=1.0) for one in found[:2]] == pairs[:2]
    assert weighted_by_gap([]) == []


@pytest.mark.parametrize(("older", "batch"), [(0, 16), (8, 16), (20, 32), (41, 48)])
def test_older_pairs_in_the_steps_of_the_new_ones(older: int, batch: int) -> None:
    """20 new pairs in batches of 16; with as many older ones twice as large, to the nearest."""
    pairs = [*numbered("new", 20), *numbered("old", older, "replay, 1 back")]
    dpo = Dpo(batch_size=16, micro_batch_size=16)
    found = beside_new_ones(dpo, pairs)
    assert found.batch_size == batch
    assert found.model_copy(update={"batch_size": 16}) == dpo
    assert math.ceil(len(pairs) / batch) == 2  # as many steps as the new ones take


def test_older_pairs_as_the_newest_judge_has_them() -> None:
    kept, tied, turned, unread = numbered("p", 4)
    turned = replace(turned, smoothing=0.2)
    older = [
        Regraded(kept, (5, 4), (3, 4)),  # 5 > 3, 5 > 4, 4 > 3, and a tie: 3.5 of 4
        Regraded(tied, (3,), (3, None)),
        Regraded(turned, (1, 1), (1, 2)),  # a tie and a defeat, twice: 1 of 4
        Regraded(unread, (None,), (5,)),  # nobody disputes it
    ]
    assert [one.doubt for one in older] == [0.125, 0.5, 0.75, 0.0]
    assert as_newest_judge_has_it(older, "drop") == ([kept, unread], 2)
    smoothed, disputed = as_newest_judge_has_it(older, "smooth")
    # 0.2 x 0.25 + 0.8 x 0.75: one of the two judges has it wrong, not both.
    assert [one.smoothing for one in smoothed] == [0.125, 0.5, 0.65, 0.0]
    assert [replace(one, smoothing=0.0) for one in smoothed[:2]] == [kept, tied]
    assert disputed == 2


def test_schedules() -> None:
    assert [at_iteration((0, 0.32, 0.4), t) for t in (1, 2, 3, 4)] == [0, 0.32, 0.4, 0.4]
    assert (at_iteration(0.3, 7), at_iteration((), 1)) == (0.3, 0.0)
