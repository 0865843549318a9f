"""Names and places of what is in a run, by folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.run.files import read_json, sha256_file, write_json
from srlm_lite.run.sums import forget, is_harmed, summed_in, sums_of


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
        artefacts = {name: sha256_file(file) for name, file in self._files()}
        write_json(self.done, {**facts, "sha256": artefacts})
        self._noted.unlink(missing_ok=True)
        for name in artefacts:
            forget(self.path / name)

    def _files(self) -> list[tuple[str, Path]]:
        """What is below this folder but `done.json` and what is hidden, by relative name."""
        return [
            (str(file.relative_to(self.path)), file)
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and file != self.done and not file.name.startswith(".")
        ]

    @property
    def _noted(self) -> Path:
        """In a folder that is not finished: the SHA-256 of each file that is."""
        return self.path / ".noted.json"

    def note(self, seen: dict[Path, tuple[int, int, str]]) -> None:
        """Note the hash of every file, at the end of a stage: not of journals, which do it.

        Args:
            seen: When a file was written, its size, and its hash, as of the last time.
        """
        noted = {}
        for name, file in self._files():
            if sums_of(file).is_file():
                continue
            now = file.stat()
            if seen.get(file, (0, 0, ""))[:2] != (now.st_mtime_ns, now.st_size):
                seen[file] = (now.st_mtime_ns, now.st_size, sha256_file(file))
            noted[name] = seen[file][2]
        write_json(self._noted, noted)

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

    def changed(self, *, weights: bool = True) -> list[str]:
        """Files of a finished folder that are not what the run has written, and what they are now.

        Of a folder that is not finished, those that have been noted: what is missing is made again.

        Args:
            weights: Look at adapters, too, which may take seconds.
        """
        if not self.is_done:
            return [f"{file} (changed)" for file in self._changed_so_far()]
        told = []
        for name, digest in read_json(self.done, sha256=dict)["sha256"].items():
            file = self.path / name
            if not weights and file.suffix == ".safetensors":
                continue
            if not file.is_file():
                told.append(f"{file} (missing)")
            elif sha256_file(file) != digest:
                told.append(f"{file} (changed)")
        return told

    def _changed_so_far(self) -> Iterator[Path]:
        yield from (file for file in summed_in(self.path) if is_harmed(file))
        if self._noted.is_file():
            for name, digest in read_json(self._noted).items():
                file = self.path / name
                if file.is_file() and sha256_file(file) != digest:
                    yield file


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
    def sha256(self) -> str:
        """Noted of the adapter's weights; empty before it is done. Anchors that are the same have
        the same."""
        noted = read_json(self.done, sha256=dict)["sha256"] if self.is_done else {}
        found = [noted.get(file.name, "") for file in self.adapter_files if "json" not in file.name]
        return str(found[0]) if found else ""

    @property
    def reading(self) -> Path:
        """How well the bare base reads the run's data."""
        return self.path / "reading.json"

    @property
    def ift_only(self) -> Path:
        """The IFT-only adapter that writes the EFT targets."""
        return self.path / "ift_only"

    def eft_file(self, name: str) -> Path:
        """What the model that writes EFT targets did, by name; `judgements` are its grades."""
        return self.path / f"eft_{name}.jsonl"

    @property
    def disturbed(self) -> Path:
        """What the IFT-only model writes for pairs with a known loser."""
        return self.path / "disturbed"

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
class CheckpointDir:
    """`.checkpoint/`: the training under way, as it was after a step; a folder for each.

    A folder has its name only when it is whole, and the one before goes when it has.
    """

    path: Path

    def of(self, step: int) -> Path:
        """Where the training goes as it is after a step."""
        return self.path / f"step_{step}"

    @property
    def draft(self) -> Path:
        """Where a folder is written before it gets its name, or lies when it has lost it."""
        return self.path / ".draft"

    @staticmethod
    def state(folder: Path) -> Path:
        """The file in a folder that has all but the tensors."""
        return folder / "state.json"

    @staticmethod
    def tensors(folder: Path) -> Path:
        """The file in a folder that has the weights, and the optimiser's state."""
        return folder / "tensors.safetensors"

    def newest(self) -> Path | None:
        """The folder of the last step that is whole."""
        steps = (folder.name.removeprefix("step_") for folder in self.path.glob("step_*"))
        last = max((int(step) for step in steps if step.isdecimal()), default=None)
        return None if last is None else self.of(last)

    def discard(self, folder: Path) -> None:
        """Delete a folder; killed in its midst it has no name any more."""
        shutil.rmtree(self.draft, ignore_errors=True)
        folder.replace(self.draft)
        shutil.rmtree(self.draft)

    def drop(self) -> None:
        """Delete all of it; what is half deleted has no name any more."""
        newest = self.newest()
        if newest is not None:
            self.discard(newest)
        shutil.rmtree(self.path, ignore_errors=True)

    def progress(self) -> dict[str, Any] | None:
        """Which training it is of, its step, and how many there are.

        None where there is none that can be read: the run may be replacing it.
        """
        folder = self.newest()
        if folder is None:
            return None
        try:
            found = read_json(self.state(folder), training=dict, step=int, steps=int)
        except UserError:
            return None
        return {**found["training"], "step": found["step"], "steps": found["steps"]}


@dataclass(frozen=True, slots=True)
class IterationDir(StageDir):
    """`iter_001/` and so on."""

    number: int

    def file(self, name: str) -> Path:
        """Rows of the iteration, by the name of their file: a method may have some of its own."""
        return self.path / f"{name}.jsonl"

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
        """Candidates of a stronger model, from its server."""
        return self.path / "teacher_candidates.jsonl"

    @property
    def votes(self) -> Path:
        """How often a prompt's samples end in each answer, where answers are voted on."""
        return self.path / "votes.jsonl"

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
    def comparisons(self) -> Path:
        """What the judge made of every two candidates, where it compares them."""
        return self.path / "comparisons.jsonl"

    @property
    def labels(self) -> Path:
        """What principles made of pairs of candidates."""
        return self.path / "labels.jsonl"

    @property
    def past_candidates(self) -> Path:
        """Candidates of the first model, where a method wants them beside the policy's."""
        return self.path / "past_candidates.jsonl"

    @property
    def judged_candidates(self) -> list[Path]:
        """The files that exist of candidates in `judgements`: the policy's, and others beside."""
        return _existing(self.candidates, self.past_candidates, self.teacher_candidates)

    @property
    def future_candidates(self) -> Path:
        """Candidates of a provisional next model."""
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
        """Judgements by the model before the policy, on the policy's candidates."""
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
        """The place of the delta that the iteration learns."""
        return DeltaPlace("delta", self.delta, self.path / "training.json")

    @property
    def judge_place(self) -> DeltaPlace:
        """The place of the judge's delta, where it has one of its own."""
        folder = self.path / "judge_delta"
        return DeltaPlace("judge delta", folder, folder / "training.json")

    @property
    def provisional_place(self) -> DeltaPlace:
        """The place of a delta that only helps to make pairs."""
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

    def file(self, name: str) -> Path:
        """What a judge that is asked in its run's form made of the replies, by name."""
        return self.path / f"{name}.jsonl"

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


def _existing(*paths: Path) -> list[Path]:
    return [path for path in paths if path.is_file()]


def adapter_files(folder: Path) -> tuple[Path, ...]:
    """What an adapter is, on disk."""
    return folder / "adapter_model.safetensors", folder / "adapter_config.json"
