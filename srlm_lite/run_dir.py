"""The run directory: the only code that knows a path under it.

Every artefact is either complete or absent as far as a reader can tell: whole files are written
beside their place and renamed into it; journals grow by whole chunks, and a torn tail is cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from srlm_lite.errors import UserError
from srlm_lite.recipe import Recipe, as_noted_now, recipe_of_run
from srlm_lite.records import Record

R = TypeVar("R", bound=Record)

_RESTORE = "Restore it, or delete the iterations after it"
_LOCK = ".lock"
_OWN = re.compile(
    r"run\.json|base\.json|metrics\.jsonl|anchor|base|reward|iter_\d{3,}|\.scratch|vllm\.log"
    r"|compare|mt_bench|report\.html|tracking\.json|tensorboard|wandb"
)

_BEFORE = {"run.json", "base.json", "vllm.log"}
"""What a run leaves that has computed nothing yet."""


def read_jsonl(path: Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """All rows of a JSONL file.

    Args:
        growing: Of a run that may be going on, or was killed: a last line without its end, of a
            chunk that is being written, is passed over.

    Raises:
        UserError: The file is missing, or a line is not a JSON object; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # files from Windows may begin with a mark
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path)) from error
    except IsADirectoryError as error:
        raise UserError("is a directory, not a file", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=str(path)) from error
    if growing:
        text = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            told = getattr(error, "msg", str(error))
            raise UserError(f"not JSON ({told})", where=f"{path}:{number}") from error
        if _has_lone_surrogate(line, row):
            raise UserError(
                "holds half a character (a lone surrogate)",
                where=f"{path}:{number}",
                way_out="Write the file again as UTF-8, or leave the row out",
            )
        if not isinstance(row, dict):
            raise UserError("expected a JSON object", where=f"{path}:{number}")
        rows.append(row)
    return rows


