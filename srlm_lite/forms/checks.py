"""Items of a checklist that code can check: counts, lengths, formats, words. Pure.

A check is a short phrase, as a model writes it and as people edit it: `at least 3 bullets`, `50 to
80 words`, `contains "oak"`, `ends with a question`. An item is checked by code only where all that
it says is such a phrase, with no more around it than `the reply has` or `does it`; `at least 3
words about trees` is left to the judge.

`ifeval ID {arguments}` takes any of IFEval's checks, which need the extra `eval`; their counts of
sentences and words are NLTK's, and these here are plain rules that need nothing.

Source: Viswanathan et al. 2025, RLCF, arXiv:2507.18624, section 3, checks by code what code can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_SIGN = re.compile(r"^\s*(?:[-*•]|[0-9]+[.)])\s+(?=\S)")
_BULLET = re.compile(r"^\s*[-*•]\s+(?=\S)")
_NUMBERED = re.compile(r"^\s*[0-9]+[.)]\s+(?=\S)")
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d]*(?=\s|$)")


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def words(text: str) -> int:
    """Runs of letters and figures; `don't` and `well-known` are one each."""
    return len(_WORD.findall(text))


def sentences(text: str) -> int:
    """What ends in a stop, and a line or rest of one that says something and ends in none.

    The sign before an item of a list ends nothing. A stop inside an abbreviation does.
    """
    count = 0
    for line in _lines(text):
        line = _SIGN.sub("", line)
        parts = _SENTENCE_END.split(line)
        count += sum(any(map(str.isalnum, part)) for part in parts)
    return count


def paragraphs(text: str) -> int:
    """Blocks with an empty line between them."""
    return sum(bool(block.strip()) for block in re.split(r"\n\s*\n", text))


UNITS: Mapping[str, Callable[[str], int]] = {
    "word": words,
    "sentence": sentences,
    "paragraph": paragraphs,
    "line": lambda text: len(_lines(text)),
    "bullet": lambda text: sum(bool(_BULLET.match(line)) for line in text.splitlines()),
    "item": lambda text: sum(bool(_SIGN.match(line)) for line in text.splitlines()),
    "character": lambda text: len(text.strip()),
}
"""What can be counted. A bullet is a line that begins with -, * or •; an item also one with a
number and a stop."""


def _is_json(text: str) -> bool:
    """JSON alone, perhaps in a fence."""
    lines = text.strip().splitlines()
    if len(lines) > 2 and lines[0].strip() in ("```", "```json") and lines[-1].strip() == "```":
        lines = lines[1:-1]
    try:
        json.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return False
    return True


def _is_list(text: str) -> bool:
    """Two items at least, and nothing but a line before and a line after them."""
    marks = [bool(_SIGN.match(line)) for line in _lines(text)]
    return sum(marks) > 1 and all(marks[1:-1])


def _ends_with_question(text: str) -> bool:
    return text.rstrip().rstrip("\"')*_\u201d").endswith("?")


FORMATS: Mapping[str, Callable[[str], bool]] = {
    "valid json": _is_json,
    "a list": _is_list,
    "a numbered list": lambda text: (
        _is_list(text) and not any(_BULLET.match(line) for line in _lines(text))
    ),
    "a bulleted list": lambda text: (
        _is_list(text) and not any(_NUMBERED.match(line) for line in _lines(text))
    ),
    "ends with a question": _ends_with_question,
    "in capitals": lambda text: text.upper() == text and text.lower() != text,
    "in lower case": lambda text: text.lower() == text and text.upper() != text,
    "no commas": lambda text: "," not in text,
}
"""What a whole reply can be, or do."""


@dataclass(frozen=True, slots=True)
class Check:
    """A phrase that code can hold a reply against."""

    phrase: str
    holds: Callable[[str], bool]


_NUMBERS = {
    name: number
    for number, name in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=1
    )
}
_N = rf"([0-9]{{1,6}}|{'|'.join(_NUMBERS)})"
_UNIT = rf"({'|'.join(UNITS)})s?(?: points?)?"
_COUNTS: tuple[tuple[re.Pattern[str], tuple[str, str]], ...] = tuple(
    (re.compile(pattern), ends)
    for pattern, ends in (
        (rf"(?:at least|no fewer than|no less than|a minimum of) {_N} {_UNIT}", ("n", "")),
        (rf"{_N} {_UNIT} (?:or|and) more", ("n", "")),
        (rf"{_N} (?:or|and) more {_UNIT}", ("n", "")),
        (rf"(?:at most|no more than|up to|a maximum of) {_N} {_UNIT}", ("", "n")),
        (rf"{_N} {_UNIT} or (?:fewer|less)", ("", "n")),
        (rf"{_N} or (?:fewer|less) {_UNIT}", ("", "n")),
        (rf"(?:more than|over) {_N} {_UNIT}", ("n+1", "")),
        (rf"(?:fewer than|less than|under|below) {_N} {_UNIT}", ("", "n-1")),
        (rf"(?:exactly |just )?{_N} {_UNIT}", ("n", "n")),
    )
)
_BETWEEN = re.compile(rf"(?:between |from )?{_N}(?: to | and |-){_N} {_UNIT}")
_TEXT = r"[\"'\u201c]([^\"\u201c\u201d]{1,200}?)[\"'\u201d]"
_TEXTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(rf"(?:contains?|mentions?|includes?|uses?)(?: the words?)? {_TEXT}", re.I), "has"),
    (
        re.compile(
            rf"(?:does not|do not|doesn't|don't|never) "
            rf"(?:contain|mention|include|use)(?: the words?)? {_TEXT}",
            re.I,
        ),
        "lacks",
    ),
    (re.compile(rf"(?:starts?|begins?) with {_TEXT}", re.I), "starts"),
    (re.compile(rf"ends? with {_TEXT}", re.I), "ends"),
)
_LEAD = re.compile(
    r"(?:check: *)?"
    r"(?:(?:does |do |is |are )?(?:the |your )?(?:whole )?(?:reply|response|answer|text|it) )?"
    r"(?:must |should |to )?"
    r"(?:(?:have|has|be|is|are|give|gives|list|lists|written|write) )*",
    re.I,
)
_IFEVAL = re.compile(r"ifeval ([a-z_]+:[a-z_]+) *(\{.*\})?", re.DOTALL)


def read_check(item: str) -> Check | None:
    """The check that an item says, or None where only a judge can tell.

    Args:
        item: Such as `The reply has at least 3 bullets.` or `does it end with a question?`
    """
    text = " ".join(item.split()).rstrip(" .?!")
    if found := _IFEVAL.fullmatch(text):
        return _ifeval(text, found)
    lead = _LEAD.match(text)
    body = text[lead.end() :] if lead else text
    for phrase in dict.fromkeys((body, text)):
        check = _count(phrase.lower()) or _format(phrase.lower()) or _words(phrase)
        if check is not None:
            return check
    return None


def _count(text: str) -> Check | None:
    if found := _BETWEEN.fullmatch(text):
        least, most = _number(found[1]), _number(found[2])
        return _within(text, found[3], least, most) if least <= most else None
    for pattern, (low, high) in _COUNTS:
        if found := pattern.fullmatch(text):
            number, unit = _number(found[1]), found[2]
            return _within(text, unit, _end(low, number), _end(high, number))
    return None


def _number(text: str) -> int:
    return _NUMBERS.get(text) or int(text)


def _end(said: str, number: int) -> int | None:
    return {"": None, "n": number, "n+1": number + 1, "n-1": number - 1}[said]


def _within(phrase: str, unit: str, low: int | None, high: int | None) -> Check:
    count = UNITS[unit]

    def holds(reply: str) -> bool:
        found = count(reply)
        return (low is None or low <= found) and (high is None or found <= high)

    return Check(phrase, holds)


def _format(text: str) -> Check | None:
    plain = re.sub(r"^end with", "ends with", text.replace("lowercase", "lower case"))
    plain = {
        "json": "valid json",
        "in uppercase": "in capitals",
        "in upper case": "in capitals",
    }.get(plain, plain)
    holds = FORMATS.get(plain) or FORMATS.get(plain.removeprefix("all "))
    return None if holds is None else Check(text, holds)


def _words(text: str) -> Check | None:
    for pattern, kind in _TEXTS:
        if found := pattern.fullmatch(text):
            wanted = found[1].strip().casefold()
            if not wanted:
                return None
            return Check(text, _KINDS[kind](wanted))
    return None


def _whole(wanted: str) -> re.Pattern[str]:
    """A text as whole words."""
    before, after = (r"(?<!\w)" if wanted[0].isalnum() else "", r"(?!\w)")
    return re.compile(before + re.escape(wanted) + (after if wanted[-1].isalnum() else ""))


_KINDS: Mapping[str, Callable[[str], Callable[[str], bool]]] = {
    "has": lambda wanted: lambda reply: bool(_whole(wanted).search(reply.casefold())),
    "lacks": lambda wanted: lambda reply: not _whole(wanted).search(reply.casefold()),
    "starts": lambda wanted: lambda reply: reply.strip().casefold().startswith(wanted),
    "ends": lambda wanted: lambda reply: reply.strip().casefold().endswith(wanted),
}


def _ifeval(text: str, found: re.Match[str]) -> Check | None:
    try:
        arguments: Any = json.loads(found[2] or "{}")
    except ValueError:
        return None
    if not isinstance(arguments, dict):
        return None
    name = found[1]

    def holds(reply: str) -> bool:
        from srlm_lite.evaluate import ifeval

        task = ifeval.tasks_of(
            [{"key": 0, "prompt": "", "instruction_id_list": [name], "kwargs": [arguments]}],
            where=text,
        )[0]
        return bool(ifeval.check(task, reply).strict[0])

    return Check(text, holds)
