"""The campaign itself: that it sees what it looks for, and a little of each part of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "campaign"


def campaign(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """`make campaign ARGS=...`, or a piece of code that imports its parts."""
    place = f"import sys; sys.path[:0] = [{str(CAMPAIGN)!r}, {str(CAMPAIGN.parent)!r}]\n"
    start = ["-c", place + code] if code else [str(CAMPAIGN), *words]
    return subprocess.run([sys.executable, *start], capture_output=True, text=True)


def test_what_counts_as_the_same_results_and_as_a_refusal() -> None:
    code = """
import tempfile, json
from pathlib import Path
from random import Random
from common import Ended, difference, results
from damage import _harm, _judge
from fuzz import garbled, other_values
folder = Path(tempfile.mkdtemp())
(folder / "iter_001").mkdir()
pairs = folder / "iter_001" / "pairs.jsonl"
pairs.write_text("one")
(folder / "metrics.jsonl").write_text('{"stage": "pairs", "seconds": 1.0, "pairs": 2}')
before = results(folder)
(folder / "metrics.jsonl").write_text('{"stage": "pairs", "seconds": 9.0, "pairs": 2}')
(folder / "run.json").write_text("{}")
(folder / ".lock").write_text("")
assert results(folder) == before
(folder / "metrics.jsonl").write_text('{"stage": "pairs", "seconds": 9.0, "pairs": 3}')
pairs.write_text("two")
assert difference(before, results(folder)) == "iter_001/pairs.jsonl, metrics.jsonl"
for harm in ("truncated", "bit flipped", "emptied", "deleted"):
    pairs.write_bytes(b"one two three")
    _harm(pairs, harm, pairs, Random(3))
    assert not pairs.exists() or pairs.read_bytes() != b"one two three", harm
line = "srlm-lite: run.json: is gone\\n"
assert Ended(2, "", line).line and Ended(2, "", "starting\\n" + line).line
for bad in (Ended(1, "", line), Ended(2, "", line + line), Ended(2, "", "Traceback\\n" + line)):
    assert bad.line is None
fine = Ended(0, "M1 0.5", "")
assert _judge(fine, {}, Ended(2, "", line), {})[0] == "named"
assert _judge(fine, {}, fine, {})[0] == "survived"
assert _judge(fine, {}, Ended(0, "M1 0.7", ""), {})[0] == "failed"
assert _judge(fine, {"a": "1"}, fine, {"a": "2"})[0] == "failed"
assert _judge(fine, {}, Ended(1, "", "Traceback"), {})[0] == "failed"
for seed in range(200):
    draw = Random(seed)
    assert garbled(b"name: tiny", draw) != garbled(b"name: tiny", Random(seed + 1000)) or seed
    other_values({"a": [1, {"b": 2}], "c": None}, draw)
print("done")
"""
    done = campaign(code=code)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("kills", "--what", "self-rewarding", "--n", "2"),
        ("damage", "--n", "12"),
        ("fuzz", "--n", "40"),
        ("odds", "--n", "4"),
        ("servers", "--what", "all", "--n", "1"),
        ("disk", "--n", "2"),
    ],
    ids=lambda words: words[0],
)
def test_a_little_of_a_part(words: tuple[str, ...], tmp_path: Path) -> None:
    done = campaign("--only", *words, "--seed", "5", "--out", str(tmp_path / "tries.jsonl"))
    assert done.returncode == 0, done.stderr
    if "no file system can be mounted" not in done.stdout:
        rows = [json.loads(line) for line in (tmp_path / "tries.jsonl").read_text().splitlines()]
        assert rows and {row["outcome"] for row in rows} <= {"survived", "named", "mended"}
