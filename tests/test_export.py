"""Export: the files are the stack, to the last bit that their dtype can hold."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import exporting
import pytest
import torch
import yaml
from conftest import CHATML
from exporting import TARGETS, as_the_card_says, make_run, random_adapter
from gguf_files import File
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from srlm_lite.errors import ProofError, UserError
from srlm_lite.export import card
from srlm_lite.export.export import Export, ExportWish
from srlm_lite.export.source import find_source
from srlm_lite.methods import METHODS
from srlm_lite.model import merge, parity
from srlm_lite.model.base import base_files, load_base, skeleton
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.checkpoint import Checkpoint, ShardWriter, TensorInfo, write_shard
from srlm_lite.model.layout import Layout
from srlm_lite.model.nf4 import nf4_modules
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.progress import Silent
from srlm_lite.recipe import recipe_from
from srlm_lite.run.files import read_json, write_json
from srlm_lite.run.run import RunDir
from srlm_lite.settings import Base

IDS = torch.tensor([[5, 17, 99, 3, 42, 250, 7, 7, 61, 12]])


def export(run: RunDir, out: Path, which: str = "last", **wish: Any) -> dict[str, Any]:
    return Export(find_source(run.path, which), ExportWish(out=out, **wish), Silent()).make()


def saved_base(tiny_base_dir: Path, folder: Path, *, tied: bool, shard: str) -> Path:
    """The tiny base again, in many files or with tied embeddings."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base_dir)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tiny_base_dir: Path, tmp_path: Path) -> RunDir:
    """An anchor and two iterations on the tiny base."""
    adapters = [random_adapter(tiny_base_dir, seed=seed, rank=2 + seed) for seed in (0, 1, 2)]
    return make_run(tmp_path / "run", tiny_base_dir, adapters=adapters, dtype="float32")


def stack_logits(run: RunDir, numbers: Sequence[str]) -> torch.Tensor:
    """What the slot, in which the run is trained and evaluated, computes."""
    base = load_base(find_source(run.path, "last").recipe.base)
    stack = [Adapter.load(run.path / name) for name in numbers]
    slot = Slot(base.model, targets=TARGETS, rank=sum(adapter.rank for adapter in stack))
    slot.load(stack)
    with torch.inference_mode():
        return slot.model(input_ids=IDS).logits.float()


def plain_logits(folder: Path) -> torch.Tensor:
    """What plain transformers makes of a directory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("which", "numbers"),
    [
        ("anchor", ["anchor"]),
        ("1", ["anchor", "iter_001/delta"]),
        ("last", ["anchor", "iter_002/delta"]),
    ],
)
def test_merged_weights_are_the_stack(
    run: RunDir, tmp_path: Path, which: str, numbers: list[str]
) -> None:
    export(run, tmp_path / "out", which)
    assert torch.allclose(
        plain_logits(tmp_path / "out"), stack_logits(run, numbers), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_and_tied_bases_keep_their_files(
    tiny_base_dir: Path, tmp_path: Path, tied: bool
) -> None:
    base = saved_base(tiny_base_dir, tmp_path / "base", tied=tied, shard="100KB")
    stack = [random_adapter(base, seed=seed) for seed in (0, 1)]
    run = make_run(tmp_path / "run", base, adapters=stack, dtype="float32")
    export(run, tmp_path / "out")

    files = {file.name for file in base.glob("*.safetensors")}
    assert len(files) > 2
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == files
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (base, tmp_path / "out")
    )
    assert after["weight_map"] == before["weight_map"]
    assert ("lm_head.weight" in after["weight_map"]) is not tied
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    expected = stack_logits(run, ["anchor", "iter_001/delta"])
    assert torch.allclose(plain_logits(tmp_path / "out"), expected, atol=1e-4, rtol=0)


def test_an_update_of_a_tied_head_leaves_the_embedding_alone(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    base = saved_base(tiny_base_dir, tmp_path / "base", tied=True, shard="1GB")
    rows = Checkpoint(base).info("model.embed_tokens.weight").shape[0]
    head = Adapter(rank=2, alpha=2, factors={"lm_head": (torch.randn(2, 64), torch.randn(rows, 2))})
    run = make_run(tmp_path / "run", base, adapters=[head], dtype="float32")
    export(run, tmp_path / "out")

    b, a = head.factors["lm_head"][1], head.factors["lm_head"][0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = Checkpoint(base).read("model.embed_tokens.weight")
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.allclose(model.lm_head.weight, embedding + b @ a, atol=1e-5)


def test_sums_are_rounded_once(run: RunDir, tmp_path: Path) -> None:
    """The reference sums in float64, so only ties within float32's error may fall otherwise."""
    export(run, tmp_path / "out", dtype="bfloat16")
    source = find_source(run.path, "last")
    base, out = Checkpoint(source.base_files().folder), Checkpoint(tmp_path / "out")
    equal = total = 0
    for infos in out.shards.values():
        for info in infos:
            exact = base.read(info.name).double()
            for adapter in source.stack():
                if (module := info.name.removesuffix(".weight")) in adapter.factors:
                    a, b = adapter.factors[module]
                    exact += adapter.scaling * b.double() @ a.double()
            found = out.read(info.name)
            assert found.dtype == torch.bfloat16
            equal += int((found == exact.to(torch.bfloat16)).sum())
            total += found.numel()
    assert equal / total > 0.999


