"""How every stage that makes many rows makes them: chunk by chunk, shared out, into a journal.

A chunk's rows reach the disk together, so a killed run loses at most one, and what is there is not
made again. Seeds depend on the names of rows alone: not on chunks, nor on who computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from srlm_lite.engines import Role
from srlm_lite.records import Candidate, Judgement, Likelihood, Reply, Weighed
from srlm_lite.run.journal import Journal
from srlm_lite.session import Session, Work

T = TypeVar("T")
R = TypeVar("R", Candidate, Judgement, Likelihood, Reply, Weighed)

KEYS: Mapping[type, Callable[[Any], str]] = {
    Candidate: lambda row: row.candidate_id,
    Judgement: lambda row: f"{row.candidate_id}:{row.vote}",
    Likelihood: lambda row: row.candidate_id,
    Reply: lambda row: row.name,
    Weighed: lambda row: row.name,
}
"""The name of a row, by what it is a row of."""


def chunked(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """A sequence cut into chunks of a size, the last one maybe shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def journaled(
    session: Session,
    work: Work[Sequence[T]],
    chunks: Sequence[Sequence[T]],
    *,
    kind: type[R],
    names: Callable[[T], Sequence[str]],
    path: Path,
    stage: str,
    unit: str,
    role: Role | None = None,
) -> list[R]:
    """The rows of all chunks, appended to the journal at `path`; those that it holds are read.

    Args:
        work: Makes a chunk's rows, in this process or in another one; tells how many are done.
        kind: What the rows are.
        names: Of the rows that an item makes, in order: an item's do not change between starts.
        stage: What the progress is called.
        unit: What it counts: answers, replies.
        role: Whose engine does the work; None where it is none's, but the base's in memory.
    """
    named = [[name for item in chunk for name in names(item)] for chunk in chunks]
    task = session.reporter.start(stage, sum(map(len, named)), unit)

    def compute(missing: Sequence[int]) -> Iterator[list[R]]:
        items = [chunks[index] for index in missing]
        return session.share_out(work, items, role=role, advance=task.advance)

    def on_chunk(index: int, computed: bool) -> None:
        if not computed:  # an earlier start of the run has left it on disk
            task.advance(len(named[index]))

    rows: list[R] = Journal(path, kind, KEYS[kind]).stream(named, compute, on_chunk=on_chunk)
    return rows
