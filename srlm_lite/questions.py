"""Questions to a judge beside its rubric: their templates, and how replies to them are read. Pure.

Which of two replies is better is asked in one way everywhere (`PairQuestion`): of a policy's
candidates (`judge.form: pairwise`), of two models (`srlm-lite compare`), and which of two
judgements is (`meta-rewarding`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from srlm_lite.errors import UserError
from srlm_lite.judging import plain_lines
from srlm_lite.quoting import fill, options, verdicts
from srlm_lite.records import FinishReason
from srlm_lite.shipped import TEMPLATES, shipped_file, shipped_text

QuestionKind = Literal[
    "checklist",
    "checklist-item",
    "disturb",
    "meta-judge",
    "mt-bench",
    "new-problem",
    "pairwise",
    "side-by-side",
    "step",
]
QUESTIONS: Mapping[QuestionKind, tuple[str, ...]] = {
    "checklist": ("prompt",),
    "checklist-item": ("prompt", "response", "item"),
    "disturb": ("prompt",),
    "meta-judge": ("first", "second"),
    "mt-bench": ("turn", "conversation"),
    "new-problem": ("problems",),
    "pairwise": ("prompt", "first", "second"),
    "side-by-side": ("prompt", "responses"),
    "step": ("prompt", "steps"),
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


Verdict = Literal["A", "B", "tie"]
"""Which of the two replies shown is better: the first, the second, or neither."""

WINNERS = ("Winner: A", "Winner: B")
"""Last lines of a reply to the shipped question, where the first, or the second reply is better."""

_VERDICT = re.compile(r"winner\s*[:=]\s*(?:reply\s+)?\(?(a|b|tie)\)?\s*\.?", re.IGNORECASE)
WRITTEN = (verdicts("winner", r"(?:reply(?:\W|_)*+)?(?:a|b|tie)"),)
"""Lines that a judge writes who is asked the shipped question, for `quote`."""


def read_verdict(reply: str, *, finish_reason: FinishReason = "stop") -> Verdict | None:
    """The verdict that a judge's reply ends in, or None when it cannot be read.

    A verdict is the last line of the reply, `Winner: A`, `Winner: B` or `Winner: tie`, markdown
    aside. Anything else, and a reply that ran into its token limit, is None.
    """
    lines = plain_lines(reply) if finish_reason == "stop" else []
    found = _VERDICT.fullmatch(lines[-1].strip()) if lines else None
    if found is None:
        return None
    word = found[1].lower()
    return "tie" if word == "tie" else "A" if word == "a" else "B"


def read_choice(reply: str, lines: tuple[str, str], *, finish_reason: FinishReason = "stop") -> int:
    """1 where the reply's last line is the first of two lines, -1 the second, 0 anything else."""
    found = plain_lines(reply) if finish_reason == "stop" else []
    last = found[-1].strip(" .").lower() if found else ""
    named = [last == line.lower() for line in lines]
    return int(named[0]) - int(named[1])


@dataclass(frozen=True, slots=True)
class PairQuestion:
    """Which of two replies to a prompt is better, as it is put to a judge.

    Args:
        template: With its places for the prompt and both replies.
        winners: The last line of the judge's reply where the first, or the second is better.
    """

    template: str
    winners: tuple[str, str] = WINNERS

    def ask(self, prompt: str, first: str, second: str) -> str:
        """The question; no text in it holds a line that the judge is to write."""
        written = WRITTEN if self.winners == WINNERS else options(*self.winners)
        return fill(self.template, {"prompt": prompt, "first": first, "second": second}, written)

    def read(self, reply: str, *, finish_reason: FinishReason = "stop") -> Verdict | None:
        """The verdict that a judge's reply ends in, or None when it cannot be read."""
        if self.winners == WINNERS:
            return read_verdict(reply, finish_reason=finish_reason)
        named = read_choice(reply, self.winners, finish_reason=finish_reason)
        return None if not named else "A" if named > 0 else "B"
