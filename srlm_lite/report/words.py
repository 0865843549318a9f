"""What a method's figures are: by no means every method orders its pairs by a judge's score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from srlm_lite.methods import DEFAULT, METHODS, own_settings
from srlm_lite.methods.base import Words

__all__ = ["Words", "words"]


def words(settings: Mapping[str, Any]) -> Words:
    """The words for a run with these settings, a recipe as `run.json` has it."""
    kind = METHODS.get(str(settings.get("method", DEFAULT)))
    found = kind.words(own_settings(kind, settings)) if kind else Words()
    engine = (settings.get("judge") or {}).get("engine")
    engine = engine or (settings.get("rollout") or {}).get("engine")
    found = replace(found, external=engine == "openai")
    if found.score == "score" and (settings.get("pairing") or {}).get("source") == "gold":
        return replace(found, score="gold score")
    return found
