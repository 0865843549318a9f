"""CREAM: how consistently two models in a row rank the candidates says how far to trust the pairs.

The score of a candidate is its log-likelihood under the policy, less that under the bare base
(DPO's implicit reward); the model before ranks the same candidates. Kendall's tau between the two
rankings, averaged over prompts, gives the consistency C = (tau + 1) / 2, and the loss is
C L(w, l) + (1 - C) L(l, w): DPO with a label smoothing of 1 - C.

In the first iteration the model before is the base itself, which has no ratio to itself; it ranks
by its log-likelihood per token, as the authors' code does.

Source: Wang et al. 2024, arXiv:2410.12735, Algorithm 1, and the code in Raibows/CREAM
(`consistency_avg` is `consistency: run`, `consistency_dyn` is `sample`). That judge scores can
stand in for the ratios is our addition. A bias that no longer moves is consistent too: look at the
judge's accuracy beside C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.judging import mean_scores
from srlm_lite.methods.self_rewarding import (
    MadePairs,
    SelfRewarding,
    best_against_worst,
    judged,
)
from srlm_lite.pairing import Drops, Scored, Scores, usable_candidates
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages import iteration as stages
from srlm_lite.stages.likelihood import candidate_likelihoods


def kendall(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau of two scorings of the same items, from -1 to 1; None for fewer than two.

    Each pair of items counts 1 where both put it in the same order, -1 where in opposite ones,
    and 0 where one of them has a tie.
    """
    agreements = [
        _sign(one[i] - one[j]) * _sign(other[i] - other[j])
        for i, j in combinations(range(len(one)), 2)
    ]
    return fmean(agreements) if agreements else None


def consistencies(
    groups: Mapping[str, Sequence[Scored]], before: Mapping[str, float | None]
) -> dict[str, float]:
    """C = (tau + 1) / 2 of each prompt whose candidates the model before has scored too.

    Args:
        groups: The usable candidates of each prompt with their present scores.
        before: The earlier scores, by candidate.
    """
    found = {}
    for prompt_id, group in groups.items():
        both = [
            (score, earlier)
            for candidate, score in group
            for earlier in [before.get(candidate.candidate_id)]
            if earlier is not None
        ]
        tau = kendall([now for now, _ in both], [earlier for _, earlier in both])
        if tau is not None:
            found[prompt_id] = (tau + 1) / 2
    return found


def refuse_nothing_to_learn(pairs: Sequence[PreferencePair], where: Path) -> None:
    """Stop where every pair pulls both ways alike.

    Raises:
        UserError: C is exactly 0.5 for all pairs.
    """
    if pairs and all(one.smoothing == 0.5 for one in pairs):
        raise UserError(
            "the consistency is 0.5 for all pairs: the two models' rankings have nothing in "
            "common, and there is nothing to learn",
            where=str(where),
            way_out="Give more candidates (rollout.n) or prompts (prompts.per_iteration)",
        )


class Cream(SelfRewarding):
    """Pairs by likelihood ratio (or by judge), smoothed by their inconsistency."""

    def judgements(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
    ) -> tuple[list[Judgement], dict[str, Any]]:
        """None, unless the recipe ranks by judge."""
        if session.recipe.cream.scores == "judge":
            return stages.judgements(session, iteration, prompts, candidates)
        return stages.no_judgements(iteration)

    def make_pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The best against the worst, each smoothed by 1 - C."""
        section = session.recipe.cream
        rank = _by_judge if section.scores == "judge" else _by_likelihood
        usable, drops, before = rank(session, iteration, prompts, candidates, judgements)
        of_prompt = consistencies(usable, before)
        # Where nothing tells, as with a base that cannot grade, pairs are taken as they are.
        overall = fmean(of_prompt.values()) if of_prompt else 1.0
        pairs, drops, facts = best_against_worst(session, iteration, prompts, usable, drops)
        trusts = of_prompt if section.consistency == "sample" else {}
        smoothed = [
            replace(one, smoothing=round(1 - trusts.get(one.prompt_id, overall), 6))
            for one in pairs
        ]
        refuse_nothing_to_learn(smoothed, iteration.path)
        told = {} if section.scores == "judge" else _accuracy(session, prompts, usable)
        return smoothed, drops, {**facts, "consistency": round(overall, 4), **told}


Ranked = tuple[dict[str, list[Scored]], Drops, Scores]
"""Usable candidates with their scores, what was left out, and the scores of the model before."""


def _by_likelihood(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
) -> Ranked:
    t, first = iteration.number, iteration.number == 1
    stacks = {"policy": session.stack(t - 1), "base": []}
    if not first:
        stacks["before"] = session.stack(t - 2)
    found = {
        name: candidate_likelihoods(
            session, stack, prompts, candidates, path=iteration.likelihoods / f"{name}.jsonl"
        )
        for name, stack in stacks.items()
    }
    base = found["base"]
    now = {name: row.logp - base[name].logp for name, row in found["policy"].items()}
    if first:
        before = {name: row.logp / row.n_tokens for name, row in base.items()}
    else:
        before = {name: row.logp - base[name].logp for name, row in found["before"].items()}
    usable, drops = usable_candidates(
        prompts, candidates, now, drop_truncated=session.recipe.pairing.drop_truncated
    )
    return usable, drops, before


def _accuracy(
    session: Session, prompts: Sequence[Prompt], usable: Mapping[str, Sequence[Scored]]
) -> dict[str, Any]:
    """How often the likelihoods are in the gold order, as a judge's grades are measured."""
    return stages.on_policy_accuracy(
        session.recipe.evaluate.gold,
        {prompt.prompt_id: prompt.text for prompt in prompts},
        [candidate for group in usable.values() for candidate, _ in group],
        [
            Judgement(candidate.candidate_id, 0, "", score, candidate.finish_reason)
            for group in usable.values()
            for candidate, score in group
        ],
    )


def _by_judge(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
) -> Ranked:
    t = iteration.number
    earlier, _ = stages.judgements(
        session,
        iteration,
        prompts,
        candidates,
        by=stages.Grader(
            session.stack(t - 2) if t > 1 else [],
            iteration.earlier_judgements,
            "earlier judgements",
        ),
    )
    usable, drops = judged(session, prompts, candidates, judgements)
    return usable, drops, mean_scores(earlier, min_votes=session.recipe.judge.min_votes)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
