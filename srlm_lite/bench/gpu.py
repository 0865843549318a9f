"""`srlm-lite bench gpu`: what a base of a given shape costs on this device, without its weights.

The base is random, in NF4, and built on the device one tensor at a time. On it, with an anchor and
a delta in the slot as in any iteration, run

    ours        candidates and judgements by our engine, then DPO steps with all their proofs
    folded      the sampling once more, on a 16-bit copy of the weights that has the stack in it
                (`rollout.fold`)
    eager       the sampling with every kernel launched by itself (without `rollout.cuda_graphs`)
    continuous  the sampling by transformers' continuous batching
    plain       the same numbers of tokens by batched `generate`, then DPO by a stock TRL trainer on
                a LoRA of the same rank

All have the same base in memory. Every sample has its full length, so the work is equal. The
floor of each phase is `srlm_lite.bench.floor`'s at rates measured in the same run.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from srlm_lite.bench import floor
from srlm_lite.bench.backend import Backend
from srlm_lite.bench.continuous import ContinuousBatching
from srlm_lite.bench.floor import PhaseWork
from srlm_lite.bench.machine import peak_memory, resident, synchronise
from srlm_lite.bench.plain import PlainGenerate
from srlm_lite.bench.roofline import matmul_rates, measure_rates, roofline, shape_of
from srlm_lite.bench.workload import Workload
from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.device import compute_dtype
from srlm_lite.model.random_base import random_base
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.planning.machine import refuse_base
from srlm_lite.planning.shapes import SHAPES, config_of
from srlm_lite.progress import Reporter
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.settings import Base, Dpo, Lora
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.plain import train_plain_dpo

Way = Literal["ours", "folded", "eager", "continuous", "plain"]
WAYS: tuple[Way, ...] = get_args(Way)
Device = Literal["auto", "cpu", "cuda"]

_TRAIN = ("ours", "plain")
"""Ways that have DPO steps of their own."""

TINY = "tiny"
_TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

LORA = Lora()
"""The shape of the anchor, and of the delta."""

_TEMPERATURE, _TOP_P = 0.7, 0.9


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is done of everything."""

    prompts: int = 16
    n: int = 4
    prompt_tokens: int = 128
    answer_tokens: int = 256
    rubric_tokens: int = 256
    """At the start of every judge prompt, the same in all."""
    votes: int = 3
    vote_tokens: int = 96
    pair_prompt_tokens: int = 128
    reply_tokens: int = 512
    micro_batch: int = 1
    """Pairs in memory at once."""
    batch: int = 4
    """Pairs in one optimiser step."""
    steps: int = 3
    """Steps of DPO; the first one does not count."""

    @property
    def candidates(self) -> int:
        return self.prompts * self.n


SMALL = Extent(
    prompts=2,
    n=2,
    prompt_tokens=8,
    answer_tokens=8,
    rubric_tokens=16,
    votes=2,
    vote_tokens=8,
    pair_prompt_tokens=8,
    reply_tokens=12,
    batch=2,
)
"""For the shape `tiny`."""


def job_of(shape: str, **wanted: int | None) -> Extent:
    """The job of a shape, with what the user asked for.

    Raises:
        UserError: Sizes that do not go together.
    """
    job = SMALL if shape == TINY else Extent()
    job = replace(job, **{key: value for key, value in wanted.items() if value is not None})
    if job.batch % job.micro_batch:
        raise UserError("does not divide the batch", where=f"--micro-batch {job.micro_batch}")
    return job


def ways_of(text: str) -> tuple[Way, ...]:
    """The ways named in a list with commas.

    Raises:
        UserError: One that does not exist.
    """
    named = [name.strip() for name in text.split(",")]
    unknown = [name for name in named if name not in WAYS]
    if unknown:
        raise UserError(
            f"no such way: {unknown[0]}", where="--ways", way_out=f"There are {', '.join(WAYS)}"
        )
    return tuple(way for way in WAYS if way in named)


