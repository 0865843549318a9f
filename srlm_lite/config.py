"""Recipes: what a run is to do. Every setting is defined and documented here, once.

A recipe is a YAML file with the sections below. `load_recipe` reads it, applies overrides such
as `dpo.beta=0.2`, resolves its paths, and refuses keys it does not know.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from srlm_lite.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(gt=0, le=1)]


def known_temperature(value: float) -> float:
    """A temperature at which something can be drawn: logits are divided by it in float32.

    Raises:
        ValueError: It is none.
    """
    if value == 0 or 0.001 <= value <= 100:
        return value
    raise ValueError(f"{value:g} is no temperature: 0 (greedy), or from 0.001 to 100")


Temperature = Annotated[float, AfterValidator(known_temperature)]


@dataclass(frozen=True, slots=True)
class Before:
    """Marks a setting that came later: what a run does that was begun without it.

    Such a run keeps this value, whatever the default is, until somebody names another; and a
    recipe with this value is the same configuration as one that cannot say it.
    """

    value: Any


class Section(BaseModel):
    """A part of a recipe. Frozen, and closed: an unknown key is an error."""

    model_config = ConfigDict(
        # No setting means anything as NaN or infinity, and bounds let both pass here and there.
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    def __hash__(self) -> int:
        """As pydantic's, which knows no mappings among the settings."""
        return hash(self.model_dump_json())


class Base(Section):
    """The frozen weights."""

    name: str
    """Hub id, local directory, `.gguf` file, or `smollm2-135m-instruct`."""
    revision: str | None = None
    """Commit or tag on the Hub."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: 4-bit weights through bitsandbytes, with double quantization."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. `auto`: bfloat16 where the device is fast at it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["transformers", "unsloth"] = "transformers"
    """What holds the weights and computes on them. `unsloth`: its loader and kernels, an extra; a
    tool for GPUs, which on a CPU only shows that it works."""
    attention: Annotated[Literal["own", "sdpa"], Before("sdpa")] = "own"
    """`own`: whatever the base's layers compute. `sdpa`: always by transformers' `sdpa`, which is
    faster and leaves out, without a word, the cap that Gemma 2 puts on its scores."""
    chat_template: str | None = None
    """Name of a shipped template or a path; used in place of the tokenizer's own.
    Needed by bases that have none, such as Llama-2."""
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str], Before({})] = {}
    """Variables that the template reads, such as `enable_thinking: false` or `reasoning_effort`."""
    window: Positive = 2048
    """Longest sequence in tokens that training and judging may see."""


class Lora(Section):
    """Shape of one adapter."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
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

    dir: str
    """Holds `ift.jsonl`, `eft_train.jsonl`, `eft_eval.jsonl`, `prompts.jsonl`,
    and optionally `eval_prompts.jsonl`. For a base that thinks, a response to learn from may begin
    with a thought in the marks of the template, such as `<think>`; one without teaches to answer
    at once, behind the empty thought that the template writes there, if it writes one."""
    extra: str | None = None
    """More rows of the form of `ift.jsonl` for the anchor, such as a method's own questions with
    the replies that it hopes for."""
    ranked: str | None = None
    """Replies that humans ranked, a file of the form of `eft_train.jsonl`, for the methods that
    learn from them (`dpo`, `rlhf`: default `eft_train.jsonl`; `spin`: default `ift.jsonl`)."""


class Optim(Section):
    """An optimiser run."""

    section: ClassVar[str]
    """Where it stands in a recipe."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The schedule ends at this share of the learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Positive = 16
    """Sequences (or pairs) in one optimiser step."""
    micro_batch_size: Positive = 4
    """Sequences (or pairs) in memory at once; divides `batch_size`."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False
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


class Anchor(Optim):
    """The SFT adapter on instruction data (IFT) and judge data (EFT): the paper's M1."""

    section = "anchor"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    init: str = "base"
    """`base`: a fresh adapter on the base. A path: an adapter trained before, taken as it is."""
    use_ift: bool = True
    """False leaves out `ift.jsonl`: a judge-only anchor for a base that already answers well."""
    use_eft: bool = True
    ift_limit: Positive | None = None
    eft_prompts: Positive | None = None
    """At most this many EFT prompts (with all their replies)."""
    eft_targets: Literal["self", "given", "human"] = "self"
    """`self`: the IFT-only model writes rationale and score; a prompt's judgements are kept when
    their order agrees with the human order. `given`: the data has them. `human`: the human
    quality, or rank, on the rubric's scale and no rationale, for bases too small to write one."""
    max_score_share: Annotated[float, Field(gt=0, le=1)] = 0.35
    """The most common score is thinned to this share of the targets, unless they are given."""
    lora: Lora = Lora()


