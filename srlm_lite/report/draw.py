"""Charts as SVG, drawn by matplotlib.

The SVG goes into the page as it is: no script, text that can be read and searched, and colours
that are the page's own CSS variables, so that it follows dark mode.
"""

from __future__ import annotations

import io
import math
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from srlm_lite.report.charts import Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stand for a variable until the SVG is written; matplotlib wants real ones.
INK, MUTED, GRID, PAGE = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0102{n:02x}" for n in range(0x10, 0x18))
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAGE: "var(--card)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES, start=1)},
}

MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "srlm-lite",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.2,
}

WIDTH = 4.9
"""Inches; a phone shows it about as wide as that, and its letters at their size."""


@lru_cache(maxsize=128)
def svg(chart: Chart) -> str:
    """The chart as an `<svg>` element for an HTML page; the same values give the same bytes.

    A tenth of a second each: what shows a chart again, as a notebook does, draws it once.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, _height(chart)), layout="constrained")
        axes = figure.subplots()
        _DRAW[chart.kind](axes, chart)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            columns = 2 if max(map(len, labels)) > 14 else 3
            figure.legend(
                handles,
                labels,
                loc="outside lower center",
                ncols=columns,
                columnspacing=1.2,
                handletextpad=0.5,
            )
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(out.getvalue(), chart)


LETTERS = 56
"""So many of names, with the space between them, fit below bars without running together."""

PAPER = {
    **{"ink": "#1b1f24", "muted": "#57606a", "grid": "#dfe3e8", "card": "#ffffff"},
    **{"series-1": "#0b62a4", "series-2": "#c2410c", "series-3": "#0f7b5f", "series-4": "#8e3a9d"},
    **{"series-5": "#8a6100", "series-6": "#b5236b", "series-7": "#56616e", "series-8": "#3b7a0e"},
}
"""The page's colours in the light, by variable."""


def picture(chart: Chart) -> str:
    """The chart as an SVG file: on white, in colours and of a size of its own, with its title.

    For where there is no page around it, such as a notebook.
    """
    text = re.sub(r"var\(--([\w-]+)\)", lambda match: PAPER[match[1]], svg(chart))
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    head, rest = text.split(">", 1)
    box = f'viewBox="0 -28 {width} {float(height) + 28:g}"'
    head = re.sub(r'viewBox="[^"]+"', f'{box} width="{float(width) * 1.35:.0f}"', head)
    title = (
        f'<rect y="-28" width="100%" height="100%" fill="{PAPER["card"]}"/>'
        f'<text x="8" y="-9" font-family="sans-serif" font-size="13" font-weight="bold" '
        f'fill="{PAPER["ink"]}" id="{chart.slug}-title">{escape(chart.title)}</text>'
    )
    return f"{head}>{title}{rest}"


def _height(chart: Chart) -> float:
    if chart.kind == "stack":
        return 1.5 + 0.34 * len(chart.series[0].x) + 0.1 * len(chart.series)
    return 3.1 + 0.1 * max(0, len(chart.series) - 3)


