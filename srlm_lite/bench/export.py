"""Export beside PEFT's merge and save: seconds, peak memory, and what is left of the update.

Every way gets the same base and the same two adapters, an anchor and a delta of random weights.
Their updates together are a given share of each weight's norm. Each way has its own process.

    copy   the base's files, copied and flushed to the disk: what no export can do without
    ours   W + sum of s·B·A in float32, rounded once; then the check of tensors and logits
    peft   `merge_and_unload` of the anchor, then of the delta, then `save_pretrained`

In 4 bits the base is NF4. PEFT merges into NF4 and quantizes the sum again, once for each adapter;
ours is merged onto the dequantized base and written in 16 bits. What is left of the update is
W_exported - W_base against the true sum of s·B·A, over all tensors that have one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from srlm_lite.bench.gguf import bench_gguf
from srlm_lite.bench.machine import apart, resident_peak
from srlm_lite.errors import UserError
from srlm_lite.model import parity
from srlm_lite.model.base import base_files, empty_model
from srlm_lite.model.checkpoint import Checkpoint, TensorInfo, write_index, write_shard
from srlm_lite.model.layout import Layout
from srlm_lite.model.merge import Weights, plan, write
from srlm_lite.model.nf4 import nf4_modules
from srlm_lite.model.stack import Adapter, fuse
from srlm_lite.progress import Reporter
from srlm_lite.settings import Base, Lora

hf: Any = transformers  # only partly typed

RANK = 16
"""The rank of each of the two adapters."""
DTYPE = torch.bfloat16
RANDOM = "random"
"""A base of random weights, made for the measurement."""
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""The shape of that base: a Llama of 1.1 billion parameters."""
_SHARD = 500 << 20


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What a way is to do: all of it can be handed to another process."""

    base: Path
    adapters: tuple[Path, Path]
    out: Path
    four_bit: bool = False


def bench_export(
    base: str,
    *,
    update: float,
    four_bit: bool,
    reporter: Reporter,
    shape: dict[str, Any] = LARGE,
    gguf: bool = False,
) -> dict[str, Any]:
    """Measure every way on one base.

    Args:
        base: As in a recipe, or `random`.
        update: Norm of both updates together, as a share of the weight's.
        four_bit: Measure merges on an NF4 base too.
        shape: Settings of the random base.
        gguf: Hold llama.cpp on GGUF files against the stack too.
    """
    with tempfile.TemporaryDirectory(prefix="srlm-lite-bench-") as temporary:
        scratch = Path(temporary)
        if base == RANDOM:
            folder = random_base(scratch / "base", shape)
        else:
            folder = base_files(Base(name=base)).folder
        adapters = tuple(
            random_adapter(folder, seed=seed, share=update / math.sqrt(2)) for seed in (0, 1)
        )
        paths = (scratch / "anchor", scratch / "delta")
        for adapter, path in zip(adapters, paths, strict=True):
            adapter.save(path, base_name=str(folder))
        ways: dict[str, tuple[Callable[[ExportJob], dict[str, Any]], bool]] = {
            "copy": (_copy, False),
            "ours": (_ours, False),
            "peft": (_peft, False),
        }
        if four_bit:
            ways |= {"ours, 4-bit": (_ours, True), "peft, 4-bit": (_peft, True)}
        task = reporter.start("export", len(ways), "ways")
        measured = {}
        for name, (way, quantized) in ways.items():
            task.note(name)
            job = ExportJob(folder, paths, scratch / "out", quantized)
            measured[name] = apart(way, job)
            shutil.rmtree(job.out)
            task.advance()
        served = bench_gguf(folder, paths, scratch, reporter) if gguf else None
        shards = Checkpoint(folder).shards
        sizes = [sum(info.nbytes for info in infos) for infos in shards.values()]
        return {
            "base": base,
            "parameters": sum(math.prod(i.shape) for infos in shards.values() for i in infos),
            "bytes": sum(sizes),
            "largest_shard_bytes": max(sizes),
            "update": update,
            "rank": RANK,
            "threads": torch.get_num_threads(),
            "ways": measured,
            "gguf": served,
        }


def random_base(folder: Path, shape: dict[str, Any]) -> Path:
    """A base of random weights in bfloat16, in shards of half a gigabyte."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    shards: list[list[TensorInfo]] = [[]]
    for name, parameter in empty_model(folder).named_parameters():
        if sum(info.nbytes for info in shards[-1]) > _SHARD:
            shards.append([])
        shards[-1].append(TensorInfo(name, DTYPE, tuple(parameter.shape)))
    generator = torch.Generator().manual_seed(0)
    names = {}
    for number, infos in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names[file] = infos
        write_shard(folder / file, infos, (_random(info, generator) for info in infos))
    write_index(folder, names)
    return folder