class Prompts(Section):
    """The prompts of each iteration."""

    source: Literal["file", "self-instruct"] = "file"
    """`self-instruct`: the anchor writes new prompts, 8-shot (6 from IFT, 2 generated)."""
    file: str | None = None
    """Prompt list; default: `prompts.jsonl` of the data directory."""
    per_iteration: Positive = 64
    reuse: bool = False
    """Let an iteration use prompts that an earlier one has used, when the file runs out."""


class Sampling(Section):
    """How text is drawn."""

    temperature: Temperature = 0.7
    """0 is greedy."""
    top_p: Probability = 0.9
    max_new_tokens: Positive = 512


EngineName = Literal["transformers", "vllm", "openai"]


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
    batch_rows: Positive | Literal["auto"] = "auto"
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


class Judge(Sampling):
    """LLM-as-a-judge."""

    engine: EngineName | None = None
    """Default: `rollout.engine`. `openai` makes the judge an external one."""
    rubric: str = "additive-5"
    """Name of a shipped rubric or a path."""
    score: Literal["sampled", "expected"] = "sampled"
    """`sampled`: the number that the judge writes, as in the paper. `expected`: the mean of the
    numbers it could have written there, by their probability; finer, with fewer ties. Needs a
    rubric whose scores are one token each; a fraction such as 3.5 counts as sampled."""
    votes: Positive = 3
    """Judgements sampled for each candidate; their mean is its score."""
    min_votes: Positive = 2
    """Candidates with fewer readable votes are dropped."""
    max_new_tokens: Positive = 256
    retry_max_new_tokens: Positive = 512
    """An unreadable vote is sampled once more with this limit."""

    @model_validator(mode="after")
    def _votes_suffice(self) -> Judge:
        if self.min_votes > self.votes:
            raise ValueError("min_votes exceeds votes")
        return self


class Vllm(Section):
    """Settings of the engine `vllm`."""

    memory: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Share of the GPU's memory, or on a CPU, for the key-value cache, of the free memory; the base
    in this process keeps its own."""


class OpenAI(Section):
    """The server of the engine `openai`."""

    url: str | None = None
    """Up to and including `/v1`."""
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is in no file and no log."""
    parallel: Positive = 8
    """Requests under way at once."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Of one request."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Of one request, with exponential back-off, before the run stops."""

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


class Pairing(Section):
    """How scores become preference pairs."""

    source: Literal["judge", "random", "gold"] = "judge"
    """`random` is the control: two candidates of a prompt, drawn blindly. `gold` is the upper
    bound: the scorer that `evaluate.gold` names takes the judge's place."""
    min_gap: Annotated[float, Field(ge=0)] = 0.0
    """The scores of a pair must differ by more than this."""
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
    drop_truncated: bool = True
    """Leave out candidates that ran into the token limit; else they are learned without an end."""
    min_pairs: Positive = 8
    """Stop when an iteration finds fewer."""


class Dpo(Optim):
    """Training the delta."""

    section = "dpo"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    init: Literal["anchor", "previous"] = "anchor"
    """`anchor` rebases: the delta starts from zero. `previous` starts from the last delta."""
    reference: Literal["init", "anchor"] = "init"
    """The stack that DPO's log-ratios are taken against."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the negative log-likelihood of the chosen reply beside the DPO loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """How likely a pair's order is wrong (conservative DPO): the loss is (1 - s) times DPO's, plus
    s times that of the pair turned round. Comes on top of what a method says of a single pair."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Length-desensitised DPO (LD-DPO): weight of the tokens by which one reply is longer than the
    other. Default: 1, plain DPO."""
    lora: Lora = Lora()

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
    """Of the sampled answers; default: `rollout.temperature`."""
    gold: str | None = None
    """`module:function`: an external score of an answer that the model never sees."""
    judged_answers: Annotated[int, Field(ge=0)] = 64
    """So many of the sampled answers are graded by the model itself and by the anchor, a judge
    that stays what it is; 0 for none. The divergence, which needs no judge, is of as many, or of
    64."""
    ifeval: str | None = None
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
    tasks_dir: str | None = None
    """Directory with tasks of your own, YAML files in the harness's format; their data may be local
    files."""
    tasks_limit: Positive | None = None
    """At most so many items a task."""
    gate: Gate = Gate()


TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracking(Section):
    """Who else is told a run's figures while it runs; decides nothing in a run. Needs the extra
    `tracking`."""

    report_to: tuple[TrackerName, ...] = ()
    """What TRL logs at each step of each training, and the figures of each stage, go there: one
    name or a list. One run here is one run there."""
    project: str = "srlm-lite"
    """Of W&B and trackio."""
    name: str | None = None
    """Of the run in W&B and trackio; default: the recipe's, the directory's, and a few letters
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
    template: str = "pairwise"
    """Of the pairwise question: name of a shipped template or a path."""
    temperature: Temperature = 0.0
    """Of the pairwise judge; 0 is greedy."""
    max_new_tokens: Positive = 512
    """Of its reply."""


