"""What makes a text usable, and when two texts say the same."""

from __future__ import annotations

import re
import unicodedata

GARBLED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\uf8ff\ufffd"
    "\U000f0000-\U000ffffd\U00100000-\U0010fffd]"
)
"""Unicode's categories Cc, Cs and Co, all but tab and line breaks, and U+FFFD."""

CHAT_MARKERS = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|\[/?INST\]|<</?SYS>>|</s>|<s>|<(?:start|end)_of_turn>"
)
"""Left behind by sampling, or put there to pass for a turn of the chat."""

BRACKETED_ONLY = re.compile(r"(?:[(\[{][^()\[\]{}]*[)\]}][\s,;.]*)+")
LEAST_LETTERS = 1 / 3
LONGEST_PHRASE = 8
FEWEST_COPIES = 4
SHORTEST_RUN = 10


THOUGHT_OPENINGS = (
    "<think>",
    "<thinking>",
    "<thought>",
    "<reasoning>",
    "<seed:think>",
    "◁think▷",
    "[THINK]",
    "<|begin_of_thought|>",
    "<|START_THINKING|>",
    "<|channel>thought",
)
"""How makers of models begin a thought; `model.template` knows them with what is around them."""


def begins_with_thought(text: str) -> bool:
    """Whether a reply begins with a thought, in the marks of any maker."""
    return text.lstrip().startswith(THOUGHT_OPENINGS)


def normalised(text: str) -> str:
    """The text without what does not change its meaning: case, width, spacing, final stops."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = " ".join(folded.split())
    return spaced.rstrip(" .?!") or spaced


def words_of(text: str) -> str:
    """Its words alone, case folded: without punctuation and spacing, what tells near copies.

    A text without letters or figures is its own.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or text


def is_garbled(text: str) -> bool:
    """Whether it holds characters that no one writes.

    These are control characters other than tab and line breaks, U+FFFD (the trace of a broken
    encoding), lone surrogates (which UTF-8 cannot hold) and private characters.
    """
    return GARBLED.search(text) is not None


def is_repetitive(text: str) -> bool:
    """Whether a phrase of up to 8 words comes 4 times or more in a row, over 10 words in all.

    This is how sampling runs away; a chorus or a "no, no, no" stays below it.
    """
    words = text.casefold().split()
    for size in range(1, LONGEST_PHRASE + 1):
        run = size
        for earlier, later in zip(words, words[size:], strict=False):
            run = run + 1 if earlier == later else size
            if run >= max(FEWEST_COPIES * size, SHORTEST_RUN):
                return True
    return False


def is_language(text: str) -> bool:
    """Whether a third of it is letters, and not all of it stands in brackets.

    Sampled prompt lists hold tuples such as `(ginger: food) (has_effect) (heartburn: disorder)`.
    """
    visible = [character for character in text if not character.isspace()]
    letters = sum(unicodedata.category(character)[0] in "LM" for character in visible)
    return letters >= LEAST_LETTERS * len(visible) and not BRACKETED_ONLY.fullmatch(text.strip())


def prompt_problem(text: str, *, min_chars: int, max_chars: int) -> str | None:
    """Why a text does not serve as a prompt, a key of `ledger.REASONS`; None when it does."""
    if not text.strip():
        return "empty"
    if is_garbled(text):
        return "garbled"
    if CHAT_MARKERS.search(text):
        return "chat_markers"
    if len(text) < min_chars:
        return "too_short"
    if len(text) > max_chars:
        return "too_long"
    if is_repetitive(text):
        return "repetition"
    if not is_language(text):
        return "not_language"
    return None
