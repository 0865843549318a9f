"""LLM-as-a-judge, the pure part: render the rubric, read the judge's reply, aggregate votes.

This seam decides what the model learns, so it errs on one side only: a reply that cannot be
read is None. It is never a number, and nothing a candidate writes can become its score, because
only the judge's reply is read, never the prompt that quotes the candidate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import yaml

from srlm_lite.config import SHIPPED, shipped_file
from srlm_lite.errors import UserError
from srlm_lite.records import FinishReason, Judgement

PLACEHOLDER = re.compile(r"\{\{\s*(prompt|response)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Rubric:
    """The judge's instructions and the range of its score.

    `template` holds `{{prompt}}` and `{{response}}` once each. `delimiter` is the tag name that
    the template puts around the response, if it does.
    """

    name: str
    template: str
    min: float = 0.0
    max: float = 5.0
    step: float | None = None
    delimiter: str | None = None

    def render(self, *, prompt: str, response: str) -> str:
        """The judge's prompt for one candidate.

        Both texts are inserted in one pass, so a candidate that spells a placeholder inserts
        nothing; the delimiter's tags inside either text lose their angle bracket, so that
        neither can end its own quotation.
        """
        texts = {"prompt": self._fenced(prompt), "response": self._fenced(response)}
        return PLACEHOLDER.sub(lambda match: texts[match[1]], self.template)

    def _fenced(self, text: str) -> str:
        if self.delimiter is None:
            return text
        tag = re.compile(rf"<(?=\s*/?\s*{re.escape(self.delimiter)}\b)", re.IGNORECASE)
        return tag.sub("&lt;", text)

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
        UserError: Not found, unknown keys, a placeholder missing or doubled, or an empty range.
    """
    path = shipped_file(*SHIPPED["judge", "rubric"], name=name_or_path)
    return _read_rubric(path)


def _read_rubric(path: Path) -> Rubric:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("not readable as YAML", where=str(path)) from error
    if not isinstance(raw, dict) or "template" not in raw:
        raise UserError("a rubric needs the keys name, template, min, max", where=str(path))
    unknown = raw.keys() - set(Rubric.__slots__)
    if unknown:
        raise UserError(f"unknown keys: {', '.join(sorted(unknown))}", where=str(path))
    rubric = Rubric(**{"name": path.stem, **raw})
    found = sorted(match[1] for match in PLACEHOLDER.finditer(rubric.template))
    if found != ["prompt", "response"]:
        raise UserError(
            "the template must hold {{prompt}} and {{response}} once each", where=str(path)
        )
    if not rubric.min < rubric.max:
        raise UserError("min must be below max", where=str(path))
    return rubric


SCORE_LINE = re.compile(
    r"""
    (?:(?:final|total|overall)\s+)?score
    \s*[:=]\s*
    [\[(<]?\s*
    (?P<value>[+-]?\d+(?:[.,]\d+)?)
    \s*(?:points?)?\s*
    [\])>]?
    (?:\s*(?:/|out\s+of)\s*(?P<of>\d+(?:\.0+)?))?
    \s*(?:points?)?\s*\.?
    """,
    re.IGNORECASE | re.VERBOSE,
)


def parse_score(
    reply: str, rubric: Rubric, *, finish_reason: FinishReason = "stop"
) -> float | None:
    """The score a judge's reply ends in, or None when it cannot be read.

    A score is a line of its own, `Score: <number>`, markdown emphasis aside; the last such line
    counts. `/5` or `out of 5` is accepted when it names the rubric's maximum. None when there
    is no such line, when the number is off the rubric's range or grid, or when the reply ran
    into its token limit: what a truncated reply would have ended in is not known.
    """
    if finish_reason == "length":
        return None
    last = None
    for line in reply.splitlines():
        last = SCORE_LINE.fullmatch(_plain(line)) or last
    if last is None:
        return None
    if last["of"] is not None and float(last["of"]) != rubric.max:
        return None
    score = float(last["value"].replace(",", "."))
    return score if rubric.allows(score) else None


def _plain(line: str) -> str:
    halves = line.replace("½", ".5")
    # Full-width digits and colons are the same characters to a reader.
    return re.sub(r"[*_`#]", "", unicodedata.normalize("NFKC", halves)).strip()


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
    votes: dict[str, list[float | None]] = {}
    for judgement in judgements:
        votes.setdefault(judgement.candidate_id, []).append(judgement.score)
    return dict(votes)