class MtBench(Section):
    """`srlm-lite mt-bench`; decides nothing in a run."""

    max_new_tokens: Positive | None = 1024
    """Of an answer, as in MT-Bench's own program; half of `base.window` where that is less. None:
    as `rollout.max_new_tokens`."""
    top_p: Annotated[Probability | None, Before(None)] = 1.0
    """Of an answer, as in MT-Bench's own program. None: as `rollout.top_p`."""
    template: str = "mt-bench"
    """Of the judge's question: name of a shipped template or a path."""
    judge_max_new_tokens: Positive = 1024
    """Of the judge's reply."""


MethodName = Literal[
    "self-rewarding",
    "dpo",
    "spin",
    "cream",
    "temporal",
    "dno",
    "scir",
    "meta-rewarding",
    "rlaif",
    "rlhf",
]


class Offline(Section):
    """Method `dpo`: pairs of replies that humans ranked, from `data.ranked`."""

    pairs: Literal["best-worst", "all"] = "best-worst"
    """`all`: every two replies of a prompt that humans told apart."""


class Spin(Section):
    """Method `spin`: a human's answer against the last model's."""

    answers: Positive = 1
    """Answers of the last model to each prompt, each a pair with the human's."""
    lambdas: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        0.1,
        0.1,
        0.1,
        5.0,
    )
    """The loss's lambda in each iteration, in place of `dpo.beta`; the last one stays."""


class Cream(Section):
    """Method `cream`: pairs count by how consistently they are ranked."""

    scores: Literal["likelihood", "judge"] = "likelihood"
    """What ranks the candidates. `likelihood` is the paper: their log-likelihood ratio to the
    bare base. `judge`: this iteration's judge against the last iteration's."""
    consistency: Literal["run", "sample"] = "run"
    """`run`: one C, the mean over all prompts. `sample`: each prompt its own."""


class Dno(Section):
    """Method `dno`: every pair with a good winner and a wide margin."""

    teacher: str | None = None
    """A stronger model's answers: a JSONL file with `prompt_id` and `response`, or `server` for
    the model of the section `openai`. Without, the policy is alone."""
    grading: Literal["rubric", "side-by-side"] = "rubric"
    """`side-by-side`: the judge sees all answers to a prompt at once, in an order drawn for each
    vote, as in the paper. `rubric`: each answer by itself."""
    template: str = "side-by-side"
    """Of the side-by-side judge's prompt: name of a shipped template or a path."""
    least_positive: float = 5.0
    """Lowest score of a chosen answer."""
    margin: Annotated[float, Field(gt=0)] = 2.0
    """Least gap of a pair whose chosen answer is the teacher's."""
    own_margin: Annotated[float, Field(gt=0)] = 1.0
    """Least gap of a pair whose chosen answer is the policy's own."""
    repeated_words: Annotated[int, Field(ge=2)] = 6
    """An answer that says a run of so many words three times is rejected whatever its score."""


class Consistency(Section):
    """Terms of a DPO that pulls judge and implicit reward together; pairs they dispute wait."""

    sharpness: Annotated[float, Field(gt=0)] = 1.0
    """Turns a difference of log-ratios per token into the implicit reward's preference."""
    consistency_weight: Annotated[float, Field(ge=0)] = 0.1
    """Of the symmetric KL divergence between the two preferences."""
    confidence_weight: Annotated[float, Field(ge=0)] = 0.01
    """Of the entropy of both."""
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 0.5
    """DPO takes a pair when the judge prefers its chosen reply by more than this."""


class Scir(Consistency):
    """Method `scir`: judge and implicit reward are pulled together; pairs they dispute wait."""


