"""What a run keeps of its stages: a row in `metrics.jsonl` for each, and `done.json` at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from srlm_lite.evaluate.gate import findings
from srlm_lite.run.layout import StageDir
from srlm_lite.session import Session
from srlm_lite.stages.evaluation import evaluations

T = TypeVar("T")


class StageLog:
    """Runs the stages of the anchor or of one iteration, and records them."""

    def __init__(self, session: Session, directory: StageDir, *, iteration: int) -> None:
        self._session, self._directory, self._iteration = session, directory, iteration
        self._seen: dict[Path, tuple[int, int, str]] = {}
        directory.path.mkdir(parents=True, exist_ok=True)

    def run(self, stage: str, function: Callable[[], tuple[T, dict[str, Any]]]) -> T:
        """Run a stage; a stage that an earlier start has finished gives its result again.

        Args:
            function: Gives the result and the facts for `metrics.jsonl`.
        """
        begin = time.monotonic()
        result, facts = function()
        self._directory.note(self._seen)
        seconds = round(time.monotonic() - begin, 2)
        if stage in self._finished():
            return result
        row = {"iteration": self._iteration, "stage": stage, "seconds": seconds, **facts}
        self._session.run.add_metrics(row)
        self._session.tracker.stage()
        self._session.reporter.finish(self._iteration, stage, facts, seconds)
        return result

    def finish(self) -> None:
        """Warn of what the evaluation shows, and close the folder with `done.json`."""
        measured = evaluations(self._session.run, self._iteration)
        for found in findings(measured, self._session.recipe.evaluate.gate):
            self._session.reporter.warn(found.text)
        rows = self._finished()
        self._directory.finish(
            iteration=self._iteration,
            seconds=round(sum(row["seconds"] for row in rows.values()), 2),
            counts={
                stage: {key: value for key, value in row.items() if isinstance(value, int)}
                for stage, row in rows.items()
                if stage != "evaluation"
            },
        )

    def _finished(self) -> dict[str, dict[str, Any]]:
        return {
            row["stage"]: row
            for row in self._session.run.read_metrics()
            if row["iteration"] == self._iteration
        }
