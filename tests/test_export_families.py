"""Export from today's model families: what is exported is the stack, under the files' own names.

The stack is computed apart: plain transformers loads the base, and each update is added to its
weight in memory. Neither the merge nor its check is asked.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exporting import make_run
from families import FAMILIES, build_family
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from srlm_lite.errors import ProofError, UserError
from srlm_lite.evaluate.gate import findings
from srlm_lite.export.export import Export, ExportWish
from srlm_lite.export.source import find_source
from srlm_lite.model import companions, parity
from srlm_lite.model.base import empty_model, load_base, skeleton
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.checkpoint import Checkpoint
from srlm_lite.model.exportable import placing, refuse_unexportable
from srlm_lite.model.layout import Layout
from srlm_lite.model.merge import base_weights
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.progress import Silent
from srlm_lite.run.run import RunDir
from srlm_lite.session import refuse_unexportable as refuse_before_the_anchor
from srlm_lite.settings import Base, Gate, is_targeted
from srlm_lite.shipped import recipes_dir
from srlm_lite.training.rloo import larger

hf: Any = transformers
IDS = torch.randint(5, 130, (2, 20), generator=torch.Generator().manual_seed(0))

KINDS = {
    "gpt_neox": "the head has another name in the files",
    "qwen3_5_vl": "the text model alone is loaded from files that hold a vision tower",
    "qwen3_moe": "one tensor an expert in the files",
    "gpt_oss": "experts that are fused in the files too",
    "deepseek_v3": "a router's bias is a buffer",
    "gpt2": "transposed weights",
    "falcon_h1": "a convolution's weight is read by the layer around it",
}
MORE = {
    "gemma3": "text and vision, other prefixes in the files; so it is with an adapted head",
    "mixtral": "one tensor an expert, under other names",
    "lfm2": "another such convolution",
    "mamba": "and one beside scans",
    "granitehybrid_moe": "convolution, experts, scaled logits",
    "nemotron_h": "layers of three kinds",
    "minimax": "linear attention beside experts",
}
"""Variations of those, and mixtures of them."""
WIDE = {
    "deepseek_v3": ("q_b_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2_moe": ("q_proj", "gate_proj", "up_proj", "down_proj"),
}
"""Dense layers and shared experts of mixtures of experts: PEFT takes their names for others."""


def slow(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@dataclass(frozen=True)
class Made:
    """A run on a tiny base, exported in both forms, and the logits it has."""

    base: Path
    run: RunDir
    stack: list[Adapter]
    merged: Path
    adapter: Path
    logits: torch.Tensor


def random_stack(base: Path, targets: Iterable[str]) -> list[Adapter]:
    """An anchor and a delta on the text model's layers that the targets name."""
    model: Any = empty_model(base)
    inside = {*model.get_decoder().modules(), model.get_output_embeddings()}
    stack = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name, module in model.named_modules():
            if module not in inside or not is_targeted(name, targets):
                continue
            shape = tuple(module.weight.shape)
            out, into = shape[::-1] if isinstance(module, Conv1D) else shape
            a = torch.randn(4, into, generator=generator) / into**0.5
            factors[name] = (a, torch.randn(out, 4, generator=generator) * 0.1)
        stack.append(Adapter(rank=4, alpha=8.0, factors=factors))
    return stack


def summed(base: Path, stack: list[Adapter]) -> torch.Tensor:
    """Logits of the base with each update added to a weight of its own."""
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for adapter in stack:
            for name, (a, b) in adapter.factors.items():
                module = model.get_submodule(name)
                update = adapter.scaling * (b @ a)
                right = update.T if isinstance(module, Conv1D) else update
                module.weight = nn.Parameter(module.weight + right)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits.float()
    return found


def loaded(folder: Path, kind: Any = None) -> Any:
    """By plain transformers, which has to find every tensor, and no other."""
    kind = kind or hf.AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model


def alike(found: torch.Tensor, right: torch.Tensor) -> bool:
    return float((found - right).abs().max()) <= 5e-5 * max(1.0, float(right.abs().max()))


