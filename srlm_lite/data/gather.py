"""From rows to prompts with all their replies, whatever the shape and wherever the rows stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from srlm_lite.conversation import Asked, digest_of, messages_of, transcript
from srlm_lite.data.columns import digest, id_of, is_foreign, reused_id
from srlm_lite.data.ledger import Ledger
from srlm_lite.data.order import places_of
from srlm_lite.data.ranked import TARGET_END
from srlm_lite.data.row_store import RowStore, packed, unpacked
from srlm_lite.data.shapes import Found, GivenReply, Order, Said, TableShape, replies_in
from srlm_lite.data.sources import DataSource, Row
from srlm_lite.data.split import PlacedReply, RankedPrompt
from srlm_lite.data.text import is_garbled
from srlm_lite.data.turns import Unusable
from srlm_lite.errors import UserError
from srlm_lite.records import Messages, Prompt

TICK = 500
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
"""What no file of UTF-8 can hold."""

TABLES = (
    "TABLE said (n INTEGER PRIMARY KEY, source INT, prompt TEXT, line INT, asked TEXT, "
    "reply TEXT, text TEXT, body TEXT)",
    "TABLE asked (source INT, prompt TEXT, text TEXT, messages TEXT, answered INT, "
    "PRIMARY KEY (source, prompt, answered)) WITHOUT ROWID",
)
"""Replies as they come, and what they answer."""


@dataclass(frozen=True, slots=True)
class Table:
    """A source whose shape is known.

    Attributes:
        order: How far places of replies compare.
        number: Tells sources apart on the store.
        prefix: Goes before ids that a column gives, where several sources could give the same.
    """

    source: DataSource
    shape: TableShape
    at: Found
    order: Order
    number: int = 0
    prefix: str = ""

    @property
    def prompt_id(self) -> str | None:
        """The column with the prompt's id."""
        return self.at.get("prompt_id", (None,))[0]


def id_of_asked(asked: Asked) -> str:
    """The id of what is asked, from what it says."""
    return digest(asked) if isinstance(asked, str) else digest_of(asked)


def messages_in(asked: Asked) -> Messages | None:
    """What a record has beside the text: nothing for a single user turn."""
    return None if isinstance(asked, str) else tuple(asked)


def read_asked(
    table: Table, *, lang: str | None, ledger: Ledger, tick: Callable[[int], None]
) -> Iterator[Prompt]:
    """The prompt of each row; an empty one where a row has none that can be asked.

    Raises:
        UserError: A row cannot be read.
    """
    label = table.source.label
    for number, row in enumerate(table.source.rows, start=1):
        if number % TICK == 0:
            tick(TICK)
        try:
            if is_foreign(row, lang):
                raise Unusable("other_language")
            asked = table.shape.read(row, table.at).asked
        except Unusable as problem:
            if problem.reason in ("empty", "garbled"):  # as lists are told of
                asked = ""
            else:
                ledger.seen += 1
                ledger.drop(problem.reason)
                continue
        given = id_of(row, table.at.get("prompt_id", (None,))[0])
        prompt_id = f"{table.prefix}{given}" if given else id_of_asked(asked)
        yield Prompt(prompt_id, transcript(asked), label, messages_in(asked))


def put_by(
    table: Table, store: RowStore, *, lang: str | None, replies: Ledger, tick: Callable[[int], None]
) -> None:
    """Read all rows of a table with replies and put them by.

    Args:
        lang: Rows that have a column `lang` must agree with it; None takes every language.
        replies: Is told of every reply.

    Raises:
        UserError: A row cannot be read; an id stands for two different prompts.
    """
    for line, row in enumerate(table.source.rows, start=1):
        if line % TICK == 0:
            tick(TICK)
        try:
            if is_foreign(row, lang):
                raise Unusable("other_language")
            said = table.shape.read(row, table.at)
        except Unusable as problem:
            count = _counted(table, max(1, replies_in(row, table.at)))
            replies.seen += count
            replies.drop(problem.reason, count)
            continue
        replies.seen += _counted(table, len(said.replies))
        if table.order == "first":
            _put_pairs(table, store, said, line, replies)
        else:
            _put_replies(table, store, row, said, line, replies)
    if table.prompt_id is not None:
        _refuse_reused_ids(table, store)


def _counted(table: Table, replies: int) -> int:
    """How many the account has of a row's replies: of pairs there are as many as lesser ones."""
    return 2 * (replies - 1) if table.order == "first" else replies


