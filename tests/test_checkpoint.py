"""A training that is stopped goes on from its checkpoint, and ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Cli, Done
from forked import ended
from messages import Told
from safetensors.torch import load_file
from test_processes import environment, free_port, started_as_two
from trainings import LORA, given_anchor, tokens

from srlm_lite.errors import ProofError
from srlm_lite.loop import iterate
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.processes import Processes
from srlm_lite.recipe import load_recipe
from srlm_lite.run.files import sha256_file
from srlm_lite.run.layout import CheckpointDir
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Anchor, Base, Consistency, Dpo, Rollout
from srlm_lite.shipped import recipes_dir
from srlm_lite.stopping import Terminated, deferred, terminable
from srlm_lite.training import checkpoint
from srlm_lite.training.checkpoint import Checkpoints, packed, unpacked, write_checkpoint
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.reward import RewardModel, train_reward
from srlm_lite.training.rloo import train_rloo
from srlm_lite.training.sft import Example, train_sft
from srlm_lite.training.steps import StepTrainer

SCRIPT = Path(__file__).with_name("stopped.py")
EXAMPLES = [Example(tokens(i), tokens(100 + i)) for i in range(7)]
PAIRS = [
    PairExample(
        tokens(i), tokens(200 + i), tokens(300 + i), weight=1 + i % 3, smoothing=0.1 * (i % 2)
    )
    for i in range(7)
]
STEPS = {"learning_rate": 5e-3, "batch_size": 4, "micro_batch_size": 2, "epochs": 3}
"""Seven examples in steps of four and three, three times; micro-batches of two and one."""


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> LoadedBase:
    return load_base(Base(name=str(tiny_base_dir), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def slot(base: LoadedBase) -> Slot:
    return Slot(base.model, targets=LORA.targets, rank=8)


class Killed(BaseException):
    """In place of SIGKILL: nothing is written after it."""


@dataclass
class Training:
    """A training that can be told to die in a step, before that one is kept.

    Args:
        seed: Of the training; another one is another training.
    """

    slot: Slot
    base: LoadedBase
    folder: Path
    kind: str = "sft"
    seed: int = 3
    every_s: float = 1e-9
    said: list[str] = field(default_factory=list)

    @property
    def place(self) -> CheckpointDir:
        return CheckpointDir(self.folder / ".checkpoint")

    def run(self, *, dies_in: int | None = None) -> tuple[bytes, str]:
        """The trained weights, and everything that was told of the training."""
        told: list[Any] = []

        def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
            told.append([step, steps, {k: v for k, v in logs.items() if k != "step_time"}])
            if step == dies_in:
                raise Killed

        common: dict[str, Any] = {
            "scratch": self.folder,
            "seed": self.seed,
            "on_step": on_step,
            "checkpoints": Checkpoints(
                self.place,
                {"iteration": 1, "name": "delta"},
                "the training",
                self.every_s,
                Processes(),
                tell=self.said.append,
            ),
        }
        weights, facts = KINDS[self.kind](self.slot, self.base, common)
        return weights, json.dumps([facts, told])

    def resumed(self, *dies_in: int) -> tuple[bytes, str]:
        for step in dies_in:
            with pytest.raises(Killed):
                self.run(dies_in=step)
        return self.run()


def of_adapter(adapter: Adapter) -> bytes:
    return bytes.fromhex(adapter.digest())


def sft(slot: Slot, base: LoadedBase, common: dict[str, Any]) -> tuple[bytes, Any]:
    adapter, facts = train_sft(
        slot, base, given_anchor(slot), EXAMPLES, optim=Anchor(**STEPS), dropout=0.3, **common
    )
    return of_adapter(adapter), facts


def dpo(slot: Slot, base: LoadedBase, common: dict[str, Any]) -> tuple[bytes, Any]:
    anchor = given_anchor(slot)
    adapter, facts = train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=slot.fresh(LORA, seed=4),
        reference=[anchor],
        pairs=PAIRS,
        dpo=Dpo(**STEPS, nll_weight=0.5),
        consistency=Consistency(),
        **common,
    )
    return of_adapter(adapter), facts


def reward(slot: Slot, base: LoadedBase, common: dict[str, Any]) -> tuple[bytes, Any]:
    model, facts = train_reward(
        slot,
        base,
        anchor=[given_anchor(slot)],
        adapter=slot.fresh(LORA, seed=4),
        pairs=PAIRS,
        optim=Dpo(**STEPS),
        **common,
    )
    return of_adapter(model.adapter) + model.head.numpy().tobytes(), facts


def rloo(slot: Slot, base: LoadedBase, common: dict[str, Any]) -> tuple[bytes, Any]:
    """Four prompts, two a step: two steps an epoch, and three epochs."""
    anchor = given_anchor(slot)
    head = torch.randn(1, base.model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    adapter, drawn, facts = train_rloo(
        slot,
        base,
        ChatFormat.of(base),
        anchor=[anchor],
        delta=slot.fresh(LORA, seed=4),
        reference=[anchor],
        reward=RewardModel(slot.fresh(LORA, seed=6), head),
        prompts=[tokens(i) for i in range(4)],
        optim=Dpo(learning_rate=5e-3, batch_size=4, micro_batch_size=2, epochs=3),
        rollout=Rollout(n=2, temperature=1.0, top_p=1.0, max_new_tokens=4),
        kl_weight=0.1,
        drop_truncated=False,
        **common,
    )
    return of_adapter(adapter) + repr(drawn).encode(), facts


KINDS: dict[str, Callable[[Slot, LoadedBase, dict[str, Any]], tuple[bytes, Any]]] = {
    "sft": sft,
    "dpo": dpo,
    "reward": reward,
    "rloo": rloo,
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_with_the_same_bytes(
    kind: str, slot: Slot, base: LoadedBase, tmp_path: Path
) -> None:
    """Killed in the second step, so that it goes on within a pass, and in the fifth of six, so that
    it goes on at the beginning of the third."""
    alone = Training(slot, base, tmp_path / "alone", kind)
    expected = alone.run()
    assert alone.said == [] and alone.place.newest() == alone.place.of(5)
    stopped = Training(slot, base, tmp_path / "stopped", kind)
    assert stopped.resumed(2, 5) == expected
    assert stopped.said == [f"the training goes on from step {step} of 6" for step in (1, 4)]


def test_a_checkpoint_of_another_training_is_not_used(
    slot: Slot, base: LoadedBase, tmp_path: Path
) -> None:
    one = Training(slot, base, tmp_path)
    with pytest.raises(Killed):
        one.run(dies_in=3)
    other = Training(slot, base, tmp_path, seed=4)
    expected = Training(slot, base, tmp_path / "alone", seed=4).run()
    assert other.run() == expected
    assert other.said == [
        "the training begins anew: the checkpoint that is there is of another training; "
        "differing: seed"
    ]


def test_one_that_is_damaged_is_not_used(slot: Slot, base: LoadedBase, tmp_path: Path) -> None:
    one = Training(slot, base, tmp_path)
    for damaged in (CheckpointDir.tensors, CheckpointDir.state):
        with pytest.raises(Killed):
            one.run(dies_in=3)
        file = damaged(one.place.of(2))
        file.write_bytes(file.read_bytes()[:-9])
        one.said.clear()
        with pytest.raises(Killed):
            one.run(dies_in=2)
        assert one.said == ["the training begins anew: the checkpoint that is there is damaged"]
        assert one.place.newest() == one.place.of(1)
        one.place.drop()


def test_what_memory_allows_may_change(slot: Slot, base: LoadedBase, tmp_path: Path) -> None:
    """A run that was out of memory goes on with smaller micro-batches, from where it was."""
    optim = Dpo(learning_rate=1e-3, batch_size=4, micro_batch_size=4)
    smaller = optim.model_copy(update={"micro_batch_size": 1, "gradient_checkpointing": True})
    slower = optim.model_copy(update={"learning_rate": 1e-4})
    told = [checkpoint.deciding(one) for one in (optim, smaller, slower)]
    assert checkpoint.differing(told[0], told[1]) == []
    assert checkpoint.differing(told[0], told[2]) == ["learning_rate"]
    # Of a setting that came later an earlier version's checkpoint says nothing.
    assert "loss" not in told[0]
    other = checkpoint.deciding(optim.model_copy(update={"loss": "ipo"}))
    assert checkpoint.differing(told[0], other) == ["loss"]
    assert checkpoint.differing({"a": None}, {}) == checkpoint.differing({}, {"a": None}) == ["a"]


def test_a_budget_that_was_halved_stays_so(
    slot: Slot, base: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the second step; what goes on from there cuts its steps as before."""
    learned, before = StepTrainer._learned, list[int]()

    def short(self: StepTrainer, model: Any, step: Any) -> Any:
        if self.state.global_step == 1 and not before:
            before.append(self.budget)
            raise MemoryError
        return learned(self, model, step)

    monkeypatch.setattr(StepTrainer, "_learned", short)
    expected = Training(slot, base, tmp_path / "alone").run()
    facts, _ = json.loads(expected[1])
    assert facts["tokens_at_once"] < before.pop()
    assert Training(slot, base, tmp_path / "stopped").resumed(3) == expected
    assert len(before) == 1


