"""A run in several processes: the same bytes as in one, and an end that says why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from srlm_lite import processes
from srlm_lite.config import load_recipe, recipes_dir
from srlm_lite.loop import iterate
from srlm_lite.model.stack import Adapter
from srlm_lite.processes import Place, Processes, of_one_process, place
from srlm_lite.run_dir import RunDir, read_json
from srlm_lite.session import Session

HERE = Path(__file__).parent
SAMPLED = ("prompts.jsonl", "candidates.jsonl", "judgements.jsonl", "pairs.jsonl", "drops.json")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def started_as_two(*command: str) -> list[subprocess.Popen[str]]:
    """Two processes with what a launcher tells them, and no launcher."""
    port = str(free_port())
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(**told, MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def accelerate(config: str, *options: str, run: list[str]) -> subprocess.Popen[str]:
    """The launcher itself, with a shipped configuration; it does not ask whether GPUs are there."""
    file = recipes_dir() / "accelerate" / config
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return subprocess.Popen(
        [*launch, *options, "-m", "srlm_lite", *run],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor that is not nothing, on the toy base."""
    folder = tmp_path_factory.mktemp("anchor")
    recipe = load_recipe("tiny")
    fresh = Session(recipe, RunDir(folder)).slot.fresh(recipe.anchor.lora, seed=5)
    generator = torch.Generator().manual_seed(6)
    factors = {
        name: (a, 0.01 * torch.randn(b.shape, generator=generator))
        for name, (a, b) in fresh.factors.items()
    }
    Adapter(fresh.rank, fresh.alpha, factors).save(folder / "given", base_name="toy")
    return folder / "given"


def overrides(anchor: Path) -> list[str]:
    """One iteration in six chunks: an odd last round, and more chunks than processes."""
    return [
        f"anchor.init={anchor}",
        "iterations=1",
        "prompts.per_iteration=10",
        "rollout.chunk_prompts=2",
        "evaluate.policy_prompts=2",
        "evaluate.eft_prompts=1",
        "pairing.min_pairs=1",
    ]


def arguments(out: Path, anchor: Path) -> list[str]:
    settings = [part for one in overrides(anchor) for part in ("--set", one)]
    return ["iterate", "--recipe", "tiny", "--adapters", str(out), *settings]


def run_alone(out: Path, anchor: Path) -> RunDir:
    recipe, directory = load_recipe("tiny", overrides(anchor)), RunDir(out)
    directory.open(recipe, {})
    iterate(Session(recipe, directory))
    return directory


