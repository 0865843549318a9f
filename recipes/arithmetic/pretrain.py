"""Make the arithmetic base and its data: `python recipes/arithmetic/pretrain.py --out DIR`.

Writes
  DIR/data/        ift, eft_train, eft_eval, prompts, eval_prompts (.jsonl), in seconds
  DIR/steps.jsonl  verdicts on single steps, for the anchor of `toy-steps`
  DIR/base/        a word-level Llama of about 0.9M parameters with its tokenizer (bf16)

The base is pretrained on answers of a solver who slips (`srlm_lite.tasks.arithmetic`), on reviews
and on verdicts on single steps in the judge's formats, and on new problems after the example of
others. So, as with the toy base, the judge's skill is not learned from `eft_train` alone, and its
reviews carry labels of the gold scorer. One verdict among a hundred tokens teaches little: where
steps are judged, every token of theirs is followed by a verdict on all up to it, in place of the
token that comes next.

One problem in eight is held out (`arithmetic.is_held_out`): only eft_eval and eval_prompts have
those. Deterministic for a seed and thread count on one machine. Takes about 25
minutes on one core; stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from srlm_lite.tasks import arithmetic
from srlm_lite.tasks.rows import Row, prompt_rows, ranked_rows, write_rows

if TYPE_CHECKING:
    from srlm_lite.model.word_level import Dialogue

RECIPES = Path(__file__).parent.parent
RUBRIC: str = yaml.safe_load((RECIPES / "rubrics" / "arithmetic.yaml").read_text("utf-8"))[
    "template"
]
STEP = (RECIPES / "templates" / "arithmetic-step.txt").read_text("utf-8")
NEW_PROBLEM = (RECIPES / "templates" / "arithmetic-problem.txt").read_text("utf-8")

SLIPS = 0.1
"""How often a step of an answer goes wrong: of the anchor's data, and of what the base learns."""
REVIEWED_SLIPS = (0.0, 0.1, 0.3)
SHOTS = 2
"""Problems that a request for a new one shows."""
SIZE = (6, 112, 288)
"""Layers, their width and the width within: a verdict compares what a step should be, which takes
layers of its own to compute."""
STEPS = 3300
USER_WEIGHT = 0.3
"""How much a token of the user's turn counts. Problems are full of repetitions, and without
learning those a base computes well and copies badly: of what a problem says it took the wrong
number or name."""
VERDICT_WEIGHT = 2.0
"""How much a verdict counts, in the reply and at every token of the steps that are judged."""


def judge_prompt(prompt: str, response: str) -> str:
    """The rubric filled in, as the judge receives it."""
    return RUBRIC.replace("{{prompt}}", prompt).replace("{{response}}", response)


def step_prompt(prompt: str, steps: list[str]) -> str:
    """The question whether the last of these steps is right."""
    return STEP.replace("{{prompt}}", prompt).replace("{{steps}}", "\n".join(steps))


def reviewed_answer(rng: random.Random, prompt: str) -> str:
    """An answer such as a judge may meet: some of it wrong, at times out of shape."""
    response = arithmetic.sample_answer(rng, prompt, rng.choice(REVIEWED_SLIPS))
    return arithmetic.disturb(rng, response) if rng.random() < 0.25 else response


def verdict(rng: random.Random, prompt: str) -> tuple[list[str], str]:
    """Steps, and whether the last of them is right: about as many are wrong as right.

    Steps behind a mistake are asked about as well.
    """
    wanted = rng.random() < 0.5
    while True:
        steps = arithmetic.read_steps(prompt, reviewed_answer(rng, prompt))
        fitting = [at for at, step in enumerate(steps) if step.is_right == wanted]
        if fitting:
            at = rng.choice(fitting)
            said = arithmetic.RIGHT if wanted else arithmetic.WRONG
            return [step.text for step in steps[: at + 1]], said


def make_data(*, seed: int) -> dict[str, list[Row]]:
    """Rows of every data file by file stem; the same seed gives the same rows."""
    rng = random.Random(f"arithmetic data {seed}")
    known = _distinct(rng, 2200, held_out=False)
    unseen = _distinct(rng, 300, held_out=True)
    ift = [
        {
            "prompt_id": f"arithmetic-ift-{number:04}",
            "prompt": prompt,
            "response": arithmetic.sample_answer(rng, prompt, SLIPS),
        }
        for number, prompt in enumerate(known[:400])
    ]
    eft_train = [
        row
        for number, prompt in enumerate(known[400:1200])
        for row in ranked_rows(
            f"arithmetic-eft-{number:04}", prompt, [_answer_with_score(rng, prompt, number)],
            score=_score, target=arithmetic.review,
        )
    ]  # fmt: skip
    return {
        "ift": ift,
        "eft_train": eft_train,
        "eft_eval": _ranked(rng, "arithmetic-judge", unseen[:60]),
        "prompts": prompt_rows("arithmetic-prompt", known[1200:], "arithmetic"),
        "eval_prompts": prompt_rows("arithmetic-eval", unseen[60:260], "arithmetic"),
    }


