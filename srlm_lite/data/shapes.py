"""The shapes of tables: how each is told by its columns, and what one of its rows says.

A shape is a row of `SHAPES`. `find` looks at the columns and returns which of them hold what, or
None where it is another shape; `read` makes of a row what was asked and what was replied. The first
shape that finds its columns is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from srlm_lite.conversation import Asked, Message, with_system
from srlm_lite.data.columns import (
    NAMES,
    NO_SCORES,
    OPTIONS,
    Columns,
    id_of,
    no_such_column,
    number_of,
    text_of,
)
from srlm_lite.data.sources import Column, Row
from srlm_lite.data.turns import (
    Unusable,
    asked_of,
    is_dialogue,
    is_message,
    is_transcript,
    parsed,
    text_in,
    turns_in,
)
from srlm_lite.errors import UserError

Format = Literal["oasst-trees", "ranked", "ift", "prompts"]
Found = Mapping[str, tuple[str, ...]]
"""What is held by which columns: several only where a table has one for each reply."""

Order = Literal["all", "row", "first", "none"]
"""How far places compare: with all replies to the prompt, within the row, only the first reply with
each other one of its row, or not at all."""


@dataclass(frozen=True, slots=True)
class GivenReply:
    """A reply in a row.

    Attributes:
        place: Lower is better; None where it is not to be told.
        good: What people marked it as.
    """

    text: str
    place: float | None = 0.0
    quality: float | None = None
    id: str | None = None
    target: str | None = None
    good: bool | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """What a row says: what was asked, and the replies; none where it only asks."""

    asked: Asked
    replies: tuple[GivenReply, ...] = ()


@dataclass(frozen=True, slots=True)
class SeenColumns:
    """The columns of a table, and what the user says of them."""

    where: str
    columns: Mapping[str, Column]
    given: Columns
    ignored: frozenset[str] = frozenset()

    def named(self, role: str) -> str | None:
        """The column that the user names for a role, if it is here."""
        name = getattr(self.given, role, None)
        return name if name in self.columns else None

    def find(self, role: str, fits: Callable[[Any], bool], *, filled: bool = False) -> str | None:
        """The column of a role: the user's, else one with a common name and fitting cells.

        Args:
            filled: One without any cell that says something does not do.
        """
        if named := self.named(role):
            return named
        lower = {name.lower(): name for name in reversed(list(self.columns))}
        for name in NAMES[role]:
            column = name if name in self.columns else lower.get(name)
            if column is None or column in self.ignored:
                continue
            cells = self.columns[column].cells
            if any(map(fits, cells)) or not (cells or filled):
                return column
        return None


@dataclass(frozen=True, slots=True)
class TableShape:
    """One way in which people lay out such data."""

    name: str
    format: Format
    order: Order
    by: str
    """How it is told, for readers."""
    gives: str
    like: str
    """Published data of this shape."""
    find: Callable[[SeenColumns], Found | None]
    read: Callable[[Row, Found], Said]


# Cells


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str)


def _is_asked(cell: Any) -> bool:
    return isinstance(cell, str) or is_message(cell) or is_dialogue(cell) or _is_document(cell)


def _is_document(cell: Any) -> bool:
    """An object with a text in it, such as WebGPT's question."""
    keys = ("full_text", "text", "post")
    return isinstance(cell, Mapping) and any(isinstance(cell.get(key), str) for key in keys)


def _is_reply(cell: Any) -> bool:
    return _is_asked(cell) or _is_texts(cell)


def _is_texts(cell: Any) -> bool:
    cell = parsed(cell)
    return isinstance(cell, list) and bool(cell) and all(isinstance(one, str) for one in cell)


def _is_number(cell: Any) -> bool:
    return number_of(cell) is not None


def _is_numbers(cell: Any) -> bool:
    return isinstance(cell, list) and any(map(_is_number, cell))


def _is_flag(cell: Any) -> bool:
    return isinstance(cell, bool) or str(cell).lower() in ("true", "false")


def _is_list_of_replies(cell: Any) -> bool:
    cell = parsed(cell)
    if _is_texts(cell):
        return True
    return (
        isinstance(cell, list)
        and bool(cell)
        and not is_dialogue(cell)
        and all(isinstance(one, Mapping) and _key(one, REPLY_KEYS) for one in cell)
    )


def _is_dialogue_here(cell: Any) -> bool:
    return is_dialogue(parsed(cell))


REPLY_KEYS = (
    "response",
    "answer",
    "text",
    "content",
    "completion",
    "output",
    "reply",
    "generation",
)
SCORE_KEYS = ("overall_score", "score", "rating", "reward", "quality", "fine-grained_score")
RANK_KEYS = ("rank", "ranking")


def _key(entry: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if entry.get(name) is not None), None)


