#!/bin/sh
# `generate` with a repetition penalty, as generation_config.json of Qwen2 and others has one, counts
# the padding of a batch as tokens that were said: where the padding token is the one that ends a
# reply, as is common, the end gets less likely in each row that is padded.
#
# Versions: transformers 5.17.0, torch 2.13.0 (CPU), Python 3.11.
# Expected: what attention_mask hides is no part of the text, so a row's scores are the same, padded or
# not.
# Seen: all scores are the same within rounding but that of the end, which is divided by the penalty
# (multiplied, where it is below 0). Short prompts of a batch get longer replies than alone.
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

END_ID, PENALTY = 2, 1.3
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
        bos_token_id=1, eos_token_id=END_ID, pad_token_id=END_ID,
    )
).eval()
ids = torch.arange(5, 13)[None]
row = torch.cat([torch.full((1, 6), END_ID), ids], 1)


def scores(ids, penalty):
    """Of the first token of a reply."""
    done = model.generate(
        ids, attention_mask=(ids != END_ID).long(), repetition_penalty=penalty, max_new_tokens=1,
        do_sample=False, output_scores=True, return_dict_in_generate=True,
    )
    return done.scores[0][0]


def differ(penalty):
    """Tokens whose scores depend on the padding."""
    far = (scores(ids, penalty) - scores(row, penalty)).abs()
    return (far > 1e-4).nonzero().flatten().tolist()


with_one, without = differ(PENALTY), differ(1.0)
print(f"scores that depend on padding: {with_one}, without a penalty {without}; the end is {END_ID}")
alone, padded = (float(scores(one, PENALTY)[END_ID]) for one in (ids, row))
print(f"the end's score: {alone:.3f} alone, {padded:.3f} padded")
as_told = abs(padded - (alone / PENALTY if alone > 0 else alone * PENALTY)) < 1e-3
raise SystemExit(0 if (with_one, without) == ([END_ID], []) and as_told else 1)
END
