"""The reward model: trained once on replies that humans ranked, and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from srlm_lite.errors import UserError
from srlm_lite.pairing import best_and_worst, told_apart
from srlm_lite.progress import Training
from srlm_lite.records import Candidate, Instruction, PreferencePair, Prompt, RankedReply
from srlm_lite.run.files import read_json
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.settings import Optim
from srlm_lite.stages.anchor import ift_examples, scratch
from srlm_lite.stages.keeping import checkpoints, kept
from srlm_lite.stages.pairs import pair_example
from srlm_lite.stages.replies import without_thoughts
from srlm_lite.stages.seed_data import data_file, ranked_file, read_ranked

if TYPE_CHECKING:
    from srlm_lite.training.reward import RewardModel


Kind = Literal["best-worst", "all"]
"""Which of a prompt's replies become pairs."""


def ranked_pairs(group: Sequence[RankedReply], kind: Kind) -> list[PreferencePair]:
    """Pairs of a prompt's replies that humans told apart, scored by -rank.

    Args:
        kind: `all` of them, or `best-worst`.
    """
    scored = [
        (Candidate(row.prompt_id, row.response_id, row.response, 0, "stop"), -float(row.rank))
        for row in group
    ]
    if kind == "best-worst":
        scored = list(best_and_worst(scored))
    return told_apart(Prompt.of(group[0]), scored)


def reward_model(
    session: Session, *, optim: Optim, pairs: Kind
) -> tuple[RewardModel, dict[str, Any]]:
    """The run's reward model and the facts of its training; trained where there is none.

    `accuracy_held_out` is the share of the judge's held-out replies, two by two, that it puts in
    the human order.

    Raises:
        UserError: No two ranked replies fit the window.
    """
    from srlm_lite.training.reward import RewardModel

    directory = session.run.reward
    if not directory.is_done:
        _train(session, optim, pairs)
    done = read_json(directory.done)
    return RewardModel.load(directory.adapter, directory.head), done["training"]


def _train(session: Session, optim: Optim, kind: Kind) -> None:
    from srlm_lite.training.arguments import total_steps
    from srlm_lite.training.reward import train_reward

    recipe, directory = session.recipe, session.run.reward
    path = ranked_file(recipe)
    groups = without_thoughts(session.chat, read_ranked(path, None))
    made = [one for group in groups for one in ranked_pairs(group, kind)]
    examples = [pair_example(session, one) for one in made]
    fitting = [one for one in examples if len(one) <= recipe.base.window]
    if not fitting:
        raise UserError(
            f"has no two replies to a prompt that humans told apart and that fit the window "
            f"({len(examples)} do not fit)",
            where=str(path),
            way_out="Name ranked replies with data.ranked, or raise base.window",
        )
    anchor = session.stack(0)
    seed = derive_seed(recipe.seed, "reward")
    session.close_engines()
    training = Training(0, "reward")
    task = session.reporter.start("reward model", total_steps(len(fitting), optim), "steps")

    def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
        task.advance()
        task.note(f"loss {logs['loss']:.3f} accuracy {logs['accuracy']:.2f}")
        session.tracker.step(training, step, logs)

    with kept(session):
        model, facts = train_reward(
            session.slot,
            session.base,
            anchor=anchor,
            adapter=session.slot.fresh(recipe.dpo.lora, seed=seed),
            pairs=fitting,
            optim=optim,
            scratch=scratch(session.run.scratch),
            seed=seed,
            on_step=on_step,
            checkpoints=checkpoints(session, training, "reward model", task),
        )
        model.save(directory.adapter, directory.head, base_name=recipe.base.name)
        told: dict[str, Any] = {"pairs": len(fitting), "too_long": len(examples) - len(fitting)}
        held_out = _held_out_accuracy(session, model)
        directory.finish(training={**told, **facts, "accuracy_held_out": held_out})


def _held_out_accuracy(session: Session, model: RewardModel) -> float | None:
    """Ties count half; a reply that does not fit the window is left out."""
    from srlm_lite.training.reward import reward_replies

    recipe = session.recipe
    groups = read_ranked(data_file(recipe, "eft_eval.jsonl"), recipe.evaluate.eft_prompts)
    groups = without_thoughts(session.chat, groups)
    rows = [row for group in groups for row in group]
    asked = [Instruction(row.prompt_id, row.prompt, row.response, row.messages) for row in rows]
    examples = {
        row.response_id: one
        for row, one in zip(rows, ift_examples(session, asked), strict=True)
        if len(one) <= recipe.base.window
    }
    values = reward_replies(
        session.slot,
        session.base,
        session.stack(0),
        model,
        list(examples.values()),
        batch_rows=2 * recipe.dpo.micro_batch_size,
    )
    reward = dict(zip(examples, values, strict=True))
    credits = []
    for group in groups:
        known = [row for row in group if row.response_id in reward]
        for a, b in combinations(known, 2):
            gap = reward[a.response_id] - reward[b.response_id]
            if a.rank != b.rank:
                credits.append(0.5 if gap == 0 else float((gap > 0) == (a.rank < b.rank)))
    return round(fmean(credits), 4) if credits else None
