"""The base in memory, once, and the roles that run on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from srlm_lite.config import EngineName, Recipe
from srlm_lite.judging import Rubric, load_rubric
from srlm_lite.progress import Reporter, Silent
from srlm_lite.run_dir import RunDir

if TYPE_CHECKING:  # torch is imported when the base is first needed, and not before
    from srlm_lite.model.base import LoadedBase
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.model.stack import Adapter, Slot
    from srlm_lite.rollout.protocol import Engine

Role = Literal["policy", "judge", "teacher"]
"""What a stack is asked to do; each role may have an engine of its own. A teacher is another
model, behind the server of the section `openai`."""


class Session:
    """A recipe at work in a run directory.

    Loading is lazy: a run whose stages are all complete never loads its base.
    """

    def __init__(self, recipe: Recipe, run: RunDir, reporter: Reporter | None = None) -> None:
        self.recipe, self.run = recipe, run
        self.reporter: Reporter = reporter or Silent()
        self._engines: dict[EngineName, Engine] = {}

    @cached_property
    def rubric(self) -> Rubric:
        return load_rubric(self.recipe.judge.rubric)

    @cached_property
    def base(self) -> LoadedBase:
        from srlm_lite.model.base import load_base

        base = load_base(self.recipe.base)
        self.run.hold_to_base(base.source)
        return base

    @cached_property
    def chat(self) -> ChatFormat:
        from srlm_lite.model.chat import ChatFormat

        return ChatFormat.of(self.base, template=self.recipe.base.chat_template)

    @cached_property
    def slot(self) -> Slot:
        from srlm_lite.model.base import check_targets
        from srlm_lite.model.stack import Slot

        recipe = self.recipe
        shipped = self.shipped_anchor
        rank = recipe.anchor.lora.rank if shipped is None else shipped.rank
        targets = tuple(dict.fromkeys((*recipe.anchor.lora.targets, *recipe.dpo.lora.targets)))
        check_targets(self.base.model, targets)
        return Slot(
            self.base.model,
            targets=targets,
            rank=rank + recipe.dpo.lora.rank,
            fold=recipe.rollout.fold,
        )

    @cached_property
    def shipped_anchor(self) -> Adapter | None:
        """The anchor the recipe starts from, or None when the run trains its own."""
        from srlm_lite.model.stack import Adapter

        init = self.recipe.anchor.init
        return None if init == "base" else Adapter.load(Path(init))

    def engine(self, stack: Sequence[Adapter], role: Role = "policy") -> Engine:
        """The sampling engine of a role, with a stack loaded."""
        rollout, judge = self.recipe.rollout, self.recipe.judge
        name = rollout.engine if role == "policy" else judge.engine or rollout.engine
        if role == "teacher":
            name = "openai"
        if name not in self._engines:
            self._engines[name] = self._make_engine(name)
        engine = self._engines[name]
        engine.load(stack)
        return engine

    def _make_engine(self, name: EngineName) -> Engine:
        recipe = self.recipe
        if name == "openai":
            from srlm_lite.rollout.openai_engine import OpenAIEngine

            if recipe.rollout.engine == name and recipe.iterations > 1:
                self.reporter.warn(
                    "rollout.engine=openai: the candidates of every iteration come from the "
                    "server's model, which learns nothing from this run"
                )
            return OpenAIEngine(recipe.openai)
        rows = None if recipe.rollout.batch_rows == "auto" else recipe.rollout.batch_rows
        if name == "vllm":
            from srlm_lite.rollout.vllm_engine import VllmEngine

            return VllmEngine(
                self.base,
                self.chat,
                recipe.base,
                memory=recipe.vllm.memory,
                batch_rows=rows,
                rank=self.slot.rank,
                scratch=self.run.scratch,
                log=self.run.vllm_log,
            )
        from srlm_lite.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(self.slot, self.chat, batch_rows=rows)

    def close_engines(self) -> None:
        """Give back the memory of sampling, before a training needs it."""
        for engine in self._engines.values():
            engine.close()

    def stack(self, iteration: int, role: Role = "policy") -> list[Adapter]:
        """The adapters of an iteration's model as they lie on disk; 0 is the anchor alone.

        Where the judge has deltas of its own, its last one stands in the policy's place.
        """
        from srlm_lite.model.stack import Adapter

        stack = [Adapter.load(self.run.anchor.adapter)]
        deltas = [self.run.iteration(iteration).delta] if iteration else []
        if role == "judge" and self.recipe.judge_has_deltas:
            places = [self.run.iteration(t).judge_place for t in range(iteration, 0, -1)]
            deltas = [place.adapter for place in places if place.training.is_file()][:1]
        return [*stack, *(Adapter.load(path) for path in deltas)]
