"""What each method makes of the toy world, from the same anchor, beside its controls.

The cases of the recipe `toy` can be run on any other recipe with a gold scorer.
Every case is an ordinary run in a directory of its own, so a stopped bench goes on. Gold is never
seen while training (but in the case that says so). Cases of one seed share an anchor, unless the
case is about the anchor or its method needs to be taught more; each seed has another. What that
anchor says and grades in several cases alike is computed once. M0, the bare base, is measured once
for each seed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

from srlm_lite.bench.lending import (
    lend_evaluation,
    lend_first_iteration,
    lend_grades,
    lend_reading,
    same_evaluation,
    same_first_grades,
    same_first_iteration,
    same_reading,
)
from srlm_lite.errors import TooFewPairs, UserError
from srlm_lite.evaluate.gate import findings
from srlm_lite.judging import mean_scores
from srlm_lite.loop import iterate, make_anchor
from srlm_lite.methods import METHODS, method_of
from srlm_lite.methods.base import Case
from srlm_lite.methods.cream import consistencies
from srlm_lite.progress import Reporter, Silent
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.records import Candidate, Judgement
from srlm_lite.run.files import read_json, read_records
from srlm_lite.run.layout import StageDir
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Gate
from srlm_lite.stages.at_work import AtWork
from srlm_lite.stages.evaluation import evaluation
from srlm_lite.stages.log import StageLog

B = TypeVar("B")

TOY = "toy"
"""The recipe that most cases change."""

SHARED = "anchor"
"""The anchor of most cases."""


TEMPTATIONS: dict[str, Case] = {
    "likes length": Case("toy", ("pairing.alpha=-0.03",)),
    "likes length, rho 0.3": Case("toy", ("pairing.alpha=-0.03", "pairing.rho=0.3")),
    "lr 1e-3": Case("toy", ("dpo.learning_rate=1e-3",)),
}
"""Settings that do harm. The judge that likes length gives 0.03 points a character, about as much
again as its scores vary."""


def _groups() -> dict[str, dict[str, Case]]:
    groups: dict[str, dict[str, Case]] = {}
    for method in METHODS.values():
        for name, case in method.bench().items():
            groups.setdefault(case.group, {})[name] = case
    return {**groups, "Temptations": TEMPTATIONS}


GROUPS = _groups()
"""The cases by name, as the plot shows them side by side: each method declares its own."""

CASES: dict[str, Case] = {name: case for group in GROUPS.values() for name, case in group.items()}

ANCHORS: dict[str, Case] = {
    SHARED: Case(TOY, anchor=None),
    **{
        case.anchor: Case(case.recipe, anchor=None, is_long=case.is_long)
        for case in reversed(CASES.values())  # of several the first one counts
        if case.anchor is not None and case.anchor != SHARED
    },
}
"""Anchors that several cases share."""

PLAIN = "self-rewarding"
"""The case that others are held against."""

CHAIN = ("dpo.init=previous", "dpo.reference=anchor")
"""What `toy` says of a delta. On any other recipe the cases say it as well, or `self-rewarding`
would be another case there."""

SMALLER = (
    "prompts.per_iteration=100",
    "judge.votes=2",
    "evaluate.policy_prompts=100",
    "evaluate.eft_prompts=30",
)
"""The part of the recipes' work that the bench does."""

COLD = 0.5
"""Temperature at which the anchor answers once more: a sharper model alone raises a mean."""

PICKED_FROM = 4
"""Answers a prompt of the anchor, of which its own judge picks one."""

BARE, COLDER, PICKED = "base", "cold anchor", "anchor's pick"
"""What is measured beside the cases."""


@dataclass(frozen=True, slots=True)
class MethodsBench:
    """What to run, and where."""

    out: Path
    cases: tuple[str, ...] = tuple(CASES)
    seeds: int = 1
    iterations: int = 3
    overrides: tuple[str, ...] = ()
    jobs: int = 1
    """Cases at a time, each in a process of its own that computes in one thread."""
    recipe: str = TOY
    """What the cases change. All of the work of another recipe is done, the part `SMALLER` of
    `toy`'s."""

    def __post_init__(self) -> None:
        if self.recipe != TOY:
            _check(self)


