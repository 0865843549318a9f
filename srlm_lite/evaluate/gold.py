"""Gold scorers: an external check of an answer that the model never sees."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from srlm_lite.errors import UserError

Points = float | Mapping[str, float]
"""A score, or points for each criterion, whose sum is the score."""


@dataclass(frozen=True, slots=True)
class Gold:
    """A gold scorer by its name, `module:function`."""

    name: str
    function: Callable[[str, str], Points]

    def points(self, prompt: str, response: str) -> dict[str, float]:
        """Points by criterion; a scorer that gives one number has the one criterion `score`.

        Raises:
            UserError: The scorer failed, or gave something that is no number.
        """
        try:
            points = self.function(prompt, response)
            if isinstance(points, Mapping):
                return {str(key): float(value) for key, value in points.items()}
            return {"score": float(points)}
        except Exception as error:
            raise UserError(
                f"the gold scorer failed on a response ({type(error).__name__}: {error})",
                where=self.name,
            ) from error

    def total(self, prompt: str, response: str) -> float:
        """The gold score."""
        return sum(self.points(prompt, response).values())


def load_gold(name: str) -> Gold:
    """Import a gold scorer; modules in the working directory are found too.

    Raises:
        UserError: Not of the form `module:function`, or it cannot be imported.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError("expected module:function", where=f"evaluate.gold = {name}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"cannot be imported ({error})",
            where=f"evaluate.gold = {name}",
            way_out="Put the module on PYTHONPATH or in the working directory",
        ) from error
    return Gold(name, function)
