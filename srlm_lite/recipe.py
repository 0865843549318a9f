"""Recipes: what a run is to do.

A recipe is a YAML file with the sections of `Recipe`. `load_recipe` reads it, applies overrides
such as `dpo.beta=0.2`, resolves its paths, and refuses keys it does not know.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from srlm_lite.errors import UserError, shorten
from srlm_lite.forms import FORMS, form_of, sections_of_other_forms
from srlm_lite.methods import DEFAULT, METHODS, method_of, sections_of_others
from srlm_lite.settings import (
    SERVERS,
    Before,
    DecidesNothing,
    IsPath,
    Section,
    Shared,
    marked,
    sections_of,
)
from srlm_lite.shipped import place_of_base, recipes_dir
from srlm_lite.yaml_text import parse_yaml, read_yaml

if TYPE_CHECKING:
    _OfMethods = Shared
else:
    _OfMethods = create_model(
        "_OfMethods",
        __base__=Shared,
        method=(
            Literal[tuple(METHODS)],
            Field(DEFAULT, description=Shared.model_fields["method"].description),
        ),
        **{
            kind.section: (kind.Settings, kind.Settings())
            for kind in (*METHODS.values(), *FORMS.values())
            if kind.section
        },
    )


class Recipe(_OfMethods):
    """All a run needs to know: what methods share, and a section for each method, and each form of
    judging, that has its own."""

    @field_validator("method", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        if not isinstance(value, str) or value in METHODS:
            return value
        close = difflib.get_close_matches(value, METHODS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(METHODS)}"
        raise PydanticCustomError("unknown_method", "no such method; {hint}", {"hint": hint})

    @model_validator(mode="after")
    def _server_is_named(self) -> Recipe:
        if self.asks_a_server and not (self.openai.url and self.openai.model):
            raise ValueError("the engine openai needs openai.url and openai.model")
        return self

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Recipe:
        method_of(self).needs()
        form_of(self).needs()
        return self

    @model_validator(mode="after")
    def _gold_is_there(self) -> Recipe:
        if self.pairing.source == "gold" and self.evaluate.gold is None:
            raise ValueError(
                "pairing.source=gold needs evaluate.gold, the scorer whose order it is"
            )
        return self

    @model_validator(mode="after")
    def _older_pairs_are_there(self) -> Recipe:
        pairing, method = self.pairing, method_of(self)
        if pairing.accumulate is True and pairing.replay:
            raise ValueError(
                "pairing.accumulate takes all older pairs, pairing.replay shares of them: "
                "leave one out"
            )
        for name in ("older_steps", "older_order"):
            value = getattr(pairing, name)
            if value != type(pairing).model_fields[name].default and not method.has_older_pairs:
                raise ValueError(
                    f"pairing.{name}={value} is about older pairs, and none are learned: set "
                    "pairing.accumulate=true, or dpo.init=anchor"
                )
        judged = method.judge_makes_pairs and pairing.source == "judge"
        if pairing.older_order != "keep" and not judged:
            raise ValueError(
                f"pairing.older_order={pairing.older_order} asks the judge anew, which has not "
                "made these pairs"
            )
        return self

    @model_validator(mode="after")
    def _pairs_have_what_is_asked(self) -> Recipe:
        if self.pairing.weight == "gap" and self.pairing.source not in ("judge", "gold"):
            raise ValueError(
                f"pairing.weight=gap needs scores that order the pairs, and those of "
                f"pairing.source={self.pairing.source} do not"
            )
        if self.pairing.older_order == "smooth" and self.dpo.loss == "sft":
            raise ValueError(
                "pairing.older_order=smooth turns a share of a pair's loss round, and dpo.loss=sft "
                "learns the chosen reply alone: take pairing.older_order=drop"
            )
        return self

    @model_validator(mode="after")
    def _settings_are_read(self) -> Recipe:
        unread = METHODS[self.method].unread(self.own)
        for name, values in unread.items():
            section, key = name.split(".")
            value = getattr(getattr(self, section), key)
            plain = type(getattr(self, section)).model_fields[key].default
            if value in values if values else value != plain:
                shown = str(value).lower() if isinstance(value, bool) else value
                told = f"{name}={shown}" if values else name
                raise ValueError(f"method {self.method} knows no {told}")
        return self

    @property
    def own(self) -> Section:
        """The settings of the recipe's method."""
        found: Section = method_of(self).own
        return found

    @property
    def asks_a_server(self) -> bool:
        """Whether the run needs the server of the section `openai`."""
        asks = method_of(self).asks_a_server
        return asks or not SERVERS.isdisjoint({self.rollout.engine, self.judge.engine})

    @property
    def judge_makes_pairs(self) -> bool:
        """Whether differences of the rubric's scores decide what is a pair."""
        return method_of(self).judge_makes_pairs

    @property
    def judge_has_deltas(self) -> bool:
        """Whether the judge's role has deltas of its own."""
        return method_of(self).judge_has_deltas

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: every setting that decides what is computed.

        Leaves out the sections of other methods and forms, and what `DecidesNothing`. A path counts
        by what the file holds, not by where it lies; that of a shipped base by its place among the
        recipes, so that a run goes on from another installation (`RunDir.hold_to_base` holds it to
        the weights). A setting that came later counts where it is not what it was `Before`.
        """
        others = sections_of_others(self.method) | sections_of_other_forms(self.judge.form)
        settings = as_noted_now(self.model_dump(mode="json", exclude=others))
        settings["pairing"]["accumulate"] = method_of(self).accumulates  # what `auto` comes to
        for name, before in marked(Recipe, Before):  # as named, before files stand for their names
            part, key = _place(settings, name)
            if key in part and part[key] == before.value:
                del part[key]
        for part, key, path in paths_in(settings):
            if path.by_content:
                part[key] = _content_digest(part[key], path)
        return settings

    def digest(self) -> str:
        """SHA-256 of the identity."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


