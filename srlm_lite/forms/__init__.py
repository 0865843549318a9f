"""The forms of judging: what turns candidates into judgements, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srlm_lite.declared import NoSettings
from srlm_lite.forms.base import Form
from srlm_lite.forms.grade import GradeForm
from srlm_lite.settings import FormName, Shared

FORMS: Mapping[FormName, type[Form[Any]]] = {
    "grade": GradeForm,
}
"""Every form that a recipe may name, a row each; their sections stand in this order in a recipe."""


def form_of(recipe: Shared) -> Form[Any]:
    """The recipe's form, bound to its settings."""
    kind = FORMS[recipe.judge.form]
    own = NoSettings() if kind.section is None else getattr(recipe, kind.section)
    return kind(recipe, own)


def sections_of_other_forms(form: str) -> set[str]:
    """The sections of a recipe that belong to other forms than this one."""
    return {kind.section for name, kind in FORMS.items() if kind.section and name != form}


def forms_table() -> str:
    """The forms with what they ask and their sources, as a table in Markdown."""
    rows = ["| `judge.form` | the judge is asked for | source |", "|---|---|---|"]
    for name, kind in FORMS.items():
        rows.append(f"| `{name}` | {kind.asks} | {kind.cited() or 'its own'} |")
    return "\n".join(rows)
