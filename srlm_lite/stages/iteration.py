"""One iteration: prompts, candidates, judgements, preference pairs, delta."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

from srlm_lite.engines import Role
from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.evaluate.judge_metrics import judge_metrics
from srlm_lite.pairing import Drops, replayed
from srlm_lite.progress import Training
from srlm_lite.records import (
    Candidate,
    FinishReason,
    Instruction,
    Judgement,
    PreferencePair,
    Prompt,
    RankedReply,
    TrainingStep,
)
from srlm_lite.rollout.protocol import Sample
from srlm_lite.run.files import read_json, read_records, write_json, write_records
from srlm_lite.run.layout import DeltaPlace, IterationDir
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.settings import Dpo, Optim, Scir
from srlm_lite.stages.anchor import Sft, fitting_examples, ift_examples, scratch
from srlm_lite.stages.replies import candidate_of, learned_ids
from srlm_lite.stages.sampling import judge_replies, sample_candidates
from srlm_lite.stages.seed_data import check_window, prompt_file, read_prompts
from srlm_lite.stages.self_instruct import write_prompts

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter
    from srlm_lite.training.dpo import PairExample
    from srlm_lite.training.reward import RewardModel


Pool = tuple[list[Prompt], Path]
"""Prompts that the iterations take theirs from, and the file they are from."""
DpoFacts = dict[str, float]


def prompts(
    session: Session, iteration: IterationDir, pool: Callable[[Session], Pool | None]
) -> tuple[list[Prompt], dict[str, Any]]:
    """The iteration's prompts: the next slice of the shuffled list, or newly written ones.

    Args:
        pool: Gives that list, or None where prompts are written.
    """
    if iteration.prompts.is_file():
        found = read_records(iteration.prompts, Prompt)
        return found, {"prompts": len(found)}
    listed = pool(session)
    if listed is None:
        chosen, facts = write_prompts(session, iteration)
    else:
        chosen, facts = _slice(session, listed, iteration.number)
    write_records(iteration.prompts, chosen)
    return chosen, {"prompts": len(chosen), **facts}


def listed_prompts(session: Session) -> Pool | None:
    """The recipe's own list, where it has one."""
    if session.recipe.prompts.source == "self-instruct":
        return None
    path = prompt_file(session.recipe)
    return read_prompts(path), path


def check_prompts(session: Session, pool: Callable[[Session], Pool | None]) -> None:
    """Find out before the anchor is trained whether the last iteration will have prompts.

    Raises:
        UserError: Too few of them fit the window, or none can beside a thought.
    """
    if session.recipe.iterations:
        check_window(session.recipe, thought=session.thought_tokens())
    found = pool(session) if session.recipe.iterations else None
    if found is not None:
        _fitting(session, found, session.recipe.iterations)


def _slice(session: Session, pool: Pool, number: int) -> tuple[list[Prompt], dict[str, Any]]:
    fitting = _fitting(session, pool, number)
    Random(f"{session.recipe.seed}/prompts").shuffle(fitting)
    count = session.recipe.prompts.per_iteration
    chosen = [fitting[i % len(fitting)] for i in range((number - 1) * count, number * count)]
    return chosen, {"too_long": len(pool[0]) - len(fitting)}


def _in_another_directory(session: Session) -> str:
    """What to add to advice that makes another run: its anchor need not be trained again."""
    if not session.run.anchor.training.is_file():
        return ""
    place = session.run.anchor.adapter.absolute()
    return f", in another directory; anchor.init={place} keeps this anchor"


def _fitting(session: Session, pool: Pool, number: int) -> list[Prompt]:
    """The prompts that fit the window, enough of them for this iteration."""
    section, (prompts, path) = session.recipe.prompts, pool
    fitting = [prompt for prompt in prompts if session.leaves_room(prompt.text)]
    first, last = (number - 1) * section.per_iteration, number * section.per_iteration
    way_out = "Lower prompts.per_iteration"
    if session.thought_tokens():
        way_out += " or rollout.max_thought_tokens"
    kept = _in_another_directory(session)
    if last > len(fitting) and not section.reuse:
        raise UserError(
            f"iteration {number} needs prompts {first + 1} to {last}, but the list has "
            f"{len(fitting)} that fit the window",
            where=str(path),
            way_out=f"{way_out}, or set prompts.reuse=true{kept}",
        )
    if len(fitting) < section.per_iteration:
        raise UserError(
            f"has {len(fitting)} prompts that fit the window, fewer than prompts.per_iteration "
            f"= {section.per_iteration}",
            where=str(path),
            way_out=f"{way_out}{kept}",
        )
    return fitting


