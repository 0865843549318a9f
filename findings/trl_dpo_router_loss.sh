#!/usr/bin/env bash
# TRL's DPO adds a mixture's router loss though the model's configuration has it off.
#
# Versions: torch 2.13.0, transformers 5.17.0, trl 1.14.0, peft 0.21.2
# Guess: with output_router_logits off, as the class and published files have it, DPO's loss is
#   DPO's alone: ln 2 at the first step, where policy and reference are the same model.
# Seen: DPOTrainer turns the router's logits on by itself wherever the configuration has
#   router_aux_loss_coef, and adds that times the balancing loss: above ln 2 at a margin of 0.
#   With router_aux_loss_coef=0.0 in DPOConfig and configuration it is ln 2.
#
# Exits 0 while that is so, and non-zero when the behaviour has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0 trl==1.14.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import math
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(125))])}
made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
)

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import DPOConfig, DPOTrainer

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    num_experts=8, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
assert not config.output_router_logits
rows = Dataset.from_list([{"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7"}])


def first_step(coefficient):
    torch.manual_seed(0)
    config.router_aux_loss_coef = coefficient
    more = {} if coefficient else {"router_aux_loss_coef": 0.0}
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=1, learning_rate=0.0, logging_steps=1,
        per_device_train_batch_size=1, report_to=[], use_cpu=True, bf16=False, **more,
    )
    trainer = DPOTrainer(
        Qwen3MoeForCausalLM(config), args=arguments, train_dataset=rows,
        processing_class=tokenizer, peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    return next(row for row in trainer.state.log_history if "loss" in row)


on, off = first_step(0.001), first_step(0.0)
print(f"ln 2 is {math.log(2):.6f}; loss {on['loss']:.6f}, without the coefficient {off['loss']:.6f}")
assert abs(on["rewards/margins"]) < 1e-6
assert abs(off["loss"] - math.log(2)) < 1e-4, "the loss without a coefficient is not DPO's"
assert on["loss"] > math.log(2) + 5e-4, "changed: no router loss is added now"
PYTHON
