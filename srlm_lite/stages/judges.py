"""A judge at work, on a session: what a form of judging asks by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from srlm_lite.declared import Facts
from srlm_lite.forms import form_of
from srlm_lite.forms.adaptive import START, Rule, pooled_variance, wanted
from srlm_lite.forms.base import JudgeAtWork, JudgeQuestion
from srlm_lite.judging import Rubric
from srlm_lite.records import Candidate, Judgement, Prompt, RankedReply, Record, Reply, Weighed
from srlm_lite.run.files import read_records, write_records
from srlm_lite.session import Session
from srlm_lite.stages.sampling import ask, judge_replies, limits_of
from srlm_lite.stages.weighing import weigh

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

R = TypeVar("R", bound=Record)
Place = Callable[[str], Path]
"""The file of a name; `judgements` is that of the judgements themselves."""


class SessionJudge(JudgeAtWork):
    """A stack in the judge's role.

    Args:
        place: Where its files go.
        stage: What the judging is called while it goes on.
        seed_path: What its seeds come of.
        shared: Where files go that all judgings share; default: the run's.
        votes: Votes on a candidate; default: `judge.votes`.
        every_vote: All of them are drawn, whatever `judge.adaptive_votes` says: somebody is going
            to look at each.
    """

    def __init__(
        self,
        session: Session,
        stack: Sequence[Adapter],
        *,
        place: Place,
        stage: str,
        seed_path: Sequence[object],
        shared: Place | None = None,
        votes: int | None = None,
        every_vote: bool = False,
    ) -> None:
        self._session, self._stack, self._place = session, stack, place
        self._shared = shared or session.run.shared
        self._stage, self._seed_path = stage, seed_path
        self._votes = votes or session.recipe.judge.votes
        self._adapts = session.recipe.judge.adaptive_votes and not every_vote
        self.recipe = session.recipe
        self.where = str(place("judgements").parent)

    @property
    def rubric(self) -> Rubric:
        """See `JudgeAtWork`; as all verbs."""
        return self._session.rubric

    def vote(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        if not self._adapts:
            return self._voted(prompts, candidates, self._votes, self._place("judgements")), {}
        judge = self.recipe.judge
        numbers = {row.candidate_id: range(min(START, self._votes)) for row in candidates}
        rows: dict[str, list[Judgement]] = {name: [] for name in numbers}
        for number in count(1):
            asked = [row for row in candidates if numbers[row.candidate_id]]
            if not asked:
                break
            path = self._file(f"votes_{number}")
            for row in self._voted(prompts, asked, numbers, path):
                rows[row.candidate_id].append(row)
            votes = {name: [row.score for row in some] for name, some in rows.items()}
            rule = Rule(
                total=self._votes,
                least=min(judge.min_votes, self._votes),
                scale=(self.rubric.min, self.rubric.max),
                variance=pooled_variance(votes),
                step=self.rubric.step or 1.0,
            )
            wanting = set(wanted(rule, candidates, votes))
            numbers = {
                name: range(
                    len(some),
                    min(self._votes, len(some) + rule.at_once) if name in wanting else len(some),
                )
                for name, some in votes.items()
            }
        every = [vote for row in candidates for vote in rows[row.candidate_id]]
        write_records(self._place("judgements"), every)
        most = self._votes * len(candidates)
        return every, {"votes_drawn": round(len(every) / most, 4) if most else None}

    def _voted(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        votes: int | Mapping[str, range],
        path: Path,
    ) -> list[Judgement]:
        recipe = self.recipe
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        return judge_replies(
            self._session,
            self._stack,
            [(row.candidate_id, texts[row.prompt_id], row.text) for row in candidates],
            path=path,
            stage=self._stage,
            votes=votes,
            chunk=recipe.rollout.chunk_prompts * recipe.rollout.n,
            seed_path=self._seed_path,
        )

    def ask(
        self, questions: Sequence[JudgeQuestion], *, about: str, max_new_tokens: int | None = None
    ) -> dict[str, Reply]:
        return ask(
            self._session,
            self._stack,
            [(one.name, one.text) for one in questions],
            path=self._file(about),
            stage=self._called(about),
            limits=limits_of(self.recipe.judge, max_new_tokens=max_new_tokens),
            seed_path=(*self._seed_path, about),
        )

    def weigh(
        self,
        questions: Sequence[JudgeQuestion],
        options: Sequence[str],
        *,
        about: str,
        setting: str,
    ) -> dict[str, Weighed]:
        return weigh(
            self._session,
            self._stack,
            questions,
            options,
            path=self._file(about),
            stage=self._called(about),
            setting=setting,
        )

    def length(self, text: str) -> int:
        return len(self._session.chat.target_ids(text))

    def write(self, name: str, rows: Sequence[Record], *, shared: bool = False) -> None:
        path = self._shared(name) if shared else self._place(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, rows)

    def read(self, name: str, kind: type[R], *, shared: bool = False) -> list[R] | None:
        path = self._shared(name) if shared else self._place(name)
        return read_records(path, kind) if path.is_file() else None

    def _file(self, about: str) -> Path:
        path = self._place(about.replace(" ", "_").replace(",", ""))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _called(self, about: str) -> str:
        """What a part of the judging is called while it goes on."""
        return f"{self._stage}: {about}"


def as_candidates(rows: Sequence[RankedReply]) -> tuple[list[Prompt], list[Candidate]]:
    """Ranked replies as a judge takes them: their prompts, and they themselves."""
    prompts = {row.prompt_id: Prompt.of(row) for row in rows}
    return list(prompts.values()), [
        Candidate(row.prompt_id, row.response_id, row.response, 0, "stop") for row in rows
    ]


def judged(
    session: Session,
    stack: Sequence[Adapter],
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    *,
    place: Place,
    stage: str,
    seed_path: Sequence[object],
    shared: Place | None = None,
    votes: int | None = None,
    every_vote: bool = False,
) -> tuple[list[Judgement], Facts]:
    """The judgements of a stack on candidates, in the recipe's form; see `SessionJudge`."""
    judge = SessionJudge(
        session,
        stack,
        place=place,
        stage=stage,
        seed_path=seed_path,
        shared=shared,
        votes=votes,
        every_vote=every_vote,
    )
    return form_of(session.recipe).judge(judge, prompts, candidates)