def make(base: Path, folder: Path, targets: Iterable[str]) -> Made:
    stack = random_stack(base, tuple(targets))
    run = make_run(folder / "run", base, adapters=stack, dtype="float32")
    for form in ("merged", "adapter"):
        wish = ExportWish(out=folder / form, form=form, dtype="float32")  # type: ignore[arg-type]
        Export(find_source(run.path, "last"), wish, Silent()).make()
    return Made(base, run, stack, folder / "merged", folder / "adapter", summed(base, stack))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def check_both_forms(made: Made) -> None:
    bare = logits(hf.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32))
    assert not torch.allclose(bare, made.logits, atol=1e-2)  # the updates count
    assert alike(logits(loaded(made.merged)), made.logits)
    (named,) = json.loads((made.merged / "config.json").read_text())["architectures"]
    assert alike(logits(loaded(made.merged, getattr(hf, named))), made.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of what it does not find, or finds too many of
        for known in (".*a tied layer is part of the adapter", "fan_in_fan_out is set to True but"):
            warnings.filterwarnings("ignore", known)  # of a head that is adapted, and it is right
        warnings.simplefilter("ignore", FutureWarning)  # of names that transformers changes
        model = hf.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
        with_adapter = PeftModel.from_pretrained(model, made.adapter)
    assert alike(logits(with_adapter), made.logits)


@pytest.mark.parametrize("name", [*KINDS, *slow(MORE)])
def test_both_forms_are_the_stack(bases: Path, tmp_path: Path, name: str) -> None:
    made = make(build_family(name, bases), tmp_path, FAMILIES[name].targets)
    check_both_forms(made)
    before, after = Checkpoint(made.base), Checkpoint(made.merged)
    assert before.names == after.names  # the files' names, in the files' order
    assert all(before.info(each).shape == after.info(each).shape for each in before.names)


@pytest.mark.parametrize("name", WIDE)
def test_peft_finds_dense_layers_beside_experts(bases: Path, tmp_path: Path, name: str) -> None:
    check_both_forms(make(build_family(name, bases), tmp_path, WIDE[name]))


@pytest.mark.parametrize("name", ["gemma3", "qwen3", *slow(("gpt2", "gpt_neox"))])
def test_an_update_of_the_head_parts_it_from_the_embedding(
    bases: Path, tmp_path: Path, name: str
) -> None:
    targets = (FAMILIES[name].targets[0], "lm_head")
    made = make(build_family(name, bases), tmp_path, targets)
    check_both_forms(made)
    before, after = (hf.AutoModelForCausalLM.from_pretrained(f) for f in (made.base, made.merged))
    embedding = after.get_input_embeddings().weight
    assert torch.equal(embedding, before.get_input_embeddings().weight.to(embedding.dtype))
    settings = json.loads((made.merged / "config.json").read_text())
    for part in (settings, settings.get("text_config", settings)):
        assert part["tie_word_embeddings"] is False


def hrm_text(folder: Path) -> Path:
    """A family whose files have query, key, value and gate in one tensor, and memory in four."""
    base = hf.HrmTextConfig(
        vocab_size=140, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, num_hidden_layers=1, max_position_embeddings=512,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return saved(hf.AutoModelForCausalLM.from_config(base), folder / "hrm_text")


def saved(model: Any, folder: Path) -> Path:
    model.generation_config = hf.GenerationConfig(bos_token_id=2, eos_token_id=3, pad_token_id=0)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(recipes_dir() / "toy" / "base" / file, folder / file)
    return folder


def test_several_layers_in_one_tensor_of_the_files(tmp_path: Path) -> None:
    base = hrm_text(tmp_path)
    assert "model.L_module.layers.0.attn.gqkv_proj.weight" in Checkpoint(base)
    made = make(base, tmp_path, ("q_proj", "v_proj", "up_proj"))
    check_both_forms(made)


def test_what_nf4_makes_of_transposed_weights_is_what_the_run_had(
    bases: Path, tmp_path: Path
) -> None:
    base = build_family("gpt2", bases)
    stack = random_stack(base, ("c_attn", "c_fc"))
    run = make_run(tmp_path / "run", base, adapters=stack, quantization="nf4", dtype="float32")
    wish = ExportWish(out=tmp_path / "out", onto="dequantized", dtype="float32")
    Export(find_source(run.path, "last"), wish, Silent()).make()
    slot = Slot(
        load_base(find_source(run.path, "last").recipe.base).model,
        targets=("c_attn", "c_fc"),
        rank=8,
    )
    slot.load(stack)
    right = logits(slot.model)
    assert float((logits(loaded(tmp_path / "out")) - right).abs().max()) < 1e-3


def test_what_nf4_makes_of_them_is_written_in_their_place(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = hrm_text(tmp_path)
    layout = Layout(Checkpoint(base), model := empty_model(base))
    section = Base(name=str(base), quantization="nf4", dtype="float32", device="cpu")
    weights = base_weights(layout, section, model, nf4=True)
    name, file = "model.L_module.layers.0.self_attn.k_proj.weight", ""
    file = layout.group(name).files[0]
    whole = torch.cat(list(weights.blocks(file, 0, 256 * 64, size=1000))).view(256, 64)
    # In the files: gate, query, key, value, 64 rows each. NF4 rounds each of them by itself.
    rows = Checkpoint(base).read(file)[128:192]
    packed, state = quantize_4bit(rows.contiguous(), quant_type="nf4", compress_statistics=True)
    assert torch.equal(whole[128:192], dequantize_4bit(packed, state))


def test_layers_that_share_their_weights_part(tmp_path: Path) -> None:
    """Zamba 2 has one block in several layers, and an adapter in each."""
    settings = hf.Zamba2Config(
        vocab_size=140, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], hybrid_layer_ids=[1, 3],
        mamba_d_state=16, mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=16, chunk_size=16,
        num_mem_blocks=1, adapter_rank=4, num_attention_heads=4, num_key_value_heads=4,
        attention_head_dim=32, max_position_embeddings=512,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = saved(hf.AutoModelForCausalLM.from_config(settings), tmp_path / "zamba2")
    check_both_forms(make(base, tmp_path, ("q_proj", "down_proj")))


def test_a_vision_tower_stays_as_it_is(bases: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(build_family("gemma3", bases), base)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3"}')
    made = make(base, tmp_path, FAMILIES["gemma3"].targets)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, made.merged))
    tower = [name for name in before if "vision" in name or "multi_modal" in name]
    assert len(tower) > 10
    assert all(torch.equal(before[name].float(), after[name]) for name in tower)
    copied = (made.merged / "preprocessor_config.json").read_text()
    assert copied == (base / "preprocessor_config.json").read_text()
    settings = json.loads((made.adapter / "adapter_config.json").read_text())
    assert all("vision" not in target for target in settings["target_modules"])


def test_mixed_dtypes_stay_mixed(bases: Path, tmp_path: Path) -> None:
    """And the index of several files tells their bytes."""
    model = hf.AutoModelForCausalLM.from_pretrained(build_family("qwen3_moe", bases))
    model.model.norm.float()
    base = saved(model, tmp_path / "base")
    model.save_pretrained(base, max_shard_size="50KB")
    (base / "model.safetensors").unlink()
    stack = random_stack(base, ("q_proj",))
    run = make_run(tmp_path / "run", base, adapters=stack, dtype="float32")
    Export(find_source(run.path, "last"), ExportWish(out=tmp_path / "out"), Silent()).make()
    before, after = Checkpoint(base), Checkpoint(tmp_path / "out")
    assert {before.info(name).dtype for name in before.names} == {torch.float32, torch.bfloat16}
    assert [before.info(name) for name in before.names] == [after.info(n) for n in after.names]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(after.info(n).nbytes for n in after.names)


# --- the streamed comparison -------------------------------------------------------------------


def test_a_router_s_bias_is_read(bases: Path, tmp_path: Path) -> None:
    """A buffer that files have; with one that matters, other experts are chosen."""
    base = tmp_path / "base"
    shutil.copytree(build_family("deepseek_v3", bases), base)
    tensors = load_file(base / "model.safetensors")
    (name,) = [each for each in tensors if each.endswith("e_score_correction_bias")]
    tensors[name] = torch.tensor([0.0, 9.0, 0.0, 9.0])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model, _ = skeleton(base)
    read = Layout(Checkpoint(base), model).read
    (streamed,) = parity.logits(model, read, IDS.tolist())
    plain = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert alike(streamed, logits(plain).flatten(0, 1))


class Reader(nn.Module):
    """Reads the weight of a layer that it does not call; or among all of its parameters."""

    def __init__(self, *, past: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, bias=False, device="meta")
        self._past = past

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        weight = next(self.inner.parameters()) if self._past else self.inner.weight
        return type("Out", (), {"logits": nn.functional.one_hot(input_ids, 2).float() @ weight.T})


def test_a_weight_that_is_read_and_not_called_is_there() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model: Any = Reader(past=False)
    (found,) = parity.logits(model, {"inner.weight": weight}.__getitem__, [[0, 1]])
    assert torch.equal(found, weight.T)
    assert model.inner.weight.is_meta


def test_a_weight_that_cannot_be_read_is_no_number() -> None:
    model: Any = Reader(past=True)
    (found,) = parity.logits(model, {"inner.weight": torch.ones(2, 2)}.__getitem__, [[0, 1]])
    assert found.isnan().all()


# --- what is no number -------------------------------------------------------------------------


def test_nan_is_no_small_difference() -> None:
    zeros, nan = torch.zeros(40, 3), torch.zeros(40, 3)
    nan[35, 1] = torch.nan
    for a, b in ((zeros, nan), (nan, zeros), (nan, nan)):
        assert not parity.compare(a, b).max_abs_logit_diff <= 1e9
    assert parity.compare(zeros, zeros).max_abs_logit_diff == 0
    infinite = torch.tensor([[torch.inf, 1.0]])
    row, allowed = (
        parity.compare(infinite, zeros[:1, :2]),
        parity.tolerance(torch.float32, infinite),
    )
    assert not row.max_abs_logit_diff <= allowed


def test_nan_is_furthest_and_stays_it() -> None:
    nan = float("nan")
    assert parity.is_further(nan, 1.0) and not parity.is_further(2.0, nan)
    assert parity.is_further(2.0, 1.0) and not parity.is_further(1.0, 2.0)
    assert not parity.is_further(nan, nan)
    for pair in ((nan, 0.0), (0.0, nan)):
        assert larger(*pair) != larger(*pair)
    assert larger(0.5, 0.25) == larger(0.25, 0.5) == 0.5


@pytest.mark.parametrize("name", ["first", "last"])
def test_a_tensor_of_nan_fails_an_export(bases: Path, tmp_path: Path, name: str) -> None:
    """Wherever it lies, and also where no text reaches it."""
    base = build_family("qwen3_5_vl", bases)
    layout, export = Layout(Checkpoint(base), model := empty_model(base)), tmp_path / "export"
    shutil.copytree(base, export)
    tensors = load_file(base / "model.safetensors")
    stray = {"first": layout.strays[0], "last": layout.parameters[-1]}[name]
    tensors[stray if name == "first" else layout.group(stray).files[0]].fill_(torch.nan)
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    check = parity.TensorCheck(layout, [], Layout(Checkpoint(export), model))
    check.rest(layout.read)
    assert check.worst == stray and not check.error <= 0.5


def test_a_gate_does_not_pass_what_is_no_number() -> None:
    judge = {"score_histogram": {"1": 4, "5": 4}, "parse_rate": 1.0}
    now = {"judge": judge, "policy": {"divergence": float("nan")}}
    (found,) = findings([{"judge": judge, "policy": {}}, now], Gate())
    assert found.gate == "no_number" and "divergence" in found.text


# --- before the anchor -------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_before_it_trains(bases: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(build_family("qwen3_moe", bases), base)
    refuse_unexportable(base, ("q_proj", "gate_proj"))
    run = make_run(tmp_path / "run", base, adapters=random_stack(base, ("q_proj",)))
    recipe = find_source(run.path, "last").recipe

    tensors = load_file(base / "model.safetensors")
    moved = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"an adapter on model\.layers\.1\.self_attn\.q_proj could"):
        refuse_before_the_anchor(recipe, RunDir(tmp_path / "new"))
    refuse_before_the_anchor(recipe, run)  # its anchor is there: it goes on

    tensors["model.layers.1.self_attn.q_proj.weight"] = moved[:, :-1].contiguous()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"could not be exported: model\.layers\.1\.\S+ cannot be"):
        refuse_unexportable(base, ("q_proj",))


