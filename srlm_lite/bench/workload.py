"""The fixed work of `srlm-lite bench rollout`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

from srlm_lite.errors import UserError

PROMPTS = (
    "How do I keep basil alive on a windowsill through the winter?",
    "My sister is turning forty next month and says she wants no presents. What could I do for "
    "her that is not a thing, costs little, and does not end in a surprise party?",
    "Explain in plain words why the sky is blue at noon and red in the evening.",
    "Write a polite but firm note to the neighbours who leave their bicycles in front of our "
    "cellar door.",
    "I have two eggs, half a cabbage, soy sauce and cold rice. What can I cook in a quarter of an "
    "hour with one pan?",
    "What is the difference between a virus and a bacterium, and why does it matter to my doctor?",
    "Help me plan three days in Lisbon in November with a child of six who hates museums and loves "
    "trams, boats and anything with cheese.",
    "A train leaves at 9:40 and arrives at 13:05. It stops four times for six minutes each. How "
    "long is it moving?",
    "Give me five names for a small bakery that opens at four in the morning.",
    "I want to learn to run again after a knee operation last spring. How should the first four "
    "weeks look, and which signs tell me to stop?",
    "Summarise the idea of supply and demand for a class of twelve-year-olds, with one example "
    "from a school yard.",
    "Our team of five meets every day for an hour and nobody likes it. What else could we try, and "
    "how do we find out whether it is better?",
    "What should I look at when I buy a used violin?",
    "Write a short story that begins with the sentence: The lighthouse keeper had never learned to "
    "swim.",
    "How can I tell whether a mail that claims to come from my bank is genuine?",
    "I keep forgetting what I read. Describe a way of taking notes by hand that takes no more than "
    "ten minutes a chapter, and say what it is good for and what it is not.",
)
"""Sixteen questions as users ask them, in words of our own."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Answers to prompts, and votes on all the answers, with every sample drawn to its full length.

    Raises:
        UserError: More prompts than there are, or none.
    """

    prompts: int = len(PROMPTS)
    n: int = 4
    """Candidates a prompt."""
    answer_tokens: int = 96
    votes: int = 3
    """Judgements of each candidate."""
    vote_tokens: int = 64
    question_tokens: int | None = None
    """Tokens of each prompt, its question lengthened with others; None leaves it as it is."""
    rubric: str = "additive-5"
    temperature: float = 0.7
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.prompts <= len(PROMPTS):
            raise UserError(f"is {self.prompts}, not 1 to {len(PROMPTS)}", where="--prompts")

    def texts(self, tokens: Callable[[str], int]) -> tuple[str, ...]:
        """The questions.

        Args:
            tokens: How many there are in a text, as it stands in the prompt.
        """
        return tuple(self._lengthened(place, tokens) for place in range(self.prompts))

    def _lengthened(self, place: int, tokens: Callable[[str], int]) -> str:
        """With as many words of the other questions before it as fit, in an order of its own."""
        question, most = PROMPTS[place], self.question_tokens
        if most is None:
            return question
        others = " ".join((*PROMPTS[place + 1 :], *PROMPTS[:place])).split()
        words = others * (most // len(others) + 1)

        def text(count: int) -> str:
            return " ".join((*words[:count], question))

        fit = bisect_right(range(len(words)), most, key=lambda count: tokens(text(count)))
        return text(max(0, fit - 1))

    @property
    def new_tokens(self) -> int:
        """Tokens of all candidates and all judgements."""
        answers = self.prompts * self.n
        return answers * self.answer_tokens + answers * self.votes * self.vote_tokens


class StandIn:
    """What spells for a base of random weights, whose tokenizer knows no more than a few words.

    Four characters are a token, about as many as a tokenizer of English makes one of.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def prompt_ids(self, text: str) -> list[int]:
        """One id for each four characters, the same for the same ones."""
        parts = (text[start : start + 4] for start in range(0, len(text), 4))
        return [crc32(part.encode()) % self._vocabulary for part in parts]

    def text_of(self, ids: Sequence[int]) -> str:
        """Four characters for each id."""
        return "".join(f"{token % 16**4:04x}" for token in ids)
