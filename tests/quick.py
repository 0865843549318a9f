"""What `make quick` runs: the tests that compute with no model, or with one for a moment.

Whole files, so that nothing else is imported. Tests of theirs that take longer are marked `model`;
one that takes more than its moment and is not fails, whoever runs it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

MOMENT = 60.0
"""Seconds of one core, on an old one: many times what any of these tests takes on a new one."""

# fmt: off
FILES = frozenset({
    "anchor_targets", "arithmetic", "cli", "compare", "data_prepare", "data_shapes", "data_show",
    "dealing", "doctor", "engines", "english", "evaluation_tables", "explain", "house_style",
    "human_targets", "ifeval", "judge_metrics", "judge_tests", "judging", "kept_ids",
    "layering", "messages", "methods", "mt_bench", "pairing", "planning_shapes", "policy_metrics",
    "preferences", "preflight", "principles", "quoting",
    "reading", "readme", "recipe", "room", "run_dir", "scpo", "seed_data", "self_instruct",
    "settings", "trees", "warnings", "window",
})
# fmt: on
"""The files, without the `test_` before their names."""


def is_quick(path: Path) -> bool:
    """Whether a file's tests belong to it, those apart that are marked `model`."""
    return path.stem.removeprefix("test_") in FILES


def overstays(item: pytest.Item, seconds: float) -> bool:
    """Whether a test that `make quick` runs took more than its moment."""
    marked = item.get_closest_marker("model") is not None
    return is_quick(item.path) and not marked and seconds > MOMENT


def seconds_of_cores() -> float:
    """Those that this process has computed so far, and its children that have ended."""
    now = os.times()
    return time.process_time() + now.children_user + now.children_system
