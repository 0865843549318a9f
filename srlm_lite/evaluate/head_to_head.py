"""Two models head to head: who wins a prompt, and what that comes to over all of them.

A pairwise judge sees both replies twice, each first once; where its two verdicts name different
replies the prompt is a tie, for then it has judged the position. A pointwise judge grades each
reply alone, and the higher score wins. What cannot be read is counted and left out.

Source: Yuan et al. 2024, arXiv:2401.10020, section 3.1.2, for both orders; Zheng et al. 2023,
arXiv:2306.05685, section 3.4, for disagreement as a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from srlm_lite.evaluate.length_control import (
    GamedRow,
    Rate,
    length_controlled,
    why_lengths_do_not_tell,
    win_rate,
)
from srlm_lite.questions import Verdict


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prompt: how far the model is preferred to the baseline, and both replies' lengths.

    `preference` is 1 where the model wins, 0 where it loses, 0.5 for a tie, or a probability in
    between; None where the judge could not be read. Lengths are in characters. `difficulty` is
    the prompt's own, where it is known.
    """

    preference: float | None
    model_chars: int
    baseline_chars: int
    difficulty: float | None = None


def of_verdicts(model_first: Verdict | None, baseline_first: Verdict | None) -> float | None:
    """The model's preference from the verdicts of both orders; None where one is missing."""
    if model_first is None or baseline_first is None:
        return None
    first = {"A": 1.0, "B": 0.0, "tie": 0.5}[model_first]
    second = {"A": 0.0, "B": 1.0, "tie": 0.5}[baseline_first]
    return first if first == second else 0.5


def of_scores(model: float | None, baseline: float | None) -> float | None:
    """The model's preference from the scores of both replies; None where one is missing."""
    if model is None or baseline is None:
        return None
    return 0.5 if model == baseline else float(model > baseline)


def tally(preferences: Sequence[float | None]) -> dict[str, Any]:
    """Wins, ties, losses and win rate of the model, with 95% intervals.

    Returns:
        `wins`, `ties`, `losses`: each `count`, and `share`, `low`, `high` of the readable prompts
        (Wilson's interval). `win_rate`: `value`, `low`, `high` in percent, a tie half a win.
        `prompts`, and how many of them are `unreadable`.
    """
    read = [preference for preference in preferences if preference is not None]
    return {
        "prompts": len(preferences),
        "unreadable": len(preferences) - len(read),
        "wins": _share(sum(value > 0.5 for value in read), len(read)),
        "ties": _share(sum(value == 0.5 for value in read), len(read)),
        "losses": _share(sum(value < 0.5 for value in read), len(read)),
        "win_rate": _rounded(win_rate(read)) if read else None,
    }


def head_to_head(outcomes: Sequence[Outcome], gamed: Sequence[GamedRow] = ()) -> dict[str, Any]:
    """The tally, and beside it the length-controlled win rate.

    That is the minimal variant where prompts have no difficulty.

    Args:
        gamed: Rows for the length-controlled win rate, as published with difficulties.

    Returns:
        As `tally`, and `length_controlled`: `value`, `low`, `high` in percent and the weights
        behind them, or None where nothing can be fitted; `lengths_do_not_tell`, where that is why,
        says in which way; `mean_chars` of both.
    """
    why = why_lengths_do_not_tell([_gap(one) for one in outcomes])
    return {
        **tally([one.preference for one in outcomes]),
        "length_controlled": _length_controlled(outcomes, gamed),
        **({"lengths_do_not_tell": why} if why else {}),
        "mean_chars": {
            "model": round(fmean(one.model_chars for one in outcomes), 1),
            "baseline": round(fmean(one.baseline_chars for one in outcomes), 1),
        },
    }


def _gap(one: Outcome) -> int:
    return one.baseline_chars - one.model_chars


def _share(count: int, of: int) -> dict[str, Any]:
    if not of:
        return {"count": 0, "share": None, "low": None, "high": None}
    from scipy.stats import binomtest

    interval = binomtest(count, of).proportion_ci(method="wilson")
    return {
        "count": count,
        "share": round(count / of, 4),
        "low": round(float(interval.low), 4),
        "high": round(float(interval.high), 4),
    }


def _rounded(rate: Rate) -> dict[str, float | None]:
    # The last digits of a float may differ from machine to machine.
    return {
        name: None if value is None else round(value, 8) for name, value in asdict(rate).items()
    }


def _length_controlled(
    outcomes: Sequence[Outcome], gamed: Sequence[GamedRow]
) -> dict[str, Any] | None:
    known = [one.difficulty for one in outcomes if one.difficulty is not None]
    difficulties = known if known and len(known) == len(outcomes) else None
    fitted = length_controlled(
        [one.preference for one in outcomes],
        [_gap(one) for one in outcomes],
        difficulties=difficulties,
        gamed=gamed,
    )
    if fitted is None:
        return None
    full = "full" if gamed else "with difficulty, without gamed baselines"
    return {
        **_rounded(fitted.rate),
        "variant": "minimal" if difficulties is None else full,
        "quality_weight": round(fitted.quality, 8),
        "length_weight": round(fitted.length, 8),
        "difficulty_weight": None if fitted.difficulty is None else round(fitted.difficulty, 8),
        "strength": round(fitted.strength, 8),
    }
