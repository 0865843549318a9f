"""GGUF files: tokens, keys and tensors, held against the file's own words and against llama.cpp.

Versions seen: llama.cpp as of xllamacpp 2026.10.11549, transformers 5.17.0, gguf 0.19.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import (
    HEAD_WIDTH,
    HIDDEN,
    LAYERS,
    TEXT,
    File,
    llama_cpp,
    sentencepiece,
)

from srlm_lite.errors import UserError
from srlm_lite.model import gguf as gguf_module
from srlm_lite.model.base import (
    LoadedBase,
    base_files,
    load_base,
    read_config,
    spoken_here,
)
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.companions import write_tokenizer
from srlm_lite.model.gguf_header import read_header
from srlm_lite.model.gguf_splits import SPLITS
from srlm_lite.model.gguf_tokenizer import build_tokenizer, read_vocabulary
from srlm_lite.model.whereabouts import SMOLLM2, smollm2_file
from srlm_lite.progress import Silent
from srlm_lite.recipe import load_recipe
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session, refuse_unreadable_base
from srlm_lite.settings import Base


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRLM_LITE_CACHE", str(tmp_path / "cache"))


def load(made: File, folder: Path) -> tuple[Path, LoadedBase]:
    file = made.write(folder / "tiny.gguf")
    return file, load_base(Base(name=str(file), dtype="float32"))


def refusal(made: File, folder: Path) -> str:
    file = made.write(folder / "tiny.gguf")
    with pytest.raises(UserError) as caught:
        load_base(Base(name=str(file)))
    line = str(caught.value)
    assert "\n" not in line
    assert "tiny.gguf" in line
    return line


def spelled(base: LoadedBase, text: str) -> list[str]:
    tokenizer: Any = base.tokenizer
    return [
        tokenizer.decode([token]) for token in tokenizer(text, add_special_tokens=False).input_ids
    ]


def llama(pre: str | None = "llama-bpe", **keys: Any) -> File:
    return File("llama").gpt2(pre, **keys).weights()


def numbers(pre: str) -> File:
    """Its only merges are of 1234."""
    made = llama(pre)
    tokens = [token for token in made.tokenizer["tokens"] if len(token) == 1]
    made.tokenizer["tokens"] = ["<|end|>", "<|begin|>", *tokens, "12", "123", "1234"]
    made.tokenizer["token_type"] = [3, 3, *[1] * (len(tokens) + 3)]
    made.tokenizer["merges"] = ["1 2", "12 3", "123 4"]
    return made.weights()


def gemma3(**keys: Any) -> File:
    return File("gemma3").spm(add_space_prefix=False).set(**keys).weights()


# The tokenizer


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["123", "4"]),  # at most three digits
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("gpt-2", ["1234"]),
    ],
)
def test_digits_are_cut_as_the_file_says(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    assert spelled(load(numbers(pre), tmp_path)[1], "1234") == pieces


def test_a_word_that_is_a_token_needs_no_merges_where_the_model_has_it_so(tmp_path: Path) -> None:
    made = llama("llama-bpe")
    made.tokenizer["tokens"].append("qzqz")
    made.tokenizer["token_type"].append(1)
    assert spelled(load(made.weights(), tmp_path)[1], "qzqz") == ["qzqz"]


@pytest.mark.parametrize(
    ("made", "added"),
    [
        (lambda: llama("llama-bpe"), True),  # llama.cpp's default for it
        (lambda: llama("llama-bpe", add_bos_token=False), False),
        (lambda: llama("smollm"), False),
        (lambda: llama("smollm", add_bos_token=True), True),
        (lambda: File("llama").spm().weights(), True),
        (lambda: File("llama").spm(add_bos_token=False).weights(), False),
    ],
)
def test_bos_stands_in_front_where_the_file_says(
    tmp_path: Path, made: Callable[[], File], added: bool
) -> None:
    _, base = load(made(), tmp_path)
    tokenizer: Any = base.tokenizer
    assert (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) == added


def test_scores_say_what_merges_first(tmp_path: Path) -> None:
    """`ab` before `bc`, although `bc` stands first in the vocabulary."""
    made = File("llama").spm(add_space_prefix=False)
    rows = {"\u2581": -8.0, "a": -9.0, "b": -10.0, "c": -11.0, "bc": -2.0, "ab": -1.0}
    kept = [at for at, kind in enumerate(made.tokenizer["token_type"]) if kind != 1]
    for name in ("tokens", "scores", "token_type"):
        made.tokenizer[name] = [made.tokenizer[name][at] for at in kept]
    made.tokenizer["tokens"] += rows
    made.tokenizer["scores"] += rows.values()
    made.tokenizer["token_type"] += [1] * len(rows)
    _, base = load(made.weights(), tmp_path)
    assert spelled(base, "abc") == ["ab", "c"]
    assert spelled(base, "bc") == ["bc"]
    assert base.tokenizer("\u00e9", add_special_tokens=False).input_ids == [3 + 0xC3, 3 + 0xA9]
    assert spelled(base, "a\n\nb<tool>") == ["a", "\n\n", "b", "<tool>"]


def test_every_end_that_the_file_names_ends_a_reply(tmp_path: Path) -> None:
    made = llama("llama-bpe", eot_token_id=5)
    assert load(made, tmp_path)[1].eos_ids == (0, 5)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_a_file_is_spoken_to_before_anything_is_converted(kind: str, tmp_path: Path) -> None:
    made = (
        llama("llama-bpe", eot_token_id=5)
        if kind == "byte level"
        else File("llama").spm().weights()
    )
    file = made.write(tmp_path / "tiny.gguf")
    section = Base(name=str(file), dtype="float32")
    found = spoken_here(section)
    assert found is not None and not list(tmp_path.glob("cache/gguf-*"))
    base = load_base(section)
    assert found[1] == base.eos_ids
    for text in (TEXT, " a", "<tool>"):
        assert found[0](text).input_ids == base.tokenizer(text).input_ids
    assert found[0].pad_token_id == base.tokenizer.pad_token_id
    assert spoken_here(section, conversion=1) is None  # whose tokenizer was another one


def test_the_saved_tokenizer_is_a_byte_level_one(tmp_path: Path) -> None:
    """llama.cpp's converter takes byte_fallback, with a sequence to decode, for SentencePiece, and
    then makes a vocabulary without merges."""
    file, _ = load(llama("smollm"), tmp_path)
    folder = base_files(Base(name=str(file))).folder
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert saved["decoder"]["type"] == "ByteLevel"
    assert not saved["model"]["byte_fallback"]
    assert len(saved["model"]["merges"]) == len(llama("smollm").tokenizer["merges"])


def test_a_vocabulary_of_sentencepiece_comes_with_its_model(tmp_path: Path) -> None:
    """llama.cpp's converter has the scores from there alone."""
    from sentencepiece import SentencePieceProcessor

    file, base = load(File("llama").spm().weights(), tmp_path)
    model = SentencePieceProcessor()
    model.Load(str(base_files(Base(name=str(file))).folder / "tokenizer.model"))
    pieces, scores, _ = sentencepiece(lines=False)
    assert [model.IdToPiece(token) for token in range(len(pieces))] == pieces
    assert [model.GetScore(token) for token in range(len(pieces))] == pytest.approx(scores)
    plain = TEXT.replace("<tool>", "")
    assert model.EncodeAsIds(plain) == base.tokenizer(plain, add_special_tokens=False).input_ids


