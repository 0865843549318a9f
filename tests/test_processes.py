"""A run in several processes: the same bytes as in one, and an end that says why."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import Cli
from forked import Program
from trainings import CASES

from srlm_lite import processes
from srlm_lite.errors import UserError
from srlm_lite.loop import iterate
from srlm_lite.model.base import load_base
from srlm_lite.model.stack import Adapter
from srlm_lite.processes import LAUNCHER, Place, Processes, of_one_process, place
from srlm_lite.recipe import load_recipe
from srlm_lite.run.files import read_json, read_jsonl
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session, refuse_sharding
from srlm_lite.shipped import recipes_dir

HERE = Path(__file__).parent
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=TWO_GPUS)]
SHARDING = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What accelerate tells the processes that it launches with a configuration of FSDP."""
LORA = "{rank: 4, alpha: 8, targets: [q_proj, down_proj]}"
SAMPLED = ("prompts.jsonl", "candidates.jsonl", "judgements.jsonl", "pairs.jsonl", "drops.json")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def started_as_two(*command: str, told: Mapping[str, str] | None = None) -> list[Program]:
    """Two processes with what a launcher tells them, and no launcher."""
    port = str(free_port())
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return [
        Program(
            *command,
            env=environment(**place, **told or {}, MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank),
        )
        for rank in ("0", "1")
    ]


