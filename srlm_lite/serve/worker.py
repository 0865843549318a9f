"""The thread that owns the model: requests come in from many, and are answered in batches.

What a request draws does not depend on what waits beside it (see `Engine.sample`), so requests that
ask the same model in the same way are sampled together.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from srlm_lite.conversation import Asked, with_system
from srlm_lite.errors import UserError
from srlm_lite.records import Reply
from srlm_lite.rollout.protocol import Limits, Request, Sample, StopRule, Token
from srlm_lite.seeds import derive_seed
from srlm_lite.serve.request import MOST_ALTERNATIVES, Ask, Refused
from srlm_lite.session import Session
from srlm_lite.stages.replies import reply_of
from srlm_lite.window import room_for_answer

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

logger = logging.getLogger(__name__)

GATHER_S = 0.01
"""How long a request waits for others to be answered with it."""
MOST_WAITING = 512
"""Requests; more are asked to come again."""

Stacks = Mapping[str, Sequence["Adapter"]]
"""The models that are served, by name; an empty stack is the base."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the replies to a request."""

    text: str
    finish_reason: str
    thought: str | None
    tokens: tuple[Token, ...]
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The replies to a request, and what they took."""

    choices: tuple[Choice, ...]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn, thoughts included."""
        return sum(choice.n_tokens for choice in self.choices)


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way.

    Args:
        show: Receives a reply while it grows: the number of the choice, and the next piece.
    """

    ask: Ask
    show: Callable[[int, str], None] | None = None
    future: Future[Answered] = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the reply any more."""


