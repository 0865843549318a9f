"""Candidates against each other: who meets, what verdicts come to, and how far to trust them."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest
from commands import Cli
from messages import Told
from toy_run import make_toy_run

from srlm_lite.declared import Facts, Sizes, Weighs
from srlm_lite.evaluate.gate import findings
from srlm_lite.forms import form_in, form_of, pairwise
from srlm_lite.forms.base import JudgeAtWork, JudgeQuestion
from srlm_lite.forms.tournament import (
    AllPairs,
    Bracket,
    contest_facts,
    credits,
    shares,
    strengths,
)
from srlm_lite.judging import Rubric, load_rubric
from srlm_lite.preflight.inputs import judge_data
from srlm_lite.preflight.launch import Launch
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.records import (
    Annotation,
    Candidate,
    Contest,
    Judgement,
    PreferencePair,
    Prompt,
    RankedReply,
    Reply,
    Weighed,
)
from srlm_lite.report.facts import gather
from srlm_lite.report.html import html
from srlm_lite.report.pack import pack
from srlm_lite.run.files import read_records, write_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Gate
from srlm_lite.stages.at_work import AtWork
from srlm_lite.stages.evaluation import evaluation


def contest(a: str, b: str, first: float | None, last: float | None) -> Contest:
    return Contest("p", a, b, first, last)


def rounded(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if score is None else round(score, 4) for name, score in scores.items()}


# a beats b in both orders, b and c once each, c cannot be read against a but in one order.
THREE = (
    contest("a", "b", 0.9, 0.8),
    contest("a", "c", 0.6, None),
    contest("b", "c", 0.7, 0.4),
)


def test_a_score_is_the_share_of_won_verdicts() -> None:
    """a: 3 of 3; b: 0 of 2 and 1 of 2; c: 0 of 1 and 1 of 2."""
    assert rounded(shares("abc", credits(THREE))) == {"a": 1.0, "b": 0.25, "c": 0.3333}


def test_or_the_mean_probability_of_winning() -> None:
    """a: (.9 + .8 + .6) / 3; b: (.1 + .2 + .7 + .4) / 4; c: (.4 + .3 + .6) / 3."""
    found = rounded(shares("abc", credits(THREE, soft=True)))
    assert found == {"a": 0.7667, "b": 0.35, "c": 0.4333}


def test_a_tie_is_half_a_win_and_nobody_s_verdicts_are_no_score() -> None:
    found = shares("abc", credits([contest("a", "b", 0.5, 1.0)]))
    assert found == {"a": 0.75, "b": 0.25, "c": None}


def test_a_longer_winner_counts_less_and_far_lengths_not_at_all() -> None:
    """a has 10 characters, b 8, c 5: a and b differ by a fifth of the longer, the others by more.

    a's win over b counts 8 / 10; b's over a would count 10 / 8.
    """
    lengths = {"a": 10, "b": 8, "c": 5}
    both = [contest("a", "b", 1.0, 0.0), contest("a", "c", 0.0, 0.0)]
    found = rounded(shares("abc", credits(both, lengths=lengths, within=0.2)))
    assert found == {"a": 0.4, "b": 0.625, "c": None}


def test_strengths_order_a_chain_and_leave_out_who_has_not_played() -> None:
    """a beats b, b beats c: a and c have never met, and are told apart all the same."""
    given = list(credits([contest("a", "b", 0.9, 0.9), contest("b", "c", 0.9, 0.9)]))
    found = strengths("abcd", given)
    a, b, c = (found[name] or 0.0 for name in "abc")
    assert a > b > c and b == pytest.approx(0.5, abs=0.1)
    assert found["d"] is None
    # Of two that win as often, who beats the stronger ones is the stronger.
    equal = strengths("ab", list(credits([contest("a", "b", 1.0, 0.0)])))
    assert equal == pytest.approx({"a": 0.5, "b": 0.5})


def test_how_far_verdicts_can_be_trusted() -> None:
    """Three contests: the first says a twice; the second says whoever is shown first; the third
    could be read in one order alone.

    Verdicts: a (first), a (last), a (first), c (first), c (first): four of five for the first.
    The one contest won by somebody longer is a's over b. a beats b, c beats b.
    """
    found = contest_facts(
        [
            contest("a", "b", 0.9, 0.8),
            contest("a", "c", 0.9, 0.1),
            contest("c", "b", 0.7, None),
        ],
        lengths={"a": 3, "b": 2, "c": 1},
        mass=[0.5, 1.0],
    )
    assert found == {
        "comparisons": 3,
        "verdicts": 5,
        "position_consistency": 0.5,
        "first_wins": 0.8,
        "intransitive": None,  # a and c have no winner
        "triples": 0,
        "longer_wins": 0.5,
        "verdict_mass": 0.75,
    }


def test_triples_that_go_in_a_circle() -> None:
    circle = [contest("a", "b", 1, 1), contest("b", "c", 1, 1), contest("a", "c", 0, 0)]
    line = [contest("d", "e", 1, 1), contest("e", "f", 1, 1), contest("d", "f", 1, 1)]
    lengths = dict.fromkeys("abcdef", 1)
    found = contest_facts([*circle, *line], lengths=lengths)
    assert (found["intransitive"], found["triples"], found["longer_wins"]) == (0.5, 2, None)


def play(field: Any, better: Callable[[str, str], float | None]) -> tuple[int, list[int]]:
    """Contests of a field until nobody meets any more: how many, and of each round."""
    rounds = []
    while meetings := field.meetings():
        rounds.append(len(meetings))
        field.take([contest(a, b, better(a, b), better(a, b)) for a, b in meetings])
        assert len(rounds) < 20
    return sum(rounds), rounds


@pytest.mark.parametrize("n", [2, 3, 5, 7, 8, 12, 16])
def test_a_bracket_finds_best_and_worst_of_a_judge_that_is_right(n: int) -> None:
    """N - 1 contests for the seeds, N - 1 until the best is left, and N // 2 - 1 for the worst."""
    names = [f"{i:02}" for i in range(n)]
    shuffled = Random(n).sample(names, n)
    field = Bracket(shuffled, Random(0))
    contests, rounds = play(field, lambda a, b: 0.5 + (int(a) - int(b)) / 100)
    assert contests == 2 * (n - 1) + n // 2 - 1
    assert len(rounds) == 1 + (n - 1).bit_length()
    scores = field.scores
    assert sorted(scores) == names
    assert (max(scores.values()), min(scores.values())) == (1.0, 0.0)
    assert scores[names[-1]] == 1.0 and scores[names[0]] == 0.0


