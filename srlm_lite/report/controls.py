"""A run beside its controls: other runs from the same anchor, with one thing done otherwise.

A model that learns sharpens as well, and a mean may rise by that alone. What pairs drawn blindly or
turned round, a colder anchor or its judge's pick of several answers, SFT on the chosen replies or
one pass over all prompts reach as well, the loop has not brought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from srlm_lite.evaluate.judge_figures import ACCURACY
from srlm_lite.recipe import Recipe
from srlm_lite.report.answer import best, interval
from srlm_lite.report.charts import number
from srlm_lite.report.facts import Estimate, Facts, ModelFacts
from srlm_lite.run.files import in_short
from srlm_lite.run.run import RunDir
from srlm_lite.settings import Before, marked

KNOWN = {
    ("pairing.source", "random"): "pairs drawn blindly",
    ("pairing.source", "flipped"): "the judge's pairs turned round",
    ("pairing.source", "gold"): "pairs by the gold scorer, the upper bound",
    ("dpo.loss", "sft"): "SFT on the chosen replies alone",
}
"""Settings that make a run a control, and what it is called then."""

OTHERWISE = {
    ("dpo.init", "previous"): "the chain: each delta from the last one",
    ("dpo.init", "anchor"): "rebased: each delta from the anchor",
    ("pairing.accumulate", True): "on all pairs so far",
    ("pairing.accumulate", False): "on the last pairs alone",
}
"""Settings that make it another way to learn, and what that is called."""

NOT_COMPARED = ("name", "description", "iterations", "tracking", "compare", "mt_bench")
"""What decides nothing of what a run computes, or is told of in another way."""

MEASURING = ("base", "data", "evaluate", "seed")
"""Settings in which a control should be as the run is: else their figures are of other things."""

ADDED = "evaluate.best_of"
"""It adds a figure to the others, and changes none."""

SHOWN = 4
"""Other differing settings that a control's name has, at most."""


Kind = Literal["control", "bound", "other"]
"""A control; an upper bound, which nobody expects a run to pass; or another way to learn."""


@dataclass(frozen=True, slots=True)
class Control:
    """Another run, and in what it differs from the run."""

    facts: Facts
    differing: Mapping[str, tuple[Any, Any]]
    """By setting: the run's value, and the control's."""
    same_anchor: bool
    one_pass: bool
    """Whether it answers at once what the run answers in several iterations."""

    @property
    def name(self) -> str:
        """What it is, by what it does otherwise."""
        left = {key: both for key, both in self.differing.items() if key != ADDED}
        found = []
        if not self.trains:
            cold = left.pop("evaluate.temperature", None)
            found.append("the anchor" + ("" if cold is None else f" at temperature {cold[1]:g}"))
            left = {key: both for key, both in left.items() if key.split(".")[0] in MEASURING}
        for (key, value), name in (KNOWN | OTHERWISE).items():
            if key in left and left[key][1] == value:
                found.append(name)
                del left[key]
        if self.one_pass:
            found.append(f"one pass over all {left.pop('prompts.per_iteration')[1]} prompts")
        others = [f"{key} {in_short(theirs)}" for key, (_, theirs) in left.items()]
        more = [f"and {len(others) - SHOWN} more settings"] if len(others) > SHOWN else []
        return "; ".join([*found, *others[:SHOWN], *more]) or "the same settings"

    @property
    def kind(self) -> Kind:
        """A run that does something else otherwise, such as another method, is no control."""
        if self.differing.get("pairing.source", ("", ""))[1] == "gold":
            return "bound"
        does = {(key, theirs) for key, (_, theirs) in self.differing.items()}
        return "control" if does & KNOWN.keys() or self.one_pass or not self.trains else "other"

    @property
    def trains(self) -> bool:
        """Whether it goes on from the anchor at all."""
        return bool(self.facts.planned)

    @property
    def doubts(self) -> list[str]:
        """Why its figures are not those of the run with one thing done otherwise."""
        found = []
        if not self.same_anchor:
            found.append("it has another anchor")
        keys = [key for key in self.differing if key.split(".")[0] in MEASURING and key != ADDED]
        keys = [key for key in keys if self.trains or key != "evaluate.temperature"]
        if keys:
            found.append(f"measured otherwise: {', '.join(keys[:SHOWN])}")
        if not self.facts.is_finished:
            found.append("it is not finished")
        return found


def controls_of(facts: Facts) -> list[Control]:
    """The run's controls (`Facts.controls`), with what they do otherwise."""
    return [_control(facts, other) for other in facts.controls]


def _control(facts: Facts, other: Facts) -> Control:
    mine, theirs = (_settings(one) for one in (facts, other))
    differing = {
        key: (mine.get(key), theirs.get(key))
        for key in dict.fromkeys((*mine, *theirs))
        if mine.get(key) != theirs.get(key)
    }
    same = bool(facts.anchor_sha256) and facts.anchor_sha256 == other.anchor_sha256
    if same:
        differing = {key: value for key, value in differing.items() if key[:7] != "anchor."}
    all_prompts = (facts.finished or facts.planned) * mine["prompts.per_iteration"]
    one_pass = other.planned == 1 < facts.planned
    one_pass = one_pass and theirs["prompts.per_iteration"] == all_prompts
    return Control(other, differing, same, one_pass)