def make_steps(*, seed: int) -> list[Row]:
    """Questions about single steps with their verdicts, on problems that no other file has."""
    rng = random.Random(f"arithmetic steps {seed}")
    taken = {row.get("prompt") or row["text"] for rows in make_data(seed=seed).values()
             for row in rows}  # fmt: skip
    rows: list[Row] = []
    while len(rows) < 600:
        prompt = arithmetic.sample_problem(rng)
        if prompt in taken:
            continue
        steps, said = verdict(rng, prompt)
        rows.append(
            {
                "prompt_id": f"arithmetic-step-{len(rows):04}",
                "prompt": step_prompt(prompt, steps),
                "response": said,
            }
        )
    return rows


def write_data(directory: Path, *, seed: int) -> None:
    """Write each file of `make_data` as JSONL into `data`, and the verdicts beside it."""
    (directory / "data").mkdir(parents=True, exist_ok=True)
    for stem, rows in make_data(seed=seed).items():
        write_rows(directory / "data" / f"{stem}.jsonl", rows)
    write_rows(directory / "steps.jsonl", make_steps(seed=seed))


def pretraining_dialogue(rng: random.Random, done: float) -> Dialogue:
    """A dialogue of one of the four kinds; of answers there are most at the beginning.

    What a step should be is what an answer says, so a judge can only be learned behind that.
    """
    from srlm_lite.model.word_level import Dialogue

    prompt = arithmetic.sample_problem(rng)
    answers = 0.25 + 0.35 * max(0.0, 1 - 2 * done)
    kind = rng.random()
    if kind < answers:
        return Dialogue(prompt, arithmetic.sample_answer(rng, prompt, SLIPS))
    if kind < answers + 0.08:
        shown = "\n".join(arithmetic.sample_problem(rng) for _ in range(SHOTS))
        return Dialogue(NEW_PROBLEM.replace("{{problems}}", shown), prompt)
    if rng.random() < 0.45:
        response = reviewed_answer(rng, prompt)
        inside = tuple(arithmetic.verdicts(prompt, response))
        target = arithmetic.review(prompt, response)
        return Dialogue(judge_prompt(prompt, response), target, inside)
    steps, said = verdict(rng, prompt)
    inside = tuple(arithmetic.verdicts(prompt, "\n".join(steps)))
    return Dialogue(step_prompt(prompt, steps), said, inside, weight=VERDICT_WEIGHT)


def make_base(
    directory: Path, *, seed: int, steps: int, batch: int, threads: int, minutes: float
) -> bool:
    """Pretrain the base and save it with its tokenizer; whether it is done."""
    from srlm_lite.model.word_level import Size, make_tokenizer, pretrain

    return pretrain(
        directory,
        make_tokenizer(arithmetic.vocabulary(), marks=",.:?", numbers=True),
        pretraining_dialogue,
        rng=random.Random(f"arithmetic pretraining {seed}"), seed=seed, steps=steps, batch=batch,
        threads=threads, size=Size(*SIZE), user_weight=USER_WEIGHT, verdict_weight=VERDICT_WEIGHT,
        orthogonal=True,
        progress=directory.parent / "pretraining.pt", minutes=minutes,
        tell=lambda line: print(line, flush=True),
    )  # fmt: skip


def _distinct(rng: random.Random, count: int, *, held_out: bool) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[arithmetic.sample_problem(rng, held_out=held_out)] = None
    return list(found)


def _score(prompt: str, response: str) -> int:
    return int(arithmetic.review(prompt, response).split()[-1])


def _answer_with_score(rng: random.Random, prompt: str, number: int) -> str:
    """An answer without a mistake for every second number, else one with a mistake."""
    while True:
        response = reviewed_answer(rng, prompt)
        if (_score(prompt, response) == arithmetic.MAX_SCORE) == (number % 2 == 0):
            return response


def _ranked(rng: random.Random, stem: str, prompts: list[str]) -> list[Row]:
    """Four answers to each prompt, every second one without a mistake."""
    rows: list[Row] = []
    for number, prompt in enumerate(prompts):
        answers = [_answer_with_score(rng, prompt, at) for at in range(4)]
        rows += ranked_rows(f"{stem}-{number:04}", prompt, answers, score=_score)
    return rows


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--out", type=Path, required=True, help="directory for base/ and data/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop then, and go on when called again"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-only", action="store_true", help="leave the base as it is")
    arguments = parser.parse_args()
    write_data(arguments.out, seed=arguments.seed)
    if not arguments.data_only:
        make_base(
            arguments.out / "base",
            seed=arguments.seed,
            steps=arguments.steps,
            minutes=arguments.minutes,
            batch=arguments.batch,
            threads=arguments.threads,
        )


if __name__ == "__main__":
    main()