class MetaRewarding(Section):
    """Method `meta-rewarding`: the model also judges its judgements, and learns from that."""

    schedule: tuple[Literal["both", "policy", "judge"], ...] = ("both", "both", "policy")
    """What each iteration trains, the last entry those after it: `both` policy and judge, or one
    of them alone. The paper stops training the judge after two iterations. Where the judge trains
    alone, a delta for both roles learns from its pairs, and the policy changes along; of deltas
    for one role each the policy's stays as it is."""
    roles: Literal["shared", "separate"] = "shared"
    """One delta for policy and judge, or one each."""
    template: str = "meta-judge"
    """Of the meta-judge's question: name of a shipped template or a path."""
    verdicts: tuple[str, str] = ("Winner: Judgement A", "Winner: Judgement B")
    """Last line of the meta-judge's reply where the first, or the second judgement wins."""
    max_new_tokens: Positive = 512
    """Of the meta-judge's reply."""
    hide_scores: bool = False
    """Show it the judgements without their scores: it tends to choose the higher one."""
    judgement_caps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1100, 1000)
    """Longest judgement, in characters, that may be chosen in each iteration."""
    answer_caps: tuple[Annotated[int, Field(ge=0)], ...] = (2500, 0)
    """Longest answer that may be chosen in each iteration; 0 is any."""


class RevisionSft(Optim):
    """SFT on revisions."""

    section = "rlaif.sft"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4


class Rlaif(Section):
    """Method `rlaif`: critique and revision, then preferences, both by principles."""

    principles: str = "assistant"
    """Name of shipped principles or a path: the principles and the questions about them."""
    drafts: Positive = 1
    """Answers to each prompt of the first iteration that are revised."""
    rounds: Positive = 4
    """Times a draft is criticised and revised, each time in the light of a fresh principle."""
    helpful: Annotated[float, Field(ge=0)] = 0.0
    """Rows of `ift.jsonl` that are learned beside the revisions, so many for each of them."""
    max_new_tokens: Positive = 256
    """Of a critique, or of the rationale before a label."""
    rationale: bool = False
    """The labeller gives its reasons before it names the better answer."""
    clamp: Annotated[float, Field(gt=0.5, le=1)] = 0.6
    """Labels after a rationale stay between 1 - clamp and clamp: such labels are overconfident."""
    sft: RevisionSft = RevisionSft()


class RewardSection(Optim):
    """Training the reward model."""

    section = "rlhf.reward"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    pairs: Literal["best-worst", "all"] = "all"
    """`all`: every two replies of a prompt that humans told apart."""


class Rlhf(Section):
    """Method `rlhf`: a reward model from human pairs, and the policy trained against it."""

    kl_weight: Annotated[float, Field(gt=0)] = 0.05
    """What a nat of divergence from the reference costs, in units of the reward."""
    reward: RewardSection = RewardSection()


class Shared(Section):
    """What all methods share of a recipe."""

    name: str
    description: str = ""
    method: MethodName = "self-rewarding"
    seed: int = 0
    iterations: Annotated[int, Field(ge=0)] = 3
    base: Base
    data: Data
    anchor: Anchor = Anchor()
    prompts: Prompts = Prompts()
    rollout: Rollout = Rollout()
    judge: Judge = Judge()
    pairing: Pairing = Pairing()
    dpo: Dpo = Dpo()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    compare: Compare = Compare()
    mt_bench: MtBench = MtBench()
    vllm: Vllm = Vllm()
    openai: OpenAI = OpenAI()


