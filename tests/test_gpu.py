"""What has to hold on a GPU as well; what applies to a CPU runs there too, in the same bodies."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from srlm_lite.bench.gpu import Extent, bench_gpu
from srlm_lite.doctor.machine import gpu_findings
from srlm_lite.methods import METHODS
from srlm_lite.model.base import load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.progress import Silent
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.settings import Base, Lora
from srlm_lite.training.selftest import prove_stack, toy_base

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
RUBRIC = "Read the reply and judge it. One point for each thing that it does well. " * 4
TEXTS = ("moon", "How do I look after a bicycle?", "a b c", "What is a cache, and why? " * 9)


@pytest.fixture(autouse=True)
def _here(request: pytest.FixtureRequest) -> None:
    asked = request.node.get_closest_marker("gpu") is not None
    if asked and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


# --- the proof of the stack -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("device", [GPU])
def test_the_stack_is_proven(device: Any, quantization: Any, dtype: Any) -> None:
    """First loss ln 2, first margin 0; anchor and base stay bit for bit what they were."""
    facts = prove_stack(toy_base(device=device, quantization=quantization, dtype=dtype))
    assert facts["step0_loss"] == pytest.approx(0.693147, abs=1e-3)
    assert facts["step0_margin"] == pytest.approx(0, abs=2e-3)
    assert facts["last_loss"] < facts["step0_loss"]


# --- sampling ---------------------------------------------------------------------------------


def random_adapter(slot: Slot, seed: int) -> Adapter:
    fresh = slot.fresh(Lora(rank=4, alpha=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: (a, 0.3 * torch.randn(b.shape, generator=generator))
        for module, (a, b) in fresh.factors.items()
    }
    return Adapter(4, 4.0, factors)


@pytest.mark.parametrize(("quantization", "fold"), [("none", False), ("nf4", False), ("nf4", True)])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_greedy_is_token_for_token_what_plain_generate_gives(
    tiny_base_dir: Path, device: Any, quantization: Any, fold: bool
) -> None:
    """In float32, two adapters in the slot, ragged prompts, with and without a shared rubric."""
    section = Base(
        name=str(tiny_base_dir), device=device, dtype="float32", quantization=quantization
    )
    base = load_base(section)
    slot, chat = Slot(base.model, targets=Lora().targets, rank=8), ChatFormat.of(base)
    engine = TransformersEngine(slot, chat, batch_rows=6)
    stack = [random_adapter(slot, 1), random_adapter(slot, 2)]
    model: Any = slot.model.get_base_model()
    for before in ("", RUBRIC):
        prompts = [tuple(chat.prompt_ids(before + text)) for text in TEXTS]
        limits = Limits(temperature=0.0, top_p=1.0, max_new_tokens=40, ignore_end=True)
        slot.fold = fold
        engine.load(stack)
        rows = engine.sample([Request(prompt, (1, 2)) for prompt in prompts], limits)
        slot.fold = False
        slot.load(())
        slot.load(stack)
        for prompt, samples in zip(prompts, rows, strict=True):
            ids = torch.tensor([prompt], device=base.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=40,
                eos_token_id=None,
                pad_token_id=chat.pad_id,
            )
            expected = output[0, ids.shape[1] :].tolist()
            assert [list(sample.token_ids) for sample in samples] == [expected, expected]
    assert engine._captures == (device == "cuda")  # it was graphs, to the end


# --- memory -----------------------------------------------------------------------------------


def allocated() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
def test_sampling_and_training_give_their_memory_back(tiny_base_dir: Path) -> None:
    section = Base(name=str(tiny_base_dir), device="cuda", quantization="nf4")
    prove_stack(load_base(section))  # libraries take their workspaces; a base is wrapped once
    base = load_base(section)
    slot = Slot(base.model, targets=Lora().targets, rank=8)
    engine = TransformersEngine(slot, ChatFormat.of(base))
    before = allocated()
    limits = Limits(temperature=1.0, top_p=1.0, max_new_tokens=64, ignore_end=True)
    prompt = tuple(range(4, 400))
    engine.sample([Request(prompt, tuple(range(64))), Request(prompt, (1,))], limits)
    engine.close()
    assert allocated() <= before + (1 << 20)


@pytest.mark.gpu
@pytest.mark.vllm
def test_vllm_gives_its_memory_back_before_training(
    wide_headed_base_dir: Path, tmp_path: Path
) -> None:
    """A 16-bit base and a stack as one LoRA; what is free afterwards is what was free before."""
    from srlm_lite.rollout.vllm_engine import VllmEngine

    section = Base(name=str(wide_headed_base_dir), device="cuda", dtype="bfloat16", window=1024)
    base = load_base(section)
    slot, chat = Slot(base.model, targets=Lora().targets, rank=8), ChatFormat.of(base)
    engine = VllmEngine(
        base,
        chat,
        section,
        memory=0.3,
        batch_rows=16,
        rank=8,
        scratch=tmp_path / "scratch",
        log=tmp_path / "vllm.log",
    )
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    engine.load([random_adapter(slot, 1), random_adapter(slot, 2)])
    limits = Limits(temperature=0.0, top_p=1.0, max_new_tokens=16)
    requests = [Request(tuple(chat.prompt_ids(text)), (1,)) for text in TEXTS]
    samples = engine.sample(requests, limits)
    assert all(row[0].n_tokens for row in samples)
    total = torch.cuda.mem_get_info()[1]
    assert torch.cuda.mem_get_info()[0] < free - 0.1 * total  # it does hold its share
    engine.close()
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20)


# --- a base of a real shape -------------------------------------------------------------------


@pytest.mark.gpu
def test_a_7b_shape_in_nf4_is_built_without_its_16_bits() -> None:
    """6.5 billion weights at 4.13 bits, and an embedding and a head of 131 million each in 16."""
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("less than 16 GB free on the GPU")
    job = Extent(
        prompts=2, n=2, answer_tokens=8, votes=1, vote_tokens=4, reply_tokens=64, batch=1, steps=2
    )
    found = bench_gpu("llama2-7b", job, Silent(), ways=("ours",), device="cuda")
    base = found["base"]
    assert base["in_use_bytes"] == pytest.approx(3.9e9, rel=0.1)
    # At its peak one more tensor, in 16 bits, and what quantizing it takes.
    assert base["peak_bytes"] - base["in_use_bytes"] < 1e9
    assert found["ways"]["ours"]["dpo"]["step0_loss"] == pytest.approx(0.693147, abs=1e-3)
    assert found["ways"]["ours"]["dpo"]["peak_bytes"] < 16e9


# --- the whole of it --------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "srlm_lite", *words], capture_output=True, text=True
    )


@pytest.mark.gpu
def test_a_loop_and_an_export_on_the_gpu(tmp_path: Path) -> None:
    """NF4 in bfloat16: two iterations, resumed to the same bytes, exported with its parity."""
    out, merged = tmp_path / "run", tmp_path / "merged"
    words = ("iterate", "--recipe", "tiny", "--adapters", str(out))
    done = command(*words, "--set", "base.device=cuda", "--set", "base.dtype=bfloat16")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["step0_loss"] for row in rows if row["stage"] == "delta"]
    assert losses == pytest.approx([0.693147] * 2, abs=1e-3)
    digest = json.loads((out / "iter_002" / "done.json").read_text())
    assert (
        command(*words, "--set", "base.device=cuda", "--set", "base.dtype=bfloat16").returncode == 0
    )
    assert json.loads((out / "iter_002" / "done.json").read_text()) == digest
    done = command("export", "--adapters", str(out), "--out", str(merged), "--onto", "dequantized")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (merged / "parity.json").is_file()


SMALL = (
    "base.device=cuda",
    "prompts.per_iteration=16",
    "pairing.min_pairs=1",
    "anchor.ift_limit=64",
    "anchor.eft_prompts=32",
    "anchor.epochs=1",
    "evaluate.policy_prompts=4",
    "evaluate.eft_prompts=2",
)
RECIPES = {name: kind.shipped_recipe() for name, kind in METHODS.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("method", RECIPES)
def test_a_method_runs_on_the_gpu(method: str, tmp_path: Path) -> None:
    """Likelihoods, labels, reward models, losses of their own: all meet the device here."""
    out = tmp_path / "run"
    settings = [word for each in SMALL for word in ("--set", each)]
    words = ("--recipe", RECIPES[method], "--iterations", "1", "--adapters", str(out))
    done = command("iterate", *words, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [delta] = [row for row in rows if row["stage"] == "delta"]
    if method == "rlhf":  # on-policy: its proof is of the divergence
        assert delta["step0_kl"] == pytest.approx(0, abs=1e-3)
    elif method == "rlaif":  # its first delta is SFT on the revisions
        assert 0 < delta["last_loss"] < 4.9  # a guess among the base's 140 tokens is at 4.94
    else:
        assert delta["step0_loss"] == pytest.approx(0.693147, abs=1e-3)
    assert (out / "iter_001" / "done.json").is_file()


@pytest.mark.gpu
def test_the_doctor_knows_the_gpu() -> None:
    finding = gpu_findings()[0]
    assert torch.cuda.get_device_name(0) in finding.text
    assert finding.state in ("ok", "warning")
    done = command("doctor", "--json")
    assert done.returncode == 0, done.stdout[-2000:]
    assert all("cuda" in way["text"] for way in json.loads(done.stdout)["proof of the stack"])
