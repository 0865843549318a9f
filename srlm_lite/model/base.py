"""Load the frozen base: a Hub model, a local directory, or a GGUF file.

A GGUF file is converted once to a bfloat16 safetensors directory in the cache (see `cache_dir`),
and that directory is what gets loaded. So a GGUF base has no ways of its own afterwards: it takes
NF4 like any other, can be saved, and carries the special tokens that its file names.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srlm_lite.errors import UserError
from srlm_lite.model import unsloth_backend
from srlm_lite.model.bare import bare_model
from srlm_lite.model.checkpoint import INDEX, Checkpoint, weight_files
from srlm_lite.model.device import compute_device, dtype_on, refuse_quantization
from srlm_lite.model.gguf import CONVERSION, converted, gguf_settings, gguf_tokenizer
from srlm_lite.model.heap import give_back
from srlm_lite.model.layout import Layout
from srlm_lite.model.nf4 import nf4_settings
from srlm_lite.model.quiet import first_line as _first_line
from srlm_lite.model.quiet import quiet as _quiet
from srlm_lite.model.sharding import load_shards
from srlm_lite.model.tokenizer import open_tokenizer
from srlm_lite.model.whereabouts import (
    PATTERNS,
    WHERE,
    Kind,
    directory_here,
    is_here,
    located,
    of_the_hub,
    refuse_no_model,
    refuse_quantized,
)
from srlm_lite.settings import Base

log = logging.getLogger(__name__)
hf: Any = transformers  # only partly typed

_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_READ_BEFORE_TRIM = 16 << 20
"""Bytes of 16-bit tensors that may lie freed in the allocator's hands while a base is loaded."""


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """The frozen base in memory.

    The model is in eval mode, no parameter requires a gradient, and its generation config holds
    only token ids: how to sample is for the recipe to say, not for the checkpoint.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    """Compute dtype: of the weights, or of what NF4 weights are expanded to."""
    folder: str
    """Where `from_pretrained` finds it: a directory, of a GGUF file the converted one, or a Hub id
    (whose revision `source` has)."""
    source: dict[str, Any]
    """For run.json: name, kind, location, and sha256 (files) or revision (Hub)."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id at which the checkpoint says a text ends."""
        return _ids(self.model.generation_config.eos_token_id)


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """The base on disk: a directory with `config.json`, safetensors weights and a tokenizer."""

    folder: Path
    kind: Kind
    source: dict[str, Any]
    """As `LoadedBase.source`."""


def base_files(
    section: Base, *, revision: str | None = None, conversion: int | None = None
) -> BaseFiles:
    """The files of the base that a recipe names, without loading it.

    Args:
        revision: Commit on the Hub; default: the recipe's.
        conversion: Of a GGUF file, by number; default: the newest.

    Raises:
        UserError: They cannot be found, fetched or read.
    """
    kind, location = located(section.name)
    if kind != "hub":
        folder, known_by = _local_files(kind, location, conversion)
        source = {"name": section.name, "kind": kind, "location": location, **known_by}
        return BaseFiles(folder=Path(folder), kind=kind, source=source)
    with _quiet(), _explained(section, kind, location):
        folder = snapshot_download(
            location,
            revision=revision or section.revision,
            allow_patterns=PATTERNS,
        )
    _check_directory(Path(folder))
    commit = Path(folder).name  # the cache names a snapshot by its commit
    source = {"name": section.name, "kind": kind, "location": location, "revision": commit}
    return BaseFiles(folder=Path(folder), kind=kind, source=source)


def base_is_here(section: Base, *, conversion: int | None = None) -> bool:
    """Whether the base's files are on this machine; if not, the Hub has them and gives them out.

    Args:
        conversion: Of a GGUF file, by number; default: the newest.

    Raises:
        UserError: As `load_base` would, as far as that shows without fetching the weights.
    """
    here = is_here(section)
    refuse_unreadable(section, conversion=conversion)
    return here


def refuse_unreadable(section: Base, *, conversion: int | None = None) -> None:
    """Look into the files of a base that is here, and not in the Hub's cache.

    Args:
        conversion: Of a GGUF file, by number; default: the newest.

    Raises:
        UserError: As `load_base` would.
    """
    kind, location = located(section.name)
    if kind == "directory":
        _check_directory(Path(location))
        with _explained(section, kind, location):
            spoken(Path(location))
    elif kind == "gguf" and conversion in (None, CONVERSION):
        gguf_settings(Path(location))


def read_config(section: Base) -> Any:
    """The configuration of the base that a recipe names, as transformers has it; no weights.

    Raises:
        UserError: It cannot be found, fetched or read.
    """
    kind, location = located(section.name)
    if kind == "gguf":
        return gguf_settings(Path(location))
    with _quiet(), _explained(section, kind, location):
        return hf.AutoConfig.from_pretrained(
            location, revision=section.revision or "main", trust_remote_code=False
        )


