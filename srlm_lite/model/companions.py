"""The small files beside exported weights: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srlm_lite.errors import ProofError
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.gguf_tokenizer import ADDED_FILE, SENTENCEPIECE_FILE

hf: Any = transformers  # only partly typed

_CONVERSATION = (
    {"role": "user", "content": "What is the moon made of?"},
    {"role": "assistant", "content": "Rock."},
    {"role": "user", "content": "Is it far?"},
)


def write_config(base: Path, folder: Path, *, dtype: torch.dtype | None, unties: bool) -> None:
    """The base's `config.json`, with what the export has changed."""
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for key in ("_name_or_path", "_model_name_or_path", "torch_dtype", "quantization_config"):
        if key == "torch_dtype" and key in settings:
            settings.setdefault("dtype", settings[key])
        settings.pop(key, None)
    if dtype is not None:
        settings["dtype"] = str(dtype).removeprefix("torch.")
    if unties:
        settings["tie_word_embeddings"] = False
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def write_generation_config(
    base: Path, folder: Path, model: PreTrainedModel, chat: ChatFormat
) -> None:
    """The base's own way to sample, ending a reply where the chat format ends it."""
    if (base / "generation_config.json").is_file():
        settings = hf.GenerationConfig.from_pretrained(str(base))
    else:
        settings = copy.deepcopy(model.generation_config)
    settings.eos_token_id = list(chat.stop_ids)
    settings.pad_token_id = chat.pad_id
    settings.save_pretrained(str(folder))


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> None:
    """The tokenizer with the chat template in use, and its files of SentencePiece where it has any:
    llama.cpp's converter has the scores from there alone.

    Raises:
        ProofError: Plain transformers, given these files, renders a conversation otherwise.
    """
    tokens: Any = copy.deepcopy(tokenizer)
    tokens.chat_template = chat.portable_template
    tokens.save_pretrained(str(folder))
    for name in (SENTENCEPIECE_FILE, ADDED_FILE):
        if (Path(tokens.name_or_path) / name).is_file():
            shutil.copyfile(Path(tokens.name_or_path) / name, folder / name)
    plain = hf.AutoTokenizer.from_pretrained(str(folder))
    for messages in (_CONVERSATION[:1], _CONVERSATION):
        ids = plain.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        if list(ids) != chat.render(messages, generation=True):
            raise ProofError("the exported tokenizer renders a conversation with other ids")
