"""Preference files as tests of a judge: prompts with replies of which it is known which are better.

The sets that judges are measured by have layouts of their own, a row of `FORMATS` each; any other
file is read by the shapes that `srlm-lite data prepare` knows. Nothing is filtered by quality or
language: a judge is asked about all of it, and what cannot be read is counted by its reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

from srlm_lite.conversation import Asked, transcript
from srlm_lite.data.columns import Columns, digest, id_of, number_of
from srlm_lite.data.gather import text_problem
from srlm_lite.data.ledger import Ledger
from srlm_lite.data.oasst import read_trees
from srlm_lite.data.shapes import Found, GivenReply, SeenColumns, TableShape, order_of, shape_of
from srlm_lite.data.sources import Column, DataSource, Row, read_source
from srlm_lite.data.turns import Unusable, asked_of, parsed, turns_in
from srlm_lite.errors import UserError

TestKind = Literal["pairs", "best", "ties", "styles"]
"""What is made of a prompt's pairs beside the share that is right: nothing, whether a best reply
comes out on top, whether all right ones do, or how styles of right and wrong replies meet."""


@dataclass(frozen=True, slots=True)
class JudgeTest:
    """A prompt with replies, and which of them are known to be better than which.

    Attributes:
        name: Unique in its file.
        prompt: What a judge is shown; of a conversation its transcript.
        pairs: (better, worse), as places in `replies`.
        styles: Of each reply, where the file has it; 0 is the plainest.
        subset: The domain that the file puts it in; empty where it has none.
    """

    name: str
    prompt: str
    replies: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    kind: TestKind = "pairs"
    styles: tuple[int, ...] = ()
    subset: str = ""


@dataclass(frozen=True, slots=True)
class JudgeTests:
    """The tests of a file, in its order.

    Attributes:
        format: The name of its layout.
        dropped: Rows that give no test, by the reason; where a prompt's replies stand in rows of
            their own, prompts.
    """

    format: str
    tests: tuple[JudgeTest, ...]
    dropped: Mapping[str, int]

    def at_most(self, count: int | None) -> tuple[JudgeTest, ...]:
        """So many of them, spread evenly over the file, so that no subset at its end is lost."""
        every = self.tests
        if count is None or count >= len(every):
            return every
        return tuple(every[place * len(every) // count] for place in range(count))


@dataclass(frozen=True, slots=True)
class Known:
    """What a row says: what was asked, the replies, and the pairs that are known."""

    asked: Asked
    replies: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    kind: TestKind = "pairs"
    styles: tuple[int, ...] = ()
    subset: str = ""


@dataclass(frozen=True, slots=True)
class PreferenceFormat:
    """One published layout.

    Attributes:
        holds: What a row holds, for readers.
        told: Whether the columns and their first cells are of this layout.
    """

    name: str
    holds: str
    told: Callable[[Mapping[str, Column]], bool]
    read: Callable[[Row], Known]


def read_judge_tests(path: Path) -> JudgeTests:
    """The tests of a preference file: JSON, JSONL, CSV, Parquet or a folder of them.

    Raises:
        UserError: It is not there or cannot be read, nothing in it orders replies, or no row gives
            a pair.
    """
    if not path.exists():
        raise UserError("no such file", where=str(path))
    source = read_source(str(path))
    columns = source.profile()
    published = next((one for one in FORMATS if one.told(columns)), None)
    dropped: Counter[str] = Counter()
    if published is not None:
        found = _rows(source, published.read, dropped)
        name = published.name
    else:
        seen = SeenColumns(source.where, columns, Columns())
        shape = shape_of(seen, ("oasst-trees", "ranked"))
        if shape is None:
            raise UserError(
                f"nothing orders its replies. Columns: {', '.join(columns)}",
                where=source.where,
                way_out="Bring it into shape with `srlm-lite data prepare`, which takes the names "
                "of columns, and name the eft_eval.jsonl that it writes",
            )
        found = _by_shape(source, *shape, dropped)
        name = shape[0].name
    tests = tuple(_named(found))
    if not tests:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise UserError(f"has no two replies in an order ({told or 'no rows'})", where=source.where)
    return JudgeTests(name, tests, dict(dropped))


def _named(found: Iterable[tuple[str | None, Known]]) -> Iterator[JudgeTest]:
    """Each with a name of its own: the file's id where it is unique, else made of what it says."""
    seen: set[str] = set()
    for given, known in found:
        prompt = transcript(known.asked)
        name = given if given and given not in seen else digest(prompt, *known.replies)
        while name in seen:  # the same row again: it counts again
            name += "+"
        seen.add(name)
        yield JudgeTest(
            name, prompt, known.replies, known.pairs, known.kind, known.styles, known.subset
        )


