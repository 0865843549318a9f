"""Questions that are answered by probabilities alone: one prefill each, and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_lite.conversation import messages_of
from srlm_lite.engines import Role
from srlm_lite.errors import UserError
from srlm_lite.forms.base import JudgeQuestion
from srlm_lite.records import Weighed
from srlm_lite.rollout.protocol import Limits, Request, Token
from srlm_lite.session import Advance, Session
from srlm_lite.stages.chunks import journaled
from srlm_lite.stages.sampling import ALTERNATIVES
from srlm_lite.window import leaves_room

if TYPE_CHECKING:
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.model.stack import Adapter

Ids = tuple[int, ...]

WORDS_TO_COME = 16
"""Tokens in which a server's judge has to come to the option: nobody can begin its reply for it."""


@dataclass(frozen=True, slots=True)
class WeighedOptions:
    """Replies of which a judge gives one, as ids: what they begin with, and what tells them apart.

    Args:
        begun: The ids that all of them begin with.
        next: Of each, the id that follows.
    """

    begun: Ids
    next: Ids
    texts: tuple[str, ...]
    """What the ids of `next` spell."""


def options_of(chat: ChatFormat, options: Sequence[str], *, setting: str) -> WeighedOptions:
    """WeighedOptions in the tokens of a base.

    Args:
        setting: Where a recipe says what they are.

    Raises:
        UserError: Two of them go on with the same token.
    """
    whole = [tuple(chat.target_ids(option)) for option in options]
    begun = 0
    while len({ids[begun : begun + 1] for ids in whole}) == 1 and begun < len(whole[0]):
        begun += 1
    after = [ids[begun : begun + 1] for ids in whole]
    texts = [chat.spell(ids).strip() for ids in after]
    for place, (ids, text) in enumerate(zip(after, texts, strict=True)):
        if not ids or ids in after[:place] or text in texts[:place]:
            other = after.index(ids) if ids in after[:place] else texts.index(text)
            raise UserError(
                f"`{options[other]}` and `{options[place]}` go on with the same token to this "
                "base, so no single probability tells them apart",
                where=setting,
                way_out="Take options that begin with different words or digits, or let the judge "
                "write its reply",
            )
    return WeighedOptions(
        whole[0][:begun], tuple(one for ids in after for one in ids), tuple(texts)
    )


def weigh(
    session: Session,
    stack: Sequence[Adapter],
    questions: Sequence[JudgeQuestion],
    options: Sequence[str],
    *,
    path: Path,
    stage: str,
    setting: str,
    role: Role = "judge",
) -> dict[str, Weighed]:
    """How likely a stack is to reply with each option, by the question's name; see `JudgeAtWork`.

    Probabilities go to the journal at `path`. Questions about the same thing are put to the engine
    together, so that what they begin with is a trunk of theirs alone.

    Raises:
        UserError: Two options go on with the same token to this base.
    """
    if not session.engine_kind(role).remote and questions:
        options_of(session.chat, options, setting=setting)
    rows = journaled(
        session,
        _Weigh(stack, role, tuple(options), setting),
        chunks_of(questions, session.recipe.rollout.chunk_prompts * session.recipe.rollout.n),
        kind=Weighed,
        names=lambda question: [question.name],
        path=path,
        stage=stage,
        unit="questions",
        role=role,
    )
    return {row.name: row for row in rows}


def chunks_of(questions: Sequence[JudgeQuestion], size: int) -> list[list[JudgeQuestion]]:
    """Questions in parts of about a size, those about the same thing beside each other in one."""
    together: dict[str, list[JudgeQuestion]] = {}
    for one in questions:
        together.setdefault(one.about, []).append(one)
    parts: list[list[JudgeQuestion]] = []
    for about, some in together.items():
        # Those about nothing have no part to share, and there may be any number of them.
        pieces = [some] if about else [some[i : i + size] for i in range(0, len(some), size)]
        for piece in pieces:
            if parts and len(parts[-1]) + len(piece) <= size:
                parts[-1] += piece
            else:
                parts.append(list(piece))
    return parts


@dataclass(frozen=True, slots=True)
class _Weigh:
    """The probabilities of a chunk of questions."""

    stack: Sequence[Adapter]
    role: Role
    options: tuple[str, ...]
    setting: str

    def __call__(
        self, session: Session, item: Sequence[JudgeQuestion], advance: Advance
    ) -> list[Weighed]:
        if session.engine_kind(self.role).remote:
            return self._of_a_server(session, item, advance)
        chat, window = session.chat, session.recipe.base.window
        options = options_of(chat, self.options, setting=self.setting)
        limits = Limits(
            temperature=0.0,
            top_p=1.0,
            max_new_tokens=1,
            alternatives=ALTERNATIVES,
            also=options.next,
            ignore_end=True,  # what would be an end is an alternative as well
        )
        requests: dict[str, dict[str, Request]] = {}
        for one in item:
            ids = (*chat.prompt_ids(one.text), *options.begun)
            if leaves_room(len(ids), window, answer=1):
                requests.setdefault(one.about, {})[one.name] = Request(ids, (0,))
        advance(len(item) - sum(map(len, requests.values())))
        engine, found = session.engine(self.stack, self.role), {}
        for some in requests.values():
            drawn = engine.sample(list(some.values()), limits, on_samples=advance)
            for name, [sample] in zip(some, drawn, strict=True):
                found[name] = Weighed(name, told_in(sample.tokens[0], options.texts))
        return [found.get(one.name, Weighed(one.name, None)) for one in item]

    def _of_a_server(
        self, session: Session, item: Sequence[JudgeQuestion], advance: Advance
    ) -> list[Weighed]:
        """A server tells of the most probable tokens of a reply: greedily, up to the option."""
        listed = "\n".join(self.options)
        asked = f"Give no reasons. Reply with one of these lines alone, as it stands:\n{listed}"
        requests = [Request((), (0,), messages_of(f"{one.text}\n\n{asked}")) for one in item]
        limits = Limits(0.0, 1.0, WORDS_TO_COME, alternatives=ALTERNATIVES)
        drawn = session.engine(self.stack, self.role).sample(requests, limits, on_samples=advance)
        return [
            Weighed(one.name, told_by(sample.tokens, self.options))
            for one, [sample] in zip(item, drawn, strict=True)
        ]


def told_in(token: Token, texts: Sequence[str]) -> tuple[float, ...]:
    """The probability of each text among the alternatives to a token; whitespace does not count."""
    likely = [(text.strip(), math.exp(logp)) for text, logp in token.alternatives]
    return tuple(round(sum(p for text, p in likely if text == one), 8) for one in texts)


def told_by(tokens: Sequence[Token], options: Sequence[str]) -> tuple[float, ...]:
    """The probability of each option where a reply, written freely, comes to tell them apart.

    Zeros where it never does: it says something else.
    """

    def begun(text: str) -> list[int]:
        said = " ".join(text.split())
        return [i for i, option in enumerate(options) if said and option.startswith(said)]

    before = ""
    for token in tokens:
        at = [(begun(before + text), math.exp(logp)) for text, logp in token.alternatives]
        if any(len(named) == 1 for named, _ in at):
            return tuple(
                round(sum(p for named, p in at if named == [i]), 8) for i in range(len(options))
            )
        before += token.text
        if before.strip() and not begun(before):
            break
    return (0.0,) * len(options)
