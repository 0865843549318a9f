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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from srlm_lite.judging import votes_by_candidate
from srlm_lite.methods.base import Case, Facts, Iteration, MadePairs, Source
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.pairing import judge_preference
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.settings import Consistency


class ScirSettings(Consistency):
    """Method `scir`: judge and implicit reward are pulled together; pairs they dispute wait."""


class Scir(SelfRewarding[ScirSettings]):
    """Pairs that carry the judge's preference, and a loss that compares it."""

    name = "scir"
    sources = (
        Source(
            "Zhou et al. 2025",
            "Self-Consistency of the Internal Reward Models Improves Self-Rewarding Language "
            "Models",
            "2502.08922",
            "in a formulation of srlm-lite's own",
        ),
    )
    learns_from = "its own grades, where its implicit reward agrees"
    remark = "in our formulation: the paper's equations are unconfirmed"
    made_by = (
        "answering prompts, grading its own answers and DPO on the pairs that its implicit reward "
        "agrees with"
    )
    section = "scir"
    Settings = ScirSettings
    cases = {"scir": Case("toy-scir")}

    def needs(self) -> None:
        """An implicit reward."""
        dpo = self.recipe.dpo
        if not (dpo.init == "previous" and dpo.reference == "anchor"):
            raise ValueError(
                "method scir needs dpo.init=previous and dpo.reference=anchor: the implicit reward "
                "is what the last model has learned beyond the anchor"
            )

    @classmethod
    def unread(cls, own: ScirSettings) -> Mapping[str, Collection[Any]]:
        """It would hold blind pairs, and those of a gold scorer, to what the judge thinks of
        them."""
        return {"pairing.source": ("random", "flipped", "gold"), "dpo.loss": ()}

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The best against the worst; `smoothing` is 1 - p."""
        pairs, drops, facts = super().make_pairs(it, prompts, candidates, judgements)
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

    def delta(self, it: Iteration, pairs: Sequence[PreferencePair]) -> tuple[None, Facts]:
        """DPO on agreed pairs, and the consistency terms on all."""
        return None, it.learn(pairs, consistency=self.own)
