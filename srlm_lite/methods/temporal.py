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

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from srlm_lite.evaluate.candidates import candidate_facts
from srlm_lite.forms import form_of
from srlm_lite.methods.base import (
    Case,
    Facts,
    Iteration,
    MadePairs,
    NoSettings,
    Phase,
    Sizes,
    Source,
)
from srlm_lite.methods.self_rewarding import SelfRewarding
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

PAST, FUTURE = "past", "future"
"""Kinds of candidates: the first model's, and the next one's."""


class Temporal(SelfRewarding[NoSettings]):
    """Two more sets of candidates, and a delta in between."""

    name = "temporal"
    sources = (
        Source(
            "Jin et al. 2025", "Temporal Self-Rewarding Language Models: Decoupling "
            "Chosen-Rejected via Past-Future", "2508.06026",
        ),
    )  # fmt: skip
    learns_from = "its own grades; the first model's answers rejected, the next one's chosen"
    made_by = (
        "answering prompts, grading its own answers and DPO on the next model's best answers "
        "against the first one's worst"
    )
    cases = {"temporal": Case("toy-temporal")}

    def needs(self) -> None:
        """Scores of different models' answers that can be held against each other."""
        if form_of(self.recipe).compares:
            raise ValueError(
                "method temporal holds the next model's answers against the policy's by their "
                f"scores, and judge.form={self.recipe.judge.form} scores each only against the "
                "answers beside it"
            )

    @classmethod
    def unread(cls, own: NoSettings) -> Mapping[str, Collection[Any]]:
        """Blind pairs have no past and no future, and a future of flipped ones is none to go by."""
        return {"pairing.source": ("random", "flipped")}

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """The policy, the next model and, from the second iteration on, the first one answer."""
        recipe, n = self.recipe, self.recipe.rollout.n
        answers = n * recipe.prompts.per_iteration * max(0, 3 * recipe.iterations - 1)
        yield self.answers(sizes, texts=answers)
        yield from self.votes(sizes, answers=answers)
        yield from self.votes_on_older(sizes)
        yield self.dpo(sizes, pairs=2)  # the provisional delta, too

    def candidates(self, it: Iteration, prompts: Sequence[Prompt]) -> tuple[list[Candidate], Facts]:
        """The policy's, and from the second iteration on the first model's."""
        own = it.answer(prompts)
        if it.number == 1:
            return own, candidate_facts(own)
        past = it.answer(prompts, by=it.anchor, kind=PAST)
        return [*own, *past], {**candidate_facts(own), "past_candidates": len(past)}

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """Anchored rejection, then future-guided choice."""
        pairing = self.recipe.pairing
        usable, drops = self.judged(prompts, candidates, judgements)
        alpha = length_penalty(list(usable.values()), pairing)
        rho = at_iteration(pairing.rho, it.number)
        rules: Rules = {"min_gap": pairing.min_gap, "rho": rho, "alpha": alpha}
        undone = Drops(drops.prompts.copy(), drops.candidates)
        provisional = anchored_pairs(prompts, usable, undone, **rules)
        fitting = it.fitting(provisional)
        if len(fitting) < pairing.min_pairs:
            return provisional, undone, {}  # too few for any delta: the stage will say so
        it.learn([*fitting, *it.older()], called="provisional")
        future = self._future(it, prompts)
        pairs = anchored_pairs(prompts, usable, drops, future=future, **rules)
        return (
            pairs,
            drops,
            {
                "from_past": sum(has_tag(one.rejected_id, f"{PAST}-") for one in pairs),
                "from_future": sum(has_tag(one.chosen_id, f"{FUTURE}-") for one in pairs),
            },
        )

    def _future(self, it: Iteration, prompts: Sequence[Prompt]) -> dict[str, list[Scored]]:
        """The provisional model's candidates, with the policy's scores."""
        rows = it.answer(prompts, by=it.provisional, kind=FUTURE)
        usable, _ = self.judged(prompts, rows, it.grade(prompts, rows, by=it.policy, kind=FUTURE))
        return usable


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
        own = [one for one in group if not has_tag(one[0].candidate_id, f"{PAST}-")]
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
