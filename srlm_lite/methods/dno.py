"""DNO, direct Nash optimisation, in its practical form: all pairs with a clear winner.

The policy's candidates, and where there is one a stronger teacher's answer, are graded. A winner
needs a high score, and a margin over the loser: a wider one for the teacher's answer, so that the
policy's own good answers count. Every pair that qualifies is learned, with pairs of earlier
iterations beside them (`pairing.replay: [0.3, 0.15]`). An answer that repeats itself loses to any.

Source: Rosset et al. 2024, arXiv:2404.03715, section 4: K = 5, winners of 5 or 6 on a scale of 6,
margins of 2 and 1, at most 30% of the last iteration's pairs and 15% of the one's before. Its
annotator is GPT-4-Turbo, which grades side by side; here it is the judge of the recipe, so for
the paper's setting it is `judge.engine: openai` with `dno.grading: side-by-side`. The printed
learning rate (5e-5) looks odd and is not taken over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import permutations
from random import Random
from typing import Annotated, Any, Literal

from pydantic import Field

from srlm_lite.errors import UserError
from srlm_lite.evaluate.candidates import candidate_facts, vote_facts
from srlm_lite.forms import form_of
from srlm_lite.judging import plain_lines
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
)
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.pairing import Drops, Scored, has_tag, length_penalty, pair
from srlm_lite.questions import load_question
from srlm_lite.quoting import SCORES, fill, numbered
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.settings import IsPath, Section
from srlm_lite.shipped import TEMPLATES

TEACHER = "teacher"
"""The kind of the teacher's answers."""

SERVER = "server"
"""What a recipe calls the teacher behind the section `openai`."""

BEST_SIDE_BY_SIDE = 6
"""The scale of the side-by-side judge ends here; it begins at 0."""


class DnoSettings(Section):
    """Method `dno`: every pair with a good winner and a wide margin."""

    teacher: Annotated[str | None, IsPath(words=(SERVER,))] = None
    """A stronger model's answers: a JSONL file with `prompt_id` and `response`, or `server` for
    the model of the section `openai`. Without, the policy is alone."""
    grading: Literal["rubric", "side-by-side"] = "rubric"
    """`side-by-side`: the judge sees all answers to a prompt at once, in an order drawn for each
    vote, as in the paper. `rubric`: each answer by itself."""
    template: Annotated[str, IsPath(shipped=TEMPLATES)] = "side-by-side"
    """The side-by-side judge's question: name of a shipped template or a path."""
    least_positive: float = 5.0
    """Lowest score of a chosen answer."""
    margin: Annotated[float, Field(gt=0)] = 2.0
    """Least gap of a pair whose chosen answer is the teacher's."""
    own_margin: Annotated[float, Field(gt=0)] = 1.0
    """Least gap of a pair whose chosen answer is the policy's own."""
    repeated_words: Annotated[int, Field(ge=2)] = 6
    """An answer that says a run of so many words three times is rejected whatever its score."""


_SCORE = re.compile(r"score (\d+): (\d+(?:\.\d+)?)", re.IGNORECASE)
WRITTEN = (*SCORES, numbered("score"))
"""Lines that the side-by-side judge writes, for `quote`."""


def margin_pairs(
    prompts: Sequence[Prompt],
    usable: Mapping[str, Sequence[Scored]],
    drops: Drops,
    section: DnoSettings,
    *,
    min_gap: float = 0.0,
    alpha: float = 0.0,
) -> list[PreferencePair]:
    """Every pair whose winner scores high enough, with the margin that its author asks for.

    An answer that repeats itself cannot win, and loses to every winner. Prompts without a pair
    are counted in `drops` as `no_margin`.

    Args:
        min_gap: The scores of a pair that wins by its margin differ by more than this, too.
        alpha: What a character more costs the winner of its margin, in score points.
    """
    pairs = []
    for prompt in (prompt for prompt in prompts if prompt.prompt_id in usable):
        found = []
        for winner, loser in permutations(usable[prompt.prompt_id], 2):
            of_teacher = has_tag(winner[0].candidate_id, f"{TEACHER}-")
            margin = section.margin if of_teacher else section.own_margin
            gap = winner[1] - loser[1]
            longer = len(winner[0].text) - len(loser[0].text)
            wide = gap > min_gap and gap - alpha * longer >= margin
            if winner[1] < section.least_positive or repeats(winner[0].text, section):
                continue
            if wide or repeats(loser[0].text, section):
                found.append(pair(prompt, winner, loser))
        drops.prompts["no_margin"] += not found
        pairs += found
    return pairs


