"""A data directory as one HTML file that needs nothing else and runs nothing: it has no script.

Templates escape all they are given, and the page's own policy lets nothing run or be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from srlm_lite.conversation import NAMES
from srlm_lite.dataview.figures import MOST_ROWS, Figures, FileFigures, Spread
from srlm_lite.dataview.languages import Languages
from srlm_lite.dataview.rows import DataRow
from srlm_lite.dataview.standing import Standout
from srlm_lite.dataview.text import one_line, tables
from srlm_lite.report.charts import Chart, Series
from srlm_lite.report.draw import svg
from srlm_lite.report.pack import TEXT_LIMITS, shortened

MOST_BYTES = 5_000_000
"""No page is larger."""

GENERATOR = "srlm-lite data show"
"""By this name a file is known to be such a page, which another may replace."""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


@dataclass(frozen=True, slots=True)
class DrawnText:
    """A text of a sample, with who says it and what is known of it."""

    who: str
    text: str
    facts: str = ""
    side: str = ""
    """`chosen` and `rejected` mark the best and the worst reply."""


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """A drawn prompt, with its rows."""

    name: str
    facts: str
    start: str
    turns: tuple[DrawnText, ...]
    replies: tuple[DrawnText, ...]


@dataclass(frozen=True, slots=True)
class SampledFile:
    """The drawn prompts of a file."""

    name: str
    prompts: int
    samples: tuple[DrawnPrompt, ...]


def html(
    figures: Figures,
    languages: Mapping[str, Languages],
    found: Sequence[Standout],
    *,
    samples: int,
) -> str:
    """The whole page; long texts are cut in the middle until it is small enough.

    Args:
        samples: Prompts of each file that are shown.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_asset),
    )
    template = environment.get_template("data.html.jinja")
    page = ""
    for limit in TEXT_LIMITS:
        page = template.render(
            generator=GENERATOR,
            policy=POLICY,
            style=_report_style() + _asset("data.css"),
            name=figures.directory.resolve().name,
            summary=one_line(figures),
            found=found,
            charts=[(chart, svg(chart)) for chart in charts(figures, languages)],
            tables=tables(figures, languages),
            files=[_sampled(one, samples, limit) for one in figures.files],
            limit=limit,
            most_rows=MOST_ROWS,
        )
        if len(page.encode()) <= MOST_BYTES:
            break
    return page


def charts(figures: Figures, languages: Mapping[str, Languages]) -> list[Chart]:
    """Lengths, qualities and languages as pictures."""
    found = []
    unit = "characters" if figures.window is None else "tokens"
    for one in figures.files:
        sides = [
            ("prompts", getattr(one, f"prompt_{'chars' if unit == 'characters' else unit}")),
            ("replies", getattr(one, f"reply_{'chars' if unit == 'characters' else unit}")),
        ]
        known = [(what, spread) for what, spread in sides if spread is not None]
        found += [_lengths(one, what, spread, unit) for what, spread in known]
        if one.order is not None and one.order.scores:
            found.append(_scores(one))
    return found


def _lengths(one: FileFigures, what: str, spread: Spread, unit: str) -> Chart:
    name = f"{one.file.name}, {what}"
    bins = [f"{low:,}" for low, _, _ in spread.bins]
    counts = tuple(float(count) for *_, count in spread.bins)
    series = Series(what, tuple(bins), counts)
    return Chart(
        f"length-{_slug(name)}",
        name,
        "bars",
        f"{unit}, from",
        "how many",
        (series,),
        note="The last bar has the longest 1%." if spread.longest > spread.p99 else "",
        digits=0,
    )


def _scores(one: FileFigures) -> Chart:
    scores = one.order.scores if one.order is not None else ()
    names = tuple(f"{low:g}" for low, _, _ in scores)
    counts = tuple(float(count) for *_, count in scores)
    return Chart(
        f"quality-{_slug(one.file.name)}",
        f"{one.file.name}, quality",
        "bars",
        "quality that people gave"
        if all(low == high for low, high, _ in scores)
        else "quality that people gave, from",
        "replies",
        (Series("replies", names, counts),),
        digits=0,
    )


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)


def _sampled(one: FileFigures, count: int, limit: int | None) -> SampledFile:
    drawn = tuple(_sample(one, rows, limit) for rows in one.drawn[:count])
    return SampledFile(one.file.name, one.prompts, drawn)


def _sample(one: FileFigures, rows: Sequence[DataRow], limit: int | None) -> DrawnPrompt:
    def cut(text: str) -> str:
        return text if limit is None else shortened(text, limit)

    first = rows[0]
    lines = f"line {first.line}" if len(rows) == 1 else f"lines from {first.line}"
    messages = first.messages or ({"role": "user", "content": first.prompt},)
    facts = [lines]
    if len(messages) > 1:
        facts.append(f"{len(messages)} messages")
    replies = [row for row in rows if row.response is not None]
    if one.order is not None:
        facts.append(f"{len(replies)} replies")
    ranks = [row.rank for row in replies]
    return DrawnPrompt(
        name=first.prompt_id,
        facts=", ".join(facts),
        start=messages[-1]["content"][:200],
        turns=tuple(DrawnText(NAMES[m["role"]], cut(m["content"])) for m in messages),
        replies=tuple(
            reply
            for row in sorted(replies, key=lambda row: row.rank)
            for reply in _replies(one, row, ranks, cut)
        ),
    )


def _replies(
    one: FileFigures, row: DataRow, ranks: Sequence[int], cut: Callable[[str], str]
) -> Iterator[DrawnText]:
    text = row.response or ""
    length = f"{len(text):,} characters"
    if one.order is None:
        yield DrawnText("Reply", cut(text), length)
        return
    side = ""
    if min(ranks) < max(ranks):
        side = {min(ranks): "chosen", max(ranks): "rejected"}.get(row.rank, "")
    quality = [] if row.quality is None else [f"quality {row.quality:g}"]
    yield DrawnText(f"Rank {row.rank}", cut(text), ", ".join([*quality, length]), side)
    if row.target is not None:
        yield DrawnText(f"The judge's target for rank {row.rank}", cut(row.target))


@cache
def _asset(name: str) -> str:
    folder = resources.files("srlm_lite.dataview") / "templates"
    return (folder / name).read_text(encoding="utf-8")


@cache
def _report_style() -> str:
    folder = resources.files("srlm_lite.report") / "templates"
    return (folder / "report.css").read_text(encoding="utf-8")