def _put_pairs(table: Table, store: RowStore, said: Said, line: int, replies: Ledger) -> None:
    problem = next(filter(None, (text_problem(reply.text) for reply in said.replies)), None)
    if problem is not None:
        replies.drop(problem, _counted(table, len(said.replies)))
        return
    key = id_of_asked(said.asked)
    _put_asked(table, store, key, said.asked, answered=True)
    best, *others = said.replies
    for other in others:
        texts = (transcript(said.asked), best.text, other.text)
        body = packed([best.text, other.text, best.quality, other.quality])
        store.put("said", None, table.number, key, line, key, digest(*texts), "", body)


def _put_replies(
    table: Table, store: RowStore, row: Row, said: Said, line: int, replies: Ledger
) -> None:
    given = id_of(row, table.prompt_id)
    asked = id_of_asked(said.asked)
    key = f"{table.prefix}{given}" if given else asked
    answered = False
    for reply in said.replies:
        problem = _problem_of(reply)
        if problem is not None:
            replies.drop(problem)
            continue
        answered = True
        name = digest(reply.text)
        reply_id = f"{table.prefix}{reply.id}" if reply.id else _id_by_text(key, reply.text)
        body = packed([reply.text, reply.place, reply.quality, reply.target, reply.good])
        store.put("said", None, table.number, key, line, asked, reply_id, name, body)
    if not answered and given:  # that an id is one prompt's is asked of all rows
        store.put("said", None, table.number, key, line, asked, None, "", "")
    _put_asked(table, store, key, said.asked, answered=answered)


def _put_asked(table: Table, store: RowStore, key: str, asked: Asked, *, answered: bool) -> None:
    messages = None if isinstance(asked, str) else packed(messages_of(asked))
    text = packed(transcript(asked))
    store.put("asked", table.number, key, text, messages, answered)


def _problem_of(reply: GivenReply) -> str | None:
    """Why a reply is dropped, if it is."""
    problem = text_problem(reply.text)
    if problem is None and reply.place is None:
        problem = "no_score"
    target = reply.target
    if problem is None and target is not None:
        whole = HALF_A_CHARACTER.search(target) is None
        problem = None if whole and TARGET_END.search(target) else "bad_target"
    return problem


def text_problem(text: str) -> str | None:
    """Why a text is of no use, if it is not."""
    if not text.strip():
        return "empty"
    return "garbled" if is_garbled(text) else None


def _id_by_text(prompt_id: str, text: str) -> str:
    return f"{prompt_id}-{digest(text)}"


def _refuse_reused_ids(table: Table, store: RowStore) -> None:
    found = store.one(
        "SELECT s.line, s.prompt FROM said s JOIN (SELECT prompt, asked, MIN(n) FROM said "
        "WHERE source = ?1 GROUP BY prompt) f ON f.prompt = s.prompt "
        "WHERE s.source = ?1 AND s.asked <> f.asked ORDER BY s.n LIMIT 1",
        table.number,
    )
    if found is not None:
        line, prompt = found
        raise reused_id(table.source, line, str(prompt).removeprefix(table.prefix))


# Reading them back by prompt


def index(store: RowStore) -> None:
    """Make ready for reading by prompt, once all is put by."""
    store.make("INDEX said_by_prompt ON said (source, prompt, n)")


def ranked_prompts(table: Table, store: RowStore, replies: Ledger) -> Iterator[RankedPrompt]:
    """The prompts with their replies, each prompt once, in the order of their keys.

    Ids of replies are unique over the source, as whoever reads the data needs them: where a column
    counts them anew for each prompt, the prompt's id goes before them.

    Args:
        replies: Is told of replies that no order joins with the others of their prompt.
    """
    name = _naming(table, store)
    rows = store.run(
        "SELECT s.prompt, s.line, s.reply, s.body, a.text, a.messages FROM said s "
        "JOIN asked a ON a.source = s.source AND a.prompt = s.prompt AND a.answered = 1 "
        "WHERE s.source = ? AND s.body <> '' ORDER BY s.prompt, s.n",
        table.number,
    )
    for key, group in groupby(rows, key=lambda row: str(row[0])):
        said = list(group)
        text, messages = said[0][4:]
        asked: Asked = next(unpacked([messages or text]))
        if table.order == "first":
            found = _of_pairs(key, asked, said, replies)
        else:
            found = _of_replies(table, key, asked, said, name, replies)
        if found is not None:
            yield found


