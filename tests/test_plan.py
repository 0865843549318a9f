"""The plan against the real thing, counted in live bytes; and what `plan` and `iterate` say."""

from __future__ import annotations

import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_bytes import LiveBytes
from messages import Told
from typer.testing import CliRunner

from srlm_lite.errors import UserError
from srlm_lite.hardware import device_name
from srlm_lite.methods import METHODS
from srlm_lite.methods.rlhf import RewardSection
from srlm_lite.planning.gpus import known_gpu
from srlm_lite.planning.lengths import lengths_of, longest
from srlm_lite.planning.machine import plan_for, remade, settings_that_fit, shortfall, spread
from srlm_lite.planning.memory import ROUNDING, Held, holes, sampling, training
from srlm_lite.planning.plan import (
    Hardware,
    Phase,
    Plan,
    advice,
    needs_sharding,
    parse_gpus,
)
from srlm_lite.planning.probe import probe, shape_of_base
from srlm_lite.planning.rates import known_rates, rates_key, remember
from srlm_lite.planning.shapes import config_of
from srlm_lite.planning.times import (
    Time,
    by_devices,
    in_words,
    other_engines,
    shipped_rates,
    speedup,
    times_of,
    total,
)
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.rollout.sizes import leaf_room
from srlm_lite.settings import Anchor, Base, Dpo, Lora

RANK = 8
GB = 10**9


MANY_WORDS = 16384


@pytest.fixture(scope="module")
def wide_base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that its tensors, and not the bookkeeping around them, are what counts."""
    return _wide(tiny_base_dir, tmp_path_factory.mktemp("wide_base"), {})


@pytest.fixture(scope="module")
def wordy_base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with logits that outweigh all else."""
    more = {"vocab_size": MANY_WORDS}
    return _wide(tiny_base_dir, tmp_path_factory.mktemp("wordy_base"), more)


