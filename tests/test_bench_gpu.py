"""`srlm-lite bench gpu`: a random base like a loaded one, equal work, and a floor by arithmetic."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from commands import Cli
from transformers import LlamaConfig

from srlm_lite.bench.floor import Dimensions, decode, dpo_step, prefill
from srlm_lite.bench.gpu import SMALL, TINY, Extent, bench_gpu, job_of, shape_config, ways_of
from srlm_lite.bench.roofline import shape_of
from srlm_lite.errors import UserError
from srlm_lite.model.base import load_base
from srlm_lite.model.random_base import random_base
from srlm_lite.planning.shapes import SHAPES
from srlm_lite.progress import Silent
from srlm_lite.settings import Base

TOOL = Path(__file__).resolve().parent.parent / ".ci" / "gpu_report.py"
SPEC = importlib.util.spec_from_file_location("gpu_report", TOOL)
assert SPEC is not None and SPEC.loader is not None
gpu_report = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_report)

CPU = torch.device("cpu")
F32 = torch.float32


def test_a_base_larger_than_the_machine_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """36.4 GB, and 16 bytes a weight of an MLP projection, 8192 x 28672, are 40.1; 0.7 is ours."""
    from srlm_lite.bench import gpu
    from srlm_lite.planning import machine

    monkeypatch.setattr(machine, "machine_memory", lambda: 40 * 10**9)
    monkeypatch.setattr(gpu, "random_base", None)  # nothing is built
    # What `auto` gives depends on the CPU; float32 would double the embeddings and the head.
    monkeypatch.setattr(gpu, "compute_dtype", lambda section: torch.bfloat16)
    with pytest.raises(UserError, match=r"--shape llama2-70b: .* 40\.8 GB .* has 40\.0 GB"):
        bench_gpu("llama2-70b", Extent(), Silent(), device="cpu")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_random_base_is_built_as_a_real_one_is_loaded(
    tiny_base_dir: Path, quantization: str
) -> None:
    section = {"name": str(tiny_base_dir), "dtype": "float32", "quantization": quantization}
    loaded = load_base(Base(**section)).model
    config = LlamaConfig.from_pretrained(tiny_base_dir)
    built = random_base(config, name="x", device=CPU, dtype=F32, quantization=quantization).model
    expected, found = dict(loaded.named_parameters()), dict(built.named_parameters())
    assert list(found) == list(expected)
    for name, weight in expected.items():
        other = found[name]
        assert type(other) is type(weight), name
        assert (other.shape, other.dtype, other.device) == (
            weight.shape,
            weight.dtype,
            weight.device,
        )
        assert not other.requires_grad
        if quantization == "nf4" and hasattr(weight, "quant_state"):
            one, two = weight.quant_state, other.quant_state
            assert (one.shape, one.quant_type, one.nested, one.blocksize) == (
                two.shape,
                two.quant_type,
                two.nested,
                two.blocksize,
            )
    ids = torch.arange(4, 12).unsqueeze(0)
    logits = built(input_ids=ids).logits
    assert logits.isfinite().all() and logits.std() > 0
    flags = ("is_loaded_in_4bit", "is_quantized")
    assert [getattr(built, f, False) for f in flags] == [getattr(loaded, f, False) for f in flags]


def test_a_tied_base_stays_tied() -> None:
    config = LlamaConfig(
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = random_base(config, name="x", device=CPU, dtype=F32, quantization="nf4").model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_shape_of_an_nf4_base_counts_its_scales() -> None:
    """64 numbers have a scale of one byte, 256 scales one of four: 0.5 + 1/64 + 4/16384."""
    config = LlamaConfig(
        **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256},
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    base = random_base(config, name="x", device=CPU, dtype=torch.bfloat16, quantization="nf4")
    shape = shape_of(base.model)
    assert shape.linear == 7 * 256 * 256
    assert shape.linear_bytes == pytest.approx(0.5 + 1 / 64 + 4 / 16384)
    assert shape.number_bytes == 2
    assert shape.weights == pytest.approx(7 * 65536 * 0.515869140625 + 2 * 512 * 256)


def test_quantized_weights_are_read_at_their_own_size() -> None:
    """Linear layers of 100 weights at half a byte, 50 of the head at 2: 150 bytes a pass."""
    shape = Dimensions(100, 50, 2, 4, 2, number_bytes=2, linear_bytes=0.5)
    plain = Dimensions(100, 50, 2, 4, 2, number_bytes=2)
    assert prefill(plain, [3]).bytes - prefill(shape, [3]).bytes == 150
    one = decode(plain, [3], samples=1, new_tokens=3).bytes
    assert one - decode(shape, [3], samples=1, new_tokens=3).bytes == 2 * 150


def test_a_step_of_dpo() -> None:
    """One pair of 3 and 2 tokens, 2 and 1 scored: forward twice, backward once.

    Layers: 3 x 2 x 100 for each of 5 tokens; attention to 6 + 3 = 9 tokens, 4 x 2 x 4 each, 4
    times; scores: 3 x 2 x 50 for each of 3.
    """
    shape = Dimensions(100, 50, 2, 4, 2, number_bytes=2)
    work = dpo_step(shape, [(3, 2), (2, 1)], batches=1, checkpointing=False)
    assert work.flops == 3 * 200 * 5 + 4 * 32 * 9 + 3 * 100 * 3
    assert work.bytes == 3 * 2 * 150
    again = dpo_step(shape, [(3, 2), (2, 1)], batches=1, checkpointing=True)
    assert again.flops - work.flops == 200 * 5 + 32 * 9
    assert again.bytes == 4 * 2 * 150


@pytest.mark.parametrize(("shape", "billions"), [("llama2-7b", 6.6), ("llama2-70b", 68.7)])
def test_the_shapes_are_the_models(shape: str, billions: float) -> None:
    """On the meta device: weights of the linear layers and the head, in billions."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(shape_config(shape))
    found = shape_of(model)
    assert (found.linear + found.head) / 1e9 == pytest.approx(billions, rel=0.01)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"--shape: no such shape: gpt-5\. There are tiny, llama2"):
        shape_config("gpt-5")
    with pytest.raises(UserError, match=r"--ways: no such way: trl"):
        ways_of("ours,trl")
    with pytest.raises(UserError, match="does not divide the batch"):
        job_of("llama2-7b", micro_batch=3)
    assert job_of(TINY, prompts=None) == SMALL
    assert job_of("llama3.1-8b", prompts=3) == Extent(prompts=3)
    assert set(SHAPES) >= {"llama2-70b", "llama3.1-8b", "llama2-7b"}


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match="--device: no CUDA device was found"):
        bench_gpu(TINY, SMALL, Silent(), device="cuda")


