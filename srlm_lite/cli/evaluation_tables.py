"""An evaluation for a person: tables of the judge, of the policy, and of what else was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srlm_lite.cli.tables import plain_table
from srlm_lite.cli.wrapping import fitted
from srlm_lite.evaluate.judge_figures import JUDGE_FIGURES

Figures = Mapping[str, Any]

_JUDGE: Mapping[str, str] = {
    "pairwise_accuracy": "pairwise accuracy",
    "pairwise_accuracy_decided": "the same, without ties",
    **{one.key: one.label for one in JUDGE_FIGURES},
    "order_consistency": "votes that agree",
    "mean_score": "mean score",
}
_POLICY: Mapping[str, str] = {
    "gold_mean": "gold",
    "self_score": "graded by itself",
    "anchor_score": "graded by the anchor",
    "self_gold_accuracy": "own grades by gold",
    "anchor_gold_accuracy": "anchor's by gold",
    "mean_length_chars": "characters, mean",
    "median_length_chars": "characters, median",
    "mean_length_tokens": "tokens, mean",
    "truncated_rate": "cut off at the limit",
    "divergence": "divergence",
    "answers": "answers",
}
_IFEVAL: Mapping[str, str] = {
    "prompt_strict": "prompts, strictly",
    "prompt_loose": "prompts, loosely",
    "instruction_strict": "instructions, strictly",
    "instruction_loose": "instructions, loosely",
}
_ERRORS = {"gold_mean": "gold_se", "self_score": "self_score_se", "anchor_score": "anchor_score_se"}
"""Figures whose standard error has a name of its own."""
_WHOLE = ("answers", "prompts", "pairs")
_TOLD_BESIDE = {
    "judge": ("intervals", "calibration", "length_correlation", "score_histogram", *_WHOLE),
    "policy": (
        "intervals",
        "greedy",
        "temperature",
        "score_scale",
        "too_long",
        "gold_by_criterion",
    ),
    "ifeval": ("intervals", "prompts", "instructions", "skipped", "prompts_skipped"),
}
"""What stands in notes and in tables of its own."""


def evaluation_text(result: Mapping[str, Figures], *, width: int | None = None) -> str:
    """The figures of an `eval.json` that were measured, each with its 95% interval.

    Args:
        width: Columns of the terminal; None: no line is broken.
    """
    parts = {
        "judge": _judge,
        "policy": _policy,
        "ifeval": _ifeval,
        "capabilities": _capabilities,
    }
    blocks = [
        part(result[name], width) for name, part in parts.items() if result.get(name) is not None
    ]
    return "\n\n".join(fitted("\n".join(block), width) for block in blocks)


def _judge(figures: Figures, width: int | None) -> list[str]:
    rows = _rows(figures, _JUDGE)
    rows += _others(figures, {*_JUDGE, *_TOLD_BESIDE["judge"]})
    lines = [plain_table(["as judge", "", "95%"], rows, width=width), ""]
    lines.append(f"{figures.get('prompts', 0)} prompts, {figures.get('pairs', 0)} pairs of replies")
    if histogram := figures.get("score_histogram"):
        counts = ", ".join(f"{score}: {count}" for score, count in histogram.items())
        lines.append(f"votes by score: {counts}")
    if length := figures.get("length_correlation"):
        lines.append(
            f"correlation with length: {_number(length.get('judge'))} of its scores, "
            f"{_number(length.get('people'))} of people's"
        )
    return lines + _calibration(figures.get("calibration"), width)


def _calibration(found: Figures | None, width: int | None) -> list[str]:
    if not found:
        return []
    rows = [
        [score, str(one["replies"]), _number(one.get("score")), _number(one["human"])]
        for score, one in found["bins"].items()
    ]
    heads = ["scores by people's quality", "replies", "its mean", "people's mean"]
    return [
        "",
        plain_table(heads, rows, width=width),
        "",
        f"Pearson {_number(found['pearson'])}, Spearman {_number(found['spearman'])}, mean "
        f"difference {_number(found['error'])}",
    ]


def _policy(figures: Figures, width: int | None) -> list[str]:
    greedy: Figures = figures.get("greedy") or {}
    rows: list[list[str]] = []
    for key, label in _POLICY.items():
        if key in figures or key in greedy:
            rows.append([label, *_cells(figures, key), *_cells(greedy, key)])
        if key == "gold_mean":
            rows += _criteria(figures, greedy)
    known = {*_POLICY, *_ERRORS.values(), *_TOLD_BESIDE["policy"], "gold_by_criterion_se"}
    rows += [[*row, "", ""] for row in _others(figures, known)]
    heads = ["as policy", "sampled", "95%", "greedy", "95%"]
    notes = []
    if figures.get("temperature") is not None:
        notes.append(f"sampled at temperature {figures['temperature']:g}")
    if scale := figures.get("score_scale"):
        notes.append(f"grades from {scale[0]:g} to {scale[1]:g}")
    if "divergence" in figures:
        notes.append("divergence from the anchor, in nats a token of its own answers")
    if "self_gold_accuracy" in figures or "anchor_gold_accuracy" in figures:
        notes.append("by gold: pairs of its answers that the grades put in gold's order")
    if "too_long" in figures:
        notes.append(f"{figures['too_long']} held-out prompts too long for base.window")
    lines = [plain_table(heads, rows, width=width)] if rows else []
    return [*lines, "", "; ".join(notes)] if notes else lines


def _criteria(figures: Figures, greedy: Figures) -> list[list[str]]:
    found = figures.get("gold_by_criterion") or greedy.get("gold_by_criterion") or {}
    rows = []
    for name in found:
        row = [f"  {name}"]
        for part in (figures, greedy):
            value = part.get("gold_by_criterion", {}).get(name)
            error = part.get("gold_by_criterion_se", {}).get(name)
            row += [_with_error(value, error), ""]
        rows.append(row)
    return rows


def _ifeval(figures: Figures, width: int | None) -> list[str]:
    rows = _rows(figures, _IFEVAL)
    rows += _others(figures, {*_IFEVAL, *_TOLD_BESIDE["ifeval"]})
    lines = [
        plain_table(["IFEval, share followed", "", "95%"], rows, width=width),
        "",
        f"{figures.get('prompts', 0)} prompts, {figures.get('instructions', 0)} instructions",
    ]
    if skipped := figures.get("skipped"):
        checks = ", ".join(f"{name}: {count}" for name, count in skipped.items())
        prompts = figures.get("prompts_skipped", 0)
        lines.append(f"left out, not to be checked here: {checks} ({prompts} prompts)")
    return lines


def _capabilities(found: Figures, width: int | None) -> list[str]:
    rows = [
        [
            name,
            one["metric"],
            _with_error(one["value"], one.get("se")),
            "-" if one.get("items") is None else str(one["items"]),
        ]
        for name, one in found["tasks"].items()
    ]
    return [
        plain_table(["task", "metric", "", "items"], rows, width=width),
        "",
        f"lm-evaluation-harness {found['harness']}",
    ]


def _rows(figures: Figures, labels: Mapping[str, str]) -> list[list[str]]:
    return [[label, *_cells(figures, key)] for key, label in labels.items() if key in figures]


def _others(figures: Figures, known: Iterable[str]) -> list[list[str]]:
    """What these tables have no words for yet, by its key: nothing is left out."""
    rows = []
    for key, value in figures.items():
        if key in known:
            continue
        if isinstance(value, Mapping):
            rows += [
                [f"{key.replace('_', ' ')}, {name}", _plain(one), ""] for name, one in value.items()
            ]
        else:
            rows.append([key.replace("_", " "), *_cells(figures, key)])
    return rows


def _cells(figures: Figures, key: str) -> list[str]:
    """A figure and its interval."""
    if key not in figures:
        return ["", ""]
    value, ends = figures[key], (figures.get("intervals") or {}).get(key)
    if key in _WHOLE:
        return [_plain(value), ""]
    return [_with_error(value, figures.get(_ERRORS.get(key, ""))), _ends(ends)]


def _with_error(value: Any, error: float | None) -> str:
    return _number(value) + (f" ±{error:.2f}" if error is not None else "")


def _ends(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{_number(ends[0])} to {_number(ends[1])}"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return _plain(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _plain(value: Any) -> str:
    return "-" if value is None else str(value)
