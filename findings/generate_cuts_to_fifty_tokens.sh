#!/bin/sh
# `generate(do_sample=True)` of a model whose generation_config.top_k is None draws from the 50 most
# likely tokens alone, and with top_k=None passed from all: the default of transformers 4 has gone from
# the configuration, and is filled in at the call where nothing is said.
#
# Versions: transformers 5.17.0, torch 2.13.0 (CPU), Python 3.11.
# Expected: a top_k that is None cuts nothing, as top_p's and min_p's do not, wherever it is said.
# Seen: 50 of 64 tokens have a score with nothing said, 64 with top_k=None and with top_k=0. So samples
# at temperature 1 are not of the model's own distribution, though its configuration shows no cut.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()
ids = torch.arange(3, 11)[None]


def left(**settings):
    """How many tokens can be drawn."""
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=1,
        output_scores=True, return_dict_in_generate=True, **settings,
    )
    return int(torch.isfinite(done.scores[0]).sum())


said = model.generation_config.top_k
found = {"nothing said": left(), "top_k=None": left(top_k=None), "top_k=0": left(top_k=0)}
print(f"generation_config.top_k is {said}; tokens of 64 that can be drawn: {found}")
wanted = {"nothing said": 50, "top_k=None": 64, "top_k=0": 64}
raise SystemExit(0 if said is None and found == wanted else 1)
END
