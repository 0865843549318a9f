"""What each chart of a report shows, as plain values; the table behind it is the same values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean
from typing import Any, Literal

from srlm_lite.evaluate.judge_figures import READABLE, TIES, figures_of, notes
from srlm_lite.report.facts import Curve, Estimate, Facts, IterationFacts, ModelFacts, figure
from srlm_lite.settings import Dpo

Kind = Literal["lines", "curves", "bars", "stack", "points"]

MOST_POINTS = 300
"""Points that a scatter chart draws, at most; its line and its table are of all."""

STAGES = ("base", "anchor", "prompts", "candidates", "judgements", "pairs", "delta", "evaluation")
"""Stages in the order in which they run."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values along x; None where there is none. `low` and `high` bound an interval of each."""

    name: str
    x: tuple[Any, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()

    @property
    def has_intervals(self) -> bool:
        """Whether any value has one."""
        return any(value is not None for value in self.low)


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture and the table behind it."""

    slug: str
    title: str
    kind: Kind
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    note: str = ""
    y_range: tuple[float, float] | None = None
    digits: int = 2
    """Decimals in the table."""
    rows: tuple[tuple[str, ...], ...] | None = None
    """The table, head first, where it is not the series themselves."""

    @property
    def table(self) -> tuple[tuple[str, ...], ...]:
        """Head and rows as text."""
        if self.rows is not None:
            return self.rows
        head = [self.x_label]
        for one in self.series:
            head += [one.name, "95% interval"] if one.has_intervals else [one.name]
        places = list(dict.fromkeys(x for one in self.series for x in one.x))
        rows = [tuple(head)]
        for place in places:
            cells = [str(place)]
            for one in self.series:
                i = one.x.index(place) if place in one.x else None
                cells.append(number(None if i is None else one.y[i], self.digits))
                if one.has_intervals:
                    cells.append("" if i is None else self._interval(one, i))
            rows.append(tuple(cells))
        return tuple(rows)

    def _interval(self, one: Series, i: int) -> str:
        if one.low[i] is None:
            return ""
        return f"{number(one.low[i], self.digits)} to {number(one.high[i], self.digits)}"


@dataclass(frozen=True, slots=True)
class ChartGroup:
    """Charts that belong together."""

    slug: str
    title: str
    intro: str
    charts: tuple[Chart, ...]


def number(value: float | None, digits: int = 2) -> str:
    """Text of a number; empty where there is none."""
    return "" if value is None else f"{value:,.{digits}f}"


def groups(facts: Facts) -> list[ChartGroup]:
    """All charts of which the run has the values."""
    score, external = facts.words.judgement, facts.words.external
    found = [
        ChartGroup(
            "answers",
            "Answers",
            "Of each model on the same held-out prompts. Bars are 95% intervals over prompts.",
            _drawn(_gold(facts), _criteria(facts), _grades(facts), _lengths(facts)),
        ),
        ChartGroup(
            "duels",
            "Head to head",
            "Answers of two models to the same prompts, as srlm-lite compare had them judged: "
            "wins in percent, a tie is half a win. At 50 percent neither is better.",
            _drawn(*_duels(facts)),
        ),
        ChartGroup(
            "judging",
            "Judging",
            f"Of {'the judge, a server' if external else 'each model, as judge'}, on the same "
            "replies that humans or a gold scorer put in order.",
            _drawn(_agreement(facts), _correlation(facts), _lost_votes(facts)),
        ),
        ChartGroup(
            "scores",
            "Scores",
            f"What {'the judge, a server, gave' if external else 'each model gave, as judge,'} to "
            "held-out replies, whose quality does not change"
            + (", and to its own candidates" if any(it.votes for it in facts.iterations) else "")
            + ". One tall bar means that grades say little.",
            _drawn(*_histograms(facts)),
        ),
        ChartGroup(
            "length",
            f"Length against {score}",
            f"Each point is a candidate; the line is the mean {score} by fifths of the length. A "
            f"{'reward model' if score == 'reward' else 'judge'} that likes length for its own "
            "sake shows as a line that rises.",
            _drawn(*(_length_against_score(it, score) for it in facts.iterations)),
        ),
        ChartGroup(
            "pairs-made",
            "Pairs",
            "What became of each iteration's prompts.",
            _drawn(_kept(facts), _gold_order(facts)),
        ),
        ChartGroup(
            "training",
            "Training and time",
            "Rewards are DPO's implicit ones: beta times the log-ratio of policy to reference."
            if any(_is_dpo(curve) for it in facts.iterations for curve in it.curves)
            else "",
            _drawn(*_training(facts), *_rloo(facts), _seconds(facts)),
        ),
    ]
    return [group for group in found if group.charts]


def _drawn(*charts: Chart | None) -> tuple[Chart, ...]:
    return tuple(chart for chart in charts if chart is not None)


def _over_models(
    facts: Facts, name: str, value: Callable[[ModelFacts], Estimate | None]
) -> Series | None:
    """A value of every measured model, the base before them; None where no model has it."""
    models = [model for model in facts.models if model.evaluation]
    found = [value(model) for model in models]
    if not any(found):
        return None
    return Series(
        name,
        tuple(model.name for model in models),
        tuple(None if one is None else one.value for one in found),
        tuple(None if one is None else one.low for one in found),
        tuple(None if one is None else one.high for one in found),
    )


def _lines(
    facts: Facts,
    slug: str,
    title: str,
    y_label: str,
    values: Sequence[tuple[str, Callable[[ModelFacts], Estimate | None]]],
    **more: Any,
) -> Chart | None:
    found = [_over_models(facts, name, value) for name, value in values]
    series = tuple(one for one in found if one is not None)
    return Chart(slug, title, "lines", "model", y_label, series, **more) if series else None


def _gold(facts: Facts) -> Chart | None:
    return _lines(
        facts,
        "gold",
        "Gold score",
        "gold score",
        [("sampled", lambda model: model.gold), ("greedy", lambda model: model.greedy_gold)],
        note=f"By {facts.gold_name}, which the policy never sees.",
    )


def _criteria(facts: Facts) -> Chart | None:
    names = dict.fromkeys(
        name for model in facts.models for name in model.policy.get("gold_by_criterion") or {}
    )
    if len(names) < 2:
        return None

    def points(name: str) -> Callable[[ModelFacts], Estimate | None]:
        return lambda model: Estimate.of(
            (model.policy.get("gold_by_criterion") or {}).get(name), None
        )

    return _lines(
        facts,
        "criteria",
        "Gold score by criterion",
        "mean points",
        [(name, points(name)) for name in names],
        note="Sampled answers.",
    )


def _grades(facts: Facts) -> Chart | None:
    return _lines(
        facts,
        "grades",
        "Grades of its answers",
        "mean score",
        [
            ("by the anchor", lambda model: model.anchor_score),
            ("by itself", lambda model: model.self_score),
        ],
        note="The anchor is a judge that does not drift: a model that rises by itself alone has "
        "learned to please itself.",
    )


def _lengths(facts: Facts) -> Chart | None:
    made = _lines(
        facts,
        "length-by-model",
        "Length",
        "characters",
        [
            ("answers", lambda m: figure(m.policy, "mean_length_chars")),
            (
                "greedy answers",
                lambda m: figure(m.policy.get("greedy") or {}, "mean_length_chars"),
            ),
        ],
        digits=0,
    )
    series = list(made.series) if made else []
    paired = {
        it.number: [one.record for one in it.pairs if not one.record.origin]
        for it in facts.iterations
    }
    for side in ("chosen", "rejected"):
        means = {
            f"M{t}": fmean(len(getattr(record, side)) for record in records)
            for t, records in paired.items()
            if records
        }
        if means:
            series.append(Series(side, tuple(means), tuple(means.values())))
    if not series:
        return None
    return Chart(
        "length-by-model",
        "Length",
        "lines",
        "model",
        "characters",
        tuple(series),
        note="Means."
        + (
            " Chosen and rejected: of the pairs that this model was trained on next."
            if any(paired.values())
            else ""
        ),
        digits=0,
    )


def _duels(facts: Facts) -> list[Chart]:
    """For each baseline, the win rates of the run's iterations against it by each judge.

    Where a judge has decided on the same two models twice, the one on more prompts counts.
    """
    several = len({duel.result.get("source") for duel in facts.duels}) > 1
    against: dict[str, dict[str, dict[int, Estimate]]] = {}
    for duel in sorted(facts.duels, key=lambda one: one.prompts):
        if duel.iteration is None:
            continue
        judge = f"by {duel.judge}" + (f", {duel.result.get('source')}" if several else "")
        rates = against.setdefault(duel.baseline, {})
        for name, rate in (
            (judge, duel.win_rate),
            (f"{judge}, length-controlled", duel.length_controlled),
        ):
            if rate is not None:
                rates.setdefault(name, {})[duel.iteration] = rate
    return [
        Chart(
            f"duels-{i}",
            f"Win rate against {baseline}",
            "lines",
            "model",
            "percent of prompts",
            tuple(_by_iteration(name, rates) for name, rates in by_judge.items()),
            y_range=(0, 100),
            digits=1,
        )
        for i, (baseline, by_judge) in enumerate(against.items(), start=1)
    ]


def _by_iteration(name: str, values: Mapping[int, Estimate]) -> Series:
    found = sorted(values.items())
    return Series(
        name,
        tuple(f"M{t + 1}" for t, _ in found),
        tuple(one.value for _, one in found),
        tuple(one.low for _, one in found),
        tuple(one.high for _, one in found),
    )


def _figure(key: str) -> Callable[[ModelFacts], Estimate | None]:
    """A figure of the judge."""
    return lambda model: figure(model.judge, key)


def _own_accuracy(model: ModelFacts) -> float | None:
    """Accuracy of what ordered the candidates from which this model was trained."""
    known = [model.stages.get(stage, {}) for stage in ("judgements", "delta")]
    values = [row.get("gold_pairwise_accuracy") for row in known]
    return next((value for value in values if value is not None), None)


def _agreement(facts: Facts) -> Chart | None:
    chart = _lines(
        facts,
        "agreement",
        "Agreement with the right order",
        "share",
        [(one.label, _figure(one.key)) for one in figures_of("agreement")],
        note=notes("agreement"),
        y_range=(0, 1),
    )
    own = [
        (f"M{model.number}", value)
        for model in facts.models
        if model.number and (value := _own_accuracy(model)) is not None
    ]
    if chart is None or not own:
        return chart
    series = Series(facts.words.own_accuracy, *map(tuple, zip(*own, strict=True)))
    return replace(chart, series=(*chart.series, series))


def _correlation(facts: Facts) -> Chart | None:
    return _lines(
        facts,
        "correlation",
        "Rank correlation",
        "correlation",
        [(one.label, _figure(one.key)) for one in figures_of("correlation")],
        note="Of scores with the right order, for each prompt, averaged.",
        y_range=(-0.25, 1),
    )


def _lost_votes(facts: Facts) -> Chart | None:
    def unreadable(model: ModelFacts) -> Estimate | None:
        rate = READABLE.of(model.judge)
        return None if rate is None else Estimate(1 - rate)

    return _lines(
        facts,
        "lost-votes",
        "Ties and unreadable votes",
        "share",
        [(TIES.label, _figure(TIES.key)), ("unreadable", unreadable)],
        note=f"Ties: {TIES.note}.",
        y_range=(0, 1),
    )


def _histograms(facts: Facts) -> list[Chart]:
    """For each model as judge: shares of the votes by score."""
    own = {it.number - 1: it.votes for it in facts.iterations if it.votes}
    charts = []
    for model in facts.models:
        held_out = model.judge.get("score_histogram") or {}
        sides = [
            ("held-out replies", held_out),
            ("own candidates", own.get(model.number, {}) if model.number is not None else {}),
        ]
        sides = [(name, counts) for name, counts in sides if sum(counts.values())]
        if not sides:
            continue
        scores = sorted(
            {score for _, counts in sides for score in counts if score != "unreadable"}, key=float
        )
        bins = (*scores, "unreadable")
        charts.append(
            Chart(
                f"scores-{model.name}",
                facts.words.as_judge(model.name),
                "bars",
                "score",
                "share of votes",
                tuple(
                    Series(
                        f"{name} ({sum(counts.values()):,} votes)",
                        bins,
                        tuple(counts.get(score, 0) / sum(counts.values()) for score in bins),
                    )
                    for name, counts in sides
                ),
                digits=3,
            )
        )
    return charts


def _length_against_score(iteration: IterationFacts, score: str) -> Chart | None:
    scored = sorted(iteration.scored)
    if len(scored) < 10:
        return None
    shown = scored
    if len(scored) > MOST_POINTS:
        shown = sorted(Random(0).sample(scored, MOST_POINTS))
    fifths = [scored[len(scored) * i // 5 : len(scored) * (i + 1) // 5] for i in range(5)]
    means = [(fmean(n for n, _ in part), fmean(s for _, s in part)) for part in fifths]
    note = f"{len(scored):,} candidates of M{iteration.number}"
    if len(shown) < len(scored):
        note += f", {len(shown)} of them drawn"
    defined = len({n for n, _ in scored}) > 1 and len({s for _, s in scored}) > 1
    if defined:
        from scipy.stats import spearmanr

        rank = float(spearmanr([n for n, _ in scored], [s for _, s in scored]).statistic)
        note += f"; Spearman correlation {rank:+.2f}"
    rows = [("characters", "candidates", f"mean {score}")]
    rows += [
        (f"{part[0][0]} to {part[-1][0]}", str(len(part)), number(mean))
        for part, (_, mean) in zip(fifths, means, strict=True)
    ]
    return Chart(
        f"length-{iteration.number}",
        f"Iteration {iteration.number}",
        "points",
        "characters",
        score if score == "reward" else f"mean {score}",
        (
            Series("candidates", tuple(n for n, _ in shown), tuple(s for _, s in shown)),
            Series("mean by fifths", tuple(n for n, _ in means), tuple(s for _, s in means)),
        ),
        note=note + ".",
        rows=tuple(rows),
    )


def _stack(
    slug: str,
    title: str,
    unit: str,
    places: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    **more: Any,
) -> Chart | None:
    shown = [(name, values) for name, values in parts if any(values)]
    series = tuple(Series(name, tuple(places), tuple(values)) for name, values in shown)
    return Chart(slug, title, "stack", "", unit, series, **more) if series else None


def _kept(facts: Facts) -> Chart | None:
    made = [it for it in facts.iterations if it.pairs or it.drops]
    reasons = dict.fromkeys(
        reason
        for reason, _ in sorted(
            ((reason, n) for it in made for reason, n in it.drops.items()), key=lambda one: -one[1]
        )
    )
    parts: list[tuple[str, list[float]]] = [("with a pair", [it.paired_prompts for it in made])]
    parts += [
        (reason.replace("_", " "), [it.drops.get(reason, 0) for it in made]) for reason in reasons
    ]
    counts = ", ".join(f"{len(it.pairs):,} in iteration {it.number}" for it in made)
    return _stack(
        "kept",
        "Prompts with a pair, and why others have none",
        "prompts",
        [f"iteration {it.number}" for it in made],
        parts,
        note=f"Pairs, replayed ones included: {counts}.",
        digits=0,
    )


def _gold_order(facts: Facts) -> Chart | None:
    found = [
        (model.number, agreement)
        for model in facts.models
        if model.number and (agreement := model.stages.get("pairs", {}).get("gold_agreement"))
    ]
    names = {"right": "in the gold order", "tied": "tied in gold", "reversed": "reversed"}
    return _stack(
        "gold-order",
        "Pairs held against gold",
        "pairs",
        [f"iteration {n}" for n, _ in found],
        [(name, [counts.get(key, 0) for _, counts in found]) for key, name in names.items()],
        note="Whether the gold scorer prefers the chosen reply too.",
        digits=0,
    )


def _training(facts: Facts) -> list[Chart | None]:
    """Loss and rewards by step; from runs that kept no steps, what their end says."""
    curves = [(it.number, curve) for it in facts.iterations for curve in it.curves if curve.steps]

    def named(n: int, curve: Curve) -> str:
        return f"iteration {n}" + ("" if curve.name == "delta" else f", {curve.name}")

    def chart(slug: str, title: str, key: str, note: str, **more: Any) -> Chart | None:
        series = tuple(
            Series(
                named(n, curve),
                tuple(row.step for row in curve.steps),
                tuple(getattr(row, key) for row in curve.steps),
            )
            for n, curve in curves
        )
        if not series:
            return None
        return Chart(
            slug, title, "curves", "step", title.lower(), series, note=note, digits=4, **more
        )

    if not curves:
        return [_ends(facts)]
    return [
        chart("dpo-loss", "Loss", "loss", _of_equals(facts)),
        chart("dpo-margin", "Reward margin", "reward_margin", "Chosen above rejected."),
        chart(
            "dpo-accuracy",
            "Reward accuracy",
            "reward_accuracy",
            "Share of a step's pairs with a positive margin.",
            y_range=(0, 1),
        ),
    ]


def _of_equals(facts: Facts) -> str:
    settings = facts.settings["dpo"]
    equal = Dpo(beta=settings["beta"], loss=settings.get("loss", "sigmoid")).loss_of_equals
    if equal is None:
        return ""
    named = "ln 2 = 0.693" if equal == math.log(2) else f"{equal:.4g}"
    return f"{named} is where policy and reference agree."


def _is_dpo(curve: Curve) -> bool:
    """Whether it is a DPO training; SFT and RLOO have no margin."""
    return "reward_margin" in curve.facts


def _ends(facts: Facts) -> Chart | None:
    ended = [
        (f"iteration {it.number}", curve.facts)
        for it in facts.iterations
        for curve in it.curves
        if curve.name == "delta" and _is_dpo(curve)
    ]
    keys = {
        "last_loss": "loss",
        "reward_accuracy": "reward accuracy",
        "reward_margin": "reward margin",
    }
    series = tuple(
        Series(name, tuple(x for x, _ in ended), tuple(end.get(key) for _, end in ended))
        for key, name in keys.items()
        if any(end.get(key) is not None for _, end in ended)
    )
    if not series:
        return None
    return Chart(
        "dpo-end",
        "DPO at its end",
        "lines",
        "iteration",
        "mean of the last steps",
        series,
        note="Means over the last quarter of the steps; this run did not keep the steps.",
        digits=4,
    )


def _rloo(facts: Facts) -> list[Chart | None]:
    """What an on-policy training began and ended with."""
    ended = [
        (f"iteration {it.number}", curve.facts)
        for it in facts.iterations
        for curve in it.curves
        if "last_reward" in curve.facts
    ]

    def chart(slug: str, title: str, unit: str, parts: Mapping[str, str], note: str) -> Chart:
        places = tuple(place for place, _ in ended)
        series = tuple(
            Series(name, places, tuple(end.get(key) for _, end in ended))
            for key, name in parts.items()
        )
        return Chart(slug, title, "lines", "iteration", unit, series, note=note, digits=3)

    if not ended:
        return []
    return [
        chart(
            "rloo-reward",
            "Reward",
            "mean reward",
            {"first_reward": "first steps", "last_reward": "last steps"},
            "Of the answers that the policy drew while it trained, by the frozen reward model. A "
            "reward that rises while gold falls is a reward model used up.",
        ),
        chart(
            "rloo-divergence",
            "Divergence from the reference",
            "nats a token",
            {"kl": "last steps"},
            "At the end of the training. Far from the reference the reward model knows little.",
        ),
    ]


def _seconds(facts: Facts) -> Chart | None:
    models = [model for model in facts.models if model.stages]
    words = facts.words
    names = {"delta": words.training}
    if words.judging != "judging":
        names["judgements"] = words.judging
    stages = dict.fromkeys(
        (*STAGES, *(stage for model in models for stage in model.stages)),
    )
    return _stack(
        "seconds",
        "Seconds by stage",
        "seconds",
        [f"iteration {model.number}" if model.number else "anchor" for model in models],
        [
            (
                names.get(stage, stage),
                [float(model.stages.get(stage, {}).get("seconds", 0.0)) for model in models],
            )
            for stage in stages
        ],
        note="Of a stage that was stopped and resumed, the last start.",
        digits=1,
    )