def test_a_bracket_goes_on_where_nothing_can_be_read() -> None:
    field = Bracket("abcde", Random(1))
    assert play(field, lambda a, b: None)[0] == 4 + 4 + 1
    assert sorted(field.scores.values()) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_everybody_meets_everybody_once() -> None:
    field = AllPairs("abcd")
    assert play(field, lambda a, b: 0.5) == (6, [6])


class Court(JudgeAtWork):
    """A judge whose verdicts are a function of the two answers shown."""

    where = "here"

    def __init__(self, recipe: Recipe, p_first: Callable[[str, str], float | None]) -> None:
        self.recipe, self._p_first = recipe, p_first
        self.written: dict[str, Sequence[Any]] = {}
        self.asked: list[list[JudgeQuestion]] = []

    @property
    def rubric(self) -> Rubric:
        return load_rubric("toy")

    def vote(self, *args: Any) -> tuple[list[Judgement], Facts]:
        raise AssertionError("it does not vote")

    def _shown(self, question: JudgeQuestion) -> tuple[str, str]:
        first, second = question.text.split("\n1:\n")[1].split("\n2:\n")
        return first, second

    def weigh(
        self, questions: Sequence[JudgeQuestion], options: Sequence[str], **_: Any
    ) -> dict[str, Weighed]:
        self.asked.append(list(questions))
        found = {}
        for one in questions:
            p = self._p_first(*self._shown(one))
            found[one.name] = Weighed(one.name, None if p is None else (p / 2, (1 - p) / 2))
        return found

    def ask(
        self, questions: Sequence[JudgeQuestion], *, about: str, max_new_tokens: int | None = None
    ) -> dict[str, Reply]:
        self.asked.append(list(questions))
        found = {}
        for one in questions:
            p = self._p_first(*self._shown(one))
            told = "Who knows?" if p is None else "Well.\n1" if p > 0.5 else "Well.\n2"
            found[one.name] = Reply(one.name, told)
        return found

    def length(self, text: str) -> int:
        return len(text.split())

    def write(self, name: str, rows: Sequence[Any]) -> None:
        self.written[name] = list(rows)

    def read(self, name: str, kind: type[Any]) -> None:
        return None