def device_of(text: str) -> Device:
    """What `--device` says.

    Raises:
        UserError: Something else.
    """
    if text not in get_args(Device):
        raise UserError(f"is {text}, not one of {', '.join(get_args(Device))}", where="--device")
    return cast(Device, text)


def shape_config(name: str) -> Any:
    """The configuration of a shape.

    Raises:
        UserError: There is none of that name.
    """
    if name == TINY:
        from transformers import LlamaConfig

        return LlamaConfig(**_TINY_SHAPE)
    if name not in SHAPES:
        known = ", ".join((TINY, *SHAPES))
        raise UserError(f"no such shape: {name}", where="--shape", way_out=f"There are {known}")
    return config_of(name)


def bench_gpu(
    shape: str,
    job: Extent,
    reporter: Reporter,
    *,
    ways: Sequence[Way] = WAYS,
    device: Device = "auto",
    backend: Backend = "transformers",
) -> dict[str, Any]:
    """Build the base and measure every way on it.

    Args:
        backend: `unsloth` loads from files alone: the base is written to a temporary directory, in
            NF4, and read back by it. It has to be imported already.

    Raises:
        UserError: No such shape, or no memory for it.
    """
    config = shape_config(shape)
    section = Base(name=shape, device=device, quantization="nf4")
    where = torch.device("cuda", 0) if _on_cuda(device) else torch.device("cpu")
    dtype = compute_dtype(section)
    if where.type == "cpu":
        refuse_base(config, itemsize=dtype.itemsize, where=f"--shape {shape}")
    parts = 1 + sum(3 if way in _TRAIN else 2 for way in ways)
    task = reporter.start(shape, parts, "parts")
    task.note("building the base")
    try:
        with _clock(where) as load:
            base = random_base(config, name=shape, device=where, dtype=dtype, quantization="nf4")
        if backend == "unsloth":
            task.note("handing the base to Unsloth")
            base = _through_files(base)
        task.advance()
        bench = _GpuBench(base, job, backend)
        measured: dict[str, dict[str, Any]] = {}
        for way in ways:
            phases: dict[str, Any] = {}
            for phase, run in bench.phases(way).items():
                task.note(f"{way}: {phase}")
                phases[phase] = run()
                task.advance()
            measured[way] = phases
            bench.clear()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{shape} does not fit beside this work",
            where=str(where),
            way_out="Try a smaller shape, --prompts, --reply-tokens or --micro-batch",
        ) from error
    return bench.report(measured, load)


def _through_files(base: LoadedBase) -> LoadedBase:
    """The same base in the hands of Unsloth."""
    with tempfile.TemporaryDirectory(prefix="srlm-lite-bench-") as folder:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        name = base.folder
        device = "cuda" if base.device.type == "cuda" else "cpu"
        del base
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        section = Base(
            name=folder, device=device, quantization="nf4", backend="unsloth", window=2048
        )
        return replace(load_base(section), folder=name)


def _on_cuda(device: str) -> bool:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device was found", where="--device", way_out="Use --device cpu")
    return device != "cpu" and torch.cuda.is_available()


@dataclass(slots=True)
class _Clock:
    seconds: float = 0.0
    peak: int | None = None
    after: int | None = None
    """Bytes in use at the end."""


@contextmanager
def _clock(device: torch.device) -> Iterator[_Clock]:
    """Seconds and the peak of memory of what is done within."""
    clock = _Clock()
    synchronise(device)
    begin = time.perf_counter()
    with peak_memory(device) as peak:
        yield clock
        synchronise(device)
        clock.seconds = time.perf_counter() - begin
    clock.peak = peak.bytes
    clock.after = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()


