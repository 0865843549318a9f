#!/bin/sh
# In a step of TRL's DPO whose pairs do not fill its last micro-batch, the pairs there count for more:
# of five pairs in micro-batches of two, the fifth counts as much as two of the others.
#
# Versions: trl 1.14.0, transformers 5.17.0, peft 0.21.2, torch 2.13.0, datasets 4.8.5, Python 3.11.
# Expected: the mean over the step's pairs, however they are cut; gradient accumulation is to save
# memory and to change nothing, as SFT's token counts see to since transformers 4.46.
# Seen: a mean of the micro-batches' means. The step's gradient is .167 of each of the first four pairs'
# and .333 of the fifth's; in one batch it is .2 of each. It is the end of every epoch whose pairs are
# not a multiple of the batch.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 trl==1.14.0 peft==0.21.2 datasets==4.8.5
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))])}
made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
)
shape = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)

pairs = [
    {"prompt": "w1 w2", "chosen": f" w{4 + i} w5", "rejected": f" w{20 + i} w7"} for i in range(5)
]


class Watched(DPOTrainer):
    """Keeps the gradient of the step, which the last micro-batch completes."""

    def training_step(self, model, inputs, *more):
        loss = super().training_step(model, inputs, *more)
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        self.gradient = torch.cat([torch.zeros(0) if g is None else g.flatten() for g in grads])
        return loss


def gradient(rows, size):
    torch.manual_seed(0)
    arguments = DPOConfig(
        output_dir=sys.argv[1] + "/run", max_steps=1, learning_rate=0.0, max_grad_norm=1e9,
        per_device_train_batch_size=size, gradient_accumulation_steps=-(-len(rows) // size),
        gradient_checkpointing=False, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=True)
    trainer = Watched(
        LlamaForCausalLM(shape), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=lora,
    )
    trainer.train()
    return trainer.gradient


each = torch.stack([gradient([pair], 1) for pair in pairs], 1)
found = {}
for size in (2, 5):
    weights = torch.linalg.lstsq(each, gradient(pairs, size)[:, None]).solution.flatten()
    found[size] = [round(float(one), 3) for one in weights]
    print(f"micro-batches of {size}: what each pair's own gradient counts for {found[size]}")
raise SystemExit(0 if found == {2: [0.167] * 4 + [0.333], 5: [0.2] * 5} else 1)
END