def _settings(facts: Facts) -> dict[str, Any]:
    """What decides a run, by dotted key, as `Recipe.identity` has it."""
    told = dict(_flat(RunDir(facts.where).recipe().identity()))
    for name, before in marked(Recipe, Before):  # an identity leaves out what was so before
        told.setdefault(name, before.value)
    return {key: value for key, value in told.items() if key.split(".")[0] not in NOT_COMPARED}


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(key, value)]
    return [
        one for name, below in value.items() for one in _flat(below, f"{key}.{name}".strip("."))
    ]


# --- what comes of it -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beside:
    """The run's best model beside a control's, each by the same rule."""

    name: str
    mine: Estimate
    theirs: Estimate
    kind: Kind = "control"
    doubts: tuple[str, ...] = ()

    @property
    def gap(self) -> Estimate:
        """How far the run is ahead."""
        return self.mine.minus(self.theirs)

    @property
    def told_apart(self) -> bool:
        """Whether the run is ahead by more than chance."""
        return self.gap.low is not None and self.gap.low > 0

    @property
    def text(self) -> str:
        """One line."""
        line = (
            f"{self.name}: {self.theirs.value:.2f} against {self.mine.value:.2f} here, "
            f"{self.gap.value:+.2f}{interval(self.gap)}"
        )
        return f"{line}; {', '.join(self.doubts)}" if self.doubts else line


def comparisons(facts: Facts) -> list[Beside]:
    """The run's best answers beside those of its controls, by gold, or else by the anchor's grades
    where the anchor is the same; and beside what M1's judge picks of several."""
    chosen = _chosen(facts)
    if chosen is None:
        return []
    found = []
    for control in controls_of(facts):
        theirs = _chosen(control.facts)
        if theirs is None:
            continue
        mine, other = chosen.gold, theirs.gold
        if control.same_anchor and not (mine and other):
            mine, other = chosen.anchor_score, theirs.anchor_score
        if mine and other:
            told = tuple(control.doubts)
            found.append(Beside(control.name, mine, other, control.kind, told))
    same = [control.facts for control in controls_of(facts) if control.same_anchor]
    for one in (facts, *same) if facts.controls else ():
        first = next((model for model in one.models if model.number == 0), None)
        if chosen.gold and first and first.best_of_gold:
            name = f"no training: M1's pick, as judge, of {first.policy['best_of']['n']} answers"
            found.append(Beside(name, chosen.gold, first.best_of_gold))
            break
    return found


def verdict(found: Sequence[Beside]) -> str:
    """What the controls say of what the loop has brought."""
    held = [one for one in found if one.kind == "control"]
    if not held:
        return (
            "None of these runs is a control with figures of its own: they do not tell whether the "
            "model learned or grew sharper."
        )
    level = [one.name for one in held if not one.told_apart]
    if not level:
        return "More than chance above every control: the rise is the loop's own."
    return (
        f"Not above {'; '.join(level)} by more than chance: what such a control reaches as well, "
        "the loop has not brought."
    )


COLUMNS = (
    "run", "model", "prompts", "pairs learned", "steps", "gold", "gold, greedy",
    "gold, best of several", "judge accuracy", "on own answers", "divergence", "characters",
)  # fmt: skip


def rows(facts: Facts) -> list[tuple[str, ...]]:
    """A row for each model of the run and of its controls, under `COLUMNS`; the first three count
    what led to the model, iterations before it included."""
    found = []
    runs = [("this run", facts), *((one.name, one.facts) for one in controls_of(facts))]
    for name, run in runs:
        prompts = pairs = steps = 0
        for model in run.models:
            made = model.stages.get("pairs", {})
            prompts += int(model.stages.get("prompts", {}).get("prompts", 0))
            pairs += sum(int(made.get(key, 0)) for key in ("pairs", "judge_pairs", "replayed"))
            steps += int(model.stages.get("delta", {}).get("steps", 0))
            if model.evaluation:
                counts = (prompts, pairs, steps) if model.number else ("", "", "")
                found.append((name, model.name, *map(str, counts), *_figures(model)))
    return found


def _figures(model: ModelFacts) -> tuple[str, ...]:
    policy = model.policy
    return (
        *(
            number(one.value if one else None)
            for one in (model.gold, model.greedy_gold, model.best_of_gold)
        ),
        number(ACCURACY.of(model.judge)),
        number(policy.get("self_gold_accuracy")),
        number(policy.get("divergence"), 3),
        number(policy.get("mean_length_chars"), 0),
    )


def _chosen(facts: Facts) -> ModelFacts | None:
    """The best iteration by what is measured, or the anchor where there is none."""
    return best(facts) or next((model for model in facts.measured if model.number == 0), None)
