"""A merged model as a GGUF file, one tensor in memory at a time.

Names of tensors, types and their rounding are the package `gguf`'s. What a family's keys are, and
what llama.cpp wants rearranged (Llama's queries and keys, Gemma's norms), is llama.cpp's word
(conversion/llama.py, conversion/gemma.py, July 2026). Every number is rounded once, from the
float32 sum of base and adapters. Nothing here is trusted: `gguf_read` holds the file against it.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from srlm_lite.errors import UserError
from srlm_lite.model.layout import Layout
from srlm_lite.model.merge import Merge, MergePlan, Weights, merged

hf_gguf: Any = gguf
Array = np.ndarray[Any, Any]

Quantize = Literal["f16", "bf16", "q8_0", "q4_k_m"]

TYPES: dict[str, Any] = {
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
"""What the package `gguf` rounds to. Of K types it can only read."""
_FILE_TYPES: dict[str, Any] = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_F32: Any = gguf.GGMLQuantizationType.F32
_WHERE = "--as gguf"
_CONVERTER = (
    "llama.cpp's own converter may take it: name its directory in SRLM_LITE_LLAMA_CPP, or export "
    "with --as merged"
)
_THREADS = 8
_ROWS = 1 << 20
"""Elements that one thread rounds at a time."""


class _WrittenFamily(NamedTuple):
    """What llama.cpp wants of a model type."""

    architecture: str
    rotated_in_pairs: bool = False
    """Queries and keys: llama.cpp turns neighbours, transformers a number and the one half a head
    further."""
    norms_from_zero: bool = False
    """The model adds 1 to the weights of its norms, llama.cpp does not."""


FAMILIES = {
    "llama": _WrittenFamily("llama", rotated_in_pairs=True),
    "mistral": _WrittenFamily("llama", rotated_in_pairs=True),
    "qwen2": _WrittenFamily("qwen2"),
    "qwen3": _WrittenFamily("qwen3"),
    "gemma2": _WrittenFamily("gemma2", norms_from_zero=True),
    "gemma3_text": _WrittenFamily("gemma3", norms_from_zero=True),
}
"""Model types whose file is proven here: written, read by other code, and by llama.cpp."""


@dataclass(frozen=True, slots=True)
class _WrittenTo:
    """One tensor of the file."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    merge: Merge | None
    """Where it is from; None: its values stand in `values`."""
    values: Array | None = None
    heads: int = 0
    """How many heads it has; in each a row and the one half a head further become neighbours."""
    shift: float = 0.0

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