def test_an_export_carries_the_scores_too(tmp_path: Path) -> None:
    file, base = load(File("llama").spm().weights(), tmp_path)
    write_tokenizer(tmp_path, base.tokenizer, ChatFormat.of(base, template="plain"))
    own = base_files(Base(name=str(file))).folder
    for name in ("tokenizer.model", "added_tokens.json"):
        assert (tmp_path / name).read_bytes() == (own / name).read_bytes()
    assert "<tool>" in json.loads((tmp_path / "added_tokens.json").read_text())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"pre": "perceptron"}, "tokenizer.ggml.pre is perceptron"),
        ({"model": "t5"}, "of the kind t5"),
        ({"model": "bert"}, "of the kind bert"),
        ({"precompiled_charsmap": [1, 2, 3]}, "tokenizer.ggml.precompiled_charsmap"),
        ({"token_type": [1, 1]}, "types of them"),
        ({"merges": ["a zz"]}, "'a zz'"),
    ],
)
def test_a_vocabulary_that_cannot_be_followed_is_refused(
    tmp_path: Path, keys: dict[str, Any], told: str
) -> None:
    made = llama()
    made.tokenizer |= keys
    assert told in refusal(made, tmp_path)


def test_scores_that_leave_open_what_merges_first_are_refused(tmp_path: Path) -> None:
    made = File("llama").spm()
    made.tokenizer["scores"] = [0.0] * len(made.tokenizer["tokens"])
    assert "same score" in refusal(made.weights(), tmp_path)


