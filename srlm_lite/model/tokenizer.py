"""The tokenizer of a base, held to what its own `tokenizer.json` says.

transformers picks a tokenizer's class by the configuration, and some classes put rules of their
own in the place of the file's: 5.17.0 opens a byte-level `tokenizer.json` beside
`tokenizer_class: LlamaTokenizerFast` (DeepSeek-R1's distillations, for one) as a Llama tokenizer,
which drops every space, and whatever lies beside the model type `qwen2` as Qwen's. Neither says a
word.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers as hf
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from srlm_lite.errors import UserError

FILE = "tokenizer.json"
_CONFIG = "config.json"
SAMPLES = (
    "The cat sat on 3 mats, didn't it? Nobody knows: 2024 is far off.",
    "One line.\nAnother one,\twith a tab.\n\nA third: x = (y + 10) * 42;",
    "Café, naïve, 北京 and Москва; ½ of it is 100% true",
)
"""Texts with what ways of cutting treat apart: digits, line ends, contractions, scripts.

None begins with a space or follows a special token: there Llama's tokenizers of before and after
transformers 5 differ on purpose."""


def open_tokenizer(folder: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or a Hub model, which gives the ids that its own file gives.

    Never mistral-common's, which transformers takes wherever that is installed and a `tekken.json`
    lies there: it knows no chat template, and hides what its ids stand for.

    Raises:
        UserError: What an export would hold, transformers would open as another tokenizer.
    """
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    opened: PreTrainedTokenizerBase = hf.AutoTokenizer.from_pretrained(
        folder, mistral_format=False, **options
    )
    found = cached_file(
        folder, FILE, revision=options["revision"], _raise_exceptions_for_missing_entries=False
    )
    if found is None or _ids(opened) == _ids_in_file(Path(found)):
        return opened
    # With what its `tokenizer_config.json` says on top, such as a space before every text.
    own: PreTrainedTokenizerBase = hf.PreTrainedTokenizerFast.from_pretrained(folder, **options)
    if _ids(own) == _ids(opened):
        return opened
    _check_lasts(own, hf.AutoConfig.from_pretrained(folder, **options))
    return own


def _ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for text in SAMPLES]


def _ids_in_file(file: Path) -> list[list[int]]:
    own = Tokenizer.from_file(str(file))
    return [own.encode(text, add_special_tokens=False).ids for text in SAMPLES]


def _check_lasts(own: PreTrainedTokenizerBase, settings: Any) -> None:
    """Write it as an export does, and open that as its reader will."""
    with TemporaryDirectory(prefix="srlm-lite-tokenizer-") as scratch:
        own.save_pretrained(scratch)
        (Path(scratch) / _CONFIG).write_text(settings.to_json_string(), encoding="utf-8")
        opened = hf.AutoTokenizer.from_pretrained(scratch, mistral_format=False)
        if _ids(opened) != _ids(own):
            raise UserError(
                f"transformers opens a {type(opened).__name__} for the model type "
                f"{settings.model_type}, which cuts text otherwise than {FILE} there: the base "
                "would be read wrong, here or after the export",
                where="base.name",
                way_out=f"If {FILE} is not the base's own, get its files again; else the base "
                "needs another release of transformers",
            )
