"""One iteration: prompts, candidates, judgements, preference pairs, delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

from srlm_lite import methods
from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.evaluate.judge_metrics import judge_metrics
from srlm_lite.pairing import Drops
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt, RankedReply
from srlm_lite.run_dir import (
    IterationDir,
    read_json,
    read_records,
    write_json,
    write_records,
)
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.stages.anchor import scratch
from srlm_lite.stages.sampling import judge_replies, sample_candidates
from srlm_lite.stages.seed_data import prompt_file, read_prompts
from srlm_lite.stages.self_instruct import write_prompts

if TYPE_CHECKING:
    from srlm_lite.training.dpo import PairExample


def prompts(session: Session, iteration: IterationDir) -> tuple[list[Prompt], dict[str, Any]]:
    """The iteration's prompts: the next slice of the shuffled list, or newly written ones."""
    section = session.recipe.prompts
    if iteration.prompts.is_file():
        found = read_records(iteration.prompts, Prompt)
        return found, {"prompts": len(found)}
    if section.source == "self-instruct":
        chosen, facts = write_prompts(session, iteration)
    else:
        path = prompt_file(session.recipe)
        chosen, facts = _slice(session, read_prompts(path), iteration.number, path)
    write_records(iteration.prompts, chosen)
    return chosen, {"prompts": len(chosen), **facts}


def _slice(
    session: Session, pool: list[Prompt], number: int, path: Path
) -> tuple[list[Prompt], dict[str, Any]]:
    section = session.recipe.prompts
    room = session.recipe.base.window - session.recipe.rollout.max_new_tokens
    fitting = [p for p in pool if len(session.chat.prompt_ids(p.text)) <= room]
    Random(f"{session.recipe.seed}/prompts").shuffle(fitting)
    first, last = (number - 1) * section.per_iteration, number * section.per_iteration
    if last > len(fitting) and not section.reuse:
        raise UserError(
            f"iteration {number} needs prompts {first + 1} to {last}, but the list has "
            f"{len(fitting)} that fit the window",
            where=str(path),
            way_out="Lower prompts.per_iteration, or set prompts.reuse=true",
        )
    if len(fitting) < section.per_iteration:
        raise UserError(
            f"has {len(fitting)} prompts that fit the window, fewer than prompts.per_iteration "
            f"= {section.per_iteration}",
            where=str(path),
        )
    chosen = [fitting[i % len(fitting)] for i in range(first, last)]
    return chosen, {"too_long": len(pool) - len(fitting)}


def candidates(
    session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
) -> tuple[list[Candidate], dict[str, Any]]:
    """N answers to each prompt from the current policy."""
    section = session.recipe.rollout
    rows = sample_candidates(
        session,
        session.stack(iteration.number - 1),
        prompts,
        path=iteration.candidates,
        stage="candidates",
        sampling=section,
        n=section.n,
        seed_path=(session.recipe.seed, iteration.number, "candidates"),
    )
    return rows, {
        "candidates": len(rows),
        "truncated": sum(row.finish_reason == "length" for row in rows),
        "mean_tokens": round(fmean(row.n_tokens for row in rows), 1),
    }


def judgements(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
) -> tuple[list[Judgement], dict[str, Any]]:
    """K votes on each candidate from the same weights in the judge's role.

    Candidates that pairing would leave out whatever their score, empty or (where the recipe
    drops those) truncated, are not judged.
    """
    recipe = session.recipe
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}
    replies = [
        (row.candidate_id, texts[row.prompt_id], row.text)
        for row in candidates
        if row.text and not (recipe.pairing.drop_truncated and row.finish_reason == "length")
    ]
    rows = judge_replies(
        session,
        session.stack(iteration.number - 1),
        replies,
        path=iteration.judgements,
        stage="judgements",
        votes=recipe.judge.votes,
        chunk=recipe.rollout.chunk_prompts * recipe.rollout.n,
        seed_path=(recipe.seed, iteration.number, "judgements"),
    )
    readable = [row.score for row in rows if row.score is not None]
    return rows, {
        "judgements": len(rows),
        "parse_rate": round(len(readable) / max(1, len(rows)), 4),
        "mean_score": round(fmean(readable), 3) if readable else None,
        **_on_policy_accuracy(recipe.evaluate.gold, texts, candidates, rows),
    }


def _on_policy_accuracy(
    gold_name: str | None,
    texts: Mapping[str, str],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
) -> dict[str, Any]:
    """Share of the policy's own candidates' pairs that the judge puts in the gold order."""
    if gold_name is None:
        return {}
    gold = load_gold(gold_name)
    judged = {row.candidate_id for row in judgements}
    by_prompt: dict[str, dict[Candidate, float]] = {}
    for row in candidates:
        if row.candidate_id in judged:
            points = gold.total(texts[row.prompt_id], row.text)
            by_prompt.setdefault(row.prompt_id, {})[row] = points
    groups = []
    for prompt_id, points_of in by_prompt.items():
        order = sorted(set(points_of.values()), reverse=True)
        groups.append(
            [
                RankedReply(
                    prompt_id, texts[prompt_id], row.candidate_id, row.text, order.index(points)
                )
                for row, points in points_of.items()
            ]
        )
    # The best possible score plays no part in the pairwise accuracy.
    metrics = judge_metrics(groups, judgements, best_score=0.0)
    return {"gold_pairwise_accuracy": metrics["pairwise_accuracy"]}