def test_a_token_twice_is_refused(tmp_path: Path) -> None:
    made = llama()
    made.tokenizer["tokens"][-1] = made.tokenizer["tokens"][-2]
    assert "two of its tokens" in refusal(made, tmp_path)


def test_a_class_of_the_library_that_cuts_otherwise_is_refused(tmp_path: Path) -> None:
    """transformers 5.17 opens every tokenizer beside a Qwen2 as Qwen2's, with its own pattern."""
    assert "Qwen2Tokenizer" in refusal(File("qwen2").gpt2("gpt-2").weights(), tmp_path)


# Keys and tensors


def frequencies(base: LoadedBase) -> torch.Tensor:
    rotary: Any = base.model.model.rotary_emb
    return rotary.inv_freq.double()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("factor", "context", "low", "high"),
    [(8.0, 8192, 1.0, 4.0), (32.0, 8192, 1.0, 4.0), (5.0, 1000, 2.0, 9.0), (6.0, 700, 1.0, 4.0)],
)
def test_frequencies_are_divided_by_the_files_own_numbers(
    tmp_path: Path, factor: float, context: int, low: float, high: float
) -> None:
    made = llama().divided(factor, context=context, low=low, high=high)
    plain = 10000.0 ** -(np.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
    wanted = plain / made.tensors["rope_freqs.weight"]
    found = frequencies(load(made, tmp_path)[1])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-4)


def test_other_divisors_are_refused(tmp_path: Path) -> None:
    made = llama()
    made.tensors["rope_freqs.weight"] = np.linspace(1, 7, HEAD_WIDTH // 2).astype(np.float32)
    assert "rope_freqs.weight does not follow" in refusal(made, tmp_path)


def test_gemmas_scaling_is_of_the_layers_that_see_all(tmp_path: Path) -> None:
    made = gemma3(rope__scaling__type="linear", rope__scaling__factor=8.0, rope__freq_base=1e6)
    settings = read_config(Base(name=str(made.write(tmp_path / "tiny.gguf"))))
    assert settings.rope_parameters["full_attention"]["factor"] == 8
    assert settings.rope_parameters["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize(("layers", "scalar"), [(LAYERS, HEAD_WIDTH), (62, 168)])
def test_gemmas_27b_divides_by_width_and_heads(tmp_path: Path, layers: int, scalar: int) -> None:
    made = gemma3(embedding_length=5376, attention__head_count=32, block_count=layers)
    settings = read_config(Base(name=str(made.write(tmp_path / "tiny.gguf"))))
    assert settings.query_pre_attn_scalar == scalar


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"rope__scaling__type": "dynamic", "rope__scaling__factor": 2.0}, "type is dynamic"),
        ({"rope__scaling__type": "longrope"}, "longrope lacks factors"),
        ({"rope__scaling__attn_factor": 1.2}, "attn_factor"),
        ({"rope__scaling__alpha": 1000.0}, "llama.rope.scaling.alpha"),
        ({"rope__dimension_count": 16}, "16 of 32 dimensions"),
        ({"logit_scale": 0.25}, "llama.logit_scale"),
        ({"attention__scale": 0.1}, "llama.attention.scale"),
        ({"attention__causal": False}, "not causal"),
        ({"attention__value_length": 16}, "differ in width"),
        ({"attention__head_count_kv": [1, 1, 2, 1]}, "from layer to layer"),
        ({"expert_count": 8, "expert_used_count": 2}, "llama.expert_count"),
        ({"attention__sliding_window": 128}, "llama.attention.sliding_window"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused(
    tmp_path: Path, keys: dict[str, Any], told: str
) -> None:
    assert told in refusal(llama().set(**keys), tmp_path)


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path: Path) -> None:
    made = llama()
    made.tensors["blk.1.attn_q_norm.weight"] = np.ones(HEAD_WIDTH, np.float32)
    assert "blk.1.attn_q_norm.weight" in refusal(made, tmp_path)