def _rows(
    source: DataSource, read: Callable[[Row], Known], dropped: Counter[str]
) -> Iterator[tuple[str | None, Known]]:
    for row in source.rows:
        try:
            known = read(row)
            _refuse_useless(known)
        except Unusable as problem:
            dropped[problem.reason] += 1
            continue
        ids = (id_of(row, name) for name in ("id", "pair_id", "question_id", "prompt_id"))
        yield next(filter(None, ids), None), known


def _refuse_useless(known: Known) -> None:
    """A row is a test where all it compares is text, and the two of a pair differ."""
    for text in (transcript(known.asked), *known.replies):
        problem = text_problem(text)
        if problem is not None:
            raise Unusable(problem)
    if not known.pairs:
        raise Unusable("tied")
    if any(known.replies[better] == known.replies[worse] for better, worse in known.pairs):
        raise Unusable("duplicate")


# --- any other file, by its shape -----------------------------------------------------------------

SUBSETS = ("subset", "domain", "category", "task", "source")
"""Columns that may say which domain a row is of, in this order."""

MOST_SUBSETS = 40
"""A column with more values than this in its first rows names something else."""


def _by_shape(
    source: DataSource, shape: TableShape, at: Found, dropped: Counter[str]
) -> Iterator[tuple[str | None, Known]]:
    if shape.format == "oasst-trees":
        yield from _of_trees(source, dropped)
        return
    order = order_of(shape, at)
    column = _subset_column(source.profile(), at)
    groups: dict[str, _Group] = {}
    for number, row in enumerate(source.rows):
        try:
            said = shape.read(row, at)
        except Unusable as problem:
            dropped[problem.reason] += 1
            continue
        given = id_of(row, at.get("prompt_id", (None,))[0])
        key = f"row {number}"
        if order == "all":
            key = given or digest(transcript(said.asked))
        group = groups.setdefault(key, _Group(said.asked, given, _text(row, column)))
        if group.asked != said.asked:
            dropped["other_prompt"] += 1
            continue
        for reply in said.replies:
            group.add(reply)
    for group in groups.values():
        known = group.known(first=order == "first")
        if known.pairs:
            yield group.given, known
        else:
            dropped[group.problem or ("tied" if len(known.replies) > 1 else "unordered")] += 1


@dataclass(slots=True)
class _Group:
    """Replies whose places compare."""

    asked: Asked
    given: str | None
    subset: str
    replies: list[GivenReply] = field(default_factory=list)
    problem: str | None = None
    """Why the first reply that is of no use is not."""

    def add(self, reply: GivenReply) -> None:
        """One more, if it is of use."""
        problem = text_problem(reply.text) or ("no_score" if reply.place is None else None)
        if problem is None:
            self.replies.append(reply)
        else:
            self.problem = self.problem or problem

    def known(self, *, first: bool) -> Known:
        """Its pairs: of the first reply with each other one, or of all that differ in place."""
        kept = list({one.text.strip(): one for one in reversed(self.replies)}.values())[::-1]
        both = list(combinations(range(len(kept)), 2))
        if first:
            both = [pair for pair in both if pair[0] == 0]
        pairs = [pair for a, b in both if (pair := _pair(kept, a, b)) is not None]
        texts = tuple(one.text.strip() for one in kept)
        return Known(self.asked, texts, tuple(pairs), subset=self.subset)


def _pair(replies: Sequence[GivenReply], a: int, b: int) -> tuple[int, int] | None:
    one, other = replies[a].place, replies[b].place
    if one is None or other is None or one == other:
        return None
    return (a, b) if one < other else (b, a)


