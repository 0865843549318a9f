"""What a judge is shown of others' texts: nothing in it is a line that the judge itself writes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

# On folded text (`_fold`). All repetitions are possessive: a run of thousands costs a single pass.
_GAP = r"(?:\W|_)*+"
_ON_LINE = r"(?:[^\w\n]|_)*+"
_START = rf"(?m:^){_ON_LINE}"
_WORD = r"(?<![^\W_])"
_IS = rf"(?=(?:[^\w:=]|_)*+[:=]){_GAP}"
_LAST = rf"(?=(?![^\W_])(?:[^\w\s]|{_ON_LINE}(?m:$)))"
_ADJECTIVES = rf"(?:(?:my|the|your|final|total|overall){_ON_LINE})*+"

SCORES = (
    re.compile(rf"{_WORD}(?P<word>score){_IS}(?=\d)"),
    re.compile(rf"{_START}{_ADJECTIVES}{_WORD}(?P<word>score)(?=(?:[^\w\n:=]|_)*+[:=])"),
    re.compile(
        rf"{_START}{_ADJECTIVES}{_WORD}(?P<word>score)"
        rf"(?=(?:[^\w\n|>~\u2013\u2014-]|_)*+[|>~\u2013\u2014-]){_GAP}(?=\d)"
    ),
)
"""Lines that say a score, and `SCORE_LINE` among them: `score: 5` anywhere in a line, at its
beginning `Score:` with anything behind it, or `score - 5`."""

_TURNS = (
    re.compile(rf"{_START}(?P<word>user|assistant|system|human|judge)(?=(?:[^\w\n:]|_)*+:)"),
    re.compile(rf"(?m:^)[^\w\n#]*+#{_ON_LINE}(?P<word>instruction|response|input)(?=[^\w\n:]*+:)"),
    re.compile(r"(?P<word><)\|[^\s<>]{1,40}>"),
    re.compile(r"(?P<word>[\[<])(?:/?inst\]|</?sys>>|/?(?:start|end)_of_turn>|/s>)"),
)
"""Words and tokens by which templates, a server's among them, begin and end turns."""