def case(*texts: str, prompt_id: str = "p") -> list[Candidate]:
    return [
        Candidate(prompt_id, f"{prompt_id}#{i}", text, 1, "stop") for i, text in enumerate(texts)
    ]


def judged(
    candidates: Sequence[Candidate], p_first: Callable[[str, str], float | None], *overrides: str
) -> tuple[dict[str, float | None], Facts, Court]:
    recipe = load_recipe("toy-pairwise", ["pairwise.score=wins", *overrides])
    court = Court(recipe, p_first)
    prompts = [Prompt(name, f"about {name}") for name in {row.prompt_id for row in candidates}]
    rows, facts = form_of(recipe).judge(court, prompts, candidates)
    assert [row.candidate_id for row in rows] == [row.candidate_id for row in candidates]
    assert court.written["judgements"] == rows
    return {row.candidate_id: row.score for row in rows}, facts, court


def longer(first: str, second: str) -> float:
    return 0.9 if len(first) > len(second) else 0.1


def test_each_two_answers_of_a_prompt_are_shown_in_both_orders() -> None:
    rows = [*case("a", "bb", "ccc"), *case("dd", "e", prompt_id="q")]
    scores, facts, court = judged(rows, longer)
    assert scores == {"p#0": 0.0, "p#1": 0.5, "p#2": 1.0, "q#0": 1.0, "q#1": 0.0}
    [questions] = court.asked
    assert len(questions) == 2 * (3 + 1)
    assert {one.about for one in questions} == {"p", "q"}
    assert facts["position_consistency"] == 1.0 and facts["longer_wins"] == 1.0
    assert facts["comparisons"] == 4 and facts["verdict_mass"] == 0.5
    assert [row.verdicts for row in court.written["judgements"]] == [4, 4, 4, 2, 2]
    assert len(court.written["comparisons"]) == 4


def test_a_judge_that_likes_the_first_place_tells_nobody_apart() -> None:
    scores, facts, _ = judged(case("a", "bb", "ccc"), lambda first, second: 0.8)
    assert set(scores.values()) == {0.5}
    assert (facts["position_consistency"], facts["first_wins"]) == (0.0, 1.0)


def test_answers_alike_are_one_and_one_alone_is_in_the_middle() -> None:
    rows = [*case("a", "bb", "a"), *case("x", "x", prompt_id="q")]
    scores, _, court = judged(rows, longer)
    assert scores == {"p#0": 0.0, "p#1": 1.0, "p#2": 0.0, "q#0": 0.5, "q#1": 0.5}
    assert len(court.asked[0]) == 2


def test_what_cannot_be_read_is_no_score() -> None:
    """Against c nothing can be read; c has no verdict at all."""
    scores, _, court = judged(
        case("a", "bb", "ccc"), lambda a, b: None if "ccc" in (a, b) else longer(a, b)
    )
    assert scores == {"p#0": 0.0, "p#1": 1.0, "p#2": None}
    unread = court.written["judgements"][2]
    assert (unread.text, unread.finish_reason, unread.verdicts) == ("", "stop", 0)


def test_verdicts_that_are_written() -> None:
    scores, facts, court = judged(case("a", "bb"), longer, "pairwise.verdict=reply")
    assert scores == {"p#0": 0.0, "p#1": 1.0}
    assert "verdict_mass" not in facts
    [row] = court.written["comparisons"]
    assert (row.said_first, row.said_last) == ("Well.\n2", "Well.\n1")


def test_many_candidates_meet_in_a_bracket() -> None:
    """Eight answers: 7 + 7 + 3 contests in place of 28, in four rounds."""
    texts = ["x" * i for i in (3, 1, 8, 5, 7, 2, 6, 4)]
    scores, facts, court = judged(case(*texts), longer)
    assert facts["comparisons"] == 17 and len(court.asked) == 4
    assert (scores["p#2"], scores["p#1"]) == (1.0, 0.0)
    rounds = [row.round for row in court.written["comparisons"]]
    assert rounds == [None] * 7 + [2] * 4 + [3] * 4 + [4] * 2


