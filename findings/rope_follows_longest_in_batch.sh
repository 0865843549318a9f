#!/bin/sh
# Where a model's positions are scaled by the length of the text (rope types `longrope`, of Phi-3 with
# 128k, and `dynamic`), transformers goes by the longest text in the batch: a short text gets other
# logits beside a long one than alone.
#
# Versions: transformers 5.17.0, torch 2.13.0 (CPU), Python 3.11.
# Expected: a row's logits are its own, within rounding, whatever lies beside it; as with plain rope.
# Seen: off by more than a tenth of the largest logit, padded left or right. Padded as far but alone it
# is within rounding, so it is the neighbour, and no padding, that does it. What a prompt samples then
# depends on the batch that it is drawn in.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
BEFORE = 16  # positions that the model was made for at first
SHORT, LONG = torch.arange(3, 11)[None], torch.arange(3, 43)[None]
halves = SHAPE["hidden_size"] // SHAPE["num_attention_heads"] // 2
longrope = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BEFORE,
    "short_factor": [1.0] * halves, "long_factor": [4.0] * halves,
}
torch.manual_seed(0)
phi = Phi3Config(
    **SHAPE, rope_parameters=longrope, max_position_embeddings=64,
    original_max_position_embeddings=BEFORE,
)
models = {
    "longrope": Phi3ForCausalLM(phi),
    "dynamic": LlamaForCausalLM(
        LlamaConfig(
            **SHAPE, max_position_embeddings=BEFORE,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        )
    ),
    "plain": LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=64)),
}


def padded(ids, to, *, left):
    """Ids, mask and positions of one row."""
    fill = torch.zeros(1, to - ids.shape[1], dtype=torch.long)
    mask = torch.ones_like(ids)
    parts = ((fill, ids), (fill, mask)) if left else ((ids, fill), (mask, fill))
    row, seen = (torch.cat(both, 1) for both in parts)
    return row, seen, (seen.cumsum(1) - 1).clamp(min=0)


found = {}
for name, model in models.items():
    model.eval()
    off = {"beside a long one": 0.0, "padded alone": 0.0}
    for left in (True, False):
        short = padded(SHORT, LONG.shape[1], left=left)
        both = [torch.cat(two) for two in zip(short, padded(LONG, LONG.shape[1], left=left))]
        for how, (ids, mask, positions) in (("padded alone", short), ("beside a long one", both)):
            with torch.no_grad():
                own = model(SHORT).logits[0]
                logits = model(ids, attention_mask=mask, position_ids=positions).logits[0]
            logits = logits[mask[0].bool()]
            far = float((logits - own).abs().max() / own.abs().max())
            off[how] = max(off[how], far)
    print(name, {how: f"{far:.1e} of the largest logit" for how, far in off.items()})
    found[name] = (off["beside a long one"] > 0.1, off["padded alone"] < 1e-4)
raise SystemExit(0 if found == {"longrope": (True, True), "dynamic": (True, True), "plain": (False, True)} else 1)
END
