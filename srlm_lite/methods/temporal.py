"""Temporal Self-Rewarding: what is rejected comes from the past, what is chosen from the future.

As a model improves, its best and its worst answer come closer and DPO has less to learn from.
So the rejected one is anchored in the first model: it is the worst candidate of M1, where that is
worse than the policy's own worst. With these pairs a provisional next model is trained; where its
best candidate beats the policy's best, it takes the chosen place. The policy, as judge, scores all
of them; the delta is then trained on the final pairs from where the provisional one began.

In the first iteration the policy is M1, and there is no past. With stacked deltas the past costs
no memory and no loading.

Source: Jin et al. 2025, arXiv:2508.06026: K = 7 candidates of each model, one epoch of DPO for
the future model (trained, not an average).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from srlm_lite.methods.self_rewarding import MadePairs, SelfRewarding, judged
from srlm_lite.pairing import (
    Drops,
    Scored,
    at_iteration,
    best_and_worst,
    has_tag,
    length_penalty,
    pair,
    too_close,
)
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run_dir import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages import iteration as stages

PAST, FUTURE = "past-", "future-"
"""What marks the names of the first model's candidates, and of the next one's."""


class Temporal(SelfRewarding):
    """Two more sets of candidates, and a delta in between."""

    def candidates(
        self, session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
    ) -> tuple[list[Candidate], dict[str, Any]]:
        """The policy's, and from the second iteration on the first model's."""
        own, facts = stages.candidates(session, iteration, prompts)
        if iteration.number == 1:
            return own, facts
        first = stages.Answerer(
            session.stack(0), iteration.past_candidates, "past candidates", PAST
        )
        past, _ = stages.candidates(session, iteration, prompts, of=first)
        return [*own, *past], {**facts, "past_candidates": len(past)}

    def make_pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """Anchored rejection, then future-guided choice."""
        pairing = session.recipe.pairing
        usable, drops = judged(session, prompts, candidates, judgements)
        alpha = length_penalty(list(usable.values()), pairing)
        rho = at_iteration(pairing.rho, iteration.number)
        provisional = anchored_pairs(
            prompts, usable, drops, min_gap=pairing.min_gap, rho=rho, alpha=alpha
        )
        fitting = stages.fitting_pairs(session, provisional)
        if len(fitting) < pairing.min_pairs:
            return provisional, drops, {}  # too few for any delta: the stage will say so
        stages.delta(session, iteration, fitting, place=iteration.provisional_place)
        future = _future(session, iteration, prompts)
        pairs = guided_pairs(provisional, future, rho=rho, alpha=alpha)
        return (
            pairs,
            drops,
            {
                "from_past": sum(has_tag(one.rejected_id, PAST) for one in pairs),
                "from_future": sum(has_tag(one.chosen_id, FUTURE) for one in pairs),
            },
        )


def anchored_pairs(
    prompts: Sequence[Prompt],
    usable: Mapping[str, Sequence[Scored]],
    drops: Drops,
    *,
    min_gap: float = 0.0,
    rho: float = 0.0,
    alpha: float = 0.0,
) -> list[PreferencePair]:
    """The policy's best against the worst of the policy and the first model; ties: the policy's.

    Prompts without a pair are counted in `drops`.
    """
    pairs = []
    for prompt in prompts:
        group = usable.get(prompt.prompt_id, ())
        own = [one for one in group if not has_tag(one[0].candidate_id, PAST)]
        if not own:
            drops.prompts["tied"] += bool(group)
            continue
        chosen, _ = best_and_worst(own, rho=rho, alpha=alpha)
        _, rejected = best_and_worst(group, rho=rho, alpha=alpha)
        if reason := too_close(chosen, rejected, group, min_gap, alpha=alpha):
            drops.prompts[reason] += 1
        else:
            pairs.append(pair(prompt, chosen, rejected))
    return pairs


def guided_pairs(
    pairs: Sequence[PreferencePair],
    future: Mapping[str, Sequence[Scored]],
    *,
    rho: float = 0.0,
    alpha: float = 0.0,
) -> list[PreferencePair]:
    """The pairs, with the next model's best in the chosen place where it scores higher."""
    guided = []
    for one in pairs:
        group = future.get(one.prompt_id)
        if group:
            (best, score), _ = best_and_worst(group, rho=rho, alpha=alpha)
            longer = len(best.text) - len(one.chosen)
            if score - alpha * longer > one.chosen_score and best.text != one.rejected:
                one = replace(
                    one, chosen_id=best.candidate_id, chosen=best.text, chosen_score=score
                )
        guided.append(one)
    return guided


def _future(
    session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
) -> dict[str, list[Scored]]:
    """The provisional model's candidates, with the policy's scores."""
    model = stages.stack_of(session, iteration.provisional_place)
    place = stages.Answerer(model, iteration.future_candidates, "future candidates", FUTURE)
    rows, _ = stages.candidates(session, iteration, prompts, of=place)
    judge = stages.Grader(
        session.stack(iteration.number - 1), iteration.future_judgements, "future judgements"
    )
    votes, _ = stages.judgements(session, iteration, prompts, rows, by=judge)
    usable, _ = judged(session, prompts, rows, votes)
    return usable
