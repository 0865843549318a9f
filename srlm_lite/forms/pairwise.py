"""A prompt's candidates against each other: the judge says which of two answers is better.

Every two of them are shown in both orders. By default the judge writes nothing: its reply is begun
up to where the two verdicts part, and the probabilities of the next token say who wins, for one
prefill a question. What all questions about a prompt begin with is computed once. The score is the
share of won verdicts; two orders that contradict each other are half a win for either.

Source: Ou et al. 2025 (SERL), arXiv:2511.07922: a model that judges its own answers in pairs, by
sampled verdicts. There the judge learns too, by RL; here it is the stack of the iteration, and
verdicts by probability are our addition. Position consistency as in Zheng et al. 2023,
arXiv:2306.05685.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, count
from random import Random
from typing import Annotated, Literal

from pydantic import Field as Ranged
from pydantic import field_validator

from srlm_lite.declared import Draws, Facts, Phase, Sizes, Source, Weighs
from srlm_lite.forms.base import BEGUN, Form, JudgeAtWork, JudgeQuestion, Scale, no_verdict
from srlm_lite.forms.grade import LEAST_MASS
from srlm_lite.forms.tournament import (
    AllPairs,
    Bracket,
    Field,
    Meeting,
    contest_facts,
    credits,
    near,
    shares,
    strengths,
)
from srlm_lite.judging import Rubric
from srlm_lite.questions import WINNERS, PairQuestion, load_question
from srlm_lite.records import Candidate, Contest, Instruction, Judgement, Prompt, RankedReply
from srlm_lite.settings import IsPath, Positive, Section
from srlm_lite.shipped import TEMPLATES


class PairwiseSettings(Section):
    """Form `pairwise`: candidates are compared with each other."""

    template: Annotated[str, IsPath(shipped=TEMPLATES)] = "pairwise"
    """The question: name of a shipped template or a path. The same as `compare.template`'s."""
    winners: tuple[str, str] = WINNERS
    """Last line of the judge's reply where the first, or the second answer is better."""
    verdict: Literal["probability", "reply"] = "probability"
    """`probability`: the judge writes nothing, and the likelier one of `winners` is its verdict.
    `reply`: it writes its reasons and then one of `winners`."""
    score: Literal["wins", "probability", "bradley-terry"] = "wins"
    """`wins`: the share of won verdicts. `probability`: the mean probability of winning, with fewer
    ties. `bradley-terry`: how likely it is to beat a candidate of average strength."""
    length_within: Annotated[float, Ranged(gt=0, lt=1)] | None = None
    """Length control of SERL: only answers whose lengths differ by at most this share of the longer
    one are compared (.2 there), and a win counts as much less as the winner is longer."""
    all_pairs: Annotated[int, Ranged(ge=2)] = 6
    """With more candidates than this a prompt's meet in a bracket, and not everybody everybody,
    unless `length_within` says who meets. A bracket ranks: `score` counts for nothing there."""
    lessons: Positive = 12
    """Questions that an anchor learns of each prompt with ranked replies, at most; every two of
    them make two, one in each order."""

    @field_validator("winners")
    @classmethod
    def _are_told_apart(cls, value: tuple[str, str]) -> tuple[str, str]:
        if value[0].strip().lower() == value[1].strip().lower():
            raise ValueError("the two verdicts are the same line")
        return value