class _GpuBench:
    def __init__(self, base: LoadedBase, job: Extent, backend: Backend) -> None:
        self.base, self.job, self.backend = base, job, backend
        self.chat = ChatFormat.of(base)
        self.shape = shape_of(base.model)
        self.slot = Slot(base.model, targets=LORA.targets, rank=2 * LORA.rank, backend=backend)
        self.anchor = _random(self.slot.fresh(LORA, seed=1))
        self.delta = _random(self.slot.fresh(LORA, seed=2))
        draw = random.Random(0)
        vocabulary = base.model.config.vocab_size

        def ids(count: int) -> tuple[int, ...]:
            return tuple(draw.randrange(4, vocabulary) for _ in range(count))

        self.questions = [ids(job.prompt_tokens) for _ in range(job.prompts)]
        rubric = ids(job.rubric_tokens)
        self.grading = [
            rubric + question + ids(job.answer_tokens)
            for question in self.questions
            for _ in range(job.n)
        ]
        self.pairs = [
            PairExample(ids(job.pair_prompt_tokens), ids(job.reply_tokens), ids(job.reply_tokens))
            for _ in range(job.batch * job.steps)
        ]
        self.dpo = Dpo(
            learning_rate=1e-5,
            batch_size=job.batch,
            micro_batch_size=job.micro_batch,
            gradient_checkpointing=True,
            lora=LORA,
        )

    def phases(self, way: Way) -> Mapping[str, Callable[[], dict[str, Any]]]:
        by = {"plain": self._plainly, "continuous": self._continuously}
        sample, job = by.get(way, self._ours), self.job
        self.slot.fold = way == "folded"
        self.engine = TransformersEngine(self.slot, self.chat, cuda_graphs=way != "eager")
        phases: dict[str, Callable[[], dict[str, Any]]] = {
            "candidates": lambda: self._sampled(sample, self.questions, job.n, job.answer_tokens),
            "judge": lambda: self._sampled(sample, self.grading, job.votes, job.vote_tokens),
        }
        return {**phases, "dpo": lambda: self._trained(way)} if way in _TRAIN else phases

    def clear(self) -> None:
        """Before the next way: its memory is its own."""
        self.engine.close()
        self.slot.fold = False
        self.slot.load(())
        gc.collect()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _sampled(
        self, sample: Any, prompts: list[tuple[int, ...]], n: int, new_tokens: int
    ) -> dict[str, Any]:
        self.slot.load([self.anchor, self.delta])
        sample(prompts[:1], 1, 2)  # a warm-up
        with _clock(self.base.device) as clock:
            sample(prompts, n, new_tokens)
        tokens = len(prompts) * n * new_tokens
        return {
            "seconds": clock.seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / clock.seconds,
            "peak_bytes": clock.peak,
        }

    def _ours(self, prompts: list[tuple[int, ...]], n: int, new_tokens: int) -> None:
        limits = Limits(_TEMPERATURE, _TOP_P, max_new_tokens=new_tokens, ignore_end=True)
        requests = [Request(ids, tuple(range(n * i, n * i + n))) for i, ids in enumerate(prompts)]
        self.engine.load([self.anchor, self.delta])
        self.engine.sample(requests, limits)

    def _plainly(self, prompts: list[tuple[int, ...]], n: int, new_tokens: int) -> None:
        plain = PlainGenerate(
            self.slot.model.get_base_model(),
            pad_id=self.chat.pad_id,
            batch_prompts=max(1, 64 // n),
            workload=Workload(),
        )
        plain.sample(prompts, n=n, new_tokens=new_tokens, on_samples=lambda count: None)

    def _continuously(self, prompts: list[tuple[int, ...]], n: int, new_tokens: int) -> None:
        engine = ContinuousBatching(
            self.slot.model.get_base_model(),
            pad_id=self.chat.pad_id,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
        )
        engine.sample(prompts, n=n, new_tokens=new_tokens, on_samples=lambda count: None)

    def _trained(self, way: Way) -> dict[str, Any]:
        ends: list[float] = []

        def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
            synchronise(self.base.device)
            ends.append(time.perf_counter())

        facts: dict[str, float] = {}
        with (
            tempfile.TemporaryDirectory(prefix="srlm-lite-bench-") as scratch,
            _clock(self.base.device) as clock,
        ):
            options: dict[str, Any] = {
                "pairs": self.pairs,
                "dpo": self.dpo,
                "scratch": Path(scratch),
                "seed": 0,
                "on_step": on_step,
            }
            if way == "ours":
                _, facts = train_dpo(
                    self.slot,
                    self.base,
                    anchor=[self.anchor],
                    delta=self.slot.fresh(LORA, seed=3),
                    reference=[self.anchor],
                    **options,
                )
            else:
                train_plain_dpo(self.slot, self.base, stack=[self.anchor, self.delta], **options)
        steps = [after - before for before, after in pairwise(ends)]
        per_step = sum(steps) / len(steps)
        trained = sum(len(p.prompt_ids) * 2 + len(p.chosen_ids) * 2 for p in self.pairs)
        return {
            "seconds": clock.seconds,
            "seconds_per_step": per_step,
            "tokens_per_s": trained / self.job.steps / per_step,
            "peak_bytes": clock.peak,
            **({"step0_loss": facts["step0_loss"]} if facts else {}),
        }

    def _work(self) -> dict[str, PhaseWork]:
        job, shape = self.job, self.shape
        work: dict[str, PhaseWork] = {}
        for name, prompts, n, new_tokens in (
            ("candidates", self.questions, job.n, job.answer_tokens),
            ("judge", self.grading, job.votes, job.vote_tokens),
        ):
            lengths, shared = [len(ids) for ids in prompts], floor.shared_prefix(prompts)
            before = floor.prefill(shape, lengths, shared=shared)
            after = floor.decode(shape, lengths, samples=n, new_tokens=new_tokens, shared=shared)
            work[f"{name}_prefill"], work[f"{name}_decode"] = before, after
        one = (job.pair_prompt_tokens + job.reply_tokens, job.reply_tokens)
        work["dpo_step"] = floor.dpo_step(
            shape,
            [one] * (2 * job.batch),
            batches=job.batch // job.micro_batch,
            checkpointing=self.dpo.gradient_checkpointing,
        )
        return work

    def report(self, measured: dict[str, dict[str, Any]], load: _Clock) -> dict[str, Any]:
        model: Any = self.base.model
        rates = measure_rates(model, rows=self.job.candidates)
        if self.base.device.type == "cuda":
            # A GPU is only busy with products far larger than those of one step of decoding.
            large = matmul_rates([(8192, 8192, 8192)], dtype=model.dtype, device=model.device)
            rates = replace(rates, matmul={**rates.matmul, **large})
        bound = roofline(rates, self._work())
        least = {name: row["seconds"] for name, row in bound["floor"].items()}
        floors = {
            "candidates": least["candidates_prefill"] + least["candidates_decode"],
            "judge": least["judge_prefill"] + least["judge_decode"],
            "dpo": least["dpo_step"],
        }
        for phases in measured.values():
            for name, phase in phases.items():
                took = phase["seconds_per_step"] if name == "dpo" else phase["seconds"]
                phase["floor_s"] = floors[name]
                phase["floor_share"] = floors[name] / took
        weights = [w for w in model.parameters() if w.dtype != torch.float32 or w.dim() > 1]
        return {
            "shape": self.base.folder,
            "parameters": self.shape.linear + self.shape.head,
            "backend": self.backend,
            "quantization": "nf4",
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": str(self.base.device),
            "threads": torch.get_num_threads(),
            "base": {
                "seconds": load.seconds,
                "bytes": sum(w.numel() * w.element_size() for w in weights),
                "in_use_bytes": load.after,
                "peak_bytes": load.peak,
                "bytes_per_linear_weight": self.shape.linear_bytes,
            },
            "ways": measured,
            "machine_rates": bound["machine_rates"],
            "floor": bound["floor"],
            "job": {**asdict(self.job), "rank": 2 * LORA.rank},
        }


def _random(adapter: Adapter) -> Adapter:
    """With a B that is not zero, so that nothing is skipped."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        module: (a, torch.empty(b.shape).normal_(std=1e-3, generator=generator))
        for module, (a, b) in adapter.factors.items()
    }
    return Adapter(adapter.rank, adapter.alpha, factors)