def _wide(tiny_base_dir: Path, folder: Path, more: dict[str, int]) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_base_dir)
    config.update({"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3})
    config.update({"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **more})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(folder)
    return folder


def loaded(folder: Path, quantization: str, dtype: str) -> tuple[Any, Any, Held, list[Any]]:
    from srlm_lite.model.base import load_base
    from srlm_lite.model.stack import Slot

    section = Base(name=str(folder), quantization=quantization, dtype=dtype, device="cpu")
    base = load_base(section)
    lora = Lora(rank=RANK, alpha=16)
    slot = Slot(base.model, targets=lora.targets, rank=2 * RANK)
    held = Held(
        shape=shape_of_base(Base(name=str(folder))),
        nf4=quantization == "nf4",
        itemsize=base.dtype.itemsize,
        device="cpu",
        targets=lora.targets,
        rank=2 * RANK,
    )
    return base, slot, held, [slot.fresh(lora, seed=1), slot.fresh(lora, seed=2)]


def test_the_bytes_of_a_base_are_those_it_has(wide_base: Path) -> None:
    from srlm_lite.bench.load import tensor_bytes

    for quantization, dtype in (("none", "float32"), ("nf4", "bfloat16")):
        base, _, held, _ = loaded(wide_base, quantization, dtype)
        frozen = [p for n, p in base.model.named_parameters() if "lora_" not in n]
        assert sum(tensor_bytes(p) for p in frozen) == pytest.approx(held.base, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "quantization", "dtype", "checkpointing", "dropout"),
    [
        ("dpo", "none", "bfloat16", False, 0.0),
        ("dpo", "nf4", "float32", False, 0.0),
        ("dpo", "none", "bfloat16", True, 0.0),
        ("sft", "nf4", "bfloat16", False, 0.1),
        ("sft", "none", "bfloat16", True, 0.0),
        ("reward", "none", "float32", False, 0.0),
        ("reward", "nf4", "bfloat16", True, 0.0),
    ],
)
def test_training_holds_what_the_shapes_say(
    kind: str,
    quantization: str,
    dtype: str,
    checkpointing: bool,
    dropout: float,
    wide_base: Path,
    tmp_path: Path,
) -> None:
    predicted, peak = training_peak(
        wide_base, tmp_path, kind, quantization, dtype, checkpointing=checkpointing, dropout=dropout
    )
    assert predicted == pytest.approx(peak, rel=0.06)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("dpo", "float32"), ("dpo", "bfloat16"), ("sft", "bfloat16")]
)
def test_losses_hold_the_logits_of_256_tokens(
    kind: str, dtype: str, wordy_base: Path, tmp_path: Path
) -> None:
    """A micro-batch has 508 target tokens in DPO, whose logits are 33 MB once in float32."""
    predicted, peak = training_peak(wordy_base, tmp_path, kind, "none", dtype, checkpointing=True)
    embeddings = MANY_WORDS * 128 * (4 if dtype == "float32" else 2)  # no operation returns them
    assert predicted - embeddings == pytest.approx(peak, rel=0.02)
    of_logit = 8 if dtype == "float32" else 10
    assert 0.6 * peak < of_logit * 256 * MANY_WORDS < peak


def training_peak(
    folder: Path,
    tmp_path: Path,
    kind: str,
    quantization: str,
    dtype: str,
    *,
    checkpointing: bool,
    dropout: float = 0.0,
) -> tuple[int, int]:
    """Bytes of a training: predicted, of what an operation meets, and counted."""
    from srlm_lite.training.dpo import PairExample, train_dpo
    from srlm_lite.training.reward import train_reward
    from srlm_lite.training.sft import Example, train_sft

    base, slot, held, (anchor, delta) = loaded(folder, quantization, dtype)
    tokens, micro = 128, 4
    optim = {
        "batch_size": micro,
        "micro_batch_size": micro,
        "epochs": 2,  # the optimiser's states are there in the second step
        "learning_rate": 1e-3,
        "gradient_checkpointing": checkpointing,
        "lora": Lora(rank=RANK, alpha=16),
    }

    def ids(count: int, seed: int) -> tuple[int, ...]:
        """No two of them begin alike, so that nothing is shared."""
        return tuple((seed + 7 * i) % 199 for i in range(count))

    pairs = [
        PairExample(ids(1, i), ids(tokens - 2, 20 + i), ids(tokens - 1, 40 + i))
        for i in range(micro)
    ]
    with LiveBytes() as live:
        if kind == "reward":
            del optim["lora"]
            train_reward(
                slot,
                base,
                anchor=[anchor],
                adapter=delta,
                pairs=pairs,
                optim=RewardSection(**optim),
                scratch=tmp_path,
                seed=0,
            )
        elif kind == "dpo":
            train_dpo(
                slot,
                base,
                anchor=[anchor],
                delta=delta,
                reference=[anchor, delta],
                pairs=pairs,
                dpo=Dpo(**optim),
                scratch=tmp_path,
                seed=0,
            )
        else:
            train_sft(
                slot,
                base,
                anchor,
                [Example(ids(64, i), ids(64 - i % 2, 20 + i)) for i in range(micro)],
                optim=Anchor(**optim),
                dropout=dropout,
                scratch=tmp_path,
                seed=0,
            )
    parts = training(
        held,
        kind=kind,
        rows=micro * (1 if kind == "sft" else 2),
        tokens=tokens,
        checkpointing=checkpointing,
        accumulates=False,
        dropout=dropout > 0,
    )
    # The stack's own tensors, which no operation has met; DPO takes a digest of its reference.
    made_before = 0 if kind == "dpo" else 4 * held.slot
    return sum(parts.values()) - made_before, live.peak


def test_sampling_holds_what_the_shapes_say(wide_base: Path) -> None:
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.rollout.protocol import Limits, Request
    from srlm_lite.rollout.transformers_engine import TransformersEngine

    base, slot, held, stack = loaded(wide_base, "none", "float32")
    engine = TransformersEngine(slot, ChatFormat.of(base, template=None), batch_rows=256)
    texts = [tuple((7 * i + j) % 200 for j in range(100 - i % 2)) for i in range(48)]
    requests = [Request(ids, tuple(range(4 * i, 4 * i + 4))) for i, ids in enumerate(texts)]
    with LiveBytes() as live:
        engine.load(stack)
        engine.sample(requests, Limits(0.7, 0.9, max_new_tokens=70, ignore_end=True))
    parts = sampling(held, prompts=48, samples=4, prompt_tokens=100, new_tokens=70)
    assert parts["kv_cache"] > 0.8 * sum(parts.values())
    assert sum(parts.values()) - 4 * held.slot == pytest.approx(live.peak, rel=0.06)


def test_a_second_micro_batch_finds_the_gradients_of_the_first() -> None:
    """AdamW has 8 bytes a parameter of the slot; a float32 gradient that waits is 4 more."""
    shape = probe(config_of("smollm2-135m"))
    slot = shape.adapter_parameters(Lora().targets, 16)  # the anchor's 8 ranks and the delta's
    for micro, bytes_each in ((16, 8), (8, 12)):
        settings = ["dpo.batch_size=16", f"dpo.micro_batch_size={micro}"]
        plan = plan_for(load_recipe("smollm2-135m", settings), Hardware("cuda", "", 80 * GB))
        dpo = next(phase for phase in plan.phases if phase.name == "DPO")
        assert dpo.parts["optimizer"] == bytes_each * slot


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rounding_a_tensor_on_a_cpu_takes_16_bytes_a_weight() -> None:
    """9.4 million weights: its blocks of float32 are too large for the allocator's heap."""
    import torch
    from bitsandbytes.nn import Params4bit

    from srlm_lite.bench.machine import resident_peak, status_bytes
    from srlm_lite.model.heap import give_back

    Params4bit(torch.ones(64, 64).bfloat16(), requires_grad=False).to("cpu")  # the code is there
    weight = torch.ones(3072, 3072).bfloat16()
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    except OSError:
        pytest.skip("the system does not let us reset the peak of memory")
    without = status_bytes("VmRSS") - weight.nbytes
    Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    taken = (resident_peak() - without) / weight.numel()
    assert taken == pytest.approx(ROUNDING["cpu"], rel=0.06)


@pytest.mark.parametrize(("device", "bytes_each"), [("cpu", 16), ("cuda", 2)])
def test_loading_in_nf4_counts_the_largest_tensor_on_its_way(device: Any, bytes_each: int) -> None:
    """In Llama-2 7B an MLP projection, 4096 x 11008: 0.72 GB on a CPU, more than a first token."""
    recipe = load_recipe("llama2-7b", ["base.dtype=bfloat16"])
    load = plan_for(recipe, Hardware(device, "", 80 * GB)).phases[0]
    rounding = bytes_each * 4096 * 11008
    if device == "cpu":
        assert load.parts["activations"] == rounding
        assert load.total == load.parts["base"] + rounding + load.parts["libraries"]
    else:
        assert load.total > load.parts["base"] + rounding + load.parts["libraries"]
    in_16_bits = load_recipe("llama2-7b", ["base.quantization=none", "base.dtype=bfloat16"])
    whole = plan_for(in_16_bits, Hardware(device, "", 80 * GB)).phases[0]
    assert whole.parts["activations"] < 10e6


def test_a_cpu_s_heap_loses_half_of_the_activations_again() -> None:
    """Hidden states of 4 x 128 tokens have 4 * 128 * 576 * 2 bytes, 0.6 MB.

    From 32 MB on, of 29,128 tokens here, glibc maps each block by itself.
    """
    shape = probe(config_of("smollm2-135m"))
    here, there = (
        Held(shape, nf4=False, itemsize=2, device=device, targets=Lora().targets, rank=16)
        for device in ("cpu", "cuda")
    )
    assert holes(here, 100, count=512) == 50
    assert holes(here, 100, count=29_127) == 50 and holes(here, 100, count=29_128) == 0
    assert holes(there, 100, count=512) == 0
    settings = ["base.window=128", "base.dtype=bfloat16", "dpo.micro_batch_size=4"]
    recipe = load_recipe("smollm2-135m", settings)
    plan = plan_for(recipe, Hardware("cpu", "CPU", 24 * GB), lengths=longest(recipe))
    dpo = next(phase for phase in plan.phases if phase.name == "DPO")
    tensors = training(
        here,
        kind="dpo",
        rows=8,
        tokens=128,
        checkpointing=False,
        accumulates=True,
        dropout=recipe.dpo.lora.dropout > 0,
    )
    assert dpo.parts["activations"] == int(1.5 * tensors["activations"])


def test_a_leaf_grows_by_doubling() -> None:
    assert [leaf_room(n) for n in (1, 32, 33, 96, 768)] == [32, 32, 64, 128, 1024]


def test_llama2_70b_in_nf4_by_hand() -> None:
    """68.98B parameters, 2 x 32000 x 8192 of them in embeddings and head, 161 norms of 8192."""
    shape = probe(config_of("llama2-70b"))
    held = Held(shape, nf4=True, itemsize=2, device="cuda", targets=Lora().targets, rank=32)
    kept = 2 * 32000 * 8192 + 161 * 8192
    rounded = 68_976_648_192 - kept
    assert held.quantized == rounded
    # Half a byte, a byte for each 64, four for each 256 of those.
    assert held.base == pytest.approx(
        rounded * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * kept, rel=1e-4
    )
    assert held.kv_per_token == 2 * 80 * 8 * 128 * 2
    # R (inputs + outputs) of q, k, v, o, gate, up, down.
    layer = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    assert held.slot == 32 * 80 * layer


@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [
        ("llama2-70b", "2x80GB"),
        ("llama2-7b", "24GB"),
        ("qwen3-8b", "24GB"),
        ("gemma3-4b", "24GB"),
        ("mistral-7b", "24GB"),
        ("smollm3-3b", "16GB"),
    ],
)
def test_the_recipes_for_a_gpu_fit_where_they_say(recipe: str, gpus: str) -> None:
    plan = plan_for(load_recipe(recipe), parse_gpus(gpus))
    assert [phase.name for phase in plan.phases if not plan.fits(phase)] == []


