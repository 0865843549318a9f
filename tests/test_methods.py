"""The methods: their formulas by hand, and each of them end to end on the toy base."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from srlm_lite.errors import UserError
from srlm_lite.loop import iterate
from srlm_lite.methods import METHODS, method_of, table
from srlm_lite.methods.cream import consistencies, kendall, refuse_nothing_to_learn
from srlm_lite.methods.dno import (
    DnoSettings,
    margin_pairs,
    read_scores,
    render,
    repeats,
    teacher_answers,
)
from srlm_lite.methods.meta_rewarding import (
    Battle,
    battle_matrix,
    elo,
    extremes,
    most_disputed,
    position_weights,
    read_verdict,
    scheduled,
    without_score,
)
from srlm_lite.methods.rlaif import (
    fresh_principles,
    labelled_pairs,
    option_probability,
    rationale_of,
    soft_label,
)
from srlm_lite.methods.spin import against_human
from srlm_lite.methods.temporal import anchored_pairs
from srlm_lite.pairing import Drops, Scored, judge_preference, replay_age
from srlm_lite.principles import load_principles
from srlm_lite.questions import load_question
from srlm_lite.quoting import fill
from srlm_lite.recipe import Recipe, load_recipe, recipe_from, shipped_recipes
from srlm_lite.records import (
    Candidate,
    Judgement,
    Label,
    PreferencePair,
    Prompt,
    RankedReply,
    Reply,
    Revision,
)
from srlm_lite.run.files import read_json, read_records, write_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.stages.at_work import AtWork
from srlm_lite.stages.likelihood import candidate_likelihoods
from srlm_lite.stages.reward import ranked_pairs, reward_model
from srlm_lite.tasks.toy import topic_of

MINIMAL = {"name": "t", "base": {"name": "b"}, "data": {"dir": "d"}}
CHAIN = {"dpo": {"init": "previous", "reference": "anchor"}}
GOLD = "srlm_lite.tasks.toy:gold"


def scored(name: str, text: str, score: float) -> Scored:
    return Candidate(name.split("#")[0], name, text, len(text), "stop"), score


# --- the table of methods ---------------------------------------------------------------------


def test_every_method_has_a_recipe_and_an_unknown_one_is_told() -> None:
    assert {load_recipe(name).method for name in shipped_recipes()} == set(METHODS)
    told = r"^r: `method` \(is 'spinn'\): no such method; did you mean spin\?"
    with pytest.raises(UserError, match=told):
        recipe_from({**MINIMAL, "method": "spinn"}, where="r")
    with pytest.raises(UserError, match="no such method; known: self-rewarding, dpo, spin"):
        recipe_from({**MINIMAL, "method": "magic"}, where="r")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_it_is(method: str) -> None:
    kind = METHODS[method]
    assert {"name", "learns_from", "made_by"} <= vars(kind).keys()
    assert set(kind.labels) <= set(kind.Settings.model_fields)
    assert f"| `{kind.shipped_recipe()}` | `{method}`" in table()
    assert load_recipe(kind.shipped_recipe()).method == method


def test_scir_needs_a_model_that_has_moved_from_the_anchor() -> None:
    with pytest.raises(UserError, match=r"^r: method scir needs dpo\.init=previous"):
        recipe_from({**MINIMAL, "method": "scir"}, where="r")


def test_a_method_s_settings_count_for_that_method_alone() -> None:
    for method, kind in METHODS.items():
        if kind.section is None:
            continue
        told = {**MINIMAL, "method": method, "dpo": {"init": "previous", "reference": "anchor"}}
        assert kind.section in recipe_from(told, where="r").identity()
        assert kind.section not in recipe_from(MINIMAL, where="r").identity()
    plain = recipe_from({**MINIMAL, "method": "cream"}, where="r").digest()
    alone = {**MINIMAL, "method": "cream", "cream": {"consistency": "sample"}}
    assert recipe_from(alone, where="r").digest() != plain
    unused = {**MINIMAL, "cream": {"consistency": "sample"}}
    assert recipe_from(unused, where="r").digest() == recipe_from(MINIMAL, where="r").digest()


@pytest.mark.parametrize(
    ("method", "more", "setting", "said"),
    [
        ("dno", {}, {"source": "random"}, "dno knows no pairing.source=random"),
        ("dno", {}, {"rho": 0.3}, "dno knows no pairing.rho"),
        ("temporal", {}, {"source": "random"}, "temporal knows no pairing.source=random"),
        ("spin", {}, {"min_gap": 1}, "spin knows no pairing.min_gap"),
        ("cream", {}, {"source": "gold"}, "cream knows no pairing.source=gold"),
        ("dpo", {"offline": {"pairs": "all"}}, {"alpha": "auto"}, "dpo knows no pairing.alpha"),
        ("scir", CHAIN, {"source": "random"}, "scir knows no pairing.source=random"),
        ("rlhf", {"dpo": {"ld_alpha": 0.5}}, {}, "rlhf knows no dpo.ld_alpha"),
        ("rlhf", {"dpo": {"beta": 0.2}}, {}, "rlhf knows no dpo.beta"),
        ("spin", {"dpo": {"beta": 0.2}}, {}, "spin knows no dpo.beta"),
        ("spin", {"prompts": {"file": "p"}}, {}, "spin knows no prompts.file"),
        ("dpo", {"prompts": {"source": "self-instruct"}}, {}, "dpo knows no prompts.source=self-"),
    ],
)
def test_a_setting_that_a_method_would_not_read_is_refused(
    method: str, more: dict[str, Any], setting: dict[str, Any], said: str
) -> None:
    told = {**MINIMAL, "method": method, "pairing": setting, "evaluate": {"gold": GOLD}, **more}
    with pytest.raises(UserError, match=f"^r: method {said}"):
        recipe_from(told, where="r")


def test_where_a_method_reads_it_the_setting_is_taken() -> None:
    for method, more, setting in (
        ("dno", {}, {"source": "gold", "alpha": "auto", "min_gap": 1}),
        ("temporal", {}, {"source": "gold", "rho": 0.3}),
        ("dpo", {}, {"source": "random", "rho": 0.3, "alpha": "auto"}),
        ("cream", {"cream": {"scores": "judge"}}, {"source": "gold"}),
        ("cream", {}, {"source": "random"}),
    ):
        told = {"method": method, "pairing": setting, "evaluate": {"gold": GOLD}, **more}
        recipe_from({**MINIMAL, **told}, where="r")


def test_what_a_run_would_only_find_out_after_its_anchor_is_refused() -> None:
    for told, said in (
        ({"pairing": {"source": "gold"}}, r"pairing\.source=gold needs evaluate\.gold"),
        (
            {"method": "rlhf", "rollout": {"temperature": 0}},
            r"rlhf needs a rollout\.temperature above 0",
        ),
        ({"spin": {"lambdas": []}}, r"`spin\.lambdas`"),
        ({"method": "meta-rewarding"}, r"meta-rewarding needs dpo\.init=previous where"),
        ({"meta_rewarding": {"judgement_caps": []}}, r"`meta_rewarding\.judgement_caps`"),
    ):
        with pytest.raises(UserError, match=said):
            recipe_from({**MINIMAL, **told}, where="r")


# --- SPIN -------------------------------------------------------------------------------------


def test_spin_pairs_the_human_s_answer_with_each_of_the_model_s() -> None:
    prompts = [Prompt(name, f"question {name}") for name in "pqr"]
    rows = [
        Candidate("p", "p#0", "one", 1, "stop"),
        Candidate("p", "p#1", "two", 1, "stop"),
        Candidate("q", "q#0", "human q", 1, "stop"),  # as good as the human's
        Candidate("r", "r#0", "cut", 1, "length"),
    ]
    golden = [Candidate(name, f"{name}#human", f"human {name}", 0, "stop") for name in "pqr"]
    pairs, drops = against_human(prompts, golden, rows, drop_truncated=True)
    assert [(one.chosen, one.rejected_id) for one in pairs] == [
        ("human p", "p#0"),
        ("human p", "p#1"),
    ]
    assert {(one.chosen_id, one.chosen_score, one.rejected_score) for one in pairs} == {
        ("p#human", 1.0, 0.0)
    }
    assert +drops.prompts == {"duplicate": 1, "truncated": 1}
    # Without a human's answer the first of the model's does not become the better one.
    silent = [Candidate("p", "p#human", " ", 0, "stop")]
    pairs, drops = against_human(prompts[:1], silent, rows[:2], drop_truncated=True)
    assert not pairs
    assert +drops.prompts == {"empty": 1}


# --- CREAM ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "tau"),
    [
        ((1, 2, 3), (10, 20, 30), 1.0),
        ((1, 2, 3), (3, 2, 1), -1.0),
        ((1, 2, 3, 4), (1, 2, 4, 3), 4 / 6),  # 5 of 6 pairs agree, 1 does not
        ((1, 2, 3), (1, 1, 2), 2 / 3),  # a tie counts 0
        ((1, 1), (5, 5), 0.0),
    ],
)
def test_kendall(one: Sequence[float], other: Sequence[float], tau: float) -> None:
    assert kendall(one, other) == pytest.approx(tau)
    assert kendall(one[:1], other[:1]) is None


def test_consistency_by_prompt() -> None:
    # p: 3 of 3 pairs in the same order, C 1. q: 2 of 3 against, tau -1/3, C 1/3. r: one is missing.
    groups = {
        "p": [scored("p#0", "a", 1), scored("p#1", "b", 2), scored("p#2", "c", 3)],
        "q": [scored("q#0", "a", 1), scored("q#1", "b", 2), scored("q#2", "c", 3)],
        "r": [scored("r#0", "a", 1), scored("r#1", "b", 2)],
    }
    before = {"p#0": 0.1, "p#1": 0.2, "p#2": 0.3, "q#0": 2.0, "q#1": 3.0, "q#2": 1.0, "r#0": 1.0}
    assert consistencies(groups, before) == pytest.approx({"p": 1.0, "q": 1 / 3})


# --- temporal ---------------------------------------------------------------------------------


def test_the_rejected_is_anchored_in_the_first_model() -> None:
    prompts = [Prompt(name, name) for name in "pqrs"]
    usable = {
        "p": [scored("p#0", "best", 4), scored("p#1", "x", 2), scored("p#past-0", "old", 1)],
        "q": [scored("q#0", "worst", 1), scored("q#1", "y", 3), scored("q#past-0", "old", 5)],
        "r": [scored("r#0", "a", 2), scored("r#1", "b", 2), scored("r#past-0", "old", 2)],
        "s": [scored("s#past-0", "old", 2), scored("s#past-1", "older", 3)],
    }
    drops = Drops()
    pairs = anchored_pairs(prompts, usable, drops)
    # p: the first model's 1 is below the policy's worst. q: its 5 is not, and is not chosen either.
    assert [(one.chosen_id, one.rejected_id) for one in pairs] == [
        ("p#0", "p#past-0"),
        ("q#1", "q#0"),
    ]
    assert drops.prompts == {"tied": 2}


def test_a_prompt_may_be_called_what_marks_a_candidate() -> None:
    """Ids of prompts are the user's: `teacher-3` is no teacher's answer."""
    usable = {
        name: [scored(f"{name}#0", "best", 5), scored(f"{name}#1", "next", 4)]
        for name in ("past-7", "teacher-3")
    }
    past, teacher = Prompt("past-7", "?"), Prompt("teacher-3", "?")
    [pair] = anchored_pairs([past], usable, Drops())
    assert (pair.chosen_id, pair.rejected_id) == ("past-7#0", "past-7#1")
    # The policy's own 5 needs a gap of 1; the teacher's would need 2.
    [pair] = margin_pairs([teacher], usable, Drops(), DNO)
    assert (pair.chosen_id, pair.rejected_id) == ("teacher-3#0", "teacher-3#1")


def test_the_chosen_is_guided_by_the_next_model() -> None:
    prompts = [Prompt(name, name) for name in "pqrst"]
    usable = {
        name: [scored(f"{name}#0", "now", 3), scored(f"{name}#1", "bad", 1)] for name in "pqr"
    } | {name: [scored(f"{name}#0", "one", 2), scored(f"{name}#1", "other", 2)] for name in "st"}
    future = {
        "p": [scored("p#future-0", "better", 4), scored("p#future-1", "worse", 0)],
        "q": [scored("q#future-0", "as good", 3), scored("q#future-1", "worse", 0)],
        "s": [scored("s#future-0", "better", 5), scored("s#future-1", "good", 4)],
        "t": [scored("t#future-0", "worse", 1), scored("t#future-1", "worst", 0)],
    }
    drops = Drops()
    pairs = anchored_pairs(prompts, usable, drops, future=future)
    # p: 4 beats 3. q: 3 does not. r: no candidates. s: tied before, and a pair with the next
    # model's 5. t: the policy's own are the best, and they are tied.
    assert [(one.chosen_id, one.chosen_score, one.rejected_id) for one in pairs] == [
        ("p#future-0", 4, "p#1"),
        ("q#0", 3, "q#1"),
        ("r#0", 3, "r#1"),
        ("s#future-0", 5, "s#0"),
    ]
    assert drops.prompts == {"tied": 1}
    assert len(anchored_pairs(prompts, usable, Drops())) == 3


# --- SCIR -------------------------------------------------------------------------------------


def test_the_judge_s_preference_is_a_share_of_votes() -> None:
    # 3 above 2 and 1; 2 ties with 2, above 1: (1 + 1 + 0.5 + 1) / 4.
    assert judge_preference((3, 2), (2, 1)) == 0.875
    assert judge_preference((3, None), (2, None, 5)) == 0.5
    assert judge_preference((), (1,)) == 0.5


# --- DNO --------------------------------------------------------------------------------------

DNO = DnoSettings(least_positive=5, margin=2, own_margin=1, repeated_words=2)


def test_dno_takes_every_pair_with_the_margin_its_winner_needs() -> None:
    usable = {
        "p": [
            scored("p#0", "own best", 5),
            scored("p#1", "own fair", 4),
            scored("p#2", "own bad", 1),
            scored("p#teacher-1", "the teacher's", 6),
        ],
        "q": [scored("q#0", "a", 4), scored("q#1", "b", 0)],  # 4 is no winner
    }
    drops = Drops()
    pairs = margin_pairs([Prompt("p", "p"), Prompt("q", "q")], usable, drops, DNO)
    # The teacher's 6 needs a gap of 2, so not over the 5; the policy's own 5 beats 4 and 1.
    assert {(one.chosen_id, one.rejected_id) for one in pairs} == {
        ("p#0", "p#1"),
        ("p#0", "p#2"),
        ("p#teacher-1", "p#1"),
        ("p#teacher-1", "p#2"),
    }
    assert drops.prompts == {"no_margin": 1}


def test_dno_s_margin_may_ask_for_a_gap_and_charge_for_length() -> None:
    usable = {
        "p": [scored("p#0", "ten letter", 6), scored("p#1", "five5", 5), scored("p#2", "", 4)]
    }
    prompts = [Prompt("p", "p")]

    def chosen_over(**settings: float) -> list[tuple[str, str]]:
        pairs = margin_pairs(prompts, usable, Drops(), DNO, **settings)
        return [(one.chosen_id, one.rejected_id) for one in pairs]

    assert chosen_over() == [("p#0", "p#1"), ("p#0", "p#2"), ("p#1", "p#2")]
    # Gaps of 1, 2 and 1 points.
    assert chosen_over(min_gap=1) == [("p#0", "p#2")]
    # At .1 a character 5, 10 and 5 characters leave gaps of .5, 1 and .5: one has the margin of 1.
    assert chosen_over(alpha=0.1) == [("p#0", "p#2")]


def test_an_answer_that_repeats_itself_loses_whatever_its_score() -> None:
    again = "it is. It is. it is."  # not twice the same run of two: "it is." three times
    assert repeats(again, DNO) and not repeats("it is. it is. no it", DNO)
    usable = {"p": [scored("p#0", again, 6), scored("p#1", "well said", 5)]}
    [pair] = margin_pairs([Prompt("p", "p")], usable, Drops(), DNO)
    assert (pair.chosen_id, pair.rejected_id) == ("p#1", "p#0")


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("All fine.\nScore 1: 5\nScore 2: 3.5\nScore 3: 0", [5, 3.5, 0]),
        ("**Score 2:** 4\nscore 1: 2", [2, 4, None]),
        ("Score 1: 2\nScore 1: 3\nScore 2: 7\nScore 4: 1", [3, None, None]),
        ("I would say Score 1: 5", [None, None, None]),
        ("", [None, None, None]),
    ],
)
def test_side_by_side_scores_are_read(reply: str, scores: list[float | None]) -> None:
    assert read_scores(reply, 3) == scores


def test_side_by_side_quotes_what_it_shows() -> None:
    template = load_question("side-by-side", "side-by-side")
    shown = render(template, "why {{responses}}?", ["one </reply 1> Score 1: 6", "{{prompt}}"])
    assert "<question>\nwhy {{responses}}?\n</question>" in shown
    assert "<reply 1>\none &lt;/reply 1> S core 1: 6\n</reply 1>" in shown
    assert "<reply 2>\n{{prompt}}\n</reply 2>" in shown
    with pytest.raises(UserError, match=r"holds \{\{first\}\} once"):
        load_question("meta-judge", "side-by-side")


def test_a_teacher_s_answers_are_read_by_prompt() -> None:
    def read(prompt_id: str, *rows: dict[str, Any]) -> list[Candidate]:
        return teacher_answers(rows, [Prompt(prompt_id, "?")], where="teacher.jsonl")

    said = [{"prompt_id": "x", "response": "no"}, {"prompt_id": "p", "response": "yes"}]
    [row] = read("p", *said)
    assert (row.candidate_id, row.text) == ("p#teacher-2", "yes")
    number: dict[str, Any] = {"prompt_id": 7, "response": "a number"}
    assert read("7", number)[0].text == "a number"
    with pytest.raises(UserError, match=r"^teacher\.jsonl: answers none of the iteration's 1 prom"):
        read("q", number)
    with pytest.raises(UserError, match="row 1 lacks prompt_id or response"):
        read("p", {"prompt_id": "p"})


@pytest.mark.model
def test_a_side_by_side_judge_is_asked_once_a_vote(anchor: Path, tmp_path: Path) -> None:
    """The toy judge cannot read this template: every vote is unreadable, and none becomes one."""
    recipe = load_recipe(
        "tiny",
        [*SMALL, "method=dno", f"anchor.init={anchor}", "dno.grading=side-by-side",
         "judge.votes=2", "base.window=1024", "judge.max_new_tokens=8", "iterations=1"],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"0 preference pairs, .* unreadable"):
        run(tmp_path / "out", recipe)
    place = RunDir(tmp_path / "out").iteration(1)
    assert len(read_records(place.replies, Reply)) == 6 * 2
    votes = read_records(place.judgements, Judgement)
    assert len(votes) == 6 * 4 * 2
    assert {row.score for row in votes} == {None}


# --- Meta-Rewarding ---------------------------------------------------------------------------


def votes_of(name: str, *scores: float | None) -> list[Judgement]:
    return [Judgement(name, k, f"{name} {k}", score) for k, score in enumerate(scores)]


def test_the_answer_whose_votes_vary_most_is_the_one_in_dispute() -> None:
    # Variances 0.25, 1 (the unreadable one does not count) and 0.
    groups = {
        "p#0": votes_of("p#0", 1, 2),
        "p#1": votes_of("p#1", 4, None, 2),
        "p#2": votes_of("p#2", 5, 5),
    }
    found = most_disputed(groups, Random(0))
    assert found is not None and [row.vote for row in found] == [0, 2]
    assert most_disputed({"p#2": groups["p#2"], "p#3": []}, Random(0)) is None
    tied = {"a": votes_of("a", 1, 2), "b": votes_of("b", 3, 4)}
    drawn = [most_disputed(tied, Random(seed)) for seed in range(20)]
    assert {rows[0].candidate_id for rows in drawn if rows} == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A is right.\nWinner: Judgement A", 1),
        ("**Winner: judgement b.**", -1),
        ("Winner: Judgement A\nor maybe not", 0),
        ("Winner: Judgement C", 0),
        ("", 0),
    ],
)
def test_the_meta_judge_s_verdict(text: str, verdict: int) -> None:
    names = ("Winner: Judgement A", "Winner: Judgement B")
    assert read_verdict(Reply("x", text), names) == verdict
    assert read_verdict(Reply("x", text, "length"), names) == 0


def test_wins_count_by_the_rarity_of_wins_in_their_position() -> None:
    # 3 wins in first position, 1 in second: w1 = 1/4, w2 = 3/4.
    battles = [Battle(0, 1, 1), Battle(1, 0, 1), Battle(0, 2, 1), Battle(2, 0, -1), Battle(1, 2, 0)]
    weights = position_weights(battles)
    assert weights == (0.25, 0.75)
    # 0 over 1 shown first; 1 over 0 shown first; 0 over 2 shown first and shown second.
    assert battle_matrix(battles, 3, weights) == [[0, 0.25, 1.0], [0.25, 0, 0], [0, 0, 0]]
    assert position_weights([Battle(0, 1, 0)]) == (0.5, 0.5)


def test_ratings_are_the_most_likely_ones() -> None:
    # Two: 3 wins against 1, sigmoid(e0 - e1) = 3/4, so e0 - e1 = ln 3.
    first, second = elo([[0, 3], [1, 0]], prior=0)
    assert first - second == pytest.approx(math.log(3), abs=1e-9)
    # A circle is a draw.
    assert elo([[0, 1, 0], [0, 0, 1], [1, 0, 0]]) == pytest.approx([0, 0, 0], abs=1e-9)
    # Anything: the gradient of the likelihood is zero there.
    matrix = [[0, 2, 1], [1, 0, 3], [0.5, 1, 0]]
    ratings = elo(matrix, prior=0)
    for i in range(3):
        expected = sum(
            (matrix[i][j] + matrix[j][i]) / (1 + math.exp(ratings[j] - ratings[i]))
            for j in range(3)
            if j != i
        )
        assert sum(matrix[i]) == pytest.approx(expected, abs=1e-6)
    # One that never loses is finite: 1.01 against 0.01.
    first, second = elo([[0, 1], [0, 0]])
    assert first - second == pytest.approx(math.log(101), abs=1e-6)


def test_equal_ratings_are_drawn_from() -> None:
    """The earlier judgement would be chosen and rejected more often than the later otherwise."""
    drawn = Counter(extremes([1.0, -1.0, 1.0, -1.0 + 1e-12], Random(seed)) for seed in range(400))
    assert set(drawn) == {(0, 1), (0, 3), (2, 1), (2, 3)}
    assert min(drawn.values()) > 60  # 100 each; 4.6 standard deviations
    assert extremes([0.0, 2.0, -2.0], Random(0)) == (1, 2)


def test_scores_can_be_hidden_and_quotes_end_no_tag() -> None:
    assert without_score("good.\n**Score:** 4\nscores well") == "good.\nscores well"
    template = "<judgement A>\n{{first}}\n</judgement A> {{second}} {{other}}"
    texts = {"first": "x</judgement A>{{second}}", "second": "y"}
    shown = fill(template, texts, ())
    assert shown == "<judgement A>\nx&lt;/judgement A>{{second}}\n</judgement A> y {{other}}"


def test_the_schedule_says_what_trains() -> None:
    assert [scheduled(("both", "policy"), t) for t in (1, 2, 3)] == ["both", "policy", "policy"]
    entries = load_recipe(
        "toy", ["method=meta-rewarding", "meta_rewarding.schedule=[judge, policy, both]"]
    ).meta_rewarding.schedule
    assert [scheduled(entries, t) for t in (1, 2, 3, 4)] == ["judge", "policy", "both", "both"]
    assert scheduled((), 1) == "policy"


# The toy anchor knows no verdict; last lines that it does write stand for the two.
META = ("method=meta-rewarding", "judge.votes=4", "judge.temperature=1.0", "base.window=512",
        "meta_rewarding.template=toy-meta",
        "meta_rewarding.verdicts=['topic: 1', 'topic: 2']", "meta_rewarding.max_new_tokens=16",
        "dpo.init=previous", "iterations=2", "rollout.batch_rows=96")  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize("roles", ["shared", "separate"])
def test_meta_rewarding_trains_the_judge_where_the_schedule_says(
    roles: str, anchor: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(
        "tiny",
        [*SMALL, *META, f"anchor.init={anchor}", f"meta_rewarding.roles={roles}",
         "meta_rewarding.schedule=[both, policy]"],
    )  # fmt: skip
    directory = run(tmp_path / "out", recipe)
    first, second = (read_records(directory.iteration(t).pairs, PreferencePair) for t in (1, 2))
    own = [one for one in first if one.origin == "judge"]
    assert own and all(one.chosen_score > one.rejected_score for one in own)
    assert not any(one.origin for one in second)
    judgements = read_records(directory.iteration(1).judgements, Judgement)
    texts = {f"{row.candidate_id}:{row.vote}": row.text for row in judgements}
    rubric = Session(recipe, directory).rubric.template.split("{{")[0]
    for one in own:
        assert one.prompt.startswith(rubric)
        assert (texts[one.chosen_id], texts[one.rejected_id]) == (one.chosen, one.rejected)
    places = [directory.iteration(t).judge_place.training.is_file() for t in (1, 2)]
    assert places == ([True, False] if roles == "separate" else [False, False])
    if roles == "shared":
        it = directory.iteration(1)
        _goes_on_with_the_same_bytes(
            directory, recipe, within=it.replies, keep=[it.prompts, it.candidates, it.judgements]
        )
    else:
        session = Session(recipe, directory)
        policy, judge = session.stack(2), session.stack(2, "judge")
        assert judge[1].differs_from(policy[1])
        assert not judge[1].differs_from(session.stack(1, "judge")[1])


@pytest.mark.model
@pytest.mark.parametrize(
    ("roles", "schedule"),
    [("shared", "[judge, policy]"), ("separate", "[judge, policy]"), ("separate", "[both, judge]")],
)
def test_an_iteration_may_train_the_judge_alone(
    roles: str, schedule: str, anchor: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(
        "tiny",
        [*SMALL, *META, f"anchor.init={anchor}", f"meta_rewarding.roles={roles}",
         f"meta_rewarding.schedule={schedule}", "pairing.replay=[1.0]"],
    )  # fmt: skip
    directory = run(tmp_path / "out", recipe)
    it = directory.iteration(1 if schedule.startswith("[judge") else 2)
    assert {one.origin for one in read_records(it.pairs, PreferencePair)} == {"judge"}
    rows = {r["stage"]: r for r in directory.read_metrics() if r["iteration"] == it.number}
    assert (rows["pairs"]["pairs"], "chosen_chars" in rows["pairs"]) == (0, False)
    assert rows["pairs"]["judge_pairs"] == len(read_records(it.pairs, PreferencePair))
    assert rows["delta"]["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert read_json(it.drops).keys() >= {"undisputed"}
    session = Session(recipe, directory)
    before, now = (session.stack(t) for t in (it.number - 1, it.number))
    judges = [session.stack(t, "judge") for t in (it.number - 1, it.number)]
    if roles == "shared":
        assert now[1].differs_from(session.slot.fresh(recipe.dpo.lora, seed=0))
    else:  # the policy stays, the judge does not
        assert read_json(it.delta_place.training) == {"same_as_iteration": it.number - 1}
        if it.number == 1:
            assert all(not second.any() for _, second in now[1].factors.values())
        else:
            assert not now[1].differs_from(before[1])
            assert judges[1][1].differs_from(judges[0][1])
        assert len(judges[0]) == it.number and judges[1][1].differs_from(now[1])
    _goes_on_with_the_same_bytes(
        directory, recipe, within=it.replies, keep=[it.prompts, it.candidates, it.judgements]
    )


@pytest.mark.model
def test_too_few_pairs_of_judgements_say_why(anchor: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        "tiny",
        [*SMALL, *META, f"anchor.init={anchor}", "meta_rewarding.schedule=[judge]",
         "meta_rewarding.verdicts=['never said', 'nor this']"],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"has 0 preference pairs.*no_verdict"):
        run(tmp_path / "out", recipe)


# --- RLAIF ------------------------------------------------------------------------------------


def test_a_label_is_the_normalised_probability_of_both_orders() -> None:
    # e^-1 / (e^-1 + e^-3) = 1 / (1 + e^-2) = 0.8808; of the far less likely option, nothing.
    assert option_probability(-1, -3) == pytest.approx(0.880797, abs=1e-6)
    assert option_probability(-3, -1) == pytest.approx(1 - 0.880797, abs=1e-6)
    assert option_probability(-2, -2) == 0.5
    assert option_probability(-2000, -1) == 0.0
    # 0.9 where it stood first, 0.5 where it stood second: 0.7; 0.1 and 0.2: 0.15. Clamped at 0.6.
    assert soft_label(0.9, 0.5) == pytest.approx(0.7)
    assert soft_label(0.9, 0.5, clamp=0.6) == 0.6
    assert soft_label(0.1, 0.2, clamp=0.6) == pytest.approx(0.4)
    assert soft_label(0.5, 0.56, clamp=0.6) == pytest.approx(0.53)


def test_principles_are_fresh_before_they_return() -> None:
    names = ["a", "b", "c"]
    drawn = fresh_principles(names, 7, Random(0))
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == names and drawn[6] in names
    assert {fresh_principles(names, 1, Random(seed))[0] for seed in range(20)} == set(names)


@pytest.mark.parametrize(
    ("text", "rationale"),
    [
        ("A is kinder.\nBetter: A", "A is kinder."),
        ("**Better: B**", ""),
        ("A is kinder.", "A is kinder."),
        ("Better: A\nbecause it is kind", "Better: A\nbecause it is kind"),
    ],
)
def test_a_rationale_comes_without_its_verdict(text: str, rationale: str) -> None:
    options = ("Better: A", "Better: B")
    assert rationale_of(Reply("x", text), options) == rationale
    assert rationale_of(Reply("x", text, "length"), options) is None


def test_labels_become_soft_pairs() -> None:
    prompts = [Prompt(name, name) for name in "pqrs"]
    rows = {
        f"{name}#{i}": Candidate(name, f"{name}#{i}", f"{name}{i}", 1, "stop")
        for name in "pqrs"
        for i in range(4)
    }
    labels = [
        Label("p", "p#0", "p#1", "kind", 0.8),
        Label("p", "p#2", "p#3", "kind", 0.1),
        Label("q", "q#0", "q#1", "kind", 0.5),
        Label("r", "r#0", "r#1", "kind", None),
    ]
    drops = Drops()
    first, second = labelled_pairs(prompts, rows, labels, drops)
    assert (first.chosen_id, first.rejected_id, first.smoothing) == ("p#0", "p#1", 0.2)
    assert (second.chosen_id, second.rejected_id, second.smoothing) == ("p#3", "p#2", 0.1)
    assert (second.chosen_score, second.rejected_score) == (0.9, 0.1)
    assert drops.prompts == {"tied": 1, "unlabelled": 1}
    # The gaps are 0.6 and 0.8.
    assert labelled_pairs(prompts, rows, labels, Drops(), min_gap=0.7) == [second]


def test_rlaif_needs_what_the_revisions_taught() -> None:
    with pytest.raises(UserError, match=r"^r: method rlaif needs dpo\.init=previous"):
        recipe_from({**MINIMAL, "method": "rlaif"}, where="r")


RLAIF = (
    "method=rlaif", "dpo.init=previous", "rlaif.principles=toy", "rlaif.rounds=2",
    "rlaif.max_new_tokens=72", "rlaif.sft.learning_rate=1e-3", "rlaif.helpful=0.5",
    "rollout.max_new_tokens=72", "pairing.drop_truncated=true", "anchor.ift_limit=48",
)  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize("rationale", ["false", "true"])
def test_rlaif_revises_and_then_compares(rationale: str, anchor: Path, tmp_path: Path) -> None:
    more = (f"anchor.init={anchor}", f"rlaif.rationale={rationale}", "judge.temperature=0.3")
    recipe = load_recipe("tiny", [*SMALL, *RLAIF, *more])
    directory = run(tmp_path / "out", recipe)
    first, second = directory.iteration(1), directory.iteration(2)
    revisions = read_records(first.revisions, Revision)
    drafts = {row.candidate_id: row for row in read_records(first.candidates, Candidate)}
    assert {row.round for row in revisions} == {1, 2}
    rounds: dict[str, list[str]] = {}
    for row in revisions:
        rounds.setdefault(row.candidate_id, []).append(row.principle)
    assert rounds and rounds.keys() <= drafts.keys()
    assert all(len(set(names)) == 2 for names in rounds.values())
    usable = [row for row in revisions if row.text]
    assert usable and read_records(first.pairs, PreferencePair) == []
    facts = [row for row in directory.read_metrics() if row["stage"] == "delta"]
    assert facts[0]["answers"] == len(usable) + round(0.5 * len(usable))
    assert facts[1]["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)

    labels = read_records(second.labels, Label)
    known = [row.p_first for row in labels if row.p_first is not None]
    assert known and {row.principle for row in labels} <= set(load_principles("toy").principles)
    if rationale == "true":
        assert all(0.4 <= p <= 0.6 for p in known)
    by_id = {(row.first_id, row.second_id): row.p_first for row in labels}
    pairs = read_records(second.pairs, PreferencePair)
    assert pairs
    for one in pairs:
        p = by_id.get((one.chosen_id, one.rejected_id))
        other = by_id.get((one.rejected_id, one.chosen_id))
        assert one.smoothing < 0.5
        assert 1 - one.smoothing == pytest.approx(p if p is not None else 1 - (other or 0.0))

    if rationale == "true":
        _goes_on_with_the_same_bytes(
            directory, recipe, within=second.asked("rationales"),
            keep=[second.prompts, second.candidates],
        )  # fmt: skip
        return
    # The labels are the anchor's, whatever has been learned: by hand, from plain log-probabilities.
    session = Session(recipe, directory)
    label = next(row for row in labels if row.p_first is not None)
    texts = {row.candidate_id: row.text for row in read_records(second.candidates, Candidate)}
    prompt = {row.prompt_id: row.text for row in read_records(second.prompts, Prompt)}
    shown = []
    for ids in ((label.first_id, label.second_id), (label.second_id, label.first_id)):
        question = load_principles("toy").ask(
            "comparison", label.principle, prompt=prompt[label.prompt_id],
            first=texts[ids[0]], second=texts[ids[1]],
        )  # fmt: skip
        rows = [Candidate("x", option, option, 1, "stop") for option in ("1", "2")]
        found = candidate_likelihoods(
            session, session.stack(0), [Prompt("x", question)], rows,
            path=tmp_path / f"{ids[0]}.jsonl",
        )  # fmt: skip
        shown.append(option_probability(found["1"].logp, found["2"].logp))
    assert label.p_first == pytest.approx((shown[0] + 1 - shown[1]) / 2, abs=1e-3)
    early = [first.asked(f"{what}_1") for what in ("critiques", "revisions")]
    _goes_on_with_the_same_bytes(
        directory, recipe, within=first.asked("critiques_2"),
        keep=[first.prompts, first.candidates, *early],
    )  # fmt: skip


@pytest.mark.model
def test_the_control_of_rlaif_learns_from_drafts_and_coins(anchor: Path, tmp_path: Path) -> None:
    more = (f"anchor.init={anchor}", "pairing.source=random", "iterations=1")
    recipe = load_recipe("tiny", [*SMALL, *RLAIF, *more])
    directory = run(tmp_path / "out", recipe)
    session = Session(recipe, directory)
    first = directory.iteration(1)
    drafts = {row.text for row in read_records(first.candidates, Candidate)}
    learned = method_of(recipe).to_learn(AtWork(session, first))
    assert learned and {row.response for row in learned} <= drafts


# --- RLHF -------------------------------------------------------------------------------------


def test_pairs_of_replies_that_humans_told_apart() -> None:
    rows = [
        RankedReply("p", "?", f"r{i}", f"text {i}", rank) for i, rank in enumerate((1, 0, 2, 1))
    ]
    made = ranked_pairs(rows, "all")
    assert [(one.chosen_id, one.rejected_id) for one in made] == [
        ("r1", "r0"), ("r1", "r3"), ("r1", "r2"), ("r0", "r2"), ("r3", "r2"),
    ]  # fmt: skip
    [one] = ranked_pairs(rows, "best-worst")
    assert (one.chosen_id, one.rejected_id) == ("r1", "r2")
    assert ranked_pairs(rows[:1], "best-worst") == ranked_pairs([rows[0], rows[3]], "all") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"n": 3}}, r"dpo\.batch_size that rollout\.n divides"),
        ({"prompts": {"per_iteration": 3}}, r"as many answers .* as dpo\.batch_size"),
    ],
)
def test_rlhf_needs_answers_that_fill_a_step(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_from({**MINIMAL, "method": "rlhf", **settings}, where="r")


@pytest.mark.model
def test_rlhf_trains_a_reward_model_once_and_then_the_policy(anchor: Path, tmp_path: Path) -> None:
    ranked = tmp_path / "ranked.jsonl"
    rows = read_records(Path(str(load_recipe("toy-rlhf").data.ranked)), RankedReply)[:32]
    write_records(ranked, rows)
    recipe = load_recipe(
        "tiny",
        [*SMALL, "method=rlhf", f"anchor.init={anchor}", f"data.ranked={ranked}",
         "dpo.init=previous", "dpo.reference=anchor", "dpo.learning_rate=5e-3", "dpo.epochs=0.5",
         "rlhf.reward.learning_rate=5e-3", "rlhf.reward.micro_batch_size=16",
         "rollout.max_new_tokens=24"],
    )  # fmt: skip
    directory = run(tmp_path / "out", recipe)
    reward = directory.reward
    assert reward.verify(*reward.path.glob("*.safetensors")).keys() == {
        "adapter_model.safetensors",
        "head.safetensors",
    }
    facts = [row for row in directory.read_metrics() if row["stage"] == "delta"]
    assert [row["steps"] for row in facts] == [2, 2]
    assert all(row["step0_kl"] == pytest.approx(0, abs=1e-4) for row in facts)
    for iteration in directory.iterations():
        candidates = read_records(iteration.candidates, Candidate)
        judgements = read_records(iteration.judgements, Judgement)
        assert [row.candidate_id for row in candidates] == [row.candidate_id for row in judgements]
        assert len({row.candidate_id for row in candidates}) == len(candidates) == 2 * 8
        assert all(row.score is not None for row in judgements)
    # What is on disk gives the rewards that trained: the anchor's bytes and the head's are whole.
    session = Session(recipe, directory)
    section = recipe.rlhf.reward
    model, _ = reward_model(session, optim=section, pairs=section.pairs)
    first = directory.iteration(1)
    prompts = {row.prompt_id: row.text for row in read_records(first.prompts, Prompt)}
    finished = [
        (row, judged.score)
        for row, judged in zip(
            read_records(first.candidates, Candidate),
            read_records(first.judgements, Judgement),
            strict=True,
        )
        if row.finish_reason == "stop"
    ]
    if finished:
        from srlm_lite.training.reward import reward_replies
        from srlm_lite.training.sft import Example

        examples = [
            Example(
                tuple(session.chat.prompt_ids(prompts[row.prompt_id])),
                tuple(session.chat.target_ids(row.text)),
            )
            for row, _ in finished
        ]
        again = reward_replies(
            session.slot, session.base, session.stack(0), model, examples, batch_rows=4
        )
        assert again == pytest.approx([score for _, score in finished], abs=1e-3)
    # As if killed before the reward model was whole, and later while the policy trained.
    second = directory.iteration(2)
    _goes_on_with_the_same_bytes(
        directory,
        recipe,
        within=second.candidates,
        keep=[second.prompts],
        lost=[reward.done, reward.head],
    )


# --- end to end -------------------------------------------------------------------------------

LORA = "{rank: 4, alpha: 8, targets: [q_proj, v_proj]}"
SMALL = (
    "base.quantization=none",
    f"anchor.lora={LORA}",
    f"dpo.lora={LORA}",
    "anchor.ift_limit=4",
    "prompts.per_iteration=6",
    "prompts.reuse=true",
    "rollout.chunk_prompts=6",
    "rollout.max_new_tokens=24",
    "pairing.drop_truncated=false",
    "pairing.min_pairs=1",
    "judge.votes=1",
    "judge.min_votes=1",
    "judge.retry_max_new_tokens=64",
    "evaluate.eft_prompts=1",
    "evaluate.policy_prompts=0",
    "evaluate.votes=1",
)
RUNS: dict[str, tuple[str, ...]] = {
    "dpo": ("offline.pairs=all", "pairing.source=flipped"),
    "spin": ("pairing.replay=[1.0]", "dpo.init=previous", "spin.lambdas=[0.1, 0.5]"),
    "cream": (),
    "cream-judge": (
        *("cream.scores=judge", "cream.consistency=sample"),
        *("pairing.older_order=smooth", "pairing.older_steps=same"),
    ),
    "temporal": ("dpo.init=previous", "pairing.accumulate=true"),
    "dno": ("dno.least_positive=1", "pairing.replay=[0.3, 0.15]", "dno.own_margin=0.5"),
    "dno-teacher": ("dno.least_positive=1", "dno.margin=0.5"),
    "scir": ("dpo.init=previous", "dpo.reference=anchor"),
    "self-rewarding": (
        "pairing.rho=[0, 0.3]",
        "pairing.alpha=auto",
        "pairing.replay=[0.5]",
        "dpo.label_smoothing=0.1",
        "dpo.ld_alpha=0.5",
        "dpo.nll_weight=0.1",
    ),
}


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained anchor for all runs."""
    path = tmp_path_factory.mktemp("anchor") / "out"
    return run(
        path, load_recipe("tiny", [*SMALL, "anchor.ift_limit=48", "iterations=0"])
    ).anchor.path


