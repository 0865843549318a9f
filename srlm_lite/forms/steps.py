"""Step by step: the judge is asked of each step of an answer whether it is right, one prefill each.

An answer is split by its lines or its sentences. Of each step the judge sees the prompt and all
steps up to it, and what counts is the probability of its saying `right` and not `wrong`. The score
is their product, the least of them or their mean. Where answers to a prompt begin with the same
steps and part, the judge has compared the steps that follow: `steps.pairs` makes pairs of those.

Source: Zhang et al. 2025, arXiv:2503.03746 (process-based self-rewarding): step-wise judging, and
preference pairs of next steps behind the same prefix. Different here: it searches step by step,
six samples each, and lets the judge compare them with each other; here whole answers are sampled,
and steps are graded alone. Probability of one token, and product or minimum over the steps:
Lightman et al. 2023, arXiv:2305.20050, section 2.6.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from srlm_lite.declared import Facts, Phase, Sizes, Source, Weighs
from srlm_lite.forms.base import Form, JudgeAtWork, JudgeQuestion, PairsAtWork, Scale, no_verdict
from srlm_lite.forms.grade import LEAST_MASS
from srlm_lite.judging import Rubric
from srlm_lite.pairing import Drops, Scored, pair
from srlm_lite.questions import load_question
from srlm_lite.quoting import fill
from srlm_lite.records import (
    Candidate,
    Ids,
    JudgedStep,
    Judgement,
    PreferencePair,
    Prompt,
    Weighed,
)
from srlm_lite.settings import IsPath, Section
from srlm_lite.shipped import TEMPLATES

STEPS_TOLD = 8
"""Steps of an answer that `srlm-lite plan` counts with."""

TAKE_PAIRS = ("self-rewarding", "scir")
"""Methods that pair the policy's answers as the form says."""

SplitBy = Literal["lines", "sentences"]
Aggregate = Literal["product", "minimum", "mean"]


