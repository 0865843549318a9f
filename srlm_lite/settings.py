"""The settings that all methods share, by section; a method's own stand in its file.

Each is defined and documented in one place.

Marks on a setting say what `recipe.py` and others need to know of it beside its type and its
meaning: that it may be a path, that it came later, that it decides nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from srlm_lite.errors import shorten
from srlm_lite.shipped import CHAT_TEMPLATES, RUBRICS, TEMPLATES, Shelf
from srlm_lite.telling import looks_secret

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(gt=0, le=1)]


def known_temperature(value: float) -> float:
    """A temperature at which something can be drawn: logits are divided by it in float32.

    Raises:
        ValueError: Nothing can.
    """
    if value == 0 or 0.001 <= value <= 100:
        return value
    raise ValueError(f"{value:g} is no temperature: 0 (greedy), or from 0.001 to 100")


Temperature = Annotated[
    float,
    AfterValidator(known_temperature),
    WithJsonSchema({"anyOf": [{"const": 0}, {"type": "number", "minimum": 0.001, "maximum": 100}]}),
]


@dataclass(frozen=True, slots=True)
class Before:
    """Marks a setting that came later: what a run does that was begun without it.

    Such a run keeps this value, whatever the default is, until somebody names another; and a
    recipe with this value is the same configuration as one that cannot say it.
    """

    value: Any


@dataclass(frozen=True, slots=True)
class IsPath:
    """Marks a setting that may be a path.

    A relative one starts at the recipe's own directory, or else at the working directory, or else
    at that of the shipped recipes; what is in none of them stays as it is.
    """

    words: tuple[str, ...] = ()
    """Words that are no paths, even where there is a file or directory of that name."""
    shipped: Shelf | None = None
    """The shipped files that it may name without their place and ending."""
    by_content: bool = True
    """Whether it counts by what the file holds, wherever that lies; else as it is written."""


@dataclass(frozen=True, slots=True)
class DecidesNothing:
    """Marks a setting, or a whole section, that decides nothing of what is computed.

    A run goes on with another value. Such a setting names the run, says how long it goes on, looks
    at figures, passes them on or stops; says how a server is reached; is read by commands after
    the run alone; or says what is in memory at once, which moves last bits alone, and which a run
    that was out of memory has to change.
    """


DECIDES_NOTHING = DecidesNothing()


def _takes_truth(annotation: Any) -> bool:
    """Whether true or false can be a setting's value."""
    inside = get_args(annotation)
    if get_origin(annotation) is Literal:
        return any(isinstance(one, bool) for one in inside)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return True  # which says itself what it is
    return annotation in (bool, Any) or any(map(_takes_truth, inside))


