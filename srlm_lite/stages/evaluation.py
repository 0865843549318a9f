"""The evaluation after the anchor and after every iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from srlm_lite.errors import GateError, UserError, same_command
from srlm_lite.evaluate import ifeval
from srlm_lite.evaluate.answers import vote_figures
from srlm_lite.evaluate.gate import best_model, findings
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.evaluate.intervals import interval
from srlm_lite.evaluate.judge_metrics import calibration, judge_metrics, share_in_gold_order
from srlm_lite.evaluate.policy_metrics import (
    best_graded,
    means_by_prompt,
    policy_metrics,
    standard_error,
)
from srlm_lite.forms import form_of
from srlm_lite.judging import mean_scores
from srlm_lite.records import Candidate, Prompt, VoteCount
from srlm_lite.run.files import read_json, read_records, write_json, write_records
from srlm_lite.run.layout import IterationDir, StageDir
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Gate, Sampling
from srlm_lite.stages.judges import Place, as_candidates, judged
from srlm_lite.stages.likelihood import candidate_likelihoods
from srlm_lite.stages.replies import without_thoughts
from srlm_lite.stages.sampling import chat_of, sample_candidates
from srlm_lite.stages.seed_data import data_file, ifeval_tasks, policy_prompts, read_ranked
from srlm_lite.window import room_for_answer

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

IFEVAL_TOKENS = 1280
"""Longest answer to an IFEval prompt in lm-evaluation-harness."""


DIVERGENCE_ANSWERS = 64
"""Sampled answers that the divergence is measured on where a judge grades none."""


def evaluation(
    session: Session,
    directory: StageDir,
    stack: Sequence[Adapter],
    *,
    judge: Sequence[Adapter] | None = None,
    shared: Place | None = None,
) -> tuple[None, dict[str, Any]]:
    """Measure a stack as judge and as policy; write `eval.json`.

    Where answers are voted on, it says also how sure the votes were that the model learned from.

    Every model of a run answers the same prompts and judges the same replies, with the same
    seeds, so that differences are the models'.

    Args:
        judge: The stack in the judge's role, where that is another one.
        shared: Where files go that its judgings share; the run's unless said.
    """
    if directory.evaluation.is_file():
        return None, read_json(directory.evaluation)
    recipe = session.recipe
    groups = read_ranked(data_file(recipe, "eft_eval.jsonl"), recipe.evaluate.eft_prompts)
    groups = without_thoughts(chat_of(session, "judge"), groups)
    judgements, facts = judged(
        session,
        stack if judge is None else judge,
        *as_candidates([row for group in groups for row in group]),
        place=lambda name: directory.evaluation_dir / f"{name}.jsonl",
        stage="evaluation, judge",
        votes=recipe.evaluate.votes or recipe.judge.votes,
        seed_path=(recipe.seed, "evaluation", "judge"),
        shared=shared,
        every_vote=True,
    )
    scale = form_of(recipe).scale(session.rubric)
    result = {
        "judge": {
            **judge_metrics(groups, judgements, best_score=scale[1], with_intervals=True),
            "calibration": calibration(groups, judgements, scale=scale),
            **facts,
        },
        "policy": _policy(session, directory, stack, stack if judge is None else judge, shared),
    }
    if isinstance(directory, IterationDir) and directory.votes.is_file():
        result["votes"] = vote_figures(read_records(directory.votes, VoteCount))
    if recipe.evaluate.ifeval:
        result["ifeval"] = _ifeval(session, directory, stack)
    if recipe.evaluate.tasks:
        result["capabilities"] = _capabilities(session, directory, stack)
    write_json(directory.evaluation, result)
    return None, result


def _policy(
    session: Session,
    directory: StageDir,
    stack: Sequence[Adapter],
    judge: Sequence[Adapter],
    shared: Place | None,
) -> dict[str, Any]:
    recipe = session.recipe
    held_out = policy_prompts(recipe)
    prompts = held_out
    if not session.engine_kind("policy").remote:  # a server has a window of its own
        prompts = [prompt for prompt in held_out if session.leaves_room(prompt)]
    left_out = {"too_long": len(held_out) - len(prompts)} if len(prompts) < len(held_out) else {}
    if not prompts:
        return left_out
    gold = load_gold(recipe.evaluate.gold) if recipe.evaluate.gold else None
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}

    def answers(kind: str, *, temperature: float, n: int) -> list[Candidate]:
        sampling = Sampling(
            temperature=temperature,
            top_p=recipe.rollout.top_p,
            max_new_tokens=recipe.rollout.max_new_tokens,
        )
        return sample_candidates(
            session,
            stack,
            prompts,
            path=directory.evaluation_dir / f"answers_{kind}.jsonl",
            stage=f"evaluation, {kind} answers",
            sampling=sampling,
            n=n,
            seed_path=(recipe.seed, "evaluation", "policy"),
        )

    temperature = recipe.evaluate.temperature or recipe.rollout.temperature
    sampled = answers("sampled", temperature=temperature, n=recipe.evaluate.samples)
    greedy = answers("greedy", temperature=0.0, n=1)
    figures = policy_metrics(texts, sampled, gold)
    points = {}
    if gold is not None:
        points = {row.candidate_id: gold.total(texts[row.prompt_id], row.text) for row in sampled}
    best: dict[str, Any] = {}
    if recipe.evaluate.best_of:
        several = answers("best_of", temperature=temperature, n=recipe.evaluate.best_of)
        picks = _picked(session, directory, judge, texts, several, shared)
        best["best_of"] = {"n": recipe.evaluate.best_of, **policy_metrics(texts, picks, gold)}
    graded, ends = _grades(session, directory, judge, texts, sampled, points, shared)
    return {
        **figures,
        **graded,
        **_divergence(session, directory, stack, prompts, sampled),
        "intervals": {**figures["intervals"], **ends},
        "temperature": temperature,
        "greedy": policy_metrics(texts, greedy, gold),
        **best,
        **left_out,
    }


def _picked(
    session: Session,
    directory: StageDir,
    judge: Sequence[Adapter],
    texts: Mapping[str, str],
    answers: Sequence[Candidate],
    shared: Place | None,
) -> list[Candidate]:
    """The best answer to each prompt by the model's own judge, asked as it is of candidates."""
    recipe = session.recipe

    def place(what: str) -> Path:
        file = "grades_best_of" if what == "judgements" else f"grades_best_of_{what}"
        return directory.evaluation_dir / f"{file}.jsonl"

    rows, _ = judged(
        session,
        judge,
        [Prompt(prompt_id, text) for prompt_id, text in texts.items()],
        [row for row in answers if row.text],
        place=place,
        stage="evaluation, grades of the best of several",
        seed_path=(recipe.seed, "evaluation", "best of"),
        shared=shared,
    )
    return best_graded(answers, mean_scores(rows, min_votes=form_of(recipe).min_votes))


