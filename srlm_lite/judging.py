"""LLM-as-a-judge, the pure part: render the rubric, read the judge's reply, aggregate votes.

This seam decides what the model learns, so it errs on one side only: a reply that cannot be
read is None. It is never a number, and nothing a candidate writes can become its score: only the
judge's reply is read, never the prompt that quotes the candidate, and in what it quotes (`quote`) a
judge finds no score to copy.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal, Protocol

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from srlm_lite.errors import UserError
from srlm_lite.records import FinishReason, Judgement
from srlm_lite.shipped import RUBRICS, TEMPLATES, shipped_file, shipped_text
from srlm_lite.yaml_text import read_yaml

PLACEHOLDER = re.compile(r"\{\{\s*(prompt|response)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Rubric:
    """The judge's instructions and the range of its score.

    `template` holds `{{prompt}}` and `{{response}}` once each. `delimiter` is the tag name that
    the template puts around the response, if it does.
    """

    name: str
    template: str
    min: FiniteFloat = 0.0
    max: FiniteFloat = 5.0
    step: Annotated[FiniteFloat, Field(gt=0)] | None = None
    delimiter: Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")] | None = None

    def render(self, *, prompt: str, response: str) -> str:
        """The judge's prompt for one candidate.

        Both texts are inserted in one pass, so a candidate that spells a placeholder inserts
        nothing.
        """
        texts = {"prompt": self.quote(prompt), "response": self.quote(response)}
        return PLACEHOLDER.sub(lambda match: texts[match[1]], self.template)

    def quote(self, text: str) -> str:
        """A text as the judge is shown it: `quote` with score lines and the rubric's item lines."""
        named = () if self.delimiter is None else (self.delimiter,)
        written = (*SCORES, *_item_lines(self.template))
        return quote(text, written, tags=(*closing_tags(self.template), *named))

    def allows(self, score: float) -> bool:
        """Whether the score lies in the range and, where there is one, on the grid."""
        if not self.min <= score <= self.max:
            return False
        if self.step is None:
            return True
        steps = (score - self.min) / self.step
        return abs(steps - round(steps)) < 1e-9


def load_rubric(name_or_path: str) -> Rubric:
    """A shipped rubric by name, or one from a file.

    Raises:
        UserError: Not found, unknown keys, values of another type, an empty range, a placeholder
            missing or doubled, or no delimiter around the response where one is named.
    """
    path = shipped_file(RUBRICS, name=name_or_path)
    return _read_rubric(path)


QuestionKind = Literal["disturb", "meta-judge", "mt-bench", "pairwise", "side-by-side"]
QUESTIONS: Mapping[QuestionKind, tuple[str, ...]] = {
    "disturb": ("prompt",),
    "meta-judge": ("first", "second"),
    "mt-bench": ("turn", "conversation"),
    "pairwise": ("prompt", "first", "second"),
    "side-by-side": ("prompt", "responses"),
}
"""Questions to a judge beside its rubric, and the placeholders that a template of each holds once.
The shipped template of a kind has the kind's name."""


def load_question(kind: QuestionKind, name_or_path: str) -> str:
    """The template of a question to the judge, by shipped name or from a file.

    Raises:
        UserError: Not found, or a `{{placeholder}}` is missing or doubled.
    """
    path = shipped_file(TEMPLATES, name=name_or_path)
    text = shipped_text(TEMPLATES, name=name_or_path)
    for placeholder in QUESTIONS[kind]:
        if text.count(f"{{{{{placeholder}}}}}") != 1:
            raise UserError(
                f"a template of this kind holds {{{{{placeholder}}}}} once", where=str(path)
            )
    return text


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


# --- what a judge is shown of others' texts ---------------------------------------------------

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
def _item_lines(template: str) -> tuple[re.Pattern[str], ...]:
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