def repeats(text: str, section: DnoSettings) -> bool:
    """Whether a run of `repeated_words` words occurs three times, overlapping ones included."""
    words, n = text.lower().split(), section.repeated_words
    runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return max(runs.values(), default=0) >= 3


def read_scores(reply: str, n: int) -> list[float | None]:
    """The scores that a side-by-side reply gives to replies 1 to n.

    Each is a line of its own, `Score <i>: <number>`; of several for one reply the last counts,
    and a number off the scale is none.
    """
    scores: list[float | None] = [None] * n
    for line in plain_lines(reply):
        match = _SCORE.fullmatch(line)
        if match and 1 <= int(match[1]) <= n:
            score = float(match[2])
            scores[int(match[1]) - 1] = score if score <= BEST_SIDE_BY_SIDE else None
    return scores


def render(template: str, prompt: str, replies: Sequence[str]) -> str:
    """The side-by-side judge's question."""
    texts = {f"reply{i}": text for i, text in enumerate(replies, start=1)}
    places = (f"<reply {i}>\n{{{{reply{i}}}}}\n</reply {i}>" for i in range(1, len(replies) + 1))
    whole = template.replace("{{responses}}", "\n".join(places))
    return fill(whole, {"prompt": prompt, **texts}, WRITTEN)


class Dno(SelfRewarding[DnoSettings]):
    """More candidates, another way to grade them, more pairs."""

    name = "dno"
    sources = (
        Source(
            "Rosset et al. 2024",
            "Direct Nash Optimization: Teaching Language Models to Self-Improve with General "
            "Preferences",
            "2404.03715",
        ),
    )
    learns_from = "every pair with a good winner and a wide margin"
    remark = "a teacher's answers (a file, a server) and grading side by side on wish"
    made_by = (
        "answering prompts beside a teacher, grading the answers and DPO on the pairs with a wide "
        "margin"
    )
    section = "dno"
    Settings = DnoSettings
    advice = {"no_margin": "lower dno.least_positive or the margins"}
    cases = {"dno": Case("toy-dno")}

    def needs(self) -> None:
        """A winner's least score that there can be."""
        form = form_of(self.recipe)
        if self.own.grading == "rubric" and form.compares and self.own.least_positive > 1:
            raise ValueError(
                f"with judge.form={form.name} scores are shares: set dno.least_positive and the "
                "margins between 0 and 1"
            )

    @classmethod
    def unread(cls, own: DnoSettings) -> Mapping[str, Collection[Any]]:
        """A pair is what has the margin, whatever else ranks it."""
        return {"pairing.source": ("random",), "pairing.rho": ()}

    @property
    def judge_makes_pairs(self) -> bool:
        """By the rubric; side by side, on a scale of its own."""
        return super().judge_makes_pairs and self.own.grading == "rubric"

    @property
    def pairs_samples(self) -> bool:
        """Unless a teacher's answer is beside them."""
        return self.own.teacher is None

    @property
    def asks_a_server(self) -> bool:
        """Where the teacher is there."""
        return self.own.teacher == SERVER

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """A teacher's answer is one more to grade, and not drawn here."""
        recipe = self.recipe
        n = recipe.rollout.n + (self.own.teacher is not None)
        yield self.answers(sizes)
        if self.own.grading == "rubric":
            yield from self.votes(sizes, answers=n * self.all_prompts)
        else:
            asked = self.all_prompts * recipe.judge.votes
            room = sizes.room(sizes.judgement)
            at_once = 4 * recipe.rollout.chunk_prompts
            yield Draws("side by side", at_once, 1, room, sizes.judgement, asked, "judge")
        yield from self.votes_on_older(sizes, answers=n)
        tokens = sizes.own if self.own.teacher is None else sizes.window
        yield self.dpo(sizes, pairs=n * (n - 1) / 2, tokens=tokens)

    def preflight(self, data: SeedData) -> None:
        """The template, and the teacher's file."""
        if self.own.grading == "side-by-side":
            load_question("side-by-side", self.own.template)
        if self.own.teacher not in (None, SERVER):
            data.rows(str(self.own.teacher))

    def candidates(self, it: Iteration, prompts: Sequence[Prompt]) -> tuple[list[Candidate], Facts]:
        """The policy's, then the teacher's."""
        own = it.answer(prompts)
        facts, teacher = candidate_facts(own), self._teacher(it, prompts)
        return [*own, *teacher], {**facts, **({"teacher": len(teacher)} if teacher else {})}

    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """One by one, or side by side."""
        if self.own.grading == "rubric":
            return super().judgements(it, prompts, candidates)
        rows = self._side_by_side(it, prompts, candidates)
        it.write("judgements", rows)
        return rows, vote_facts(rows)

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """Every pair that qualifies."""
        usable, drops = self.judged(prompts, candidates, judgements)
        pairing = self.recipe.pairing
        alpha = length_penalty(list(usable.values()), pairing)
        pairs = margin_pairs(prompts, usable, drops, self.own, min_gap=pairing.min_gap, alpha=alpha)
        return pairs, drops, {"alpha": round(alpha, 6)} if pairing.alpha == "auto" else {}

    def _teacher(self, it: Iteration, prompts: Sequence[Prompt]) -> list[Candidate]:
        named = self.own.teacher
        if named is None:
            return []
        if named == SERVER:
            return it.answer(prompts, n=1, by=it.teacher, kind=TEACHER)
        told = it.data.rows(named)
        rows = [it.as_answer(row) for row in teacher_answers(told, prompts, where=named)]
        it.write(f"{TEACHER}_candidates", rows)
        return rows

    def _side_by_side(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> list[Judgement]:
        recipe = self.recipe
        template = load_question("side-by-side", self.own.template)
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        groups: dict[str, list[Candidate]] = {}
        for row in candidates:
            if row.text and not (recipe.pairing.drop_truncated and row.finish_reason == "length"):
                groups.setdefault(row.prompt_id, []).append(row)
        orders = {
            (prompt_id, vote): Random(f"{recipe.seed}/{it.number}/{prompt_id}/{vote}").sample(
                group, len(group)
            )
            for prompt_id, group in groups.items()
            for vote in range(recipe.judge.votes)
        }
        replies = it.ask(
            [
                (
                    f"{prompt_id}:{vote}",
                    render(template, texts[prompt_id], [row.text for row in order]),
                )
                for (prompt_id, vote), order in orders.items()
            ],
            about="side by side",
            by=it.policy,
        )
        found = []
        for (prompt_id, vote), order in orders.items():
            reply = replies[f"{prompt_id}:{vote}"]
            scores = read_scores(reply.text if reply.finish_reason == "stop" else "", len(order))
            for row, score in zip(order, scores, strict=True):
                found.append(
                    Judgement(row.candidate_id, vote, reply.text, score, reply.finish_reason)
                )
        return found


def teacher_answers(
    told: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], *, where: str
) -> list[Candidate]:
    """The answers that the rows of a file have to these prompts.

    Raises:
        UserError: A row lacks a key, or no row is for any of the prompts.
    """
    wanted = {prompt.prompt_id for prompt in prompts}
    rows: list[Candidate] = []
    for number, row in enumerate(told, start=1):
        named, text = row.get("prompt_id"), row.get("response")
        if named is None or not isinstance(text, str):
            raise UserError(f"row {number} lacks prompt_id or response", where=where)
        prompt_id = str(named)  # a number in some files, as in prompt lists
        if prompt_id in wanted:
            name = f"{prompt_id}#{TEACHER}-{number}"
            rows.append(Candidate(prompt_id, name, text, len(text.split()), "stop"))
    if not rows:
        raise UserError(
            f"answers none of the iteration's {len(prompts)} prompts",
            where=where,
            way_out="Its prompt_id have to be those of the prompt list",
        )
    return rows
