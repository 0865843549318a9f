"""The processes of one run, where a launcher has started several: the first leads, others follow.

`accelerate launch` and `torchrun` start the same command several times and say in the environment
which of them a process is. The first one runs the loop and writes every file; the others wait for
work (see `session.follow`). Alone, a process does all of it and nothing here is more than a value.

Whatever ends one process ends all of them. Each gives signs of life to a store that all can reach,
and whoever fails leaves there what went wrong; so a process that was killed, hangs, or lies on a
machine that is gone stops the run within `PATIENCE_S`, whatever call the others are waiting in.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from srlm_lite.errors import SrlmError, UserError
from srlm_lite.stopping import exit_code, told
from srlm_lite.telling import for_terminal, without_secrets

BEAT_S = 1.0
"""Seconds between two signs of life."""
PATIENCE_S = 120.0
"""Seconds without a sign of life after which a process counts as lost."""
HEARD_S = 10.0
"""Seconds that a failing process gives the first one to say what went wrong."""

GOES_ON = "what is done is on disk, and the same command goes on from here"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OF_LAUNCHERS = (
    *LAUNCHER,
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
)
_SHARDING = "ACCELERATE_USE_FSDP"
_KNOWN_SHARDING = {
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
"""What a launcher's configuration of FSDP may say where it matters here."""
_met = threading.Event()
_ENDED, _HEARD, _READ = "ended", "heard", "read"
_CLOSED = ("closed by peer", "connection reset", "broken pipe", "socket closed")


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many processes this one is; `local_rank` counts on its own machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process runs the loop and writes the files."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether errors are said by this process: one on each machine."""
        return self.local_rank == 0


def place() -> Place:
    """The place that a launcher has given this process; alone where there was none."""
    if not all(os.environ.get(name) for name in LAUNCHER):
        return Place()
    rank, world, local_rank = (int(os.environ[name]) for name in LAUNCHER[:3])
    return Place(rank, world, local_rank) if world > 1 else Place()


class Processes:
    """This process among its fellows; alone, every call is trivial."""

    def __init__(self, at: Place | None = None) -> None:
        self.place = at or Place()
        self.shards = False
        """Whether the base is spread over them, as the launcher's configuration says (FSDP)."""
        self._group: Any = None
        self._watch: _Watch | None = None
        self._failed_with: int | None = None

    @property
    def world(self) -> int:
        """How many they are."""
        return self.place.world

    @contextlib.contextmanager
    def joined(self, *, cpu: bool) -> Iterator[None]:
        """Meet the others, and stay together until the end of this context.

        An error in it ends all processes; those that do not raise it end with its exit code.

        Args:
            cpu: The run computes on the CPU, whatever else is there.

        Raises:
            UserError: There are more processes on this machine than GPUs, or the launcher wants
                a kind of sharding that there is not.
            SrlmError: Another process is lost.
        """
        self.shards = takes_sharding() and self.world > 1
        if self.world == 1:
            yield
            return
        self._join(cpu)
        try:
            yield
        except BaseException as error:
            known = _known(error)
            self._fail(known)
            if known is error:
                raise
            raise known from error
        self._leave()

    def _join(self, cpu: bool) -> None:
        import torch
        from accelerate import PartialState

        dist: Any = torch.distributed
        cpu = cpu or not torch.cuda.is_available()
        there = int(os.environ.get("LOCAL_WORLD_SIZE", self.place.local_rank + 1))
        if not cpu and there > torch.cuda.device_count():
            raise UserError(
                f"{there} processes on this machine, but {torch.cuda.device_count()} GPUs",
                where="--num_processes",
                way_out="Start one process for each GPU, or set base.device=cpu",
            )
        PartialState(cpu=cpu)
        # Values travel between CPUs on every device. Liveness is the watch's affair: a call may
        # wait for as long as another process works.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        shared = dist.PrefixStore(f"srlm-lite/{attempt}", store)
        self._watch = _Watch(shared, self.place, say=_say_over_bar, end=os._exit)
        self._watch.start()
        atexit.register(self._end)  # last of all that is registered from here on
        _met.set()

    def _leave(self) -> None:
        import torch.distributed as dist

        dist.barrier(group=self._group)  # nobody may miss a process that has finished
        if self._watch is not None:
            self._watch.stop()
        dist.destroy_process_group()

    def _fail(self, error: BaseException) -> None:
        """Tell the others; where the first process does not take it up, say it here."""
        if self._watch is None:
            return
        self._watch.stop()
        code, line = _exit_code(error), str(error) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            line = told(error)
        elif code != 2:
            line = f"stopped: {line}"
        if not self._watch.tell(line, code) and self.place.local_rank == 1:
            _say(line)
        self._failed_with = code

    def _end(self) -> None:
        """After a failure, end before gloo misses the others and aborts with a code of its own."""
        if self._failed_with is None or self._watch is None:
            return
        self._watch.see_off()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self._failed_with)

    def broadcast(self, value: Any = None) -> Any:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def anyone(self, value: bool) -> bool:
        """Whether it is true in any process; all call it together."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        flag = torch.tensor([value], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def wait_for_the_end(self) -> None:
        """Wait, in another process than the first, until that has said why it stops and ends all.

        Raises:
            SrlmError: It has not.
        """
        time.sleep(PATIENCE_S)
        raise SrlmError(f"the first process has not ended this one; {GOES_ON}")

    def gather(self, value: Any) -> list[Any]:
        """All processes' values by rank, in the first one; nothing in the others."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found = [None] * self.world if self.place.leads else None
        dist.gather_object(value, found, dst=0, group=self._group)
        return found or []


