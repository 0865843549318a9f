"""Write the toy's data with judge data of a careless judge: python careless.py OUT [--share S].

A share of the reviews of `eft_train.jsonl`, half of them by default, keep their evidence and have a
coin decide each verdict; their score counts those. An anchor that learns from them is a judge with
room to improve: .71 of the held-out pairs in order, where the toy's own has .93. What holds gold
(`eft_eval.jsonl`) stays right. The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from pathlib import Path

from srlm_lite.tasks.rows import write_rows

DATA = Path(__file__).parent / "data"
VERDICT = re.compile(r"(yes|no)$")


def careless(review: str, rng: random.Random) -> str:
    """A review with verdicts by a coin. Its last line is the score, the number of yeses."""
    *verdicts, _ = review.split("\n")
    drawn = [VERDICT.sub(lambda _: rng.choice(["yes", "no"]), line) for line in verdicts]
    score = sum(line.endswith("yes") for line in drawn)
    return "\n".join([*drawn, f"Score: {score}"])


def write(out: Path, *, share: float, seed: int = 0) -> None:
    """Write all files of the data into a folder, which is made."""
    shutil.copytree(DATA, out, dirs_exist_ok=True)
    rng = random.Random(seed)
    file = out / "eft_train.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if rng.random() < share:
            row["target"] = careless(row["target"], rng)
    write_rows(file, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write(asked.out, share=asked.share, seed=asked.seed)


if __name__ == "__main__":
    main()