WORDS = {
    "missing": "has to be given",
    "model_type": "is a section: a mapping of settings, or section.key=value",
    "tuple_type": "is a list: [one, two]",
}
"""What some of pydantic's errors say, in the words of recipes."""


def as_noted_now(identity: dict[str, Any]) -> dict[str, Any]:
    """The same identity, which an earlier version may have noted, without what decides nothing."""
    noted: dict[str, Any] = copy.deepcopy(identity)
    noted["base"]["name"] = place_of_base(noted["base"]["name"])
    for name, _ in marked(Recipe, DecidesNothing):
        part, key = _place(noted, name)
        part.pop(key, None)
    return noted


def paths_in(settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, IsPath]]:
    """The settings of a recipe, or of a part of it, that may be paths.

    Args:
        settings: By section, as in a file; what is no section there is passed over.

    Yields:
        The section that holds it, its key there, and what kind of path it may be.
    """
    for name, mark in marked(Recipe, IsPath):
        part, key = _place(settings, name)
        if isinstance(part.get(key), str):
            yield part, key, mark


def _place(settings: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The section that holds a setting, and its key there; an empty one where there is none."""
    *above, key = name.split(".")
    part: Any = settings
    for section in above:
        part = part.get(section)
        if not isinstance(part, dict):
            return {}, key
    return part, key


def recipe_of_run(noted: Mapping[str, Any], *, where: str) -> Recipe:
    """The recipe that a run has noted; settings that it did not know yet are what they were before.

    Raises:
        UserError: As `recipe_from`.
    """
    recipe = recipe_from(noted, where=where)
    return as_begun(recipe, noted, where=where)


def as_begun(recipe: Recipe, noted: Mapping[str, Any], *, where: str) -> Recipe:
    """A recipe for going on with a run that has noted `noted`.

    What the run was begun without, and the recipe does not name itself, stays as it was before.

    Raises:
        UserError: As `recipe_from`.
    """
    given = recipe.model_dump(mode="json", exclude_unset=True)
    for name, before in marked(Recipe, Before):
        known, key = _place(dict(noted), name)
        if key in known:
            continue
        part = given
        for section in name.split(".")[:-1]:
            part = part.setdefault(section, {})
        part.setdefault(key, before.value)
    return recipe_from(given, where=where)


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe given by shipped name or by path.

    Raises:
        UserError: There is no such recipe.
    """
    shipped = recipes_dir() / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError("is a directory, not a recipe", where=name_or_path, way_out="Name a file")
    close = difflib.get_close_matches(name_or_path, shipped_recipes(), n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Shipped: {', '.join(shipped_recipes())}"
    raise UserError("no such recipe", where=name_or_path, way_out=hint)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides and resolve its paths.

    A file that says `extends: NAME|PATH` is that recipe with what it says itself on top. Paths in
    a file are looked for beside it, in the working directory, and among the shipped recipes, so
    that a copy of one of those finds what it found; paths in overrides in the working directory.

    Raises:
        UserError: Not found, not YAML, an unknown key, or a value out of range.
    """
    path = find_recipe(name_or_path)
    said = reduce(_merged, (raw for _, raw in _layers(path)))
    return overridden(said, overrides, where=str(path))


def overridden(raw: Mapping[str, Any], overrides: Sequence[str], *, where: str) -> Recipe:
    """A recipe as a mapping with `section.key=value` overrides on top.

    Raises:
        UserError: As `load_recipe`.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        _apply(given, override)
    _resolve_paths(given, Path.cwd())
    return recipe_from(_merged(raw, given), where=f"{where} with --set" if given else where)


def begun_from(name: str, *, called: str) -> str:
    """The text of a recipe that extends a shipped one, all of whose settings stand in it to change.

    Raises:
        UserError: There is no shipped recipe of that name.
    """
    path = recipes_dir() / f"{name}.yaml"
    if not path.is_file():
        find_recipe(name)  # tells of one that is near
        raise UserError("no shipped recipe", where=name, way_out="srlm-lite recipes list")
    said = path.read_text(encoding="utf-8").splitlines()
    first = next(at for at, line in enumerate(said) if not line.startswith("#") and line.strip())
    settings = [line for line in said[first:] if not re.match(r"(name|description):", line)]
    body = "\n".join(f"# {line}".rstrip() if line.strip() else "" for line in settings).strip()
    return (
        f"# The recipe {name}, but for what stands here without a `#`. What a setting means:\n"
        "#   srlm-lite recipes explain KEY\n"
        f"extends: {name}\nname: {json.dumps(called, ensure_ascii=False)}\n\n{body}\n"
    )


def layers_of(name_or_path: str) -> list[tuple[Path, dict[str, Any]]]:
    """What each file of a recipe says, with its paths resolved: first what is extended.

    Raises:
        UserError: As `load_recipe`, but keys and values are not looked at.
    """
    return _layers(find_recipe(name_or_path))


def _layers(path: Path, *above: Path) -> list[tuple[Path, dict[str, Any]]]:
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of sections", where=str(path))
    _resolve_paths(raw, path.parent, Path.cwd(), recipes_dir())
    extended = raw.pop("extends", None)
    if extended is None:
        return [(path, raw)]
    if not isinstance(extended, str):
        raise UserError("`extends` names one recipe", where=str(path))
    beside = path.parent / extended
    found = beside if beside.is_file() else find_recipe(extended)
    if any(found.samefile(each) for each in (path, *above)):
        raise UserError("extends itself", where=str(path))
    return [*_layers(found, path, *above), (path, raw)]


def recipe_from(raw: Mapping[str, Any], *, where: str) -> Recipe:
    """Validate a mapping as a recipe.

    Raises:
        UserError: Names the first offending key, and for an unknown one the nearest known.
    """
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        # A misspelt key is unknown under its name and missing under the right one.
        found = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        first = found[0]
        location = _as_written(first["loc"])
        key = ".".join(location)
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"unknown key `{key}`", where=where, way_out=_suggestion(location)
            ) from error
        whole_section = first["type"] in ("missing", "value_error")
        shown = "" if whole_section else f" (is {shorten(repr(first['input']))})"
        message = WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
        at = f"`{key}`{shown}: " if key else ""  # two sections that do not go together
        raise UserError(f"{at}{message}", where=where) from error
    for key, text in _texts(recipe.model_dump()):
        if "\0" in text or text != text.encode("utf-8", "replace").decode("utf-8"):
            raise UserError(
                f"`{key}` (is {text!r}): holds a character that no file can", where=where
            )
    return recipe


def _as_written(location: Sequence[str | int]) -> list[str]:
    """Where a mistake is, by keys and places alone: pydantic adds which of several types it is."""
    section: type[BaseModel] | None = Recipe
    parts: list[str] = []
    for part in location:
        if section is not None or isinstance(part, int):
            parts.append(str(part))
        below = {} if section is None else sections_of(section)
        section = below.get(str(part))
    return parts


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts at and below a setting, with their dotted keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _texts(below, f"{key}.{name}".lstrip("."))
    elif isinstance(value, tuple):
        for one in value:
            yield from _texts(one, key)


def _suggestion(location: list[str]) -> str:
    *above, name = location
    section: type[BaseModel] = Recipe
    for part in above:
        section = sections_of(section)[part]
    close = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{'.'.join([*above, *close])}`?"
    elsewhere = [key for key in _keys(Recipe) if key.split(".")[-1] == name]
    if elsewhere:
        return f"Did you mean {' or '.join(f'`{key}`' for key in elsewhere)}?"
    return f"Known here: {', '.join(section.model_fields)}"


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys at and below a section, dotted."""
    below = sections_of(section)
    return [f"{prefix}{name}" for name in section.model_fields] + [
        key for name, part in below.items() for key in _keys(part, f"{prefix}{name}.")
    ]


def _apply(target: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError("expected KEY=VALUE", where=f"--set {override}")
    *above, last = key.strip().split(".")
    for section in above:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError("a key cannot be both a value and a section", where=f"--set {override}")
    try:
        target[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        where = f"--set {shorten(override)}"
        raise UserError("the value is not valid YAML", where=where) from error


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = _merged(below, value) if both and below is not None else value
    return result


def _resolve_paths(raw: dict[str, Any], *directories: Path) -> None:
    for part, key, mark in paths_in(raw):
        value = part[key]
        if value in mark.words or _shipped(value, mark):
            continue
        path = Path(os.path.expanduser(value))  # Path's own fails where there is no such user
        # Links are not followed: in a Hub cache only the link's name tells a `.gguf`.
        places = [os.path.abspath(directory / path) for directory in directories]
        part[key] = next((place for place in places if os.path.exists(place)), value)


def _shipped(value: str, mark: IsPath) -> Path | None:
    """The shipped file that such a setting names, if it names one."""
    place = mark.shipped.place(value) if mark.shipped else None
    return place if place and place.is_file() else None


def _content_digest(value: str, mark: IsPath) -> str:
    path = _shipped(value, mark) or Path(value)
    if value in mark.words or not path.exists():
        return value
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file() or file.name.startswith("."):
            continue
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"sha256:{digest.hexdigest()}"
