"""Offline DPO on replies that humans ranked: no candidates, no judge. The baseline.

Source: Rafailov et al. 2023, arXiv:2305.18290.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from srlm_lite.evaluate.candidates import NO_VOTES, candidate_facts
from srlm_lite.methods.base import (
    RANKED_REPLIES,
    Case,
    Facts,
    Iteration,
    MadePairs,
    Phase,
    Pool,
    SeedData,
    Sizes,
    Source,
    Words,
)
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.pairing import told_apart, usable_candidates
from srlm_lite.records import Candidate, Judgement, Prompt, RankedReply
from srlm_lite.settings import Section


class Offline(Section):
    """Method `dpo`: pairs of replies that humans ranked, from `data.ranked`."""

    pairs: Literal["best-worst", "all"] = "best-worst"
    """`all`: every two replies of a prompt that humans told apart."""


class OfflineDpo(SelfRewarding[Offline]):
    """The human replies stand where the policy's answers would, the human rank where scores."""

    name = "dpo"
    sources = (
        Source(
            "Rafailov et al. 2023",
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "2305.18290",
        ),
    )
    learns_from = "replies that humans ranked"
    remark = "offline: the baseline"
    made_by = "DPO on replies that humans ranked"
    is_self_rewarding = False
    learns_ranked = True
    section = "offline"
    Settings = Offline
    unshown = ("rollout.n", "rollout.temperature")
    cases = {
        "dpo": Case("toy-dpo", ("prompts.per_iteration=80",), group=RANKED_REPLIES)
    }  # its file has 240

    @classmethod
    def words(cls, own: Offline) -> Words:
        """The humans' ranks order the pairs."""
        return Words(
            "minus human rank", "humans have ranked the replies", candidates="human replies"
        )

    @classmethod
    def unread(cls, own: Offline) -> Mapping[str, Collection[Any]]:
        """Prompts and their order are the humans'."""
        unread: dict[str, Collection[Any]] = {
            "pairing.source": ("gold",),
            "prompts.source": ("self-instruct",),
            "prompts.file": (),
        }
        if own.pairs == "all":
            unread |= {"pairing.rho": (), "pairing.alpha": (), "pairing.source": ("random", "gold")}
        return unread

    @property
    def judge_makes_pairs(self) -> bool:
        """Never."""
        return False

    @property
    def pairs_samples(self) -> bool:
        """Never."""
        return False

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """DPO alone, on replies that may fill the window."""
        pairs = 1 if self.own.pairs == "best-worst" else None
        yield self.dpo(sizes, pairs=pairs, tokens=sizes.window)

    def pool(self, data: SeedData) -> Pool:
        """Prompts of the ranked replies."""
        groups, path = data.ranked()
        return [Prompt.of(group[0], path.name) for group in groups], path

    def candidates(self, it: Iteration, prompts: Sequence[Prompt]) -> tuple[list[Candidate], Facts]:
        """The human replies."""
        rows = [
            it.as_answer(
                Candidate(
                    row.prompt_id, row.response_id, row.response, it.length(row.response), "stop"
                )
            )
            for row in _replies(it.data, prompts)
        ]
        it.write("candidates", rows)
        return rows, candidate_facts(rows)

    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """Humans have judged: an empty file, for whoever reads the run."""
        it.write("judgements", [])
        return [], dict(NO_VOTES)

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The reply of the best rank against that of the worst, or all that differ in rank."""
        pairing = self.recipe.pairing
        scores = {row.response_id: -float(row.rank) for row in _replies(it.data, prompts)}
        usable, drops = usable_candidates(
            prompts, candidates, scores, drop_truncated=pairing.drop_truncated
        )
        if self.own.pairs == "best-worst":
            return self.best_against_worst(it, prompts, usable, drops)
        pairs = []
        for prompt in (prompt for prompt in prompts if prompt.prompt_id in usable):
            differing = told_apart(prompt, usable[prompt.prompt_id], min_gap=pairing.min_gap)
            pairs += differing
            if not differing:
                told = told_apart(prompt, usable[prompt.prompt_id])
                drops.prompts["narrow" if told else "tied"] += 1
        return pairs, drops, {}


def _replies(data: SeedData, prompts: Sequence[Prompt]) -> list[RankedReply]:
    groups, _ = data.ranked()
    by_prompt = {group[0].prompt_id: group for group in groups}
    return [row for prompt in prompts for row in by_prompt[prompt.prompt_id]]
