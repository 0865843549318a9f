"""New prompts written by the anchor, few-shot, as in Self-Instruct."""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Any

from srlm_lite.conversation import messages_of
from srlm_lite.data.self_instruct import MAX_NEW_TOKENS, PromptPool
from srlm_lite.errors import UserError
from srlm_lite.records import Prompt
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.run.files import read_records
from srlm_lite.run.layout import IterationDir
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.stages.replies import reply_of
from srlm_lite.stages.sampling import with_thought
from srlm_lite.stages.seed_data import read_ift
from srlm_lite.window import room_for_prompt

SAMPLING = Limits(temperature=0.6, top_p=0.9, max_new_tokens=MAX_NEW_TOKENS)
"""As in Yuan et al. 2024, arXiv:2401.10020, section 3.1.2."""


def write_prompts(session: Session, iteration: IterationDir) -> tuple[list[Prompt], dict[str, Any]]:
    """As many new prompts as the iteration needs, all by the anchor.

    The anchor, not the latest model, writes them: the paper's prompts come from one fixed model
    too, and later models tend to answer in place of asking.

    Raises:
        UserError: Ten requests for each prompt wanted did not yield enough that pass the filters.
    """
    recipe = session.recipe
    wanted = recipe.prompts.per_iteration
    earlier = [
        prompt.text
        for before in range(1, iteration.number)
        for prompt in read_records(session.run.iteration(before).prompts, Prompt)
    ]
    # What a conversation asks for in its last turn cannot be understood by itself.
    shown = [row.prompt for row in read_ift(recipe) if row.messages is None]
    pool = PromptPool(shown, generated=earlier)
    engine = session.engine(session.stack(0))
    task = session.reporter.start("prompts", wanted, "prompts")
    batch = recipe.rollout.chunk_prompts
    limits = with_thought(session, SAMPLING)
    longest = room_for_prompt(recipe.base.window, answer=limits.max_new_tokens)
    made: list[str] = []
    for start in count(0, batch):
        if start >= 10 * wanted:
            raise UserError(
                f"Self-Instruct wrote {len(made)} of {wanted} prompts in {start} tries; "
                f"filtered: {dict(pool.drops)}",
                where=str(iteration.path),
                way_out="Give a prompt list (prompts.source=file), or lower prompts.per_iteration",
            )
        seeds = [
            derive_seed(recipe.seed, iteration.number, "self-instruct", start + i)
            for i in range(batch)
        ]
        texts = [pool.request(Random(seed)) for seed in seeds]
        requests = [
            Request(tuple(session.chat.prompt_ids(text)), (seed,), messages_of(text))
            for seed, text in zip(seeds, texts, strict=True)
        ]
        fitting = [one for one in requests if len(one.prompt_ids) <= longest]
        pool.drops["long_request"] += len(requests) - len(fitting)
        for [sample] in engine.sample(fitting, limits):
            said = reply_of(session.chat, "", sample)
            new = [
                text
                for text in pool.offer(said.text, finished=said.finish_reason == "stop")
                if session.leaves_room(Prompt("", text))
            ]
            made.extend(new)
            task.advance(len(new))
        if len(made) >= wanted:
            break
    prompts = [
        Prompt(f"self-{iteration.number}-{i:05d}", text, "self-instruct")
        for i, text in enumerate(made[:wanted])
    ]
    return prompts, {"filtered": dict(pool.drops)}