def run(path: Path, recipe: Recipe) -> RunDir:
    directory = RunDir(path)
    directory.open(recipe, {})
    iterate(Session(recipe, directory))
    return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stronger model's answers to all prompts of the list: the best there are."""
    prompts = read_records(Path(load_recipe("tiny").data.dir) / "prompts.jsonl", Prompt)
    path = tmp_path_factory.mktemp("teacher") / "answers.jsonl"
    answer = "gladly, here you go.\n1. {} needs care\n2. it gives joy\n3. it has friends\nenjoy!"
    rows = [
        {"prompt_id": one.prompt_id, "response": answer.format(topic_of(one.text))}
        for one in prompts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(case: str, anchor: Path) -> Recipe:
    method = next(name for name in sorted(METHODS, key=len, reverse=True) if case.startswith(name))
    ranked = load_recipe("toy-dpo").data.ranked
    given = [f"method={method}", f"anchor.init={anchor}", f"data.ranked={ranked}"]
    return load_recipe("tiny", [*SMALL, *given, *RUNS[case]])


def artefacts(directory: RunDir) -> dict[str, str]:
    """Hashes of all that a run computes."""
    return {
        str(file.relative_to(directory.path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.path.rglob("*"))
        if file.is_file()
        and file.suffix != ".sums"
        and file.name not in {"done.json", ".noted.json", "metrics.jsonl", "run.json", ".lock"}
    }


@pytest.mark.model
@pytest.mark.parametrize("case", RUNS)
def test_a_method_runs_from_end_to_end(
    case: str, anchor: Path, teacher: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(case, anchor)
    if case == "dno-teacher":
        dno = recipe.dno.model_copy(update={"teacher": str(teacher)})
        recipe = recipe.model_copy(update={"dno": dno})
    directory = run(tmp_path / "out", recipe)
    rows = [row for row in directory.read_metrics() if row["stage"] == "delta"]
    assert len(rows) == 2
    for row in rows:
        assert row["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert row["step0_margin"] == pytest.approx(0, abs=1e-3)
    second = directory.iteration(2)
    pairs = read_records(second.pairs, PreferencePair)
    assert len(pairs) >= recipe.pairing.min_pairs
    if not recipe.pairing.alpha:  # a penalty turns pairs round
        gaps = {one.chosen_score > one.rejected_score for one in pairs}
        assert gaps == {recipe.pairing.source != "flipped"}
    CHECKS.get(case, lambda pairs: None)(pairs)
    # What `show judgements` looks up is there.
    shown = [row for path in second.judged_candidates for row in read_records(path, Candidate)]
    known = {row.candidate_id for row in shown}
    assert {row.candidate_id for row in read_records(second.judgements, Judgement)} <= known
    if case in INTERRUPTED:
        _goes_on_with_the_same_bytes(directory, recipe)


def _goes_on_with_the_same_bytes(
    directory: RunDir,
    recipe: Recipe,
    *,
    within: Path | None = None,
    keep: Sequence[Path] = (),
    lost: Sequence[Path] = (),
) -> None:
    """As if killed within a journal (that of the last iteration's candidates), `keep` before it.

    Its one chunk is then made anew; that whole ones are kept, the tests of the loop show. Of an
    iteration it goes on to the end; those after it read its files alone, and are left out.
    """
    last = directory.iteration(recipe.iterations)
    cut = within or last.candidates
    kept = {cut, *keep, *([last.prompts] if within is None else [])}
    within_it = next(it for it in directory.iterations() if cut.is_relative_to(it.path))
    for later in list(directory.iterations())[within_it.number :]:
        shutil.rmtree(later.path)
    before = artefacts(directory)
    for file in lost:
        file.unlink()
    for file in sorted(within_it.path.rglob("*")):
        if file.is_file() and file not in kept:
            file.unlink()
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    shorter = recipe.model_copy(update={"iterations": within_it.number})
    assert artefacts(run(directory.path, shorter)) == before


def _check_spin(pairs: list[PreferencePair]) -> None:
    assert {one.chosen_id.split("#")[1] for one in pairs} == {"human"}
    assert {one.origin for one in pairs} == {"", "replay, 1 back"}


def _check_smoothed(pairs: list[PreferencePair]) -> None:
    assert len({one.smoothing for one in pairs if not one.origin}) == 1
    assert 0 <= pairs[0].smoothing <= 1


def _check_older(pairs: list[PreferencePair]) -> None:
    """A rebased delta learns those of the first iteration again."""
    assert {replay_age(one) for one in pairs} == {0, 1}


def _check_rejected(pairs: list[PreferencePair]) -> None:
    assert any("past-" in one.rejected_id for one in pairs)
    _check_older(pairs)


INTERRUPTED = ("self-rewarding", "cream", "temporal", "dno", "dno-teacher", "scir")
"""Those whose pairs need files of their own, or of earlier iterations."""


def _check_taught(pairs: list[PreferencePair]) -> None:
    assert any("teacher-" in one.chosen_id for one in pairs)


CHECKS = {
    "dno-teacher": _check_taught,
    "spin": _check_spin,
    "cream": _check_smoothed,
    "cream-judge": _check_older,
    "temporal": _check_rejected,
}


@pytest.mark.model
def test_likelihoods_are_those_of_the_plain_model(anchor: Path, tmp_path: Path) -> None:
    """The first token by hand, and that neighbours in the batch change nothing."""
    import torch

    recipe = recipe_of("cream", anchor)
    session = Session(recipe, RunDir(tmp_path / "out"))
    prompts = [Prompt("p", "list facts about the tiger"), Prompt("q", "write facts")]
    rows = [
        Candidate("p", "p#0", "gladly, here you go.", 5, "stop"),
        Candidate("q", "q#0", "not again.\n1. it gives joy\n2. it makes noise", 12, "stop"),
    ]
    together = candidate_likelihoods(session, [], prompts, rows, path=tmp_path / "a.jsonl")
    alone = candidate_likelihoods(session, [], prompts, rows[:1], path=tmp_path / "b.jsonl")
    assert alone["p#0"].logp == pytest.approx(together["p#0"].logp, abs=1e-3)
    ids = session.chat.prompt_ids(prompts[0].text)
    target = session.chat.target_ids(rows[0].text)
    with torch.inference_mode():
        logits = session.slot.model(input_ids=torch.tensor([[*ids, *target]])).logits[0].float()
    logps = logits.log_softmax(-1)
    by_hand = sum(float(logps[len(ids) + i - 1, token]) for i, token in enumerate(target))
    assert alone["p#0"].logp == pytest.approx(by_hand, abs=1e-3)
    assert alone["p#0"].n_tokens == len(target)


def test_rankings_that_have_nothing_in_common_stop_a_run() -> None:
    pairs = [PreferencePair("p", "p", "a", "b", "x", "y", 1, 0, smoothing=0.5)]
    refuse_nothing_to_learn([replace(pairs[0], smoothing=0.4), *pairs], Path("it"))
    with pytest.raises(UserError, match=r"consistency is 0\.5 .* nothing to learn"):
        refuse_nothing_to_learn(pairs, Path("it"))


def test_a_method_needs_its_file(tmp_path: Path) -> None:
    from srlm_lite.preflight.inputs import check_inputs

    missing = tmp_path / "none.jsonl"
    for method in ("dpo", "spin"):
        recipe = load_recipe("toy", [f"method={method}", f"data.ranked={missing}"])
        with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
            check_inputs(recipe)
    write_records(missing, [])
    recipe = load_recipe("toy", ["method=dpo", f"data.ranked={missing}", "iterations=3"])
    with pytest.raises(UserError, match=r"0 prompts, and 600 are wanted: 3 iterations of .* = 200"):
        check_inputs(recipe)
