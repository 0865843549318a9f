"""A few yes-or-no items for each prompt, written by the model: the score is the share that holds.

For each prompt the judge writes a checklist once in a run: items with weights, in a file that
people can edit (`checklists.jsonl`). Two standing items stand in every list. What code can check is
marked and checked by code (`forms.checks`); of all others the judge's probability of `yes` is read,
which takes one prefill an item. The score is the weighted mean. Of the pairs those are learned that
differ most on a single item.

Source: Viswanathan et al. 2025 (RLCF), arXiv:2507.18624, sections 2 and 3: weighted items by
prompt, a standing one for relevance and tone, code for what code can check, and the 40% of pairs
with the widest gap on an item. There items are graded 0 to 100 by another, larger model, which also
sees answers when it writes them; probabilities of yes, and the model's own items, are ours. The
reference answer by the model itself is from POP, arXiv:2604.20051.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field as Ranged
from pydantic import field_validator

from srlm_lite.declared import Draws, Facts, Phase, Sizes, Source, Weighs
from srlm_lite.errors import UserError
from srlm_lite.forms.base import Form, JudgeAtWork, JudgeQuestion, Scale, no_verdict
from srlm_lite.forms.checks import read_check
from srlm_lite.forms.grade import LEAST_MASS
from srlm_lite.judging import Rubric
from srlm_lite.questions import load_question
from srlm_lite.quoting import fill, options
from srlm_lite.records import (
    Candidate,
    CheckedItem,
    Checklist,
    Judgement,
    PreferencePair,
    Prompt,
    Reply,
    Weighed,
)
from srlm_lite.settings import IsPath, Positive, Probability, Section
from srlm_lite.shipped import TEMPLATES

MOST_WEIGHT = 100
LONGEST_ITEM = 300
"""Characters; a longer line is no item."""

STANDING = (
    "Does the reply do what the prompt asks, without a preamble and without what nobody asked for?",
    "Does the reply have the tone and the form that the prompt calls for?",
)


class ChecklistSettings(Section):
    """Form `checklist`: candidates are held against a few yes-or-no items by prompt."""

    template: Annotated[str, IsPath(shipped=TEMPLATES)] = "checklist"
    """The question for a prompt's items: name of a shipped template or a path. Each line of the
    reply is one, `80 | Does it ...?`, its weight before a bar or a colon."""
    item_template: Annotated[str, IsPath(shipped=TEMPLATES)] = "checklist-item"
    """The question whether an item holds: name of a shipped template or a path."""
    options: tuple[str, str] = ("yes", "no")
    """The judge's reply where an item holds, and where it does not."""
    most_items: Positive = 6
    """Items of a prompt at most, the first ones, beside the standing ones."""
    max_new_tokens: Positive = 256
    """Longest reply with items."""
    standing: tuple[str, ...] = STANDING
    """Items of every checklist."""
    standing_weight: Annotated[float, Ranged(gt=0, le=MOST_WEIGHT)] = 100.0
    """Weight of each; those of the judge's own items are from 1 to 100."""
    code: bool = True
    """Check by code what code can check: counts, lengths, formats and words."""
    keep: Probability = 0.4
    """Share of an iteration's pairs that is learned: those with the widest gap on an item. 1: all.
    """
    reference: bool = False
    """Show the judge an answer of its own beside the one that it checks. The question has a place
    for it then: `{{reference}}`, as in the shipped `checklist-item-reference`."""

    @field_validator("options")
    @classmethod
    def _are_two(cls, value: tuple[str, str]) -> tuple[str, str]:
        if value[0].strip().lower() == value[1].strip().lower():
            raise ValueError("yes and no are the same reply")
        return value


