"""Candidates and scores become preference pairs; every prompt without one is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from random import Random
from typing import Literal

from srlm_lite.records import Candidate, PreferencePair, Prompt
from srlm_lite.settings import Pairing

CANDIDATE_REASONS = (
    "truncated",
    "empty",
    "duplicate",
    "too_long_to_judge",
    "unreadable",
    "too_few_votes",
)
"""Why a candidate cannot be part of a pair, in the order in which it is asked."""

PROMPT_REASONS = (*CANDIDATE_REASONS, "tied", "narrow", "too_long")
"""Why a prompt gave no pair."""

JUDGE = "judge"
"""Origin of a pair of judgements."""

Scores = Mapping[str, float | None]
"""Score by candidate; None is unreadable."""

Scored = tuple[Candidate, float]


@dataclass(slots=True)
class Drops:
    """What was left out, and why. A method may have reasons of its own for a prompt."""

    prompts: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, object]:
        """All reasons with their counts, zeros included: prompts on top, candidates below."""
        reasons = dict.fromkeys((*PROMPT_REASONS, *self.prompts))
        return {
            **{reason: self.prompts[reason] for reason in reasons},
            "candidates": {reason: self.candidates[reason] for reason in CANDIDATE_REASONS},
        }

    def summary(self) -> str:
        """The prompts' reasons in words, most frequent first."""
        return ", ".join(
            f"{count} {reason}" for reason, count in self.prompts.most_common() if count
        )


def usable_candidates(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    scores: Scores,
    *,
    votes: Mapping[str, Sequence[float | None]] | None = None,
    unasked: Container[str] = (),
    drop_truncated: bool,
) -> tuple[dict[str, list[Scored]], Drops]:
    """The candidates of each prompt that can be part of a pair, with their scores.

    Of several usable candidates with the same text the first counts, and the others are
    duplicates. A prompt with fewer than two is dropped, for its candidates' main reason.

    Args:
        votes: Tells a candidate with too few readable votes from one with none.
        unasked: Candidates that the judge was not asked about: the question did not fit its window.
    """
    by_prompt: dict[str, list[Candidate]] = {prompt.prompt_id: [] for prompt in prompts}
    for candidate in candidates:
        by_prompt[candidate.prompt_id].append(candidate)
    found: dict[str, list[Scored]] = {}
    drops = Drops()
    for prompt in prompts:
        usable, reasons = _usable(
            by_prompt[prompt.prompt_id], scores, votes or {}, unasked, drop_truncated
        )
        drops.candidates.update(reasons)
        if len(usable) < 2:
            drops.prompts[_main_reason(reasons)] += 1
        else:
            found[prompt.prompt_id] = usable
    return found, drops


def pairs_of(
    prompts: Sequence[Prompt],
    usable: Mapping[str, Sequence[Scored]],
    drops: Drops,
    *,
    pairing: Pairing,
    seed: int = 0,
    iteration: int = 1,
) -> tuple[list[PreferencePair], Drops]:
    """At most one pair a prompt of its usable candidates; drops are added to those given.

    The candidate of the highest score is chosen, that of the lowest rejected; among equal scores
    the earlier one counts. With `pairing.source: random`, the control, two usable candidates are
    drawn blindly instead.

    Source: Yuan et al. 2024, arXiv:2401.10020, section 2.3.
    """
    alpha = length_penalty(list(usable.values()), pairing)
    rho = at_iteration(pairing.rho, iteration)
    pairs: list[PreferencePair] = []
    for prompt in prompts:
        if prompt.prompt_id not in usable:
            continue
        scored = usable[prompt.prompt_id]
        if pairing.source == "random":
            chosen, rejected = Random(f"{seed}/{prompt.prompt_id}").sample(scored, 2)
        else:
            chosen, rejected = best_and_worst(scored, rho=rho, alpha=alpha)
            if reason := too_close(chosen, rejected, scored, pairing.min_gap, alpha=alpha):
                drops.prompts[reason] += 1
                continue
        pairs.append(pair(prompt, chosen, rejected))
    return pairs, drops


def too_close(
    chosen: Scored,
    rejected: Scored,
    scored: Sequence[Scored],
    min_gap: float,
    *,
    alpha: float = 0.0,
) -> str | None:
    """Why two candidates, picked from `scored`, are no pair; None where they are one.

    `tied`: the scores do not tell the candidates apart, or the two are one. `narrow`: they do, but
    not by more than `min_gap`. Scores count as they rank: lowered by alpha a character. So a pair
    that the penalty has turned round is one, as in DICE; but where all scores are equal length
    alone does not make one, for no judge has preferred anything.

    Source: Chen et al. 2024 (DICE), arXiv:2406.09760, and its code.
    """
    gap = lowered(chosen, alpha) - lowered(rejected, alpha)
    same = chosen[0].text == rejected[0].text
    if gap <= 0 or same or _all_equal(scored):
        return "tied"
    return "narrow" if gap <= min_gap else None


