"""Final answers that can be compared, and the votes that samples give them. Pure.

An extractor reads the final answer of a reply, or None where it has none. Replies with the same
one vote for it; whether it is right nobody says.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_function
from srlm_lite.records import Candidate, Prompt, VoteCount

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])|(?<![\w.])-?\.\d+")
_SAID = re.compile(
    r"(?i:\banswer\b|\boption\b|\bchoice\b|\\boxed)[^A-Za-z\n]{0,12}?(?i:is\s*)?"
    r"[\s:*({\[$]{0,6}(?:\\text\{)?([A-J])(?![A-Za-z'])"
)
_ALONE = re.compile(r"[\s*({\[]*([A-J])[\s*)}\].:]*")


def number(reply: str) -> str | None:
    """The last number of a reply: `1,234.50` and `1234.5` are the same one."""
    found = _NUMBER.findall(reply)
    if not found:
        return None
    value = Decimal(found[-1].replace(",", ""))
    return "0" if not value else f"{value.normalize():f}"


def choice(reply: str) -> str | None:
    """The letter, A to J, of the option that a reply ends with.

    The last one behind `answer`, `option`, `choice` or in `\\boxed{}`; else a last line that is a
    letter and no more.
    """
    said = _SAID.findall(reply)
    if said:
        return str(said[-1])
    lines = [line for line in reply.splitlines() if line.strip()]
    alone = _ALONE.fullmatch(lines[-1]) if lines else None
    return alone[1] if alone else None


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {"number": number, "choice": choice}
"""What reads an answer, by name."""


@dataclass(frozen=True, slots=True)
class Extractor:
    """What reads the final answer of a reply: one of `EXTRACTORS`, or a function of the user's."""

    name: str
    function: Callable[[str], object]
    where: str

    def __call__(self, reply: str) -> str | None:
        """The answer, as a text that equals that of replies with the same one.

        Raises:
            UserError: It failed, or gave neither a text nor None.
        """
        try:
            found = self.function(reply)
        except Exception as error:  # code of the user's own
            raise UserError(
                f"the extractor failed on a reply ({type(error).__name__}: {error})",
                where=self.where,
            ) from error
        if found is not None and not isinstance(found, str):
            raise UserError(
                f"the extractor gave {found!r}, neither a text nor None", where=self.where
            )
        return found


def load_extractor(name: str, *, where: str) -> Extractor:
    """An extractor by its name, or by `module:function` as the gold scorer is.

    Args:
        where: The setting that names it.

    Raises:
        UserError: It cannot be imported, or is no function of a reply.
    """
    where = f"{where} = {name}"
    if name in EXTRACTORS:
        return Extractor(name, EXTRACTORS[name], where)
    if ":" not in name:
        known = ", ".join(EXTRACTORS)
        raise UserError(f"expected {known}, or module:function", where=where)
    return Extractor(name, load_function(name, ("reply",), where=where), where)


def count_votes(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    extractor: Callable[[str], str | None],
) -> list[VoteCount]:
    """The votes of each prompt's candidates for its answers, the most frequent answer first.

    What ran into the token limit or cannot be read votes for none, and still counts as a sample.
    Among answers with as many votes the one that came first stands first.
    """
    by_prompt: dict[str, list[Candidate]] = {prompt.prompt_id: [] for prompt in prompts}
    for row in candidates:
        by_prompt[row.prompt_id].append(row)
    counted = []
    for prompt_id, rows in by_prompt.items():
        answers = {
            row.candidate_id: None if row.finish_reason == "length" else extractor(row.text)
            for row in rows
        }
        votes = Counter(answer for answer in answers.values() if answer is not None)
        counted.append(VoteCount(prompt_id, len(rows), dict(votes.most_common()), answers))
    return counted


def vote_figures(counted: Sequence[VoteCount]) -> dict[str, Any]:
    """How sure the votes of an iteration are, and how varied its answers.

    `vote_share` is the mean share of the most frequent answer, `answers` the mean number of
    answers a prompt, `unanimous` and `unread` the shares of prompts whose samples all agree and of
    samples without an answer; `answer_entropy` is the entropy in nats of the most frequent answers
    over the prompts, `majority_answers` their number. A policy that learns from its own majorities
    may come to say one answer to everything: then the share nears 1 while that entropy falls.

    Source: Shafayat et al. 2025, arXiv:2505.21444, section 4.
    """
    samples = sum(row.samples for row in counted)
    tops = Counter(next(iter(row.votes)) for row in counted if row.votes)
    total = sum(tops.values())
    entropy = -sum(n / total * math.log(n / total) for n in tops.values()) if total else 0.0
    return {
        "vote_share": round(fmean(row.share for row in counted), 4) if counted else None,
        "answers": round(fmean(len(row.votes) for row in counted), 2) if counted else None,
        "unanimous": round(sum(row.share == 1 for row in counted) / max(1, len(counted)), 4),
        "unread": round(1 - sum(sum(row.votes.values()) for row in counted) / max(1, samples), 4),
        "answer_entropy": round(entropy + 0.0, 4),
        "majority_answers": len(tops),
    }
