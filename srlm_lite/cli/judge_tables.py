"""What `srlm-lite bench judge --pairs` and `--disturbed` found, for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

STYLE_KINDS = ("easy", "normal", "hard")


def judge_text(result: dict[str, Any]) -> str:
    """What was found, for a terminal."""
    from srlm_lite.cli.tables import plain_table

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    def ends(found: list[float] | None) -> str:
        return "-" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    forms = result["forms"]
    rows, prices = [], []
    subsets: dict[str, list[str]] = {}
    for name, found in forms.items():
        cost = found["cost"]
        rows.append(
            [
                name,
                share(found["accuracy"]),
                ends(found["intervals"]["accuracy"]),
                share(found["decided"]),
                share(found["tie_rate"]),
                share(found["unreadable"]),
                share(found["position_consistency"]),
            ]
        )
        prices.append(
            [
                name,
                share(found["longer_errors"]),
                share(found["accuracy_longer"]),
                share(found["accuracy_shorter"]),
                number(cost.get("seconds_per_reply"), 3),
                number(cost.get("read"), 0),
                number(cost.get("written"), 0),
            ]
        )
        for subset, one in found["subsets"].items():
            row = subsets.setdefault(subset or "(none)", [str(one["pairs"])])
            row.append(f"{share(one['accuracy'])} ({ends(one['interval'])})")
    columns = ["asked for", "accuracy", "95%", "of decided", "ties", "unreadable", "both orders"]
    more = ["asked for", "longer wins", "if longer", "if shorter", "s a reply", "read", "written"]
    lines = [
        _head(result, next(iter(forms.values()))),
        plain_table(columns, rows),
        "accuracy: ties and unreadable pairs count half; both orders: the same verdict in both",
        "",
        plain_table(more, prices),
        "longer wins: of the wrong verdicts; if longer, if shorter: the accuracy where the better "
        "reply is; read, written: tokens a reply",
    ]
    if subsets:
        lines += [
            "",
            plain_table(["domain", "pairs", *forms], [[k, *v] for k, v in subsets.items()]),
        ]
        means = ", ".join(f"{name} {share(one['subset_mean'])}" for name, one in forms.items())
        lines.append(f"mean over domains: {means}")
    lines += _of_prompts(forms, share, ends)
    own = result["self_preference"]
    if own is not None:
        told = ", ".join(
            f"{name} {number(own[key], 3)} ({ends(own['intervals'][key])})"
            for name, key in (
                ("noise", "noise"),
                ("follows its model's confidence", "self_bias"),
                ("too high rather than too low", "skew"),
                ("kinder to own answers", "kinder"),
            )
        )
        lines += [
            "",
            f"its model's own {own['answers']} answers by {own['form']}, quality by "
            f"{own['reference']}: {told}",
        ]
    return "\n".join([*lines, ""])


def _head(result: dict[str, Any], form: dict[str, Any]) -> str:
    source = result["source"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items())
    if "pairs" in source:
        what = (
            f"{source['pairs']} ({source['format']}), {source['tests']} of {source['of']} prompts"
        )
    else:
        what = f"{source['tests']} of {source['disturbed']} disturbed prompts"
        if "gold_agreement" in source:
            what += f", {source['gold_agreement']:.2f} of them in gold's order"
    left = f"; without a pair: {dropped}" if dropped else ""
    unasked = f"; {form['unasked']} do not fit the window" if form["unasked"] else ""
    return (
        f"{result['recipe']}, {result['judge']} as judge, rubric {result['rubric']}: {what}{left}; "
        f"{form['pairs']} pairs, {result['replies']} replies{unasked}"
    )


def _of_prompts(
    forms: dict[str, Any],
    share: Callable[[float | None], str],
    ends: Callable[[list[float] | None], str],
) -> list[str]:
    """What is said of whole prompts, and of styles, where the file has such."""
    told = {"best": "the best reply on top", "all_above": "all right replies above all wrong ones"}
    lines = []
    for key, words in told.items():
        found = {name: one[key] for name, one in forms.items() if key in one}
        if found:
            shares = ", ".join(
                f"{name} {share(one['share'])} ({ends(one['interval'])})"
                for name, one in found.items()
            )
            lines.append(f"{words}: {shares}")
    for name, one in forms.items():
        if one["styles"]:
            kinds = ", ".join(f"{kind} {share(one['styles'][kind])}" for kind in STYLE_KINDS)
            lines.append(f"{name}, right against wrong replies by style: {kinds}")
    return lines
