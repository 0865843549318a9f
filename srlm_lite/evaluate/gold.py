"""Gold scorers: an external check of an answer that the model never sees."""

from __future__ import annotations

import importlib
import inspect
import math
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
            UserError: The scorer failed, or gave something that is no finite number.
        """
        try:
            given = self.function(prompt, response)
            by_name = given if isinstance(given, Mapping) else {"score": given}
            points = {str(key): float(value) for key, value in by_name.items()}
        except Exception as error:
            raise UserError(
                f"the gold scorer failed on a response ({type(error).__name__}: {error})",
                where=self.name,
            ) from error
        if not all(math.isfinite(value) for value in points.values()):
            raise UserError(f"the gold scorer gave {given}, not a finite number", where=self.name)
        return points

    def total(self, prompt: str, response: str) -> float:
        """The gold score."""
        return sum(self.points(prompt, response).values())


def load_gold(name: str) -> Gold:
    """Import a gold scorer; modules in the working directory are found too.

    Raises:
        UserError: Not of the form `module:function`, it cannot be imported, or is no function of
            a prompt and a response.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError("expected module:function", where=f"evaluate.gold = {name}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UserError(
            f"cannot be imported ({error})",
            where=f"evaluate.gold = {name}",
            way_out="Put the module on PYTHONPATH or in the working directory",
        ) from error
    except Exception as error:  # the module is the user's own code
        raise UserError(
            f"cannot be used ({type(error).__name__}: {error})", where=f"evaluate.gold = {name}"
        ) from error
    if not callable(function):
        raise UserError("is not a function", where=f"evaluate.gold = {name}")
    try:
        inspect.signature(function).bind("prompt", "response")
    except TypeError as error:
        raise UserError(
            f"cannot be called with a prompt and a response ({error})",
            where=f"evaluate.gold = {name}",
        ) from error
    except ValueError:  # what is built in may not tell
        pass
    return Gold(name, function)