class Section(BaseModel):
    """A part of a recipe. Frozen, and closed: an unknown key is an error."""

    model_config = ConfigDict(
        # No setting means anything as NaN or infinity, and bounds let both pass here and there.
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes`, which YAML reads as true, would be taken for a learning rate of 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and not _takes_truth(annotation):
            told = "YAML reads yes, no, on and off as true and false, which say nothing here"
            raise PydanticCustomError("truth", "{told}", {"told": told})
        return value

    def __hash__(self) -> int:
        """As pydantic's, which knows no mappings among the settings."""
        return hash(self.model_dump_json())


M = TypeVar("M")


def sections_of(section: type[BaseModel]) -> dict[str, type[Section]]:
    """The sections right below a section, by name."""
    return {
        name: field.annotation
        for name, field in section.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def marked(section: type[BaseModel], kind: type[M], prefix: str = "") -> Iterator[tuple[str, M]]:
    """The marks of one kind on the settings at and below a section, each after its dotted name."""
    below = sections_of(section)
    for name, field in section.model_fields.items():
        if name in below:
            yield from marked(below[name], kind, f"{prefix}{name}.")
        for mark in field.metadata:
            if isinstance(mark, kind):
                yield f"{prefix}{name}", mark


def as_before(section: Section) -> dict[str, Any]:
    """What a section says, without the settings that came later and are what they were before.

    For names that go by settings: what was made without such a setting keeps its name.
    """
    came = dict(marked(type(section), Before))
    found = section.model_dump()
    return {
        name: value
        for name, value in found.items()
        if name not in came or value != came[name].value
    }


class Base(Section):
    """The frozen weights."""

    name: Annotated[str, IsPath(by_content=False)]
    """Hub id, local directory, `.gguf` file, or `smollm2-135m-instruct`."""
    revision: str | None = None
    """Commit or tag on the Hub."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: 4-bit weights through bitsandbytes, with double quantization."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. `auto`: bfloat16 where the device is fast at it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes. `auto`: a GPU where there is one."""
    backend: Literal["transformers", "unsloth"] = "transformers"
    """What holds the weights and computes on them. `unsloth`: its loader and kernels, an extra; a
    tool for GPUs, which on a CPU only shows that it works."""
    attention: Annotated[Literal["own", "sdpa"], Before("sdpa")] = "own"
    """`own`: whatever the base's layers compute. `sdpa`: always by transformers' `sdpa`, which is
    faster and leaves out, without a word, the cap that Gemma 2 puts on its scores."""
    chat_template: Annotated[str | None, IsPath(shipped=CHAT_TEMPLATES)] = None
    """Name of a shipped template or a path; used in place of the tokenizer's own.
    Needed by bases that have none, such as Llama-2."""
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str], Before({})] = {}
    """Variables that the template reads, such as `enable_thinking: false` or `reasoning_effort`."""
    system: Annotated[str | None, Field(min_length=1, pattern=r"\S"), Before(None)] = None
    """A system message before every prompt, wherever the policy answers or learns to: in sampling,
    pairs, instruction data, evaluation, comparisons and `srlm-lite chat`. A prompt's own system
    message stands in its place. What a judge is asked has none, nor have rows of `data.extra`."""
    window: Positive = 2048
    """Longest sequence in tokens that training and judging may see."""


class Lora(Section):
    """Shape of one adapter."""

    rank: Positive = 16
    """Rank of the update; the size of the adapter grows with it."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs left out at each step of a training."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers that carry the adapter, or the ends of their dotted names."""


LORA_TARGETS = "lora.targets"
"""Where a target that the base does not have is told of."""


def is_targeted(module: str, targets: Iterable[str]) -> bool:
    """Whether `lora.targets` name a module, by its dotted name; as PEFT reads them."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


class Data(Section):
    """Where the seed data is: a directory as `srlm-lite data prepare` writes it."""

    dir: Annotated[str, IsPath()]
    """Holds `ift.jsonl`, `eft_train.jsonl`, `eft_eval.jsonl`, `prompts.jsonl`,
    and optionally `eval_prompts.jsonl`. For a base that thinks, a response to learn from may begin
    with a thought in the marks of the template, such as `<think>`; one without teaches to answer
    at once, behind the empty thought that the template writes there, if it writes one."""
    extra: Annotated[str | None, IsPath()] = None
    """More rows of the form of `ift.jsonl` for the anchor, such as a method's own questions with
    the replies that it hopes for. They are learned as they stand, without `base.system`."""
    ranked: Annotated[str | None, IsPath()] = None
    """Replies that humans ranked, a file of the form of `eft_train.jsonl`, for the methods that
    learn from them (`dpo`, `rlhf`: default `eft_train.jsonl`; `spin`: default `ift.jsonl`), and for
    an anchor that is taught to compare (`judge.form: pairwise`: default `eft_train.jsonl`)."""


class Optim(Section):
    """An optimiser run."""

    section: ClassVar[str]
    """Where it stands in a recipe."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Passes over the examples; a part of one is a share of the steps."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The highest of the schedule."""
    final_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The schedule ends at this share of the learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the learning rate rises from zero."""
    batch_size: Positive = 16
    """Sequences (or pairs) in one optimiser step."""
    micro_batch_size: Annotated[Positive, DECIDES_NOTHING] = 4
    """Sequences (or pairs) in memory at once; divides `batch_size`."""
    micro_batch_tokens: Annotated[Positive | Literal["auto"], Before("auto"), DECIDES_NOTHING] = (
        "auto"
    )
    """Tokens in memory at once; `auto`: what `micro_batch_size` of the longest sequences (or pairs)
    of the training can have at most, on a CPU no more than 1280. What several have in common counts
    once. One that alone has more is computed by itself. Halved by itself when memory runs out."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """A longer gradient is cut to this length before a step."""
    gradient_checkpointing: Annotated[bool, DECIDES_NOTHING] = False
    """Trades a third more compute for much less activation memory."""

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Optim:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) must divide batch_size "
                f"({self.batch_size})"
            )
        return self

    @model_validator(mode="after")
    def _constant_stays(self) -> Optim:
        if self.schedule == "constant" and self.final_learning_rate_ratio not in (0, 1):
            raise ValueError("a constant schedule has no final_learning_rate_ratio")
        return self


DISTURBED_PROMPTS = 64
"""Prompts of which `anchor.eft_targets: disturbed` makes pairs where `eft_prompts` is not set."""


class Anchor(Optim):
    """The SFT adapter on instruction data (IFT) and judge data (EFT): the paper's M1."""

    section = "anchor"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    init: Annotated[str, IsPath(words=("base",))] = "base"
    """`base`: a fresh adapter on the base. A path: an adapter trained before, taken as it is."""
    use_ift: bool = True
    """False leaves out `ift.jsonl`: a judge-only anchor for a base that already answers well."""
    use_eft: bool = True
    """False leaves out `eft_train.jsonl`: an anchor that is taught to answer alone."""
    ift_limit: Positive | None = None
    """At most this many rows of `ift.jsonl`, the first ones."""
    eft_prompts: Positive | None = None
    """At most this many EFT prompts (with all their replies)."""
    eft_targets: Literal["self", "given", "human", "disturbed"] = "self"
    """`self`: the IFT-only model writes rationale and score; a prompt's judgements are kept when
    their order agrees with the human order. `given`: the data has them. `human`: the human
    quality, or rank, on the rubric's scale and no rationale, for bases too small to write one.
    `disturbed`: as `self`, without ranked replies: of each of `eft_prompts` prompts (64 unless
    said) the model writes one that only looks like it, and its answer to that is the worse one."""
    disturb_template: Annotated[str, IsPath(shipped=TEMPLATES), Before("disturb")] = "disturb"
    """The question for an instruction that only looks like a given one: name of a shipped template
    or a path. Also asked by `srlm-lite bench judge --disturbed`."""
    max_score_share: Annotated[float, Field(gt=0, le=1)] = 0.35
    """The most common score is thinned to this share of the targets, unless they are given."""
    lora: Lora = Lora()


class Prompts(Section):
    """The prompts of each iteration."""

    source: Literal["file", "self-instruct"] = "file"
    """`self-instruct`: the anchor writes new prompts, 8-shot (6 from IFT, 2 generated)."""
    file: Annotated[str | None, IsPath()] = None
    """Prompt list; default: `prompts.jsonl` of the data directory."""
    per_iteration: Positive = 64
    """Prompts that each iteration answers."""
    reuse: bool = False
    """Let an iteration use prompts that an earlier one has used, when the file runs out."""


class Sampling(Section):
    """How text is drawn."""

    temperature: Temperature = 0.7
    """0 is greedy."""
    top_p: Probability = 0.9
    """Tokens are drawn from the likeliest that have this probability together; 1 is all."""
    max_new_tokens: Positive = 512
    """Longest reply, in tokens."""


EngineName = Literal["transformers", "vllm", "openai"]
SERVERS: frozenset[EngineName] = frozenset({"openai"})
"""Engines in which a server's own model answers; `openai.url` and `openai.model` say which."""


class Rollout(Sampling):
    """Candidates."""

    engine: EngineName = "transformers"
    """`transformers`: in this process, on the base in memory. `vllm`: in a process of its own.
    `openai`: a server that speaks the OpenAI protocol; it never sees what the run learns."""
    n: Annotated[int, Field(ge=2)] = 4
    """Candidates a prompt."""
    max_thought_tokens: Annotated[Positive, Before(1024)] = 1024
    """Longest thought before an answer, of a base that thinks; `max_new_tokens` are the answer's
    alone. It holds for every reply of the base, a judge's and an evaluation's too. A thought that
    has not closed by then is a reply that ran into the token limit."""
    batch_rows: Annotated[Positive | Literal["auto"], DECIDES_NOTHING] = "auto"
    """Sequences in one forward pass; `auto` goes by the device's memory. Halved by itself when
    memory runs out."""
    fold: bool = False
    """Sample with the stack written into a second copy of the weights, in the compute dtype: faster
    for small models, and for any on a GPU; the copy takes memory (of a quantized base as much as
    the unquantized one), and the update is rounded."""
    cuda_graphs: bool = True
    """Launch each step of sampling as one CUDA graph, where the base is whole on a GPU: faster, as
    Python launches kernels more slowly than a GPU computes them. Nothing changes on a CPU."""
    chunk_prompts: Positive = 16
    """Prompts whose results reach the disk together; a killed run loses at most one chunk."""


FormName = Literal["grade", "pairwise", "checklist", "steps"]


class Judge(Sampling):
    """LLM-as-a-judge."""

    form: Annotated[FormName, Before("grade")] = "grade"
    """How candidates are judged. `grade`: each alone, by the rubric. `pairwise`: a prompt's against
    each other. `checklist`: each by a few yes-or-no items that the model writes for the prompt.
    `steps`: each step of it, right or wrong."""
    rationale: Annotated[bool, Before(True)] = True
    """False: the judge writes nothing. A score is the mean of the whole scores that it would give,
    by their probability, for the price of reading the question once; `votes` and `score` count for
    nothing then, and the anchor learns judge data without reasons. Needs a rubric whose scores are
    one token each."""
    engine: EngineName | None = None
    """Default: `rollout.engine`. `openai` makes the judge an external one."""
    rubric: Annotated[str, IsPath(shipped=RUBRICS)] = "additive-5"
    """Name of a shipped rubric or a path."""
    score: Literal["sampled", "expected"] = "sampled"
    """`sampled`: the number that the judge writes, as in the paper. `expected`: the mean of the
    numbers it could have written there, by their probability; finer, with fewer ties. Needs a
    rubric whose scores are one token each; a fraction such as 3.5 counts as sampled."""
    votes: Positive = 3
    """Judgements sampled for each candidate; their mean is its score."""
    min_votes: Positive = 2
    """Candidates with fewer readable votes are dropped."""
    adaptive_votes: Annotated[bool, Before(False)] = False
    """Draw more votes only where they can still matter: two on every candidate, and then up to
    `votes` on those that may yet be the best or the worst of their prompt, until the chance that
    another one would be is below 5%. Those that are drawn are the same as without."""
    max_new_tokens: Positive = 256
    retry_max_new_tokens: Positive = 512
    """An unreadable vote is sampled once more with this limit."""

    @model_validator(mode="after")
    def _votes_suffice(self) -> Judge:
        if self.min_votes > self.votes:
            raise ValueError("min_votes exceeds votes")
        if self.adaptive_votes and not self.rationale:
            raise ValueError("without a rationale there are no votes: leave out adaptive_votes")
        return self


class Vllm(Section):
    """Settings of the engine `vllm`."""

    memory: Annotated[float, Field(gt=0, le=1), DECIDES_NOTHING] = 0.45
    """Share of the GPU's memory, or on a CPU, for the key-value cache, of the free memory; the base
    in this process keeps its own."""


class OpenAI(Section):
    """The server of the engine `openai`."""

    url: str | None = None
    """Up to and including `/v1`."""
    model: str | None = None
    """What the server calls the model that it is to ask."""
    key_variable: Annotated[str, DECIDES_NOTHING] = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is in no file and no log."""
    parallel: Annotated[Positive, DECIDES_NOTHING] = 8
    """Requests under way at once."""
    timeout_s: Annotated[float, Field(gt=0), DECIDES_NOTHING] = 120.0
    """Seconds that one request may take."""
    retries: Annotated[int, Field(ge=0), DECIDES_NOTHING] = 6
    """How often a request is repeated, with exponential back-off, before the run stops."""

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(f"{shorten(repr(value))} is no URL such as http://127.0.0.1:8000/v1")
        return value

    @field_validator("key_variable")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        # Of a key that was put here nothing is to be said, in no message and no run.json.
        if not re.fullmatch(r"[A-Za-z_]\w*", value) or looks_secret(value):
            raise ValueError(
                "is the name of an environment variable, such as OPENAI_API_KEY; the key itself "
                "stands in that variable, and in no recipe"
            )
        return value


class Pairing(Section):
    """How scores become preference pairs."""

    source: Literal["judge", "random", "flipped", "gold"] = "judge"
    """`random` is the control: two candidates of a prompt, drawn blindly. `flipped` is another one:
    the judge's pairs turned round, so that what it rejects is chosen. `gold` is the upper bound:
    the scorer that `evaluate.gold` names takes the judge's place."""
    min_gap: Annotated[float, Field(ge=0)] = 0.0
    """The scores of a pair must differ by more than this."""
    weight: Annotated[Literal["equal", "gap"], Before("equal")] = "equal"
    """`gap`: the loss of a pair counts by its score gap, as a multiple of the iteration's mean."""
    rho: (
        Annotated[float, Field(ge=0, le=0.5)] | tuple[Annotated[float, Field(ge=0, le=0.5)], ...]
    ) = 0.0
    """Length control of Meta-Rewarding: chosen is the shortest candidate within this share of the
    prompt's score range from its top, rejected the longest within it from the bottom; 0 is off.
    A list gives each iteration its own, the last one those after it."""
    alpha: float | Literal["auto"] = 0.0
    """Length control of DICE: candidates are ranked by score - alpha * characters. `auto` finds
    the alpha at which chosen and rejected are equally long on average. A negative one is a judge
    that likes length: for experiments."""
    replay: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Pairs of the last iteration, of the one before it, and so on that are learned once more: at
    most so many for each new pair."""
    accumulate: Annotated[bool | Literal["auto"], Before(False)] = "auto"
    """Learn the pairs of all iterations so far, those of judgements included, each time. `auto`:
    where a delta is rebased (`dpo.init: anchor`) and `replay` names no shares, for such a delta
    has forgotten what the last one learned. Iteration t then takes about t times the steps of the
    first one."""
    older_steps: Annotated[Literal["more", "same"], Before("more")] = "more"
    """`same`: older pairs take no steps of their own: `dpo.batch_size` counts new pairs, and each
    step has their share of older ones beside them, to the nearest whole multiple."""
    older_order: Annotated[Literal["keep", "drop", "smooth"], Before("keep")] = "keep"
    """What becomes of older pairs whose order the newest judge does not share. `drop` and `smooth`
    have it grade both replies anew, `judge.votes` times: `drop` leaves a pair out where it does
    not prefer the chosen one; `smooth` takes the share of its votes that do not for how likely the
    order is wrong, as `dpo.label_smoothing` does."""
    drop_truncated: bool = True
    """Leave out candidates that ran into the token limit; else they are learned without an end."""
    min_pairs: Annotated[Positive, DECIDES_NOTHING] = 8
    """Stop when an iteration finds fewer."""


LossName = Literal["sigmoid", "sigmoid_norm", "ipo", "apo_zero", "apo_down", "simpo", "sft"]
"""What a delta may minimise; all but `simpo` by the names that TRL has for them."""


class Dpo(Optim):
    """Training the delta."""

    section = "dpo"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    init: Literal["anchor", "previous"] = "anchor"
    """`anchor` rebases: the delta starts from zero. `previous` starts from the last delta."""
    reference: Literal["init", "anchor"] = "init"
    """The stack that DPO's log-ratios are taken against."""
    loss: Annotated[LossName, Before("sigmoid")] = "sigmoid"
    """What is minimised; docs/training.md has the formulas. `sigmoid`: DPO's. `sigmoid_norm`: the
    same on log-ratios per token. `ipo`: a square around a target margin per token, with `beta` for
    its tau. `apo_zero`: the chosen reply up and the rejected one down. `apo_down`: both down, the
    rejected one more. `simpo`: likelihoods per token, and no reference. `sft`: the chosen reply
    alone, for a control."""
    target_margin: Annotated[float, Field(ge=0), Before(0.5)] = 0.5
    """Margin by which the chosen reply is to be ahead, of `simpo` alone: its gamma."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """DPO's inverse temperature: the larger, the closer the delta stays to the reference."""
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the negative log-likelihood of the chosen reply beside the DPO loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """How likely a pair's order is wrong (conservative DPO): the loss is (1 - s) times DPO's, plus
    s times that of the pair turned round. Comes on top of what a method says of a single pair."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Length-desensitised DPO (LD-DPO): weight of the tokens by which one reply is longer than the
    other. Default: 1, plain DPO."""
    lora: Lora = Lora()

    @property
    def loss_of_equals(self) -> float | None:
        """The loss of a pair where policy and reference are one model, whatever the pair; None
        where there is no such value."""
        of_equals: dict[str, float] = {
            "sigmoid": math.log(2),
            "sigmoid_norm": math.log(2),
            "ipo": 1 / (2 * self.beta) ** 2,
            "apo_zero": 1.0,
            "apo_down": 1.0,
        }
        return of_equals.get(self.loss)

    @model_validator(mode="after")
    def _terms_go_with_the_loss(self) -> Dpo:
        if self.ld_alpha is not None and self.loss in ("sigmoid_norm", "ipo", "simpo", "sft"):
            raise ValueError(f"loss={self.loss} knows no ld_alpha: it goes by the token already")
        if self.loss != "simpo" and self.target_margin != 0.5:
            raise ValueError(f"loss={self.loss} knows no target_margin: it is that of simpo")
        if self.loss == "sft" and (self.label_smoothing or self.nll_weight):
            raise ValueError(
                "loss=sft is the likelihood of the chosen reply alone: leave out label_smoothing "
                "and nll_weight"
            )
        return self

    @model_validator(mode="after")
    def _no_dropout(self) -> Dpo:
        if self.lora.dropout:
            raise ValueError("dropout would make policy and reference differ; leave it at 0")
        return self


class Gate(Section):
    """What a model may lose before the run warns of it, or stops. It only looks at figures, so a
    stopped run goes on with other gates."""

    action: Literal["warn", "stop"] = "warn"
    """`stop`: no iteration starts from a model that does not pass."""
    judge_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Largest fall of the judge's pairwise accuracy below the best model before; of this and of
    the next three never less than chance can do with so few prompts."""
    gold: Annotated[float, Field(ge=0)] = 0.0
    """Largest fall of the gold score below the best model before, in points."""
    criterion: Annotated[float, Field(ge=0)] = 0.0
    """Largest fall of one of the gold scorer's criteria below the anchor while the whole score
    rises, in points; never less than chance can do with so few prompts and so many criteria."""
    anchor_score: Annotated[float, Field(ge=0)] = 0.0
    """Largest fall of the score that the anchor, as judge, gives to the answers below the best
    model before, in points."""
    capability: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest fall of a task of the capability panel below the anchor."""
    one_score: Probability = 0.8
    """Share of the judge's votes with one and the same score at which its grades have collapsed."""
    readable: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of readable votes."""
    vote_share: Probability = 0.95
    """Mean share of the most frequent answer, where answers are voted on (`scpo`), from which on
    the votes have collapsed if over the prompts answers have also become few: the entropy of the
    most frequent ones is below half of what it was in the first iteration."""
    position_consistency: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of comparisons whose two orders name the same reply, of a judge that compares."""
    intransitive: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Largest share of triples of replies that such a judge puts in a circle; one in four is what a
    coin does."""
    length: Annotated[float, Field(ge=0)] = 0.3
    """Answers may have grown since the anchor by so much more, as a share of their length, than
    their score has, as a share of the rubric's scale. The score is the anchor's."""
    truncated: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Largest rise of the share of answers that run into the token limit."""
    divergence: Annotated[float, Field(gt=0)] = 1.0
    """How far the policy may go from the anchor, in nats a token of its own answers. It needs no
    judge, so none can be pleased by what it warns of."""


class Evaluate(Section):
    """What is measured after the anchor and after each iteration."""

    eft_prompts: Positive | None = None
    """At most this many EFT eval prompts (with all their replies)."""
    votes: Positive | None = None
    """Judgements a reply; default: `judge.votes`."""
    policy_prompts: Annotated[int, Field(ge=0)] = 64
    """Held-out prompts the policy answers, for length and gold score."""
    samples: Positive = 1
    """Sampled answers a prompt, beside one greedy answer."""
    temperature: Annotated[Temperature, Field(gt=0)] | None = None
    """Temperature of the sampled answers; default: `rollout.temperature`."""
    best_of: Annotated[Annotated[int, Field(ge=2)] | None, Before(None)] = None
    """So many answers to each prompt are sampled and graded by the model, as candidates are, and
    the best one is measured too: what the judge brings without any training."""
    gold: str | None = None
    """`module:function`: an external score of an answer that the model never sees."""
    judged_answers: Annotated[int, Field(ge=0)] = 64
    """So many of the sampled answers are graded by the model itself and by the anchor, a judge
    that stays what it is; 0 for none. The divergence, which needs no judge, is of as many, or of
    64."""
    ifeval: Annotated[str | None, IsPath()] = None
    """IFEval's prompts, a file of the form of its `input_data.jsonl`: how many of the instructions
    that code can check are followed, in greedy answers. Needs the extra `eval`."""
    ifeval_prompts: Positive | None = None
    """At most this many of them."""
    ifeval_max_new_tokens: Positive | None = None
    """Longest answer to them. Default: 1280 as in lm-evaluation-harness, or what the window leaves
    the longest of the prompts."""
    tasks: tuple[str, ...] = ()
    """Capability panel: tasks of lm-evaluation-harness by name, on the model in memory. Needs the
    extra `eval`."""
    tasks_dir: Annotated[str | None, IsPath()] = None
    """Directory with tasks of your own, YAML files in the harness's format; their data may be local
    files."""
    tasks_limit: Positive | None = None
    """At most so many items a task."""
    gate: Annotated[Gate, DECIDES_NOTHING] = Gate()


TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracking(Section):
    """Who else is told a run's figures while it runs; decides nothing in a run. Needs the extra
    `tracking`."""

    report_to: tuple[TrackerName, ...] = ()
    """What TRL logs at each step of each training, and the figures of each stage, go there: one
    name or a list. One run here is one run there."""
    project: str = "srlm-lite"
    """Project in W&B and trackio."""
    name: str | None = None
    """The run's name in W&B and trackio; default: the recipe's, the directory's, and a few letters
    that tell runs apart."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, str):
            return () if value == "none" else (value,)
        return value


class Compare(Section):
    """Head to head of two models, `srlm-lite compare`; decides nothing in a run."""

    judging: Literal["pointwise", "pairwise"] = "pointwise"
    """How a judge of the run's own decides. `pointwise`: the higher of the scores that it gives
    each reply alone, as judge data teaches it to. `pairwise`: it is shown both, in both orders.
    A judge behind a server is asked pairwise, unless the command says otherwise."""
    template: Annotated[str, IsPath(shipped=TEMPLATES)] = "pairwise"
    """The pairwise question: name of a shipped template or a path."""
    temperature: Temperature = 0.0
    """Temperature of the pairwise judge; 0 is greedy."""
    max_new_tokens: Positive = 512
    """Longest reply of the pairwise judge."""


class MtBench(Section):
    """`srlm-lite mt-bench`; decides nothing in a run."""

    max_new_tokens: Positive | None = 1024
    """Longest answer, as in MT-Bench's own program; half of `base.window` where that is less. None:
    as `rollout.max_new_tokens`."""
    top_p: Annotated[Probability | None, Before(None)] = 1.0
    """Nucleus of an answer, as in MT-Bench's own program. None: as `rollout.top_p`."""
    template: Annotated[str, IsPath(shipped=TEMPLATES)] = "mt-bench"
    """The judge's question: name of a shipped template or a path."""
    judge_max_new_tokens: Positive = 1024
    """Longest reply of the judge."""


class Consistency(Section):
    """Terms of a DPO that pulls judge and implicit reward together; pairs they dispute wait."""

    sharpness: Annotated[float, Field(gt=0)] = 1.0
    """Turns a difference of log-ratios per token into the implicit reward's preference."""
    consistency_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the symmetric KL divergence between the two preferences."""
    confidence_weight: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the entropy of both."""
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 0.5
    """DPO takes a pair when the judge prefers its chosen reply by more than this."""


class Shared(Section):
    """What a recipe says whatever its method: all but the sections that one method alone reads."""

    name: Annotated[str, DECIDES_NOTHING]
    """What reports and trackers call a run of it."""
    description: Annotated[str, DECIDES_NOTHING] = ""
    """What it is for, in a line; `srlm-lite recipes list` prints it."""
    method: str = "self-rewarding"
    """What turns answers into something to learn from."""
    seed: int = 0
    """All that is drawn at random follows from it."""
    iterations: Annotated[int, Field(ge=0), DECIDES_NOTHING] = 3
    """Rounds of the loop after the anchor. A longer run continues a shorter one."""
    checkpoint_minutes: Annotated[float, Field(ge=0), DECIDES_NOTHING] = 10.0
    """Minutes of a training after which it is kept on disk as it is, and then again and again: a
    killed run goes on from there, with the same bytes. The folder takes three times what the
    adapter that trains takes in float32, twice that while it is replaced, and is deleted when the
    training has ended. 0: only when Ctrl-C or SIGTERM ends the run, which keeps it always."""
    base: Base
    data: Data
    anchor: Anchor = Anchor()
    prompts: Prompts = Prompts()
    rollout: Rollout = Rollout()
    judge: Judge = Judge()
    pairing: Pairing = Pairing()
    dpo: Dpo = Dpo()
    evaluate: Evaluate = Evaluate()
    tracking: Annotated[Tracking, DECIDES_NOTHING] = Tracking()
    compare: Annotated[Compare, DECIDES_NOTHING] = Compare()
    mt_bench: Annotated[MtBench, DECIDES_NOTHING] = MtBench()
    vllm: Vllm = Vllm()
    openai: OpenAI = OpenAI()

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the layers that carry an adapter: the anchor's, a delta's or both."""
        return tuple(dict.fromkeys((*self.anchor.lora.targets, *self.dpo.lora.targets)))
