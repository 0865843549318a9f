"""Names of layers, told without torch: none that a base has is refused, and typos are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, _config
from messages import Told
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from srlm_lite.model.gguf_config import _FAMILIES
from srlm_lite.model.layer_names import (
    MODEL_TYPES,
    SAME_NAMES,
    layers_in_files,
    layers_in_gguf,
    names_in_code,
    refuse_absent_layers,
    refuse_names_unknown_to,
)
from srlm_lite.model.targets import adaptable
from srlm_lite.model.whereabouts import smollm2_file
from srlm_lite.recipe import load_recipe
from srlm_lite.settings import Base

DENSE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def base_like(folder: Path, **settings: object) -> Path:
    """The tiny base, with something else in its configuration."""
    source = Path(load_recipe("tiny").base.name)
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def test_which_layers_a_base_has_is_told_by_its_files_where_they_call_them_as_memory_does(
    tmp_path: Path,
) -> None:
    """And by no others: a Mixture's files name each expert, which memory has not."""
    assert not [kind for kind in SAME_NAMES if get_checkpoint_conversion_mapping(kind)]
    assert layers_in_files(Path(load_recipe("tiny").base.name)) == {*DENSE, "lm_head"}
    assert layers_in_files(base_like(tmp_path / "mixture", model_type="mixtral")) is None
    torn = base_like(tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"\xff" * 20)
    assert layers_in_files(torn) is None and names_in_code(torn)[0] is None
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + b"\xff" * 20)
    assert layers_in_gguf(tmp_path / "torn.gguf") is None
    if (file := smollm2_file()) is not None:
        assert layers_in_gguf(file) == {*DENSE, "lm_head"}


@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_of_any_family_is_missed_whatever_its_files_call_it(
    name: str, tmp_path: Path
) -> None:
    family, hf = FAMILIES[name], transformers
    config = _config(family, hf)
    kind = hf.AutoModelForImageTextToText if family.vision else hf.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    config.save_pretrained(tmp_path)
    header = json.dumps({"a": {"shape": [2, 2], "dtype": "F32", "data_offsets": [0, 0]}}).encode()
    file = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(file)
    possible, proposed = names_in_code(tmp_path)
    assert possible is not None and not proposed  # the file has none of its tensors
    assert {name.rpartition(".")[2] for name in adaptable(model)} <= possible
    assert {"q_porj", "embed_tokens"}.isdisjoint(possible)


def test_a_typo_is_refused_in_a_family_whose_files_have_other_names(
    told: Told, tmp_path: Path
) -> None:
    base = base_like(tmp_path / "base", model_type="qwen3_moe")
    with told.refused():
        refuse_absent_layers(Base(name=str(base)), ["q_proj", "q_porj"])
    assert refuse_absent_layers(Base(name=str(base)), ["q_proj", "self_attn.o_proj", "0"])
    for kind in ("llama", "mixtral"):
        with told.refused():
            refuse_names_unknown_to(kind, ["q_proj", "q_porj"])
        refuse_names_unknown_to(kind, ["q_proj", "self_attn.o_proj", "lm_head"])
    refuse_names_unknown_to("no_family", ["q_porj"])


@pytest.mark.parametrize("settings", [{"model_type": "no_family"}, {"auto_map": {}}])
def test_where_the_code_is_not_known_nothing_is_told(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    """Other checks ask again when the base is loaded."""
    base = base_like(tmp_path / "base", **{"model_type": "mixtral", **settings})
    assert not refuse_absent_layers(Base(name=str(base)), ["q_porj"])


def test_architectures_of_gguf_are_those_that_are_served() -> None:
    assert {name: one.model_type for name, one in _FAMILIES.items()} == MODEL_TYPES
