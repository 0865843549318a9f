"""A GGUF file as a safetensors directory, which is what transformers loads.

transformers reads the weights. What they compute and what the tokens are, it reads from few keys
and partly wrongly, so that is built here from the whole of the file (`gguf_config`,
`gguf_tokenizer`), and held against it.
"""

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
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils

from srlm_lite.errors import UserError
from srlm_lite.model.cache import cache_dir
from srlm_lite.model.gguf_config import read_settings, refuse_unserved, unread_tensors
from srlm_lite.model.gguf_header import WHERE, Header, read_header
from srlm_lite.model.gguf_tokenizer import (
    build_tokenizer,
    check_tokenizer,
    read_vocabulary,
    write_sentencepiece,
)
from srlm_lite.model.quiet import first_line, quiet

log = logging.getLogger(__name__)
hf: Any = transformers  # only partly typed
hf_gguf: Any = modeling_gguf_pytorch_utils

_TELLING = {"qwen35"}
"""Architectures whose loader says which of a file's tensors it has not read."""

CONVERSION = 2
"""Number of the conversion, which a run keeps: raise it when a file is converted otherwise."""
FIRST_CONVERSION = 1
"""The conversion of runs that note no number. Its tokenizer is the library's guess."""


def converted(file: Path, digest: str, conversion: int = CONVERSION) -> Path:
    """The safetensors directory of a GGUF file: from the cache, or made now.

    Raises:
        UserError: The file cannot be read, or what it says cannot be made right.
    """
    folder = cache_dir() / f"gguf-{digest[:16]}-{conversion}-{transformers.__version__}"
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
        _convert(file, draft, conversion)
        with contextlib.suppress(OSError):  # another process was quicker; its result is the same
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not (folder / "config.json").is_file():
        raise UserError(
            "cannot put the converted file here", where=str(folder), way_out="Delete it"
        )
    return folder


def outdated(conversion: int | None) -> str | None:
    """What to tell of a run that keeps an earlier conversion; None: nothing."""
    if conversion != FIRST_CONVERSION:
        return None
    return (
        "the run was begun on the first conversion of its GGUF file and goes on with it: text may "
        "be cut into other tokens than the model was trained on (digits, spaces; with Gemma each "
        "letter is one), BOS is left out, and so are scalings of positions. A new run has the "
        "file's own"
    )


def gguf_settings(file: Path) -> Any:
    """The configuration of the model in a GGUF file, without its weights.

    Raises:
        UserError: The file cannot be read, or what it says cannot be made right.
    """
    header = _header(file)
    return read_settings(header, read_vocabulary(header))


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, which its header holds whole: nothing is converted.

    Raises:
        UserError: As `gguf_settings`.
    """
    return build_tokenizer(read_vocabulary(_header(file)))


def _header(file: Path) -> Header:
    try:
        header = read_header(file)
    except Exception as error:  # whatever a torn header holds
        raise _unreadable_gguf(file, error) from error
    refuse_unserved(header)
    return header


def _convert(file: Path, target: Path, conversion: int) -> None:
    if conversion == FIRST_CONVERSION:
        _save(file, target, *_first_conversion(file))
        return
    header = _header(file)
    vocabulary = read_vocabulary(header)
    settings = read_settings(header, vocabulary)
    tokenizer = build_tokenizer(vocabulary)
    model, unexpected = _load(file, settings)
    if header.architecture not in _TELLING:
        processor = hf_gguf.TENSOR_PROCESSORS.get(header.architecture, hf_gguf.TensorProcessor)
        unexpected = unread_tensors(
            header, hf_gguf.get_gguf_hf_weights_map(model, processor(config={}))
        )
    if unexpected:
        raise header.refusal(
            f"the model has no place for {len(unexpected)} tensors, such as {unexpected[0]}"
        )
    _save(file, target, model, tokenizer)
    if vocabulary.sentencepiece:
        write_sentencepiece(vocabulary, target)
    with quiet():
        check_tokenizer(vocabulary, tokenizer, target)


def _load(file: Path, settings: Any = None) -> tuple[PreTrainedModel, list[str]]:
    """The model with the file's weights, of the settings given or of those the library reads; and
    the tensors left over, which the library tells of some architectures only (`_TELLING`)."""
    # The conversion's progress bar cannot be switched off, only redirected.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            model: PreTrainedModel
            model, report = hf.AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                dtype=torch.bfloat16,
                output_loading_info=True,
                **({} if settings is None else {"config": settings}),
            )
        except Exception as error:  # the reader meets a torn file with whatever it trips over
            raise _unreadable_gguf(file, error) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{file} lacks {len(missing)} tensors, such as {missing[0]}",
            where=WHERE,
            way_out="Get the file again",
        )
    return model, sorted(report["unexpected_keys"])


def _first_conversion(file: Path) -> tuple[PreTrainedModel, Any]:
    """As all files were converted at first, for the runs that began on that."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = hf.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        except Exception as error:
            raise _unreadable_gguf(file, error) from error
    model, _ = _load(file)
    for role in ("bos", "eos", "unk", "pad"):
        token_id = getattr(model.config, f"{role}_token_id", None)
        if isinstance(token_id, int):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    return model, tokenizer


def _save(file: Path, target: Path, model: Any, tokenizer: Any) -> None:
    # The weights are dequantized by now, yet the model refuses to be saved while it is marked.
    if hasattr(model.config, "quantization_config"):
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
        return UserError(f"{file}: {text}", where=WHERE)
    if isinstance(error, ImportError):
        return UserError(text, where=WHERE, way_out="pip install gguf")
    return UserError(
        f"{file} cannot be read as GGUF: truncated or damaged ({type(error).__name__}: {text})",
        where=WHERE,
        way_out="Get the file again",
    )
