"""A training kept on disk while it goes on, so that a killed run goes on from there.

What is kept is all that the next step depends on: weights, optimiser, schedule, the place in the
data, the generators; and what has been logged, so that the results tell of the whole training. A
training that goes on from there ends with the same bytes as one that was never stopped.

Of the slot that is the adapter that trains: what is frozen below it is loaded as at the start, and
the optimiser has zeros there.

A checkpoint says what training it is of: examples, settings, adapters, seed, processes, versions.
One of anything else is told of, and not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from srlm_lite.errors import ProofError, UserError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.processes import Processes
from srlm_lite.run.files import read_json, sha256_file, write_json
from srlm_lite.run.layout import CheckpointDir
from srlm_lite.settings import Before, DecidesNothing, Optim, marked
from srlm_lite.stopping import Stop, deferred

FORMAT = 2
"""A checkpoint whose files have another form is not used."""

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
"""Those whose version decides what a step computes."""

TRAINER_STATE = "trainer_state.json"
"""Where transformers' trainer looks for its own counters."""

Tensors = dict[str, Tensor]
Index = tuple[slice, slice]


class Keeper(Protocol):
    """Whatever has been told of each step, and is to be told again of those that are done."""

    def replay(self, history: Sequence[Mapping[str, Any]], steps: int) -> None:
        """What the trainer has logged, of a training of so many steps."""


class Proof(Protocol):
    """What was shown before the first step."""

    facts: dict[str, float]


class More(Protocol):
    """Something with a state of its own that the steps change."""

    def kept(self) -> Any:
        """The state, as JSON can hold it."""

    def go_on(self, kept: Any) -> None:
        """Take it on again."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where a training of a run is kept, and how often.

    Args:
        place: Where the first process, and no other, writes and looks.
        training: Which training of the run it is: JSON.
        about: What it is called while it runs.
        every_s: Seconds of training between two; 0: only when it is stopped.
        tell: Shows the user a line.
        restart: Called when steps have been told of that were done before.
    """

    place: CheckpointDir
    training: dict[str, Any]
    about: str
    every_s: float
    processes: Processes
    tell: Callable[[str], None] = lambda text: None
    restart: Callable[[], None] = lambda: None

    def keep(
        self,
        base: LoadedBase,
        slot: Slot,
        optim: Optim,
        *,
        seed: int,
        keeper: Keeper,
        examples: Iterable[Any],
        adapters: Sequence[Adapter],
        proof: Proof | None = None,
        more: More | None = None,
        **others: Any,
    ) -> Kept:
        """What `run_training` is to keep.

        Args:
            slot: One adapter of it trains by now.
            examples: What is learned from; told apart by their `repr`.
            adapters: All that stand at the start: what is frozen, what is trained, references.
            others: Whatever else decides what is computed, as JSON.
        """
        of = {
            "format": FORMAT,
            "examples": digest(examples),
            "settings": deciding(optim),
            "adapters": [adapter.digest() for adapter in adapters],
            "seed": seed,
            "base": [base.source.get(key) for key in ("sha256", "revision")],
            "dtype": str(base.dtype),
            "device": base.device.type,
            "processes": self.processes.world,
            "versions": versions(),
            **others,
        }
        return Kept(self, slot.learning, json.loads(json.dumps(of)), keeper, proof, more)


class Resumable:
    """A trainer that can go on from a checkpoint; before TRL's in the bases."""

    epochs_done: int = 0
    """Passes over the data that lie behind it when it begins."""
    kept: Kept | None = None

    @property
    def cut(self) -> dict[str, Any]:
        """With what a step is cut, where that is no setting but was found out meanwhile: JSON."""
        return {}

    def cut_again(self, cut: Mapping[str, Any]) -> None:
        """Cut the steps that follow in the same way."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `Kept` puts the weights back, when the proofs of the start are through."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called where the data of the next step has been read."""
        if self.kept is not None:
            self.kept.restore_generators()


