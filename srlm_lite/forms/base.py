"""What a form of judging is, and what it asks by. Read this to write one.

A form turns candidates into judgements: by one absolute grade, by comparing them with each other,
by a list of questions. It is a class in a file of its own: it declares what the rest of the program
says and counts of it (`Form`), and what it does with a judge (`Form.judge`). The judge
(`JudgeAtWork`) is one model with its verbs; stacks, engines, processes and paths are behind it, so
that iterations, evaluations, comparisons and benchmarks all judge by the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from srlm_lite.declared import Facts, NoSettings, Phase, Sizes, Source
from srlm_lite.judging import Rubric
from srlm_lite.pairing import Drops, Scored
from srlm_lite.records import (
    Candidate,
    Ids,
    Instruction,
    Judgement,
    PreferencePair,
    Prompt,
    RankedReply,
    Record,
    Reply,
    Weighed,
)
from srlm_lite.settings import Section, Shared

S = TypeVar("S", bound=Section)
R = TypeVar("R", bound=Record)

BEGUN = 8
"""Tokens that are put in a judge's mouth, and that are weighed, at most: `Score: 3`."""

Scale = tuple[float, float]
"""The lowest and the highest score."""


@dataclass(frozen=True, slots=True)
class JudgeQuestion:
    """A question to a judge; `name` is unique in its file.

    Those with the same `about`, a prompt's id for one, are read together: what they begin with is
    computed once. Empty: with all others that have none.
    """

    name: str
    text: str
    about: str = ""


