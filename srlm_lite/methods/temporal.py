"""Temporal Self-Rewarding: what is rejected comes from the past, what is chosen from the future.

As a model improves, its best and its worst answer come closer and DPO has less to learn from.
So the rejected one is anchored in the first model: it is the worst candidate of M1, where that is
worse than the policy's own worst. With these pairs a provisional next model is trained; where its
best candidate beats the policy's best, it takes the chosen place, in every prompt. The policy, as
judge, scores all of them; the delta is then trained on the final pairs from where the provisional
one began.

In the first iteration the policy is M1, and there is no past. With stacked deltas the past costs
no memory and no loading.

Source: Jin et al. 2025, arXiv:2508.06026: K = 7 candidates of each model, one epoch of DPO for
the future model (trained, not an average).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from srlm_lite.methods.self_rewarding import MadePairs, SelfRewarding, judged
from srlm_lite.pairing import (
    Drops,
    Scored,
    at_iteration,
    best_and_worst,
    has_tag,
    length_penalty,
    lowered,
    pair,
    too_close,
)
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run.layout import IterationDir
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
        rules: Rules = {"min_gap": pairing.min_gap, "rho": rho, "alpha": alpha}
        undone = Drops(drops.prompts.copy(), drops.candidates)
        provisional = anchored_pairs(prompts, usable, undone, **rules)
        fitting = stages.fitting_pairs(session, provisional)
        if len(fitting) < pairing.min_pairs:
            return provisional, undone, {}  # too few for any delta: the stage will say so
        stages.delta(session, iteration, fitting, place=iteration.provisional_place)
        future = _future(session, iteration, prompts)
        pairs = anchored_pairs(prompts, usable, drops, future=future, **rules)
        return (
            pairs,
            drops,
            {
                "from_past": sum(has_tag(one.rejected_id, PAST) for one in pairs),
                "from_future": sum(has_tag(one.chosen_id, FUTURE) for one in pairs),
            },
        )


class Rules(TypedDict, total=False):
    """How candidates are ranked and when two are a pair, as in `Pairing`."""

    min_gap: float
    rho: float
    alpha: float


def anchored_pairs(
    prompts: Sequence[Prompt],
    usable: Mapping[str, Sequence[Scored]],
    drops: Drops,
    *,
    future: Mapping[str, Sequence[Scored]] | None = None,
    min_gap: float = 0.0,
    rho: float = 0.0,
    alpha: float = 0.0,
) -> list[PreferencePair]:
    """The policy's best against the worst of the policy and the first model; ties: the policy's.

    Prompts without a pair are counted in `drops`.

    Args:
        future: The next model's candidates: its best takes the chosen place where it ranks higher,
            in every prompt, also one whose candidates of now make no pair.
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
        coming = (future or {}).get(prompt.prompt_id, ())
        if coming:
            best, _ = best_and_worst(coming, rho=rho, alpha=alpha)
            if lowered(best, alpha) > lowered(chosen, alpha):
                chosen = best
        if reason := too_close(chosen, rejected, [*group, *coming], min_gap, alpha=alpha):
            drops.prompts[reason] += 1
        else:
            pairs.append(pair(prompt, chosen, rejected))
    return pairs


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