# Finding columns

COMMON: dict[str, Callable[[Any], bool]] = {
    "system": lambda cell: isinstance(cell, str | list | Mapping),
    "input": _is_text,
    "past": lambda cell: isinstance(cell, list) and not is_dialogue(cell),
    "prompt_id": lambda cell: isinstance(cell, str | int),
}
"""What every shape takes where it is there."""


def needing(
    needs: Mapping[str, Callable[[Any], bool]],
    *takes: str,
) -> Callable[[SeenColumns], dict[str, tuple[str, ...]] | None]:
    """Finds a shape by the columns that it cannot do without."""

    def find(seen: SeenColumns) -> dict[str, tuple[str, ...]] | None:
        found: dict[str, tuple[str, ...]] = {}
        for role, fits in needs.items():
            column = seen.find(role, fits)
            if column is None or (column,) in found.values():
                return None
            found[role] = (column,)
        return _with_common(seen, found, takes)

    return find


TAKEN: dict[str, Callable[[Any], bool]] = {
    "prompt": _is_asked,
    "id": lambda cell: isinstance(cell, str | int),
    "target": _is_text,
}


def _with_common(
    seen: SeenColumns, found: dict[str, tuple[str, ...]], takes: Iterable[str] = ()
) -> dict[str, tuple[str, ...]]:
    for role in (*takes, *COMMON):
        fits = TAKEN.get(role) or COMMON[role]
        column = seen.find(role, fits, filled=True)
        if role not in found and column is not None and (column,) not in found.values():
            found[role] = (column,)
    return found


def _find_ordered(seen: SeenColumns) -> Found | None:
    """One reply a row, with a rank or score."""
    base = needing({"prompt": _is_asked, "response": _is_asked}, "id", "target")(seen)
    return _with_order(seen, base)


def _find_graded_dialogue(seen: SeenColumns) -> Found | None:
    return _with_order(seen, needing({"dialogue": _is_dialogue_here}, "id", "target")(seen))


def _with_order(seen: SeenColumns, base: dict[str, tuple[str, ...]] | None) -> Found | None:
    """An order that is given is the only one: with `score` given, `rank` is not looked for."""
    if base is None:
        return None
    rank = seen.find("rank", _is_number) if seen.named("score") is None else seen.named("rank")
    score = seen.find("score", _is_number)
    if rank is None and score is None:
        return None
    base |= {"rank": (rank,)} if rank else {}
    return base | ({"score": (score,)} if score else {})


def _find_pairs(seen: SeenColumns) -> Found | None:
    found = needing({"chosen": _is_reply, "rejected": _is_reply}, "prompt")(seen)
    if found is None:
        return None
    cells = seen.columns[found["chosen"][0]].cells
    if any(map(_is_whole, cells)):
        found.pop("input", None)
        found.pop("past", None)
    elif cells and "prompt" not in found:
        return None
    return found | _pair_scores(seen)


def _is_whole(cell: Any) -> bool:
    """Whether a reply's cell has the prompt too."""
    cell = parsed(cell)
    turns = (
        next((one for one in cell.values() if isinstance(one, list)), [])
        if (isinstance(cell, Mapping))
        else cell
    )
    return is_transcript(cell) or (is_dialogue(cell) and len(turns) > 1)


def _pair_scores(seen: SeenColumns) -> dict[str, tuple[str, ...]]:
    """The scores of both sides, where the user names either."""
    if (score := seen.named("score")) is None:
        return {}
    for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if one in score and (score2 := score.replace(one, other)) in seen.columns:
            return {"score": (score, score2) if one == "chosen" else (score2, score)}
    return {}


def _find_against(seen: SeenColumns) -> Found | None:
    """A dialogue that ends in the chosen reply, and the rejected one."""
    return needing({"dialogue": _is_dialogue_here, "rejected": _is_text})(seen)


SIDE = re.compile(r"(.*?)[_ -]?(\d|[a-hA-H])")
SIDE_STEMS = frozenset(
    {*NAMES["response"], "human_ref", "conversation", "summary", "generation", "candidate"}
)
SIGNED = ("overall_preference", "preference_strength")
"""Columns in which a negative number prefers the first of two, as HelpSteer's do."""


def _sides(seen: SeenColumns) -> tuple[str, ...]:
    """Columns that hold one reply each: `response_0`, `response_1`, perhaps more."""
    by_stem: dict[str, list[str]] = {}
    for name, column in seen.columns.items():
        match = SIDE.fullmatch(name)
        stem = match[1].lower() if match else ""
        if stem in SIDE_STEMS and name not in seen.ignored and any(map(_is_reply, column.cells)):
            by_stem.setdefault(stem, []).append(name)
    found = max(by_stem.values(), key=len, default=[])
    return tuple(sorted(found)) if len(found) > 1 else ()


