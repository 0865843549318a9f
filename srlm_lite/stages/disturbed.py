"""Pairs with a known loser, for whoever has no ranked replies: answers to a disturbed instruction.

The model writes an instruction that only looks like a given one, and answers both. Its answer to
the disturbed one is, to the given one, the worse of the two: nobody has to compare them.

Source: Wang et al. 2024, Self-Taught Evaluators, arXiv:2408.02666, section 3.2; Whitehouse et al.
2025, J1, arXiv:2505.10320, section 2.1, trains judges on such pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_lite.data.text import words_of
from srlm_lite.questions import load_question
from srlm_lite.quoting import fill
from srlm_lite.records import Candidate, Prompt, RankedReply, Reply
from srlm_lite.session import Session
from srlm_lite.settings import Sampling
from srlm_lite.stages.sampling import ask, limits_of, sample_candidates

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

LOSER = "~disturbed"
"""What the id of a disturbed instruction ends in."""


@dataclass(frozen=True, slots=True)
class Disturbed:
    """Pairs, each the better reply first, and the prompts that gave none, by the reason."""

    groups: list[list[RankedReply]]
    instructions: Mapping[str, str]
    """The disturbed instruction of each prompt, by its id."""
    drops: Mapping[str, int]


def disturbed_pairs(
    session: Session,
    stack: Sequence[Adapter],
    prompts: Sequence[Prompt],
    *,
    folder: Path,
    seed_path: Sequence[object],
) -> Disturbed:
    """A pair of each prompt: the model's answers to it and to what it makes of it.

    Args:
        folder: Where what the model writes goes; a stopped start goes on from there.
    """
    recipe = session.recipe
    template = load_question("disturb", recipe.anchor.disturb_template)
    written = ask(
        session,
        stack,
        [(one.prompt_id, fill(template, {"prompt": one.text}, ())) for one in prompts],
        path=folder / "instructions.jsonl",
        stage="disturbed instructions",
        limits=limits_of(recipe.rollout),
        seed_path=(*seed_path, "instructions"),
        role="policy",
    )
    drops: Counter[str] = Counter()
    others = {}
    for prompt in prompts:
        found = read_instruction(prompt, written[prompt.prompt_id])
        if isinstance(found, Prompt):
            others[prompt.prompt_id] = found
            if session.leaves_room(prompt) and session.leaves_room(found):
                continue
            found = "too_long"
        drops[found] += 1
        others.pop(prompt.prompt_id, None)
    answered = [prompt for prompt in prompts if prompt.prompt_id in others]
    answers = sample_candidates(
        session,
        stack,
        [one for prompt in answered for one in (prompt, others[prompt.prompt_id])],
        path=folder / "answers.jsonl",
        stage="answers to both",
        sampling=Sampling(
            temperature=recipe.rollout.temperature,
            top_p=recipe.rollout.top_p,
            max_new_tokens=recipe.rollout.max_new_tokens,
        ),
        n=1,
        seed_path=(*seed_path, "answers"),
    )
    of_prompt = {row.prompt_id: row for row in answers}
    groups = []
    for prompt in answered:
        pair = of_prompt[prompt.prompt_id], of_prompt[others[prompt.prompt_id].prompt_id]
        group = ranked(prompt, *pair)
        if isinstance(group, str):
            drops[group] += 1
        else:
            groups.append(group)
    told = {row[0].prompt_id: others[row[0].prompt_id].text for row in groups}
    return Disturbed(groups, told, dict(drops))


def read_instruction(prompt: Prompt, reply: Reply) -> Prompt | str:
    """The disturbed instruction as a prompt, or why the model's reply is none.

    `unfinished`: it ran into the token limit, so that what it asks is not known. `empty`: no words.
    `same`: those of the prompt itself, to which no answer of its own would be worse.
    """
    text = reply.text.strip()
    if reply.finish_reason == "length":
        return "unfinished"
    if not any(map(str.isalnum, text)):
        return "empty"
    if words_of(text) == words_of(prompt.text):
        return "same"
    return Prompt(f"{prompt.prompt_id}{LOSER}", text, "disturbed")


def ranked(prompt: Prompt, winner: Candidate, loser: Candidate) -> list[RankedReply] | str:
    """Both answers in their known order, as replies to the prompt, or why they are no pair."""
    if "length" in (winner.finish_reason, loser.finish_reason):
        return "unfinished"
    if not (winner.text.strip() and loser.text.strip()):
        return "empty"
    if winner.text.strip() == loser.text.strip():
        return "same"
    return [
        RankedReply(
            prompt.prompt_id,
            prompt.text,
            answer.candidate_id,
            answer.text,
            rank,
            messages=prompt.messages,
        )
        for rank, answer in enumerate((winner, loser))
    ]