class GgufFile:
    """A GGUF file in the making.

    Args:
        model: The base, on the meta device; its buffers are real.
        plan: What is merged, in float32.
        vocabulary: Keys that concern text.
        general: Keys under `general.`, as `name`.

    Raises:
        UserError: Its family, or a setting of it, is none that a file is proven for here.
    """

    def __init__(
        self,
        layout: Layout,
        model: PreTrainedModel,
        plan: MergePlan,
        quantize: str,
        *,
        vocabulary: Mapping[str, Any],
        general: Mapping[str, Any],
    ) -> None:
        self._model: Any = model
        self._family = family_of(model)
        self._quantize = quantize
        if self.architecture == "gemma2" and plan.unties:
            raise UserError(
                "Gemma 2 has one tensor for embeddings and head in a GGUF file, and an adapter on "
                "one side parts them",
                where=_WHERE,
                way_out="Export with --as merged",
            )
        rope = _rope(self._model.config)
        self._keys = {
            **{f"general.{key}": value for key, value in general.items()},
            "general.file_type": int(_FILE_TYPES[quantize]),
            "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
            **{
                f"{self.architecture}.{key}": value
                for key, value in _settings(self._model.config, rope).items()
            },
            **vocabulary,
        }
        self._places = [*self._divisors(rope), *self._placed(layout, plan)]

    @property
    def architecture(self) -> str:
        return self._family.architecture

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(place.nbytes for place in self._places)

    def size(self) -> int:
        """Size of the whole file."""
        with tempfile.TemporaryDirectory() as folder:
            head = Path(folder) / "head"
            self._begin(head).close()
            padded = (_padded(place.nbytes) for place in self._places)
            return _padded(head.stat().st_size) + sum(padded)

    def write(
        self, path: Path, weights: Weights, *, on_bytes: Callable[[int], None] = lambda count: None
    ) -> None:
        """Write the file; it is whole, or absent."""
        draft = path.with_name(f".{path.name}.tmp")
        writer = self._begin(draft)
        try:
            with ThreadPoolExecutor(min(torch.get_num_threads(), _THREADS)) as pool:
                for place in self._places:
                    writer.write_tensor_data(_rounded(place, _whole(place, weights), pool))
                    on_bytes(place.nbytes)
        finally:
            writer.close()
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)

    def write_head(self, path: Path) -> None:
        """Write what comes before the weights: enough to read what they would compute."""
        writer = self._begin(path)
        for place in self._places:
            if place.values is not None:  # they come first
                writer.write_tensor_data(place.values)
        writer.close()

    def _begin(self, path: Path) -> Any:
        logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
        writer = hf_gguf.GGUFWriter(path, self.architecture)
        for key, value in self._keys.items():
            _add(writer, key, value)
        for place in self._places:
            writer.add_tensor_info(
                place.name, place.shape, np.dtype(np.float32), place.nbytes, raw_dtype=place.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer

    def _placed(self, layout: Layout, plan: MergePlan) -> Iterator[_WrittenTo]:
        config = self._model.config
        key = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
        inside = self._model.state_dict()
        for merge in (one for merges in plan.shards.values() for one in merges):
            group = layout.group_of_file(merge.info.name)
            name = merge.info.name if group is None else group.first
            if name not in inside:  # such as frequencies, which older checkpoints have
                continue
            if name == "lm_head.weight" and config.tie_word_embeddings and not plan.unties:
                continue
            stem, _, suffix = name.rpartition(".")
            found = names.get_name(stem)
            if found is None:
                raise UserError(f"GGUF has no name for {name}", where=_WHERE, way_out=_CONVERTER)
            yield self._place(f"{found}.{suffix}", merge)

    def _place(self, name: str, merge: Merge) -> _WrittenTo:
        config, shape, heads = self._model.config, merge.info.shape, 0
        is_norm = name.endswith("norm.weight")
        if self._family.rotated_in_pairs and ".attn_q." in name:
            heads = config.num_attention_heads
        if self._family.rotated_in_pairs and ".attn_k." in name:
            heads = config.num_key_value_heads
        shift = 1.0 if is_norm and self._family.norms_from_zero else 0.0
        return _WrittenTo(name, self._kind(shape, is_norm), shape, merge, heads=heads, shift=shift)

    def _kind(self, shape: Sequence[int], is_norm: bool) -> Any:
        """llama.cpp's rules: vectors and norms stay as they are, and blocks do not cross rows."""
        if len(shape) == 1 or is_norm:
            return _F32
        kind = TYPES[self._quantize]
        return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else TYPES["f16"]

    def _divisors(self, rope: Mapping[str, Any]) -> Iterator[_WrittenTo]:
        """Llama 3.1's scaling: what each frequency is divided by."""
        if rope["rope_type"] != "llama3":
            return
        found = self._model.model.rotary_emb.inv_freq.double()
        width = 2 * len(found)
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        values = (plain / found).float().numpy()
        yield _WrittenTo("rope_freqs.weight", _F32, values.shape, None, values)


def family_of(model: Any) -> _WrittenFamily:
    """What is known of a model's family.

    Raises:
        UserError: Nothing.
    """
    if (kind := model.config.model_type) not in FAMILIES:
        raise UserError(
            f"bases of the type {kind} are not written as GGUF here; {', '.join(FAMILIES)} are",
            where=_WHERE,
            way_out=_CONVERTER,
        )
    return FAMILIES[kind]


def _rope(config: Any) -> dict[str, Any]:
    """How positions turn queries and keys, of layers that see the whole text."""
    said = config.rope_parameters
    rope: dict[str, Any] = dict(said.get("full_attention", said))
    kind = rope.setdefault("rope_type", "default")
    known = {"default", "linear", "yarn"}
    if config.model_type in ("llama", "mistral"):
        known.add("llama3")
    if (
        kind not in known
        or rope.get("partial_rotary_factor", 1.0) != 1.0
        or rope.get("attention_factor") is not None
    ):
        raise UserError(
            f"how the base scales positions ({kind}) is not written as GGUF here",
            where=_WHERE,
            way_out=_CONVERTER,
        )
    return rope


def _settings(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the architecture."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": width,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for end in ("fast", "slow"):
            if rope.get(f"beta_{end}") is not None:
                keys[f"rope.scaling.yarn_beta_{end}"] = float(rope[f"beta_{end}"])
    if config.model_type in ("gemma2", "gemma3_text"):
        keys |= _gemma(config)
    return keys


def _gemma(config: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {"attention.sliding_window": config.sliding_window}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            keys[name] = float(getattr(config, name))
    if config.model_type == "gemma3_text":
        local = config.rope_parameters["sliding_attention"]
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
        sees_all = [n for n, kind in enumerate(config.layer_types, 1) if kind == "full_attention"]
        keys["attention.sliding_window_pattern"] = (
            sees_all[0] if sees_all else len(config.layer_types) + 1
        )
    return keys


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _padded(count: int) -> int:
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    return math.ceil(count / alignment) * alignment


def _whole(place: _WrittenTo, weights: Weights) -> Array:
    """A tensor in float32, as llama.cpp wants it arranged."""
    if place.merge is None:
        assert_values: Any = place.values
        return np.asarray(assert_values)
    whole, start = torch.empty(math.prod(place.shape)), 0
    for block in merged(place.merge, weights, 0, whole.numel()):
        whole[start : start + block.numel()].copy_(block)
        start += block.numel()
    return in_pairs(whole.view(place.shape), place.heads).add_(place.shift).numpy()


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head, a row and the one half a head further made neighbours."""
    if not heads:
        return weight
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _rounded(place: _WrittenTo, values: Array, pool: ThreadPoolExecutor) -> Array:
    """The bytes of a tensor in its type."""
    if place.kind == _F32:
        return values
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _ROWS // rows.shape[1])
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    return np.concatenate(list(pool.map(lambda part: rounded(part, place.kind), parts)))


def rounded(values: Array, kind: Any) -> Array:
    """Rows in a type of GGUF.

    Raises:
        UserError: A number is too large for it.
    """
    with np.errstate(over="ignore"):
        made: Array = gguf.quants.quantize(values, kind)
    if kind == TYPES["f16"] and not np.isfinite(made).all():
        raise UserError(
            "some weights are too large for float16", where="--quantize f16", way_out="Take bf16"
        )
    return made
