"""Make the toy base and its data: `python recipes/toy/pretrain.py --out recipes/toy`.

Writes
  OUT/data/   ift, eft_train, eft_eval, prompts, eval_prompts (.jsonl), in seconds
  OUT/        ranked replies and comparisons of reviews for the methods (.jsonl)
  OUT/base/   a word-level Llama of about 0.9M parameters with its tokenizer (bf16, under 2 MB)

The base is pretrained on dialogues of random quality and on reviews of such answers in the judge's
format, loss on the assistant's turns only. So the judge's skill is not learned from `eft_train`
alone, and the reviews carry labels of the gold scorer (`srlm_lite.tasks.toy`): a rise in gold on
this task tests the loop, it does not prove that a model can judge what nobody taught it.

One phrasing of a prompt in eight is held out: only eft_eval and eval_prompts use those.
Deterministic for a seed and thread count on one machine. Takes six to seven minutes on one core.
"""

from __future__ import annotations

import argparse
import random
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from srlm_lite.tasks import toy
from srlm_lite.tasks.rows import Row, prompt_rows, ranked_rows, write_rows

if TYPE_CHECKING:
    from srlm_lite.model.word_level import Dialogue

RUBRIC = Path(__file__).parent.parent / "rubrics" / "toy.yaml"
META_TEMPLATE = Path(__file__).parent.parent / "templates" / "toy-meta.txt"
DISTURB_TEMPLATE = Path(__file__).parent.parent / "templates" / "toy-disturb.txt"
LIST_TEMPLATE = Path(__file__).parent.parent / "templates" / "toy-checklist.txt"
ITEM_TEMPLATE = Path(__file__).parent.parent / "templates" / "toy-checklist-item.txt"
PRINCIPLES = Path(__file__).parent.parent / "principles" / "toy.yaml"
TEMPLATE: str = yaml.safe_load(RUBRIC.read_text(encoding="utf-8"))["template"]

# Bad answers of the anchor's training data mostly just lack the opening or ending, so its most
# likely answer scores low as well and greedy decoding leaves room for a rise.
IFT_RATES = {"topic": 0.6, "items": 0.5, "unique": 0.6, "opening": 0.4, "ending": 0.4}
PRETRAIN_RATES = {"topic": 0.5, "items": 0.4, "unique": 0.5, "opening": 0.35, "ending": 0.35}
REVIEWED_RATES = (0.2, 0.4, 0.6, 0.8, 0.95)


def judge_prompt(prompt: str, response: str) -> str:
    """The toy rubric filled in, as the judge receives it."""
    return TEMPLATE.replace("{{prompt}}", prompt).replace("{{response}}", response)


def make_data(*, seed: int) -> dict[str, list[Row]]:
    """Rows of every data file by file stem; the same seed gives the same rows."""
    rng = random.Random(f"toy data {seed}")
    known = toy.prompts(held_out=False)
    unseen = toy.prompts(held_out=True)
    rng.shuffle(known)
    rng.shuffle(unseen)
    ift_prompts, eft_prompts, loop_prompts = known[:400], known[400:1200], known[1200:2160]
    judge_eval, policy_eval = unseen[:60], unseen[60:260]

    ift = [
        {
            "prompt_id": f"toy-ift-{number:04}",
            "prompt": prompt,
            "response": toy.sample_answer(rng, prompt, IFT_RATES),
        }
        for number, prompt in enumerate(ift_prompts)
    ]
    eft_train = [
        row
        for number, prompt in enumerate(eft_prompts)
        for row in ranked_rows(
            f"toy-eft-{number:04}", prompt, [_answer_with_score(rng, prompt, number % 6)],
            score=_gold, target=toy.review,
        )
    ]  # fmt: skip
    eft_eval = _ranked(rng, "toy-judge", judge_eval)
    return {
        "ift": ift,
        "eft_train": eft_train,
        "eft_eval": eft_eval,
        "prompts": prompt_rows("toy-prompt", loop_prompts, "toy"),
        "eval_prompts": prompt_rows("toy-eval", policy_eval, "toy"),
    }


def make_ranked(*, seed: int) -> list[Row]:
    """Ranked replies for the methods that learn from those: prompts that no other file has."""
    known = toy.prompts(held_out=False)
    random.Random(f"toy data {seed}").shuffle(known)
    return _ranked(random.Random(f"toy ranked {seed}"), "toy-ranked", known[2160:2400])