@pytest.fixture(scope="module")
def alone(anchor: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run in one process."""
    return run_alone(tmp_path_factory.mktemp("alone") / "out", anchor)


def sampled(run: RunDir) -> dict[str, bytes]:
    return {name: (run.iteration(1).path / name).read_bytes() for name in SAMPLED}


def distance(one: Adapter, other: Adapter) -> float:
    """Of two adapters, as a share of what one of them is."""
    both = [
        (a, b)
        for module, factors in one.factors.items()
        for a, b in zip(factors, other.factors[module], strict=True)
    ]
    gap = sum(float(((a - b) ** 2).sum()) for a, b in both) ** 0.5
    return gap / sum(float((a**2).sum()) for a, _ in both) ** 0.5


def test_two_machines_sample_the_same_bytes_as_one_process(
    alone: RunDir, anchor: Path, tmp_path: Path
) -> None:
    """Two launches of a process each, as on two machines, that meet on 127.0.0.1."""
    out, port = tmp_path / "out", str(free_port())
    machines = [
        accelerate(
            "multi-node.yaml",
            *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
            run=arguments(out, anchor),
        )
        for rank in (0, 1)
    ]
    said = [machine.communicate() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    # One of them speaks, and has the table.
    assert "iteration 1  pairs" in said[0][1] and "M2" in said[0][0]
    assert "iteration 1" not in said[1][1] and said[1][0] == ""
    two = RunDir(out)
    assert sampled(two) == sampled(alone)
    assert read_json(two.run_json)["processes"] == 2
    facts = [read_json(run.iteration(1).delta_place.training) for run in (alone, two)]
    assert facts[1].keys() == facts[0].keys()
    assert facts[1] == pytest.approx(facts[0], rel=1e-3, abs=1e-4)
    deltas = [Adapter.load(run.iteration(1).delta) for run in (alone, two)]
    assert distance(*deltas) < 1e-3


def test_a_killed_process_ends_the_run_and_the_rest_goes_on_from_there(
    alone: RunDir, anchor: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    port = str(free_port())
    launcher = accelerate("ddp-2.yaml", "--main_process_port", port, run=arguments(out, anchor))
    candidates = RunDir(out).iteration(1).candidates
    while not candidates.exists() or not candidates.stat().st_size:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    second = [
        process
        for process in psutil.Process(launcher.pid).children(recursive=True)
        if process.environ().get("RANK") == "1"
    ]
    second[0].send_signal(signal.SIGKILL)
    _, errors = launcher.communicate()
    assert launcher.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("srlm-lite: stopped: ")]
    assert len(lines) == 1 and processes.GOES_ON in lines[0]
    assert not RunDir(out).iteration(1).is_done
    # With as many processes as you like: here one.
    again = run_alone(out, anchor)
    assert sampled(again) == sampled(alone)
    names = [again.iteration(1).delta / "adapter_model.safetensors", again.iteration(1).evaluation]
    for file in names:
        assert file.read_bytes() == (alone.path / file.relative_to(out)).read_bytes()


def test_a_mistake_is_said_once_and_ends_both(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("not a run")
    both = started_as_two(
        *("-m", "srlm_lite", "iterate", "--recipe", "tiny", "--adapters", str(tmp_path))
    )
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [2, 2]
    lines = [line for _, errors in said for line in errors.splitlines() if "srlm-lite:" in line]
    assert lines == [
        f"srlm-lite: {tmp_path}: holds files, but no run (no run.json). "
        "Choose an empty or new directory for --adapters"
    ]


def test_two_processes_train_what_one_does(tiny_base_dir: Path, tmp_path: Path) -> None:
    """SFT and DPO, weighted too, in batches that neither divide the data nor the processes.

    AdamW divides by the size of a gradient: where that is rounding alone, so is its step. Hence
    the tolerance of a thousandth of the adapter.
    """
    from trainings import trainings

    out = tmp_path / "trained.pt"
    both = started_as_two(str(HERE / "trainings.py"), str(tiny_base_dir), str(out))
    alone = trainings(tiny_base_dir)
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    together, digests = torch.load(out, weights_only=False)
    assert digests[0] == digests[1]
    assert together.keys() == alone.keys()
    for name, (adapter, facts) in alone.items():
        trained, told = together[name]
        assert distance(adapter, trained) < 1e-3, name
        assert told.keys() == facts.keys()
        assert told == pytest.approx(facts, rel=1e-3, abs=1e-4), name


def test_the_place_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert place() == Place(), "half of it is no launcher"
    monkeypatch.setenv("MASTER_PORT", "1")
    assert place() == Place(3, 4, 1)
    assert not place().leads and not place().speaks
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert place() == Place()


def test_a_program_of_one_process_gets_its_gpu_and_no_fellows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert of_one_process() == dict(os.environ)
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    for name, value in {**told, "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    found = of_one_process()
    assert found["CUDA_VISIBLE_DEVICES"] == "6"
    assert not found.keys() & {*told, "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert of_one_process()["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize("name", ["ddp-2", "ddp-8", "multi-node"])
def test_a_configuration_is_one_of_accelerate_s(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    file = recipes_dir() / "accelerate" / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(str(file))
    assert str(config.distributed_type).endswith("MULTI_GPU")
    assert config.mixed_precision == "no", "the recipe's base.dtype says what is computed in"
    assert config.num_processes >= 2 * config.num_machines or name == "multi-node"


def test_alone_everything_is_trivial() -> None:
    one = Processes()
    with one.joined(cpu=True):
        assert one.broadcast("a") == "a"
        assert one.gather("a") == ["a"]


class Ended(Exception):
    """In place of the end of the process."""


def watch(
    store: Any, at: Place, said: list[str], codes: list[int], *, patience_s: float = 0.5
) -> processes._Watch:
    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    return processes._Watch(store, at, say=said.append, end=end, beat_s=0.02, patience_s=patience_s)


@pytest.fixture
def store() -> Any:
    distributed: Any = torch.distributed
    return distributed.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


def run_to_its_end(thread: processes._Watch) -> None:
    with pytest.raises(Ended):
        thread.run()


def test_a_process_without_a_sign_of_life_ends_the_run(store: Any) -> None:
    said: list[str] = []
    codes: list[int] = []
    run_to_its_end(watch(store, Place(0, 2, 0), said, codes))
    assert codes == [1]
    assert len(said) == 1 and "process 1 has given no sign of life for" in said[0]
    # The others, who watch the first alone, find it in the store.
    run_to_its_end(watch(store, Place(2, 3, 2), said, codes))
    assert codes == [1, 1] and len(said) == 1


def test_an_error_of_one_is_said_by_the_first(store: Any) -> None:
    said: list[str] = []
    codes: list[int] = []
    first = watch(store, Place(0, 2, 0), said, codes, patience_s=600)
    thread = threading.Thread(target=run_to_its_end, args=(first,))
    thread.start()
    distributed: Any = torch.distributed
    failing = watch(
        distributed.TCPStore("127.0.0.1", store.port, is_master=False), Place(1, 2, 1), [], []
    )
    assert failing.tell("base.name: is not there", 2), "the first process has taken it up"
    thread.join()
    assert (said, codes) == (["base.name: is not there"], [2])