def test_what_goes_on_is_proven_to_be_what_was_kept(
    slot: Slot, base: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimiser whose state does not come back would train on, and end elsewhere."""
    one = Training(slot, base, tmp_path)
    with pytest.raises(Killed):
        one.run(dies_in=3)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    with pytest.raises(ProofError, match="goes on otherwise than it was kept: optimizer"):
        one.run()


def test_of_the_slot_what_learns_is_kept(slot: Slot, base: LoadedBase, tmp_path: Path) -> None:
    """The delta's rows of weights and moments; the anchor's are what they were, and zero."""
    one = Training(slot, base, tmp_path, kind="dpo")
    with pytest.raises(Killed):
        one.run(dies_in=3)
    newest = one.place.newest()
    assert newest is not None
    found = load_file(one.place.tensors(newest))
    moments = {name for name in found if "exp_avg" in name}
    weights = {name for name in found if name.startswith("weights/")}
    assert len(moments) == 2 * len(weights) > 0
    for name in moments | weights:
        assert LORA.rank in found[name].shape and slot.rank not in found[name].shape, name


def test_it_is_kept_after_the_interval_and_not_before(
    slot: Slot, base: LoadedBase, tmp_path: Path
) -> None:
    patient = Training(slot, base, tmp_path, every_s=3600)
    never = Training(slot, base, tmp_path, every_s=0)
    for one in (patient, never):
        with pytest.raises(Killed):
            one.run(dies_in=5)
        assert not one.place.path.exists()


def test_a_full_disk_does_not_end_it(
    slot: Slot, base: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is tried; the last that is whole stays."""
    write = checkpoint.write_checkpoint

    def full(place: CheckpointDir, step: int, state: Any, found: Any) -> None:
        if step > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(place, step, state, found)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    one = Training(slot, base, tmp_path)
    one.run()
    assert one.said == [
        f"no checkpoint after step {step} of 6 of the training, which could not be kept "
        "([Errno 28] No space left on device)"
        for step in (2, 3, 4, 5)
    ]
    assert one.place.newest() == one.place.of(1)


def test_any_state_of_an_optimiser_comes_back() -> None:
    """bitsandbytes has mappings in mappings, bytes, and one table that all share."""
    table = torch.arange(256, dtype=torch.float32)
    state = {
        "state": {
            0: {"step": 3, "quant": {"state1": torch.ones(4, dtype=torch.uint8), "qmap1": table}},
            1: {"step": torch.tensor(3.0), "quant": {"qmap1": table}},
        },
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "fused": None, "params": [0, 1]}],
    }
    found: dict[str, torch.Tensor] = {}
    again = unpacked(json.loads(json.dumps(packed(state, found, "it"))), found)
    assert again["param_groups"] == [
        {"lr": 0.1, "betas": [0.9, 0.999], "fused": None, "params": [0, 1]}
    ]
    assert again["state"][0]["step"] == 3 and again["state"].keys() == {0, 1}
    quant = again["state"][0]["quant"]
    assert quant["state1"].dtype == torch.uint8 and torch.equal(quant["qmap1"], table)
    assert found["it/state/0/quant/qmap1"].data_ptr() != table.data_ptr()
    with pytest.raises(TypeError, match="it/0 is a set"):
        packed([{1}], {}, "it")


