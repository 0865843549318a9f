"""Pairs with a known loser: answers to an instruction that only looks like the one asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from messages import Told

from srlm_lite.planning.lengths import lengths_of
from srlm_lite.preflight.inputs import data
from srlm_lite.preflight.launch import Launch
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.records import Candidate, FinishReason, Prompt, RankedReply, Reply
from srlm_lite.run.files import read_jsonl, read_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.shipped import recipes_dir
from srlm_lite.stages.anchor import anchor
from srlm_lite.stages.disturbed import LOSER, ranked, read_instruction
from srlm_lite.stages.seed_data import prompts_to_disturb
from srlm_lite.tasks import toy

PROMPT = Prompt("p", "Name a tree.")


@pytest.mark.parametrize(
    ("text", "finish", "problem"),
    [
        ("Name a tool.", "length", "unfinished"),
        (" \n", "stop", "empty"),
        ("...", "stop", "empty"),
        ("name a tree", "stop", "same"),
    ],
)
def test_a_reply_that_is_no_other_instruction(
    text: str, finish: FinishReason, problem: str
) -> None:
    assert read_instruction(PROMPT, Reply("p", text, finish)) == problem


def test_a_disturbed_instruction() -> None:
    found = read_instruction(PROMPT, Reply("p", "\nName a tool. ", "stop"))
    assert found == Prompt(f"p{LOSER}", "Name a tool.", "disturbed")


def test_the_answer_to_the_disturbed_one_is_the_loser_for_the_prompt() -> None:
    winner = Candidate("p", "p#0", "Oak.", 2, "stop")
    loser = Candidate(f"p{LOSER}", f"p{LOSER}#0", "Saw.", 2, "stop")
    assert ranked(PROMPT, winner, loser) == [
        RankedReply("p", "Name a tree.", "p#0", "Oak.", 0),
        RankedReply("p", "Name a tree.", f"p{LOSER}#0", "Saw.", 1),
    ]
    cut = Candidate("p", "p#0", "Oak is", 2, "length")
    blank, same = (Candidate("x", "x#0", text, 1, "stop") for text in ("  ", "Oak. "))
    assert [ranked(PROMPT, winner, one) for one in (cut, blank, same)] == [
        "unfinished",
        "empty",
        "same",
    ]


SETTINGS = (
    "anchor.eft_targets=disturbed",
    "anchor.disturb_template=toy-disturb",
    f"data.extra={recipes_dir() / 'toy' / 'disturb.jsonl'}",
    "anchor.eft_prompts=12",
    "rollout.chunk_prompts=12",
)


@pytest.mark.model
def test_no_ranked_replies_are_read(tmp_path: Path) -> None:
    """400 IFT rows and 800 questions, learned twice, and 12 pairs; prompts are the run's own."""
    recipe = load_recipe("toy", SETTINGS)
    seen = data(Launch(recipe, RunDir(tmp_path)))
    assert "12 prompts to disturb" in seen.text and "EFT prompts" in seen.text
    prompts, path = prompts_to_disturb(recipe)
    assert len(prompts) == 12 and path.name == "prompts.jsonl"
    assert lengths_of(recipe).examples == 2 * (400 + 800) + 2 * 12


@pytest.mark.slow
@pytest.mark.model
def test_an_anchor_that_learns_to_judge_from_them(tmp_path: Path) -> None:
    """The toy's questions are about another topic: each loser answers about that one."""
    recipe = load_recipe("toy", [*SETTINGS, "anchor.ift_limit=16", "anchor.epochs=2"])
    session = Session(recipe, RunDir(tmp_path / "out"))
    session.run.open(recipe, {"versions": {}})
    _, facts = anchor(session)
    place = session.run.anchor
    asked = {row["name"]: row["text"] for row in read_jsonl(place.disturbed / "instructions.jsonl")}
    prompts = {one.prompt_id: one.text for one in prompts_to_disturb(recipe)[0]}
    assert asked.keys() == prompts.keys()
    topics = [(toy.topic_of(prompts[name]), toy.topic_of(asked[name])) for name in asked]
    assert sum(one != other and other is not None for one, other in topics) >= 6
    targets = read_records(place.eft_targets, RankedReply)
    assert facts["eft"] == len(targets) > 0 and len(targets) % 2 == 0
    for winner, loser in zip(targets[::2], targets[1::2], strict=True):
        assert (winner.rank, loser.rank) == (0, 1) and winner.prompt == loser.prompt
        scores = [int(str(row.target).split()[-1]) for row in (winner, loser)]
        assert scores[0] > scores[1]
    assert set(facts["eft_drops"]) >= {"disagreeing", "unreadable", "thinned"}


@pytest.mark.model
def test_a_model_that_cannot_write_such_questions(tmp_path: Path, told: Told) -> None:
    """In one token nothing is asked."""
    recipe: Recipe = load_recipe("toy", [*SETTINGS, "rollout.max_new_tokens=1", "data.extra=null"])
    recipe = recipe.model_copy(
        update={"anchor": recipe.anchor.model_copy(update={"ift_limit": 8, "epochs": 1.0})}
    )
    session = Session(recipe, RunDir(tmp_path / "out"))
    session.run.open(recipe, {"versions": {}})
    with told.refused():
        anchor(session)
