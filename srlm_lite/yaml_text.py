"""YAML as people write it: mistakes are told of, with their place."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from srlm_lite.errors import UserError, shorten


class _Loader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key that stands twice is an error.

    Of a section pasted in twice the first would be lost without a word.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key `{key.value}` stands here twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """What a text in YAML says.

    Raises:
        yaml.YAMLError: It is not YAML, a key stands twice in it, or a value is out of its range.
    """
    try:
        return deepcopy(_parsed(text))
    # A day that no month has, a number of thousands of digits, a tag for what it is not.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


@lru_cache(maxsize=128)
def _parsed(text: str) -> Any:
    """Kept: recipes that others extend are read again and again."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        UserError: It is not YAML, not UTF-8, or a key stands twice in it.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = shorten(_problem(error))
        raise UserError(f"not readable as YAML ({said})", where=str(path)) from error


def _problem(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return str(error)
    if problem == "but found another document":
        problem = "a second document begins, and it is to be one"
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"
