"""`srlm-lite bench rollout`: the same samples by our engines and by plain `generate`.

Order: ours first, for its candidates are what every way has to judge; then vLLM, then transformers'
continuous batching, then plain `generate` in batches, then one by one. Each has a short warm-up
before its clock starts. Loading the base and starting an engine are not counted. The machine's
rates are measured before and after them, and the higher ones count.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import packages_distributions, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import torch

from srlm_lite.bench import floor
from srlm_lite.bench.continuous import ContinuousBatching
from srlm_lite.bench.machine import peak_memory, synchronise
from srlm_lite.bench.named import named
from srlm_lite.bench.plain import PlainGenerate
from srlm_lite.bench.roofline import Rates, measure_rates, roofline, shape_of
from srlm_lite.bench.workload import StandIn, Workload
from srlm_lite.errors import SrlmError, UserError
from srlm_lite.judging import whole_scores
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.device import compute_device, compute_dtype
from srlm_lite.model.random_base import random_base
from srlm_lite.planning.shapes import config_of
from srlm_lite.progress import Reporter
from srlm_lite.recipe import Recipe, recipe_from
from srlm_lite.rollout.protocol import Engine, Limits, Request, Sample
from srlm_lite.run.run import RunDir
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.settings import Base, Lora
from srlm_lite.stages.sampling import ALTERNATIVES
from srlm_lite.stages.weighing import options_of

Way = Literal["ours", "vllm", "continuous", "batched", "one-by-one"]
WAYS: tuple[Way, ...] = ("ours", "vllm", "continuous", "batched", "one-by-one")
"""In the order in which they run."""

KEYS: dict[Way, str] = {
    "ours": "ours_s",
    "vllm": "vllm_s",
    "continuous": "continuous_batching_s",
    "batched": "batched_generate_s",
    "one-by-one": "one_by_one_s",
}
WARM_UP_TOKENS = 4
RANDOM = "random"
"""What a base of random weights is named by: `random:SHAPE`, by the shapes of `plan`."""

Ids = tuple[int, ...]


class SamplingWay(Protocol):
    """A way to draw n samples of each prompt, all of full length."""

    def sample(
        self,
        prompts: Sequence[Ids],
        *,
        n: int,
        new_tokens: int,
        on_samples: Callable[[int], None],
    ) -> object:
        """Draw; `on_samples` is told how many have just been finished."""
        ...


@dataclass(frozen=True, slots=True)
class RolloutBench:
    """What a user may choose."""

    base: str = "smollm2-135m-instruct"
    ways: tuple[Way, ...] = ("ours", "vllm", "batched", "one-by-one")
    workload: Workload = field(default_factory=Workload)
    batch_rows: int | None = None
    """Ours: samples in one batch; None goes by the device's memory, as in a run."""
    naive_batch_prompts: int = 16
    """Batched plain `generate`: prompts in one call, each with all its samples."""
    one_by_one_prompts: int = 1
    """One by one is measured on so many prompts and their judgements, and extrapolated."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the two phases, and the peak of memory in bytes over both.

    `prefill_s` are seconds of reading the same judge prompts for the probabilities of their next
    token, with nothing written; ours alone.
    """

    candidates_s: float
    judge_s: float
    peak_bytes: int | None
    prefill_s: float | None = None

    @property
    def total(self) -> float:
        return self.candidates_s + self.judge_s


