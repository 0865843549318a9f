"""One run on disk: what it is, who may go on with it, what is done."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from srlm_lite.errors import UserError
from srlm_lite.recipe import Recipe, as_noted_now, recipe_of_run
from srlm_lite.run.files import draft_of, in_short, read_json, write_atomically, write_json
from srlm_lite.run.layout import (
    AnchorDir,
    CheckpointDir,
    ComparisonsDir,
    IterationDir,
    MtBenchDir,
    RewardDir,
    StageDir,
    adapter_files,
)
from srlm_lite.run.sums import forget, is_harmed, note
from srlm_lite.telling import without_secrets_in

FORMAT = 1
"""What `run.json` says of the form of a run's files, counted up where an earlier version would read
them wrongly. Runs from before it was noted have this one."""

_RESTORE = "Restore it, or delete the iterations after it"
_LOCK = ".lock"
_ASIDE, _DROPPED = ".before", ".dropped"
"""Where the run lies that another one is to follow; and while it is deleted."""
_OWN = re.compile(
    r"run\.json|base\.json|metrics\.jsonl|\.metrics\.jsonl\.sums|anchor|base|reward|iter_\d{3,}|\.scratch|\.checkpoint|vllm\.log"
    r"|compare|mt_bench|report\.html|tracking\.json|tensorboard|wandb"
)

_BEFORE = {
    *("run.json", "base.json", "vllm.log", "metrics.jsonl", ".metrics.jsonl.sums", "report.html"),
    *("tracking.json", "tensorboard", "wandb", ".scratch"),
}
"""What a run leaves that has learned nothing yet, its anchor's folder apart."""