class JudgeAtWork(ABC):
    """A judge as a form sees it: one model, asked for one set of candidates.

    The verbs give what they gave before where a run goes on, and compute what is missing. Seeds
    come of the place that the judging has in the run, and of the names that a verb is given.
    """

    recipe: Shared
    """The settings that all share; a form's own are `Form.own`."""
    where: str
    """Where its files lie, for messages."""

    @property
    @abstractmethod
    def rubric(self) -> Rubric:
        """What it grades by."""

    @abstractmethod
    def vote(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """Sampled grades of each candidate by the rubric, into `judgements`.

        Each candidate gets as many as the settings say (`judge.votes`).
        """

    @abstractmethod
    def ask(
        self, questions: Sequence[JudgeQuestion], *, about: str, max_new_tokens: int | None = None
    ) -> dict[str, Reply]:
        """A sampled reply to each question, by name.

        A question that does not fit the window gets an empty reply of finish reason `length`.

        Args:
            about: What the questions are called while they are asked, and their file.
            max_new_tokens: Of a reply; default: `judge.max_new_tokens`.
        """

    @abstractmethod
    def weigh(
        self,
        questions: Sequence[JudgeQuestion],
        options: Sequence[str],
        *,
        about: str,
        setting: str,
    ) -> dict[str, Weighed]:
        """How likely the judge is to reply with each of some options, by name; nothing is written.

        What the options have in common at their beginning, as `Score: ` of grades, is put in the
        judge's mouth, and the probabilities are those of the next token. One prefill a question.

        Args:
            options: Whole replies.
            about: As of `ask`.
            setting: Where a recipe says what the options are, for messages.

        Raises:
            UserError: Two options go on with the same token to this base, or a server does not
                tell probabilities.
        """

    @abstractmethod
    def length(self, text: str) -> int:
        """Tokens of a reply."""

    @abstractmethod
    def write(self, name: str, rows: Sequence[Record], *, shared: bool = False) -> None:
        """Write a file of the form's own, whole; `judgements` holds what `Form.judge` gives.

        Args:
            shared: It is one for the whole run, which people may edit between two judgings.
        """

    @abstractmethod
    def read(self, name: str, kind: type[R], *, shared: bool = False) -> list[R] | None:
        """The rows of such a file; None where there is none yet."""


class PairsAtWork(Protocol):
    """An iteration as a form sees it that makes pairs of its own."""

    def read(self, name: str, kind: type[R]) -> list[R]:
        """The rows of a file of the iteration, those that its judge has written among them."""

    def unended(self, text: str) -> Ids:
        """Ids of an answer that goes on: without the end of its turn."""


class Form(ABC, Generic[S]):
    """A form of judging, bound to a recipe: `self.recipe` are the settings that all share,
    `self.own` those of its section."""

    name: ClassVar[str]
    """By which `judge.form` names it."""
    sources: ClassVar[tuple[Source, ...]] = ()
    """The papers that it is from."""
    asks: ClassVar[str]
    """What the judge is asked; ends the sentence "The judge is asked for"."""
    score: ClassVar[str] = "score"
    """What a score of it is called."""
    section: ClassVar[str | None] = None
    """The recipe's section with its own settings."""
    Settings: ClassVar[type[Section]] = NoSettings
    """What that section holds."""
    labels: ClassVar[Mapping[str, str]] = {}
    """Its own settings that a report shows, with what they are called there."""
    unshown: ClassVar[Collection[str]] = ()
    """Dotted settings that it does not read, and that a report need not show."""
    shown: ClassVar[int] = 1
    """Candidates that one question to the judge shows."""
    compares: ClassVar[bool] = False
    """Whether candidates are judged against each other: one alone has no score."""
    has_lessons: ClassVar[bool] = False
    """Whether an anchor is taught its own questions (`lessons`), and not the rubric's."""
    figures: ClassVar[Mapping[str, str]] = {}
    """Facts of its judging that reports show, with what they are called there."""

    @classmethod
    def told(cls, judgement: Judgement) -> tuple[str, ...]:
        """What a judgement says beside its score and its text, a line each, for reports."""
        return ()

    def __init__(self, recipe: Shared, own: S) -> None:
        self.recipe, self.own = recipe, own

    @classmethod
    def cited(cls) -> str:
        """Its sources, in Markdown."""
        return ", ".join(source.link for source in vars(cls).get("sources", ()))

    # Declarations that go by its settings.

    @property
    def min_votes(self) -> int:
        """Readable judgements that a candidate needs to have a score: one, unless it votes."""
        return 1

    @property
    def weighs(self) -> bool:
        """Whether it asks for probabilities, which not every server tells."""
        return False

    def blank(self, rubric: Rubric) -> str:
        """Its longest question without the prompt and the candidates in it, for planning.

        Raises:
            UserError: The file that it is in cannot be read.
        """
        return rubric.render(prompt="", response="")

    def scale(self, rubric: Rubric) -> Scale:
        """The lowest and the highest score that it can give."""
        return rubric.min, rubric.max

    def needs(self) -> None:
        """Refuse settings that cannot go together.

        Raises:
            ValueError: Says which, and what would do.
        """

    def preflight(self) -> None:
        """Read the files that it is going to need, before a run begins.

        Raises:
            UserError: One is missing, or cannot be read.
        """

    @abstractmethod
    def phases(self, sizes: Sizes, *, prompts: int, answers: int, at_once: int) -> Iterator[Phase]:
        """What judging takes of a machine, for `srlm-lite plan`.

        Args:
            prompts: Of the whole run.
            answers: Candidates of the whole run.
            at_once: Candidates that are judged at once.
        """

    def kept(
        self, pairs: Sequence[PreferencePair], judgements: Sequence[Judgement]
    ) -> list[PreferencePair]:
        """Those of an iteration's pairs that are worth learning, in their order."""
        return list(pairs)

    def lessons(self, groups: Sequence[Sequence[RankedReply]], rubric: Rubric) -> list[Instruction]:
        """What teaches an anchor to judge in this form, from replies that humans ranked.

        Without it an anchor is taught by the rubric, as `anchor.eft_targets` says.

        Args:
            groups: The replies of each prompt.

        Returns:
            Questions, as they stand, with the replies to learn.
        """
        return []

    @abstractmethod
    def judge(
        self, judge: JudgeAtWork, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """The judgements on candidates, and facts for `metrics.jsonl`.

        Args:
            candidates: Those that can be part of a pair: none is empty.

        Returns:
            Rows in the order of the candidates, at least one of each. A candidate's score is the
            mean of its rows' scores; None is a judgement that cannot be read, and never a number.
        """

    def pairs(
        self,
        work: PairsAtWork,
        prompts: Sequence[Prompt],
        usable: Mapping[str, Sequence[Scored]],
        drops: Drops,
    ) -> list[PreferencePair] | None:
        """Pairs of a form that knows more than scores; None: the best against the worst, by those.

        Args:
            usable: The candidates of a prompt that can be part of a pair, with their scores.
            drops: Where prompts without a pair are counted, by reason.
        """
        return None


def no_verdict(candidate: Candidate, *, too_long: bool = False, **fields: Any) -> Judgement:
    """The judgement of a candidate on which there is none.

    Args:
        too_long: The judge was not asked: its question does not fit the window.
    """
    return Judgement(
        candidate.candidate_id, 0, "", None, "length" if too_long else "stop", **fields
    )
