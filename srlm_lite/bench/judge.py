"""`srlm-lite bench judge`: what expected scores change, on the judgements of a run.

Nothing is sampled: judgements made with `judge.score: expected` carry both scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.evaluate.candidates import on_policy_accuracy
from srlm_lite.judging import as_sampled, mean_scores, votes_by_candidate
from srlm_lite.pairing import pairs_of, usable_candidates
from srlm_lite.recipe import Recipe
from srlm_lite.records import Candidate, Judgement, Prompt
from srlm_lite.run.files import read_records
from srlm_lite.run.layout import IterationDir
from srlm_lite.run.run import RunDir


def bench_judge(directory: Path, iteration: int | None = None) -> dict[str, Any]:
    """Both kinds of score on the judgements of one iteration; the last one by default.

    Returns:
        `iteration`, `votes`, `unreadable`, and for `sampled` and `expected` each what
        `with_scores` says.

    Raises:
        UserError: There is no such iteration, it has no judgements yet, or none with both scores.
    """
    run = RunDir(directory)
    recipe = run.recipe()
    place = _iteration(run, iteration)
    judgements = read_records(place.judgements, Judgement)
    readable = [row for row in judgements if row.score is not None]
    if not readable or any(row.sampled_score is None for row in readable):
        raise UserError(
            "its judgements carry no expected scores",
            where=str(place.judgements),
            way_out="Make a run with --set judge.score=expected",
        )
    prompts = read_records(place.prompts, Prompt)
    candidates = read_records(place.candidates, Candidate)
    return {
        "run": recipe.name,
        "iteration": place.number,
        "votes": len(judgements),
        "unreadable": len(judgements) - len(readable),
        "gold": recipe.evaluate.gold,
        "sampled": with_scores(recipe, prompts, candidates, [as_sampled(j) for j in judgements]),
        "expected": with_scores(recipe, prompts, candidates, judgements),
    }


def with_scores(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
) -> dict[str, Any]:
    """What follows from the scores of these judgements.

    Returns:
        `tie_rate`: of all pairs of a prompt's candidates with enough readable votes
        (`candidate_pairs`), the share with equal mean scores. `pairs`: the preference pairs that
        the recipe's pairing makes of them, whatever its source and method are, and `tied` the
        prompts whose candidates are too close for one. `gold_pairwise_accuracy`: the share of the
        candidates' pairs in the gold order, ties as half; None without a gold scorer.
    """
    scores = mean_scores(judgements, min_votes=recipe.judge.min_votes)
    of_prompt: dict[str, list[float]] = {}
    for row in candidates:
        score = scores.get(row.candidate_id)
        if score is not None:
            of_prompt.setdefault(row.prompt_id, []).append(score)
    equal = [a == b for found in of_prompt.values() for a, b in combinations(found, 2)]
    usable, drops = usable_candidates(
        prompts,
        candidates,
        scores,
        votes=votes_by_candidate(judgements),
        drop_truncated=recipe.pairing.drop_truncated,
    )
    pairing = recipe.pairing.model_copy(update={"source": "judge"})
    pairs, drops = pairs_of(prompts, usable, drops, pairing=pairing)
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}
    accuracy = on_policy_accuracy(recipe.evaluate.gold, texts, candidates, judgements)
    return {
        "tie_rate": round(sum(equal) / len(equal), 4) if equal else None,
        "candidate_pairs": len(equal),
        "pairs": len(pairs),
        "tied": drops.prompts["tied"],
        "gold_pairwise_accuracy": accuracy.get("gold_pairwise_accuracy"),
    }


def _iteration(run: RunDir, number: int | None) -> IterationDir:
    judged = [place for place in run.iterations() if place.judgements.is_file()]
    if number is None and judged:
        return judged[-1]
    for place in judged:
        if place.number == number:
            return place
    numbers = ", ".join(str(place.number) for place in judged)
    raise UserError(
        "has no judgements yet" if number is None else f"has no judgements of iteration {number}",
        where=str(run.path),
        way_out=f"It has those of {numbers}" if numbers else None,
    )
