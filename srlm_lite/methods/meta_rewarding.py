"""Meta-Rewarding: the model judges its judgements too, and learns to judge from that.

Policy pairs are made as in Self-Rewarding, with length control (`pairing.rho`, a value for each
iteration). For the judge, each prompt gives the answer whose votes vary most. The model, as
meta-judge, compares every two of its judgements, in both orders; wins count by the rarity of wins
in their position; the ratings that make these battles most likely order the judgements, and the
best against the worst is a pair whose prompt is the judge's own.

Source: Wu et al. 2024, arXiv:2407.19594, sections 2.1 and 2.2: K = 7 answers, N = 11 judgements,
rho 0, 0.32, 0.32, 0.4, the judge trained in the first two iterations only, for the meta-judge
comes to prefer the higher score (97.7% in the second). The printed learning rates (5e-8 and 5e-6)
look odd and are not taken over. The prior of the ratings is our addition: without one a judgement
that never loses has no finite rating. `hide_scores`, a delta each for policy and judge, and
iterations that train the judge alone are too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random
from statistics import fmean, pvariance
from typing import Annotated, Any, Literal

from pydantic import Field

from srlm_lite.forms.tournament import elo as elo
from srlm_lite.judging import Rubric
from srlm_lite.methods.base import (
    TAUGHT_MORE,
    Case,
    Draws,
    Facts,
    Iteration,
    MadePairs,
    Phase,
    SeedData,
    Sizes,
    Source,
)
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.pairing import JUDGE, Drops, at_iteration, is_of_judgements, replay_age
from srlm_lite.questions import load_question, read_choice
from srlm_lite.quoting import fill, options
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt, Reply
from srlm_lite.settings import IsPath, Positive, Section
from srlm_lite.shipped import TEMPLATES

_SAME = 1e-9
"""Ratings closer than this are equal: they come out of an iteration."""


class MetaRewardingSettings(Section):
    """Method `meta-rewarding`: the model also judges its judgements, and learns from that."""

    schedule: tuple[Literal["both", "policy", "judge"], ...] = ("both", "both", "policy")
    """What each iteration trains, the last entry those after it: `both` policy and judge, or one
    of them alone. The paper stops training the judge after two iterations. Where the judge trains
    alone, a delta for both roles learns from its pairs, and the policy changes along; of deltas
    for one role each the policy's stays as it is."""
    roles: Literal["shared", "separate"] = "shared"
    """One delta for policy and judge, or one each."""
    template: Annotated[str, IsPath(shipped=TEMPLATES)] = "meta-judge"
    """The meta-judge's question: name of a shipped template or a path."""
    verdicts: tuple[str, str] = ("Winner: Judgement A", "Winner: Judgement B")
    """Last line of the meta-judge's reply where the first, or the second judgement wins."""
    max_new_tokens: Positive = 512
    """Longest reply of the meta-judge."""
    hide_scores: bool = False
    """Show it the judgements without their scores: it tends to choose the higher one."""
    judgement_caps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1100, 1000)
    """Longest judgement, in characters, that may be chosen in each iteration."""
    answer_caps: tuple[Annotated[int, Field(ge=0)], ...] = (2500, 0)
    """Longest answer that may be chosen in each iteration; 0 is any."""


@dataclass(frozen=True, slots=True)
class Battle:
    """A comparison of two judgements: 1 where the one shown first won, -1 the second, else 0."""

    first: int
    second: int
    result: int


def most_disputed(
    judgements: Mapping[str, Sequence[Judgement]], rng: Random
) -> list[Judgement] | None:
    """The readable judgements of the answer to a prompt whose scores vary most.

    Ties are drawn. None where no answer has two different scores.
    """
    readable = [[row for row in rows if row.score is not None] for rows in judgements.values()]
    spread = [pvariance([row.score or 0.0 for row in rows]) if rows else 0.0 for rows in readable]
    widest = max(spread, default=0.0)
    if not widest:
        return None
    return rng.choice(
        [rows for rows, value in zip(readable, spread, strict=True) if value == widest]
    )