def candidates(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    *,
    n: int | None = None,
    of: Answerer | None = None,
) -> tuple[list[Candidate], dict[str, Any]]:
    """N answers to each prompt from the current policy.

    Args:
        n: Other than the recipe's.
        of: Another model than the policy.
    """
    section = session.recipe.rollout
    of = of or Answerer(session.stack(iteration.number - 1), iteration.candidates)
    rows = sample_candidates(
        session,
        of.stack,
        prompts,
        path=of.path,
        stage=of.stage,
        sampling=section,
        n=n or section.n,
        seed_path=(session.recipe.seed, iteration.number, of.stage),
        tag=of.tag,
        role=of.role,
    )
    return rows, candidate_facts(rows)


def candidate_facts(rows: Sequence[Candidate]) -> dict[str, Any]:
    """What `metrics.jsonl` keeps of candidates."""
    return {
        "candidates": len(rows),
        "truncated": sum(row.finish_reason == "length" for row in rows),
        "mean_tokens": round(fmean(row.n_tokens for row in rows), 1),
    }


@dataclass(frozen=True, slots=True)
class Answerer:
    """A model that answers the prompts, where its answers go, and what marks their names."""

    stack: Sequence[Adapter]
    path: Path
    stage: str = "candidates"
    tag: str = ""
    role: Role = "policy"


@dataclass(frozen=True, slots=True)
class Grader:
    """A model that grades candidates, and where its judgements go."""

    stack: Sequence[Adapter]
    path: Path
    stage: str = "judgements"


def no_judgements(iteration: IterationDir) -> tuple[list[Judgement], dict[str, Any]]:
    """Of a method without a judge: an empty file, for whoever reads the run."""
    write_records(iteration.judgements, [])
    return [], {"judgements": 0, "parse_rate": None, "mean_score": None}


def judgements(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    *,
    by: Grader | None = None,
) -> tuple[list[Judgement], dict[str, Any]]:
    """K votes on each candidate from the same weights in the judge's role, or `by` others.

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
    by = by or Grader(session.stack(iteration.number - 1, "judge"), iteration.judgements)
    rows = judge_replies(
        session,
        by.stack,
        replies,
        path=by.path,
        stage=by.stage,
        votes=recipe.judge.votes,
        chunk=recipe.rollout.chunk_prompts * recipe.rollout.n,
        seed_path=(recipe.seed, iteration.number, by.stage),
    )
    readable = [row.score for row in rows if row.score is not None]
    return rows, {
        "judgements": len(rows),
        "parse_rate": round(len(readable) / max(1, len(rows)), 4),
        "mean_score": round(fmean(readable), 3) if readable else None,
        **on_policy_accuracy(recipe.evaluate.gold, texts, candidates, rows),
    }


def on_policy_accuracy(
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


def keep_pairs(
    session: Session,
    iteration: IterationDir,
    made: Sequence[PreferencePair],
    drops: Drops,
    *,
    origin: str = "",
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """The method's preference pairs that fit the window, and older ones to replay.

    Args:
        origin: Of the pairs that the iteration is about, and that `drops` tells of.

    Raises:
        UserError: Fewer new ones than `pairing.min_pairs`; says why prompts gave none.
    """
    recipe = session.recipe
    fitting = fitting_pairs(session, made)
    own = [pair for pair in fitting if not pair.origin]
    main = [pair for pair in fitting if pair.origin == origin]
    drops.prompts["too_long"] += sum(pair.origin == origin for pair in made) - len(main)
    write_json(iteration.drops, drops.to_json())
    _refuse_too_few(session, main, drops, iteration)
    older = [
        read_records(session.run.iteration(t).pairs, PreferencePair)
        for t in range(iteration.number - 1, 0, -1)[: len(recipe.pairing.replay)]
    ]
    replays = replayed(
        older,
        new=len(own),
        shares=recipe.pairing.replay,
        seed=derive_seed(recipe.seed, iteration.number, "replay"),
    )
    write_records(iteration.pairs, [*fitting, *replays])
    return [*fitting, *replays], {
        "pairs": len(own),
        **({"judge_pairs": len(fitting) - len(own)} if len(fitting) > len(own) else {}),
        **({"replayed": len(replays)} if replays else {}),
        "drops": {reason: count for reason, count in drops.prompts.items() if count},
        **(_own_facts(recipe.evaluate.gold, own) if own else {}),
    }


def _own_facts(gold_name: str | None, own: Sequence[PreferencePair]) -> dict[str, Any]:
    return {
        "chosen_chars": _mean_length([pair.chosen for pair in own]),
        "rejected_chars": _mean_length([pair.rejected for pair in own]),
        **_gold_agreement(gold_name, own),
    }


def fitting_pairs(session: Session, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs whose two sequences both fit the window."""
    window = session.recipe.base.window
    return [pair for pair in pairs if len(pair_example(session, pair)) <= window]


