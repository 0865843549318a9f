"""A data directory's figures as tables: for a terminal of 80 columns, and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from srlm_lite.dataview.figures import Figures, Spread
from srlm_lite.dataview.languages import UNTOLD, Languages

MOST_LANGUAGES = 6
"""The others count together."""
REST = "others"


@dataclass(frozen=True, slots=True)
class FigureTable:
    """Rows below a head; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    prose: bool = False
    """Whether the last column is text, where the others are figures."""


def tables(figures: Figures, languages: Mapping[str, Languages]) -> list[FigureTable]:
    """All that is counted, as far as there is something to count.

    Args:
        languages: By the name of a file.
    """
    found = [_rows(figures), _lengths(figures), _order(figures), _scores(figures)]
    found += [_languages(languages), _shared(figures)]
    return [one for one in found if one.rows]


def _rows(figures: Figures) -> FigureTable:
    rows = [
        (
            one.file.stem,
            f"{one.rows:,}",
            f"{one.prompts:,}",
            _share(one.conversations, one.rows),
            _share(one.systems, one.rows),
            f"{one.same_prompts.rows:,}",
            f"{one.same_replies.rows:,}" if one.file.kind != "prompts" else "",
        )
        for one in figures.files
    ]
    missing = [f"{one.name} is not there; it is needed {one.needed}" for one in figures.missing]
    note = "Again: in the words of an earlier one of the file, whatever the case and punctuation"
    head = ("file", "rows", "prompts", "dialogues", "system", "prompts again", "replies again")
    return FigureTable("Rows", head, tuple(rows), ". ".join([note, *missing]))


def _lengths(figures: Figures) -> FigureTable:
    counted = figures.window is not None
    rows = []
    for one in figures.files:
        pairs = (
            ("prompts", one.prompt_tokens if counted else one.prompt_chars),
            ("replies", one.reply_tokens if counted else one.reply_chars),
        )
        for what, spread in pairs:
            if spread is not None:
                rows.append((f"{one.file.stem}, {what}", *_spread(spread)))
    unit = "tokens, template included" if counted else "characters"
    note = (
        f"Of {figures.window:,} tokens in the window, too long: "
        + ", ".join(f"{one.file.stem} {one.beyond:,}" for one in figures.files)
        if counted
        else "With --base NAME or --recipe NAME in tokens, and with what does not fit the window"
    )
    head = (f"length in {unit}", "mean", "median", "90%", "99%", "longest")
    return FigureTable("Lengths", head, tuple(rows), note)


def _spread(one: Spread) -> tuple[str, ...]:
    return tuple(f"{v:,.0f}" for v in (one.mean, one.median, one.p90, one.p99, one.longest))


def _order(figures: Figures) -> FigureTable:
    rows = []
    for one in figures.files:
        if (order := one.order) is None:
            continue
        fewest, mean, most = order.replies
        wins = order.longer_wins
        longer = "" if wins is None else f"{wins.value:.0%}"
        if wins is not None and wins.low is not None and wins.high is not None:
            longer += f" ({100 * wins.low:.0f} to {100 * wins.high:.0f})"
        rows.append(
            (
                one.file.stem,
                f"{order.ordered:,}",
                f"{order.single:,}",
                f"{order.tied:,}",
                f"{mean:g} ({fewest} to {most})",
                _share(order.tied_pairs, order.pairs),
                longer,
            )
        )
    head = ("order", "ordered", "alone", "tied", "replies each", "ties", "longer wins (95%)")
    note = (
        "Ordered, alone, tied: prompts with replies in order, with one reply, with replies all of "
        "one rank. Ties: of pairs of replies. Longer wins: how often the better of two is the "
        "longer one"
    )
    return FigureTable("Order", head, tuple(rows), note)


def _scores(figures: Figures) -> FigureTable:
    rows = []
    for one in figures.files:
        if one.order is None:
            continue
        most = max((count for *_, count in one.order.scores), default=0)
        for low, high, count in one.order.scores:
            name = f"{low:g}" if low == high else f"{low:.3g} to {high:.3g}"
            bar = "█" * round(28 * count / most) or "▏"
            share = _share(count, one.order.qualities)
            rows.append((f"{one.file.stem}, {name}", f"{count:,}", share, bar.ljust(28)))
    targets = [
        f"{one.file.name}: {one.order.targets:,} of {one.rows:,} rows have a judge's target"
        for one in figures.files
        if one.order is not None and one.order.targets
    ]
    return FigureTable(
        "Quality", ("quality", "replies", "share", ""), tuple(rows), ". ".join(targets), prose=True
    )


def _languages(languages: Mapping[str, Languages]) -> FigureTable:
    rows = []
    for name, told in languages.items():
        stem = name.removesuffix(".jsonl")
        for what, counts in (("prompts", told.prompts), ("replies", told.replies)):
            if counts:
                whole = sum(count for _, count in counts)
                shown = ", ".join(
                    f"{code} {_share(count, whole)}" for code, count in grouped(counts)
                )
                rows.append((f"{stem}, {what}", f"{whole:,}", shown))
    note = f"By py3langid, of prompts drawn at random and a reply to each; {UNTOLD}: cannot be told"
    return FigureTable("Languages", ("languages", "drawn", ""), tuple(rows), note, prose=True)


def grouped(counts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The most frequent languages, and all others as one."""
    rest = sum(count for _, count in counts[MOST_LANGUAGES:])
    return [*counts[:MOST_LANGUAGES], *([(REST, rest)] if rest else [])]


def _shared(figures: Figures) -> FigureTable:
    held = [one for one in figures.files if one.file.held_out]
    found = {(one.held_out, one.other): one for one in figures.shared}
    rows = []
    for one in held:
        for other in figures.files:
            if not other.file.held_out:
                shared = found.get((one.file.name, other.file.name))
                same, alike = (shared.same, shared.alike) if shared else (0, 0)
                rows.append((f"{one.file.stem}, {other.file.stem}", f"{same:,}", f"{alike:,}"))
    head = ("prompts that are held out and also in", "the same", "in the same words")
    return FigureTable("Held out", head, tuple(rows))


def _share(part: int, whole: int) -> str:
    """A percentage; one that is neither nothing nor all is never shown as if it were."""
    if not part or not whole:
        return "0" if whole else ""
    share = 100 * part / whole
    if share < 1:
        return "<1%"
    return f"{min(share, 99):.0f}%" if part < whole else "100%"


def one_line(figures: Figures) -> str:
    """What is there, in a line."""
    rows = sum(one.rows for one in figures.files)
    count = len(figures.files)
    return f"{figures.directory}: {rows:,} rows in {count} file{'' if count == 1 else 's'}"
