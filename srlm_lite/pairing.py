"""Candidates and judgements become preference pairs; every prompt without one is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from srlm_lite.config import Pairing
from srlm_lite.judging import mean_scores, votes_by_candidate
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt

CANDIDATE_REASONS = ("truncated", "empty", "duplicate", "unreadable", "too_few_votes")
"""Why a candidate cannot be part of a pair, in the order in which it is asked."""

PROMPT_REASONS = (*CANDIDATE_REASONS, "tied", "too_long")
"""Why a prompt gave no pair."""


@dataclass(slots=True)
class Drops:
    """What was left out, and why."""

    prompts: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, object]:
        """All reasons with their counts, zeros included: prompts on top, candidates below."""
        return {
            **{reason: self.prompts[reason] for reason in PROMPT_REASONS},
            "candidates": {reason: self.candidates[reason] for reason in CANDIDATE_REASONS},
        }

    def summary(self) -> str:
        """The prompts' reasons in words, most frequent first."""
        return ", ".join(
            f"{count} {reason}" for reason, count in self.prompts.most_common() if count
        )


def make_pairs(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
    *,
    pairing: Pairing,
    min_votes: int,
    seed: int,
) -> tuple[list[PreferencePair], Drops]:
    """At most one pair a prompt: the candidate of the highest mean score against the lowest.

    Among equal scores the earlier candidate counts. Of several usable candidates with the same
    text the first counts, and the others are duplicates. With `pairing.source: random`, the
    control, two usable candidates are drawn blindly instead.

    Source: Yuan et al. 2024, arXiv:2401.10020, section 2.3.
    """
    scores = mean_scores(judgements, min_votes=min_votes)
    votes = votes_by_candidate(judgements)
    by_prompt: dict[str, list[Candidate]] = {prompt.prompt_id: [] for prompt in prompts}
    for candidate in candidates:
        by_prompt[candidate.prompt_id].append(candidate)

    pairs: list[PreferencePair] = []
    drops = Drops()
    for prompt in prompts:
        usable, reasons = _usable(by_prompt[prompt.prompt_id], scores, votes, pairing)
        drops.candidates.update(reasons)
        if len(usable) < 2:
            drops.prompts[_main_reason(reasons)] += 1
            continue
        if pairing.source == "random":
            chosen, rejected = Random(f"{seed}/{prompt.prompt_id}").sample(usable, 2)
        else:
            chosen = max(usable, key=lambda item: item[1])
            rejected = min(usable, key=lambda item: item[1])
            if chosen[1] - rejected[1] <= pairing.min_gap:
                drops.prompts["tied"] += 1
                continue
        pairs.append(
            PreferencePair(
                prompt_id=prompt.prompt_id,
                prompt=prompt.text,
                chosen_id=chosen[0].candidate_id,
                rejected_id=rejected[0].candidate_id,
                chosen=chosen[0].text,
                rejected=rejected[0].text,
                chosen_score=chosen[1],
                rejected_score=rejected[1],
            )
        )
    return pairs, drops


def _usable(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float | None],
    votes: Mapping[str, Sequence[float | None]],
    pairing: Pairing,
) -> tuple[list[tuple[Candidate, float]], list[str]]:
    usable: list[tuple[Candidate, float]] = []
    reasons: list[str] = []
    seen: set[str] = set()
    for candidate in candidates:
        score = scores.get(candidate.candidate_id)
        if pairing.drop_truncated and candidate.finish_reason == "length":
            reasons.append("truncated")
        elif not candidate.text.strip():
            reasons.append("empty")
        elif candidate.text in seen:
            reasons.append("duplicate")
        elif score is None:
            readable = [vote for vote in votes.get(candidate.candidate_id, ()) if vote is not None]
            reasons.append("too_few_votes" if readable else "unreadable")
        else:
            usable.append((candidate, score))
            seen.add(candidate.text)
    return usable, reasons


def _main_reason(reasons: Sequence[str]) -> str:
    counts = Counter(reasons)
    return max(CANDIDATE_REASONS, key=lambda reason: counts[reason])
