"""What the base makes of its own data, before anything is trained on that."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from srlm_lite.conversation import last_turn
from srlm_lite.evaluate.reading import (
    ADVICE,
    KINDS,
    Price,
    doubts,
    excerpt,
    figures,
    shuffled,
    spread,
)
from srlm_lite.records import Instruction
from srlm_lite.run.files import read_json, write_json
from srlm_lite.session import Advance, Session
from srlm_lite.stages.seed_data import answered_prompts

if TYPE_CHECKING:
    from srlm_lite.training.sft import Example

_CHUNK = 8
"""Texts that a process reads before it is given more."""


def reading(session: Session) -> tuple[None, dict[str, Any]]:
    """Measure how well the base reads the answers it is to learn, and their prompts.

    Answers stand behind their prompts in the chat format, without the end of the turn; prompts
    stand alone. Of a conversation the turn that is answered is read. A run that takes a shipped
    anchor measures it too: that was made on this base, or should have been. Without instruction
    data or ranked replies there is nothing to read.
    """
    path = session.run.anchor.reading
    if path.is_file():
        return None, read_json(path)
    found = _read(session, spread(answered_prompts(session.recipe)))
    if told := doubts(found):
        session.reporter.warn(f"{'; '.join(told)}: {ADVICE}")
    write_json(path, found)
    return None, found


def _read(session: Session, rows: Sequence[Instruction]) -> dict[str, Any]:
    rng = Random(f"{session.recipe.seed}/reading")
    texts, examples = [], []
    for row in rows:
        for what, text in zip(
            KINDS, (excerpt(row.response), excerpt(last_turn(row.asked))), strict=True
        ):
            mixed = shuffled(text, rng)
            both = [_example(session, row, what, each) for each in (text, mixed)]
            if mixed != text and all(0 < len(one) <= session.recipe.base.window for one in both):
                texts.append((what, len(text.encode())))
                examples += both
    chunks = [examples[at : at + _CHUNK] for at in range(0, len(examples), _CHUNK)]
    read = session.share_out(_log_likelihoods, chunks, advance=lambda count: None)
    nats = [-value for values in read for value in values]
    prices: dict[str, list[tuple[Price, Price]]] = {}
    for i, (what, size) in enumerate(texts):
        price, of_mixed = (
            Price(nats[at], len(examples[at].target_ids), size) for at in (2 * i, 2 * i + 1)
        )
        prices.setdefault(what, []).append((price, of_mixed))
    vocabulary = session.base.model.config.get_text_config().vocab_size
    return {what: figures(pairs, vocabulary=vocabulary) for what, pairs in prices.items()}


def _example(session: Session, row: Instruction, what: str, text: str) -> Example:
    from srlm_lite.training.sft import Example

    if what == "answers":
        ids = session.chat.target_ids(text)
        if ids[-1] == session.chat.end_id:
            ids = ids[:-1]
        asked = excerpt(last_turn(row.asked))
        return Example(tuple(session.chat.prompt_ids(asked)), tuple(ids))
    tokenizer: Any = session.base.tokenizer
    first = tokenizer.bos_token_id
    ids = tokenizer(text, add_special_tokens=False).input_ids
    # What has no beginning of a text has the end of the one before.
    return Example((tokenizer.eos_token_id if first is None else first,), tuple(ids))


def _log_likelihoods(session: Session, item: Sequence[Example], advance: Advance) -> list[float]:
    """A chunk's, under the bare base."""
    from srlm_lite.training.likelihood import log_likelihoods

    rows = 2 * session.recipe.dpo.micro_batch_size  # as many as DPO holds, and that with gradients
    return log_likelihoods(session.slot, session.base, (), item, batch_rows=rows)
