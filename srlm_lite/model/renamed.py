"""What transformers has given another name, by the name that the installed one knows.

From 5.23 on gradient checkpointing is activation checkpointing, and from 5.24 on a cache is `cache`
and no longer `past_key_values`, in what a model takes and in what it gives. The old names work
until 6.0 and 5.40, with warnings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

OLD_CACHE, NEW_CACHE = "past_key_values", "cache"
OLD_CHECKPOINTING, NEW_CHECKPOINTING = "gradient_checkpointing", "activation_checkpointing"


def with_cache(model: Any, held: Any) -> dict[str, Any]:
    """The keyword argument that gives a model a cache; `held` may be None."""
    return {_cache_name(type(model).forward): held}


@cache
def _cache_name(forward: Callable[..., Any]) -> str:
    """Kept: a model is asked at every step, and signatures are slow."""
    takes = inspect.signature(forward).parameters
    return NEW_CACHE if NEW_CACHE in takes else OLD_CACHE


def cache_of(output: Any) -> Any:
    """The cache in what a model gave, or None."""
    return next((output[name] for name in (NEW_CACHE, OLD_CACHE) if name in output), None)


def checkpointing_name(holder: Any, part: str = "{}") -> str:
    """How a model or training arguments call checkpointing, `part` around it: `is_{}`, `{}_enable`.

    Asked of the class: a model warns where it is asked for the old name.
    """
    new = part.format(NEW_CHECKPOINTING)
    kind = holder if isinstance(holder, type) else type(holder)
    fields = getattr(kind, "__dataclass_fields__", {})
    return new if hasattr(kind, new) or new in fields else part.format(OLD_CHECKPOINTING)
