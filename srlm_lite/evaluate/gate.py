"""Gates: is a model worse than the recipe allows? And which model of a run is the best?

Gold scores are for experiments; most runs have none. What then tells that a rising judge score is
no gain is a yardstick that does not move: the anchor in the judge's role grades the answers of
every model to the same held-out prompts (`policy.anchor_score`), beside the model's own grades
(`policy.self_score`). It is blind to what it was always blind to, but it cannot drift along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isnan
from statistics import NormalDist
from typing import Any

from srlm_lite.evaluate.judge_figures import ACCURACY, READABLE
from srlm_lite.evaluate.judge_metrics import collapsed_score
from srlm_lite.settings import Gate

CHANCE = 0.05
"""How likely a model no worse than the anchor may be told to have lost a criterion."""

Evaluation = Mapping[str, Any]
"""What `eval.json` holds."""


@dataclass(frozen=True, slots=True)
class FailedGate:
    """A gate that a model does not pass: what happened, and what to try."""

    gate: str
    text: str


def findings(evaluations: Sequence[Evaluation], gate: Gate) -> list[FailedGate]:
    """The gates that the last of a run's models does not pass.

    Args:
        evaluations: Of the models in order, the anchor first. What was not measured is not
            compared.
    """
    *before, now = evaluations
    return [
        FailedGate(check.__name__.lstrip("_"), text)
        for check in CHECKS
        for text in check(before, now, gate)
    ]


Check = Callable[[Sequence[Evaluation], Evaluation, Gate], Iterator[str]]


def _one_score(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    score = collapsed_score(now["judge"]["score_histogram"], share=gate.one_score)
    if score is not None:
        yield (
            f"the judge gives nearly every reply the score {score}: its grades have collapsed "
            "and say nothing; look at `srlm-lite show judgements`, and give the anchor more judge "
            "data, or a finer rubric"
        )


def _readable(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    readable = READABLE.of(now["judge"])
    if readable is not None and readable < gate.readable:
        yield (
            f"only {readable:.0%} of the judge's votes can be read: give the anchor "
            "more judge data, or raise judge.max_new_tokens"
        )


def _judge_accuracy(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    known = [ACCURACY.of(each["judge"]) for each in before]
    best = max((value for value in known if value is not None), default=None)
    accuracy = ACCURACY.of(now["judge"])
    if best is None or accuracy is None:
        return
    # Two standard errors of a share near one half: fewer pairs, more patience.
    chance = 1 / now["judge"]["pairs"] ** 0.5
    if best - accuracy > max(gate.judge_accuracy, chance):
        yield (
            f"the judge's pairwise accuracy fell from {best:.2f} to {accuracy:.2f}: later "
            "iterations learn from worse grades; lower dpo.learning_rate, or set dpo.init=anchor"
        )


def _position_consistency(
    before: Sequence[Evaluation], now: Evaluation, gate: Gate
) -> Iterator[str]:
    found = now["judge"].get("position_consistency")
    if found is not None and found < gate.position_consistency:
        first = now["judge"].get("first_wins")
        which = f"; {first:.0%} of its verdicts are for the one shown first" if first else ""
        yield (
            f"in only {found:.0%} of its comparisons the judge names the same reply in both orders"
            f"{which}: it judges the place more than the reply; give the anchor more ranked "
            "replies, or set judge.form=grade"
        )


def _intransitive(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    """Where few triples are told, more of them may go in a circle by chance."""
    found, triples = now["judge"].get("intransitive"), now["judge"].get("triples")
    if found is None or not triples:
        return
    if found > gate.intransitive + 1 / triples**0.5:
        yield (
            f"{found:.0%} of the judge's comparisons of three replies go round in a circle: it has "
            "no order of them; give the anchor more ranked replies, or set judge.form=grade"
        )


def _gold(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    fall = _fall(before, now, "gold_mean", "gold_se", least=gate.gold)
    if fall is not None:
        yield (
            f"the gold score fell from {fall[0]:.2f} to {fall[1]:.2f}: the judge rewards something "
            "else; stop at the best iteration, or lower dpo.learning_rate"
        )


def _criterion(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    """What the judge does not see may fall behind a score that rises.

    Against the anchor and not the best model before: among many models some criterion is high by
    luck. The more criteria, the more of them fall by luck, so each is held to a stricter error.
    """
    if not before:
        return
    first, last = before[0]["policy"], now["policy"]
    total = first.get("gold_mean"), last.get("gold_mean")
    points = last.get("gold_by_criterion") or {}
    if None in total or total[1] <= total[0] or len(points) < 2:
        return
    patience = NormalDist().inv_cdf(1 - CHANCE / len(points))
    for name, value in points.items():
        known = (first.get("gold_by_criterion") or {}).get(name)
        a, b = ((each.get("gold_by_criterion_se") or {}).get(name) for each in (first, last))
        if known is None or a is None or b is None:
            continue
        if known - value > max(gate.criterion, patience * hypot(a, b)):
            yield (
                f"`{name}` of the gold score fell from {known:.2f} at the anchor to {value:.2f} "
                f"while the whole rose from {total[0]:.2f} to {total[1]:.2f}: the policy exploits "
                "what the judge is blind to; give the judge data on it, lower dpo.learning_rate, "
                "or stop earlier"
            )


def _anchor_score(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    fall = _fall(before, now, "anchor_score", "anchor_score_se", least=gate.anchor_score)
    if fall is None:
        return
    best, score = fall
    known = [each["policy"].get("self_score") for each in before]
    own_before = max((value for value in known if value is not None), default=None)
    own = now["policy"].get("self_score")
    if own is not None and own_before is not None and own > own_before:
        told = (
            f"the model's grades of its own answers rose from {own_before:.2f} to {own:.2f}, while "
            f"those of the anchor, a judge that does not drift, fell from {best:.2f} to "
            f"{score:.2f}: it learns to please itself"
        )
    else:
        told = f"the anchor's grades of the answers fell from {best:.2f} to {score:.2f}"
    yield f"{told}; lower dpo.learning_rate, raise dpo.beta, or stop at the best iteration"


def _vote_share(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    """Samples that agree may be right; where they agree on one answer to all prompts they are not.

    Source: Shafayat et al. 2025, arXiv:2505.21444, section 4.
    """
    first = next((each["votes"] for each in before if each.get("votes")), None)
    votes = now.get("votes")
    if not votes or first is None or votes["vote_share"] is None:
        return
    entropy = first["answer_entropy"], votes["answer_entropy"]
    if votes["vote_share"] >= gate.vote_share and entropy[1] < entropy[0] / 2:
        yield (
            f"{votes['vote_share']:.0%} of a prompt's samples agree, while answers have become "
            f"few: their entropy over the prompts fell from {entropy[0]:.2f} to {entropy[1]:.2f} "
            "nats: the policy says the same to everything; stop at an earlier iteration, or lower "
            "dpo.learning_rate"
        )


def _length(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    if not before:
        return
    first, last = before[0]["policy"], now["policy"]
    lengths = first.get("mean_length_chars"), last.get("mean_length_chars")
    scores = first.get("anchor_score"), last.get("anchor_score")
    scale = last.get("score_scale")
    if None in (*lengths, *scores, scale) or not lengths[0]:
        return
    growth = lengths[1] / lengths[0] - 1
    gain = (scores[1] - scores[0]) / (scale[1] - scale[0])
    if growth - max(0.0, gain) > gate.length:
        yield (
            f"answers have grown by {growth:.0%} since the anchor ({lengths[0]:.0f} to "
            f"{lengths[1]:.0f} characters), their score by {gain:.0%} of the scale: part of what "
            "the judge prefers is length; set pairing.rho=0.3 or pairing.alpha=auto"
        )


def _truncated(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    if not before:
        return
    first, last = before[0]["policy"].get("truncated_rate"), now["policy"].get("truncated_rate")
    if first is not None and last is not None and last - first > gate.truncated:
        yield (
            f"{last:.0%} of the answers run into the token limit, {first:.0%} did at the anchor: "
            "they no longer end; lower dpo.learning_rate, or set dpo.nll_weight"
        )


def _divergence(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    found = now["policy"].get("divergence")
    if found is not None and found > gate.divergence:
        yield (
            f"the model has gone {found:.1f} nats a token from the anchor: so far from what it was "
            "taught on, grades say little, however high; lower dpo.learning_rate, raise what holds "
            "it there (dpo.beta, or what the method has in its place), or stop at the best "
            "iteration"
        )


def _capability(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    if not before:
        return
    tasks = now.get("capabilities", {}).get("tasks", {})
    first = before[0].get("capabilities", {}).get("tasks", {})
    for name, found in tasks.items():
        if name not in first or not found.get("higher_is_better", True):
            continue
        fall = first[name]["value"] - found["value"]
        if fall > max(gate.capability, 2 * (found.get("se") or 0.0)):
            yield (
                f"{name} ({found['metric']}) fell from {first[name]['value']:.2f} at the anchor to "
                f"{found['value']:.2f}: the model forgets; lower dpo.learning_rate, raise "
                "dpo.beta, or set dpo.nll_weight"
            )


def _no_number(before: Sequence[Evaluation], now: Evaluation, gate: Gate) -> Iterator[str]:
    """No other gate stops what is no number: it is neither above nor below anything."""
    tasks = now.get("capabilities", {}).get("tasks", {})
    figures = {**now["judge"], **now["policy"], **{name: tasks[name]["value"] for name in tasks}}
    for name, value in figures.items():
        if isinstance(value, float) and isnan(value):
            yield f"{name} is no number (NaN): what it is measured on has broken down"


CHECKS: tuple[Check, ...] = (
    _no_number,
    _one_score,
    _readable,
    _judge_accuracy,
    _position_consistency,
    _intransitive,
    _gold,
    _criterion,
    _anchor_score,
    _vote_share,
    _length,
    _truncated,
    _divergence,
    _capability,
)


def _fall(
    before: Sequence[Evaluation], now: Evaluation, figure: str, error: str, *, least: float
) -> tuple[float, float] | None:
    """The figure of the best model before and of this one, where it has fallen.

    By more than `least`, and by more than two standard errors of the difference: both models'
    answers are drawn, and the best of several is high by luck as well.
    """
    value = now["policy"].get(figure)
    known = [each["policy"] for each in before if each["policy"].get(figure) is not None]
    if value is None or not known:
        return None
    best = max(known, key=lambda policy: float(policy[figure]))
    chance = 2 * hypot(best.get(error) or 0.0, now["policy"].get(error) or 0.0)
    return (best[figure], value) if best[figure] - value > max(least, chance) else None


@dataclass(frozen=True, slots=True)
class Best:
    """The best model of a run, by which figure, and the others within chance of it.

    Models by their place: 0 is the anchor.
    """

    place: int
    figure: str
    value: float
    interval: Sequence[float] | None
    alike: tuple[int, ...]
    ranked: tuple[int, ...]
    """All that could be the best, the best first."""


FIGURES = ("gold_mean", "anchor_score")
"""What the policy is compared by: the first one that all models have."""


BROKEN = {"one_score", "readable", "judge_accuracy", "vote_share", "truncated", "divergence"}
"""Gates on which a model fails that is broken; the anchor's grades may be high all the same."""


