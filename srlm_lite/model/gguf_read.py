"""A GGUF file as transformers' model of it, tensor by tensor: what an export is held against.

Settings and tokens are read as those of a base are (`gguf_config`, `gguf_tokenizer`); types are
expanded by the package `gguf`, and tensors rearranged by transformers' own rules. None of it is
code that writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils

from srlm_lite.errors import ProofError
from srlm_lite.model.base import empty_model
from srlm_lite.model.gguf_config import read_settings, refuse_unserved, unread_tensors
from srlm_lite.model.gguf_header import Header, read_header
from srlm_lite.model.gguf_tokenizer import build_tokenizer, read_vocabulary
from srlm_lite.model.gguf_write import TYPES, rounded
from srlm_lite.model.parity import is_further
from srlm_lite.model.stack import Adapter

hf_gguf: Any = modeling_gguf_pytorch_utils

_COMPUTES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *(
        "hidden_act",
        "hidden_activation",
        "attention_bias",
        "mlp_bias",
        "use_bidirectional_attention",
    ),
    *("sliding_window", "layer_types", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
"""Settings that decide what a model of these families computes, frequencies apart."""
_SAME = 2e-4
"""Relative: two numbers are one. A file has them in float32."""
_F32: Any = gguf.GGMLQuantizationType.F32
_ORDERED: dict[Any, float] = {
    _F32: 1e-4,
    gguf.GGMLQuantizationType.F16: 1e-4,
    gguf.GGMLQuantizationType.BF16: 4e-4,
    gguf.GGMLQuantizationType.Q8_0: 5e-4,
}
"""How far a right tensor may be from its rounded sum, as a share of its norm: sums in another order
move a few numbers over to the next step of the type. Gemma's norms lose digits to the 1 in them."""
_ROUNDED: set[Any] = set(TYPES.values())
_OTHER_TYPES = 0.25
"""The same for types of few bits, from the sum itself: 4 bits move a tensor by .08."""


def readable(file: Path) -> bool:
    """Whether the file is of an architecture that is read here."""
    try:
        refuse_unserved(read_header(file))
    except Exception:
        return False
    return True


def main_type(file: Path) -> str:
    """The type that most bytes of a file's tensors have, by GGUF's name: `Q4_K`."""
    sizes: dict[int, int] = {}
    for one in read_header(file).tensors.values():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(one.ggml_type)]
        count = math.prod(one.shape) // block * size
        sizes[one.ggml_type] = sizes.get(one.ggml_type, 0) + count
    return str(gguf.GGMLQuantizationType(max(sizes, key=lambda kind: sizes[kind])).name)


class GgufModel:
    """A file, read as transformers computes it.

    Raises:
        UserError: It cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._header: Header = read_header(file)
        refuse_unserved(self._header)
        vocabulary = read_vocabulary(self._header)
        self.model: PreTrainedModel = empty_model(read_settings(self._header, vocabulary))
        self.tokenizer = build_tokenizer(vocabulary)
        self.ends: list[int] = vocabulary.ends
        """Every id that the file says a reply ends with."""
        self.template: str = self._header.fields.get("tokenizer.chat_template", "")
        config = self.model.config.to_dict()
        processor = hf_gguf.TENSOR_PROCESSORS.get(
            self._header.architecture, hf_gguf.TensorProcessor
        )
        self._processor = processor(config=config)
        self._names = {
            name: place
            for place, name in hf_gguf.get_gguf_hf_weights_map(self.model, self._processor).items()
            if place in self._header.tensors
        }
        if unread := unread_tensors(self._header, self._names.values()):
            raise self._header.refusal(f"nothing reads its tensor {unread[0]}")

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters that the file has."""
        return list(self._names)

    def read(self, name: str) -> Tensor:
        """One parameter, in float32; KeyError where the file does not have it."""
        place = self._names[name]
        info = self._header.tensors[place]
        kind = gguf.GGMLQuantizationType(info.ggml_type)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        row = info.shape[-1] // block * size
        raw = np.memmap(self._file, np.uint8, "r", info.offset, (math.prod(info.shape[:-1]), row))
        values = gguf.quants.dequantize(raw, kind).reshape(info.shape)
        made = self._processor.process(weights=values, name=place, tensor_key_mapping={})
        return torch.from_numpy(np.array(made.weights, dtype=np.float32))

    def type_of(self, name: str) -> Any:
        """The type that the file has a parameter in."""
        return gguf.GGMLQuantizationType(self._header.tensors[self._names[name]].ggml_type)

    def other_settings(self, base: PreTrainedModel, *, unties: bool) -> list[str]:
        """Settings by which the file computes otherwise than the base, each with both values."""
        ours: Any = base.config.get_text_config(decoder=True)
        theirs: Any = self.model.config
        apart = [
            f"{key} {_value(theirs, key)} for {_value(ours, key)}"
            for key in _COMPUTES
            if not _same(_value(ours, key), _value(theirs, key))
        ]
        if bool(ours.tie_word_embeddings and not unties) != bool(theirs.tie_word_embeddings):
            apart.append("tied embeddings")
        return apart + self._other_frequencies(base)

    def _other_frequencies(self, base: PreTrainedModel) -> list[str]:
        ours, theirs = ({**dict(model.named_buffers())} for model in (base, self.model))
        found = []
        for name, buffer in ours.items():
            if not name.endswith("inv_freq"):
                continue
            other = theirs.get(name)
            if other is None or not torch.allclose(buffer, other, rtol=_SAME, atol=0):
                found.append(f"frequencies of positions ({name})")
        strengths = [_strength(model) for model in (base, self.model)]
        if not _same(*strengths):
            found.append("strength of attention")
        return found


