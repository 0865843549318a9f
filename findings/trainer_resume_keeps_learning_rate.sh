#!/bin/sh
# A Trainer that goes on from a checkpoint takes learning rate and weight decay from the checkpoint,
# whatever its arguments say now: the way to go on more slowly changes nothing, and nothing says so.
#
# Versions: transformers 5.17.0, accelerate 1.15.0, torch 2.13.0, Python 3.11.
# Expected: the rate that the arguments of the second call have, or a warning, as there is one where
# logging_steps or save_steps differ.
# Seen: with learning_rate=1e-5 and weight_decay=0.5 it goes on with 1e-3 and 0: the same weights, to
# the last bit, as with the arguments left alone, and no word of it in the log, its infos included.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=info "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import logging
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

BEFORE, NOW = (1e-3, 0.0), (1e-5, 0.5)
said = []


class Heard(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


transformers.utils.logging.add_handler(Heard())
rows = [{"input_ids": torch.arange(n, n + 8), "labels": torch.arange(n, n + 8)} for n in range(1, 9)]


def trained(rate, decay, checkpoint=None):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    arguments = TrainingArguments(
        output_dir=sys.argv[1] + "/run", learning_rate=rate, weight_decay=decay, max_steps=4,
        save_steps=2, logging_steps=1, per_device_train_batch_size=2, lr_scheduler_type="constant",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )
    trainer = Trainer(LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    return rates[2:], trainer.optimizer.param_groups[0]["weight_decay"], trainer.model.state_dict()


checkpoint = sys.argv[1] + "/run/checkpoint-2"
_, _, whole = trained(*BEFORE)
said.clear()
rates, decay, weights = trained(*NOW, checkpoint)
told = [line for line in said if "learning_rate" in line.lower() or "weight_decay" in line.lower()]
# The arguments themselves, where they are logged, are no warning.
told = [line for line in told if "checkpoint" in line.lower()]
same = all(torch.equal(weights[name], whole[name]) for name in whole)
print(f"asked for {NOW}: goes on with rates {rates}, decay {decay}; same weights {same}; told: {told}")
raise SystemExit(0 if rates == [BEFORE[0]] * 2 and decay == BEFORE[1] and same and not told else 1)
END
