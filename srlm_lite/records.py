"""What the stages of a run hand to one another: one frozen record a row of a JSONL file."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, Self

from srlm_lite.conversation import Asked, Message

FinishReason = Literal["stop", "length"]
"""Why sampling ended: the end-of-sequence token or the stop rule, or the token limit."""


Messages = tuple[Message, ...]
"""The turns before a reply. A record has them only beyond one user turn, and then its prompt's text
is their transcript: what a judge and a reader see."""

Ids = tuple[int, ...]
"""Token ids of a whole reply as it was sampled, thought included, with the end of its turn unless
it ran into the token limit. A record has them where reading the text again would give others."""


CheckedItem = tuple[str, float | None, str]
"""An item of a checklist, how likely it holds of a candidate, from 0 to 1 (None is unreadable), and
who checked it: `judge` or `code`."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row. Unknown keys in a file are ignored, so that files may carry more than we read."""

    omitted: ClassVar[frozenset[str]] = frozenset()
    """Fields that a row leaves out where they are None, as rows of earlier versions do."""

    def to_row(self) -> dict[str, Any]:
        """The JSON object of this record, keys in the order of the fields."""
        # What it holds is shared, not copied: a record is not changed, and copying takes longest.
        row = {name: getattr(self, name) for name in _names(type(self))[0]}
        return {key: row[key] for key in row if row[key] is not None or key not in self.omitted}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The record of a JSON object.

        Raises:
            KeyError: A field without a default is missing.
        """
        return cls(**cls.known(row))

    @classmethod
    def known(cls, row: dict[str, Any]) -> dict[str, Any]:
        """What of a JSON object is a field here; its values may be of any type.

        Raises:
            KeyError: A field without a default is missing.
        """
        names, needed = _names(cls)
        if missing := [name for name in needed if name not in row]:
            raise KeyError(", ".join(missing))
        return {name: row[name] for name in names if name in row}


_NAMES: dict[type[Record], tuple[tuple[str, ...], tuple[str, ...]]] = {}


def _names(kind: type[Record]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields of a kind of record, and those of them without a default."""
    if kind not in _NAMES:  # looking them up would take most of the time of reading a file
        every = fields(kind)
        needed = tuple(field.name for field in every if field.default is MISSING)
        _NAMES[kind] = tuple(field.name for field in every), needed
    return _NAMES[kind]


@dataclass(frozen=True, slots=True)
class Prompt(Record):
    """What the policy answers: a user turn's text, or a conversation and its transcript."""

    omitted = frozenset({"messages"})

    prompt_id: str
    text: str
    source: str = ""
    messages: Messages | None = None

    @property
    def asked(self) -> Asked:
        """What is sampled and learned after."""
        return self.messages or self.text

    @classmethod
    def of(cls, row: Instruction | RankedReply, source: str = "") -> Self:
        """The prompt that a row of data has replies to."""
        return cls(row.prompt_id, row.prompt, source, row.messages)


@dataclass(frozen=True, slots=True)
class Candidate(Record):
    """One sampled answer.

    `text` is what is judged and shown: the answer without the thought before it. `n_tokens` were
    drawn, those of the thought included. `ids` are what is learned, see `Ids`.
    """

    omitted = frozenset({"thought", "ids"})

    prompt_id: str
    candidate_id: str
    text: str
    n_tokens: int
    finish_reason: FinishReason
    thought: str | None = None
    ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class Judgement(Record):
    """One judgement of a candidate: a sampled grade, or what another form of judging comes to.

    `score` is what counts. It is None when the judge's reply could not be read; None never counts
    as a number. `sampled_score` is what the reply says, where `score` is an expected one. `text`
    is without the judge's thought; `ids` are what is learned, see `Ids`. `verdicts` is on how many
    comparisons with other candidates the score rests, `items` what a checklist's items came to.
    """

    omitted = frozenset({"thought", "ids", "verdicts", "items"})

    candidate_id: str
    vote: int
    text: str
    score: float | None
    finish_reason: FinishReason = "stop"
    retried: bool = False
    sampled_score: float | None = None
    thought: str | None = None
    ids: Ids | None = None
    verdicts: int | None = None
    items: tuple[CheckedItem, ...] | None = None


