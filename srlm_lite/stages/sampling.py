"""Candidates, and judgements of candidates, chunk by chunk into journals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_lite.conversation import messages_of
from srlm_lite.engines import Role
from srlm_lite.errors import UserError
from srlm_lite.judging import (
    expected_score,
    names_a_score,
    parse_score,
    score_line_complete,
    whole_scores,
)
from srlm_lite.records import Candidate, Judgement, Prompt, Reply
from srlm_lite.rollout.protocol import Limits, Request, Sample, StopRule
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Advance, Session
from srlm_lite.settings import Sampling
from srlm_lite.stages.chunks import chunked, journaled
from srlm_lite.stages.replies import candidate_of, reply_of, split
from srlm_lite.window import leaves_room

if TYPE_CHECKING:
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.model.stack import Adapter

ReplyToJudge = tuple[str, str, str]
"""Id of a reply, the prompt it answers, its text."""

ALTERNATIVES = 20
"""Tokens looked at for an expected score; more than servers commonly give."""


def limits_of(sampling: Sampling, *, max_new_tokens: int | None = None) -> Limits:
    """A recipe's sampling section for an engine."""
    return Limits(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=max_new_tokens or sampling.max_new_tokens,
    )


def sample_candidates(
    session: Session,
    stack: Sequence[Adapter],
    prompts: Sequence[Prompt],
    *,
    path: Path,
    stage: str,
    sampling: Sampling,
    n: int,
    seed_path: Sequence[object],
    tag: str = "",
    role: Role = "policy",
) -> list[Candidate]:
    """n answers to each prompt, appended to the journal at `path`.

    Candidate i of a prompt is named `<prompt_id>#<tag><i>`; its seed depends on that name alone.
    """
    marks = [f"#{tag}{i}" for i in range(n)]
    return journaled(
        session,
        _Answer(stack, role, marks, limits_of(sampling), seed_path),
        chunked(prompts, session.recipe.rollout.chunk_prompts),
        kind=Candidate,
        names=lambda prompt: [f"{prompt.prompt_id}{mark}" for mark in marks],
        path=path,
        stage=stage,
        unit="answers",
        role=role,
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """Candidates for a chunk of prompts, one for each mark."""

    stack: Sequence[Adapter]
    role: Role
    marks: Sequence[str]
    limits: Limits
    seed_path: Sequence[object]

    def __call__(
        self, session: Session, item: Sequence[Prompt], advance: Advance
    ) -> list[Candidate]:
        requests = [
            Request(
                prompt_ids=tuple(session.chat.policy_ids(prompt)),
                seeds=tuple(
                    derive_seed(*self.seed_path, f"{prompt.prompt_id}{mark}") for mark in self.marks
                ),
                messages=session.chat.policy_turns(prompt),
            )
            for prompt in item
        ]
        engine = session.engine(self.stack, self.role)
        limits = with_thought(session, self.limits, self.role)
        answers = engine.sample(requests, limits, on_samples=advance)
        return [
            candidate_of(session.chat, prompt.prompt_id, f"{prompt.prompt_id}{mark}", sample)
            for prompt, samples in zip(item, answers, strict=True)
            for mark, sample in zip(self.marks, samples, strict=True)
        ]


def ask(
    session: Session,
    stack: Sequence[Adapter],
    questions: Sequence[tuple[str, str]],
    *,
    path: Path,
    stage: str,
    limits: Limits,
    seed_path: Sequence[object],
    role: Role = "judge",
    learned: bool = False,
) -> dict[str, Reply]:
    """One reply to each question (name, text), appended to the journal at `path`, by name.

    Args:
        learned: Keep what a training needs to know of the replies, see `Ids`.

    A question that does not fit the window gets an empty reply of finish reason `length`; a server
    has a window of its own.
    """
    rows = journaled(
        session,
        _Reply(stack, role, limits, seed_path, learned),
        chunked(questions, 4 * session.recipe.rollout.chunk_prompts),
        kind=Reply,
        names=lambda question: question[:1],
        path=path,
        stage=stage,
        unit="replies",
        role=role,
    )
    return {row.name: row for row in rows}


@dataclass(frozen=True, slots=True)
class _Reply:
    """One reply to each question (name, text) of a chunk."""

    stack: Sequence[Adapter]
    role: Role
    limits: Limits
    seed_path: Sequence[object]
    learned: bool

    def __call__(
        self, session: Session, item: Sequence[tuple[str, str]], advance: Advance
    ) -> list[Reply]:
        fitting = {}
        limits = with_thought(session, self.limits, self.role)
        for name, text in item:
            ids = _fitting_ids(session, text, self.role, limits)
            if ids is not None:
                seed = derive_seed(*self.seed_path, name)
                fitting[name] = Request(ids, (seed,), messages_of(text))
        drawn = draw(session, self.stack, self.role, fitting, limits, advance)
        advance(len(item) - len(fitting))
        chat = chat_of(session, self.role)
        found = {name: reply_of(chat, name, sample) for name, sample in drawn.items()}
        replies = [found.get(name, Reply(name, "", "length")) for name, _ in item]
        return replies if self.learned else [replace(reply, ids=None) for reply in replies]


def draw(
    session: Session,
    stack: Sequence[Adapter],
    role: Role,
    requests: Mapping[str, Request],
    limits: Limits,
    advance: Advance,
) -> dict[str, Sample]:
    """One sample of each request, of one seed, under its name."""
    engine = session.engine(stack, role)
    sampled = engine.sample(list(requests.values()), limits, on_samples=advance)
    return {name: sample for name, [sample] in zip(requests, sampled, strict=True)}


def chat_of(session: Session, role: Role) -> ChatFormat | None:
    """How the base behind a role is spoken to; None of a server, which needs no base here."""
    return None if session.engine_kind(role).remote else session.chat


def with_thought(session: Session, limits: Limits, role: Role = "policy") -> Limits:
    """The limits of an answer with room for a thought before it, where the role's base thinks."""
    thought = session.thought_tokens(role)
    whole = limits.max_new_tokens + thought
    return replace(limits, max_new_tokens=whole, max_thought_tokens=thought)


def _of_the_answer(rule: StopRule, text: str) -> bool:
    """A stop rule for a server, which may send a thought along."""
    thought, answer = split(None, text)
    return rule(text) if thought is None else answer is not None and rule(f"{answer}\n")


def _fitting_ids(session: Session, text: str, role: Role, limits: Limits) -> tuple[int, ...] | None:
    """A question as ids, or None where it does not fit the window.

    Empty for a server: it gets the text, has a template and a window of its own, and needs no
    base in this process.
    """
    if session.engine_kind(role).remote:
        return ()
    ids = tuple(session.chat.prompt_ids(text))
    window = session.recipe.base.window
    return ids if leaves_room(len(ids), window, answer=limits.max_new_tokens) else None


def judge_replies(
    session: Session,
    stack: Sequence[Adapter],
    replies: Sequence[ReplyToJudge],
    *,
    path: Path,
    stage: str,
    votes: int | Mapping[str, range],
    chunk: int,
    seed_path: Sequence[object],
) -> list[Judgement]:
    """Sampled judgements of each reply, appended to the journal at `path`.

    The seed of a vote goes by the reply and its number, whichever others are drawn.

    Args:
        votes: How many of each reply; or by its id the numbers of those to draw.

    A vote ends with its score line. Where prompt or reply speak of a score themselves, it goes on
    to its own end, for a score line before that may be a quotation.

    With `judge.score: expected` a readable vote's score is the expected one wherever that can be
    told, and `sampled_score` is what the vote says.

    A vote that cannot be read is sampled once more, with more tokens; if that cannot be read
    either its score is None. Where the window has no room for that many, the vote stays as it was.
    A reply whose judge prompt does not fit the window gets unreadable votes without any sampling;
    a server has a window of its own.

    Raises:
        UserError: Expected scores are asked for, but a score of the rubric is several tokens. Not
            of a server, whose tokens are not known: where a score is several of them, the vote
            counts as it was sampled.
    """
    items = [
        (reply, range(votes) if isinstance(votes, int) else votes[reply[0]]) for reply in replies
    ]
    return journaled(
        session,
        _Judge(stack, seed_path),
        chunked(items, chunk),
        kind=Judgement,
        names=lambda item: [f"{item[0][0]}:{vote}" for vote in item[1]],
        path=path,
        stage=stage,
        unit="judgements",
        role="judge",
    )


@dataclass(frozen=True, slots=True)
class _Judge:
    """The votes on a chunk of replies, each given with the numbers of its votes."""

    stack: Sequence[Adapter]
    seed_path: Sequence[object]

    def __call__(
        self, session: Session, item: Sequence[tuple[ReplyToJudge, range]], advance: Advance
    ) -> list[Judgement]:
        judge, items = session.recipe.judge, item
        drawn = self._sample(session, items, judge.max_new_tokens, "first")
        first = [
            drawn.get((reply[0], vote), Judgement(reply[0], vote, "", None, "length"))
            for reply, votes in items
            for vote in votes
        ]
        advance(len(first))
        again = [
            (
                reply,
                [row.vote for row in first if row.candidate_id == reply[0] and row.score is None],
            )
            for reply, _ in items
        ]
        again = [(reply, unread) for reply, unread in again if unread]
        if not again:
            return first
        second = self._sample(session, again, judge.retry_max_new_tokens, "retry")
        retried = {key: replace(row, retried=True) for key, row in second.items()}
        return [retried.get((row.candidate_id, row.vote), row) for row in first]

    def _sample(
        self,
        session: Session,
        items: Sequence[tuple[ReplyToJudge, Sequence[int]]],
        max_new_tokens: int,
        attempt: str,
    ) -> dict[tuple[str, int], Judgement]:
        """By candidate and vote; none of a reply whose question does not fit the window."""
        judge = session.recipe.judge
        texts = [
            session.rubric.render(prompt=prompt, response=response)
            for (_, prompt, response), _ in items
        ]
        limits = with_thought(session, limits_of(judge, max_new_tokens=max_new_tokens), "judge")
        prompt_ids = [_fitting_ids(session, text, "judge", limits) for text in texts]
        fitting = {i: ids for i, ids in enumerate(prompt_ids) if ids is not None}
        requests = {
            i: Request(
                prompt_ids=ids,
                seeds=tuple(
                    derive_seed(*self.seed_path, attempt, items[i][0][0], vote)
                    for vote in items[i][1]
                ),
                messages=messages_of(texts[i]),
            )
            for i, ids in fitting.items()
        }
        if judge.score == "expected":
            if not session.engine_kind("judge").remote:
                # Of a server's tokens nothing is known in advance, and this process's tokenizer,
                # for which the base would be read, says nothing of them. `expected_score` finds
                # none where the score is several tokens; the sampled one then counts.
                _check_scores_are_tokens(session)
            limits = replace(limits, alternatives=ALTERNATIVES)
        complete: StopRule = partial(score_line_complete, session.rubric)
        if session.engine_kind("judge").remote:
            complete = partial(_of_the_answer, complete)
        stopped = replace(limits, stop=complete)
        engine = session.engine(self.stack, "judge")
        by_item: dict[int, list[Sample]] = {}
        for quotes, rule in ((False, stopped), (True, limits)):
            group = [i for i in fitting if _names_a_score(items[i][0]) == quotes]
            if group:
                sampled = engine.sample([requests[i] for i in group], rule)
                by_item.update(zip(group, sampled, strict=True))
        return {
            (items[i][0][0], vote): _judgement(session, items[i][0], vote, sample)
            for i, samples in by_item.items()
            for vote, sample in zip(items[i][1], samples, strict=True)
        }


def _judgement(session: Session, of: ReplyToJudge, vote: int, sample: Sample) -> Judgement:
    rubric, chat = session.rubric, chat_of(session, "judge")
    said = reply_of(chat, of[0], sample, ruled=not _names_a_score(of))
    score = parse_score(said.text, rubric, finish_reason=said.finish_reason)
    row = Judgement(of[0], vote, said.text, score, said.finish_reason, thought=said.thought)
    if score is None:
        return row  # nothing is learned of it
    row = replace(row, ids=said.ids)
    if session.recipe.judge.score == "sampled":
        return row
    expected = expected_score(sample.tokens, rubric, sampled=score)
    counts = score if expected is None else round(expected, 4)
    return replace(row, score=counts, sampled_score=score)


def _check_scores_are_tokens(session: Session) -> None:
    def is_token(score: int) -> bool:
        ids = session.chat.target_ids(f"Score: {score}")
        return str(score) in (session.chat.spell([one]).strip() for one in ids)

    split = [score for score in whole_scores(session.rubric) if not is_token(score)]
    if split:
        raise UserError(
            f"the score {split[0]} is more than one token to this base",
            where="judge.score = expected",
            way_out="Set judge.score=sampled, or use a rubric with scores from 0 to 9",
        )


def _names_a_score(reply: ReplyToJudge) -> bool:
    _, prompt, response = reply
    return names_a_score(prompt) or names_a_score(response)
