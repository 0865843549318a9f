"""What TensorBoard, Weights & Biases and trackio are told of a run, while it runs.

One run here is one run there, however many trainings it has. Of each stage they get the figures of
`metrics.jsonl`, over iterations; of each training what TRL logs, over steps of the optimiser. Those
are counted on from one iteration to the next, so that a curve goes on; but TensorBoard tells runs
apart by directory, so there each training has one, and its curves lie over one another.

transformers' own callbacks, behind the trainers' `report_to`, would begin a run with each training
and call every loss `train/loss`. So the trainers report to the stage alone, and the stage to here.

`tracking.json` notes what each has been told. A run that goes on tells nothing twice, and what they
missed is told at its start: so even a finished run can be shown to them. trackio writes down what
it is told only half a second later: a run that was killed before looks up what it has.

What goes there may be seen by others, so no text goes there with a secret in it: names, settings,
and the command line that W&B notes by itself.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from srlm_lite.errors import UserError
from srlm_lite.progress import Training
from srlm_lite.recipe import Recipe
from srlm_lite.records import TrainingStep
from srlm_lite.report.facts import gather, used_settings
from srlm_lite.run.files import read_json, read_records, write_json
from srlm_lite.run.run import RunDir
from srlm_lite.settings import TrackerName
from srlm_lite.telling import for_terminal, without_secrets

ITERATION = "iteration"
"""The axis of all figures but those of a training's steps."""

FLUSH_S = 1.0
"""Seconds between two times that steps are passed on: a note on the disk goes with each."""

LEFT_OUT = {
    *("intervals", "score_histogram", "bins"),
    *("prompts", "pairs", "answers", "replies", "temperature"),
}
"""What of an evaluation is no curve over iterations, or the same in all of them."""

Values = dict[str, float]

Written = Sequence[tuple[int, Collection[str]]]
"""Rows that a tracker has written down: step, and the names of the figures."""


def missing(report_to: Sequence[TrackerName]) -> list[TrackerName]:
    """Those that are not installed."""
    return [name for name in report_to if not _is_installed(name)]


def check_installed(report_to: Sequence[TrackerName]) -> None:
    """Refuse to go on without a tracker that the recipe names.

    Raises:
        UserError: One is not installed; says how.
    """
    for name in missing(report_to):
        raise UserError(
            "is not installed",
            where=f"tracking.report_to = {name}",
            way_out=f"pip install {name}, or all three: pip install 'srlm-lite[tracking]'",
        )


def _is_installed(name: str) -> bool:
    # Not by looking for the module: W&B leaves a directory `wandb` wherever it runs.
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


