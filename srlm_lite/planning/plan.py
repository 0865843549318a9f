"""A recipe's phases: what each needs, whether that fits, and what to change.

All is counted at its longest: prompts and answers that fill the window, or, where the seed data is
there, that are as long as its longest row can be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import attrgetter
from typing import Any

from srlm_lite.data.self_instruct import MAX_NEW_TOKENS
from srlm_lite.declared import Draws, Sizes, Trains, Weighs
from srlm_lite.engines import ENGINES, EngineKind, kind_of
from srlm_lite.errors import UserError
from srlm_lite.methods import method_of
from srlm_lite.planning.gpus import gpu_names, known_gpu
from srlm_lite.planning.lengths import Lengths
from srlm_lite.planning.memory import (
    LIBRARIES,
    Device,
    Held,
    Shape,
    exporting,
    holes,
    loading,
    sampling,
    training,
)
from srlm_lite.recipe import Recipe, recipe_from
from srlm_lite.rollout.sizes import drawing_bytes, rows_within
from srlm_lite.settings import Anchor, Dpo, Optim
from srlm_lite.training.sizes import AT_ONCE_ON_A_CPU
from srlm_lite.window import longest_prompt

PARTS = ("base", "adapters", "optimizer", "activations", "kv_cache", "logits", "libraries")
USABLE: Mapping[Device, float] = {"cuda": 0.95, "cpu": 1.0}
"""Share of a device's memory that a plan may fill; a GPU's allocator loses some to fragments."""
_LIKE: Mapping[str, str] = {"sft": "anchor SFT", "dpo": "DPO"}
"""For each kind of training, a phase whose rate stands for it."""
HERE = ENGINES["transformers"]
"""The engine that is advised where another one takes too much."""
_LEAST_WINDOW = 512
"""Shorter ones are not advised: a judge's question takes most of that."""
_TEXTS = 6
_TEXT_TOKENS = 48
"""What an export is compared on, at most."""
_WRITTEN = 6
"""Bytes that a token of a journal takes on the disk, with what stands around it, roughly."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where a recipe is to run: `count` devices of `memory` bytes each."""

    device: Device
    name: str
    memory: int
    count: int = 1
    shards: int = 1
    """How many of them the base is spread over; 1: each holds it whole."""

    def __str__(self) -> str:
        return f"{self.count} x {self.memory / 1e9:.0f} GB" + (
            f" ({self.name})" if self.name else ""
        )


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a run.

    `parts` are bytes on the device (of an export, on the machine); `least` the bytes that it cannot
    do without, where it can make do with smaller batches by itself. `tokens` are those drawn, or
    trained on, by the whole phase in the whole run, votes asked again apart; None where the data is
    not there to count, and where IFEval or a capability panel come on top.
    """

    name: str
    parts: Mapping[str, int]
    least: int
    tokens: int | None = None
    read: int | None = None
    """Tokens of the prompts that it reads in the whole run; None where `tokens` are."""
    shares: int = 1
    """Equal parts of its work that processes can take at the same time: chunks of an iteration,
    micro-batches of a step."""
    engine: str = ""
    """The engine that samples it, if one does."""
    on_host: bool = False
    shape: Mapping[str, int] = field(default_factory=dict)
    """Sequences and their tokens: what a measurement of this phase has to run."""
    like: str = ""
    """A phase that does the same kind of work, whose rate stands for this one's."""
    trains: Trains | None = None
    """What it trains, if anything."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """All phases of a recipe on one kind of hardware."""

    recipe: Recipe
    shape: Shape
    hardware: Hardware
    lengths: Lengths
    phases: tuple[Phase, ...]
    disk: Mapping[str, int]
    itemsize: int
    """Bytes of the compute dtype."""
    anchor_rank: int
    not_in_4_bits: Mapping[str, int]
    """Bytes of a base in NF4 that NF4 does not reach, by what they are of."""

    @property
    def peak(self) -> int:
        """The largest peak of the phases on the device."""
        return max(phase.total for phase in self.phases if not phase.on_host)

    @property
    def usable(self) -> float:
        """Bytes of one device that a plan may fill."""
        return USABLE[self.hardware.device] * self.hardware.memory

    def fits(self, phase: Phase) -> bool:
        return phase.on_host or phase.total <= self.usable

    def impossible(self) -> list[Phase]:
        """Phases that no smaller batch makes fit.

        A GPU's sampling batch halves by itself when memory runs out. On a CPU the system ends the
        process in place of telling it, so there the batch has to fit as it is.
        """
        halves = self.hardware.device == "cuda"
        return [
            phase
            for phase in self.phases
            if not phase.on_host and (phase.least if halves else phase.total) > self.usable
        ]


def parse_gpus(text: str) -> Hardware:
    """`2x80GB`, `24GB`, `8xH100`, `RTX4090`.

    Raises:
        UserError: Another form, or a GPU that is not known by this name.
    """
    text = text.strip()
    counted = re.match(r"(\d+)\s*x\s*", text, re.IGNORECASE)
    count, kind = (int(counted[1]), text[counted.end() :]) if counted else (1, text)
    unit = "(?:GB?)?" if counted else "GB?"
    size = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*{unit}", kind, re.IGNORECASE)
    gpu = known_gpu(kind)
    memory = gpu.memory if gpu else int(float(size[1]) * 1e9) if size else 0
    if not (count and memory):
        raise UserError(
            f"{text!r} is no number of GPUs with their name or memory",
            where="--gpus",
            way_out=f"Write it as 8xH100, 2x80GB or 24GB. Known by name: {gpu_names()}",
        )
    return Hardware("cuda", gpu.name if gpu else "", memory, count)


def make_plan(
    recipe: Recipe,
    shape: Shape,
    hardware: Hardware,
    lengths: Lengths,
    *,
    itemsize: int,
    anchor_rank: int | None = None,
) -> Plan:
    """What each phase of a recipe needs on some hardware.

    Args:
        itemsize: Bytes of the compute dtype.
        anchor_rank: Of a shipped anchor; None: the recipe trains its own.
    """
    held = Held(
        shape=shape,
        nf4=recipe.base.quantization == "nf4",
        itemsize=itemsize,
        device=hardware.device,
        targets=recipe.targets,
        rank=(anchor_rank or recipe.anchor.lora.rank) + recipe.dpo.lora.rank,
        fold=recipe.rollout.fold,
        shards=hardware.shards,
    )
    maker = _Phases(recipe, held, hardware, lengths, trains_anchor=anchor_rank is None)
    phases = tuple(maker.all())
    return Plan(
        recipe=recipe,
        shape=shape,
        hardware=hardware,
        lengths=lengths,
        phases=phases,
        disk=_disk(recipe, held, maker.written()),
        itemsize=itemsize,
        anchor_rank=held.rank - recipe.dpo.lora.rank,
        not_in_4_bits=held.not_in_4_bits if held.nf4 else {},
    )


@dataclass(frozen=True, slots=True)
class _Phases:
    recipe: Recipe
    held: Held
    hardware: Hardware
    lengths: Lengths
    trains_anchor: bool

    def all(self) -> Iterator[Phase]:
        recipe = self.recipe
        found = list(method_of(recipe).phases(self._sizes)) if recipe.iterations else []
        yield self._load()
        if recipe.iterations and recipe.prompts.source == "self-instruct":
            yield self._prompts()
        for one in found:
            if isinstance(one, Draws):
                yield self._drawn(one)
            elif isinstance(one, Weighs):
                yield self._weighed(one)
        if self.trains_anchor:
            yield self._anchor()
        for one in found:
            if isinstance(one, Trains):
                yield self._trained(one)
        yield self._evaluation()
        yield self._export()

    def written(self) -> int:
        """Tokens that the method samples in the whole run."""
        found = method_of(self.recipe).phases(self._sizes) if self.recipe.iterations else ()
        return sum(one.texts * one.new_tokens for one in found if isinstance(one, Draws))

    @property
    def _sizes(self) -> Sizes:
        return Sizes(
            window=self.recipe.base.window,
            prompt=self._room,
            answer=self._answer,
            own=min(self.lengths.pair, self.recipe.base.window),
            question=self._judge_room,
            judgement=self._judgement,
            thought=self.lengths.thought,
        )

    def _drawn(self, one: Draws) -> Phase:
        return self._sampling(
            one.name,
            prompts=one.prompts,
            samples=one.samples,
            prompt_tokens=one.prompt_tokens,
            new=one.new_tokens,
            tokens=one.texts * one.new_tokens,
            requests=math.ceil(one.texts / one.samples),
            rounds=self.recipe.iterations,
            engine=HERE if one.in_training else kind_of(self.recipe, one.role),
            like="judge" if one.role == "judge" else "candidates",
            whole=one.in_training,
        )

    def _weighed(self, one: Weighs) -> Phase:
        """A prefill; what it draws is one token a question, whose time says nothing of it."""
        return self._sampling(
            one.name,
            prompts=one.prompts,
            samples=1,
            prompt_tokens=one.prompt_tokens,
            new=1,
            tokens=one.texts,
            engine=kind_of(self.recipe, one.role),
            like="",
        )

    def _trained(self, one: Trains) -> Phase:
        rows = 2 if one.kind in ("dpo", "reward") else 1
        count = None if one.examples is None else math.ceil(one.examples) * rows * one.tokens
        return self._training(one, count, rows=rows)

    def _load(self) -> Phase:
        """The base, read and rounded, or its first token: the larger of both."""
        first = self._sampling("load", prompts=1, samples=1, prompt_tokens=8, new=1, tokens=0)
        coming = self._libraries(loading(self.held), "sampling")
        if sum(coming.values()) <= first.total:
            return first
        return replace(first, parts=coming, least=sum(coming.values()))

    def _libraries(self, parts: Mapping[str, int], kind: str) -> dict[str, int]:
        where: Device = "cpu" if kind == "export" else self.held.device
        return {**parts, "libraries": LIBRARIES[where][kind]}

    def _sampling(
        self,
        name: str,
        *,
        prompts: int,
        samples: int,
        prompt_tokens: int,
        new: int,
        tokens: int | None,
        requests: int = 0,
        rounds: int = 1,
        engine: EngineKind = HERE,
        like: str = "candidates",
        whole: bool = False,
    ) -> Phase:
        """`prompts` requests of `samples` texts each, given to the engine at once.

        Args:
            requests: Those of the whole run.
            rounds: Into so many parts the run's requests fall, whose chunks are dealt out.
            whole: It cannot take fewer of them at once.
        """

        def parts(at_once: int) -> dict[str, int]:
            if engine.samples_here:
                found = sampling(
                    self.held,
                    prompts=at_once,
                    samples=samples,
                    prompt_tokens=prompt_tokens,
                    new_tokens=new,
                    refills=at_once < prompts,
                )
            else:
                found = self._beside()
                if share := engine.share(self.recipe):
                    found["kv_cache"] = int(share * self.hardware.memory)
            return self._libraries(found, "sampling")

        rows = self._rows(prompt_tokens + new)
        at_once = prompts if whole else max(1, min(prompts, rows // samples))
        shape = {
            "prompts": prompts,
            "samples": samples,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new,
            "batch_rows": at_once * samples,
        }
        least = sum(parts(at_once if whole else 1).values())
        alone = whole or method_of(self.recipe).one_process
        return Phase(
            name,
            parts(at_once),
            least,
            tokens,
            read=None if tokens is None else requests * prompt_tokens,
            shares=1 if alone else max(1, math.ceil(requests / rounds / max(1, prompts))),
            engine=engine.name,
            shape=shape,
            like=like,
        )

    def _beside(self) -> dict[str, int]:
        """The base and its slot, while another process samples."""
        return {"base": self.held.base, "adapters": self.held.itemsize * self.held.slot}

    def _rows(self, tokens: int) -> int:
        """As `rollout.batch_rows` says, or as the engine finds."""
        said = self.recipe.rollout.batch_rows
        if said != "auto":
            return said
        shape, c = self.held.shape, self.held.itemsize
        return rows_within(
            self.hardware.memory,
            weights=self.held.base,
            row=self.held.kv_per_token * tokens + drawing_bytes(shape.vocabulary, c),
        )

    @property
    def _room(self) -> int:
        """The longest prompt of a candidate."""
        return longest_prompt(
            self.recipe.base.window, answer=self._answer, bound=self.lengths.prompt
        )

    @property
    def _judge_room(self) -> int:
        return longest_prompt(
            self.recipe.base.window, answer=self._judgement, bound=self.lengths.judge_prompt
        )

    @property
    def _answer(self) -> int:
        """Tokens of an answer at most, its thought included."""
        return self.recipe.rollout.max_new_tokens + self.lengths.thought

    @property
    def _judgement(self) -> int:
        """And of a judgement."""
        return _judgement(self.recipe, self.lengths)

    def _prompts(self) -> Phase:
        recipe, new = self.recipe, MAX_NEW_TOKENS + self.lengths.thought
        found = self._sampling(
            "prompts",
            prompts=recipe.rollout.chunk_prompts,
            samples=1,
            prompt_tokens=recipe.base.window,
            new=new,
            tokens=recipe.iterations * recipe.prompts.per_iteration * new,
            requests=recipe.iterations * recipe.prompts.per_iteration,
            engine=kind_of(recipe, "policy"),
        )
        return replace(found, shares=1)  # the first process writes them

    def _anchor(self) -> Phase:
        section = self.recipe.anchor
        tokens = min(self.lengths.example, self.recipe.base.window)
        count = self.lengths.examples
        trained = None if count is None else math.ceil(count * section.epochs) * tokens
        one = Trains("anchor SFT", "sft", "anchor", tokens, None)
        return self._training(one, trained, rows=1)

    def _training(self, one: Trains, trained: int | None, *, rows: int) -> Phase:
        """A training; `rows` are the sequences of one example."""
        section: Optim = attrgetter(one.section)(self.recipe)
        at_once = self._at_once(section, one, rows)
        parts = training(
            self.held,
            kind=one.kind,
            rows=rows * at_once,
            tokens=one.tokens,
            checkpointing=section.gradient_checkpointing,
            accumulates=section.batch_size > at_once,
            dropout=isinstance(section, Anchor | Dpo) and section.lora.dropout > 0,
            scored=one.scored,
        )
        count = rows * at_once * one.tokens
        parts["activations"] += holes(self.held, parts["activations"], count=count)
        whole = self._libraries(parts, "training")
        shape = {
            "sequences": rows * at_once,
            "tokens": one.tokens,
            "accumulated": math.ceil(section.batch_size / at_once),
        }
        like = _LIKE.get(one.kind, "")
        total = sum(whole.values())
        alone = one.kind == "rloo" or method_of(self.recipe).one_process
        return Phase(
            one.name,
            whole,
            total,
            trained,
            shares=1 if alone else shape["accumulated"],
            shape=shape,
            like=like,
            trains=one,
        )

    def _at_once(self, section: Optim, one: Trains, rows: int) -> int:
        """Examples in memory at once, as long as they can be."""
        tokens, micro = section.micro_batch_tokens, section.micro_batch_size
        if one.kind == "rloo":  # a trainer of TRL's
            return micro
        if tokens != "auto":
            return min(section.batch_size, max(1, tokens // (rows * one.tokens)))
        if self.held.device == "cpu":
            return min(micro, max(1, AT_ONCE_ON_A_CPU // (rows * one.tokens)))
        return micro

    def _evaluation(self) -> Phase:
        """As judge and as policy: the larger of both."""
        recipe = self.recipe
        votes = recipe.evaluate.votes or recipe.judge.votes
        chunk = recipe.rollout.chunk_prompts
        models, section = recipe.iterations + 1, recipe.evaluate
        picked_from = section.policy_prompts * (section.best_of or 0)
        drawn = models * (section.policy_prompts * (section.samples + 1) + picked_from)
        total, requests = None, 0
        if self.lengths.graded is not None and not (section.ifeval or section.tasks):
            # A model's own answers are graded by itself and by the anchor, the anchor's by itself.
            own = min(section.judged_answers, section.policy_prompts * section.samples)
            external = kind_of(recipe, "judge").remote
            judges = models if external else 2 * models - 1
            requests = models * self.lengths.graded + judges * own
            voted = requests * votes + models * picked_from * recipe.judge.votes
            requests += models * picked_from
            total = drawn * self._answer + voted * self._judgement
        as_judge = self._sampling(
            "evaluation",
            prompts=chunk * recipe.rollout.n,
            samples=votes,
            prompt_tokens=self._judge_room,
            new=self._judgement,
            tokens=total,
            requests=requests,
            rounds=models,
            engine=kind_of(recipe, "judge"),
            like="",
        )
        as_policy = self._sampling(
            "evaluation",
            prompts=max(1, min(chunk, recipe.evaluate.policy_prompts)),
            samples=max(section.samples, section.best_of or 0),
            prompt_tokens=self._room,
            new=self._answer,
            tokens=total,
            requests=models * section.policy_prompts * 2,  # sampled and greedy
            rounds=models,
            engine=kind_of(recipe, "policy"),
        )
        larger = max((as_judge, as_policy), key=lambda phase: phase.total)
        parts = (as_judge.read, as_policy.read)
        read = None if total is None else sum(part or 0 for part in parts)
        return replace(larger, read=read)

    def _export(self) -> Phase:
        parts = exporting(self.held, source_itemsize=2, texts=_TEXTS, text_tokens=_TEXT_TOKENS)
        whole = self._libraries(parts, "export")
        on_host = self.hardware.device == "cuda"
        return Phase("export", whole, sum(whole.values()), on_host=on_host)


def _judgement(recipe: Recipe, lengths: Lengths) -> int:
    """Tokens of a judgement at most; of a server's judge no thought is known."""
    external = kind_of(recipe, "judge").remote
    return recipe.judge.max_new_tokens + (0 if external else lengths.thought)


