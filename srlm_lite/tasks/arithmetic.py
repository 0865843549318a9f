"""Arithmetic word problems whose answers, and every step of them, code can check.

A problem tells in two to four sentences how many things somebody has, and asks for a number. An
answer computes one sentence a line, `12 + 5 = 17`, and ends in `answer: 17`. Numbers stay below
100 and words are few, so a Llama of a million parameters is enough to solve some of them.

A careless solver (`sample_answer`) slips: it miscounts, takes the wrong operation or leaves a
sentence out. What says "fewer" and means "add" (`that is 5 fewer than eva has.`) it misreads every
other time, as people do (Lewis and Mayer 1987, doi:10.1037/0022-0663.79.4.363): there the answer of
a majority is no surer than a coin.

Pure Python: the script that trains the base, the tests and the gold scorer all use it.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from functools import cache

NAMES = ("tom", "ann", "sam", "lea", "ben", "mia", "max", "eva")
THINGS = ("apples", "books", "coins", "cards", "shells", "eggs", "stamps", "balls")

MAX_VALUE = 50
"""The largest number that somebody has; a slip may write one up to 99."""
MAX_CHANGE = 9
MAX_FACTOR = 4

START = "{name} has {n} {things}."
BOXES = "{name} has {k} boxes of {n} {things}."
CHANGES = {
    "{name} buys {n} more.": "+",
    "{name} finds {n} more.": "+",
    "{other} gives {n} to {name}.": "+",
    "{name} sells {n}.": "-",
    "{name} loses {n}.": "-",
    "{name} gives {n} to {other}.": "-",
    "then {name} has {n} times as many.": "*",
    "{name} keeps one of {n} equal parts.": "/",
}
COMPARISONS = {
    "{other} has {n} more than {name}.": "+",
    "{other} has {n} fewer than {name}.": "-",
    "that is {n} fewer than {other} has.": "+",
    "that is {n} more than {other} has.": "-",
}
"""How the last sentence may bring in somebody else, whom the question is then about."""
MISLEADING = tuple(COMPARISONS)[2:]
"""Sentences whose word for the change is not what has to be done."""
QUESTIONS = ("how many {things} does {who} have?", "how many {things} does {who} have now?")

RIGHT, WRONG = "right", "wrong"
"""The judge's verdicts on a step."""
MAX_SCORE = 5
"""The score in a review of an answer without a mistake; else it is the right steps before one."""

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>")
_PUNCTUATION = ("\n", ",", ".", ":", "?", "+", "-", "*", "/", "=")
_OTHER_WORDS = (
    "grade", "check", "the", "last", "step", "steps", "answer", "problem", "write", "a", "new",
    "none", "Score", "said", RIGHT, WRONG,
)  # fmt: skip

_TOKEN = re.compile(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]|\n")
_EQUATION = re.compile(r"(\d{1,3}) ?([-+*/]) ?(\d{1,3}) ?= ?(\d{1,3})")
_TURNABLE = re.compile(r"(\d+) ([+*]) (\d+)")
_ANSWER = re.compile(r"answer: ?(\d{1,3})\.?")


def words(text: str) -> list[str]:
    """The words, digits, signs and newlines of a text, as the tokenizer of the base cuts it."""
    return _TOKEN.findall(text)


def vocabulary() -> list[str]:
    """Every token of this world, special tokens first, in a fixed order."""
    seen = dict.fromkeys([*_PUNCTUATION, *(str(n) for n in range(10)), *_OTHER_WORDS])
    seen |= dict.fromkeys([*NAMES, *THINGS])
    for text in (START, BOXES, *CHANGES, *COMPARISONS, *QUESTIONS):
        seen |= dict.fromkeys(words(re.sub(r"\{\w+\}", "", text)))
    return [*SPECIAL_TOKENS, *seen]


