#!/bin/sh
# `datasets` reads replies that are text in a JSON Lines or CSV file as other types: a reply
# "2024-05-01" comes back as a time, "007" as 7, "NA" as nothing. Where the first row of a CSV file has
# one cell too many, all rows move one column on, those too that fit the head: prompts become a column
# `__index_level_0__`, chosen replies prompts, rejected ones chosen.
#
# Versions: datasets 4.8.5, pyarrow 26.0.1, pandas 3.1.1, Python 3.11.
# Expected: strings of a JSON file stay strings; a CSV row that does not fit its head is an error.
# Seen: as above, without a warning. Strings that are no dates stay strings.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  datasets==4.8.5 pyarrow==26.0.1 pandas==3.1.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" HF_DATASETS_DISABLE_PROGRESS_BARS=1 \
  "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import datetime
import json
import sys
from pathlib import Path

from datasets import load_dataset

folder = Path(sys.argv[1])


def read(kind: str, text: str) -> list[dict]:
    file = folder / f"{abs(hash(text))}.{kind}"
    file.write_text(text)
    found = load_dataset("json" if kind == "jsonl" else kind, data_files=str(file), split="train")
    return list(found)


def lines(*replies: str) -> str:
    return "".join(json.dumps({"prompt": "When?", "chosen": one}) + "\n" for one in replies)


dates = read("jsonl", lines("2024-05-01", "2023-01-09"))
words = read("jsonl", lines("in May", "on Monday"))
cells = read("csv", "prompt,chosen\nWhich agent?,007\nWhich agent?,006\n")
none = read("csv", "prompt,chosen\nWhich country code?,NA\nWhich?,FR\n")
moved = read("csv", "prompt,chosen,rejected\nA,B,C,D\nE,F,G\n")
print("dates:", dates[0]["chosen"].__class__.__name__, dates[0]["chosen"])
print("words:", words[0]["chosen"])
print("007:", repr(cells[0]["chosen"]), " NA:", repr(none[0]["chosen"]))
print("behind a row with one cell too many:", moved[1])
as_told = (
    isinstance(dates[0]["chosen"], datetime.datetime)
    and words[0]["chosen"] == "in May"
    and cells[0]["chosen"] == 7
    and none[0]["chosen"] is None
    and (moved[1]["prompt"], moved[1]["chosen"], moved[1]["rejected"]) == ("F", "G", None)
)
raise SystemExit(0 if as_told else 1)
END