def _check(settings: MethodsBench) -> None:
    """Raises a UserError where some cases cannot be run on a recipe."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    where = f"bench methods --recipe {settings.recipe}"
    if recipe.evaluate.gold is None:
        raise UserError(
            "this recipe has no gold scorer, by which the cases are held against each other",
            where=where,
            way_out="Set evaluate.gold, or hold runs against each other by `report --control`",
        )
    own = [name for name in settings.cases if CASES[name].recipe != TOY]
    if own:
        raise UserError(
            f"not cases of this recipe, but of recipes of their own: {', '.join(own)}",
            where=where,
            way_out="Name others by --cases",
        )
    taught = [name for name in settings.cases if CASES[name].anchor is None]
    if taught and recipe.anchor.init is not None:
        raise UserError(
            f"the anchor is given, and these cases each train one: {', '.join(taught)}",
            where=where,
            way_out="Name others by --cases, or `--set anchor.init=null`",
        )


def cases_of(names: str | None, recipe: str = TOY) -> tuple[str, ...]:
    """Names of cases, separated by semicolons; by default all that change the recipe, and for the
    recipe `toy` those of other recipes too.

    Raises:
        UserError: There is no such case.
    """
    if names is None:
        return tuple(name for name, case in CASES.items() if TOY in (recipe, case.recipe))
    found = tuple(name.strip() for name in names.split(";") if name.strip())
    unknown = [name for name in found if name not in CASES]
    if unknown or not found:
        raise UserError(
            f"no such case: {', '.join(unknown) or 'none named'}",
            where="--cases",
            way_out=f"There are: {'; '.join(CASES)}",
        )
    return found


def bench_methods(settings: MethodsBench, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run every case for every seed, as far as that has not been done; all that was measured."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.cases}
    bare, cold, picked = [], [], []
    with _workers(settings, reporter) as begin:
        for seed in range(settings.seeds):
            names = sorted([BARE, COLDER, PICKED, *runs], key=_is_short)
            alone = [name for name in names if name in CASES and CASES[name].anchor is None]
            needed = sorted({CASES[name].anchor or SHARED for name in settings.cases} | {SHARED})
            training = {name: begin(_train_anchor, settings, seed, name) for name in needed}
            # What waits for no anchor fills the time of those that do.
            begun = {name: begin(_measure, settings, seed, None, name) for name in alone}
            anchors = {name: result() for name, result in training.items()}
            for name in names:
                if name not in begun:
                    begun[name] = begin(_measure, settings, seed, anchors[_anchor_of(name)], name)
            found = {name: result() for name, result in begun.items()}
            bare.append({"seed": seed, **found[BARE]})
            cold.append(found[COLDER]["gold"])
            picked.append(found[PICKED]["gold"])
            for name, rows in runs.items():
                rows.append({"seed": seed, **found[name]})
    return {
        "seeds": settings.seeds,
        "iterations": settings.iterations,
        "recipe": settings.recipe,
        "overrides": [*_for_all(settings), *settings.overrides],
        "base": {
            "summary": {key: _mean([one[key] for one in bare]) for key in ("gold", "greedy")},
            "runs": bare,
        },
        "cold_anchor": {"temperature": COLD, "gold": cold},
        "best_of": {"n": PICKED_FROM, "gold": picked},
        "cases": {
            name: {
                "recipe": CASES[name].recipe,
                "overrides": list(CASES[name].overrides),
                "summary": summary(rows),
                "above_plain": above(rows, runs.get(PLAIN, [])) if name != PLAIN else None,
                "runs": rows,
            }
            for name, rows in runs.items()
        },
    }


Begin = Callable[..., Callable[[], Any]]
"""Begins a job with its arguments; what it gives is waited for by a call."""


@contextmanager
def _workers(settings: MethodsBench, reporter: Reporter | None) -> Iterator[Begin]:
    """What does jobs: here and at once, or in processes of their own, in the order given."""
    if settings.jobs == 1:
        yield lambda job, *given: partial(_given, job(reporter, *given))
        return
    # Not forked: a fork inherits the locks of torch's threads, and hangs in them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.jobs, context, initializer=_begin_work) as pool:
        yield lambda job, *given: pool.submit(job, None, *given).result


def _given(value: B) -> B:
    return value


def _is_short(name: str) -> bool:
    """The long ones begin first, or the last worker would end alone."""
    return name not in CASES or not CASES[name].is_long


def _begin_work() -> None:
    import torch

    from srlm_lite.bench.machine import end_with_the_bench

    torch.set_num_threads(1)
    end_with_the_bench()


def _anchor_of(name: str) -> str:
    return (CASES[name].anchor if name in CASES else None) or SHARED


def _train_anchor(
    reporter: Reporter | None, settings: MethodsBench, seed: int, name: str
) -> RunDir:
    """An anchor, with its evaluation, and what several cases draw and grade first."""
    place = _run(reporter, settings, ANCHORS[name], name, seed, None, 0)
    recipe = _recipe(settings, ANCHORS[name], seed, None, 0)
    sharing = [
        case
        for case in (CASES[other] for other in settings.cases)
        if case.anchor == name
        and same_first_grades(recipe, _recipe(settings, case, seed, place.anchor.path, 0))
    ]
    if settings.iterations and len(sharing) > 1:
        _draw_and_grade(Session(recipe, place, reporter or Silent()))
    return place


def _draw_and_grade(session: Session) -> None:
    """The first iteration as far as its grades."""
    method, directory = method_of(session.recipe), session.run.iteration(1)
    it = AtWork(session, directory)
    with session.run.locked():
        log = StageLog(session, directory, iteration=1)
        prompts = log.run("prompts", lambda: method.prompts(it))
        answers = log.run("candidates", lambda: method.candidates(it, prompts))
        log.run("judgements", lambda: method.judgements(it, prompts, answers))


def _measure(
    reporter: Reporter | None, settings: MethodsBench, seed: int, anchor: RunDir | None, name: str
) -> dict[str, Any]:
    """A case, run and read."""
    if name == BARE:
        return _bare_base(settings, seed, reporter)
    if name == COLDER:
        case = Case(TOY, (f"evaluate.temperature={COLD}",))
        place = _run(reporter, settings, case, name, seed, anchor, 0)
        return _figures(read_json(place.anchor.evaluation))
    if name == PICKED:
        case = Case(TOY, (f"evaluate.best_of={PICKED_FROM}",))
        place = _run(reporter, settings, case, name, seed, anchor, 0)
        return {"gold": read_json(place.anchor.evaluation)["policy"]["best_of"]["gold_mean"]}
    case = CASES[name]
    iterations = settings.iterations
    try:
        return measured(_run(reporter, settings, case, name, seed, anchor, iterations), iterations)
    except TooFewPairs as error:  # as where a learning rate is too high: that is what came of it
        place = _place(settings, name, seed)
        done = sum(one.is_done for one in islice(place.iterations(), iterations))
        return {**measured(place, done), "stopped": str(error)}


def _bare_base(settings: MethodsBench, seed: int, reporter: Reporter | None) -> dict[str, Any]:
    """M0, measured as all models are."""
    place = _place(settings, SHARED, seed)
    if not place.base_evaluation.evaluation.is_file():
        recipe = _recipe(settings, ANCHORS[SHARED], seed, None, 0)
        with place.locked():
            session = Session(recipe, place, reporter or Silent())
            evaluation(session, place.base_evaluation, [])
    return _figures(read_json(place.base_evaluation.evaluation))


def _for_all(settings: MethodsBench) -> tuple[str, ...]:
    """What is changed in the recipe for every case."""
    return SMALLER if settings.recipe == TOY else CHAIN


def _recipe(settings: MethodsBench, case: Case, seed: int, anchor: Path | None, t: int) -> Recipe:
    given = [*_for_all(settings), *case.overrides, *settings.overrides]
    base = settings.recipe if case.recipe == TOY else case.recipe
    own = [f"seed={seed}", f"iterations={min(t, 1) if case.one_pass else t}"]
    if case.one_pass:
        of_each = load_recipe(base, given).prompts.per_iteration
        own.append(f"prompts.per_iteration={max(1, settings.iterations) * of_each}")
    if anchor is not None:
        own.append(f"anchor.init={anchor}")
    return load_recipe(base, [*given, *own])


def _place(settings: MethodsBench, name: str, seed: int) -> RunDir:
    if name in CASES and CASES[name].one_pass:  # over more prompts it is another run
        name = f"{name} for {settings.iterations}"
    folder = "".join(char if char.isalnum() else "-" for char in name)
    return RunDir(settings.out / f"{folder}-{seed}")


def _run(
    reporter: Reporter | None,
    settings: MethodsBench,
    case: Case,
    name: str,
    seed: int,
    anchor: RunDir | None,
    iterations: int,
) -> RunDir:
    """A case's run, without what the run of its anchor has done already."""
    path = None if anchor is None else anchor.anchor.path
    recipe = _recipe(settings, case, seed, path, iterations)
    place = _place(settings, name, seed)
    with place.locked():
        place.open(recipe, {"bench": name})
        session = Session(recipe, place, reporter or Silent())
        if anchor is not None and case.anchor is not None:
            other = _recipe(settings, ANCHORS[case.anchor], seed, None, 0)
            if same_reading(recipe, other):
                lend_reading(anchor, place)
            if same_evaluation(recipe, other):
                lend_evaluation(anchor, place)
            make_anchor(session)
            if iterations and same_first_grades(recipe, other):
                lend_grades(anchor, place, 1)
            if iterations and name != PLAIN:
                plain = _place(settings, PLAIN, seed)
                of_plain = _recipe(settings, CASES[PLAIN], seed, path, iterations)
                if CASES[PLAIN].anchor == case.anchor and same_first_iteration(recipe, of_plain):
                    lend_first_iteration(plain, place)
                    if iterations > 1 and place.iteration(1).is_done:
                        lend_grades(plain, place, 2)
        iterate(session)
    return place


