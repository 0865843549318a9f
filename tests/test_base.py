"""Bases: what loads, what is refused and how, and that NF4 on a CPU computes what it should."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import httpx
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from srlm_lite.errors import UserError
from srlm_lite.model import base as base_module
from srlm_lite.model import gguf as gguf_module
from srlm_lite.model import whereabouts
from srlm_lite.model.bare import bare_model
from srlm_lite.model.base import (
    LoadedBase,
    load_base,
    load_files,
)
from srlm_lite.model.heap import give_back
from srlm_lite.model.targets import check_targets
from srlm_lite.model.whereabouts import SMOLLM2, SMOLLM2_WHEEL
from srlm_lite.settings import Base

DIMENSION, HIDDEN, HEADS, LAYERS = 32, 64, 4, 2
IM_START, IM_END, END_OF_TEXT = 1, 2, 0


@pytest.fixture
def tiny_copy(tiny_base_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_dir, tmp_path / "copy"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SRLM_LITE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights as a GGUF file: BOS 1, EOS 2, and no padding token."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(DIMENSION)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(IM_START)
    writer.add_eos_token_id(IM_END)
    writer.add_unk_token_id(END_OF_TEXT)
    random = np.random.default_rng(0)
    square, up, down = (DIMENSION, DIMENSION), (HIDDEN, DIMENSION), (DIMENSION, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), DIMENSION),
        "output": (len(tokens), DIMENSION),
        "output_norm": (DIMENSION,),
    }
    for block in range(LAYERS):
        shapes |= {f"blk.{block}.{norm}_norm": (DIMENSION,) for norm in ("attn", "ffn")}
        shapes |= {f"blk.{block}.attn_{part}": square for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{part}": up for part in ("gate", "up")}
        shapes |= {f"blk.{block}.ffn_down": down}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refusal(section: Base) -> str:
    with pytest.raises(UserError) as caught:
        load_base(section)
    line = str(caught.value)
    assert "\n" not in line
    return line


# What loads


def test_a_directory_loads_frozen_and_ready(tiny_base_dir: Path) -> None:
    base = load_base(Base(name=str(tiny_base_dir), dtype="float32"))
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.dtype == base.dtype == torch.float32
    assert base.source["kind"] == "directory"
    assert len(base.source["sha256"]) == 64
    json.dumps(base.source)


@pytest.mark.parametrize("family", ["gemma3", "recurrent_gemma", "deepseek_v3", "qwen3_next"])
def test_a_model_without_weights_has_its_buffers(
    family: str, family_base: Callable[[str], Path]
) -> None:
    """Those that no file holds, as a model that is really there has them."""
    hf: Any = transformers
    settings = hf.AutoConfig.from_pretrained(family_base(family))
    bare = bare_model(settings)
    assert {parameter.device.type for parameter in bare.parameters()} == {"meta"}
    whole = hf.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    found, expected = dict(bare.named_buffers()), dict(whole.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name


def test_the_digest_of_a_directory_follows_its_weights(
    tiny_base_dir: Path, tiny_copy: Path
) -> None:
    before = load_base(Base(name=str(tiny_base_dir))).source["sha256"]
    assert load_base(Base(name=str(tiny_copy))).source["sha256"] == before
    model = AutoModelForCausalLM.from_pretrained(tiny_copy)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tiny_copy)
    assert load_base(Base(name=str(tiny_copy))).source["sha256"] != before


def test_the_checkpoint_does_not_say_how_to_sample(tiny_copy: Path) -> None:
    (tiny_copy / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.1, "top_k": 3, "eos_token_id": [2, 5]}'
    )
    base = load_base(Base(name=str(tiny_copy)))
    settings = base.model.generation_config
    assert (settings.temperature, settings.top_k) == (None, None)
    assert base.eos_ids == (2, 5)


def test_a_base_without_pad_token_pads_with_its_eos(tiny_copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_copy)
    tokenizer.add_tokens([])
    settings = json.loads((tiny_copy / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (tiny_copy / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = (tiny_copy / "tokenizer.json").read_text().replace("<pad>", "<unused>")
    (tiny_copy / "tokenizer.json").write_text(vocabulary)
    base = load_base(Base(name=str(tiny_copy)))
    assert base.tokenizer.pad_token == "<|im_end|>"
    assert base.model.generation_config.pad_token_id == base.tokenizer.pad_token_id == 2


@pytest.mark.parametrize(("amx", "avx512_bf16", "dtype"), [
    (True, False, torch.bfloat16),
    (False, True, torch.bfloat16),
    (False, False, torch.float32),
])  # fmt: skip
def test_auto_dtype_on_a_cpu_follows_its_instructions(
    tiny_base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    amx: bool,
    avx512_bf16: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert load_base(Base(name=str(tiny_base_dir), device="cpu")).model.dtype == dtype


def test_loading_is_silent(tiny_base_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(Base(name=str(tiny_base_dir), quantization="nf4"))
    assert capfd.readouterr() == ("", "")


# GGUF


def test_the_library_still_sets_the_gguf_traps(tiny_gguf: Path) -> None:
    """When this fails, the repairs in `_convert` may have become needless."""
    where: dict[str, Any] = {"gguf_file": tiny_gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(tiny_gguf.parent, **where)
    assert tokenizer.eos_token_id != IM_END
    assert tokenizer.pad_token is None
    model = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, **where)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tiny_gguf.parent / "saved")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_gguf_base_has_its_own_special_tokens_and_can_be_saved(
    tiny_gguf: Path, own_cache: Path, tmp_path: Path, quantization: Any
) -> None:
    base = load_base(Base(name=str(tiny_gguf), quantization=quantization, dtype="float32"))
    assert base.source["kind"] == "gguf"
    tokenizer: Any = base.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (IM_START, IM_END)
    assert tokenizer.pad_token_id == IM_END
    assert base.eos_ids == (IM_END,)
    assert base.model.generation_config.pad_token_id == IM_END
    assert tokenizer.decode(tokenizer("a <|im_end|> b").input_ids) == "a <|im_end|> b"
    base.model.save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").glob("*.safetensors"))
    quantized = isinstance(base.model.get_submodule("model.layers.0.mlp.up_proj"), Linear4bit)
    assert quantized == (quantization == "nf4")


def test_a_gguf_file_is_converted_once(
    tiny_gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_base(Base(name=str(tiny_gguf)))
    monkeypatch.setattr(gguf_module, "_convert", None)
    again = load_base(Base(name=str(tiny_gguf)))
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert [path.name[:5] for path in own_cache.iterdir()] == ["gguf-"]


def test_a_failed_conversion_leaves_nothing_behind(
    tiny_gguf: Path, own_cache: Path, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(tiny_gguf.read_bytes()[:-5000])
    assert "truncated or damaged" in refusal(Base(name=str(torn)))
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_what_is_no_gguf_is_refused(own_cache: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    line = refusal(Base(name=str(file)))
    assert str(file) in line
    assert "truncated or damaged" in line


def test_a_gguf_of_an_unknown_architecture_is_refused(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(file, "perceptron")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "perceptron" in refusal(Base(name=str(file)))


def test_a_cache_that_cannot_be_written_names_the_way_out(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SRLM_LITE_CACHE", str(tmp_path / "file" / "cache"))
    assert "SRLM_LITE_CACHE" in refusal(Base(name=str(tiny_gguf)))


# SmolLM2


def test_smollm2_comes_from_its_wheel(smollm2: LoadedBase) -> None:
    assert smollm2.source["kind"] == "gguf"
    tokenizer: Any = smollm2.tokenizer
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert smollm2.eos_ids == (2,)
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008


def test_smollm2_speaks(smollm2: LoadedBase) -> None:
    tokenizer: Any = smollm2.tokenizer
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = smollm2.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])


def test_without_the_wheel_smollm2_is_a_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whereabouts, "smollm2_file", lambda: None)
    line = refusal(Base(name=SMOLLM2))
    assert "Hub cannot be reached" in line
    assert SMOLLM2_WHEEL in line


# What is refused


@pytest.mark.parametrize(
    "name", ["/no/such/place", "./nowhere", "~/nowhere-at-all", "missing.gguf", "a/b/c", "x y"]
)
def test_a_path_to_nothing_is_refused(name: str) -> None:
    assert f"there is nothing at {name}" in refusal(Base(name=name))


def test_an_unreachable_hub_is_said(tmp_path: Path) -> None:
    line = refusal(Base(name="nobody/no-such-model"))
    assert "nobody/no-such-model is not here, and the Hub cannot be reached" in line


@pytest.mark.parametrize(
    ("error", "expected"),
    [(GatedRepoError, "gated"), (RepositoryNotFoundError, "no nobody/no-such-model here or on")],
)
def test_what_the_hub_denies_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], expected: str
) -> None:
    def deny(*args: object, **options: object) -> None:
        request = httpx.Request("GET", "https://huggingface.co")
        cause: Any = error
        try:
            raise cause("denied\nat length", response=httpx.Response(403, request=request))
        except error as denied:
            raise OSError("You are trying to access a gated repo.\nMake sure …") from denied

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", deny)
    assert expected in refusal(Base(name="nobody/no-such-model"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "not a .gguf file" in refusal(Base(name=str(tmp_path / "model.safetensors")))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal(Base(name=str(tmp_path)))


def test_pickled_weights_are_refused(tiny_copy: Path) -> None:
    (tiny_copy / "model.safetensors").unlink()
    (tiny_copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "only pickled ones" in refusal(Base(name=str(tiny_copy)))


@pytest.mark.parametrize("kept", [0, 4, 1000, -1000])
def test_truncated_weights_are_refused(tiny_copy: Path, kept: int) -> None:
    file = tiny_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    line = refusal(Base(name=str(tiny_copy)))
    assert "truncated or damaged weights" in line
    assert str(file) in line


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "model.safetensors.index.json: damaged"),
        ("{}", "model.safetensors.index.json: damaged"),
        ('{"weight_map": {"a": "b.safetensors"}}', "b.safetensors: the index names it, but it is"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "which is no *.safetensors file beside it"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "which is no *.safetensors file beside it"),
    ],
)
def test_an_index_of_other_files_is_refused(tiny_copy: Path, index: str, message: str) -> None:
    (tiny_copy / "model.safetensors").rename(tiny_copy / "model-00001-of-00002.safetensors")
    (tiny_copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (tiny_copy / "model.safetensors.index.json").write_text(index)
    assert message in refusal(Base(name=str(tiny_copy)))


@pytest.mark.parametrize("wrong", [{"hidden_size": "x"}, {"num_attention_heads": 0}, []])
def test_a_damaged_configuration_is_refused(tiny_copy: Path, wrong: Any) -> None:
    settings = json.loads((tiny_copy / "config.json").read_text())
    damaged = settings | wrong if isinstance(wrong, dict) else wrong
    (tiny_copy / "config.json").write_text(json.dumps(damaged))
    assert f"{tiny_copy} cannot be loaded (" in refusal(Base(name=str(tiny_copy)))


def test_missing_tensors_are_refused(tiny_copy: Path) -> None:
    settings = json.loads((tiny_copy / "config.json").read_text())
    settings["num_hidden_layers"] = 3
    (tiny_copy / "config.json").write_text(json.dumps(settings))
    line = refusal(Base(name=str(tiny_copy)))
    assert "lack 9 tensors, such as model.layers.2." in line


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj", "norm"])
def test_a_tensor_of_another_shape_is_refused(
    tiny_copy: Path, quantization: Literal["none", "nf4"], name: str
) -> None:
    """Rounded to NF4 it would be taken whatever its shape."""
    tensors = load_file(tiny_copy / "model.safetensors")
    name = f"model.{name}.weight"
    rows, *columns = tensors[name].shape
    tensors[name] = tensors[name][: rows // 2].contiguous()
    save_file(tensors, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    line = refusal(Base(name=str(tiny_copy), quantization=quantization))
    there, wanted = ([n, *columns] for n in (rows // 2, rows))
    assert f"{name} cannot be read as {name} ({there} for {name}, the model has {wanted})" in line
    assert str(tiny_copy) in line


def test_an_unknown_architecture_is_refused(tiny_copy: Path) -> None:
    settings = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps(settings | {"model_type": "perceptron"}))
    assert "no architecture perceptron" in refusal(Base(name=str(tiny_copy)))


def test_a_model_that_needs_its_own_code_is_refused(tiny_copy: Path) -> None:
    settings = json.loads((tiny_copy / "config.json").read_text())
    settings |= {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (tiny_copy / "config.json").write_text(json.dumps(settings))
    assert "does not run" in refusal(Base(name=str(tiny_copy)))


def test_a_directory_without_tokenizer_is_refused(tiny_copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny_copy / name).unlink()
    assert "tokenizer" in refusal(Base(name=str(tiny_copy)))


def test_a_tokenizer_of_another_model_is_refused(tiny_copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_copy)
    tokenizer.add_tokens(["more", "than", "fits"])
    tokenizer.save_pretrained(tiny_copy)
    assert "do not belong together" in refusal(Base(name=str(tiny_copy)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_but_absent_is_refused(tiny_base_dir: Path) -> None:
    line = refusal(Base(name=str(tiny_base_dir), device="cuda"))
    assert line.startswith("base.device: ")
    assert "base.device=auto" in line


def test_nf4_without_bitsandbytes_is_refused(
    tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "bitsandbytes" in refusal(Base(name=str(tiny_base_dir), quantization="nf4"))


def test_targets_that_do_not_exist_are_refused(tiny_base_dir: Path) -> None:
    model = load_base(Base(name=str(tiny_base_dir))).model
    check_targets(model, ["q_proj", "mlp.up_proj"])
    with pytest.raises(UserError, match=r"c_attn. It has down_proj, gate_proj, k_proj, o_proj"):
        check_targets(model, ["q_proj", "c_attn"])
    with pytest.raises(UserError, match="proj"):
        check_targets(model, ["proj"])  # a part of a name is not the name


# NF4


@pytest.fixture(params=["float32", "bfloat16"])
def nf4(request: pytest.FixtureRequest, tiny_base_dir: Path) -> LoadedBase:
    return load_base(Base(name=str(tiny_base_dir), quantization="nf4", dtype=request.param))


@pytest.fixture
def dequantized(nf4: LoadedBase, tiny_base_dir: Path) -> Any:
    """A plain model in float32 that holds what the NF4 weights stand for."""
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in four_bit_layers(nf4.model):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.copy_(weight)
    return plain


def four_bit_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Linear4bit))


def tolerance(base: LoadedBase) -> float:
    """Relative error that the compute dtype explains: bfloat16 keeps 8 bits, 2^-8 = 0.4%."""
    return 1e-4 if base.dtype == torch.float32 else 0.02


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_nf4_covers_the_layers_but_not_the_head(nf4: LoadedBase, tiny_base_dir: Path) -> None:
    names = [name for name, _ in four_bit_layers(nf4.model)]
    assert len(names) == 2 * 7
    assert all(layer.weight.quant_state.nested for _, layer in four_bit_layers(nf4.model))
    assert {layer.weight.quant_state.quant_type for _, layer in four_bit_layers(nf4.model)} == {
        "nf4"
    }
    head: Any = nf4.model.get_output_embeddings()
    original = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=nf4.dtype)
    assert torch.equal(head.weight, original.lm_head.weight)


def test_nf4_computes_what_its_weights_stand_for(nf4: LoadedBase, dequantized: Any) -> None:
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        assert relative_error(nf4.model(ids).logits, dequantized(ids).logits) < tolerance(nf4)


@pytest.mark.parametrize("shape", [(2, 16), (1, 16), (1, 2)])
def test_lora_gradients_on_nf4_are_those_of_the_dequantized_base(
    nf4: LoadedBase, dequantized: Any, shape: tuple[int, int]
) -> None:
    assert relative_lora_gradient_error(nf4, dequantized, shape) < 3 * tolerance(nf4)


def test_lora_gradients_survive_sampling(nf4: LoadedBase, dequantized: Any) -> None:
    """A forward pass in eval mode must not repack the weights: the packed kernel has no gradient.

    Unguarded, on a CPU with AVX512-BF16, the gradient of a layer's input is None from then on.
    """
    packed = [layer.weight.data.clone() for _, layer in four_bit_layers(nf4.model)]
    with torch.no_grad():
        nf4.model.generate(
            torch.arange(3, 11).reshape(1, 8), max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
    for before, (_, layer) in zip(packed, four_bit_layers(nf4.model), strict=True):
        assert torch.equal(before, layer.weight.data)
    assert relative_lora_gradient_error(nf4, dequantized, (2, 16)) < 3 * tolerance(nf4)


def test_nf4_gives_the_same_with_and_without_gradient(nf4: LoadedBase) -> None:
    """DPO's reference pass has no gradient, its policy pass has one: the margin must start at 0."""
    ids = torch.arange(3, 35).reshape(2, 16)
    embedding: Any = nf4.model.get_input_embeddings()
    with torch.no_grad():
        without = nf4.model(ids).logits
    embedding.weight.requires_grad_(True)
    assert torch.equal(without, nf4.model(ids).logits)


