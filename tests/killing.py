"""Starts a run again and again, each time in a fork of itself, and kills it at a random moment.

Forks, because a run of its own imports its libraries for seconds, in which there is nothing to
lose. Prints how many were killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import srlm_lite.stages.at_work
import srlm_lite.training.dpo
import srlm_lite.training.sft  # noqa: F401
from srlm_lite.cli import main


def size(path: Path) -> int:
    """Bytes below a path; files may come and go meanwhile."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def start(words: list[str]) -> int:
    """The command in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    sys.argv = ["srlm-lite", *words]
    try:
        main.run()
    finally:  # the command ends with SystemExit
        os._exit(0)


def is_over(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG) != (0, 0)


def kill_often(out: Path, words: list[str], times: int) -> int:
    """Kill so many runs, each after it has written something; fewer if one gets to its end."""
    rng = random.Random(7)
    for killed in range(times):
        before, pid = size(out), start(words)
        over = False
        while size(out) == before and not over:
            time.sleep(0.02)
            over = is_over(pid)
        time.sleep(rng.uniform(0, 0.8))
        if over or is_over(pid):
            return killed
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return times


if __name__ == "__main__":
    _, out, count, *settings = sys.argv
    words = ["iterate", "--recipe", "tiny", "--adapters", out, *settings]
    print(kill_often(Path(out), words, times=int(count)))
