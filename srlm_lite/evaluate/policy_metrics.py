"""What the policy's answers look like: length, endings, and the gold score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from srlm_lite.evaluate.gold import Gold
from srlm_lite.records import Candidate


def policy_metrics(
    prompts: Mapping[str, str], answers: Sequence[Candidate], gold: Gold | None
) -> dict[str, Any]:
    """Metrics of sampled answers.

    Args:
        prompts: prompt_id to text.
        answers: One or more for each prompt.

    Returns:
        `mean_length_chars`, `mean_length_tokens`, `truncated_rate`, `answers`; with a gold
        scorer also `gold_mean`, its standard error `gold_se` over prompts (answers to one
        prompt are averaged first, for they are not independent), and `gold_by_criterion`.
    """
    metrics: dict[str, Any] = {
        "mean_length_chars": round(fmean(len(answer.text) for answer in answers), 1),
        "mean_length_tokens": round(fmean(answer.n_tokens for answer in answers), 1),
        "truncated_rate": round(fmean(a.finish_reason == "length" for a in answers), 4),
        "answers": len(answers),
    }
    if gold is None:
        return metrics
    points = [gold.points(prompts[answer.prompt_id], answer.text) for answer in answers]
    by_prompt: dict[str, list[float]] = {}
    for answer, point in zip(answers, points, strict=True):
        by_prompt.setdefault(answer.prompt_id, []).append(sum(point.values()))
    means = [fmean(scores) for scores in by_prompt.values()]
    criteria = {name: None for point in points for name in point}
    return {
        **metrics,
        "gold_mean": round(fmean(means), 4),
        "gold_se": round(stdev(means) / len(means) ** 0.5, 4) if len(means) > 1 else None,
        "gold_by_criterion": {
            name: round(fmean(point.get(name, 0.0) for point in points), 4) for name in criteria
        },
    }
