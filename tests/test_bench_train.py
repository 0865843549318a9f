"""`srlm-lite bench train`: what it takes, and the least work that it counts."""

from __future__ import annotations

from typing import Any

import pytest

from srlm_lite.bench.floor import Dimensions
from srlm_lite.bench.train import row_work, rows_of, workloads_of
from srlm_lite.errors import UserError
from srlm_lite.training.trees import Forest


def test_workloads_are_named_in_their_own_order() -> None:
    assert workloads_of("sft, short") == ("short", "sft")
    with pytest.raises(UserError, match=r"--workloads: no such workload: long\. There are short, "):
        workloads_of("short,long")


def test_the_least_work_of_a_tree_by_hand() -> None:
    # A prompt of 3 tokens with replies of 2 and 3, the last one of each in no row: 6 tokens.
    row = Forest([((1, 2, 3), (4, 5)), ((1, 2, 3), (6, 7, 8))]).row([0, 1])
    shape = Dimensions(linear=10, head=7, layers=2, query_width=4, cache_width=2, number_bytes=2)
    # Attended to: 1 + 2 + 3 in the prompt, 1 and 1 + 2 in the replies, the prompt by 3 tokens.
    linear, attended, scores = 2 * 10 * 6, 4 * 4 * 2 * (6 + 1 + 3 + 3 * 3), 2 * 7 * 5
    assert row_work(shape, row, learns=False).flops == linear + attended + scores
    work = row_work(shape, row, learns=True)
    assert work.flops == 2 * linear + 3 * attended + 2 * scores
    assert work.bytes == 2 * 2 * (10 + 7)


def test_the_table_leaves_out_what_was_not_measured() -> None:
    found: dict[str, Any] = {
        "ours_s": 10.0,
        "trl_s": None,
        "ratio_vs_trl": None,
        "ours_peak_bytes": 1_500_000_000,
        "trl_peak_bytes": None,
        "tokens_per_s": {"ours": 512.4, "trl": None},
        "floor_share": 0.25,
    }
    (row,) = rows_of({"workloads": {"short": found}})
    assert row == ["short", "10.0", "-", "-", "1.50", "-", "512", "0.25"]
