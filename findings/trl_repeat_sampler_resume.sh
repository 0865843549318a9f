#!/bin/sh
# A run of TRL's RLOOTrainer (GRPOTrainer has the same sampler) that goes on from a checkpoint in its
# second epoch is dealt the prompts in the first epoch's order again: some of that epoch's prompts come
# twice, and others not at all.
#
# Versions: trl 1.14.0, transformers 5.17.0, torch 2.13.0, datasets 4.8.5, Python 3.11.
# Expected: the prompts that the run would have had without the stop; within the first epoch it is so.
# Seen: RepeatSampler draws each epoch's order from a generator that is seeded when the trainer is made,
# and nothing is drawn for the epochs that the checkpoint is past. Trainer skips steps, not orders.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 trl==1.14.0 datasets==4.8.5
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import RLOOConfig, RLOOTrainer

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

PROMPTS, STEPS = 6, 6  # two prompts a step: an epoch is three steps
rows = Dataset.from_list([{"prompt": f"w{number}"} for number in range(PROMPTS)])


def dealt(folder, checkpoint=None):
    """The prompts of each step that is taken."""
    steps = []

    def reward(prompts, completions, **more):
        steps.append(sorted(set(prompts)))
        return [float(len(one)) for one in completions]

    torch.manual_seed(0)
    arguments = RLOOConfig(
        output_dir=f"{sys.argv[1]}/{folder}", max_steps=STEPS, save_steps=1, seed=3, beta=0.0,
        per_device_train_batch_size=4, num_generations=2, max_completion_length=2,
        learning_rate=1e-6, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
    )
    trainer = RLOOTrainer(
        LlamaForCausalLM(shape), reward_funcs=reward, args=arguments, train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return steps


whole = dealt("whole")
late = {}
for done in (1, 4):
    late[done] = dealt(f"from{done}", f"{sys.argv[1]}/whole/checkpoint-{done}")
    print(f"after step {done}: whole run {whole[done:]}, gone on {late[done]}")
second = whole[3:4] + late[4]
print("second epoch of the run that went on:", second)
missed = PROMPTS - len({prompt for step in second for prompt in step})
as_told = late[1] == whole[1:] and late[4] == whole[1:3] != whole[4:] and missed > 0
raise SystemExit(0 if as_told else 1)
END