def test_a_part_of_a_file_is_refused(tmp_path: Path) -> None:
    made = llama()
    made.general["split.count"] = 3
    assert "one part of 3" in refusal(made, tmp_path)


# Runs of the first conversion


class _Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_run_keeps_the_conversion_that_it_began_with(tmp_path: Path) -> None:
    file = numbers("smollm").write(tmp_path / "tiny.gguf")
    recipe = load_recipe("tiny", [f"base.name={file}", "base.chat_template=chatml"])
    for began, conversion in (("now", 2), ("before", 1)):
        run, heard = RunDir(tmp_path / began), _Heard()
        run.path.mkdir()
        if began == "before":  # as commit 513090d noted it
            source = base_files(recipe.base, conversion=1).source
            del source["conversion"]
            run.base_json.write_text(json.dumps(source))
        base = Session(recipe, run, heard).base
        assert run.base_conversion == base.source["conversion"] == conversion
        # The first took GPT-2's split for all.
        assert spelled(base, "1234") == (["1234"] if conversion == 1 else list("1234"))
        assert any("first conversion" in line for line in heard.warnings) == (conversion == 1)
    assert json.loads((tmp_path / "now" / "base.json").read_text())["conversion"] == 2


def test_a_run_is_refused_before_it_begins_and_an_earlier_one_goes_on(tmp_path: Path) -> None:
    file = llama().set(logit_scale=0.25).write(tmp_path / "tiny.gguf")
    recipe, run = load_recipe("tiny", [f"base.name={file}"]), RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=r"llama\.logit_scale"):
        refuse_unreadable_base(recipe, run)
    assert not run.path.exists()
    run.path.mkdir()
    source = base_files(recipe.base, conversion=1).source
    run.base_json.write_text(json.dumps({**source, "conversion": 1}))
    refuse_unreadable_base(recipe, run)
    assert Session(recipe, run).run.base_conversion == 1


def test_conversions_do_not_share_a_folder(tmp_path: Path) -> None:
    file = llama("smollm").write(tmp_path / "tiny.gguf")
    first, second = (base_files(Base(name=str(file)), conversion=n).folder for n in (1, 2))
    assert first != second
    assert gguf_module.CONVERSION == 2


# llama.cpp

