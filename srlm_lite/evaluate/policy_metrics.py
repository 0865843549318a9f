"""What the policy's answers look like: length, endings, and the gold score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from srlm_lite.evaluate.gold import Gold
from srlm_lite.evaluate.intervals import Terms, intervals
from srlm_lite.records import Candidate


def policy_metrics(
    prompts: Mapping[str, str], answers: Sequence[Candidate], gold: Gold | None
) -> dict[str, Any]:
    """Metrics of sampled answers.

    Args:
        prompts: prompt_id to text.
        answers: One or more for each prompt.

    Returns:
        `mean_length_chars`, `median_length_chars`, `mean_length_tokens`, `truncated_rate`,
        `answers`; with a gold scorer also `gold_mean`, its standard error `gold_se` over prompts
        (answers to one prompt are averaged first, for they are not independent), and the same of
        each criterion, `gold_by_criterion` and `gold_by_criterion_se`. `intervals` has the 95%
        interval of each mean and rate. Tokens are counted with those of thoughts, characters
        without.
    """
    by_prompt: dict[str, list[Candidate]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt_id, []).append(answer)
    groups = list(by_prompt.values())
    terms: dict[str, Terms] = {
        "mean_length_chars": [(sum(len(a.text) for a in some), len(some)) for some in groups],
        "truncated_rate": [
            (sum(a.finish_reason == "length" for a in some), len(some)) for some in groups
        ],
    }
    metrics: dict[str, Any] = {
        "mean_length_chars": round(fmean(len(answer.text) for answer in answers), 1),
        "median_length_chars": round(median(len(answer.text) for answer in answers), 1),
        "mean_length_tokens": round(fmean(answer.n_tokens for answer in answers), 1),
        "truncated_rate": round(fmean(a.finish_reason == "length" for a in answers), 4),
        "answers": len(answers),
    }
    if gold is not None:
        points = [
            [gold.points(prompts[prompt_id], answer.text) for answer in some]
            for prompt_id, some in by_prompt.items()
        ]
        criteria = {name: None for some in points for point in some for name in point}
        means = [fmean(sum(point.values()) for point in some) for some in points]
        by_criterion = {
            name: [fmean(point.get(name, 0.0) for point in some) for some in points]
            for name in criteria
        }
        terms["gold_mean"] = [(mean, 1) for mean in means]
        metrics |= {
            "gold_mean": round(fmean(means), 4),
            "gold_se": standard_error(means),
            "gold_by_criterion": {
                name: round(fmean(values), 4) for name, values in by_criterion.items()
            },
            "gold_by_criterion_se": {
                name: standard_error(values) for name, values in by_criterion.items()
            },
        }
    return {**metrics, "intervals": intervals(terms, means=("mean_length_chars", "gold_mean"))}


def best_graded(
    answers: Sequence[Candidate], scores: Mapping[str, float | None]
) -> list[Candidate]:
    """The answer of the highest score to each prompt, the first of several; one without a score
    counts as below all others.

    Args:
        scores: By candidate_id.
    """
    best: dict[str, tuple[float, Candidate]] = {}
    for answer in answers:
        found = scores.get(answer.candidate_id)
        score = -math.inf if found is None else found
        if answer.prompt_id not in best or score > best[answer.prompt_id][0]:
            best[answer.prompt_id] = score, answer
    return [answer for _, answer in best.values()]


def means_by_prompt(
    answers: Sequence[Candidate], scores: Mapping[str, float | None]
) -> list[float]:
    """The mean score of each prompt's answers; without the answers that have none.

    Args:
        scores: By candidate_id.
    """
    by_prompt: dict[str, list[float]] = {}
    for answer in answers:
        score = scores.get(answer.candidate_id)
        if score is not None:
            by_prompt.setdefault(answer.prompt_id, []).append(score)
    return [fmean(found) for found in by_prompt.values()]


def standard_error(means: Sequence[float]) -> float | None:
    """The standard error of the mean of the prompts' means; None where there is one prompt."""
    return round(stdev(means) / len(means) ** 0.5, 4) if len(means) > 1 else None
