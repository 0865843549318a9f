"""Self-Rewarding Language Models: the model's own mean score orders its own answers.

Every other method is this one with some stages changed: a class that overrides what differs.

Source: Yuan et al. 2024, arXiv:2401.10020: N = 4 answers at temperature 0.7 and top-p 0.9, three
votes on each, the best against the worst, none where they are equal. `dpo.init: previous` is the
paper's chain of models; `anchor` starts each delta anew. How many epochs of DPO it took is not
stated there, and it picked checkpoints by an outside judge, which a run here does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.judging import mean_scores, unasked, votes_by_candidate
from srlm_lite.pairing import Drops, Scored, Scores, length_penalty, pairs_of, usable_candidates
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run.layout import IterationDir
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.stages import iteration as stages

MadePairs = tuple[Sequence[PreferencePair], Drops, dict[str, Any]]
"""Pairs, what gave none and why, and facts for `metrics.jsonl`."""


class SelfRewarding:
    """The stages of an iteration, each with its result and its facts; stateless.

    A stage whose files are complete gives what is in them, and computes nothing.
    """

    def pool(self, session: Session) -> stages.Pool | None:
        """The list that the iterations take their prompts from; None where they are written."""
        return stages.listed_prompts(session)

    def prompts(
        self, session: Session, iteration: IterationDir
    ) -> tuple[list[Prompt], dict[str, Any]]:
        """New prompts."""
        return stages.prompts(session, iteration, self.pool)

    def candidates(
        self, session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
    ) -> tuple[list[Candidate], dict[str, Any]]:
        """N answers to each prompt by the policy."""
        return stages.candidates(session, iteration, prompts)

    def judgements(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
    ) -> tuple[list[Judgement], dict[str, Any]]:
        """K grades of each answer by the same weights."""
        return stages.judgements(session, iteration, prompts, candidates)

    def pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> tuple[list[PreferencePair], dict[str, Any]]:
        """What to learn from; methods change `make_pairs`."""
        made, drops, facts = self.make_pairs(session, iteration, prompts, candidates, judgements)
        about = self.origin_of_pairs(session, iteration)
        kept, counts = stages.keep_pairs(session, iteration, made, drops, origin=about)
        return kept, {**counts, **facts}

    def origin_of_pairs(self, session: Session, iteration: IterationDir) -> str:
        """Origin of the pairs that an iteration must have enough of: the policy's own."""
        return ""

    def make_pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The best against the worst candidate of each prompt, by mean score."""
        usable, drops = judged(session, prompts, candidates, judgements)
        return best_against_worst(session, iteration, prompts, usable, drops)

    def delta(
        self, session: Session, iteration: IterationDir, pairs: Sequence[PreferencePair]
    ) -> tuple[None, dict[str, Any]]:
        """DPO on the pairs."""
        return stages.delta(session, iteration, pairs)


def judged(
    session: Session,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
) -> tuple[dict[str, list[Scored]], Drops]:
    """The candidates that can be part of a pair, with their mean scores."""
    recipe = session.recipe
    scores: Scores = mean_scores(judgements, min_votes=recipe.judge.min_votes)
    if recipe.pairing.source == "gold":
        scores = gold_scores(recipe.evaluate.gold, prompts, candidates)
    return usable_candidates(
        prompts,
        candidates,
        scores,
        votes=votes_by_candidate(judgements),
        unasked=unasked(judgements),
        drop_truncated=recipe.pairing.drop_truncated,
    )


def gold_scores(
    name: str | None, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
) -> dict[str, float]:
    """What the gold scorer says, in the judge's place: the upper bound.

    Raises:
        UserError: The recipe names none.
    """
    if name is None:
        raise UserError(
            "names no gold scorer to take the judge's place",
            where="evaluate.gold",
            way_out="Name one, or set pairing.source=judge",
        )
    gold = load_gold(name)
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}
    return {row.candidate_id: gold.total(texts[row.prompt_id], row.text) for row in candidates}


def best_against_worst(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    usable: dict[str, list[Scored]],
    drops: Drops,
) -> MadePairs:
    """One pair a prompt, under the options of the section `pairing`."""
    pairing = session.recipe.pairing
    pairs, drops = pairs_of(
        prompts,
        usable,
        drops,
        pairing=pairing,
        seed=derive_seed(session.recipe.seed, iteration.number, "pairs"),
        iteration=iteration.number,
    )
    facts = {}
    if pairing.alpha == "auto":
        facts["alpha"] = round(length_penalty(list(usable.values()), pairing), 6)
    return pairs, drops, facts