class Worker:
    """Answers requests by the models of a run, one batch at a time.

    Args:
        stacks: The models by name.
    """

    def __init__(self, session: Session, stacks: Stacks) -> None:
        self._session, self.stacks = session, stacks
        self._jobs: queue.Queue[Job | None] = queue.Queue(MOST_WAITING)
        self._held: list[Job] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._loaded: Future[None] = Future()

    def start(self) -> None:
        """Load the base in the thread that is going to compute on it.

        Raises:
            UserError: It cannot be loaded.
        """
        self._thread.start()
        self._loaded.result()

    def put(self, job: Job) -> None:
        """Have a request answered; its future gets the replies.

        Raises:
            Refused: Too many wait already, or the server is about to end.
        """
        if self._ended.is_set():
            raise Refused("the server is about to end", status=503)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Refused("too many requests are waiting", status=429) from None

    def end(self, timeout: float) -> bool:
        """Answer no more; whether the thread has ended within some seconds."""
        self._ended.set()
        with suppress(queue.Full):  # it looks whether it is to end before each batch
            self._jobs.put_nowait(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._session.engine(next(iter(self.stacks.values())))
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        while (batch := self._next()) is not None:
            self._answer(batch)
        for job in [*self._held, *_rest(self._jobs)]:
            job.future.set_exception(Refused("the server has ended", status=503))
        self._session.close_engines()

    def _next(self) -> list[Job] | None:
        """The oldest request, and those that can be answered with it; None: no more."""
        if not self._held:
            self._held += filter(None, [self._jobs.get()])
            time.sleep(GATHER_S)
        self._held += _rest(self._jobs)
        if self._ended.is_set():
            return None
        self._held = [job for job in self._held if not job.left.is_set()]
        if not self._held:
            return []
        first, *others = self._held
        batch = [first, *(job for job in others if _go_together(first, job))]
        self._held = [job for job in self._held if job not in batch]
        return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        """Answer requests that go together; what goes wrong is theirs alone."""
        ready: list[tuple[Job, Request, Limits]] = []
        for job in batch:
            try:
                ready.append((job, *self._prepared(job.ask)))
            except BaseException as error:
                _fail(job, error)
        by_limits: dict[Limits, list[tuple[Job, Request]]] = {}
        for job, request, limits in ready:
            by_limits.setdefault(limits, []).append((job, request))
        for limits, some in by_limits.items():
            try:
                engine = self._session.engine(self.stacks[some[0][0].ask.model])
                if some[0][0].show is not None and self._session.engine_kind("policy").samples_here:
                    [(job, request)] = some
                    samples = [self._shown(job, request, limits)]
                else:
                    samples = engine.sample([request for _, request in some], limits)
                for (job, request), drawn in zip(some, samples, strict=True):
                    job.future.set_result(self._answered(job.ask, request, drawn))
            except BaseException as error:
                for job, _ in some:
                    _fail(job, error)

    def _prepared(self, ask: Ask) -> tuple[Request, Limits]:
        """What is sampled for a request.

        Raises:
            Refused: It does not fit the window.
        """
        recipe = self._session.recipe
        ids = self._ids(ask)
        thought = self._session.thought_tokens()
        if ask.logprobs and thought:
            raise Refused("not of a base that thinks before it answers", param="logprobs")
        room = room_for_answer(recipe.base.window, prompt=len(ids))
        most = ask.max_tokens or min(room, recipe.rollout.max_new_tokens + thought)
        if room < max(1, most):
            raise Refused(
                f"the messages take {len(ids)} tokens and the reply up to {max(1, most)}, and the "
                f"window has {recipe.base.window} (base.window)",
                param="messages",
                code="context_length_exceeded",
            )
        given = secrets.randbits(63) if ask.seed is None else ask.seed
        seeds = (given, *(derive_seed(given, "choice", i) for i in range(1, ask.n)))
        rollout = recipe.rollout
        limits = Limits(
            temperature=rollout.temperature if ask.temperature is None else ask.temperature,
            top_p=rollout.top_p if ask.top_p is None else ask.top_p,
            max_new_tokens=most,
            stop=_rule_of(ask.stop),
            alternatives=MOST_ALTERNATIVES if ask.logprobs else 0,
            max_thought_tokens=min(thought, most - 1),
        )
        return Request(prompt_ids=tuple(ids), seeds=seeds), limits

    def _ids(self, ask: Ask) -> list[int]:
        """As in the run: by the base's template, under the recipe's system message."""
        asked: Asked = ask.messages
        if not ask.bare:
            asked = with_system(asked, self._session.chat.system)
        return self._session.chat.prompt_ids(asked)

    def _shown(self, job: Job, request: Request, limits: Limits) -> list[Sample]:
        """Its replies one after the other, each shown as it grows: a line or more at a time."""
        engine = self._session.engine(self.stacks[job.ask.model])
        samples = []
        for number, seed in enumerate(request.seeds):
            grown = Growing(job.ask.stop, partial(job.show or _nowhere, number))

            def rule(text: str, grown: Growing = grown) -> bool:
                grown.more(text)
                return grown.stopped or job.left.is_set() or self._ended.is_set()

            [[sample]] = engine.sample(
                [Request(prompt_ids=request.prompt_ids, seeds=(seed,))],
                replace(limits, stop=rule),
            )
            if not grown.stopped and (job.left.is_set() or self._ended.is_set()):
                raise Refused("the server has ended, and the reply with it", status=503)
            samples.append(sample)
        return samples

    def _answered(self, ask: Ask, request: Request, drawn: Sequence[Sample]) -> Answered:
        choices = []
        for sample in drawn:
            reply = reply_of(self._session.chat, "", sample, ruled=bool(ask.stop))
            choices.append(_choice(ask, reply, sample))
        return Answered(tuple(choices), len(request.prompt_ids))


class Growing:
    """A reply while it is sampled, and what of it may be shown: up to where it would be cut.

    Args:
        stops: Texts that end it, and are no part of it.
    """

    def __init__(self, stops: Sequence[str], show: Callable[[str], None]) -> None:
        self._stops, self._show = stops, show
        self.shown = ""
        self.stopped = False
        """Whether one of the texts has come."""

    def more(self, text: str) -> None:
        """The reply so far; what could still turn out to begin a stop is held back."""
        cut = cut_at(text, self._stops)
        self.stopped = cut is not None
        sure = text[: len(text) - _may_begin(text, self._stops)] if cut is None else cut
        piece = sure.strip()[len(self.shown) :]
        if piece:
            self.shown += piece
            self._show(piece)


def cut_at(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stops in it; None where there is none."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(found)] if found else None


def _may_begin(text: str, stops: Sequence[str]) -> int:
    """Characters at a text's end that a stop begins with."""
    return max(
        (
            size
            for stop in stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ),
        default=0,
    )


def _choice(ask: Ask, reply: Reply, sample: Sample) -> Choice:
    text, reason, tokens = reply.text, str(reply.finish_reason), sample.tokens
    if (cut := cut_at(text, ask.stop)) is not None:
        text, reason = cut.strip(), "stop"
    if ask.logprobs:
        tokens = _spelling(tokens, text)
    return Choice(text, reason, reply.thought, tokens, sample.n_tokens)


def _spelling(tokens: Sequence[Token], text: str) -> tuple[Token, ...]:
    """The tokens up to where they spell a text, but for its spaces: of some tokenizers these are
    part of no token."""

    def letters(said: str) -> int:
        return len("".join(said.split()))

    wanted, covered = letters(text), 0
    for place, token in enumerate(tokens):
        if covered >= wanted:
            return tuple(tokens[:place])
        covered += letters(token.text)
    return tuple(tokens)


def _go_together(one: Job, other: Job) -> bool:
    """Whether two requests can be answered in one batch."""
    if one.show is not None or other.show is not None:
        return False
    a, b = one.ask, other.ask
    alike = (a.model, a.temperature, a.top_p, a.stop, a.logprobs)
    return alike == (b.model, b.temperature, b.top_p, b.stop, b.logprobs)


@lru_cache(maxsize=64)
def _rule_of(stops: tuple[str, ...]) -> StopRule | None:
    """The same rule for the same stops, so that requests with it can share a batch."""
    return partial(_holds_one, stops) if stops else None


def _holds_one(stops: tuple[str, ...], text: str) -> bool:
    return cut_at(text, stops) is not None


def _rest(jobs: queue.Queue[Job | None]) -> list[Job]:
    """What waits, without waiting."""
    found: list[Job] = []
    with suppress(queue.Empty):
        while True:
            job = jobs.get_nowait()
            if job is not None:
                found.append(job)
    return found


def _fail(job: Job, error: BaseException) -> None:
    if not isinstance(error, Refused | UserError):
        logger.error("a request failed", exc_info=error)
    if not job.future.done():
        job.future.set_exception(error)


def _nowhere(number: int, piece: str) -> None:
    """Shows a piece to nobody."""