class ChecklistForm(Form[ChecklistSettings]):
    """Items, and what holds of each candidate."""

    name = "checklist"
    sources = (
        Source(
            "Viswanathan et al. 2025",
            "Checklists Are Better Than Reward Models For Aligning Language Models",
            "2507.18624",
            "with items of the model's own",
        ),
    )
    asks = "a few yes-or-no items by prompt, and then which of them hold of each answer"
    score = "share of the checklist"
    section = "checklist"
    Settings = ChecklistSettings
    labels = {"keep": "share of pairs kept, by the widest gap on an item"}
    unshown = ("judge.votes", "judge.rubric")
    figures = {
        "items": "items a prompt",
        "by_code": "of them checked by code",
        "items_hold": "items that hold",
        "items_unreadable": "items unreadable",
    }

    @classmethod
    def told(cls, judgement: Judgement) -> tuple[str, ...]:
        """Each item with how likely it holds."""
        return tuple(item_line(*item) for item in judgement.items or ())

    @property
    def weighs(self) -> bool:
        """Always: of an item the probability of yes is read."""
        return True

    def scale(self, rubric: Rubric) -> Scale:
        """A share."""
        return 0.0, 1.0

    def preflight(self) -> None:
        """The two questions."""
        _ = self.questions

    @property
    def questions(self) -> tuple[str, str]:
        """The question for items, and the one about an item.

        Raises:
            UserError: One cannot be read, or has no place for the reference answer, or one in vain.
        """
        about_item = load_question("checklist-item", self.own.item_template)
        has_place = about_item.count("{{reference}}")
        if has_place != int(self.own.reference):
            raise UserError(
                "has to hold {{reference}} once"
                if self.own.reference
                else "has a place for a reference answer, and checklist.reference is off",
                where=f"checklist.item_template = {self.own.item_template}",
                way_out="Set checklist.item_template=checklist-item-reference"
                if self.own.reference
                else "Set checklist.reference=true",
            )
        return load_question("checklist", self.own.template), about_item

    def phases(self, sizes: Sizes, *, prompts: int, answers: int, at_once: int) -> Iterator[Phase]:
        """The items of each prompt, and one reading for each item of each candidate."""
        new = sizes.reply(self.own.max_new_tokens)
        room = sizes.room(new)
        yield Draws("checklists", min(at_once, prompts), 1, room, new, prompts, "judge")
        if self.own.reference:
            yield Draws(
                "reference answers", min(at_once, prompts), 1, sizes.prompt, new, prompts, "judge"
            )
        items = self.own.most_items + len(self.own.standing)
        yield Weighs("items (prefill)", at_once * items, sizes.room(1), answers * items)

    def judge(
        self, judge: JudgeAtWork, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """The checklists that are missing, into `checklists` of the run; then each item."""
        lists = self._lists(judge, prompts)
        _, template = self.questions
        written = options(*self.own.options)
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        questions = []
        for row in candidates:
            found = lists[texts[row.prompt_id]]
            shown = {"prompt": texts[row.prompt_id], "response": row.text}
            if self.own.reference:
                shown["reference"] = found.reference or ""
            questions += [
                JudgeQuestion(
                    f"{row.candidate_id}:{number}",
                    fill(template, {**shown, "item": item["item"]}, written),
                    row.candidate_id,
                )
                for number, item in enumerate(found.items)
                if item["by"] == "judge"
            ]
        weighed = judge.weigh(
            questions, self.own.options, about="item weights", setting="checklist.options"
        )
        rows = [judged_by(lists[texts[row.prompt_id]], row, weighed) for row in candidates]
        judge.write("judgements", rows)
        return rows, facts_of([lists[prompt.text] for prompt in prompts], rows)

    def kept(
        self, pairs: Sequence[PreferencePair], judgements: Sequence[Judgement]
    ) -> list[PreferencePair]:
        """See `widest`."""
        return widest(pairs, judgements, share=self.own.keep)

    def _lists(self, judge: JudgeAtWork, prompts: Sequence[Prompt]) -> dict[str, Checklist]:
        """By the prompt's text: of the run's file, and what is missing there is written first."""
        where = f"{judge.where}: checklists"
        there = judge.read("checklists", Checklist, shared=True) or []
        found = {row.prompt: checked_list(row, where=where) for row in there}
        missing = [one for one in prompts if one.text not in found]
        if missing:
            template, _ = self.questions
            replies = judge.ask(
                [
                    JudgeQuestion(one.prompt_id, fill(template, {"prompt": one.text}, ()))
                    for one in missing
                ],
                about="checklist items",
                max_new_tokens=self.own.max_new_tokens,
            )
            for one in missing:
                found[one.text] = self._checklist(one, replies[one.prompt_id])
        bare = [one for one in prompts if self.own.reference and found[one.text].reference is None]
        if bare:
            answers = judge.ask(
                [JudgeQuestion(one.prompt_id, one.text) for one in bare],
                about="reference answers",
                max_new_tokens=self.recipe.rollout.max_new_tokens,
            )
            for one in bare:
                answer = answers[one.prompt_id].text
                found[one.text] = replace(found[one.text], reference=answer)
        if missing or bare:
            judge.write("checklists", list(found.values()), shared=True)
        return found

    def _checklist(self, prompt: Prompt, reply: Reply) -> Checklist:
        own = read_items(reply.text, most=self.own.most_items, apart_from=self.own.standing)
        standing = [(text, self.own.standing_weight) for text in self.own.standing]
        return Checklist(
            prompt.prompt_id,
            prompt.text,
            tuple(
                {"item": text, "weight": weight, "by": self._by(text)}
                for text, weight in (*own, *standing)
            ),
        )

    def _by(self, item: str) -> str:
        return "code" if self.own.code and read_check(item) is not None else "judge"


# --- pure -----------------------------------------------------------------------------------------

_WEIGHED = re.compile(r"(?:[-*•]\s+|[0-9]{1,2}[.)]\s+)?\(?([0-9]{1,3})(?:\)|/100)?\s*[|:]\s*(.+)")
_SIGNED = re.compile(r"(?:[-*•]|[0-9]{1,2}[.)])\s+(.+)")


def read_items(reply: str, *, most: int, apart_from: Sequence[str] = ()) -> list[tuple[str, float]]:
    """The items that a judge's reply lists, each with its weight.

    An item is a line `80 | Does it ...?`, or one with a sign of a list before it; one without a
    weight has the highest. A line that is neither is an item only where it asks or is a check. An
    item with weight 0, one over `LONGEST_ITEM` characters, and one again in the same words, are
    left out.
    """
    found: dict[str, tuple[str, float]] = {}
    seen = {_words(one) for one in apart_from}
    for line in reply.splitlines():
        item = _item(line.strip())
        if item is None or _words(item[0]) in seen or len(item[0]) > LONGEST_ITEM:
            continue
        if item[1] and any(map(str.isalpha, item[0])):
            found.setdefault(_words(item[0]), (item[0], min(item[1], float(MOST_WEIGHT))))
    return list(found.values())[:most]


def _item(line: str) -> tuple[str, float] | None:
    if weighed := _WEIGHED.fullmatch(line):
        return weighed[2].strip(), float(weighed[1])
    if signed := _SIGNED.fullmatch(line):
        return signed[1].strip(), float(MOST_WEIGHT)
    return (line, float(MOST_WEIGHT)) if line.endswith("?") or read_check(line) else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def checked_list(row: Checklist, *, where: str) -> Checklist:
    """A checklist as it stands in the run's file, which people may have edited.

    Raises:
        UserError: An item lacks something, or has it in another form.
    """
    if not row.items:
        raise _wrong(row, "has no items", where)
    for item in row.items:
        if not isinstance(item, Mapping) or not str(item.get("item") or "").strip():
            raise _wrong(row, "an item has no text", where)
        weight = item.get("weight")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and math.isfinite(weight or 0) and (weight or 0) > 0):
            raise _wrong(
                row, f"{item['item']!r} has the weight {weight!r}, no number above 0", where
            )
        if item.get("by") not in ("judge", "code"):
            raise _wrong(row, f"{item['item']!r} is checked by neither judge nor code", where)
        if item["by"] == "code" and read_check(str(item["item"])) is None:
            raise _wrong(row, f"{item['item']!r} is none that code can check", where)
    return row


