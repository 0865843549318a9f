"""SCIR: a model's two opinions of an answer, as judge and as implicit reward, have to agree.

The judge's preference p is the share of its votes on two answers that put the chosen one above.
The implicit reward's, q, is what the model being trained has moved towards the chosen answer,
beyond the anchor and per token. DPO takes a pair only while q does not contradict p, at each step
anew; a symmetric KL divergence draws q towards p and an entropy term makes it surer.

Source: Zhou et al. 2025, arXiv:2502.08922, known to us from summaries alone: its equations and
settings are unconfirmed, and those here are our formulation. The judge's preference is fixed while
the delta trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from srlm_lite.judging import votes_by_candidate
from srlm_lite.methods.self_rewarding import MadePairs, SelfRewarding
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages import iteration as stages


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


class Scir(SelfRewarding):
    """Pairs that carry the judge's preference, and a loss that compares it."""

    def make_pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The best against the worst; `smoothing` is 1 - p."""
        pairs, drops, facts = super().make_pairs(
            session, iteration, prompts, candidates, judgements
        )
        votes = votes_by_candidate(judgements)
        sure = [
            replace(
                one,
                smoothing=round(
                    1 - judge_preference(votes[one.chosen_id], votes[one.rejected_id]), 6
                ),
            )
            for one in pairs
        ]
        return sure, drops, facts

    def delta(
        self, session: Session, iteration: IterationDir, pairs: Sequence[PreferencePair]
    ) -> tuple[None, dict[str, Any]]:
        """DPO on agreed pairs, and the consistency terms on all."""
        return stages.delta(session, iteration, pairs, consistency=session.recipe.scir)