@pytest.mark.parametrize(
    ("recipe", "settings", "memory", "advised"),
    [
        (
            "llama3.1-8b",
            ["dpo.micro_batch_size=8", "dpo.gradient_checkpointing=false"],
            "24GB",
            {"dpo.gradient_checkpointing", "dpo.micro_batch_size"},
        ),
        ("llama3.1-8b", ["rollout.batch_rows=256"], "17GB", {"rollout.batch_rows"}),
        # Activations of one sequence: shorter ones help, and answers have to fit in them.
        (
            "llama3.1-8b",
            [],
            "10GB",
            {
                *("base.window", "rollout.max_new_tokens"),
                *("anchor.micro_batch_size", "rollout.batch_rows"),
            },
        ),
        # The copy in 16 bits does not fit while the base is loaded, nor while it samples.
        ("llama2-70b", ["rollout.fold=true"], "80GB", {"rollout.fold"}),
        # Smaller batches are tried first, and are needless in the end.
        ("llama2-7b", ["base.quantization=none"], "16GB", {"base.quantization"}),
    ],
)
def test_what_does_not_fit_gets_settings_that_do(
    recipe: str, settings: list[str], memory: str, advised: set[str]
) -> None:
    plan = plan_for(load_recipe(recipe, settings), parse_gpus(memory))
    assert not all(plan.fits(phase) for phase in plan.phases)
    changes, suffice = settings_that_fit(plan)
    assert suffice and {change.partition("=")[0] for change in changes} == advised
    changed = load_recipe(recipe, [*settings, *changes])
    assert changed.rollout.max_new_tokens <= changed.base.window // 2
    again = plan_for(changed, plan.hardware)
    assert all(again.fits(phase) for phase in again.phases)
    assert shortfall(again) is None


@pytest.mark.parametrize(("device", "stands_in_the_way"), [("cpu", True), ("cuda", False)])
def test_a_batch_too_large_halves_on_a_gpu_alone(device: Any, stands_in_the_way: bool) -> None:
    recipe = load_recipe("llama3.1-8b", ["base.dtype=bfloat16", "rollout.batch_rows=256"])

    def plan(memory: int) -> Any:
        return plan_for(recipe, Hardware(device, "", memory))

    phase = next(one for one in plan(80 * GB).phases if one.name == "candidates")
    assert phase.least < phase.total
    tight = plan((phase.least + phase.total) // 2)
    assert not tight.fits(phase)
    assert ("candidates" in [one.name for one in tight.impossible()]) is stands_in_the_way


def test_what_nothing_makes_fit_is_said() -> None:
    plan = plan_for(load_recipe("llama2-70b"), Hardware("cpu", "CPU", 24 * GB))
    missing = shortfall(plan)
    assert missing is not None and missing.phase in missing.what
    assert missing.way_out == "Name a smaller base, or a machine with more memory"
    assert needs_sharding(plan) is None  # no devices to spread it over


def test_adapters_that_no_machine_holds_are_told_of_though_the_export_is_the_largest() -> None:
    huge = ["anchor.lora.rank=1000000", "dpo.lora.rank=1000000"]
    missing = shortfall(plan_for(load_recipe("toy", huge), Hardware("cpu", "CPU", 24 * GB)))
    assert missing is not None
    assert missing.way_out == "Name a smaller base, or a machine with more memory"


def test_a_base_too_large_for_a_device_is_to_be_sharded() -> None:
    plan = plan_for(load_recipe("llama2-70b"), parse_gpus("4x24GB"))
    assert settings_that_fit(plan)[1] is False
    assert needs_sharding(plan) == 2
    # Half a byte a weight of the layers is spread; of it three layers are whole at a time.
    spread_out = spread(plan)
    layers = sum(one.inputs * one.outputs for one in plan.shape.linears if one.is_of_a_layer)
    gone = layers / 2 * (1 - 1 / 4 - 3 / 80)
    bases = [each.phases[0].parts["base"] for each in (plan, spread_out)]
    assert bases[0] - bases[1] == pytest.approx(gone, rel=1e-6)
    assert spread_out.fits(spread_out.phases[0])
    shown = run("plan", "--recipe", "llama2-70b", "--gpus", "4x24GB").output
    assert "spread over all 4" in shown and "fsdp2-qlora.yaml" in shown


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        ("2x80GB", "recipe llama2-70b: 2 x 80 GB, enough for 70B in NF4"),
        ("24GB", "recipe llama3.1-8b: 1 x 24 GB, enough for 8B in NF4"),
        ("8GB", "recipe smollm2-135m-demo: 1 x 8 GB, too little for 8B"),
    ],
)
def test_without_a_recipe_it_is_one_for_the_gpus_that_are_asked_about(gpus: str, told: str) -> None:
    assert told in run("plan", "--gpus", gpus).output