class StepsSettings(Section):
    """Form `steps`: each step of an answer is judged."""

    split: SplitBy = "lines"
    """What is a step: a line that holds text, or a sentence."""
    score: Aggregate = "product"
    """What becomes of the steps' probabilities of being right."""
    template: Annotated[str, IsPath(shipped=TEMPLATES)] = "step"
    """The question: name of a shipped template or a path."""
    options: tuple[str, str] = ("right", "wrong")
    """What the judge says of a step: the whole reply."""
    pairs: Literal["answers", "partings", "steps"] = "answers"
    """`answers`: the best answer against the worst, by score. `partings`: two answers that begin
    with the same right steps and part at one that only one of them gets right. `steps`: those two
    cut off behind that step, at every such parting."""
    min_gap: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Two steps behind the same prefix are told apart by more than this."""


_SENTENCE_END = re.compile(r"(?<!\w\.\w)(?<!\b[A-Z])[.!?…]+[\"')\]]*(?=\s+[^\sa-z])|\n+")
_LINE_END = re.compile(r"\n+")
_NUMBERED = re.compile(r"\W*(?:\d{1,3}|[A-Za-z])[.)]\s*")


def split_steps(text: str, by: SplitBy = "lines") -> list[str]:
    """The steps of an answer, each with the white space before it; together they are the text.

    By lines: those that hold text. By sentences: those and what ends in `.`, `!` or `?` before a
    word that does not go on small; the point of a number, of a list's number or of an initial ends
    none. What is blank at the end belongs to the last step.
    """
    end_of = _SENTENCE_END if by == "sentences" else _LINE_END
    ends = [match.end() for match in end_of.finditer(text)]
    steps: list[str] = []
    begin = 0
    blank = ""
    for end in [*ends, len(text)]:
        piece = blank + text[begin:end]
        begin = end
        numbered = by == "sentences" and end < len(text) and _NUMBERED.fullmatch(piece)
        if piece.strip() and not numbered:
            steps.append(piece)
            blank = ""
        else:
            blank = piece
    if blank and steps:
        steps[-1] += blank
    elif blank.strip():
        steps.append(blank)
    return steps


def step_score(right: Sequence[float], how: Aggregate) -> float:
    """The score of an answer, 0 to 1, of its steps' probabilities of being right.

    Raises:
        ValueError: There is no step.
    """
    if not right:
        raise ValueError("an answer without a step")
    if how == "product":
        return math.prod(right)
    return min(right) if how == "minimum" else fmean(right)


@dataclass(frozen=True, slots=True)
class Parting:
    """Where answers to a prompt that began with the same right steps go on differently.

    `before` is what they share; of the next steps the judge finds `right` the best and `wrong` the
    worst. `right_ids` and `wrong_ids` are the candidates that go on so.
    """

    before: tuple[str, ...]
    right: str
    wrong: str
    p_right: float
    p_wrong: float
    right_ids: tuple[str, ...]
    wrong_ids: tuple[str, ...]

    @property
    def gap(self) -> float:
        """By how much the judge tells the two apart."""
        return self.p_right - self.p_wrong


def partings(
    candidates: Sequence[Candidate],
    judged: Mapping[str, Sequence[JudgedStep]],
    *,
    min_gap: float = 0.0,
) -> list[Parting]:
    """All partings of a prompt's candidates, in the order in which answers come to them.

    Steps count as the same where they read the same. All steps of the prefix, and the better one
    behind it, are more likely right than wrong, and the worse one is not.

    Args:
        judged: The steps of each candidate, in order.
    """
    nodes: dict[tuple[str, ...], dict[str, tuple[float, list[str]]]] = {}
    for row in candidates:
        before: tuple[str, ...] = ()
        for step in judged.get(row.candidate_id, ()):
            if step.p_right is None:
                break
            text = step.text.strip()
            _, ids = nodes.setdefault(before, {}).setdefault(text, (step.p_right, []))
            ids.append(row.candidate_id)
            if step.p_right < 0.5:
                break  # what follows a mistake is compared with nothing
            before = (*before, text)
    found = []
    for before, ways in nodes.items():
        best = max(ways, key=lambda text: ways[text][0])
        worst = min(ways, key=lambda text: ways[text][0])
        (high, right_ids), (low, wrong_ids) = ways[best], ways[worst]
        if high >= 0.5 > low and high - low > min_gap:
            found.append(
                Parting(before, best, worst, high, low, tuple(right_ids), tuple(wrong_ids))
            )
    return found


class StepsForm(Form[StepsSettings]):
    """The probability that each step is right."""

    name = "steps"
    sources = (
        Source(
            "Zhang et al. 2025",
            "Process-based Self-Rewarding Language Models",
            "2503.03746",
            "steps graded alone, of whole answers",
        ),
        Source("Lightman et al. 2023", "Let's Verify Step by Step", "2305.20050", "their product"),
    )
    asks = "a verdict on each step of an answer, right or wrong"
    score = "probability of being right"
    section = "steps"
    Settings = StepsSettings
    labels: ClassVar[Mapping[str, str]] = {
        "split": "a step is",
        "score": "score of an answer",
        "pairs": "pairs of",
    }
    figures: ClassVar[Mapping[str, str]] = {
        "judged_steps": "steps judged",
        "right_steps": "share of steps judged right",
    }

    @property
    def weighs(self) -> bool:
        """Always."""
        return True

    def scale(self, rubric: Rubric) -> Scale:
        """From 0 to 1, as a probability is."""
        return 0.0, 1.0

    def needs(self) -> None:
        """A method that takes the form's pairs, and two options that differ."""
        one, other = self.own.options
        if not one.strip() or one.strip() == other.strip():
            raise ValueError("steps.options are two different replies")
        if self.own.pairs != "answers" and self.recipe.method not in TAKE_PAIRS:
            raise ValueError(
                f"method {self.recipe.method} makes pairs of its own; leave steps.pairs at answers"
            )

    def preflight(self) -> None:
        """The question."""
        load_question("step", self.own.template)

    def phases(self, sizes: Sizes, *, prompts: int, answers: int, at_once: int) -> Iterator[Phase]:
        """One reading a step; how many an answer has nobody knows before."""
        yield Weighs("judge (steps)", at_once, sizes.question, answers * STEPS_TOLD)

    def judge(
        self, judge: JudgeAtWork, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """A verdict on every distinct beginning of the answers to a prompt, and their scores."""
        template = load_question("step", self.own.template)
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        asked: dict[tuple[str, tuple[str, ...]], JudgeQuestion] = {}
        beginnings: dict[str, list[tuple[str, ...]]] = {}
        for row in candidates:
            steps = split_steps(row.text, self.own.split)
            beginnings[row.candidate_id] = found = []
            for count in range(1, len(steps) + 1):
                begun = tuple(step.strip() for step in steps[:count])
                found.append(begun)
                if (row.prompt_id, begun) not in asked:
                    shown = {
                        "prompt": texts[row.prompt_id],
                        "steps": "".join(steps[:count]).strip(),
                    }
                    name = f"{row.candidate_id}/{count}"
                    text = fill(template, shown, ())
                    asked[row.prompt_id, begun] = JudgeQuestion(name, text, row.prompt_id)
        weighed = judge.weigh(
            list(asked.values()), self.own.options, about="step weights", setting="steps.options"
        )
        verdicts = {key: _right(weighed[one.name]) for key, one in asked.items()}
        rows: list[JudgedStep] = []
        judgements = []
        for row in candidates:
            of_row = [
                JudgedStep(row.candidate_id, at, begun[-1], verdicts[row.prompt_id, begun])
                for at, begun in enumerate(beginnings[row.candidate_id])
            ]
            rows += of_row
            unread = [
                begun
                for begun in beginnings[row.candidate_id]
                if weighed[asked[row.prompt_id, begun].name].p is None
            ]
            judgements.append(self._judgement(row, of_row, too_long=bool(unread)))
        judge.write("judged_steps", rows)
        judge.write("judgements", judgements)
        known = [row.p_right for row in rows if row.p_right is not None]
        facts: Facts = {"judged_steps": len(rows), "step_questions": len(asked)}
        if known:
            facts["right_steps"] = round(sum(p >= 0.5 for p in known) / len(known), 4)
        return judgements, facts

    def _judgement(
        self, candidate: Candidate, steps: Sequence[JudgedStep], *, too_long: bool
    ) -> Judgement:
        known = [step.p_right for step in steps if step.p_right is not None]
        if len(known) < len(steps) or not steps:
            return no_verdict(candidate, too_long=too_long)
        said = "\n".join(f"{p:.2f} {step.text}" for p, step in zip(known, steps, strict=True))
        score = round(step_score(known, self.own.score), 4)
        return Judgement(candidate.candidate_id, 0, said, score)

    def pairs(
        self,
        work: PairsAtWork,
        prompts: Sequence[Prompt],
        usable: Mapping[str, Sequence[Scored]],
        drops: Drops,
    ) -> list[PreferencePair] | None:
        """Pairs at partings, where the recipe wants those.

        A prompt without a parting is counted in `drops` as `no_parting`.
        """
        if self.own.pairs == "answers":
            return None
        judged: dict[str, list[JudgedStep]] = {}
        for row in work.read("judged_steps", JudgedStep):
            judged.setdefault(row.candidate_id, []).append(row)
        made: list[PreferencePair] = []
        for prompt in (one for one in prompts if one.prompt_id in usable):
            scored = usable[prompt.prompt_id]
            found = partings([row for row, _ in scored], judged, min_gap=self.own.min_gap)
            if not found:
                drops.prompts["no_parting"] += 1
            elif self.own.pairs == "partings":
                made.append(whole_pair(prompt, scored, max(found, key=lambda one: one.gap)))
            else:
                made += [
                    step_pair(prompt, scored, one, self.own.split, work.unended) for one in found
                ]
        return made


def whole_pair(prompt: Prompt, scored: Sequence[Scored], parting: Parting) -> PreferencePair:
    """The best answer that goes on right at a parting against the worst that goes on wrong."""
    right = [one for one in scored if one[0].candidate_id in parting.right_ids]
    wrong = [one for one in scored if one[0].candidate_id in parting.wrong_ids]
    return pair(prompt, max(right, key=_score), min(wrong, key=_score))


def step_pair(
    prompt: Prompt,
    scored: Sequence[Scored],
    parting: Parting,
    split: SplitBy,
    unended: Callable[[str], Ids],
) -> PreferencePair:
    """The two steps of a parting, each behind what both answers begin with, and without an end.

    What they begin with is as likely in both, so DPO learns the step alone.

    Args:
        unended: Ids of a text that goes on.
    """
    by_id = {one[0].candidate_id: one[0] for one in scored}
    count = len(parting.before) + 1
    cut = [
        "".join(split_steps(by_id[name].text, split)[:count]).strip()
        for name in (parting.right_ids[0], parting.wrong_ids[0])
    ]
    whole = pair(
        prompt,
        (by_id[parting.right_ids[0]], parting.p_right),
        (by_id[parting.wrong_ids[0]], parting.p_wrong),
    )
    return replace(
        whole,
        chosen=cut[0],
        rejected=cut[1],
        chosen_ids=unended(cut[0]),
        rejected_ids=unended(cut[1]),
    )


def _score(one: Scored) -> float:
    return one[1]


def _right(weighed: Weighed) -> float | None:
    """How likely the judge finds a step right; None where it would say neither."""
    shares = weighed.shares
    if shares is None or sum(weighed.p or ()) < LEAST_MASS:
        return None
    return round(shares[0], 4)
