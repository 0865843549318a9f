"""Texts as trees in one row: what several texts have in common stands there, and is computed, once.

    trunk      what many prompts begin with, such as a rubric or a template's first lines
    branches   the rest of each prompt
    leaves     its replies, as many as are learned from, however many pairs they are in

A row lists a tree depth first, so each part stands right after the part that it goes on from, or
after that part's earlier branches. A token sees the parts above its own, and of its own what is
before it; its position is the one that it has in its text.

Where a prompt is cut is decided once for all texts of a training, whichever of them are in a row:
so every token is computed by the same operations in every row, and rounds alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

Ids = tuple[int, ...]
Text = tuple[Ids, Ids]
"""A prompt, and what is learned after it."""

LEAST_TRUNK = 16
"""Tokens that prompts have to have in common to be cut there: each part costs an attention more."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `start` to `stop` of a row; all that stands below them ends before `end`."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class TreeRow:
    """Trees in a row, and what is asked of them.

    Args:
        positions: Of each token in its text.
        sources: Places of the tokens that are asked, text by text.
        targets: Ids that come next after them; empty where states alone are asked for.
        counts: How many of them each text has.
        places: Where the first token of each text's last part is.
    """

    ids: list[int]
    positions: list[int]
    parts: tuple[Part, ...]
    sources: list[int]
    targets: list[int]
    counts: list[int]
    places: list[int]


class Forest:
    """The trees of all texts of a training, from which rows are made.

    Args:
        shares: False keeps every text by itself, whole.
        scored: Each target is asked for, and a text's last token, after which nothing comes, is in
            no row. Else the last token of each text is asked for, and is there.
    """

    def __init__(self, texts: Sequence[Text], *, shares: bool = True, scored: bool = True) -> None:
        self._scored = scored
        self._texts = list(texts)
        self._parts: list[Ids] = []
        known: dict[tuple[int, Ids], int] = {}
        trunks = cuts({prompt for prompt, _ in texts}) if shares else {}
        self._paths: list[tuple[int, ...]] = []
        for place, (prompt, target) in enumerate(texts):
            learned = target[: -1 if scored else None]
            whole = [*_pieces(prompt, trunks.get(prompt, ())), learned]
            pieces = whole if shares else [(*prompt, *learned)]
            path: list[int] = []
            for piece in filter(None, pieces):
                above = path[-1] if path else -1
                key = (above, piece) if shares else (-2 - place, piece)
                if key not in known:
                    known[key] = len(self._parts)
                    self._parts.append(piece)
                path.append(known[key])
            self._paths.append(tuple(path))

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, text: int) -> Text:
        """Its prompt, and what is learned after it."""
        return self._texts[text]

    def counted(self, text: int) -> int:
        """How many of its targets a text is asked for."""
        return len(self._texts[text][1]) if self._scored else 1

    def tree(self, text: int) -> tuple[int, ...]:
        """What a text's prompt is, to be held against others': equal for equal prompts."""
        _, target = self._texts[text]
        leaf = len(target) > 1 or not self._scored
        return self._paths[text][: -1 if leaf else None]

    def tokens(self, texts: Iterable[int]) -> int:
        """Tokens of a row with these texts."""
        return sum(len(self._parts[part]) for part in {p for t in texts for p in self._paths[t]})

    def row(self, texts: Sequence[int]) -> TreeRow:
        """A row with these texts, which may lie in trees of their own."""
        # Sorted, the paths down to every part list the trees depth first.
        paths = [self._paths[text] for text in texts]
        down = sorted({path[: i + 1] for path in paths for i in range(len(path))})
        ids: list[int] = []
        positions: list[int] = []
        starts: dict[tuple[int, ...], int] = {}
        stops: dict[tuple[int, ...], int] = {}
        for path in down:
            piece = self._parts[path[-1]]
            above = path[:-1]
            first = positions[stops[above] - 1] + 1 if above else 0
            starts[path] = len(ids)
            ids += piece
            positions += range(first, first + len(piece))
            stops[path] = len(ids)
        ends = dict(stops)
        for path in reversed(down):
            if len(path) > 1:
                ends[path[:-1]] = max(ends[path[:-1]], ends[path])
        sources: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        for text, path in zip(texts, paths, strict=True):
            prompt, target = self._texts[text]
            places = [
                place
                for i in range(len(path))
                for place in range(starts[path[: i + 1]], stops[path[: i + 1]])
            ]
            if self._scored:
                asked, learned = places[len(prompt) - 1 :], target
            else:
                asked, learned = places[-1:], ()
            sources += asked
            targets += learned
            counts.append(len(asked))
        return TreeRow(
            ids,
            positions,
            tuple(Part(starts[path], stops[path], ends[path]) for path in down),
            sources,
            targets,
            counts,
            [starts[path] for path in paths],
        )


def _pieces(prompt: Ids, at: Sequence[int]) -> list[Ids]:
    edges = [0, *at, len(prompt)]
    return [prompt[a:b] for a, b in pairwise(edges)]


def cuts(prompts: Collection[Ids], least: int = LEAST_TRUNK) -> dict[Ids, tuple[int, ...]]:
    """Where each prompt is cut, so that what several have in common is a part of its own.

    A part of at least so many tokens; prompts that are in common with none are not cut.
    """
    found: dict[Ids, tuple[int, ...]] = {prompt: () for prompt in prompts}
    waiting = [(sorted(found), 0, 0)]
    while waiting:
        group, cut, seen = waiting.pop()
        if len(group) < 2:
            continue
        # Of a sorted list the first and the last differ earliest.
        first, last = group[0], group[-1]
        shortest = min(len(first), len(last))
        same = next((i for i in range(seen, shortest) if first[i] != last[i]), shortest)
        if same - cut >= least:
            for prompt in group:
                found[prompt] = (*found[prompt], same)
            cut = same
        longer = [prompt for prompt in group if len(prompt) > same]
        for _, members in groupby(longer, key=lambda prompt: prompt[same]):
            waiting.append((list(members), cut, same))
    return {prompt: tuple(at for at in ends if at < len(prompt)) for prompt, ends in found.items()}
