"""How a stage tells whoever is watching how far it is."""

from __future__ import annotations

from typing import Any, Protocol


class Task(Protocol):
    """One long stage."""

    def advance(self, count: int = 1) -> None:
        """So many more units are done."""

    def note(self, text: str) -> None:
        """A few words beside the bar, such as the current loss."""


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


class _SilentTask:
    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Silent:
    """Shows nothing."""

    def start(self, stage: str, total: int, unit: str) -> Task:
        return _SilentTask()

    def finish(self, iteration: int, stage: str, facts: dict[str, Any], seconds: float) -> None:
        pass

    def warn(self, text: str) -> None:
        pass