class Recipe(Shared):
    """All a run needs to know."""

    offline: Offline = Offline()
    spin: Spin = Spin()
    cream: Cream = Cream()
    dno: Dno = Dno()
    scir: Scir = Scir()
    meta_rewarding: MetaRewarding = MetaRewarding()
    rlaif: Rlaif = Rlaif()
    rlhf: Rlhf = Rlhf()

    @model_validator(mode="after")
    def _server_is_named(self) -> Recipe:
        if self.asks_a_server and not (self.openai.url and self.openai.model):
            raise ValueError("the engine openai needs openai.url and openai.model")
        return self

    @model_validator(mode="after")
    def _implicit_reward_exists(self) -> Recipe:
        told = self.dpo.init == "previous" and self.dpo.reference == "anchor"
        if self.method == "scir" and not told:
            raise ValueError(
                "method scir needs dpo.init=previous and dpo.reference=anchor: the implicit reward "
                "is what the last model has learned beyond the anchor"
            )
        return self

    @model_validator(mode="after")
    def _revisions_are_kept(self) -> Recipe:
        if self.method == "rlaif" and self.dpo.init != "previous":
            raise ValueError(
                "method rlaif needs dpo.init=previous: what the revisions taught is in the last "
                "delta"
            )
        return self

    @model_validator(mode="after")
    def _both_roles_are_kept(self) -> Recipe:
        if self.method != "meta-rewarding" or self.dpo.init == "previous":
            return self
        meta = self.meta_rewarding
        if meta.roles == "shared" and {"policy", "judge"} & set(meta.schedule):
            raise ValueError(
                "method meta-rewarding needs dpo.init=previous where its schedule trains one role "
                "alone: a delta that starts from zero forgets the other one. Or set "
                "meta_rewarding.roles=separate"
            )
        return self

    @model_validator(mode="after")
    def _answers_fill_a_step(self) -> Recipe:
        if self.method != "rlhf":
            return self
        if self.dpo.batch_size % self.rollout.n:
            raise ValueError("method rlhf needs a dpo.batch_size that rollout.n divides")
        if self.prompts.per_iteration * self.rollout.n < self.dpo.batch_size:
            raise ValueError(
                "method rlhf needs as many answers (prompts.per_iteration times rollout.n) as "
                "dpo.batch_size"
            )
        return self

    @model_validator(mode="after")
    def _something_can_be_drawn(self) -> Recipe:
        if self.method == "rlhf" and not self.rollout.temperature:
            raise ValueError(
                "method rlhf needs a rollout.temperature above 0: it learns from how replies to "
                "one prompt differ"
            )
        return self

    @model_validator(mode="after")
    def _gold_is_there(self) -> Recipe:
        if self.pairing.source == "gold" and self.evaluate.gold is None:
            raise ValueError(
                "pairing.source=gold needs evaluate.gold, the scorer whose order it is"
            )
        return self

    @model_validator(mode="after")
    def _settings_are_read(self) -> Recipe:
        unread = dict(UNREAD.get(self.method, {}))
        if self.method == "dpo" and self.offline.pairs == "all":
            unread |= {"pairing.rho": (), "pairing.alpha": (), "pairing.source": ("random", "gold")}
        if self.method == "cream" and self.cream.scores == "likelihood":
            unread |= {"pairing.source": ("gold",)}
        for name, values in unread.items():
            section, key = name.split(".")
            value = getattr(getattr(self, section), key)
            plain = type(getattr(self, section)).model_fields[key].default
            if value in values if values else value != plain:
                told = f"{name}={value}" if values else name
                raise ValueError(f"method {self.method} knows no {told}")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the layers that carry an adapter: the anchor's, a delta's or both."""
        return tuple(dict.fromkeys((*self.anchor.lora.targets, *self.dpo.lora.targets)))

    @property
    def asks_a_server(self) -> bool:
        """Whether the run needs the server of the section `openai`."""
        teacher = self.method == "dno" and self.dno.teacher == "server"
        return teacher or "openai" in (self.rollout.engine, self.judge.engine)

    @property
    def judge_makes_pairs(self) -> bool:
        """Whether differences of the rubric's scores decide what is a pair."""
        if self.pairing.source != "judge" or self.method in ("dpo", "rlaif"):
            return False
        if self.method == "dno" and self.dno.grading == "side-by-side":
            return False
        return self.method != "cream" or self.cream.scores == "judge"

    @property
    def judge_has_deltas(self) -> bool:
        """Whether the judge's role has deltas of its own."""
        return self.method == "meta-rewarding" and self.meta_rewarding.roles == "separate"

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: every setting that decides what is computed.

        Leaves out `iterations` (a longer run continues a shorter one), the tracking (which passes
        figures on), name, description, what is for comparisons afterwards, the sections of other
        methods, and `DECIDES_NOTHING`. A path counts by what the file holds, not by where it lies;
        that of a shipped base by its place among the recipes, so that a run goes on from another
        installation (`RunDir.hold_to_base` holds it to the weights). A setting that came later
        counts where it is not what it was `Before`.
        """
        others = {section for method, section in METHOD_SECTIONS.items() if method != self.method}
        left_out = {"iterations", "name", "description", "tracking", *AFTERWARDS, *others}
        settings = self.model_dump(mode="json", exclude=left_out)
        for section, key in PATH_KEYS:
            if section not in settings:
                continue
            value = settings[section][key]
            if isinstance(value, str) and (section, key) != ("base", "name"):
                settings[section][key] = _content_digest(section, key, value)
        for name, before in _came_later(Recipe):
            *sections, key = name.split(".")
            part = _below(settings, sections)
            if key in part and part[key] == before:
                del part[key]
        return as_noted_now(settings)

    def digest(self) -> str:
        """SHA-256 of the identity."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