def _suffix(name: str) -> str:
    match = SIDE.fullmatch(name)
    return match[2].lower() if match else ""


def _find_sides(seen: SeenColumns) -> Found | None:
    sides = _sides(seen)
    if not sides:
        return None
    found: dict[str, tuple[str, ...]] = {"sides": sides}
    for role in ("scores", "ranks"):
        for name in (role.removesuffix("s"), *NAMES[role.removesuffix("s")]):
            each = tuple(_of_side(seen, name, side) or "" for side in sides)
            if all(each):
                found.setdefault(role, each)
    named = seen.named("better") or seen.find("better", lambda cell: True, filled=True)
    one_hot = tuple(
        _of_side(seen, "winner_model", side) or _of_side(seen, "winner", side) or ""
        for side in sides
    )
    if seen.named("score") is None and len(sides) == 2 and (named or all(one_hot)):
        found = {"sides": sides, "better": (named,) if named else one_hot}
        if named is not None:
            _refuse_unclear_choice(seen, named, sides)
    if len(found) == 1:
        return None
    prompt = seen.find("prompt", _is_asked, filled=True)
    if prompt is not None and prompt not in sides:
        found["prompt"] = (prompt,)
    elif not any(is_dialogue(cell) for cell in seen.columns[sides[0]].cells):
        return None
    return _with_common(seen, found)


def _of_side(seen: SeenColumns, name: str, side: str) -> str | None:
    """The column of that name for one side, such as `score_0` for `response_0`."""
    lower = {column.lower(): column for column in seen.columns}
    suffix = _suffix(side)
    tries = (f"{name}_{suffix}", f"{name}{suffix}", f"{side}_{name}", f"{name}_{side}")
    return next((lower[one.lower()] for one in tries if one.lower() in lower), None)


def _refuse_unclear_choice(seen: SeenColumns, column: str, sides: tuple[str, ...]) -> None:
    for cell in seen.columns[column].cells:
        try:
            _choice(cell, column, sides)
        except Unusable:
            raise UserError(
                f"column {column!r} does not say clearly which of {' and '.join(sides)} is the "
                f"better one: {cell!r}",
                where=seen.where,
                way_out="Write the column's name or its last letter there, or name another column "
                "with --better-column",
            ) from None


def _choice(cell: Any, column: str, sides: Sequence[str]) -> int | None:
    """Which of two replies is the better one; None for a tie.

    Raises:
        Unusable: It does not say so in a way that is known.
    """
    number = number_of(cell) if not isinstance(cell, str) or cell.strip() else None
    if column.lower() in SIGNED:
        if number is None:
            raise Unusable("no_score")
        return None if number == 0 else int(number > 0)
    if sides[0].lower().startswith("human_ref") and number in (0, 1):
        return 1 - int(number)  # Stanford Human Preferences: 1 prefers A
    if number is not None and [_suffix(side) for side in sides] == ["1", "2"] and 1 <= number <= 2:
        return None if number == 1.5 else int(number > 1.5)  # AlpacaEval's are weighted
    if number is not None and number == int(number):
        said = str(int(number))
    elif isinstance(cell, str):
        said = cell.strip().lower()
    else:
        raise Unusable("no_score")
    if over := re.fullmatch(r"(\w+) *(>+|<+) *\w+", said):
        first = _choice(over[1], column, sides)
        return first if first is None or ">" in over[2] else 1 - first
    for place, side in enumerate(sides):
        if said == side.lower() or re.fullmatch(rf"(?:.*[_\W])?{_suffix(side)}", said):
            return place
    if re.match(r"\w+ *(=|~) *\w+$|tie|both|neither|equal|same|draw|no[ _]preference", said):
        return None
    raise Unusable("no_score")


def _find_list(seen: SeenColumns) -> Found | None:
    """A list of replies, with scores or ranks beside it or within."""
    replies = seen.named("response")
    cells = seen.columns[replies].cells if replies else []
    if not any(map(_is_list_of_replies, cells)):
        replies = seen.find("replies", _is_list_of_replies, filled=True)
    prompt = seen.find("prompt", _is_asked, filled=True)
    if replies is None or prompt in (None, replies):
        return None
    found: dict[str, tuple[str, ...]] = {"prompt": (str(prompt),), "replies": (replies,)}
    entries = [parsed(cell)[0] for cell in seen.columns[replies].cells if _is_list_of_replies(cell)]
    within = [entry for entry in entries if isinstance(entry, Mapping)]
    given = seen.given.score
    if within and given is not None and any(given in entry for entry in within):
        return _with_common(seen, found | {"score within": (given,)})
    score = seen.named("score") or seen.find("scores", _is_numbers, filled=True)
    rank = seen.named("rank") or seen.find("ranks", _is_numbers, filled=True)
    best = seen.named("better") or seen.find("better", _is_number, filled=True)
    if rank is not None and seen.named("score") is None:
        found["ranks"] = (rank,)
    if score is not None and score != rank:
        found["scores"] = (score,)
    elif entry := next(iter(within), None):
        graded = (
            {"annotations": "annotations"} if isinstance(entry.get("annotations"), Mapping) else {}
        )
        keys = {"rank within": RANK_KEYS, "score within": (*SCORE_KEYS, *graded)}
        for role, names in keys.items():
            if key := next((name for name in names if any(name in one for one in within)), None):
                found.setdefault(role, (key,))
    if best is not None and len(found) == 2:
        found["best"] = (best,)
    return _with_common(seen, found) if len(found) > 2 else None


