"""`srlm-lite serve`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.errors import UserError
from srlm_lite.export.source import find_source
from srlm_lite.recipe import Recipe
from srlm_lite.run.run import RunDir
from srlm_lite.serve.http import Server, is_local
from srlm_lite.serve.worker import Stacks, Worker
from srlm_lite.session import Session
from srlm_lite.telling import hide

KEY_VARIABLE = "SRLM_API_KEY"
"""Holds the key where `--api-key` is not given; on a command line other users can read it."""
PATIENCE_S = 10.0
"""How long the end waits for the batch that is being computed."""


@dataclass(frozen=True, slots=True)
class ServeWish:
    """What to serve, and where."""

    directory: Path
    which: str | None
    """A model's name; None: all of them."""
    host: str
    port: int
    key: str | None


def run_serve(wish: ServeWish) -> None:
    """Serve until interrupted."""
    run = RunDir(wish.directory)
    recipe = _sampled_here(run.recipe())
    key = _key(wish.key)
    console = ConsoleReporter()
    stacks = _stacks(run, wish.which)
    worker = Worker(Session(recipe, run, console), stacks)
    with Server(wish.host, wish.port, worker, key=key) as server:
        if not is_local(wish.host):
            guard = "whoever has the key" if key else "anyone there, without a key (--api-key)"
            console.warn(f"{wish.host} can be reached from other machines, by {guard}")
        console.say(f"loading {recipe.base.name}")
        worker.start()
        console.say(f"serving {', '.join(stacks)} of {run.path} at {server.url}; Ctrl-C ends it")
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        # Whoever has started it in the background ends it so.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while thread.is_alive():
                thread.join(0.5)
        except KeyboardInterrupt:
            console.say("ending")
        server.shutdown()
    if not worker.end(PATIENCE_S):
        # A batch is still being computed, and no one waits for it.
        sys.stderr.flush()
        os._exit(0)


def _stacks(run: RunDir, which: str | None) -> Stacks:
    """The finished models by name, or the one that is wanted.

    Raises:
        UserError: There is no such model, or a file of one has changed.
    """
    if which == "base":
        return {"base": []}
    if which is not None:
        source = find_source(run.path, which)
        return {str(source.iteration or "anchor"): source.stack()}
    stacks: dict[str, Any] = {"base": []}
    if run.anchor.is_done:
        names = ["anchor", *map(str, range(1, run.last_done() + 1))]
        stacks |= {name: find_source(run.path, name).stack() for name in names}
    return stacks


def _sampled_here(recipe: Recipe) -> Recipe:
    """The recipe with an engine that samples from the run's own models."""
    from srlm_lite.engines import kind_of

    if not kind_of(recipe, "policy").remote:
        return recipe
    rollout = recipe.rollout.model_copy(update={"engine": "transformers"})
    return recipe.model_copy(update={"rollout": rollout})


def _key(given: str | None) -> str | None:
    key = given if given is not None else os.environ.get(KEY_VARIABLE)
    if key is None or key == "":
        return None
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        where = f"${KEY_VARIABLE}" if given is None else "--api-key"
        raise UserError("holds characters that no key has", where=where)
    hide(key)
    return key
