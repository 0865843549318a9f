"""Today's bases: mixtures of experts, vision-language checkpoints, and files that are not quite
Llama's. Each runs, or is refused in one line before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import Cli
from families import build_family
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase, empty_model, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.sharding import load_shards
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.model.targets import check_targets, experts_left_out, targeted
from srlm_lite.planning.machine import plan_for
from srlm_lite.planning.plan import Hardware
from srlm_lite.recipe import load_recipe
from srlm_lite.rollout.memory import rows_that_fit
from srlm_lite.rollout.sizes import attention_of
from srlm_lite.settings import Base, Lora

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.tensor([[5, 9, 17, 33, 65, 2, 8]])

Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The tiny base of a family."""
    folder = tmp_path_factory.mktemp("families")
    return lambda name: build_family(name, folder)


def loaded(folder: Path, quantization: str = "none") -> LoadedBase:
    return load_base(
        Base(name=str(folder), dtype="float32", device="cpu", quantization=quantization)
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits.float()
    return found


def refusal(folder: Path, *targets: str) -> str:
    with pytest.raises(UserError) as caught:
        check_targets(empty_model(folder), targets)
    return str(caught.value)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["gemma3", "qwen3_5_vl"])
def test_a_vision_language_base_is_a_text_model(
    built: Built, family: str, quantization: str
) -> None:
    """It is what plain transformers loads, sizes its batches, and has adapters on its text alone.

    Gemma 3's files say `language_model.model`, memory says `model.language_model`; of Qwen3.5
    transformers loads the text model alone, which has other names than the files again.
    """
    base = loaded(built(family), quantization)
    plain: Any = AutoModelForCausalLM.from_pretrained(built(family), dtype=torch.float32)
    slot = Slot(base.model, targets=ALL, rank=2)
    layers = 2 * 7 if family == "gemma3" else 7 + 3  # one layer of Qwen3.5's attends otherwise
    assert len(slot.modules) == layers and not any("vision" in name for name in slot.modules)
    exact = torch.equal(logits(slot.model), logits(plain))
    assert exact == (quantization == "none")
    assert rows_that_fit(base.model, tokens=100) >= 1


def test_targets_of_a_mixture_are_its_linear_layers(built: Built) -> None:
    """DeepSeek-V3: the first layer is dense, the second has four experts and a shared one.

    PEFT 0.21 takes `gate_proj`, of whichever layer, for the fused experts, and wants `up_proj`
    with it.
    """
    base = loaded(built("deepseek_v3"))
    named = [f"model.layers.{at}.gate_proj" for at in ("0.mlp", "1.mlp.shared_experts")]
    assert targeted(base.model, ["gate_proj"]) == named
    assert experts_left_out(base.model, ["gate_proj", "kv_b_proj"]) == ["gate_proj"]
    slot = Slot(base.model, targets=["gate_proj"], rank=2)
    assert slot.modules == named
    adapter = slot.fresh(Lora(rank=2, alpha=4, targets=("gate_proj",)), seed=1)
    with slot.beside("ref", [adapter]):  # as TRL adds its reference
        wrapped = [name for name, part in slot.model.named_modules() if name.endswith(".lora_A")]
        assert len(wrapped) == 2
        assert all("ref" in slot.model.get_submodule(name) for name in wrapped)


@pytest.mark.parametrize(
    ("family", "target", "works"),
    [
        ("qwen3_moe", "gate_proj", "k_proj, o_proj, q_proj, v_proj"),
        ("mixtral", "w1", "k_proj, o_proj, q_proj, v_proj"),
        ("gpt_oss", "down_proj", "k_proj, o_proj, q_proj, v_proj"),
        ("granitemoe", "gate_up_proj", "k_proj, o_proj, q_proj, v_proj"),
    ],
)
def test_adapters_on_fused_experts_are_refused(
    built: Built, family: str, target: str, works: str
) -> None:
    line = refusal(built(family), "q_proj", target)
    assert line.startswith(f"lora.targets: {target} is of the base's experts, which lie fused")
    assert line.endswith(f"It has {works}")


def test_a_target_of_the_vision_tower_alone_is_refused(built: Built) -> None:
    line = refusal(built("gemma3"), "fc1")
    assert "no linear layer named fc1 in its text model, only in another part" in line
    assert line.endswith(f"It has {', '.join(sorted(ALL))}")


