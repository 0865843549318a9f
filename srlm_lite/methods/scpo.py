"""Self-consistency preference optimisation: what most samples agree on is the better answer.

Where final answers can be compared, as numbers and options can, no judge is needed. Each of a
prompt's k samples votes for the answer that it ends in; chosen is a sample with the most frequent
one, rejected one with the rarest. A prompt counts where the most frequent has at least a share of
the samples (`scpo.thresholds`, higher from iteration to iteration), and its pair weighs
(V+ - V-) / k, DPO's part and the NLL of the chosen reply alike. New problems are written by the
model after the example of the listed ones, and kept by the same threshold. No label is used.

Source: Prasad et al. 2024, arXiv:2411.04109: k = 8 at temperature 0.7 and top-p 0.9, thresholds
0.5 and then 0.7 (GSM8K), DPO at beta 0.5 plus NLL of weight 1, reference M_t, two iterations.
Different here: the anchor writes the new problems, as in Self-Instruct here; and the NLL is a mean
over the step's tokens, not over those of each reply.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from srlm_lite.evaluate.answers import count_votes, load_extractor, vote_figures
from srlm_lite.evaluate.candidates import NO_VOTES, gold_scores
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.methods.base import (
    Case,
    Draws,
    Facts,
    Iteration,
    MadePairs,
    Phase,
    SeedData,
    Sizes,
    Source,
    Words,
)
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.pairing import Drops, Scored, at_iteration, pair, usable_candidates
from srlm_lite.questions import load_question
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt, VoteCount
from srlm_lite.settings import IsPath, Positive, Probability, Section
from srlm_lite.shipped import TEMPLATES

NEW = "scpo-"
"""Begins the name of a problem that a model wrote."""


class ScpoSettings(Section):
    """Method `scpo`: votes of samples for their final answers."""

    answer: str = "number"
    """What reads the final answer of a reply. `number`: the last number in it. `choice`: the letter
    of an option. `module:function`: a function of the reply that gives the answer as a text, or
    None; modules in the working directory are found too."""
    thresholds: Annotated[tuple[Probability, ...], Field(min_length=1)] = (0.5, 0.7)
    """Least share of a prompt's samples that the most frequent answer has, for each iteration; the
    last one for those after it."""
    weighted: bool = True
    """A pair weighs (V+ - V-) / k, the difference of the two shares; false: all weigh 1."""
    new_problems: Annotated[float, Field(ge=0)] = 1.0
    """New problems that the anchor is asked for, so many for each listed prompt."""
    shots: Positive = 4
    """Listed prompts that it is shown as examples."""
    template: Annotated[str, IsPath(shipped=TEMPLATES)] = "new-problem"
    """How it is asked: name of a shipped template or a path."""
    problem_max_new_tokens: Positive = 256
    """Longest new problem."""


def voted_pairs(
    prompts: Sequence[Prompt],
    usable: Mapping[str, Sequence[Scored]],
    drops: Drops,
    *,
    threshold: float,
    weighted: bool = True,
) -> list[PreferencePair]:
    """At most one pair a prompt: the most frequent answer against the rarest one.

    Prompts without a pair are counted in `drops`: `unsure` where no answer has the threshold,
    `tied` where the two have as many votes, or are one.

    Args:
        usable: Candidates with the share of their prompt's samples that end as they do; among
            equal ones the earlier counts.
    """
    pairs = []
    for prompt in (one for one in prompts if one.prompt_id in usable):
        scored = usable[prompt.prompt_id]
        chosen = max(scored, key=lambda one: one[1])
        rejected = min(scored, key=lambda one: one[1])
        if chosen[1] == rejected[1]:
            drops.prompts["tied"] += 1
        elif chosen[1] < threshold:
            drops.prompts["unsure"] += 1
        else:
            weight = chosen[1] - rejected[1] if weighted else 1.0
            pairs.append(replace(pair(prompt, chosen, rejected), weight=weight))
    return pairs


def shares(counted: Sequence[VoteCount]) -> dict[str, float | None]:
    """By candidate, the share of its prompt's samples that end as it does; None: unreadable."""
    return {
        candidate_id: None if answer is None else row.votes[answer] / row.samples
        for row in counted
        for candidate_id, answer in row.answers.items()
    }


