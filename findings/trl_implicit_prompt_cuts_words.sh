#!/bin/sh
# TRL takes as the prompt of a pair without one (plain texts, the whole dialogue in `chosen` and
# `rejected`, as in hh-rlhf) what both texts begin with, character by character: the shared beginning of
# both replies goes to the prompt, cut within numbers and words.
#
# Versions: trl 1.14.0, transformers 5.17.0, torch 2.13.0, datasets 4.8.5, Python 3.11.
# Expected: a cut at the last turn or word, or the tokens of the whole texts.
# Seen: "There are 12 of them." against 13 is learned as "2 of them." after a prompt that ends in
# "There are 1"; "yes" against "yes, I do" as "s" after "ye". Tokens of such a cut are none that a model
# would write.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 trl==1.14.0 datasets==4.8.5
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
from datasets import Dataset
from trl import extract_prompt

ASKED = "\n\nHuman: How many, and do you count?\n\nAssistant: "
pairs = [("There are 12 of them.", "There are 13 of them."), ("yes", "yes, I do")]
rows = Dataset.from_list([{"chosen": ASKED + one, "rejected": ASKED + other} for one, other in pairs])
found = [
    (row["prompt"].removeprefix(ASKED), row["chosen"], row["rejected"])
    for row in rows.map(extract_prompt)
]
for one in found:
    print("prompt ends in {!r}, chosen {!r}, rejected {!r}".format(*one))
wanted = [("There are 1", "2 of them.", "3 of them."), ("ye", "s", "s, I do")]
raise SystemExit(0 if found == wanted else 1)
END