@pytest.mark.parametrize("gpus", ["5x24GB", "8x24GB", "2x36GB"])
def test_what_is_advised_for_a_spread_base_fits_when_it_is_followed(gpus: str) -> None:
    spread_out = spread(plan_for(load_recipe("llama2-70b"), parse_gpus(gpus)))
    changes, suffice = settings_that_fit(spread_out)
    assert suffice and changes
    again = plan_for(load_recipe("llama2-70b", changes), spread_out.hardware)
    assert all(again.fits(phase) for phase in again.phases)


def test_the_seed_data_bounds_the_lengths() -> None:
    """The longest prompt of the demo has 45 bytes or so, and answers have 96 tokens at most."""
    recipe = load_recipe("smollm2-135m-demo")
    lengths = lengths_of(recipe)
    assert lengths.prompt < 128 < recipe.base.window
    assert lengths.pair == lengths.prompt + 96 + 4
    assert lengths.graded == 40
    # 400 IFT rows, 800 EFT rows, and 400 more that show it how to compare judgements.
    assert [lengths_of(load_recipe(name)).examples for name in ("toy", "toy-meta")] == [1200, 1600]
    # The model that writes the targets learns the 400 first.
    assert lengths_of(load_recipe("toy", ["anchor.eft_targets=self"])).examples == 1600
    without = load_recipe("llama3.1-8b", ["data.dir=/nowhere"])
    assert lengths_of(without) == longest(without)


def test_prompts_are_measured_whatever_names_their_text(tmp_path: Path) -> None:
    """A list may say `text`, `prompt` or `instruction`; without held-out prompts of their own the
    evaluation takes those of `eft_eval.jsonl`. The longest has 300 bytes, a template 64 tokens."""
    data = shutil.copytree(load_recipe("tiny").data.dir, tmp_path / "data")
    recipe = load_recipe("tiny", [f"data.dir={data}", "base.window=4096"])
    for column in ("text", "prompt", "instruction"):
        (data / "prompts.jsonl").write_text(json.dumps({column: 300 * "a"}) + "\n")
        assert lengths_of(recipe).prompt == 300 + 64
    (data / "prompts.jsonl").write_text(json.dumps({"text": "short"}) + "\n")
    reply = {"prompt_id": "1", "prompt": 300 * "a", "response_id": "1", "response": "b", "rank": 0}
    (data / "eft_eval.jsonl").write_text(json.dumps(reply) + "\n")
    assert lengths_of(recipe).prompt < 300
    (data / "eval_prompts.jsonl").unlink()
    assert lengths_of(recipe).prompt == 300 + 64


@pytest.mark.parametrize("source", ["judge", "random", "gold"])
def test_candidates_are_judged_wherever_the_order_of_pairs_comes_from(source: str) -> None:
    """The tokens: 2 iterations of 12 prompts with 4 answers each, 3 votes of 64."""
    plan = plan_for(load_recipe("tiny", [f"pairing.source={source}"]), parse_gpus("24GB"))
    [phase] = [phase for phase in plan.phases if phase.name == "judge"]
    assert phase.tokens == 2 * 12 * 4 * 3 * 64


def test_the_tokens_of_an_evaluation_by_hand() -> None:
    """`tiny`: 3 models, each with 8 sampled and 8 greedy answers of 48 tokens and 2 votes of 64 on
    16 replies. Each grades its own 8 sampled ones, and the anchor those of the other two."""

    def tokens(*settings: str) -> int | None:
        plan = plan_for(load_recipe("tiny", settings), parse_gpus("24GB"))
        return next(phase.tokens for phase in plan.phases if phase.name == "evaluation")

    assert lengths_of(load_recipe("tiny")).graded == 16
    assert tokens() == 3 * 16 * 48 + (3 * 16 + 5 * 8) * 2 * 64
    assert tokens("evaluate.judged_answers=3") == 3 * 16 * 48 + (3 * 16 + 5 * 3) * 2 * 64
    # The best of 3 answers to 8 prompts, each with the 2 votes of a candidate.
    more = 3 * 8 * 3 * (48 + 2 * 64)
    assert tokens("evaluate.best_of=3", "judge.votes=2") == tokens("judge.votes=2") + more
    server = ("openai.url=http://127.0.0.1:1/v1", "openai.model=m", "judge.engine=openai")
    assert tokens(*server) == 3 * 16 * 48 + (3 * 16 + 3 * 8) * 2 * 64
    assert tokens("evaluate.tasks=[piqa]") is None


def test_replayed_pairs_count() -> None:
    """2 iterations of 12 prompts, a pair each: 24, and half as many again."""
    recipe = load_recipe("tiny", ["pairing.replay=[0.3, 0.2]"])
    plan = plan_for(recipe, parse_gpus("24GB"))
    dpo = next(phase for phase in plan.phases if phase.name == "DPO")
    assert dpo.tokens == 36 * 2 * dpo.shape["tokens"]