def lowered(one: Scored, alpha: float) -> float:
    """A score as it ranks under a length penalty."""
    return one[1] - alpha * len(one[0].text)


def _all_equal(scored: Sequence[Scored]) -> bool:
    return len({score for _, score in scored}) < 2


def told_apart(
    prompt: Prompt, scored: Sequence[Scored], *, min_gap: float = 0.0
) -> list[PreferencePair]:
    """Every two candidates of a prompt whose scores differ by more, the better one chosen."""
    ordered = sorted(scored, key=lambda one: -one[1])
    return [pair(prompt, a, b) for a, b in combinations(ordered, 2) if a[1] - b[1] > min_gap]


def pair(prompt: Prompt, chosen: Scored, rejected: Scored) -> PreferencePair:
    """A pair of two scored candidates of a prompt."""
    return PreferencePair(
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        chosen_id=chosen[0].candidate_id,
        rejected_id=rejected[0].candidate_id,
        chosen=chosen[0].text,
        rejected=rejected[0].text,
        chosen_score=chosen[1],
        rejected_score=rejected[1],
        chosen_ids=chosen[0].ids,
        rejected_ids=rejected[0].ids,
        messages=prompt.messages,
    )


def best_and_worst(
    scored: Sequence[Scored], *, rho: float = 0.0, alpha: float = 0.0
) -> tuple[Scored, Scored]:
    """The candidates to choose and to reject; length counts where rho or alpha is above 0.

    With rho, chosen is the shortest of those that score at least (1 - rho) max + rho min, and
    rejected the longest of those that score at most (1 - rho) min + rho max. With alpha, scores
    are lowered by alpha a character first, for the choice only.

    Source: rho, Wu et al. 2024, arXiv:2407.19594, section 2.1; alpha, Chen et al. 2024 (DICE),
    arXiv:2406.09760.
    """
    adjusted = [lowered(one, alpha) for one in scored]
    top, bottom = max(adjusted), min(adjusted)
    if not rho:
        return scored[adjusted.index(top)], scored[adjusted.index(bottom)]
    good, bad = (1 - rho) * top + rho * bottom, (1 - rho) * bottom + rho * top
    # The extremes themselves belong, whatever the rounding.
    high = [one for one, value in zip(scored, adjusted, strict=True) if value >= good - 1e-9]
    low = [one for one, value in zip(scored, adjusted, strict=True) if value <= bad + 1e-9]
    shortest = min(high, key=lambda one: len(one[0].text))
    return shortest, max(low, key=lambda one: len(one[0].text))


def length_penalty(groups: Sequence[Sequence[Scored]], pairing: Pairing) -> float:
    """The alpha of `pairing.alpha`, in score points a character.

    `auto`: the alpha at which the chosen are, on average, as long as the rejected, by bisection;
    0 where they are no longer without it. The gap falls in steps, so it may come out a little
    to either side.

    Source: Chen et al. 2024 (DICE), arXiv:2406.09760.
    """
    if pairing.alpha != "auto":
        return pairing.alpha
    if mean_length_gap(groups, 0.0) <= 0:
        return 0.0
    low, high = 0.0, 1e-4
    while mean_length_gap(groups, high) > 0 and high < 1e3:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if mean_length_gap(groups, middle) > 0:
            low = middle
        else:
            high = middle
    return min(low, high, key=lambda alpha: abs(mean_length_gap(groups, alpha)))


def mean_length_gap(groups: Sequence[Sequence[Scored]], alpha: float) -> float:
    """Characters by which chosen are longer than rejected under a length penalty, on average.

    Of the groups that give a pair: those whose scores are not all equal.
    """
    gaps = []
    for group in groups:
        chosen, rejected = best_and_worst(group, alpha=alpha)
        if not too_close(chosen, rejected, group, 0.0, alpha=alpha):
            gaps.append(len(chosen[0].text) - len(rejected[0].text))
    return sum(gaps) / len(gaps) if gaps else 0.0


def at_iteration(setting: float | Sequence[float], iteration: int) -> float:
    """The value of a setting that may be a schedule, for iteration 1, 2, ...; the last one stays.

    An empty schedule is 0.
    """
    if isinstance(setting, int | float):
        return setting
    return setting[min(iteration, len(setting)) - 1] if setting else 0.0


def replayed(
    older: Sequence[Sequence[PreferencePair]], *, new: int, shares: Sequence[float], seed: int
) -> list[PreferencePair]:
    """Pairs of earlier iterations to learn from once more, marked `replay`.

    Args:
        older: The pairs of the last iteration, of the one before it, and so on. Only those of
            that iteration's own candidates count, no replays and no pairs of judgements.
        new: How many new pairs there are.
        shares: Of each of the older iterations, at most so many for each new pair.
    """
    chosen: list[PreferencePair] = []
    for back, (pairs, share) in enumerate(zip(older, shares, strict=False), start=1):
        own = [one for one in pairs if not one.origin]
        count = min(len(own), round(share * new))
        drawn = sorted(Random(f"{seed}/{back}").sample(range(len(own)), count))
        chosen += [replace(own[i], origin=f"replay, {back} back") for i in drawn]
    return chosen