def _find_good(seen: SeenColumns) -> Found | None:
    """Replies that people marked as good or not."""
    base = needing({"prompt": _is_asked, "response": _is_asked})(seen)
    base = base or needing({"dialogue": _is_dialogue_here})(seen)
    good = seen.named("better") or seen.find("good", _is_flag, filled=True)
    if base is None or good is None or seen.named("score") or seen.named("rank"):
        return None
    return {**base, "good": (good,)}


def _find_tree(seen: SeenColumns) -> Found | None:
    cells = seen.columns["prompt"].cells if "prompt" in seen.columns else []
    nested = bool(cells) and isinstance(cells[0], Mapping) and "replies" in cells[0]
    flat = {"message_id", "parent_id", "text", "role"}
    return {} if nested or flat <= set(seen.columns) else None


# Reading rows


def _cell(row: Row, at: Found, role: str) -> Any:
    return row.get(at[role][0]) if role in at else None


def _before(row: Row, at: Found) -> list[Message]:
    """The turns that the columns prompt, history and input make."""
    turns = turns_in(_cell(row, at, "prompt"), role="user")
    past: list[Message] = []
    for exchange in _cell(row, at, "past") or ():
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise Unusable("not_text")
        past += [*turns_in(exchange[0], role="user"), *turns_in(exchange[1], role="assistant")]
    more = _cell(row, at, "input")
    if more is not None and not isinstance(more, str):
        raise Unusable("not_text")
    if more and more.strip() and turns:
        last = turns[-1]
        below = f"{last['content']}\n\n{more.strip()}".strip()
        turns[-1] = {"role": last["role"], "content": below}
    return [*past, *turns]


def _under_system(row: Row, at: Found, turns: Sequence[Message]) -> Asked:
    """What is asked, with the system message of its own column."""
    system = text_in(_cell(row, at, "system"))
    own = [one["content"] for one in turns if one["role"] == "system" and one["content"]]
    if system and own and own != [system]:
        raise Unusable("two_systems")
    turns = [one for one in turns if one["role"] != "system" or one["content"]]
    return asked_of(list(_messages(with_system(turns, system) if turns and system else turns)))


def _messages(asked: Asked) -> Sequence[Message]:
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked


def _asked(row: Row, at: Found) -> Asked:
    return _under_system(row, at, _before(row, at))


def _exchange(row: Row, at: Found, cell: Any) -> tuple[Asked, str]:
    """What was asked, and the reply in a cell, which may repeat all that went before it."""
    said = turns_in(cell, role="assistant")
    turns = said if len(said) > 1 else [*_before(row, at), *said]
    if not said:
        return _under_system(row, at, turns), ""
    if turns[-1]["role"] != "assistant":
        raise Unusable("unanswerable")
    return _under_system(row, at, turns[:-1]), turns[-1]["content"]


def _read_pair(row: Row, at: Found) -> Said:
    chosen, rejected = _cell(row, at, "chosen"), _cell(row, at, "rejected")
    several = parsed(rejected) if _is_texts(rejected) else [rejected]
    if _is_texts(chosen) and len(parsed(chosen)) == 1:
        chosen = parsed(chosen)[0]
    sides = [_exchange(row, at, cell) for cell in (chosen, *several)]
    if any(asked != sides[0][0] for asked, _ in sides):
        raise Unusable("other_prompt")
    scores = [number_of(row.get(name)) for name in at.get("score", ())]
    quality = scores if len(sides) == 2 and scores else [None] * len(sides)
    return Said(
        sides[0][0],
        tuple(
            GivenReply(text, float(place > 0), score)
            for place, ((_, text), score) in enumerate(zip(sides, quality, strict=True))
        ),
    )


def _read_one(row: Row, at: Found) -> Said:
    """One reply, with its place by rank, by score, or by none."""
    asked, text = _exchange(row, at, _cell(row, at, "response"))
    return Said(asked, (_graded(row, at, text),))