def test_layers_whose_weight_the_code_takes_pass_adapters_over(built: Built) -> None:
    """Mamba multiplies by dt_proj's weight itself, and hands out_proj's to its kernels."""
    for target, why in (("dt_proj", "computes with the weight"), ("out_proj", "computes with")):
        line = refusal(built("mamba"), "in_proj", target)
        assert f"the base's code {why}" in line and "It has in_proj" in line


def test_code_that_does_not_run_passes_no_adapter_over(built: Built) -> None:
    """BLOOM takes dense's weight apart where its configuration says so, which nobody's does."""
    folder = built("bloom")
    check_targets(empty_model(folder), ["dense", "dense_4h_to_h"])
    settings = AutoConfig.from_pretrained(folder)
    settings.pretraining_tp, settings.slow_but_exact = 2, True
    with pytest.raises(UserError, match="computes with the weight of dense"):
        check_targets(empty_model(settings), ["dense"])


def test_layers_of_several_sizes_count_as_the_widest(built: Built) -> None:
    """Gemma 4: heads of 16 in one layer, of 32 in the other; two key-value heads each."""
    base = loaded(built("gemma4_text"))
    assert attention_of(base.model.config) == (4, 32, 2 * 2 * 32)
    assert rows_that_fit(base.model, tokens=100) >= 1