def takes_sharding() -> bool:
    """Whether a launcher asks for FSDP; it is then taken from the libraries that would read it.

    The base is sharded when it is loaded, and to accelerate the adapters are what DDP trains.
    """
    asked = os.environ.pop(_SHARDING, "false").lower() == "true"
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        value = os.environ.pop(name).lower()
        if asked and value != _KNOWN_SHARDING.get(name, value):
            raise UserError(
                f"is {value}, which there is not here",
                where=name.lower(),
                way_out=f"Set it to {_KNOWN_SHARDING[name]}, as recipes/accelerate/fsdp2-qlora.yaml"
                " does",
            )
    return asked


class _Watch(threading.Thread):
    """Gives signs of life and looks for those of the others, in the background.

    The first process watches all, the others watch the first.

    Args:
        store: A key-value store that all processes reach.
        say: Shows the user a line.
        end: Ends this process with an exit code, whatever its main thread waits in.
    """

    def __init__(
        self,
        store: Any,
        at: Place,
        *,
        say: Callable[[str], None],
        end: Callable[[int], None],
        beat_s: float = BEAT_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._store, self._place, self._say, self._end = store, at, say, end
        self._beat_s, self._patience_s = beat_s, patience_s
        self._stopped = threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        others = range(1, self._place.world) if self._place.leads else [0]
        seen = {rank: (0, time.monotonic()) for rank in others}
        while not self._stopped.wait(self._beat_s):
            try:
                self._store.add(f"beat/{self._place.rank}", 1)
                if self._store.check([_ENDED]):
                    return self._end_with(json.loads(self._store.get(_ENDED)))
                beats = {rank: self._store.add(f"beat/{rank}", 0) for rank in others}
            except (RuntimeError, ConnectionError):
                if not self._stopped.is_set():
                    self._lost("the first process is gone")
                return
            now = time.monotonic()
            for rank, beat in beats.items():
                if beat != seen[rank][0]:
                    seen[rank] = (beat, now)
                elif now - seen[rank][1] > self._patience_s:
                    line = f"process {rank} has given no sign of life for {self._patience_s:.0f} s"
                    self.tell(f"stopped: {line}; {GOES_ON}", 1)
                    return self._lost(line)

    def stop(self) -> None:
        """End, and leave this process alone from here on."""
        self._stopped.set()

    def tell(self, line: str, code: int) -> bool:
        """Leave what has ended the run, and see whether the first process has taken it up."""
        try:
            ended = {"rank": self._place.rank, "line": line, "code": code}
            self._store.compare_set(_ENDED, "", json.dumps(ended))  # the first error counts
            if not self._place.leads:
                self._store.wait([_HEARD], timedelta(seconds=HEARD_S))
        except (RuntimeError, ConnectionError):
            return False
        return True

    def see_off(self) -> None:
        """The first process keeps the store: wait until the others have read why it ends."""
        end = time.monotonic() + 3 * self._beat_s
        with contextlib.suppress(RuntimeError, ConnectionError):
            while self._place.leads and time.monotonic() < end:
                if self._store.add(_READ, 0) >= self._place.world - 1:
                    return
                time.sleep(self._beat_s / 20)

    def _end_with(self, ended: dict[str, Any]) -> None:
        if self._place.leads:
            self._say(ended["line"])
            with contextlib.suppress(RuntimeError, ConnectionError):
                self._store.set(_HEARD, "1")
        else:
            if self._place.speaks:  # on a machine where the first process cannot be seen
                self._say(ended["line"])
            with contextlib.suppress(RuntimeError, ConnectionError):
                self._store.add(_READ, 1)
        self._end(ended["code"])

    def _lost(self, line: str) -> None:
        if self._place.speaks:
            self._say(f"stopped: {line}; {GOES_ON}")
        self._end(1)


def _known(error: BaseException) -> BaseException:
    """The error, or in place of what a library says of a closed connection, what it means."""
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(words in text for words in _CLOSED):
        return SrlmError(f"another process of the run is gone; {GOES_ON}")
    return error


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return 2
    return exit_code(error) if isinstance(error, KeyboardInterrupt) else 1


def say(line: str) -> None:
    """Show an error before this process ends with it; of all on a machine, one does."""
    if place().speaks:
        _say(line)
    elif not _met.is_set():
        # All of them meet it, and the launcher ends all when one has ended: wait for the speaker.
        time.sleep(HEARD_S)


def _say(line: str) -> None:
    sys.stderr.write(f"srlm-lite: {for_terminal(without_secrets(line))}\n")
    sys.stderr.flush()


def _say_over_bar(line: str) -> None:
    """While a progress bar may be drawn: show the cursor again, which it hides."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")
    _say(line)


def of_one_process() -> dict[str, str]:
    """The environment of this process for a program of its own, on its GPU, that is no fellow."""
    at = place()
    if at.world == 1:
        return dict(os.environ)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
    }
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(at.local_rank + 1)]
    if at.local_rank < len(gpus):
        kept["CUDA_VISIBLE_DEVICES"] = gpus[at.local_rank]
    return kept
