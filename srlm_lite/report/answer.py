"""What a reader wants to know first: did it improve, by how much, at what cost, and what now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from srlm_lite.evaluate.gate import Best, best_model, findings
from srlm_lite.evaluate.judge_figures import ACCURACY, TIES
from srlm_lite.evaluate.reading import anchor_doubts, doubts
from srlm_lite.report.facts import Duel, Estimate, Facts, ModelFacts
from srlm_lite.settings import Gate

LENGTH_GROWTH = 1.3
"""Answers longer than the anchor's by this factor are told where no grades of the anchor tell
whether they are better as well: judges like length for its own sake."""

MADE = (
    ("candidates", "candidates"),
    ("delta", "drawn"),
    ("judgements", "judgements"),
    ("judgements", "revisions"),
    ("judgements", "labels"),
    ("pairs", "pairs"),
)
"""Stages and what `metrics.jsonl` says they made."""

Improved = Literal["yes", "no", "unclear", "unknown"]


@dataclass(frozen=True, slots=True)
class Headline:
    """The top of a report."""

    improved: Improved
    headline: str
    by_how_much: tuple[str, ...]
    cost: tuple[str, ...]
    export: tuple[str, ...]
    worries: tuple[str, ...]


def answer(facts: Facts) -> Headline:
    """What the run's figures say, with their uncertainty, and no more than they say."""
    improved, headline, by_how_much = _improvement(facts)
    return Headline(
        improved,
        headline,
        by_how_much,
        _cost(facts),
        _export(facts),
        tuple(worries(facts)),
    )


def best(facts: Facts) -> ModelFacts | None:
    """The finished iteration of the best answers, or the last one where nothing tells them apart.

    None before one has been measured.
    """
    models, found = _ranked(facts)
    made = [model for model in models if model.number]
    if found is None or not made:
        return made[-1] if made else None
    sound = [models[place] for place in found.ranked if models[place].number]
    return sound[0] if sound else max(made, key=lambda model: float(model.policy[found.figure]))


Standing = Literal["ahead", "alike", "behind"]


def anchor_beside_best(facts: Facts) -> Standing | None:
    """How M1 stands beside the best iteration, by what was measured; alike: within chance of it.

    None where nothing tells.
    """
    models, found = _ranked(facts)
    chosen = best(facts)
    if found is None or chosen is None:
        return None
    places = {model.number: place for place, model in enumerate(models)}
    anchor, iteration = places.get(0), places[chosen.number]
    if found.place == anchor:
        return "alike" if iteration in found.alike else "ahead"
    return "alike" if anchor in found.alike else "behind"


def _ranked(facts: Facts) -> tuple[list[ModelFacts], Best | None]:
    """The finished models, and the best of them as the run's end names it."""
    models = [model for model in facts.measured if model.is_done]
    return models, best_model([_evaluation(model) for model in models], _gate(facts))


def _evaluation(model: ModelFacts) -> Mapping[str, Any]:
    return {"judge": model.judge, "policy": model.policy}


def _gate(facts: Facts) -> Gate:
    return Gate.model_validate((facts.settings.get("evaluate") or {}).get("gate") or {})


def _improvement(facts: Facts) -> tuple[Improved, str, tuple[str, ...]]:
    models = facts.measured
    first, chosen = (models[0] if models else None), best(facts)
    if first is None or first.number != 0:
        return "unknown", "Nothing is measured yet.", ()
    if chosen is None:
        text = "No iteration is finished and measured yet: there is only the anchor."
        return "unknown", text, (_standing(first),)
    details = [*_sides(first, chosen)]
    duel = _duel(facts, chosen)
    if (first.gold is None or chosen.gold is None) and duel and duel.win_rate:
        return _by_duel(duel, duel.win_rate, chosen, details)
    if first.gold is None or chosen.gold is None:
        return _by_grades(first, chosen, details)
    difference = chosen.gold.minus(first.gold)
    rose = (
        f"gold score {first.gold.value:.2f} ({first.name}) to {chosen.gold.value:.2f} "
        f"({chosen.name}): {difference.value:+.2f}{interval(difference)}"
    )
    if difference.low is None or difference.high is None:
        return "unclear", f"Not shown: {rose}, with no interval to hold it against.", tuple(details)
    if difference.low > 0:
        return "yes", f"Yes: {rose}.", (*details, *_caution(facts))
    if difference.high < 0:
        return "no", f"No, it got worse: {rose}.", tuple(details)
    return "unclear", f"Not shown: {rose}. The interval includes no change.", tuple(details)