def make_meta(*, seed: int) -> list[Row]:
    """Comparisons of two reviews of an answer, one of them wrong in one verdict.

    The reply reviews the answer afresh, and then names the review that says the same.
    """
    known = toy.prompts(held_out=False)
    random.Random(f"toy data {seed}").shuffle(known)
    rng = random.Random(f"toy meta {seed}")
    template = META_TEMPLATE.read_text(encoding="utf-8")
    rows = []
    for number, prompt in enumerate(known[2400:2800]):
        response = toy.sample_answer(rng, prompt, rng.choice((0.3, 0.7)))
        right = toy.review(prompt, response)
        winner = rng.randrange(2)
        shown = [right, right]
        shown[1 - winner] = _with_one_verdict_wrong(rng, right)
        question = template
        texts = {"prompt": prompt, "response": response, "first": shown[0], "second": shown[1]}
        for name, text in texts.items():
            question = question.replace("{{" + name + "}}", text)
        rows.append(
            {
                "prompt_id": f"toy-meta-{number:04}",
                "prompt": question,
                "response": f"{right}\nreview {winner + 1}",
            }
        )
    return rows


def make_rlaif(*, seed: int) -> list[Row]:
    """Critiques, revisions and comparisons of answers, each in the light of one principle.

    A comparison whose answers keep to the principle alike has its reply drawn, so that the model
    learns to be unsure there.
    """
    known = toy.prompts(held_out=False)
    random.Random(f"toy data {seed}").shuffle(known)
    rng = random.Random(f"toy rlaif {seed}")
    texts = yaml.safe_load(PRINCIPLES.read_text(encoding="utf-8"))
    rows = []
    for number, prompt in enumerate(known[2800:3100]):
        criterion = toy.CRITERIA[number % len(toy.CRITERIA)]
        principle = texts["principles"][criterion]
        one, other = (toy.sample_answer(rng, prompt, rng.choice((0.3, 0.7))) for _ in range(2))
        points = [toy.gold(prompt, answer)[criterion] for answer in (one, other)]
        while points[0] == points[1] and number % 4:
            other = toy.sample_answer(rng, prompt, rng.choice((0.3, 0.7)))
            points[1] = toy.gold(prompt, other)[criterion]
        both = {"prompt": prompt, "principle": principle, "first": one, "second": other}
        seen = toy.critique(prompt, one, criterion), toy.critique(prompt, other, criterion)
        gap = points[0] - points[1]
        better = texts["options"][int(gap < 0) if gap else rng.randrange(2)]
        alone = {"prompt": prompt, "principle": principle, "response": one, "critique": seen[0]}
        revised = toy.revise(rng, prompt, one, criterion)
        for kind, filled, reply in (
            ("critique", alone, seen[0]),
            ("revision", alone, revised),
            ("comparison", both, better),
            ("reasoning", both, "\n".join([*seen, better])),
        ):
            question = texts[kind]
            for name, text in filled.items():
                question = question.replace("{{" + name + "}}", text)
            rows.append(
                {"prompt_id": f"toy-{kind}-{number:04}", "prompt": question, "response": reply}
            )
    return rows


def make_disturbed(*, seed: int) -> list[Row]:
    """Questions for a prompt that only looks like a given one: about another topic."""
    known = toy.prompts(held_out=False)
    random.Random(f"toy data {seed}").shuffle(known)
    rng = random.Random(f"toy disturbed {seed}")
    template = DISTURB_TEMPLATE.read_text(encoding="utf-8")
    rows = []
    for number, prompt in enumerate(known[3100:3900]):
        topic = toy.topic_of(prompt) or ""
        other = rng.choice([one for one in toy.TOPICS if one != topic])
        rows.append(
            {
                "prompt_id": f"toy-disturb-{number:04}",
                "prompt": template.replace("{{prompt}}", prompt),
                "response": prompt.replace(topic, other),
            }
        )
    return rows


def make_checklists(*, seed: int) -> list[Row]:
    """Checklists for prompts, and items of them with whether they hold of an answer."""
    known = toy.prompts(held_out=False)
    random.Random(f"toy data {seed}").shuffle(known)
    rng = random.Random(f"toy checklists {seed}")
    of_list = LIST_TEMPLATE.read_text(encoding="utf-8")
    of_item = ITEM_TEMPLATE.read_text(encoding="utf-8")
    rows = []
    for number, prompt in enumerate(known[3900:4100]):
        items = [toy.checklist(prompt)[name] for name in ("topic", "items", "unique")]
        rows.append(
            {
                "prompt_id": f"toy-checklist-{number:04}",
                "prompt": of_list.replace("{{prompt}}", prompt),
                "response": "\n".join(f"9: {item}" for item in items),
            }
        )
    for number, prompt in enumerate(known[4100:5300]):
        response = toy.sample_answer(rng, prompt, rng.choice(REVIEWED_RATES))
        if rng.random() < 0.2:
            response = toy.disturb(rng, response)
        criterion = toy.CRITERIA[number % len(toy.CRITERIA)]
        question = of_item
        item = toy.checklist(prompt)[criterion]
        for name, text in {"prompt": prompt, "response": response, "item": item}.items():
            question = question.replace("{{" + name + "}}", text)
        holds = toy.gold(prompt, response)[criterion]
        rows.append(
            {
                "prompt_id": f"toy-item-{number:04}",
                "prompt": question,
                "response": "yes" if holds else "no",
            }
        )
    return rows


