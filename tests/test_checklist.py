"""The form `checklist`: items as a judge writes them, what holds of a reply, which pairs stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from messages import Told

from srlm_lite.forms import form_of
from srlm_lite.forms.base import JudgeAtWork
from srlm_lite.forms.checklist import (
    ChecklistForm,
    ChecklistSettings,
    checked_list,
    facts_of,
    item_line,
    judged_by,
    read_items,
    widest,
)
from srlm_lite.judging import mean_scores
from srlm_lite.recipe import load_recipe
from srlm_lite.records import (
    Candidate,
    Checklist,
    Judgement,
    PreferencePair,
    Prompt,
    Reply,
    Weighed,
)
from srlm_lite.run.files import read_records, write_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.stages.judges import judged

# --- items, as they are written -------------------------------------------------------------------


def test_lines_with_weights() -> None:
    reply = """Here is what to check:
80 | Does the reply name three trees?
- 40: Is it short?
2. (100) | at least 3 bullets
0 | Is it long?
80 | does the reply name THREE trees
900 | Is it kind?"""
    assert read_items(reply, most=9) == [
        ("Does the reply name three trees?", 80),
        ("Is it short?", 40),
        ("at least 3 bullets", 100),
        ("Is it kind?", 100),
    ]
    assert read_items(reply, most=2) == read_items(reply, most=9)[:2]
    left = read_items(reply, most=9, apart_from=["Is it short"])
    assert [text for text, _ in left] == [
        "Does the reply name three trees?",
        "at least 3 bullets",
        "Is it kind?",
    ]


def test_lines_without_weights() -> None:
    """A numbered line is an item, whatever it says; others only where they ask or are a check."""
    reply = "The list:\n1. Names three trees.\nIs it short?\nat most 20 words\nThat is all.\n- 7"
    assert read_items(reply, most=9) == [
        ("Names three trees.", 100),
        ("Is it short?", 100),
        ("at most 20 words", 100),
    ]
    assert read_items("", most=9) == [] and read_items(f"5 | {'x' * 301}?", most=9) == []


# --- what holds of a reply ------------------------------------------------------------------------

LIST = Checklist(
    "p",
    "Name trees.",
    (
        {"item": "Does it name trees?", "weight": 80, "by": "judge"},
        {"item": "at least 2 bullets", "weight": 40, "by": "code"},
        {"item": "Is it kind?", "weight": 40, "by": "judge"},
    ),
)
TWO = Candidate("p", "p#0", "- Oak\n- Fir", 4, "stop")
ONE = Candidate("p", "p#1", "- Oak", 2, "stop")


def weighed(*p: tuple[float, float] | None, of: str = "p#0") -> dict[str, Weighed]:
    return {f"{of}:{at}": Weighed(f"{of}:{at}", found) for at, found in zip((0, 2), p, strict=True)}


def test_the_score_is_the_weighted_share() -> None:
    """Yes has .6 and no .2: .75. (80 * .75 + 40 * 1 + 40 * .25) / 160 = .6875."""
    row = judged_by(LIST, TWO, weighed((0.6, 0.2), (0.1, 0.3)))
    assert row.score == 0.6875
    assert row.items == (
        ("Does it name trees?", 0.75, "judge"),
        ("at least 2 bullets", 1.0, "code"),
        ("Is it kind?", 0.25, "judge"),
    )
    other = judged_by(LIST, ONE, weighed((0.6, 0.2), (0.1, 0.3), of="p#1"))
    assert other.score == 0.4375  # without the second bullet


def test_an_unreadable_item_counts_for_nothing() -> None:
    """(80 * .75 + 40) / 120."""
    row = judged_by(LIST, TWO, weighed((0.6, 0.2), (0.001, 0.002)))
    assert row.score == 0.8333 and row.items is not None and row.items[2][1] is None
    only = Checklist("p", "Name trees.", LIST.items[:1])
    nothing = judged_by(only, TWO, {"p#0:0": Weighed("p#0:0", (0.001, 0.0))})
    assert nothing.score is None and nothing.finish_reason == "stop"


def test_a_question_that_does_not_fit_gives_no_verdict() -> None:
    row = judged_by(LIST, TWO, weighed((0.6, 0.2), None))
    assert row.score is None and row.finish_reason == "length"


def test_facts_and_words() -> None:
    """Two rows with 3 items: .75, 1, .25 and .75, 0, unreadable; the five known have 2.75."""
    rows = [
        judged_by(LIST, TWO, weighed((0.6, 0.2), (0.1, 0.3))),
        judged_by(LIST, ONE, weighed((0.6, 0.2), (0.0, 0.0), of="p#1")),
    ]
    assert facts_of([LIST], rows) == {
        "items": 3.0,
        "by_code": 0.3333,
        "items_hold": 0.55,
        "items_unreadable": 0.1667,
    }
    assert ChecklistForm.told(rows[0]) == (
        "0.75: Does it name trees?",
        "yes, by code: at least 2 bullets",
        "0.25: Is it kind?",
    )
    assert item_line("x", None, "judge") == "unreadable: x"
    assert item_line("x", 0.0, "code") == "no, by code: x"


# --- which pairs stay -----------------------------------------------------------------------------


def pair(number: int) -> PreferencePair:
    return PreferencePair(f"p{number}", "P?", f"{number}+", f"{number}-", "a", "b", 1.0, 0.0)


def rows(number: int, better: list[float | None], worse: list[float | None]) -> list[Judgement]:
    return [
        Judgement(
            f"{number}{sign}", 0, "", 0.5, items=tuple((str(at), p, "judge") for at, p in found)
        )
        for sign, found in (("+", enumerate(better)), ("-", enumerate(worse)))
    ]


def test_pairs_with_the_widest_gap_on_an_item() -> None:
    """Gaps: .9 (on the second item, though worse), .2, .5, none known, .6. Two of four stay, and
    the pair of which no item is known."""
    pairs = [pair(number) for number in range(5)]
    judgements = [
        *rows(0, [0.5, 0.0], [0.5, 0.9]),
        *rows(1, [0.9, 0.5], [0.7, 0.5]),
        *rows(2, [0.9, None], [0.4, 0.0]),
        *rows(3, [None], [0.3]),
        *rows(4, [0.8], [0.2]),
    ]
    left = widest(pairs, judgements, share=0.4)
    assert [one.prompt_id for one in left] == ["p0", "p3", "p4"]
    assert widest(pairs, judgements, share=1.0) == pairs
    assert [one.prompt_id for one in widest(pairs[1:3], judgements, share=0.01)] == ["p2"]
    assert widest(pairs, [], share=0.4) == pairs


# --- a form, asked --------------------------------------------------------------------------------


class HandJudge(JudgeAtWork):
    """A judge whose replies are written here; what it is asked is kept."""

    def __init__(self, replies: dict[str, str], yes: dict[str, float]) -> None:
        self.replies, self.yes = replies, yes
        self.asked: list[Any] = []
        self.files: dict[str, list[Any]] = {}
        self.where = "the run"

    @property
    def rubric(self) -> Any:
        raise AssertionError("not read")

    def vote(self, prompts: Any, candidates: Any) -> Any:
        raise AssertionError("no votes")

    def ask(self, questions: Any, *, about: str, max_new_tokens: int | None = None) -> Any:
        self.asked.append((about, [one.text for one in questions]))
        return {one.name: Reply(one.name, self.replies[f"{about} {one.name}"]) for one in questions}

    def weigh(self, questions: Any, options: Any, *, about: str, setting: str) -> Any:
        self.asked.append((about, [one.text for one in questions]))
        return {
            one.name: Weighed(one.name, (self.yes[one.name], 1 - self.yes[one.name]))
            for one in questions
        }

    def length(self, text: str) -> int:
        return len(text)

    def write(self, name: str, rows: Any, *, shared: bool = False) -> None:
        assert shared == (name == "checklists")
        self.files[name] = list(rows)

    def read(self, name: str, kind: Any, *, shared: bool = False) -> Any:
        return self.files.get(name)


def test_checklists_are_written_once() -> None:
    recipe = load_recipe("toy-checklist", ["checklist.reference=false"])
    own = ChecklistSettings(standing=("Is it kind?",), standing_weight=20)
    form = ChecklistForm(recipe, own)
    judge = HandJudge(
        {"checklist items p": "60 | Does it name trees?\n20 | at least 2 bullets\n9 | Is it kind?"},
        {"p#0:0": 0.5, "p#0:2": 1.0, "p#1:0": 1.0, "p#1:2": 0.0},
    )
    prompts, candidates = [Prompt("p", "Name trees.")], [TWO, ONE]
    found, facts = form.judge(judge, prompts, candidates)
    # (60 * .5 + 20 * 1 + 20 * 1) / 100, and (60 * 1 + 0 + 0) / 100.
    assert mean_scores(found, min_votes=1) == {"p#0": 0.7, "p#1": 0.6}
    assert [about for about, _ in judge.asked] == ["checklist items", "item weights"]
    [written] = judge.files["checklists"]
    assert [(one["weight"], one["by"]) for one in written.items] == [
        (60, "judge"),
        (20, "code"),
        (20, "judge"),
    ]
    assert (facts["items"], facts["by_code"]) == (3.0, 0.3333)
    assert "Does it name trees?" in judge.asked[1][1][0] and "- Oak" in judge.asked[1][1][0]
    # People have taken the last item out and made the first one a matter of code.
    edited = ({"item": "contains 'fir'", "weight": 1, "by": "code"}, *written.items[1:2])
    judge.files["checklists"] = [Checklist("p", "Name trees.", edited)]
    again, _ = form.judge(judge, prompts, candidates)
    assert mean_scores(again, min_votes=1) == {"p#0": 1.0, "p#1": 0.0}
    assert judge.asked[2:] == [("item weights", [])]


def test_a_reference_answer_is_shown() -> None:
    own = ChecklistSettings(
        standing=("Is it kind?",), reference=True, item_template="checklist-item-reference"
    )
    judge = HandJudge(
        {"checklist items p": "nothing", "reference answers p": "Elm, my friend."},
        {"p#0:0": 0.25},
    )
    found, _ = ChecklistForm(load_recipe("toy"), own).judge(
        judge, [Prompt("p", "Name trees.")], [TWO]
    )
    assert found[0].score == 0.25
    assert "Elm, my friend." in judge.asked[2][1][0]
    assert judge.files["checklists"][0].reference == "Elm, my friend."


@pytest.mark.parametrize(
    "items",
    [
        (),
        ({"item": " ", "weight": 1, "by": "judge"},),
        ({"item": "Is it kind?", "weight": 0, "by": "judge"},),
        ({"item": "Is it kind?", "weight": "9", "by": "judge"},),
        ({"item": "Is it kind?", "weight": 1, "by": "me"},),
        ({"item": "Is it kind?", "weight": 1, "by": "code"},),
    ],
)
def test_a_checklist_that_somebody_has_broken(items: Any, told: Told) -> None:
    with told.refused():
        checked_list(Checklist("p", "P?", items), where="out/checklists.jsonl")


@pytest.mark.parametrize(
    "settings", [["checklist.reference=true"], ["checklist.item_template=checklist-item-reference"]]
)
def test_a_question_without_its_places(settings: list[str], told: Told) -> None:
    with told.refused():
        form_of(load_recipe("toy-checklist", settings)).preflight()


def test_options_that_are_one(told: Told) -> None:
    with told.refused():
        load_recipe("toy-checklist", ["checklist.options=[yes, Yes]"])


# --- on a model -----------------------------------------------------------------------------------


@pytest.mark.model
def test_the_bare_toy_base_is_asked_by_a_list_of_the_run(tmp_path: Path) -> None:
    """It has never seen such a question, but can be asked; by code it is right."""
    recipe = load_recipe("toy-checklist", ["checklist.standing=[the opening is good.]"])
    session = Session(recipe, RunDir(tmp_path / "out"))
    texts = ["1. oak has history\n2. oak needs care\n3. oak gives joy", "1. oak has history"]
    prompts = [Prompt("p", "show me facts about the oak")]
    candidates = [Candidate("p", f"p#{at}", text, 9, "stop") for at, text in enumerate(texts)]
    items = (
        {"item": "list 3 items and more.", "weight": 9, "by": "code"},
        {"item": "the opening is good.", "weight": 1, "by": "judge"},
    )
    path = session.run.shared("checklists")
    path.parent.mkdir(parents=True)
    write_records(path, [Checklist("p", prompts[0].text, items)])
    found, facts = judged(
        session,
        [],
        prompts,
        candidates,
        place=lambda name: tmp_path / f"{name}.jsonl",
        stage="judgements",
        seed_path=(0,),
    )
    assert [row.items[0][1] for row in found if row.items] == [1.0, 0.0]
    assert facts["by_code"] == 0.5
    assert [row.candidate_id for row in read_records(tmp_path / "judgements.jsonl", Judgement)] == [
        "p#0",
        "p#1",
    ]
