"""A conversation with one model of a run at a time, on the base in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from srlm_lite.conversation import Message, transcript
from srlm_lite.errors import UserError
from srlm_lite.judging import names_a_score, parse_score, score_line_complete
from srlm_lite.records import Prompt, Reply
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.settings import Sampling
from srlm_lite.stages.replies import reply_of
from srlm_lite.stages.sampling import limits_of, with_thought
from srlm_lite.window import leaves_room, room_for_prompt

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

Show = Callable[[str], None]
"""Receives a reply piece by piece, a line or more at a time; the pieces are the reply."""


class Conversation:
    """The turns so far, and who answers next.

    Args:
        temperature: Of the answers; default: the recipe's.
    """

    def __init__(self, session: Session, *, temperature: float | None = None) -> None:
        self._session = session
        changes = {} if temperature is None else {"temperature": temperature}
        self._sampling: Sampling = session.recipe.rollout.model_copy(update=changes)
        self._stack: Sequence[Adapter] = ()
        self._judge: Sequence[Adapter] = ()
        self._messages: list[dict[str, str]] = []
        self._drawn = 0

    def use(self, stack: Sequence[Adapter], *, judge: Sequence[Adapter] | None = None) -> None:
        """From here on this stack answers and judges; an empty one is the bare base.

        Args:
            judge: The stack in the judge's role, where that is another one.
        """
        self._session.engine(stack)
        self._stack, self._judge = stack, stack if judge is None else judge

    def reset(self) -> None:
        """Forget all turns."""
        self._messages.clear()

    def answer(self, text: str, show: Show) -> int:
        """Answer a message; how many old turns did not fit the window and were forgotten.

        The recipe's system message stands before them, and is not forgotten.

        Raises:
            UserError: The message alone does not fit.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        limits = with_thought(self._session, limits_of(self._sampling))
        window = self._session.recipe.base.window
        room = room_for_prompt(window, answer=limits.max_new_tokens)
        forgotten = 0
        while len(ids := self._ids(messages)) > room:
            if len(messages) == 1:
                raise UserError(f"the message is too long: {len(ids)} tokens, and {room} fit")
            del messages[:2]
            forgotten += 1
        reply = self._reply(self._stack, ids, limits, show)
        if reply.thought is not None and not reply.text:
            raise UserError(
                f"its thought did not end within {limits.max_thought_tokens} tokens",
                way_out="Ask again; in a run, raise rollout.max_thought_tokens",
            )
        self._messages = [*messages, {"role": "assistant", "content": reply.text}]
        return forgotten

    def judge(self, show: Show) -> float | None:
        """The model's own score of the last answer, shown with its reasons.

        It is judged as the answer to all that was said before.

        None where it cannot be read, as of a grading that ran into the token limit.

        Raises:
            UserError: There is no answer yet, or it does not fit the judge's window.
        """
        if not self._messages:
            raise UserError("there is no answer to judge yet")
        *before, last = self._messages
        prompt, reply = transcript(before), last["content"]
        rubric, judge = self._session.rubric, self._session.recipe.judge
        ids = self._session.chat.prompt_ids(rubric.render(prompt=prompt, response=reply))
        limits = with_thought(self._session, limits_of(judge))
        window = self._session.recipe.base.window
        if not leaves_room(len(ids), window, answer=limits.max_new_tokens):
            raise UserError("the answer is too long to be judged")
        if not (names_a_score(prompt) or names_a_score(reply)):  # as in a run
            limits = replace(limits, stop=partial(score_line_complete, rubric))
        said = self._reply(self._judge, ids, limits, show)
        return parse_score(said.text, rubric, finish_reason=said.finish_reason)

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        """What the model goes on from; its own replies stand in it as templates write past ones."""
        chat = self._session.chat
        turns = chat.policy_turns(Prompt("", "", messages=tuple(messages)))
        return chat.render(turns, generation=True)

    def _reply(
        self, stack: Sequence[Adapter], ids: Sequence[int], limits: Limits, show: Show
    ) -> Reply:
        """Shown as it grows, without the thought before it."""
        self._drawn += 1
        seed = derive_seed(self._session.recipe.seed, "chat", self._drawn)
        shown = 0

        def more(text: str) -> bool:
            nonlocal shown
            show(text.strip()[shown:])
            shown = len(text.strip())
            return limits.stop is not None and limits.stop(text)

        request = Request(prompt_ids=tuple(ids), seeds=(seed,))  # the engine is of this process
        engine = self._session.engine(stack)
        # Engines ask a stop rule whenever a line is complete: the place to show it.
        [[sample]] = engine.sample([request], replace(limits, stop=more))
        reply = reply_of(self._session.chat, "", sample)
        more(reply.text)
        return reply
