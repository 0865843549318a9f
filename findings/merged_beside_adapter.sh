#!/bin/sh
# A merged model saved into the directory of its own adapter is loaded with the adapter on top once
# more: transformers finds `adapter_config.json` beside whole weights and adds the adapter to them.
#
# Versions: transformers 5.17.0, peft 0.21.2, torch 2.13.0, Python 3.11.
# Expected: `merge_and_unload().save_pretrained(folder)` writes whole weights, and what is loaded
# from the folder is those; or an error, or a warning.
# Seen: no word of it. The model that is loaded has LoRA weights, and its logits are those of the
# base with twice the adapter's change. With the merged model in a folder of its own they are the
# merged ones.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

shared, own = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "merged"
torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
)
tuned = get_peft_model(
    LlamaForCausalLM(shape).eval(),
    LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
)
tuned.save_pretrained(shared)
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    right = tuned(input_ids=ids).logits
    for layer in tuned.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling = {name: 2 * value for name, value in layer.scaling.items()}
    twice = tuned(input_ids=ids).logits
    for layer in tuned.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling = {name: value / 2 for name, value in layer.scaling.items()}
    merged = tuned.merge_and_unload()
    found = {}
    for place in (shared, own):
        merged.save_pretrained(place)
        loaded = AutoModelForCausalLM.from_pretrained(place).eval()
        logits = loaded(input_ids=ids).logits
        lora = sum("lora_" in name for name, _ in loaded.named_parameters())
        off = {name: float((logits - one).abs().max()) for name, one in (("merged", right), ("twice", twice))}
        found[place.name] = (lora > 0, off["merged"] < 1e-5, off["twice"] < 1e-5)
        print(f"{place.name}: {lora} LoRA tensors, logits off by {off['merged']:.4f} from the "
              f"merged model's, {off['twice']:.4f} from those of twice the adapter")
raise SystemExit(0 if found == {"run": (True, False, True), "merged": (False, True, False)} else 1)
END
