"""The trainings of an iteration, each into a delta on top of the anchor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from srlm_lite.engines import Role
from srlm_lite.errors import UserError
from srlm_lite.evaluate.candidates import on_policy_accuracy
from srlm_lite.pairing import replay_age
from srlm_lite.progress import Training
from srlm_lite.records import (
    FinishReason,
    Instruction,
    Judgement,
    PreferencePair,
    Prompt,
    TrainingStep,
)
from srlm_lite.rollout.protocol import Sample
from srlm_lite.run.files import read_json, write_json, write_records
from srlm_lite.run.layout import DeltaPlace, IterationDir
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.settings import Consistency, Dpo, Optim
from srlm_lite.stages.anchor import Sft, fitting_examples, ift_examples, scratch
from srlm_lite.stages.keeping import checkpoints, kept
from srlm_lite.stages.pairs import pair_example
from srlm_lite.stages.replies import candidate_of

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter
    from srlm_lite.training.dpo import PairExample
    from srlm_lite.training.reward import RewardModel

DpoFacts = dict[str, float]


def dpo_delta(
    session: Session,
    iteration: IterationDir,
    pairs: Sequence[PreferencePair],
    *,
    dpo: Dpo | None = None,
    place: DeltaPlace | None = None,
    consistency: Consistency | None = None,
    role: Role = "policy",
) -> dict[str, Any]:
    """DPO: what this iteration learns on top of the anchor.

    Args:
        dpo: Settings other than the recipe's.
        place: Where to put another delta than the iteration's own.
        consistency: Terms that pull the implicit reward towards the judge.
        role: Whose delta it is.
    """
    place = place or iteration.delta_place
    if place.training.is_file():
        return read_json(place.training, steps=int)
    recipe = session.recipe
    dpo = dpo or recipe.dpo
    if recipe.pairing.older_steps == "same":
        dpo = beside_new_ones(dpo, pairs)
    seed = derive_seed(recipe.seed, iteration.number, place.name)
    anchor, start, reference = _from_where(session, iteration, dpo, seed=seed, role=role)
    examples = [pair_example(session, pair) for pair in pairs]
    training = Training(iteration.number, place.name)
    with kept(session):
        trained, (facts, curve) = session.together(
            _Dpo(training, anchor, start, reference, examples, dpo, consistency, seed)
        )
        trained.save(place.adapter, base_name=recipe.base.name)
        write_records(place.steps, curve)
        write_json(place.training, facts)  # last: where it is, the delta is whole
    return facts


def beside_new_ones(dpo: Dpo, pairs: Sequence[PreferencePair]) -> Dpo:
    """Settings by which older pairs lie in the steps of the new ones: a step's batch is larger, by
    the nearest whole multiple, and its loss the mean over all of it."""
    new = sum(not replay_age(one) for one in pairs)
    times = max(1, round(len(pairs) / new)) if new else 1
    return dpo.model_copy(update={"batch_size": times * dpo.batch_size})


@dataclass(frozen=True, slots=True)
class _Dpo:
    """The training of a delta, in one process or in all."""

    training: Training
    anchor: Adapter
    start: Adapter
    reference: Sequence[Adapter]
    pairs: Sequence[PairExample]
    dpo: Dpo
    consistency: Consistency | None
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
            checkpoints=checkpoints(session, self.training, "DPO", task),
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
    session: Session,
    iteration: IterationDir,
    rows: Sequence[Instruction],
    *,
    optim: Optim,
    about: str,
) -> dict[str, Any]:
    """SFT: a fresh delta on top of the anchor that learns these answers.

    Args:
        about: What the training is called while it runs.

    Raises:
        UserError: None of them fits the window.
    """
    place = iteration.delta_place
    if place.training.is_file():
        return read_json(place.training, steps=int)
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
    with kept(session):
        trained, facts = session.together(
            Sft(start, examples, about, training, seed, optim=optim, below=session.stack(0))
        )
        trained.save(place.adapter, base_name=recipe.base.name)
        told = {"answers": len(examples), "too_long": too_long, **facts}
        write_json(place.training, told)  # last: where it is, the delta is whole
    return told


def rloo_delta(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    reward: RewardModel,
    *,
    kl_weight: float,
) -> dict[str, Any]:
    """RLOO: a delta that learns from answers it draws itself; they become the candidates.

    Candidate i of a prompt is named `<prompt_id>#<i>` in the order in which they were drawn; its
    judgement is the reward.
    """
    from srlm_lite.training.arguments import total_steps
    from srlm_lite.training.rloo import answers_of_epoch, train_rloo

    recipe, place = session.recipe, iteration.delta_place
    if place.training.is_file():
        return read_json(place.training, steps=int)
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

    with kept(session):
        trained, drawn, facts = train_rloo(
            session.slot,
            session.base,
            session.chat,
            anchor=[anchor],
            delta=start,
            reference=reference,
            reward=reward,
            prompts=[session.chat.policy_ids(prompt) for prompt in prompts],
            optim=recipe.dpo,
            rollout=recipe.rollout,
            kl_weight=kl_weight,
            drop_truncated=recipe.pairing.drop_truncated,
            scratch=scratch(session.run.scratch),
            seed=seed,
            thought_tokens=session.thought_tokens(),
            on_step=on_step,
            checkpoints=checkpoints(session, training, "RLOO", task),
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
    return told


def _from_where(
    session: Session, iteration: IterationDir, dpo: Dpo, *, seed: int, role: Role = "policy"
) -> tuple[Adapter, Adapter, list[Adapter]]:
    """The anchor, the delta that training starts from, and the reference stack."""
    anchor, *previous = session.stack(iteration.number - 1, role)
    start = session.slot.fresh(dpo.lora, seed=seed)
    if dpo.init == "previous" and previous:
        start = previous[0]
    return anchor, start, [anchor] if dpo.reference == "anchor" else [anchor, start]
