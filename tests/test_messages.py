"""The table of messages: an entry is a test's, and another message than it says fails."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from messages import TABLE, Told, function_of, read_table

from srlm_lite.errors import UserError

HERE = Path(__file__).parent


def test_every_entry_is_that_of_a_test() -> None:
    table = read_table()
    assert table
    for file, entries in table.items():
        tree = ast.parse((HERE / f"{file}.py").read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {function_of(test) for test in entries} <= there, f"{TABLE}: {file}"
        assert all(entries.values()), f"{TABLE}: {file} has entries without a message"


def test_a_message_is_held_in_full(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("has no row", where=str(tmp_path / "a.jsonl"), way_out="Give it one")

    def told(*expected: str) -> Told:
        return Told(list(expected), tmp_path, tmp_path.parent)

    held = told("TMP/a.jsonl: has no row. Give it one")
    with held.refused():
        refuse()
    held.finish()
    for entry in ("TMP/a.jsonl: has no row", "TMP/a.jsonl: has no row. Give it two", ""):
        with pytest.raises(AssertionError), told(entry).refused():
            refuse()
    with pytest.raises(AssertionError, match="not in the table"), told().refused():
        refuse()
    with pytest.raises(AssertionError, match="no more"):
        told("TMP/a.jsonl: has no row. Give it one").finish()
