"""vLLM serves what `export` writes: merged weights, and the stack as one LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exporting import make_run, random_adapter

from srlm_lite.export.export import Export, ExportWish
from srlm_lite.export.source import find_source
from srlm_lite.progress import Silent
from srlm_lite.shipped import recipes_dir

pytestmark = pytest.mark.vllm

SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

def main():
    model, lora, rank, ids = json.loads(sys.argv[1])
    options = {"enable_lora": True, "max_lora_rank": rank} if lora else {}
    llm = LLM(model=model, dtype="float32", max_model_len=128, enforce_eager=True,
              max_num_seqs=4, **options)
    limits = SamplingParams(temperature=0, max_tokens=12)
    request = LoRARequest("stack", 1, lora) if lora else None
    [out] = llm.generate([{"prompt_token_ids": ids}], limits, lora_request=request)
    print("IDS", json.dumps(list(out.outputs[0].token_ids)))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_vllm_answers_as_the_stack(tmp_path: Path, form: str) -> None:
    """On the toy base: the noise base's heads are too narrow for vLLM's kernels."""
    from srlm_lite.model.base import load_base
    from srlm_lite.model.stack import Slot

    toy = recipes_dir() / "toy" / "base"
    adapters = [random_adapter(toy, seed=seed, rank=8, size=0.02) for seed in (0, 1)]
    run = make_run(tmp_path / "run", toy, adapters=adapters, dtype="float32")
    source = find_source(run.path, "last")
    out = tmp_path / "out"
    Export(source, ExportWish(out, form=form), Silent()).make()  # type: ignore[arg-type]

    import torch

    ids = [5, 17, 99, 3, 42, 25, 7, 7, 61, 12]
    base = load_base(source.recipe.base)
    slot = Slot(base.model, targets=("q_proj", "v_proj", "down_proj"), rank=16)
    slot.load(source.stack())
    expected = slot.model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False
    )[0, len(ids) :].tolist()

    model = str(out if form == "merged" else toy)
    lora = str(out) if form == "adapter" else None
    (tmp_path / "serve.py").write_text(SERVE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "serve.py"), json.dumps([model, lora, 16, ids])],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    found = next((line for line in done.stdout.splitlines() if line.startswith("IDS")), None)
    assert found is not None, done.stderr[-2000:]
    assert json.loads(found.removeprefix("IDS ")) == expected
