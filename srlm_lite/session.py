"""The base in memory, once, and the roles that run on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from srlm_lite.conversation import Answerable, key_of
from srlm_lite.engines import ENGINES, EngineKind, Role, kind_of
from srlm_lite.errors import ProofError, UserError
from srlm_lite.judging import Rubric, load_rubric
from srlm_lite.methods import METHODS
from srlm_lite.processes import Processes
from srlm_lite.progress import Reporter, Silent, Tracker, Untracked
from srlm_lite.recipe import Recipe
from srlm_lite.run.layout import StageDir, adapter_files
from srlm_lite.run.run import RunDir
from srlm_lite.settings import EngineName
from srlm_lite.window import leaves_room

if TYPE_CHECKING:  # torch is imported when the base is first needed, and not before
    from srlm_lite.model.base import LoadedBase
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.model.sharding import Pace
    from srlm_lite.model.stack import Adapter, Slot
    from srlm_lite.rollout.protocol import Engine

I = TypeVar("I", contravariant=True)  # noqa: E741
R = TypeVar("R")

Advance = Callable[[int], None]
"""Told how many more rows are done."""


class Work(Protocol[I]):
    """What makes a chunk's rows of an item; it travels between processes."""

    def __call__(self, session: Session, item: I, advance: Advance) -> list[Any]: ...