def test_a_folder_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    place, weights = CheckpointDir(tmp_path / "kept"), {"w": torch.ones(2)}
    told = {"training": {"iteration": 2, "name": "delta"}, "steps": 9}
    assert place.newest() is None and place.progress() is None
    write_checkpoint(place, 9, {**told, "step": 9}, weights)
    write_checkpoint(place, 10, {**told, "step": 10}, weights)
    assert [folder.name for folder in place.path.iterdir()] == ["step_10"]
    assert place.progress() == {"iteration": 2, "name": "delta", "step": 10, "steps": 9}
    # Killed while it wrote the next one, or deleted one.
    (place.draft / "x").mkdir(parents=True)
    assert place.newest() == place.of(10)
    write_checkpoint(place, 11, {**told, "step": 11}, weights)
    assert [folder.name for folder in place.path.iterdir()] == ["step_11"]
    place.state(place.of(11)).write_text("{")
    assert place.progress() is None
    place.drop()
    assert not place.path.exists()
    place.drop()


SETTINGS = (
    "base.quantization=none",
    "base.device=cpu",
    "checkpoint_minutes=1e-9",
    "anchor.ift_limit=12",
    "anchor.eft_prompts=2",
    "anchor.batch_size=4",
    "prompts.per_iteration=6",
    "rollout.n=2",
    "rollout.max_new_tokens=32",
    "judge.votes=1",
    "judge.min_votes=1",
    "judge.max_new_tokens=12",
    "judge.retry_max_new_tokens=12",
    "pairing.source=gold",
    "pairing.drop_truncated=false",
    "pairing.min_pairs=1",
    "dpo.batch_size=2",
    "dpo.micro_batch_size=2",
    "evaluate.policy_prompts=0",
    "evaluate.eft_prompts=1",
    "evaluate.votes=1",
)


