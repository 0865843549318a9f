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

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean
from typing import Any, Literal

from srlm_lite.errors import UserError
from srlm_lite.evaluate.candidates import NO_VOTES
from srlm_lite.forms import form_of
from srlm_lite.judging import mean_scores
from srlm_lite.methods.base import Case, Facts, Iteration, MadePairs, Phase, Sizes, Source, Words
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.pairing import Drops, Scored, Scores, usable_candidates
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.settings import Section


class CreamSettings(Section):
    """Method `cream`: pairs count by how consistently they are ranked."""

    scores: Literal["likelihood", "judge"] = "likelihood"
    """What ranks the candidates. `likelihood` is the paper: their log-likelihood ratio to the
    bare base. `judge`: this iteration's judge against the last iteration's."""
    consistency: Literal["run", "sample"] = "run"
    """`run`: one C, the mean over all prompts. `sample`: each prompt its own."""


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


def refuse_nothing_to_learn(pairs: Sequence[PreferencePair], where: str) -> None:
    """Stop where every pair pulls both ways alike.

    Raises:
        UserError: C is exactly 0.5 for all pairs.
    """
    if pairs and all(one.smoothing == 0.5 for one in pairs):
        raise UserError(
            "the consistency is 0.5 for all pairs: the two models' rankings have nothing in "
            "common, and there is nothing to learn",
            where=where,
            way_out="Give more candidates (rollout.n) or prompts (prompts.per_iteration)",
        )


Ranked = tuple[dict[str, list[Scored]], Drops, Scores]
"""Usable candidates with their scores, what was left out, and the scores of the model before."""


class Cream(SelfRewarding[CreamSettings]):
    """Pairs by likelihood ratio (or by judge), smoothed by their inconsistency."""

    name = "cream"
    sources = (
        Source(
            "Wang et al. 2024", "CREAM: Consistency Regularized Self-Rewarding Language Models",
            "2410.12735",
        ),
    )  # fmt: skip
    learns_from = "its own rankings, as far as two models in a row agree on them"
    remark = "by likelihood or by judge, run-wide or by sample"
    made_by = (
        "answering prompts and DPO on its own rankings, as far as two models in a row agree on them"
    )
    section = "cream"
    Settings = CreamSettings
    cases = {"cream": Case("toy-cream"), "cream, judge": Case("toy-cream", ("cream.scores=judge",))}

    @classmethod
    def words(cls, own: CreamSettings) -> Words:
        """By default a ratio of likelihoods, and no judge."""
        if own.scores == "judge":
            return Words()
        return Words("log-likelihood above the base's", "their likelihood ranks them")

    @classmethod
    def unread(cls, own: CreamSettings) -> Mapping[str, Collection[Any]]:
        """Gold takes a judge's place, and no likelihood's; the chosen reply alone is not
        smoothed."""
        unread: dict[str, Collection[Any]] = {"dpo.loss": ("sft",)}
        return unread | ({"pairing.source": ("gold",)} if own.scores == "likelihood" else {})

    @property
    def judge_makes_pairs(self) -> bool:
        """Where it ranks."""
        return super().judge_makes_pairs and self.own.scores == "judge"

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """Each answer is graded by two judges, or only read."""
        yield self.answers(sizes)
        if self.own.scores == "judge":
            yield from self.votes(sizes, answers=2 * self.all_prompts * self.recipe.rollout.n)
        yield from self.votes_on_older(sizes)
        yield self.dpo(sizes)

    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """Only where the recipe ranks by judge."""
        if self.own.scores == "judge":
            return super().judgements(it, prompts, candidates)
        it.write("judgements", [])
        return [], dict(NO_VOTES)

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The best against the worst, each smoothed by 1 - C."""
        by_judge = self.own.scores == "judge"
        rank = self._by_judge if by_judge else self._by_likelihood
        usable, drops, before = rank(it, prompts, candidates, judgements)
        of_prompt = consistencies(usable, before)
        # Where nothing tells, as with a base that cannot grade, pairs are taken as they are.
        overall = fmean(of_prompt.values()) if of_prompt else 1.0
        pairs, drops, facts = self.best_against_worst(it, prompts, usable, drops)
        trusts = of_prompt if self.own.consistency == "sample" else {}
        smoothed = [
            replace(one, smoothing=round(1 - trusts.get(one.prompt_id, overall), 6))
            for one in pairs
        ]
        refuse_nothing_to_learn(smoothed, it.where)
        told = {} if by_judge else self._accuracy(prompts, usable)
        return smoothed, drops, {**facts, "consistency": round(overall, 4), **told}

    def _by_likelihood(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> Ranked:
        first = it.number == 1
        models = {"policy": it.policy, "base": it.base}
        if not first:
            models["before"] = it.earlier
        found = {
            name: it.likelihoods(prompts, candidates, by=model, name=name)
            for name, model in models.items()
        }
        base = found["base"]
        now = {name: row.logp - base[name].logp for name, row in found["policy"].items()}
        if first:
            before = {name: row.logp / row.n_tokens for name, row in base.items()}
        else:
            before = {name: row.logp - base[name].logp for name, row in found["before"].items()}
        usable, drops = usable_candidates(
            prompts, candidates, now, drop_truncated=self.recipe.pairing.drop_truncated
        )
        return usable, drops, before

    def _accuracy(self, prompts: Sequence[Prompt], usable: Mapping[str, Sequence[Scored]]) -> Facts:
        """How often the likelihoods are in the gold order, as a judge's grades are measured."""
        rows = [row for group in usable.values() for row in group]
        return self.accuracy(
            prompts,
            [candidate for candidate, _ in rows],
            [Judgement(one.candidate_id, 0, "", score, one.finish_reason) for one, score in rows],
        )

    def _by_judge(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> Ranked:
        earlier = it.grade(prompts, candidates, by=it.earlier, kind="earlier")
        usable, drops = self.judged(prompts, candidates, judgements)
        return usable, drops, mean_scores(earlier, min_votes=form_of(self.recipe).min_votes)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
