"""The toy world: a tiny language whose answers code can check.

A prompt asks for facts about one of 24 topics; a good answer opens politely, names the topic,
lists at least three items, repeats none, and closes properly. `gold` gives one point for each.
The vocabulary has about 200 words, so a Llama of a million parameters is enough to speak it.

Pure Python: the script that trains the toy base, the tests and the gold scorer all use it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

CRITERIA = ("topic", "items", "unique", "opening", "ending")
"""What `gold` pays for, in the order in which a review treats them."""

MIN_ITEMS = 3

TOPICS = (
    "tiger", "horse", "rabbit", "eagle", "whale", "spider",
    "oak", "rose", "cactus", "tulip", "bamboo", "fern",
    "train", "robot", "clock", "boat", "radio", "drill",
    "river", "desert", "island", "city", "forest", "castle",
)  # fmt: skip

# The last word alone identifies a fact. All topics share one short list: to see that two items are
# the same is the hardest thing a judge of this size learns, and more words make it harder.
FACTS = (
    "has history", "has friends", "needs care", "needs space", "gives joy", "gives shelter",
    "makes noise", "makes news", "fears fire", "fears storms", "keeps secrets", "draws visitors",
)  # fmt: skip

POLITE_OPENINGS = (
    "sure, happy to help.",
    "gladly, here you go.",
    "certainly, here they are.",
    "welcome, this is my list.",
)
RUDE_OPENINGS = ("not again.", "fine, if you must.", "what, more facts?")
PROPER_ENDINGS = (
    "hope this helps!",
    "enjoy your facts!",
    "ask me for more!",
    "thanks for asking!",
)
RUDE_ENDINGS = ("that is all.", "go away.", "and so on.")

POLITE_WORDS = frozenset(line.split()[0].strip(",") for line in POLITE_OPENINGS)
CLOSING_WORDS = frozenset(line.split()[0] for line in PROPER_ENDINGS)

_GREETINGS = ("", "hello, ", "hi, ", "good day, ")
_REQUESTS = (
    "give me",
    "tell me",
    "show me",
    "write",
    "list",
    "can you give me",
    "i want",
    "i need",
)
_NOUNS = ("facts", "some facts", "simple facts", "good facts")
_TAILS = ("", ", please", " now", " today", " for my class")

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>")
_PUNCTUATION = ("\n", ",", ".", ":", "!", "?")
_REVIEW_WORDS = (
    "review", "the", "answer", "question", "one", "point", "each", "for",
    "Score", "yes", "no", "none", "again", "it", *CRITERIA,
)  # fmt: skip
_MAX_COUNT = 9

_ITEM = re.compile(r"[0-9]\.")
_TOKEN = re.compile(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]|\n")


def words(text: str) -> list[str]:
    """The words, digits, punctuation marks and newlines of a text, as the toy tokenizer cuts it."""
    return _TOKEN.findall(text)


def vocabulary() -> list[str]:
    """Every token of the toy world, special tokens first, in a fixed order."""
    texts = [
        *TOPICS,
        *FACTS,
        *POLITE_OPENINGS,
        *RUDE_OPENINGS,
        *PROPER_ENDINGS,
        *RUDE_ENDINGS,
        *(text for _, text in phrasings()),
    ]
    seen = dict.fromkeys([*_PUNCTUATION, *(str(n) for n in range(10)), *_REVIEW_WORDS])
    for text in texts:
        seen.update(dict.fromkeys(words(text.replace("{topic}", ""))))
    return [*SPECIAL_TOKENS, *seen]


def phrasings() -> list[tuple[bool, str]]:
    """Every way to ask, as (held out, template with `{topic}`).

    One phrasing in eight is held out: no training text of any kind contains it.
    """
    combinations = itertools.product(_GREETINGS, _REQUESTS, _NOUNS, _TAILS)
    shuffled = [
        f"{greeting}{request} {noun} about the {{topic}}{tail}"
        for greeting, request, noun, tail in combinations
    ]
    random.Random("toy phrasings").shuffle(shuffled)
    return [(number % 8 == 0, text) for number, text in enumerate(shuffled)]


def prompts(*, held_out: bool) -> list[str]:
    """All distinct prompts of one side of the split, each phrasing with each topic."""
    return [
        template.format(topic=topic)
        for is_held_out, template in phrasings()
        if is_held_out == held_out
        for topic in TOPICS
    ]


def topic_of(prompt: str) -> str | None:
    """The topic a prompt asks about, or None where it names none of this world."""
    return next((word for word in words(prompt.lower()) if word in TOPICS), None)


@dataclass(frozen=True)
class AnswerParts:
    """The parts of an answer that the criteria look at.

    `opening` and `ending` are "" where the answer has none; a line that stands alone counts as
    the opening. `facts` are the last words of the items, in order: they identify a fact.
    """

    opening: str
    facts: tuple[str, ...]
    ending: str
    mentions: tuple[str, ...]


def read_answer(response: str) -> AnswerParts:
    """Split an answer into opening, items and ending; any text can be read."""
    lines = [line.strip().lower() for line in response.splitlines() if line.strip()]
    items = [words(_ITEM.sub("", line)) for line in lines if _ITEM.match(line)]
    opening = lines[0] if lines and not _ITEM.match(lines[0]) else ""
    ending = lines[-1] if len(lines) > 1 and not _ITEM.match(lines[-1]) else ""
    mentions = [word for word in words(" ".join(lines)) if word in TOPICS or word == "it"]
    return AnswerParts(
        opening=opening,
        facts=tuple(item[-1] for item in items if item),
        ending=ending,
        mentions=tuple(mentions),
    )


def gold(prompt: str, response: str) -> dict[str, float]:
    """Points of an answer by criterion, each 0.0 or 1.0; their sum is the gold score (0 to 5).

    - topic: the answer contains the topic's name.
    - items: it lists at least three items (lines that start with a number).
    - unique: it lists at least one item, and no two end in the same word.
    - opening: its first line is no item and starts with a polite word.
    - ending: its last line is no item, starts with a closing word and ends in "!".
    """
    answer = read_answer(response)
    points = {
        "topic": topic_of(prompt) in answer.mentions,
        "items": len(answer.facts) >= MIN_ITEMS,
        "unique": 0 < len(answer.facts) == len(set(answer.facts)),
        "opening": _first_word(answer.opening) in POLITE_WORDS,
        "ending": _first_word(answer.ending) in CLOSING_WORDS and answer.ending.endswith("!"),
    }
    return {criterion: float(points[criterion]) for criterion in CRITERIA}


def review(prompt: str, response: str) -> str:
    """The judge's ideal reply: for each criterion the evidence, then the verdict, then the score.

    The items are copied out by number, and one seen before is marked `again`: a judge of this
    size stays at chance on repetition without that step, and loses its place in a list whose
    items carry no number.
    """
    answer = read_answer(response)
    points = gold(prompt, response)
    asked = topic_of(prompt) or "none"
    found = asked if points["topic"] else next(iter(answer.mentions), "none")
    listed = [
        f"{number} {fact}{' again' if fact in answer.facts[: number - 1] else ''}"
        for number, fact in enumerate(answer.facts[:_MAX_COUNT], start=1)
    ]
    evidence = {
        "topic": f"{asked} {found} ",
        "items": f"{' '.join(listed) or 'none'} ",
        "unique": "",
        "opening": f"{_first_word(answer.opening) or 'none'} ",
        "ending": f"{_first_word(answer.ending) or 'none'} ",
    }
    lines = [
        f"{criterion}: {evidence[criterion]}{'yes' if points[criterion] else 'no'}"
        for criterion in CRITERIA
    ]
    return "\n".join([*lines, f"Score: {sum(points.values()):.0f}"])


def checklist(prompt: str) -> dict[str, str]:
    """For each criterion an item that it is checked by; that on `items` code can count."""
    return {
        "topic": f"the answer is about the {topic_of(prompt)}.",
        "items": f"list {MIN_ITEMS} items and more.",
        "unique": "list no items again.",
        "opening": "the opening is good.",
        "ending": "the ending is good.",
    }


def critique(prompt: str, response: str, criterion: str) -> str:
    """The part of the review that speaks of one criterion, with the evidence for it."""
    lines = review(prompt, response).split("\n")
    at = CRITERIA.index(criterion)
    # Whether items repeat is seen from the line before, where they are copied out.
    return "\n".join(lines[at - 1 if criterion == "unique" else at : at + 1])


def sample_answer(rng: random.Random, prompt: str, rates: Mapping[str, float] | float = 0.5) -> str:
    """An answer that earns each criterion's point with the given probability, independently.

    Raises:
        ValueError: The prompt names no topic of this world.
    """
    topic = topic_of(prompt)
    if topic is None:
        raise ValueError(f"no topic of the toy world in {prompt!r}")
    rate = dict.fromkeys(CRITERIA, rates) if isinstance(rates, float) else rates
    good = {criterion: rng.random() < rate[criterion] for criterion in CRITERIA}
    lines = [*_opening(rng, good["opening"]), *_items(rng, topic, good)]
    lines += _ending(rng, good["ending"])
    return "\n".join(lines)


def revise(rng: random.Random, prompt: str, response: str, criterion: str) -> str:
    """The answer with one criterion met that was not, and the others left as they are.

    The answer is one as `sample_answer` writes it; it comes back as it is where it earns the point.
    """
    points = gold(prompt, response)
    if points[criterion]:
        return response
    lines = response.split("\n")
    first = next(at for at, line in enumerate(lines) if _ITEM.match(line))
    items = [line for line in lines if _ITEM.match(line)]
    before, after = lines[:first], lines[first + len(items) :]
    if criterion == "opening":
        before = [rng.choice(POLITE_OPENINGS)]
    elif criterion == "ending":
        after = [rng.choice(PROPER_ENDINGS)]
    else:
        pairs = [_ITEM.sub("", item).split(maxsplit=1) for item in items]
        subjects, facts = [one for one, _ in pairs], [fact for _, fact in pairs]
        unused = [fact for fact in FACTS if fact not in facts]
        if criterion == "topic":
            subjects = [topic_of(prompt) or "it" for _ in subjects]
        elif criterion == "items":
            more = rng.sample(unused, MIN_ITEMS - len(facts))
            subjects, facts = subjects + ["it"] * len(more), facts + more
        else:
            rng.shuffle(unused)
            facts = [
                fact if fact not in facts[:at] else unused.pop() for at, fact in enumerate(facts)
            ]
        items = [
            f"{number}. {subject} {fact}"
            for number, (subject, fact) in enumerate(zip(subjects, facts, strict=True), start=1)
        ]
    return "\n".join([*before, *items, *after])


def disturb(rng: random.Random, response: str) -> str:
    """The answer with one accident a sampled model could have: a line lost, moved, cut or doubled.

    Reviews of such answers keep the judge from trusting that every answer is well formed.
    """
    lines = response.split("\n")
    at = rng.randrange(len(lines))
    accident = rng.randrange(4)
    if accident == 0 and len(lines) > 1:
        del lines[at]
    elif accident == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif accident == 2:
        lines.insert(rng.randrange(len(lines)), lines.pop(at))
    else:
        del lines[at + 1 :]
        kept = lines[at].split(" ")
        lines[at] = " ".join(kept[: rng.randint(1, len(kept))])
    return "\n".join(lines)


def _first_word(line: str) -> str:
    return next(iter(words(line)), "")


def _opening(rng: random.Random, good: bool) -> Iterator[str]:
    if good:
        yield rng.choice(POLITE_OPENINGS)
    elif rng.random() < 0.3:
        yield rng.choice(RUDE_OPENINGS)


def _ending(rng: random.Random, good: bool) -> Iterator[str]:
    if good:
        yield rng.choice(PROPER_ENDINGS)
    elif rng.random() < 0.3:
        yield rng.choice(RUDE_ENDINGS)


def _items(rng: random.Random, topic: str, good: Mapping[str, bool]) -> Iterator[str]:
    if good["items"]:
        count = rng.choice((3, 3, 4, 4, 5))
    else:
        # Pairs repeat about as often as not, so that a judge has to look.
        count = 2 if not good["unique"] else rng.choice((1, 2, 2, 2))
    facts = rng.sample(FACTS, count)
    if not good["unique"]:
        first, second = sorted(rng.sample(range(count), 2))
        facts[second] = facts[first]

    if good["topic"]:
        subject, named = topic, rng.randrange(count)
    else:
        wrong = rng.random() < 0.4
        subject = rng.choice([t for t in TOPICS if t != topic]) if wrong else "it"
        named = -1
    for number, fact in enumerate(facts):
        says_it = good["topic"] and number != named and rng.random() < 0.25
        yield f"{number + 1}. {'it' if says_it else subject} {fact}"
