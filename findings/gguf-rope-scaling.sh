#!/bin/sh
# transformers leaves out what a GGUF file says of the scaling of positions: the tensor
# rope_freqs.weight of Llama 3.1 and 3.2, and gemma3.rope.scaling.* of Gemma 3 from 4B on.
#
# Versions: transformers 5.17.0, torch 2.13.0 (CPU), gguf 0.19.0, Python 3.11.
# Expected: frequencies divided by the tensor's numbers; by 8 in the layers of full attention.
# Seen: the model is the same with the tensor or the keys as without. Long texts come out wrong:
# 11.7 nats from llama.cpp at 1,024 tokens of a tiny model.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END'
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

WIDTH, ROWS = 32, 40


def write(name: str, architecture: str, *, scaled: bool) -> str:
    writer = gguf.GGUFWriter(name, architecture)
    writer.add_context_length(131072)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(WIDTH)
    writer.add_value_length(WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(ROWS)
    if scaled and architecture == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (ROWS, WIDTH), "output": (ROWS, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{part}_norm": (WIDTH,) for part in ("attn", "ffn")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{part}": (WIDTH, WIDTH) for part in matrices}
    for tensor, shape in shapes.items():
        writer.add_tensor(f"{tensor}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    if scaled and architecture == "llama":
        divisors = np.full(WIDTH // 2, 8.0, np.float32)
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return name


def logits(name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(Path.cwd(), gguf_file=name, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(ROWS)[None]).logits


plain, divided = (
    logits(write(f"{scaled}.gguf", "llama", scaled=scaled)) for scaled in (False, True)
)
print("rope_freqs.weight changes nothing:", torch.equal(plain, divided))
name = write("gemma.gguf", "gemma3", scaled=True)
full = AutoConfig.from_pretrained(Path.cwd(), gguf_file=name).rope_parameters["full_attention"]
print("gemma3.rope.scaling.factor is 8, and of full attention was read:", full)
raise SystemExit(0 if torch.equal(plain, divided) and "factor" not in full else 1)
END
