"""A GGUF file as a safetensors directory, which is what transformers loads."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from srlm_lite.errors import UserError
from srlm_lite.model.cache import cache_dir
from srlm_lite.model.quiet import first_line, quiet

log = logging.getLogger(__name__)
hf: Any = transformers  # only partly typed

_WHERE = "base.name"
_CONVERSION = 1
"""Part of the cache key: raise it when the conversion of a GGUF file changes."""


def converted(file: Path, digest: str) -> Path:
    """The safetensors directory of a GGUF file: from the cache, or made now."""
    folder = cache_dir() / f"gguf-{digest[:16]}-{_CONVERSION}-{transformers.__version__}"
    if (folder / "config.json").is_file():
        return folder
    log.info("converting %s, once", file.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to the cache ({error.strerror})",
            where=str(folder.parent),
            way_out="Set SRLM_LITE_CACHE to a directory that can be written",
        ) from error
    try:
        _convert(file, draft)
        with contextlib.suppress(OSError):  # another process was quicker; its result is the same
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not (folder / "config.json").is_file():
        raise UserError(
            "cannot put the converted file here", where=str(folder), way_out="Delete it"
        )
    return folder


def _convert(file: Path, target: Path) -> None:
    at: dict[str, Any] = {"gguf_file": file.name}
    # The conversion's progress bar cannot be switched off, only redirected.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = hf.AutoTokenizer.from_pretrained(str(file.parent), **at)
            model, report = hf.AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=torch.bfloat16, output_loading_info=True, **at
            )
        except Exception as error:  # the reader meets a torn file with whatever it trips over
            raise _unreadable_gguf(file, error) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{file} lacks {len(missing)} tensors, such as {missing[0]}",
            where=_WHERE,
            way_out="Get the file again",
        )
    # The tokenizer comes back with the library's guesses; the file's own ids are in the config.
    for role in ("bos", "eos", "unk", "pad"):
        token_id = getattr(model.config, f"{role}_token_id", None)
        if isinstance(token_id, int):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    # The weights are dequantized by now, yet the model refuses to be saved while it is marked.
    del model.config.quantization_config
    model.hf_quantizer = None
    with quiet():
        try:
            tokenizer.save_pretrained(str(target))
            model.save_pretrained(str(target))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the converted {file.name} ({first_line(error)})",
                where=str(target.parent),
                way_out="Make room, or set SRLM_LITE_CACHE to another directory",
            ) from error


def _unreadable_gguf(file: Path, error: Exception) -> UserError:
    text = first_line(error)
    if "architecture" in text:
        return UserError(f"{file}: {text}", where=_WHERE)
    if isinstance(error, ImportError):
        return UserError(text, where=_WHERE, way_out="pip install gguf")
    return UserError(
        f"{file} cannot be read as GGUF: truncated or damaged ({type(error).__name__}: {text})",
        where=_WHERE,
        way_out="Get the file again",
    )
