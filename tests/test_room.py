"""What a window leaves for prompt and reply: when sampled, and in a judge's question."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from commands import Cli

from srlm_lite.doctor.recipes import recipe_finding
from srlm_lite.judging import load_rubric
from srlm_lite.planning.probe import prompt_tokens, question_tokens
from srlm_lite.planning.room import Counted, room_for, room_of, unjudged
from srlm_lite.recipe import load_recipe
from srlm_lite.records import Prompt

RUBRIC = Counted(311, exact=True)


def test_the_rubric_and_the_judgement_take_their_part_of_the_window() -> None:
    """2048 tokens when sampled; 2048 - 256 - 311 = 1481 to be judged. With an answer of 768 tokens
    that is safe for prompts of 1481 - 768 = 713."""
    recipe = load_recipe("llama3.1-8b")
    room = room_of(recipe, rubric=RUBRIC, prompts=Counted(320, exact=True), held_out=None)
    assert room is not None
    assert (room.sampled, room.judged, room.safe_prompt, room.missing) == (2048, 1481, 713, 567)
    assert room.prompts == "held-out prompts"  # those it writes itself have 320 at most
    found = unjudged(room)
    assert found is not None
    assert found[0].startswith("held-out prompts of more than 713 tokens may get replies too long")
    assert "may have 2,048 tokens when sampled, 1,481 to be judged" in found[0]
    assert found[1] == "Set base.window=2615"
    estimated = unjudged(replace(room, exact=False))
    assert estimated is not None and "about 1,481 to be judged" in estimated[0]


def test_prompts_that_are_short_enough_are_no_matter() -> None:
    """713 tokens and an answer of 768 are 1481, which a judge's question has room for."""
    recipe = load_recipe("llama3.1-8b")
    for longest, missing in ((713, 0), (714, 1)):
        counted = Counted(longest, exact=True)
        room = room_of(recipe, rubric=RUBRIC, prompts=counted, held_out=counted)
        assert room is not None and room.missing == missing
        assert (unjudged(room) is None) == (missing == 0)


@pytest.mark.parametrize(
    "change", ["base.window=2148", "rollout.max_new_tokens=668", "judge.max_new_tokens=156"]
)
def test_what_is_advised_mends_it(change: str) -> None:
    """Prompts of 813 tokens lack 100."""
    counted = Counted(813, exact=True)
    room = room_of(load_recipe("llama3.1-8b"), rubric=RUBRIC, prompts=counted, held_out=counted)
    assert room is not None and room.missing == 100
    found = unjudged(room)
    assert found is not None and change in found[1].removeprefix("Set ").split(" or ")
    mended = room_of(
        load_recipe("llama3.1-8b", [change]), rubric=RUBRIC, prompts=counted, held_out=counted
    )
    assert mended is not None and mended.missing == 0


def test_where_there_is_room_for_no_prompt_that_is_said() -> None:
    recipe = load_recipe("llama3.1-8b", ["judge.max_new_tokens=1000"])
    room = room_of(recipe, rubric=RUBRIC, prompts=None, held_out=None)
    assert room is not None and room.safe_prompt < 0
    found = unjudged(room)
    assert found is not None and found[0].startswith("all prompts may get replies too long")


def test_a_thought_takes_room_before_the_answer_and_before_the_judgement() -> None:
    """2048 - 500 = 1548 when sampled, 2048 - 500 - 256 - 311 = 981 to be judged."""
    room = room_of(
        load_recipe("llama3.1-8b"), rubric=RUBRIC, prompts=None, held_out=None, thought=500
    )
    assert room is not None and (room.sampled, room.judged) == (1548, 981)


def test_a_server_has_a_window_of_its_own_and_without_grades_nothing_is_lost() -> None:
    server = load_recipe(
        "llama3.1-8b", ["judge.engine=openai", "openai.url=http://x/v1", "openai.model=m"]
    )
    assert room_of(server, rubric=RUBRIC, prompts=None, held_out=None) is None
    ungraded = ["iterations=0", "evaluate.judged_answers=0"]
    assert (
        room_of(load_recipe("llama3.1-8b", ungraded), rubric=RUBRIC, prompts=None, held_out=None)
        is None
    )


