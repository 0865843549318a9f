#!/usr/bin/env bash
# TRL's SFT trains Granite on another loss than the model's own.
#
# Versions: torch 2.13.0, transformers 5.17.0, trl 1.14.0
# Guess: SFTTrainer, settings left alone, minimises the loss that the model computes of the labels.
# Seen: its default loss_type, chunked_nll, multiplies with lm_head by itself and leaves Granite's
#   logits_scaling out, which divides the logits: the first step's loss is another one than
#   model(input_ids, labels=...).loss, and loss_type="nll" gives the model's own.
#
# Exits 0 while that is so, and non-zero when the behaviour has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0 trl==1.14.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(125))])}
made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
)

from transformers import GraniteConfig, GraniteForCausalLM
from trl import SFTConfig, SFTTrainer

shape = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
config = GraniteConfig(
    **shape, num_attention_heads=2, num_key_value_heads=1, logits_scaling=8.0,
    tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)


def fresh_model():
    """TRL changes a model that it trains, so each training has its own."""
    torch.manual_seed(0)
    model = GraniteForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=2.0)  # large enough to be scaled down, as trained ones are
    return model


ids = [1, *range(10, 40)]
with torch.no_grad():
    own = float(fresh_model()(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)


def first_loss(**settings):
    """What TRL logs of the first step; the learning rate is nothing, so the model stays."""
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=1, learning_rate=0.0, logging_steps=1,
        per_device_train_batch_size=1, report_to=[], use_cpu=True, bf16=False, **settings,
    )
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}])
    trainer = SFTTrainer(fresh_model(), arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


default, plain = first_loss(), first_loss(loss_type="nll")
print(f"the model's own {own:.3f}, TRL's default {default:.3f}, loss_type=nll {plain:.3f}")
assert abs(plain - own) < 0.01, "loss_type=nll is no longer the model's own loss"
assert abs(default - own) > 0.5, "changed: the default is the model's own loss now"
PYTHON
