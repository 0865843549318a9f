"""What a method's figures are: by no means every method orders its pairs by a judge's score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from srlm_lite.engines import ENGINES
from srlm_lite.forms import form_in
from srlm_lite.methods import DEFAULT, METHODS, own_settings
from srlm_lite.methods.base import Words

__all__ = ["Words", "words"]


def words(settings: Mapping[str, Any]) -> Words:
    """The words for a run with these settings, a recipe as `run.json` has it."""
    method = METHODS.get(str(settings.get("method", DEFAULT)))
    found = method.words(own_settings(method, settings)) if method else Words()
    engine = (settings.get("judge") or {}).get("engine")
    engine = engine or (settings.get("rollout") or {}).get("engine")
    external = any(kind.name == engine and kind.remote for kind in ENGINES.values())
    found = replace(found, external=external)
    form = form_in(settings)
    if found.score == "score" and form.score != "score":
        found = replace(found, score=form.score, judgement=form.score)
    if (
        found.score in ("score", form.score)
        and (settings.get("pairing") or {}).get("source") == "gold"
    ):
        return replace(found, score="gold score")
    return found