def _by_grades(
    first: ModelFacts, chosen: ModelFacts, details: list[str]
) -> tuple[Improved, str, tuple[str, ...]]:
    """Without gold and without a head to head there is only what a judge of the run says."""
    unknown = "Not known: the recipe names no gold scorer, and the judge's own grades cannot tell."
    advice = f"compare {first.name} and {chosen.name} head to head: srlm-lite compare"
    if first.anchor_score is None or chosen.anchor_score is None:
        return "unknown", unknown, (*details, advice)
    difference = chosen.anchor_score.minus(first.anchor_score)
    graded = (
        f"the anchor, as a judge that does not drift, grades {chosen.name}'s answers "
        f"{difference.value:+.2f} against {first.name}'s{interval(difference)}"
    )
    return "unknown", f"Not known from outside; {graded}.", (*details, advice)


def _duel(facts: Facts, model: ModelFacts) -> Duel | None:
    """A head to head of the model with the anchor: by a judge from outside, if there is one.

    Of several by such judges, the one on the most prompts: a trial on a few tells least.
    """
    found = [one for one in facts.duels if one.iteration == model.number]
    found = [one for one in found if one.baseline == "anchor" and one.win_rate]
    return min(found, key=lambda one: (_is_of_the_run(one), -one.prompts), default=None)


def _is_of_the_run(duel: Duel) -> bool:
    return duel.judge == "anchor" or duel.judge.startswith("iteration ")


def _by_duel(
    duel: Duel, rate: Estimate, model: ModelFacts, details: list[str]
) -> tuple[Improved, str, tuple[str, ...]]:
    wins = f"{model.name} wins {rate.value:.0f}% of the prompts against M1"
    if rate.low is not None and rate.high is not None:
        wins += f" (95% interval {rate.low:.0f} to {rate.high:.0f})"
    wins += f", judged by {duel.judge}"
    fair = duel.length_controlled
    if fair:
        details = [f"length-controlled: {fair.value:.0f}%", *details]
    elif why := duel.result.get("lengths_do_not_tell"):
        details = [f"no length-controlled rate: lengths do not tell, for {why}", *details]
    if _is_of_the_run(duel):
        details = [*details, "the judge is a model of this run: it may like its own style"]
    if rate.low is not None and rate.low > 50:
        return "yes", f"Yes: {wins}.", tuple(details)
    if rate.high is not None and rate.high < 50:
        return "no", f"No, it got worse: {wins}.", tuple(details)
    return "unclear", f"Not shown: {wins}.", tuple(details)


