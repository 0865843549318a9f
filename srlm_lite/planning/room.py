"""Whether all that may be sampled can be judged: a judge's question holds the rubric as well.

A reply whose question does not fit the window gets no votes, and so is in no pair. That costs the
longest replies first, without a word before the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from srlm_lite.data.self_instruct import MAX_NEW_TOKENS
from srlm_lite.engines import kind_of
from srlm_lite.forms import form_of
from srlm_lite.forms.base import BEGUN
from srlm_lite.planning.lengths import around, longest, prompts_of
from srlm_lite.planning.probe import prompt_tokens, question_tokens
from srlm_lite.records import Prompt
from srlm_lite.settings import Shared
from srlm_lite.window import room_for_prompt

BYTES_A_TOKEN = 4
"""Roughly, of English text: for what no tokenizer is here to count."""
SELF_WRITTEN = MAX_NEW_TOKENS
"""Tokens of a reply in which the anchor writes new prompts, and of a prompt of its own at most."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Tokens, and whether a tokenizer counted them or they are estimated from bytes."""

    tokens: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Room:
    """Tokens that a prompt and its reply may have together, or its replies: as many as a question
    to the judge shows.

    All are of the whole turn, with what the template writes around it; a thought is not part of a
    reply, for no judge sees it.
    """

    sampled: int
    """At most, when the reply is sampled."""
    judged: int
    """At most, for a judge's question to fit the window."""
    rubric: int
    judgement: int
    """Tokens of a judge's reply, for which its question leaves room."""
    answer: int
    """`rollout.max_new_tokens`."""
    window: int
    prompts: Literal["prompts", "held-out prompts"] = "prompts"
    """Which of them are the longest."""
    known: bool = True
    """Whether the data bounds the longest prompt, or the window alone."""
    exact: bool = True
    shown: int = 1
    """Replies in a question to the judge."""

    @property
    def safe_prompt(self) -> int:
        """Tokens of a prompt up to which every reply can be judged; below 1: of no prompt."""
        return self.judged - self.shown * self.answer

    @property
    def missing(self) -> int:
        """By so many tokens the longest that may be sampled is too long; 0: it can be judged."""
        return max(0, self.sampled - self.judged)


def room_of(
    recipe: Shared,
    *,
    rubric: Counted,
    prompts: Counted | None,
    held_out: Counted | None,
    thought: int = 0,
) -> Room | None:
    """What the recipe's window leaves for prompt and reply; None of a judge behind a server.

    Args:
        rubric: What a judge's question holds beside prompt and replies.
        prompts: The longest that candidates answer; None: as long as the window admits.
        held_out: The same of the evaluation, whose answers are judged as well.
        thought: Before every answer and judgement.
    """
    if kind_of(recipe, "judge").remote:
        return None
    form, window, answer = form_of(recipe), recipe.base.window, recipe.rollout.max_new_tokens
    judgement = BEGUN if form.weighs else recipe.judge.max_new_tokens + thought
    longest_asked = room_for_prompt(window, answer=answer, thought=thought)
    admitted = Counted(max(0, longest_asked), exact=True)

    def within(counted: Counted | None) -> tuple[int, bool, bool]:
        found = counted or admitted
        return min(found.tokens, admitted.tokens), counted is not None, found.exact

    asked = [("prompts", within(prompts))] if recipe.iterations else []
    if recipe.evaluate.judged_answers and recipe.evaluate.policy_prompts:
        asked.append(("held-out prompts", within(held_out)))
    if not asked:
        return None
    which, (tokens, known, exact) = max(asked, key=lambda one: one[1][0])
    return Room(
        sampled=tokens + form.shown * answer,
        judged=room_for_prompt(window, answer=judgement) - rubric.tokens,
        rubric=rubric.tokens,
        judgement=judgement,
        answer=answer,
        shown=form.shown,
        window=window,
        prompts="prompts" if which == "prompts" else "held-out prompts",
        known=known,
        exact=rubric.exact and exact,
    )


def room_for(recipe: Shared) -> Room | None:
    """The same, counted by the base's tokenizer where that is here, else estimated from bytes.

    Raises:
        UserError: The rubric cannot be read.
    """
    from srlm_lite.judging import load_rubric

    training, evaluated = prompts_of(recipe)
    question = form_of(recipe).blank(load_rubric(recipe.judge.rubric))
    counted = question_tokens(recipe.base, ["", question])
    if counted is None:
        rubric = Counted(len(question.encode()) // BYTES_A_TOKEN, exact=False)
    else:
        rubric = Counted(counted[1] - counted[0], exact=True)
    prompts = _longest(recipe, training)
    if recipe.prompts.source == "self-instruct":
        prompts = Counted(SELF_WRITTEN + around(recipe.base), exact=True)
    return room_of(
        recipe,
        rubric=rubric,
        prompts=prompts,
        held_out=_longest(recipe, evaluated),
        thought=longest(recipe).thought,
    )


_LOOKED_AT = 64
"""Prompts, the longest in bytes, of which a tokenizer says which is the longest in tokens."""


def _longest(recipe: Shared, prompts: Sequence[Prompt] | None) -> Counted | None:
    """The longest of some prompts as turns; None where they are not here."""
    if not prompts:
        return None
    largest = sorted(prompts, key=lambda one: len(one.text.encode()), reverse=True)[:_LOOKED_AT]
    counted = prompt_tokens(recipe.base, largest)
    if counted is None:
        turns = around(recipe.base, largest[0].messages or ())
        return Counted(turns + len(largest[0].text.encode()) // BYTES_A_TOKEN, exact=False)
    return Counted(max(counted), exact=True)


def unjudged(room: Room) -> tuple[str, str] | None:
    """What may be sampled and not be judged, and the settings that mend it; None: all can be.

    Where the prompts are not here to be measured, a larger window is for what this one samples.
    """
    if not room.missing:
        return None
    about = "" if room.exact else "about "
    short = max(0, room.safe_prompt)
    of_which = f"{room.prompts} of more than {about}{short:,} tokens" if short else "all prompts"
    replies = "reply" if room.shown == 1 else "replies"
    what = (
        f"{of_which} may get replies too long to be judged, which then have no grade: prompt and "
        f"{replies} together may have {room.sampled:,} tokens when sampled, {about}"
        f"{room.judged:,} to be judged (the rubric takes {about}{room.rubric:,}, a judgement "
        f"{room.judgement:,})"
    )
    changes = [f"base.window={room.window + room.missing}"]
    answer = room.answer - math.ceil(room.missing / room.shown)
    judgement = room.judgement - room.missing
    if room.known and 2 * answer >= room.answer:
        changes.append(f"rollout.max_new_tokens={answer}")
    if 2 * judgement >= room.judgement:
        changes.append(f"judge.max_new_tokens={judgement}")
    return what, "Set " + " or ".join(changes)