def _mean_length(texts: Sequence[str]) -> float:
    return round(fmean(len(text) for text in texts), 1)


def _refuse_too_few(
    session: Session, pairs: Sequence[PreferencePair], drops: Drops, iteration: IterationDir
) -> None:
    needed = session.recipe.pairing.min_pairs
    if len(pairs) >= needed:
        return
    advice = {
        "tied": "raise judge.votes or rollout.n, or train a finer judge",
        "narrow": "lower pairing.min_gap",
        "truncated": "raise rollout.max_new_tokens",
        "unreadable": "raise judge.max_new_tokens, or give the anchor more judge data",
        "too_long_to_judge": "raise base.window, or lower rollout.max_new_tokens or "
        "judge.max_new_tokens: what is sampled has to fit the judge's question",
        "too_few_votes": "raise judge.max_new_tokens or judge.votes",
        "duplicate": "raise rollout.temperature",
        "empty": "check the chat template and the anchor",
        "too_long": "raise base.window or lower rollout.max_new_tokens",
        "no_margin": "lower dno.least_positive or the margins",
        "unlabelled": "raise rlaif.max_new_tokens",
        "undisputed": "raise judge.votes",
        "long_chosen": "raise meta_rewarding.answer_caps",
    }
    if session.thought_tokens():
        advice["truncated"] += " or rollout.max_thought_tokens"
    main = next((reason for reason, count in drops.prompts.most_common(1) if count), "")
    go_on = f"Go on with them by pairing.min_pairs={len(pairs)}. " if pairs else ""
    raise UserError(
        f"iteration {iteration.number} has {len(pairs)} preference pairs, fewer than "
        f"pairing.min_pairs = {needed}; prompts without one: {drops.summary() or 'none'}",
        where=str(iteration.path),
        way_out=f"{go_on}To have more, {advice.get(main, 'give more prompts')}; more prompts "
        f"help always (prompts.per_iteration){_in_another_directory(session)}",
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
        chosen_ids=learned_ids(session.chat, pair.chosen, pair.chosen_ids),
        rejected_ids=learned_ids(session.chat, pair.rejected, pair.rejected_ids),
        weight=pair.weight,
        smoothing=pair.smoothing,
    )


