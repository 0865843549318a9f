"""What can be counted in a data directory, in one pass over each file.

No text is kept but those of a few drawn prompts: of a row there stay some numbers and digests of
its texts, about 80 bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from srlm_lite.data.text import begins_with_thought, words_of
from srlm_lite.dataview.rows import FILES, DataFile, DataRow, as_json, files_of, rows_of
from srlm_lite.progress import Reporter, Silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRAWN = 400
"""Prompts of a file that are drawn: whose languages are told, and from whom the page shows some."""
MOST_ROWS = 16
"""Replies to a drawn prompt that are kept."""
MOST_CHARS = 20_000
"""Characters of a text that are kept."""
MOST_IN_GROUP = 200
"""Replies to one prompt that are held against each other; the first ones, of more."""
BINS = 20
"""Bars of a histogram, at most."""


class Tokens(Protocol):
    """Counts a row's tokens as a run would."""

    window: int
    thinks: bool
    """Whether the base takes a reply's thought for one."""

    def prompt(self, row: DataRow) -> int:
        """Tokens of what is asked, in the base's template, up to where the reply starts."""
        ...

    def reply(self, row: DataRow) -> int:
        """Tokens of the reply and the end of its turn."""
        ...

    def whole(self, file: DataFile, row: DataRow, prompt: int, reply: int) -> int:
        """Tokens that the row needs of the window."""
        ...


@dataclass(frozen=True, slots=True)
class Spot:
    """A row of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Spread:
    """How long some texts are."""

    mean: float
    median: float
    p90: float
    p99: float
    longest: int
    longest_at: Spot
    bins: tuple[tuple[int, int, int], ...]
    """From, up to and without, how many."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """How often something is so, with its 95% interval where that is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Ordering:
    """What a file of ranked replies says of their order, by prompt."""

    ordered: int
    """Prompts with replies of different rank."""
    single: int
    """Prompts with one reply."""
    tied: int
    """Prompts all of whose replies have the same rank."""
    replies: tuple[int, float, int]
    """To a prompt: fewest, mean, most."""
    pairs: int
    """Any two replies to one prompt."""
    tied_pairs: int
    longer_wins: Proportion | None
    """How often, in pairs in order, the better reply is the longer one; as long is half."""
    upside_down: int
    """Pairs whose better rank has the lower quality."""
    upside_down_at: Spot | None
    qualities: int
    """Replies with a quality."""
    scores: tuple[tuple[float, float, int], ...]
    """Their histogram: from, to, how many; a bar of a single value has both ends at it."""
    targets: int
    """Replies with a judge's target."""


@dataclass(frozen=True, slots=True)
class Again:
    """Rows that say what an earlier row of the file has said."""

    rows: int
    first: tuple[Spot, Spot] | None = None
    """The first of them, and the row before it."""


@dataclass(frozen=True, slots=True)
class FileFigures:
    """What is in one file."""

    file: DataFile
    rows: int
    prompts: int
    """Different ones, by their ids."""
    conversations: int
    """Rows with more than one user turn before the reply."""
    systems: int
    """Rows with a system message."""
    empty: int
    """Rows without a prompt, or without a reply where there is to be one."""
    empty_at: Spot | None
    thoughts: int
    """Replies that begin with a thought."""
    thoughts_at: Spot | None
    same_prompts: Again
    """In the same words, under another id or in another row."""
    same_replies: Again
    same_ids: Again
    """Ids of replies, or of prompts in a list of them, where a run wants each once."""
    mixed_ids: Again
    """The same id for another prompt."""
    prompt_chars: Spread | None
    reply_chars: Spread | None
    prompt_tokens: Spread | None
    reply_tokens: Spread | None
    beyond: int | None
    """Rows that do not fit the window; None where no base counts their tokens."""
    beyond_at: Spot | None
    order: Ordering | None
    drawn: tuple[tuple[DataRow, ...], ...] = ()
    """Rows of some prompts, drawn at random; the same file gives the same ones."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Prompts of a held-out file that are in another one, too."""

    held_out: str
    other: str
    same: int
    """Different prompts, letter for letter the same."""
    alike: int
    """The same in all but case, punctuation and spaces."""
    first: tuple[Spot, Spot]