class PairwiseForm(Form[PairwiseSettings]):
    """Verdicts on every two candidates."""

    name = "pairwise"
    sources = (
        Source(
            "Ou et al. 2025",
            "SERL: Self-Examining Reinforcement Learning on Open-Domain",
            "2511.07922",
            "its share of won verdicts",
        ),
    )
    asks = "which of two answers to a prompt is better, in both orders"
    score = "share of verdicts won"
    section = "pairwise"
    Settings = PairwiseSettings
    labels = {"verdict": "verdicts by", "score": "score"}
    unshown = ("judge.votes", "judge.rubric")
    shown = 2
    compares = True
    has_lessons = True
    figures = {
        "position_consistency": "same winner in both orders",
        "first_wins": "won by the one shown first",
        "intransitive": "triples that go in a circle",
        "longer_wins": "won by the longer one",
    }

    @classmethod
    def told(cls, judgement: Judgement) -> tuple[str, ...]:
        """On how many verdicts the score rests."""
        return () if judgement.verdicts is None else (f"of {judgement.verdicts} verdicts",)

    @property
    def weighs(self) -> bool:
        """Unless verdicts are written."""
        return self.own.verdict == "probability"

    @property
    def question(self) -> PairQuestion:
        """What the judge is asked.

        Raises:
            UserError: The template cannot be read.
        """
        return PairQuestion(load_question("pairwise", self.own.template), self.own.winners)

    def blank(self, rubric: Rubric) -> str:
        """The question about two answers."""
        return self.question.ask("", "", "")

    def scale(self, rubric: Rubric) -> Scale:
        """Shares; with length control a win over a longer answer counts more than one."""
        within = self.own.length_within
        longest = 1.0 if within is None or self.own.score == "bradley-terry" else 1 / (1 - within)
        return 0.0, round(longest, 4)

    def preflight(self) -> None:
        """The template."""
        _ = self.question

    def phases(self, sizes: Sizes, *, prompts: int, answers: int, at_once: int) -> Iterator[Phase]:
        """Two questions for every two candidates of a prompt that meet."""
        n = max(1, round(answers / max(1, prompts)))
        meetings = n * (n - 1) // 2
        if n > self.own.all_pairs and self.own.length_within is None:
            meetings = 2 * (n - 1) + max(0, n // 2 - 1)
        questions = 2 * meetings * prompts
        if self.weighs:
            yield Weighs("comparisons (prefill)", at_once, sizes.room(BEGUN), questions)
            return
        new = sizes.judgement
        yield Draws("comparisons", at_once, 1, sizes.room(new), new, questions, "judge")

    def lessons(self, groups: Sequence[Sequence[RankedReply]], rubric: Rubric) -> list[Instruction]:
        """Every two replies that people ranked apart, in both orders, with the verdict alone."""
        question, (first, second) = self.question, self.own.winners
        rows = []
        for group in groups:
            apart = [
                (a, b)
                for a, b in combinations(group, 2)
                if a.rank != b.rank and a.response.strip() and b.response.strip()
            ]
            most = max(1, self.own.lessons // 2)
            if len(apart) > most:
                rng = Random(f"{self.recipe.seed}/lessons/{group[0].prompt_id}")
                apart = rng.sample(apart, most)
            for a, b in apart:
                for one, other in ((a, b), (b, a)):
                    rows.append(
                        Instruction(
                            f"{one.response_id}>{other.response_id}",
                            question.ask(one.prompt, one.response, other.response),
                            first if one.rank < other.rank else second,
                        )
                    )
        return rows

    def judge(
        self, judge: JudgeAtWork, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """Contests round after round, into `comparisons`, and the score of each candidate."""
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        groups: dict[str, dict[str, Candidate]] = {}
        for row in candidates:
            # One text stands for all that are the same.
            groups.setdefault(row.prompt_id, {}).setdefault(row.text, row)
        fields = {name: self._field(name, list(some.values())) for name, some in groups.items()}
        by_id = {row.candidate_id: row for some in groups.values() for row in some.values()}
        contests: dict[str, list[Contest]] = {name: [] for name in groups}
        mass: list[float] = []
        for number in count(1):
            meetings = {name: field.meetings() for name, field in fields.items()}
            if not any(meetings.values()):
                break
            found = self._contests(judge, texts, by_id, meetings, number, mass)
            for name, held in found.items():
                fields[name].take(held)
                contests[name] += held
        every = [one for held in contests.values() for one in held]
        judge.write("comparisons", every)
        scores: dict[str, float | None] = {}
        counts: dict[str, int] = {}
        for name, some in groups.items():
            known = [row.candidate_id for row in some.values()]
            of_prompt = self._scores(known, fields[name], contests[name], by_id)
            told = {text: of_prompt[row.candidate_id] for text, row in some.items()}
            verdicts = _verdicts_of(contests[name])
            for row in candidates:
                if row.prompt_id == name:
                    scores[row.candidate_id] = told[row.text]
                    counts[row.candidate_id] = verdicts.get(some[row.text].candidate_id, 0)
        rows = [
            _judgement(row, scores[row.candidate_id], counts[row.candidate_id])
            for row in candidates
        ]
        judge.write("judgements", rows)
        lengths = {name: len(row.text) for name, row in by_id.items()}
        return rows, contest_facts(every, lengths=lengths, mass=mass)

    def _field(self, prompt_id: str, rows: Sequence[Candidate]) -> Field:
        names = [row.candidate_id for row in rows]
        within = self.own.length_within
        if within is not None:
            lengths = {row.candidate_id: len(row.text) for row in rows}
            return AllPairs(names, lambda a, b: near(lengths[a], lengths[b], within))
        if len(names) <= self.own.all_pairs:
            return AllPairs(names)
        return Bracket(names, Random(f"{self.recipe.seed}/bracket/{prompt_id}"))

    def _contests(
        self,
        judge: JudgeAtWork,
        texts: Mapping[str, str],
        by_id: Mapping[str, Candidate],
        meetings: Mapping[str, Sequence[Meeting]],
        number: int,
        mass: list[float],
    ) -> dict[str, list[Contest]]:
        """The contests of a round; both orders of each are questions of their own."""
        asked, questions = self.question, []
        for prompt_id, some in meetings.items():
            for a, b in some:
                for one, other in ((a, b), (b, a)):
                    shown = by_id[one].text, by_id[other].text
                    text = asked.ask(texts[prompt_id], *shown)
                    questions.append(JudgeQuestion(f"{one}>{other}", text, prompt_id))
        later = f", round {number}" if number > 1 else ""
        p_first: dict[str, float | None] = {}
        said: dict[str, str] = {}
        if self.weighs:
            weighed = judge.weigh(
                questions,
                self.own.winners,
                about=f"comparison weights{later}",
                setting="pairwise.winners",
            )
            for name, likely in weighed.items():
                total = sum(likely.p or ())
                if likely.p is not None:
                    mass.append(total)
                told = likely.shares if total >= LEAST_MASS else None
                p_first[name] = None if told is None else round(told[0], 6)
        else:
            replies = judge.ask(questions, about=f"comparison replies{later}")
            for name, reply in replies.items():
                named = asked.read(reply.text, finish_reason=reply.finish_reason)
                p_first[name] = None if named is None else {"A": 1.0, "B": 0.0}.get(named, 0.5)
                said[name] = reply.text
        return {
            prompt_id: [
                Contest(
                    prompt_id,
                    a,
                    b,
                    p_first[f"{a}>{b}"],
                    None if (last := p_first[f"{b}>{a}"]) is None else round(1 - last, 6),
                    number if number > 1 else None,
                    said.get(f"{a}>{b}"),
                    said.get(f"{b}>{a}"),
                )
                for a, b in some
            ]
            for prompt_id, some in meetings.items()
        }

    def _scores(
        self,
        names: Sequence[str],
        field: Field,
        contests: Sequence[Contest],
        by_id: Mapping[str, Candidate],
    ) -> dict[str, float | None]:
        if len(names) == 1:  # its equals are itself
            return {names[0]: 0.5}
        if isinstance(field, Bracket):
            readable = {name for one in contests if one.readable for name in one.ids}
            return {
                name: round(score, 4) if name in readable else None
                for name, score in field.scores.items()
            }
        within = self.own.length_within
        lengths = None if within is None else {name: len(by_id[name].text) for name in names}
        soft = self.own.score == "probability"
        given = list(credits(contests, soft=soft, lengths=lengths, within=within or 0.0))
        found = (strengths if self.own.score == "bradley-terry" else shares)(names, given)
        return {name: None if score is None else round(score, 4) for name, score in found.items()}


def _verdicts_of(contests: Sequence[Contest]) -> dict[str, int]:
    """How many verdicts that can be read each candidate is part of."""
    found: dict[str, int] = {}
    for one in contests:
        for name in one.ids:
            found[name] = found.get(name, 0) + len(one.readable)
    return found


def _judgement(candidate: Candidate, score: float | None, verdicts: int) -> Judgement:
    if score is None:
        return no_verdict(candidate, verdicts=verdicts)
    return Judgement(candidate.candidate_id, 0, "", score, verdicts=verdicts)
