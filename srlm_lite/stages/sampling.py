"""Candidates, and judgements of candidates, chunk by chunk into journals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_lite.config import Sampling
from srlm_lite.judging import parse_score
from srlm_lite.progress import Task
from srlm_lite.records import Candidate, Judgement, Prompt
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.run_dir import Journal
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

ReplyToJudge = tuple[str, str, str]
"""Id of a reply, the prompt it answers, its text."""


def chunked(items: Sequence[object], size: int) -> list[slice]:
    """Slices that cut a sequence into chunks of a size, the last one maybe shorter."""
    return [slice(start, start + size) for start in range(0, len(items), size)]


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
) -> list[Candidate]:
    """n answers to each prompt, appended to the journal at `path`.

    Candidate i of a prompt is named `<prompt_id>#<i>`; its seed depends on that name alone.
    """
    limits = limits_of(sampling)
    chunks = chunked(prompts, session.recipe.rollout.chunk_prompts)
    names = [[f"{p.prompt_id}#{i}" for p in prompts[chunk] for i in range(n)] for chunk in chunks]
    task = session.reporter.start(stage, len(prompts) * n, "answers")

    def compute(index: int) -> list[Candidate]:
        chunk = prompts[chunks[index]]
        requests = [
            Request(
                prompt_ids=tuple(session.chat.prompt_ids(prompt.text)),
                seeds=tuple(derive_seed(*seed_path, f"{prompt.prompt_id}#{i}") for i in range(n)),
            )
            for prompt in chunk
        ]
        answers = session.engine(stack).sample(requests, limits, on_samples=task.advance)
        return [
            Candidate(
                prompt_id=prompt.prompt_id,
                candidate_id=f"{prompt.prompt_id}#{i}",
                text=sample.text.strip(),
                n_tokens=len(sample.token_ids),
                finish_reason=sample.finish_reason,
            )
            for prompt, samples in zip(chunk, answers, strict=True)
            for i, sample in enumerate(samples)
        ]

    journal = Journal(path, Candidate, lambda row: row.candidate_id)
    return journal.fill(names, compute, on_chunk=_skip(task, names))


def judge_replies(
    session: Session,
    stack: Sequence[Adapter],
    replies: Sequence[ReplyToJudge],
    *,
    path: Path,
    stage: str,
    votes: int,
    chunk: int,
    seed_path: Sequence[object],
) -> list[Judgement]:
    """`votes` sampled judgements of each reply, appended to the journal at `path`.

    A vote that cannot be read is sampled once more, with more tokens; if that cannot be read
    either its score is None. A reply whose judge prompt does not fit the window gets unreadable
    votes without any sampling.
    """
    judge = session.recipe.judge
    chunks = chunked(replies, chunk)
    names = [[f"{r[0]}:{vote}" for r in replies[c] for vote in range(votes)] for c in chunks]
    task = session.reporter.start(stage, len(replies) * votes, "judgements")

    def sample(
        items: Sequence[tuple[ReplyToJudge, Sequence[int]]], *, max_new_tokens: int, attempt: str
    ) -> list[Judgement]:
        prompt_ids = [
            tuple(
                session.chat.prompt_ids(session.rubric.render(prompt=reply[1], response=reply[2]))
            )
            for reply, _ in items
        ]
        room = session.recipe.base.window - max_new_tokens
        fitting = [i for i, ids in enumerate(prompt_ids) if len(ids) <= room]
        requests = [
            Request(
                prompt_ids=prompt_ids[i],
                seeds=tuple(
                    derive_seed(*seed_path, attempt, items[i][0][0], vote) for vote in items[i][1]
                ),
            )
            for i in fitting
        ]
        limits = limits_of(judge, max_new_tokens=max_new_tokens)
        sampled = session.engine(stack).sample(requests, limits)
        by_item = dict(zip(fitting, sampled, strict=True))
        judgements = []
        for i, (reply, wanted) in enumerate(items):
            for place, vote in enumerate(wanted):
                if i not in by_item:
                    judgements.append(Judgement(reply[0], vote, "", None, "length"))
                    continue
                one = by_item[i][place]
                score = parse_score(one.text, session.rubric, finish_reason=one.finish_reason)
                judgements.append(
                    Judgement(reply[0], vote, one.text.strip(), score, one.finish_reason)
                )
        return judgements

    def compute(index: int) -> list[Judgement]:
        items = [(reply, range(votes)) for reply in replies[chunks[index]]]
        first = sample(items, max_new_tokens=judge.max_new_tokens, attempt="first")
        task.advance(len(first))
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
        second = sample(again, max_new_tokens=judge.retry_max_new_tokens, attempt="retry")
        retried = {
            (row.candidate_id, row.vote): Judgement(**{**row.to_row(), "retried": True})
            for row in second
        }
        return [retried.get((row.candidate_id, row.vote), row) for row in first]

    journal = Journal(path, Judgement, lambda row: f"{row.candidate_id}:{row.vote}")
    return journal.fill(names, compute, on_chunk=_skip(task, names))


def _skip(task: Task, names: Sequence[Sequence[str]]) -> Callable[[int, bool], None]:
    """Move the bar over chunks that an earlier start of the run has left on disk."""

    def on_chunk(index: int, computed: bool) -> None:
        if not computed:
            task.advance(len(names[index]))

    return on_chunk
