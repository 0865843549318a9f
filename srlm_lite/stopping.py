"""What Ctrl-C and SIGTERM do: at once, or where a training can be left without losing steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from srlm_lite.errors import same_command


class Terminated(KeyboardInterrupt):
    """SIGTERM, which Slurm and others send before they kill; it goes wherever Ctrl-C goes."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """That of a shell: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def told(stop: KeyboardInterrupt) -> str:
    """The line that says what has been stopped, and that it can go on."""
    where = f" {stop}" if str(stop) else ""
    if isinstance(stop, Terminated):
        return (
            f"stopped: ended from outside (SIGTERM){where}; what is done is on disk, and "
            f"{same_command()} goes on from here"
        )
    return f"interrupted{where}; {same_command()} goes on from here"


@contextmanager
def terminable() -> Iterator[None]:
    """Within this context SIGTERM raises `Terminated`, as Ctrl-C raises `KeyboardInterrupt`."""

    def terminated(number: int, frame: Any) -> None:
        raise Terminated

    before = _replace(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        _restore(before)


class Stop:
    """What has been asked for while it could not be done at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        """SIGINT or SIGTERM, the first that came; None: nothing."""

    @property
    def asked(self) -> bool:
        return self.number is not None

    def error(self, where: str = "") -> KeyboardInterrupt:
        """What ends the command.

        Args:
            where: After what it stops, for the user.
        """
        kind = KeyboardInterrupt if self.number == signal.SIGINT else Terminated
        return kind(*filter(None, [where]))

    def _take(self, number: int, frame: Any) -> None:
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and number == signal.SIGINT and sys.stderr.isatty():
            # A step may take minutes. Not `print`: it may be in the midst of another one.
            os.write(2, b"\nfinishing the step under way; Ctrl-C again stops at once\n")
        self.number = self.number or number


_stop: Stop | None = None


@contextmanager
def deferred() -> Iterator[Stop]:
    """Within this context Ctrl-C and SIGTERM wait for whoever looks at the `Stop`, or for its end.

    A second Ctrl-C does not wait. Contexts within one another share one `Stop`, and the outer one
    acts on it.

    Raises:
        KeyboardInterrupt: At its end, where a signal came and nobody has acted on it; `Terminated`
            for SIGTERM.
    """
    global _stop
    if _stop is not None:
        yield _stop
        return
    stop = _stop = Stop()
    before = {**_replace(signal.SIGINT, stop._take), **_replace(signal.SIGTERM, stop._take)}
    try:
        yield stop
    finally:
        _stop = None
        _restore(before)
    if stop.asked:
        raise stop.error()


def _replace(number: signal.Signals, handler: Any) -> dict[signal.Signals, Any]:
    """Set a handler; the one before. Nothing where it is not to be heard, or not this thread's."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    if signal.getsignal(number) in (signal.SIG_IGN, None):  # of a job in the background, say
        return {}
    return {number: signal.signal(number, handler)}


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