def _random(info: TensorInfo, generator: torch.Generator) -> Tensor:
    if len(info.shape) == 1:
        return torch.ones(info.shape, dtype=DTYPE)
    return torch.empty(info.shape, dtype=DTYPE).normal_(std=0.02, generator=generator)


def random_adapter(folder: Path, *, seed: int, share: float) -> Adapter:
    """Random updates of every target, each of a norm that is this share of the weight's."""
    checkpoint, targets = Checkpoint(folder), Lora().targets
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for info in (info for infos in checkpoint.shards.values() for info in infos):
        module = info.name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            out_features, in_features = info.shape
            a = torch.randn(RANK, in_features, generator=generator)
            b = torch.randn(out_features, RANK, generator=generator)
            # |B·A|² = tr(BᵀB·AAᵀ), without the product.
            norm = float(((b.T @ b) * (a @ a.T)).sum().sqrt())
            wanted = share * float(checkpoint.read(info.name).float().norm())
            factors[module] = (a, b * (wanted / norm))
    if not factors:
        raise UserError("the base has none of the layers that adapters target", where=str(folder))
    return Adapter(rank=RANK, alpha=float(RANK), factors=factors)


def _copy(job: ExportJob) -> dict[str, Any]:
    begin = time.monotonic()
    shutil.copytree(job.base, job.out)
    plain = time.monotonic() - begin
    for file in job.out.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    return {
        "seconds": time.monotonic() - begin,
        "unflushed_s": plain,
        "peak_bytes": resident_peak(),
    }


def _ours(job: ExportJob) -> dict[str, Any]:
    job.out.mkdir()
    model = empty_model(job.base)  # before the clock, for what transformers imports with it
    begin = time.monotonic()
    stack = [Adapter.load(path) for path in job.adapters]
    weights = _weights(job, model)
    merges = plan(weights.layout, stack, dtype=DTYPE)
    write(merges, weights, job.out)
    seconds, peak = time.monotonic() - begin, resident_peak()
    export = Layout(Checkpoint(job.out), model)
    check = parity.TensorCheck(weights.layout, stack, export)
    texts = [list(range(7 * i, 7 * i + 48)) for i in range(6)]
    ours, _ = parity.logits(model, check.reading(weights.read), texts, stacks=[stack, stack[:-1]])
    check.rest(weights.read)
    (theirs,) = parity.logits(model, export.read, texts)
    row = parity.compare(ours, theirs)
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "with_parity_s": time.monotonic() - begin,
        "with_parity_peak_bytes": resident_peak(),
        "tensor_error": check.error,
        "mean_kl": row.mean_kl,
        **_left(job, export.read, weights.read),
    }


def _peft(job: ExportJob) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if job.four_bit:
        options = {"quantization_config": _nf4(), "device_map": {"": "cpu"}}
    empty = empty_model(job.base)
    begin = time.monotonic()
    model = hf.AutoModelForCausalLM.from_pretrained(job.base, dtype=DTYPE, **options)
    for path in job.adapters:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    model.save_pretrained(job.out)
    seconds, peak = time.monotonic() - begin, resident_peak()
    read = _expanded(model) if job.four_bit else Checkpoint(job.out).read
    weights = _weights(job, empty)
    return {"seconds": seconds, "peak_bytes": peak, **_left(job, read, weights.read)}


def _nf4() -> Any:
    return hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )


def _weights(job: ExportJob, model: PreTrainedModel) -> Weights:
    """The base that the way merges onto."""
    names = nf4_modules(model) if job.four_bit else frozenset()
    return Weights(Layout(Checkpoint(job.base), model), nf4=names, dtype=DTYPE)


def _expanded(model: nn.Module) -> Callable[[str], Tensor]:
    """What the weights of a model in 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    def read(name: str) -> Tensor:
        weight: Any = model.get_parameter(name)
        expanded: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return expanded

    return read


def _left(
    job: ExportJob, exported: Callable[[str], Tensor], base: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Cosine and norm ratio of W_exported - W_base to the true update."""
    dot = found_square = true_square = 0.0
    for name, true in _updates(job):
        found = exported(name).float() - base(name).float()
        dot += float((found * true).sum(dtype=torch.float64))
        found_square += float(found.square().sum(dtype=torch.float64))
        true_square += float(true.square().sum(dtype=torch.float64))
    found_norm, true_norm = math.sqrt(found_square), math.sqrt(true_square)
    return {
        "cosine": dot / (found_norm * true_norm) if found_norm else 0.0,
        "norm_ratio": found_norm / true_norm,
        "projection": dot / true_square,
    }


def _updates(job: ExportJob) -> Iterator[tuple[str, Tensor]]:
    fused = fuse([Adapter.load(path) for path in job.adapters])
    for module, (a, b) in fused.factors.items():
        yield f"{module}.weight", fused.scaling * (b @ a)
