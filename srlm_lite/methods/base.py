"""What a method is, and what its stages are given. Read this to write one.

A method is a class in a file of its own: it declares what the rest of the program says and counts
of it (`Method`), and overrides the stages that it changes. A stage is given one thing, the
iteration (`Iteration`): its verbs ask models, grade, and learn, and what they have done once they
give again from disk. Models, engines, processes and paths are behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from srlm_lite.declared import Draws as Draws
from srlm_lite.declared import Facts as Facts
from srlm_lite.declared import NoSettings as NoSettings
from srlm_lite.declared import Phase as Phase
from srlm_lite.declared import Sizes as Sizes
from srlm_lite.declared import Source as Source
from srlm_lite.declared import Trains as Trains
from srlm_lite.declared import Weighs as Weighs
from srlm_lite.declared import Words as Words
from srlm_lite.forms.base import JudgeQuestion
from srlm_lite.judging import Rubric
from srlm_lite.pairing import Drops
from srlm_lite.records import (
    Candidate,
    Ids,
    Instruction,
    Judgement,
    Likelihood,
    PreferencePair,
    Prompt,
    RankedReply,
    Record,
    Reply,
    Weighed,
)
from srlm_lite.settings import Consistency, Dpo, Optim, Section, Shared

S = TypeVar("S", bound=Section)
R = TypeVar("R", bound=Record)

Pool = tuple[list[Prompt], Path]
"""Prompts that the iterations take theirs from, and the file they are from."""

MorePrompts = Callable[[Sequence[Prompt]], tuple[Sequence[Prompt], Facts]]
"""Makes further prompts of an iteration, given those from the pool."""

MadePairs = tuple[Sequence[PreferencePair], Drops, Facts]
"""Pairs, what gave none and why, and facts for `metrics.jsonl`."""


# --- what a method declares -----------------------------------------------------------------------


CONTROLS = "Self-rewarding and controls"
RANKED_REPLIES = "Learning from ranked replies"
OWN_GRADES = "Other ways with the own grades"
REBASING = "What a rebased delta learns"
SHARPENING = "Learning or sharpening"
TAUGHT_MORE = "With an anchor that learned more"
OF_FORMS = "Forms of judging"
LOSSES = "Other losses"
"""What cases of the bench are shown beside."""


@dataclass(frozen=True, slots=True)
class Case:
    """A run of `srlm-lite bench methods`: a recipe, what is changed in it, and where it begins."""

    recipe: str
    overrides: tuple[str, ...] = ()
    anchor: str | None = "anchor"
    """The name of the anchor that it shares with other cases: `anchor` is the recipe `toy`'s, of
    any other the first case that names it trains it. None: it trains its own."""
    is_long: bool = False
    """Whether it takes longer than most."""
    group: str = OWN_GRADES
    """What it is shown beside."""
    one_pass: bool = False
    """Whether one iteration takes the prompts that others take in several."""


# --- what a method's stages are given -------------------------------------------------------------


class SeedData(ABC):
    """The seed data of a run, read and checked; what is missing or wrong is a `UserError`."""

    @abstractmethod
    def prompts(self) -> Pool:
        """The recipe's prompt list."""

    @abstractmethod
    def instructions(self) -> list[Instruction]:
        """Instruction data (`ift.jsonl`)."""

    @abstractmethod
    def ranked(self) -> tuple[list[list[RankedReply]], Path]:
        """Replies that humans ranked, grouped by prompt, and their file (`data.ranked`)."""

    @abstractmethod
    def human_answers(self) -> tuple[list[Instruction], Path]:
        """One human answer a prompt, and their file: the best ranked ones, or `ift.jsonl`."""

    @abstractmethod
    def rows(self, path: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file that a setting names."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the run, by name; `Iteration` has the ones that there are."""

    after: int | None
    """The iteration that ended with it; 0 is the anchor, None the bare base."""
    deltas: Literal["policy", "judge", "provisional", "teacher"] = "policy"
    """Whose adapters it has on top of the anchor, where roles have deltas of their own; a teacher
    is another model, behind the server of the section `openai`."""


class Iteration(ABC):
    """One iteration at work: what a method's stages ask, and learn, with.

    The verbs give what they gave before where a run goes on, and compute what is missing. Seeds
    come of the recipe's, the iteration's number and the names that a verb is given, so a name that
    changes draws other text. All files lie in the iteration's directory.
    """

    recipe: Shared
    """The settings that all methods share; a method's own are `Method.own`."""
    number: int
    """From 1."""
    where: str
    """Its directory, for messages."""

    # Models.

    @property
    def policy(self) -> Model:
        """The model that the iteration begins with: the anchor in the first one."""
        return Model(self.number - 1)

    @property
    def judge(self) -> Model:
        """The same weights as the policy's, or the judge's own where it has deltas of its own."""
        return Model(self.number - 1, "judge")

    @property
    def earlier(self) -> Model:
        """The model before the policy: the bare base in the first iteration."""
        return Model(self.number - 2) if self.number > 1 else self.base

    @property
    def anchor(self) -> Model:
        """The first model, which all deltas stand on."""
        return Model(0)

    @property
    def base(self) -> Model:
        """The weights without any adapter."""
        return Model(None)

    @property
    def provisional(self) -> Model:
        """What `learn(..., called="provisional")` has trained in this iteration."""
        return Model(self.number, "provisional")

    @property
    def teacher(self) -> Model:
        """The model of the section `openai`."""
        return Model(None, "teacher")

    # What a run has.

    @property
    @abstractmethod
    def data(self) -> SeedData:
        """The seed data."""

    @property
    @abstractmethod
    def rubric(self) -> Rubric:
        """What the judge is asked by."""

    # Verbs: text.

    @abstractmethod
    def prompts(
        self, pool: Callable[[SeedData], Pool | None], *, more: MorePrompts | None = None
    ) -> tuple[list[Prompt], Facts]:
        """The iteration's prompts: the next slice of the shuffled pool.

        Args:
            pool: Reads it; where it gives None, the anchor writes new prompts.
            more: Gives further ones, and facts of them; those that fit the window are taken.
        """

    @abstractmethod
    def answer(
        self, prompts: Sequence[Prompt], *, n: int | None = None, by: Model | None = None,
        kind: str = "",
    ) -> list[Candidate]:  # fmt: skip
        """Sampled answers to each prompt, under the section `rollout`.

        Answer i of a prompt is named `<prompt_id>#<kind>-<i>`; without a kind, `<prompt_id>#<i>`.

        Args:
            n: Answers a prompt; default: `rollout.n`.
            by: Who answers; default: the policy.
            kind: Tells answers of several models apart; they go to `<kind>_candidates.jsonl`, and
                those without a kind to `candidates.jsonl`.
        """

    @abstractmethod
    def judged(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate], *,
        by: Model | None = None, kind: str = "",
    ) -> tuple[list[Judgement], Facts]:  # fmt: skip
        """The judgements on each candidate, in the recipe's form (`judge.form`), and its facts.

        Candidates that pairing would leave out whatever their score, empty or (where the recipe
        drops those) truncated, are not judged.

        Args:
            by: Who judges; default: the judge.
            kind: As of `answer`; they go to `<kind>_judgements.jsonl`.
        """

    def grade(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate], *,
        by: Model | None = None, kind: str = "",
    ) -> list[Judgement]:  # fmt: skip
        """The judgements alone."""
        return self.judged(prompts, candidates, by=by, kind=kind)[0]

    @abstractmethod
    def ask(
        self, questions: Sequence[tuple[str, str]], *, about: str, by: Model,
        max_new_tokens: int | None = None, turn: str = "", seeded: Sequence[object] = (),
        to_learn: bool = False,
    ) -> dict[str, Reply]:  # fmt: skip
        """A reply to each question, given as (name, text), by name.

        A question is asked as it stands: `base.system` is for prompts, which `answer` answers.
        A question that does not fit the window gets an empty reply of finish reason `length`.

        Args:
            about: What the questions are called while they are asked.
            max_new_tokens: Of a reply; default: `judge.max_new_tokens`.
            turn: Where a method asks several times: the file, in `replies/`. Else there is one,
                `replies.jsonl`.
            seeded: The names that the seeds come of; default: `about`.
            to_learn: The replies are answers that may be learned: drawn as the policy's answers
                are, under `rollout`, and kept as the ids that were drawn.
        """

    @abstractmethod
    def weigh(
        self, questions: Sequence[JudgeQuestion], options: Sequence[str], *, about: str, by: Model,
        setting: str,
    ) -> dict[str, Weighed]:  # fmt: skip
        """How likely a model is to reply with each of some options, by the question's name.

        One prefill a question; nothing is written. See `JudgeAtWork.weigh`.

        Args:
            about: What the questions are called while they are asked, and their file.
            setting: Where a recipe says what the options are, for messages.
        """

    @abstractmethod
    def likelihoods(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate], *, by: Model, name: str,
        questions: bool = False,
    ) -> dict[str, Likelihood]:  # fmt: skip
        """How likely a model finds each candidate that fits the window, by candidate_id.

        Args:
            name: Of the file in `likelihoods/`.
            questions: The prompts are questions of the method's own, as `ask` puts them: without
                `base.system`.
        """

    @abstractmethod
    def as_answer(self, candidate: Candidate) -> Candidate:
        """A candidate whose text is from a file, taken apart as a sampled one is: thought and
        answer, of a base that thinks."""

    @abstractmethod
    def length(self, text: str) -> int:
        """Tokens of a reply."""

    @abstractmethod
    def unended(self, text: str) -> Ids:
        """Ids of an answer that goes on: without the end of its turn."""

    # Verbs: files.

    @abstractmethod
    def write(self, name: str, rows: Sequence[Record]) -> None:
        """Write a file of the method's own, `<name>.jsonl`, whole."""

    @abstractmethod
    def read(self, name: str, kind: type[R]) -> list[R]:
        """The rows of a file of the iteration, `<name>.jsonl`."""

    # Verbs: pairs.

    @abstractmethod
    def fitting(self, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
        """The pairs whose two sequences both fit the window."""

    @abstractmethod
    def older(self) -> list[PreferencePair]:
        """The pairs of all iterations before, marked so, where a delta learns those; as the newest
        judge has them, where the recipe asks for that."""

    @abstractmethod
    def keep(
        self, pairs: Sequence[PreferencePair], drops: Drops, *, advice: Mapping[str, str],
        origin: str = "",
    ) -> tuple[list[PreferencePair], Facts]:  # fmt: skip
        """Write the pairs that fit the window, and older ones to replay, as `pairs.jsonl`.

        Args:
            drops: Prompts without a pair, by reason.
            advice: What to do about a method's own reasons.
            origin: Of the pairs that the iteration is about, and that `drops` tells of.

        Raises:
            UserError: Fewer new ones than `pairing.min_pairs`; says why prompts gave none.
        """

    @abstractmethod
    def keep_none(self) -> tuple[list[PreferencePair], Facts]:
        """Write that there are no pairs, for a method that learns from something else."""

    # Verbs: learning. Each gives the facts of its training.

    @abstractmethod
    def learn(
        self, pairs: Sequence[PreferencePair], *, dpo: Dpo | None = None,
        called: Literal["delta", "judge delta", "provisional"] = "delta",
        consistency: Consistency | None = None,
    ) -> Facts:  # fmt: skip
        """DPO on pairs, into the iteration's delta.

        Args:
            dpo: Other settings than the recipe's.
            called: Another delta: the judge's own, or a `provisional` one that only helps to make
                pairs.
            consistency: Terms that pull the implicit reward towards the judge.
        """

    @abstractmethod
    def stay(self) -> None:
        """The policy's last delta once more, for an iteration that trains the judge alone."""

    @abstractmethod
    def imitate(self, rows: Sequence[Instruction], *, optim: Optim, about: str = "SFT") -> Facts:
        """SFT on answers, into a fresh delta on top of the anchor.

        Args:
            about: What the training is called while it runs.

        Raises:
            UserError: None of them fits the window.
        """

    @abstractmethod
    def reward_model(
        self, *, optim: Optim, pairs: Literal["best-worst", "all"]
    ) -> tuple[object, Facts]:
        """The run's reward model, for `reinforce`: trained once, on the ranked replies.

        Args:
            pairs: Of each prompt's replies, the best against the worst, or all that humans told
                apart.
        """

    @abstractmethod
    def reinforce(self, prompts: Sequence[Prompt], *, reward: object, kl_weight: float) -> Facts:
        """RLOO against a reward model, into the iteration's delta.

        The policy answers at every step anew; what it has said, and the rewards, become the
        iteration's candidates and judgements.

        Args:
            kl_weight: What a nat of divergence from the reference costs, in units of the reward.
        """


# --- the method -----------------------------------------------------------------------------------


class Method(ABC, Generic[S]):
    """A method: what is said and counted of it, and the stages of an iteration.

    A method inherits from the one that it changes, `SelfRewarding` in the first place. It is bound
    to a recipe: `self.recipe` are the settings that all share, `self.own` those of its section.
    """

    name: ClassVar[str]
    """By which recipes name it."""
    sources: ClassVar[tuple[Source, ...]] = ()
    """The papers that it is from; not those of the method that it inherits from."""
    learns_from: ClassVar[str]
    """What teaches the policy; ends the sentence "It learns from"."""
    remark: ClassVar[str] = ""
    """What to know of it beside that, for the table of methods."""
    made_by: ClassVar[str]
    """For a model card; ends the sentence "n iterations followed, of"."""
    recipe_name: ClassVar[str]
    """The shipped recipe that shows it, where that is not `toy-NAME`."""
    section: ClassVar[str | None] = None
    """The recipe's section with its own settings."""
    Settings: ClassVar[type[Section]] = NoSettings
    """What that section holds."""
    labels: ClassVar[Mapping[str, str]] = {}
    """Its own settings that a report shows, with what they are called there."""
    unshown: ClassVar[Collection[str]] = ()
    """Settings that it does not read, and that a report need not show, beside `unread`."""
    advice: ClassVar[Mapping[str, str]] = {}
    """What to do where its own reasons leave too many prompts without a pair."""
    is_self_rewarding: ClassVar[bool] = True
    """Whether the model's own judgement, of whatever kind, is what teaches it."""
    trainer: ClassVar[str] = "dpo"
    """A model card's tag for how its deltas are trained."""
    one_process: ClassVar[bool] = False
    """Whether it cannot be trained in several processes."""
    learns_ranked: ClassVar[bool] = False
    """Whether it learns from `data.ranked`, which is the judge data where a recipe names none."""
    cases: ClassVar[Mapping[str, Case]] = {}
    """Runs of the bench of methods, by name; without any of its own: its recipe."""

    def __init__(self, recipe: Shared, own: S) -> None:
        self.recipe, self.own = recipe, own

    # Declarations that go by its own settings, or by all.

    @classmethod
    def cited(cls) -> str:
        """Its sources, in Markdown."""
        return ", ".join(source.link for source in vars(cls).get("sources", ()))

    @classmethod
    def bench(cls) -> Mapping[str, Case]:
        """Its runs of `srlm-lite bench methods`."""
        return vars(cls).get("cases") or {cls.name: Case(cls.shipped_recipe())}

    @classmethod
    def shipped_recipe(cls) -> str:
        """The shipped recipe that shows it."""
        named: str = vars(cls).get("recipe_name", f"toy-{cls.name}")
        return named

    @classmethod
    def words(cls, own: S) -> Words:
        """How a report and `srlm-lite show` speak of its figures."""
        return Words()

    def needs(self) -> None:
        """Refuse settings that cannot go together.

        Raises:
            ValueError: Says which, and what would do.
        """

    @classmethod
    def unread(cls, own: S) -> Mapping[str, Collection[Any]]:
        """Settings that it does not read, by dotted key: these values, or any but the default.

        They are refused, or a run that is called a control would be none.
        """
        return {}

    @property
    def judge_makes_pairs(self) -> bool:
        """Whether differences of the rubric's scores decide what is a pair."""
        return self.recipe.pairing.source in ("judge", "flipped")

    @property
    def pairs_samples(self) -> bool:
        """Whether every pair is two of `rollout.n` samples of one prompt, which have to differ."""
        return False

    @property
    def accumulates(self) -> bool:
        """Whether a delta learns the pairs of all iterations so far."""
        told, replay = self.recipe.pairing.accumulate, self.recipe.pairing.replay
        return self.recipe.dpo.init == "anchor" and not replay if told == "auto" else told

    @property
    def has_older_pairs(self) -> bool:
        """Whether pairs of earlier iterations are learned once more."""
        return self.accumulates or any(self.recipe.pairing.replay)

    @property
    def judge_has_deltas(self) -> bool:
        """Whether the judge's role has deltas of its own."""
        return False

    @property
    def asks_a_server(self) -> bool:
        """Whether it asks the server of the section `openai`, whatever engine samples."""
        return False

    @abstractmethod
    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """What it draws and trains in a whole run, the anchor's training and evaluations apart."""

    def preflight(self, data: SeedData) -> None:
        """Read what a run is going to need, before it begins.

        Raises:
            UserError: Something is missing, or cannot be read.
        """

    # The stages of an iteration, each with its result and its facts.

    @abstractmethod
    def pool(self, data: SeedData) -> Pool | None:
        """The list that the iterations take their prompts from; None where they are written."""

    @abstractmethod
    def prompts(self, it: Iteration) -> tuple[list[Prompt], Facts]:
        """The iteration's prompts."""

    @abstractmethod
    def candidates(self, it: Iteration, prompts: Sequence[Prompt]) -> tuple[list[Candidate], Facts]:
        """Answers to them."""

    @abstractmethod
    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """What is thought of the answers."""

    @abstractmethod
    def pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> tuple[list[PreferencePair], Facts]:
        """What to learn from."""

    @abstractmethod
    def delta(self, it: Iteration, pairs: Sequence[PreferencePair]) -> tuple[None, Facts]:
        """The training, into the iteration's delta."""
