"""What `data prepare` makes of a source, all of it in memory; and what many rows cost.

    python tests/preparing.py COUNT FOLDER

writes so many rows there, prepares them, and prints seconds and memory.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_lite.data.ledger import Ledger
from srlm_lite.data.prepare import Options
from srlm_lite.data.prepare import read as opened
from srlm_lite.records import Instruction, Prompt, RankedReply

Row = dict[str, Any]


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@dataclass
class Seed:
    """The rows of IFT and EFT."""

    ift: list[Instruction]
    eft_train: list[RankedReply]
    eft_eval: list[RankedReply]


@dataclass
class Loaded:
    """All that was prepared, in memory."""

    format: str
    notes: list[str]
    files: dict[str, list[Any]]
    reply_ledger: Ledger
    prompt_ledger: Ledger

    @property
    def seed(self) -> Seed:
        names = ("ift.jsonl", "eft_train.jsonl", "eft_eval.jsonl")
        return Seed(*(self.files.get(name, []) for name in names))

    @property
    def prompts(self) -> list[Prompt]:
        return self.files["prompts.jsonl"]

    def rows(self) -> dict[str, list[Any]]:
        return self.files


def read(source: str | None, options: Options) -> Loaded:
    with opened(source, options) as prepared:
        files = {name: list(rows()) for name, rows in prepared.rows().items()}
        ledgers = prepared.reply_ledger, prepared.prompt_ledger
        return Loaded(prepared.format, prepared.notes, files, *ledgers)


MEASURE = """
import json, resource, sys, time
from pathlib import Path
from srlm_lite.data.prepare import Options, prepare
begun = time.monotonic()
facts = prepare(sys.argv[1], Path(sys.argv[2]), Options())
print(json.dumps({
    "rows": facts["replies"]["seen"],
    "seconds": round(time.monotonic() - begun, 1),
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    "libraries": sorted({"torch", "datasets", "pandas", "pyarrow"} & set(sys.modules)),
}))
"""


def measured(count: int, folder: Path, *, words: int = 160) -> Row:
    """What `data prepare` takes of so many rows: four scored replies a prompt, a kilobyte each."""
    path = folder / f"{count}.jsonl"
    draw = random.Random(0)
    vocabulary = [f"word{n}" for n in range(1000)]
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            row = {
                "prompt": f"What is to be said of thing {n // 4}, and why?",
                "response": " ".join(draw.choices(vocabulary, k=words)),
                "score": n % 4,
            }
            file.write(json.dumps(row) + "\n")
    command = [sys.executable, "-c", MEASURE, str(path), str(folder / f"out-{count}")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: Row = json.loads(done.stdout)
    return {"file_mb": path.stat().st_size >> 20, **found}


if __name__ == "__main__":
    print(measured(int(sys.argv[1]), Path(sys.argv[2])))
