"""A base's tokenizer gives the ids of its own `tokenizer.json`, whatever class transformers picks.

transformers 5.17.0 opens what `tokenizer_class` names, or what it has for the model type, and some
of these classes cut text by rules of their own (models/auto/tokenization_auto.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

from srlm_lite.errors import UserError
from srlm_lite.model.base import load_base
from srlm_lite.model.tokenizer import SAMPLES, open_tokenizer
from srlm_lite.settings import Base

TEXT = "of the 123"


def byte_level(split: str | None = None) -> Tokenizer:
    """All bytes, " the" and two digits at once; `split` cuts text first."""
    vocabulary = {letter: at for at, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("2", "0")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        first = pre_tokenizers.Split(Regex(split), "isolated")
        cut = pre_tokenizers.Sequence([first, cut])
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    return tokenizer


def as_llama_2() -> Tokenizer:
    """As files made from SentencePiece are: a mark for spaces, one before the text, and bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ofthe123"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def folder_of(place: Path, tokenizer: Tokenizer, model_type: str, name: str | None) -> Path:
    """A directory as a base's: its tokenizer, and the class that it names for it."""
    place.mkdir()
    tokenizer.save(str(place / "tokenizer.json"))
    named = {} if name is None else {"tokenizer_class": name}
    (place / "tokenizer_config.json").write_text(json.dumps(named))
    (place / "config.json").write_text(json.dumps({"model_type": model_type}))
    return place


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_byte_level_file_named_a_llama_tokenizer_keeps_its_spaces(
    model_type: str, tmp_path: Path
) -> None:
    """As DeepSeek-R1's distillations name theirs."""
    own = byte_level()
    folder = folder_of(tmp_path / "base", own, model_type, "LlamaTokenizerFast")
    plain = AutoTokenizer.from_pretrained(str(folder))
    assert plain.decode(plain(TEXT).input_ids) == "ofthe123"  # else this test shows nothing
    opened = open_tokenizer(str(folder))
    assert opened(TEXT).input_ids == own.encode(TEXT).ids
    assert all(opened.decode(opened(text).input_ids) == text for text in SAMPLES)


def test_so_do_the_tokenizer_of_a_whole_base_and_the_one_that_it_is_exported_with(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_dir, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_base(Base(name=str(folder))).tokenizer
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == own.encode(TEXT).ids
    tokenizer.save_pretrained(str(tmp_path / "exported"))
    shutil.copy(folder / "config.json", tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(str(tmp_path / "exported"))
    assert exported(TEXT, add_special_tokens=False).input_ids == own.encode(TEXT).ids


def test_what_transformers_would_open_otherwise_after_the_export_is_refused(tmp_path: Path) -> None:
    """For the model type qwen2 it takes Qwen's way of cutting, which parts digits."""
    folder = folder_of(tmp_path / "base", byte_level(r"\d+|\D+"), "qwen2", "PreTrainedTokenizer")
    with pytest.raises(UserError, match=r"a Qwen2Tokenizer for the model type qwen2.*read wrong"):
        open_tokenizer(str(folder))


def test_qwens_own_way_of_cutting_is_no_other(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", byte_level(), "qwen2", None)
    plain = AutoTokenizer.from_pretrained(str(folder))
    plain.save_pretrained(str(tmp_path / "own"))
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "own")
    assert type(open_tokenizer(str(tmp_path / "own"))) is type(plain)


def test_a_llama_tokenizer_stays_one(tmp_path: Path) -> None:
    own = as_llama_2()
    folder = folder_of(tmp_path / "base", own, "llama", "LlamaTokenizerFast")
    opened = open_tokenizer(str(folder))
    assert isinstance(opened, LlamaTokenizer)
    assert opened(TEXT, add_special_tokens=False).input_ids == own.encode(TEXT).ids
