"""Trackers are told every figure once, whatever stops the run; and the run does not notice them.

W&B and trackio are tried where they are installed (`pip install -c constraints.txt -e
'.[tracking]'`), on this machine alone: W&B offline, trackio in a directory of the test.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from forked import Program
from reporting import add_anchor, add_iteration, evaluation, new_run, some_pairs
from test_processes import LORA, started_as_two
from test_processes import anchor as anchor  # the fixture

from srlm_lite import tracking
from srlm_lite.cli.iterate import Wish, run_iterate
from srlm_lite.doctor.recipes import recipe_finding
from srlm_lite.errors import UserError
from srlm_lite.loop import iterate
from srlm_lite.processes import Processes
from srlm_lite.progress import Silent, Task, Training, Untracked
from srlm_lite.recipe import load_recipe
from srlm_lite.run.files import read_json, read_jsonl
from srlm_lite.run.run import RunDir
from srlm_lite.session import Follower, Session
from srlm_lite.tracking import RunTracking, cut_back, stage_figures, tracked

Curves = Mapping[str, list[tuple[int, float]]]
"""Figures by name: step and value, in the order in which they came."""


class Console:
    """Remembers what it was told to show."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


# --- what is told -------------------------------------------------------------------------------


def test_a_row_of_metrics_becomes_figures_in_groups() -> None:
    pairs = {
        "iteration": 2,
        "stage": "pairs",
        "seconds": 1.5,
        "pairs": 30,
        "drops": {"tied": 4},
        "note": "text",
        "nothing": None,
    }
    assert stage_figures(pairs) == {"pairs/pairs": 30, "pairs/drops/tied": 4, "seconds/pairs": 1.5}
    row = {
        **evaluation(gold=2.5, error=0.25),
        "iteration": 1,
        "stage": "evaluation",
        "seconds": 9.0,
    }
    row["policy"]["intervals"] = {"gold_mean": [2.0, 3.0]}
    figures = stage_figures(row)
    assert figures["judge/pairwise_accuracy"] == 0.9
    assert figures["policy/gold_mean"] == figures["policy/greedy/gold_mean"] == 2.5
    assert figures["seconds/evaluation"] == 9.0
    # What is no curve, or has one and the same value in all models, is left out.
    assert not [name for name in figures if "histogram" in name or "intervals" in name]
    assert not figures.keys() & {"judge/prompts", "judge/pairs", "policy/answers"}


def test_steps_are_counted_on_through_the_iterations(tmp_path: Path) -> None:
    """Trainings of one name: 4 and 3 steps make 7, and what was told is told no more."""
    told: list[tuple[str, int, int]] = []

    class Place:
        hint = ""

        def tell(self, values: Any, *, step: int, of: Training | None, before: int) -> None:
            told.append((of.name if of else "", step, before))

        def close(self, failed: bool) -> None: ...

    tracking = RunTracking(new_run(tmp_path / "out"), lambda text: None)
    tracking._notes["told"]["wandb"] = {"stages": 0, "steps": {}}
    tracking._places["wandb"] = Place()
    for iteration, name, steps in (
        (1, "delta", 4),
        (2, "judge", 2),
        (2, "delta", 3),
        (2, "delta", 3),
    ):
        for step in range(1, steps + 1):
            tracking.step(Training(iteration, name), step, {"loss": 1.0})
    tracking.close()
    deltas = [(1, 0), (2, 0), (3, 0), (4, 0), (1, 4), (2, 4), (3, 4)]
    assert [(step, before) for name, step, before in told if name == "delta"] == deltas
    assert [(step, before) for name, step, before in told if name == "judge"] == [(1, 0), (2, 0)]


# --- each tracker, on a run of files ------------------------------------------------------------