def _grades(
    session: Session,
    directory: StageDir,
    judge: Sequence[Adapter],
    texts: Mapping[str, str],
    answers: Sequence[Candidate],
    gold: Mapping[str, float],
    shared: Place | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model itself and the anchor, as judges, think of the first of its answers.

    Args:
        gold: Gold scores by answer, where there are any.

    Returns:
        `self_score`, `anchor_score`, their standard errors over prompts, and the rubric's scale;
        and the intervals. An external judge is one and the same for all: it is `anchor_score`.
        An answer without text is shown to no judge: it has the rubric's lowest score.
        With gold also `self_gold_accuracy` and `anchor_gold_accuracy`.
    """
    recipe, run = session.recipe, session.run
    some = answers[: recipe.evaluate.judged_answers]
    if not some:
        return {}, {}
    external = session.engine_kind("judge").remote
    own = external or (len(judge) == 1 and directory.path == run.anchor.path)
    judges: dict[str, Sequence[Adapter]] = {"anchor" if own else "self": judge}
    if not own and run.anchor.training.is_file():
        judges["anchor"] = session.stack(0)
    form = form_of(recipe)
    scale = form.scale(session.rubric)
    beside: dict[str, Candidate] = {}
    if form.compares:
        beside = {} if own and not external else _of_the_anchor(session, some)
        if not beside and not own:
            return {}, {}
    figures: dict[str, Any] = {}
    ends: dict[str, Any] = {}
    for name, stack in judges.items():

        def place(what: str, whose: str = name) -> Path:
            file = f"grades_{whose}" if what == "judgements" else f"grades_{whose}_{what}"
            return directory.evaluation_dir / f"{file}.jsonl"

        rows, _ = judged(
            session,
            stack,
            [Prompt(prompt_id, text) for prompt_id, text in texts.items()],
            [row for row in (*some, *beside.values()) if row.text],
            place=place,
            stage=f"evaluation, grades of the {'model' if name == 'self' else name}",
            votes=recipe.evaluate.votes or recipe.judge.votes,
            seed_path=(recipe.seed, "evaluation", "grades"),
            shared=shared,
            every_vote=True,
        )
        scores = _with_blanks(mean_scores(rows, min_votes=1), some, beside, scale)
        means = means_by_prompt(some, scores)
        figures[f"{name}_score"] = round(fmean(means), 4) if means else None
        figures[f"{name}_score_se"] = standard_error(means)
        ends[f"{name}_score"] = interval([(mean, 1) for mean in means])
        if gold and not form.compares:
            figures[f"{name}_gold_accuracy"] = share_in_gold_order(scores, gold)
    if own:
        for key in ("score", "score_se", "gold_accuracy"):
            if f"anchor_{key}" in figures:
                figures[f"self_{key}"] = figures[f"anchor_{key}"]
    return {**figures, "score_scale": list(scale)}, ends


def _of_the_anchor(session: Session, answers: Sequence[Candidate]) -> dict[str, Candidate]:
    """The anchor's answers to the same prompts, by the name of the answer that each is held
    against; none where the anchor has not answered them."""
    path = session.run.anchor.evaluation_dir / "answers_sampled.jsonl"
    rows = read_records(path, Candidate) if path.is_file() else []
    found = {row.candidate_id: row for row in rows}
    wanted = [row.candidate_id for row in answers]
    if not found.keys() >= set(wanted):
        return {}
    return {name: replace(found[name], candidate_id=f"{name} of the anchor") for name in wanted}


def _with_blanks(
    scores: Mapping[str, float | None],
    answers: Sequence[Candidate],
    beside: Mapping[str, Candidate],
    scale: tuple[float, float],
) -> dict[str, float | None]:
    """Scores with those of answers that no judge was shown, for want of text.

    A blank one has the lowest, one beside a blank one the highest, two blank ones, or an answer
    that is held against none, what lies between.
    """
    found = dict(scores)
    for row in answers:
        other = beside.get(row.candidate_id)
        if not row.text:
            both = other is not None and not other.text
            found[row.candidate_id] = sum(scale) / 2 if both else scale[0]
        elif other is not None and not other.text:
            found[row.candidate_id] = scale[1]
    return found


def _divergence(
    session: Session,
    directory: StageDir,
    stack: Sequence[Adapter],
    prompts: Sequence[Prompt],
    answers: Sequence[Candidate],
) -> dict[str, float]:
    """How far the policy has gone from the anchor, in nats a token of its own answers.

    The mean log-ratio over as many of the sampled answers as are graded, or over
    `DIVERGENCE_ANSWERS` where none is: an estimate of the
    Kullback-Leibler divergence, at the temperature at which they were drawn if that is 1.

    Returns:
        `divergence`; nothing for the bare base, and where a server answers in the policy's place.
    """
    recipe, run = session.recipe, session.run
    wanted = recipe.evaluate.judged_answers or DIVERGENCE_ANSWERS
    some = [row for row in answers if row.text][:wanted]
    if not (some and stack and run.anchor.training.is_file()):
        return {}
    if session.engine_kind("policy").remote:
        return {}
    if directory.path == run.anchor.path:
        return {"divergence": 0.0}
    own, anchor = (
        candidate_likelihoods(
            session,
            model,
            prompts,
            some,
            path=directory.evaluation_dir / f"likelihoods_{name}.jsonl",
        )
        for name, model in (("own", stack), ("anchor", session.stack(0)))
    )
    tokens = sum(row.n_tokens for row in own.values())
    ratio = sum(row.logp - anchor[name].logp for name, row in own.items())
    return {"divergence": round(ratio / tokens, 4)} if tokens else {}


def _ifeval(session: Session, directory: StageDir, stack: Sequence[Adapter]) -> dict[str, Any]:
    recipe = session.recipe
    tasks = ifeval_tasks(recipe)
    prompts = [Prompt(task.prompt_id, task.prompt, "ifeval") for task in tasks]
    lengths = [len(session.chat.policy_ids(prompt)) for prompt in prompts]
    limit = recipe.evaluate.ifeval_max_new_tokens
    thought = session.thought_tokens()
    room = room_for_answer(recipe.base.window, prompt=max(lengths), thought=thought)
    if limit is None:
        limit = min(IFEVAL_TOKENS, room)
    if limit > room or limit < 1:
        before = f", a thought of {thought}" if thought else ""
        raise UserError(
            f"an IFEval prompt of {max(lengths)} tokens{before} and an answer of {limit} do not "
            f"fit the window of {recipe.base.window}",
            where="evaluate.ifeval_max_new_tokens",
            way_out="Lower it, or raise base.window",
        )
    answers = sample_candidates(
        session,
        stack,
        prompts,
        path=directory.evaluation_dir / "answers_ifeval.jsonl",
        stage="evaluation, IFEval",
        sampling=Sampling(temperature=0.0, max_new_tokens=limit),
        n=1,
        seed_path=(recipe.seed, "evaluation", "ifeval"),
    )
    checked = [ifeval.check(task, answer.text) for task, answer in zip(tasks, answers, strict=True)]
    write_records(directory.evaluation_dir / "ifeval.jsonl", checked)
    return {**ifeval.ifeval_metrics(checked), "max_new_tokens": limit}


def _capabilities(
    session: Session, directory: StageDir, stack: Sequence[Adapter]
) -> dict[str, Any]:
    from srlm_lite.model.harness import run_tasks

    path, recipe = directory.evaluation_dir / "capabilities.json", session.recipe
    if path.is_file():
        return read_json(path)
    section = recipe.evaluate
    session.close_engines()
    session.reporter.start("evaluation, capabilities", len(section.tasks), "tasks")
    found = run_tasks(
        session.slot,
        session.base,
        stack,
        section.tasks,
        folder=Path(section.tasks_dir) if section.tasks_dir else None,
        limit=section.tasks_limit,
        window=recipe.base.window,
        batch_rows=2 * recipe.dpo.micro_batch_size,
    )
    write_json(path, found)
    return found


def warnings(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], gate: Gate | None = None
) -> list[str]:
    """What in an evaluation, beside the one before it, bodes ill."""
    history = [now] if before is None else [before, now]
    return [found.text for found in findings(history, gate or Gate())]


def evaluations(run: RunDir, last: int | None = None) -> list[dict[str, Any]]:
    """The evaluations of a run's models, the anchor first, up to iteration `last` or all."""
    places: list[StageDir] = [run.anchor, *run.iterations()]
    if last is not None:
        places = places[: last + 1]
    files = [place.evaluation for place in places if place.evaluation.is_file()]
    return [read_json(file, judge=dict, policy=dict) for file in files]


def hold_to_gates(session: Session, iteration: int) -> None:
    """Go no further from a model that does not pass the gates, where the recipe says so.

    Raises:
        GateError: Says what happened, what to try, and how to go on.
    """
    gate = session.recipe.evaluate.gate
    if gate.action == "warn":
        return
    found = findings(evaluations(session.run, iteration), gate)
    if found:
        model = f"iteration {iteration}" if iteration else "the anchor"
        names = " ".join(f"evaluate.gate.{one.gate}" for one in found)
        raise GateError(
            f"after {model}: {'; '.join(one.text for one in found)}. To go on all the same: "
            f"{same_command()}, with --set evaluate.gate.action=warn or another {names}"
        )


def best_line(run: RunDir, gate: Gate) -> str | None:
    """Which model of a run is the best, by what, and how surely; None with a single one."""
    measured = evaluations(run)
    best = best_model(measured, gate)
    if best is None or len(measured) < 2:
        return None
    by = {
        "gold_mean": "the gold score of sampled answers",
        "anchor_score": "the anchor's grades of sampled answers",
    }[best.figure]
    ends = "" if best.interval is None else f" [{best.interval[0]:.2f}, {best.interval[1]:.2f}]"
    line = f"best: {_model(best.place)}, by {by}: {best.value:.2f}{ends}"
    if best.alike:
        line += f"; not told apart from it: {', '.join(map(_model, best.alike))}"
    if best.place != len(measured) - 1:
        line += f" (the last one is {_model(len(measured) - 1)})"
    return line


def _model(place: int) -> str:
    return f"M{place + 1}, {f'iteration {place}' if place else 'the anchor'}"
