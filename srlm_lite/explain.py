"""What can be said of a setting, in words and for editors: all of it from its definition."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from srlm_lite.errors import UserError
from srlm_lite.forms import FORMS
from srlm_lite.methods import METHODS
from srlm_lite.recipe import Recipe, layers_of, load_recipe
from srlm_lite.settings import Before, DecidesNothing, IsPath, Section, known_temperature

NOTHING = "null"
"""How a recipe writes that there is no value."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a recipe, or a section of them."""

    key: str
    """Dotted, such as `dpo.beta`."""
    field: FieldInfo
    read_by: str | None
    """The method, or the form of judging, that alone reads it; None where whichever a recipe names
    may."""
    decides: bool
    """Whether another value makes another run."""
    meaning: str
    """Its docstring in one line."""

    @property
    def section(self) -> type[BaseModel] | None:
        """What a section holds; None for a single setting."""
        return _section(self.field)

    @property
    def takes(self) -> str:
        """What it may be, in words."""
        return _words(self.field.annotation, self.field.metadata)

    @property
    def words(self) -> tuple[Any, ...]:
        """The words that it takes; empty where it takes others too."""
        kind = self.field.annotation
        if kind is bool:
            return ("true", "false")
        kinds = (kind, *get_args(kind))
        return tuple(word for one in kinds if get_origin(one) is Literal for word in get_args(one))

    @property
    def default(self) -> str | None:
        """Its default as a recipe would write it; None where it has to be given."""
        return None if self.field.is_required() else written(self.field.get_default())

    @property
    def before(self) -> str | None:
        """What a run keeps that was begun before there was such a setting; None: always there."""
        marks = [mark for mark in self.field.metadata if isinstance(mark, Before)]
        return written(marks[0].value) if marks else None

    @property
    def refused(self) -> dict[str, tuple[str, ...]]:
        """By method that does not read it: the values refused; without any, all but the default.

        A method's own settings are at their defaults.
        """
        unread = {name: kind.unread(kind.Settings()) for name, kind in METHODS.items()}
        return {
            name: tuple(written(value) for value in keys[self.key])
            for name, keys in unread.items()
            if self.key in keys
        }


def settings_in(
    section: type[BaseModel] = Recipe, *, above: Setting | None = None
) -> list[Setting]:
    """The settings and sections right below a section, in the order of their definition."""
    return [_setting(section, name, above) for name in section.model_fields]


def all_settings() -> Iterator[Setting]:
    """Every section and setting; a section comes before what it holds."""
    waiting = settings_in()
    while waiting:
        first, *waiting = waiting
        yield first
        if first.section is not None:
            waiting = [*settings_in(first.section, above=first), *waiting]


def find_setting(key: str) -> Setting:
    """A setting or section by its dotted key.

    Raises:
        UserError: There is none; names those that are near.
    """
    known = {one.key: one for one in all_settings()}
    if key in known:
        return known[key]
    name = key.rsplit(".", 1)[-1]
    near = [one for one in known if one.rsplit(".", 1)[-1] == name]
    near = near or difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    near = near or [
        one for one in known if difflib.get_close_matches(name, [one.rsplit(".", 1)[-1]])
    ]
    hint = f"Did you mean {_either(near[:5])}?" if near else "`srlm-lite recipes explain` lists all"
    raise UserError("no such setting", where=key, way_out=hint)


def value_in(key: str, recipe: str) -> tuple[Any, Path | None]:
    """What a recipe has at a key, and the file that says so.

    Args:
        recipe: Shipped name or path. A file that it extends is named where that says it.

    Returns:
        The value, and None for the file where it is the default.

    Raises:
        UserError: As `load_recipe`.
    """
    value: Any = load_recipe(recipe).model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    said = [path for path, raw in layers_of(recipe) if _says(raw, key.split("."))]
    return value, said[-1] if said else None