class Kept(TrainerCallback):
    """Keeps a training, and goes on with what is kept of it.

    Args:
        learning: As `Slot.learning`; a parameter that it does not name learns as a whole.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        learning: Mapping[int, Index],
        of: dict[str, Any],
        keeper: Keeper,
        proof: Proof | None,
        more: More | None,
    ) -> None:
        self._checkpoints, self._of = checkpoints, of
        self._keeper, self._proof, self._more = keeper, proof, more
        self._leads = checkpoints.processes.place.leads
        self._trainer: Any = None
        self._learning = learning
        self._found: tuple[dict[str, Any], Tensors] | None = None
        self._generators: Tensors = {}
        self._stop = Stop()
        self._due = 0.0

    def train(self, trainer: Any) -> None:
        """`trainer.train`, from the start or from where it was.

        Raises:
            KeyboardInterrupt: Ctrl-C or, as `Terminated`, SIGTERM has stopped it after a step,
                which is kept.
            ProofError: What goes on is not what was kept.
        """
        self._trainer = trainer
        found = self._find() if self._leads else None
        self._found = self._checkpoints.processes.broadcast(found)
        trainer.add_callback(self)  # the last: proofs of the start come before it
        with deferred() as self._stop:
            if self._found is None:
                trainer.train()
                return
            state = self._found[0]["trainer"]
            trainer.kept, trainer.epochs_done = self, int(state["epoch"])
            folder = Path(trainer.args.output_dir)
            write_json(folder / TRAINER_STATE, state)
            trainer.train(resume_from_checkpoint=str(folder))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take on what was kept, in place of the start."""
        if self._found is not None:
            kept, tensors = self._found
            self._found = None  # no second copy while it trains
            self._restore(kept, tensors)
            self._generators = {k: v for k, v in tensors.items() if k.startswith("generators/")}
            self._keeper.replay(kept["trainer"]["log_history"], state.max_steps)
            self._checkpoints.restart()
            if self._leads:
                done = f"step {state.global_step} of {state.max_steps}"
                self._checkpoints.tell(f"{self._checkpoints.about} goes on from {done}")
        self._due = time.monotonic() + self._checkpoints.every_s

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After a step, when all of it has been noted."""
        if logs is None or "loss" not in logs:
            return
        processes = self._checkpoints.processes
        asked = processes.anyone(self._stop.asked)
        if state.global_step >= state.max_steps:  # its end is near: it stops when that is written
            if asked and self._leads:
                self._stop.number = self._stop.number or signal.SIGTERM
            elif asked:
                self._stop.number = None
            return
        where = f"after step {state.global_step} of {state.max_steps} of {self._checkpoints.about}"
        due = self._checkpoints.every_s and time.monotonic() >= self._due
        if self._leads and (asked or due):
            try:
                self._write(state)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(self._checkpoints.place.draft, ignore_errors=True)
                where += f", which could not be kept ({error})"
                if not asked:
                    self._checkpoints.tell(f"no checkpoint {where}")
            self._due = time.monotonic() + self._checkpoints.every_s
        if not asked:
            return
        # All ask again, so that none ends while the first one is writing.
        if processes.anyone(self._stop.number == signal.SIGINT):
            self._stop.number = signal.SIGINT
        if not self._leads:
            processes.wait_for_the_end()
        raise self._stop.error(where)

    def restore_generators(self) -> None:
        """Those of torch, as they were after the step."""
        torch.set_rng_state(self._generators["generators/cpu"])
        if "generators/cuda" in self._generators:
            torch.cuda.set_rng_state(self._generators["generators/cuda"])

    def _find(self) -> tuple[dict[str, Any], Tensors] | None:
        """What is kept of this very training; what is not of it, or damaged, is deleted."""
        place, about = self._checkpoints.place, self._checkpoints.about
        folder = place.newest()
        if folder is None:
            return None
        try:
            kept = read_json(place.state(folder), training=dict, of=dict, trainer=dict)
            if kept["training"] != self._checkpoints.training:
                why = ""  # left by one that has ended
            elif others := differing(kept["of"], self._of):
                why = f"is of another training; differing: {', '.join(others)}"
            elif sha256_file(place.tensors(folder)) != kept.get("sha256"):
                why = "is damaged"
            else:
                return kept, load_file(place.tensors(folder))
        except (UserError, OSError, SafetensorError):
            why = "is damaged"
        if why:
            self._checkpoints.tell(f"{about} begins anew: the checkpoint that is there {why}")
        place.discard(folder)
        return None

    def _write(self, state: Any) -> None:
        kept, tensors = self._capture()
        tensors["generators/cpu"] = torch.get_rng_state()
        if self._trainer.args.device.type == "cuda":
            tensors["generators/cuda"] = torch.cuda.get_rng_state()
        told = {
            "training": self._checkpoints.training,
            "step": state.global_step,
            "steps": state.max_steps,
            "of": self._of,
            "facts": self._proof.facts if self._proof else {},
            "trainer": asdict(state),
            "cut": self._trainer.cut,
            "more": self._more.kept() if self._more else None,
            **kept,
        }
        write_checkpoint(self._checkpoints.place, state.global_step, told, tensors)

    def _capture(self) -> tuple[dict[str, Any], Tensors]:
        """What a step reads and changes."""
        trainer, tensors = self._trainer, {}
        for name, weight in _trained(trainer.model).items():
            tensors[f"weights/{name}"] = _copied(weight[self._part(weight)])
        scaler = trainer.accelerator.scaler
        optimizer = trainer.optimizer.state_dict()
        parts = {
            "optimizer": optimizer | {"state": self._states(optimizer["state"])},
            "schedule": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return {name: packed(part, tensors, name) for name, part in parts.items()}, tensors

    def _part(self, weight: Tensor) -> Index | tuple[()]:
        """What of a parameter learns, as its index."""
        return self._learning.get(id(weight), ())

    @property
    def _parameters(self) -> list[Tensor]:
        """Those of the optimiser, as its state counts them."""
        return [one for group in self._trainer.optimizer.param_groups for one in group["params"]]

    def _states(self, states: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """The optimiser's, without the zeros that it has where nothing learns."""
        parameters, found = self._parameters, {}
        for number, state in states.items():
            weight = parameters[number]
            index = self._part(weight)
            found[number] = {
                name: _Partial(value[index])
                if index and isinstance(value, Tensor) and _is_zero_beside(value, weight, index)
                else value
                for name, value in state.items()
            }
        return found

    def _whole(self, states: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """What `_states` was given."""
        parameters, found = self._parameters, {}
        for number, state in states.items():
            weight, values = parameters[number], dict(state)
            for name, value in state.items():
                if isinstance(value, _Partial):
                    whole = torch.zeros(weight.shape, dtype=value.tensor.dtype)
                    whole[self._part(weight)] = value.tensor
                    values[name] = whole
            found[number] = values
        return found

    def _restore(self, kept: Mapping[str, Any], tensors: Tensors) -> None:
        """Take on the state, and prove that it is what was kept."""
        trainer = self._trainer
        weights = _trained(trainer.model)
        of_weights = {name for name in tensors if name.startswith("weights/")}
        if of_weights != {f"weights/{name}" for name in weights}:
            raise ProofError("a checkpoint holds other weights than those that are to be trained")
        for name, weight in weights.items():
            weight.data[self._part(weight)].copy_(tensors[f"weights/{name}"])
        optimizer = unpacked(kept["optimizer"], tensors)
        states = self._whole(optimizer["state"])
        trainer.optimizer.load_state_dict(optimizer | {"state": states})
        trainer.lr_scheduler.load_state_dict(unpacked(kept["schedule"], tensors))
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(unpacked(kept["scaler"], tensors))
        trainer.cut_again(kept["cut"])
        if self._proof:
            self._proof.facts = dict(kept["facts"])
        if self._more:
            self._more.go_on(kept["more"])
        again, found = self._capture()
        told = {name: tensors[name] for name in tensors if not name.startswith("generators/")}
        for name in told.keys() | found.keys():
            if name not in told or name not in found or not _same(told[name], found[name]):
                raise ProofError(f"a training goes on otherwise than it was kept: {name} differs")
        for name, part in again.items():
            if json.dumps(part) != json.dumps(kept[name]):
                raise ProofError(f"a training goes on otherwise than it was kept: {name} differs")


def write_checkpoint(
    place: CheckpointDir, step: int, state: Mapping[str, Any], tensors: Tensors
) -> None:
    """Write a checkpoint, whole or not at all; the one before is deleted when it is."""
    draft, whole = place.draft, place.of(step)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    file = place.tensors(draft)
    save_file(tensors, file)
    _sync(file)
    write_json(place.state(draft), {**state, "sha256": sha256_file(file)})
    _sync(draft)
    draft.replace(whole)
    _sync(place.path)
    for folder in place.path.glob("step_*"):
        if folder != whole:
            place.discard(folder)


def digest(examples: Iterable[Any]) -> str:
    """SHA-256 of values in their order, told apart by their `repr`."""
    found = hashlib.sha256()
    for example in examples:
        found.update(repr(example).encode() + b"\n")
    return found.hexdigest()


def deciding(optim: Optim) -> dict[str, Any]:
    """A section's settings, without those that decide nothing: they may change when memory does
    not suffice, and what is done by then stays done. Nor with one that came later and has it as it
    was before: an earlier version's checkpoint cannot say it."""
    free = {name for name, _ in marked(type(optim), DecidesNothing)}
    before = {name: mark.value for name, mark in marked(type(optim), Before)}
    return {
        name: value
        for name, value in optim.model_dump(mode="json").items()
        if name not in free and not (name in before and value == before[name])
    }


def versions() -> dict[str, str]:
    """Those of the libraries that compute."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, or that one of two does not have."""
    return sorted(
        key
        for key in one.keys() | other.keys()
        if (key in one, one.get(key)) != (key in other, other.get(key))
    )


@dataclass(frozen=True, slots=True)
class _Partial:
    """The part of a tensor that learns; the rest of it is zero."""

    tensor: Tensor


def _is_zero_beside(value: Tensor, weight: Tensor, index: Index) -> bool:
    """Whether it has the parameter's form, and is zero where that does not learn."""
    if value.shape != weight.shape or not value.is_floating_point():
        return False
    return int(value.count_nonzero()) == int(value[index].count_nonzero())


def packed(value: Any, tensors: Tensors, name: str) -> Any:
    """A tree of mappings, sequences and values as JSON, whose keys need not be texts.

    Args:
        tensors: Gets a copy of each tensor of the tree, on the CPU, by where it stood.

    Raises:
        TypeError: It holds something else.
    """
    if isinstance(value, Tensor):
        tensors[name] = _copied(value)
        return {"tensor": name}
    if isinstance(value, _Partial):
        return {"part": packed(value.tensor, tensors, name)}
    if isinstance(value, Mapping):
        items = [[key, packed(below, tensors, f"{name}/{key}")] for key, below in value.items()]
        return {"items": items}
    if isinstance(value, list | tuple):
        return [packed(below, tensors, f"{name}/{i}") for i, below in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which no checkpoint can hold")


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `packed` was given, with lists in place of tuples."""
    if isinstance(value, list):
        return [unpacked(below, tensors) for below in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "part" in value:
            return _Partial(unpacked(value["part"], tensors))
        return {key: unpacked(below, tensors) for key, below in value["items"]}
    return value


def _trained(model: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
