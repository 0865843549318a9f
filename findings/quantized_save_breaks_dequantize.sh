#!/bin/sh
# Saving a model in NF4 leaves the live model unable to be dequantized: `save_pretrained` writes the
# dtype into its config as a string, and puts that string into the config of the model in memory.
#
# Versions: transformers 5.17.0, bitsandbytes 0.50.2, accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
# Expected: saving changes nothing in memory: `dequantize()` gives a bfloat16 model before and after.
# Seen: before, config.dtype is torch.bfloat16 and dequantize() works. After, it is the string
# "bfloat16", and dequantize() raises RuntimeError, "Invalid device string: 'bfloat16'": the string is
# given to `.to`, which takes it for a device. What was saved can be loaded and dequantized.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 bitsandbytes==0.50.2 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

plain, saved = (str(Path(sys.argv[1]) / name) for name in ("plain", "saved"))
config = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)


def loaded(path, **more):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **more)


def dequantized(model):
    """The dtypes of the weights, or what was raised."""
    try:
        model.dequantize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return {str(weight.dtype) for weight in model.parameters()}


nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
kept, written = (loaded(plain, quantization_config=nf4) for _ in range(2))
written.save_pretrained(saved)
print(f"config.dtype: {kept.config.dtype!r}, after saving {written.config.dtype!r}")
found = [dequantized(model) for model in (kept, written, loaded(saved))]
print("dequantize(): {}; after saving: {}; of what was saved: {}".format(*found))
fine = {"torch.bfloat16"}
as_told = found[0] == found[2] == fine and "Invalid device string" in str(found[1])
raise SystemExit(0 if as_told and written.config.dtype == "bfloat16" else 1)
END
