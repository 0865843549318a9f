"""The base in memory, once, and the roles that run on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_lite.config import Recipe
from srlm_lite.judging import Rubric, load_rubric
from srlm_lite.progress import Reporter, Silent
from srlm_lite.run_dir import RunDir

if TYPE_CHECKING:  # torch is imported when the base is first needed, and not before
    from srlm_lite.model.base import LoadedBase
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.model.stack import Adapter, Slot
    from srlm_lite.rollout.protocol import Engine


class Session:
    """A recipe at work in a run directory.

    Loading is lazy: a run whose stages are all complete never loads its base.
    """

    def __init__(self, recipe: Recipe, run: RunDir, reporter: Reporter | None = None) -> None:
        self.recipe, self.run = recipe, run
        self.reporter: Reporter = reporter or Silent()

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

    @cached_property
    def _engine(self) -> Engine:
        from srlm_lite.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(
            self.slot.model, self.chat, batch_rows=self.recipe.rollout.batch_rows
        )

    def engine(self, stack: Sequence[Adapter]) -> Engine:
        """The sampling engine with a stack in the slot."""
        self.slot.load(stack)
        return self._engine

    def stack(self, iteration: int) -> list[Adapter]:
        """The adapters of an iteration's model as they lie on disk; 0 is the anchor alone."""
        from srlm_lite.model.stack import Adapter

        stack = [Adapter.load(self.run.anchor.adapter)]
        if iteration:
            stack.append(Adapter.load(self.run.iteration(iteration).delta))
        return stack
