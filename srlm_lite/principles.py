"""What a model is held to in `rlaif`: principles, and the questions that put them to it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from srlm_lite.errors import UserError
from srlm_lite.quoting import closing_tags, options, quote
from srlm_lite.shipped import PRINCIPLES, shipped_file
from srlm_lite.yaml_text import read_yaml

_PLACES = {
    "critique": {"principle", "prompt", "response"},
    "revision": {"principle", "prompt", "response", "critique"},
    "comparison": {"principle", "prompt", "first", "second"},
    "reasoning": {"principle", "prompt", "first", "second"},
}
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_COMPARES = ("comparison", "reasoning")
"""Questions whose replies end in one of the options."""


@dataclass(frozen=True, slots=True)
class Principles:
    """Principles by name, and four questions, each a template with `{{principle}}` in it.

    `critique` and `revision` ask about one reply, `comparison` and `reasoning` which of two is
    better, the latter with a rationale before the answer. `options` is what the last line of that
    answer is where the first, or the second reply is better.
    """

    critique: str
    revision: str
    comparison: str
    reasoning: str
    options: tuple[str, str]
    principles: Mapping[str, str]

    def ask(self, question: str, principle: str, **texts: str) -> str:
        """A question about a principle, given by its name.

        The texts are quoted and inserted in one pass, so that what one spells inserts nothing.
        """
        template: str = getattr(self, question)
        written = options(*self.options) if question in _COMPARES else ()
        tags = closing_tags(template)
        filled = {name: quote(text, written, tags=tags) for name, text in texts.items()}
        filled["principle"] = self.principles[principle]
        return _PLACE.sub(lambda match: filled[match[1]], template)


def load_principles(name_or_path: str) -> Principles:
    """Principles by shipped name, or from a YAML file.

    Raises:
        UserError: Not found, not YAML, an unknown or missing key, no principle, two options alike,
            or a question whose placeholders are not the ones it needs, once each.
    """
    path = shipped_file(PRINCIPLES, name=name_or_path)
    raw = read_yaml(path)
    try:
        found = TypeAdapter(Principles).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"`{key}`: {first['msg']}", where=str(path)) from error
    unknown = raw.keys() - set(Principles.__slots__)
    if unknown:
        raise UserError(f"unknown keys: {', '.join(sorted(map(str, unknown)))}", where=str(path))
    for question, places in _PLACES.items():
        if sorted(_PLACE.findall(getattr(found, question))) != sorted(places):
            wanted = ", ".join(f"{{{{{place}}}}}" for place in sorted(places))
            raise UserError(f"`{question}` must hold {wanted} once each", where=str(path))
    if not found.principles:
        raise UserError("names no principle", where=str(path))
    if found.options[0] == found.options[1]:
        raise UserError("the two options are the same", where=str(path))
    return found