def test_all_pairs_so_far_count() -> None:
    """A rebased delta: iteration t learns t shares of 12 pairs; 12 + 24 + 36. Regraded: 12 + 24."""

    def phases(*overrides: str) -> dict[str, Phase]:
        recipe = load_recipe("tiny", ["iterations=3", "judge.votes=2", *overrides])
        return {one.name: one for one in plan_for(recipe, parse_gpus("24GB")).phases}

    found = phases("pairing.older_order=drop")
    assert found["DPO"].tokens == 72 * 2 * found["DPO"].shape["tokens"]
    new_tokens = load_recipe("tiny").judge.max_new_tokens
    assert found["judge, older pairs"].tokens == 36 * 2 * 2 * new_tokens
    alone = phases("pairing.accumulate=false")
    assert alone["DPO"].tokens == 36 * 2 * alone["DPO"].shape["tokens"]
    assert "judge, older pairs" not in alone
    chain = phases("dpo.init=previous")
    assert chain["DPO"].tokens == alone["DPO"].tokens


def test_the_trainings_of_other_methods_are_phases() -> None:
    def trainings(name: str, *overrides: str) -> dict[str, int | None]:
        recipe = load_recipe(name, ["anchor.init=base", *overrides])
        plan = plan_for(recipe, Hardware("cuda", "", 24 * GB), lengths=longest(recipe))
        return {one.name: one.tokens for one in plan.phases if one.trains}

    assert list(trainings("toy-rlhf")) == ["anchor SFT", "reward model", "RLOO"]
    more = ["iterations=3", "prompts.per_iteration=10", "pairing.replay=[]", "dpo.epochs=1",
            "rlaif.drafts=2", "rlaif.rounds=3", "rlaif.helpful=0.5", "rlaif.sft.epochs=2",
            "base.window=512"]  # fmt: skip
    found = trainings("toy-rlaif", *more)
    assert list(found) == ["anchor SFT", "revision SFT", "DPO"]
    assert found["revision SFT"] == 10 * 2 * 3 * 1.5 * 2 * 512
    # The first iteration has none; 4 answers are compared two by two.
    assert found["DPO"] == 2 * 10 * 2 * 2 * 512
    assert list(trainings("toy-rlaif", "iterations=1")) == ["anchor SFT", "revision SFT"]


def test_a_reward_model_that_does_not_fit_gets_settings_that_do() -> None:
    recipe = load_recipe(
        "toy-rlhf", ["rlhf.reward.batch_size=64", "rlhf.reward.micro_batch_size=64"]
    )

    def remake(changed: Recipe) -> Plan:
        return plan_for(changed, Hardware("cuda", "", room), lengths=longest(changed))

    room = 24 * GB
    whole = {one.name: one for one in remake(recipe).phases}
    # What all others need, and not that.
    room = int(max(one.total for name, one in whole.items() if name != "reward model") / 0.95) + 1
    plan = remake(recipe)
    assert [one.name for one in plan.phases if not plan.fits(one)] == ["reward model"]
    changes, suffice = advice(plan, remake)
    assert suffice and all(one.startswith("rlhf.reward.") for one in changes)


