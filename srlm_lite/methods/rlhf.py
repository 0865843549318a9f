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

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from srlm_lite.evaluate.candidates import NO_VOTES
from srlm_lite.methods.base import (
    RANKED_REPLIES,
    Case,
    Draws,
    Facts,
    Iteration,
    Phase,
    SeedData,
    Sizes,
    Source,
    Trains,
    Words,
)
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.settings import Optim, Section


class RewardSection(Optim):
    """Training the reward model."""

    section = "rlhf.reward"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    pairs: Literal["best-worst", "all"] = "all"
    """`all`: every two replies of a prompt that humans told apart."""


class RlhfSettings(Section):
    """Method `rlhf`: a reward model from human pairs, and the policy trained against it."""

    kl_weight: Annotated[float, Field(gt=0)] = 0.05
    """What a nat of divergence from the reference costs, in units of the reward."""
    reward: RewardSection = RewardSection()


class Rlhf(SelfRewarding[RlhfSettings]):
    """Everything happens while the delta trains; the stages before it prepare that."""

    name = "rlhf"
    sources = (
        Source(
            "Ouyang et al. 2022",
            "Training language models to follow instructions with human feedback",
            "2203.02155",
        ),
        Source(
            "Ahmadian et al. 2024",
            "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human "
            "Feedback in LLMs",
            "2402.14740",
        ),
    )
    learns_from = "a reward model of replies that humans ranked, one more adapter on the base"
    remark = "by RLOO"
    made_by = "RLOO against a reward model of replies that humans ranked"
    is_self_rewarding = False
    learns_ranked = True
    trainer = "rloo"
    one_process = True  # what the policy draws while it learns is not dealt out
    section = "rlhf"
    Settings = RlhfSettings
    labels = {"kl_weight": "weight of the divergence"}
    unshown = ("judge.votes", "pairing.source")
    # One pass over the pairs in place of three: a third of the time.
    cases = {
        "rlhf": Case("toy-rlhf", ("rlhf.reward.epochs=1",), is_long=True, group=RANKED_REPLIES)
    }

    @classmethod
    def words(cls, own: RlhfSettings) -> Words:
        """Rewards, and no pairs."""
        return Words(
            why_no_pairs="the policy learns from the rewards of its own answers",
            judgement="reward",
            judging="reward model",
            training="RLOO",
            own_accuracy="reward model on the policy's answers, by gold",
        )

    def needs(self) -> None:
        """Answers that fill a step, and that differ."""
        recipe = self.recipe
        if recipe.dpo.batch_size % recipe.rollout.n:
            raise ValueError("method rlhf needs a dpo.batch_size that rollout.n divides")
        if recipe.prompts.per_iteration * recipe.rollout.n < recipe.dpo.batch_size:
            raise ValueError(
                "method rlhf needs as many answers (prompts.per_iteration times rollout.n) as "
                "dpo.batch_size"
            )
        if not recipe.rollout.temperature:
            raise ValueError(
                "method rlhf needs a rollout.temperature above 0: it learns from how replies to "
                "one prompt differ"
            )

    @classmethod
    def unread(cls, own: RlhfSettings) -> Mapping[str, Collection[Any]]:
        """All that is about pairs."""
        return {
            "pairing.source": ("random", "flipped", "gold"),
            "pairing.min_gap": (),
            "pairing.rho": (),
            "pairing.alpha": (),
            "pairing.replay": (),
            "pairing.accumulate": (True,),
            "pairing.older_steps": (),
            "pairing.older_order": (),
            "pairing.weight": (),
            "dpo.beta": (),
            "dpo.loss": (),
            "dpo.target_margin": (),
            "dpo.nll_weight": (),
            "dpo.label_smoothing": (),
            "dpo.ld_alpha": (),
        }

    @property
    def judge_makes_pairs(self) -> bool:
        """Never."""
        return False

    @property
    def pairs_samples(self) -> bool:
        """Never."""
        return False

    @property
    def accumulates(self) -> bool:
        """There are no pairs."""
        return False

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """Answers are drawn while the policy trains, a step's at once."""
        recipe, n = self.recipe, self.recipe.rollout.n
        drawn = self.all_prompts * n * recipe.dpo.epochs
        at_once, new = recipe.dpo.batch_size // n, sizes.answer
        yield Draws("candidates", at_once, n, sizes.prompt, new, round(drawn), in_training=True)
        yield Trains("reward model", "reward", "rlhf.reward", sizes.window, None)
        yield Trains("RLOO", "rloo", "dpo", sizes.own, drawn, scored=new)

    def preflight(self, data: SeedData) -> None:
        """The ranked replies."""
        if self.recipe.iterations:
            data.ranked()

    def candidates(self, it: Iteration, prompts: Sequence[Prompt]) -> tuple[list[Candidate], Facts]:
        """Not yet: the policy answers while it trains."""
        return [], {"candidates": 0}

    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """The reward model, trained where there is none yet."""
        _, facts = self._reward(it)
        return [], {**NO_VOTES, **{f"reward_{name}": value for name, value in facts.items()}}

    def pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> tuple[list[PreferencePair], Facts]:
        """It learns from none."""
        return it.keep_none()

    def delta(self, it: Iteration, pairs: Sequence[PreferencePair]) -> tuple[None, Facts]:
        """RLOO against the reward model."""
        prompts, (reward, _) = it.read("prompts", Prompt), self._reward(it)
        return None, it.reinforce(prompts, reward=reward, kl_weight=self.own.kl_weight)

    def _reward(self, it: Iteration) -> tuple[object, Facts]:
        section = self.own.reward
        return it.reward_model(optim=section, pairs=section.pairs)
