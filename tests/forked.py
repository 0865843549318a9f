"""Python programs in processes of their own, forked from one that has imported the libraries.

Importing them takes ten seconds of a core, once for every process that a test would start afresh.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

LIBRARIES = ("srlm_lite.cli.iterate", "srlm_lite.session", "srlm_lite.model.base",
             "srlm_lite.training.dpo", "srlm_lite.training.sft",
             "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer")  # fmt: skip

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*LIBRARIES])


class Program:
    """One that was started, with what it has printed.

    Args:
        words: What would follow `python`: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
        env: All of its environment.
    """

    def __init__(self, *words: str, env: Mapping[str, str]) -> None:
        self._said = Path(tempfile.mkdtemp())
        self._process = _CONTEXT.Process(target=_run, args=(words, dict(env), self._said))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As that of `subprocess`: None while it runs."""
        return self._process.exitcode

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; its stdout and stderr."""
        self._process.join()
        out, err = (path.read_text(encoding="utf-8") for path in _streams(self._said))
        return out, err


def _streams(folder: Path) -> tuple[Path, Path]:
    return folder / "stdout", folder / "stderr"


def _run(words: tuple[str, ...], env: dict[str, str], said: Path) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(_streams(said), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    code: object = 0
    try:
        _execute(words)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # multiprocessing leaves them out
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _execute(words: tuple[str, ...]) -> None:
    kind, rest = words[0], list(words[1:])
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(rest[0], main.__dict__)
    else:
        sys.argv = [*words]
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