def test_layers_whose_weight_the_code_takes_stay_out_of_nf4(built: Built) -> None:
    """Packed, dt_proj's weight could not be multiplied by."""
    base = loaded(built("mamba"), "nf4")
    packed = {
        name.rpartition(".")[2]
        for name, module in base.model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert packed == {"in_proj", "x_proj", "out_proj"}
    assert logits(base.model).isfinite().all()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_transposed_layers_carry_adapters(tmp_path: Path, quantization: str) -> None:
    """GPT-2's weights are (in, out). The update is B A x, whether it is folded in or not."""
    settings = GPT2Config(vocab_size=140, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path)
    toy = Path(load_recipe("toy").base.name)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(toy / file, tmp_path / file)
    targets = ("c_attn", "c_proj", "c_fc")
    found = []
    for fold in (False, True):
        base = loaded(tmp_path, quantization)
        bare = logits(base.model)
        slot = Slot(base.model, targets=targets, rank=2, fold=fold)
        assert len(slot.modules) == 4
        fresh = slot.fresh(Lora(rank=2, alpha=4, targets=targets), seed=1)
        torch.manual_seed(1)
        factors = {name: (a, torch.randn_like(b)) for name, (a, b) in fresh.factors.items()}
        slot.load([Adapter(rank=2, alpha=4, factors=factors)])
        found.append(logits(slot.model))
        assert (found[-1] - bare).abs().max() > 0.01
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3", "mamba"])
def test_a_plan_counts_what_nf4_does_not_reach(built: Built, family: str) -> None:
    """To the byte, against the base in memory."""
    targets = "in_proj" if family == "mamba" else "q_proj"
    recipe = load_recipe(
        "tiny",
        [
            f"base.name={built(family)}",
            "base.quantization=nf4",
            "base.dtype=float32",
            f"anchor.lora.targets=[{targets}]",
            f"dpo.lora.targets=[{targets}]",
        ],
    )
    plan = plan_for(recipe, Hardware("cpu", "CPU", int(1e9)))
    base = loaded(built(family), "nf4")
    whole = [p for p in base.model.parameters() if not hasattr(p, "quant_state")]
    assert sum(plan.not_in_4_bits.values()) == sum(p.nbytes for p in whole)
    experts = [p for name, p in base.model.named_parameters() if ".experts." in name]
    assert plan.not_in_4_bits["fused experts"] == sum(p.nbytes for p in experts)
    assert bool(experts) == (family == "qwen3_moe")


def test_plan_says_it_and_refuses_a_target_before_any_weight_is_read(
    built: Built, tmp_path: Path, cli: Cli
) -> None:
    folder = shutil.copytree(built("qwen3_moe"), tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"")
    named = ("plan", "--recipe", "tiny", "--set", f"base.name={folder}")
    refused = cli(*named)
    assert refused.returncode == 2 and "lora.targets: gate_proj is of" in refused.stderr
    sets = [f"{section}.lora.targets=[q_proj,o_proj]" for section in ("anchor", "dpo")]
    said = cli(*named, *[part for one in sets for part in ("--set", one)])
    assert said.returncode == 0, said.stderr
    (line,) = [line for line in said.stdout.splitlines() if "out of NF4's reach" in line]
    assert "fused experts 0.00" in line and "embedding and head" in line


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_quantized_base_is_refused_as_such(
    tiny_base_dir: Path, tmp_path: Path, said: dict[str, Any], kind: str, quantization: str
) -> None:
    folder = shutil.copytree(tiny_base_dir, tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": said}))
    with pytest.raises(UserError, match=rf"is quantized already \({kind}\)") as caught:
        loaded(folder, quantization)
    assert "Name the model that it was made from" in str(caught.value)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_beside_the_weights_is_not_loaded(
    tiny_base_dir: Path, tmp_path: Path, quantization: str
) -> None:
    """transformers would load it as well, and name the base that it was trained on."""
    folder = shutil.copytree(tiny_base_dir, tmp_path / "base")
    module = "model.layers.0.self_attn.q_proj"
    adapter = Adapter(rank=2, alpha=2, factors={module: (torch.ones(2, 64), torch.ones(64, 2))})
    adapter.save(folder, base_name="org/another-base")
    base = loaded(folder, quantization)
    assert torch.equal(logits(base.model), logits(loaded(tiny_base_dir, quantization).model))
    assert not any("lora" in name for name, _ in base.model.named_parameters())


@pytest.fixture
def one_token_more(tiny_base_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A base whose tokenizer has a token more than the embedding has rows, as Gemma 3 1B."""

    def make(*, special: bool, template: str = "") -> Path:
        folder = shutil.copytree(tiny_base_dir, tmp_path / "base")
        tokens = json.loads((folder / "tokenizer.json").read_text())
        rows = json.loads((folder / "config.json").read_text())["vocab_size"]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        image = {"id": rows, "content": "<image_soft_token>", "special": special, **flags}
        tokens["added_tokens"].append(image)
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
        if template:
            with (folder / "chat_template.jinja").open("a") as file:
                file.write(template)
        return Path(folder)

    return make


def test_a_special_token_beyond_the_rows_is_never_spelled(
    one_token_more: Callable[..., Path],
) -> None:
    base = loaded(one_token_more(special=True))
    tokens: Any = base.tokenizer
    rows = base.model.get_input_embeddings().weight.shape[0]
    assert tokens("<image_soft_token>").input_ids == [rows]
    chat = ChatFormat.of(base)
    for ids in (chat.prompt_ids("<image_soft_token>"), chat.target_ids("an <image_soft_token>")):
        assert max(ids) < rows


@pytest.mark.parametrize(
    ("special", "template"), [(False, ""), (True, "{{ '<image_soft_token>' }}")]
)
def test_other_tokens_beyond_the_rows_are_refused(
    one_token_more: Callable[..., Path], special: bool, template: str
) -> None:
    with pytest.raises(UserError, match="Model and tokenizer do not belong together"):
        loaded(one_token_more(special=special, template=template))


def test_what_a_vision_tower_has_not_learned_does_not_hold_a_run_up(tiny_base_dir: Path) -> None:
    """Version 0.1 put adapters there as well; their B was never anything but zero."""
    base = loaded(tiny_base_dir)
    slot = Slot(base.model, targets=["q_proj"], rank=2)
    fresh = slot.fresh(Lora(rank=2, alpha=4, targets=("q_proj",)), seed=1)
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    for b in (torch.zeros(8, 2), torch.ones(8, 2)):
        adapter = Adapter(2, 4, {**fresh.factors, tower: (torch.ones(2, 8), b)})
        if not b.any():
            slot.load([adapter], train=True)
            slot.assert_unchanged([adapter])
            continue
        with pytest.raises(UserError, match=r"has weights for model\.vision_tower"):
            slot.load([adapter])


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "qwen3_5_vl", "qwen3_moe"])
def test_a_sharded_base_is_read_from_the_files_as_a_whole_one(
    built: Built, family: str, nf4: bool
) -> None:
    """Renamed tensors, and one tensor an expert."""
    folder = built(family)
    settings = AutoConfig.from_pretrained(folder)
    model, report = load_shards(folder, settings, torch.device("cpu"), torch.float32, nf4=nf4)
    assert not report["missing_keys"]
    whole = loaded(folder, "nf4" if nf4 else "none").model
    assert torch.equal(logits(model), logits(whole))


def test_every_linear_layer_of_llama_is_still_a_target(tiny_base_dir: Path) -> None:
    model = empty_model(tiny_base_dir)
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert targeted(model, ALL) == [name for name in linear if name != "lm_head"]
    kept = load_file(tiny_base_dir / "model.safetensors")
    assert {f"{name}.weight" for name in targeted(model, ALL)} <= kept.keys()