WORDS = {
    "missing": "has to be given",
    "model_type": "is a section: a mapping of settings, or section.key=value",
}
"""What some of pydantic's errors say, in the words of recipes."""

UNREAD: dict[str, dict[str, tuple[str, ...]]] = {
    "dpo": {"pairing.source": ("gold",), "prompts.source": ("self-instruct",), "prompts.file": ()},
    "spin": {
        "pairing.source": ("random", "gold"), "pairing.min_gap": (), "pairing.rho": (),
        "pairing.alpha": (), "dpo.beta": (), "prompts.source": ("self-instruct",),
        "prompts.file": (),
    },
    "temporal": {"pairing.source": ("random",)},
    # It would hold blind pairs, and those of a gold scorer, to what the judge thinks of them.
    "scir": {"pairing.source": ("random", "gold")},
    "dno": {"pairing.source": ("random",), "pairing.rho": ()},
    "rlaif": {"pairing.rho": (), "pairing.alpha": ()},
    "rlhf": {
        "pairing.source": ("random", "gold"), "pairing.min_gap": (), "pairing.rho": (),
        "pairing.alpha": (), "pairing.replay": (), "dpo.beta": (), "dpo.nll_weight": (),
        "dpo.label_smoothing": (), "dpo.ld_alpha": (),
    },
}  # fmt: skip
"""Settings that a method does not read: these values, or any but the default. They are refused, or
a run that is called a control would be none."""

AFTERWARDS = ("compare", "mt_bench")
"""Sections that a run does not read."""

DECIDES_NOTHING = (
    "evaluate.gate",
    "pairing.min_pairs",
    *(f"openai.{key}" for key in ("key_variable", "parallel", "timeout_s", "retries")),
    "rollout.batch_rows",
    "vllm.memory",
    *(
        f"{section}.{key}"
        for section in ("anchor", "dpo", "rlaif.sft", "rlhf.reward")
        for key in ("micro_batch_size", "gradient_checkpointing")
    ),
)
"""Settings with another value of which a run goes on: what only looks at figures or stops; how a
server is reached; what is in memory at once, which moves last bits alone, and which a run that was
out of memory has to change."""

METHOD_SECTIONS = {
    "dpo": "offline",
    "spin": "spin",
    "cream": "cream",
    "dno": "dno",
    "scir": "scir",
    "meta-rewarding": "meta_rewarding",
    "rlaif": "rlaif",
    "rlhf": "rlhf",
}
"""The section of each method that has one of its own."""

PATH_KEYS = (
    ("base", "name"),
    ("base", "chat_template"),
    ("data", "dir"),
    ("data", "ranked"),
    ("anchor", "init"),
    ("prompts", "file"),
    ("judge", "rubric"),
    ("dno", "teacher"),
    ("dno", "template"),
    ("meta_rewarding", "template"),
    ("data", "extra"),
    ("evaluate", "ifeval"),
    ("compare", "template"),
    ("mt_bench", "template"),
    ("evaluate", "tasks_dir"),
    ("rlaif", "principles"),
)
"""Settings that may be paths: relative ones start at the recipe's own directory, or else at the
working directory; what is in neither stays as it is."""

NO_PATHS = {("anchor", "init", "base"), ("dno", "teacher", "server")}
"""Words that are no paths, even where there is a file or directory of that name."""


SHIPPED = {
    ("judge", "rubric"): ("rubrics", ".yaml"),
    ("base", "chat_template"): ("chat_templates", ".jinja"),
    ("dno", "template"): ("templates", ".txt"),
    ("meta_rewarding", "template"): ("templates", ".txt"),
    ("compare", "template"): ("templates", ".txt"),
    ("mt_bench", "template"): ("templates", ".txt"),
    ("rlaif", "principles"): ("principles", ".yaml"),
}
"""Settings that may name a shipped file: its folder and ending."""


def recipes_dir() -> Path:
    """The directory of the shipped recipes: inside an installed package, or of a checkout."""
    packaged = Path(str(resources.files("srlm_lite"))) / "recipes"
    return packaged if packaged.is_dir() else packaged.parent.parent / "recipes"


def place_of_base(name: str) -> str:
    """A base by its place among the recipes, where it is shipped with them; else as it is named.

    The recipes need not be this installation's.
    """
    folders = Path(name).parts
    if "recipes" in folders:
        last = len(folders) - 1 - folders[::-1].index("recipes")
        inside = Path(*folders[last + 1 :])
        if inside.parts and (recipes_dir() / inside).is_dir():
            return f"recipes/{inside.as_posix()}"
    return name


