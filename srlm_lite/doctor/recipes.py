"""What each recipe lacks here."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from srlm_lite.config import Base, Recipe, load_recipe, shipped_recipes
from srlm_lite.doctor.finding import Finding, State
from srlm_lite.errors import UserError


def recipe_findings(names: list[str] | None = None) -> list[Finding]:
    """One finding for each recipe; by default the shipped ones."""
    return [recipe_finding(load_recipe(name)) for name in names or shipped_recipes()]


def recipe_finding(recipe: Recipe) -> Finding:
    """Whether a recipe could start, and if not, what stands in its way."""
    lacks: list[tuple[State, str, str | None]] = []
    here, why, way_out = _base(recipe.base)
    if why is not None:
        lacks.append(("bad", why, way_out))
    elif not here:
        lacks.append(("warning", "its base will be downloaded", None))
    engines = {recipe.rollout.engine, recipe.judge.engine}
    if "vllm" in engines and importlib.util.find_spec("vllm") is None:
        lacks.append(("bad", "vLLM is not installed", "pip install 'srlm-lite[vllm]'"))
    if not Path(recipe.data.dir).is_dir():
        way_out = "Make it: srlm-lite data prepare"
        lacks.append(("warning", f"no directory {recipe.data.dir} here", way_out))
    if not lacks:
        return Finding("ok", recipe.name, "ready")
    worst: State = "bad" if any(state == "bad" for state, _, _ in lacks) else "warning"
    ways = [way for _, _, way in lacks if way]
    return Finding(worst, recipe.name, "; ".join(w for _, w, _ in lacks), ". ".join(ways) or None)


@cache
def _base(section: Base) -> tuple[bool, str | None, str | None]:
    """Whether a base is here; what stands in its way, and the way out."""
    from srlm_lite.model.base import base_is_here

    try:
        return base_is_here(section), None, None
    except UserError as error:
        return False, error.what, error.way_out
