"""The forms of judging: what turns candidates into judgements, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srlm_lite.declared import NoSettings
from srlm_lite.forms.base import Form
from srlm_lite.forms.checklist import ChecklistForm
from srlm_lite.forms.grade import GradeForm
from srlm_lite.forms.pairwise import PairwiseForm
from srlm_lite.forms.steps import StepsForm
from srlm_lite.settings import FormName, Shared

FORMS: Mapping[FormName, type[Form[Any]]] = {
    "grade": GradeForm,
    "pairwise": PairwiseForm,
    "checklist": ChecklistForm,
    "steps": StepsForm,
}
"""Every form that a recipe may name, a row each; their sections stand in this order in a recipe."""

DEFAULT_FORM: FormName = "grade"
"""The form of a recipe that names none."""


def form_of(recipe: Shared) -> Form[Any]:
    """The recipe's form, bound to its settings."""
    kind = FORMS[recipe.judge.form]
    own = NoSettings() if kind.section is None else getattr(recipe, kind.section)
    return kind(recipe, own)


def sections_of_other_forms(form: str) -> set[str]:
    """The sections of a recipe that belong to other forms than this one."""
    return {kind.section for name, kind in FORMS.items() if kind.section and name != form}


def form_in(settings: Mapping[str, Any]) -> type[Form[Any]]:
    """The form of a recipe as `run.json` has it; the default one for a form that is not known."""
    named = (settings.get("judge") or {}).get("form", DEFAULT_FORM)
    return FORMS.get(named, FORMS[DEFAULT_FORM])


def forms_table() -> str:
    """The forms with what they ask and their sources, as a table in Markdown."""
    rows = ["| recipe | `judge.form` | the judge is asked for | source |", "|---|---|---|---|"]
    for name, kind in FORMS.items():
        shown = "all others" if name == DEFAULT_FORM else f"`toy-{name}`"
        rows.append(f"| {shown} | `{name}` | {kind.asks} | {kind.cited() or 'its own'} |")
    return "\n".join(rows)