MARKS = {"true": True, "1": True, "1.0": True, "yes": True, "good": True} | {
    "false": False,
    "0": False,
    "0.0": False,
    "no": False,
    "bad": False,
}
"""What may stand in a column that says whether a reply is good."""


def _graded(row: Row, at: Found, text: str) -> GivenReply:
    quality = number_of(_cell(row, at, "score")) if "score" in at else None
    place: float | None = 0.0
    if "rank" in at:
        place = number_of(_cell(row, at, "rank"))
    elif "score" in at:
        place = None if quality is None else -quality
    good = None
    if "good" in at:
        good = MARKS.get(str(_cell(row, at, "good")).strip().lower())
        quality = None if good is None else float(good)
        place = None if quality is None else -quality
    ids = {role: at.get(role, (None,))[0] for role in ("id", "target")}
    return GivenReply(
        text, place, quality, id_of(row, ids["id"]), text_of(row, ids["target"]) or None, good
    )


def _read_dialogue(row: Row, at: Found) -> Said:
    """A dialogue: its last reply answers all that went before; without one it only asks."""
    turns = turns_in(_cell(row, at, "dialogue"), role="user")
    reply = turns[-1] if turns and turns[-1]["role"] == "assistant" else None
    asked = _under_system(row, at, turns[:-1] if reply else turns)
    return Said(asked, (_graded(row, at, reply["content"]),) if reply else ())


def _read_against(row: Row, at: Found) -> Said:
    said = _read_dialogue(row, {key: names for key, names in at.items() if key != "rejected"})
    if not said.replies:
        raise Unusable("unanswerable")
    other = text_of(row, at["rejected"][0])
    return Said(said.asked, (GivenReply(said.replies[0].text), GivenReply(other, 1.0)))


def _read_transcript(row: Row, at: Found) -> Said:
    return _read_dialogue(row, {**at, "dialogue": at["transcript"]})


def _turn_by_turn(row: Row, at: Found) -> list[tuple[Asked, str]] | None:
    """Exchanges whose prompts are a list, beside lists of the replies to each."""
    prompts = parsed(_cell(row, at, "prompt"))
    if not isinstance(prompts, list) or not _is_texts(prompts):
        return None
    exchanges = []
    for side in at["sides"]:
        replies = parsed(row.get(side))
        if not _is_texts(replies) or len(replies) != len(prompts):
            raise Unusable("unanswerable")
        turns = [turn for pair in zip(prompts, replies, strict=True) for turn in _turns_of(pair)]
        exchanges.append((_under_system(row, at, turns[:-1]), turns[-1]["content"]))
    return exchanges


def _turns_of(pair: tuple[str, str]) -> list[Message]:
    names = ("user", "assistant")
    return [{"role": name, "content": text.strip()} for name, text in zip(names, pair, strict=True)]


def _read_sides(row: Row, at: Found) -> Said:
    exchanges = _turn_by_turn(row, at) or [
        _exchange(row, at, row.get(side)) for side in at["sides"]
    ]
    if any(asked != exchanges[0][0] for asked, _ in exchanges):
        raise Unusable("other_prompt")
    texts = [text for _, text in exchanges]
    if "better" in at:
        return Said(exchanges[0][0], _best_first(texts, _better(row, at)))
    scores = [number_of(row.get(name)) for name in at["scores"]] if "scores" in at else []
    ranks = [number_of(row.get(name)) for name in at["ranks"]] if "ranks" in at else []
    return Said(
        exchanges[0][0],
        tuple(
            GivenReply(text, *_place(_at(ranks, number), _at(scores, number), bool(ranks)))
            for number, text in enumerate(texts)
        ),
    )


def _at(numbers: Sequence[float | None], number: int) -> float | None:
    return numbers[number] if number < len(numbers) else None


def _place(
    rank: float | None, score: float | None, by_rank: bool
) -> tuple[float | None, float | None]:
    """Place and quality of a reply with a rank or a score."""
    return rank if by_rank else None if score is None else -score, score


def _best_first(texts: Sequence[str], best: int | None) -> tuple[GivenReply, ...]:
    if best is None or not 0 <= best < len(texts):
        raise Unusable("tied")
    others = (text for place, text in enumerate(texts) if place != best)
    return (GivenReply(texts[best]), *(GivenReply(text, 1.0) for text in others))


def _better(row: Row, at: Found) -> int | None:
    if len(at["better"]) == 1:
        return _choice(_cell(row, at, "better"), at["better"][0], at["sides"])
    won = [place for place, name in enumerate(at["better"]) if number_of(row.get(name)) == 1]
    return won[0] if len(won) == 1 else None