def test_length_control_asks_only_about_answers_of_a_length() -> None:
    texts = ("x" * 10, "y" * 8, "z" * 4)
    scores, _, court = judged(
        case(*texts), lambda a, b: 0.9 if "x" in a else 0.1, "pairwise.length_within=0.2"
    )
    assert len(court.asked[0]) == 2
    assert scores == {"p#0": 0.8, "p#1": 0.0, "p#2": None}


def test_the_scale_is_that_of_a_share() -> None:
    rubric = load_rubric("toy")

    def scale(*overrides: str) -> tuple[float, float]:
        return form_of(load_recipe("toy-pairwise", list(overrides))).scale(rubric)

    assert scale() == (0.0, 1.0)
    # A winner of 8 characters against one of 10 has 10 / 8.
    assert scale("pairwise.length_within=0.2") == (0.0, 1.25)
    assert scale("pairwise.length_within=0.2", "pairwise.score=bradley-terry") == (0.0, 1.0)


def ranked(name: str, *ranks: int) -> list[RankedReply]:
    return [
        RankedReply(name, f"about {name}", f"{name}{i}", f"reply {name} {i}", rank)
        for i, rank in enumerate(ranks)
    ]


def test_lessons_are_ranked_replies_in_both_orders() -> None:
    """Two of three replies are ranked alike: two pairs, four questions, each winner twice."""
    form = form_of(load_recipe("toy-pairwise"))
    rows = form.lessons([ranked("a", 0, 1, 1), ranked("b", 0, 0)], load_rubric("toy"))
    assert [(row.prompt_id, row.response) for row in rows] == [
        ("a0>a1", "1"),
        ("a1>a0", "2"),
        ("a0>a2", "1"),
        ("a2>a0", "2"),
    ]
    assert rows[1].prompt.endswith("1:\nreply a 1\n2:\nreply a 0")


def test_lessons_of_a_prompt_with_many_replies_are_drawn() -> None:
    form = form_of(load_recipe("toy-pairwise", ["pairwise.lessons=6"]))
    group = ranked("a", *range(6))
    rows = form.lessons([group], load_rubric("toy"))
    assert len(rows) == 6
    pairs = {frozenset(row.prompt_id.split(">")) for row in rows}
    assert len(pairs) == 3 and pairs <= {
        frozenset((a.response_id, b.response_id)) for a, b in combinations(group, 2)
    }
    assert rows == form.lessons([group], load_rubric("toy"))


@pytest.mark.parametrize(
    ("n", "overrides", "questions"),
    [(4, [], 12), (6, [], 30), (7, [], 28), (4, ["pairwise.all_pairs=3"], 14)],
)
def test_the_plan_counts_the_questions(n: int, overrides: list[str], questions: int) -> None:
    """N (N - 1) questions, or in a bracket two for each of its contests: of ten prompts."""
    form = form_of(load_recipe("toy-pairwise", overrides))
    sizes = Sizes(256, 20, 64, 90, 100, 72, 0)
    [phase] = form.phases(sizes, prompts=10, answers=10 * n, at_once=40)
    assert isinstance(phase, Weighs)
    assert phase.texts == 10 * questions


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("toy-meta", ["judge.form=pairwise"]),
        ("toy-meta", ["judge.rationale=false"]),
        ("toy-temporal", ["judge.form=pairwise"]),
        ("toy-dno", ["judge.form=pairwise"]),
        ("toy-pairwise", ["pairwise.winners=['Winner: A', 'winner: a']"]),
    ],
)
def test_methods_that_cannot_take_a_form_say_so(
    recipe: str, overrides: list[str], told: Told
) -> None:
    with told.refused():
        load_recipe(recipe, overrides)


def test_a_form_s_settings_count_for_it_alone() -> None:
    """A recipe with another form is the same run whatever its section says."""
    grade = load_recipe("toy").digest()
    assert load_recipe("toy", ["pairwise.score=bradley-terry"]).digest() == grade
    compared = load_recipe("toy-pairwise").digest()
    assert load_recipe("toy-pairwise", ["pairwise.score=bradley-terry"]).digest() != compared
    assert compared != grade


def forms_run(path: Path, *overrides: str) -> RunDir:
    return make_toy_run(
        path,
        models=2,
        overrides=(
            "judge.form=pairwise",
            "pairwise.template=toy-pairwise",
            "pairwise.winners=['1', '2']",
            "evaluate.policy_prompts=6",
            "evaluate.eft_prompts=4",
            *overrides,
        ),
    )