PREVIOUS = ("dpo.init=previous",)
# A delta that begins anew learns from the pairs of all iterations: of 12 prompts, then of 24.
ALL = 12 + 24
SHAPES: dict[str, tuple[tuple[str, ...], dict[str, int | None]]] = {
    # 2 iterations of 12 prompts, 4 answers of 48 tokens, 3 votes of 64; sequences of pairs.
    "self-rewarding": ((), {"candidates": 96 * 48, "judge": 96 * 3 * 64, "DPO": ALL * 2}),
    # Humans have answered and judged: how many of their replies differ, the data says.
    "dpo": ((), {"DPO": ALL * 2}),
    "dpo, all": (("offline.pairs=all",), {"DPO": None}),
    "spin": (("spin.answers=2",), {"candidates": 48 * 48, "DPO": 2 * ALL * 2}),
    # Likelihoods rank, or two judges.
    "cream": ((), {"candidates": 96 * 48, "DPO": ALL * 2}),
    "cream, judge": (
        ("cream.scores=judge",),
        {"candidates": 96 * 48, "judge": 2 * 96 * 3 * 64, "DPO": ALL * 2},
    ),
    # The policy and the next model in both iterations, the first model in the second one.
    "temporal": (
        PREVIOUS,
        {"candidates": 5 * 48 * 48, "judge": 5 * 48 * 3 * 64, "DPO": 2 * 24 * 2},
    ),
    # All 6 pairs of 4 answers; with a teacher's the 10 of 5, one more to grade.
    "dno": ((), {"candidates": 96 * 48, "judge": 96 * 3 * 64, "DPO": ALL * 6 * 2}),
    "dno, teacher": (
        ("dno.teacher=answers.jsonl",),
        {"candidates": 96 * 48, "judge": 120 * 3 * 64, "DPO": ALL * 10 * 2},
    ),
    "dno, side by side": (
        ("dno.grading=side-by-side",),
        {"candidates": 96 * 48, "side by side": 24 * 3 * 64, "DPO": ALL * 6 * 2},
    ),
    "scir": (
        (*PREVIOUS, "dpo.reference=anchor"),
        {"candidates": 96 * 48, "judge": 96 * 3 * 64, "DPO": 24 * 2},
    ),
    # In one of the iterations 3 votes are compared, 6 ways; its pairs are two a prompt.
    "meta-rewarding": (
        (*PREVIOUS, "meta_rewarding.schedule=[both, policy]", "meta_rewarding.max_new_tokens=16"),
        {
            "candidates": 96 * 48,
            "judge": 96 * 3 * 64,
            "meta-judge": 12 * 6 * 16,
            "DPO": (24 + 12) * 2,
        },
    ),
    # 12 drafts in the first iteration, 48 answers in the second, compared in both orders.
    "rlaif": (
        (*PREVIOUS, "rlaif.rounds=2", "rlaif.max_new_tokens=32", "rlaif.rationale=true"),
        {
            "candidates": 60 * 48,
            "critiques": 24 * 32,
            "revisions": 24 * 48,
            "rationales": 2 * 24 * 32,
            "revision SFT": 24,
            "DPO": 24 * 2,
        },
    ),
    # A step's answers at once; how many pairs the reward model learns, the data says.
    "rlhf": (
        ("dpo.batch_size=8",),
        {"candidates": 96 * 48, "reward model": None, "RLOO": 96},
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_the_phases_of_every_method_by_hand(case: str) -> None:
    """Tokens that are drawn, and sequences that are trained on."""
    settings, expected = SHAPES[case]
    method = case.partition(",")[0]
    recipe = load_recipe("tiny", [f"method={method}", "dpo.epochs=1", *settings])
    plan = plan_for(recipe, parse_gpus("24GB"), lengths=longest(recipe))
    shared = {"load", "anchor SFT", "evaluation", "export"}
    found = {
        one.name: one.tokens // one.shape["tokens"] if one.trains and one.tokens else one.tokens
        for one in plan.phases
        if one.name not in shared
    }
    assert found == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_phases(method: str) -> None:
    """With its own recipe: something trains beside the anchor, and no phase stands twice."""
    recipe = load_recipe(METHODS[method].shipped_recipe())
    plan = plan_for(recipe, parse_gpus("24GB"), lengths=longest(recipe))
    names = [phase.name for phase in plan.phases]
    assert len(set(names)) == len(names)
    assert any(one.trains and one.name != "anchor SFT" for one in plan.phases)
    assert all(phase.total > 0 for phase in plan.phases)


@pytest.mark.parametrize(
    "text", ["80", "0x80GB", "two", "2x0GB", "", "2x", "80GB,24GB", "8xA100", "NVIDIA H100 PCIe"]
)
def test_odd_gpus_are_refused(told: Told, text: str) -> None:
    with told.refused():
        parse_gpus(text)


def test_gpus_are_read_by_number_memory_and_name() -> None:
    assert parse_gpus("2x80GB") == parse_gpus("2x80") == Hardware("cuda", "", 80 * GB, 2)
    assert parse_gpus("24 gb") == Hardware("cuda", "", 24 * GB, 1)
    assert parse_gpus("8xH100") == parse_gpus("8 x h100") == Hardware("cuda", "H100", 80 * GB, 8)
    assert parse_gpus("rtx4090") == parse_gpus("1x4090") == Hardware("cuda", "RTX4090", 24 * GB)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        # Of another speed than the one of that name.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpu_is_known_by_its_driver_s_name(driver: str, name: str | None) -> None:
    found = known_gpu(driver)
    assert (None if found is None else found.name) == name


def test_a_base_computes_in_32_bits_where_a_gpu_knows_no_bfloat16() -> None:
    plans = [plan_for(load_recipe("smollm3-3b"), parse_gpus(gpu)) for gpu in ("T4", "16GB", "L4")]
    assert [plan.itemsize for plan in plans] == [4, 2, 2]


def test_rates_are_kept_by_device_and_base(tmp_path: Path) -> None:
    remember(tmp_path, "here", {"DPO": 100.0})
    remember(tmp_path, "here", {"judge": 50.0})
    known = known_rates(tmp_path, "here")
    assert known is not None and known[0] == {"DPO": 100.0, "judge": 50.0}
    assert known_rates(tmp_path, "there") is None


@pytest.mark.parametrize("row", [5, {}, {"tokens_per_s": {}}, {"tokens_per_s": 1, "date": ""}])
def test_a_rate_of_another_hand_is_none(row: Any, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({"key": row}))
    assert known_rates(tmp_path, "key") is None
    remember(tmp_path, "key", {"DPO": 2.0})
    found = known_rates(tmp_path, "key")
    assert found is not None and found[0] == {"DPO": 2.0}


def test_rates_of_many_measured_at_once_are_all_kept(tmp_path: Path) -> None:
    keys = [f"base {number}" for number in range(60)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda key: remember(tmp_path, key, {"DPO": 1.0}), keys))
    assert [key for key in keys if known_rates(tmp_path, key) is None] == []


# --- times ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_rates_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srlm_lite.planning.times.rates_folder", lambda: tmp_path / "none")


def timed(recipe: str, gpus: str, *settings: str) -> tuple[Plan, dict[str, Time]]:
    plan = plan_for(load_recipe(recipe, settings), parse_gpus(gpus))
    return plan, times_of(plan)


def test_the_shipped_rates_say_where_they_stand() -> None:
    root = Path(__file__).parents[1]
    for rate in shipped_rates():
        file, section, *_ = (part.strip() for part in rate.source.replace(":", ",").split(","))
        text = (root / file).read_text(encoding="utf-8")
        assert f"## {section}" in text, rate
        assert rate.date in text and known_gpu(rate.gpu) is not None
        assert probe(config_of(rate.base)).parameters == rate.parameters
    assert {rate.gpu for rate in shipped_rates()} == {"H100", "H200"}


def test_a_measured_time_is_tokens_by_the_rate() -> None:
    """Answers at 1,575 tokens/s and their prompts at 9,925, each as it was measured."""
    plan, times = timed("llama3.1-8b", "H100", "rollout.batch_rows=64", "rollout.n=4")
    phase = next(one for one in plan.phases if one.name == "candidates")
    assert phase.shape["batch_rows"] == 64 and phase.tokens and phase.read
    drawn = plan.recipe.iterations * plan.recipe.prompts.per_iteration * 4
    assert phase.tokens == drawn * plan.recipe.rollout.max_new_tokens
    assert phase.read == drawn // 4 * phase.shape["prompt_tokens"]
    assert times["candidates"].known == "measured"
    assert times["candidates"].seconds == pytest.approx(phase.tokens / 1575 + phase.read / 9925)


def test_another_device_is_scaled_by_what_bounds_the_work() -> None:
    """An L4 has 0.3 of an H100's 3.35 TB/s, and 121 of its 989 TFLOP/s."""
    settings = ("rollout.batch_rows=64",)
    plan, here = timed("llama3.1-8b", "H100", *settings)
    _, there = timed("llama3.1-8b", "L4", *settings)
    phase = next(one for one in plan.phases if one.name == "candidates")
    assert phase.tokens and phase.read
    expected = phase.tokens / (1575 * 0.300 / 3.35) + phase.read / (9925 * 121 / 989)
    assert there["candidates"].seconds == pytest.approx(expected)
    assert there["candidates"].known == "scaled" and "bandwidth x0.09" in there["candidates"].source
    assert here["DPO"].seconds and there["DPO"].seconds
    assert there["DPO"].seconds == pytest.approx(here["DPO"].seconds * 989 / 121)


def test_what_is_faster_than_a_measured_device_is_taken_as_no_faster() -> None:
    """H100's figures, had they been the only ones, against those of an H200 with 1.43 times the
    bandwidth: 1,575 tokens/s against 1,647, and 2,703 against 3,125."""
    _, nearest = timed("llama3.1-8b", "H200", "rollout.batch_rows=64")
    _, faster = timed("llama3.1-8b", "B200", "rollout.batch_rows=64")
    assert "on H200" in faster["candidates"].source and "no faster" in faster["candidates"].source
    assert faster["candidates"].seconds == nearest["candidates"].seconds
    assert nearest["candidates"].known == "scaled"  # its prompts are read as on an H100


def test_a_larger_base_takes_as_much_longer_as_it_has_weights() -> None:
    smaller, larger = (timed("llama3.1-8b", "H100")[1], timed("qwen3-8b", "H100")[1])
    ratio = probe(config_of("qwen3-8b")).parameters / probe(config_of("llama3.1-8b")).parameters
    assert larger["DPO"].known == "scaled" and "weights x0.98" in larger["DPO"].source
    assert larger["DPO"].seconds and smaller["DPO"].seconds
    assert larger["DPO"].seconds == pytest.approx(smaller["DPO"].seconds * ratio)


def test_work_is_shared_by_chunks_and_micro_batches() -> None:
    """7 chunks in an iteration take 4 devices 2 rounds; 16 micro-batches take 4."""
    plan, _ = timed("llama3.1-8b", "8xH100")
    phases = {phase.name: phase for phase in plan.phases}
    assert speedup(replace(phases["candidates"], shares=7), 4) == 3.5
    assert speedup(replace(phases["DPO"], shares=16), 4) == 4.0
    assert speedup(phases["prompts"], 8) == 1.0  # the first process writes them
    assert plan.recipe.prompts.per_iteration == 2000 and plan.recipe.rollout.chunk_prompts == 64
    assert phases["candidates"].shares == phases["judge"].shares == 32
    alone = plan_for(load_recipe("toy-rlhf"), parse_gpus("8xH100"))
    assert {phase.shares for phase in alone.phases} == {1}  # rlhf runs in one process
    by = by_devices(plan)
    assert list(by) == [1, 2, 4, 8, 16] and by[1] > by[2] > by[8]


@pytest.mark.parametrize(
    ("recipe", "gpus", "settings", "why"),
    [
        ("llama3.1-8b", "24GB", (), "none that is known by name"),
        ("llama3.1-8b", "H100", ("rollout.engine=vllm",), "the engine vllm"),
        ("llama3.1-8b", "H100", ("base.quantization=none",), "in NF4"),
        ("llama2-70b", "RTX4090", (), "does not fit"),
        ("smollm2-135m", "H100", ("base.quantization=nf4",), "no base of about this size"),
    ],
)
def test_what_is_not_known_is_said_and_why(
    recipe: str, gpus: str, settings: tuple[str, ...], why: str
) -> None:
    _, times = timed(recipe, gpus, *settings)
    assert times["candidates"].seconds is None and times["candidates"].known == "unknown"
    assert why in times["candidates"].source


def test_a_user_s_own_rates_come_first_whatever_the_driver_calls_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srlm_lite.planning.times.rates_folder", lambda: tmp_path)
    recipe = load_recipe("llama3.1-8b")
    key = rates_key(recipe, device="NVIDIA H100 80GB HBM3", itemsize=2)
    remember(tmp_path, key, {"DPO": 4000.0, "candidates": 500.0})
    plan, times = timed("llama3.1-8b", "H100")
    tokens = {phase.name: phase.tokens or 0 for phase in plan.phases}
    assert times["DPO"].seconds == tokens["DPO"] / 4000 and times["DPO"].known == "measured"
    assert times["prompts"].seconds == tokens["prompts"] / 500  # of the same kind of work
    assert times["DPO"].source.startswith("your own, ")
    assert "H100" in times["judge"].source  # measured elsewhere
    assert "your own" not in timed("llama3.1-8b", "H200")[1]["DPO"].source
    for other in ("rollout.fold=true", "rollout.engine=vllm"):  # neither was what was measured
        _, times = timed("llama3.1-8b", "H100", other)
        assert "your own" not in times["candidates"].source


@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [("llama3.1-8b", "H100"), ("llama2-70b", "8xH200"), ("gemma3-4b", "T4"), ("qwen3-8b", "24GB")],
)
def test_where_times_are_from_is_told_in_words(told: Told, recipe: str, gpus: str) -> None:
    """Without the figures: those follow from the recipe, whose plan others change."""
    shown = run("plan", "--recipe", recipe, "--gpus", gpus).stdout
    for line in shown.splitlines():
        if line.startswith(("time of ", "in all ", "with ", "`srlm-lite bench plan`")):
            told(re.sub(r"\d[\d.]*(?= (?:h|min|s|GB)\b)|(?<= x)\d\.\d+", "#", line))