def flipped(pair: PreferencePair) -> PreferencePair:
    """The same pair with its rejected reply chosen: a control."""
    return replace(
        pair,
        chosen_id=pair.rejected_id,
        rejected_id=pair.chosen_id,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_score=pair.rejected_score,
        rejected_score=pair.chosen_score,
        chosen_ids=pair.rejected_ids,
        rejected_ids=pair.chosen_ids,
    )


def weighted_by_gap(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Pairs whose weight is their score gap over the mean gap, times what it was.

    Source: linear, and 1 on average, is our formulation of what several have: the quality weight
    of Peng et al. 2025, arXiv:2506.10054, known to us from summaries, grows with the gap too.
    """
    gaps = [one.chosen_score - one.rejected_score for one in pairs]
    mean = sum(gaps) / len(gaps) if gaps else 0.0
    return [
        replace(one, weight=round(one.weight * gap / mean, 6))
        for one, gap in zip(pairs, gaps, strict=True)
        if mean > 0
    ]


def accumulated(older: Sequence[Sequence[PreferencePair]]) -> list[PreferencePair]:
    """The pairs that were new in earlier iterations, marked `replay`, the latest ones first.

    Args:
        older: The pairs of the last iteration, of the one before it, and so on.
    """
    return [
        replace(one, origin=f"{one.origin}, {origin}".removeprefix(", "))
        for back, pairs in enumerate(older, start=1)
        for origin in (f"replay, {back} back",)
        for one in pairs
        if not replay_age(one)
    ]


def judge_preference(chosen: Sequence[float | None], rejected: Sequence[float | None]) -> float:
    """How likely a vote on one reply is above a vote on the other; equal ones count half.

    0.5 where a reply has no readable vote.
    """
    credits = [
        0.5 if one == other else float(one > other)
        for one in chosen
        for other in rejected
        if one is not None and other is not None
    ]
    return sum(credits) / len(credits) if credits else 0.5


@dataclass(frozen=True, slots=True)
class Regraded:
    """The newest votes on the two replies of an older pair."""

    pair: PreferencePair
    chosen: Sequence[float | None]
    rejected: Sequence[float | None]

    @property
    def doubt(self) -> float:
        """Share of the votes by which the chosen reply is not the better one; 0 where a reply has
        no readable vote, for then nobody disputes the order."""
        read = all(
            any(vote is not None for vote in votes) for votes in (self.chosen, self.rejected)
        )
        return 1 - judge_preference(self.chosen, self.rejected) if read else 0.0


def as_newest_judge_has_it(
    older: Sequence[Regraded], order: Literal["drop", "smooth"]
) -> tuple[list[PreferencePair], int]:
    """Older pairs under `pairing.older_order`, and how many of them are disputed.

    A pair is disputed where the newest judge does not prefer its chosen reply. `smooth`: the order
    is wrong where either the pair's own smoothing or the newest judge has it so, but not both.
    """
    disputed = sum(one.doubt >= 0.5 for one in older)
    if order == "drop":
        return [one.pair for one in older if one.doubt < 0.5], disputed
    smoothed = [
        replace(
            one.pair,
            smoothing=round(
                one.pair.smoothing * (1 - one.doubt) + (1 - one.pair.smoothing) * one.doubt, 6
            ),
        )
        for one in older
    ]
    return smoothed, disputed


def has_tag(candidate_id: str, tag: str) -> bool:
    """Whether a candidate's name, `<prompt_id>#<tag><i>`, has this tag; a prompt's may spell it."""
    return candidate_id.rpartition("#")[2].startswith(tag)


def replay_age(pair: PreferencePair) -> int:
    """How many iterations ago the pair was new: 0 unless it is a replay."""
    match = re.fullmatch(rf"(?:{JUDGE}, )?replay, (\d+) back", pair.origin)
    return int(match[1]) if match else 0


def is_of_judgements(origin: str) -> bool:
    """Whether the prompt of such a pair is a question to the judge, and its replies judgements."""
    return origin.partition(",")[0] == JUDGE


def _usable(
    candidates: Sequence[Candidate],
    scores: Scores,
    votes: Mapping[str, Sequence[float | None]],
    unasked: Container[str],
    drop_truncated: bool,
) -> tuple[list[Scored], list[str]]:
    usable: list[Scored] = []
    reasons: list[str] = []
    seen: set[str] = set()
    for candidate in candidates:
        score = scores.get(candidate.candidate_id)
        if drop_truncated and candidate.finish_reason == "length":
            reasons.append("truncated")
        elif not candidate.text.strip():
            reasons.append("empty")
        elif candidate.text in seen:
            reasons.append("duplicate")
        elif score is None and candidate.candidate_id in unasked:
            reasons.append("too_long_to_judge")
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
