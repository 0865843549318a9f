"""RLHF: a reward model from human comparisons, and the policy trained against it, on policy.

The reward model is one more adapter on the anchor, with a scalar head, on the same base in memory.
Before the first iteration it learns the Bradley-Terry model of the pairs that humans ranked, P(w
above l) = sigmoid(r(w) - r(l)), and is frozen from then on. In an iteration the policy answers the
prompts itself, `rollout.n` times each, at every step anew, and learns by RLOO: the advantage of an
answer is its reward less `rlhf.kl_weight` times its log-ratio to the reference, less the mean of
that over its siblings.

The answers that were drawn and their rewards lie where candidates and judgements do, so that the
same commands show them; a reward has no text and no scale.

Source: Ouyang et al. 2022, arXiv:2203.02155, Eqs. 1 and 2, without the pretraining term; its PPO
has left TRL, and RLOO (Ahmadian et al. 2024, arXiv:2402.14740) takes its place. Neither paper is
in our notes: objective and baseline are as TRL documents and computes them, settings are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.pairing import Drops
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run.files import read_json, read_records, write_json, write_records
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages import iteration as stages
from srlm_lite.stages.reward import reward_model


class Rlhf(SelfRewarding):
    """Everything happens while the delta trains; the stages before it prepare that."""

    def candidates(
        self, session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
    ) -> tuple[list[Candidate], dict[str, Any]]:
        """None yet: the policy answers while it trains."""
        return [], {"candidates": 0}

    def judgements(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
    ) -> tuple[list[Judgement], dict[str, Any]]:
        """None: the reward model, trained where there is none yet."""
        _, facts = reward_model(session)
        told = {f"reward_{name}": value for name, value in facts.items()}
        return [], {"judgements": 0, "parse_rate": None, "mean_score": None, **told}

    def pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> tuple[list[PreferencePair], dict[str, Any]]:
        """None."""
        write_json(iteration.drops, Drops().to_json())
        write_records(iteration.pairs, [])
        return [], {"pairs": 0, "drops": {}}

    def delta(
        self, session: Session, iteration: IterationDir, pairs: Sequence[PreferencePair]
    ) -> tuple[None, dict[str, Any]]:
        """RLOO against the reward model."""
        if iteration.delta_place.training.is_file():
            return None, read_json(iteration.delta_place.training, steps=int)
        prompts = read_records(iteration.prompts, Prompt)
        model, _ = reward_model(session)
        return stages.on_policy_delta(session, iteration, prompts, model)
