"""What methods and forms of judging declare of themselves: where they are from, what they take.

Both are a class a file, and what the rest of the program says and counts of them is asked of the
class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from srlm_lite.pairing import is_of_judgements
from srlm_lite.settings import Section
from srlm_lite.window import longest_prompt

Facts = dict[str, Any]
"""What `metrics.jsonl` keeps of a stage."""


class NoSettings(Section):
    """The settings of a method, or of a form of judging, that has none of its own."""


@dataclass(frozen=True, slots=True)
class Source:
    """A paper that a method, or a form of judging, is from."""

    authors: str
    """`Yuan et al. 2024`."""
    title: str
    arxiv: str
    """Its number there."""
    note: str = ""
    """What to know of how a method here follows it."""

    @property
    def link(self) -> str:
        """Where it can be read, in Markdown."""
        cited = f"[{self.authors}](https://arxiv.org/abs/{self.arxiv})"
        return f"{cited}, {self.note}" if self.note else cited


@dataclass(frozen=True, slots=True)
class Words:
    """How to speak of a run of one method: not every method orders its pairs by a judge's score."""

    score: str | None = "score"
    """The figure of either reply of a pair; None where it only tells the two apart."""
    why_no_votes: str | None = None
    """Where no judge grades the candidates: who or what does instead."""
    why_no_pairs: str | None = None
    """Where nothing is learned from pairs: from what else."""
    judgement: str = "score"
    """What a judgement of a candidate gives."""
    candidates: str = "candidates"
    """What stands where the policy's answers do."""
    judging: str = "judging"
    """What takes the time between candidates and pairs."""
    training: str = "DPO"
    """What trains a delta."""
    own_accuracy: str = "on own candidates, by gold"
    """Whose pairwise accuracy by gold a run of the method measures on candidates."""
    external: bool = False
    """Whether a server judges, the same for all models."""

    def as_judge(self, model: str) -> str:
        """Who judged when a model was evaluated."""
        return f"the judge, at {model}" if self.external else f"{model} as judge"

    def score_of(self, origin: str) -> str | None:
        """The figure of a pair's replies, by where the pair is from."""
        return "rating by the meta-judge" if is_of_judgements(origin) else self.score


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long a recipe's texts can be, in tokens, for counting phases."""

    window: int
    prompt: int
    """A prompt of the policy's."""
    answer: int
    """An answer, its thought included."""
    own: int
    """A prompt with an answer of the policy's."""
    question: int
    """A judge's question."""
    judgement: int
    """A judge's reply, its thought included."""
    thought: int
    """A thought before any reply of the base."""

    def reply(self, max_new_tokens: int) -> int:
        """A reply with another limit, its thought included."""
        return max_new_tokens + self.thought

    def room(self, new_tokens: int) -> int:
        """The longest question that leaves room for so many new tokens."""
        return longest_prompt(self.window, answer=new_tokens, bound=self.window)


@dataclass(frozen=True, slots=True)
class Draws:
    """A phase that samples text, for `srlm-lite plan`."""

    name: str
    prompts: int
    """Requests that the engine is given at once."""
    samples: int
    """Texts for each."""
    prompt_tokens: int
    new_tokens: int
    texts: int
    """Texts of the whole run."""
    role: Literal["policy", "judge"] = "policy"
    """Whose engine draws them."""
    in_training: bool = False
    """Whether a training draws them itself, all of `prompts` at once."""


@dataclass(frozen=True, slots=True)
class Trains:
    """A phase that trains, for `srlm-lite plan`."""

    name: str
    kind: Literal["sft", "dpo", "reward", "rloo"]
    section: str
    """Where the recipe sets its optimiser, dotted."""
    tokens: int
    """Tokens of the longest sequence; a pair has two, either reply with the prompt."""
    examples: float | None
    """Those that the whole run passes through, epochs counted; None: the data says."""
    scored: int = 0
    """For `rloo`: tokens of a sequence whose logits are in memory at once."""


@dataclass(frozen=True, slots=True)
class Weighs:
    """A phase that reads questions and asks for the probabilities of the next token alone."""

    name: str
    prompts: int
    """Questions that the engine is given at once."""
    prompt_tokens: int
    texts: int
    """Questions of the whole run."""
    role: Literal["policy", "judge"] = "judge"
    """Whose engine reads them."""


Phase = Draws | Weighs | Trains
