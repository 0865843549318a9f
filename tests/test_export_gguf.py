"""Export as GGUF: what the file holds, held against files of the same kind, and against llama.cpp.

Versions seen: llama.cpp as of xllamacpp 2026.10.11549, transformers 5.17.0, gguf 0.19.0.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import exporting
import numpy as np
import pytest
import torch
from commands import Cli
from exporting import make_run, random_adapter
from gguf_files import File
from messages import Told
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
)

from srlm_lite.errors import ProofError
from srlm_lite.export import llama_cpp
from srlm_lite.export.export import ExportWish
from srlm_lite.export.gguf import GgufExport
from srlm_lite.export.modelfile import go_template, modelfile
from srlm_lite.export.source import find_source
from srlm_lite.model import gguf_write
from srlm_lite.model.base import base_files
from srlm_lite.model.gguf_header import read_header
from srlm_lite.progress import Silent
from srlm_lite.run.run import RunDir
from srlm_lite.settings import Base

TOOLS = os.environ.get(llama_cpp.SETTING)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of their own, and none of llama.cpp's tools, whatever this machine has."""
    monkeypatch.setenv("SRLM_LITE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "none").mkdir()
    monkeypatch.setenv(llama_cpp.SETTING, str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))


def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)


def run_on(base: Path, folder: Path, **base_: Any) -> RunDir:
    weights = base_files(Base(name=str(base))).folder
    adapters = [random_adapter(weights, seed=seed) for seed in (0, 1)]
    return make_run(folder / "run", base, adapters=adapters, dtype="float32", **base_)


def export(run: RunDir, out: Path, **wish: Any) -> dict[str, Any]:
    wanted = ExportWish(out=out, form="gguf", **wish)
    return GgufExport(find_source(run.path, "last"), wanted, Silent()).make()


def llama(**keys: Any) -> File:
    return File("llama").gpt2("llama-bpe", eot_token_id=5, **keys).weights()


