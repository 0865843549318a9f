"""All checks of a launch, in the order in which they are asked, and who is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from srlm_lite.errors import UserError
from srlm_lite.preflight import base, inputs, machine
from srlm_lite.preflight.launch import Launch, Seen

Check = Callable[[Launch], Seen]
"""Looks at one thing; raises UserError where it stands in the way of the run."""

CHECKS: Mapping[str, Check] = {
    "processes": machine.processes,
    "directory": machine.directory,
    "engines": inputs.engines,
    "judge": inputs.judge,
    "files": inputs.files,
    "data": inputs.data,
    "judge data": inputs.judge_data,
    "method": inputs.method,
    "window": inputs.window,
    "prompts": inputs.prompts,
    "held-out": inputs.held_out,
    "tracking": machine.tracking,
    "server": machine.server,
    "base": base.base,
    "layers": base.layers,
    "device": base.device,
    "backend": base.backend,
    "base files": base.files,
    "targets": base.targets,
    "anchor": base.anchor,
    "chat template": base.template,
    "conversations": base.conversations,
    "thoughts": base.thoughts,
    "prompts that fit": base.prompts_that_fit,
    "judging": base.judging,
    "capabilities": base.capabilities,
    "memory": machine.memory,
    "disk": machine.disk,
    "time": machine.time,
}
"""Name to check. `device` imports torch, and those from `base files` on what loads a base, which
takes seconds: whatever can be told without comes before. Unsloth, which `backend` imports, comes
before what imports transformers."""

NEEDS: Mapping[str, tuple[str, ...]] = {
    "prompts": ("window",),
    "judge data": ("judge", "data"),
    "held-out": ("data",),
    "base files": ("base",),
    "layers": ("base",),
    "targets": ("base", "layers", "base files", "device"),
    "anchor": ("files", "targets"),
    "chat template": ("base", "base files", "device"),
    "conversations": ("base", "data", "prompts", "chat template"),
    "thoughts": ("base", "data", "chat template"),
    "prompts that fit": ("base", "chat template", "prompts", "conversations"),
    "capabilities": ("files",),
    "judging": ("base", "data", "judge", "prompts", "chat template", "conversations"),
    "memory": ("base", "device", "targets"),
    "disk": ("base", "device", "targets"),
    "time": ("base", "device", "targets"),
}
"""Checks that mean nothing where another one has found something: they would say it again."""

OF_WORK = (
    "device",
    "chat template",
    "conversations",
    "thoughts",
    "prompts that fit",
    "judging",
    "capabilities",
    "disk",
    "time",
    "server",
)
"""Checks of what a run that is finished does not need any more."""

State = Literal["ok", "warning", "bad", "not asked"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one check.

    Args:
        text: What was found; where the state is `bad`, the one line that says what to do.
    """

    check: str
    state: State
    text: str
    warnings: tuple[str, ...] = ()


def refuse(launch: Launch) -> list[str]:
    """Ask everything that can fail before a run writes anything; what bodes ill, a line each.

    Raises:
        UserError: The first that stands in the way.
    """
    # `RunDir.open` asks all of the directory next, under its lock; it may hash gigabytes.
    asked = {**_checks(launch), "directory": machine.glance}.values()
    return [line for check in asked for line in check(launch).warnings]


def answers(launch: Launch) -> Iterator[Answer]:
    """The answer of every check, one after the other, whatever the ones before have found."""
    bad: set[str] = set()
    for name, check in CHECKS.items():
        if waits := [need for need in NEEDS.get(name, ()) if need in bad]:
            bad.add(name)
            yield Answer(name, "not asked", f"see {', '.join(waits)}")
            continue
        if name not in _checks(launch):
            yield Answer(name, "not asked", "the run is finished")
            continue
        try:
            seen = check(launch)
        except UserError as error:
            bad.add(name)
            yield Answer(name, "bad", str(error))
        else:
            state: State = "ok" if seen.asked else "not asked"
            yield Answer(name, "warning" if seen.warnings else state, seen.text, seen.warnings)


def answers_of_files(launch: Launch) -> Iterator[Answer]:
    """The answers of the checks that need neither a directory nor a machine: settings and files."""
    named = {check: name for name, check in CHECKS.items()}
    for check in inputs.INPUTS:
        try:
            seen = check(launch)
        except UserError as error:
            yield Answer(named[check], "bad", str(error))
        else:
            state: State = "ok" if seen.asked else "not asked"
            yield Answer(
                named[check], "warning" if seen.warnings else state, seen.text, seen.warnings
            )


def _checks(launch: Launch) -> Mapping[str, Check]:
    """The checks that a launch is asked."""
    done = OF_WORK if launch.is_finished else ()
    return {name: check for name, check in CHECKS.items() if name not in done}


def can_start(found: Sequence[Answer]) -> bool:
    """Whether nothing stands in the way."""
    return all(answer.state != "bad" for answer in found)