class EngineSampler:
    """One of the program's engines, on the bare base, through its protocol."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self._engine, self._workload = engine, workload

    def sample(
        self,
        prompts: Sequence[Ids],
        *,
        n: int,
        new_tokens: int,
        on_samples: Callable[[int], None],
    ) -> list[list[Sample]]:
        """Draw; every sample has to be as long as asked for.

        Raises:
            SrlmError: One is not.
        """
        limits = Limits(
            temperature=self._workload.temperature,
            top_p=self._workload.top_p,
            max_new_tokens=new_tokens,
            ignore_end=True,
        )
        requests = [
            Request(prompt, tuple(derive_seed("bench", i, j) for j in range(n)))
            for i, prompt in enumerate(prompts)
        ]
        samples = self._engine.sample(requests, limits, on_samples=on_samples)
        if any(one.n_tokens != new_tokens for row in samples for one in row):
            raise SrlmError("an engine ended a sample before it had its full length")
        return samples


def weigh_all(engine: Engine, prompts: Sequence[Ids], options: Ids) -> None:
    """Read prompts for the probabilities of tokens that may come next, as a judge without a
    rationale does."""
    limits = Limits(
        temperature=0.0,
        top_p=1.0,
        max_new_tokens=1,
        alternatives=ALTERNATIVES,
        also=options,
        ignore_end=True,
    )
    engine.sample([Request(prompt, (0,)) for prompt in prompts], limits)


def ways_of(text: str) -> tuple[Way, ...]:
    """The ways named in a list with commas.

    Raises:
        UserError: One that does not exist.
    """
    return named(text, WAYS, what="way", where="--engines")


def bench_rollout(settings: RolloutBench, reporter: Reporter) -> dict[str, Any]:
    """Measure the ways side by side in this process.

    Returns:
        Seconds of each way over the whole workload (`one_by_one_s`, `batched_generate_s`,
        `ours_s`, `vllm_s`; None where a way was not asked for or is not installed), ratios, our
        seconds of judging by votes (`votes_s`) and by one reading each (`prefill_s`), the
        roofline's floor, tokens per second, memory, and what they were measured with.
    """
    with TemporaryDirectory() as folder:
        return _RolloutRunner(settings, _session(settings, Path(folder), reporter), reporter).run()


def _session(settings: RolloutBench, folder: Path, reporter: Reporter) -> Session:
    """The engines as a run has them, on the bare base: an empty stack, folded, is the base."""
    section = Base(name=settings.base)
    kind, _, shape = settings.base.partition(":")
    if kind == RANDOM:
        base = random_base(
            config_of(shape, where="--base"),
            name=settings.base,
            device=compute_device(section.device),
            dtype=compute_dtype(section),
            quantization="none",
        )
    else:
        base = load_base(section)
    session = Session(_recipe(settings, base), RunDir(folder), reporter)
    session.base = base
    return session


def _recipe(settings: RolloutBench, base: LoadedBase) -> Recipe:
    model: Any = base.model
    linear = {
        name.rpartition(".")[2]
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    if not linear:
        raise UserError("it has no linear layer that could carry an adapter", where="--base")
    usual = [target for target in Lora().targets if target in linear]
    lora = {"lora": {"targets": usual or sorted(linear)[:1]}}
    return recipe_from(
        {
            "name": "bench",
            "base": {"name": settings.base},
            "anchor": lora,
            "dpo": lora,
            "data": {"dir": "."},
            "rollout": {"batch_rows": settings.batch_rows or "auto", "fold": True},
            "judge": {"rubric": settings.workload.rubric, "engine": "vllm"},
        },
        where="bench",
    )


class _RolloutRunner:
    def __init__(self, settings: RolloutBench, session: Session, reporter: Reporter) -> None:
        self._settings, self._session, self._reporter = settings, session, reporter
        self._work = settings.workload
        self._device = session.base.device
        is_random = settings.base.startswith(f"{RANDOM}:")
        self._stand_in = StandIn(session.base.model.config.vocab_size) if is_random else None
        self._texts = self._work.texts(lambda text: len(self._prompt_ids(text)))
        self._questions = [self._prompt_ids(text) for text in self._texts]
        self._ours = EngineSampler(session.engine(()), self._work)
        self._grading = self._judge_prompts()

    @cached_property
    def _bare_model(self) -> Any:
        """The base without the slot around its layers; from here on our engine is of no use."""
        model: Any = self._session.slot.model
        return model.unload()

    def _prompt_ids(self, text: str) -> Ids:
        return tuple((self._stand_in or self._session.chat).prompt_ids(text))

    def _text_of(self, ids: Ids) -> str:
        """Not `Sample.text`: it may stop at an end of turn, and the work has to be equal."""
        if self._stand_in is not None:
            return self._stand_in.text_of(ids)
        return str(self._session.base.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _judge_prompts(self) -> list[Ids]:
        """The rubric around each of our candidates; drawing them here has no clock."""
        work, rubric = self._work, self._session.rubric
        rows = self._ours.sample(
            self._questions, n=work.n, new_tokens=work.answer_tokens, on_samples=lambda count: None
        )
        prompts = []
        for question, row in zip(self._texts, rows, strict=True):
            for one in row:
                text = rubric.render(prompt=question, response=self._text_of(one.token_ids))
                prompts.append(self._prompt_ids(text))
        return prompts

    def run(self) -> dict[str, Any]:
        before = self._rates()
        timings: dict[Way, Timing] = {}
        for way in WAYS:
            if way in self._settings.ways and (way != "vllm" or vllm_is_here()):
                timings[way] = self._measure(way)
        return self._report(timings, before.or_better(self._rates()))

    def _rates(self) -> Rates:
        work = self._work
        return measure_rates(self._session.base.model, rows=work.prompts * work.n * work.votes)

    def _measure(self, way: Way) -> Timing:
        sampler, work = self._sampler(way), self._work
        few = self._measured_prompts(way)
        questions, grading = self._questions[:few], self._grading[: few * work.n]
        task = self._reporter.start(way, len(questions) * work.n * (1 + work.votes), "samples")

        def phase(prompts: Sequence[Ids], n: int, new_tokens: int) -> float:
            start = time.perf_counter()
            sampler.sample(prompts, n=n, new_tokens=new_tokens, on_samples=task.advance)
            synchronise(self._device)
            return (time.perf_counter() - start) * work.prompts / few

        for prompts in (questions[:1], grading[:1]):
            sampler.sample(prompts, n=2, new_tokens=WARM_UP_TOKENS, on_samples=lambda count: None)
        with peak_memory(self._device) as peak:
            candidates_s = phase(questions, work.n, work.answer_tokens)
            judge_s = phase(grading, work.votes, work.vote_tokens)
        prefill_s = self._prefill() if way == "ours" else None
        if way == "vllm":
            self._session.close_engines()
        return Timing(candidates_s, judge_s, peak.bytes, prefill_s)

    def _prefill(self) -> float:
        """Seconds in which our engine judges all candidates without a rationale."""
        begun: Ids = ()
        options: Ids = tuple(range(6))
        if self._stand_in is None:
            scores = [f"Score: {score}" for score in whole_scores(self._session.rubric)]
            told = options_of(self._session.chat, scores, setting="--rubric")
            begun, options = told.begun, told.next
        prompts = [(*prompt, *begun) for prompt in self._grading]
        engine = self._session.engine(())
        weigh_all(engine, prompts[:1], options)
        start = time.perf_counter()
        weigh_all(engine, prompts, options)
        synchronise(self._device)
        return time.perf_counter() - start

    def _measured_prompts(self, way: Way) -> int:
        all_of_them = self._work.prompts
        few = self._settings.one_by_one_prompts
        return min(few, all_of_them) if way == "one-by-one" else all_of_them

    def _sampler(self, way: Way) -> SamplingWay:
        if way == "ours":
            return self._ours
        if way == "vllm":
            return EngineSampler(self._session.engine((), "judge"), self._work)
        if way == "continuous":
            return ContinuousBatching(
                self._session.slot.model.get_base_model(),
                pad_id=self._session.chat.pad_id,
                temperature=self._work.temperature,
                top_p=self._work.top_p,
            )
        return PlainGenerate(
            self._bare_model,
            pad_id=self._session.chat.pad_id,
            batch_prompts=self._settings.naive_batch_prompts if way == "batched" else 0,
            workload=self._work,
        )

    def _judging(self, ours: Timing | None) -> dict[str, float | None]:
        """Our judgements by written votes, and by one reading of the question each."""
        votes_s = None if ours is None else round(ours.judge_s, 3)
        prefill_s = None if ours is None or ours.prefill_s is None else round(ours.prefill_s, 3)
        return {
            "votes_s": votes_s,
            "prefill_s": prefill_s,
            "prefill_share": _ratio(prefill_s, votes_s),
        }

    def _report(self, timings: dict[Way, Timing], rates: Rates) -> dict[str, Any]:
        settings, work, base = self._settings, self._work, self._session.base
        seconds = {way: round(timing.total, 3) for way, timing in timings.items()}
        bound = roofline(
            rates, floor.phases(shape_of(base.model), work, self._questions, self._grading)
        )
        return {
            **{key: seconds.get(way) for way, key in KEYS.items()},
            **self._judging(timings.get("ours")),
            "ratio_vs_batched_generate": _ratio(seconds.get("batched"), seconds.get("ours")),
            "ratio_vs_vllm": _ratio(seconds.get("vllm"), seconds.get("ours")),
            **bound,
            "floor_share": {way: _ratio(bound["floor_s"], own) for way, own in seconds.items()},
            "tokens_per_s": {way: _ratio(work.new_tokens, own) for way, own in seconds.items()},
            "phases": {
                way: {
                    "candidates_s": round(timing.candidates_s, 3),
                    "judge_s": round(timing.judge_s, 3),
                }
                for way, timing in timings.items()
            },
            "peak_memory_bytes": {way: timing.peak_bytes for way, timing in timings.items()},
            "one_by_one_measured_prompts": self._measured_prompts("one-by-one"),
            "workload": {
                **asdict(work),
                "new_tokens": work.new_tokens,
                "prompt_tokens": sum(map(len, self._questions)),
                "judge_prompt_tokens": sum(map(len, self._grading)),
            },
            "batch_rows": settings.batch_rows,
            "naive_batch_prompts": settings.naive_batch_prompts,
            "base": base.source,
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": str(base.device),
            "vllm": _vllm_version() if "vllm" in timings else None,
            "threads": torch.get_num_threads(),
        }


def vllm_is_here() -> bool:
    """Whether the engine `vllm` can be measured."""
    return importlib.util.find_spec("vllm") is not None


def _vllm_version() -> str:
    """The version of the package that carries vLLM here, which on a CPU has another name."""
    package = packages_distributions()["vllm"][0]
    return f"{package} {version(package)}"


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a / b, 3)