@dataclass(frozen=True, slots=True)
class Figures:
    """What is in a data directory."""

    directory: Path
    files: tuple[FileFigures, ...]
    missing: tuple[DataFile, ...]
    shared: tuple[Overlap, ...]
    window: int | None = None
    thinks: bool | None = None
    """Whether the base that counts tokens thinks; None where there is none."""


def figures_of(
    directory: Path, tokens: Tokens | None = None, reporter: Reporter | None = None
) -> Figures:
    """Read a data directory.

    Args:
        tokens: Counts them; without it lengths are in characters.
        reporter: Told how far it is.

    Raises:
        UserError: It holds no data, or a row cannot be read.
    """
    found = files_of(directory)
    columns = []
    for file in found:
        path, one = directory / file.name, Tally(file, tokens)
        task = (reporter or Silent()).start(file.name, path.stat().st_size, "bytes")
        for row in rows_of(path, file.kind, task.advance):
            one.add(row)
        columns.append(one)
    files = [one.figures() for one in columns]
    return Figures(
        directory=directory,
        files=tuple(files),
        missing=tuple(file for file in FILES if file.needed and file not in found),
        shared=tuple(_shared(columns)),
        window=None if tokens is None else tokens.window,
        thinks=None if tokens is None else tokens.thinks,
    )