def test_settings_that_peft_refuses_are_told(bases: Path) -> None:
    """PEFT 0.21 puts no adapter on Mamba's out_proj, whose weight its kernels read."""
    model = empty_model(build_family("mamba", bases))
    with pytest.raises(UserError, match=r"out_proj elsewhere. Export with --as merged"):
        placing(model, ["backbone.layers.0.mixer.out_proj"])


# --- generation configs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kept", "told"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9}, "do_sample"),
        ({"temperature": 0.9, "do_sample": False}, {"temperature": None}, "left out"),
        ({"temperature": 0.9, "do_sample": True}, {"temperature": 0.9}, ""),
        ({}, {"do_sample": None}, ""),
    ],
)
def test_a_generation_config_can_be_saved(
    bases: Path, tmp_path: Path, said: dict[str, Any], kept: dict[str, Any], told: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(build_family("qwen3", bases), base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, **said}))
    model, tokenizer = skeleton(base)
    settings, line = companions.generation_config(base, model, ChatFormat(tokenizer, stop_ids=(3,)))
    settings.save_pretrained(str(tmp_path))
    read = hf.GenerationConfig.from_pretrained(str(tmp_path))
    assert {key: getattr(read, key) for key in kept} == kept
    assert read.eos_token_id == [3]
    assert told in line if told else not line


def test_a_layer_that_is_not_called_is_told_of(bases: Path, tmp_path: Path) -> None:
    """Mamba multiplies with dt_proj's weight itself: what lies beside that layer does nothing."""
    with pytest.raises(ProofError, match="every tensor is right, so the base computes with"):
        make(build_family("mamba", bases), tmp_path, ("dt_proj",))


def test_a_wrong_tensor_fails_under_its_own_name(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that a conversion puts in each other's place are told, though every byte is there."""
    right = Layout.written
    base = hrm_text(tmp_path)
    monkeypatch.setattr(
        Layout,
        "written",
        lambda *args: {name: value.flip(0) for name, value in right(*args).items()},
    )
    with pytest.raises(ProofError, match=r"layers\.0\.\S+ differs most"):
        make(base, tmp_path, ("q_proj",))
