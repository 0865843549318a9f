"""Does a base understand a text? Bits per byte, beside the same text with its letters shuffled.

A base whose tokenizer or weights were read wrongly still answers, trains and is exported; only what
it makes of real text gives it away. Letters are shuffled within their words: spaces, stops and the
lengths of words stay, so that knowing words and what follows them is all that can help.

In bits per byte alone the two would not do: garbled words take more tokens, so even a base that is
given the wrong ids reads them at a higher price (SmolLM2-135M with every id moved: 4.6 bits against
8.4, and 11.6 nats a token against 11.5). Compared is the price of a token, text by text, which was
0.22 to 0.40 lower for English, Chinese, Russian and German, and at most 0.08 with a tokenizer that
spells, or that gives other ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from srlm_lite.evaluate.intervals import interval, ratio

MOST_TEXTS = 24
MOST_CHARACTERS = 120
"""How much of a text is read: it costs seconds, on a large base too."""

FEWEST_TEXTS = 6
"""With fewer, chance could say anything."""

LEAST_GAIN = 0.1
"""How much less a token a text has to cost that is understood, as a share of what it costs
shuffled."""

KINDS = ("answers", "prompts")
"""The kinds of text that a base reads."""

Figures = Mapping[str, Any]
R = TypeVar("R")

_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True, slots=True)
class Price:
    """What a model pays for a text: its negative log-likelihood, and for how many tokens."""

    nats: float
    tokens: int
    bytes: int

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens


def excerpt(text: str) -> str:
    """The beginning of a text, up to the end of a word."""
    text = text.strip()
    if len(text) <= MOST_CHARACTERS:
        return text
    cut = text[:MOST_CHARACTERS]
    return cut.rsplit(maxsplit=1)[0] if len(cut.split()) > 1 else cut


def shuffled(text: str, rng: Random) -> str:
    """The same letters in another order, word by word."""

    def mixed(word: re.Match[str]) -> str:
        letters = list(word[0])
        rng.shuffle(letters)
        return "".join(letters)

    return _WORD.sub(mixed, text)


def spread(rows: Sequence[R], most: int = MOST_TEXTS) -> list[R]:
    """At most so many of the rows, from all over them."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else list(rows)


def figures(prices: Sequence[tuple[Price, Price]], *, vocabulary: int) -> dict[str, Any]:
    """What real texts cost, and shuffled.

    Args:
        prices: Of each text as it is, and with its letters shuffled; at least one.
        vocabulary: How many ids the base has.

    Returns:
        Bits per byte and nats a token of both, over all bytes and tokens; `gain`, by how much of a
        shuffled token's price a real one is cheaper, the mean over texts with its 95% interval; and
        what an id costs that is drawn blindly.
    """
    real, mixed = [one for one, _ in prices], [other for _, other in prices]
    gains = [(1 - a.per_token / b.per_token, 1.0) for a, b in prices if b.nats > 0]
    return {
        "texts": len(prices),
        "bits_per_byte": _bits_per_byte(real),
        "nats_per_token": _nats_per_token(real),
        "shuffled": {
            "bits_per_byte": _bits_per_byte(mixed),
            "nats_per_token": _nats_per_token(mixed),
        },
        "gain": ratio(gains),
        "gain_interval": interval(gains),
        "blind_nats_per_token": round(math.log(vocabulary), 4),
    }


def _bits_per_byte(prices: Sequence[Price]) -> float:
    nats, size = sum(one.nats for one in prices), sum(one.bytes for one in prices)
    return round(nats / (size * math.log(2)), 4)


def _nats_per_token(prices: Sequence[Price]) -> float:
    return round(sum(one.nats for one in prices) / sum(one.tokens for one in prices), 4)


def doubts(reading: Figures) -> list[str]:
    """Why a base does not seem to understand its data; empty where it does.

    Args:
        reading: The `figures` of `answers` and `prompts`, as far as there are any.
    """
    return [
        doubt
        for what in KINDS
        if what in reading
        for doubt in _doubts(f"the {what} of its data", reading[what], blind=what == "answers")
    ]


def _doubts(what: str, found: Figures, *, blind: bool) -> Iterator[str]:
    """Doubts about one kind of text.

    A base may have learned answers alone: then prompts may cost anything, as long as those that
    are shuffled cost more.
    """
    price, chance = found["nats_per_token"], found["blind_nats_per_token"]
    bounds, other = found["gain_interval"], found["shuffled"]
    if blind and not price < chance:  # nor is NaN
        yield (
            f"the base finds {what} no likelier than ids drawn blindly "
            f"({price:.2f} nats a token against {chance:.2f})"
        )
    elif found["texts"] >= FEWEST_TEXTS and bounds and not bounds[0] > LEAST_GAIN:
        yield (
            f"the base reads {what} hardly better than with the letters of each word shuffled "
            f"({price:.2f} nats a token against {other['nats_per_token']:.2f}, "
            f"{found['bits_per_byte']:.2f} bits a byte against {other['bits_per_byte']:.2f})"
        )


def anchor_doubts(reading: Figures, training: Figures) -> list[str]:
    """Whether the anchor's losses are such that it cannot have understood its data.

    At its first step it is the base, and better than blind chance. At its end it has learned the
    format, and what it learned costs less than shuffled letters cost the base.

    Args:
        training: The facts of the anchor's training, losses in nats a target token.
    """
    answers = reading.get("answers")
    if not answers or "last_loss" not in training:
        return []
    first, last = first_loss(training), training["last_loss"]
    chance, mixed = answers["blind_nats_per_token"], answers["shuffled"]["nats_per_token"]
    found = []
    if not first < chance:
        found.append(
            f"the anchor's training began at {first:.2f} nats a token, and an id drawn blindly "
            f"costs {chance:.2f}"
        )
    if not last < mixed:
        found.append(
            f"the anchor's training ended at {last:.2f} nats a token, and answers with their "
            f"letters shuffled cost the base {mixed:.2f}"
        )
    return found


def first_loss(training: Figures) -> float:
    """Loss of the first step, or, in runs that did not note it, of the first quarter of steps."""
    return float(training.get("step0_nll", training["first_loss"]))


ADVICE = (
    "its weights, its tokenizer, or its chat template are not what it was trained with, or it "
    "does not know the language of the data: look at that before you go on"
)
