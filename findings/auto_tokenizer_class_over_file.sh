#!/bin/sh
# AutoTokenizer opens a byte-level tokenizer.json as a Llama tokenizer where tokenizer_config.json
# says `tokenizer_class: LlamaTokenizerFast`, as those of DeepSeek-R1's distillations do: the file's
# way of cutting text is replaced by SentencePiece's, and every space is lost.
#
# Versions: transformers 5.17.0, tokenizers 0.23.3, torch 2.13.0, Python 3.11.
# Expected: the ids that the file itself gives, as transformers 4 gave.
# Seen: model types llama and qwen3: "of the 123" comes back as "ofthe123". Type qwen2 is opened as
# Qwen2Tokenizer, which cuts by Qwen's rule: "2024" is one token in the file and four then. Types
# mistral, phi3 and deepseek_v3 go by the file. transformers names DeepSeek's repositories among
# those that it opens by the file; a copy of one in a directory is none of them.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

vocabulary = {letter: at for at, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("2", "0"), ("2", "4"), ("20", "24")]
for left, right in merges:
    vocabulary[left + right] = len(vocabulary)
own = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
own.decoder = decoders.ByteLevel()

seen = {}
for model_type in ("llama", "qwen3", "qwen2", "mistral", "phi3", "deepseek_v3"):
    base = Path(sys.argv[1]) / model_type
    base.mkdir()
    own.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    opened = AutoTokenizer.from_pretrained(str(base))
    ids = opened("of the 123", add_special_tokens=False).input_ids
    year = opened("2024", add_special_tokens=False).input_ids
    seen[model_type] = (opened.decode(ids), year == own.encode("2024").ids)
    print(f"{model_type}: {type(opened).__name__} says {opened.decode(ids)!r}, 2024 is {year}")
wanted = dict.fromkeys(seen, ("of the 123", True))
wanted |= {"llama": ("ofthe123", seen["llama"][1]), "qwen3": ("ofthe123", seen["qwen3"][1])}
wanted["qwen2"] = ("of the 123", False)
raise SystemExit(0 if seen == wanted else 1)
END
