"""The command line, told to send itself a signal in a training.

python tests/stopped.py RANK KIND STEP SIGNAL|GROUP WORDS...

The process of that rank sends it when it has taken the step: SIGKILL comes before that is kept.
GROUP is Ctrl-C at a terminal: SIGINT, to the launcher that has started it and all in its group.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from srlm_lite.cli import main
from srlm_lite.processes import place
from srlm_lite.training.arguments import Listener


def stop_in(rank: int, kind: str, step: int, name: str) -> None:
    """Stop the training of a kind, `SFT` or `DPO`, in a step."""
    take = Listener._take

    def took(self: Listener, at: int, steps: int, logs: Mapping[str, Any]) -> None:
        take(self, at, steps, logs)
        if at == step and kind == ("DPO" if "rewards/margins" in logs else "SFT"):
            if name == "GROUP":
                os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
            else:
                os.kill(os.getpid(), signal.Signals[name])

    if place().rank == rank:
        Listener._take = took  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, kind, step, name, *words = sys.argv[1:]
    stop_in(int(rank), kind, int(step), name)
    sys.argv = ["srlm-lite", *words]
    main.run()
