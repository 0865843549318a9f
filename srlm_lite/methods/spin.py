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

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

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
from srlm_lite.pairing import Drops, at_iteration, pair, usable_candidates
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.settings import Positive, Section


class SpinSettings(Section):
    """Method `spin`: a human's answer against the last model's."""

    answers: Positive = 1
    """Answers of the last model to each prompt, each a pair with the human's."""
    lambdas: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        0.1,
        0.1,
        0.1,
        5.0,
    )
    """The loss's lambda in each iteration, in place of `dpo.beta`; the last one stays."""


class Spin(SelfRewarding[SpinSettings]):
    """The opponent is the last model, the winner always the human."""

    name = "spin"
    sources = (
        Source(
            "Chen et al. 2024",
            "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
            "2401.01335",
        ),
    )
    learns_from = "a human's answer against the last model's"
    made_by = "DPO on a human's answers against its own"
    is_self_rewarding = False
    section = "spin"
    Settings = SpinSettings
    labels = {"answers": "answers a prompt", "lambdas": "lambda by iteration"}
    unshown = ("rollout.n",)
    cases = {"spin": Case("toy-spin", group=RANKED_REPLIES)}

    @classmethod
    def words(cls, own: SpinSettings) -> Words:
        """A pair's two replies have no figures."""
        return Words(None, "a human's answer counts as better than the model's")

    @classmethod
    def unread(cls, own: SpinSettings) -> Mapping[str, Collection[Any]]:
        """Prompts and winners are the human's, and lambda stands for beta."""
        return {
            "pairing.source": ("random", "flipped", "gold"),
            "pairing.min_gap": (),
            "pairing.rho": (),
            "pairing.alpha": (),
            "dpo.beta": (),
            "prompts.source": ("self-instruct",),
            "prompts.file": (),
        }

    @property
    def judge_makes_pairs(self) -> bool:
        """Never."""
        return False

    @property
    def pairs_samples(self) -> bool:
        """Never."""
        return False

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """The model's answers, and as many pairs with the human's, which may fill the window."""
        yield self.answers(sizes, n=self.own.answers)
        yield self.dpo(sizes, pairs=self.own.answers, tokens=sizes.window)

    def pool(self, data: SeedData) -> Pool:
        """Prompts that a human has answered."""
        answers, path = data.human_answers()
        return [Prompt.of(row, path.name) for row in answers], path

    def candidates(self, it: Iteration, prompts: Sequence[Prompt]) -> tuple[list[Candidate], Facts]:
        """The last model's answers."""
        rows = it.answer(prompts, n=self.own.answers)
        return rows, candidate_facts(rows)

    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """The human's answer is the better one: an empty file."""
        it.write("judgements", [])
        return [], dict(NO_VOTES)

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The human's answer, scored 1, against each of the model's, scored 0."""
        answers, _ = it.data.human_answers()
        human = {row.prompt_id: row.response for row in answers}
        golden = [
            it.as_answer(
                Candidate(p.prompt_id, f"{p.prompt_id}#human", human[p.prompt_id], 0, "stop")
            )
            for p in prompts
        ]
        pairs, drops = against_human(
            prompts, golden, candidates, drop_truncated=self.recipe.pairing.drop_truncated
        )
        return pairs, drops, {}

    def delta(self, it: Iteration, pairs: Sequence[PreferencePair]) -> tuple[None, Facts]:
        """DPO with the iteration's lambda for beta."""
        value = at_iteration(self.own.lambdas, it.number)
        return None, it.learn(pairs, dpo=self.recipe.dpo.model_copy(update={"beta": value}))


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