def measured(run: RunDir, iterations: int) -> dict[str, Any]:
    """What a run says of its models, M1 (the anchor) first, as far as so many iterations.

    It may hold more, of an earlier bench in the same place.
    """
    places: list[StageDir] = [run.anchor, *islice(run.iterations(), iterations)]
    evaluations = [read_json(place.evaluation) for place in places]
    rows = [row for row in run.read_metrics() if row["iteration"] <= iterations]
    facts = {(row["iteration"], row["stage"]): row for row in rows}
    models = []
    for t, found in enumerate(evaluations):
        pairs = facts.get((t, "pairs"), {})
        # Of the answers of M(t) in iteration t, which train M(t+1).
        ranked = [facts.get((t + 1, stage), {}) for stage in ("judgements", "pairs", "delta")]
        models.append(
            {
                **_figures(found),
                "ranker_accuracy": next(
                    (row[RANKER] for row in ranked if row.get(RANKER) is not None), None
                ),
                "judge_mean": ranked[0].get("mean_score"),
                "pairs": pairs.get("pairs"),
                "pairs_by_gold": pairs.get("gold_agreement"),
                "cream_consistency": pairs.get("consistency"),
            }
        )
    blind = [_without_gold(found) for found in evaluations]
    for before, after in pairwise(range(len(places))):
        models[after]["consistency"] = _consistency(places[before], places[after])
        warned = findings(blind[: after + 1], Gate())
        models[after]["warnings"] = {found.gate: found.text for found in warned}
    seconds: dict[str, float] = {}
    for row in rows:
        if row["iteration"]:
            seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    return {
        "models": models,
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_stage": {stage: round(value, 1) for stage, value in seconds.items()},
    }


