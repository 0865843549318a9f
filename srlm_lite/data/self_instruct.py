"""Self-Instruct: the model writes new prompts after the example of old ones.

Each request shows eight prompts, six of the seed's and two the model wrote before, and asks for
more; what comes back is read, filtered and added to the pool. Sampling is somebody else's job
(the paper's settings: temperature 0.6, top-p 0.9).

Source: Wang et al. 2022, arXiv:2212.10560; shots as in Yuan et al. 2024, arXiv:2401.10020.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

from srlm_lite.data.text import normalised, prompt_problem
from srlm_lite.errors import UserError

SEED_SHOTS = 6
GENERATED_SHOTS = 2
MAX_NEW_TOKENS = 256
"""Longest reply to one request."""
MAX_SIMILARITY = 0.7
MIN_WORDS, MAX_WORDS = 3, 150
MAX_SHOT_CHARS = 600
"""Longer seed prompts are not shown: eight of them would fill the window."""

KEYWORDS = re.compile(
    r"""\b(?:
        images? | pictures? | photos? | photographs? | screenshots? | illustrations?
      | graphs? | charts? | diagrams? | figures?\s+(?:above|below)
      | videos? | audio | recordings? | melody | attach(?:ed|ment|ments)
      | (?:link|file|document|table|article|passage|text)\s+(?:above|below)
      | draw
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Asks for what a text model cannot see or make, or points at what is not there."""

ITEM = re.compile(r"(?P<number>\d{1,3})\s*[.):](?!\d)\s*(?P<text>.*)")
ANSWER = re.compile(r"(?:answer|response|output|solution|assistant|a)\s*\d*\s*:", re.IGNORECASE)

HEADING = (
    "Here is a list of requests that different people sent to an assistant. They are varied in "
    "topic and form, and each can be understood by itself. The list goes on in the same way, "
    "with new requests and without any answers."
)


class _Words:
    """Words of any script; rouge-score's own tokenizer knows only a-z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


class PromptPool:
    """Seed prompts and the ones the model has written so far.

    Attributes:
        drops: Why prompts that the model wrote were not taken: `unfinished`, `answer`,
            `too_short`, `too_long`, `keyword`, `duplicate`, `similar`, and the reasons of
            `text.prompt_problem`.
    """

    def __init__(
        self,
        seed_prompts: Sequence[str],
        *,
        generated: Sequence[str] = (),
        max_similarity: float = MAX_SIMILARITY,
    ) -> None:
        """Start a pool.

        Args:
            seed_prompts: The prompts of IFT.
            generated: Prompts that an earlier pool took, to go on from there.
            max_similarity: ROUGE-L (F1) with a prompt of the pool from which on a new one counts
                as a copy.

        Raises:
            UserError: No seed prompt is short enough to be shown.
        """
        from rouge_score import rouge_scorer  # brings nltk and scikit-learn: a second and more

        self.drops: Counter[str] = Counter()
        self.max_similarity = max_similarity
        flat = (" ".join(prompt.split()) for prompt in seed_prompts)
        self._seed = [prompt for prompt in flat if 0 < len(prompt) <= MAX_SHOT_CHARS]
        if not self._seed:
            raise UserError(
                f"Self-Instruct needs prompts of at most {MAX_SHOT_CHARS} characters to begin with",
                way_out="Give IFT data with shorter prompts, or a prompt list",
            )
        self._generated: list[str] = []
        self._words = _Words()
        self._scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=self._words)
        self._known: dict[str, tuple[str, frozenset[tuple[str, int]]]] = {}
        for prompt in seed_prompts:
            self._remember(prompt)
        for prompt in generated:
            self._generated.append(prompt)
            self._remember(prompt)

    @property
    def generated(self) -> tuple[str, ...]:
        """The prompts taken so far, in order."""
        return tuple(self._generated)

    def request(self, rng: random.Random) -> str:
        """A text to be continued: eight numbered prompts, and the number of the next one.

        Where the model has not written enough yet, seed prompts stand in. It works as raw text
        and as a user message.
        """
        generated = rng.sample(self._generated, min(GENERATED_SHOTS, len(self._generated)))
        wanted = SEED_SHOTS + GENERATED_SHOTS - len(generated)
        shots = rng.sample(self._seed, min(wanted, len(self._seed))) + generated
        rng.shuffle(shots)
        lines = [f"{number}. {shot}" for number, shot in enumerate(shots, start=1)]
        return "\n".join([HEADING, "", *lines, f"{len(shots) + 1}."])

    def offer(self, continuation: str, *, finished: bool = True) -> list[str]:
        """Take the new prompts of a continuation into the pool.

        Args:
            continuation: What the model wrote after `request`.
            finished: False when it ran into its token limit; its last prompt is then left out.

        Returns:
            The prompts taken, in order. `drops` counts the others.
        """
        taken = []
        for prompt in self._read(continuation, finished=finished):
            problem = self._problem(prompt)
            if problem is not None:
                self.drops[problem] += 1
                continue
            self._generated.append(prompt)
            self._remember(prompt)
            taken.append(prompt)
        return taken

    def _read(self, continuation: str, *, finished: bool) -> list[str]:
        """The items of the list that the continuation goes on with.

        The first may lack its number, which the request ends in. A later number has to follow
        the one before: a model that goes on to answer its own prompts starts a list at 1, and
        the steps of a recipe are not prompts. Lines without a number belong to such answers.
        """
        items: list[str] = []
        last_number: int | None = None
        ends_in_item = False
        for line in filter(None, map(str.strip, continuation.splitlines())):
            match = ITEM.fullmatch(line)
            number = int(match["number"]) if match else None
            if items and last_number is None and number == 1:
                break
            follows = number is not None and (last_number is None or number == last_number + 1)
            opens = not items and not line.endswith(":")
            ends_in_item = follows or opens
            if ends_in_item:
                items.append(match["text"].strip() if match else line)
                last_number = number
        if ends_in_item and not finished:
            items.pop()
            self.drops["unfinished"] += 1
        return items

    def _problem(self, prompt: str) -> str | None:
        if ANSWER.match(prompt):
            return "answer"
        problem = prompt_problem(prompt, min_chars=1, max_chars=len(prompt))
        if problem is not None:
            return problem
        words = len(prompt.split())
        if not MIN_WORDS <= words <= MAX_WORDS:
            return "too_short" if words < MIN_WORDS else "too_long"
        if KEYWORDS.search(prompt):
            return "keyword"
        if normalised(prompt) in self._known:
            return "duplicate"
        return "similar" if self._is_similar(prompt) else None

    def _is_similar(self, prompt: str) -> bool:
        """Whether ROUGE-L with any prompt of the pool reaches the limit.

        The longest common subsequence is at most as long as the words both have, repetitions
        included, so F1 <= 2 * common / (m + n). That bound costs a set intersection and spares
        nearly all of the real computations.
        """
        bag = self._bag(prompt)
        for other, other_bag in self._known.values():
            if 2 * len(bag & other_bag) < self.max_similarity * (len(bag) + len(other_bag)):
                continue
            if self._scorer.score(other, prompt)["rougeL"].fmeasure >= self.max_similarity:
                return True
        return False

    def _remember(self, prompt: str) -> None:
        self._known.setdefault(normalised(prompt), (prompt, self._bag(prompt)))

    def _bag(self, text: str) -> frozenset[tuple[str, int]]:
        """The words with a number each, so that a repeated word counts as often as it comes."""
        seen: Counter[str] = Counter()
        bag = []
        for word in self._words.tokenize(text):
            bag.append((word, seen[word]))
            seen[word] += 1
        return frozenset(bag)