class Session:
    """A recipe at work in a run directory.

    Loading is lazy: a run whose stages are all complete never loads its base. Where there are
    several processes each has a session; the first one's alone knows the run directory, and gives
    the others what they are to do (`share_out`, `together`).
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        reporter: Reporter | None = None,
        processes: Processes | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.recipe, self.run = recipe, run
        self.reporter: Reporter = reporter or Silent()
        self.tracker: Tracker = tracker or Untracked()
        self.processes = processes or Processes()
        self._engines: dict[EngineName, Engine] = {}
        self._revision: str | None = None
        self._conversion: int | None = None
        self.pace: Pace | None = None
        """What keeps the processes of a sharded base in step, once it is loaded."""
        self._prompt_lengths: dict[object, int] = {}
        """Tokens of prompts, by what is asked: every iteration goes through the whole list again.
        """
        import_backend(recipe)

    def leaves_room(self, prompt: Answerable) -> bool:
        """Whether the window has room for an answer after this prompt."""
        asked = key_of(prompt.asked)
        if asked not in self._prompt_lengths:
            self._prompt_lengths[asked] = len(self.chat.policy_ids(prompt))
        return leaves_room(
            self._prompt_lengths[asked],
            self.recipe.base.window,
            answer=self.recipe.rollout.max_new_tokens,
            thought=self.thought_tokens(),
        )

    def thought_tokens(self, role: Role = "policy") -> int:
        """Tokens that a thought before the answer may take: 0 where the base does not think.

        0 for a judge or teacher behind a server, too: it has limits of its own.
        """
        if role != "policy" and self.engine_kind(role).remote:
            return 0
        return self.recipe.rollout.max_thought_tokens if self.chat.thinks else 0

    @cached_property
    def rubric(self) -> Rubric:
        return load_rubric(self.recipe.judge.rubric)

    @cached_property
    def base(self) -> LoadedBase:
        from srlm_lite.model.base import load_base
        from srlm_lite.model.gguf import outdated

        if self.processes.place.leads:
            self._revision = self.run.base_revision
            self._conversion = self.run.base_conversion
            # So that all of them load at the same time.
            self._order(_LoadBase(self._revision, self._conversion))
        section = self.recipe.base
        if self._revision is not None:  # the Hub's model may have moved on since the run began
            section = section.model_copy(update={"revision": self._revision})
        base = load_base(section, sharded=self.processes.shards, conversion=self._conversion)
        if self.processes.shards:
            from srlm_lite.model.sharding import Pace

            self.pace = Pace(
                base.model,
                anyone=self.processes.anyone,
                call=lambda: self._order(_PassBy()),
                thank=lambda: self.processes.gather(None),
            )
        if self.processes.place.leads:
            _refuse_different(self.processes.gather(base.source))
            self.run.hold_to_base(base.source)
            if base.source["kind"] == "hub":  # whose files are here only now
                refuse_unexportable(self.recipe, self.run)
            self._warn_of_positions(base)
            if old := outdated(self._conversion):
                self.reporter.warn(old)
        return base

    def _warn_of_positions(self, base: LoadedBase) -> None:
        text, window = base.model.config.get_text_config(), self.recipe.base.window
        positions = getattr(text, "max_position_embeddings", None)
        if isinstance(positions, int) and window > positions:
            self.reporter.warn(
                f"base.window is {window}, and the base was made for {positions} "
                "positions: text beyond them it reads and writes badly, if at all"
            )
        own = positions_of_its_own(text)
        if own is not None and window > own:
            self.reporter.warn(
                f"base.window is {window}, and beside a text of more than {own} tokens this base "
                "reads and writes others otherwise than alone: what a prompt samples depends on "
                f"its neighbours. base.window={own} avoids that"
            )

    @cached_property
    def chat(self) -> ChatFormat:
        from srlm_lite.model.chat import ChatFormat

        section = self.recipe.base
        return ChatFormat.of(
            self.base,
            template=section.chat_template,
            settings=section.chat_template_kwargs,
            system=section.system,
        )

    @cached_property
    def slot(self) -> Slot:
        from srlm_lite.model.stack import Slot
        from srlm_lite.model.targets import check_targets, experts_left_out

        recipe = self.recipe
        shipped = self.shipped_anchor
        rank = recipe.anchor.lora.rank if shipped is None else shipped.rank
        check_targets(self.base.model, recipe.targets)
        if left_out := experts_left_out(self.base.model, recipe.targets):
            self.reporter.warn(
                f"the base's experts lie fused in memory, where no adapter reaches them: "
                f"{', '.join(left_out)} are adapted in its other layers alone"
            )
        slot = Slot(
            self.base.model,
            targets=recipe.targets,
            rank=rank + recipe.dpo.lora.rank,
            fold=recipe.rollout.fold,
            backend=recipe.base.backend,
        )
        if shipped is not None:
            slot.load((shipped,))  # refused here if it does not fit the base
        return slot

    def settle(self) -> None:
        """From here on this is the run of its directory: it has its base, its stack and its data.

        Raises:
            UserError: The stack does not fit the base.
        """
        if not self.run.is_settled:
            _ = self.slot
            self.run.settle()

    @cached_property
    def shipped_anchor(self) -> Adapter | None:
        """The anchor the recipe starts from, or None when the run trains its own."""
        from srlm_lite.model.stack import Adapter

        init = self.recipe.anchor.init
        return None if init == "base" else Adapter.load(Path(init))

    def engine(self, stack: Sequence[Adapter], role: Role = "policy") -> Engine:
        """The sampling engine of a role, with a stack loaded."""
        kind = self.engine_kind(role)
        if kind.name not in self._engines:
            self._engines[kind.name] = kind.make(self)
        engine = self._engines[kind.name]
        engine.load(stack)
        return engine

    def engine_kind(self, role: Role) -> EngineKind:
        """What the engine is that samples for a role."""
        return kind_of(self.recipe, role)

    def reach(self, role: Role) -> None:
        """Ask what the engine of a role depends on whether it is there, before all work for it.

        Raises:
            UserError: It is not, or what says where it is holds a secret.
        """
        kind = self.engine_kind(role)
        if kind.reach is not None:
            kind.discreet(self.recipe)
            kind.reach(self.recipe)

    def close_engines(self) -> None:
        """Give back the memory of sampling, before a training needs it."""
        for engine in self._engines.values():
            engine.close()

    def stack(self, iteration: int, role: Role = "policy") -> list[Adapter]:
        """The adapters of an iteration's model as they lie on disk; 0 is the anchor alone.

        Where the judge has deltas of its own, its last one stands in the policy's place.

        Raises:
            UserError: One is missing or damaged, or not what a finished stage has written.
        """
        from srlm_lite.model.stack import Adapter

        adapters: list[tuple[StageDir, Path]] = [(self.run.anchor, self.run.anchor.adapter)]
        begun = [self.run.iteration(t) for t in range(iteration, 0, -1)]
        if role == "judge" and self.recipe.judge_has_deltas:
            own = [(it, it.judge_place) for it in begun]
            adapters += [(it, place.adapter) for it, place in own if place.training.is_file()][:1]
        else:
            adapters += [(it, it.delta) for it in begun[:1]]
        for stage, folder in adapters:
            if stage.is_done:
                stage.verify(*adapter_files(folder))
        return [Adapter.load(folder) for _, folder in adapters]

    def share_out(
        self, work: Work[I], items: Sequence[I], *, role: Role | None = None, advance: Advance
    ) -> Iterator[list[Any]]:
        """The rows of each item, in order; with several processes as many items at once.

        An item is computed whole by one process, in the same way whichever that is, so the rows do
        not depend on how many there are. A server is asked by the first process alone:
        `openai.parallel` says how many requests it gets at once.

        Args:
            role: Whose engine does the work; None where it is none's, but the base's in memory.
        """
        world = self.processes.world
        if world == 1 or (role and self.engine_kind(role).remote):
            for item in items:
                yield work(self, item, advance)
            return
        self._ready()
        for start in range(0, len(items), world):
            dealt = items[start : start + world]
            self._order(_Share(work if start == 0 else None, dealt))
            with self.apart():
                own = work(self, dealt[0], advance)
            for rank, rows in enumerate(self.processes.gather(own)[: len(dealt)]):
                if rank:
                    advance(len(rows))
                yield rows

    def together(self, work: Callable[[Session], tuple[Adapter, R]]) -> tuple[Adapter, R]:
        """A training that all processes do at the same time, each with its share of every step.

        Raises:
            ProofError: They have not ended with the same adapter.
        """
        self._ready()
        self._order(_Train(work))
        with self.alike():
            adapter, facts = work(self)
        if self.processes.world > 1:
            digests = self.processes.gather(adapter.digest())
            if len(set(digests)) > 1:
                raise ProofError(f"the processes have trained different adapters: {digests}")
        return adapter, facts

    def apart(self) -> AbstractContextManager[None]:
        """Within this context each process computes something of its own."""
        return self.pace.apart() if self.pace else nullcontext()

    def alike(self) -> AbstractContextManager[None]:
        """Within this context all processes compute the same, or their shares of it in step."""
        return self.pace.alike() if self.pace else nullcontext()

    def _ready(self) -> None:
        """Have the base loaded: that is an order of its own, which no other may enclose."""
        if self.processes.world > 1:
            _ = self.base

    def _order(self, order: Order | None) -> None:
        if self.processes.world > 1:
            self.processes.broadcast(order)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Tell the other processes the recipe, and at the end to go home.

        After an error it does not tell them: they may be in the midst of something, where no order
        reaches them. `Processes.joined` ends them then.
        """
        if self.processes.world > 1:
            self.processes.broadcast(self.recipe)
        yield
        self._order(None)