RANKER = "gold_pairwise_accuracy"
"""What a stage says of the judge, the labels, the reward model or the likelihoods by which it ranks
the policy's own answers."""


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the table has of a model's evaluation."""
    policy, greedy = found["policy"], found["policy"].get("greedy", {})
    return {
        "gold": policy.get("gold_mean"),
        "gold_se": policy.get("gold_se"),
        "greedy": greedy.get("gold_mean"),
        "by_criterion": policy.get("gold_by_criterion"),
        "greedy_by_criterion": greedy.get("gold_by_criterion"),
        "chars": policy.get("mean_length_chars"),
        "judge_accuracy": found["judge"]["pairwise_accuracy"],
        "judge_ties": found["judge"].get("tie_rate"),
        "judge_accuracy_on_policy": policy.get("self_gold_accuracy"),
        "self_score": policy.get("self_score"),
        "anchor_score": policy.get("anchor_score"),
        "divergence": policy.get("divergence"),
    }


def _without_gold(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_gold(value) if isinstance(value, Mapping) else value
        for key, value in figures.items()
        if "gold" not in key
    }


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


FIGURES = (
    "gold",
    "greedy",
    "chars",
    "judge_accuracy",
    "judge_ties",
    "judge_accuracy_on_policy",
    "ranker_accuracy",
    "consistency",
    "pairs",
    "self_score",
    "anchor_score",
    "divergence",
)
"""Figures of a model that the summary has the mean of."""


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread (standard deviation) over seeds, of every model in order.

    A run that has stopped for want of pairs counts as far as it came; the rise is of the others.
    """
    longest = max(len(run["models"]) for run in runs)
    models = [[run["models"][t] for run in runs if t < len(run["models"])] for t in range(longest)]
    result: dict[str, Any] = {
        key: [_mean([model.get(key) for model in same]) for same in models] for key in FIGURES
    }
    result["gold_spread"] = [_spread([model["gold"] for model in same]) for same in models]
    for key in ("by_criterion", "greedy_by_criterion"):
        result[key] = [_by_criterion([model.get(key) for model in same]) for same in models]
    whole = [run["models"] for run in runs if len(run["models"]) == longest]
    rises = [models[-1]["gold"] - models[0]["gold"] for models in whole]
    result["stopped"] = sum("stopped" in run for run in runs)
    result["rise"], result["rise_spread"] = _mean(rises), _spread(rises)
    result["warned"] = sum(bool(model.get("warnings")) for run in runs for model in run["models"])
    result["seconds"] = _mean([run["seconds"] for run in runs])
    return result


def above(
    runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, float | None] | None:
    """How far the last models of a case are above those of another one, in gold of sampled answers:
    the mean over seeds, and its 95% interval by Student's t of the differences; None without both.
    Of seeds at which either has stopped for want of pairs there is no difference.
    """
    both = [
        (one["models"][-1]["gold"], other["models"][-1]["gold"])
        for one, other in zip(runs, others, strict=False)
        if "stopped" not in one and "stopped" not in other
    ]
    gaps = [a - b for a, b in both if a is not None and b is not None]
    if not gaps:
        return None
    width = None
    if 1 < len(gaps) <= len(T95) + 1:
        width = T95[len(gaps) - 2] * stdev(gaps) / len(gaps) ** 0.5
    mean = fmean(gaps)
    return {
        "mean": round(mean, 4),
        "low": None if width is None else round(mean - width, 4),
        "high": None if width is None else round(mean + width, 4),
    }


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5%, for 1, 2, ... degrees of freedom."""


def _by_criterion(found: Sequence[Mapping[str, float] | None]) -> dict[str, float | None]:
    names = {name: None for points in found for name in points or ()}
    return {name: _mean([(points or {}).get(name) for points in found]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 4) if known else None


def _spread(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(stdev(known), 4) if len(known) > 1 else None
