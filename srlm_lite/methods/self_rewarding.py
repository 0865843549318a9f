"""Self-Rewarding Language Models: the model's own mean score orders its own answers.

Every other method is this one with some stages changed: a class that overrides what differs.

Source: Yuan et al. 2024, arXiv:2401.10020: N = 4 answers at temperature 0.7 and top-p 0.9, three
votes on each, the best against the worst, none where they are equal. `dpo.init: previous` is the
paper's chain of models; `anchor` starts each delta anew. How many epochs of DPO it took is not
stated there, and it picked checkpoints by an outside judge, which a run here does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from srlm_lite.evaluate.candidates import (
    candidate_facts,
    gold_scores,
    on_policy_accuracy,
    vote_facts,
)
from srlm_lite.forms import form_of
from srlm_lite.judging import mean_scores, unasked, votes_by_candidate
from srlm_lite.methods.base import (
    CONTROLS,
    LOSSES,
    OF_FORMS,
    REBASING,
    SHARPENING,
    Case,
    Draws,
    Facts,
    Iteration,
    MadePairs,
    Method,
    Phase,
    Pool,
    S,
    SeedData,
    Sizes,
    Source,
    Trains,
)
from srlm_lite.pairing import Drops, Scored, Scores, length_penalty, pairs_of, usable_candidates
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.seeds import derive_seed

REBASED = ("dpo.init=anchor", "pairing.accumulate=true")
REBASED_ALONE = ("dpo.init=anchor", "pairing.accumulate=false")
FAST = ("dpo.learning_rate=1e-2",)
"""Where a chain of deltas collapses on the toy world."""


class SelfRewarding(Method[S]):
    """Answers, grades by the same weights, the best against the worst, DPO.

    A stage whose files are complete gives what is in them, and computes nothing.
    """

    name = "self-rewarding"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("Yuan et al. 2024", "Self-Rewarding Language Models", "2401.10020"),
    )
    learns_from = "its own grades"
    made_by = "answering prompts, grading its own answers and DPO on the pairs"
    recipe_name = "toy-paper"
    cases = {
        "self-rewarding": Case("toy", group=CONTROLS),
        "init: anchor": Case("toy", REBASED_ALONE, group=CONTROLS),
        "paper's chain": Case("toy-paper", group=CONTROLS),
        "random pairs": Case("toy", ("pairing.source=random",), group=CONTROLS),
        "gold pairs": Case("toy", ("pairing.source=gold",), group=CONTROLS),
        "no judge data": Case("toy", ("anchor.use_eft=false",), anchor=None, group=CONTROLS),
        "expected scores": Case("toy", ("judge.score=expected",), group=OF_FORMS),
        "no rationale": Case("toy", ("judge.rationale=false",), anchor=None, group=OF_FORMS),
        "pairwise": Case("toy-pairwise", anchor=None, is_long=True, group=OF_FORMS),
        "checklist": Case("toy-checklist", anchor=None, is_long=True, group=OF_FORMS),
        "flipped pairs": Case("toy", ("pairing.source=flipped",), group=SHARPENING),
        "SFT on the best": Case("toy", ("dpo.loss=sft",), group=SHARPENING),
        "one pass": Case("toy", group=SHARPENING, one_pass=True),
        "all pairs so far": Case("toy", REBASED, group=REBASING),
        "all pairs, same steps": Case(
            "toy", (*REBASED, "pairing.older_steps=same"), group=REBASING
        ),
        "all pairs, disputed dropped": Case(
            "toy", (*REBASED, "pairing.older_order=drop"), group=REBASING
        ),
        "all pairs, disputed smoothed": Case(
            "toy", (*REBASED, "pairing.older_order=smooth"), group=REBASING
        ),
        "lr 1e-2": Case("toy", FAST, group=REBASING),
        "lr 1e-2, all pairs so far": Case("toy", (*REBASED, *FAST), group=REBASING),
        "sigmoid_norm": Case("toy", ("dpo.loss=sigmoid_norm", "dpo.beta=2"), group=LOSSES),
        "ipo": Case("toy", ("dpo.loss=ipo", "dpo.beta=0.5"), group=LOSSES),
        "apo_zero": Case("toy", ("dpo.loss=apo_zero",), group=LOSSES),
        "apo_down": Case("toy", ("dpo.loss=apo_down",), group=LOSSES),
        "simpo": Case("toy", ("dpo.loss=simpo", "dpo.beta=2"), group=LOSSES),
        "gap weights": Case("toy", ("pairing.weight=gap",), group=LOSSES),
    }

    @property
    def pairs_samples(self) -> bool:
        """Always."""
        return True

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """N answers a prompt, the votes on each, and a pair a prompt."""
        yield self.answers(sizes)
        # Blind pairs and gold ones are judged too: it says how good the judge is on them.
        yield from self.votes(sizes)
        yield from self.votes_on_older(sizes)
        yield self.dpo(sizes)

    def pool(self, data: SeedData) -> Pool | None:
        """The recipe's own list, where it has one."""
        return data.prompts() if self.recipe.prompts.source == "file" else None

    def prompts(self, it: Iteration) -> tuple[list[Prompt], Facts]:
        """New prompts."""
        return it.prompts(self.pool)

    def candidates(self, it: Iteration, prompts: Sequence[Prompt]) -> tuple[list[Candidate], Facts]:
        """N answers to each prompt by the policy."""
        rows = it.answer(prompts)
        return rows, candidate_facts(rows)

    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """What the same weights, as judge, think of each answer, in the recipe's form."""
        rows, facts = it.judged(prompts, candidates)
        told = self.accuracy(prompts, candidates, rows)
        return rows, {**vote_facts(rows), **told, **facts}

    def pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> tuple[list[PreferencePair], Facts]:
        """What to learn from; methods change `make_pairs`."""
        made, drops, facts = self.make_pairs(it, prompts, candidates, judgements)
        if self.recipe.pairing.source in ("judge", "flipped"):
            worth = form_of(self.recipe).kept(made, judgements)
            if len(worth) < len(made):
                drops.prompts["not_widest"] += len(made) - len(worth)
                made = worth
        kept, counts = it.keep(made, drops, advice=self.advice, origin=self.origin_of_pairs(it))
        return kept, {**counts, **facts}

    def origin_of_pairs(self, it: Iteration) -> str:
        """Origin of the pairs that an iteration must have enough of: the policy's own."""
        return ""

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The best against the worst candidate of each prompt, by mean score.

        Or the pairs of a form of judging that makes its own.
        """
        usable, drops = self.judged(prompts, candidates, judgements)
        if self.recipe.pairing.source in ("judge", "flipped"):
            own = form_of(self.recipe).pairs(it, prompts, usable, drops)
            if own is not None:
                return own, drops, {}
        return self.best_against_worst(it, prompts, usable, drops)

    def delta(self, it: Iteration, pairs: Sequence[PreferencePair]) -> tuple[None, Facts]:
        """DPO on the pairs."""
        return None, it.learn(pairs)

    # What methods that change a stage build on.

    def judged(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> tuple[dict[str, list[Scored]], Drops]:
        """The candidates that can be part of a pair, with their mean scores."""
        scores: Scores = mean_scores(judgements, min_votes=form_of(self.recipe).min_votes)
        if self.recipe.pairing.source == "gold":
            scores = gold_scores(self.recipe.evaluate.gold, prompts, candidates)
        return usable_candidates(
            prompts,
            candidates,
            scores,
            votes=votes_by_candidate(judgements),
            unasked=unasked(judgements),
            drop_truncated=self.recipe.pairing.drop_truncated,
        )

    def best_against_worst(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        usable: dict[str, list[Scored]],
        drops: Drops,
    ) -> MadePairs:
        """One pair a prompt, under the options of the section `pairing`."""
        pairing = self.recipe.pairing
        pairs, drops = pairs_of(
            prompts,
            usable,
            drops,
            pairing=pairing,
            seed=derive_seed(self.recipe.seed, it.number, "pairs"),
            iteration=it.number,
        )
        facts = {}
        if pairing.alpha == "auto":
            facts["alpha"] = round(length_penalty(list(usable.values()), pairing), 6)
        return pairs, drops, facts

    def accuracy(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> Facts:
        """How often the judgements are in the gold order, where there is a gold scorer."""
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        return on_policy_accuracy(self.recipe.evaluate.gold, texts, candidates, judgements)

    # And their phases.

    @property
    def all_prompts(self) -> int:
        """Prompts of the whole run."""
        return self.recipe.iterations * self.recipe.prompts.per_iteration

    @property
    def chunk(self) -> int:
        """Prompts that are answered at once."""
        return min(self.recipe.rollout.chunk_prompts, self.recipe.prompts.per_iteration)

    def answers(self, sizes: Sizes, *, n: int | None = None, texts: int | None = None) -> Draws:
        """Answers to prompts.

        Args:
            n: A prompt; default: `rollout.n`.
            texts: Of the whole run; default: n to each prompt.
        """
        n = n or self.recipe.rollout.n
        texts = self.all_prompts * n if texts is None else texts
        return Draws("candidates", self.chunk, n, sizes.prompt, sizes.answer, texts)

    def votes(
        self, sizes: Sizes, *, answers: int | None = None, prompts: int | None = None
    ) -> Iterator[Phase]:
        """The judging of answers, in the recipe's form.

        Args:
            answers: Of the whole run; default: `rollout.n` to each prompt.
            prompts: That they answer; default: those of the whole run.
        """
        n, prompts = self.recipe.rollout.n, self.all_prompts if prompts is None else prompts
        graded = prompts * n if answers is None else answers
        yield from form_of(self.recipe).phases(
            sizes, prompts=prompts, answers=graded, at_once=self.chunk * n
        )

    def dpo(
        self, sizes: Sizes, *, pairs: float | None = 1, tokens: int | None = None,
        prompts: int | None = None,
    ) -> Trains:  # fmt: skip
        """DPO on pairs.

        Args:
            pairs: A prompt, at most; None where the data says how many.
            tokens: Of the longer one of a pair; default: a prompt with an answer of the policy's.
            prompts: Of the whole run; default: all of them.
        """
        recipe = self.recipe
        seen = self.all_prompts if prompts is None else prompts
        told = None
        if pairs is not None:
            told = (seen + self.learned_again(seen)) * pairs * recipe.dpo.epochs
        return Trains("DPO", "dpo", "dpo", tokens or sizes.own, told)

    def learned_again(self, prompts: int) -> float:
        """Prompts whose pairs are learned once more, of so many that the iterations learn."""
        if not self.accumulates:
            return prompts * sum(self.recipe.pairing.replay)
        # Iteration t has t - 1 shares before its own.
        learning = min(self.recipe.iterations, prompts // self.recipe.prompts.per_iteration)
        return prompts * max(0, learning - 1) / 2

    def votes_on_older(self, sizes: Sizes, *, answers: int = 2) -> Iterator[Phase]:
        """Votes of the newest judge on the replies of older pairs, where it is asked.

        Args:
            answers: A prompt.
        """
        if self.recipe.pairing.older_order == "keep":
            return
        again = round(self.learned_again(self.all_prompts))
        for one in self.votes(sizes, answers=answers * again, prompts=again):
            yield replace(one, name=f"{one.name}, older pairs")
