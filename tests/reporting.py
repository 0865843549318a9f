"""Run directories for tests of the report: written by the record writers, without any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from srlm_lite.recipe import load_recipe
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt, TrainingStep
from srlm_lite.run.files import write_json, write_records
from srlm_lite.run.layout import IterationDir, StageDir
from srlm_lite.run.run import RunDir

SYLLABLES = ("ba", "dor", "en", "fi", "gul", "ish", "lan", "mor", "qua", "tis", "ver", "zo")
WORDS = ["".join(parts) for parts in product(SYLLABLES, repeat=3)]
"""As many as a text of some length draws from, so that it packs no better than one."""


@dataclass(frozen=True)
class Reply:
    """A candidate and the judge's votes on it."""

    text: str
    scores: Sequence[float | None]
    words: str = "Score: said"


@dataclass(frozen=True)
class Told:
    """A pair: the prompt, the chosen reply, the rejected one."""

    prompt: str
    chosen: Reply
    rejected: Reply
    origin: str = ""


def new_run(path: Path, *overrides: str, **facts: Any) -> RunDir:
    """A run of the recipe `toy` that has only begun."""
    run = RunDir(path)
    run.open(load_recipe("toy", ["iterations=2", *overrides]), facts)
    return run


def evaluation(
    *, gold: float | None = 2.0, error: float | None = 0.1, accuracy: float = 0.9, **policy: Any
) -> dict[str, Any]:
    """An `eval.json` of the first release: without intervals."""
    scored = {} if gold is None else {"gold_mean": gold, "gold_se": error}
    return {
        "judge": {
            "pairwise_accuracy": accuracy,
            "five_best": 0.8,
            "exact_match": 0.5,
            "spearman": 0.7,
            "kendall": 0.6,
            "parse_rate": 0.95,
            "tie_rate": 0.1,
            "score_histogram": {"1": 10, "2": 12, "4": 8, "unreadable": 2},
            "prompts": 20,
            "pairs": 100,
        },
        "policy": {
            "mean_length_chars": 80.0,
            "truncated_rate": 0.0,
            "answers": 20,
            **scored,
            "greedy": {"mean_length_chars": 90.0, **scored},
            **policy,
        },
    }


def add_anchor(run: RunDir, measured: Mapping[str, Any] | None = None) -> None:
    """A finished anchor."""
    run.add_metrics({"iteration": 0, "stage": "anchor", "seconds": 60.0, "steps": 10})
    run.anchor.path.mkdir(parents=True)
    finish(run.anchor, measured)


def finish(place: StageDir, measured: Mapping[str, Any] | None = None) -> None:
    """Evaluate and close a stage."""
    write_json(place.evaluation, measured or evaluation())
    place.finish(iteration=0, seconds=1.0, counts={})


def add_iteration(
    run: RunDir,
    number: int,
    pairs: Sequence[Told],
    *,
    measured: Mapping[str, Any] | None = None,
    drops: Mapping[str, int] | None = None,
    steps: int = 4,
    judged: bool = True,
) -> IterationDir:
    """A finished iteration with these pairs; each has its prompt and its two candidates."""
    place = run.iteration(number)
    place.path.mkdir(parents=True)
    prompts, candidates, judgements, records = [], [], [], []
    for i, told in enumerate(pairs):
        prompt = Prompt(f"p{number}-{i}", told.prompt)
        prompts.append(prompt)
        for which, reply in enumerate((told.chosen, told.rejected)):
            name = f"{prompt.prompt_id}#{which}"
            candidates.append(Candidate(prompt.prompt_id, name, reply.text, 5, "stop"))
            judgements += [
                Judgement(name, vote, reply.words, score) for vote, score in enumerate(reply.scores)
            ]
        records.append(
            PreferencePair(
                prompt.prompt_id,
                told.prompt,
                f"{prompt.prompt_id}#0",
                f"{prompt.prompt_id}#1",
                told.chosen.text,
                told.rejected.text,
                _mean(told.chosen.scores),
                _mean(told.rejected.scores),
                origin=told.origin,
            )
        )
    write_records(place.prompts, prompts)
    write_records(place.candidates, candidates)
    write_records(place.judgements, judgements if judged else [])
    write_records(place.pairs, records)
    write_json(place.drops, {"tied": 0, **(drops or {}), "candidates": {"truncated": 0}})
    if steps:
        curve = [
            TrainingStep(s, 0.7 - 0.01 * s, 0.01 * s, 0.5, 0.01 * s, 0.0)
            for s in range(1, steps + 1)
        ]
        write_records(place.delta_place.steps, curve)
    facts = {"steps": steps, "last_loss": 0.66, "reward_accuracy": 0.8, "reward_margin": 0.05}
    write_json(place.delta_place.training, facts)
    for stage, more in (
        ("prompts", {"prompts": len(prompts)}),
        ("candidates", {"candidates": len(candidates)}),
        ("judgements", {"judgements": len(judgements)}),
        ("pairs", {"pairs": len(records)}),
        ("delta", facts),
        ("evaluation", {}),
    ):
        run.add_metrics({"iteration": number, "stage": stage, "seconds": 10.0, **more})
    finish(place, measured)
    return place


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else 0.0


def some_pairs(n: int, *, words: int = 12, votes: int = 2, seed: int = 0) -> list[Told]:
    """Pairs of random words; the judge's words are as many."""
    random = Random(seed)

    def text() -> str:
        return " ".join(random.choices(WORDS, k=words)) + f" {random.random()}"

    def reply(low: int) -> Reply:
        scores = [float(random.randint(low, low + 2)) for _ in range(votes)]
        return Reply(text(), scores, text())

    return [Told(text(), reply(3), reply(0)) for _ in range(n)]
