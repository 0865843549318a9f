"""Which model of a run is to be exported, and whether all of it is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_lite.errors import UserError
from srlm_lite.recipe import Recipe
from srlm_lite.records import Candidate, Prompt
from srlm_lite.run.files import read_records
from srlm_lite.run.layout import StageDir
from srlm_lite.run.run import RunDir

if TYPE_CHECKING:
    from srlm_lite.model.base import BaseFiles
    from srlm_lite.model.stack import Adapter

PROMPTS = (
    "What is the moon made of?",
    "How do I keep my bicycle in good shape?",
    "Write two sentences about a lighthouse.",
    "Why does bread rise in the oven?",
)
"""For a run that has no prompts of its own yet."""

_TEXTS = 6


@dataclass(frozen=True, slots=True)
class FinishedModel:
    """One finished model of a run: the base, the anchor, and the delta of an iteration."""

    run: RunDir
    recipe: Recipe
    iteration: int
    """0 for the anchor alone."""
    hashes: tuple[str, ...]
    """SHA-256 of every file of the stack, held against `done.json`."""

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-m{self.iteration + 1}"

    @property
    def places(self) -> list[StageDir]:
        """The anchor and all iterations up to this one."""
        return [self.run.anchor, *map(self.run.iteration, range(1, self.iteration + 1))]

    def stack(self) -> list[Adapter]:
        """The adapters, from disk."""
        from srlm_lite.model.stack import Adapter

        stack = [Adapter.load(self.run.anchor.adapter)]
        if self.iteration:
            stack.append(Adapter.load(self.run.iteration(self.iteration).delta))
        return stack

    def base_files(self) -> BaseFiles:
        """The files of the base that the run was on.

        Raises:
            UserError: They are other weights by now, or not to be had.
        """
        from srlm_lite.model.base import base_files

        if not self.run.base_json.is_file():
            raise UserError(
                "is missing: nothing says which weights the run was on",
                where=str(self.run.base_json),
            )
        run = self.run
        files = base_files(
            self.recipe.base, revision=run.base_revision, conversion=run.base_conversion
        )
        self.run.hold_to_base(files.source)
        return files

    def texts(self) -> list[tuple[Prompt, str | None]]:
        """A few prompts with an answer that the run has given, where it has.

        Half of them are conversations, where the run has any.
        """
        first = self.run.iteration(max(1, self.iteration))
        if not (first.prompts.is_file() and first.candidates.is_file()):
            return [(Prompt("", prompt), None) for prompt in PROMPTS]
        answers = {row.prompt_id: row.text for row in read_records(first.candidates, Candidate)}
        prompts = read_records(first.prompts, Prompt)
        several = [one for one in prompts if one.messages][: _TEXTS // 2]
        few = [*[one for one in prompts if not one.messages][: _TEXTS - len(several)], *several]
        return [(prompt, answers.get(prompt.prompt_id)) for prompt in few]


def find_source(directory: Path, which: str) -> FinishedModel:
    """The model of an iteration: a number, `anchor` or `last`.

    Raises:
        UserError: There is no such model, it is not finished, or a file of it has changed.
    """
    run = RunDir(directory)
    recipe = run.recipe()
    iteration = _iteration(run, which)
    run.hold_to_files()
    hashes = list(run.anchor.verify(*run.anchor.adapter_files).values())
    if iteration:
        place = run.iteration(iteration)
        hashes += place.verify(*place.adapter_files).values()
    return FinishedModel(run=run, recipe=recipe, iteration=iteration, hashes=tuple(hashes))


def _iteration(run: RunDir, which: str) -> int:
    if which == "last":
        return run.last_done()
    if which == "anchor":
        return 0
    begun = [place.number for place in run.iterations()]
    if which.isdecimal() and int(which) in begun:
        return int(which)
    raise UserError(
        f"has no iteration {which}" if which else "no iteration is named",
        where=str(run.path),
        way_out=f"It has: {', '.join(['anchor', *map(str, begun)])}",
    )