def accelerate(config: str, *options: str, run: Sequence[str]) -> Program:
    """The launcher itself, with a shipped configuration; it does not ask whether GPUs are there.

    What it starts are programs that import everything anew, for ten seconds of a core each.
    """
    file = recipes_dir() / "accelerate" / config
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(file), *options)
    return Program(*launch, *run, env=environment())


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor that is not nothing, on the toy base."""
    folder = tmp_path_factory.mktemp("anchor")
    recipe = load_recipe("tiny", ["base.quantization=none", f"anchor.lora={LORA}"])
    fresh = Session(recipe, RunDir(folder)).slot.fresh(recipe.anchor.lora, seed=5)
    generator = torch.Generator().manual_seed(6)
    factors = {
        name: (a, 0.01 * torch.randn(b.shape, generator=generator))
        for name, (a, b) in fresh.factors.items()
    }
    Adapter(fresh.rank, fresh.alpha, factors).save(folder / "given", base_name="toy")
    return folder / "given"


NF4 = "base.quantization=nf4"


def overrides(anchor: Path, *more: str) -> list[str]:
    """One iteration in three chunks: an odd last round, and more chunks than processes."""
    return [
        "base.device=cpu",
        "base.quantization=none",
        f"anchor.init={anchor}",
        f"anchor.lora={LORA}",
        f"dpo.lora={LORA}",
        "iterations=1",
        "prompts.per_iteration=5",
        "rollout.chunk_prompts=2",
        "rollout.max_new_tokens=32",
        "judge.votes=1",
        "judge.min_votes=1",
        "evaluate.votes=1",
        "evaluate.policy_prompts=2",
        "evaluate.eft_prompts=1",
        "pairing.min_pairs=1",
        *more,
    ]


def arguments(out: Path, anchor: Path, *more: str) -> list[str]:
    settings = [part for one in overrides(anchor, *more) for part in ("--set", one)]
    return ["-m", "srlm_lite", "iterate", "--recipe", "tiny", "--adapters", str(out), *settings]


def run_alone(out: Path, anchor: Path, *more: str) -> RunDir:
    recipe, directory = load_recipe("tiny", overrides(anchor, *more)), RunDir(out)
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
    """How far two adapters lie apart, as a share of what one of them is."""
    both = [
        (a, b)
        for module, factors in one.factors.items()
        for a, b in zip(factors, other.factors[module], strict=True)
    ]
    gap = sum(float(((a - b) ** 2).sum()) for a, b in both) ** 0.5
    return gap / sum(float((a**2).sum()) for a, _ in both) ** 0.5


def test_two_processes_sample_the_same_bytes_as_one(
    alone: RunDir, anchor: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    both = started_as_two(*arguments(out, anchor))
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    # One of them speaks, and has the table.
    assert "iteration 1  pairs" in said[0][1] and "M2" in said[0][0]
    assert "iteration 1" not in said[1][1] and said[1][0] == ""
    same_as_alone(RunDir(out), alone)


@pytest.mark.slow
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
    same_as_alone(RunDir(out), alone)


def same_as_alone(two: RunDir, alone: RunDir) -> None:
    """The bytes of what was sampled and paired; of what was trained, all but the last bits."""
    assert sampled(two) == sampled(alone)
    assert read_json(two.run_json)["processes"] == 2
    facts = [read_json(run.iteration(1).delta_place.training) for run in (alone, two)]
    assert facts[1].keys() == facts[0].keys()
    assert facts[1] == pytest.approx(facts[0], rel=1e-3, abs=1e-4)
    deltas = [Adapter.load(run.iteration(1).delta) for run in (alone, two)]
    assert distance(*deltas) < 1e-3


@pytest.mark.parametrize("more", [(), pytest.param((NF4,), marks=pytest.mark.slow)])
def test_two_processes_that_share_a_base_do_what_one_does(
    more: tuple[str, ...], alone: RunDir, anchor: Path, tmp_path: Path
) -> None:
    """The whole loop on a base that neither of them holds (FSDP2)."""
    out = tmp_path / "out"
    both = started_as_two(*arguments(out, anchor, *more), told=SHARDING)
    if more:
        alone = run_alone(tmp_path / "alone", anchor, *more)
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert read_json(RunDir(out).run_json)["sharded"] is True
    same_as_alone(RunDir(out), alone)


@pytest.mark.parametrize(("config", "more"), [("ddp-2.yaml", {}), ("fsdp2-qlora.yaml", SHARDING)])
def test_the_launcher_tells_both_what_the_configuration_says(
    config: str, more: dict[str, str], tmp_path: Path
) -> None:
    """As `started_as_two` does without it."""
    (tmp_path / "told.py").write_text(
        "import json, os, pathlib, sys\n"
        "told = {name: os.environ.get(name) for name in sys.argv[1:]}\n"
        "file = pathlib.Path(__file__).with_name(os.environ['RANK'] + '.json')\n"
        "file.write_text(json.dumps(told))\n"
    )
    options, names = ("--main_process_port", str(free_port())), (*LAUNCHER, *SHARDING)
    launcher = accelerate(config, *options, run=[str(tmp_path / "told.py"), *names])
    said = launcher.communicate()
    assert launcher.returncode == 0, said
    for rank in ("0", "1"):
        told = read_json(tmp_path / f"{rank}.json")
        assert told.pop("MASTER_PORT") == options[1]
        both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **dict.fromkeys(SHARDING), **more}
        assert told == {**both, "RANK": rank, "LOCAL_RANK": rank}


@pytest.mark.parametrize("config", ["ddp-2.yaml", "fsdp2-qlora.yaml"])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_two_gpus_do_what_one_does(config: str, device: str, anchor: Path, tmp_path: Path) -> None:
    settings = (NF4, f"base.device={device}")
    alone = run_alone(tmp_path / "alone", anchor, *settings)
    out, port = tmp_path / "out", str(free_port())
    options = ("--main_process_port", port)
    launcher = accelerate(config, *options, run=arguments(out, anchor, *settings))
    said = launcher.communicate()
    assert launcher.returncode == 0, said
    same_as_alone(RunDir(out), alone)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_rest_goes_on_from_there(
    alone: RunDir, anchor: Path, tmp_path: Path
) -> None:
    out, port = tmp_path / "out", str(free_port())
    options = ("--main_process_port", port)
    launcher = accelerate("ddp-2.yaml", *options, run=arguments(out, anchor))
    wait_for_candidates(out, launcher)
    second = [
        process
        for process in psutil.Process(launcher.pid).children(recursive=True)
        if process.environ().get("RANK") == "1"
    ]
    second[0].send_signal(signal.SIGKILL)
    _, errors = launcher.communicate()
    assert launcher.returncode != 0
    _said_why_and_goes_on(errors, out, alone, anchor)


def test_a_killed_process_ends_one_that_lacks_its_part_of_the_base(
    alone: RunDir, anchor: Path, tmp_path: Path
) -> None:
    """In the next pass the other one waits for what the killed one held (FSDP2)."""
    out = tmp_path / "out"
    first, second = started_as_two(*arguments(out, anchor), told=SHARDING)
    wait_for_candidates(out, first)
    second.kill()
    _, errors = first.communicate()
    assert first.returncode == 1
    _said_why_and_goes_on(errors, out, alone, anchor)


def wait_for_candidates(out: Path, program: Program) -> None:
    candidates = RunDir(out).iteration(1).candidates
    while not candidates.exists() or not candidates.stat().st_size:
        assert program.poll() is None, program.communicate()
        time.sleep(0.02)


def _said_why_and_goes_on(errors: str, out: Path, alone: RunDir, anchor: Path) -> None:
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


def test_rlhf_is_refused_at_once_where_there_are_several_processes(tmp_path: Path) -> None:
    """The first one says so and ends; then a launcher ends the other, which waits for that."""
    first, second = started_as_two(
        *("-m", "srlm_lite", "iterate", "--recipe", "toy-rlhf", "--adapters", str(tmp_path / "out"))
    )
    _, errors = first.communicate()
    assert first.returncode == 2
    assert second.poll() is None
    second.kill()
    assert second.communicate() == ("", "")
    assert [line for line in errors.splitlines() if "srlm-lite:" in line] == [
        "srlm-lite: method: rlhf trains in one process, and there are 2. "
        "Start it without a launcher"
    ]
    assert not (tmp_path / "out").exists()


def test_one_that_no_launcher_ends_leaves_by_itself_without_a_word(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    for name, value in {**told, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_met", threading.Event())
    monkeypatch.setattr(processes, "HEARD_S", 0.2)
    start = time.monotonic()
    done = cli("iterate", "--recipe", "toy-rlhf", "--adapters", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert time.monotonic() - start >= 0.2


RLAIF = (
    "method=rlaif",
    "iterations=2",
    "dpo.init=previous",
    "rlaif.principles=toy",
    "rlaif.max_new_tokens=48",
    "rlaif.sft.learning_rate=1e-3",
    "rollout.max_new_tokens=48",
    "prompts.per_iteration=6",
    "prompts.reuse=true",
    "evaluate.policy_prompts=0",
)


def test_two_processes_revise_and_label_as_one_does(anchor: Path, tmp_path: Path) -> None:
    """With `rlaif` all bytes up to the first training, and to rounding what comes of that."""
    settings = [*overrides(anchor), *RLAIF]
    recipe, alone = load_recipe("tiny", settings), RunDir(tmp_path / "alone")
    alone.open(recipe, {})
    iterate(Session(recipe, alone))
    two = RunDir(tmp_path / "two")
    sets = [part for one in settings for part in ("--set", one)]
    both = started_as_two(
        *("-m", "srlm_lite", "iterate", "--recipe", "tiny", "--adapters", str(two.path), *sets)
    )
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    names = ("prompts.jsonl", "candidates.jsonl", "revisions.jsonl", "drops.json")
    for name in names:
        one, other = ((run.iteration(1).path / name).read_bytes() for run in (alone, two))
        assert one == other, name
    for number in (1, 2):
        deltas = [Adapter.load(run.iteration(number).delta) for run in (alone, two)]
        assert distance(*deltas) < 1e-3
    labels = [read_jsonl(run.iteration(2).labels) for run in (alone, two)]
    assert len(labels[0]) == len(labels[1]) > 0
    for one, other in zip(*labels, strict=True):
        by_one, by_two = one.pop("p_first"), other.pop("p_first")
        assert other == one and by_two == pytest.approx(by_one, abs=1e-3)


BUG = """
import sys, time
from pathlib import Path
from srlm_lite.recipe import load_recipe
from srlm_lite.processes import Processes, place
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session, follow