def _read_list(row: Row, at: Found) -> Said:
    asked = _asked(row, at)
    entries = parsed(_cell(row, at, "replies"))
    if not isinstance(entries, list):
        raise Unusable("not_text")
    replies = []
    by_rank = bool({"ranks", "rank within"} & set(at))
    for number, entry in enumerate(entries):
        within = entry if isinstance(entry, Mapping) else {}
        text = within.get(_key(within, REPLY_KEYS) or "") if within else entry
        if not isinstance(text, str):
            raise Unusable("not_text")
        score = _nth(row, at, "scores", number)
        if "score within" in at:
            score = _within(within, at["score within"][0])
        rank = _nth(row, at, "ranks", number)
        if "rank within" in at:
            rank = number_of(within.get(at["rank within"][0]))
        replies.append(GivenReply(text.strip(), *_place(rank, score, by_rank)))
    if "best" in at:
        best = number_of(_cell(row, at, "best"))
        texts = [reply.text for reply in replies]
        return Said(asked, _best_first(texts, None if best is None else int(best)))
    return Said(asked, tuple(replies))


def _nth(row: Row, at: Found, role: str, number: int) -> float | None:
    cells = parsed(_cell(row, at, role))
    return number_of(cells[number]) if isinstance(cells, list) and number < len(cells) else None


def _within(entry: Mapping[str, Any], key: str) -> float | None:
    """A score within a reply's object: a number, or the mean of ratings by aspect."""
    value = entry.get(key)
    if not isinstance(value, Mapping):
        return number_of(value)
    ratings = [number_of(one.get("Rating")) for one in value.values() if isinstance(one, Mapping)]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def _read_prompt(row: Row, at: Found) -> Said:
    return Said(_asked(row, at))


def _read_tree(row: Row, at: Found) -> Said:
    raise NotImplementedError("trees are read as a whole: see oasst.py")


SHAPES = (
    TableShape(
        "trees",
        "oasst-trees",
        "all",
        "`prompt` with `replies` within, or messages of `message_id`, `parent_id`, `text`, `role`",
        "ranked first replies; prompts of unfinished trees",
        "OASST1, OASST2",
        _find_tree,
        _read_tree,
    ),
    TableShape(
        "pairs",
        "ranked",
        "first",
        "chosen, rejected (a text, messages, a transcript, or several rejected); perhaps prompt",
        "a reply and those it was preferred to",
        "HH-RLHF, UltraFeedback binarized, Orca DPO, Tulu 3 preferences, Stack Exchange paired, "
        "OpenAI's preference format",
        _find_pairs,
        _read_pair,
    ),
    TableShape(
        "dialogues against",
        "ranked",
        "first",
        "a dialogue that ends in the chosen reply, and rejected",
        "the same",
        "ms-swift's preference format",
        _find_against,
        _read_against,
    ),
    TableShape(
        "sides",
        "ranked",
        "row",
        "replies in columns of their own (`response_0`, `response_1`; `answer_a`, `answer_b`), "
        "with better, or with a score or rank for each",
        "two or more replies in an order",
        "PKU-SafeRLHF, SHP, Chatbot Arena, WebGPT comparisons, HelpSteer3",
        _find_sides,
        _read_sides,
    ),
    TableShape(
        "list",
        "ranked",
        "row",
        "prompt, replies (texts or objects), with scores or ranks beside them or within",
        "replies in the order of their scores",
        "UltraFeedback, Nectar, summaries with a `choice`",
        _find_list,
        _read_list,
    ),
    TableShape(
        "marked",
        "ranked",
        "all",
        "prompt and response, or a dialogue; with good, true or false",
        "good replies before others; a prompt without a good one teaches nothing",
        "KTO data",
        _find_good,
        lambda row, at: (_read_dialogue if "dialogue" in at else _read_one)(row, at),
    ),
    TableShape(
        "graded",
        "ranked",
        "all",
        "prompt, response, and a score or rank",
        "all replies of a prompt in one order",
        "HelpSteer (say which score), Open Assistant replies with quality",
        _find_ordered,
        _read_one,
    ),
    TableShape(
        "graded dialogues",
        "ranked",
        "all",
        "a dialogue, and a score or rank",
        "the last replies to the same turns in one order",
        "rated chats",
        _find_graded_dialogue,
        _read_dialogue,
    ),
    TableShape(
        "dialogues",
        "ift",
        "none",
        "a dialogue: messages of role and content or from and value, an object of lists, exchanges "
        "of input and output",
        "its last reply, to all that went before; a prompt where it ends with the user",
        "UltraChat, Tulu 3 SFT, ShareGPT, Capybara, OpenAI's, Anthropic's and Gemini's chats",
        needing({"dialogue": _is_dialogue_here}),
        _read_dialogue,
    ),
    TableShape(
        "instructions",
        "ift",
        "none",
        "prompt and response, perhaps input",
        "the response as an answer to learn from",
        "Alpaca, Dolly, GSM8K",
        needing({"prompt": _is_asked, "response": _is_asked}, "id", "target"),
        _read_one,
    ),
    TableShape(
        "transcripts",
        "ift",
        "none",
        "a text of `Human:` and `Assistant:` in turns, also behind ###",
        "as a dialogue",
        "OpenAssistant-Guanaco",
        needing({"transcript": is_transcript}),
        _read_transcript,
    ),
    TableShape(
        "prompts",
        "prompts",
        "none",
        "prompt alone, or a line of text each",
        "prompts",
        "lists of questions",
        needing({"prompt": _is_asked}),
        _read_prompt,
    ),
)
"""In the order in which they are tried."""


