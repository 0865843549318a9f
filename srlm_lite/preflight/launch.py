"""A run as it is about to be started, and what a check of it finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from srlm_lite.recipe import Recipe
from srlm_lite.run.run import RunDir

if TYPE_CHECKING:
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.planning.plan import Plan


@dataclass(frozen=True)
class Launch:
    """A recipe in a run directory, on so many processes.

    Args:
        run: Where it is to run; None where nobody has said.
        fresh: What is there is to go.
        planned: A plan that cannot fit stops it.
        processes: That a launcher has started.
        sharded: The base is spread over them; else each holds it whole.
    """

    recipe: Recipe
    run: RunDir | None = None
    fresh: bool = False
    planned: bool = True
    processes: int = 1
    sharded: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether it goes on with what an earlier start has written."""
        return self.begun is not None

    @property
    def begun(self) -> RunDir | None:
        """The run that it goes on with; None where it starts anew."""
        run = self.run
        return run if run is not None and not self.fresh and run.is_begun else None

    @property
    def is_finished(self) -> bool:
        """Whether all that the recipe wants is there already: nothing is loaded, or asked."""
        run = self.begun
        return run is not None and run.anchor.is_done and run.last_done() >= self.recipe.iterations

    @cached_property
    def plan(self) -> Plan:
        """What the recipe takes of this machine.

        Raises:
            UserError: Nothing is known of the base's shape, or a LoRA target is not of it.
        """
        from srlm_lite.planning.machine import hardware_found, plan_for

        shards = self.processes if self.sharded else 1
        return plan_for(self.recipe, replace(hardware_found(self.recipe), shards=shards))

    @cached_property
    def chat(self) -> ChatFormat | None:
        """How the base is going to be spoken to; None where its files are not here to tell.

        Raises:
            UserError: As `ChatFormat`.
        """
        from srlm_lite.model.base import spoken_here
        from srlm_lite.model.chat import ChatFormat

        section, run = self.recipe.base, self.run
        noted = (None, None) if run is None else (run.base_revision, run.base_conversion)
        try:
            found = spoken_here(section, revision=noted[0], conversion=noted[1])
        except Exception:  # loading the base will say what is wrong with it
            return None
        if found is None:
            return None
        tokenizer, ends = found
        return ChatFormat(
            tokenizer,
            template=section.chat_template,
            settings=section.chat_template_kwargs,
            system=section.system,
            stop_ids=ends,
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """What a check has found where nothing stands in the way.

    Args:
        text: What was looked at, in a few words.
        warnings: What bodes ill, a line each.
        asked: False where there was nothing to ask.
    """

    text: str
    warnings: tuple[str, ...] = ()
    asked: bool = True