@dataclass(frozen=True, slots=True)
class Checklist(Record):
    """What replies to a prompt are held against; people may edit it.

    Each of `items` has its text (`item`), a `weight` above 0, and who checks it (`by`): `judge` or
    `code`. `reference` is an answer by the model itself, where a judge is shown one.
    """

    omitted = frozenset({"reference"})

    prompt_id: str
    prompt: str
    items: tuple[dict[str, Any], ...]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Contest(Record):
    """What a judge makes of two candidates of a prompt, in both orders.

    Both probabilities are of the first candidate's winning: `p_shown_first` where it was shown
    first, `p_shown_last` where it was shown last. A verdict that was written is 1, 0, or 0.5 for a
    tie; None is one that could not be read. `round` is that of a bracket, from 2 on; `said_first`
    and `said_last` are the judge's replies, where it wrote any.
    """

    omitted = frozenset({"round", "said_first", "said_last"})

    prompt_id: str
    first_id: str
    second_id: str
    p_shown_first: float | None
    p_shown_last: float | None
    round: int | None = None
    said_first: str | None = None
    said_last: str | None = None

    @property
    def ids(self) -> tuple[str, str]:
        """Both candidates."""
        return self.first_id, self.second_id

    def told(self, of: str) -> str:
        """What the judge made of one of them against the other, in words."""

        def shown(p: float | None) -> str:
            if p is None:
                return "unreadable"
            return f"{p if of == self.first_id else 1 - p:.2f}"

        shown_as = self.p_shown_first, self.p_shown_last
        first, last = shown_as if of == self.first_id else shown_as[::-1]
        return f"wins with {shown(first)} where it is shown first, with {shown(last)} last"

    @property
    def readable(self) -> tuple[float, ...]:
        """How likely the first wins, by the verdicts that can be read."""
        return tuple(p for p in (self.p_shown_first, self.p_shown_last) if p is not None)


@dataclass(frozen=True, slots=True)
class PreferencePair(Record):
    """Two candidates of one prompt, the better one first, with the ids they came from.

    The loss of the pair counts `weight` times. `smoothing` is how likely the order is wrong, from
    0 to 1: that share of the loss is of the pair turned round. `origin` is empty for a pair of
    this iteration's candidates, else it says where the pair is from. The ids are what is learned,
    see `Ids`.
    """

    omitted = frozenset({"chosen_ids", "rejected_ids", "messages"})

    prompt_id: str
    prompt: str
    chosen_id: str
    rejected_id: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    weight: float = 1.0
    smoothing: float = 0.0
    origin: str = ""
    chosen_ids: Ids | None = None
    rejected_ids: Ids | None = None
    messages: Messages | None = None

    @property
    def asked(self) -> Asked:
        """What both replies answer."""
        return self.messages or self.prompt


@dataclass(frozen=True, slots=True)
class JudgedStep(Record):
    """A step of a candidate, counted from 0, and how likely the judge finds it right.

    `p_right` is None where the judge could not be asked, or would say neither right nor wrong.
    """

    candidate_id: str
    step: int
    text: str
    p_right: float | None


@dataclass(frozen=True, slots=True)
class VoteCount(Record):
    """How often a prompt's samples end in each answer, the most frequent one first.

    `answers` are what each candidate ends in, None where it could not be read.
    """

    prompt_id: str
    samples: int
    votes: dict[str, int]
    answers: dict[str, str | None]

    @property
    def share(self) -> float:
        """The share of the samples that end in the most frequent answer."""
        return max(self.votes.values(), default=0) / self.samples if self.samples else 0.0