class RunDir:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def base_json(self) -> Path:
        """Which weights the run is on, by hash or revision."""
        return self.path / "base.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """Where a report goes that is not told another place."""
        return self.path / "report.html"

    @property
    def tracking(self) -> Path:
        """What trackers have been told."""
        return self.path / "tracking.json"

    @property
    def tensorboard(self) -> Path:
        """What TensorBoard reads. W&B makes a directory of its own name beside it."""
        return self.path / "tensorboard"

    @property
    def vllm_log(self) -> Path:
        """What the engine vllm says, of all starts."""
        return self.path / "vllm.log"

    @property
    def scratch(self) -> Path:
        """For what training libraries insist on writing; removed when a stage ends."""
        return self.path / ".scratch"

    @property
    def checkpoint(self) -> CheckpointDir:
        """The training under way, as it was after one of its steps."""
        return CheckpointDir(self.path / ".checkpoint")

    def shared(self, name: str) -> Path:
        """A file of the judge's that the whole run shares and people may edit."""
        return self.path / f"{name}.jsonl"

    @property
    def anchor(self) -> AnchorDir:
        return AnchorDir(self.path / "anchor")

    @property
    def reward(self) -> RewardDir:
        return RewardDir(self.path / "reward")

    @property
    def base_evaluation(self) -> StageDir:
        """Where an evaluation of the bare base goes."""
        return StageDir(self.path / "base")

    @property
    def comparisons(self) -> ComparisonsDir:
        return ComparisonsDir(self.path / "compare")

    def mt_bench(self, name: str) -> MtBenchDir:
        """Where a model's MT-Bench goes; the name ends in a digest, as of a comparison."""
        return MtBenchDir(self.path / "mt_bench" / name)

    def under_way(self) -> dict[str, Any] | None:
        """The training that is kept: its iteration and name, its step, and how many there are.

        None where there is none, and where its result is written: a run may be killed before it
        lets go of what it has kept.
        """
        found = self.checkpoint.progress()
        if found is None:
            return None
        result = self._result(found["iteration"], found["name"])
        return None if result is not None and result.is_file() else found

    def _result(self, iteration: int, training: str) -> Path | None:
        """What is written last of a training; None: of one that is not known here."""
        if iteration:
            places = {place.name: place for place in self.iteration(iteration).delta_places}
            place = places.get(training.removesuffix(" sft"))
            return None if place is None else place.training
        weights, _ = adapter_files(self.anchor.ift_only)
        of_run = {
            "anchor": self.anchor.training,
            "ift-only": weights,
            "reward": self.reward.done,
        }
        return of_run.get(training)

    def iteration(self, number: int) -> IterationDir:
        return IterationDir(self.path / f"iter_{number:03d}", number)

    def iterations(self) -> Iterator[IterationDir]:
        """The iterations that have begun, in order."""
        number = 1
        while self.iteration(number).path.is_dir():
            yield self.iteration(number)
            number += 1

    def last_done(self) -> int:
        """Number of the last iteration that is done; 0 when only the anchor is, or nothing.

        Raises:
            UserError: One in between is gone.
        """
        begun = sum(1 for _ in self.iterations())
        last = self._last_begun()
        if last > begun:
            raise UserError(
                f"is gone, and iteration {last} is there",
                where=str(self.iteration(begun + 1).path),
                way_out=_RESTORE,
            )
        return max((it.number for it in self.iterations() if it.is_done), default=0)

    def _last_begun(self) -> int:
        found = (re.fullmatch(r"iter_(\d{3,})", entry.name) for entry in self._entries())
        return max((int(name[1]) for name in found if name), default=0)

    def _hold_to_models(self) -> None:
        """Refuse to make anew a model that what is there was made from: it might become another.

        Raises:
            UserError: The training of one is gone.
        """
        last = self._last_begun()
        before = [self.iteration(t).delta_place.training for t in range(1, last)]
        for training in [self.anchor.training, *before] if last else []:
            if not training.is_file():
                raise UserError(
                    f"is gone, and iteration {last} was made from that model",
                    where=str(training),
                    way_out=_RESTORE,
                )

    def hold_to_files(self) -> None:
        """Hold every file of the finished stages against the hash that was noted of it.

        Of a stage under way, those that have been noted by now.

        Raises:
            UserError: Some have been edited, truncated or deleted since; names them.
        """
        stages: list[StageDir] = [self.anchor, self.reward, *self.iterations()]
        harmed = [(stage, line) for stage in stages for line in stage.changed()]
        changed = [line for stage, line in harmed if stage.is_done]
        if harmed and not changed:
            folder = harmed[0][0].path
            raise UserError(
                f"holds files that the run has not written so: {_some([o for _, o in harmed])}",
                where=str(self.path),
                way_out=f"Restore them, or delete {folder} and go on (iterate makes it again)",
            )
        if changed:
            raise UserError(
                f"holds files that the run has not written so: {_some(changed)}",
                where=str(self.path),
                way_out="Restore them, or delete the iterations from the first of them on and go "
                "on (iterate makes them again)",
            )

    def hold_to_rows(self, *numbers: int) -> None:
        """The same of rows and figures alone, in no time.

        Args:
            numbers: Of iterations; default: all, and the anchor.

        Raises:
            UserError: As `hold_to_files`.
        """
        stages = map(self.iteration, numbers) if numbers else [self.anchor, *self.iterations()]
        for place in stages:
            if changed := place.changed(weights=False):
                raise UserError(
                    f"holds files that the run has not written so: {_some(changed)}",
                    where=str(self.path),
                    way_out=f"Restore them, or delete {place.path} and what follows it, and go on",
                )

    @property
    def exists(self) -> bool:
        return self.run_json.is_file()

    @property
    def is_begun(self) -> bool:
        """Whether anything has been learned or sampled: until then it may still be another run."""
        return self.exists and any(self._is_work(entry) for entry in self._entries())

    def _is_work(self, entry: Path) -> bool:
        if entry == self.anchor.path and entry.is_dir():
            # How the base reads its data is told in seconds, and nothing is learned by it.
            early = (self.anchor.reading.name, draft_of(self.anchor.reading).name)
            return any(file.name not in early for file in entry.iterdir())
        return _OWN.fullmatch(entry.name) is not None and entry.name not in _BEFORE

    def facts(self) -> dict[str, Any]:
        """What `run.json` says.

        Raises:
            UserError: There is no run here.
        """
        if not self.exists:
            place = shlex.quote(str(self.path))
            raise UserError(
                "holds no run (no run.json)",
                where=str(self.path),
                way_out=f"Start one with: srlm-lite iterate --adapters {place}",
            )
        facts = read_json(self.run_json)
        self._refuse_later(facts)
        recipe: Any = facts.get("recipe")
        identity: Any = facts.get("identity")
        base = identity.get("base") if isinstance(identity, dict) else None
        if (
            not isinstance(recipe, dict)
            or not isinstance(base, dict)
            or not (isinstance(base.get("name"), str))
        ):
            raise UserError("not the run.json of a run of srlm-lite", where=str(self.run_json))
        if differing := _contradictions(as_noted_now(identity), recipe):
            raise UserError(
                f"contradicts itself: its recipe and its identity differ in {_some(differing)}",
                where=str(self.run_json),
                way_out="Restore it: one of the two is not as the run has written it",
            )
        return facts

    def _refuse_later(self, facts: Mapping[str, Any]) -> None:
        form, versions = facts.get("format", FORMAT), facts.get("versions")
        if isinstance(form, int) and form <= FORMAT:
            return
        by = versions.get("srlm-lite") if isinstance(versions, dict) else None
        raise UserError(
            f"is of a later srlm-lite{f', {by}' if isinstance(by, str) else ''}: its files have "
            f"form {in_short(form)}, and this one knows {FORMAT}",
            where=str(self.run_json),
            way_out="Update srlm-lite",
        )

    def recipe(self) -> Recipe:
        """The recipe that the run was begun or last gone on with.

        Raises:
            UserError: There is no run here, or its recipe cannot be read.
        """
        return recipe_of_run(self.facts()["recipe"], where=str(self.run_json))

    def open(self, recipe: Recipe, facts: dict[str, Any], *, fresh: bool = False) -> None:
        """Begin a run here, or go on with the one that is here.

        Args:
            fresh: Begin one in any case; the one that is here is set aside, see `settle`.

        Raises:
            UserError: The directory holds a run of another configuration (the differing keys are
                named), or files that are not a run's.
        """
        self._refuse_other_places()
        if fresh and self.exists:
            if self._aside.is_dir():  # one that never got going lies in the place of the last whole
                self._clear()
            else:
                self._set_aside()
        if not self.exists:
            self._write_run(recipe, facts)
            return
        if self._differing(recipe) and not self.is_begun:
            self._clear()
            self._write_run(recipe, facts)
            return
        self.check(recipe)
        if self.facts()["recipe"] != recipe.model_dump(mode="json"):
            self._write_run(recipe, facts)  # more iterations, other gates, the same files elsewhere

    @contextmanager
    def or_as_before(self) -> Iterator[None]:
        """Within this context a run that was set aside lies where it lay again if it ends by an
        error before the new one has settled. An interrupted one may go on.
        """
        try:
            yield
        except Exception:
            if self._aside.is_dir():
                self._give_back()
            raise

    @property
    def is_settled(self) -> bool:
        """Whether no run is set aside for this one."""
        return not self._aside.is_dir()

    def settle(self) -> None:
        """The new run has what it needs: from here on it is the run, and the last one is gone."""
        dropped = self.path / _DROPPED
        shutil.rmtree(dropped, ignore_errors=True)
        if self._aside.is_dir():
            self._aside.replace(dropped)  # at once, so that no half of it is ever given back
            shutil.rmtree(dropped)

    def check(self, recipe: Recipe, *, fresh: bool = False) -> None:
        """Whether `open` would begin a run here, or go on with the one that is here.

        Raises:
            UserError: As `open`.
        """
        self._refuse_other_places()
        if fresh or not self.exists:
            return
        self._refuse_another(recipe)
        self._hold_to_models()
        self.hold_to_files()

    def glance(self, recipe: Recipe, *, fresh: bool = False) -> None:
        """What of `check` and `locked` shows at once: no file of a finished stage is read.

        Raises:
            UserError: As they.
        """
        self._refuse_other_places()
        self._refuse_unwritable()
        if self._lock.is_file():
            with self._lock.open() as file:
                self._hold(file)
        if self.exists and not fresh:
            self._refuse_another(recipe)

    def _refuse_another(self, recipe: Recipe) -> None:
        differing = self._differing(recipe)
        if differing and self.is_begun:
            raise UserError(
                f"holds a run of another configuration; differing: {_some(differing)}",
                where=str(self.path),
                way_out="Use another directory, undo the difference, or start over with --fresh",
            )

    def _refuse_unwritable(self) -> None:
        place = self.path.absolute()
        there = next(one for one in (place, *place.parents) if one.exists())
        if not there.is_dir():
            raise UserError("lies below a file", where=str(self.path))
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(
                "nothing can be written there",
                where=str(there),
                way_out="Allow it, or choose another directory for --adapters",
            )

    def _differing(self, recipe: Recipe) -> list[str]:
        """What the run that is here and a recipe do not agree on, a line each."""
        return _differences(as_noted_now(self.facts()["identity"]), recipe.identity())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working in this directory meanwhile.

        The lock goes with the process, however that ends.

        Raises:
            UserError: Another process has it, or this is no place for a run.
        """
        self._refuse_other_places()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except NotADirectoryError as error:
            raise UserError("lies below a file", where=str(self.path)) from error
        except FileNotFoundError as error:  # not of a parent: those are made as well
            raise UserError(
                "no directory can be made here", where=str(self.path), way_out="Choose another"
            ) from error
        with self._lock.open("w") as file:
            self._hold(file)
            if self._is_torn:
                self._give_back()
            yield

    @property
    def _lock(self) -> Path:
        return self.path / _LOCK

    def _hold(self, lock: IO[str]) -> None:
        """Have the lock until the file is closed."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "another srlm-lite is working here",
                where=str(self.path),
                way_out="Wait until it has finished, or use another directory",
            ) from error

    def _refuse_other_places(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError("is a file, not a directory", where=str(self.path))
        if not self.exists and self._entries() and not self._is_torn:
            raise UserError(
                "holds files, but no run (no run.json)",
                where=str(self.path),
                way_out="Choose an empty or new directory for --adapters",
            )

    def _entries(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        # A draft of run.json is left by a run that was killed, or found the disk full, there.
        not_yet = (_LOCK, _ASIDE, _DROPPED, draft_of(self.run_json).name)
        return [entry for entry in self.path.iterdir() if entry.name not in not_yet]

    @property
    def _aside(self) -> Path:
        return self.path / _ASIDE

    @property
    def _is_torn(self) -> bool:
        """Whether setting a run aside, or giving it back, was killed midway."""
        both = self.exists and (self._aside / self.run_json.name).is_file()
        return self._aside.is_dir() and not both

    def _set_aside(self) -> None:
        self._aside.mkdir()
        for entry in self._own():
            entry.replace(self._aside / entry.name)

    def _give_back(self) -> None:
        if not self._is_torn:
            self._clear()
        first = sorted(self._aside.iterdir(), key=lambda entry: entry.name == self.run_json.name)
        for entry in first:
            entry.replace(self.path / entry.name)
        self._aside.rmdir()

    def _clear(self) -> None:
        for entry in self._own():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _own(self) -> list[Path]:
        """What a run writes, and nothing that somebody has put beside it. Its run.json last: where
        a process is killed on the way, it is still a run.
        """
        found = sorted(self._entries(), key=lambda entry: entry == self.run_json)
        return [entry for entry in found if _OWN.fullmatch(entry.name)]

    @property
    def base_revision(self) -> str | None:
        """The commit of a base from the Hub; None where it is from elsewhere, or not noted yet."""
        if not self.base_json.is_file():
            return None
        revision: str | None = read_json(self.base_json).get("revision")
        return revision

    @property
    def base_conversion(self) -> int | None:
        """How the run's GGUF file was converted, by number; None where it is on none, or not yet.

        Runs from before there was a second way noted no number.
        """
        if not self.base_json.is_file():
            return None
        noted = read_json(self.base_json)
        return noted.get("conversion", 1) if noted.get("kind") == "gguf" else None

    def hold_to_base(self, source: dict[str, Any]) -> None:
        """Note which base the run is on, by hash or revision; refuse any other from then on.

        Raises:
            UserError: The run was begun on other weights.
        """
        if not self.base_json.is_file():
            write_json(self.base_json, source)
            return
        begun = read_json(self.base_json, name=str)
        for key in ("sha256", "revision"):
            if begun.get(key) != source.get(key):
                raise UserError(
                    f"the run was begun on other weights of {begun['name']} "
                    f"({key} {in_short(begun.get(key))}, now {in_short(source.get(key))})",
                    where=str(self.path),
                    way_out="Restore the base, or use another directory",
                )

    def _write_run(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        resolved = {
            "format": FORMAT,
            "recipe": recipe.model_dump(mode="json"),
            "digest": recipe.digest(),
            "identity": recipe.identity(),
            "seed": recipe.seed,
            **without_secrets_in(facts),  # the command line may have one
        }
        write_json(self.run_json, resolved)

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; it is on disk when this returns.

        What a killed run left of a last line is replaced, not continued.
        """
        line = json.dumps(row, ensure_ascii=False) + "\n"
        whole = self._whole_metrics()
        if self.metrics.exists() and self.metrics.stat().st_size != len(whole.encode()):
            forget(self.metrics)  # what was noted of the torn one is not what follows
        write_atomically(self.metrics, whole + line)
        note(self.metrics)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of `metrics.jsonl`; a torn last line is passed over."""
        if is_harmed(self.metrics):
            raise self._damaged_metrics("its hash is another one than was noted")
        try:
            rows = [json.loads(line) for line in self._whole_metrics().split("\n") if line]
            wanted = {"iteration", "stage"}
            if not all(isinstance(row, dict) and wanted <= row.keys() for row in rows):
                raise ValueError("a row is not a stage's")
            return rows
        except ValueError as error:
            raise self._damaged_metrics(str(error)) from error

    def _damaged_metrics(self, why: str) -> UserError:
        return UserError(
            f"damaged ({why})",
            where=str(self.metrics),
            way_out="Restore it, or delete it: only figures of stages are lost",
        )

    def _whole_metrics(self) -> str:
        if not self.metrics.exists():
            return ""
        content = self.metrics.read_bytes()
        return content[: content.rfind(b"\n") + 1].decode("utf-8")


_SHOWN = 6
"""Differing settings that a refusal names."""


def _some(lines: Sequence[str]) -> str:
    """The first few in one line, and how many more there are."""
    more = len(lines) - _SHOWN
    return "; ".join([*lines[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _contradictions(identity: Any, recipe: Any, prefix: str = "") -> list[str]:
    """Settings of which a run's identity says another thing than its recipe, a line each.

    What the identity knows by content, by its place among the shipped, or by what `auto` came to is
    passed over.
    """
    if isinstance(identity, dict) and isinstance(recipe, dict):
        return [
            line
            for key in sorted(identity.keys() & recipe.keys())
            for line in _contradictions(identity[key], recipe[key], f"{prefix}.{key}".lstrip("."))
        ]
    by_content = isinstance(identity, str) and identity.startswith("sha256:")
    if identity == recipe or by_content or prefix == "base.name" or recipe == "auto":
        return []
    return [f"{prefix} ({in_short(recipe)}, {in_short(identity)})"]


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{prefix} ({in_short(before)} there, {in_short(now)} now)"]
