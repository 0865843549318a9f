"""SPIN, self-play fine-tuning: a human's answer against the last model's own, and no judge.

The loss is log(1 + exp(-t)), t = lambda log[p(y|x) / p_t(y|x)] - lambda log[p(y'|x) / p_t(y'|x)],
with y the human's answer and y' drawn from the last model p_t: DPO with beta = lambda, the
reference being the last model (`dpo.init: previous`, `dpo.reference: init`). From the second
iteration on, the pairs of the one before are learned once more (`pairing.replay: [1.0]`).

Source: Chen et al. 2024, arXiv:2401.01335, Eq. 4.7 and section 6.1: lambda 0.1, and 5 in the fourth
iteration; two epochs in the paper, six in its released script. It trains with RMSProp, we with
AdamW. Its ceiling is the human answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srlm_lite.methods.self_rewarding import MadePairs, SelfRewarding
from srlm_lite.pairing import Drops, at_iteration, pair, usable_candidates
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages import iteration as stages
from srlm_lite.stages.replies import read_as_reply
from srlm_lite.stages.seed_data import read_human_answers


class Spin(SelfRewarding):
    """The opponent is the last model, the winner always the human."""

    def pool(self, session: Session) -> stages.Pool:
        """Prompts that a human has answered."""
        answers, path = read_human_answers(session.recipe)
        return [Prompt(row.prompt_id, row.prompt, path.name) for row in answers], path

    def candidates(
        self, session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
    ) -> tuple[list[Candidate], dict[str, Any]]:
        """The last model's answers."""
        return stages.candidates(session, iteration, prompts, n=session.recipe.spin.answers)

    def judgements(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
    ) -> tuple[list[Judgement], dict[str, Any]]:
        """None: the human's answer is the better one."""
        return stages.no_judgements(iteration)

    def make_pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The human's answer, scored 1, against each of the model's, scored 0."""
        answers, _ = read_human_answers(session.recipe)
        human = {row.prompt_id: row.response for row in answers}
        golden = [
            read_as_reply(
                session.chat,
                Candidate(p.prompt_id, f"{p.prompt_id}#human", human[p.prompt_id], 0, "stop"),
            )
            for p in prompts
        ]
        pairs, drops = against_human(
            prompts, golden, candidates, drop_truncated=session.recipe.pairing.drop_truncated
        )
        return pairs, drops, {}

    def delta(
        self, session: Session, iteration: IterationDir, pairs: Sequence[PreferencePair]
    ) -> tuple[None, dict[str, Any]]:
        """DPO with the iteration's lambda for beta."""
        value = at_iteration(session.recipe.spin.lambdas, iteration.number)
        dpo = session.recipe.dpo.model_copy(update={"beta": value})
        return stages.delta(session, iteration, pairs, dpo=dpo)


def against_human(
    prompts: Sequence[Prompt],
    golden: Sequence[Candidate],
    candidates: Sequence[Candidate],
    *,
    drop_truncated: bool,
) -> tuple[list[PreferencePair], Drops]:
    """A pair for each candidate that can be one; one equal to the human's answer cannot.

    Nor is there one where the human's answer is empty: a candidate must not stand in its place.

    Args:
        golden: The human's, a prompt each, with names that end in `#human`.
    """
    rows = [*golden, *candidates]  # the human's first: of equal texts the first one counts
    scores = {row.candidate_id: float(row.candidate_id.endswith("#human")) for row in rows}
    usable, drops = usable_candidates(prompts, rows, scores, drop_truncated=drop_truncated)
    pairs = []
    for prompt in prompts:
        if prompt.prompt_id not in usable:
            continue
        best, *others = usable[prompt.prompt_id]
        if not best[1]:
            drops.prompts["empty"] += 1
            continue
        pairs += [pair(prompt, best, own) for own in others]
    return pairs, drops
