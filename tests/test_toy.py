"""The toy world: its gold scorer, its data, and the base that ships with it."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from srlm_lite.tasks import toy

RECIPES = Path(__file__).parent.parent / "recipes"
BASE = RECIPES / "toy" / "base"
DATA = RECIPES / "toy" / "data"
FILES = ("ift", "eft_train", "eft_eval", "prompts", "eval_prompts")
PROMPT = "hello, give me facts about the tiger, please"
SCORE_LINE = re.compile(r"^Score: ([0-5])$")


def rows(stem: str) -> list[dict[str, Any]]:
    lines = (DATA / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def script_of(stem: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"toy_{stem}", RECIPES / "toy" / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_of("pretrain")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@pytest.mark.parametrize(
    ("response", "earned"),
    [
        (
            "sure, happy to help.\n1. tiger has teeth\n2. it likes rain\n3. it needs food\n"
            "hope this helps!",
            {"topic", "items", "unique", "opening", "ending"},
        ),
        ("1. it has teeth\n2. it likes rain\n3. it has teeth", {"items"}),
        ("1. tiger has teeth", {"topic", "unique"}),
        ("1. tiger has teeth\n2. tiger needs teeth\n3. it likes rain", {"topic", "items"}),
        ("1. lion has teeth\n2. horse likes rain\nenjoy your facts!", {"unique", "ending"}),
        ("sure, happy to help.", {"opening"}),
        ("hope this helps!", set()),
        ("not again.\n1. it has teeth\nthat is all.", {"unique"}),
        ("1. it has teeth\nhope this helps", {"unique"}),
        ("1. it has teeth\nhope this helps!\n2. it likes rain", {"unique"}),
        ("\n\n  Sure, happy to help.  \n\n1. TIGER has teeth  \n", {"topic", "unique", "opening"}),
        ("1. \n2.\n- has teeth", set()),
        ("", set()),
        ("Score: 5", set()),
        ("le tigre a des dents", set()),
    ],
)
def test_gold_pays_one_point_for_each_property(response: str, earned: set[str]) -> None:
    points = toy.gold(PROMPT, response)
    assert tuple(points) == toy.CRITERIA
    assert {criterion for criterion, point in points.items() if point == 1.0} == earned
    assert set(points.values()) <= {0.0, 1.0}


def test_a_prompt_without_a_topic_never_earns_the_topic_point() -> None:
    assert toy.gold("how are you", "1. tiger has teeth")["topic"] == 0.0


def test_review_shows_its_evidence_before_each_verdict() -> None:
    response = (
        "sure, happy to help.\n1. horse has teeth\n2. it likes rain\n3. it has teeth\ngo away."
    )
    assert toy.review(PROMPT, response) == (
        "topic: tiger horse no\n"
        "items: 1 teeth 2 rain 3 teeth again yes\n"
        "unique: no\n"
        "opening: sure yes\n"
        "ending: go no\n"
        "Score: 2"
    )


def test_review_of_an_empty_answer() -> None:
    assert toy.review(PROMPT, "").splitlines()[1] == "items: none no"
    assert toy.review(PROMPT, "").endswith("\nScore: 0")


def test_review_ends_in_the_gold_score_even_for_broken_answers() -> None:
    rng = random.Random(1)
    for prompt in rng.sample(toy.prompts(held_out=False), 300):
        response = toy.disturb(rng, toy.sample_answer(rng, prompt))
        match = SCORE_LINE.match(toy.review(prompt, response).splitlines()[-1])
        assert match is not None
        assert float(match[1]) == sum(toy.gold(prompt, response).values())


@pytest.mark.parametrize("criterion", toy.CRITERIA)
def test_sampled_answers_earn_exactly_what_they_were_asked_to(criterion: str) -> None:
    rng = random.Random(criterion)
    rates = dict.fromkeys(toy.CRITERIA, 0.0) | {criterion: 1.0}
    for prompt in rng.sample(toy.prompts(held_out=False), 100):
        points = toy.gold(prompt, toy.sample_answer(rng, prompt, rates))
        assert {name for name, point in points.items() if point} == {criterion}


@pytest.mark.parametrize("criterion", toy.CRITERIA)
def test_a_revision_earns_one_more_point_and_keeps_the_others(criterion: str) -> None:
    rng = random.Random(f"revise {criterion}")
    for prompt in toy.prompts(held_out=False)[:100]:
        answer = toy.sample_answer(rng, prompt, 0.4)
        before = toy.gold(prompt, answer)
        revised = toy.revise(rng, prompt, answer, criterion)
        assert toy.gold(prompt, revised) == {**before, criterion: 1.0}, (answer, revised)
        assert (revised == answer) == bool(before[criterion])


def test_a_critique_is_the_review_s_part_with_the_evidence() -> None:
    answer = "1. it makes news\n2. it makes news\nthanks for asking!"
    prompt = "list facts about the oak"
    assert toy.critique(prompt, answer, "opening") == "opening: none no"
    assert toy.critique(prompt, answer, "unique") == "items: 1 news 2 news again no\nunique: no"


def test_examples_of_principles_are_right_and_stay_in_the_world() -> None:
    """What the anchor of `toy-rlaif` learns from: each kind as often, nothing it cannot spell."""
    examples = [json.loads(line) for line in (RECIPES / "toy" / "rlaif.jsonl").open()]
    kinds = Counter(row["prompt_id"].split("-")[1] for row in examples)
    assert kinds == dict.fromkeys(("critique", "revision", "comparison", "reasoning"), 300)
    known = set(toy.vocabulary())
    for row in examples:
        assert set(toy.words(f"{row['prompt']}\n{row['response']}")) <= known
    asked = {row["prompt"].split("question: ")[1].split("\n")[0] for row in examples}
    assert len(asked) == 300 and not asked & {row["text"] for row in rows("eval_prompts")}


def test_examples_of_disturbed_prompts_are_about_another_topic() -> None:
    examples = [json.loads(line) for line in (RECIPES / "toy" / "disturb.jsonl").open()]
    known = set(toy.vocabulary())
    assert len(examples) == 800
    for row in examples:
        assert set(toy.words(row["prompt"])) <= known
        asked = row["prompt"].split("question: ")[1]
        topic, other = toy.topic_of(asked), toy.topic_of(row["response"])
        assert topic and other and topic != other
        assert row["response"] == asked.replace(topic, other)


def test_examples_of_checklists_are_right_and_stay_in_the_world() -> None:
    examples = [json.loads(line) for line in (RECIPES / "toy" / "checklist.jsonl").open()]
    known, kinds = (
        set(toy.vocabulary()),
        Counter(row["prompt_id"].split("-")[1] for row in examples),
    )
    assert kinds == {"checklist": 200, "item": 1200}
    for row in examples:
        assert set(toy.words(f"{row['prompt']}\n{row['response']}")) <= known
        if row["prompt_id"].startswith("toy-item"):
            asked, rest = row["prompt"].removeprefix("question: ").split("\nanswer:\n")
            answer, item = rest.split("\none point for: ")
            criterion = {text: name for name, text in toy.checklist(asked).items()}[item]
            assert row["response"] == ("yes" if toy.gold(asked, answer)[criterion] else "no")
    asked = {row["prompt"].split("question: ")[1].split("\n")[0] for row in examples}
    assert len(asked) == 1400 and not asked & {row["text"] for row in rows("eval_prompts")}


def test_last_word_identifies_a_fact() -> None:
    assert len({fact.split()[-1] for fact in toy.FACTS}) == len(toy.FACTS) == 12
    assert len(toy.TOPICS) == 24


def test_vocabulary_is_small_and_without_doubles() -> None:
    vocabulary = toy.vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) <= 200


def test_held_out_phrasings_are_apart() -> None:
    known, unseen = toy.prompts(held_out=False), toy.prompts(held_out=True)
    assert not set(known) & set(unseen)
    assert len(set(known)) == len(known) >= 600


def test_shipped_data_is_what_the_script_makes(script: ModuleType, tmp_path: Path) -> None:
    script.write_data(tmp_path / "data", seed=0)
    for name in ("ranked.jsonl", "meta.jsonl", "rlaif.jsonl", "disturb.jsonl", "checklist.jsonl"):
        assert (tmp_path / name).read_bytes() == (RECIPES / "toy" / name).read_bytes(), name
    for stem in FILES:
        made = (tmp_path / "data" / f"{stem}.jsonl").read_bytes()
        assert made == (DATA / f"{stem}.jsonl").read_bytes(), stem


def test_data_has_the_promised_shape() -> None:
    assert [len(rows(stem)) for stem in FILES] == [400, 800, 240, 960, 200]
    for stem in FILES:
        if stem != "eft_eval":
            ids = [row["prompt_id"] for row in rows(stem)]
            assert len(set(ids)) == len(ids)
    for row in rows("eft_train"):
        assert row["target"].splitlines()[-1] == f"Score: {row['quality']:.0f}"
    shares = [sum(row["quality"] == score for row in rows("eft_train")) for score in range(6)]
    assert max(shares) - min(shares) <= 1


def test_rank_follows_gold_and_ties_share_a_rank() -> None:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows("eft_eval"):
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    assert len(by_prompt) == 60
    for replies in by_prompt.values():
        for one in replies:
            golds = {sum(toy.gold(r["prompt"], r["response"]).values()) for r in replies}
            own = sum(toy.gold(one["prompt"], one["response"]).values())
            assert one["quality"] == own
            assert one["rank"] == sum(gold > own for gold in golds)


def test_evaluation_prompts_are_seen_nowhere_else() -> None:
    texts = {stem: {row.get("prompt") or row["text"] for row in rows(stem)} for stem in FILES}
    trained = texts["ift"] | texts["eft_train"] | texts["prompts"]
    assert len(trained) == 400 + 800 + 960
    assert trained <= set(toy.prompts(held_out=False))
    assert texts["eft_eval"] | texts["eval_prompts"] <= set(toy.prompts(held_out=True))
    assert not texts["eft_eval"] & texts["eval_prompts"]


def test_rubric_keeps_the_answer_last() -> None:
    rubric = yaml.safe_load((RECIPES / "rubrics" / "toy.yaml").read_text(encoding="utf-8"))
    assert (rubric["min"], rubric["max"]) == (0, len(toy.CRITERIA))
    assert rubric["template"].count("{{prompt}}") == 1
    assert rubric["template"].endswith("{{response}}")


def test_every_text_survives_the_tokenizer(tokenizer: Any, script: ModuleType) -> None:
    texts = [row[key] for stem in FILES for row in rows(stem) for key in row if key == "text"]
    for row in rows("eft_train") + rows("eft_eval"):
        texts.append(script.judge_prompt(row["prompt"], row["response"]))
        texts.append(toy.review(row["prompt"], row["response"]))
    texts += [row["response"] for row in rows("ift")]
    texts += [*toy.RUDE_OPENINGS, *toy.RUDE_ENDINGS]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == toy.words(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_chat_template_renders_bos_once_and_ends_turns(tokenizer: Any) -> None:
    question = [{"role": "user", "content": PROMPT}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    answered = tokenizer.apply_chat_template(
        [*question, {"role": "assistant", "content": "go away."}], return_dict=False, tokenize=True
    )
    assert tokenizer.decode(asked) == f"<bos> <user> {PROMPT} <assistant>"
    assert answered[: len(asked)] == asked
    assert answered.count(tokenizer.bos_token_id) == 1
    assert answered[-1] == tokenizer.eos_token_id


def test_base_loads_without_custom_code_and_is_small() -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert type(model) is LlamaForCausalLM
    assert 0.5e6 < model.num_parameters() < 1.2e6
    assert model.generation_config.eos_token_id == toy.SPECIAL_TOKENS.index("<eos>")
    assert (BASE / "model.safetensors").stat().st_size <= 2.5e6


def test_base_speaks_and_reviews(tokenizer: Any, script: ModuleType) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()

    def generate(contents: list[str]) -> list[str]:
        chats = [[{"role": "user", "content": content}] for content in contents]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=60)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    prompts = [row["text"] for row in rows("eval_prompts")[:64]]
    answers = generate(prompts)
    golds = [sum(toy.gold(p, a).values()) for p, a in zip(prompts, answers, strict=True)]
    assert 1.0 < sum(golds) / 64 < 3.5
    reviews = generate([script.judge_prompt(p, a) for p, a in zip(prompts, answers, strict=True)])
    readable = [SCORE_LINE.match(review.splitlines()[-1]) for review in reviews if review]
    assert sum(match is not None for match in readable) > 0.8 * 64


def test_a_careless_judge_s_reviews_keep_their_evidence(tmp_path: Path) -> None:
    script_of("careless").write(tmp_path, share=0.5)
    lines = (tmp_path / "eft_train.jsonl").read_text(encoding="utf-8").splitlines()
    changed, shifts = 0, []
    for right, told in zip(rows("eft_train"), map(json.loads, lines), strict=True):
        assert {**told, "target": None} == {**right, "target": None}
        verdicts = told["target"].split("\n")
        before = right["target"].split("\n")
        assert [re.sub("(yes|no)$", "", line) for line in verdicts[:-1]] == [
            re.sub("(yes|no)$", "", line) for line in before[:-1]
        ]
        score = SCORE_LINE.match(verdicts[-1])
        assert score and int(score[1]) == sum(line.endswith("yes") for line in verdicts)
        changed += told["target"] != right["target"]
        shifts.append(int(score[1]) - right["quality"])
    # Half of them, less those whose coins all fell right.
    assert 0.4 < changed / len(lines) < 0.55
    assert abs(sum(shifts) / len(shifts)) < 0.2  # no kinder and no harsher
    for stem in ("ift", "eft_eval", "prompts", "eval_prompts"):
        assert (tmp_path / f"{stem}.jsonl").read_bytes() == (DATA / f"{stem}.jsonl").read_bytes()
