"""How a stage keeps its training while it goes on, and lets go of it when its result is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from srlm_lite.progress import Task, Training
from srlm_lite.session import Session
from srlm_lite.stopping import deferred

if TYPE_CHECKING:
    from srlm_lite.training.checkpoint import Checkpoints


@contextmanager
def kept(session: Session) -> Iterator[None]:
    """A training and the writing of its result, in the first process.

    Ctrl-C and SIGTERM stop the training after a step, or what follows it when all is written.
    """
    with deferred():
        yield
        session.run.checkpoint.drop()


def checkpoints(session: Session, training: Training, about: str, task: Task) -> Checkpoints:
    """Where a training is kept, in each of the processes that do it."""
    from srlm_lite.training.checkpoint import Checkpoints

    return Checkpoints(
        session.run.checkpoint,
        asdict(training),
        about,
        60 * session.recipe.checkpoint_minutes,
        session.processes,
        tell=lambda text: session.reporter.say(f"  {text}"),
        restart=task.restart,
    )