def shape_of(seen: SeenColumns, formats: Iterable[str]) -> tuple[TableShape, Found] | None:
    """The first shape of these formats that finds its columns."""
    for shape in SHAPES:
        if shape.format in formats and (found := shape.find(seen)) is not None:
            if order_of(shape, found) == "first":  # what a pair says names it
                found = {role: names for role, names in found.items() if role != "prompt_id"}
            return shape, found
    return None


def has_replies(seen: SeenColumns) -> bool:
    """Whether a column has a name and cells as replies have."""
    return any(_may_be_reply(name, column, alone=False) for name, column in seen.columns.items())


def order_of(shape: TableShape, at: Found) -> Order:
    """How far places of replies compare, with the columns that were found."""
    if {"better", "best"} & set(at):
        return "first"
    return "all" if {"scores", "score within"} & set(at) and not _RANKS & set(at) else shape.order


_RANKS = {"ranks", "rank within"}


def replies_in(row: Row, at: Found) -> int:
    """How many replies a row has, for the account of one that cannot be read."""
    if "rejected" in at:
        rejected = _cell(row, at, "rejected")
        return 1 + (len(parsed(rejected)) if _is_texts(rejected) else 1)
    if "sides" in at:
        return len(at["sides"])
    if "replies" in at:
        entries = parsed(_cell(row, at, "replies"))
        return len(entries) if isinstance(entries, list) else 0
    return int(bool({"response", "dialogue", "transcript"} & set(at)))


# What would be lost

_LOST_ROLES = ("system", "input", "past")


def check_given(seen: SeenColumns, *, elsewhere: Iterable[str] = ()) -> None:
    """That the columns that the user names are there, in this table or in another one.

    Raises:
        UserError: One is not.
    """
    there = set(seen.columns) | set(elsewhere)
    for field in fields(Columns):
        name = getattr(seen.given, field.name)
        if name is not None and name not in there:
            raise no_such_column(name, seen.columns, where=seen.where, option=OPTIONS[field.name])


def unused(seen: SeenColumns, at: Found) -> list[str]:
    """The columns that say something and are not read, `lang` apart, which is looked at."""
    used = {name for names in at.values() for name in names} | {"lang"}
    return [name for name, column in seen.columns.items() if name not in used and column.filled]


def unused_within(seen: SeenColumns, at: Found) -> list[str]:
    """The keys of replies' objects that are not read, such as a second score."""
    if "replies" not in at:
        return []
    [replies] = at["replies"]
    cells = (parsed(cell) for cell in seen.columns[replies].cells)
    entries = [one for cell in cells if isinstance(cell, list) for one in cell[:1]]
    keys = dict.fromkeys(key for one in entries if isinstance(one, Mapping) for key in one)
    used = {name for names in at.values() for name in names} | set(REPLY_KEYS)
    return [f"{replies}.{key}" for key in keys if key not in used]


def refuse_losses(
    seen: SeenColumns, shape: TableShape, at: Found, *, only_asks: bool = False
) -> None:
    """That no reply, only score, input or system message stands in a column that is not read.

    Args:
        only_asks: The user wants the prompts alone.

    Raises:
        UserError: One does; names the options that decide.
    """
    left = [name for name in unused(seen, at) if name not in seen.ignored]
    for role in _LOST_ROLES:
        for name in left:
            known = {name.lower() for name in NAMES[role]}
            if name.lower() in known and not _repeats(seen, at, name):
                raise _loss(seen, name, f"holds what may be {_WHAT[role]}", OPTIONS.get(role))
    if only_asks:
        return
    for name in left:
        found = _may_be_reply(name, seen.columns[name], alone=shape.format == "prompts")
        if found and not _repeats(seen, at, name):
            raise _reply_loss(seen, at, name)
    if shape.order == "none":
        marks = [name for name in left if _may_be_mark(name, seen.columns[name])]
        if marks and shape.format == "ift":
            raise UserError(
                f"replies beside marks in {', '.join(marks)}, which may say that one is bad",
                where=seen.where,
                way_out=f"Say --better-column {marks[0]}, or leave it out with {_ignoring(marks)}",
            )
        numbers = [name for name in left if _may_be_score(name, seen.columns[name])]
        if numbers and shape.format == "ift":
            names = ", ".join(numbers)
            raise UserError(
                f"replies without a score or rank, beside numbers in {names}",
                where=seen.where,
                way_out=f"Say which orders them with --score-column {numbers[0]} or --rank-column, "
                f"or that none does with {_ignoring(numbers)}",
            )