def spare_prompts(table: Table, store: RowStore) -> Iterator[Prompt]:
    """The prompts to which no reply could be placed."""
    rows = store.run(
        "SELECT prompt, text, messages FROM asked a WHERE source = ?1 AND answered = 0 AND NOT "
        "EXISTS (SELECT 1 FROM asked b WHERE b.source = ?1 AND b.prompt = a.prompt AND b.answered)",
        table.number,
    )
    for key, text, messages in rows:
        asked: Asked = next(unpacked([messages or text]))
        yield Prompt(key, transcript(asked), table.source.label, messages_in(asked))


Name = Callable[[str, str, str], str]


def _naming(table: Table, store: RowStore) -> Name:
    """What makes an id of a prompt's, a reply's and a text's, so that each is one reply's alone.

    All ids are made in the same way: as they are, else by prompt, else by text, which a column that
    is no id at all (a model's name) comes to.
    """
    if "id" not in table.at:
        return lambda key, reply, text: reply
    doubles = (
        "SELECT 1 FROM said WHERE source = ? AND body <> '' "
        "GROUP BY {} HAVING COUNT(DISTINCT {}) > 1 LIMIT 1"
    )
    if store.one(doubles.format("reply", "prompt || '-' || text"), table.number) is None:
        return lambda key, reply, text: reply
    if store.one(doubles.format("prompt, reply", "text"), table.number) is None:
        return lambda key, reply, text: f"{key}-{reply}"
    return lambda key, reply, text: _id_by_text(key, text)


def _of_replies(
    table: Table, key: str, asked: Asked, said: Sequence[Any], name: Name, replies: Ledger
) -> RankedPrompt:
    placed: dict[int, list[PlacedReply]] = {}
    good: dict[int, list[bool | None]] = {}
    for _, line, reply, body, *_ in said:
        text, place, quality, target, mark = next(unpacked([body]))
        group = line if table.order == "row" else 0
        one = PlacedReply(name(key, reply, text), text, place, quality, target)
        placed.setdefault(group, []).append(one)
        good.setdefault(group, []).append(mark)
    # Ranks of two rows do not compare; which of them is kept does not hang on which comes first.
    group = next(iter(placed))
    if len(placed) > 1:
        group = min(placed, key=lambda one: (-len(placed[one]), sorted(map(repr, placed[one]))))
    replies.drop("other_order", len(said) - len(placed[group]))
    marks = good[group]
    has_best = marks.count(False) < len(marks)
    return RankedPrompt(key, transcript(asked), tuple(placed[group]), has_best, messages_in(asked))


def _of_pairs(key: str, asked: Asked, said: Sequence[Any], replies: Ledger) -> RankedPrompt | None:
    """The replies of a prompt's pairs, those that one order joins."""
    pairs = {reply: next(unpacked([body])) for _, _, reply, body, *_ in said}
    replies.drop("duplicate", 2 * (len(said) - len(pairs)))
    pairs = dict(sorted(pairs.items()))
    places = places_of((better, worse) for better, worse, *_ in pairs.values())
    messages = messages_in(asked)
    ids: dict[str, str] = {}
    quality: dict[str, float | None] = {}
    lost = 0
    kept = [one for one, (better, worse, *_) in pairs.items() if {better, worse} <= set(places)]
    prompt_id = key if messages or not kept else kept[0]
    for pair_id, (better, worse, better_quality, worse_quality) in pairs.items():
        sides = (("chosen", better, better_quality), ("rejected", worse, worse_quality))
        for side, text, score in sides:
            if text not in places:
                lost += 1
                continue
            made = f"{key}-{digest(text)}" if messages else f"{pair_id}-{side}"
            ids.setdefault(text, made)
            if quality.get(text) is None:
                quality[text] = score
    replies.drop("other_order", lost)
    same = sum(better == worse and better in places for better, worse, *_ in pairs.values())
    replies.drop("duplicate", same)
    # A reply of several pairs is one reply.
    replies.drop("repeated", 2 * len(pairs) - lost - same - len(ids))
    if not places:
        return None
    placed = tuple(
        PlacedReply(ids[text], text, float(place), quality[text]) for text, place in places.items()
    )
    return RankedPrompt(prompt_id, transcript(asked), placed, messages=messages)


def refuse_no_order(table: Table) -> None:
    """That the replies are in an order.

    Raises:
        UserError: None of this shape is.
    """
    if table.order == "none":
        raise UserError(
            "no column orders the replies; there: " + ", ".join(table.source.columns()),
            where=table.source.where,
            way_out="Name it with --score-column or --rank-column",
        )
