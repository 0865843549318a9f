"""The house style: a short advice reply with five properties that code can check.

``gold`` is the external check of the ``smollm2-135m-demo`` recipe. ``review`` writes the same
verdicts as a judge's reply that quotes its evidence first; the EFT targets are made with it.
Pure Python: text in, points out.
"""

from __future__ import annotations

import re

CRITERIA = ("opening", "topic", "bullets", "figure", "ending")
"""One point each, in the order in which a reader meets them."""

OPENING = "In short:"
ENDING = "Next step:"
BULLETS_WANTED = 3

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_BULLET = re.compile(r"^[-*•]\s+(?=\S)")
_LIST_NUMBER = re.compile(r"^[0-9]+[.)](?=\s|$)")
_FIGURE = re.compile(r"[0-9]+(?:[.,:][0-9]+)*(?:\s*[^\W\d_]+)?")


def _lines(response: str) -> list[str]:
    """The lines that hold text, without the white space around them."""
    return [line.strip() for line in response.splitlines() if line.strip()]


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _starts_with(line: str, label: str) -> bool:
    """Whether the line is the label (in any case) followed by at least one word."""
    head, rest = line[: len(label)], line[len(label) :]
    return head.casefold() == label.casefold() and bool(_words(rest))


def topic_of(prompt: str) -> str:
    """The topic of a question is its last word; empty when the prompt has no words."""
    words = _words(prompt)
    return words[-1] if words else ""


def names_topic(line: str, topic: str) -> bool:
    """Whether a line has the topic as a whole word; case and a plural s don't matter."""
    wanted = topic.casefold()
    if not wanted:
        return False
    found = {word.casefold() for word in _words(line)}
    return bool(found & {wanted, wanted + "s", wanted.removesuffix("s") or wanted})


def bullets(response: str) -> list[str]:
    """The texts of the lines that start with a bullet sign, a space and a text."""
    lines = _lines(response)
    return [_BULLET.sub("", line) for line in lines if _BULLET.match(line)]


def first_figure(response: str) -> str | None:
    """The first number in digits with the word after it; a list number does not count."""
    for line in _lines(response):
        match = _FIGURE.search(_LIST_NUMBER.sub("", line))
        if match:
            return match.group()
    return None


def gold(prompt: str, response: str) -> dict[str, float]:
    """Points for each criterion (0 or 1); their sum is the gold score, 0 to 5.

    opening: the first line starts with ``In short:`` and goes on.
    topic: the first line names the topic, which is the last word of the prompt.
    bullets: exactly three lines are bullets.
    figure: some number is written in digits (``1.`` at the start of a line does not count).
    ending: the last line starts with ``Next step:`` and goes on.
    """
    lines = _lines(response)
    if not lines:
        return dict.fromkeys(CRITERIA, 0.0)
    verdicts = (
        _starts_with(lines[0], OPENING),
        names_topic(lines[0], topic_of(prompt)),
        len(bullets(response)) == BULLETS_WANTED,
        first_figure(response) is not None,
        _starts_with(lines[-1], ENDING),
    )
    return {name: float(verdict) for name, verdict in zip(CRITERIA, verdicts, strict=True)}


def review(prompt: str, response: str) -> str:
    """A judge's reply: for each criterion the evidence, the verdict, the points so far.

    The evidence is copied from the reply (its first line, the first word of each bullet, the
    figure, the start of the last line), so that every verdict follows from words just written.
    """
    points = gold(prompt, response)
    lines = _lines(response) or ["none"]
    starts = [text.split()[0] for text in bullets(response)]
    counted = " ".join(f"{number} {word}" for number, word in enumerate(starts, start=1))
    evidence = {
        "opening": f"First line: {lines[0]}\nOpening",
        "topic": topic_of(prompt),
        "bullets": f"Bullets {counted or 'none'}",
        "figure": f"Figure {first_figure(response) or 'none'}",
        "ending": f"Last line: {' '.join(lines[-1].split()[:3])}",
    }
    total = 0
    written = []
    for name in CRITERIA:
        total += int(points[name])
        written.append(f"{evidence[name]} {'yes' if points[name] else 'no'} ({total})")
    return "\n".join([*written, f"Score: {total}"])
