"""Offline DPO on replies that humans ranked: no candidates, no judge. The baseline.

Source: Rafailov et al. 2023, arXiv:2305.18290.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srlm_lite.methods.self_rewarding import MadePairs, SelfRewarding, best_against_worst
from srlm_lite.pairing import told_apart, usable_candidates
from srlm_lite.records import Candidate, Judgement, Prompt, RankedReply
from srlm_lite.run.files import write_records
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages import iteration as stages
from srlm_lite.stages.replies import read_as_reply
from srlm_lite.stages.seed_data import ranked_file, read_ranked


class OfflineDpo(SelfRewarding):
    """The human replies stand where the policy's answers would, the human rank where scores."""

    def pool(self, session: Session) -> stages.Pool:
        """Prompts of the ranked replies."""
        path = ranked_file(session.recipe)
        groups = read_ranked(path, None)
        return [Prompt(group[0].prompt_id, group[0].prompt, path.name) for group in groups], path

    def candidates(
        self, session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
    ) -> tuple[list[Candidate], dict[str, Any]]:
        """The human replies."""
        rows = [
            read_as_reply(
                session.chat,
                Candidate(
                    row.prompt_id,
                    row.response_id,
                    row.response,
                    len(session.chat.target_ids(row.response)),
                    "stop",
                ),
            )
            for row in _replies(session, prompts)
        ]
        write_records(iteration.candidates, rows)
        return rows, stages.candidate_facts(rows)

    def judgements(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
    ) -> tuple[list[Judgement], dict[str, Any]]:
        """None: humans have judged."""
        return stages.no_judgements(iteration)

    def make_pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The reply of the best rank against that of the worst, or all that differ in rank."""
        recipe = session.recipe
        scores = {row.response_id: -float(row.rank) for row in _replies(session, prompts)}
        usable, drops = usable_candidates(
            prompts, candidates, scores, drop_truncated=recipe.pairing.drop_truncated
        )
        if recipe.offline.pairs == "best-worst":
            return best_against_worst(session, iteration, prompts, usable, drops)
        pairs = []
        for prompt in (prompt for prompt in prompts if prompt.prompt_id in usable):
            differing = told_apart(prompt, usable[prompt.prompt_id], min_gap=recipe.pairing.min_gap)
            pairs += differing
            if not differing:
                told = told_apart(prompt, usable[prompt.prompt_id])
                drops.prompts["narrow" if told else "tied"] += 1
        return pairs, drops, {}


def _replies(session: Session, prompts: Sequence[Prompt]) -> list[RankedReply]:
    groups = read_ranked(ranked_file(session.recipe), None)
    by_prompt = {group[0].prompt_id: group for group in groups}
    return [row for prompt in prompts for row in by_prompt[prompt.prompt_id]]
