#!/bin/sh
# Llama 4 scales the queries of its layers without positions by how far along a token is
# (attn_temperature_tuning), and transformers counts slots of the row for that, not position_ids: with
# padding on the left, or several texts in one row, a text gets other logits than alone.
#
# Versions: transformers 5.17.0, torch 2.13.0 (CPU), Python 3.11.
# Expected: with mask and position_ids given, padding on the left changes logits within rounding.
# Seen: off by more than a tenth of the largest logit; with attn_temperature_tuning off within rounding.
# The scale grows in steps of floor_scale tokens: 8 here, 8,192 in the published models, so there it
# shows once text and padding are longer than that.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

found = {}
for tuned in (True, False):
    torch.manual_seed(0)
    model = Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[0, 0], pad_token_id=0,
            attention_chunk_size=64, attn_temperature_tuning=tuned, floor_scale=8, attn_scale=0.5,
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(1, 13)[None]
    row = torch.cat([torch.zeros_like(ids), ids], 1)
    mask = (row > 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids).logits
        padded = model(row, attention_mask=mask, position_ids=positions).logits[:, ids.shape[1] :]
    found[tuned] = float((padded - alone).abs().max() / alone.abs().max())
    print(f"tuned {tuned}: padding moves the logits by {found[tuned]:.1e} of the largest")
raise SystemExit(0 if found[False] < 1e-4 < 0.1 < found[True] else 1)
END
