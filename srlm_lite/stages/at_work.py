"""An iteration as a method's stages see it, on a session and a run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from srlm_lite.engines import Role
from srlm_lite.forms.base import JudgeQuestion
from srlm_lite.judging import Rubric
from srlm_lite.methods import method_of
from srlm_lite.methods.base import Facts, Iteration, Model, MorePrompts
from srlm_lite.pairing import Drops
from srlm_lite.records import (
    Candidate,
    Ids,
    Instruction,
    Judgement,
    Likelihood,
    PreferencePair,
    Prompt,
    Record,
    Reply,
    Weighed,
)
from srlm_lite.run.files import read_records, write_records
from srlm_lite.run.layout import DeltaPlace, IterationDir
from srlm_lite.session import Session
from srlm_lite.settings import Consistency, Dpo, Optim
from srlm_lite.stages import learning, pairs, prompts, reward
from srlm_lite.stages.judges import judged
from srlm_lite.stages.likelihood import candidate_likelihoods
from srlm_lite.stages.replies import read_as_reply
from srlm_lite.stages.sampling import ask, limits_of, sample_candidates
from srlm_lite.stages.seed_data import FilesOfRecipe
from srlm_lite.stages.weighing import weigh

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

R = TypeVar("R", bound=Record)


class AtWork(Iteration):
    """The verbs of an iteration, each on the stage that does it."""

    def __init__(self, session: Session, directory: IterationDir) -> None:
        self._session, self._directory = session, directory
        self.recipe, self.number = session.recipe, directory.number
        self.where = str(directory.path)

    @cached_property
    def data(self) -> FilesOfRecipe:
        """The seed data."""
        return FilesOfRecipe(self._session.recipe)

    @property
    def rubric(self) -> Rubric:
        """What the judge is asked by."""
        return self._session.rubric

    def prompts(
        self, pool: prompts.ReadPool, *, more: MorePrompts | None = None
    ) -> tuple[list[Prompt], Facts]:
        """See `Iteration`; as all verbs."""
        return prompts.prompts(self._session, self._directory, pool, more)

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int | None = None,
        by: Model | None = None,
        kind: str = "",
    ) -> list[Candidate]:
        by = by or self.policy
        rollout = self.recipe.rollout
        is_taught = by.deltas == "teacher"
        role: Role = "teacher" if is_taught else "policy"
        # A teacher's stage has always been called by its kind alone, and the seeds come of it.
        stage = kind if is_taught else f"{kind} candidates".strip()
        return sample_candidates(
            self._session,
            self._stack(by),
            prompts,
            path=self._file(kind, "candidates"),
            stage=stage,
            sampling=rollout,
            n=n or rollout.n,
            seed_path=(self.recipe.seed, self.number, stage),
            tag=f"{kind}-" if kind else "",
            role=role,
        )

    def judged(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        *,
        by: Model | None = None,
        kind: str = "",
    ) -> tuple[list[Judgement], Facts]:
        recipe, stage = self.recipe, f"{kind} judgements".strip()
        asked = [
            row
            for row in candidates
            if row.text and not (recipe.pairing.drop_truncated and row.finish_reason == "length")
        ]
        return judged(
            self._session,
            self._stack(by or self.judge),
            prompts,
            asked,
            place=lambda name: self._file(kind, name),
            stage=stage,
            seed_path=(recipe.seed, self.number, stage),
        )

    def ask(
        self,
        questions: Sequence[tuple[str, str]],
        *,
        about: str,
        by: Model,
        max_new_tokens: int | None = None,
        turn: str = "",
        seeded: Sequence[object] = (),
        to_learn: bool = False,
    ) -> dict[str, Reply]:
        section = self.recipe.rollout if to_learn else self.recipe.judge
        return ask(
            self._session,
            self._stack(by),
            questions,
            path=self._directory.asked(turn) if turn else self._directory.replies,
            stage=about,
            limits=limits_of(section, max_new_tokens=max_new_tokens),
            seed_path=(self.recipe.seed, self.number, *(seeded or (about,))),
            role="policy" if to_learn else "judge",
            learned=to_learn,
        )

    def weigh(
        self,
        questions: Sequence[JudgeQuestion],
        options: Sequence[str],
        *,
        about: str,
        by: Model,
        setting: str,
    ) -> dict[str, Weighed]:
        return weigh(
            self._session,
            self._stack(by),
            questions,
            options,
            path=self._file("", about.replace(" ", "_")),
            stage=about,
            setting=setting,
        )

    def likelihoods(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        *,
        by: Model,
        name: str,
        questions: bool = False,
    ) -> dict[str, Likelihood]:
        path, stack = self._directory.likelihoods / f"{name}.jsonl", self._stack(by)
        return candidate_likelihoods(
            self._session, stack, prompts, candidates, path=path, questions=questions
        )

    def as_answer(self, candidate: Candidate) -> Candidate:
        return read_as_reply(self._session.chat, candidate)

    def length(self, text: str) -> int:
        return len(self._session.chat.target_ids(text))

    def unended(self, text: str) -> Ids:
        return tuple(self._session.chat.target_ids(text))[:-1]

    def write(self, name: str, rows: Sequence[Record]) -> None:
        write_records(self._directory.file(name), rows)

    def read(self, name: str, kind: type[R]) -> list[R]:
        return read_records(self._directory.file(name), kind)

    def fitting(self, made: Sequence[PreferencePair]) -> list[PreferencePair]:
        return pairs.fitting_pairs(self._session, made)

    def older(self) -> list[PreferencePair]:
        if not method_of(self._session.recipe).accumulates:
            return []
        found, _ = pairs.older_pairs(self._session, self._directory, self._grade_older, new=0)
        return found

    def keep(
        self,
        made: Sequence[PreferencePair],
        drops: Drops,
        *,
        advice: Mapping[str, str],
        origin: str = "",
    ) -> tuple[list[PreferencePair], Facts]:
        return pairs.keep_pairs(
            self._session,
            self._directory,
            made,
            drops,
            advice=advice,
            grade=self._grade_older,
            origin=origin,
        )

    def keep_none(self) -> tuple[list[PreferencePair], Facts]:
        return pairs.keep_none(self._directory)

    def learn(
        self,
        made: Sequence[PreferencePair],
        *,
        dpo: Dpo | None = None,
        called: Literal["delta", "judge delta", "provisional"] = "delta",
        consistency: Consistency | None = None,
    ) -> Facts:
        return learning.dpo_delta(
            self._session,
            self._directory,
            made,
            dpo=dpo,
            place=self._place(called),
            consistency=consistency,
            role="judge" if called == "judge delta" else "policy",
        )

    def stay(self) -> None:
        learning.same_delta(self._session, self._directory)

    def imitate(self, rows: Sequence[Instruction], *, optim: Optim, about: str = "SFT") -> Facts:
        return learning.sft_delta(self._session, self._directory, rows, optim=optim, about=about)

    def reward_model(self, *, optim: Optim, pairs: reward.Kind) -> tuple[object, Facts]:
        return reward.reward_model(self._session, optim=optim, pairs=pairs)

    def reinforce(self, prompts: Sequence[Prompt], *, reward: Any, kl_weight: float) -> Facts:
        return learning.rloo_delta(
            self._session, self._directory, prompts, reward, kl_weight=kl_weight
        )

    def _grade_older(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> list[Judgement]:
        return self.grade(prompts, candidates, kind="older")

    def _stack(self, model: Model) -> list[Adapter]:
        """The adapters of a model, from disk."""
        if model.after is None:
            return []
        if model.deltas == "provisional":
            from srlm_lite.model.stack import Adapter

            place = self._directory.provisional_place
            return [*self._session.stack(0), Adapter.load(place.adapter)]
        return self._session.stack(model.after, "judge" if model.deltas == "judge" else "policy")

    def _file(self, kind: str, of: str) -> Path:
        return self._directory.file(f"{kind}_{of}" if kind else of)

    def _place(self, called: str) -> DeltaPlace:
        return {place.name: place for place in self._directory.delta_places}[called]
