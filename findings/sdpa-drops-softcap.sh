#!/bin/sh
# Gemma 2 caps the logits of its attention (attn_logit_softcapping), and transformers computes it
# with SDPA where nothing is said, which leaves the cap out without a word.
#
# Versions: transformers 5.17.0, torch 2.13.0 (CPU), Python 3.11.
# Expected: the same logits, within rounding, whichever implementation of attention computes them.
# Seen: SDPA's are those of a model without the cap, to the last digit of rounding; eager's are not.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0
"$folder/venv/bin/python" - <<'END'
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.manual_seed(0)
settings = Gemma2Config(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32,
    attn_logit_softcapping=1.0, initializer_range=0.3,
)
model = Gemma2ForCausalLM(settings).eval()
print("chosen where nothing is said:", model.config._attn_implementation)
ids = torch.arange(64)[None]


def logits(implementation: str, cap: float | None) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = cap
    with torch.no_grad():
        return model(ids).logits


sdpa, eager, uncapped = logits("sdpa", 1.0), logits("eager", 1.0), logits("eager", None)
scale = float(eager.abs().max())
to_eager, to_uncapped = (float((sdpa - one).abs().max()) / scale for one in (eager, uncapped))
print(f"SDPA is {to_eager:.1e} of the largest logit from eager, {to_uncapped:.1e} from no cap")
raise SystemExit(0 if to_uncapped < 1e-4 < 1e-2 < to_eager else 1)
END