@dataclass(frozen=True, slots=True)
class TrainingStep(Record):
    """One step of DPO's optimiser: means over its pairs, before the update.

    Rewards are DPO's implicit ones; `reward_accuracy` is the share of pairs with a positive margin.
    """

    step: int
    loss: float
    reward_margin: float
    reward_accuracy: float
    reward_chosen: float
    reward_rejected: float
    learning_rate: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Likelihood(Record):
    """How likely a model finds a candidate: in nats, the sum over its tokens and its end."""

    candidate_id: str
    logp: float
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Weighed(Record):
    """How likely a judge is to go on with each of some options; `name` is unique in its file.

    `p` are probabilities in the order of the options, of the first token in which they differ, at
    temperature 1; what they lack to 1 is what else the judge would say. None where the question
    does not fit the window.
    """

    name: str
    p: tuple[float, ...] | None

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The options' probabilities among themselves, sum 1; None where nothing is known."""
        total = sum(self.p or ())
        return tuple(one / total for one in self.p or ()) if total else None


@dataclass(frozen=True, slots=True)
class Reply(Record):
    """What a model said to a question that a method asked; `name` is unique in its file.

    `text` is without the thought before it. `ids` as in `Ids`, where the reply is to be learned.
    """

    omitted = frozenset({"thought", "ids"})

    name: str
    text: str
    finish_reason: FinishReason = "stop"
    thought: str | None = None
    ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class Annotation(Record):
    """A prompt of a head to head, with the names of AlpacaEval's format.

    `output_1` is the baseline's, `output_2` the model's. `preference` is 2 where the model wins, 1
    where the baseline does, 1.5 for a tie, None where the judge could not be read. What decided
    stands beside it: `verdicts` of a pairwise judge, shown the model's reply as A and then as B,
    or the mean `scores` of a pointwise one, the model's first.
    """

    prompt_id: str
    instruction: str
    output_1: str
    output_2: str
    generator_1: str
    generator_2: str
    annotator: str
    preference: float | None
    verdicts: tuple[str | None, str | None] | None = None
    scores: tuple[float | None, float | None] | None = None


@dataclass(frozen=True, slots=True)
class Revision(Record):
    """An answer after a round of critique and revision; `candidate_id` is the draft's.

    `text` is None where critique or revision ran into the token limit or is empty: the answer
    stays as it was. `ids` are what is learned of it, see `Ids`.
    """

    omitted = frozenset({"ids"})

    prompt_id: str
    candidate_id: str
    round: int
    principle: str
    critique: str
    text: str | None
    ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class Label(Record):
    """What a principle makes of two candidates of a prompt.

    `p_first` is how likely the first one keeps better to it: the mean over both orders in which
    they were shown. None where it could not be told.
    """

    prompt_id: str
    first_id: str
    second_id: str
    principle: str
    p_first: float | None


@dataclass(frozen=True, slots=True)
class Instruction(Record):
    """A row of `ift.jsonl`: an answer to learn from."""

    omitted: ClassVar[frozenset[str]] = frozenset({"messages"})

    prompt_id: str
    prompt: str
    response: str
    messages: Messages | None = None

    @property
    def asked(self) -> Asked:
        """What it answers."""
        return self.messages or self.prompt


@dataclass(frozen=True, slots=True)
class SampledInstruction(Instruction):
    """An answer to learn from that this run's model wrote; no file of data has its `ids`."""

    omitted = frozenset({"ids", "messages"})

    ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class RankedReply(Record):
    """A row of `eft_train.jsonl` or `eft_eval.jsonl`: a reply with its place among the others.

    `rank` is 0 for the best reply of a prompt; equal ranks are ties. `target` is the judge's
    whole reply to learn from, or None when the IFT-only model is to write it.
    """

    omitted: ClassVar[frozenset[str]] = frozenset({"messages"})

    prompt_id: str
    prompt: str
    response_id: str
    response: str
    rank: int
    quality: float | None = None
    target: str | None = None
    messages: Messages | None = None

    @property
    def asked(self) -> Asked:
        """What it answers."""
        return self.messages or self.prompt


@dataclass(frozen=True, slots=True)
class SampledTarget(RankedReply):
    """A row of `eft_targets.jsonl`; a run that is given the file reads the target's text alone."""

    omitted = frozenset({"target_ids", "messages"})

    target_ids: Ids | None = None