class Tally:
    """The rows of a file as numbers: digests of its texts, lengths, ranks."""

    def __init__(self, file: DataFile, tokens: Tokens | None) -> None:
        self.file, self._tokens = file, tokens
        self.lines = array("I")
        self.ids, self.reply_ids = array("Q"), array("Q")
        self.prompts, self.words, self.replies = array("Q"), array("Q"), array("Q")
        self._lengths = {
            name: array("I")
            for name in ("prompt_chars", "reply_chars", "prompt_tokens", "reply_tokens")
        }
        self._ranks, self._qualities = array("q"), array("d")
        self._conversations = self._systems = self._empty = self._beyond = self._targets = 0
        self._thoughts = 0
        self._empty_at: Spot | None = None
        self._thoughts_at: Spot | None = None
        self._beyond_at: Spot | None = None
        self._drawn = Drawn()

    def add(self, row: DataRow) -> None:
        """Count a row."""
        place = Spot(self.file.name, row.line)
        self.lines.append(row.line)
        self.ids.append(digest(row.prompt_id))
        self.prompts.append(digest(as_json(row)))
        self.words.append(digest(words_of(row.prompt)))
        self._lengths["prompt_chars"].append(len(row.prompt))
        if row.messages is not None:
            self._systems += row.messages[0]["role"] == "system"
            self._conversations += any(one["role"] == "assistant" for one in row.messages)
        if row.response is not None:
            self.replies.append(digest(words_of(row.response)))
            self._lengths["reply_chars"].append(len(row.response))
        if row.response is not None and begins_with_thought(row.response):
            self._thoughts += 1
            self._thoughts_at = self._thoughts_at or place
        if not row.prompt.strip() or (row.response is not None and not row.response.strip()):
            self._empty += 1
            self._empty_at = self._empty_at or place
        if self.file.kind == "ranked":
            self.reply_ids.append(digest(row.response_id or ""))
            self._ranks.append(row.rank)
            self._qualities.append(float("nan") if row.quality is None else row.quality)
            self._targets += row.target is not None
        if self._tokens is not None:
            self._count(self._tokens, row, place)
        self._drawn.offer(row)

    def _count(self, tokens: Tokens, row: DataRow, place: Spot) -> None:
        prompt = tokens.prompt(row)
        self._lengths["prompt_tokens"].append(prompt)
        reply = 0
        if row.response is not None:
            reply = tokens.reply(row)
            self._lengths["reply_tokens"].append(reply)
        if tokens.whole(self.file, row, prompt, reply) > tokens.window:
            self._beyond += 1
            self._beyond_at = self._beyond_at or place

    def figures(self) -> FileFigures:
        """What the rows say, once all have been added."""
        import numpy as np

        whole = {"answers": None, "ranked": self.reply_ids, "prompts": self.ids}[self.file.kind]
        ids, prompts = _of(self.ids), _of(self.prompts)
        first = np.unique(ids, return_index=True)[1]

        def spread(name: str) -> Spread | None:
            return self._spread(_of(self._lengths[name]))

        return FileFigures(
            file=self.file,
            rows=len(self.lines),
            prompts=len(first),
            conversations=self._conversations,
            systems=self._systems,
            empty=self._empty,
            empty_at=self._empty_at,
            thoughts=self._thoughts,
            thoughts_at=self._thoughts_at,
            same_prompts=self._again(_of(self.words), first if self._grouped else None),
            same_replies=self._again(_of(self.replies)),
            same_ids=Again(0) if whole is None else self._again(_of(whole)),
            mixed_ids=self._mixed(ids, prompts) if self._grouped else Again(0),
            prompt_chars=spread("prompt_chars"),
            reply_chars=spread("reply_chars"),
            prompt_tokens=spread("prompt_tokens"),
            reply_tokens=spread("reply_tokens"),
            beyond=None if self._tokens is None else self._beyond,
            beyond_at=self._beyond_at,
            order=self._order() if self._grouped else None,
            drawn=self._drawn.groups(),
        )

    @property
    def _grouped(self) -> bool:
        """Whether rows with the same prompt id belong together."""
        return self.file.kind == "ranked"

    def place(self, row: int) -> Spot:
        """Where the row of a number, from 0, stands."""
        return Spot(self.file.name, self.lines[row])

    def _again(self, values: NDArray[Any], rows: NDArray[Any] | None = None) -> Again:
        """Rows whose value an earlier one has.

        Args:
            rows: The numbers of those that count; None: all.
        """
        import numpy as np

        rows = np.arange(len(values)) if rows is None else np.sort(rows)
        _, first, inverse = np.unique(values[rows], return_index=True, return_inverse=True)
        later = np.flatnonzero(first[inverse] != np.arange(len(rows)))
        if not len(later):
            return Again(0)
        one = int(later[0])
        earlier = int(rows[first[inverse[one]]])
        return Again(len(later), (self.place(int(rows[one])), self.place(earlier)))

    def _mixed(self, ids: NDArray[Any], prompts: NDArray[Any]) -> Again:
        """Rows whose id an earlier row has for another prompt."""
        import numpy as np

        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        other = np.flatnonzero(prompts[first[inverse]] != prompts)
        if not len(other):
            return Again(0)
        one = int(other[0])
        return Again(len(other), (self.place(one), self.place(int(first[inverse[one]]))))

    def _spread(self, lengths: NDArray[Any]) -> Spread | None:
        import numpy as np

        if not len(lengths):
            return None
        at = int(lengths.argmax())
        median, p90, p99 = np.quantile(lengths, (0.5, 0.9, 0.99))
        counts, edges = np.histogram(lengths, bins=_edges(int(lengths.max()), float(p99)))
        return Spread(
            mean=round(float(lengths.mean()), 1),
            median=float(median),
            p90=float(p90),
            p99=float(p99),
            longest=int(lengths[at]),
            longest_at=self.place(at),
            bins=tuple(
                (int(low), int(high), int(count))
                for low, high, count in zip(edges, edges[1:], counts, strict=False)
            ),
        )

    def _order(self) -> Ordering:
        import numpy as np

        from srlm_lite.evaluate.intervals import ratio, share_interval

        ids, ranks, chars = _of(self.ids), _of(self._ranks), _of(self._lengths["reply_chars"])
        qualities = _of(self._qualities)
        groups = list(_groups(ids))
        counts = [len(rows) for rows in groups] or [0]
        ordered = tied = pairs = tied_pairs = upside_down = 0
        upside_down_at: Spot | None = None
        longer: list[tuple[float, float]] = []
        for rows in groups:
            if len(rows) < 2:
                continue
            rows = rows[:MOST_IN_GROUP]
            better = ranks[rows][:, None] < ranks[rows][None, :]
            in_order = int(better.sum())
            every = len(rows) * (len(rows) - 1) // 2
            pairs, tied_pairs = pairs + every, tied_pairs + every - in_order
            tied += not in_order
            ordered += in_order > 0
            if not in_order:
                continue
            size = chars[rows].astype(np.int64)
            won = (better * (np.sign(size[:, None] - size[None, :]) + 1) / 2).sum()
            longer.append((float(won), float(in_order)))
            lower = better & (qualities[rows][:, None] < qualities[rows][None, :])
            if wrong := int(lower.sum()):
                upside_down += wrong
                upside_down_at = upside_down_at or self.place(int(rows[lower.any(1).argmax()]))
        value, ends = ratio(longer), share_interval(longer) or (None, None)
        known = qualities[~np.isnan(qualities)]
        return Ordering(
            ordered=ordered,
            single=sum(count == 1 for count in counts),
            tied=tied,
            replies=(min(counts), round(sum(counts) / len(counts), 1), max(counts)),
            pairs=pairs,
            tied_pairs=tied_pairs,
            longer_wins=None if value is None else Proportion(value, *ends),
            upside_down=upside_down,
            upside_down_at=upside_down_at,
            qualities=len(known),
            scores=_histogram(known),
            targets=self._targets,
        )


