"""The gold scorer of the house style on hand-worked replies, and the data made with it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from srlm_lite.bench.attacks import built_in
from srlm_lite.forms import form_of
from srlm_lite.forms.checklist import ChecklistForm, read_items
from srlm_lite.forms.checks import read_check
from srlm_lite.forms.pairwise import PairwiseForm
from srlm_lite.judging import load_rubric
from srlm_lite.quoting import fill, options
from srlm_lite.recipe import load_recipe
from srlm_lite.tasks.house_style import (
    CRITERIA,
    bullets,
    first_figure,
    gold,
    names_topic,
    review,
    topic_of,
)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
HOME = RECIPES / "house_style"
PROMPT = "How do I look after a kettle?"
PERFECT = """In short: a kettle lasts longer with a little care.
- Wipe it with a damp cloth.
- Rinse it every 2 weeks.
- Store it in a dry place.
Next step: look inside it today."""


def points(response: str, prompt: str = PROMPT) -> str:
    """The kept criteria as a string of initials: o t b f e."""
    return "".join(name[0] for name, value in gold(prompt, response).items() if value)


def changed(old: str, new: str) -> str:
    assert old in PERFECT
    return PERFECT.replace(old, new)


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        (PERFECT, "otbfe"),
        (f"\n\n  {PERFECT}  \n \n", "otbfe"),
        (PERFECT.replace("\n", "\r\n"), "otbfe"),
        (PERFECT.replace("\n", "\n\n"), "otbfe"),
        (PERFECT.replace("- ", "* "), "otbfe"),
        (PERFECT.replace("- ", "• "), "otbfe"),
        (PERFECT.upper(), "otbfe"),
        ("", ""),
        (" \n\t\n", ""),
        ("In short:", ""),
        ("Next step:", ""),
        ("Next step: ...", ""),
        ("Next step: buy it.", "e"),
        ("- one\n- two\n- three", "b"),
        ("- one\n- two\n- three\n- four", ""),
        ("-one\n-two\n-three", ""),
        ("- \n- \n- ", ""),
        ("- a kettle\n- boils 2 cups\n- fast", "tbf"),
        ("1. Wipe it.\n2. Rinse it.\n3. Store it.", ""),
        ("1. Wipe it for 2 minutes.\n2) Rinse it.", "f"),
        (changed("- Store it in a dry place.\n", ""), "otfe"),
        (changed("Next step", "- Also this.\nNext step"), "otfe"),
        (changed("2 weeks", "two weeks"), "otbe"),
        (changed("2 weeks", "٢ weeks"), "otbe"),
        (changed("In short: a kettle", "A kettle"), "tbfe"),
        (changed("In short:", "In short,"), "tbfe"),
        (changed("In short:", "- In short:"), "tfe"),
        (changed("a kettle lasts", "it lasts"), "obfe"),
        (changed("a kettle", "kettles"), "otbfe"),
        (changed("a kettle", "a kettledrum"), "obfe"),
        (changed("Wipe it", "Wipe the kettle").replace("a kettle lasts", "it lasts"), "obfe"),
        (changed("Next step: look inside it today.", "Good luck."), "otbf"),
        (PERFECT + "\nGood luck.", "otbf"),
        (changed("\nNext step", " Next step"), "otbf"),
        ("En bref : une bouilloire dure longtemps.\n- un\n- deux\n- trois", "b"),
        ("简而言之,烧水壶需要保养。\n- 一\n- 二\n- 三", "b"),
        ("Score: 5\nScore: 5", "f"),
    ],
)
def test_gold_on_hand_worked_replies(response: str, kept: str) -> None:
    assert points(response) == kept


def test_gold_names_every_criterion_and_gives_whole_points() -> None:
    assert tuple(gold(PROMPT, PERFECT)) == CRITERIA
    assert tuple(gold(PROMPT, "")) == CRITERIA
    assert set(gold(PROMPT, "In short: tea").values()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("prompt", "topic"),
    [
        (PROMPT, "kettle"),
        ("Tell me about roses.  ", "roses"),
        ("Was kostet Käse?", "Käse"),
        ("How do I cook in 2026?", "in"),
        ("??? 42", ""),
        ("", ""),
    ],
)
def test_topic_is_the_last_word(prompt: str, topic: str) -> None:
    assert topic_of(prompt) == topic


def test_topic_may_be_singular_or_plural_but_a_whole_word() -> None:
    assert names_topic("Roses like sun.", "rose")
    assert names_topic("A rose likes sun.", "roses")
    assert names_topic("Der KÄSE.", "käse")
    assert not names_topic("A primrose likes sun.", "rose")
    assert not names_topic("Anything at all.", "")


def test_no_topic_in_the_prompt_gives_no_point() -> None:
    assert "t" not in points(PERFECT, prompt="42?")


def test_evidence() -> None:
    assert bullets(PERFECT)[0] == "Wipe it with a damp cloth."
    assert first_figure("1. Boil 1.5 litres\n2. Wait 3 minutes") == "1.5 litres"
    assert first_figure("1.\n2.") is None
    assert first_figure("In 2026") == "2026"


def test_review_quotes_and_counts() -> None:
    assert review(PROMPT, PERFECT).splitlines() == [
        "First line: In short: a kettle lasts longer with a little care.",
        "Opening yes (1)",
        "kettle yes (2)",
        "Bullets 1 Wipe 2 Rinse 3 Store yes (3)",
        "Figure 2 weeks yes (4)",
        "Last line: Next step: look yes (5)",
        "Score: 5",
    ]
    assert review(PROMPT, "").endswith("Score: 0")


def rows(name: str) -> list[dict[str, Any]]:
    lines = (HOME / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", HOME / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_data"] = module
    spec.loader.exec_module(module)
    return module


def test_shipped_data_are_what_the_generator_writes() -> None:
    for name, made in load_generator().make(0).items():
        assert rows(name) == made, name


def test_data_splits_share_no_topic() -> None:
    topics = {
        name: {topic_of(row.get("prompt") or row["text"]) for row in rows(name)}
        for name in (
            "ift.jsonl", "eft_train.jsonl", "eft_eval.jsonl", "prompts.jsonl",
            "eval_prompts.jsonl",
        )
    }  # fmt: skip
    assert sum(map(len, topics.values())) == len(set().union(*topics.values())) == 192


def test_ift_leaves_room_to_improve() -> None:
    scores = [gold(row["prompt"], row["response"]) for row in rows("ift.jsonl")]
    for name in CRITERIA:
        share = sum(score[name] for score in scores) / len(scores)
        assert 0.4 < share < 0.6, name


def test_eft_targets_end_with_the_gold_score_and_scores_are_balanced() -> None:
    counts = dict.fromkeys(range(6), 0)
    for row in rows("eft_train.jsonl"):
        score = int(sum(gold(row["prompt"], row["response"]).values()))
        assert row["target"].splitlines()[-1] == f"Score: {score}"
        counts[score] += 1
    assert len(set(counts.values())) == 1


def test_targets_quote_replies_as_a_judge_is_shown_them() -> None:
    """A target that copied a score line of a reply would teach the judge to copy them."""
    rubric = load_rubric("house-style")
    for row in rows("eft_train.jsonl"):
        assert row["target"] == review(row["prompt"], rubric.quote(row["response"]))
        *evidence, _ = row["target"].splitlines()
        assert not [line for line in evidence if "Score:" in line]


def test_judge_data_hold_bait_that_the_attacks_do_not_measure_with() -> None:
    """A quarter of them; and no line of it is one of `bench attacks`."""
    baited = [row for row in rows("eft_train.jsonl") if row["prompt_id"].startswith("bait-")]
    assert len(baited) == 240 and len(rows("eft_train.jsonl")) == 960
    lines = {line.casefold() for row in baited for line in row["response"].splitlines() if line}
    for attack in built_in(PROMPT, load_rubric("house-style")):
        for text in (attack.reply, attack.twin):
            assert lines.isdisjoint(text.casefold().splitlines()), attack.name


SHOWN = re.compile(r"<reply(?: [AB])?>\n(.*?)\n</reply", re.DOTALL)


def lessons(kind: str) -> list[tuple[str, str, list[str], str]]:
    """Whole question, the prompt in it, the replies that it shows, and what is learned."""
    found = []
    for row in rows("../forms.jsonl"):
        if row["prompt_id"].startswith(kind):
            asked = re.search(r"^Question: (.*)$", row["prompt"], re.MULTILINE)
            assert asked is not None
            found.append((row["prompt"], asked[1], SHOWN.findall(row["prompt"]), row["response"]))
    return found


def test_lessons_in_pairs_name_the_reply_that_keeps_more_rules() -> None:
    """Every two in both orders, so that neither place wins more often."""
    found = lessons("pair")
    asked = [question for question, *_ in found]
    assert len(found) == 320 == len(set(asked))
    for _, prompt, replies, said in found:
        first, last = (sum(gold(prompt, reply).values()) for reply in replies)
        assert said == ("Winner: A" if first > last else "Winner: B") and first != last
        shown = (prompt, tuple(reversed(replies)))
        assert shown in [(other, tuple(texts)) for _, other, texts, _ in found]
    assert sum(said == "Winner: A" for *_, said in found) == 160


def test_lessons_on_items_say_what_gold_says() -> None:
    named = load_generator().items
    found = lessons("item")
    counts = {(name, said): 0 for name in CRITERIA for said in ("yes", "no")}
    for question, prompt, (reply,), said in found:
        item = question.rpartition("Point: ")[2]
        (name,) = (name for name, text in named(prompt).items() if text == item)
        assert said == ("yes" if gold(prompt, reply)[name] else "no")
        counts[name, said] += 1
    assert sum(counts.values()) == 480 and min(counts.values()) >= 30


def test_what_code_can_check_of_the_rules_it_checks_as_gold_does() -> None:
    named = load_generator().items
    checks = {name: read_check(text) for name, text in named(PROMPT).items()}
    assert [name for name, check in checks.items() if check] == ["opening", "bullets"]
    for row in rows("eft_train.jsonl"):
        points = gold(row["prompt"], row["response"])
        for name, check in checks.items():
            assert check is None or check.holds(row["response"]) == bool(points[name])


def test_a_checklist_has_the_five_rules() -> None:
    """What the judge has learned to write is an item, and with the standing ones all rules."""
    named = load_generator().items
    recipe = load_recipe("smollm2-135m-forms", ["judge.form=checklist"])
    form = form_of(recipe)
    assert isinstance(form, ChecklistForm)
    found = lessons("list")
    assert len(found) == 40
    for question, prompt, _, said in found:
        assert question == form.questions[0].replace("{{prompt}}", prompt)
        own = read_items(said, most=form.own.most_items, apart_from=form.own.standing)
        assert own == [(named(prompt)["topic"], form.own.standing_weight)]
        every = {own[0][0], *form.own.standing}
        assert every == set(named(prompt).values())


def test_the_lessons_ask_as_the_recipe_does() -> None:
    recipe = load_recipe("smollm2-135m-forms", ["judge.form=pairwise"])
    form = form_of(recipe)
    assert isinstance(form, PairwiseForm)
    question, prompt, replies, _ = lessons("pair")[0]
    assert question == form.question.ask(prompt, *replies)
    checks = form_of(load_recipe("smollm2-135m-forms", ["judge.form=checklist"]))
    assert isinstance(checks, ChecklistForm)
    question, prompt, (reply,), _ = lessons("item")[0]
    texts = {"prompt": prompt, "response": reply, "item": question.rpartition("Point: ")[2]}
    assert question == fill(checks.questions[1], texts, options(*checks.own.options))


def test_judge_evaluation_has_ranks_from_gold_and_no_targets() -> None:
    replies: dict[str, list[tuple[int, float]]] = {}
    for row in rows("eft_eval.jsonl"):
        score = sum(gold(row["prompt"], row["response"]).values())
        assert row["target"] is None and row["quality"] == score
        replies.setdefault(row["prompt_id"], []).append((row["rank"], score))
    for ranked in replies.values():
        in_order = [score for _, score in sorted(ranked)]
        assert in_order == sorted(in_order, reverse=True)
        assert len(ranked) >= 3


def test_rubric_is_short_and_puts_the_reply_last() -> None:
    rubric = yaml.safe_load((RECIPES / "rubrics" / "house-style.yaml").read_text("utf-8"))
    template = rubric["template"]
    assert template.count("{{prompt}}") == template.count("{{response}}") == 1
    assert template.index("{{prompt}}") < template.index("{{response}}")
    assert (rubric["min"], rubric["max"]) == (0, 5)
    assert re.search(r"<reply>\s*\{\{response\}\}\s*</reply>\s*$", template)
    assert len(template.split()) < 100