def delta(
    session: Session,
    iteration: IterationDir,
    pairs: Sequence[PreferencePair],
    *,
    dpo: Dpo | None = None,
    place: DeltaPlace | None = None,
    consistency: Scir | None = None,
    role: Role = "policy",
) -> tuple[None, dict[str, Any]]:
    """DPO: what this iteration learns on top of the anchor.

    Args:
        dpo: Settings other than the recipe's.
        place: Where to put another delta than the iteration's own.
        consistency: Terms that pull the implicit reward towards the judge.
        role: Whose delta it is.
    """
    place = place or iteration.delta_place
    if place.training.is_file():
        return None, read_json(place.training, steps=int)
    recipe = session.recipe
    dpo = dpo or recipe.dpo
    seed = derive_seed(recipe.seed, iteration.number, place.name)
    anchor, start, reference = _from_where(session, iteration, dpo, seed=seed, role=role)
    examples = [pair_example(session, pair) for pair in pairs]
    training = Training(iteration.number, place.name)
    trained, (facts, curve) = session.together(
        _Dpo(training, anchor, start, reference, examples, dpo, consistency, seed)
    )
    trained.save(place.adapter, base_name=recipe.base.name)
    write_records(place.steps, curve)
    write_json(place.training, facts)  # last: where it is, the delta is whole
    return None, facts


@dataclass(frozen=True, slots=True)
class _Dpo:
    """The training of a delta, in one process or in all."""

    training: Training
    anchor: Adapter
    start: Adapter
    reference: Sequence[Adapter]
    pairs: Sequence[PairExample]
    dpo: Dpo
    consistency: Scir | None
    seed: int

    def __call__(self, session: Session) -> tuple[Adapter, tuple[DpoFacts, list[TrainingStep]]]:
        from srlm_lite.training.arguments import total_steps
        from srlm_lite.training.dpo import train_dpo

        session.close_engines()
        task = session.reporter.start("DPO", total_steps(len(self.pairs), self.dpo), "steps")
        curve: list[TrainingStep] = []

        def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
            curve.append(_training_step(step, logs))
            task.advance()
            task.note(f"loss {logs['loss']:.3f} margin {logs['rewards/margins']:+.2f}")
            session.tracker.step(self.training, step, logs)

        trained, facts = train_dpo(
            session.slot,
            session.base,
            anchor=[self.anchor],
            delta=self.start,
            reference=self.reference,
            pairs=self.pairs,
            dpo=self.dpo,
            consistency=self.consistency,
            scratch=scratch(session.run.scratch),
            seed=self.seed,
            on_step=on_step,
        )
        return trained, (facts, curve)


def _training_step(step: int, logs: dict[str, float]) -> TrainingStep:
    """A row of TRL's log under our names."""
    return TrainingStep(
        step=step,
        loss=logs["loss"],
        reward_margin=logs["rewards/margins"],
        reward_accuracy=logs["rewards/accuracies"],
        reward_chosen=logs["rewards/chosen"],
        reward_rejected=logs["rewards/rejected"],
        learning_rate=logs.get("learning_rate"),
        grad_norm=logs.get("grad_norm"),
    )


def same_delta(session: Session, iteration: IterationDir) -> None:
    """The policy's last delta once more, for an iteration that trains another role alone.

    Before any training it is one that changes nothing.
    """
    place = iteration.delta_place
    if place.training.is_file():
        return
    recipe, last = session.recipe, iteration.number - 1
    seed = derive_seed(recipe.seed, iteration.number, place.name)
    _, *deltas = session.stack(last)
    delta = deltas[0] if deltas else session.slot.fresh(recipe.dpo.lora, seed=seed)
    delta.save(place.adapter, base_name=recipe.base.name)
    write_json(place.training, {"same_as_iteration": last})


def sft_delta(
    session: Session, iteration: IterationDir, rows: Sequence[Instruction], *, optim: Optim
) -> tuple[None, dict[str, Any]]:
    """SFT: a fresh delta on top of the anchor that learns these answers.

    Raises:
        UserError: None of them fits the window.
    """
    place = iteration.delta_place
    if place.training.is_file():
        return None, read_json(place.training, steps=int)
    recipe = session.recipe
    examples, too_long = fitting_examples(session, ift_examples(session, rows))
    if not examples:
        raise UserError(
            f"iteration {iteration.number} has nothing to learn from ({too_long} answers are "
            "longer than base.window)",
            where=str(iteration.path),
            way_out="Look at what the model says there; give its anchor more data",
        )
    seed = derive_seed(recipe.seed, iteration.number, place.name)
    start = session.slot.fresh(recipe.dpo.lora, seed=seed)
    training = Training(iteration.number, f"{place.name} sft")
    trained, facts = session.together(
        Sft(start, examples, "revision SFT", training, seed, optim=optim, below=session.stack(0))
    )
    trained.save(place.adapter, base_name=recipe.base.name)
    told = {"answers": len(examples), "too_long": too_long, **facts}
    write_json(place.training, told)  # last: where it is, the delta is whole
    return None, told