def read_verdict(reply: Reply, verdicts: tuple[str, str]) -> int:
    """1 where the reply's last line names the first judgement, -1 the second, 0 anything else."""
    return read_choice(reply.text, verdicts, finish_reason=reply.finish_reason)


def position_weights(battles: Sequence[Battle]) -> tuple[float, float]:
    """What a win in the first, and in the second position counts: the rarer one more.

    w1 = wins in second / all wins, w2 = wins in first / all wins; 1/2 each without any.
    """
    counts = Counter(battle.result for battle in battles)
    total = counts[1] + counts[-1]
    return (counts[-1] / total, counts[1] / total) if total else (0.5, 0.5)


def battle_matrix(
    battles: Sequence[Battle], n: int, weights: tuple[float, float]
) -> list[list[float]]:
    """B[m][n] = w1 [m won, shown first] + w2 [m won, shown second]."""
    matrix = [[0.0] * n for _ in range(n)]
    for battle in battles:
        if battle.result == 1:
            matrix[battle.first][battle.second] += weights[0]
        elif battle.result == -1:
            matrix[battle.second][battle.first] += weights[1]
    return matrix


def extremes(ratings: Sequence[float], rng: Random) -> tuple[int, int]:
    """Places of a highest and of a lowest rating, drawn where several are equal.

    The first one would be favoured otherwise: judgements stand in the order of their votes.
    """
    top, bottom = max(ratings), min(ratings)
    best = rng.choice([i for i, rating in enumerate(ratings) if top - rating < _SAME])
    return best, rng.choice([i for i, rating in enumerate(ratings) if rating - bottom < _SAME])


def without_score(judgement: str) -> str:
    """A judgement without the lines that say its score."""
    kept = [line for line in judgement.splitlines() if not re.match(r"\W*score\W", line, re.I)]
    return "\n".join(kept).strip()


def render(
    template: str,
    rubric: Rubric,
    verdicts: Sequence[str],
    prompt: str,
    answer: str,
    judgements: tuple[str, str],
) -> str:
    """The meta-judge's question about two judgements of an answer.

    Their score lines stay, for it is they that are compared; those in other texts do not, and in
    none of the texts does a verdict of its own.
    """
    texts = {
        "prompt": rubric.quote(prompt),
        "response": rubric.quote(answer),
        "question": rubric.render(prompt=prompt, response=answer),
        "first": judgements[0],
        "second": judgements[1],
    }
    return fill(template, texts, options(*verdicts))


