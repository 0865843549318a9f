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

from srlm_lite.conversation import messages_of, with_system
from srlm_lite.errors import ProofError
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.gguf_tokenizer import ADDED_FILE, SENTENCEPIECE_FILE

hf: Any = transformers  # only partly typed

_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_ROLES = ("bos", "eos", "pad", "decoder_start")
_SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_CONVERSATION = (
    {"role": "user", "content": "What is the moon made of?"},
    {"role": "assistant", "content": "Rock."},
    {"role": "user", "content": "Is it far?"},
)


def write_config(base: Path, folder: Path, *, dtype: torch.dtype | None, unties: bool) -> None:
    """The base's `config.json`, with what the export has changed."""
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        settings.pop(key, None)
    text = _text_part(base)
    # A model with vision or sound has a section for each of its parts, and may be loaded whole or
    # as the text model alone: the section that applies says the same then.
    for section in (settings, *(part for part in settings.values() if isinstance(part, dict))):
        if "torch_dtype" in section:
            section.setdefault("dtype", section.pop("torch_dtype"))
        if dtype is not None and (section is settings or "dtype" in section):
            section["dtype"] = str(dtype).removeprefix("torch.")
        if unties and (section is settings or section is settings.get(text)):
            section["tie_word_embeddings"] = False
    written = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(written, encoding="utf-8")


def _text_part(base: Path) -> str | None:
    """The section of a directory's `config.json` that is the text model's, where it has one."""
    whole = hf.AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    text = whole.get_text_config(decoder=True)
    return next((key for key in whole.sub_configs if getattr(whole, key, None) is text), None)


def copy_processors(base: Path, folder: Path) -> None:
    """What prepares images, videos or sound for the base, as it is there."""
    for name in _PROCESSORS:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def generation_config(base: Path, model: PreTrainedModel, chat: ChatFormat) -> tuple[Any, str]:
    """The base's own way to sample, ending a reply where the chat format ends it.

    transformers 5 refuses to save settings that do not go together, such as a temperature without
    `do_sample`; older checkpoints have them.

    Returns:
        The generation config, and a line on what of the base's could not stay ("": nothing).
    """
    file, said = base / "generation_config.json", {}
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        settings = hf.GenerationConfig.from_pretrained(str(base))
    else:
        settings = copy.deepcopy(model.generation_config)
    settings.eos_token_id = list(chat.stop_ids)
    settings.pad_token_id = chat.pad_id
    if _is_savable(settings):
        return settings, ""
    told = "the base's generation_config.json cannot be saved as it is"
    if said.get("do_sample") is None:
        settings.do_sample = True
        if _is_savable(settings):
            return settings, f"{told}: do_sample is set, which its sampling settings are for"
    for key in _SAMPLING:
        setattr(settings, key, None)
    if _is_savable(settings):
        return settings, f"{told}: its sampling settings are left out"
    kept = {f"{role}_token_id": getattr(settings, f"{role}_token_id") for role in _ROLES}
    return hf.GenerationConfig(**kept), f"{told}: only its token ids are kept"


def _is_savable(settings: Any) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


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
    under_system = messages_of(with_system(_CONVERSATION, chat.system))
    for messages in (_CONVERSATION[:1], _CONVERSATION, under_system):
        ids = plain.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        if list(ids) != chat.render(messages, generation=True):
            raise ProofError("the exported tokenizer renders a conversation with other ids")
