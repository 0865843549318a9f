"""What each method makes of the toy world, from the same anchor, beside its controls.

Every case is an ordinary run in a directory of its own, so a stopped bench goes on. Gold is never
seen while training (but in the case that says so). Runs of one seed share one anchor, unless the
case is about the anchor; each seed has another.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from srlm_lite.config import Recipe, load_recipe
from srlm_lite.errors import UserError
from srlm_lite.judging import mean_scores
from srlm_lite.loop import iterate
from srlm_lite.methods.cream import consistencies
from srlm_lite.progress import Reporter, Silent
from srlm_lite.records import Candidate, Judgement
from srlm_lite.run_dir import RunDir, StageDir, read_json, read_records
from srlm_lite.session import Session
from srlm_lite.stages.evaluation import warnings


@dataclass(frozen=True, slots=True)
class Case:
    """A run of the bench: a recipe, what is changed in it, and whether it needs its own anchor."""

    recipe: str
    overrides: tuple[str, ...] = ()
    own_anchor: bool = False


CASES: dict[str, Case] = {
    "self-rewarding": Case("toy"),
    "init: anchor": Case("toy", ("dpo.init=anchor",)),
    "paper's chain": Case("toy-paper"),
    "random pairs": Case("toy", ("pairing.source=random",)),
    "gold pairs": Case("toy", ("pairing.source=gold",)),
    "no judge data": Case("toy", ("anchor.use_eft=false",), own_anchor=True),
    "dpo": Case("toy-dpo", ("prompts.per_iteration=80",)),  # its file has 240
    "spin": Case("toy-spin"),
    "cream": Case("toy-cream"),
    "cream, judge": Case("toy-cream", ("cream.scores=judge",)),
    "temporal": Case("toy-temporal"),
    "dno": Case("toy-dno"),
    "scir": Case("toy-scir"),
    "meta-rewarding": Case("toy-meta", ("judge.votes=5",), own_anchor=True),
    "rlaif": Case("toy-rlaif", own_anchor=True),
    "rlaif, random": Case("toy-rlaif", ("pairing.source=random",), own_anchor=True),
    "rlhf": Case("toy-rlhf"),
    "likes length": Case("toy", ("pairing.alpha=-0.03",)),
    "likes length, rho 0.3": Case("toy", ("pairing.alpha=-0.03", "pairing.rho=0.3")),
    "lr 1e-3": Case("toy", ("dpo.learning_rate=1e-3",)),
}
"""By name. The judge that likes length gives 0.03 points a character, about as much again as its
scores vary."""

SMALLER = (
    "prompts.per_iteration=100",
    "judge.votes=2",
    "evaluate.policy_prompts=100",
    "evaluate.eft_prompts=30",
)
"""Of the recipes' work, what the bench does."""

COLD = 0.5
"""Temperature at which the anchor answers once more: a sharper model alone raises a mean."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run, and where."""

    out: Path
    cases: tuple[str, ...] = tuple(CASES)
    seeds: int = 1
    iterations: int = 3
    overrides: tuple[str, ...] = ()
    jobs: int = 1
    """Cases at a time, each in a process of its own that computes in one thread."""


def cases_of(names: str | None) -> tuple[str, ...]:
    """Names of cases, separated by semicolons; all of them by default.

    Raises:
        UserError: There is no such case.
    """
    if names is None:
        return tuple(CASES)
    found = tuple(name.strip() for name in names.split(";") if name.strip())
    unknown = [name for name in found if name not in CASES]
    if unknown or not found:
        raise UserError(
            f"no such case: {', '.join(unknown) or 'none named'}",
            where="--cases",
            way_out=f"There are: {'; '.join(CASES)}",
        )
    return found