class MetaRewarding(SelfRewarding[MetaRewardingSettings]):
    """Pairs of judgements beside the policy's, or in their place."""

    name = "meta-rewarding"
    sources = (
        Source(
            "Wu et al. 2024",
            "Meta-Rewarding Language Models: Self-Improving Alignment with LLM-as-a-Meta-Judge",
            "2407.19594",
        ),
    )
    learns_from = "its own grades, and in the first iterations its own comparisons of its grades"
    remark = "one delta for both roles, or one each"
    made_by = (
        "answering prompts, grading its own answers, comparing its own grades, and DPO on the "
        "pairs of both"
    )
    recipe_name = "toy-meta"
    section = "meta_rewarding"
    Settings = MetaRewardingSettings
    advice = {
        "undisputed": "raise judge.votes",
        "long_chosen": "raise meta_rewarding.answer_caps",
    }
    cases = {
        "meta-rewarding": Case(
            "toy-meta", ("judge.votes=5",), anchor=None, is_long=True, group=TAUGHT_MORE
        )
    }

    def needs(self) -> None:
        """Written grades to compare; and what either role has learned is kept."""
        judge = self.recipe.judge
        if judge.adaptive_votes:
            raise ValueError(
                "method meta-rewarding learns from grades that contradict each other, and "
                "judge.adaptive_votes leaves such out"
            )
        if judge.form != "grade" or not judge.rationale:
            told = "judge.rationale=false" if judge.form == "grade" else f"judge.form={judge.form}"
            raise ValueError(
                f"method meta-rewarding compares grades that the judge has written, and {told} "
                "has none"
            )
        if self.recipe.dpo.init == "previous":
            return
        if self.own.roles == "shared" and {"policy", "judge"} & set(self.own.schedule):
            raise ValueError(
                "method meta-rewarding needs dpo.init=previous where its schedule trains one role "
                "alone: a delta that starts from zero forgets the other one. Or set "
                "meta_rewarding.roles=separate"
            )

    @property
    def judge_has_deltas(self) -> bool:
        """Where the roles are separate."""
        return self.own.roles == "separate"

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """Every two votes on a prompt's most disputed answer are compared, in both orders."""
        recipe, votes = self.recipe, self.recipe.judge.votes
        trained = [scheduled(self.own.schedule, t + 1) for t in range(recipe.iterations)]
        yield self.answers(sizes)
        yield from self.votes(sizes)
        yield from self.votes_on_older(sizes)
        of_judge = sum(role != "policy" for role in trained) * recipe.prompts.per_iteration
        if of_judge:
            new = sizes.reply(self.own.max_new_tokens)
            asked = of_judge * votes * (votes - 1)
            at_once = 4 * recipe.rollout.chunk_prompts
            yield Draws("meta-judge", at_once, 1, sizes.room(new), new, asked, "judge")
        of_policy = sum(role != "judge" for role in trained) * recipe.prompts.per_iteration
        judgement = sizes.question + sizes.judgement
        longest = max(sizes.own, judgement) if of_judge else sizes.own
        yield self.dpo(sizes, prompts=of_policy + of_judge, tokens=min(sizes.window, longest))

    def preflight(self, data: SeedData) -> None:
        """The meta-judge's template."""
        load_question("meta-judge", self.own.template)

    def origin_of_pairs(self, it: Iteration) -> str:
        """The judge's, where it trains alone."""
        return JUDGE if self._trained(it) == "judge" else ""

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The policy's pairs, the judge's, or both, as the schedule has it."""
        trained = self._trained(it)
        if trained == "judge":
            return self._judge_pairs(it, prompts, candidates, judgements)
        pairs, drops, facts = super().make_pairs(it, prompts, candidates, judgements)
        cap = at_iteration(self.own.answer_caps, it.number)
        short = [one for one in pairs if not cap or len(one.chosen) <= cap]
        drops.prompts["long_chosen"] += len(pairs) - len(short)
        if trained == "policy":
            return short, drops, facts
        own, undone, told = self._judge_pairs(it, prompts, candidates, judgements)
        left = {reason: count for reason, count in undone.prompts.items() if count}
        return [*short, *own], drops, {**facts, "judge_drops": left, **told}

    def delta(self, it: Iteration, pairs: Sequence[PreferencePair]) -> tuple[None, Facts]:
        """DPO on all pairs at once, or on each role's for a delta of its own."""
        if not self.judge_has_deltas:
            return None, it.learn(pairs)
        of_judge = [one for one in pairs if is_of_judgements(one.origin)]
        new = any(not replay_age(one) for one in of_judge)
        facts = it.learn(of_judge, called="judge delta") if new else {}
        if self._trained(it) == "judge":
            it.stay()
            return None, facts
        return None, it.learn([one for one in pairs if not is_of_judgements(one.origin)])

    def _trained(self, it: Iteration) -> str:
        return scheduled(self.own.schedule, it.number)

    def _judge_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        disputed = self._disputed(it, candidates, judgements)
        answers = {row.candidate_id: row for row in candidates}
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        battles = self._battles(it, disputed, answers, texts)
        weights = position_weights([one for group in battles.values() for one in group])
        cap = at_iteration(self.own.judgement_caps, it.number)
        pairs: list[PreferencePair] = []
        drops: Counter[str] = Counter(undisputed=len(prompts) - len(disputed))
        for prompt_id, rows in disputed.items():
            if not any(battle.result for battle in battles[prompt_id]):
                drops["no_verdict"] += 1
                continue
            ratings = elo(battle_matrix(battles[prompt_id], len(rows), weights))
            best, worst = extremes(ratings, self._rng(it, prompt_id, "elo"))
            if ratings[best] - ratings[worst] < _SAME:
                drops["tied"] += 1
            elif len(rows[best].text) > cap:
                drops["long_judgement"] += 1
            else:
                answer = answers[rows[0].candidate_id].text
                question = it.rubric.render(prompt=texts[prompt_id], response=answer)
                pairs.append(_pair(prompt_id, question, rows[best], rows[worst], ratings))
        return pairs, Drops(prompts=drops), _biases(disputed, battles)

    def _rng(self, it: Iteration, prompt_id: str, *what: str) -> Random:
        parts = (self.recipe.seed, it.number, "meta", prompt_id, *what)
        return Random("/".join(map(str, parts)))

    def _disputed(
        self, it: Iteration, candidates: Sequence[Candidate], judgements: Sequence[Judgement]
    ) -> dict[str, list[Judgement]]:
        """By prompt, the different judgements of its most disputed answer."""
        votes: dict[str, list[Judgement]] = {}
        for row in judgements:
            votes.setdefault(row.candidate_id, []).append(row)
        by_prompt: dict[str, dict[str, list[Judgement]]] = {}
        for candidate in candidates:
            name = candidate.candidate_id
            by_prompt.setdefault(candidate.prompt_id, {})[name] = votes.get(name, [])
        found = {}
        for prompt_id, groups in by_prompt.items():
            rows = most_disputed(groups, self._rng(it, prompt_id))
            if rows is not None:
                found[prompt_id] = list({row.text: row for row in rows}.values())
        return found

    def _battles(
        self,
        it: Iteration,
        disputed: Mapping[str, Sequence[Judgement]],
        answers: Mapping[str, Candidate],
        texts: Mapping[str, str],
    ) -> dict[str, list[Battle]]:
        own = self.own
        template = load_question("meta-judge", own.template)
        show = without_score if own.hide_scores else str
        questions = []
        for prompt_id, rows in disputed.items():
            prompt, answer = texts[prompt_id], answers[rows[0].candidate_id].text
            for m, n in permutations(range(len(rows)), 2):
                both = show(rows[m].text), show(rows[n].text)
                question = render(template, it.rubric, own.verdicts, prompt, answer, both)
                questions.append((f"{prompt_id}:{m}>{n}", question))
        replies = it.ask(
            questions, about="meta-judgements", by=it.judge, max_new_tokens=own.max_new_tokens
        )
        return {
            prompt_id: [
                Battle(m, n, read_verdict(replies[f"{prompt_id}:{m}>{n}"], own.verdicts))
                for m, n in permutations(range(len(rows)), 2)
            ]
            for prompt_id, rows in disputed.items()
        }