# --- problems -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What one sentence asks to be done with the number so far."""

    sign: str
    """One of `+ - * /`."""
    number: int
    misleading: bool = False
    """Whether its words say the other sign."""

    def of(self, value: int) -> int | None:
        """The number after it; None where it would be no whole number, or below 0."""
        return _result(value, self.sign, self.number)


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem as code reads it: the number that it begins with, and what happens to it."""

    start: int
    changes: tuple[Change, ...]

    @property
    def solution(self) -> int | None:
        """The answer; None where the numbers of a problem lead nowhere."""
        value: int | None = self.start
        for change in self.changes:
            value = None if value is None else change.of(value)
        return value


def read_problem(prompt: str) -> Problem | None:
    """The problem in a text, or None where it is none of this world.

    A text that a model wrote may be one too, of any number of steps but none. What asks for
    somebody else than it tells of is no problem.
    """
    *told, question = re.findall(r"[^.?]+[.?]", " ".join(prompt.lower().split())) or [""]
    asked = next(filter(None, (_fits(text, question) for text in QUESTIONS)), None)
    if asked is None or not told:
        return None
    changes = []
    if has := _fits(START, told[0]):
        start = int(has["n"])
    elif has := _fits(BOXES, told[0]):
        start = int(has["k"])
        changes.append(Change("*", int(has["n"])))
    else:
        return None
    name = who = has["name"]
    for sentence in told[1:]:
        if who != name:
            return None  # a comparison ends the story
        for text, sign in (CHANGES | COMPARISONS).items():
            if has := _fits(text, sentence, name=name):
                changes.append(Change(sign, int(has["n"]), text in MISLEADING))
                who = has["other"] if text in COMPARISONS else name
                break
        else:
            return None
    return Problem(start, tuple(changes)) if changes and asked["who"] == who else None


def sample_problem(rng: random.Random, *, held_out: bool = False) -> str:
    """A problem of two to four steps.

    One text in eight is held out: no training text of any kind contains it.
    """
    while True:
        text = _sampled_problem(rng)
        if is_held_out(text) == held_out:
            return text


def is_held_out(prompt: str) -> bool:
    """Whether a problem is of those that nothing is trained on."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def _sampled_problem(rng: random.Random) -> str:
    name, other, third = rng.sample(NAMES, 3)
    things = rng.choice(THINGS)
    steps = rng.choice((2, 3, 3, 4))
    who, sentences = name, []
    if rng.random() < 0.25:
        k, n = rng.randint(2, 6), rng.randint(2, 9)
        value, steps = k * n, steps - 1
        sentences.append(BOXES.format(name=name, k=k, n=n, things=things))
    else:
        value = rng.randint(5, 40)
        sentences.append(START.format(name=name, n=value, things=things))
    compares = rng.random() < 0.4
    while steps:
        table = COMPARISONS if compares and steps == 1 else CHANGES
        # Multiplying and dividing seldom fit the numbers, so they are tried more often.
        wanted = rng.choice(("+", "-", "*", "/"))
        texts = [text for text, sign in table.items() if sign == wanted]
        if not texts:
            continue
        top = MAX_CHANGE if wanted in "+-" else MAX_FACTOR
        change = Change(wanted, rng.randint(2, top))
        after = change.of(value)
        if after is None or not 2 <= after <= MAX_VALUE:
            continue
        text = rng.choice(texts)
        who = other if table is COMPARISONS else name
        giver = other if who == other else third
        sentences.append(text.format(name=name, other=giver, n=change.number))
        value, steps = after, steps - 1
    question = rng.choice(QUESTIONS).format(things=things, who=who)
    return " ".join([*sentences, question])


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One line of an answer, held against the problem and the lines before it."""

    text: str
    is_right: bool
    wanted: str
    """What would have been right here; `none` where nothing was left to do."""


def steps_of(response: str) -> list[str]:
    """The lines of an answer that hold text."""
    return [line.strip() for line in response.splitlines() if line.strip()]


def read_steps(prompt: str, response: str) -> list[Step]:
    """The steps of an answer, each judged by itself; empty where the prompt is no problem.

    A step is right that computes what the next sentence says from the number of the step before,
    be that right or not: a mistake counts where it is made, and once. One that leaves a sentence
    out is wrong, and the count goes on behind it. The last step is right if it repeats the number
    before it and no sentence is left.
    """
    problem = read_problem(prompt)
    if problem is None:
        return []
    value, at, found = problem.start, 0, []
    for line in steps_of(response):
        left = problem.changes[at:]
        wanted = _equation(value, left[0]) if left else f"answer: {value}"
        if said := _ANSWER.fullmatch(line):
            found.append(Step(line, not left and int(said[1]) == value, wanted))
            at = len(problem.changes)
            continue
        said = _EQUATION.fullmatch(line)
        if said is None:
            found.append(Step(line, False, wanted))
            continue
        a, sign, b, result = int(said[1]), said[2], int(said[3]), int(said[4])
        does = [_does(change, value, a, sign, b) for change in left]
        is_right = bool(does) and does[0] and _result(a, sign, b) == result
        found.append(Step(line, is_right, wanted))
        at += 1 + (does.index(True) if True in does else 0)
        value = result
    return found


def answer_of(response: str) -> int | None:
    """The number after the last `answer:`, or None."""
    found = [_ANSWER.fullmatch(line) for line in steps_of(response)]
    return next((int(one[1]) for one in reversed(found) if one), None)


def gold(prompt: str, response: str) -> dict[str, float]:
    """Points of an answer: `answer` is 1.0 where its number is right, `steps` the share of its
    steps that are (`read_steps`).

    Their sum orders answers: a right number always stands above a wrong one. A text that is no
    problem of this world has no right answer.
    """
    problem = read_problem(prompt)
    solution = None if problem is None else problem.solution
    steps = read_steps(prompt, response)
    right = sum(step.is_right for step in steps)
    return {
        "answer": float(solution is not None and answer_of(response) == solution),
        "steps": right / len(steps) if steps else 0.0,
    }


def review(prompt: str, response: str) -> str:
    """The judge's ideal reply: of each step, up to the first mistake, what it should be, what it
    says, and then the verdict, which has only to compare the two.

    The score is the number of right steps before it, and `MAX_SCORE` where there is none.
    """
    lines, right, ended = [], 0, False
    for step in read_steps(prompt, response):
        lines.append(f"{step.wanted} said {step.text} {RIGHT if step.is_right else WRONG}")
        ended = step.is_right and step.wanted.startswith("answer:")
        if not step.is_right:
            break
        right += 1
    return "\n".join([*lines, f"Score: {MAX_SCORE if ended else min(right, MAX_SCORE - 1)}"])


def verdicts(prompt: str, response: str) -> list[str]:
    """By token of an answer (`words`), whether its step is right as far as it goes.

    From the first token of a step that none of the right ones has, all is wrong. The end of a line
    has the verdict on the step, and so has the last token where a right step would go on.
    """
    steps = iter(read_steps(prompt, response))
    said: list[str] = []
    verdict = RIGHT
    for number, line in enumerate(response.split("\n")):
        if number:
            said.append(verdict)
        step = next(steps, None) if line.strip() else None
        if step is None:
            said += [verdict] * len(words(line))
            continue
        verdict = RIGHT if step.is_right else WRONG
        found = words(line)
        begins = _agrees(found, step.wanted)
        said += [RIGHT if at < begins else WRONG for at in range(len(found))]
    return said


def _agrees(found: list[str], wanted: str) -> int:
    """How many tokens a step has in common with one that would be right, from its beginning."""
    forms = [words(wanted)]
    if has := _TURNABLE.match(wanted):
        forms.append(words(f"{has[3]} {has[2]} {has[1]}{wanted[has.end() :]}"))
    return max(_common(found, form) for form in forms)


def _common(found: list[str], form: list[str]) -> int:
    pairs = list(zip(found, form, strict=False))
    return next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))


def sample_answer(
    rng: random.Random, prompt: str, slips: float = 0.1, misreads: float = 0.5
) -> str:
    """An answer by a solver who slips in a step with the given probability.

    Args:
        misreads: How likely it is misled where a sentence is `MISLEADING`.

    Raises:
        ValueError: The prompt is no problem of this world.
    """
    problem = read_problem(prompt)
    if problem is None:
        raise ValueError(f"no arithmetic problem: {prompt!r}")
    value, lines = problem.start, []
    for change in problem.changes:
        swapped = Change({"+": "-", "-": "+"}.get(change.sign, "+"), change.number)
        if change.misleading and rng.random() < misreads and swapped.of(value) is not None:
            change = swapped
        slip = rng.choice(("one", "one", "ten", "sign", "out")) if rng.random() < slips else ""
        if slip == "out" and len(problem.changes) > 1:
            continue
        if slip == "sign" and swapped.of(value) is not None:
            change = swapped
        result = change.of(value)
        if result is None:  # a slip before has left no whole number: it rounds down
            result = max(0, value // change.number if change.sign == "/" else 0)
        if slip in ("one", "ten"):
            off = rng.choice((-1, 1)) * (10 if slip == "ten" else 1)
            result = result + off if result + off >= 0 else result - off
        result = min(result, 99)
        lines.append(f"{value} {change.sign} {change.number} = {result}")
        value = result
    if rng.random() < slips / 5:
        value = min(99, value + 1)
    return "\n".join([*lines, f"answer: {value}"])


def disturb(rng: random.Random, response: str) -> str:
    """The answer with one accident that a sampled model could have: a line lost or doubled, or a
    figure changed."""
    lines = response.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.choice(("lost", "doubled", "figure", "figure", "figure"))
    if kind == "lost":
        del lines[at]
    elif kind == "doubled":
        lines.insert(at, lines[at])
    else:
        place = rng.choice([i for i, mark in enumerate(lines[at]) if mark.isdigit()])
        lines[at] = lines[at][:place] + str(rng.randrange(10)) + lines[at][place + 1 :]
    return "\n".join(lines)


def _fits(text: str, sentence: str, name: str | None = None) -> re.Match[str] | None:
    """A sentence held against its pattern, whoever it is about where no name is given."""
    return _pattern(text, name).fullmatch(sentence.strip())


@cache
def _pattern(text: str, name: str | None) -> re.Pattern[str]:
    pattern = re.escape(text)
    for place, found in (_PLACES | ({"name": name} if name else {})).items():
        pattern = pattern.replace(re.escape("{" + place + "}"), f"(?P<{place}>{found})")
    return re.compile(pattern)


_PLACES = {
    "name": "|".join(NAMES),
    "other": "|".join(NAMES),
    "who": "|".join(NAMES),
    "things": "|".join(THINGS),
    "n": r"\d{1,2}",
    "k": r"\d{1,2}",
}


def _result(a: int, sign: str, b: int) -> int | None:
    if sign == "/":
        return a // b if b and a % b == 0 else None
    found = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return found if found >= 0 else None


def _equation(value: int, change: Change) -> str:
    result = change.of(value)
    return f"{value} {change.sign} {change.number} = {'none' if result is None else result}"


def _does(change: Change, value: int, a: int, sign: str, b: int) -> bool:
    """Whether a step does this with the number so far; the order of a sum does not count."""
    wanted = [(value, change.number)]
    if sign in "+*":
        wanted.append((change.number, value))
    return sign == change.sign and (a, b) in wanted