def test_a_single_row_has_a_gradient(nf4: LoadedBase) -> None:
    """One row takes a path of its own in bitsandbytes, which has lost the gradient before."""
    layer: Any = nf4.model.get_submodule("model.layers.0.mlp.down_proj")
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    for rows in (1, 3):
        x = torch.randn(rows, weight.shape[1], dtype=nf4.dtype, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        # d(sum y)/dx = the column sums of W, the same for each row
        expected = weight.sum(0).expand(rows, -1)
        assert relative_error(x.grad, expected) < tolerance(nf4)


def relative_lora_gradient_error(
    nf4: LoadedBase, dequantized: Any, shape: tuple[int, int]
) -> float:
    count = shape[0] * shape[1]
    ids = torch.arange(3, 3 + count).reshape(shape)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    gradients = []
    for model in (nf4.model, dequantized):
        peft_model: Any = get_peft_model(model, settings)
        torch.manual_seed(1)
        for name, parameter in sorted(peft_model.named_parameters()):
            if "lora_" in name:  # B too: with B = 0, A has no gradient to compare
                parameter.data = 0.05 * torch.randn(parameter.shape)
        peft_model.train()
        peft_model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(
            torch.cat([
                parameter.grad.flatten()
                for name, parameter in sorted(peft_model.named_parameters())
                if "lora_" in name
            ])
        )  # fmt: skip
    return relative_error(*gradients)


def test_the_optional_bitsandbytes_kernel_is_not_missed_aloud() -> None:
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").getEffectiveLevel() >= logging.ERROR


def test_nf4_read_tensor_by_tensor_is_what_transformers_makes_of_it(tiny_base_dir: Path) -> None:
    """Packed weights, scales and their scales: bit for bit."""
    loaded = load_base(Base(name=str(tiny_base_dir), quantization="nf4", device="cpu"))
    stock = AutoModelForCausalLM.from_pretrained(
        tiny_base_dir,
        dtype=loaded.dtype,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=loaded.dtype,
        ),
    )
    ours, theirs = loaded.model.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("nested_absmax") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.model.is_quantized
    assert loaded.model.name_or_path == str(tiny_base_dir)


def status(key: str) -> int:
    """Bytes of this process, from the system."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_nf4_has_replaced_goes_back_to_the_system(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7.7 million weights that NF4 rounds: 15.3 MB in 16 bits, 4.1 MB after.

    What the allocator keeps of the 16-bit ones adds up to 25 MB, at the peak and in the end; given
    back, it is 10 MB and 6 MB. Rounding the largest tensor takes 3 MB by itself.
    """
    settings = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=9,
        num_attention_heads=4,
    )
    LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(base_module, "_READ_BEFORE_TRIM", 1)  # as for layers of a large base
    device = torch.device("cpu")
    tiny = AutoConfig.from_pretrained(tiny_base_dir)
    load_files(tiny_base_dir, tiny, device, torch.bfloat16, nf4=True)  # so that all code is there
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    except OSError:
        pytest.skip("the system does not let us reset the peak of memory")
    before = status("VmRSS")
    model, _ = load_files(tmp_path, settings, device, torch.bfloat16, nf4=True)
    assert status("VmHWM") - before < 14e6
    assert status("VmRSS") - before < 9e6
    assert model.num_parameters() > 4e6
