"""Progress: a line for each finished stage, and of a long one how far it is.

On a terminal that is a bar with ETA; in a log file a line now and then.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

from srlm_lite.cli.wrapping import fitted, hung
from srlm_lite.evaluate.judge_figures import ACCURACY
from srlm_lite.progress import Task
from srlm_lite.telling import for_terminal, without_secrets


class TimeLeft:
    """How long the rest of a stage takes, by its newest units; times are in seconds.

    The newest are those of the last two minutes, or the last ten times that some were done: a step
    may take minutes. What is done in the stage's first second was on disk and took no time.
    """

    RECENT_S, RECENT = 120.0, 10
    AT_ONCE_S = 1.0

    def __init__(self, total: int, now: float) -> None:
        self.done, self.total = 0, total
        self._start = now
        self._marks = deque([(now, 0)])

    def advance(self, count: int, now: float) -> None:
        """So many more are done."""
        self.done += count
        if now - self._start < self.AT_ONCE_S:
            self._marks = deque([(now, self.done)])
        elif count:
            self._marks.append((now, self.done))
        while len(self._marks) > self.RECENT + 1 and self._marks[1][0] < now - self.RECENT_S:
            self._marks.popleft()

    def restart(self, now: float) -> None:
        """What is done so far was done before, and took none of the time."""
        self._marks = deque([(now, self.done)])

    def left(self, now: float) -> float | None:
        """Seconds to go: None while that cannot be told. Between two units it counts down."""
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        if done == before or last == first:
            return None
        of_one = (last - first) / (done - before)
        rest = self.total - self.done
        # One that is late is expected at any moment.
        return max(0.0, rest * of_one - min(now - last, of_one))


class _Eta(ProgressColumn):
    """Rich's own column knows nothing of steps that take over half a minute."""

    def render(self, task: RichTask) -> Text:
        time_left: TimeLeft = task.fields["time_left"]
        left = time_left.left(time.monotonic())
        return Text("-" if left is None else _duration(left), style="progress.remaining")


class _Bar:
    def __init__(self, progress: Progress, task: TaskID, time_left: TimeLeft) -> None:
        self._progress, self._task, self._time_left = progress, task, time_left

    def advance(self, count: int = 1) -> None:
        self._time_left.advance(count, time.monotonic())
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)

    def restart(self) -> None:
        self._time_left.restart(time.monotonic())


class _Lines:
    """In a log file: a line after a minute, and the longer the stage takes the fewer."""

    def __init__(self, say: Callable[[str], None], stage: str, total: int, unit: str) -> None:
        self._say, self._stage, self._unit = say, stage, unit
        self._note = ""
        self._started = self._last = time.monotonic()
        self._time_left = TimeLeft(total, self._started)

    def advance(self, count: int = 1) -> None:
        now, time_left = time.monotonic(), self._time_left
        time_left.advance(count, now)
        if not count or time_left.done >= time_left.total:
            return
        if now - self._last < max(60, (now - self._started) / 10):
            return
        left = time_left.left(now)
        self._say(
            f"    {self._stage}: {time_left.done}/{time_left.total} {self._unit} after "
            f"{_duration(now - self._started)}"
            f"{'' if left is None else f', ETA {_duration(left)}'}"
            f"{self._note and f', {self._note}'}"
        )
        self._last = now

    def note(self, text: str) -> None:
        self._note = text

    def restart(self) -> None:
        self._time_left.restart(time.monotonic())