def _disk(recipe: Recipe, held: Held, written: int) -> dict[str, int]:
    """Bytes on the disk: the base's files, what the run writes, and one merged export.

    Args:
        written: Tokens of what the iterations sample.
    """
    adapter, models = 4 * held.slot, recipe.iterations + 1
    return {
        "base": 2 * held.shape.parameters,
        "run": models * adapter + _WRITTEN * written,
        "export": 2 * held.shape.parameters,
    }


def advice(plan: Plan, remake: Callable[[Recipe], Plan]) -> tuple[list[str], bool]:
    """Settings, as `key=value`, with which more fits, and whether all does with them.

    They are tried one after the other on the plan itself; what does not help is left out, and what
    a later one has made needless.
    """
    made: dict[str, Any] = {}
    recipe = plan.recipe
    for _ in range(40):
        tight = [phase for phase in plan.phases if not plan.fits(phase)]
        if not tight:
            break
        names = {phase.name for phase in tight}
        before = sum(phase.total for phase in tight)
        remedies = (changes for phase in tight for changes in _remedies(plan.recipe, phase))
        for changes in remedies:
            try:
                tried = remake(with_settings(plan.recipe, changes))
            except UserError:
                continue
            if sum(phase.total for phase in tried.phases if phase.name in names) < before:
                made |= changes
                plan = tried
                break
        else:
            break
    fits = all(plan.fits(phase) for phase in plan.phases)
    for key in [key for key in made if fits and not key.endswith(("window", "max_new_tokens"))]:
        others = {name: value for name, value in made.items() if name != key}
        without = remake(with_settings(recipe, others))
        if all(without.fits(phase) for phase in without.phases):
            made = others
    return [f"{key}={_as_text(value)}" for key, value in made.items()], fits


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_settings(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other settings.

    Raises:
        UserError: The recipe would not be valid.
    """
    raw = recipe.model_dump()
    for key, value in changes.items():
        *sections, name = key.split(".")
        reduce(dict.__getitem__, sections, raw)[name] = value
    return recipe_from(raw, where=", ".join(changes))


def _remedies(recipe: Recipe, phase: Phase) -> Iterator[Mapping[str, Any]]:
    """What may make a phase smaller, the cheapest first; of an export nothing does."""
    if phase.name == "export":
        return
    if phase.trains is None and recipe.rollout.fold:
        yield {"rollout.fold": False}
    if recipe.base.quantization == "none" and phase.name == "load":
        yield {"base.quantization": "nf4"}
    if phase.trains is not None:
        section = phase.trains.section
        optim: Optim = attrgetter(section)(recipe)
        if not optim.gradient_checkpointing:
            yield {f"{section}.gradient_checkpointing": True}
        if optim.micro_batch_size > 1:
            halves = [n for n in range(1, optim.micro_batch_size) if optim.batch_size % n == 0]
            yield {f"{section}.micro_batch_size": max(halves)}
    elif phase.name != "load":
        for key, engine in (("rollout", recipe.rollout.engine), ("judge", recipe.judge.engine)):
            if engine is not None and ENGINES[engine].holds_base:
                yield {f"{key}.engine": HERE.name}
        rows = phase.shape["batch_rows"]
        if rows > phase.shape["samples"]:
            yield {"rollout.batch_rows": max(1, rows // 2)}
    if recipe.base.quantization == "none":
        yield {"base.quantization": "nf4"}
    if recipe.base.window > _LEAST_WINDOW and phase.name != "load":
        yield _shorter(recipe, max(_LEAST_WINDOW, recipe.base.window - 256))


def _shorter(recipe: Recipe, window: int) -> Mapping[str, Any]:
    """A shorter window, and answers that leave half of it to the prompt."""
    sections = {"rollout": recipe.rollout, "judge": recipe.judge}
    cut = {
        f"{name}.max_new_tokens": window // 2
        for name, section in sections.items()
        if section.max_new_tokens > window // 2
    }
    return {"base.window": window, **cut}


def needs_sharding(plan: Plan) -> int | None:
    """Devices over which the base has to be spread, where one cannot hold it; else None."""
    load = next(phase for phase in plan.phases if phase.name == "load")
    if plan.hardware.device == "cpu" or plan.fits(load):
        return None
    room = plan.usable - (load.total - load.parts["base"])
    return math.ceil(load.parts["base"] / room) if room > 0 else None