def read_tensorboard(run: RunDir) -> dict[str, Curves]:
    """By directory, with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    found = EventMultiplexer().AddRunsFromDirectory(str(run.tensorboard))
    found.Reload()
    return {
        folder: {
            tag: [(event.step, event.value) for event in found.Scalars(folder, tag)]
            for tag in tags["scalars"]
        }
        for folder, tags in found.Runs().items()
    }


def tensorboard_curves(run: RunDir) -> Curves:
    """As one run, the directories of trainings in a row."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, tags in sorted(read_tensorboard(run).items()):
        for tag, points in tags.items():
            known = curves.setdefault(tag, [])
            before = known[-1][0] if known else 0
            known += [(step + before, value) for step, value in points]
    return curves


def wandb_records(file: Path) -> list[Any]:
    """What an offline run holds: LevelDB's log format, of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # what is left of a block is too small for a record
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def whole_wandb_records(file: Path) -> list[Any]:
    """Up to the record that ends a run: on a busy machine W&B's own process writes on for a bit."""
    for _ in range(120):
        records = wandb_records(file)
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.5)
    return records


def wandb_curves(run: RunDir) -> Curves:
    """Over the axis that W&B was told for each; all starts have one and the same id."""
    axes: dict[str, str] = {}
    ids, curves = set(), {}
    for file in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):  # named by their time
        for record in whole_wandb_records(file):
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.display_name))
            if record.HasField("metric") and record.metric.glob_name:
                axes[record.metric.glob_name.removesuffix("*")] = record.metric.step_metric
            if not record.HasField("history"):
                continue
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in row.items():
                axis = next((axis for at, axis in axes.items() if name.startswith(at)), "")
                if axis and name != axis:
                    curves.setdefault(name, []).append((row[axis], value))
    notes = read_json(run.tracking)
    assert ids == {(notes["id"], notes["name"])}
    return curves


def trackio_curves(run: RunDir) -> Curves:
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("srlm-lite") == [read_json(run.tracking)["name"]]
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs("srlm-lite", read_json(run.tracking)["name"]):
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


READERS: dict[str, Callable[[RunDir], Curves]] = {
    "tensorboard": tensorboard_curves,
    "wandb": wandb_curves,
    "trackio": trackio_curves,
}


