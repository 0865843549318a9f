"""What may be shown of a text: nothing secret, and nothing that a terminal obeys.

Texts of models, servers and data go to terminals; messages go to terminals, logs and files. Both
pass through here, so that it is one place that has to be right.
"""

from __future__ import annotations

import json
import logging
import os
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

HIDDEN = "***"
"""What stands where a secret stood."""

SHORTEST_SECRET = 8
"""Characters. A shorter value of the environment would be found in words that are no secret."""

_NAME = r"(?:api[-_]?key|key|token|secret|password|passwd|credentials?|signature|sig)"
_SECRET_VARIABLE = re.compile(rf"(?:^|_){_NAME}$", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^\s/?#@'\"]+@")
_PARAMETER = re.compile(rf"(?P<name>[?&;](?:\w*[-_])?{_NAME}=)[^&;\s'\"#)]+", re.IGNORECASE)
_HEADER = re.compile(r"(?P<scheme>\b(?:Bearer|Basic) )(?=\S*\d)[\w.~+/=-]{8,}")
_OPTION = re.compile(r"(?P<option>--api-key[ =])(?:'[^']*'|\S+)")
_WELL_KNOWN = re.compile(r"\b(?:hf_[A-Za-z]{20,}|(?:sk|pk|gsk|xai)-[\w-]{16,})")
"""Tokens of the Hub and keys of servers that say themselves what they are."""

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line feed, those that turn the direction of writing, and
halves of characters, which no terminal can be given."""

_hidden: set[str] = set()


def hide(secret: str) -> None:
    """Never show this text from here on: a key that does not stand in a variable of such a name."""
    if len(secret) >= SHORTEST_SECRET:
        _hidden.add(secret)


def without_secrets(text: str) -> str:
    """A text without the keys of the environment, and what in it looks like one.

    Values of variables named as keys, tokens and passwords are; users and passwords of URLs; their
    parameters of such names; what follows Bearer or Basic; and tokens of well-known forms.
    """
    held = {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_SECRET and _SECRET_VARIABLE.search(name)
    }
    for secret in sorted(held | _hidden, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER_OF_URL.sub(f"{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<name>{HIDDEN}", text)
    text = _HEADER.sub(rf"\g<scheme>{HIDDEN}", text)
    text = _OPTION.sub(rf"\g<option>{HIDDEN}", text)
    return _WELL_KNOWN.sub(HIDDEN, text)


def without_secrets_in(value: Any) -> Any:
    """The same of every text in a value as JSON has them, names of objects' members included."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {without_secrets_in(key): without_secrets_in(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets_in(each) for each in value]
    return value


def secret_in_url(url: str) -> str | None:
    """What of a URL is a secret, in words; None where nothing is."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        return "a user or password"
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if re.search(rf"(?:^|[-_]){_NAME}$", name, re.IGNORECASE):
            return f"the parameter {name}"
    return None


def looks_secret(text: str) -> bool:
    """Whether a text has the form of a well-known kind of key."""
    return _WELL_KNOWN.search(text) is not None


def for_terminal(text: str) -> str:
    r"""A text as a terminal may be given it: control characters are spelled, as `\x1b` is.

    So a model's words can move no cursor, set no title and write no link; neither can they turn
    the direction in which the words after them are written.
    """
    return _OBEYED.sub(_spelled, text.replace("\r\n", "\n"))


def json_for_terminal(value: Any, *, indent: int | None = None) -> str:
    """JSON, with such characters escaped; the value that it stands for is the same."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _spelled(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


class Discreet(logging.Formatter):
    """Formats a record of a log, its traceback included, without secrets and harmless to see."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(without_secrets(super().format(record)))