_WHAT = {"system": "a system message", "input": "a part of the prompt", "past": "earlier turns"}


def _loss(seen: SeenColumns, name: str, what: str, option: str | None) -> UserError:
    say = f"Say {option} {name}, or leave it out with " if option else "Leave it out with "
    return UserError(
        f"column {name!r} {what}, and would be lost",
        where=seen.where,
        way_out=f"{say}{_ignoring([name])}",
    )


def _reply_loss(seen: SeenColumns, at: Found, name: str) -> UserError:
    cells = seen.columns[name].cells
    option: str | None
    if any(map(_is_list_of_replies, cells)):
        what, option = (
            "holds lists of replies that nothing orders",
            "--score-column or --rank-column",
        )
    elif len(_sides(seen)) > 1 and "sides" not in at:
        what, option = "holds one of several replies that nothing orders", "--better-column"
    else:
        what = "holds replies"
        taken = {"response", "chosen", "sides", "replies", "dialogue"} & set(at)
        option = None if taken else f"--response-column {name}"
    say = f"Say {option}, or leave it out with " if option else "Leave it out with "
    return UserError(
        f"column {name!r} {what}, and would be lost",
        where=seen.where,
        way_out=f"{say}{_ignoring([name])}",
    )


def _ignoring(names: Iterable[str]) -> str:
    return " ".join(f"--ignore-column {name}" for name in names)


def _may_be_reply(name: str, column: Column, *, alone: bool) -> bool:
    """Whether a column may hold replies; beside others that are read, by a usual name only."""
    stem = SIDE.fullmatch(name)
    names = {name.lower(), stem[1].lower() if stem else ""}
    if alone:
        *_, last = re.split(r"[_ -]|(?<=[a-z])(?=[A-Z])", name)  # model_answer, allResponses
        names.add(last.lower())
    known = {*NAMES["response"], *NAMES["replies"], *NAMES["chosen"], *NAMES["rejected"]}
    return bool(names & (known | SIDE_STEMS)) and any(
        _is_list_of_replies(cell) or (_is_reply(cell) and not _is_number(cell))
        for cell in column.cells
    )


def _may_be_score(name: str, column: Column) -> bool:
    low = name.lower()
    if any(low in NAMES[role] for role in ("score", "scores", "rank", "ranks")):
        return True
    if low in NO_SCORES or re.search(r"(?:^|_)(?:id|ids|idx|index|count|len|length|tokens)$", low):
        return False
    return all(
        (_is_number(cell) or _is_numbers(cell)) and not isinstance(cell, bool)
        for cell in column.cells
    )


_MARK = re.compile(
    r"safe|correct|good|bad|label|accept|valid|helpful|desirable|pass|toxic|harm|reject|prefer"
)


def _may_be_mark(name: str, column: Column) -> bool:
    return bool(_MARK.search(name.lower())) and all(map(_is_flag, column.cells))


def _repeats(seen: SeenColumns, at: Found, name: str) -> bool:
    """Whether a column says again what is read, as far as it was looked at."""
    known = {
        text
        for names in at.values()
        for one in names
        if one in seen.columns
        for cell in seen.columns[one].cells
        for text in _texts(cell)
    }
    return all(text in known for cell in seen.columns[name].cells[:50] for text in _texts(cell))


def _texts(cell: Any) -> Iterator[str]:
    """All texts in a cell, those of turns one by one."""
    if isinstance(cell, str):
        yield cell.strip()
        if is_transcript(cell):
            yield from (one["content"] for one in turns_in(cell, role="user"))
    elif isinstance(cell, Mapping):
        for key, value in cell.items():
            if key not in ("role", "from", "type"):
                yield from _texts(value)
    elif isinstance(cell, list):
        for one in cell:
            yield from _texts(one)


def table() -> str:
    """The shapes, as Markdown."""
    rows = [("shape", "told by", "gives", "as in"), ("---",) * 4]
    rows += [(one.name, one.by, one.gives, one.like) for one in SHAPES]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def names_table() -> str:
    """The common names of columns, as Markdown."""
    rows = [("what it holds", "names that are found", "option"), ("---",) * 3]
    for role, names in NAMES.items():
        option = OPTIONS.get(role, "")
        listed = ", ".join(f"`{name}`" for name in names)
        rows.append((role.replace("_", " "), listed, f"`{option}`" if option else ""))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