def _line_style(i: int) -> dict[str, Any]:
    return {
        "color": SERIES[i % len(SERIES)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "linewidth": 1.8,
        "markersize": 5,
    }


def _draw_lines(axes: Axes, chart: Chart) -> None:
    """Values by model; series stand a little apart so that intervals do not cover each other."""
    names = list(dict.fromkeys(x for one in chart.series for x in one.x))
    bounded = [i for i, one in enumerate(chart.series) if one.has_intervals]
    for i, one in enumerate(chart.series):
        shift = 0.08 * (bounded.index(i) - (len(bounded) - 1) / 2) if i in bounded else 0.0
        x = [names.index(name) + shift for name in one.x]
        y = [math.nan if value is None else value for value in one.y]
        axes.plot(x, y, label=one.name, **_line_style(i))
        for place, value, low, high in _intervals(x, one):
            axes.errorbar(
                [place],
                [value],
                yerr=[[value - low], [high - value]],
                color=SERIES[i % len(SERIES)],
                capsize=3,
                linewidth=1.4,
            )
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_ylabel(chart.y_label)
    axes.grid(visible=False, axis="x")
    if chart.y_range:
        _bounded(axes, chart)


def _bounded(axes: Axes, chart: Chart) -> None:
    """The range that the quantity has, with room for a line along its edge."""
    low, high = chart.y_range or (0.0, 1.0)
    lowest = min(
        (v for one in chart.series for v in (*one.y, *one.low) if v is not None), default=low
    )
    room = (high - low) * 0.03
    axes.set_ylim(min(low, lowest) - room, high + room)


def _intervals(x: list[float], one: Series) -> list[tuple[float, float, float, float]]:
    found = []
    for place, value, low, high in zip(x, one.y, one.low, one.high, strict=False):
        if value is not None and low is not None and high is not None:
            found.append((place, value, min(low, value), max(high, value)))
    return found


def _draw_curves(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, one in enumerate(chart.series):
        style = {**_line_style(i), "markersize": 3}
        if len(one.x) > 30:
            style["marker"] = ""
        axes.plot(
            one.x,
            [math.nan if value is None else value for value in one.y],
            label=one.name,
            **style,
        )
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if max(max(one.x) for one in chart.series) < 10:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.y_range:
        _bounded(axes, chart)


def _draw_bars(axes: Axes, chart: Chart) -> None:
    names = chart.series[0].x
    width = 0.8 / len(chart.series)
    for i, one in enumerate(chart.series):
        shift = width * (i - (len(chart.series) - 1) / 2)
        axes.bar(
            [n + shift for n in range(len(names))],
            [value or 0.0 for value in one.y],
            width=width * 0.92,
            color=SERIES[i],
            hatch=("", "////")[i % 2],
            edgecolor=PAGE,
            linewidth=0,
            label=one.name,
        )
    letters = sum(len(str(name)) + 2 for name in names)
    stride = max(1 + (len(names) > 12), math.ceil(letters / LETTERS))
    last = len(names) - 1
    shown = [n for n in range(0, last, stride) if n <= last - stride] + [last]
    labels = ["n/a" if names[n] == "unreadable" else str(names[n]) for n in shown]
    axes.set_xticks(shown, labels)
    unreadable = " (n/a: unreadable)" if "unreadable" in names else ""
    axes.set_xlabel(chart.x_label + unreadable)
    axes.set_ylabel(chart.y_label)
    axes.grid(visible=False, axis="x")


def _draw_points(axes: Axes, chart: Chart) -> None:
    points, line = chart.series
    axes.scatter(
        points.x,
        [value or 0.0 for value in points.y],
        s=14,
        color=SERIES[0],
        alpha=0.35,
        linewidths=0,
        label=points.name,
    )
    axes.plot(
        line.x,
        [value or 0.0 for value in line.y],
        color=SERIES[1],
        marker="s",
        markersize=5,
        linewidth=2,
        label=line.name,
    )
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)


def _draw_stack(axes: Axes, chart: Chart) -> None:
    names = chart.series[0].x
    left = [0.0] * len(names)
    for i, one in enumerate(chart.series):
        values = [value or 0.0 for value in one.y]
        axes.barh(
            range(len(names)),
            values,
            left=left,
            height=0.62,
            color=SERIES[i % len(SERIES)],
            hatch=("", "///", "\\\\", "---")[i % 4],
            edgecolor=PAGE,
            linewidth=0.8,
            label=one.name,
        )
        left = [before + value for before, value in zip(left, values, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(chart.y_label)
    axes.grid(visible=False, axis="y")


_DRAW = {
    "lines": _draw_lines,
    "curves": _draw_curves,
    "bars": _draw_bars,
    "points": _draw_points,
    "stack": _draw_stack,
}


def _embedded(text: str, chart: Chart) -> str:
    """The bare element: no prologue, no fixed size, ids of its own, colours by variable."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    shape = box[1] if box else "0 0 360 240"
    # Groups that nothing refers to.
    rest = re.sub(r'<g id="[a-z]+[0-9]*[a-z]*(_[0-9]+)+">', "<g>", rest)
    rest = re.sub(r'\bid="', f'id="{chart.slug}-', rest)
    rest = rest.replace("url(#", f"url(#{chart.slug}-").replace('href="#', f'href="#{chart.slug}-')
    for color, variable in VARIABLES.items():
        rest = rest.replace(color, variable)
    label = f'role="img" aria-labelledby="{chart.slug}-title"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{shape}" {label}>{rest}'.strip()
    )
