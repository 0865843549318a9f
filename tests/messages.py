"""What users are told when something is refused: every message in full, in one table.

The table is `messages.yaml`, by test file and test. A test says where a message comes up, and the
table what it says, so that a new wording is one change that can be read as a whole. To write the
entries of tests anew:

    pytest --update-messages tests/test_recipe.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from srlm_lite.errors import UserError
from srlm_lite.shipped import recipes_dir

TABLE = Path(__file__).with_name("messages.yaml")
UPDATE = "--update-messages"

_HEAD = """# What users are told, in full, by test file and test: see messages.py.
# TMP is a test's own folder, RECIPES that of the shipped recipes.
"""

Table = dict[str, dict[str, list[str]]]


def read_table() -> Table:
    found: Table = yaml.safe_load(TABLE.read_text(encoding="utf-8")) or {}
    return found


def write_table(table: Table) -> None:
    ordered = {file: dict(sorted(tests.items())) for file, tests in sorted(table.items()) if tests}
    text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=96)
    TABLE.write_text(_HEAD + text, encoding="utf-8")


def function_of(test: str) -> str:
    """A test's function, whatever it is called with."""
    return test.partition("[")[0]


class Told:
    """The messages of one test, in the order in which they come up."""

    def __init__(self, expected: list[str] | None, folder: Path, base: Path) -> None:
        """
        Args:
            expected: The test's entry; None: it is being written, and anything goes.
            folder: The test's own, which is TMP in an entry.
            base: That of all tests of this run, which holds folders that several of them share.
        """
        self.found: list[str] = []
        self._expected, self._folder, self._base = expected, folder, base

    def __call__(self, message: str | BaseException) -> None:
        """Hold a message to the next one in the table."""
        line = self._without_places(str(message))
        self.found.append(line)
        if self._expected is not None:
            number = len(self.found)
            assert number <= len(self._expected), f"not in the table: {line}\n(pytest {UPDATE})"
            assert line == self._expected[number - 1]

    @contextmanager
    def refused(self) -> Iterator[pytest.ExceptionInfo[UserError]]:
        """Hold the mistake that ends the block to the next message in the table; it is one line."""
        with pytest.raises(UserError) as caught:
            yield caught
        assert "\n" not in str(caught.value)
        self(caught.value)

    def _without_places(self, line: str) -> str:
        line = line.replace(str(self._folder), "TMP").replace(str(recipes_dir()), "RECIPES")
        return re.sub(rf"{re.escape(str(self._base))}/([\w.-]*?)\d+(?=/|\b)", r"TMP/\1", line)

    def finish(self) -> None:
        """Hold the test to all that its entry says it is told."""
        if self._expected is not None:
            assert len(self.found) == len(self._expected), f"no more: {self._expected}"
