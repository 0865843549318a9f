"""The methods: what turns answers and grades into weighted pairs, one file each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from srlm_lite.errors import UserError
from srlm_lite.forms import FORMS
from srlm_lite.methods.base import Method, NoSettings
from srlm_lite.methods.cream import Cream
from srlm_lite.methods.dno import Dno
from srlm_lite.methods.dpo import OfflineDpo
from srlm_lite.methods.meta_rewarding import MetaRewarding
from srlm_lite.methods.rlaif import Rlaif
from srlm_lite.methods.rlhf import Rlhf
from srlm_lite.methods.scir import Scir
from srlm_lite.methods.scpo import Scpo
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.methods.spin import Spin
from srlm_lite.methods.temporal import Temporal
from srlm_lite.settings import Section, Shared

OURS: tuple[type[Method[Any]], ...] = (
    SelfRewarding,
    OfflineDpo,
    Spin,
    Cream,
    Temporal,
    Dno,
    Scir,
    Scpo,
    MetaRewarding,
    Rlaif,
    Rlhf,
)
"""The methods of this package, a row each; their sections stand in this order in a recipe."""

ENTRY_POINTS = "srlm_lite.methods"
"""By this group of entry points another package adds methods of its own."""


def of_other_packages() -> Iterator[type[Method[Any]]]:
    """The methods that installed packages add.

    Raises:
        UserError: One cannot be imported, or is not a method.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        where = f"{ENTRY_POINTS}: {entry.name} = {entry.value}"
        way_out = "Repair or remove the package that adds it"
        try:
            kind = entry.load()
        except Exception as error:  # whatever somebody else's module raises
            told = f"this method cannot be imported ({type(error).__name__}: {error})"
            raise UserError(told, where=where, way_out=way_out) from error
        if not (isinstance(kind, type) and issubclass(kind, Method)):
            raise UserError("is not a method", where=where, way_out=way_out)
        yield kind


def by_name(kinds: Iterable[type[Method[Any]]]) -> dict[str, type[Method[Any]]]:
    """Methods by name.

    Raises:
        UserError: Two have the same name, or the same section.
    """
    found: dict[str, type[Method[Any]]] = {}
    sections: dict[str, str] = dict.fromkeys(Shared.model_fields, "all methods")
    sections |= {form.section: f"judge.form={form.name}" for form in FORMS.values() if form.section}
    for kind in kinds:
        told = f"{kind.__module__}.{kind.__name__}"
        if kind.name in found:
            raise UserError(f"two methods are called {kind.name}", where=told)
        if kind.section in sections:
            taken = f"the section {kind.section} of a recipe is that of {sections[kind.section]}"
            raise UserError(taken, where=told, way_out="Declare another `section`, or None")
        found[kind.name] = kind
        if kind.section:
            sections[kind.section] = kind.name
    return found


METHODS = by_name([*OURS, *of_other_packages()])
"""Every method that a recipe may name."""

DEFAULT = SelfRewarding.name
"""The method of a recipe that names none."""


def sections_of_others(method: str) -> set[str]:
    """The sections of a recipe that belong to other methods than this one."""
    return {kind.section for name, kind in METHODS.items() if kind.section and name != method}


def own_settings(kind: type[Method[Any]], settings: Mapping[str, Any]) -> Section:
    """A method's own settings in a recipe as `run.json` has it.

    What cannot be read there, of a run of another version, is left at the defaults.
    """
    given = settings.get(kind.section or "") or {}
    try:
        return kind.Settings.model_validate(given)
    except ValidationError:
        return kind.Settings()


def table() -> str:
    """The methods with their recipes and sources, as a table in Markdown."""
    rows = ["| recipe | method | learns from | source |", "|---|---|---|---|"]
    for kind in METHODS.values():
        name = f"`{kind.name}`, {kind.remark}" if kind.remark else f"`{kind.name}`"
        source = kind.cited() or "its own"
        rows.append(f"| `{kind.shipped_recipe()}` | {name} | {kind.learns_from} | {source} |")
    return "\n".join(rows)


def method_of(recipe: Shared) -> Method[Any]:
    """The recipe's method, bound to its settings."""
    kind = METHODS[recipe.method]
    own = NoSettings() if kind.section is None else getattr(recipe, kind.section)
    return kind(recipe, own)
