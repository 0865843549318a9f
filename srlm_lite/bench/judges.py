"""The judge that a benchmark asks: of a run, or a recipe's shipped anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from srlm_lite.engines import Role
from srlm_lite.errors import UserError
from srlm_lite.forms import FORMS
from srlm_lite.progress import Reporter
from srlm_lite.recipe import Recipe, load_recipe, overridden
from srlm_lite.rollout.protocol import Engine, Limits, Request, Sample
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

MEASURES = (
    *("anchor.disturb_template", "judge", "openai", "rollout", "vllm"),
    *(kind.section for kind in FORMS.values() if kind.section is not None),
)
"""The settings of a run that say how its judge is asked; the others say what it is."""


class CountedSession(Session):
    """A session that counts what its engines read and write.

    `read` are the tokens of all questions, however much of them is computed once for several, and
    `written` those of replies; of a single token that is only weighed, nothing is written. What a
    server reads is not known, and not counted.
    """

    read = 0
    written = 0

    def engine(self, stack: Sequence[Adapter], role: Role = "policy") -> Engine:
        """See `Session.engine`."""
        return _CountedEngine(super().engine(stack, role), self)


@dataclass(frozen=True, slots=True)
class _CountedEngine:
    engine: Engine
    session: CountedSession

    def load(self, stack: Sequence[Adapter]) -> None:
        self.engine.load(stack)

    def sample(
        self,
        requests: Sequence[Request],
        limits: Limits,
        *,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> list[list[Sample]]:
        found = self.engine.sample(requests, limits, on_samples=on_samples)
        self.session.read += sum(len(one.prompt_ids) for one in requests)
        if limits.max_new_tokens > 1:
            self.session.written += sum(one.n_tokens for some in found for one in some)
        return found

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True, slots=True)
class BenchJudge:
    """A judge, and the model that answers.

    Attributes:
        name: `iteration 2`, `anchor`, `shipped anchor`, or a server's.
        number: Its iteration in a run, 0 for the anchor; None of a recipe's.
        scratch: A folder that is deleted when the benchmark ends.
    """

    session: CountedSession
    stack: Sequence[Adapter]
    policy: Sequence[Adapter]
    name: str
    number: int | None
    scratch: Path

    @property
    def recipe(self) -> Recipe:
        """What it is asked by."""
        return self.session.recipe


@contextmanager
def bench_judge_of(
    adapters: Path | None,
    recipe: str | None,
    overrides: Sequence[str],
    reporter: Reporter,
    *,
    iteration: int | None = None,
    measured: bool = False,
) -> Iterator[BenchJudge]:
    """The judge of a run, its last model unless said, or of a recipe's shipped anchor.

    Args:
        measured: A run's judge can be asked in another way than it was in the run, see `MEASURES`.

    Raises:
        UserError: Neither a run nor a recipe is named, or both; the recipe ships no anchor, the run
            has no such iteration, or a setting would make it another judge.
    """
    if (adapters is None) == (recipe is None):
        raise UserError("name a run with --adapters or a recipe with --recipe, one of them")
    if overrides and recipe is None and not measured:
        raise UserError("--set goes with --recipe: a run's settings are settled")
    with TemporaryDirectory(prefix="srlm-lite-judge-") as folder:
        scratch = Path(folder)
        if recipe is not None:
            session = CountedSession(
                load_recipe(recipe, overrides), RunDir(scratch / "run"), reporter
            )
            number = None
        else:
            run = RunDir(Path(str(adapters)))
            run.hold_to_files()
            session = CountedSession(_asked_as(run, overrides), run, reporter)
            number = _number(run, iteration)
        own = [] if number is None else session.stack(number)
        if session.engine_kind("judge").remote:
            stack, name = [], str(session.recipe.openai.model)
        elif number is not None:
            stack, name = session.stack(number, "judge"), f"iteration {number}" if number else ""
        else:
            anchor = session.shipped_anchor
            if anchor is None:
                raise UserError(
                    "ships no anchor",
                    where=session.recipe.name,
                    way_out="Name a run of it with --adapters",
                )
            stack, own, name = [anchor], [anchor], "shipped anchor"
        yield BenchJudge(session, stack, own, name or "anchor", number, scratch)


def _asked_as(run: RunDir, overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not any(key == one or key.startswith(f"{one}.") for one in MEASURES):
            raise UserError(
                "would make it another judge, not another way to ask it",
                where=f"--set {override}",
                way_out=f"Set something of {', '.join(MEASURES)}",
            )
    recipe = run.recipe()
    if not overrides:
        return recipe
    return overridden(recipe.model_dump(mode="json"), overrides, where=str(run.run_json))


def _number(run: RunDir, iteration: int | None) -> int:
    last = run.last_done()
    if iteration is None:
        return last
    if not 0 <= iteration <= last:
        raise UserError(
            f"has no model of iteration {iteration}",
            where=str(run.path),
            way_out=f"Its last one is {last}; 0 is the anchor",
        )
    return iteration