@pytest.fixture(params=READERS)
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    name = str(request.param)
    if tracking.missing((name,)):  # type: ignore[arg-type]
        pytest.skip(f"{name} is not installed (extra tracking)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    if name == "trackio":
        from trackio import sqlite_storage

        monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    return name


def test_every_figure_is_told_once(
    tracker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"tracking.report_to={tracker}", "iterations=2"]
    run, recipe = new_run(tmp_path / "out", *settings), load_recipe("toy", settings)
    add_anchor(run, evaluation(gold=2.0))
    add_iteration(run, 1, some_pairs(4), measured=evaluation(gold=3.0), steps=4)
    console = Console()
    with tracked(recipe, run, console) as first:
        assert first is not None
        for step in (1, 2, 3):
            first.step(Training(2, "delta"), step, {"loss": 0.1 * step, "rewards/margins": 1.0})
    # Killed there, the training begins anew and takes the same steps; then its stage ends.
    with tracked(recipe, run, console) as second:
        assert second is not None
        for step in (1, 2, 3, 4, 5):
            second.step(Training(2, "delta"), step, {"loss": 0.1 * step, "rewards/margins": 1.0})
        run.add_metrics({"iteration": 2, "stage": "delta", "seconds": 7.0, "steps": 5})
        second.stage()
    assert capsys.readouterr().out == ""
    assert len(console.said) == 2 and console.warnings == []
    curves = READERS[tracker](run)
    # The first training's steps are those of the run's own file; the second goes on from there.
    margins = [row["reward_margin"] for row in read_jsonl(run.iteration(1).delta_place.steps)]
    expected = [*enumerate(margins, start=1), *((step, 1.0) for step in range(5, 10))]
    found = curves["train/delta/rewards/margins"]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    assert len(curves["train/delta/loss"]) == 9
    assert curves["pairs/pairs"] == [(1, 4)]
    assert curves["seconds/delta"] == [(1, 10), (2, 7)]


def test_no_tracker_is_told_a_secret(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In names, settings, the names of figures, errors, and the command line, which W&B notes."""
    key, password = "planted-7f3a9c-key", "planted-5e21d0-word"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("WANDB_PROJECT", f"p-{key}")
    words = ["srlm-lite", "iterate", "--set", f"openai.url=http://me:{password}@host/v1", key]
    monkeypatch.setattr("sys.argv", words)
    settings = [
        *(f"tracking.report_to={tracker}", "iterations=1", f"tracking.name=n-{key}"),
        *(f"tracking.project=p-{key}", f"openai.url=http://me:{password}@host/v1"),
    ]
    run, recipe = new_run(tmp_path / "out", *settings), load_recipe("toy", settings)
    add_anchor(run)
    run.add_metrics({"iteration": 1, "stage": "pairs", "seconds": 2.0, "drops": {key: 4}})
    console = Console()
    with tracked(recipe, run, console) as told:
        assert told is not None
        told.step(Training(1, "delta"), 1, {key: 0.5})
        told._places[tracker].tell = lambda *at, **more: 1 / int(key)  # type: ignore[assignment]
        told.step(Training(1, "delta"), 2, {"loss": 0.5})
        told.stage()
    [warning] = console.warnings
    assert "is told no more: invalid literal" in warning and "***" in warning
    ours = {run.run_json, run.metrics}
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file not in ours]
    assert len(files) >= 2  # ours, tracking.json, and theirs
    for secret in (key, password):
        assert not [text for text in (*console.said, warning) if secret in text]
        assert not [file for file in files if secret.encode() in file.read_bytes()]
        assert not [file for file in files if secret in str(file)]
    assert words[3].endswith(f"{password}@host/v1")


def test_a_run_that_is_over_and_told_of_is_left_alone(tracker: str, tmp_path: Path) -> None:
    settings = [f"tracking.report_to={tracker}", "iterations=1"]
    run, recipe = new_run(tmp_path / "out", *settings), load_recipe("toy", settings)
    add_anchor(run)
    add_iteration(run, 1, some_pairs(2))
    with tracked(recipe, run, Console()) as first:
        assert first is not None  # nobody knows of it yet
    before = set(run.path.rglob("*"))  # a start would leave a directory or a file
    with tracked(recipe, run, Console()) as second:
        assert second is None
    assert set(run.path.rglob("*")) == before


def test_a_tracker_that_failed_is_let_go_of_at_the_end(tmp_path: Path) -> None:
    done: list[object] = []

    class Place:
        hint = ""

        def tell(self, values: Any, *, step: int, of: Training | None, before: int) -> None:
            done.append("told")
            raise ConnectionError("gone")

        def close(self, failed: bool) -> None:
            done.append(failed)
            raise ConnectionError("still gone")

    warnings: list[str] = []
    tracking = RunTracking(new_run(tmp_path / "out"), warnings.append)
    tracking._notes["told"]["wandb"] = {"stages": 0, "steps": {}}
    tracking._places["wandb"] = Place()
    for step in (1, 2):
        tracking.step(Training(1, "delta"), step, {"loss": 0.5})
    tracking.close()
    assert done == ["told", True]
    assert warnings == ["wandb is told no more: gone"]


def test_a_tracker_that_fails_is_left_out_and_caught_up_with(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = ["tracking.report_to=tensorboard", "iterations=2"]
    run, recipe = new_run(tmp_path / "out", *settings), load_recipe("toy", settings)
    run.tensorboard.write_text("in the way")
    console = Console()
    add_anchor(run)
    with tracked(recipe, run, console) as tracker:
        assert tracker is not None
        tracker.step(Training(1, "delta"), 1, {"loss": 0.5})
        tracker.stage()
    [warning] = console.warnings
    assert warning.startswith("tensorboard is told no more: ") and "in the way" not in warning
    run.tensorboard.unlink()
    with tracked(recipe, run, console):
        pass
    assert tensorboard_curves(run)["seconds/anchor"] == [(0, 60)]


# --- killed before it is written down ----------------------------------------------------------

KILLED = """
import os, signal, sys, time
from pathlib import Path
from srlm_lite import tracking
from srlm_lite.progress import Training
from srlm_lite.run.run import RunDir

class Console:
    def say(self, text): ...
    warn = say

tracking.FLUSH_S = 0.0
run = RunDir(Path(sys.argv[1]))
with tracking.tracked(run.recipe(), run, Console()) as told:
    written = told._places["trackio"].written
    if sys.argv[2] == "steps":
        told.step(Training(2, "delta"), 1, {"loss": 0.1})
        while not any("train/delta/loss" in names and step == 5 for step, names in written()):
            time.sleep(0.1)
        for step in (2, 3):
            told.step(Training(2, "delta"), step, {"loss": 0.1 * step})
        run.add_metrics({"iteration": 2, "stage": "candidates", "seconds": 5.0})
        told.stage()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_tracked(run: RunDir, how: str, folder: Path) -> Any:
    """What the run noted as told when it was killed, right after it had told that."""
    program = Program("-c", KILLED, run.path, how, env={**os.environ, "TRACKIO_DIR": str(folder)})
    program.communicate()
    assert program.returncode == -signal.SIGKILL
    return read_json(run.tracking)["told"]["trackio"]


@pytest.mark.parametrize("tracker", ["trackio"], indirect=True)
def test_what_a_kill_took_from_trackio_is_told_again(tracker: str, tmp_path: Path) -> None:
    """It writes down what it is told half a second later."""
    settings = [f"tracking.report_to={tracker}", "iterations=2"]
    run, recipe = new_run(tmp_path / "out", *settings), load_recipe("toy", settings)
    add_anchor(run, evaluation(gold=2.0))
    add_iteration(run, 1, some_pairs(4), measured=evaluation(gold=3.0), steps=4)
    told = killed_while_tracked(run, "steps", tmp_path / "trackio")
    assert told["steps"] == {"delta": {"1": 4, "2": 3}}
    assert told["stages"] == len(run.read_metrics())
    lost = trackio_curves(run)
    assert [step for step, _ in lost["train/delta/loss"]] == [1, 2, 3, 4, 5]
    assert "seconds/candidates" not in lost or len(lost["seconds/candidates"]) == 1
    with tracked(recipe, run, Console()) as again:
        assert again is not None
        for step in (1, 2, 3, 4):
            again.step(Training(2, "delta"), step, {"loss": 0.1 * step})
        run.add_metrics({"iteration": 2, "stage": "delta", "seconds": 7.0})
        again.stage()
    curves = trackio_curves(run)
    assert [step for step, _ in curves["train/delta/loss"]] == list(range(1, 9))
    assert [step for step, _ in curves["seconds/candidates"]] == [1, 2]
    assert [step for step, _ in curves["seconds/delta"]] == [1, 2]


@pytest.mark.parametrize("tracker", ["trackio"], indirect=True)
def test_a_run_that_is_over_tells_trackio_what_a_kill_took(tracker: str, tmp_path: Path) -> None:
    settings = [f"tracking.report_to={tracker}", "iterations=1"]
    run, recipe = new_run(tmp_path / "out", *settings), load_recipe("toy", settings)
    add_anchor(run)
    add_iteration(run, 1, some_pairs(2))
    told = killed_while_tracked(run, "all", tmp_path / "trackio")
    assert told["stages"] == len(run.read_metrics())
    for _ in range(2):
        with tracked(recipe, run, Console()):
            pass
    stages = [(row["iteration"], f"seconds/{row['stage']}") for row in run.read_metrics()]
    curves = trackio_curves(run)
    assert sorted((at, name) for name in curves for at, _ in curves[name] if "seconds" in name) == (
        sorted(stages)
    )


def test_notes_are_cut_back_to_what_was_written_down() -> None:
    """One of two rows of a stage in an iteration is there; the sixth of 4 + 3 steps is the last,
    which is the second of its training."""
    rows = [
        {"iteration": at, "stage": stage, "seconds": 1.0}
        for at, stage in ((0, "anchor"), (1, "delta"), (1, "delta"), (1, "evaluation"))
    ]
    told = {"stages": 4, "steps": {"delta": {"1": 4, "2": 3}, "sft": {"0": 2}, "judge": {}}}
    written = [
        (0, {"seconds/anchor"}),
        (1, {"seconds/delta"}),
        *((step, {"train/delta/loss"}) for step in range(1, 7)),
    ]
    assert cut_back(told, written, rows) == {
        "stages": 2,
        "steps": {"delta": {"1": 4, "2": 2}, "sft": {"0": 0}, "judge": {}},
    }
    whole = [(int(row["iteration"]), {f"seconds/{row['stage']}"}) for row in rows]
    steps = [(step, {"train/delta/loss"}) for step in range(1, 8)]
    steps += [(step, {"train/sft/loss"}) for step in (1, 2)]
    assert cut_back(told, [*whole, *steps], rows) == told


# --- with the loop ------------------------------------------------------------------------------

SMALL = (
    "iterations=1",
    f"anchor.lora={LORA}",
    f"dpo.lora={LORA}",
    "prompts.per_iteration=8",
    "rollout.n=2",
    "rollout.max_new_tokens=32",
    "judge.votes=1",
    "judge.min_votes=1",
    "evaluate.policy_prompts=2",
    "evaluate.eft_prompts=1",
    "evaluate.votes=1",
    "pairing.min_pairs=1",
    "pairing.source=random",
    "dpo.batch_size=1",
    "dpo.micro_batch_size=1",
    "base.quantization=none",
)


class StopsAt(Silent):
    """Interrupts the DPO training at a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._left = step

    def start(self, stage: str, total: int, unit: str) -> Task:
        return self if stage == "DPO" else super().start(stage, total, unit)

    def advance(self, count: int = 1) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        pass

    def restart(self) -> None:
        pass


def run_tiny(path: Path, *settings: str, reporter: Silent | None = None) -> RunDir:
    recipe, run = load_recipe("tiny", settings), RunDir(path)
    run.open(recipe, {})
    with tracked(recipe, run, Console()) as tracker:
        iterate(Session(recipe, run, reporter, tracker=tracker))
    return run


def artefacts(run: RunDir) -> dict[str, str]:
    return {
        str(file.relative_to(run.path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for place in (run.anchor, run.iteration(1))
        for file in sorted(place.path.rglob("*"))
        if file.is_file() and file.name != "done.json"
    }


def test_a_run_that_is_watched_is_the_same_run(
    anchor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    settings = [*SMALL, f"anchor.init={anchor}"]
    plain = run_tiny(tmp_path / "plain", *settings)
    watched = [*settings, "tracking.report_to=[tensorboard]"]
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "watched", *watched, reporter=StopsAt(3))
    stopped = read_json(RunDir(tmp_path / "watched").tracking)["told"]["tensorboard"]
    assert stopped["steps"] == {"delta": {"1": 2}}
    time.sleep(1.1)  # TensorBoard orders a directory's files by the second in their names
    run = run_tiny(tmp_path / "watched", *watched)
    assert artefacts(run) == artefacts(plain)
    assert read_json(run.run_json)["digest"] == read_json(plain.run_json)["digest"]
    # A directory for the stages and one for each training; every point once.
    found = read_tensorboard(run)
    assert found.keys() == {"iterations", "iter_001/delta"}
    steps = read_jsonl(run.iteration(1).delta_place.steps)
    assert len(steps) >= 4
    of_training = found["iter_001/delta"]
    assert of_training["train/delta/loss"] == [
        (row["step"], pytest.approx(row["loss"])) for row in steps
    ]
    assert of_training.keys() >= {"train/delta/rewards/margins", "train/delta/logps/chosen"}
    gold = [read_json(p.evaluation)["policy"]["gold_mean"] for p in (run.anchor, run.iteration(1))]
    assert found["iterations"]["policy/gold_mean"] == [
        (t, pytest.approx(value)) for t, value in enumerate(gold)
    ]
    assert found["iterations"].keys() >= {"seconds/delta", "pairs/pairs", "judge/spearman"}
    # Nobody watched the first run; it can be shown all the same, and stays what it is.
    before = artefacts(plain)
    shown = run_tiny(tmp_path / "plain", *watched)
    late = read_tensorboard(shown)
    assert late["iterations"].keys() == found["iterations"].keys()
    assert late["iter_001/delta"]["train/delta/loss"] == of_training["train/delta/loss"]
    assert artefacts(shown) == before


def test_one_of_two_processes_tells_what_one_alone_would(anchor: Path, tmp_path: Path) -> None:
    """Each figure once, from the first process; those of a training but for rounding."""
    pytest.importorskip("tensorboard")
    settings = [*SMALL, f"anchor.init={anchor}", "tracking.report_to=[tensorboard]"]
    alone, two = run_tiny(tmp_path / "alone", *settings), RunDir(tmp_path / "two")
    sets = [part for one in [*settings, "base.device=cpu"] for part in ("--set", one)]
    both = started_as_two(
        *("-m", "srlm_lite", "iterate", "--recipe", "tiny", "--adapters", str(two.path), *sets)
    )
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    expected, found = read_tensorboard(alone), read_tensorboard(two)
    assert found.keys() == expected.keys() == {"iterations", "iter_001/delta"}
    # Of which process a file is stands in its name; there is one of each directory.
    assert len(list(two.tensorboard.rglob("events.*"))) == len(found)
    for folder, curves in expected.items():
        assert found[folder].keys() == curves.keys()
        for name, points in curves.items():
            other = found[folder][name]
            assert [step for step, _ in other] == [step for step, _ in points], name
            if not name.startswith("seconds/"):
                values = [value for _, value in points]
                told = [value for _, value in other]
                assert told == pytest.approx(values, rel=1e-3, abs=1e-3), name


def test_only_the_leading_process_tells(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", ["tracking.report_to=tensorboard"])
    assert isinstance(Follower(recipe, Processes(), tmp_path).session.tracker, Untracked)


# --- settings and mistakes ----------------------------------------------------------------------


def test_trackers_are_one_name_or_a_list_and_make_no_other_run() -> None:
    plain = load_recipe("tiny")
    for said, names in (
        ("wandb", ("wandb",)),
        ("[tensorboard, trackio]", ("tensorboard", "trackio")),
        ("none", ()),
    ):
        recipe = load_recipe("tiny", [f"tracking.report_to={said}", "tracking.project=mine"])
        assert recipe.tracking.report_to == names
        assert recipe.digest() == plain.digest()
    with pytest.raises(UserError, match=r"tracking\.report_to"):
        load_recipe("tiny", ["tracking.report_to=mlflow"])
    with pytest.raises(UserError, match=r"Did you mean `tracking\.report_to`\?"):
        load_recipe("tiny", ["report_to=wandb"])


def test_a_tracker_that_is_not_installed_is_missed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_is_installed", lambda name: name != "wandb")
    with pytest.raises(UserError) as caught:
        run_iterate(Wish("tiny", tmp_path / "out", ["tracking.report_to=[tensorboard, wandb]"]))
    assert str(caught.value) == (
        "tracking.report_to = wandb: is not installed. pip install wandb, or all three: "
        "pip install 'srlm-lite[tracking]'"
    )
    assert not (tmp_path / "out").exists()
    finding = recipe_finding(load_recipe("tiny", ["tracking.report_to=wandb"]))
    assert (finding.state, finding.text) == ("bad", "not installed: wandb")


def test_a_tracker_that_does_not_start_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed (extra tracking)")
    settings = ["tracking.report_to=trackio", "tracking.project=registry-mine"]
    run = new_run(tmp_path / "out", *settings)
    with (
        pytest.raises(UserError, match=r"^tracking\.report_to: trackio does not start: "),
        tracked(load_recipe("toy", settings), run, Console()),
    ):
        pass
    assert not run.metrics.exists()


def test_fresh_forgets_what_was_told(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out")
    RunTracking(run, print).open(load_recipe("toy"))
    run.tensorboard.mkdir()
    assert run.tracking.is_file()
    run.open(load_recipe("toy"), {}, fresh=True)
    assert not run.tracking.exists() and not run.tensorboard.exists()