class _Place(Protocol):
    """A tracker at work."""

    hint: str
    """Where the figures can be looked at."""

    def tell(self, values: Values, *, step: int, of: Training | None, before: int) -> None:
        """Figures at an iteration or, of a training, at a step.

        Args:
            before: Steps of trainings of the same name in earlier iterations.
        """

    def written(self) -> Written | None:
        """What it has of this run; None: all that it was told, or that cannot be seen here."""

    def close(self, failed: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class _Opening:
    """What a tracker is opened with.

    Args:
        name: What the run is called there.
        key: Hexadecimal digits that are this run's alone.
        resume: It has been told of this run before.
    """

    run: RunDir
    project: str
    name: str
    key: str
    resume: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the run's method reads."""
        return used_settings(gather(self.run, texts=False))


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """A tracker: the package of its own name, and how it is begun.

    Args:
        way_out: What to do where it does not start.
        late: It writes down later what it is told.
    """

    open: Callable[[_Opening], _Place]
    way_out: str = "Leave it out"
    late: bool = False


class RunTracking:
    """The `Tracker` of a run: tells each of the trackers what it has not been told yet.

    Args:
        warn: Shows the user that a tracker has failed, and is left out from then on.
    """

    def __init__(self, run: RunDir, warn: Callable[[str], None]) -> None:
        self._run, self._warn = run, warn
        self._places: dict[TrackerName, _Place] = {}
        self._failed: list[_Place] = []
        self._waiting: list[tuple[Training, int, Values]] = []
        self._flushed = time.monotonic()
        self._notes: dict[str, Any] = {"id": uuid.uuid4().hex[:8], "name": None, "told": {}}
        if run.tracking.is_file():
            self._notes = read_json(run.tracking)

    def is_wanted(self, recipe: Recipe) -> bool:
        """Whether there is, or will be, anything to tell to anybody."""
        names = recipe.tracking.report_to
        if not names or not gather(self._run, texts=False).is_finished:
            return bool(names)
        rows, told = len(self._run.read_metrics()), self._notes["told"]
        return any(
            name not in told or told[name]["stages"] < rows or "open" in told[name]
            for name in names
        )

    def open(self, recipe: Recipe) -> list[str]:
        """Begin, or go on, with the trackers that the recipe names; where to look at each.

        Raises:
            UserError: One does not start.
        """
        section, key = recipe.tracking, self._notes["id"]
        made_up = f"{recipe.name}-{self._run.path.absolute().name}-{key[:4]}"
        name = self._notes["name"] or without_secrets(section.name or made_up)
        self._notes["name"], project = name, without_secrets(section.project)
        for tracker in section.report_to:
            told = self._notes["told"].setdefault(tracker, {"stages": 0, "steps": {}})
            if TRACKERS[tracker].late:
                told["open"] = True  # until it is closed, by which it has written everything down
            resume = bool(told["stages"] or told["steps"])
            try:
                opening = _Opening(self._run, project, name, key, resume)
                self._places[tracker] = place = TRACKERS[tracker].open(opening)
                written = place.written() if resume else None
            except Exception as error:  # each library has errors of its own
                self.close(failed=True)
                raise UserError(
                    f"{tracker} does not start: {_first_line(error)}",
                    where="tracking.report_to",
                    way_out=TRACKERS[tracker].way_out,
                ) from error
            if written is not None:
                told |= cut_back(told, written, self._run.read_metrics())
        self._note()
        self._tell_curves()
        self.stage()
        return [place.hint for place in self._places.values()]

    def step(self, training: Training, step: int, logs: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._waiting.append((training, step, _numbers(logs, f"train/{_word(training.name)}")))
        if time.monotonic() - self._flushed > FLUSH_S:
            self._flush()

    def stage(self) -> None:
        """See `Tracker`."""
        self._flush()
        rows = self._run.read_metrics()
        for tracker in list(self._places):
            told = self._notes["told"][tracker]
            for row in rows[told["stages"] :]:
                told["stages"] += self._tell(tracker, stage_figures(row), step=int(row[ITERATION]))
        self._note()

    def close(self, failed: bool = False) -> None:
        """Tell the rest, and let go of all trackers."""
        self._flush()
        for tracker, place in self._places.items():
            try:
                place.close(failed)
                self._notes["told"][tracker].pop("open", None)
            except Exception as error:
                self._warn(f"{tracker}: {_first_line(error)}")
        if self._places:
            self._note()
        for place in self._failed:  # at the end: letting go of one may take its time
            with contextlib.suppress(Exception):
                place.close(True)

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for training, step, values in waiting:
            number = str(training.iteration)
            for tracker in list(self._places):
                # Of each training the last step, by name and iteration.
                told = self._notes["told"][tracker]["steps"].setdefault(training.name, {})
                if step <= told.get(number, 0):
                    continue  # a killed training takes the same steps again
                before = sum(n for t, n in told.items() if int(t) < training.iteration)
                if self._tell(tracker, values, step=step, of=training, before=before):
                    told[number] = step
        if waiting:
            self._note()

    def _tell(
        self,
        tracker: TrackerName,
        values: Values,
        *,
        step: int,
        of: Training | None = None,
        before: int = 0,
    ) -> bool:
        """Whether it has been told: not if it fails, or has failed before."""
        place = self._places.get(tracker)
        if place is None:
            return False
        shown = {without_secrets(name): value for name, value in values.items()}
        try:
            place.tell(shown, step=step, of=of, before=before)
        except Exception as error:  # a run must not die of those who look at it
            self._failed.append(self._places.pop(tracker))
            self._warn(f"{tracker} is told no more: {_first_line(error)}")
            return False
        return True

    def _note(self) -> None:
        write_json(self._run.tracking, self._notes)

    def _tell_curves(self) -> None:
        """What the run has kept of trainings that are over."""
        for iteration in self._run.iterations():
            for place in iteration.delta_places:
                if place.training.is_file() and place.steps.is_file():
                    training = Training(iteration.number, place.name)
                    for row in read_records(place.steps, TrainingStep):
                        self.step(training, row.step, _logged(row))


class Console(Protocol):
    """What shows the user a line."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


@contextlib.contextmanager
def tracked(recipe: Recipe, run: RunDir, console: Console) -> Iterator[RunTracking | None]:
    """The trackers of a recipe for as long as this context lasts.

    None where it names none, or where the run is over and all of them know.

    Raises:
        UserError: One does not start.
    """
    tracking = RunTracking(run, console.warn)
    if not tracking.is_wanted(recipe):
        yield None
        return
    for hint in tracking.open(recipe):
        console.say(hint)
    try:
        yield tracking
    except BaseException:
        tracking.close(failed=True)
        raise
    tracking.close()


def cut_back(
    told: Mapping[str, Any], written: Written, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a tracker has been told, of which it has lost the end: as far as it has written it down.

    Args:
        told: Of `tracking.json`: `stages`, and the last step of each training.
        rows: Those of `metrics.jsonl`.
    """
    stages = int(told["stages"])
    while stages and not _is_written(rows[:stages], written):
        stages -= 1
    steps: dict[str, dict[str, int]] = {}
    for name, last in told["steps"].items():
        steps[name] = dict(last)
        if not last:
            continue
        newest = max(last, key=int)
        before = sum(count for number, count in last.items() if number != newest)
        group = f"train/{_word(name)}/"
        found = [step for step, names in written if any(one.startswith(group) for one in names)]
        steps[name][newest] = min(last[newest], max(0, max(found, default=0) - before))
    return {"stages": stages, "steps": steps}


def _is_written(rows: Sequence[Mapping[str, Any]], written: Written) -> bool:
    """Whether the last of some rows is; a stage may have had several in its iteration."""
    step, name = int(rows[-1][ITERATION]), _seconds(rows[-1])
    wanted = sum((int(row[ITERATION]), _seconds(row)) == (step, name) for row in rows)
    return wanted <= sum(at == step and name in names for at, names in written)


def _seconds(row: Mapping[str, Any]) -> str:
    """The figure that each row of `metrics.jsonl` has."""
    return f"seconds/{row['stage']}"


def stage_figures(row: Mapping[str, Any]) -> Values:
    """The figures of a row of `metrics.jsonl`, named in the way of trackers: `group/name`.

    An evaluation's groups are its own: judge, policy, and so on.
    """
    stage = str(row["stage"])
    facts = {key: value for key, value in row.items() if key not in (ITERATION, "stage", "seconds")}
    values = _numbers(facts, "", LEFT_OUT) if stage == "evaluation" else _numbers(facts, stage)
    return {**values, _seconds(row): float(row["seconds"])}


def _numbers(facts: Mapping[str, Any], group: str, without: Collection[str] = ()) -> Values:
    """All numbers in a mapping and the mappings in it, but for keys left out."""
    found: Values = {}
    for key, value in facts.items():
        name = f"{group}/{key}" if group else key
        if key in without:
            continue
        if isinstance(value, Mapping):
            found.update(_numbers(value, name, without))
        elif isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def _logged(row: TrainingStep) -> Values:
    """A row of ours under TRL's names."""
    named = {
        "loss": row.loss,
        "rewards/margins": row.reward_margin,
        "rewards/accuracies": row.reward_accuracy,
        "rewards/chosen": row.reward_chosen,
        "rewards/rejected": row.reward_rejected,
        "learning_rate": row.learning_rate,
        "grad_norm": row.grad_norm,
    }
    return {name: value for name, value in named.items() if value is not None}


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return for_terminal(without_secrets(first))


class _TensorBoard:
    """A directory for the figures of stages, and one for each training."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._writers: dict[str, Any] = {}
        self.hint = f"TensorBoard: tensorboard --logdir {shlex.quote(str(run.tensorboard))}"

    def tell(self, values: Values, *, step: int, of: Training | None, before: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = "iterations" if of is None else _word(of.name)
        if of is not None and of.iteration:
            folder = f"{self._run.iteration(of.iteration).path.name}/{folder}"
        if folder not in self._writers:
            self._writers[folder] = SummaryWriter(self._run.tensorboard / folder)
        for name, value in values.items():
            self._writers[folder].add_scalar(name, value, step)
        self._writers[folder].flush()

    def written(self) -> None:
        """All: each figure is flushed."""

    def close(self, failed: bool) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    """A run of W&B, which keeps its id."""

    def __init__(
        self, run: RunDir, *, project: str, name: str, key: str, config: dict[str, Any]
    ) -> None:
        import wandb

        # It would say much, and take what the terminal shows, bars and all, for a log.
        with _discreet_command():
            self._run = wandb.init(
                project=without_secrets(os.environ.get("WANDB_PROJECT", project)),
                name=name,
                id=key,
                resume="allow",
                dir=str(run.path),
                config=config,
                settings=wandb.Settings(quiet=True, console=os.environ.get("WANDB_CONSOLE", "off")),
            )
        self._axes: set[str] = set()
        folder = shlex.quote(os.path.relpath(Path(self._run.dir).parent))
        self.hint = f"W&B: {f'wandb sync {folder}' if self._run.offline else self._run.url}"

    def tell(self, values: Values, *, step: int, of: Training | None, before: int) -> None:
        # Its own step only rises; each group of figures gets an axis of its own instead.
        axis = ITERATION if of is None else f"train/{_word(of.name)}/step"
        groups = {key.split("/")[0] for key in values} if of is None else {axis.rpartition("/")[0]}
        for group in sorted(groups - self._axes):
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f"{group}/*", step_metric=axis)
        self._axes |= groups
        self._run.log({**values, axis: step + before})

    def written(self) -> None:
        """All: a process of its own writes it down, which outlives this one."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class _Trackio:
    """A run of trackio, known by its name."""

    def __init__(self, *, project: str, name: str, config: dict[str, Any], resume: bool) -> None:
        import trackio

        self._project, self._name = project, name
        with _silence():
            self._run = trackio.init(
                project, name=name, config=config, resume="allow" if resume else "never"
            )
        self.hint = f"trackio: trackio show --project {shlex.quote(project)}"

    def tell(self, values: Values, *, step: int, of: Training | None, before: int) -> None:
        self._run.log(values, step=step + before)

    def written(self) -> Written | None:
        """What is written of a run on this machine, whose figures are in SQLite at once.

        None for one on a server, or kept in files that are imported later.
        """
        from trackio.sqlite_storage import SQLiteStorage

        here = getattr(self._run, "_is_local", False)
        if not here or getattr(self._run, "_storage_mode", "sqlite") != "sqlite":
            return None
        rows = SQLiteStorage.get_logs(self._project, self._name)
        return [(int(row["step"]), row.keys()) for row in rows]

    def close(self, failed: bool) -> None:
        import trackio

        with _silence():
            trackio.finish()


TRACKERS: Mapping[TrackerName, TrackerKind] = {
    "tensorboard": TrackerKind(lambda at: _TensorBoard(at.run)),
    "wandb": TrackerKind(
        lambda at: _Wandb(at.run, project=at.project, name=at.name, key=at.key, config=at.settings),
        "Log in with `wandb login`, or keep it on this machine with WANDB_MODE=offline",
    ),
    "trackio": TrackerKind(
        lambda at: _Trackio(project=at.project, name=at.name, config=at.settings, resume=at.resume),
        "See its settings in the environment, TRACKIO_SPACE_ID above all, or leave it out",
        late=True,
    ),
}
"""All of them, by the names that a recipe knows them by."""


@contextlib.contextmanager
def _discreet_command() -> Iterator[None]:
    """The command line without secrets: W&B keeps it, and shows it to whoever sees the run."""
    words = sys.argv
    sys.argv = [without_secrets(word) for word in words]
    try:
        yield
    finally:
        sys.argv = words


def _silence() -> contextlib.redirect_stdout[io.StringIO]:
    """What trackio prints is no result of a command; our own line says where to look."""
    return contextlib.redirect_stdout(io.StringIO())