class ConsoleReporter:
    """The reporter of the command line; everything it shows goes to stderr.

    Args:
        quiet: Show nothing: of several processes one speaks.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._rich = RichConsole(file=sys.stderr, highlight=False, soft_wrap=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("  {task.description}", style="cyan"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            _Eta(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._rich,
            transient=True,
            # Bars are for eyes: a log file gets lines alone.
            disable=not self._rich.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    @property
    def _width(self) -> int | None:
        return self._rich.width if self._rich.is_terminal else None

    def say(self, text: str) -> None:
        """See `Reporter.say`."""
        self._rich.print(fitted(_fit_to_show(text), self._width), markup=False)

    def command(self, line: str, what_for: str) -> None:
        """A command to type, and what for: whole, so that it can be copied, whatever the width."""
        line, what_for = _fit_to_show(line), _fit_to_show(what_for)
        told = f"{line}  # {what_for}"
        if self._width is not None and len(told) > self._width:
            indent = " " * (len(line) - len(line.lstrip()) if line[:1] == " " else 6)
            told = f"{line}\n{fitted(f'{indent}  # {what_for}', self._width)}"
        self._rich.print(told, markup=False)

    def start(self, stage: str, total: int, unit: str) -> Task:
        """See `Reporter.start`."""
        if not self._rich.is_terminal:
            return _Lines(self.say, stage, total, unit)
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        time_left = TimeLeft(total, time.monotonic())
        shown = self._progress.add_task(stage, total=total, unit=unit, note="", time_left=time_left)
        return _Bar(self._progress, shown, time_left)

    def finish(self, iteration: int, stage: str, facts: dict[str, Any], seconds: float) -> None:
        """See `Reporter.finish`."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        where = f"iteration {iteration}" if iteration else "anchor"
        head = f"  {where:<12} {stage:<11} {_duration(seconds):>8}  "
        self._rich.print(hung(head, _fit_to_show(summary(stage, facts)), self._width), markup=False)

    def warn(self, text: str) -> None:
        """See `Reporter.warn`."""
        told = hung("  warning: ", _fit_to_show(text), self._width)
        self._rich.print(told, style="yellow", markup=False)


def _fit_to_show(text: str) -> str:
    return for_terminal(without_secrets(text))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def summary(stage: str, facts: dict[str, Any]) -> str:
    """What a finished stage has to say, in one line."""
    return SUMMARIES[stage](facts)


def _anchor(facts: dict[str, Any]) -> str:
    if "taken_from" in facts:
        return f"shipped with the recipe ({facts['taken_from']})"
    return (
        f"{facts['ift']} IFT + {facts.get('eft', 0)} EFT rows"
        f"{_too_long(facts, 'of them')}, "
        f"{facts['steps']} steps, loss {facts['first_loss']:.3f} -> {facts['last_loss']:.3f}"
    )


def _base(facts: dict[str, Any]) -> str:
    told = [
        f"{found['bits_per_byte']:.2f} bits a byte of {what} (letters shuffled: "
        f"{found['shuffled']['bits_per_byte']:.2f})"
        for what, found in facts.items()
    ]
    return ", ".join(told) or "no instruction data to read"


def _too_long(facts: dict[str, Any], which: str) -> str:
    """How many were left out, where any were."""
    count = facts.get("too_long")
    return f" ({count} {which} too long for base.window)" if count else ""


def _prompts(facts: dict[str, Any]) -> str:
    return f"{facts['prompts']} prompts{_too_long(facts, 'of the list')}"


def _candidates(facts: dict[str, Any]) -> str:
    if not facts["candidates"]:
        return "none yet: the policy answers while it trains"
    return (
        f"{facts['candidates']} answers of {facts['mean_tokens']} tokens on average, "
        f"{facts['truncated']} ran into the limit"
    )


def _judgements(facts: dict[str, Any]) -> str:
    if "revisions" in facts:
        return _revisions(facts)
    if "labels" in facts:
        return _labels(facts)
    if "reward_steps" in facts:
        return _reward(facts)
    if not facts["judgements"]:
        return "none"
    mean = "none readable" if facts["mean_score"] is None else f"mean score {facts['mean_score']}"
    text = f"{facts['judgements']} votes, {facts['parse_rate']:.1%} readable, {mean}"
    if facts.get("gold_pairwise_accuracy") is not None:
        text += f"; pairwise accuracy by gold {facts['gold_pairwise_accuracy']:.2f}"
    return text


def _revisions(facts: dict[str, Any]) -> str:
    text = f"{facts['revisions']} revisions, {facts['unusable_revisions']} more unusable"
    if facts["changed"] is not None:
        text += f"; {facts['changed']:.0%} changed the answer"
    if "gold_revised" in facts:
        text += f"; gold {facts['gold_drafts']:.2f} -> {facts['gold_revised']:.2f}"
    return text