class Order(Protocol):
    """What the first process wants of the others; gives what they are to hand back."""

    def __call__(self, follower: Follower) -> Any: ...


class Follower:
    """A process that computes what the first one asks for, and writes nothing it would miss.

    Its own run directory is a temporary one: for the scratch files of libraries, and logs.
    """

    def __init__(self, recipe: Recipe, processes: Processes, scratch: Path) -> None:
        self.session = Session(recipe, RunDir(scratch), processes=processes)
        self.work: Work[Any] | None = None

    def follow(self) -> None:
        """Until the first process has no more orders."""
        processes = self.session.processes
        order: Order | None
        while (order := processes.broadcast()) is not None:
            processes.gather(order(self))
        self.session.close_engines()


def follow(processes: Processes) -> None:
    """Work for the first process, on the recipe that it is going to send."""
    recipe: Recipe = processes.broadcast()
    scratch = Path(tempfile.mkdtemp(prefix="srlm-lite-"))
    Follower(recipe, processes, scratch).follow()
    shutil.rmtree(scratch)  # after a failure its logs may say why


@dataclass(frozen=True, slots=True)
class _LoadBase:
    revision: str | None
    conversion: int | None

    def __call__(self, follower: Follower) -> dict[str, Any]:
        follower.session._revision = self.revision
        follower.session._conversion = self.conversion
        return follower.session.base.source


@dataclass(frozen=True, slots=True)
class _Share:
    """An item for each process; without work, the same as the last time."""

    work: Work[Any] | None
    items: Sequence[Any]

    def __call__(self, follower: Follower) -> list[Any] | None:
        follower.work = self.work or follower.work
        rank = follower.session.processes.place.rank
        with follower.session.apart():
            if follower.work is None or rank >= len(self.items):
                return None
            return follower.work(follower.session, self.items[rank], lambda count: None)


@dataclass(frozen=True, slots=True)
class _Train:
    work: Callable[[Session], tuple[Adapter, Any]]

    def __call__(self, follower: Follower) -> str:
        with follower.session.alike():
            return self.work(follower.session)[0].digest()


@dataclass(frozen=True, slots=True)
class _PassBy:
    """The first process passes forward through a sharded base, for work of its own."""

    def __call__(self, follower: Follower) -> None:
        if follower.session.pace is not None:
            follower.session.pace.pass_by()