class Drawn:
    """Rows of some prompts, drawn at random in one pass: those whose ids have the lowest digests.

    A prompt that is among the lowest at the end was so from its first row on.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []
        self._rows: dict[str, list[DataRow]] = {}

    def offer(self, row: DataRow) -> None:
        """Keep a row, if its prompt is among those that are drawn so far."""
        name = row.prompt_id
        if name not in self._rows:
            place = -digest(f"drawn {name}")
            if len(self._heap) < DRAWN:
                heapq.heappush(self._heap, (place, name))
            elif place > self._heap[0][0]:
                del self._rows[heapq.heapreplace(self._heap, (place, name))[1]]
            else:
                return
            self._rows[name] = []
        if len(self._rows[name]) < MOST_ROWS:
            self._rows[name].append(_shortened(row))

    def groups(self) -> tuple[tuple[DataRow, ...], ...]:
        """The rows of each drawn prompt, in an order that is random too."""
        return tuple(tuple(self._rows[name]) for _, name in sorted(self._heap, reverse=True))


def digest(text: str) -> int:
    """64 bits of a text: two different ones among a million share theirs once in 37 million."""
    raw = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "big")


def _shared(columns: Sequence[Tally]) -> Iterator[Overlap]:
    """What held-out files have in common with those that a run learns from."""
    import numpy as np

    for held in (one for one in columns if one.file.held_out):
        for other in (one for one in columns if not one.file.held_out):
            alike, mine, theirs = np.intersect1d(
                _of(held.words), _of(other.words), return_indices=True
            )
            if len(alike):
                one = int(mine.argmin())
                yield Overlap(
                    held_out=held.file.name,
                    other=other.file.name,
                    same=len(np.intersect1d(_of(held.prompts), _of(other.prompts))),
                    alike=len(alike),
                    first=(held.place(int(mine[one])), other.place(int(theirs[one]))),
                )


def _of(values: array[Any]) -> NDArray[Any]:
    """The same memory, as an array that can be computed with."""
    import numpy as np

    return np.frombuffer(values, dtype=np.dtype(values.typecode)) if values else np.array([])


def _groups(ids: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The rows of each id, in their order."""
    import numpy as np

    if len(ids):
        order = np.argsort(ids, kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)


def _edges(longest: int, p99: float) -> list[int]:
    """Ends of a length's bars, in round steps up to the longest 1%, which share the last bar."""
    step = int(_step(max(1.0, p99 / (BINS - 1))))
    edges = list(range(0, int(p99) + step + 1, step))
    return [*edges, longest + 1] if longest >= edges[-1] else edges


def _histogram(values: NDArray[Any]) -> tuple[tuple[float, float, int], ...]:
    """A bar a value where there are few, else bars of the same width."""
    import numpy as np

    found, counts = np.unique(values, return_counts=True)
    if len(found) <= BINS:
        return tuple((float(v), float(v), int(n)) for v, n in zip(found, counts, strict=True))
    low, high = float(found[0]), float(found[-1])
    step = _step((high - low) / 11)
    first = math.floor(low / step)
    edges = [round(n * step, 12) for n in range(first, math.floor(high / step) + 2)]
    counts, _ = np.histogram(values, bins=edges)
    return tuple((a, b, int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False))


def _step(least: float) -> float:
    """The next round number: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(float(f"{n * power:.12g}") for n in (1, 2, 5, 10) if n * power >= least)


def _shortened(row: DataRow) -> DataRow:
    if len(row.prompt) + len(row.response or "") + len(row.target or "") <= MOST_CHARS:
        return row

    def cut(text: str) -> str:
        return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]} […]"

    return replace(
        row,
        prompt=cut(row.prompt),
        messages=row.messages
        and tuple({**one, "content": cut(one["content"])} for one in row.messages),
        response=None if row.response is None else cut(row.response),
        target=None if row.target is None else cut(row.target),
    )