def test_a_cpu_s_own_rates_give_a_sum_and_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srlm_lite.planning.times.rates_folder", lambda: tmp_path)
    recipe = load_recipe("tiny", ["base.device=cpu"])
    plan = plan_for(recipe)
    remember(
        tmp_path, rates_key(recipe, device=device_name("cpu"), itemsize=plan.itemsize), {"DPO": 1.0}
    )
    shown = run("plan", "--recipe", "tiny", "--set", "base.device=cpu").stdout
    tokens = next(phase.tokens for phase in plan.phases if phase.name == "DPO")
    apart = "candidates, judge, anchor SFT, evaluation"
    assert f"in all {in_words(float(tokens or 0))}, {apart} apart\n" in shown
    assert f"time of {apart}: unknown: `srlm-lite bench plan` has not measured" in shown


def test_other_engines_are_told_of_with_what_they_bring() -> None:
    plan, times = timed("llama3.1-8b", "H100")
    others = other_engines(plan, lambda recipe: remade(plan, recipe))
    assert [one.setting for one in others] == ["rollout.fold=true", "rollout.engine=vllm"]
    assert others[0].seconds is not None and others[0].seconds < total(times)[0]
    assert others[1].seconds is None and "no rate" in others[1].why
    tight, _ = timed("llama2-70b", "2xH100")
    folded = other_engines(tight, lambda recipe: remade(tight, recipe))[0]
    assert folded.seconds is None and folded.why.startswith("does not fit: ")


