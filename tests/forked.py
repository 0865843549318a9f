"""Python programs in processes of their own, forked from one that has imported the libraries.

Importing them takes more than ten seconds of a core, once for every process that is started afresh.
The processes are as real as those of `subprocess`: they can be killed, and fail on their own.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from commands import Done

LIBRARIES = ("srlm_lite.cli.iterate", "srlm_lite.session", "srlm_lite.model.base",
             "srlm_lite.training.dpo", "srlm_lite.training.sft")  # fmt: skip

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*LIBRARIES])


class Program:
    """One that was started; with the methods of `subprocess.Popen`.

    Args:
        words: What would follow `python`: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
        env: All of its environment; None: this process's.
    """

    def __init__(self, *words: str | Path, env: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="srlm-lite-program-")
        told = dict(os.environ if env is None else env)
        place = Path.cwd(), Path(self._folder.name)
        for path in _streams(place[1]):
            path.touch()  # one that is killed at once has opened neither
        self._process = CONTEXT.Process(target=_run, args=(tuple(map(str, words)), told, *place))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()

    def communicate(self) -> tuple[str, str]:
        self.wait()
        files = _streams(Path(self._folder.name))
        out, err = (path.read_text(encoding="utf-8") for path in files)
        return out, err

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def ended(*words: str | Path, env: Mapping[str, str] | None = None) -> Done:
    """A program that is waited for."""
    program = Program(*words, env=env)
    out, err = program.communicate()
    assert program.returncode is not None
    return Done(program.returncode, out, err)


def _streams(folder: Path) -> tuple[Path, Path]:
    return folder / "stdout", folder / "stderr"


def _run(words: tuple[str, ...], env: dict[str, str], where: Path, said: Path) -> None:
    gc.freeze()  # as in this process: see conftest.py
    os.environ.clear()
    os.environ.update(env)
    os.chdir(where)
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