def written(value: Any) -> str:
    """A value as a recipe would write it."""
    if isinstance(value, BaseModel):
        return ""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value and value.strip() == value:
        return value
    return text.replace("e-0", "e-") if isinstance(value, float) else text


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors.

    It knows keys, types, ranges and meanings. What two sections say together it does not know:
    `srlm-lite recipes check` does.
    """
    made = Recipe.model_json_schema()
    for part in (made, *made["$defs"].values()):
        part.pop("required", None)  # what a recipe extends may have it
    needed = [name for name, field in Recipe.model_fields.items() if field.is_required()]
    whole = {
        name: {"required": sorted(keys)}
        for name in Recipe.model_fields
        if (keys := _needed(_section(Recipe.model_fields[name])))
    }
    made["properties"] = {
        "extends": {"type": "string", "description": "The recipe that this one changes."},
        **made["properties"],
    }
    # Where a validator takes more than the type says, or less.
    trackers = made["$defs"]["Tracking"]["properties"]["report_to"]
    names = trackers["items"]["enum"]
    made["$defs"]["Tracking"]["properties"]["report_to"] = {
        "anyOf": [{"enum": ["none", *names]}, {**trackers}],
        "description": trackers["description"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "title": "A recipe of srlm-lite",
        "if": {"not": {"required": ["extends"]}},
        "then": {"required": needed, "properties": whole},
    }


def _needed(section: type[BaseModel] | None) -> list[str]:
    fields = {} if section is None else section.model_fields
    return [name for name, field in fields.items() if field.is_required()]


def _setting(section: type[BaseModel], name: str, above: Setting | None) -> Setting:
    field = section.model_fields[name]
    marked = any(isinstance(mark, DecidesNothing) for mark in field.metadata)
    return Setting(
        key=name if above is None else f"{above.key}.{name}",
        field=field,
        read_by=_reader_of_section(name) if above is None else above.read_by,
        decides=not marked and (above is None or above.decides),
        meaning=_meaning(section, name),
    )


def _reader_of_section(name: str) -> str | None:
    """The method, or the form of judging, whose own section this is."""
    named = [(f"the method {kind.name}", kind.section) for kind in METHODS.values()]
    named += [(f"judge.form={kind.name}", kind.section) for kind in FORMS.values()]
    return next((reader for reader, section in named if section == name), None)


def _meaning(section: type[BaseModel], name: str) -> str:
    """A setting's docstring, or that of the one whose default it changes; or its section's."""
    kinds = [kind for kind in section.__mro__ if issubclass(kind, BaseModel)]
    fields = [kind.model_fields[name] for kind in kinds if name in kind.model_fields]
    texts = [field.description for field in fields if field.description]
    below = _section(fields[0])
    own = below.__doc__ if below is not None else None
    return " ".join((texts[0] if texts else own or "").split())


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _says(raw: Mapping[str, Any], key: Sequence[str]) -> bool:
    first, *rest = key
    if first not in raw:
        return False
    below = raw[first]
    return not rest or (isinstance(below, Mapping) and _says(below, rest))


def _words(kind: Any, marks: Sequence[Any]) -> str:
    """A type with its marks in words."""
    if get_origin(kind) is Annotated:
        inner, *own = get_args(kind)
        more = [
            each for one in own for each in (one.metadata if isinstance(one, FieldInfo) else [one])
        ]
        return _words(inner, [*marks, *more])
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(one, marks) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return _either(get_args(kind))
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        several = "list of" if rest == [Ellipsis] else f"list of {1 + len(rest)}:"
        return f"{several} {_plural(_words(first, ()))}"
    if get_origin(kind) is dict:
        return f"mapping of names to {_words(get_args(kind)[1], ())}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "section"
    if kind is str:
        return _text(marks)
    names = {bool: "`true` or `false`", int: "whole number", float: "number", NoneType: "`null`"}
    return f"{names.get(kind, str(kind))}{_range(marks) if kind in (int, float) else ''}"


def _plural(words: str) -> str:
    for one in ("number", "text"):
        words = re.sub(rf"\b{one}\b", f"{one}s", words, count=1)
    return words


def _text(marks: Sequence[Any]) -> str:
    paths = [mark for mark in marks if isinstance(mark, IsPath)]
    if not paths:
        return "text"
    if not paths[0].by_content:
        return "name or path"
    if paths[0].shipped is not None:
        return "shipped name or path"
    return "path" + "".join(f", or `{word}`" for word in paths[0].words)


def _range(marks: Sequence[Any]) -> str:
    """The bounds of a number in words, with a blank before them."""
    if any(isinstance(mark, AfterValidator) and mark.func is known_temperature for mark in marks):
        above = any(isinstance(mark, Gt) for mark in marks)
        return " from 0.001 to 100" if above else ": 0, or from 0.001 to 100"
    low: Any = next((mark for mark in marks if isinstance(mark, (Gt, Ge))), None)
    high: Any = next((mark for mark in marks if isinstance(mark, (Lt, Le))), None)
    upper = ""
    if high is not None:
        upper = f" to {high.le:g}" if isinstance(high, Le) else f" to below {high.lt:g}"
    if isinstance(low, Gt):
        return f" above {low.gt:g}{',' if upper else ''}{upper}"
    if isinstance(low, Ge):
        return f" from {low.ge:g}{upper}" + ("" if upper else " on")
    return upper


def _either(words: Sequence[Any]) -> str:
    shown = [f"`{word}`" for word in words]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