@pytest.fixture
def hears_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy base without an anchor that learned to compare would rather say something else."""
    monkeypatch.setattr(pairwise, "LEAST_MASS", 0.0)


@pytest.mark.model
@pytest.mark.usefixtures("hears_anything")
def test_a_judge_that_compares_decides_a_comparison_in_its_form(cli: Cli, tmp_path: Path) -> None:
    """The same question and the same verdicts as of candidates; nothing is written."""
    run = forms_run(tmp_path / "run")
    options = ["--adapters", run.path, "1", "anchor", "--json"]
    done = cli("compare", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["judge"] == {"name": "iteration 1", "judging": "pairwise", "form": "pairwise"}
    [result] = run.comparisons.finished()
    contests = read_records(result.file("comparisons"), Contest)
    rows = read_records(result.annotations, Annotation)
    for row in rows:
        held = next((one for one in contests if one.prompt_id == row.prompt_id), None)
        if held is None:
            assert row.output_1 == row.output_2 or not (row.output_1 and row.output_2)
            continue
        a, b = (p is not None and p > 0.5 for p in (held.p_shown_first, held.p_shown_last))
        assert row.verdicts == ("A" if a else "B", "B" if b else "A")
        assert row.preference == (1.5 if a != b else 1.0 + a)
    assert not result.verdicts.exists()


@pytest.mark.model
@pytest.mark.usefixtures("hears_anything")
def test_an_evaluation_holds_answers_against_the_anchor_s(tmp_path: Path) -> None:
    """A win rate in the place of a grade: the anchor's own is a half, and needs no question."""
    run = forms_run(tmp_path / "run", "pairwise.score=probability")
    session = Session(run.recipe(), run)
    _, told = evaluation(session, run.anchor, session.stack(0))
    assert told["judge"]["comparisons"] == 4 * 6
    assert told["judge"]["position_consistency"] is not None
    anchor = told["policy"]
    assert (anchor["anchor_score"], anchor["self_score"], anchor["score_scale"]) == (
        0.5,
        0.5,
        [0, 1],
    )
    asked = run.anchor.evaluation_dir / "grades_anchor_comparisons.jsonl"
    assert read_records(asked, Contest) == []
    later = run.iteration(1)
    _, told = evaluation(session, later, session.stack(1))
    contests = read_records(later.evaluation_dir / "grades_self_comparisons.jsonl", Contest)
    wins = []
    answers = {
        whose: {
            row.candidate_id: row.text
            for row in read_records(place.evaluation_dir / "answers_sampled.jsonl", Candidate)
        }
        for whose, place in (("own", later), ("anchor", run.anchor))
    }
    held = {one.prompt_id: one for one in contests}
    for name, text in answers["own"].items():
        other, contest = answers["anchor"][name], held.get(name.partition("#")[0])
        if contest is None:
            wins.append(0.5 if bool(text) == bool(other) else float(bool(text)))
        else:
            wins.append(fmean(contest.readable))
    assert told["policy"]["self_score"] == pytest.approx(fmean(wins), abs=1e-4)
    assert len(set(wins)) > 1


def test_a_gate_on_the_order_of_verdicts_and_on_circles() -> None:
    def judge(**figures: float) -> dict[str, Any]:
        return {"judge": {"score_histogram": {"0.5": 1, "0": 1}, **figures}, "policy": {}}

    def failed(**figures: float) -> list[str]:
        return [found.gate for found in findings([judge(**figures)], Gate())]

    assert failed(position_consistency=0.6, intransitive=0.2, triples=100) == []
    assert failed(position_consistency=0.4, first_wins=0.9) == ["position_consistency"]
    # One in four is chance, and a tenth more is with a hundred triples.
    assert failed(intransitive=0.34, triples=100) == []
    assert failed(intransitive=0.36, triples=100) == ["intransitive"]


def test_an_anchor_needs_replies_that_are_ranked_apart(told: Told, tmp_path: Path) -> None:
    """The toy's own judge data has one reply a prompt."""
    data = Path(load_recipe("toy").data.dir)
    launch = Launch(load_recipe("toy-pairwise", [f"data.ranked={data / 'eft_train.jsonl'}"]))
    with told.refused():
        judge_data(launch)
    assert judge_data(Launch(load_recipe("toy-pairwise"))).text.endswith("of judge.form=pairwise")