def _read_rubric(path: Path) -> Rubric:
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError("a rubric is a mapping with the key template", where=str(path))
    unknown = raw.keys() - set(Rubric.__slots__)
    if unknown:
        raise UserError(f"unknown keys: {', '.join(sorted(map(str, unknown)))}", where=str(path))
    try:
        rubric = TypeAdapter(Rubric).validate_python({"name": path.stem, **raw})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"`{first['loc'][0]}`: {first['msg']}", where=str(path)) from error
    problem = _problem(rubric)
    if problem is not None:
        raise UserError(problem, where=str(path))
    return rubric


def _problem(rubric: Rubric) -> str | None:
    if not rubric.min < rubric.max:
        return "min must be below max"
    found = [match[1] for match in PLACEHOLDER.finditer(rubric.template)]
    if sorted(found) != ["prompt", "response"]:
        return "the template must hold {{prompt}} and {{response}} once each"
    before, _, after = re.split(r"(\{\{\s*response\s*\}\})", rubric.template)
    tag = rubric.delimiter
    if tag is not None and (f"<{tag}>" not in before or f"</{tag}>" not in after):
        return f"the template must put <{tag}> and </{tag}> around {{{{response}}}}"
    return None


SCORE_LINE = re.compile(
    r"""
    (?:(?:final|total|overall)\s+)?score
    \s*[:=]\s*
    (?:(?P<square>\[)|(?P<round>\()|(?P<angle><))?\s*
    (?P<value>[+-]?\d+(?:\.\d+|,\d{1,2})?)
    \s*(?:points?)?\s*
    (?(square)\])(?(round)\))(?(angle)>)
    (?:\s*(?:/|out\s+of)\s*(?P<of>\d+(?:\.0+)?))?
    \s*(?:points?)?\s*\.?
    """,
    re.IGNORECASE | re.VERBOSE,
)

MARKDOWN = str.maketrans(dict.fromkeys("*_`#", " "))
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Full-width letters, digits and colons, which to a reader are the plain ones."""


WHOLE = re.compile(r"[0-9]+")
VALUE = re.compile(r"score[^0-9]*([0-9]+(?:[.,][0-9]+)?)", re.IGNORECASE)
"""The first number after the word, in a line that `SCORE_LINE` has accepted."""


class DrawnToken(Protocol):
    """A token of a judge's reply, and what could have stood in its place."""

    @property
    def text(self) -> str: ...

    @property
    def alternatives(self) -> Sequence[tuple[str, float]]:
        """Texts with their log-probabilities."""
        ...


def parse_score(
    reply: str, rubric: Rubric, *, finish_reason: FinishReason = "stop"
) -> float | None:
    """The score a judge's reply ends in, or None when it cannot be read.

    A score is a line of its own, `Score: <number>`, markdown aside, and the last line of the
    reply: one with text behind it may be a quotation, or not be meant to stand. `/5` or
    `out of 5` is accepted when it names the rubric's maximum. None when the last line is
    anything else, when the number is off the rubric's range or grid, or when the reply ran into
    its token limit: what a truncated reply would have ended in is not known.
    """
    if finish_reason == "length":
        return None
    lines = plain_lines(reply)
    last = SCORE_LINE.fullmatch(lines[-1]) if lines else None
    if last is None:
        return None
    if last["of"] is not None and float(last["of"]) != rubric.max:
        return None
    score = float(last["value"].replace(",", "."))
    return score if rubric.allows(score) else None


def score_line_complete(rubric: Rubric, text: str) -> bool:
    """Whether a judge's reply, still being written, has just finished its score line.

    A rule for `Limits.stop`: what it stops is read by `parse_score` as that line's score. Only
    for replies in which the judge quotes no score, for it would stop at the quotation: see
    `names_a_score`.
    """
    return text.endswith(("\n", "\r")) and parse_score(text, rubric) is not None


def names_a_score(text: str) -> bool:
    """Whether a text has the word that a score line starts with, for a judge to quote."""
    return "score" in text.translate(FULL_WIDTH).casefold()


