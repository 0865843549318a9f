"""The anchor: one SFT on instruction data and judge data; base + anchor is the paper's M1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from srlm_lite.declared import NoSettings
from srlm_lite.errors import UserError
from srlm_lite.evaluate.reading import ADVICE, anchor_doubts, doubts
from srlm_lite.forms import form_of
from srlm_lite.forms.grade import GradeForm
from srlm_lite.judging import Rubric, as_sampled, parse_score
from srlm_lite.progress import Training
from srlm_lite.recipe import Recipe
from srlm_lite.records import (
    Instruction,
    Judgement,
    RankedReply,
    SampledInstruction,
    SampledTarget,
)
from srlm_lite.run.files import read_json, write_json, write_records
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.settings import Optim
from srlm_lite.stages.disturbed import Disturbed, disturbed_pairs
from srlm_lite.stages.judges import SessionJudge, as_candidates
from srlm_lite.stages.keeping import checkpoints, kept
from srlm_lite.stages.replies import learned_ids, without_thoughts
from srlm_lite.stages.seed_data import (
    data_file,
    prompts_to_disturb,
    ranked_file,
    read_extra,
    read_ift,
    read_ranked,
)

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter
    from srlm_lite.training.sft import Example


def anchor(session: Session) -> tuple[None, dict[str, Any]]:
    """Train the anchor, or take the one the recipe ships, into the run directory.

    Raises:
        UserError: No data to train on, or none of the self-written judgements agrees with the
            human order.
    """
    directory = session.run.anchor
    section = session.recipe.anchor
    if directory.training.is_file():
        trained = {"steps": int} if section.init == "base" else {}
        return None, read_json(directory.training, **trained)
    shipped = session.shipped_anchor
    if shipped is not None:
        _ = session.slot  # refused here if it does not fit the base
        return None, _save(session, shipped, {"taken_from": section.init})

    ift = ift_examples(session, read_ift(session.recipe)) if section.use_ift else []
    extra = ift_examples(session, read_extra(session.recipe), as_they_stand=True)
    eft: list[Example] = []
    facts: dict[str, Any] = {"ift": len(ift), **({"extra": len(extra)} if extra else {})}
    if section.use_eft:
        eft = judge_examples(session, ift, facts)
        facts["eft"] = len(eft)
    examples, too_long = fitting_examples(session, [*ift, *extra, *eft])
    if not examples:
        raise UserError(
            f"nothing to train the anchor on ({too_long} rows are longer than base.window)",
            where=f"data.dir = {session.recipe.data.dir}",
        )
    with kept(session):
        adapter, training = _train(session, examples, stage="anchor SFT", seed_name="anchor")
        reading = read_json(directory.reading) if directory.reading.is_file() else {}
        told = anchor_doubts(reading, training)
        if told and not doubts(reading):  # of which the user knows
            session.reporter.warn(f"{'; '.join(told)}: {ADVICE}")
        return None, _save(session, adapter, {**facts, "too_long": too_long, **training})


def _save(session: Session, adapter: Adapter, facts: dict[str, Any]) -> dict[str, Any]:
    # The facts come last: where they are, the adapter is whole.
    directory = session.run.anchor
    adapter.save(directory.adapter, base_name=session.recipe.base.name)
    write_json(directory.training, facts)
    return facts


def ift_examples(
    session: Session, rows: Sequence[Instruction], *, as_they_stand: bool = False
) -> list[Example]:
    """Instruction data as ids.

    Args:
        as_they_stand: Without the recipe's system message.
    """
    from srlm_lite.training.sft import Example

    chat = session.chat
    return [
        Example(
            prompt_ids=tuple(chat.prompt_ids(row.asked) if as_they_stand else chat.policy_ids(row)),
            target_ids=learned_ids(
                chat,
                row.response,
                row.ids if isinstance(row, SampledInstruction) else None,
            ),
        )
        for row in rows
    ]


def judge_examples(
    session: Session, ift: Sequence[Example], facts: dict[str, Any]
) -> list[Example]:
    """Judge data as ids: questions of the recipe's form of judging, or the rubric's.

    Raises:
        UserError: No two replies to a prompt are ranked apart, and the form is taught by such.
    """
    recipe, form = session.recipe, form_of(session.recipe)
    if not form.has_lessons:
        return [_judge_example(session, row) for row in eft_rows(session, ift, facts)]
    if recipe.anchor.eft_targets == "disturbed":
        found, path = _disturbed(session, _writes_pairs(session, ift))
        groups: Sequence[Sequence[RankedReply]] = found.groups
        facts["eft_drops"] = dict(found.drops)
    else:
        path = ranked_file(recipe)
        groups = without_thoughts(session.chat, read_ranked(path, recipe.anchor.eft_prompts))
    lessons = lessons_of(recipe, groups, session.rubric, path)
    write_records(session.run.anchor.eft_targets, lessons)
    return ift_examples(session, lessons, as_they_stand=True)


def lessons_of(
    recipe: Recipe, groups: Sequence[Sequence[RankedReply]], rubric: Rubric, path: Path
) -> list[Instruction]:
    """What teaches an anchor to judge in the recipe's form.

    Args:
        path: Of the replies, for messages.

    Raises:
        UserError: No two replies to a prompt are ranked apart.
    """
    lessons = form_of(recipe).lessons(groups, rubric)
    if not lessons:
        raise UserError(
            f"ranks no two replies to a prompt apart, and judge.form={recipe.judge.form} is taught "
            "by such",
            where=str(path),
            way_out="Name replies that people ranked as data.ranked, or leave judge data out "
            "(anchor.use_eft=false)",
        )
    return lessons


def eft_rows(session: Session, ift: Sequence[Example], facts: dict[str, Any]) -> list[RankedReply]:
    """Judge data with targets, from where the recipe says."""
    section = session.recipe.anchor
    drops: Mapping[str, int] = {}
    if section.eft_targets == "disturbed":
        stack = _writes_pairs(session, ift)
        found, path = _disturbed(session, stack)
        scored, disagreeing = _self_written_targets(session, stack, found.groups, path)
        drops = {**found.drops, **disagreeing}
    else:
        path = data_file(session.recipe, "eft_train.jsonl")
        groups = without_thoughts(session.chat, read_ranked(path, section.eft_prompts))
        if section.eft_targets == "given":
            rows = given_targets(groups, session.rubric, path)
            return rows if session.recipe.judge.rationale else score_lines(rows, session.rubric)
        if section.eft_targets == "human":
            scored = human_targets(groups, session.rubric)
        else:
            scored, drops = _self_written_targets(session, _ift_stack(session, ift), groups, path)
    thinned = thin_most_common(
        scored, max_share=section.max_score_share, rng=Random(f"{session.recipe.seed}/thin")
    )
    facts["eft_drops"] = {**drops, "thinned": len(scored) - len(thinned)}
    rows = [row for row, _ in thinned]
    write_records(session.run.anchor.eft_targets, rows)
    return rows


def given_targets(
    groups: Sequence[Sequence[RankedReply]], rubric: Rubric, path: Path
) -> list[RankedReply]:
    """The replies of judge data whose targets the data has.

    Raises:
        UserError: Some have none, or one that ends in no score of the rubric.
    """
    rows = [row for group in groups for row in group]
    without = sum(row.target is None for row in rows)
    if without or not rows:
        raise UserError(
            f"{without} of {len(rows)} rows have no target",
            where=str(path),
            way_out="Set anchor.eft_targets=self to let the IFT-only model write them, or =human "
            "to take the human order as it is",
        )
    unread = [r.response_id for r in rows if parse_score(r.target or "", rubric) is None]
    if unread:
        raise UserError(
            f"{len(unread)} targets do not end in a score the rubric allows, "
            f"the first for response {unread[0]}",
            where=str(path),
        )
    return rows


def score_lines(rows: Sequence[RankedReply], rubric: Rubric) -> list[RankedReply]:
    """The same rows with targets that are nothing but the score line: no reasons before it."""
    scores = [parse_score(row.target or "", rubric) for row in rows]
    return [
        replace(row, target=f"Score: {score:g}") for row, score in zip(rows, scores, strict=True)
    ]


def _writes_pairs(session: Session, ift: Sequence[Example]) -> list[Adapter]:
    """Who disturbs prompts. It has learned the extra rows, for the question may be among them."""
    extra = ift_examples(session, read_extra(session.recipe), as_they_stand=True)
    return _ift_stack(session, [*ift, *extra])


def _disturbed(session: Session, stack: Sequence[Adapter]) -> tuple[Disturbed, Path]:
    """Pairs whose loser is known, and the file that their prompts are from.

    Raises:
        UserError: The model made none.
    """
    prompts, path = prompts_to_disturb(session.recipe)
    found = disturbed_pairs(
        session,
        stack,
        prompts,
        folder=session.run.anchor.disturbed,
        seed_path=(session.recipe.seed, "eft-disturbed"),
    )
    if not found.groups:
        told = ", ".join(f"{count} {reason}" for reason, count in found.drops.items())
        raise UserError(
            f"the IFT-only model made no pair of {len(prompts)} prompts ({told})",
            where=f"anchor.disturb_template = {session.recipe.anchor.disturb_template}",
            way_out="Teach it such questions with rows of data.extra, give more prompts "
            "(anchor.eft_prompts), or set anchor.eft_targets=self where replies are ranked",
        )
    return found, path


def _self_written_targets(
    session: Session,
    stack: Sequence[Adapter],
    groups: Sequence[Sequence[RankedReply]],
    path: Path,
) -> tuple[list[tuple[RankedReply, float]], dict[str, int]]:
    known = "known" if session.recipe.anchor.eft_targets == "disturbed" else "human"
    judge = SessionJudge(
        session,
        stack,
        place=session.run.anchor.eft_file,
        stage="EFT targets",
        seed_path=(session.recipe.seed, "eft-targets"),
        every_vote=True,
    )
    rows = [row for group in groups for row in group]
    judgements, _ = GradeForm(session.recipe, NoSettings()).judge(judge, *as_candidates(rows))
    kept, drops = agreeing_targets(groups, judgements)
    if not kept:
        raise UserError(
            f"the IFT-only model's judgements agree with the {known} order on none of "
            f"{len(groups)} prompts ({drops['unreadable']} unreadable, "
            f"{drops['disagreeing']} disagreeing)",
            where=str(path),
            way_out="Set anchor.eft_targets=human for a base this small, give more prompts "
            "(anchor.eft_prompts), or leave judge data out (anchor.use_eft=false)",
        )
    return kept, drops


def human_targets(
    groups: Sequence[Sequence[RankedReply]], rubric: Rubric
) -> list[tuple[RankedReply, float]]:
    """Targets that say the human order alone: `Score: <n>`, without a rationale.

    The human quality, from the lowest to the highest of the data, becomes the rubric's scale,
    rounded to its step (1 where it has none). Without a quality the rank does: the best reply of
    a prompt gets the rubric's maximum, the worst its minimum.
    """
    qualities = [row.quality for group in groups for row in group if row.quality is not None]
    low, high = (min(qualities), max(qualities)) if qualities else (0.0, 1.0)
    step = rubric.step or 1.0
    scored = []
    for group in groups:
        worst = max((row.rank for row in group), default=0)
        for row in group:
            if row.quality is not None:
                share = (row.quality - low) / (high - low) if high > low else 1.0
            else:
                share = 1 - row.rank / worst if worst else 1.0
            score = rubric.min + round(share * (rubric.max - rubric.min) / step) * step
            scored.append((replace(row, target=f"Score: {score:g}"), score))
    return scored


def agreeing_targets(
    groups: Sequence[Sequence[RankedReply]], judgements: Sequence[Judgement]
) -> tuple[list[tuple[RankedReply, float]], dict[str, int]]:
    """The judgements whose order over a prompt's replies agrees with the human order.

    Vote v of all replies of a prompt is one try at ordering them; the first try that agrees
    gives the targets of that prompt. A try agrees when, for every two replies of different
    human rank, the better one has the higher score; replies of equal rank may have any scores.
    What counts is the score that a judgement says, which is what is learned, and no expected one.

    Returns:
        Rows with their target and its score; and the prompts left out, by reason.

    Source: Yuan et al. 2024, arXiv:2401.10020, section 3.1.1. How often the paper sampled each
    reply, and what it did with ties, is not stated there.
    """
    by_reply: dict[str, list[Judgement]] = {}
    for judgement in map(as_sampled, judgements):
        by_reply.setdefault(judgement.candidate_id, []).append(judgement)
    kept: list[tuple[RankedReply, float]] = []
    drops = Counter({"unreadable": 0, "disagreeing": 0})
    for group in groups:
        tries = list(zip(*(by_reply[row.response_id] for row in group), strict=True))
        readable = [t for t in tries if all(judgement.score is not None for judgement in t)]
        agreeing = (t for t in readable if _agrees(group, [j.score or 0.0 for j in t]))
        first = next(agreeing, None)
        if first is None:
            drops["disagreeing" if readable else "unreadable"] += 1
            continue
        kept.extend(
            (
                SampledTarget(
                    **{**row.to_row(), "target": judgement.text}, target_ids=judgement.ids
                ),
                judgement.score or 0.0,
            )
            for row, judgement in zip(group, first, strict=True)
        )
    return kept, dict(drops)


def _agrees(group: Sequence[RankedReply], scores: Sequence[float]) -> bool:
    return all(
        (score_a > score_b) if a.rank < b.rank else (score_a < score_b)
        for (a, score_a), (b, score_b) in combinations(zip(group, scores, strict=True), 2)
        if a.rank != b.rank
    )


def thin_most_common(
    rows: Sequence[tuple[RankedReply, float]], *, max_share: float, rng: Random
) -> list[tuple[RankedReply, float]]:
    """Drop rows of the most common score, drawn at random, until its share is at most max_share.

    It keeps at least as many rows as the next most common score.
    A judge trained on one dominant score learns to give that score (the paper's 4s).
    """
    counts = Counter(score for _, score in rows).most_common(2)
    if len(counts) < 2:
        return list(rows)
    (common, count), (_, runner_up) = counts
    # count' / (count' + others) <= max_share; but no score is thinned below the next one.
    others = len(rows) - count
    allowed = others * max_share // (1 - max_share) if max_share < 1 else count
    excess = max(0, count - max(int(allowed), runner_up))
    places = [i for i, (_, score) in enumerate(rows) if score == common]
    dropped = set(rng.sample(places, excess))
    return [row for i, row in enumerate(rows) if i not in dropped]


def _ift_stack(session: Session, ift: Sequence[Example]) -> list[Adapter]:
    """Who writes the EFT targets: the base where there is nothing to learn before."""
    return [_ift_only(session, ift)] if ift else []


def _ift_only(session: Session, ift: Sequence[Example]) -> Adapter:
    from srlm_lite.model.stack import WEIGHTS, Adapter

    path = session.run.anchor.ift_only
    if (path / WEIGHTS).is_file():
        return Adapter.load(path)
    examples, _ = fitting_examples(session, ift)
    with kept(session):
        adapter, _ = _train(session, examples, stage="IFT-only SFT", seed_name="ift-only")
        adapter.save(path, base_name=session.recipe.base.name)
    return adapter


def _judge_example(session: Session, row: RankedReply) -> Example:
    from srlm_lite.training.sft import Example

    judge_prompt = session.rubric.render(prompt=row.prompt, response=row.response)
    return Example(
        prompt_ids=tuple(session.chat.prompt_ids(judge_prompt)),
        target_ids=learned_ids(
            session.chat,
            row.target or "",
            row.target_ids if isinstance(row, SampledTarget) else None,
        ),
    )


def fitting_examples(session: Session, examples: Sequence[Example]) -> tuple[list[Example], int]:
    """Those that fit the window, and how many do not."""
    fitting = [example for example in examples if len(example) <= session.recipe.base.window]
    return fitting, len(examples) - len(fitting)


def _train(
    session: Session, examples: Sequence[Example], *, stage: str, seed_name: str
) -> tuple[Adapter, dict[str, float]]:
    section = session.recipe.anchor
    seed = derive_seed(session.recipe.seed, seed_name)
    start = session.slot.fresh(section.lora, seed=seed)
    return session.together(
        Sft(
            start,
            examples,
            stage,
            Training(0, seed_name),
            seed,
            optim=section,
            dropout=section.lora.dropout,
        )
    )


@dataclass(frozen=True, slots=True)
class Sft:
    """A training on answers, in one process or in all; `below` is the frozen part of the stack."""

    start: Adapter
    examples: Sequence[Example]
    stage: str
    training: Training
    seed: int
    optim: Optim
    dropout: float = 0.0
    below: Sequence[Adapter] = ()

    def __call__(self, session: Session) -> tuple[Adapter, dict[str, float]]:
        from srlm_lite.training.arguments import total_steps
        from srlm_lite.training.sft import train_sft

        session.close_engines()
        steps = total_steps(len(self.examples), self.optim)
        task = session.reporter.start(self.stage, steps, "steps")

        def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
            task.advance()
            task.note(f"loss {logs['loss']:.3f}")
            session.tracker.step(self.training, step, logs)

        return train_sft(
            session.slot,
            session.base,
            self.start,
            self.examples,
            below=self.below,
            optim=self.optim,
            dropout=self.dropout,
            scratch=scratch(session.run.scratch),
            seed=self.seed,
            on_step=on_step,
            checkpoints=checkpoints(session, self.training, self.stage, task),
        )


def scratch(path: Path) -> Path:
    """The scratch folder, made if need be."""
    path.mkdir(parents=True, exist_ok=True)
    return path