def interval(estimate: Estimate) -> str:
    """The interval in brackets, or nothing."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f" (95% interval {estimate.low:+.2f} to {estimate.high:+.2f})"


def _standing(model: ModelFacts) -> str:
    gold = f"gold score {model.gold.value:.2f}" if model.gold else "no gold score"
    accuracy = ACCURACY.of(model.judge)
    return f"{model.name}: {gold}" + (
        f", judge's {ACCURACY.label} {accuracy:.2f}" if accuracy is not None else ""
    )


def _sides(first: ModelFacts, chosen: ModelFacts) -> list[str]:
    """Other figures from the first to the chosen model."""
    found = []
    if first.greedy_gold and chosen.greedy_gold:
        difference = chosen.greedy_gold.minus(first.greedy_gold)
        found.append(
            f"greedy answers: gold {first.greedy_gold.value:.2f} to "
            f"{chosen.greedy_gold.value:.2f}, {difference.value:+.2f}{interval(difference)}"
        )
    found += _change(
        first.policy, chosen.policy, "anchor_score", "its answers, graded by the anchor:", 2
    )
    for one in (ACCURACY, TIES):
        found += _change(first.judge, chosen.judge, one.key, f"as judge: {one.label}", 2)
    found += _change(
        first.policy, chosen.policy, "mean_length_chars", "length of its answers, characters", 0
    )
    return found


def _change(
    before: Mapping[str, Any], after: Mapping[str, Any], key: str, name: str, digits: int
) -> list[str]:
    a, b = before.get(key), after.get(key)
    if a is None or b is None:
        return []
    return [f"{name} {a:.{digits}f} to {b:.{digits}f}"]


def _caution(facts: Facts) -> list[str]:
    found = []
    tried = sum(1 for model in _ranked(facts)[0] if model.number)
    if tried > 1:
        found.append(
            f"the best of {tried} iterations, picked on the prompts it is measured on: expect a "
            "little less on new ones; one seed"
        )
    if not facts.controls:
        found.append(
            "any training sharpens a model: whether the judge has taught it something, a control "
            "tells, such as pairs drawn blindly (report --control)"
        )
    return found


def _cost(facts: Facts) -> tuple[str, ...]:
    words = facts.words
    parts = dict.fromkeys(("sampling", words.judging, "training", "evaluation", "the rest"), 0.0)
    names = {
        "candidates": "sampling",
        "judgements": words.judging,
        "delta": "training",
        "anchor": "training",
        "evaluation": "evaluation",
    }
    for model in facts.models:
        for stage, row in model.stages.items():
            parts[names.get(stage, "the rest")] += float(row.get("seconds", 0.0))
    total = sum(parts.values())
    if not total:
        return ("no stage is finished yet",)
    shares = ", ".join(
        f"{name} {value / total:.0%}"
        for name, value in sorted(parts.items(), key=lambda one: -one[1])
        if value / total >= 0.01
    )
    found = [f"{duration(total)}: {shares}"]
    machine = hardware(facts)
    if machine:
        found.append(f"on {machine}")
    counts = {
        key: sum(int(model.stages.get(stage, {}).get(key, 0)) for model in facts.models)
        for stage, key in MADE
    }
    called = {"candidates": words.candidates, "drawn": "answers drawn in training"}
    made = [f"{n:,} {called.get(key, key)}" for key, n in counts.items() if n]
    if made:
        found.append(", ".join(made))
    return tuple(found)


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def hardware(facts: Facts) -> str:
    """The machine of the run, where `run.json` says it."""
    machine = facts.run.get("hardware") or {}
    gpus = [f"{gpu['name']} ({gpu['gigabytes']:g} GB)" for gpu in machine.get("gpus") or []]
    if gpus:
        return ", ".join(gpus)
    if not machine.get("cores"):
        return ""
    cores = f"{machine['cores']} cores"
    return f"{cores}, {machine['processor']}" if machine.get("processor") else cores


def _export(facts: Facts) -> tuple[str, ...]:
    chosen = best(facts)
    if chosen is None:
        return ("Nothing yet: no iteration is finished.",)
    models, found = _ranked(facts)
    last = models[-1]
    if found is None:
        return (
            f"{chosen.name}, iteration {chosen.number}: it is the last one; nothing that was "
            "measured says that it is the best.",
        )
    by = {"gold_mean": "gold score", "anchor_score": "score by the anchor"}[found.figure]
    if models[found.place] is not chosen:
        which = "iteration" if len(found.ranked) == len(models) else "iteration that is sound"
        return (
            f"None: no {which} has a higher {by} than {models[found.place].name}.",
            f"The best of them is {chosen.name}, iteration {chosen.number}.",
        )
    why = f"it has the highest {by}"
    why += ", and is the last one" if chosen is last else f"; {last.name} is the last one"
    lines = [f"{chosen.name}, iteration {chosen.number}: {why}."]
    if found.alike:
        alike = ", ".join(models[place].name for place in found.alike)
        lines.append(f"Within chance of it: {alike}.")
    return tuple(lines)


def worries(facts: Facts) -> list[str]:
    """What in the run bodes ill, each with the model that it shows in."""
    found = _reading(facts)
    history: list[Mapping[str, Any]] = []
    gate = _gate(facts)
    for model in facts.measured:
        if model.judge:
            history.append(model.evaluation)
            found += [f"{model.name}: {one.text}" for one in findings(history, gate)]
    lengths = [model.policy.get("mean_length_chars") for model in facts.measured]
    graded = any(model.anchor_score for model in facts.measured)
    if (
        not graded
        and lengths[:1]
        and lengths[0]
        and (lengths[-1] or 0) > LENGTH_GROWTH * lengths[0]
    ):
        found.append(
            f"answers grew from {lengths[0]:.0f} to {lengths[-1]:.0f} characters on average: part "
            "of what a judge prefers here may be length"
        )
    source = (facts.settings.get("pairing") or {}).get("source")
    if source in ("random", "flipped"):
        made = "drawn blindly" if source == "random" else "turned round"
        found.append(f"the pairs were {made}: this is a control, not a self-rewarding model")
    return found


def _reading(facts: Facts) -> list[str]:
    """What the base and the anchor's training made of the run's data."""
    stages = next((model.stages for model in facts.models if model.number == 0), {})
    reading, training = stages.get("base", {}), stages.get("anchor", {})
    return [*doubts(reading), *anchor_doubts(reading, training)]