def test_the_streamed_forward_pass_is_that_of_the_loaded_model(
    tiny_base_dir: Path, run: RunDir
) -> None:
    model, _ = skeleton(tiny_base_dir)
    read, stack = Checkpoint(tiny_base_dir).read, find_source(run.path, "last").stack()
    texts = [IDS[0].tolist(), IDS[0, :4].tolist()]
    bare, full = parity.logits(model, read, texts, stacks=[[], stack])
    assert len(bare) == 14
    assert torch.allclose(bare[:10], plain_logits(tiny_base_dir)[0], atol=1e-5)
    expected = stack_logits(run, ["anchor", "iter_002/delta"])[0]
    assert torch.allclose(full[:10], expected, atol=1e-4)
    assert torch.allclose(full[10:], expected[:4], atol=1e-4)  # padding changes nothing
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantized_weights_are_those_the_adapters_were_trained_against(
    tiny_base_dir: Path, dtype: str
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    section = Base(name=str(tiny_base_dir), quantization="nf4", dtype=dtype, device="cpu")
    loaded: Any = load_base(section).model
    model, _ = skeleton(tiny_base_dir)
    names, layout = nf4_modules(model), Layout(Checkpoint(tiny_base_dir), model)
    weights = merge.Weights(layout, nf4=names, dtype=getattr(torch, dtype))
    quantized = {
        f"{name}.weight": module.weight
        for name, module in loaded.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
    }
    assert quantized.keys() == names
    for name, weight in quantized.items():
        expanded = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(weights.read(name), expanded), name


def test_a_run_in_nf4_can_be_merged_onto_either_base(tiny_base_dir: Path, tmp_path: Path) -> None:
    stack = [random_adapter(tiny_base_dir, seed=seed) for seed in (0, 1)]
    run = make_run(
        tmp_path / "run", tiny_base_dir, adapters=stack, quantization="nf4", dtype="float32"
    )
    original = export(run, tmp_path / "original")
    dequantized = export(run, tmp_path / "dequantized", onto="dequantized")
    trained = stack_logits(run, ["anchor", "iter_001/delta"])

    apart = (plain_logits(tmp_path / "dequantized") - trained).abs().max()
    assert apart < 1e-3
    apart = (plain_logits(tmp_path / "original") - trained).abs().max()
    assert apart > 1e-2
    # Told in the parity of the original, where it is NF4's rounding and not an error.
    assert original["onto"] == "original" and original["max_abs_logit_diff"] < 1e-3
    assert original["against_nf4"]["max_abs_logit_diff"] > 1e-2
    assert "against_nf4" not in dequantized


def test_the_adapter_is_one_lora_that_peft_loads(
    run: RunDir, tiny_base_dir: Path, tmp_path: Path
) -> None:
    row = export(run, tmp_path / "out", form="adapter")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2 + 4  # the ranks of the anchor and of the second delta
    assert config["base_model_name_or_path"] == tiny_base_dir.name  # no path of this machine
    model = as_the_card_says(tmp_path / "out", base=str(tiny_base_dir))
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    assert torch.allclose(logits, stack_logits(run, ["anchor", "iter_002/delta"]), atol=1e-4)
    assert row["max_abs_logit_diff"] < 1e-3


def test_an_adapter_on_a_gguf_file_loads_as_its_card_says(tmp_path: Path) -> None:
    """The file divides frequencies, which transformers alone would not read."""
    made = File("llama").gpt2("llama-bpe").weights()
    made.divided(8.0, context=700, low=1.0, high=4.0)
    file = made.write(tmp_path / "tiny.gguf")
    stack = [random_adapter(base_files(Base(name=str(file))).folder, seed=0)]
    run = make_run(tmp_path / "run", file, adapters=stack, dtype="float32", chat_template="chatml")
    export(run, tmp_path / "out", form="adapter")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "what that file expands to" in text and str(tmp_path) not in text
    model = as_the_card_says(tmp_path / "out", base=str(file)).float()
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    right = stack_logits(run, ["anchor"])
    assert torch.allclose(logits, right, atol=0.01 * float(right.abs().max()))


def test_plain_transformers_chats_with_it(run: RunDir, tmp_path: Path) -> None:
    """In a process that cannot import srlm_lite."""
    export(run, tmp_path / "out")
    code = (
        "import json, sys\n"
        "sys.modules['srlm_lite'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(tmp_path / 'out')!r}\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "messages = [{'role': 'user', 'content': 'Is the moon grey?'}]\n"
        "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True,\n"
        "    return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=4, do_sample=False)\n"
        "print(json.dumps([ids['input_ids'][0].tolist(), tokenizer.eos_token,\n"
        "    tokenizer.pad_token, model.generation_config.eos_token_id, out.shape[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    ids, eos, pad, ends, length = json.loads(done.stdout.splitlines()[-1])
    base = load_base(find_source(run.path, "last").recipe.base)
    chat = ChatFormat.of(base)
    assert ids == chat.prompt_ids("Is the moon grey?")
    assert (eos, pad, ends) == ("<|im_end|>", "<pad>", list(chat.stop_ids))
    assert length > len(ids)


DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
    "{% else %}{% set day = 'never' %}{% endif %}Today: {{ day }}\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, "plain", "chatml", "llama-2", "dated"])
def test_the_template_travels_with_the_tokenizer(
    tiny_base_dir: Path, tmp_path: Path, template: str | None
) -> None:
    """The recipe's template, a BOS that only the tokenizer adds, and a day that stands still."""
    base = shutil.copytree(tiny_base_dir, tmp_path / "base")
    if template == "dated":
        template = str(tmp_path / "dated.jinja")
        Path(template).write_text(DATED)
    if template is not None:
        give_bos(base)
    adapter = random_adapter(base, seed=0)
    run = make_run(
        tmp_path / "run", base, adapters=[adapter], dtype="float32", chat_template=template
    )
    export(run, tmp_path / "out")
    chat = ChatFormat.of(load_base(find_source(run.path, "last").recipe.base), template=template)
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [
        {"role": "user", "content": "Is the moon grey?"},
        {"role": "assistant", "content": "It is."},
        {"role": "user", "content": "And Mars?"},
    ]
    ids = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == chat.render(messages, generation=True)
    if template is not None:
        assert ids[0] == plain.bos_token_id
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == list(chat.stop_ids)


def test_variables_of_the_template_travel_with_it(tiny_base_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "thinks.jinja"
    template.write_text(
        CHATML + "{% if add_generation_prompt and enable_thinking is false %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    )
    run = make_run(
        tmp_path / "run",
        tiny_base_dir,
        adapters=[random_adapter(tiny_base_dir, seed=0)],
        dtype="float32",
        chat_template=str(template),
        chat_template_kwargs={"enable_thinking": False},
    )
    export(run, tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = plain.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    card_text = (tmp_path / "out" / "README.md").read_text()
    assert "**chat template:** with `{enable_thinking: false}` written into it" in card_text


def give_bos(base: Path) -> None:
    """Let the tokenizer put a BOS before plain text, as Llama's does."""
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, sequence],
        "pair": [start, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    file.write_text(json.dumps(content))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|im_start|>"}))


# --- parity ------------------------------------------------------------------------------------


def test_parity_by_hand() -> None:
    """Two positions, two tokens: the first alike; the second (0, ln 3) against (ln 3, 0).

    There the logits are ln 3 = 1.0986 apart, p = (1/4, 3/4) and q = (3/4, 1/4), so
    KL = 1/4 ln 1/3 + 3/4 ln 3 = 1/2 ln 3 = 0.5493, and half of that in the mean.
    """
    ln3 = torch.tensor(3.0).log()
    stack = torch.tensor([[1.0, 0.0], [0.0, ln3]])
    other = torch.tensor([[1.0, 0.0], [ln3, 0.0]])
    row = parity.compare(stack, other)
    assert row.max_abs_logit_diff == pytest.approx(1.0986, abs=1e-4)
    assert row.mean_abs_logit_diff == pytest.approx(1.0986 / 2, abs=1e-4)
    assert row.mean_kl == pytest.approx(0.5493 / 2, abs=1e-4)
    assert row.top1_agreement == 0.5


def test_parity_has_its_keys(run: RunDir, tmp_path: Path) -> None:
    row = export(run, tmp_path / "out")
    assert row == exporting.parity(tmp_path / "out")
    keys = {"max_abs_logit_diff", "mean_abs_logit_diff", "mean_kl", "top1_agreement", "tolerance"}
    assert keys <= row.keys()
    assert row["max_abs_logit_diff"] <= row["tolerance"]
    assert row["top1_agreement"] == 1.0


def lose(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the merge hand one tensor's update to `change` first."""
    right = merge.merged

    def wrong(each: merge.Merge, *args: Any) -> Iterator[torch.Tensor]:
        update = each.update and change(each.update)
        return right(replace(each, update=update), *args)

    monkeypatch.setattr(merge, "merged", wrong)


def test_an_export_without_the_delta_fails(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the delta is so small that rounding to bfloat16 moves the logits more."""
    anchor = random_adapter(tiny_base_dir, seed=0)
    delta = random_adapter(tiny_base_dir, seed=1, size=3e-5)
    run = make_run(tmp_path / "run", tiny_base_dir, adapters=[anchor, delta], dtype="float32")
    row = export(run, tmp_path / "whole", dtype="bfloat16")
    assert row["last_adapter_mean_abs_logit_diff"] < row["mean_abs_logit_diff"]

    lose(monkeypatch, lambda update: (update[0][:4], update[1][:, :4]))  # the anchor's rank is 4
    with pytest.raises(ProofError, match=r"model\.layers\.\d\.\S+_proj\.weight differs most"):
        export(run, tmp_path / "out", dtype="bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_the_tensor_that_differs_most_is_named(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merge.merged

    def wrong(each: merge.Merge, *args: Any) -> Iterator[torch.Tensor]:
        for block in right(each, *args):
            yield block * 1.5 if each.info.name == "model.layers.1.mlp.up_proj.weight" else block

    monkeypatch.setattr(merge, "merged", wrong)
    with pytest.raises(ProofError, match=r"model\.layers\.1\.mlp\.up_proj\.weight differs most"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_cross_terms_fails(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`linear` combination multiplies every A with every B; here, A of the delta taken twice."""
    from srlm_lite.model import stack as stack_module

    right = stack_module.fuse

    def linear(adapters: Sequence[Adapter]) -> Adapter:
        fused = right(adapters)
        factors = {name: (a.flip(0), b) for name, (a, b) in fused.factors.items()}
        return Adapter(rank=fused.rank, alpha=fused.alpha, factors=factors)

    monkeypatch.setattr(stack_module, "fuse", linear)
    with pytest.raises(ProofError, match=r"_proj differs most"):
        export(run, tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


# --- refusals ----------------------------------------------------------------------------------


def test_an_unfinished_iteration_is_refused(run: RunDir, tmp_path: Path) -> None:
    run.iteration(2).done.unlink()
    with pytest.raises(UserError, match=r"iter_002: is not finished"):
        export(run, tmp_path / "out", "2")
    assert (
        Export(find_source(run.path, "last"), ExportWish(tmp_path / "o"), Silent()).source.iteration
        == 1
    )


@pytest.mark.parametrize(
    "name", ["anchor/adapter_model.safetensors", "iter_002/delta/adapter_config.json"]
)
@pytest.mark.parametrize("change", ["changed", "missing"])
def test_a_stack_that_is_not_the_run_s_is_refused(
    run: RunDir, tmp_path: Path, name: str, change: str
) -> None:
    file = run.path / name
    if change == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{re.escape(name)} \({change}\)"):
        export(run, tmp_path / "out")


def test_another_base_is_refused(tiny_base_dir: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base_dir, tmp_path / "base")
    run = make_run(tmp_path / "run", base, adapters=[random_adapter(base, seed=0)], dtype="float32")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(base).config)
    model.save_pretrained(base)
    with pytest.raises(UserError, match="the run was begun on other weights"):
        export(run, tmp_path / "out")


def test_a_target_that_holds_something_is_left_alone(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists already"):
        export(run, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_a_full_disk_is_seen_before_the_first_byte(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(UserError, match=r"needs \d\d\.\d MB, and 1\.0 MB are free"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_disk_that_is_full_by_now_costs_no_finished_file(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Export, draft: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Export, "_compare", killed)  # after the weights
        export(run, tmp_path / "out")
    file = tmp_path / ".out.partial" / "model.safetensors"
    stamp = file.stat().st_mtime_ns
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"kept in {file.parent}"):
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
        export(run, tmp_path / "out")
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp


def test_an_export_that_is_there_is_not_made_again(run: RunDir, tmp_path: Path) -> None:
    first = export(run, tmp_path / "out")
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert export(run, tmp_path / "out") == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="exists already"):
        export(run, tmp_path / "out", dtype="bfloat16")


# --- files -------------------------------------------------------------------------------------


def test_a_written_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5).to(torch.bfloat16),
        "ünï": torch.arange(7),
        "scalar": torch.tensor(1.5),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }
    infos = [TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    write_shard(tmp_path / "model.safetensors", infos, tensors.values())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    own = Checkpoint(tmp_path)
    assert all(torch.equal(own.read(name), tensor) for name, tensor in tensors.items())


def test_a_file_that_is_not_whole_does_not_get_its_name(tmp_path: Path) -> None:
    info = TensorInfo("w", torch.float32, (4, 3))
    with (
        pytest.raises(ValueError, match="lacks 24 bytes"),
        ShardWriter(tmp_path / "x", [info]) as x,
    ):
        x.write("w", 0, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="given"), ShardWriter(tmp_path / "x", [info]) as x:
        x.write("w", 6, torch.zeros(3, 3))
    assert not (tmp_path / "x").exists()


def test_threads_write_the_same_bytes_as_one(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of three rows and blocks of two, a dozen parts a tensor."""
    monkeypatch.setattr(merge, "_PART", 200)
    monkeypatch.setattr(merge, "_BLOCK", 130)
    base = saved_base(tiny_base_dir, tmp_path / "base", tied=False, shard="100KB")
    model, _ = skeleton(base)
    weights = merge.Weights(Layout(Checkpoint(base), model))
    stack = [random_adapter(base, seed=seed) for seed in (0, 1)]
    plan = merge.plan(weights.layout, stack, dtype=torch.bfloat16)
    threads, told = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            folder = tmp_path / str(count)
            folder.mkdir()
            merge.write(plan, weights, folder, on_bytes=told.append)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert sum(told) == 2 * plan.nbytes
    one, four = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "14")
    assert one == four and len(one) > 3
    check = parity.TensorCheck(weights.layout, stack, Layout(Checkpoint(tmp_path / "4"), model))
    check.rest(weights.read)
    assert check.error < parity.tensor_tolerance(torch.bfloat16)


def test_a_merge_that_fails_leaves_no_file(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = merge.Weights(Layout(Checkpoint(tiny_base_dir), skeleton(tiny_base_dir)[0]))
    plan = merge.plan(weights.layout, [], dtype=None)

    put = os.pwrite

    def full(file: int, data: memoryview, offset: int) -> int:
        if offset > 100_000:
            raise OSError(28, "No space left on device")
        return put(file, data, offset)

    monkeypatch.setattr("srlm_lite.model.checkpoint.os.pwrite", full)
    with pytest.raises(OSError, match="No space"):
        merge.write(plan, weights, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="F8_E4M3"):
        Checkpoint(tmp_path)


def test_a_damaged_base_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(64)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or damaged"):
        Checkpoint(tmp_path)


# --- the card ----------------------------------------------------------------------------------


def test_the_card_tells_the_lineage(run: RunDir, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    facts = run.facts()
    for part in (
        facts["digest"],
        json.loads(run.base_json.read_text())["sha256"],
        "the anchor and delta 2, which began at zero on the anchor",
        "M3 of a run of the method `self-rewarding`",
        "2 iterations followed, of answering prompts, grading its own answers and DPO",
        "| M3 | 14 | 0.75 | 0.10 | 0.98 | 220 |",  # pairs, judge, length as in `finish`
        "answers grew from 100 to 220 characters",
        "self-rewarding, seed 0",
    ):
        assert part in text, part
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "name: by-hand" in recipe
    assert "rlhf:" not in recipe  # what the method does not have
    recipe_from(yaml.safe_load(recipe), where="recipe.yaml")
    # Where things lie on this machine is nobody's business.
    assert str(tmp_path) not in text + recipe


@pytest.mark.parametrize("method", METHODS)
def test_the_card_names_what_the_method_does(
    tiny_base_dir: Path, tmp_path: Path, method: str
) -> None:
    adapters = [random_adapter(tiny_base_dir, seed=seed) for seed in (0, 1)]
    needed = {
        "dpo": {"init": "previous", "reference": "anchor"},
        "rollout": {"temperature": 1.0},
    }
    run = make_run(tmp_path / "run", tiny_base_dir, adapters=adapters, method=method, more=needed)
    base = read_json(run.base_json)
    facts = {"base": base, "onto": "original", "dtype": "bfloat16", "rank": 8}
    text = card.card(find_source(run.path, "last"), form="merged", **facts)
    told = METHODS[method]
    tags = yaml.safe_load(text.split("---")[1])["tags"]
    assert tags == ["self-rewarding"] * told.is_self_rewarding + [told.trainer]
    source = f" ({told.cited()})" if told.cited() else ""
    assert f"1 iteration followed, of {told.made_by}{source}. Made with srlm-lite." in text


def test_the_card_says_where_an_anchor_is_from_that_the_run_did_not_train(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    """The last part of its path alone: where things lie on this machine is nobody's business."""
    adapters = [random_adapter(tiny_base_dir, seed=seed) for seed in (0, 1)]
    run = make_run(tmp_path / "run", tiny_base_dir, adapters=adapters)
    facts = {"base": read_json(run.base_json), "onto": "original", "dtype": "bfloat16", "rank": 8}

    def about(which: str) -> str:
        return card.card(find_source(run.path, which), form="merged", **facts)

    trained = "the anchor, made by SFT on instruction and judge data"
    assert trained in about("anchor") and trained in about("last")
    told = run.facts()
    for noted in ("recipe", "identity"):
        told[noted]["anchor"]["init"] = str(tmp_path / "my-anchor")
    write_json(run.run_json, told)
    for text in (about("anchor"), about("last")):
        assert "the anchor, an adapter trained before and taken as it was (`my-anchor`)" in text
        assert "made by SFT" not in text and str(tmp_path) not in text