def busy(follower):
    time.sleep(3600)

processes = Processes(place())
with processes.joined(cpu=True):
    if not processes.place.leads:
        follow(processes)
    session = Session(load_recipe("tiny"), RunDir(Path(sys.argv[1])), None, processes)
    with session.leading():
        processes.broadcast(busy)
        raise ZeroDivisionError("a bug")
"""


def test_a_bug_of_the_first_process_ends_a_busy_one(tmp_path: Path) -> None:
    """It is in the midst of something for an hour; an order to go home would not reach it."""
    both = started_as_two("-c", BUG, str(tmp_path))
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert "ZeroDivisionError: a bug" in said[0][1]


@pytest.fixture(scope="module")
def both_ways(
    request: pytest.FixtureRequest, tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """What `trainings.py` does in one process, and in two."""
    import trainings

    device = request.param
    out = tmp_path_factory.mktemp("trained") / "out.pt"
    arguments = (str(HERE / "trainings.py"), str(tiny_base_dir), str(out), device)
    both = started_as_two(*arguments, told=SHARDING)
    alone: dict[Any, Any] = {}
    for quantization in ("none", "nf4"):
        base = load_base(trainings.section(tiny_base_dir, quantization, device))
        alone[quantization] = trainings.logits(base), trainings.trainings(base)
    alone["drawn"] = trainings.drawn(trainings.session_of(tiny_base_dir, device, Processes()))
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return alone, torch.load(out, weights_only=False)


@pytest.mark.parametrize("both_ways", DEVICES, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(both_ways: tuple[Any, Any], case: str) -> None:
    """SFT and DPO, weighted too, in batches that neither divide the data nor the processes.

    The base is held whole or spread over both, in NF4 as well (FSDP2). AdamW divides by the size of
    a gradient: where that is rounding alone, so is its step. Hence the tolerance of a thousandth of
    the adapter.
    """
    alone, (done, of_all, _) = both_ways
    quantization, sharded = CASES[case]
    expected_logits, expected = alone[quantization]
    found_logits, found = done[case]
    # What is gathered is bit for bit what was spread: 4-bit weights are cast nowhere.
    assert torch.equal(found_logits, expected_logits)
    assert of_all[0][1][case] == of_all[1][1][case], "both have the same adapters"
    for shares, _ in of_all:
        held, there = shares[case]
        assert held == (there // 2 if sharded else there)
    assert found.keys() == expected.keys()
    for name, (adapter, facts) in expected.items():
        trained, told = found[name]
        assert distance(adapter, trained) < 1e-3, name
        assert told.keys() == facts.keys()
        assert told == pytest.approx(facts, rel=1e-3, abs=1e-4), name
        if name != "anchor":  # on an anchor that is not nothing
            assert told["step0_loss"] == pytest.approx(0.693147, abs=1e-3)
            assert told["step0_margin"] == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("both_ways", DEVICES, indirect=True)
def test_the_first_process_samples_alone_on_a_spread_base(both_ways: tuple[Any, Any]) -> None:
    """The other one takes part in each of its passes."""
    alone, (_, _, drawn) = both_ways
    assert len(drawn) == 6 and drawn == alone["drawn"]


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


@pytest.mark.parametrize("name", ["ddp-2", "ddp-8", "multi-node", "fsdp2-qlora"])
def test_a_configuration_is_one_of_accelerate_s(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    file = recipes_dir() / "accelerate" / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(str(file))
    kind = "FSDP" if name.startswith("fsdp2") else "MULTI_GPU"
    assert str(config.distributed_type).endswith(kind)
    assert config.mixed_precision == "no", "the recipe's base.dtype says what is computed in"
    assert config.num_processes >= 2 * config.num_machines or name == "multi-node"


def test_alone_everything_is_trivial(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHARDING.items():
        monkeypatch.setenv(name, value)
    one = Processes()
    with one.joined(cpu=True):
        assert one.broadcast("a") == "a"
        assert one.gather("a") == ["a"]
        assert one.anyone(True) and not one.anyone(False)
        assert not one.shards, "there is nobody to share with"
    # What accelerate would read in a training; there DDP is what it has to do with.
    assert not SHARDING.keys() & os.environ.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "True"), ("FSDP_RESHARD_AFTER_FORWARD", "no")],
)
def test_another_way_to_shard_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, told in {**SHARDING, name: value}.items():
        monkeypatch.setenv(key, told)
    with pytest.raises(UserError) as refused, Processes().joined(cpu=True):
        pass
    assert str(refused.value).startswith(f"{name.lower()}: is {value.lower()}")


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("base.backend=unsloth", "base.backend"),
        ("rollout.engine=vllm", "rollout.engine"),
        ("judge.engine=vllm", "judge.engine"),
        ("method=rlhf", "method"),
    ],
)
def test_what_needs_the_base_whole_is_not_sharded(setting: str, where: str) -> None:
    refuse_sharding(load_recipe("tiny"))
    with pytest.raises(UserError, match=f"^{where}: .*FSDP spreads it"):
        refuse_sharding(load_recipe("tiny", [setting]))


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
