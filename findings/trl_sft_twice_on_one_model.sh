#!/bin/sh
# A model that SFTTrainer has trained with its default loss cannot be trained by another SFTTrainer with
# loss_type="nll": the first one has put a forward of its own on the model, and leaves it there.
#
# Versions: trl 1.14.0, transformers 5.17.0, torch 2.13.0, datasets 4.8.5, Python 3.11.
# Expected: a second training of a model is like the first, as Trainer's are.
# Seen: nll, then the default: both train. nll after the default: a TypeError, since what the model
# gives back has no logits.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 trl==1.14.0 datasets==4.8.5
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import sys

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

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

ids = list(range(3, 20))
rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 2)
model = LlamaForCausalLM(shape)
found = []
for settings in ({"loss_type": "nll"}, {}, {"loss_type": "nll"}):
    arguments = SFTConfig(
        output_dir=sys.argv[1] + "/run", max_steps=1, per_device_train_batch_size=1, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, **settings,
    )
    try:
        SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
        found.append("trained")
    except TypeError as error:
        found.append("TypeError")
        print(error)
print("nll, the default, nll:", found)
raise SystemExit(0 if found == ["trained", "trained", "TypeError"] else 1)
END
