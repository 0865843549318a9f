"""The arithmetic task: gold of answers and of steps by hand, and what ships with it."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from srlm_lite.shipped import recipes_dir
from srlm_lite.tasks import arithmetic

RECIPES = recipes_dir()
FOLDER = RECIPES / "arithmetic"
SCORES = {f"Score: {score}" for score in range(arithmetic.MAX_SCORE + 1)}
FILES = ("ift", "eft_train", "eft_eval", "prompts", "eval_prompts")

PROMPT = "tom has 12 apples. tom buys 5 more. tom gives 8 to ann. how many apples does tom have?"
RIGHT = "12 + 5 = 17\n17 - 8 = 9\nanswer: 9"


def rows(stem: str) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arithmetic_pretrain", FOLDER / "pretrain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "base")


@pytest.mark.parametrize(
    ("prompt", "solution"),
    [
        (PROMPT, 9),
        # 3 boxes of 4 are 12, 12 times 2 are 24.
        ("eva has 3 boxes of 4 eggs. then eva has 2 times as many. "
         "how many eggs does eva have now?", 24),
        # Half of 20 are 10; ben has 4 fewer.
        ("mia has 20 coins. mia keeps one of 2 equal parts. ben has 4 fewer than mia. "
         "how many coins does ben have?", 6),
        # What tom has is 4 fewer than what eva has: she has more.
        ("tom has 9 books. tom loses 2. that is 4 fewer than eva has. "
         "how many books does eva have?", 11),
        ("tom has 9 books. tom loses 2. that is 4 more than eva has. "
         "how many books does eva have?", 3),
        ("tom has 9 books. ann gives 2 to tom. how many books does tom have?", 11),
        ("tom has 9 books. tom gives 2 to ann. how many books does tom have?", 7),
    ],
)  # fmt: skip
def test_a_problem_is_read_and_solved(prompt: str, solution: int) -> None:
    problem = arithmetic.read_problem(prompt)
    assert problem is not None
    assert problem.solution == solution


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "how many apples does tom have?",
        "tom has 12 apples.",
        "tom has 12 apples. how many apples does tom have?",  # nothing happens
        "tom has 12 apples. tom buys 5 more. how many apples does ann have?",
        "tom has 12 apples. ann buys 5 more. how many apples does tom have?",
        "tom has 9 books. ann has 2 more than tom. how many books does tom have?",
        "tom has 9 books. ann has 2 more than tom. tom buys 5 more. how many books does tom have?",
        "tom has 9 books. tom eats 2. how many books does tom have?",
    ],
)
def test_what_is_no_problem_has_no_right_answer(prompt: str) -> None:
    assert arithmetic.read_problem(prompt) is None
    assert arithmetic.gold(prompt, RIGHT) == {"answer": 0.0, "steps": 0.0}
    assert arithmetic.review(prompt, RIGHT) == "Score: 0"


def test_a_problem_whose_numbers_lead_nowhere_has_no_solution() -> None:
    prompt = "tom has 2 apples. tom loses 5. how many apples does tom have?"
    problem = arithmetic.read_problem(prompt)
    assert problem is not None and problem.solution is None
    assert arithmetic.gold(prompt, "2 - 5 = 0\nanswer: 0") == {"answer": 0.0, "steps": 0.5}


@pytest.mark.parametrize(
    ("response", "answer", "steps"),
    [
        (RIGHT, 1.0, [True, True, True]),
        ("5 + 12 = 17\n17 - 8 = 9\nanswer: 9", 1.0, [True, True, True]),  # a sum either way
        # A mistake counts where it is made, and once: 18 - 8 is 10.
        ("12 + 5 = 18\n18 - 8 = 10\nanswer: 10", 0.0, [False, True, True]),
        # Two that cancel: the number is right, the steps are not.
        ("12 + 5 = 18\n18 - 8 = 9\nanswer: 9", 1.0, [False, False, True]),
        ("12 - 5 = 7\n7 - 8 = 1\nanswer: 1", 0.0, [False, False, True]),
        # Left out: what follows is held against what it does.
        ("12 - 8 = 4\nanswer: 4", 0.0, [False, True]),
        ("12 + 5 = 17\nanswer: 17", 0.0, [True, False]),
        ("12 + 5 = 17\n17 - 8 = 9\n9 + 1 = 10\nanswer: 10", 0.0, [True, True, False, True]),
        ("12 + 5 = 17\n17 - 8 = 9\nanswer: 8", 0.0, [True, True, False]),
        ("8 - 17 = 9\nanswer: 9", 1.0, [False, False]),  # a difference has an order
        ("answer: 9", 1.0, [False]),
        ("12 + 5 = 17\n17 - 8 = 9", 0.0, [True, True]),
        ("12 + 5 = 17 = 17\nanswer: 9", 1.0, [False, False]),
        ("", 0.0, []),
    ],
)
def test_gold_of_answers_and_steps(response: str, answer: float, steps: list[bool]) -> None:
    assert [step.is_right for step in arithmetic.read_steps(PROMPT, response)] == steps
    share = sum(steps) / len(steps) if steps else 0.0
    assert arithmetic.gold(PROMPT, response) == {"answer": answer, "steps": share}


def test_a_right_number_stands_above_a_wrong_one() -> None:
    rng = random.Random(4)
    for _ in range(200):
        prompt = arithmetic.sample_problem(rng)
        for _ in range(4):
            points = arithmetic.gold(prompt, arithmetic.sample_answer(rng, prompt, 0.3))
            assert (sum(points.values()) >= 1) == bool(points["answer"])


def test_a_review_derives_each_step_up_to_the_first_mistake() -> None:
    assert arithmetic.review(PROMPT, RIGHT) == (
        "12 + 5 = 17 said 12 + 5 = 17 right\n17 - 8 = 9 said 17 - 8 = 9 right\n"
        "answer: 9 said answer: 9 right\nScore: 5"
    )
    assert arithmetic.review(PROMPT, "12 + 5 = 17\n17 - 8 = 11\nanswer: 11") == (
        "12 + 5 = 17 said 12 + 5 = 17 right\n17 - 8 = 9 said 17 - 8 = 11 wrong\nScore: 1"
    )
    assert arithmetic.review(PROMPT, "12 + 5 = 17\n17 - 8 = 9") == (
        "12 + 5 = 17 said 12 + 5 = 17 right\n17 - 8 = 9 said 17 - 8 = 9 right\nScore: 2"
    )
    assert arithmetic.review(PROMPT, "") == "Score: 0"


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (RIGHT, "1+ 2+ ++ 5+ =+ 1+ 7+ |+ 1+ 7+ -+ 8+ =+ 9+ |+ answer+ :+ 9+"),
        # A sum either way.
        ("5 + 12 = 17\nanswer: 17", "5+ ++ 1+ 2+ =+ 1+ 7+ |+ answer- :- 1- 7-"),
        # A step is right up to the first token that no right one has, and wrong to its end.
        ("12 + 5 = 18\n18 - 8 = 10", "1+ 2+ ++ 5+ =+ 1+ 8- |- 1+ 8+ -+ 8+ =+ 1+ 0+"),
        ("12 - 5 = 7\n7 - 8 = 1", "1+ 2+ -- 5- =- 7- |- 7+ -+ 8+ =+ 1-"),
        # One that stops too early is wrong at the end of its line alone.
        ("12 + 5 = 1\nanswer: 1", "1+ 2+ ++ 5+ =+ 1+ |- answer- :- 1-"),
        ("12 + 5 = 17\n\nanswer", "1+ 2+ ++ 5+ =+ 1+ 7+ |+ |+ answer-"),
        ("", ""),
    ],
)
def test_a_verdict_at_every_token(response: str, said: str) -> None:
    found = zip(arithmetic.words(response), arithmetic.verdicts(PROMPT, response), strict=True)
    signs = {arithmetic.RIGHT: "+", arithmetic.WRONG: "-"}
    told = [word.replace("\n", "|") + signs[verdict] for word, verdict in found]
    assert " ".join(told) == said


def test_the_score_is_full_exactly_where_all_steps_are_right() -> None:
    rng = random.Random(5)
    for _ in range(300):
        prompt = arithmetic.sample_problem(rng)
        answer = arithmetic.sample_answer(rng, prompt, rng.choice((0.0, 0.3)))
        if rng.random() < 0.3:
            answer = arithmetic.disturb(rng, answer)
        steps = arithmetic.read_steps(prompt, answer)
        ended = bool(steps) and steps[-1].text.startswith("answer:")
        whole = ended and all(step.is_right for step in steps)
        assert arithmetic.review(prompt, answer).endswith("Score: 5") == whole


def test_a_solver_who_never_slips_is_right_and_one_who_does_about_half_the_time() -> None:
    rng = random.Random(6)
    right = misled = 0
    for _ in range(400):
        prompt = arithmetic.sample_problem(rng)
        never = arithmetic.sample_answer(rng, prompt, 0.0, 0.0)
        assert arithmetic.gold(prompt, never) == {"answer": 1.0, "steps": 1.0}
        right += arithmetic.gold(prompt, arithmetic.sample_answer(rng, prompt))["answer"] == 1
        if any(text.split("{")[0] in prompt for text in ("that is {",)):
            always = arithmetic.sample_answer(rng, prompt, 0.0, 1.0)
            misled += arithmetic.gold(prompt, always)["answer"] == 0
    assert 0.45 < right / 400 < 0.7
    assert misled > 40


def test_problems_stay_in_the_world() -> None:
    rng = random.Random(7)
    known = set(arithmetic.vocabulary())
    assert len(known) == len(arithmetic.vocabulary()) < 100
    signs = set()
    for _ in range(500):
        prompt = arithmetic.sample_problem(rng)
        assert not arithmetic.is_held_out(prompt)
        problem = arithmetic.read_problem(prompt)
        assert problem is not None and problem.solution is not None
        assert 2 <= len(problem.changes) <= 4 and 2 <= problem.solution <= arithmetic.MAX_VALUE
        signs |= {change.sign for change in problem.changes}
        assert set(arithmetic.words(prompt)) <= known
    assert signs == set("+-*/")
    assert arithmetic.is_held_out(arithmetic.sample_problem(rng, held_out=True))


def test_shipped_data_is_what_the_script_makes(script: ModuleType, tmp_path: Path) -> None:
    script.write_data(tmp_path, seed=0)
    for name in ("steps.jsonl", *(f"data/{stem}.jsonl" for stem in FILES)):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_data_is_apart_and_its_targets_are_right() -> None:
    assert [len(rows(f"data/{stem}")) for stem in FILES] == [400, 800, 240, 1000, 200]
    texts = {
        stem: {row.get("prompt") or row["text"] for row in rows(f"data/{stem}")} for stem in FILES
    }
    assert all(map(arithmetic.is_held_out, texts["eft_eval"] | texts["eval_prompts"]))
    assert not texts["eft_eval"] & texts["eval_prompts"]
    trained = [texts["ift"], texts["eft_train"], texts["prompts"]]
    assert len(set().union(*trained)) == sum(map(len, trained)) == 2200
    assert not any(map(arithmetic.is_held_out, set().union(*trained)))
    for row in rows("data/eft_train"):
        assert row["target"] == arithmetic.review(row["prompt"], row["response"])
        assert row["target"].endswith(f"Score: {row['quality']:.0f}")
    full = sum(row["quality"] == arithmetic.MAX_SCORE for row in rows("data/eft_train"))
    assert full == 400


def test_verdicts_on_steps_are_right_and_balanced(script: ModuleType) -> None:
    head, tail = script.STEP.split("{{prompt}}")[0], "\nsteps:\n"
    said = []
    for row in rows("steps"):
        prompt, _, steps = row["prompt"].removeprefix(head).partition(tail)
        last = arithmetic.read_steps(prompt, steps)[-1]
        assert row["response"] == (arithmetic.RIGHT if last.is_right else arithmetic.WRONG)
        said.append(last.is_right)
    assert len(said) == 600 and 250 < sum(said) < 350


def test_the_rubric_keeps_the_answer_last() -> None:
    rubric = yaml.safe_load((RECIPES / "rubrics" / "arithmetic.yaml").read_text(encoding="utf-8"))
    assert (rubric["min"], rubric["max"]) == (0, arithmetic.MAX_SCORE)
    assert rubric["template"].endswith("{{response}}")


def test_every_text_survives_the_tokenizer(tokenizer: Any, script: ModuleType) -> None:
    texts = [row["response"] for row in rows("data/ift")[:100]]
    for row in rows("data/eft_train")[:100]:
        texts += [script.judge_prompt(row["prompt"], row["response"]), row["target"]]
    texts += [row["prompt"] for row in rows("steps")[:100]]
    texts.append(script.NEW_PROBLEM.replace("{{problems}}", PROMPT))
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == arithmetic.words(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_the_base_is_small() -> None:
    assert (FOLDER / "base" / "model.safetensors").stat().st_size < 2.5e6


@pytest.mark.model
def test_the_base_solves_some_and_judges(tokenizer: Any, script: ModuleType) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32).eval()

    def encoded(contents: list[str]) -> Any:
        chats = [[{"role": "user", "content": content}] for content in contents]
        return tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )

    def generate(contents: list[str], at_most: int, temperature: float) -> list[str]:
        inputs = encoded(contents)
        output = model.generate(
            **inputs, do_sample=True, top_k=0, temperature=temperature, max_new_tokens=at_most
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    prompts = [row["text"] for row in rows("data/eval_prompts")[:100]]
    answers = generate(prompts, 56, 1.0)
    asked = list(zip(prompts, answers, strict=True))
    is_right = [arithmetic.gold(p, a)["answer"] == 1 for p, a in asked]
    assert 40 <= sum(is_right) <= 70
    said = generate([script.judge_prompt(p, a) for p, a in asked], 112, 0.7)
    scores = [text.split("\n")[-1] for text in said]
    assert sum(score in SCORES for score in scores) > 90
    full = f"Score: {arithmetic.MAX_SCORE}"
    assert sum((s == full) == r for s, r in zip(scores, is_right, strict=True)) >= 80
    steps = {
        (prompt, tuple(step.text for step in read[: at + 1])): read[at].is_right
        for prompt, answer in asked[:50]
        for read in [arithmetic.read_steps(prompt, answer)]
        for at in range(len(read))
    }
    with torch.inference_mode():
        questions = encoded([script.step_prompt(p, list(begun)) for p, begun in steps])
        logits = model(**questions).logits[:, -1]
    one, other = tokenizer.convert_tokens_to_ids([arithmetic.RIGHT, arithmetic.WRONG])
    found = (logits[:, one] > logits[:, other]).tolist()
    good = [f == r for f, r in zip(found, steps.values(), strict=True)]
    assert sum(good) / len(good) >= 0.8
    wrong = [f for f, r in zip(found, steps.values(), strict=True) if not r]
    assert sum(wrong) / len(wrong) < 0.5