def _wrong(row: Checklist, what: str, where: str) -> UserError:
    return UserError(f"prompt {row.prompt_id}: {what}", where=where, way_out="Put it right there")


def judged_by(found: Checklist, candidate: Candidate, weighed: Mapping[str, Weighed]) -> Judgement:
    """The judgement of a candidate by its prompt's checklist.

    An item's probability is p(yes) / (p(yes) + p(no)); it is unreadable, and counts for nothing,
    where the judge would hardly say either. Without any readable item there is no verdict.
    """
    items: list[CheckedItem] = []
    total = weights = 0.0
    too_long = False
    for number, item in enumerate(found.items):
        text, p = str(item["item"]), None
        if item["by"] == "code":
            check = read_check(text)
            p = None if check is None else float(check.holds(candidate.text))
        else:
            told = weighed[f"{candidate.candidate_id}:{number}"]
            too_long = too_long or told.p is None
            if told.shares is not None and sum(told.p or ()) >= LEAST_MASS:
                p = round(told.shares[0], 4)
        items.append((text, p, str(item["by"])))
        if p is not None:
            total += float(item["weight"]) * p
            weights += float(item["weight"])
    if not weights or too_long:
        return no_verdict(candidate, too_long=too_long, items=tuple(items))
    return Judgement(candidate.candidate_id, 0, "", round(total / weights, 4), items=tuple(items))


