"""Figures of an iteration's own candidates: how many, how long, and how they stand to gold's order.

Gold is measured against, and never learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.evaluate.judge_metrics import judge_metrics
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt, RankedReply


def candidate_facts(rows: Sequence[Candidate]) -> dict[str, Any]:
    """What `metrics.jsonl` keeps of candidates."""
    return {
        "candidates": len(rows),
        "truncated": sum(row.finish_reason == "length" for row in rows),
        "mean_tokens": round(fmean(row.n_tokens for row in rows), 1),
    }


def vote_facts(rows: Sequence[Judgement]) -> dict[str, Any]:
    """What `metrics.jsonl` keeps of votes."""
    readable = [row.score for row in rows if row.score is not None]
    return {
        "judgements": len(rows),
        "parse_rate": round(len(readable) / max(1, len(rows)), 4),
        "mean_score": round(fmean(readable), 3) if readable else None,
    }


NO_VOTES: Mapping[str, Any] = {"judgements": 0, "parse_rate": None, "mean_score": None}
"""What it keeps where nobody votes."""


def gold_scores(
    name: str | None, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
) -> dict[str, float]:
    """What the gold scorer says, in the judge's place: the upper bound.

    Raises:
        UserError: The recipe names none.
    """
    if name is None:
        raise UserError(
            "names no gold scorer to take the judge's place",
            where="evaluate.gold",
            way_out="Name one, or set pairing.source=judge",
        )
    gold = load_gold(name)
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}
    return {row.candidate_id: gold.total(texts[row.prompt_id], row.text) for row in candidates}


def on_policy_accuracy(
    gold_name: str | None,
    texts: Mapping[str, str],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
) -> dict[str, Any]:
    """Share of the policy's own candidates' pairs that the judge puts in the gold order."""
    if gold_name is None:
        return {}
    gold = load_gold(gold_name)
    judged = {row.candidate_id for row in judgements}
    by_prompt: dict[str, dict[Candidate, float]] = {}
    for row in candidates:
        if row.candidate_id in judged:
            points = gold.total(texts[row.prompt_id], row.text)
            by_prompt.setdefault(row.prompt_id, {})[row] = points
    groups = []
    for prompt_id, points_of in by_prompt.items():
        order = sorted(set(points_of.values()), reverse=True)
        groups.append(
            [
                RankedReply(
                    prompt_id, texts[prompt_id], row.candidate_id, row.text, order.index(points)
                )
                for row, points in points_of.items()
            ]
        )
    # The best possible score plays no part in the pairwise accuracy.
    metrics = judge_metrics(groups, judgements, best_score=0.0)
    return {"gold_pairwise_accuracy": metrics["pairwise_accuracy"]}


def pair_facts(gold_name: str | None, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """Lengths of new pairs, and how often their order is the gold scorer's.

    That is right, reversed, or tied in gold.
    """
    facts: dict[str, Any] = {
        "chosen_chars": round(fmean(len(pair.chosen) for pair in pairs), 1),
        "rejected_chars": round(fmean(len(pair.rejected) for pair in pairs), 1),
    }
    if gold_name is None:
        return facts
    gold = load_gold(gold_name)
    gaps = [gold.total(p.prompt, p.chosen) - gold.total(p.prompt, p.rejected) for p in pairs]
    facts["gold_agreement"] = {
        "right": sum(gap > 0 for gap in gaps),
        "reversed": sum(gap < 0 for gap in gaps),
        "tied": sum(gap == 0 for gap in gaps),
    }
    return facts
