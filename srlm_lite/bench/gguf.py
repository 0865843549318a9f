"""llama.cpp on exported GGUF files, beside the stack: which of two tells the same next token.

Twenty questions, and thirty tokens that the stack answers greedily in float32. At each of these 600
places three are asked for the most probable token, all after the same ids:

    stack       base and adapters, in float32
    as read     the file's weights, computed in float32: what its type alone costs
    llama.cpp   the file, as llama.cpp computes it
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from srlm_lite.bench.workload import PROMPTS
from srlm_lite.errors import UserError
from srlm_lite.export import llama_cpp
from srlm_lite.export.source import PROMPTS as FEW
from srlm_lite.model import parity
from srlm_lite.model.base import load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.checkpoint import Checkpoint
from srlm_lite.model.gguf_read import GgufModel
from srlm_lite.model.gguf_vocabulary import vocabulary_keys
from srlm_lite.model.gguf_write import TYPES, GgufFile
from srlm_lite.model.layout import Layout
from srlm_lite.model.merge import Weights, plan
from srlm_lite.model.stack import Adapter, fuse
from srlm_lite.progress import Reporter
from srlm_lite.settings import Base

hf: Any = transformers

QUESTIONS = (*PROMPTS, *FEW)
TOKENS = 30
K_TYPE = "q4_k_m"


def bench_gguf(
    folder: Path, adapters: Sequence[Path], scratch: Path, reporter: Reporter
) -> dict[str, Any] | None:
    """Measure every type that can be written here; None: the base has no tokenizer, or is none that
    a GGUF file is proven for.

    Args:
        folder: The base's files.
        scratch: A directory that may be filled.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    base = load_base(Base(name=str(folder), dtype="float32", device="cpu"))
    stack = [Adapter.load(path) for path in adapters]
    try:
        chat = ChatFormat.of(base)
        write = _Writing(folder, base, chat, stack)
    except UserError:
        return None
    texts, starts = _answers(base.model, chat, stack)
    contexts = [
        text[:at]
        for text, start in zip(texts, starts, strict=True)
        for at in range(start, len(text))
    ]
    quantizer = llama_cpp.found(llama_cpp.QUANTIZER)
    kinds = [*TYPES, *([K_TYPE] if quantizer is not None else [])]
    task = reporter.start("gguf", len(kinds), "types")
    right = _next(
        parity.logits(write.model, Weights(write.layout).read, texts, stacks=[stack])[0],
        texts,
        starts,
    )
    types = {}
    for kind in kinds:
        task.note(kind)
        file, begin = scratch / f"{kind}.gguf", time.monotonic()
        if kind in TYPES:
            write.file(kind).write(file, write.weights)
        else:
            tool: Any = quantizer
            llama_cpp.quantize(tool, scratch / "f16.gguf", file, kind)
        seconds = time.monotonic() - begin
        read = GgufModel(file)
        (found,) = parity.logits(read.model, read.read, texts)
        types[kind] = {
            "bytes": file.stat().st_size,
            "write_s": seconds,
            "read": _beside(right, _next(found, texts, starts)),
            "llama_cpp": _llama_cpp(file, contexts, right),
        }
        task.advance()
    return {"prompts": len(texts), "tokens": len(contexts), "types": types}


class _Writing:
    """The stack as GGUF files."""

    def __init__(self, folder: Path, base: Any, chat: ChatFormat, stack: list[Adapter]) -> None:
        from srlm_lite.model.base import skeleton

        self.model, tokenizer = skeleton(folder)
        self.layout = Layout(Checkpoint(folder), self.model)
        self.weights = Weights(self.layout)
        self._plan = plan(self.layout, stack, dtype=torch.float32)
        self._keys = vocabulary_keys(
            tokenizer,
            rows=base.model.config.vocab_size,
            ends=chat.stop_ids,
            last=chat.end_id,
            template=chat.portable_template,
        )
        self.file("f16")

    def file(self, kind: str) -> GgufFile:
        return GgufFile(
            self.layout, self.model, self._plan, kind, vocabulary=self._keys, general={}
        )


def _answers(
    model: Any, chat: ChatFormat, stack: Sequence[Adapter]
) -> tuple[list[list[int]], list[int]]:
    """Prompts with what the stack answers greedily, and where each answer begins."""
    fused = fuse(stack)
    with torch.inference_mode():
        for module, (a, b) in fused.factors.items():
            model.get_submodule(module).weight.add_(fused.scaling * (b @ a))
        texts, starts = [], []
        for question in QUESTIONS:
            ids = chat.prompt_ids(question)
            out = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=chat.pad_id,
            )
            texts.append(out[0].tolist())
            starts.append(len(ids))
    return texts, starts


def _next(logits: Tensor, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
    """The logits that an answer's tokens are chosen by, from those of whole texts."""
    parts = torch.split(logits, [len(text) for text in texts])
    return torch.cat([part[start - 1 : -1] for part, start in zip(parts, starts, strict=True)])


def _beside(right: Tensor, found: Tensor) -> dict[str, float]:
    apart = parity.compare(right, found)
    return {"top1_agreement": apart.top1_agreement, "mean_kl": apart.mean_kl}


def _llama_cpp(
    file: Path, contexts: Sequence[Sequence[int]], right: Tensor
) -> dict[str, float] | None:
    """llama.cpp's most probable tokens beside the stack's; None: it is not installed."""
    if not llama_cpp.installed():
        return None
    begin = time.monotonic()
    answer = llama_cpp.ask(
        llama_cpp.Asking(str(file), contexts=contexts, threads=torch.get_num_threads())
    )
    seconds = time.monotonic() - begin
    pairs = zip(answer.likely, right.argmax(-1).tolist(), strict=True)
    agreed = sum(likely[0][0] == token for likely, token in pairs)
    return {"top1_agreement": agreed / len(contexts), "seconds": seconds}