def test_it_is_counted_as_the_stages_count() -> None:
    """The longest prompt and reply that the room admits fill the window up to the judgement."""
    recipe = load_recipe("tiny")
    room = room_for(recipe)
    assert room is not None and room.exact and room.missing == 0
    prompt = "whale"
    counted = question_tokens(recipe.base, [prompt])
    assert counted is not None
    reply = " ".join(["whale"] * (room.judged - counted[0]))
    question = load_rubric("toy").render(prompt=prompt, response=reply)
    asked = question_tokens(recipe.base, [question])
    assert asked == [recipe.base.window - recipe.judge.max_new_tokens]


def test_prompts_that_are_here_are_measured(tmp_path: Path) -> None:
    """By tokens, the template's with them; a base without a tokenizer here: bytes / 4 and 64."""
    data = shutil.copytree(load_recipe("tiny").data.dir, tmp_path / "data")
    (data / "prompts.jsonl").write_text(json.dumps({"text": "whale " * 150}) + "\n")
    here = load_recipe("tiny", [f"data.dir={data}"])
    counted = prompt_tokens(here.base, [Prompt("", "whale " * 150)])
    assert counted is not None
    room = room_for(here)
    assert room is not None and room.exact and room.sampled == counted[0] + 48
    elsewhere = room_for(load_recipe("tiny", [f"data.dir={data}", "base.name=some-org/no-base"]))
    # 900 bytes are some 225 tokens; the window of 256 takes prompts up to 256 - 48 = 208.
    assert elsewhere is not None and not elsewhere.exact and elsewhere.sampled == 256
    found = unjudged(elsewhere)
    assert found is not None and "prompts of more than about" in found[0]


def test_plan_and_doctor_say_it_beforehand(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = cli("plan", "--recipe", "llama3.1-8b", "--gpus", "24GB").stdout
    assert "have 2,048 tokens when sampled, about 1,4" in shown and "Set base.window=" in shown
    row = json.loads(cli("plan", "--recipe", "llama3.1-8b", "--gpus", "24GB", "--json").stdout)
    assert row["room"]["sampled"] == 2048 and not row["room"]["fits"]
    assert not row["room"]["counted"]  # its tokenizer is gated
    # doctor says it where the recipe can run at all.
    assert "tokens when sampled" not in recipe_finding(load_recipe("llama3.1-8b")).text
    data = shutil.copytree(load_recipe("tiny").data.dir, tmp_path / "data")
    (data / "prompts.jsonl").write_text(json.dumps({"text": "whale " * 150}) + "\n")
    finding = recipe_finding(load_recipe("tiny", [f"data.dir={data}"]))
    assert "tokens when sampled" in finding.text
    assert finding.way_out is not None and "Set base.window=" in finding.way_out
    assert "too long to be judged" not in cli("plan", "--recipe", "toy").stdout


def test_a_question_about_two_replies_needs_room_for_both() -> None:
    """512 - 8 for the verdict - 100 of the question = 404; a prompt of 100 with two replies of 160
    has 420 tokens, so 16 are missing, and replies of 152 mend it."""
    recipe = load_recipe("toy-pairwise", ["base.window=512", "rollout.max_new_tokens=160"])
    asked = Counted(100, exact=True)
    room = room_of(recipe, rubric=Counted(100, exact=True), prompts=asked, held_out=asked)
    assert room is not None
    assert (room.sampled, room.judged, room.missing, room.safe_prompt) == (420, 404, 16, 84)
    found = unjudged(room)
    assert found is not None
    assert "prompt and replies together may have 420 tokens" in found[0]
    assert found[1] == "Set base.window=528 or rollout.max_new_tokens=152"
