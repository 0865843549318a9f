"""Log-likelihoods of candidates under a stack, chunk by chunk into a journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_lite.records import Candidate, Likelihood, Prompt
from srlm_lite.session import Advance, Session
from srlm_lite.stages.chunks import chunked, journaled
from srlm_lite.stages.replies import learned_ids

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter
    from srlm_lite.training.sft import Example


def candidate_likelihoods(
    session: Session,
    stack: Sequence[Adapter],
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    *,
    path: Path,
    questions: bool = False,
) -> dict[str, Likelihood]:
    """How likely a stack finds each candidate that fits the window, by candidate_id.

    Args:
        questions: The prompts are a method's questions, which have no system message.
    """
    from srlm_lite.training.sft import Example

    recipe, chat = session.recipe, session.chat
    by_id = {prompt.prompt_id: prompt for prompt in prompts}

    def before(prompt: Prompt) -> list[int]:
        return chat.prompt_ids(prompt.asked) if questions else chat.policy_ids(prompt)

    examples = {
        row.candidate_id: Example(
            tuple(before(by_id[row.prompt_id])), learned_ids(chat, row.text, row.ids)
        )
        for row in candidates
        if row.text
    }
    fitting = [named for named in examples.items() if len(named[1]) <= recipe.base.window]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = journaled(
        session,
        _Read(stack),
        chunked(fitting, recipe.rollout.chunk_prompts * recipe.rollout.n),
        kind=Likelihood,
        names=lambda named: named[:1],
        path=path,
        stage=", ".join(path.stem.split("_", 1)),
        unit="candidates",
    )
    return {row.candidate_id: row for row in rows}


@dataclass(frozen=True, slots=True)
class _Read:
    """The log-likelihoods of a chunk of candidates, by name."""

    stack: Sequence[Adapter]

    def __call__(
        self, session: Session, item: Sequence[tuple[str, Example]], advance: Advance
    ) -> list[Likelihood]:
        from srlm_lite.training.likelihood import log_likelihoods

        values = log_likelihoods(
            session.slot,
            session.base,
            self.stack,
            [example for _, example in item],
            # As many as DPO holds at once, and that with gradients.
            batch_rows=2 * session.recipe.dpo.micro_batch_size,
            on_rows=advance,
        )
        return [
            Likelihood(name, round(value, 4), len(row.target_ids))
            for (name, row), value in zip(item, values, strict=True)
        ]