KINDS: dict[str, Callable[[], File]] = {
    "llama-bpe": lambda: llama().divided(8.0, context=700, low=1.0, high=4.0),
    "smollm, linear": lambda: llama("smollm").set(
        rope__scaling__type="linear", rope__scaling__factor=4.0
    ),
    "SentencePiece": lambda: File("llama").spm().weights(),
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
    "gemma3": lambda: gemma3(
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
        rope__freq_base=1e6,
        attention__sliding_window=48,
        attention__sliding_window_pattern=2,
    ),
    "phi3, longrope": lambda: _longrope(File("phi3").spm().weights()),
    "lfm2": lambda: (
        File("lfm2")
        .gpt2("lfm2")
        .set(attention__head_count_kv=[0, 0, 1, 0], shortconv__l_cache=3)
        .weights()
    ),
    "qwen35": lambda: (
        File("qwen35")
        .gpt2("qwen35")
        .set(
            rope__dimension_count=16,
            rope__dimension_sections=[4, 2, 2, 0],
            full_attention_interval=4,
            ssm__conv_kernel=4,
            ssm__state_size=16,
            ssm__group_count=2,
            ssm__time_step_rank=4,
            ssm__inner_size=64,
            # transformers normalises keys and queries of the delta rule with 1e-6 in any case.
            attention__layer_norm_rms_epsilon=1e-6,
        )
        .weights()
    ),
    "qwen3moe": lambda: File("qwen3moe").gpt2("qwen2").set(**EXPERTS).weights(),
    "qwen2moe": lambda: (
        File("qwen2moe")
        .gpt2("qwen2")
        .set(**EXPERTS, expert_shared_feed_forward_length=HIDDEN)
        .weights()
    ),
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": HIDDEN}


def _longrope(made: File) -> File:
    half = HEAD_WIDTH // 2
    made.tensors["rope_factors_long.weight"] = np.linspace(1, 9, half).astype(np.float32)
    made.tensors["rope_factors_short.weight"] = np.linspace(1, 2, half).astype(np.float32)
    return made.set(rope__scaling__original_context_length=2048, rope__scaling__attn_factor=1.19)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_logits_are_llama_cpps(tmp_path: Path, kind: str) -> None:
    """On real text, and at 64 to 1,024 tokens.

    llama.cpp looks GELU up in float16, which moves unlikely tokens of a Gemma by thousandths of a
    nat. Its Qwen3.5 goes to .01 with the length, from both of transformers' rules, in chunks and
    token by token, which are within 2e-5 of each other.
    """
    pytest.importorskip("xllamacpp")
    file, base = load(KINDS[kind](), tmp_path)
    tokenizer: Any = base.tokenizer
    # transformers' SDPA drops Gemma 2's soft caps of attention.
    base.model.set_attn_implementation("eager" if kind == "gemma2" else "sdpa")
    rows = base.model.config.vocab_size
    ids = np.random.default_rng(1).integers(3, rows, 1024).tolist()
    with llama_cpp(file) as reference:
        for bos in (False, True):
            assert tokenizer(TEXT, add_special_tokens=bos).input_ids == reference.ids(TEXT, bos=bos)
        with torch.no_grad():
            logits = {n: base.model(torch.tensor([ids[:n]])).logits[0, -1] for n in (64, 256, 1024)}
        for length, ours in logits.items():
            found = torch.log_softmax(ours.double(), -1).numpy()
            wanted = reference.log_probabilities(ids[:length], rows)
            divergence = float((np.exp(wanted) * (wanted - found)).sum())
            assert abs(divergence) < 1e-5, (length, divergence)
            bound = 2e-2 if kind == "qwen35" else 5e-3 if "gemma" in kind else 1e-3
            assert np.abs(wanted - found).max() < bound, length


@pytest.mark.parametrize("pre", sorted({split: name for name, split in SPLITS.items()}.values()))
def test_every_split_is_llama_cpps(tmp_path: Path, pre: str) -> None:
    pytest.importorskip("xllamacpp")
    file = llama(pre).write(tmp_path / "tiny.gguf")
    tokenizer = build_tokenizer(read_vocabulary(read_header(file)))
    with llama_cpp(file) as reference:
        assert tokenizer(TEXT).input_ids == reference.ids(TEXT, bos=True)


def test_smollm2s_ids_and_logits_are_llama_cpps(smollm2: LoadedBase, shared_data: Path) -> None:
    pytest.importorskip("xllamacpp")
    file = smollm2_file()
    assert file is not None
    lines = (shared_data / "oasst2_quality.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [
        value for line in lines for value in json.loads(line).values() if isinstance(value, str)
    ]
    texts = [TEXT, *(text for text in texts if len(text) > 100)][:400]
    tokenizer: Any = smollm2.tokenizer
    rows = smollm2.model.config.vocab_size
    ids = tokenizer(" ".join(texts[:20])).input_ids
    with llama_cpp(file) as reference:
        for text in texts:
            assert tokenizer(text).input_ids == reference.ids(text, bos=True)
        with torch.no_grad():
            logits = smollm2.model(torch.tensor([ids[:256]])).logits[0]
        for length in (64, 256):
            found = torch.log_softmax(logits[length - 1].double(), -1).numpy()
            wanted = reference.log_probabilities(ids[:length], rows)
            divergence = float(np.nansum(np.exp(wanted) * (wanted - found)))
            # llama.cpp rounds the activations that meet 4-bit weights to 8 bits.
            assert abs(divergence) < 0.02, (length, divergence)
            assert int(found.argmax()) == int(np.nanargmax(wanted))


def test_smollm2_cuts_digits_apart(smollm2: LoadedBase) -> None:
    assert smollm2.source["name"] == SMOLLM2
    assert spelled(smollm2, "\n\n2024") == ["\n\n", "2", "0", "2", "4"]