@pytest.fixture
def shown(tmp_path: Path) -> RunDir:
    """A run with one prompt whose two answers have met."""
    run = forms_run(tmp_path / "run")
    place = run.iteration(1)
    good, bad = case("a good one", "a bad one")
    record = PreferencePair("p", "about p", "p#0", "p#1", good.text, bad.text, 1.0, 0.0)
    write_records(place.prompts, [Prompt("p", "about p")])
    write_records(place.candidates, [good, bad])
    write_records(
        place.judgements,
        [Judgement("p#0", 0, "", 1.0, verdicts=2), Judgement("p#1", 0, "", 0.0, verdicts=2)],
    )
    write_records(place.comparisons, [Contest("p", "p#0", "p#1", 0.91, 0.62)])
    write_records(place.pairs, [record])
    return run


def test_show_tells_who_won_against_whom(cli: Cli, shown: RunDir) -> None:
    done = cli("show", "pairs", "--adapters", shown.path, "--iteration", "1")
    assert done.returncode == 0, done.stderr
    head = done.stdout.splitlines()[0]
    assert "share of verdicts won 1 against 0" in head
    assert "the chosen one wins with 0.91 where it is shown first, with 0.62 last" in head
    assert "chosen (p#0; of 2 verdicts)" in done.stdout
    done = cli("show", "judgements", "--adapters", shown.path, "--iteration", "1")
    assert "the first wins with 0.91 where it is shown first, with 0.62 last" in done.stdout
    told = cli("show", "judgements", "--adapters", shown.path, "--iteration", "1", "--json")
    assert json.loads(told.stdout) == Contest("p", "p#0", "p#1", 0.91, 0.62).to_row()


def test_the_pair_browser_has_the_comparison_and_the_verdicts(shown: RunDir) -> None:
    facts = gather(shown)
    [pair] = facts.pairs
    assert facts.words.score == "share of verdicts won"
    packed = pack([pair], room=10_000, told=form_in(facts.settings).told)
    [row] = json.loads(gzip.decompress(base64.b64decode(packed.data)))
    assert row["vs"] == (
        "against the rejected one the chosen one wins with 0.91 where it is shown first, "
        "with 0.62 last"
    )
    assert row["cv"] == [[1.0, None, "", ["of 2 verdicts"]]]
    page = html(facts)
    assert "pairwise" in page and "verdicts by" in page


def test_what_one_made_of_the_other_is_told_from_either_side() -> None:
    met = Contest("p", "a", "b", 0.9, None)
    assert met.told("a") == "wins with 0.90 where it is shown first, with unreadable last"
    assert met.told("b") == "wins with unreadable where it is shown first, with 0.10 last"


@pytest.mark.model
@pytest.mark.usefixtures("hears_anything")
def test_judging_in_pairs_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """With the same bytes; a chunk that was half written is asked again."""
    run = forms_run(tmp_path / "run", "rollout.chunk_prompts=2", "pairwise.score=probability")
    prompts = [Prompt(name, f"list facts about the {name}") for name in ("oak", "rose", "boat")]
    rows = [
        row
        for one in prompts
        for row in case(
            f"1. {one.text.split()[-1]} has history",
            "gladly, here you go.\n1. it gives joy\n2. it needs care",
            "go away.",
            prompt_id=one.prompt_id,
        )
    ]

    def judged_now() -> tuple[list[Judgement], Facts, dict[str, bytes]]:
        place = run.iteration(2)
        found, facts = AtWork(Session(run.recipe(), run), place).judged(prompts, rows)
        files = ("judgements", "comparisons", "comparison_weights")
        return found, facts, {name: place.file(name).read_bytes() for name in files}

    found, facts, files = judged_now()
    assert (facts["comparisons"], facts["verdicts"]) == (9, 18)
    assert len({row.score for row in found}) > 3
    weights = run.iteration(2).file("comparison_weights")
    weights.write_bytes(files["comparison_weights"][: len(files["comparison_weights"]) * 2 // 3])
    for name in ("judgements", "comparisons"):
        run.iteration(2).file(name).unlink()
    assert judged_now() == (found, facts, files)