def _strength(model: Any) -> float:
    """What YaRN multiplies attention with."""
    return float(getattr(getattr(model.model, "rotary_emb", None), "attention_scaling", 1.0))


def _value(config: Any, key: str) -> Any:
    """A setting, where not to have it is the same as what computes nothing."""
    value = getattr(config, key, None) or None
    kinds = getattr(config, "layer_types", None) or []
    slides = any(kind == "sliding_attention" for kind in kinds)
    if key == "layer_types" and not slides:
        return None
    if key == "sliding_window" and kinds and not slides:
        return None
    return value


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float | int):
        return math.isclose(ours, theirs, rel_tol=_SAME)
    return bool(ours == theirs)


class GgufCheck:
    """Holds every parameter of a file against W + sum of s·B·A, rounded, while the base is read.

    The sum is taken apart from the merge; a type that `gguf` can round to is rounded by it, row by
    row, and has to be what the file has. Of other types only the distance can be told.
    """

    def __init__(self, export: GgufModel, stack: Sequence[Adapter], *, exact: bool) -> None:
        """
        Args:
            exact: Each number was rounded once. llama-quantize rounds what `f16` has left, and has
                roundings of its own.
        """
        self._export, self._stack = export, stack
        self._rounded = _ROUNDED if exact else set()
        self._allowed = _ORDERED if exact else {_F32: _ORDERED[_F32]}
        self._left = dict.fromkeys(export.parameters)
        self.worst, self.error = "", -1.0
        """The parameter furthest from what it should be, and how far, as a share of its norm."""
        self.tolerance = 1.0
        """How far that one may be, by its type."""
        self.right = True
        """Whether all are as near as they may be."""
        tied = export.model.all_tied_weights_keys
        named = dict(export.model.named_parameters(remove_duplicate=False))
        if missing := named.keys() - self._left.keys() - tied.keys():
            raise ProofError(f"the written file lacks {min(missing)}")

    def reading(self, read: Any) -> Any:
        """The same reader of the base, with each parameter checked when it is first read."""

        def checked(name: str) -> Tensor:
            weight: Tensor = read(name)
            if name in self._left:
                del self._left[name]
                self._check(name, weight)
            return weight

        return checked

    def rest(self, read: Any, held_as: Any) -> None:
        """Check what the model has not asked for."""
        for name in list(self._left):
            self._check(name, read(held_as(name)))

    def _check(self, name: str, weight: Tensor) -> None:
        found, kind = self._export.read(name), self._export.type_of(name)
        module = name.removesuffix(".weight")
        squares, norm = 0.0, 1e-30
        if found.shape != weight.shape:
            self._note(name, kind, math.inf)
            return
        rows = max(1, (1 << 20) // weight.shape[-1])
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            right = weight[part].to(torch.float32, copy=True)
            for adapter in self._stack:
                if module in adapter.factors:
                    a, b = adapter.factors[module]
                    right += adapter.scaling * (b[part] @ a)
            if kind in self._rounded:
                made = gguf.quants.dequantize(rounded(right.numpy(), kind), kind)
                right = torch.from_numpy(np.array(made, dtype=np.float32)).view(right.shape)
            squares += float((found[part] - right).square().sum())
            norm += float(right.square().sum())
        self._note(name, kind, math.sqrt(squares / norm))

    def _note(self, name: str, kind: Any, apart: float) -> None:
        allowed = self._allowed.get(kind, _OTHER_TYPES)
        self.right &= apart <= allowed
        if is_further(apart / allowed, self.error / self.tolerance):
            self.worst, self.error, self.tolerance = name, apart, allowed
