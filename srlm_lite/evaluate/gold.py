"""Gold scorers: an external check of an answer that the model never sees."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    where = f"evaluate.gold = {name}"
    return Gold(name, load_function(name, ("prompt", "response"), where=where))


def load_function(name: str, parameters: Sequence[str], *, where: str) -> Callable[..., Any]:
    """Import a function of the user's own, `module:function`, that takes these texts.

    Modules in the working directory are found too.

    Args:
        where: The setting that names it.

    Raises:
        UserError: Not of that form, it cannot be imported, or takes something else.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError("expected module:function", where=where)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UserError(
            f"cannot be imported ({error})",
            where=where,
            way_out="Put the module on PYTHONPATH or in the working directory",
        ) from error
    except Exception as error:  # the module is the user's own code
        raise UserError(f"cannot be used ({type(error).__name__}: {error})", where=where) from error
    if not callable(function):
        raise UserError("is not a function", where=where)
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise UserError(
            f"cannot be called with a {' and a '.join(parameters)} ({error})", where=where
        ) from error
    except ValueError:  # what is built in may not tell
        pass
    return function