def test_layers_with_a_window_keep_what_a_reply_can_see() -> None:
    """Gemma 3 4B: 5 of its 34 layers see all, 29 the last 1,024 tokens, 1,023 of them before."""
    shape = probe(config_of("gemma3-4b"))
    held = Held(shape, nf4=True, itemsize=2, device="cuda", targets=Lora().targets, rank=32)
    assert len(shape.windows) == 29 and set(shape.windows) == {1024}
    assert shape.kv_width == 2 * 4 * 256
    assert held.kv_of_prompt(1000) == 1000 * held.kv_per_token
    assert held.kv_of_prompt(2000) == 2 * 2048 * (5 * 2000 + 29 * 1023)
    full = Held(probe(config_of("llama3.1-8b")), True, 2, "cuda", Lora().targets, 32)
    assert full.kv_of_prompt(2000) == 2000 * full.kv_per_token


def test_a_mixture_s_experts_are_told_with_why_they_stay_in_16_bits() -> None:
    from transformers import MixtralConfig

    from srlm_lite.cli.plan import plan_text

    config = MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    shape = probe(config, targets)
    recipe = load_recipe("mistral-7b", [f"{at}.lora.targets={targets}" for at in ("anchor", "dpo")])
    plan = plan_for(recipe, parse_gpus("2xH200"), shape=shape)
    # 32 layers, 8 experts, three matrices of 4096 x 14336 each.
    assert plan.not_in_4_bits["fused experts"] == 2 * 32 * 8 * 3 * 4096 * 14336
    text = plan_text(plan, times_of(plan), settings_that_fit(plan))
    assert "fused experts 90.19 (transformers keeps all experts of a layer in one tensor" in text


def run(*arguments: str) -> Any:
    from srlm_lite.cli.main import app

    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_every_phase() -> None:
    result = run("plan", "--recipe", "llama3.1-8b", "--gpus", "24GB", "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    names = ["load", "prompts", "candidates", "judge", "anchor SFT", "DPO", "evaluation", "export"]
    assert list(row["phases"]) == names
    assert row["fits"] is True and row["change"] == []
    assert row["phases"]["DPO"]["bytes"] == sum(row["phases"]["DPO"]["parts"].values())
    text = run("plan", "--recipe", "llama2-70b", "--gpus", "1x24GB").stdout
    assert "NO" in text and "unknown: does not fit" in text
    assert "one device cannot hold the base; spread over 2 or more it may fit" in text
    table = text.split("GB at the longest")[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 120


def test_in_80_columns_the_table_comes_in_two() -> None:
    from srlm_lite.cli.plan import plan_text

    for gpus in ("2x80GB", "4x24GB"):
        plan = plan_for(load_recipe("llama2-70b"), parse_gpus(gpus))
        advice = settings_that_fit(plan)
        times = times_of(plan)
        narrow, wide = (plan_text(plan, times, advice, width=width) for width in (80, 120))
        assert max(len(line) for line in narrow.splitlines()) <= 80
        assert max(len(line) for line in wide.splitlines()) <= 120
        figures = (f"{plan.peak / 1e9:.2f}", "12,288,000", "fsdp2" if gpus == "4x24GB" else "disk")
        for text in (narrow, wide):
            assert all(figure in text for figure in figures)
        assert narrow.count(" DPO ") == 2 and wide.count(" DPO ") == 1


def test_iterate_refuses_what_cannot_fit_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srlm_lite.planning import machine

    monkeypatch.setattr(machine, "machine_memory", lambda: GB // 2)
    out = tmp_path / "out"
    arguments = ("iterate", "--recipe", "tiny", "--set", "base.device=cpu", "--adapters", str(out))
    result = run(*arguments)
    assert isinstance(result.exception, UserError)
    assert "GB" in str(result.exception) and "--no-plan" in str(result.exception)
    assert not out.exists()


def test_a_base_of_unknown_shape_is_told_in_one_line() -> None:
    recipe = Recipe.model_validate(
        {"name": "x", "base": {"name": "nobody/nothing"}, "data": {"dir": "d"}}
    )
    with pytest.raises(UserError, match=r"cannot plan for nobody/nothing.*llama2-70b"):
        plan_for(recipe, parse_gpus("24GB"))