def words(out: Path, *more: str) -> list[str]:
    sets = [part for one in (*SETTINGS, *more) for part in ("--set", one)]
    return ["iterate", "--recipe", "tiny", "--adapters", str(out), *sets]


def artefacts(run: RunDir) -> dict[str, str]:
    """Hashes of all that a run computes; seconds and hardware are no results."""
    left_out = {"done.json", ".noted.json", "metrics.jsonl", "run.json", ".lock"}
    return {
        str(file.relative_to(run.path)): sha256_file(file)
        for file in sorted(run.path.rglob("*"))
        if file.is_file() and file.suffix != ".sums" and file.name not in left_out
    }


def test_a_run_that_is_killed_and_stopped_in_its_trainings_ends_with_the_same_bytes(
    tmp_path: Path, cli: Cli, told: Told
) -> None:
    """By SIGKILL, as when the power fails; by SIGTERM, as Slurm does; by Ctrl-C."""
    whole, out = RunDir(tmp_path / "whole"), RunDir(tmp_path / "out")
    recipe = load_recipe("tiny", [*SETTINGS, "iterations=1"])
    whole.open(recipe, {})
    iterate(Session(recipe, whole))

    def stopped(kind: str, step: int, number: str) -> Done:
        return ended(SCRIPT, "0", kind, str(step), number, *words(out.path, "iterations=1"))

    killed = stopped("SFT", 3, "SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    assert out.checkpoint.newest() == out.checkpoint.of(2)
    terminated = stopped("SFT", 4, "SIGTERM")
    assert (terminated.returncode, terminated.stdout) == (143, "")
    assert "  anchor SFT goes on from step 2 of" in terminated.stderr
    told(terminated.stderr.splitlines()[-1])
    # It was the last step: what it has made is written before it ends.
    assert out.anchor.training.is_file() and not out.checkpoint.path.exists()
    interrupted = stopped("DPO", 2, "SIGINT")
    assert (interrupted.returncode, interrupted.stdout) == (130, "")
    told(interrupted.stderr.splitlines()[-1])
    assert out.checkpoint.newest() == out.checkpoint.of(2)
    shown = cli("show", "run", "--adapters", out.path)
    assert "kept: the training of delta of iteration 1 after step 2 of" in shown.stdout
    shown = cli("show", "run", "--adapters", out.path, "--json")
    assert json.loads(shown.stdout)["checkpoint"]["step"] == 2
    # Killed when its result was written, and the checkpoint not yet deleted.
    result = out.iteration(1).delta_place.training
    result.write_text("{}")
    assert "kept:" not in cli("show", "run", "--adapters", out.path).stdout
    result.unlink()
    iterate(Session(recipe, out))
    assert artefacts(out) == artefacts(whole)


def as_two(run: RunDir, *stop: str) -> tuple[list[int | None], str]:
    programs = started_as_two(SCRIPT, *stop, *words(run.path, "iterations=0"))
    errors = "".join(program.communicate()[1] for program in programs)
    return [program.returncode for program in programs], errors


def test_two_processes_stop_after_the_same_step_and_go_on(tmp_path: Path) -> None:
    """One of them is told to end, then the other is killed: the first writes, both go on."""
    whole, out = RunDir(tmp_path / "whole"), RunDir(tmp_path / "out")

    assert as_two(whole, "0", "SFT", "0", "SIGKILL")[0] == [0, 0]
    codes, errors = as_two(out, "1", "SFT", "2", "SIGTERM")
    assert codes == [143, 143], errors
    lines = [line for line in errors.splitlines() if "srlm-lite:" in line]
    assert len(lines) == 1 and "(SIGTERM) after step 2 of 4 of anchor SFT; what" in lines[0]
    assert out.checkpoint.newest() == out.checkpoint.of(2)
    codes, errors = as_two(out, "1", "SFT", "4", "SIGKILL")
    assert codes == [1, -signal.SIGKILL] and "  anchor SFT goes on from step 2 of 4" in errors
    assert out.checkpoint.newest() == out.checkpoint.of(3)
    assert as_two(out, "0", "SFT", "0", "SIGKILL")[0] == [0, 0]
    assert artefacts(out) == artefacts(whole)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_ctrl_c_on_a_launcher_stops_both_after_a_step(launcher: str, tmp_path: Path) -> None:
    """As a terminal sends it: to the launcher and all that is in its group."""
    whole, out = RunDir(tmp_path / "whole"), RunDir(tmp_path / "out")
    assert as_two(whole, "0", "SFT", "0", "SIGKILL")[0] == [0, 0]

    def started(*stop: str) -> tuple[int, str]:
        config, port = recipes_dir() / "accelerate" / "ddp-2.yaml", str(free_port())
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        launch += ["--main_process_port", port]
        if launcher == "torchrun":
            launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
        program = [sys.executable, *launch, str(SCRIPT), *stop]
        done = subprocess.run(
            [*program, *words(out.path, "iterations=0")],
            env=environment(),
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        return done.returncode, done.stderr

    # The second one sends it to the launcher's whole group, as a terminal does.
    code, errors = started("1", "SFT", "2", "GROUP")
    assert code != 0
    lines = [line for line in errors.splitlines() if line.startswith("srlm-lite:")]
    assert len(lines) == 1 and "interrupted after step" in lines[0], errors
    step = int(lines[0].split("after step ")[1].split()[0])
    assert step in (2, 3) and out.checkpoint.newest() == out.checkpoint.of(step)
    code, errors = started("0", "SFT", "0", "SIGKILL")
    assert code == 0 and f"  anchor SFT goes on from step {step} of 4" in errors
    assert artefacts(out) == artefacts(whole)


def test_signals_wait_for_a_step_and_a_second_ctrl_c_does_not() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for first, error in ((signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)):
        passed = []
        with pytest.raises(KeyboardInterrupt) as raised, deferred():
            with deferred() as inner:  # as in a stage, a training
                signal.raise_signal(first)
                assert inner.number == first
            signal.raise_signal(signal.SIGTERM)  # however often
            passed.append(first)
        assert passed == [first] and type(raised.value) is error
    with pytest.raises(KeyboardInterrupt), deferred() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        stop.number = None  # not reached
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_a_job_in_the_background_does_not_hear_stays_unheard() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_trains_without_signals() -> None:
    found: list[bool] = []

    def train() -> None:
        with deferred() as stop, terminable():
            found.append(stop.asked)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [False]