def _of_trees(source: DataSource, dropped: Counter[str]) -> Iterator[tuple[str | None, Known]]:
    replies, prompts = Ledger(), Ledger()
    ranked, _ = read_trees(source, lang=None, replies=replies, prompts=prompts)
    for found in ranked:
        if not found.is_ordered:
            dropped["unordered"] += 1
            continue
        group = _Group(found.messages or found.text, found.prompt_id, "")
        group.replies = [GivenReply(one.text, one.place) for one in found.replies]
        yield found.prompt_id, group.known(first=False)


def _subset_column(columns: Mapping[str, Column], at: Found) -> str | None:
    used = {name for names in at.values() for name in names}
    for name in SUBSETS:
        cells = columns[name].cells if name in columns and name not in used else []
        if all(isinstance(cell, str) for cell in cells) and 1 < len(set(cells)) <= MOST_SUBSETS:
            return name
    return None


def _text(row: Row, column: str | None) -> str:
    value = row.get(column) if column is not None else None
    return value.strip() if isinstance(value, str) else ""


# --- published sets -------------------------------------------------------------------------------


def _listed(row: Row, name: str) -> tuple[str, ...]:
    cell = parsed(row.get(name))
    if not isinstance(cell, list) or not cell or not all(isinstance(one, str) for one in cell):
        raise Unusable("not_text")
    return tuple(one.strip() for one in cell)


def _asked_in(row: Row, name: str) -> Asked:
    return asked_of(turns_in(row.get(name), role="user"))


def _are_lists(columns: Mapping[str, Column], *names: str) -> bool:
    return all(
        name in columns
        and bool(columns[name].cells)
        and all(isinstance(parsed(cell), list) for cell in columns[name].cells)
        for name in names
    )


def _is_reward_bench_2(columns: Mapping[str, Column]) -> bool:
    if "prompt" not in columns or not _are_lists(columns, "chosen", "rejected"):
        return False
    return {"subset", "num_correct"} <= set(columns)


def _read_reward_bench_2(row: Row) -> Known:
    chosen, rejected = _listed(row, "chosen"), _listed(row, "rejected")
    replies = (*chosen, *rejected)
    pairs = [(a, b) for a in range(len(chosen)) for b in range(len(chosen), len(replies))]
    subset = _text(row, "subset")
    kind: TestKind = "ties" if subset.lower() == "ties" else "best"
    return Known(_asked_in(row, "prompt"), replies, tuple(pairs), kind, subset=subset)


STYLES = ("concise", "detailed", "markdown")
"""RM-Bench's, in the order of its lists."""


def _is_rm_bench(columns: Mapping[str, Column]) -> bool:
    if not {"prompt", "domain"} <= set(columns) or not _are_lists(columns, "chosen", "rejected"):
        return False
    cells = [*columns["chosen"].cells, *columns["rejected"].cells]
    return all(len(parsed(cell)) == len(STYLES) for cell in cells)


def _read_rm_bench(row: Row) -> Known:
    chosen, rejected = _listed(row, "chosen"), _listed(row, "rejected")
    if {len(chosen), len(rejected)} != {len(STYLES)}:
        raise Unusable("not_text")
    every = len(STYLES)
    pairs = [(a, every + b) for a in range(every) for b in range(every)]
    return Known(
        _asked_in(row, "prompt"),
        (*chosen, *rejected),
        tuple(pairs),
        "styles",
        tuple([*range(every)] * 2),
        # The two halves of safety, refusals and answers, are one domain of the set's table.
        re.sub(r"^safety.*", "safety", _text(row, "domain")),
    )


JUDGE_BENCH_DOMAINS = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
"""By how a row's `source` begins."""


def _is_judge_bench(columns: Mapping[str, Column]) -> bool:
    return {"question", "response_A", "response_B", "label", "source"} <= set(columns)


def _read_judge_bench(row: Row) -> Known:
    said = re.fullmatch(r"\s*([AB])\s*>\s*([AB])\s*", str(row.get("label")))
    if said is None or said[1] == said[2]:
        raise Unusable("tied")
    replies = tuple(_reply_in(row, f"response_{side}") for side in "AB")
    source = _text(row, "source")
    domains = (name for start, name in JUDGE_BENCH_DOMAINS.items() if source.startswith(start))
    pair = (0, 1) if said[1] == "A" else (1, 0)
    return Known(_asked_in(row, "question"), replies, (pair,), subset=next(domains, source))