def skeleton(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model without weights (on the meta device), and its tokenizer.

    Special tokens are settled as `load_base` settles them. Buffers, which no file holds, are real.

    Raises:
        UserError: transformers cannot make sense of the directory.
    """
    section = Base(name=str(folder))
    with _quiet(), _explained(section, "directory", str(folder)):
        tokenizer = open_tokenizer(str(folder))
        model = empty_model(folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = hf.GenerationConfig.from_pretrained(str(folder))
    _check_vocabulary(model, tokenizer)
    _settle_special_tokens(model, tokenizer)
    return model, tokenizer


def spoken(folder: Path) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """The tokenizer of a base's directory as `load_base` settles it, and the ids that end a text.

    Whatever the libraries raise is let through.
    """
    with _quiet():
        tokenizer = open_tokenizer(str(folder))
        settings = hf.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        generation = settings
        if (folder / "generation_config.json").is_file():
            generation = hf.GenerationConfig.from_pretrained(str(folder))
    return tokenizer, _settle_tokenizer(tokenizer, generation, settings)


def spoken_here(
    section: Base, *, revision: str | None = None, conversion: int | None = None
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]] | None:
    """The same of the base that a recipe names, where its files are here; nothing is converted.

    Args:
        revision: Commit on the Hub; default: the recipe's.
        conversion: Of a GGUF file, by number: an earlier one made a tokenizer of its own.
    """
    kind, location = located(section.name)
    if kind == "gguf":
        if conversion not in (None, CONVERSION):
            return None
        settings = gguf_settings(Path(location))
        with _quiet():
            tokenizer = gguf_tokenizer(Path(location))
        return tokenizer, _settle_tokenizer(tokenizer, settings, settings)
    folder = directory_here(section, revision=revision)
    return None if folder is None else spoken(folder)


def tokenizer_of(section: Base) -> PreTrainedTokenizerBase:
    """The tokenizer of the base that a recipe names, without its weights.

    Of a GGUF file it is the converted one's; converting takes some seconds, once.

    Raises:
        UserError: It cannot be found, fetched or read.
    """
    kind, location = located(section.name)
    if kind == "gguf":
        location, _ = _local_files(kind, location, None)
    with _quiet(), _explained(section, kind, location):
        return open_tokenizer(location, section.revision if kind == "hub" else None)


def empty_model(base: Path | Any) -> PreTrainedModel:
    """The model that a configuration describes, or a directory's `config.json`; no weights."""
    settings = base
    if isinstance(base, Path):
        settings = hf.AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    model = bare_model(settings)
    model.tie_weights()
    model.train(False)
    return model


def load_base(section: Base, *, sharded: bool = False, conversion: int | None = None) -> LoadedBase:
    """Load the base that a recipe names, ready for adapters.

    Args:
        sharded: Only this process's part of it; all processes call this at the same time.
        conversion: Of a GGUF file, by number; default: the newest.

    Raises:
        UserError: It cannot be found, fetched, read or placed; says which and what to do.
    """
    kind, location = located(section.name)
    device = compute_device(section.device)
    dtype = dtype_on(section.dtype, device)
    refuse_quantization(section)
    source: dict[str, Any] = {"name": section.name, "kind": kind, "location": location}
    folder = location
    if kind != "hub":
        folder, known_by = _local_files(kind, location, conversion)
        source |= known_by
    with _quiet(), _explained(section, kind, location):
        model, tokenizer = _load(section, folder, kind, device, dtype, sharded=sharded)
    if kind == "hub":
        source["revision"] = getattr(model.config, "_commit_hash", None) or section.revision
    if section.attention == "own" and _caps_its_scores(model):
        model.set_attn_implementation("eager")
    keep_differentiable(model)
    _check_vocabulary(model, tokenizer)
    _settle_special_tokens(model, tokenizer)
    model.requires_grad_(False)
    model.train(False)
    model.config.use_cache = model.config.get_text_config().use_cache = True
    return LoadedBase(
        model=model, tokenizer=tokenizer, device=device, dtype=dtype, folder=folder, source=source
    )


def _caps_its_scores(model: PreTrainedModel) -> bool:
    """Whether its attention has a soft cap: transformers 5.17 drops it in `sdpa`, its default."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return capped is not None and model.config._attn_implementation == "sdpa"


def _local_files(kind: Kind, location: str, conversion: int | None) -> tuple[str, dict[str, Any]]:
    """The directory to load a local base from, and what it is known by: the SHA-256 of its files,
    and how a GGUF file was converted."""
    if kind == "gguf":
        digest, conversion = _sha256([Path(location)]), conversion or CONVERSION
        folder = converted(Path(location), digest, conversion)
        return str(folder), {"sha256": digest, "conversion": conversion}
    _check_directory(Path(location))
    return location, {"sha256": _sha256(_base_files(Path(location)))}


def _load(
    section: Base,
    folder: str,
    kind: Kind,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sharded: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    settings = hf.AutoConfig.from_pretrained(
        folder, revision=section.revision or "main", trust_remote_code=False
    )
    refuse_quantized(section.name, settings.to_dict())
    tokenizer = open_tokenizer(folder, section.revision)
    if section.backend == "unsloth":
        model = unsloth_backend.load(folder, section, device=device, dtype=dtype)
        _check_complete(model, section, folder, kind)
        return model, tokenizer
    nf4 = section.quantization == "nf4"
    if kind == "hub":
        folder = str(base_files(section, revision=settings._commit_hash).folder)
    _check_shapes(Path(folder))
    load = load_shards if sharded else load_files
    model, report = load(Path(folder), settings, device, dtype, nf4=nf4)
    _check_missing(section, sorted(report["missing_keys"]))
    return model, tokenizer


def _check_complete(model: PreTrainedModel, section: Base, folder: str, kind: Kind) -> None:
    """For a loader that does not tell: whether the files have every tensor of the model."""
    if kind == "hub":
        folder = snapshot_download(folder, revision=section.revision, local_files_only=True)
    shards = Checkpoint(Path(folder)).shards.values()
    there = {info.name for infos in shards for info in infos}
    _check_missing(section, [name for name, _ in model.named_parameters() if name not in there])


def _check_missing(section: Base, missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"the weights of {section.name} lack {len(missing)} tensors, such as {missing[0]}",
            where=WHERE,
            way_out="Get the files again",
        )


def _check_shapes(folder: Path) -> None:
    """Hold the tensors of a directory against the model that its `config.json` describes.

    A layer that is rounded to NF4 takes any shape, and fails when it first computes, or never.
    """
    Layout(Checkpoint(folder), empty_model(folder))


def load_files(
    folder: Path, settings: Any, device: torch.device, dtype: torch.dtype, *, nf4: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a directory's weights, and what transformers reports of its loading.

    transformers gets the tensors and no directory: in one that an `adapter_config.json` strayed
    into, it would load the adapter as well, or the base that this one names in place of ours.
    """
    family, settings = causal_class(settings)
    options: dict[str, Any] = {}
    if device.type == "cuda" or nf4:
        options["device_map"] = {"": device}
    if nf4:
        options["quantization_config"] = nf4_settings(dtype, empty_model(settings))
    model, report = family.from_pretrained(
        None,
        config=settings,
        state_dict=_streamed(folder),
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    give_back()
    model.name_or_path = model.config._name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = hf.GenerationConfig.from_pretrained(str(folder))
    return model, report


def causal_class(settings: Any) -> tuple[Any, Any]:
    """The class that `AutoModelForCausalLM` takes for a configuration, and what it makes it from.

    Of a vision-language model that is either the whole model, which reads text without images, or
    the text model alone, from the text's part of the configuration.

    Raises:
        ValueError: There is none.
    """
    if type(settings) not in hf.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError("Unrecognized configuration class")
    family = hf.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    if family.config_class == type(settings).sub_configs.get("text_config", settings):
        settings = settings.get_text_config()
    return family, settings


def _streamed(folder: Path) -> dict[str, Any]:
    """Each tensor of a directory, to be read when it is asked for, into memory of its own.

    transformers maps all files at once, and keeps the mapping for as long as any tensor lies in
    one: of a base in NF4 the 16-bit files then stay in memory beside the 4-bit weights.
    """
    tensors: dict[str, Any] = {}
    reading = _Reading()
    for file in weight_files(folder):
        opened: Any = safe_open(folder / file, framework="pt", backend="pread")
        for name in opened.keys():  # noqa: SIM118
            tensors[name] = _Unread(opened.get_slice(name), reading)
    return tensors


class _Reading:
    """Tensors that are read one after the other, and freed in between."""

    def __init__(self) -> None:
        self._since = 0

    def begins(self, nbytes: int) -> None:
        """The next tensor has so many bytes; those before it may be free by now.

        The 4-bit weights settle between the freed 16-bit ones, so that the allocator would keep
        nearly all of those.
        """
        if self._since >= _READ_BEFORE_TRIM:
            give_back()
            self._since = 0
        self._since += nbytes


class _Unread:
    """A tensor of a file; indexing it, with whatever index, is what reads it."""

    def __init__(self, place: Any, reading: _Reading) -> None:
        self._place, self._reading = place, reading

    def __getitem__(self, index: Any) -> Any:
        self._reading.begins(2 * math.prod(self._place.get_shape()))
        return self._place[index]


def _check_directory(folder: Path) -> None:
    refuse_no_model(folder)
    if (folder / INDEX).is_file():
        weight_files(folder)


def _base_files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if f"*{file.suffix}" in PATTERNS and file.is_file()
    )


def _sha256(files: list[Path]) -> str:
    """Digest of one file's bytes, or of names and bytes of several."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def keep_differentiable(model: PreTrainedModel) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for CPU inference.

    On a CPU with AVX512-BF16 the first forward pass in eval mode would repack them for good, for a
    kernel without a backward pass: sampling candidates would silently cut the gradient of every
    later training step. Packing also rounds the scales, so the base would no longer be frozen.
    """
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose ids the embedding has no rows for.

    Special tokens may lie beyond its rows, as Gemma 3's for images do in the sizes that read none:
    no text is ever spelled with them (see `ChatFormat`), unless the template itself writes one.
    """
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    tokens: Any = tokenizer
    added = tokens.added_tokens_decoder
    beyond = {token: i for token, i in tokens.get_vocab().items() if i >= rows}
    template = str(tokens.chat_template or "")
    if any(i not in added or not added[i].special or t in template for t, i in beyond.items()):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows",
            where=WHERE,
            way_out="Model and tokenizer do not belong together",
        )


def _settle_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make tokenizer, config and generation config agree on where a text ends and what pads it."""
    eos = _settle_tokenizer(tokenizer, model.generation_config, model.config)
    tokens: Any = tokenizer
    model.generation_config = hf.GenerationConfig(
        bos_token_id=tokens.bos_token_id,
        eos_token_id=list(eos) or None,
        pad_token_id=tokens.pad_token_id,
    )
    model.config.pad_token_id = tokens.pad_token_id


def _settle_tokenizer(
    tokenizer: PreTrainedTokenizerBase, generation: Any, settings: Any
) -> tuple[int, ...]:
    """The tokenizer's part of that; the ids at which a text ends."""
    tokens: Any = tokenizer
    told = (generation, settings, settings.get_text_config())
    ends = (_ids(getattr(one, "eos_token_id", None)) for one in told)
    eos = next(filter(None, ends), ())
    if tokens.eos_token_id is None and eos:
        tokens.eos_token = tokens.convert_ids_to_tokens(eos[0])
    if tokens.eos_token_id is not None:
        eos = tuple(sorted({*eos, tokens.eos_token_id}))
    if tokens.pad_token_id is None:
        vocabulary = tokens.get_vocab()
        known = next((token for token in _PAD_TOKENS if token in vocabulary), tokens.eos_token)
        tokens.pad_token = known
    tokens.clean_up_tokenization_spaces = False  # decoding must give back what was encoded
    return eos


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


@contextlib.contextmanager
def _explained(section: Base, kind: Kind, location: str) -> Iterator[None]:
    """Turn what a library says about a base that does not load into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{section.name} does not fit into the device's memory",
            where=WHERE,
            way_out="Set base.quantization=nf4, or name a smaller base",
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"truncated or damaged weights in {_damaged_file(location)} ({_first_line(error)})",
            where=WHERE,
            way_out="Get the file again",
        ) from error
    except UserError:
        raise
    except Exception as error:  # a library meets a damaged file with whatever it trips over
        raise _explanation(error, section, kind, location) from error


def _explanation(error: Exception, section: Base, kind: Kind, location: str) -> UserError:
    def line(what: str, way_out: str | None = None) -> UserError:
        return UserError(what, where=WHERE, way_out=way_out)

    text = _first_line(error)
    if (found := of_the_hub(error, section, location)) is not None:
        return found
    if "trust_remote_code" in str(error):
        return line(f"{location} needs code from its repository, which srlm-lite does not run")
    if "does not recognize this architecture" in str(error) or "model_type" in text:
        kind_of = re.search(r"model type `([^`]+)`", str(error))
        name = f" {kind_of[1]}" if kind_of else ""
        return line(f"transformers {transformers.__version__} knows no architecture{name}")
    if "Unrecognized configuration class" in str(error):
        return line(f"{location} is not a causal language model")
    if kind == "directory" and "okenizer" in str(error):
        return line(f"{location} has no tokenizer that can be read ({text})")
    return line(f"{location} cannot be loaded ({type(error).__name__}: {text})")


def _damaged_file(location: str) -> str:
    for file in sorted(Path(location).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return str(file)
    return location