def best_model(evaluations: Sequence[Evaluation], gate: Gate | None = None) -> Best | None:
    """The model with the best answers, by the gold score or else by the anchor's grades.

    By the anchor's grades only the anchor and models that are not broken can be the best.

    A model counts as alike when the best one's figure lies within two standard errors of the
    difference. The models answered the same prompts, so this errs on the side of caution.

    Returns:
        None where no figure was measured for all models.
    """
    for figure in FIGURES:
        values = [each["policy"].get(figure) for each in evaluations]
        if not values or None in values:
            continue
        error = "gold_se" if figure == "gold_mean" else "anchor_score_se"
        errors = [each["policy"].get(error) or 0.0 for each in evaluations]
        places = [
            i
            for i in range(len(values))
            if figure == "gold_mean" or i == 0 or not _is_broken(evaluations[: i + 1], gate)
        ]
        ranked = sorted(places, key=lambda i: (-values[i], i))
        place = ranked[0]
        alike = tuple(
            i
            for i, value in enumerate(values)
            if i in places
            and i != place
            and values[place] - value <= 2 * (errors[place] ** 2 + errors[i] ** 2) ** 0.5
        )
        interval = evaluations[place]["policy"].get("intervals", {}).get(figure)
        return Best(place, figure, values[place], interval, alike, tuple(ranked))
    return None


def _is_broken(evaluations: Sequence[Evaluation], gate: Gate | None) -> bool:
    return any(found.gate in BROKEN for found in findings(evaluations, gate or Gate()))
