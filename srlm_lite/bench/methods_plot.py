"""The bench of the methods as one picture: gold by model, a panel for each group of cases."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from srlm_lite.bench.methods import GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "srlm-lite",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}

COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#806000", "#56555a")
"""As many as a group has cases, told apart with any colour vision."""

MARKERS = "osD^vP"

BESIDE = ("self-rewarding", "random pairs")
"""What every panel shows in grey, to compare with."""

LABEL_HEIGHT = 0.053
"""The height of a label, as a share of a panel's."""


def plot(result: Mapping[str, Any]) -> str:
    """Gold of sampled answers by model as SVG, M0 the bare base; bars are the spread over seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    bare = result["base"]["summary"]["gold"]
    cases = {
        name: _Line([bare, *found["gold"]], [None, *found["gold_spread"]])
        for name, case in result["cases"].items()
        for found in [case["summary"]]
    }
    groups = {
        title: [name for name in group if name in cases]
        for title, group in GROUPS.items()
        if any(name in cases for name in group)
    }
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    values = [value for line in cases.values() for value in line.ends]
    low, high = min(values), max(values)
    room = 0.05 * (high - low or 1.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * columns, 3.9 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes, (title, names) in zip(panels, groups.items(), strict=False):
            axes.set_ylim(low - room, high + room)
            axes.tick_params(labelleft=True)
            _panel(axes, title, names, cases)
        for axes in panels[len(groups) :]:
            axes.set_axis_off()
        seeds = result["seeds"]
        spread = f"means over {seeds} seeds, bars one standard deviation" if seeds > 1 else "1 seed"
        figure.suptitle(f"Gold of sampled answers by model, 0 to 5; {spread}", x=0.01, ha="left")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


@dataclass(frozen=True, slots=True)
class _Line:
    """A case's gold by model, the bare base first, and its spread over seeds."""

    gold: Sequence[float | None]
    spread: Sequence[float | None]

    @property
    def points(self) -> list[tuple[int, float, float]]:
        """Model, gold, spread; what was not measured is left out."""
        both = enumerate(zip(self.gold, self.spread, strict=True))
        return [(t, value, spread or 0.0) for t, (value, spread) in both if value is not None]

    @property
    def ends(self) -> list[float]:
        return [value + sign * spread for _, value, spread in self.points for sign in (-1, 1)]


def _panel(axes: Axes, title: str, names: Sequence[str], cases: Mapping[str, _Line]) -> None:
    axes.set_title(title)
    beside = [name for name in BESIDE if name in cases and name not in names]
    models = max(len(cases[name].gold) for name in names)
    ends: dict[str, tuple[float, str]] = {}
    for i, name in enumerate([*beside, *names]):
        own = i - len(beside)
        color = COLORS[own] if own >= 0 else "#999999"
        t, gold, spread = zip(*cases[name].points, strict=True)
        # A little apart, so that the bars do not cover each other.
        shift = 0.06 * (own - (len(names) - 1) / 2) if own >= 0 else 0.0
        axes.errorbar(
            [place + shift * (place > 0) for place in t],
            gold,
            yerr=spread if own >= 0 else None,
            color=color,
            marker=MARKERS[own] if own >= 0 else "",
            markersize=4.5,
            linewidth=1.6 if own >= 0 else 1.2,
            elinewidth=1.0,
            capsize=2,
        )
        ends[name] = gold[-1], color
    axes.set_xticks(range(models), [f"M{t}" for t in range(models)])
    # Room for the labels to the right of the last model.
    axes.set_xlim(-0.25, (models - 1) * 1.75)
    bottom, top = axes.get_ylim()
    places = apart({name: gold for name, (gold, _) in ends.items()}, LABEL_HEIGHT * (top - bottom))
    for name, (value, color) in ends.items():
        axes.annotate(
            name,
            (models - 0.8, value),
            xytext=(models - 0.55, places[name]),
            color=color,
            va="center",
            # From the label's left edge: from its middle the line would cross its neighbours.
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "relpos": (0.0, 0.5),
                "shrinkA": 0,
            },
        )


def apart(values: Mapping[str, float], least: float) -> dict[str, float]:
    """Places for labels at these heights, in their order and at least so far apart.

    Labels that would touch share out the room around their mean.
    """
    groups: list[tuple[list[str], float]] = []
    for name in sorted(values, key=lambda name: values[name]):
        groups.append(([name], values[name]))
        while len(groups) > 1:
            (below, low), (above, high) = groups[-2:]
            if high - low >= least * (len(below) + len(above)) / 2:
                break
            both = [*below, *above]
            groups[-2:] = [(both, sum(values[name] for name in both) / len(both))]
    return {
        name: middle + least * (i - (len(names) - 1) / 2)
        for names, middle in groups
        for i, name in enumerate(names)
    }