KINDS: dict[str, Callable[[], File]] = {
    "llama-bpe, Llama 3.1": lambda: llama().divided(8.0, context=700, low=1.0, high=4.0),
    "SentencePiece": lambda: File("llama").spm().weights(),
    "smollm, linear": lambda: (
        File("llama")
        .gpt2("smollm")
        .set(rope__scaling__type="linear", rope__scaling__factor=4.0)
        .weights()
    ),
    "qwen2, yarn": lambda: (
        File("qwen2")
        .gpt2("qwen2")
        .set(
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=256,
        )
        .weights()
    ),
    "qwen3": lambda: File("qwen3").gpt2("qwen2").set(rope__freq_base=1e6).weights(),
    "gemma2": lambda: (
        File("gemma2").spm(add_space_prefix=False).set(attention__sliding_window=48).weights()
    ),
    "gemma3": lambda: (
        File("gemma3")
        .spm(add_space_prefix=False)
        .set(
            rope__freq_base=1e6,
            attention__sliding_window=48,
            attention__sliding_window_pattern=2,
        )
        .weights()
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_went_through_a_run_says_what_it_said(tmp_path: Path, kind: str) -> None:
    """From GGUF to a base, adapters, and GGUF again: keys, tokens, merges and scores come back,
    tensors are the rounded sums, and llama.cpp answers as the stack does."""
    file = KINDS[kind]().write(tmp_path / "tiny.gguf")
    run = run_on(file, tmp_path, chat_template="chatml")
    row = export(run, tmp_path / "out", quantize="f16")
    assert row["base_precision"] == "F32" and row["written_by"].startswith("gguf ")
    before = read_header(file)
    after = read_header(tmp_path / "out" / row["file"])
    own = {"tokenizer.chat_template", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}
    for key, value in before.fields.items():
        if key in own or "scores" in key:
            continue
        found = after.fields[key]
        assert found == pytest.approx(value) if isinstance(value, float) else found == value, key
    assert after.tensors.keys() == before.tensors.keys()
    scores = "tokenizer.ggml.scores"
    if scores in before.fields:  # another number may say the same order of what is put together
        pieces = before.fields["tokenizer.ggml.tokens"]
        types = before.fields["tokenizer.ggml.token_type"]
        made = [
            at
            for at, one in enumerate(pieces)
            if types[at] == 1 and any(one[:n] in pieces and one[n:] in pieces for n in range(1, 24))
        ]
        order = [np.argsort([h.fields[scores][at] for at in made]) for h in (before, after)]
        assert len(made) > 50 and np.array_equal(*order)
    if llama_cpp.installed():
        said = row["llama_cpp"]
        assert said["mean_kl"] < 1e-3 and said["top1_agreement"] == 1, said
        assert said["same_prompt"] and said["not_ended_by"] == [], said


@pytest.mark.parametrize(("quantize", "bits"), [("bf16", 16), ("q8_0", 8.5)])
def test_types_and_what_lies_beside_the_file(
    tiny_base_dir: Path, tmp_path: Path, cli: Cli, quantize: str, bits: float
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base_dir, base)
    ends = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    ends.save_pretrained(base)
    run, out = run_on(base, tmp_path), tmp_path / "out"
    options = ("--adapters", run.path, "--out", out, "--as", "gguf", "--quantize", quantize)
    listed = cli("export", *options, "--dry-run", "--json")
    done = cli("export", *options)
    assert done.returncode == 0, done.stderr
    name = f"by-hand-m2-{quantize}.gguf"
    sizes = {row["file"]: row["bytes"] for row in json.loads(listed.stdout)["files"]}
    assert sizes.keys() == {name, "Modelfile", "README.md", "recipe.yaml", "parity.json"}
    assert {file.name for file in out.iterdir()} == sizes.keys()
    file = out / name
    assert sizes[name] == file.stat().st_size
    assert f"from float32 to {quantize}, rounded once" in done.stderr
    matrices = sum(
        np.prod(one.shape) for one in read_header(file).tensors.values() if len(one.shape) == 2
    )
    assert matrices * bits / 8 < file.stat().st_size < matrices * bits / 8 + 40_000

    # Two tokens end a reply: both are in the file, and in the Modelfile.
    row = exporting.parity(out)
    assert row["stop_ids"] == {"in_file": [0, 2], "missing": []}
    told = (out / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"\n' in told and 'PARAMETER stop "<pad>"\n' in told
    assert f"FROM ./{name}\n" in told and "PARAMETER num_ctx 512\n" in told
    if llama_cpp.installed():
        assert row["llama_cpp"]["not_ended_by"] == []
    again = cli("export", *options, "--json")
    assert again.returncode == 0 and json.loads(again.stdout) == row  # found, not made again


# --- what is wrong is not kept -----------------------------------------------------------------


def one_head(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.contiguous()


WRONG: dict[str, tuple[Callable[[], File], str, Any]] = {
    "queries and keys as they were": (llama, "in_pairs", one_head),
    "another rounding": (
        llama,
        "rounded",
        lambda values, kind: np.zeros_like(values).astype(np.float16),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    made, name, wrong = WRONG[what]
    file = made().write(tmp_path / "tiny.gguf")
    run = run_on(file, tmp_path, chat_template="chatml")
    monkeypatch.setattr(gguf_write, name, wrong)
    before = {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(ProofError, match="differs most"):
        export(run, tmp_path / "out", quantize="f16")
    assert {entry.name for entry in tmp_path.iterdir()} == before


def test_norms_without_their_one_and_a_forgotten_delta_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = KINDS["gemma3"]().write(tmp_path / "tiny.gguf")
    run = run_on(file, tmp_path, chat_template="chatml")
    without_llama_cpp(monkeypatch)
    gemma = gguf_write.FAMILIES["gemma3_text"]
    with monkeypatch.context() as patched:
        patched.setitem(gguf_write.FAMILIES, "gemma3_text", replace_norms(gemma))
        with pytest.raises(ProofError, match="norm"):
            export(run, tmp_path / "out", quantize="f16")
    from srlm_lite.model import merge

    whole = merge.plan
    with monkeypatch.context() as patched:
        patched.setattr(
            merge, "plan", lambda layout, stack, dtype: whole(layout, stack[:1], dtype=dtype)
        )
        with pytest.raises(ProofError, match="differs most"):
            export(run, tmp_path / "out", quantize="q8_0")
    assert not (tmp_path / "out").exists()


def replace_norms(family: Any) -> Any:
    return family._replace(norms_from_zero=False)


def test_what_llama_cpp_says_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where reading it back finds nothing: here its probabilities come from another file."""
    if not llama_cpp.installed():
        pytest.skip("xllamacpp is not installed")
    other = llama().write(tmp_path / "tiny.gguf")
    run = run_on(other, tmp_path, chat_template="chatml")
    ask = llama_cpp.ask
    base_alone = File("llama").gpt2("llama-bpe").weights(seed=9).write(tmp_path / "other.gguf")
    monkeypatch.setattr(
        llama_cpp, "ask", lambda asked: ask(replace(asked, file=str(base_alone), messages=()))
    )
    with pytest.raises(ProofError, match="nats from the file's"):
        export(run, tmp_path / "out", quantize="f16")
    assert not (tmp_path / "out").exists()


def test_a_stopped_export_goes_on_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    run = run_on(llama().write(tmp_path / "tiny.gguf"), tmp_path, chat_template="chatml")
    with monkeypatch.context() as patched:

        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(GgufExport, "_compare", stop)
        with pytest.raises(KeyboardInterrupt):
            export(run, tmp_path / "out", quantize="f16")
    assert not (tmp_path / "out").exists()
    (file,) = (tmp_path / ".out.partial").glob("*.gguf")
    stamp = file.stat().st_mtime_ns
    row = export(run, tmp_path / "out", quantize="f16")
    assert (tmp_path / "out" / row["file"]).stat().st_mtime_ns == stamp
    assert row["written_by"].startswith("gguf ") and row["llama_cpp"] is None
    assert not (tmp_path / ".out.partial").exists()


# --- what cannot be done is said before anything is written ------------------------------------


def test_what_no_file_can_say_is_refused(
    tiny_base_dir: Path, tmp_path: Path, told: Told, family_base: Callable[[str], Path]
) -> None:
    def refused(base: Path, name: str, **wish: Any) -> None:
        run = run_on(base, tmp_path / name)
        with told.refused():
            export(run, tmp_path / "out", **wish)

    refused(tiny_base_dir, "k", quantize="q4_k_m")
    refused(tiny_base_dir, "dtype", dtype="float16")
    refused(family_base("phi"), "family")
    refused(family_base("llama"), "words")  # its tokens are whole words
    config = MistralConfig.from_pretrained(tiny_base_dir)
    config.update({"model_type": "mistral", "sliding_window": 128})
    windowed = tmp_path / "mistral"
    MistralForCausalLM(config).save_pretrained(windowed)
    AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(windowed)
    refused(windowed, "window")
    assert not (tmp_path / "out").exists()


def test_options_that_would_do_nothing_are_refused(tmp_path: Path, cli: Cli, told: Told) -> None:
    there = ("export", "--adapters", tmp_path, "--out", tmp_path / "out")
    for options in (
        ("--public",),
        ("--quantize", "q8_0"),
        ("--base-id", "org/base"),
        ("--as", "adapter", "--base-id", "../base"),
        ("--as", "adapter", "--base-id", "/home/me/base"),
        ("--push-to-hub", "a b", "--dry-run"),
    ):
        done = cli(*there, *options)
        assert (done.returncode, done.stdout) == (2, "")
        told(done.stderr.strip())


def test_the_setting_names_a_directory(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    run = run_on(tiny_base_dir, tmp_path)
    monkeypatch.setenv(llama_cpp.SETTING, str(tmp_path / "nowhere"))
    with told.refused():
        export(run, tmp_path / "out")


# --- llama.cpp's own tools ---------------------------------------------------------------------


def test_a_converter_that_fails_is_told_of_and_the_package_writes(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's knows vocabularies by a table, and this one is not in it."""
    without_llama_cpp(monkeypatch)
    run = run_on(tiny_base_dir, tmp_path)
    (tmp_path / "none" / llama_cpp.CONVERTER).write_text(
        "import sys\nfrom pathlib import Path\n"
        "assert (Path(sys.argv[1]) / 'tokenizer.json').is_file()\n"
        "raise NotImplementedError('BPE pre-tokenizer was not recognized')\n"
    )
    wish = ExportWish(tmp_path / "out", form="gguf", quantize="f16")
    made = GgufExport(find_source(run.path, "last"), wish, Silent())
    row = made.make()
    assert made.fell_back == "NotImplementedError: BPE pre-tokenizer was not recognized"
    assert row["written_by"].startswith("gguf ")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {row["file"], "Modelfile", "README.md", "recipe.yaml", "parity.json"}


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["f16", "q8_0", "q4_k_m"])
def test_llama_cpps_own_tools_write_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    if TOOLS is None:
        pytest.skip(f"llama.cpp is not here (set {llama_cpp.SETTING})")
    file = File("llama").spm().weights().write(tmp_path / "tiny.gguf")
    run = run_on(file, tmp_path, chat_template="chatml")
    monkeypatch.setenv(llama_cpp.SETTING, TOOLS)
    row = export(run, tmp_path / "out", quantize=quantize)
    assert row["written_by"].startswith(llama_cpp.CONVERTER)


# --- Ollama ------------------------------------------------------------------------------------


def rendered(template: str) -> Callable[[Any, bool], str]:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)

    def render(messages: Any, generation: bool) -> str:
        return made.render(messages=messages, add_generation_prompt=generation, bos_token="<s>")

    return render


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe "
    "good.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_in_go_writes_what_ours_writes() -> None:
    assert go_template(rendered(CHATML)) == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n{{ end }}"
        "{{ range .Messages }}"
        '{{ if eq .Role "user" }}{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n<|im_start|>user\n{{ end }}'
        "{{ end }}"
    )


def test_what_the_tokenizer_puts_in_front_is_not_in_the_template() -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    for bos, start in (("<s>", "{{ if .System }}[system]"), ("", "{{ if .System }}<s>[system]")):
        made = go_template(rendered(template), bos=bos)
        assert made is not None and made.startswith(start)


@pytest.mark.parametrize(
    "template",
    [
        # It refuses a system message; Ollama would drop it.
        "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}{{ messages[0].content }}",
        # What a reply is written behind is written behind past ones otherwise.
        CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        # Past replies are left out.
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% endif %}{% endfor %}",
        # It numbers turns.
        "{% for m in messages %}{{ loop.index }}{{ m.role }}:{{ m.content }}\n{% endfor %}",
        # Go would take it for its own.
        "{% for m in messages %}{{ '{{' }}{{ m.role }}:{{ m.content }}\n{% endfor %}",
    ],
)
def test_what_go_cannot_say_is_not_said(template: str) -> None:
    assert go_template(rendered(template)) is None
    told = modelfile("m.gguf", title="M", template=None, stops=['a"b\\'], window=64)
    assert told == (
        "# M: ollama create m -f Modelfile\nFROM ./m.gguf\n"
        "# No TEMPLATE: what the chat template does cannot be said in Ollama's language.\n"
        'PARAMETER stop "a\\"b\\\\"\nPARAMETER num_ctx 64\n'
    )


def test_a_modelfile_tells_the_model_what_the_run_told_it() -> None:
    told = modelfile("m.gguf", title="M", template="x", stops=[], window=64, system="Be brief.")
    assert told.endswith('TEMPLATE """x"""\nPARAMETER num_ctx 64\nSYSTEM """Be brief."""\n')
