"""What the policy's answers look like: length, endings, and the gold score."""

from __future__ import annotations

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
        (answers to one prompt are averaged first, for they are not independent), and
        `gold_by_criterion`. `intervals` has the 95% interval of each mean and rate.
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
        points = [gold.points(prompts[answer.prompt_id], answer.text) for answer in answers]
        totals: dict[str, list[float]] = {}
        for answer, point in zip(answers, points, strict=True):
            totals.setdefault(answer.prompt_id, []).append(sum(point.values()))
        means = [fmean(scores) for scores in totals.values()]
        criteria = {name: None for point in points for name in point}
        terms["gold_mean"] = [(mean, 1) for mean in means]
        metrics |= {
            "gold_mean": round(fmean(means), 4),
            "gold_se": round(stdev(means) / len(means) ** 0.5, 4) if len(means) > 1 else None,
            "gold_by_criterion": {
                name: round(fmean(point.get(name, 0.0) for point in points), 4) for name in criteria
            },
        }
    return {**metrics, "intervals": intervals(terms)}
