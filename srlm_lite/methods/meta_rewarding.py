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

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random
from statistics import fmean, pvariance
from typing import Any

from srlm_lite.judging import Rubric, fill, load_question, options, plain_lines
from srlm_lite.methods.self_rewarding import MadePairs, SelfRewarding
from srlm_lite.pairing import JUDGE, Drops, at_iteration
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt, Reply
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages import iteration as stages
from srlm_lite.stages.sampling import ask, limits_of

PRIOR = 0.01
"""Wins that every judgement is given over every other before the first battle."""

_SAME = 1e-9
"""Ratings closer than this are equal: they come out of an iteration."""


@dataclass(frozen=True, slots=True)
class Battle:
    """A comparison of two judgements: 1 where the one shown first won, -1 the second, else 0."""

    first: int
    second: int
    result: int


def most_disputed(
    judgements: Mapping[str, Sequence[Judgement]], rng: Random
) -> list[Judgement] | None:
    """Of a prompt's answers, the readable judgements of the one whose scores vary most.

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
    lines = plain_lines(reply.text) if reply.finish_reason == "stop" else []
    last = lines[-1].strip(" .").lower() if lines else ""
    named = [last == verdict.lower() for verdict in verdicts]
    return int(named[0]) - int(named[1])


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


def elo(matrix: Sequence[Sequence[float]], *, prior: float = PRIOR) -> list[float]:
    """The ratings that maximise the sum of B[m][n] log sigmoid(e_m - e_n), with mean 0.

    Hunter's minorise-maximise steps for the Bradley-Terry model; `prior` is added to every entry.
    """
    n = len(matrix)
    wins = [sum(row) + prior * (n - 1) for row in matrix]
    strengths = [1.0] * n
    for _ in range(500):
        new = []
        for i in range(n):
            met = sum(
                (matrix[i][j] + matrix[j][i] + 2 * prior) / (strengths[i] + strengths[j])
                for j in range(n)
                if j != i
            )
            new.append(wins[i] / met if met else strengths[i])
        scale = math.exp(fmean(math.log(value) for value in new))
        strengths = [value / scale for value in new]
    return [math.log(value) for value in strengths]


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


class MetaRewarding(SelfRewarding):
    """Pairs of judgements beside the policy's, or in their place."""

    def origin_of_pairs(self, session: Session, iteration: IterationDir) -> str:
        """The judge's, where it trains alone."""
        return JUDGE if _trained(session, iteration) == "judge" else ""

    def make_pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """The policy's pairs, the judge's, or both, as the schedule has it."""
        trained = _trained(session, iteration)
        if trained == "judge":
            return _judge_pairs(session, iteration, prompts, candidates, judgements)
        pairs, drops, facts = super().make_pairs(
            session, iteration, prompts, candidates, judgements
        )
        meta = session.recipe.meta_rewarding
        cap = at_iteration(meta.answer_caps, iteration.number)
        short = [one for one in pairs if not cap or len(one.chosen) <= cap]
        drops.prompts["long_chosen"] += len(pairs) - len(short)
        if trained == "policy":
            return short, drops, facts
        own, undone, told = _judge_pairs(session, iteration, prompts, candidates, judgements)
        left = {reason: count for reason, count in undone.prompts.items() if count}
        return [*short, *own], drops, {**facts, "judge_drops": left, **told}

    def delta(
        self, session: Session, iteration: IterationDir, pairs: Sequence[PreferencePair]
    ) -> tuple[None, dict[str, Any]]:
        """DPO on all pairs at once, or on each role's for a delta of its own."""
        if not session.recipe.judge_has_deltas:
            return stages.delta(session, iteration, pairs)
        of_judge = [one for one in pairs if one.origin == JUDGE]
        facts: dict[str, Any] = {}
        if of_judge:
            _, facts = stages.delta(
                session, iteration, of_judge, place=iteration.judge_place, role="judge"
            )
        if _trained(session, iteration) == "judge":
            stages.same_delta(session, iteration)
            return None, facts
        return stages.delta(session, iteration, [one for one in pairs if one.origin != JUDGE])


def scheduled(schedule: Sequence[str], iteration: int) -> str:
    """The schedule's entry for an iteration; the last one stays."""
    return schedule[min(iteration, len(schedule)) - 1] if schedule else "policy"


def _trained(session: Session, iteration: IterationDir) -> str:
    return scheduled(session.recipe.meta_rewarding.schedule, iteration.number)


def _judge_pairs(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
) -> MadePairs:
    recipe, t = session.recipe, iteration.number
    disputed = _disputed(session, iteration, candidates, judgements)
    answers = {row.candidate_id: row for row in candidates}
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}
    battles = _battles(session, iteration, disputed, answers, texts)
    weights = position_weights([one for group in battles.values() for one in group])
    cap = at_iteration(recipe.meta_rewarding.judgement_caps, t)
    pairs: list[PreferencePair] = []
    drops: Counter[str] = Counter(undisputed=len(prompts) - len(disputed))
    for prompt_id, rows in disputed.items():
        if not any(battle.result for battle in battles[prompt_id]):
            drops["no_verdict"] += 1
            continue
        ratings = elo(battle_matrix(battles[prompt_id], len(rows), weights))
        best, worst = extremes(ratings, _rng(session, iteration, prompt_id, "elo"))
        if ratings[best] - ratings[worst] < _SAME:
            drops["tied"] += 1
        elif len(rows[best].text) > cap:
            drops["long_judgement"] += 1
        else:
            answer = answers[rows[0].candidate_id].text
            question = session.rubric.render(prompt=texts[prompt_id], response=answer)
            pairs.append(_pair(prompt_id, question, rows[best], rows[worst], ratings))
    return pairs, Drops(prompts=drops), _biases(disputed, battles)


def _rng(session: Session, iteration: IterationDir, prompt_id: str, *what: str) -> Random:
    parts = (session.recipe.seed, iteration.number, "meta", prompt_id, *what)
    return Random("/".join(map(str, parts)))


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


def _disputed(
    session: Session,
    iteration: IterationDir,
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
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
        rng = _rng(session, iteration, prompt_id)
        rows = most_disputed(groups, rng)
        if rows is not None:
            found[prompt_id] = list({row.text: row for row in rows}.values())
    return found


def _battles(
    session: Session,
    iteration: IterationDir,
    disputed: Mapping[str, Sequence[Judgement]],
    answers: Mapping[str, Candidate],
    texts: Mapping[str, str],
) -> dict[str, list[Battle]]:
    recipe, meta = session.recipe, session.recipe.meta_rewarding
    template = load_question("meta-judge", meta.template)
    show = without_score if meta.hide_scores else str
    questions = []
    for prompt_id, rows in disputed.items():
        prompt, answer = texts[prompt_id], answers[rows[0].candidate_id].text
        for m, n in permutations(range(len(rows)), 2):
            both = show(rows[m].text), show(rows[n].text)
            question = render(template, session.rubric, meta.verdicts, prompt, answer, both)
            questions.append((f"{prompt_id}:{m}>{n}", question))
    replies = ask(
        session,
        session.stack(iteration.number - 1, "judge"),
        questions,
        path=iteration.replies,
        stage="meta-judgements",
        limits=limits_of(recipe.judge, max_new_tokens=meta.max_new_tokens),
        seed_path=(recipe.seed, iteration.number, "meta-judgements"),
    )
    return {
        prompt_id: [
            Battle(m, n, read_verdict(replies[f"{prompt_id}:{m}>{n}"], meta.verdicts))
            for m, n in permutations(range(len(rows)), 2)
        ]
        for prompt_id, rows in disputed.items()
    }


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
