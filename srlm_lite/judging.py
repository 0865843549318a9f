"""LLM-as-a-judge, the pure part: render the rubric, read the judge's reply, aggregate votes.

This seam decides what the model learns, so it errs on one side only: a reply that cannot be
read is None. It is never a number, and nothing a candidate writes can become its score: only the
judge's reply is read, never the prompt that quotes the candidate, and in what it quotes (`quote`) a
judge finds no score to copy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Protocol

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from srlm_lite.errors import UserError
from srlm_lite.quoting import SCORES, closing_tags, item_lines, quote
from srlm_lite.records import FinishReason, Judgement
from srlm_lite.shipped import RUBRICS, shipped_file
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
        written = (*SCORES, *item_lines(self.template))
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
