"""One absolute grade a candidate, by the rubric: sampled votes after reasons, or a single prefill.

With `judge.rationale: false` the judge writes nothing. Its reply is begun for it, `Score: `, and
the score is the mean of the whole scores that it would go on with, by their probability. That takes
one reading of the question in place of several written judgements, and ties hardly occur.

Source: Yuan et al. 2024, arXiv:2401.10020, for sampled votes; Liu et al. 2023 (G-Eval),
arXiv:2303.16634, section 2, for scores weighted by their probability; Wang et al. 2025,
arXiv:2503.03064, for the mean of the distribution without reasons before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from srlm_lite.declared import Draws, Facts, NoSettings, Phase, Sizes, Source, Weighs
from srlm_lite.forms.base import Form, JudgeAtWork, JudgeQuestion, no_verdict
from srlm_lite.judging import whole_scores
from srlm_lite.records import Candidate, Judgement, Prompt, Weighed

LEAST_MASS = 0.01
"""Probability that a score, or another of the options, has to have in all for the judge to have
said anything: below, it would go on with something else."""


class GradeForm(Form[NoSettings]):
    """Votes on each candidate alone."""

    name = "grade"
    sources = (
        Source("Yuan et al. 2024", "Self-Rewarding Language Models", "2401.10020"),
        Source(
            "Wang et al. 2025",
            "Improving LLM-as-a-Judge Inference with the Judgment Distribution",
            "2503.03064",
            "without rationale",
        ),
    )
    asks = "a grade of each answer alone, by the rubric"

    @property
    def min_votes(self) -> int:
        """As the recipe says; without a rationale there is one judgement."""
        return self.recipe.judge.min_votes if self.recipe.judge.rationale else 1

    @property
    def weighs(self) -> bool:
        """Where nothing is written."""
        return not self.recipe.judge.rationale

    def phases(self, sizes: Sizes, *, prompts: int, answers: int, at_once: int) -> Iterator[Phase]:
        """The votes on each candidate, or one reading."""
        judge = self.recipe.judge
        if not judge.rationale:
            yield Weighs("judge (prefill)", at_once, sizes.question, answers)
            return
        texts = answers * judge.votes
        yield Draws("judge", at_once, judge.votes, sizes.question, sizes.judgement, texts, "judge")

    def judge(
        self, judge: JudgeAtWork, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """Sampled votes, or expected scores."""
        if self.recipe.judge.rationale:
            return judge.vote(prompts, candidates)
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        questions = [
            JudgeQuestion(
                row.candidate_id,
                judge.rubric.render(prompt=texts[row.prompt_id], response=row.text),
            )
            for row in candidates
        ]
        scores = whole_scores(judge.rubric)
        found = judge.weigh(
            questions,
            [f"Score: {score}" for score in scores],
            about="score weights",
            setting="judge.rubric",
        )
        rows = [expected(row, found[row.candidate_id], scores) for row in candidates]
        judge.write("judgements", rows)
        return rows, {}


def expected(candidate: Candidate, weighed: Weighed, scores: Sequence[int]) -> Judgement:
    """The judgement whose score is the mean by probability: sum(s p(s)) / sum(p(s)).

    `sampled_score` and the text are the likeliest score. Unreadable where the judge would
    hardly go on with a score at all.
    """
    shares = weighed.shares
    if shares is None or sum(weighed.p or ()) < LEAST_MASS:
        return no_verdict(candidate, too_long=weighed.p is None)
    mean = sum(score * share for score, share in zip(scores, shares, strict=True))
    likeliest = scores[shares.index(max(shares))]
    return Judgement(
        candidate.candidate_id,
        0,
        f"Score: {likeliest}",
        round(mean, 4),
        sampled_score=float(likeliest),
    )