def expected_score(tokens: Sequence[DrawnToken], rubric: Rubric, *, sampled: float) -> float | None:
    """The mean of the scores that could have stood where the score was drawn, by probability.

    sum(s p(s)) / sum(p(s)), over the alternatives at the score's own token that are whole scores
    of the rubric. The rationale before it is as it was sampled; only the last step, from rationale
    to number, becomes finer than a whole number, and ties become rare.

    Args:
        tokens: All of the reply, each with its most probable alternatives.
        sampled: What `parse_score` reads in the reply.

    Returns:
        None where the score is not one token of digits, such as 3.5, 3½ or 10 in two tokens.

    Source: Liu et al. 2023, G-Eval, arXiv:2303.16634, section 2: scores weighted by their
    probability. Yuan et al. 2024, arXiv:2401.10020, sample whole scores and average several.
    """
    token = _score_token(tokens, sampled)
    if token is None:
        return None
    weights = [
        (float(text.strip()), math.exp(log_probability))
        for text, log_probability in token.alternatives
        if WHOLE.fullmatch(text.strip()) and rubric.allows(float(text.strip()))
    ]
    total = sum(weight for _, weight in weights)
    return sum(score * weight for score, weight in weights) / total if total else None


def _score_token(tokens: Sequence[DrawnToken], sampled: float) -> DrawnToken | None:
    """The token that is the number in the reply's last line."""
    text = "".join(token.text for token in tokens)
    start, value = 0, None
    for line in text.splitlines(keepends=True):
        if any(map(str.isalnum, _plain(line))):
            found = VALUE.search(line)
            value = (start + found.start(1), found[1]) if found else None
        start += len(line)
    if value is None or not WHOLE.fullmatch(value[1]) or float(value[1]) != sampled:
        return None
    end = 0
    for token in tokens:
        end += len(token.text)
        if end > value[0]:
            return token if token.text.strip() == value[1] else None
    return None


def whole_scores(rubric: Rubric) -> list[int]:
    """The rubric's scores without a fraction, ascending; of very many the last thousand."""
    numbers = range(math.ceil(rubric.min), math.floor(rubric.max) + 1)
    return [number for number in numbers[-1000:] if rubric.allows(number)]


def plain_lines(reply: str) -> list[str]:
    """The lines of a reply that say something, without markdown."""
    return [line for line in map(_plain, reply.splitlines()) if any(map(str.isalnum, line))]


def _plain(line: str) -> str:
    # A space for each mark, for "3*4" is not 34. Then single spaces: a run of thousands would
    # keep the pattern busy for hours.
    plain = " ".join(line.translate(FULL_WIDTH).translate(MARKDOWN).split())
    return re.sub(r"(?<=\d) ?½", ".5", plain).replace("½", "0.5")


def mean_scores(judgements: Iterable[Judgement], *, min_votes: int) -> dict[str, float | None]:
    """Mean of the readable votes for each candidate.

    Returns:
        candidate_id to mean score, in order of first appearance; None for a candidate with
        fewer than `min_votes` readable votes.
    """
    votes = votes_by_candidate(judgements)
    return {
        candidate_id: fmean(readable) if len(readable) >= min_votes else None
        for candidate_id, scores in votes.items()
        for readable in [[score for score in scores if score is not None]]
    }


def votes_by_candidate(judgements: Iterable[Judgement]) -> dict[str, Sequence[float | None]]:
    """All votes of each candidate, unreadable ones as None."""
    return {
        candidate_id: [row.score for row in rows]
        for candidate_id, rows in by_candidate(judgements).items()
    }


def unasked(judgements: Iterable[Judgement]) -> set[str]:
    """Candidates that the judge was not asked about: its question did not fit the window."""
    return {
        candidate_id
        for candidate_id, rows in by_candidate(judgements).items()
        if all(
            not row.text and row.thought is None and row.finish_reason == "length" for row in rows
        )
    }


def as_sampled(judgement: Judgement) -> Judgement:
    """The judgement with the score that it says, where its score is an expected one."""
    if judgement.sampled_score is None:
        return judgement
    return replace(judgement, score=judgement.sampled_score)


def by_candidate(judgements: Iterable[Judgement]) -> dict[str, tuple[Judgement, ...]]:
    """The judgements of each candidate, in their order."""
    found: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        found.setdefault(judgement.candidate_id, []).append(judgement)
    return {candidate_id: tuple(rows) for candidate_id, rows in found.items()}
