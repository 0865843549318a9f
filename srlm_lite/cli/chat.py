"""`srlm-lite chat`: talk to any model of a run."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path

import typer

from srlm_lite.errors import UserError
from srlm_lite.export.source import find_source
from srlm_lite.recipe import Recipe
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import known_temperature
from srlm_lite.stages.conversation import Conversation
from srlm_lite.stopping import Terminated
from srlm_lite.telling import for_terminal

HELP = """\
/judge          the model's own grading of its last answer
/iter T         go on with another model of the run: a number, anchor, base, last
/reset          forget the conversation
/quit           leave (so do the end of the input, and Ctrl-C when nothing is being said)
/help           this list
Anything else is said to the model."""


def run_chat(*, directory: Path, which: str, temperature: float | None) -> None:
    """Read lines from stdin until it ends; the model speaks on stdout, all else is on stderr."""
    if temperature is not None:
        try:
            known_temperature(temperature)
        except ValueError as error:
            raise UserError(str(error), where="--temperature") from error
    run = RunDir(directory)
    recipe = _in_process(run.recipe())
    session = Session(recipe, run)
    conversation = Conversation(session, temperature=temperature)
    _switch(conversation, session, which)
    _say("/help lists the commands; Ctrl-C stops an answer")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while (line := _read()) is not None and line != "/quit":
        try:
            _take(conversation, session, line)
        except UserError as error:  # a slip is no reason to lose the conversation
            _say(str(error))
        except Terminated:
            raise
        except KeyboardInterrupt:  # nor is an answer that grows too long
            typer.echo()
            _say("stopped, and forgotten")


def _take(conversation: Conversation, session: Session, line: str) -> None:
    command, _, rest = line.partition(" ")
    if not line:
        return
    if not command.startswith("/"):
        forgotten = conversation.answer(line, _show)
        typer.echo()
        if forgotten:
            _say(f"forgotten, for want of room: the oldest {forgotten} turns")
    elif command == "/judge":
        score = conversation.judge(_show)
        typer.echo()
        _say("no score can be read from this" if score is None else f"score {score:g}")
    elif command == "/iter":
        _switch(conversation, session, rest.strip())
    elif command == "/reset":
        conversation.reset()
        _say("the conversation is forgotten")
    elif command == "/help":
        _say(HELP)
    else:
        raise UserError(f"no command {command}", way_out="/help lists them")


def _switch(conversation: Conversation, session: Session, which: str) -> None:
    place = session.run.path
    if which == "base":
        conversation.use([])
        _say(f"the base of {place}")
        return
    source = find_source(place, which)
    own = session.recipe.judge_has_deltas
    judge = session.stack(source.iteration, "judge") if own else None
    conversation.use(source.stack(), judge=judge)
    _say(f"M{source.iteration + 1} of {place}")


def _in_process(recipe: Recipe) -> Recipe:
    """The recipe with the engine that switches stacks in the memory of this process."""
    return recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update={"engine": "transformers"}),
            "judge": recipe.judge.model_copy(update={"engine": None}),
        }
    )


def _read() -> str | None:
    """The next line; None at the end of the input, or where it is interrupted."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        typer.echo("> ", nl=False, err=True)
    try:
        line = sys.stdin.readline()
    except Terminated:
        raise
    except KeyboardInterrupt:
        line = ""
    if not line and is_typed:
        typer.echo(err=True)
    return line.strip() if line else None


def _show(piece: str) -> None:
    typer.echo(for_terminal(piece), nl=False)
    sys.stdout.flush()


def _say(text: str) -> None:
    typer.echo(for_terminal(text), err=True)
