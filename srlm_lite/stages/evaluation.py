"""The evaluation after the anchor and after every iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from srlm_lite.config import Sampling
from srlm_lite.errors import UserError
from srlm_lite.evaluate import ifeval
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.evaluate.judge_metrics import calibration, collapsed_score, judge_metrics
from srlm_lite.evaluate.policy_metrics import policy_metrics
from srlm_lite.records import Prompt
from srlm_lite.run_dir import StageDir, read_json, write_json, write_records
from srlm_lite.session import Session
from srlm_lite.stages.sampling import judge_replies, sample_candidates
from srlm_lite.stages.seed_data import data_file, ifeval_tasks, policy_prompts, read_ranked

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

LEAST_READABLE = 0.5
"""With a smaller share of readable votes than this, the judge is told to be no judge."""

IFEVAL_TOKENS = 1280
"""Longest answer to an IFEval prompt in lm-evaluation-harness."""

ACCURACY_FALL = 0.03
"""A fall of the judge's pairwise accuracy by more than this, and more than chance, is told."""


def evaluation(
    session: Session,
    directory: StageDir,
    stack: Sequence[Adapter],
    *,
    judge: Sequence[Adapter] | None = None,
) -> tuple[None, dict[str, Any]]:
    """Measure a stack as judge and as policy; write `eval.json`.

    Every model of a run answers the same prompts and judges the same replies, with the same
    seeds, so that differences are the models'.

    Args:
        judge: The stack in the judge's role, where that is another one.
    """
    if directory.evaluation.is_file():
        return None, read_json(directory.evaluation)
    recipe = session.recipe
    groups = read_ranked(data_file(recipe, "eft_eval.jsonl"), recipe.evaluate.eft_prompts)
    replies = [(row.response_id, row.prompt, row.response) for group in groups for row in group]
    judgements = judge_replies(
        session,
        stack if judge is None else judge,
        replies,
        path=directory.evaluation_dir / "judgements.jsonl",
        stage="evaluation, judge",
        votes=recipe.evaluate.votes or recipe.judge.votes,
        chunk=recipe.rollout.chunk_prompts * recipe.rollout.n,
        seed_path=(recipe.seed, "evaluation", "judge"),
    )
    result = {
        "judge": {
            **judge_metrics(groups, judgements, best_score=session.rubric.max, with_intervals=True),
            "calibration": calibration(
                groups, judgements, scale=(session.rubric.min, session.rubric.max)
            ),
        },
        "policy": _policy(session, directory, stack),
    }
    if recipe.evaluate.ifeval:
        result["ifeval"] = _ifeval(session, directory, stack)
    write_json(directory.evaluation, result)
    return None, result


def _policy(session: Session, directory: StageDir, stack: Sequence[Adapter]) -> dict[str, Any]:
    recipe = session.recipe
    prompts = policy_prompts(recipe)
    if not prompts:
        return {}
    gold = load_gold(recipe.evaluate.gold) if recipe.evaluate.gold else None
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}

    def answers(kind: str, *, temperature: float, n: int) -> dict[str, Any]:
        sampling = Sampling(
            temperature=temperature,
            top_p=recipe.rollout.top_p,
            max_new_tokens=recipe.rollout.max_new_tokens,
        )
        rows = sample_candidates(
            session,
            stack,
            prompts,
            path=directory.evaluation_dir / f"answers_{kind}.jsonl",
            stage=f"evaluation, {kind} answers",
            sampling=sampling,
            n=n,
            seed_path=(recipe.seed, "evaluation", "policy"),
        )
        return policy_metrics(texts, rows, gold)

    temperature = recipe.evaluate.temperature or recipe.rollout.temperature
    sampled = answers("sampled", temperature=temperature, n=recipe.evaluate.samples)
    greedy = answers("greedy", temperature=0.0, n=1)
    return {**sampled, "temperature": temperature, "greedy": greedy}


def _ifeval(session: Session, directory: StageDir, stack: Sequence[Adapter]) -> dict[str, Any]:
    recipe = session.recipe
    tasks = ifeval_tasks(recipe)
    lengths = [len(session.chat.prompt_ids(task.prompt)) for task in tasks]
    limit = recipe.evaluate.ifeval_max_new_tokens
    if limit is None:
        limit = min(IFEVAL_TOKENS, recipe.base.window - max(lengths))
    if max(lengths) + limit > recipe.base.window or limit < 1:
        raise UserError(
            f"an IFEval prompt of {max(lengths)} tokens and an answer of {limit} do not fit the "
            f"window of {recipe.base.window}",
            where="evaluate.ifeval_max_new_tokens",
            way_out="Lower it, or raise base.window",
        )
    answers = sample_candidates(
        session,
        stack,
        [Prompt(task.prompt_id, task.prompt, "ifeval") for task in tasks],
        path=directory.evaluation_dir / "answers_ifeval.jsonl",
        stage="evaluation, IFEval",
        sampling=Sampling(temperature=0.0, max_new_tokens=limit),
        n=1,
        seed_path=(recipe.seed, "evaluation", "ifeval"),
    )
    checked = [ifeval.check(task, answer.text) for task, answer in zip(tasks, answers, strict=True)]
    write_records(directory.evaluation_dir / "ifeval.jsonl", checked)
    return {**ifeval.ifeval_metrics(checked), "max_new_tokens": limit}


def warnings(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What in an evaluation, beside the one before it, bodes ill."""
    found = []
    judge = now["judge"]
    score = collapsed_score(judge["score_histogram"])
    if score is not None:
        found.append(
            f"the judge gives nearly every reply the score {score}: its grades have collapsed "
            "and say nothing; look at `srlm-lite show judgements`"
        )
    readable = judge.get("parse_rate")
    if readable is not None and readable < LEAST_READABLE:
        found.append(
            f"only {readable:.0%} of the judge's votes can be read: give the anchor "
            "more judge data, or raise judge.max_new_tokens"
        )
    accuracy = judge["pairwise_accuracy"]
    earlier = before["judge"]["pairwise_accuracy"] if before else None
    if accuracy is not None and earlier is not None:
        # Two standard errors of a share near one half: fewer pairs, more patience.
        chance = 1 / judge["pairs"] ** 0.5
        if earlier - accuracy > max(ACCURACY_FALL, chance):
            found.append(
                f"the judge's pairwise accuracy fell from {earlier:.2f} to {accuracy:.2f}: later "
                "iterations learn from worse grades"
            )
    gold = now["policy"].get("gold_mean")
    gold_before = before["policy"].get("gold_mean") if before else None
    error = now["policy"].get("gold_se") or 0.0
    if gold is not None and gold_before is not None and gold < gold_before - 2 * error:
        found.append(f"the gold score fell from {gold_before:.2f} to {gold:.2f}")
    return found