def widest(
    pairs: Sequence[PreferencePair], judgements: Sequence[Judgement], *, share: float
) -> list[PreferencePair]:
    """The share of the pairs with the widest gap on a single item, in their order.

    The gap is the largest distance, over the items, of what holds of the chosen reply and of the
    rejected one; an item that is unreadable of either says nothing. At least one pair is kept, and
    pairs with the same gap as the last one of them are left out or kept by their order. Pairs of
    which no item is known, as where gold makes them, are all kept.

    Source: Viswanathan et al. 2025, arXiv:2507.18624, section 3.
    """
    items = {row.candidate_id: row.items for row in judgements}
    gaps: dict[int, float] = {}
    for number, pair in enumerate(pairs):
        one, other = items.get(pair.chosen_id), items.get(pair.rejected_id)
        both = zip(one or (), other or (), strict=False)
        found = [abs(a[1] - b[1]) for a, b in both if a[1] is not None and b[1] is not None]
        if found:
            gaps[number] = max(found)
    left = math.ceil(len(gaps) * share)
    best = set(sorted(gaps, key=lambda number: -gaps[number])[:left])
    return [pair for number, pair in enumerate(pairs) if number in best or number not in gaps]


def facts_of(lists: Sequence[Checklist], rows: Sequence[Judgement]) -> dict[str, Any]:
    """What `metrics.jsonl` keeps of a judging by checklists."""
    items = [item for found in lists for item in found.items]
    verdicts = [p for row in rows for _, p, _ in row.items or ()]
    known = [p for p in verdicts if p is not None]
    return {
        "items": round(len(items) / max(1, len(lists)), 2),
        "by_code": round(sum(one["by"] == "code" for one in items) / max(1, len(items)), 4),
        "items_hold": round(fmean(known), 4) if known else None,
        "items_unreadable": round(1 - len(known) / max(1, len(verdicts)), 4),
    }


def item_line(item: str, p: float | None, by: str) -> str:
    """An item with how likely it holds, for readers."""
    if p is None:
        return f"unreadable: {item}"
    return f"{'yes' if p else 'no'}, by code: {item}" if by == "code" else f"{p:.2f}: {item}"