ARITHMETIC = "On arithmetic word problems: another base, and its gold"
"""What its cases of the bench are shown beside."""

_ANCHOR = "anchor of arithmetic"


class Scpo(SelfRewarding[ScpoSettings]):
    """Votes stand where grades would."""

    name = "scpo"
    sources = (
        Source("Prasad et al. 2024", "Self-Consistency Preference Optimization", "2411.04109"),
    )
    learns_from = "the final answer that most of its samples agree on"
    remark = "for problems whose answers can be compared"
    made_by = (
        "answering problems, some of its own, and DPO with the most frequent final answer chosen"
    )
    section = "scpo"
    Settings = ScpoSettings
    labels = {"thresholds": "least vote share", "new_problems": "new problems a prompt"}
    advice = {
        "unsure": "lower scpo.thresholds",
        "tied": "raise rollout.temperature or rollout.n",
        "unreadable": "check scpo.answer against `srlm-lite show` of the answers",
    }
    cases = {
        # The first one trains the anchor that all of them share.
        "arithmetic, grades": Case("toy-arithmetic", anchor=_ANCHOR, group=ARITHMETIC),
        "arithmetic, gold pairs": Case(
            "toy-arithmetic", ("pairing.source=gold",), anchor=_ANCHOR, group=ARITHMETIC
        ),
        "arithmetic, random pairs": Case(
            "toy-arithmetic", ("pairing.source=random",), anchor=_ANCHOR, group=ARITHMETIC
        ),
        "steps": Case("toy-steps", anchor=_ANCHOR, group=ARITHMETIC),
        "steps, pairs of steps": Case(
            "toy-steps", ("steps.pairs=steps",), anchor=_ANCHOR, group=ARITHMETIC
        ),
        "scpo": Case("toy-scpo", anchor=_ANCHOR, group=ARITHMETIC),
    }

    @classmethod
    def words(cls, own: ScpoSettings) -> Words:
        """Shares of votes, and no grades."""
        return Words("share of votes", "their final answers are counted")

    @classmethod
    def unread(cls, own: ScpoSettings) -> Mapping[str, Collection[Any]]:
        """Votes have no length and a threshold of their own, and no form of judging keeps them."""
        none: tuple[Any, ...] = ()
        return dict.fromkeys(
            ("pairing.rho", "pairing.alpha", "pairing.min_gap", "judge.form"), none
        )

    @property
    def judge_makes_pairs(self) -> bool:
        """Never."""
        return False

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """New problems, answers to all, and a pair a prompt."""
        own, n = self.own, self.recipe.rollout.n
        new = round(own.new_problems * self.recipe.prompts.per_iteration) * self.recipe.iterations
        if new:
            tokens = sizes.reply(own.problem_max_new_tokens)
            yield Draws("new problems", self.chunk, 1, sizes.room(tokens), tokens, new)
        yield self.answers(sizes, texts=(self.all_prompts + new) * n)
        yield self.dpo(sizes, prompts=self.all_prompts + new)

    def preflight(self, data: SeedData) -> None:
        """The extractor and the question for new problems."""
        load_extractor(self.own.answer, where="scpo.answer")
        if self.own.new_problems:
            load_question("new-problem", self.own.template)

    def prompts(self, it: Iteration) -> tuple[list[Prompt], Facts]:
        """Listed prompts, and new ones after their example."""
        return it.prompts(self.pool, more=lambda listed: self._new_problems(it, listed))

    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """Nobody judges: final answers are counted."""
        it.write("judgements", [])
        counted = count_votes(
            prompts, candidates, load_extractor(self.own.answer, where="scpo.answer")
        )
        it.write("votes", counted)
        facts = {**NO_VOTES, **vote_figures(counted)}
        return [], {**facts, **self._gold_of_majority(prompts, candidates, counted)}

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """By votes; under `pairing.source` drawn blindly, or as gold has it, all of weight 1."""
        scores: Mapping[str, float | None] = shares(it.read("votes", VoteCount))
        pairing = self.recipe.pairing
        if pairing.source == "gold":
            scores = gold_scores(self.recipe.evaluate.gold, prompts, candidates)
        usable, drops = usable_candidates(
            prompts, candidates, scores, drop_truncated=pairing.drop_truncated
        )
        if pairing.source in ("random", "gold"):
            return self.best_against_worst(it, prompts, usable, drops)
        threshold = at_iteration(self.own.thresholds, it.number)
        pairs = voted_pairs(prompts, usable, drops, threshold=threshold, weighted=self.own.weighted)
        mean = sum(one.weight for one in pairs) / len(pairs) if pairs else 0.0
        new = sum(one.prompt_id.startswith(NEW) for one in pairs)
        return pairs, drops, {"mean_weight": round(mean, 4), "pairs_of_new_problems": new}

    def _new_problems(self, it: Iteration, listed: Sequence[Prompt]) -> tuple[list[Prompt], Facts]:
        """What the anchor writes after the example of listed prompts, each once."""
        wanted = round(self.own.new_problems * len(listed))
        shown = [prompt.text for prompt in listed if prompt.messages is None]
        if not wanted or not shown:
            return [], {}
        template = load_question("new-problem", self.own.template)
        questions = []
        for i in range(wanted):
            rng = Random(f"{self.recipe.seed}/{it.number}/new problems/{i}")
            examples = rng.sample(shown, min(self.own.shots, len(shown)))
            text = template.replace("{{problems}}", "\n".join(examples))
            questions.append((f"{NEW}{it.number}-{i:05d}", text))
        replies = it.ask(
            questions,
            about="new problems",
            by=it.anchor,
            max_new_tokens=self.own.problem_max_new_tokens,
            turn="new_problems",
            to_learn=True,
        )
        known = {_folded(text) for text in shown}
        found, facts = [], {"unfinished_problems": 0, "repeated_problems": 0}
        for name, _ in questions:
            reply = replies[name]
            text = reply.text.strip()
            if reply.finish_reason == "length" or not text:
                facts["unfinished_problems"] += 1
            elif _folded(text) in known:
                facts["repeated_problems"] += 1
            else:
                known.add(_folded(text))
                found.append(Prompt(name, text, "scpo"))
        return found, {"new_problems": len(found), **facts}

    def _gold_of_majority(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        counted: Sequence[VoteCount],
    ) -> Facts:
        """Where there is a gold scorer: what samples earn on average, and the majorities' answers.

        By criterion, on listed prompts alone. A majority's answer is its first candidate.
        """
        if self.recipe.evaluate.gold is None:
            return {}
        gold = load_gold(self.recipe.evaluate.gold)
        texts = {one.prompt_id: one.text for one in prompts if not one.prompt_id.startswith(NEW)}
        points = {
            row.candidate_id: gold.points(texts[row.prompt_id], row.text)
            for row in candidates
            if row.prompt_id in texts
        }
        tops = []
        for row in (one for one in counted if one.prompt_id in texts):
            top = next(iter(row.votes), None)
            # A prompt on which no sample has an answer counts with what its first one earns.
            tops.append(next(points[name] for name, said in row.answers.items() if said == top))
        return {
            "gold_of_samples": _mean_points(list(points.values())),
            "gold_of_majority": _mean_points(tops),
        }


def _mean_points(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean points by criterion."""
    names = dict.fromkeys(name for one in points for name in one)
    return {name: round(fmean(one.get(name, 0.0) for one in points), 4) for name in names}


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