def on_policy_delta(
    session: Session, iteration: IterationDir, prompts: Sequence[Prompt], reward: RewardModel
) -> tuple[None, dict[str, Any]]:
    """RLOO: a delta that learns from answers it draws itself; they become the candidates.

    Candidate i of a prompt is named `<prompt_id>#<i>` in the order in which they were drawn; its
    judgement is the reward.
    """
    from srlm_lite.training.arguments import total_steps
    from srlm_lite.training.rloo import answers_of_epoch, train_rloo

    recipe, place = session.recipe, iteration.delta_place
    seed = derive_seed(recipe.seed, iteration.number, place.name)
    anchor, start, reference = _from_where(session, iteration, recipe.dpo, seed=seed)
    session.close_engines()
    steps = total_steps(answers_of_epoch(len(prompts), recipe.dpo, recipe.rollout), recipe.dpo)
    task = session.reporter.start("RLOO", steps, "steps")
    training = Training(iteration.number, place.name)

    def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
        task.advance()
        task.note(f"reward {logs['reward']:+.2f} divergence {logs['kl']:.3f}")
        session.tracker.step(training, step, logs)

    trained, drawn, facts = train_rloo(
        session.slot,
        session.base,
        session.chat,
        anchor=[anchor],
        delta=start,
        reference=reference,
        reward=reward,
        prompts=[session.chat.prompt_ids(prompt.text) for prompt in prompts],
        optim=recipe.dpo,
        rollout=recipe.rollout,
        kl_weight=recipe.rlhf.kl_weight,
        drop_truncated=recipe.pairing.drop_truncated,
        scratch=scratch(session.run.scratch),
        seed=seed,
        thought_tokens=session.thought_tokens(),
        on_step=on_step,
    )
    seen: Counter[str] = Counter()
    candidates, judgements = [], []
    for one in drawn:
        prompt_id = prompts[one.prompt].prompt_id
        name = f"{prompt_id}#{seen[prompt_id]}"
        seen[prompt_id] += 1
        reason: FinishReason = "stop" if one.finished else "length"
        text, ids = session.chat.decode(one.reply_ids), one.reply_ids
        sample = Sample(text, ids, reason, len(ids))
        candidates.append(candidate_of(session.chat, prompt_id, name, sample))
        value = None if one.reward is None else round(one.reward, 6)
        judgements.append(Judgement(name, 0, "", value, reason))
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}
    told = {
        "drawn": len(drawn),
        **facts,
        **on_policy_accuracy(recipe.evaluate.gold, texts, candidates, judgements),
    }
    write_records(iteration.candidates, candidates)
    write_records(iteration.judgements, judgements)
    trained.save(place.adapter, base_name=recipe.base.name)
    write_json(place.training, told)  # last: where it is, the delta is whole
    return None, told


def _from_where(
    session: Session, iteration: IterationDir, dpo: Dpo, *, seed: int, role: Role = "policy"
) -> tuple[Adapter, Adapter, list[Adapter]]:
    """The anchor, the delta that training starts from, and the reference stack."""
    anchor, *previous = session.stack(iteration.number - 1, role)
    start = session.slot.fresh(dpo.lora, seed=seed)
    if dpo.init == "previous" and previous:
        start = previous[0]
    return anchor, start, [anchor] if dpo.reference == "anchor" else [anchor, start]


def stack_of(session: Session, place: DeltaPlace) -> list[Adapter]:
    """The anchor and a delta that is not an iteration's own."""
    from srlm_lite.model.stack import Adapter

    return [*session.stack(0), Adapter.load(place.adapter)]