def refuse_absent_base(recipe: Recipe, run: RunDir | None) -> bool:
    """Ask for the base before anything is written; whether its files are here. It takes no torch.

    Args:
        run: Which may have noted the commit of its base; None: there is none yet.

    Raises:
        UserError: It is neither here nor to be had from the Hub.
    """
    from srlm_lite.model.whereabouts import is_here

    noted = None if run is None else run.base_revision
    return is_here(recipe.base.model_copy(update={"revision": noted or recipe.base.revision}))


def refuse_unreadable_base(recipe: Recipe, run: RunDir | None) -> None:
    """Look into the files of a base that are here.

    Raises:
        UserError: They are no base, or one that cannot be loaded.
    """
    from srlm_lite.model.base import refuse_unreadable

    refuse_unreadable(recipe.base, conversion=None if run is None else run.base_conversion)


def refuse_unexportable(recipe: Recipe, run: RunDir | None) -> None:
    """Make sure that what a run is about to train can be exported, as far as its files are here.

    A run that has its anchor goes on: it may have been begun before this was asked. Files of the
    Hub that are not here yet are asked when they are (`Session.base`).

    Raises:
        UserError: It cannot be, and why.
    """
    from srlm_lite.model.exportable import refuse_unexportable as refuse
    from srlm_lite.model.whereabouts import directory_here

    if run is not None and run.anchor.is_done:
        return
    revision = None if run is None else run.base_revision
    folder = directory_here(recipe.base, revision=revision)
    if folder is not None:
        refuse(folder, recipe.targets)


def positions_of_its_own(config: Any) -> int | None:
    """Tokens up to which a text's positions are scaled by nothing but itself; None: however long.

    transformers scales those of the types `longrope` and `dynamic` by the longest text in a batch.

    Args:
        config: Of the text model.
    """
    said = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in said.values() if isinstance(one, dict)] or [said]
    made_for = getattr(config, "max_position_embeddings", None)
    found = [
        one.get("original_max_position_embeddings") if kind == "longrope" else made_for
        for one in kinds
        if (kind := one.get("rope_type")) in ("longrope", "dynamic")
    ]
    return min((int(each) for each in found if each), default=None)


def import_backend(recipe: Recipe) -> None:
    """Import Unsloth, where the recipe has it, before anything imports what it rewrites.

    Raises:
        UserError: It is not installed, does not start, or comes too late.
    """
    if recipe.base.backend == "unsloth":
        from srlm_lite.model.unsloth_backend import import_first

        import_first()


def refuse_several(recipe: Recipe, processes: int) -> None:
    """Stop a run of a method that computes in one process, where there are several.

    Raises:
        UserError: Says which method.
    """
    if METHODS[recipe.method].one_process and processes > 1:
        raise UserError(
            f"{recipe.method} trains in one process, and there are {processes}",
            where="method",
            way_out="Start it without a launcher",
        )


def refuse_sharding(recipe: Recipe) -> None:
    """Stop a run that needs the base whole, where it is to be spread over the processes.

    Raises:
        UserError: Says which setting needs it.
    """

    def line(what: str, where: str, way_out: str) -> UserError:
        return UserError(f"{what}, and FSDP spreads it", where=where, way_out=way_out)

    if recipe.base.backend == "unsloth":
        raise line("Unsloth holds the base whole", "base.backend", "Set it to transformers")
    for name, engine in (("rollout", recipe.rollout.engine), ("judge", recipe.judge.engine)):
        if engine is not None and ENGINES[engine].holds_base:
            held = f"{ENGINES[engine].label} holds the base whole"
            raise line(held, f"{name}.engine", "Set it to transformers")
    if METHODS[recipe.method].one_process:
        raise line(
            f"{recipe.method} trains in one process, which holds the base whole",
            "method",
            "Launch it as one process, or with a configuration that is not FSDP's",
        )


def _refuse_different(sources: Sequence[dict[str, Any]]) -> None:
    """The processes may lie on several machines, each with files of its own."""
    for rank, source in enumerate(sources):
        for key in ("sha256", "revision"):
            if source.get(key) != sources[0].get(key):
                raise UserError(
                    f"process {rank} has loaded other weights of {source['name']} than the first "
                    f"({key} {source.get(key)}, not {sources[0].get(key)})",
                    where="base.name",
                    way_out="Put the same files on every machine",
                )