def _reply_in(row: Row, name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str):
        raise Unusable("not_text")
    return text.strip()


def _is_ppe_human(columns: Mapping[str, Column]) -> bool:
    if not {"prompt", "response_1", "response_2", "winner"} <= set(columns):
        return False
    return any(str(cell) in ("model_a", "model_b") for cell in columns["winner"].cells)


def _read_ppe_human(row: Row) -> Known:
    winner = str(row.get("winner"))
    if winner not in ("model_a", "model_b"):
        raise Unusable("tied")
    replies = tuple(_reply_in(row, f"response_{side}") for side in (1, 2))
    pair = (0, 1) if winner == "model_a" else (1, 0)
    return Known(_asked_in(row, "prompt"), replies, (pair,))


def _is_ppe_correctness(columns: Mapping[str, Column]) -> bool:
    return {"prompt", "response_1", "scores", "sampled_conflict_pairs"} <= set(columns)


def _read_ppe_correctness(row: Row) -> Known:
    """Only the pairs that the set has drawn, and of the replies those that stand in one."""
    scores, drawn = parsed(row.get("scores")), parsed(row.get("sampled_conflict_pairs"))
    if not isinstance(scores, list) or not isinstance(drawn, list):
        raise Unusable("no_score")
    pairs = []
    for entry in drawn:
        if not isinstance(entry, list) or len(entry) != 2:
            raise Unusable("no_score")
        one, other = (_place_in(scores, place) for place in entry)
        if scores[one] != scores[other]:
            pairs.append((one, other) if _right(scores[one]) else (other, one))
    places = sorted({place for pair in pairs for place in pair})
    at = {place: number for number, place in enumerate(places)}
    replies = tuple(_reply_in(row, f"response_{place + 1}") for place in places)
    told = dict.fromkeys((at[better], at[worse]) for better, worse in pairs)
    differing = tuple(pair for pair in told if replies[pair[0]] != replies[pair[1]])
    return Known(_asked_in(row, "prompt"), replies, differing)


def _place_in(scores: Sequence[object], place: object) -> int:
    number = number_of(place)
    if number is None or number != int(number) or not 0 <= number < len(scores):
        raise Unusable("no_score")
    return int(number)


def _right(score: object) -> bool:
    return score is True or number_of(score) == 1


FORMATS = (
    PreferenceFormat(
        "RewardBench 2",
        "`prompt`, a list `chosen` of right replies (one, in the subset Ties several) and a list "
        "`rejected` of wrong ones (three, or more), `num_correct`, `subset`",
        _is_reward_bench_2,
        _read_reward_bench_2,
    ),
    PreferenceFormat(
        "RM-Bench",
        "`prompt`, `chosen` and `rejected` with three replies each, the same content written "
        "concisely, in detail, and in detail with Markdown; `domain`",
        _is_rm_bench,
        _read_rm_bench,
    ),
    PreferenceFormat(
        "JudgeBench",
        "`question`, `response_A`, `response_B`, `label` (`A>B` or `B>A`), the question's `source`",
        _is_judge_bench,
        _read_judge_bench,
    ),
    PreferenceFormat(
        "PPE, human preference",
        "`prompt`, `response_1`, `response_2`, `winner` (`model_a`, `model_b`, or a tie)",
        _is_ppe_human,
        _read_ppe_human,
    ),
    PreferenceFormat(
        "PPE, correctness",
        "`prompt`, `response_1` to `response_32`, a list `scores` of right and wrong, and the "
        "`sampled_conflict_pairs` of their places, one right and one wrong",
        _is_ppe_correctness,
        _read_ppe_correctness,
    ),
)
"""Sets that judges are measured by. Of ties in them nothing is known, and no pair is made.

Sources: RewardBench 2, Malik et al. 2025, arXiv:2506.01937; RM-Bench, Liu et al. 2024,
arXiv:2410.16184; JudgeBench, Tan et al. 2024, arXiv:2410.12784; PPE, Frick et al. 2024,
arXiv:2410.14872.
"""


def formats_table() -> str:
    """The published layouts, as Markdown."""
    rows = [("set", "a row holds"), ("---", "---"), *((one.name, one.holds) for one in FORMATS)]
    return "".join(f"| {name} | {holds} |\n" for name, holds in rows)