def scheduled(schedule: Sequence[str], iteration: int) -> str:
    """The schedule's entry for an iteration; the last one stays."""
    return schedule[min(iteration, len(schedule)) - 1] if schedule else "policy"


def _pair(
    prompt_id: str, question: str, best: Judgement, worst: Judgement, ratings: Sequence[float]
) -> PreferencePair:
    return PreferencePair(
        prompt_id=prompt_id,
        prompt=question,
        chosen_id=f"{best.candidate_id}:{best.vote}",
        rejected_id=f"{worst.candidate_id}:{worst.vote}",
        chosen=best.text,
        rejected=worst.text,
        chosen_score=round(max(ratings), 4),
        rejected_score=round(min(ratings), 4),
        origin=JUDGE,
        chosen_ids=best.ids,
        rejected_ids=worst.ids,
    )


def _biases(
    disputed: Mapping[str, Sequence[Judgement]], battles: Mapping[str, Sequence[Battle]]
) -> dict[str, Any]:
    """How often the first position wins, and how often the higher score where scores differ."""
    first, higher = [], []
    for prompt_id, rows in disputed.items():
        for battle in battles[prompt_id]:
            if not battle.result:
                continue
            first.append(float(battle.result == 1))
            gap = (rows[battle.first].score or 0.0) - (rows[battle.second].score or 0.0)
            if gap:
                higher.append(float((gap > 0) == (battle.result == 1)))
    asked = sum(len(group) for group in battles.values())
    return {
        "meta_judgements": asked,
        "meta_readable": round(len(first) / asked, 4) if asked else None,
        "meta_first_wins": round(fmean(first), 4) if first else None,
        "meta_higher_wins": round(fmean(higher), 4) if higher else None,
    }