def bench_methods(settings: Settings, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run every case for every seed, as far as that has not been done; all that was measured."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.cases}
    cold = []
    for seed in range(settings.seeds):
        shared = _run(settings, Case("toy"), "anchor", seed, None, 0, reporter).anchor
        cold.append(_cold_anchor(settings, seed, shared.path, reporter))
        for name, place in _runs(settings, seed, shared.path, reporter).items():
            runs[name].append({"seed": seed, **measured(place)})
    return {
        "seeds": settings.seeds,
        "iterations": settings.iterations,
        "overrides": [*SMALLER, *settings.overrides],
        "cold_anchor": {"temperature": COLD, "gold": cold},
        "cases": {
            name: {
                "recipe": CASES[name].recipe,
                "overrides": list(CASES[name].overrides),
                "summary": summary(rows),
                "runs": rows,
            }
            for name, rows in runs.items()
        },
    }


def _runs(
    settings: Settings, seed: int, anchor: Path, reporter: Reporter | None
) -> dict[str, RunDir]:
    """The run of every case, with this seed."""
    if settings.jobs == 1:
        return {name: _run_case(settings, seed, anchor, reporter, name) for name in settings.cases}
    one = partial(_run_case, settings, seed, anchor, None)
    # Not forked: a fork inherits the locks of torch's threads, and hangs in them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.jobs, context, initializer=_one_thread) as pool:
        return dict(zip(settings.cases, pool.map(one, settings.cases), strict=True))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _run_case(
    settings: Settings, seed: int, shared: Path, reporter: Reporter | None, name: str
) -> RunDir:
    case = CASES[name]
    anchor = None if case.own_anchor else shared
    return _run(settings, case, name, seed, anchor, settings.iterations, reporter)


def _recipe(settings: Settings, case: Case, seed: int, anchor: Path | None, t: int) -> Recipe:
    own = [f"seed={seed}", f"iterations={t}"]
    if anchor is not None:
        own.append(f"anchor.init={anchor}")
    return load_recipe(case.recipe, [*SMALLER, *case.overrides, *settings.overrides, *own])


def _run(
    settings: Settings,
    case: Case,
    name: str,
    seed: int,
    anchor: Path | None,
    iterations: int,
    reporter: Reporter | None,
) -> RunDir:
    recipe = _recipe(settings, case, seed, anchor, iterations)
    folder = "".join(char if char.isalnum() else "-" for char in name)
    place = RunDir(settings.out / f"{folder}-{seed}")
    with place.locked():
        place.open(recipe, {"bench": name})
        iterate(Session(recipe, place, reporter or Silent()))
    return place


def _cold_anchor(
    settings: Settings, seed: int, anchor: Path, reporter: Reporter | None
) -> float | None:
    case = Case("toy", (f"evaluate.temperature={COLD}",))
    place = _run(settings, case, "cold anchor", seed, anchor, 0, reporter)
    gold: float | None = read_json(place.anchor.evaluation)["policy"].get("gold_mean")
    return gold


def measured(run: RunDir) -> dict[str, Any]:
    """What a finished run says of its models, M1 (the anchor) first."""
    places: list[StageDir] = [run.anchor, *run.iterations()]
    evaluations = [read_json(place.evaluation) for place in places]
    rows = run.read_metrics()
    facts = {(row["iteration"], row["stage"]): row for row in rows}
    models = []
    for t, evaluation in enumerate(evaluations):
        policy, pairs = evaluation["policy"], facts.get((t, "pairs"), {})
        # Of the answers of M(t) in iteration t, which train M(t+1).
        judged = facts.get((t + 1, "judgements"), {})
        models.append(
            {
                "gold": policy.get("gold_mean"),
                "gold_se": policy.get("gold_se"),
                "greedy": policy.get("greedy", {}).get("gold_mean"),
                "by_criterion": policy.get("gold_by_criterion"),
                "chars": policy.get("mean_length_chars"),
                "judge_accuracy": evaluation["judge"]["pairwise_accuracy"],
                "judge_accuracy_on_policy": judged.get("gold_pairwise_accuracy"),
                "judge_mean": judged.get("mean_score"),
                "pairs": pairs.get("pairs"),
                "pairs_by_gold": pairs.get("gold_agreement"),
                "cream_consistency": pairs.get("consistency"),
            }
        )
    for before, after in pairwise(range(len(places))):
        models[after]["consistency"] = _consistency(places[before], places[after])
        models[after]["warnings"] = warnings(
            _without_gold(evaluations[before]), _without_gold(evaluations[after])
        )
    seconds = sum(row["seconds"] for row in rows if row["iteration"])
    return {"models": models, "seconds": round(seconds, 1)}


def _without_gold(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    policy = {key: value for key, value in evaluation["policy"].items() if "gold" not in key}
    return {**evaluation, "policy": policy}


def _consistency(before: StageDir, after: StageDir) -> float | None:
    """CREAM's C of two judges in a row, over the judge's held-out replies."""
    old, new = (
        mean_scores(read_records(place.evaluation_dir / "judgements.jsonl", Judgement), min_votes=1)
        for place in (before, after)
    )
    groups: dict[str, list[tuple[Candidate, float]]] = {}
    for name, score in new.items():
        if score is not None:
            prompt_id = name.rpartition("-")[0]
            reply = Candidate(prompt_id, name, "", 0, "stop")
            groups.setdefault(prompt_id, []).append((reply, score))
    found = consistencies(groups, old)
    return round(fmean(found.values()), 4) if found else None


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread (standard deviation) over seeds, of every model in order."""
    keys = ("gold", "greedy", "chars", "judge_accuracy", "judge_accuracy_on_policy", "consistency")
    models = list(zip(*(run["models"] for run in runs), strict=True))
    result: dict[str, Any] = {
        key: [_mean([model.get(key) for model in same]) for same in models] for key in keys
    }
    result["gold_spread"] = [_spread([model["gold"] for model in same]) for same in models]
    result["pairs"] = [_mean([model.get("pairs") for model in same]) for same in models]
    result["unique"] = [
        _mean([(model["by_criterion"] or {}).get("unique") for model in same]) for same in models
    ]
    rises = [run["models"][-1]["gold"] - run["models"][0]["gold"] for run in runs]
    result["rise"], result["rise_spread"] = _mean(rises), _spread(rises)
    result["warned"] = sum(bool(model.get("warnings")) for run in runs for model in run["models"])
    result["seconds"] = _mean([run["seconds"] for run in runs])
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 4) if known else None


def _spread(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(stdev(known), 4) if len(known) > 1 else None


def plot(result: Mapping[str, Any], *, width: int = 760, height: int = 420) -> str:
    """Gold by model, a line for each case, as SVG."""
    lines = {name: case["summary"]["gold"] for name, case in result["cases"].items()}
    values: list[float] = [v for line in lines.values() for v in line if v is not None]
    low, high = min(values) - 0.1, max(values) + 0.1
    models = max(len(line) for line in lines.values())
    left, right, top, bottom = 50, width - 210, 20, height - 40

    def x(index: int) -> float:
        return left + (right - left) * index / max(1, models - 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="14">gold of sampled answers, mean over seeds</text>',
    ]
    for index in range(models):
        parts.append(f'<text x="{x(index):.1f}" y="{bottom + 20}">M{index + 1}</text>')
    for step in range(5):
        value = low + (high - low) * step / 4
        parts.append(f'<text x="8" y="{y(value) + 4:.1f}">{value:.2f}</text>')
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            'stroke="#ddd"/>'
        )
    for number, (name, line) in enumerate(lines.items()):
        known = [(x(i), y(value)) for i, value in enumerate(line) if value is not None]
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in known)
        # Hues a golden angle apart; dashes tell neighbours apart without colour.
        stroke = f"hsl({number * 137 % 360} 65% 40%)"
        dash = ("none", "6 3", "2 3")[number % 3]
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
        key = top + 18 + 21 * number
        parts.append(
            f'<line x1="{right + 15}" x2="{right + 45}" y1="{key - 4}" y2="{key - 4}" '
            f'stroke="{stroke}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts.append(f'<text x="{right + 52}" y="{key}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
