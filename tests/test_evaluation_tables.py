"""What `evaluate` shows: tables that leave no figure out, and fit a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from srlm_lite.cli.evaluation_tables import evaluation_text

KEPT = Path(__file__).parent / "data" / "run-513090d" / "iter_001" / "eval.json"

IFEVAL = {
    "prompt_strict": 0.5,
    "prompt_loose": 0.5,
    "instruction_strict": 0.75,
    "instruction_loose": 1.0,
    "prompts": 2,
    "instructions": 4,
    "skipped": {"language:response_language": 1},
    "prompts_skipped": 1,
    "intervals": {"prompt_strict": [0.0, 1.0]},
    "max_new_tokens": 512,
}
TASKS = {
    "tasks": {
        "arc_easy": {"metric": "acc_norm", "value": 0.4321, "se": 0.0123, "items": 2376},
        "mine": {"metric": "acc", "value": 0.5, "se": None, "items": None},
    },
    "versions": {"arc_easy": 1.0},
    "harness": "0.4.9",
}


@pytest.fixture
def kept() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return {**result, "ifeval": IFEVAL, "capabilities": TASKS}


def row_of(text: str, label: str) -> list[str]:
    (line,) = re.findall(rf"^ {re.escape(label)}  .*$", text, re.MULTILINE)
    return re.split(r"\s{2,}", line.strip())


def test_figures_have_their_interval_and_error_beside_them(kept: dict[str, Any]) -> None:
    text = evaluation_text(kept)
    assert row_of(text, "pairwise accuracy") == ["pairwise accuracy", "0.97", "0.92 to 1.00"]
    assert row_of(text, "5-best") == ["5-best", "-"]
    gold = ["gold", "2.62 ±0.38", "2.00 to 3.25", "2.88 ±0.12", "2.62 to 3.00"]
    assert row_of(text, "gold") == gold
    assert row_of(text, "  topic") == ["topic", "0.50 ±0.19", "0.88 ±0.12"]
    assert row_of(text, "graded by the anchor")[1:] == ["2.50 ±0.34", "1.88 to 3.12"]
    assert row_of(text, "answers") == ["answers", "8", "8"]
    assert row_of(text, "prompts, strictly") == ["prompts, strictly", "0.50", "0.00 to 1.00"]
    assert row_of(text, "arc_easy") == ["arc_easy", "acc_norm", "0.43 ±0.01", "2376"]
    assert row_of(text, "mine") == ["mine", "acc", "0.50", "-"]
    assert "votes by score: 0: 4, 1: 13, 2: 9, 3: 4, 4: 2, unreadable: 0" in text
    assert "left out, not to be checked here: language:response_language: 1 (1 prompts)" in text
    assert "_mean" not in text and "_rate" not in text


def test_a_figure_that_has_no_words_yet_is_shown_by_its_key(kept: dict[str, Any]) -> None:
    kept["judge"] |= {"new_share": 0.125, "by_form": {"rubric": 0.5, "checklist": 0.25}}
    kept["policy"] |= {"new_count": 3}
    text = evaluation_text(kept)
    assert row_of(text, "new share") == ["new share", "0.12"]
    assert row_of(text, "by form, checklist") == ["by form, checklist", "0.25"]
    assert row_of(text, "new count") == ["new count", "3"]
    assert row_of(text, "max new tokens") == ["max new tokens", "512"]


@pytest.mark.parametrize("width", [60, 80])
def test_all_of_it_fits_a_terminal(kept: dict[str, Any], width: int) -> None:
    text = evaluation_text(kept, width=width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert text.count("as policy") == (1 if width == 80 else 2)


def test_what_was_not_measured_is_not_there(kept: dict[str, Any]) -> None:
    text = evaluation_text({"judge": kept["judge"] | {"calibration": None}, "policy": {}})
    for word in ("as policy", "IFEval", "people's quality", "harness"):
        assert word not in text