def short_base(name: str) -> str:
    """A base's name without the folders around it."""
    place = place_of_base(name)
    return place.removeprefix("recipes/") if place != name else name.rstrip("/").rsplit("/", 1)[-1]


def as_noted_now(identity: dict[str, Any]) -> dict[str, Any]:
    """The same identity, which an earlier version may have noted, without what decides nothing."""
    noted: dict[str, Any] = copy.deepcopy(identity)
    noted["base"]["name"] = place_of_base(noted["base"]["name"])
    for name in DECIDES_NOTHING:
        *sections, key = name.split(".")
        _below(noted, sections).pop(key, None)
    return noted


def _below(settings: dict[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """The section at a path of names; an empty one where there is none."""
    for section in sections:
        settings = settings.get(section, {})
    return settings


def recipe_of_run(noted: Mapping[str, Any], *, where: str) -> Recipe:
    """The recipe that a run has noted; settings that it did not know yet are what they were before.

    Raises:
        UserError: As `recipe_from`.
    """
    recipe = recipe_from(noted, where=where)
    return as_begun(recipe, noted, where=where)


def as_begun(recipe: Recipe, noted: Mapping[str, Any], *, where: str) -> Recipe:
    """A recipe for going on with a run that has noted `noted`.

    What the run was begun without, and the recipe does not name itself, stays as it was before.

    Raises:
        UserError: As `recipe_from`.
    """
    given = recipe.model_dump(mode="json", exclude_unset=True)
    for name, before in _came_later(Recipe):
        *sections, key = name.split(".")
        if key in _below(dict(noted), sections):
            continue
        part = given
        for section in sections:
            part = part.setdefault(section, {})
        part.setdefault(key, before)
    return recipe_from(given, where=where)


def _came_later(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of the settings marked with `Before`, and what they were, in JSON's terms."""
    below = _sections(section)
    for name, field in section.model_fields.items():
        if name in below:
            yield from _came_later(below[name], f"{prefix}{name}.")
        for mark in field.metadata:
            if isinstance(mark, Before):
                yield f"{prefix}{name}", mark.value


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe given by shipped name or by path.

    Raises:
        UserError: There is none.
    """
    shipped = recipes_dir() / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    close = difflib.get_close_matches(name_or_path, shipped_recipes(), n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Shipped: {', '.join(shipped_recipes())}"
    raise UserError("no such recipe", where=name_or_path, way_out=hint)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides and resolve its paths.

    A file that says `extends: NAME|PATH` is that recipe with what it says itself on top. Paths in
    a file are looked for beside it, then in the working directory; paths in overrides in the
    working directory.

    Raises:
        UserError: Not found, not YAML, an unknown key, or a value out of range.
    """
    path = find_recipe(name_or_path)
    return overridden(_read_recipe(path), overrides, where=str(path))


def overridden(raw: Mapping[str, Any], overrides: Sequence[str], *, where: str) -> Recipe:
    """A recipe as a mapping with `section.key=value` overrides on top.

    Raises:
        UserError: As `load_recipe`.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        _apply(given, override)
    _resolve_paths(given, Path.cwd())
    return recipe_from(_merged(raw, given), where=f"{where} with --set" if given else where)


def _read_recipe(path: Path, *below: Path) -> dict[str, Any]:
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of sections", where=str(path))
    _resolve_paths(raw, path.parent, Path.cwd())
    extended = raw.pop("extends", None)
    if extended is None:
        return raw
    if not isinstance(extended, str):
        raise UserError("`extends` names one recipe", where=str(path))
    beside = path.parent / extended
    found = beside if beside.is_file() else find_recipe(extended)
    if any(found.samefile(each) for each in (path, *below)):
        raise UserError("extends itself", where=str(path))
    return _merged(_read_recipe(found, path, *below), raw)


def recipe_from(raw: Mapping[str, Any], *, where: str) -> Recipe:
    """Validate a mapping as a recipe.

    Raises:
        UserError: Names the first offending key, and for an unknown one the nearest known.
    """
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        # A misspelt key is unknown under its name and missing under the right one.
        found = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        first = found[0]
        location = [str(part) for part in first["loc"]]
        key = ".".join(location)
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"unknown key `{key}`", where=where, way_out=_suggestion(location)
            ) from error
        whole_section = first["type"] in ("missing", "value_error")
        shown = "" if whole_section else f" (is {shorten(repr(first['input']))})"
        message = WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
        at = f"`{key}`{shown}: " if key else ""  # two sections that do not go together
        raise UserError(f"{at}{message}", where=where) from error
    for key, text in _texts(recipe.model_dump()):
        if "\0" in text or text != text.encode("utf-8", "replace").decode("utf-8"):
            raise UserError(
                f"`{key}` (is {text!r}): holds a character that no file can", where=where
            )
    return recipe


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts at and below a setting, with their dotted keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _texts(below, f"{key}.{name}".lstrip("."))
    elif isinstance(value, tuple):
        for one in value:
            yield from _texts(one, key)


def _suggestion(location: list[str]) -> str:
    *sections, name = location
    section: type[BaseModel] = Recipe
    for part in sections:
        section = _sections(section)[part]
    close = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{'.'.join([*sections, *close])}`?"
    elsewhere = [key for key in _keys(Recipe) if key.split(".")[-1] == name]
    if elsewhere:
        return f"Did you mean {' or '.join(f'`{key}`' for key in elsewhere)}?"
    return f"Known here: {', '.join(section.model_fields)}"


def _sections(section: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in section.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys at and below a section, dotted."""
    below = _sections(section)
    return [f"{prefix}{name}" for name in section.model_fields] + [
        key for name, part in below.items() for key in _keys(part, f"{prefix}{name}.")
    ]


def _apply(target: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError("expected KEY=VALUE", where=f"--set {override}")
    *sections, last = key.strip().split(".")
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError("a key cannot be both a value and a section", where=f"--set {override}")
    try:
        target[last] = _parsed(value)
    except yaml.YAMLError as error:
        where = f"--set {shorten(override)}"
        raise UserError("the value is not valid YAML", where=where) from error


class _Loader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key that stands twice is an error.

    Of a section pasted in twice the first would be lost without a word.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key `{key.value}` stands here twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def _parsed(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    # A day that no month has, a number of thousands of digits, a tag for what it is not.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        UserError: It is none, not UTF-8, or a key stands twice in it.
    """
    try:
        return _parsed(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = shorten(_problem(error))
        raise UserError(f"not readable as YAML ({said})", where=str(path)) from error


def _problem(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return str(error)
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"


def shorten(text: str) -> str:
    """What a message can show of a text."""
    return text if len(text) <= 200 else f"{text[:200]}…"


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = _merged(below, value) if both and below is not None else value
    return result


def _resolve_paths(raw: dict[str, Any], *directories: Path) -> None:
    for section, key in PATH_KEYS:
        part = raw.get(section)
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(value, str):
            continue
        if (section, key, value) in NO_PATHS or _is_shipped_name(section, key, value):
            continue
        path = Path(os.path.expanduser(value))  # Path's own fails where there is no such user
        # Links are not followed: in a Hub cache only the link's name tells a `.gguf`.
        places = [os.path.abspath(directory / path) for directory in directories]
        part[key] = next((place for place in places if os.path.exists(place)), value)


def _is_shipped_name(section: str, key: str, value: str) -> bool:
    if (section, key) not in SHIPPED:
        return False
    folder, suffix = SHIPPED[section, key]
    return (recipes_dir() / folder / f"{value}{suffix}").is_file()


def _content_digest(section: str, key: str, value: str) -> str:
    path = Path(value)
    if _is_shipped_name(section, key, value):
        folder, suffix = SHIPPED[section, key]
        path = recipes_dir() / folder / f"{value}{suffix}"
    if (section, key, value) in NO_PATHS or not path.exists():
        return value
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file() or file.name.startswith("."):
            continue
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def shipped_text(folder: str, suffix: str, *, name: str) -> str:
    """What such a file says.

    Raises:
        UserError: As `shipped_file`; or it is not UTF-8 text.
    """
    path = shipped_file(folder, suffix, name=name)
    try:
        return path.read_text(encoding="utf-8-sig")  # files from Windows may begin with a mark
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=str(path)) from error


def shipped_file(folder: str, suffix: str, *, name: str) -> Path:
    """A rubric or chat template given by shipped name or by path.

    Raises:
        UserError: There is neither.
    """
    shipped = recipes_dir() / folder / f"{name}{suffix}"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    names = sorted(path.stem for path in (recipes_dir() / folder).glob(f"*{suffix}"))
    raise UserError(
        f"neither a file nor one of the shipped {folder} ({', '.join(names)})", where=name
    )