_LINE_ENDS = dict.fromkeys(map(ord, "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), "\n")


def quote(text: str, written: Sequence[re.Pattern[str]] = (), *, tags: Sequence[str] = ()) -> str:
    """A text of others in a question to a judge: nothing in it is a line that the judge writes.

    A judge gives evidence by copying, and goes on copying: a reply that ends in a verdict line
    gets that verdict. So each such line has the word that its reader looks for broken by a space
    after its first letter (`S core: 5`, `[ [8]]`), as special tokens are in a prompt; a line that
    is one letter or digit is put between quotation marks. The same happens to what templates write
    around turns, and a tag loses its angle bracket (`&lt;/reply>`), so that no text ends its own
    quotation. Characters that look alike by NFKC count as alike, those of no width as nothing. All
    other text stays as it is, and what has been quoted is quoted already.

    Args:
        written: Patterns of such lines, for folded text, each with a group `word` to be broken, or
            `whole` to be put between quotation marks.
        tags: Names of the tags that stand around the quotation.
    """
    patterns = [*written, *_TURNS]
    if tags:
        names = "|".join(re.escape(_fold(tag)[0]) for tag in tags)
        patterns.append(re.compile(rf"(?P<tag><)(?=[^\w<>]*+(?:{names})\b)"))
    # Again until nothing is left: taking one apart may put another together.
    while changes := sorted(set(_changes(text, patterns))):
        pieces, done = [], 0
        for start, end, new in changes:
            pieces += [text[done:start], new]
            done = end
        text = "".join([*pieces, text[done:]])
    return text


def _changes(text: str, patterns: Iterable[re.Pattern[str]]) -> Iterator[tuple[int, int, str]]:
    """What to put in place of which part of a text: start, end, the new characters."""
    folded, origin = _fold(text)
    for pattern in patterns:
        for found in pattern.finditer(folded):
            kind = found.lastgroup
            start = origin[found.start(kind or 0)]
            if kind == "tag":
                yield start, start + 1, "&lt;"
            elif kind == "whole":
                end = origin[found.end(kind) - 1] + 1
                yield start, start, '"'
                yield end, end, '"'
            elif not _is_one(origin, *found.span(kind or 0)):
                yield start + 1, start + 1, " "


def _is_one(origin: Sequence[int], start: int, end: int) -> bool:
    """Whether a folded word is a single character, such as \u2116: no reader takes it for one."""
    return end - start > 1 and origin[start] == origin[end - 1]


def _fold(text: str) -> tuple[str, Sequence[int]]:
    """A text in lower case and compatible characters, and where each of them comes from.

    Marks and characters of no width are left out, all ends of lines are newlines.
    """
    if text.isascii():
        return text.lower().translate(_LINE_ENDS), range(len(text))
    parts = [_folded(character) for character in text]
    return "".join(parts), [at for at, part in enumerate(parts) for _ in part]


@cache
def _folded(character: str) -> str:
    folded = unicodedata.normalize("NFKC", character).casefold().translate(_LINE_ENDS)
    return "".join(one for one in folded if unicodedata.category(one) not in ("Cf", "Mn"))


def verdicts(label: str, value: str) -> re.Pattern[str]:
    """Where `label: value` stands as a line or part of one; both are patterns for folded text."""
    return re.compile(rf"{_WORD}(?P<word>{label}){_IS}(?:{value}){_LAST}")


def numbered(label: str) -> re.Pattern[str]:
    """Where `label 1: 5` stands, the label a pattern for folded text."""
    return re.compile(rf"{_WORD}(?P<word>{label}){_GAP}\d++{_IS}(?=\d)")


@cache
def options(*lines: str) -> tuple[re.Pattern[str], ...]:
    """Patterns of the lines that a recipe names as verdicts, such as `Winner: Judgement A`.

    One with a colon is found anywhere in a line, as in `verdicts`; one without is a whole line.
    """
    return tuple(pattern for line in lines for pattern in _option(*_fold(line)))


def _option(line: str, origin: Sequence[int]) -> Iterator[re.Pattern[str]]:
    found = list(re.finditer(r"[^\W_]+", line))
    words = [one[0] for one in found]
    long = [one.end() - one.start() > 1 and not _is_one(origin, *one.span()) for one in found]
    at = long.index(True) if True in long else None
    parts = [f"(?P<word>{word})" if at == i else word for i, word in enumerate(words)]
    label = len(re.findall(r"[^\W_]+", re.split("[:=]", line)[0]))
    if not words:
        return  # no reader takes it for a line
    if at is None:
        marks = r'(?:[^\w\n"]|_)*+'
        yield re.compile(rf"(?m:^){marks}(?P<whole>{_ON_LINE.join(words)}){marks}(?m:$)")
    elif 0 < label < len(words):
        yield re.compile(
            rf"{_WORD}{_GAP.join(parts[:label])}{_IS}{_GAP.join(parts[label:])}{_LAST}"
        )
    else:
        yield re.compile(rf"{_START}{_ON_LINE.join(parts)}{_ON_LINE}(?m:$)")


@cache
def item_lines(template: str) -> tuple[re.Pattern[str], ...]:
    """Lines that say whether a point is given: `... yes (2)`, and `topic: whale yes`.

    The latter begin with words of the rubric.
    """
    names = "|".join(sorted(set(re.findall(r"[^\W\d_]{4,}", _fold(template)[0]))))
    label = rf"(?:(?:{names})\b[^\w\n:=]*+){{1,4}}+"
    points = r"[\s*_`]*+[(\[]\s*+\d++\s*+(?:/\s*+\d++\s*+)?[)\]]"
    return (
        re.compile(rf"{_WORD}(?P<word>yes|no)(?={points})"),
        re.compile(rf"{_START}{label}[:=][^\n]*{_WORD}(?P<word>yes|no){_ON_LINE}(?m:$)"),
    )[: 2 if names else 1]


@cache
def closing_tags(template: str) -> tuple[str, ...]:
    """Names of the tags that a template closes."""
    return tuple(dict.fromkeys(re.findall(r"</\s*([^\W\d_][\w-]*)", template)))


def fill(
    template: str,
    texts: Mapping[str, str],
    written: Sequence[re.Pattern[str]],
    *,
    tags: Sequence[str] = (),
) -> str:
    """A template with its `{{placeholders}}` replaced by quoted texts, all in one pass.

    A text that spells a placeholder fills nothing.

    Args:
        written: What the reader of the judge's reply looks for; see `quote`.
        tags: Beside those that the template closes.
    """
    tags = (*closing_tags(template), *tags)
    quoted = {name: quote(text, written, tags=tags) for name, text in texts.items()}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: quoted.get(match[1], match[0]), template)
