#!/bin/sh
# PEFT's add_weighted_adapter, asked for a combination under a name that is taken, returns without a
# word and leaves the old one: a combination of adapters that have gone on training is never made anew.
#
# Versions: peft 0.21.2, transformers 5.17.0, torch 2.13.0, Python 3.11.
# Expected: the new combination, or an error.
# Seen: no warning; the weights are the old combination's to the last bit, also with other weights and
# after the adapters have changed. After delete_adapter the new one is made.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), lora, "first")
model.add_adapter("second", lora)
layer = model.base_model.model.model.layers[0].self_attn.q_proj


def combined(*weights):
    model.add_weighted_adapter(["first", "second"], list(weights), "both", combination_type="cat")
    return layer.get_delta_weight("both").detach().clone()


def wanted(*weights):
    return sum(w * layer.get_delta_weight(n) for w, n in zip(weights, ("first", "second"))).detach()


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    old = combined(1.0, 1.0)
    right = torch.allclose(old, wanted(1.0, 1.0), atol=1e-5)
    with torch.no_grad():
        layer.lora_B["second"].weight.mul_(3.0)  # it has gone on training
    again, other = combined(1.0, 1.0), combined(1.0, -1.0)
    model.delete_adapter("both")
    anew = combined(1.0, -1.0)
is_old = torch.equal(again, old) and torch.equal(other, old)
is_new = torch.allclose(anew, wanted(1.0, -1.0), atol=1e-5)
print(f"right at first {right}; asked again it is the old one {is_old}; after deletion new {is_new}")
print("warnings:", [str(one.message) for one in said])
raise SystemExit(0 if right and is_old and is_new and not said else 1)
END