@pytest.mark.usefixtures("brief_rates")
def test_the_command(cli: Cli, tmp_path: Path) -> None:
    ways = "plain,ours,continuous,eager,folded"
    done = cli("bench", "gpu", "--device", "cpu", "--ways", ways, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bench"] == "gpu" and found["shape"] == "tiny"
    assert found["base"]["bytes_per_linear_weight"] < 0.53
    assert list(found["ways"]) == ["ours", "folded", "eager", "continuous", "plain"]
    for way, phases in found["ways"].items():
        trains = ["dpo"] if way in ("ours", "plain") else []
        assert list(phases) == ["candidates", "judge", *trains]
        assert phases["candidates"]["tokens"] == 2 * 2 * 8
        assert phases["judge"]["tokens"] == 2 * 2 * 2 * 8
        for phase in phases.values():
            assert phase["tokens_per_s"] > 0 and 0 < phase["floor_share"] < 1
            assert phase["peak_bytes"] is None or phase["peak_bytes"] > 0
    assert found["ways"]["ours"]["dpo"]["step0_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert {"date", "machine", "versions", "machine_rates", "floor", "job"} <= found.keys()
    (tmp_path / "gpu-tiny.json").write_text(json.dumps(found))
    assert "| tiny | plain | a DPO step |" in gpu_report.section(tmp_path)  # `make gpu` reads it