def read_records(path: Path, kind: type[R], *, growing: bool = False) -> list[R]:
    """All rows of a JSONL file as records.

    Args:
        growing: As for `read_jsonl`.

    Raises:
        UserError: As `read_jsonl`; or a row lacks a key or has a value of another type.
    """
    check = TypeAdapter(kind)
    records = []
    for number, row in enumerate(read_jsonl(path, growing=growing), start=1):
        try:
            records.append(check.validate_python(kind.from_row(row).to_row()))
        except KeyError as error:
            raise UserError(f"row {number} lacks {error.args[0]}", where=str(path)) from error
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"row {number}: `{first['loc'][0]}` is {_short(first['input'])}: {first['msg']}",
                where=str(path),
            ) from error
    return records


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _draft(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: indented, keys in the order given."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, **wanted: type) -> dict[str, Any]:
    """A JSON object from a file of the run.

    Args:
        wanted: Keys that the reader needs, and what stands there.

    Raises:
        UserError: It is missing, or not what the run has written there.
    """
    way_out = "Restore it, or make the run again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("is missing", where=str(path), way_out=way_out) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), way_out=way_out) from error
    if not isinstance(found, dict):
        raise UserError("not a JSON object", where=str(path), way_out=way_out)
    for key, kind in wanted.items():
        if not isinstance(found.get(key), kind):
            raise UserError(f"not as written: no `{key}`", where=str(path), way_out=way_out)
    return found


def _has_lone_surrogate(line: str, row: Any) -> bool:
    """Whether a text of a row cannot be written: only an escape can spell such a one."""
    if "\\ud" not in line and "\\uD" not in line:
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a whole JSONL file atomically."""
    write_atomically(path, "".join(_line(record) for record in records))


def _line(record: Record) -> str:
    return json.dumps(record.to_row(), ensure_ascii=False) + "\n"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Journal:
    """A JSONL file that grows by chunks, each on disk before the next one starts.

    A chunk is known by the keys of its rows, in order. `fill` computes the chunks that the file
    does not hold whole yet, after cutting off whatever a killed run left behind them.
    """

    def __init__(self, path: Path, kind: type[R], key: Callable[[Any], str]) -> None:
        self.path, self._kind, self._key = path, kind, key

    def fill(
        self,
        chunks: Sequence[Sequence[str]],
        compute: Callable[[int], Sequence[Record]],
        *,
        on_chunk: Callable[[int, bool], None] = lambda index, computed: None,
    ) -> list[Any]:
        """`stream`, with `compute` making the rows of chunk i."""
        return self.stream(chunks, lambda missing: map(compute, missing), on_chunk=on_chunk)

    def stream(
        self,
        chunks: Sequence[Sequence[str]],
        compute: Callable[[Sequence[int]], Iterable[Sequence[Record]]],
        *,
        on_chunk: Callable[[int, bool], None] = lambda index, computed: None,
    ) -> list[Any]:
        """Make the file hold all chunks; return all its rows as records.

        Args:
            chunks: The keys of each chunk's rows, in the order of the file.
            compute: Makes the rows of these chunks, in order. The next chunk is asked for when the
                last one is on disk.
            on_chunk: Told of each chunk as it becomes complete, and whether it was computed now.

        Raises:
            RuntimeError: `compute` returned rows with other keys than announced.
        """
        rows, sizes = self._whole_rows()
        records: list[Any] = []
        whole = 0
        for keys in chunks:
            found = rows[len(records) : len(records) + len(keys)]
            if [self._key(record) for record in found] != list(keys):
                break
            records.extend(found)
            whole += 1
        self._cut(sum(sizes[: len(records)]))
        for index in range(whole):
            on_chunk(index, False)
        missing = range(whole, len(chunks))
        for index, computed in zip(missing, compute(missing), strict=True):
            made: list[Any] = list(computed)
            if [self._key(record) for record in made] != list(chunks[index]):
                raise RuntimeError(f"{self.path}: chunk {index} came back with other rows")
            self._append(made)
            records.extend(made)
            on_chunk(index, True)
        return records

    def _whole_rows(self) -> tuple[list[Any], list[int]]:
        if not self.path.exists():
            return [], []
        rows, sizes = [], []
        check = TypeAdapter(self._kind)
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                found = self._kind.from_row(json.loads(line))
                rows.append(check.validate_python(found.to_row()))
            except (ValueError, KeyError, TypeError):  # a ValidationError is a ValueError
                break
            sizes.append(len(line))
        return rows, sizes

    def _cut(self, size: int) -> None:
        if not self.path.exists():
            write_atomically(self.path, "")
        elif self.path.stat().st_size != size:
            os.truncate(self.path, size)

    def _append(self, records: Sequence[Record]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(record) for record in records))
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class StageDir:
    """A folder of the run that ends with `done.json`: the anchor's, or an iteration's."""

    path: Path

    @property
    def done(self) -> Path:
        """Written last: counts, seconds, and the SHA-256 of every artefact."""
        return self.path / "done.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "eval.json"

    @property
    def evaluation_dir(self) -> Path:
        """Journals of an evaluation."""
        return self.path / "eval"

    def evaluation_on(self, name: str) -> StageDir:
        """Where the same model's evaluation on other data, or with other settings, goes."""
        return StageDir(self.path / "eval_on" / name)

    @property
    def is_done(self) -> bool:
        return self.done.is_file()

    def finish(self, **facts: Any) -> None:
        """Write `done.json` with the facts and the hash of every file below this folder."""
        artefacts = {
            str(file.relative_to(self.path)): sha256_file(file)
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and file != self.done and not file.name.startswith(".")
        }
        write_json(self.done, {**facts, "sha256": artefacts})

    def verify(self, *files: Path) -> dict[str, str]:
        """Hold files of a finished folder against `done.json`; their hashes, by relative name.

        Raises:
            UserError: The folder is not finished, or a file is missing or has changed since.
        """
        if not self.is_done:
            raise UserError(
                "is not finished (no done.json)",
                where=str(self.path),
                way_out="Finish it: srlm-lite iterate goes on where it stopped",
            )
        noted, found = read_json(self.done, sha256=dict)["sha256"], {}
        for file in files:
            name = str(file.relative_to(self.path))
            if not file.is_file():
                raise UserError("is missing", where=str(file))
            found[name] = sha256_file(file)
            if found[name] != noted.get(name):
                raise UserError(
                    "is not the file that the run has written: its hash differs from done.json",
                    where=str(file),
                    way_out="Restore it, or make the run again",
                )
        return found

    def changed(self) -> list[str]:
        """Files of a finished folder that are not what the run has written, and what they are now.

        None of a folder that is not finished: its files may still grow.
        """
        if not self.is_done:
            return []
        told = []
        for name, digest in read_json(self.done, sha256=dict)["sha256"].items():
            file = self.path / name
            if not file.is_file():
                told.append(f"{file} (missing)")
            elif sha256_file(file) != digest:
                told.append(f"{file} (changed)")
        return told


@dataclass(frozen=True, slots=True)
class AnchorDir(StageDir):
    """`anchor/`: the adapter lies directly in it."""

    @property
    def adapter(self) -> Path:
        return self.path

    @property
    def adapter_files(self) -> tuple[Path, ...]:
        """What the adapter is, on disk."""
        return adapter_files(self.adapter)

    @property
    def reading(self) -> Path:
        """How well the bare base reads the run's data."""
        return self.path / "reading.json"

    @property
    def ift_only(self) -> Path:
        """The IFT-only adapter that writes the EFT targets."""
        return self.path / "ift_only"

    @property
    def eft_judgements(self) -> Path:
        return self.path / "eft_judgements.jsonl"

    @property
    def eft_targets(self) -> Path:
        """The EFT rows that were kept, with their targets."""
        return self.path / "eft_targets.jsonl"

    @property
    def training(self) -> Path:
        """Facts of the training, written after the adapter."""
        return self.path / "training.json"


@dataclass(frozen=True, slots=True)
class RewardDir(StageDir):
    """`reward/`: the reward model's adapter, which stands on the anchor, with its head."""

    @property
    def adapter(self) -> Path:
        return self.path

    @property
    def head(self) -> Path:
        """The layer from the last hidden state to the reward."""
        return self.path / "head.safetensors"


@dataclass(frozen=True, slots=True)
class DeltaPlace:
    """Where a delta goes, and the facts of its training, written after it."""

    name: str
    adapter: Path
    training: Path

    @property
    def steps(self) -> Path:
        """Loss and rewards of every step, written before the facts."""
        return self.training.with_name("training_steps.jsonl")


@dataclass(frozen=True, slots=True)
class IterationDir(StageDir):
    """`iter_001/` and so on."""

    number: int

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.jsonl"

    @property
    def candidates(self) -> Path:
        return self.path / "candidates.jsonl"

    @property
    def judgements(self) -> Path:
        return self.path / "judgements.jsonl"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs.jsonl"

    @property
    def drops(self) -> Path:
        return self.path / "drops.json"

    @property
    def likelihoods(self) -> Path:
        """Folder of log-likelihoods, a file for each model that read the candidates."""
        return self.path / "likelihoods"

    @property
    def teacher_candidates(self) -> Path:
        """Of a stronger model, from its server."""
        return self.path / "teacher_candidates.jsonl"

    @property
    def replies(self) -> Path:
        """What a model said to a method's own questions."""
        return self.path / "replies.jsonl"

    def asked(self, what: str) -> Path:
        """What a model said where a method asks in several turns."""
        return self.path / "replies" / f"{what}.jsonl"

    @property
    def revisions(self) -> Path:
        """Answers revised in the light of principles, a row for each round."""
        return self.path / "revisions.jsonl"

    @property
    def labels(self) -> Path:
        """What principles made of pairs of candidates."""
        return self.path / "labels.jsonl"

    @property
    def past_candidates(self) -> Path:
        """Of the first model, where a method wants them beside the policy's."""
        return self.path / "past_candidates.jsonl"

    @property
    def judged_candidates(self) -> list[Path]:
        """The files that exist of candidates in `judgements`: the policy's, and others beside."""
        return _existing(self.candidates, self.past_candidates, self.teacher_candidates)

    @property
    def future_candidates(self) -> Path:
        """Of a provisional next model."""
        return self.path / "future_candidates.jsonl"

    @property
    def future_judgements(self) -> Path:
        return self.path / "future_judgements.jsonl"

    @property
    def all_candidates(self) -> list[Path]:
        """Those of a provisional next model too, where there are any."""
        return [*self.judged_candidates, *_existing(self.future_candidates)]

    @property
    def all_judgements(self) -> list[Path]:
        """On `all_candidates`, by the model that made the pairs."""
        return [*_existing(self.judgements), *_existing(self.future_judgements)]

    @property
    def earlier_judgements(self) -> Path:
        """Of the model before the policy, on the policy's candidates."""
        return self.path / "earlier_judgements.jsonl"

    @property
    def delta(self) -> Path:
        return self.path / "delta"

    @property
    def adapter_files(self) -> tuple[Path, ...]:
        """What the delta is, on disk."""
        return adapter_files(self.delta)

    @property
    def delta_place(self) -> DeltaPlace:
        """Of the delta that the iteration learns."""
        return DeltaPlace("delta", self.delta, self.path / "training.json")

    @property
    def judge_place(self) -> DeltaPlace:
        """Of the judge's delta, where it has one of its own."""
        folder = self.path / "judge_delta"
        return DeltaPlace("judge delta", folder, folder / "training.json")

    @property
    def provisional_place(self) -> DeltaPlace:
        """Of a delta that only helps to make pairs."""
        folder = self.path / "provisional"
        return DeltaPlace("provisional", folder, folder / "training.json")

    @property
    def delta_places(self) -> tuple[DeltaPlace, ...]:
        """All three, whether or not there is anything."""
        return self.delta_place, self.judge_place, self.provisional_place


@dataclass(frozen=True, slots=True)
class ComparisonsDir:
    """`compare/`: replies and judgements that comparisons share, and a folder for each of them.

    Names end in a digest of all that decides what the file holds.
    """

    path: Path

    def replies(self, name: str) -> Path:
        """A model's replies to the prompts of a comparison."""
        return self.path / "replies" / f"{name}.jsonl"

    def judgements(self, name: str) -> Path:
        """A pointwise judge's votes on such replies."""
        return self.path / "judgements" / f"{name}.jsonl"

    def finished(self) -> list[ComparisonDir]:
        """Those that have a result, by name."""
        found = map(ComparisonDir, sorted(self.path.iterdir()) if self.path.is_dir() else [])
        return [one for one in found if one.result.is_file()]

    def comparison(self, name: str) -> ComparisonDir:
        """One head to head."""
        return ComparisonDir(self.path / name)


@dataclass(frozen=True, slots=True)
class ComparisonDir:
    """One head to head."""

    path: Path

    @property
    def verdicts(self) -> Path:
        """A pairwise judge's replies, two a prompt."""
        return self.path / "verdicts.jsonl"

    @property
    def annotations(self) -> Path:
        """A row a prompt, in AlpacaEval's format."""
        return self.path / "annotations.jsonl"

    @property
    def result(self) -> Path:
        """Written last."""
        return self.path / "result.json"


@dataclass(frozen=True, slots=True)
class MtBenchDir:
    """One model's MT-Bench by one judge."""

    path: Path

    def answers(self, turn: int) -> Path:
        """The model's answers in turn 1 or 2."""
        return self.path / f"answers_{turn}.jsonl"

    @property
    def grades(self) -> Path:
        """The judge's replies, two a question."""
        return self.path / "grades.jsonl"

    @property
    def result(self) -> Path:
        """Written last."""
        return self.path / "result.json"


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

        Raises:
            UserError: Some have been edited, truncated or deleted since; names them.
        """
        stages: list[StageDir] = [self.anchor, self.reward, *self.iterations()]
        changed = [line for stage in stages for line in stage.changed()]
        if changed:
            raise UserError(
                f"holds files that the run has not written so: {_some(changed)}",
                where=str(self.path),
                way_out="Restore them, or delete the iterations from the first of them on and go "
                "on (iterate makes them again)",
            )

    @property
    def exists(self) -> bool:
        return self.run_json.is_file()

    @property
    def is_begun(self) -> bool:
        """Whether anything has been computed: until then the run may still be another one."""
        return self.exists and any(entry.name not in _BEFORE for entry in self._entries())

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
        recipe, identity = facts.get("recipe"), facts.get("identity")
        base = identity.get("base") if isinstance(identity, dict) else None
        if not isinstance(recipe, dict) or not isinstance(base, dict) or "name" not in base:
            raise UserError("not the run.json of a run of srlm-lite", where=str(self.run_json))
        return facts

    def recipe(self) -> Recipe:
        """The recipe that the run was begun or last gone on with.

        Raises:
            UserError: There is no run here, or its recipe cannot be read.
        """
        return recipe_of_run(self.facts()["recipe"], where=str(self.run_json))

    def open(self, recipe: Recipe, facts: dict[str, Any], *, fresh: bool = False) -> None:
        """Begin a run here, or go on with the one that is here.

        Raises:
            UserError: The directory holds a run of another configuration (the differing keys are
                named), or files that are not a run's.
        """
        self._refuse_other_places()
        if fresh and self.exists:
            self._clear()
        if not self.exists:
            self._write_run(recipe, facts)
            return
        if self._differing(recipe) and not self.is_begun:
            self.base_json.unlink(missing_ok=True)
        self.check(recipe)
        before = self.facts()
        if before["recipe"] != recipe.model_dump(mode="json"):
            self._write_run(recipe, facts)  # more iterations, other gates, the same files elsewhere

    def check(self, recipe: Recipe, *, fresh: bool = False) -> None:
        """Whether `open` would begin a run here, or go on with the one that is here.

        Raises:
            UserError: As `open`.
        """
        self._refuse_other_places()
        if fresh or not self.exists:
            return
        differing = self._differing(recipe)
        if differing and self.is_begun:
            raise UserError(
                f"holds a run of another configuration; differing: {_some(differing)}",
                where=str(self.path),
                way_out="Use another directory, undo the difference, or start over with --fresh",
            )
        self._hold_to_models()
        self.hold_to_files()

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
        with (self.path / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    "another srlm-lite is working here",
                    where=str(self.path),
                    way_out="Wait until it has finished, or use another directory",
                ) from error
            yield

    def _refuse_other_places(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError("is a file, not a directory", where=str(self.path))
        if not self.exists and self._entries():
            raise UserError(
                "holds files, but no run (no run.json)",
                where=str(self.path),
                way_out="Choose an empty or new directory for --adapters",
            )

    def _entries(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        # A draft of run.json is left by a run that was killed, or found the disk full, there.
        not_yet = (_LOCK, _draft(self.run_json).name)
        return [entry for entry in self.path.iterdir() if entry.name not in not_yet]

    def _clear(self) -> None:
        # What a run writes, and nothing that somebody has put beside it. Its run.json last: when
        # this is killed, it is still a run that can be started over.
        for entry in sorted(self._entries(), key=lambda entry: entry == self.run_json):
            if not _OWN.fullmatch(entry.name):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

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
                    f"({key} {_short(begun.get(key))}, now {_short(source.get(key))})",
                    where=str(self.path),
                    way_out="Restore the base, or use another directory",
                )

    def _write_run(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        resolved = {
            "recipe": recipe.model_dump(mode="json"),
            "digest": recipe.digest(),
            "identity": recipe.identity(),
            "seed": recipe.seed,
            **facts,
        }
        write_json(self.run_json, resolved)

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; it is on disk when this returns.

        What a killed run left of a last line is replaced, not continued.
        """
        line = json.dumps(row, ensure_ascii=False) + "\n"
        write_atomically(self.metrics, self._whole_metrics() + line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of `metrics.jsonl`; a torn last line is passed over."""
        try:
            rows = [json.loads(line) for line in self._whole_metrics().split("\n") if line]
            wanted = {"iteration", "stage"}
            if not all(isinstance(row, dict) and wanted <= row.keys() for row in rows):
                raise ValueError("a row is not a stage's")
            return rows
        except ValueError as error:
            raise UserError(
                f"damaged ({error})",
                where=str(self.metrics),
                way_out="Restore it, or delete it: only figures of stages are lost",
            ) from error

    def _whole_metrics(self) -> str:
        if not self.metrics.exists():
            return ""
        content = self.metrics.read_bytes()
        return content[: content.rfind(b"\n") + 1].decode("utf-8")


def _existing(*paths: Path) -> list[Path]:
    return [path for path in paths if path.is_file()]


def adapter_files(folder: Path) -> tuple[Path, ...]:
    """What an adapter is, on disk."""
    return folder / "adapter_model.safetensors", folder / "adapter_config.json"


_SHOWN = 6
"""Differing settings that a refusal names."""


def _some(lines: Sequence[str]) -> str:
    """The first few in one line, and how many more there are."""
    more = len(lines) - _SHOWN
    return "; ".join([*lines[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{prefix} ({_short(before)} there, {_short(now)} now)"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}…{text[-8:]}"
