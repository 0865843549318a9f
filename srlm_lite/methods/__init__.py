"""The methods: what turns answers and grades into weighted pairs, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from srlm_lite.methods.base import Method, NoSettings
from srlm_lite.methods.cream import Cream
from srlm_lite.methods.dno import Dno
from srlm_lite.methods.dpo import OfflineDpo
from srlm_lite.methods.meta_rewarding import MetaRewarding
from srlm_lite.methods.rlaif import Rlaif
from srlm_lite.methods.rlhf import Rlhf
from srlm_lite.methods.scir import Scir
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.methods.spin import Spin
from srlm_lite.methods.temporal import Temporal
from srlm_lite.settings import Section, Shared

METHODS: dict[str, type[Method[Any]]] = {
    method.name: method
    for method in (
        SelfRewarding,
        OfflineDpo,
        Spin,
        Cream,
        Temporal,
        Dno,
        Scir,
        MetaRewarding,
        Rlaif,
        Rlhf,
    )
}
"""Every method that a recipe may name, a row each; their sections stand in this order."""


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
    rows = ["| method | recipe | learns from | source |", "|---|---|---|---|"]
    for kind in METHODS.values():
        remark = f"; {kind.remark}" if kind.remark else ""
        recipe = next(iter(kind.bench().values())).recipe
        rows.append(f"| `{kind.name}` | `{recipe}` | {kind.learns_from}{remark} | {kind.cited()} |")
    return "\n".join(rows)


def method_of(recipe: Shared) -> Method[Any]:
    """The recipe's method, bound to its settings."""
    kind = METHODS[recipe.method]
    own = NoSettings() if kind.section is None else getattr(recipe, kind.section)
    return kind(recipe, own)
