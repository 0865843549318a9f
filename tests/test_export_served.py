"""Servers of others answer from an export what the stack answers, asked over HTTP.

vLLM has a file of its own, `test_export_vllm.py`.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from chat_server import transformers_serve
from exporting import TARGETS, make_run, random_adapter
from gguf_files import llama_cpp

from srlm_lite.export.export import Export, ExportWish
from srlm_lite.export.gguf import GgufExport
from srlm_lite.export.source import PROMPTS, FinishedModel, find_source
from srlm_lite.model.base import load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Slot
from srlm_lite.progress import Silent

TOKENS = 12


@pytest.fixture(scope="module")
def source(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedModel:
    adapters = [random_adapter(tiny_base_dir, seed=seed) for seed in (0, 1)]
    path = tmp_path_factory.mktemp("served") / "run"
    return find_source(make_run(path, tiny_base_dir, adapters=adapters, dtype="float32").path, "1")


@pytest.fixture(scope="module")
def answers(source: FinishedModel) -> list[list[int]]:
    """What the stack answers, greedily, up to and without what ends a reply."""
    base = load_base(source.recipe.base)
    chat = ChatFormat.of(base)
    slot = Slot(base.model, targets=TARGETS, rank=8)
    slot.load(source.stack())
    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([chat.prompt_ids(prompt)])
        out = slot.model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        said.append(new[:-1] if new[-1] in chat.stop_ids else new)
    return said


@pytest.mark.slow
def test_transformers_serve(
    source: FinishedModel, answers: list[list[int]], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    Export(source, ExportWish(out), Silent()).make()
    tokenizer = AutoTokenizer.from_pretrained(out)
    with transformers_serve(out) as url:
        for prompt, ids in zip(PROMPTS, answers, strict=True):
            body = {
                "model": str(out),
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": TOKENS,
                "temperature": 0,
            }
            said = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()
            text = said["choices"][0]["message"]["content"]
            assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_llama_cpps_server(source: FinishedModel, answers: list[list[int]], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    wish = ExportWish(tmp_path / "out", form="gguf", quantize="f16")
    row = GgufExport(source, wish, Silent()).make()
    with llama_cpp(tmp_path / "out" / row["file"]) as server:
        for prompt, ids in zip(PROMPTS, answers, strict=True):
            messages = [{"role": "user", "content": prompt}]
            text = server.post("/apply-template", messages=messages)["prompt"]
            said = server.post(
                "/completion", prompt=text, n_predict=TOKENS, temperature=-1.0, return_tokens=True
            )
            assert said["tokens"][: len(ids)] == ids
            assert len(said["tokens"]) <= len(ids) + 1  # what ends it, where it ended
            assert (said["stop_type"] == "eos") == (len(ids) < TOKENS)