def _labels(facts: dict[str, Any]) -> str:
    text = f"{facts['labels']} labels by principles, {facts['unlabelled']} missing"
    if facts["mean_confidence"] is not None:
        text += (
            f"; confidence {facts['mean_confidence']:.2f}, both orders agree in "
            f"{facts['orders_agree']:.0%}"
        )
    if facts.get("gold_pairwise_accuracy") is not None:
        text += f"; pairwise accuracy by gold {facts['gold_pairwise_accuracy']:.2f}"
    return text


def _reward(facts: dict[str, Any]) -> str:
    text = f"reward model on {facts['reward_pairs']} pairs, {facts['reward_steps']} steps"
    if facts["reward_accuracy_held_out"] is not None:
        text += f"; accuracy on held-out pairs {facts['reward_accuracy_held_out']:.2f}"
    return text


def _pairs(facts: dict[str, Any]) -> str:
    drops = ", ".join(f"{count} {reason}" for reason, count in facts["drops"].items())
    replayed = f" and {facts['replayed']} older ones" if facts.get("replayed") else ""
    if facts.get("older"):  # the newest judge was asked of them
        replayed += f" of {facts['older']}, {facts['disputed']} of them disputed"
    judge = f", {facts['judge_pairs']} of judgements" if facts.get("judge_pairs") else ""
    text = f"{facts['pairs']} preference pairs{judge}{replayed}" + (
        f"; no pair: {drops}" if drops else ""
    )
    if "gold_agreement" in facts:
        gold = facts["gold_agreement"]
        text += f"; gold says {gold['right']} right, {gold['reversed']} reversed"
    if "consistency" in facts:
        text += f"; consistency {facts['consistency']:.2f}"
    return text


def _delta(facts: dict[str, Any]) -> str:
    if "step0_kl" in facts:
        text = (
            f"{facts['steps']} steps, {facts['drawn']} answers, reward "
            f"{facts['first_reward']:+.2f} -> {facts['last_reward']:+.2f}, divergence "
            f"{facts['step0_kl']:.4f} -> {facts['kl']:.4f} nats a token"
        )
        if facts.get("gold_pairwise_accuracy") is not None:
            text += f"; pairwise accuracy by gold {facts['gold_pairwise_accuracy']:.2f}"
        return text
    if "answers" in facts:
        return (
            f"SFT on {facts['answers']} answers{_too_long(facts, 'more')}, {facts['steps']} steps, "
            f"loss {facts['first_loss']:.3f} -> {facts['last_loss']:.3f}"
        )
    # A delta that goes on from the one before it starts elsewhere, and below.
    first = facts["first_loss"]
    is_ln_2 = abs(facts["step0_loss"] - math.log(2)) < 1e-3
    from_zero = " (ln 2)" if is_ln_2 and abs(first - facts["step0_loss"]) < 1e-4 else ""
    return (
        f"{facts['steps']} steps, loss {first:.4f}{from_zero} -> {facts['last_loss']:.4f}, "
        f"reward accuracy {facts['reward_accuracy']:.2f}"
    )


def _evaluation(facts: dict[str, Any]) -> str:
    judge, policy = facts["judge"], facts["policy"]
    parts = []
    if policy.get("gold_mean") is not None:
        parts.append(f"gold {policy['gold_mean']:.2f}")
    if (accuracy := ACCURACY.of(judge)) is not None:
        parts.append(f"judge {ACCURACY.label} {accuracy:.2f}")
    if "mean_length_chars" in policy:
        parts.append(f"mean length {policy['mean_length_chars']:.0f} characters")
    if "too_long" in policy:
        parts.append(f"{policy['too_long']} held-out prompts too long for base.window")
    return ", ".join(parts)


SUMMARIES: dict[str, Callable[[dict[str, Any]], str]] = {
    "base": _base,
    "anchor": _anchor,
    "prompts": _prompts,
    "candidates": _candidates,
    "judgements": _judgements,
    "pairs": _pairs,
    "delta": _delta,
    "evaluation": _evaluation,
}
