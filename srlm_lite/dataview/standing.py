"""What stands out in a data directory: what a run would refuse, and what it would learn wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from srlm_lite.dataview.figures import Figures, FileFigures, Ordering
from srlm_lite.dataview.languages import Languages

LONGER_WINS = 0.55
"""An order that the longer reply wins this often, by the lower end of its interval, is a bias."""
UNORDERED = 0.5
"""Share of prompts without an order from which on a file of ranked replies says little."""
AGAIN = 0.05
"""Share of rows that say what another one has said from which on it is worth a word."""
OTHER_LANGUAGE = 0.05
"""Share of replies in another language than their prompt."""
FEW_HELD_OUT = 30
"""Prompts; on fewer, a judge's accuracy is known within 15 points or more."""


@dataclass(frozen=True, slots=True)
class Standout:
    """Something to know before a run uses the data."""

    level: Literal["refused", "warning"]
    """`refused`: a run would not start with it."""
    text: str
    way_out: str


def findings(figures: Figures, languages: Mapping[str, Languages]) -> list[Standout]:
    """What stands out, what a run refuses first.

    Args:
        languages: By the name of a file.
    """
    found = [*_shared(figures)]
    for one in figures.files:
        found += _broken(one)
        found += _again(one)
        if not figures.thinks:
            found += _thoughts(one)
        if one.order is not None:
            found += _order(one, one.order)
        if figures.window is not None:
            found += _window(one, figures.window)
        if one.file.name in languages:
            found += _languages(one, languages[one.file.name])
    return sorted(found, key=lambda finding: finding.level != "refused")


def _shared(figures: Figures) -> Iterator[Standout]:
    for one in figures.shared:
        held, other = one.first
        where = f"the first stands in {held} and {other}"
        way_out = "Take them out of one of the two: a model is not measured on what it was taught"
        if one.same:
            yield Standout(
                "refused",
                f"{one.held_out} is held out, and {_count(one.same, 'prompt')} of it "
                f"{_are(one.same)} in {one.other}, too; {where}",
                way_out,
            )
        if rest := one.alike - one.same:
            yield Standout(
                "warning",
                f"{one.held_out} is held out, and {_count(rest, 'prompt')} of it {_are(rest)} in "
                f"{one.other} in the same words, but for case, punctuation or spaces; {where}",
                way_out,
            )


def _broken(one: FileFigures) -> Iterator[Standout]:
    name = one.file.name
    if not one.rows:
        level: Literal["refused", "warning"] = "warning" if one.file.held_out else "refused"
        needed = f"; it is needed {one.file.needed}" if one.file.needed else ", or delete it"
        yield Standout(level, f"{name} is empty", f"Give it rows{needed}")
    if one.empty:
        yield Standout(
            "refused",
            f"{_count(one.empty, 'row')} of {name} {_has(one.empty)} no text to answer, or no "
            f"reply; the first is {one.empty_at}",
            "Leave them out",
        )
    if one.mixed_ids.first:
        later, earlier = one.mixed_ids.first
        yield Standout(
            "refused",
            f"a prompt id of {name} stands for two prompts, in {earlier} and {later}",
            "Give each prompt an id of its own: replies with the same id are held against each "
            "other",
        )
    if one.same_ids.first:
        later, earlier = one.same_ids.first
        key = "response_id" if one.order is not None else "prompt_id"
        yield Standout(
            "refused",
            f"a {key} of {name} stands in two rows, {earlier} and {later}",
            "Give each an id of its own",
        )


def _again(one: FileFigures) -> Iterator[Standout]:
    for what, again, whole, learned in (
        (
            "prompts",
            one.same_prompts,
            one.prompts if one.order else one.rows,
            "it is learned or asked twice",
        ),
        ("replies", one.same_replies, one.rows, "it teaches little more"),
    ):
        if again.first and again.rows >= AGAIN * whole:
            later, earlier = again.first
            yield Standout(
                "warning",
                f"{again.rows:,} of {whole:,} {what} in {one.file.name} ({again.rows / whole:.0%}) "
                f"are in the words of another one, such as {earlier} and {later}",
                f"Leave out what comes again: {learned}",
            )


def _order(one: FileFigures, order: Ordering) -> Iterator[Standout]:
    name, none = one.file.name, order.single + order.tied
    if one.rows and none >= UNORDERED * one.prompts:
        serves = "measures no judge" if one.file.held_out else "teaches no order"
        yield Standout(
            "warning",
            f"{none:,} of {one.prompts:,} prompts in {name} {serves}: {order.single:,} have one "
            f"reply, {order.tied:,} have replies of one rank alone",
            "Give more replies a prompt, and ranks that differ",
        )
    wins = order.longer_wins
    if wins is not None and wins.low is not None and wins.high is not None:
        bounds = f"{wins.value:.0%} ({wins.low:.0%} to {wins.high:.0%})"
        if wins.low >= LONGER_WINS:
            yield Standout(
                "warning",
                f"in {name} the longer of two replies is the better one in {bounds} of the pairs: "
                "a judge learns from it, or is measured by it, that longer is better",
                "Balance the lengths, or watch them in the report (`srlm-lite report`)",
            )
        elif wins.high <= 1 - LONGER_WINS:
            yield Standout(
                "warning",
                f"in {name} the longer of two replies is the better one in only {bounds} of the "
                "pairs: a judge learns from it, or is measured by it, that shorter is better",
                "Balance the lengths, or look whether rank 0 is the best reply in it",
            )
    if order.upside_down:
        yield Standout(
            "warning",
            f"{_count(order.upside_down, 'pair')} in {name} {_has(order.upside_down)} the better "
            f"rank on the reply of lower quality, the first at {order.upside_down_at}",
            "Rank 0 is the best reply, and a higher quality is better: turn one of the two round",
        )
    if one.file.held_out and 0 < order.ordered < FEW_HELD_OUT:
        yield Standout(
            "warning",
            f"{name} has {_count(order.ordered, 'prompt')} with an order: too few to tell one "
            "judge from another",
            "Hold out more (`srlm-lite data prepare --eval-share`)",
        )


def _window(one: FileFigures, window: int) -> Iterator[Standout]:
    if one.beyond:
        beside = {
            "answers": "with their reply",
            "prompts": "beside the longest answer (rollout.max_new_tokens)",
            "ranked": "as the judge's question, beside its answer (judge.max_new_tokens)",
        }[one.file.kind]
        yield Standout(
            "warning",
            f"{one.beyond:,} of {one.rows:,} rows of {one.file.name} do not fit {window:,} tokens "
            f"{beside}, and are left out; the first is {one.beyond_at}",
            "Raise base.window, or shorten them",
        )


def _thoughts(one: FileFigures) -> Iterator[Standout]:
    if one.thoughts:
        yield Standout(
            "warning",
            f"{_count(one.thoughts, 'reply', 'replies')} in {one.file.name} "
            f"{'begins' if one.thoughts == 1 else 'begin'} with a thought, the first at "
            f"{one.thoughts_at}: a base that does not think, or is told not to, takes it for text",
            "Take the thoughts out, unless the base thinks (--base says whether it does)",
        )


def _languages(one: FileFigures, told: Languages) -> Iterator[Standout]:
    if told.both and told.other >= max(2, OTHER_LANGUAGE * told.both):
        yield Standout(
            "warning",
            f"{told.other} of {told.both} drawn replies in {one.file.name} are in another language "
            "than their prompt",
            "Look at them (--html), unless they are translations",
        )


def _count(number: int, what: str, several: str | None = None) -> str:
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _has(number: int) -> str:
    return "has" if number == 1 else "have"