def pairs(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """The method's preference pairs that fit the window.

    Raises:
        UserError: Fewer than `pairing.min_pairs`; says why prompts gave none.
    """
    recipe = session.recipe
    made, drops = methods.pairs(
        recipe, prompts, candidates, judgements, seed_path=(recipe.seed, iteration.number, "pairs")
    )
    fitting = [pair for pair in made if len(pair_example(session, pair)) <= recipe.base.window]
    drops.prompts["too_long"] += len(made) - len(fitting)
    write_json(iteration.drops, drops.to_json())
    _refuse_too_few(session, fitting, drops, iteration)
    write_records(iteration.pairs, fitting)
    return fitting, {
        "pairs": len(fitting),
        "drops": {reason: count for reason, count in drops.prompts.items() if count},
        **_gold_agreement(recipe.evaluate.gold, fitting),
    }


def _refuse_too_few(
    session: Session, pairs: Sequence[PreferencePair], drops: Drops, iteration: IterationDir
) -> None:
    needed = session.recipe.pairing.min_pairs
    if len(pairs) >= needed:
        return
    advice = {
        "tied": "raise judge.votes or rollout.n, or train a finer judge",
        "truncated": "raise rollout.max_new_tokens",
        "unreadable": "raise judge.max_new_tokens, or give the anchor more judge data",
        "too_few_votes": "raise judge.max_new_tokens or judge.votes",
        "duplicate": "raise rollout.temperature",
        "empty": "check the chat template and the anchor",
        "too_long": "raise base.window or lower rollout.max_new_tokens",
    }
    main = next((reason for reason, count in drops.prompts.most_common(1) if count), "")
    raise UserError(
        f"iteration {iteration.number} has {len(pairs)} preference pairs, fewer than "
        f"pairing.min_pairs = {needed}; prompts without one: {drops.summary() or 'none'}",
        where=str(iteration.path),
        way_out=f"To change that, {advice.get(main, 'give more prompts')}; "
        "more prompts help always (prompts.per_iteration)",
    )


def _gold_agreement(gold_name: str | None, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """How often the pairs' order is the gold scorer's: right, reversed, or tied in gold."""
    if gold_name is None:
        return {}
    gold = load_gold(gold_name)
    gaps = [gold.total(p.prompt, p.chosen) - gold.total(p.prompt, p.rejected) for p in pairs]
    return {
        "gold_agreement": {
            "right": sum(gap > 0 for gap in gaps),
            "reversed": sum(gap < 0 for gap in gaps),
            "tied": sum(gap == 0 for gap in gaps),
        }
    }


def pair_example(session: Session, pair: PreferencePair) -> PairExample:
    """A preference pair as ids."""
    from srlm_lite.training.dpo import PairExample

    return PairExample(
        prompt_ids=tuple(session.chat.prompt_ids(pair.prompt)),
        chosen_ids=tuple(session.chat.target_ids(pair.chosen)),
        rejected_ids=tuple(session.chat.target_ids(pair.rejected)),
    )


def delta(
    session: Session, iteration: IterationDir, pairs: Sequence[PreferencePair]
) -> tuple[None, dict[str, Any]]:
    """DPO: what this iteration learns on top of the anchor."""
    if iteration.training.is_file():
        return None, read_json(iteration.training)
    from srlm_lite.training.arguments import total_steps
    from srlm_lite.training.dpo import train_dpo

    recipe = session.recipe
    seed = derive_seed(recipe.seed, iteration.number, "delta")
    anchor, *previous = session.stack(iteration.number - 1)
    start = session.slot.fresh(recipe.dpo.lora, seed=seed)
    if recipe.dpo.init == "previous" and previous:
        start = previous[0]
    reference = [anchor] if recipe.dpo.reference == "anchor" else [anchor, start]
    task = session.reporter.start("DPO", total_steps(len(pairs), recipe.dpo), "steps")

    def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
        task.advance()
        task.note(f"loss {logs['loss']:.3f} margin {logs['rewards/margins']:+.2f}")

    trained, facts = train_dpo(
        session.slot,
        session.base,
        anchor=[anchor],
        delta=start,
        reference=reference,
        pairs=[pair_example(session, pair) for pair in pairs],
        dpo=recipe.dpo,
        scratch=scratch(session.run.scratch),
        seed=seed,
        on_step=on_step,
    )
    trained.save(iteration.delta, base_name=recipe.base.name)
    write_json(iteration.training, facts)  # last: where it is, the delta is whole
    return None, facts