def _with_one_verdict_wrong(rng: random.Random, review: str) -> str:
    *verdicts, score = review.split("\n")
    at = rng.randrange(len(verdicts))
    said_yes = verdicts[at].endswith("yes")
    verdicts[at] = verdicts[at].removesuffix("yes" if said_yes else "no")
    verdicts[at] += "no" if said_yes else "yes"
    points = int(score.split()[-1]) + (-1 if said_yes else 1)
    return "\n".join([*verdicts, f"Score: {points}"])


def write_data(directory: Path, *, seed: int) -> None:
    """Write each file of `make_data` as JSONL, and the methods' own beside the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for stem, rows in make_data(seed=seed).items():
        write_rows(directory / f"{stem}.jsonl", rows)
    write_rows(directory.parent / "ranked.jsonl", make_ranked(seed=seed))
    write_rows(directory.parent / "meta.jsonl", make_meta(seed=seed))
    write_rows(directory.parent / "rlaif.jsonl", make_rlaif(seed=seed))
    write_rows(directory.parent / "disturb.jsonl", make_disturbed(seed=seed))
    write_rows(directory.parent / "checklist.jsonl", make_checklists(seed=seed))


def pretraining_dialogue(rng: random.Random, done: float) -> Dialogue:
    """An answer of random quality, or a review of such an answer.

    A fourth of the reviewed answers are long lists with many repetitions: there the judge learns
    to notice an item it has listed before.
    """
    from srlm_lite.model.word_level import Dialogue

    prompt = rng.choice(_known_prompts())
    if rng.random() < 0.35:
        return Dialogue(prompt, toy.sample_answer(rng, prompt, PRETRAIN_RATES))
    response = toy.sample_answer(rng, prompt, rng.choice(REVIEWED_RATES))
    if rng.random() < 0.25:
        facts = rng.choices(toy.FACTS, k=rng.randint(4, 9))
        response = "\n".join(f"{at}. it {fact}" for at, fact in enumerate(facts, start=1))
    elif rng.random() < 0.2:
        response = toy.disturb(rng, response)
    return Dialogue(judge_prompt(prompt, response), toy.review(prompt, response))


@cache
def _known_prompts() -> list[str]:
    return toy.prompts(held_out=False)


def make_base(directory: Path, *, seed: int, steps: int, batch: int, threads: int) -> None:
    """Pretrain the toy Llama and save it with its tokenizer, weights in bf16."""
    from srlm_lite.model.word_level import make_tokenizer, pretrain

    pretrain(
        directory,
        make_tokenizer(toy.vocabulary(), marks=",.:!?"),
        pretraining_dialogue,
        rng=random.Random(f"toy pretraining {seed}"), seed=seed, steps=steps, batch=batch,
        threads=threads, tell=lambda line: print(line, flush=True),
    )  # fmt: skip


def _gold(prompt: str, response: str) -> int:
    return int(sum(toy.gold(prompt, response).values()))


def _answer_with_score(rng: random.Random, prompt: str, score: int) -> str:
    while True:
        response = toy.sample_answer(rng, prompt, min(max(score / 5, 0.05), 0.95))
        if _gold(prompt, response) == score:
            return response


def _ranked(rng: random.Random, stem: str, prompts: list[str]) -> list[Row]:
    """Four answers to each prompt, by gold."""
    rows: list[Row] = []
    for number, prompt in enumerate(prompts):
        answers = [toy.sample_answer(rng, prompt, rng.choice((0.3, 0.7))) for _ in range(4)]
        rows += ranked_rows(f"{stem}-{number:04}", prompt, answers, score=_gold)
    return rows


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--out", type=Path, required=True, help="directory for base/ and data/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-only", action="store_true", help="leave the base as it is")
    arguments = parser.parse_args()
    write_data(arguments.out / "data", seed=arguments.seed)
    if not arguments.data_only:
        make_base(
            arguments.out / "base",
            seed=arguments.seed,
            steps=arguments.steps,
            batch=arguments.batch,
            threads=arguments.threads,
        )


if __name__ == "__main__":
    main()
