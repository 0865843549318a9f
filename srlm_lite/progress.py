"""How a stage tells whoever is watching how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Task(Protocol):
    """One long stage."""

    def advance(self, count: int = 1) -> None:
        """So many more units are done."""

    def note(self, text: str) -> None:
        """A few words beside the bar, such as the current loss."""

    def restart(self) -> None:
        """What is done so far was done before the stage began, and says nothing of its pace."""


class Reporter(Protocol):
    """Receives progress; what it shows is its own affair."""

    def start(self, stage: str, total: int, unit: str) -> Task:
        """A stage begins."""
        ...

    def finish(self, iteration: int, stage: str, facts: dict[str, Any], seconds: float) -> None:
        """A stage of an iteration (0 is the anchor) has ended, with these facts."""
        ...

    def warn(self, text: str) -> None:
        """Something the user should know."""
        ...

    def say(self, text: str) -> None:
        """A line of what goes on."""
        ...


class _SilentTask:
    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def restart(self) -> None:
        pass


class Silent:
    """Shows nothing."""

    def start(self, stage: str, total: int, unit: str) -> Task:
        return _SilentTask()

    def finish(self, iteration: int, stage: str, facts: dict[str, Any], seconds: float) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Training:
    """Which training of a run: of which iteration, 0 for what precedes the first, and of what."""

    iteration: int
    name: str


class Tracker(Protocol):
    """Passes a run's figures on to programs that draw them."""

    def step(self, training: Training, step: int, logs: Mapping[str, float]) -> None:
        """A step of the optimiser, counted from 1, with what the trainer logged of it."""

    def stage(self) -> None:
        """A stage has ended: `metrics.jsonl` has a new row."""


class Untracked:
    """Passes on nothing."""

    def step(self, training: Training, step: int, logs: Mapping[str, float]) -> None:
        pass

    def stage(self) -> None:
        pass
