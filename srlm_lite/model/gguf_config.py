"""The configuration of transformers that computes what a GGUF file describes.

Every key of the architecture is honoured, known to compute nothing, or a reason to refuse the file;
so is every tensor. What the keys mean is llama.cpp's word (src/llama-model.cpp, src/models/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import transformers

from srlm_lite.model.gguf_header import Header
from srlm_lite.model.gguf_tokenizer import Vocabulary
from srlm_lite.model.quiet import quiet

hf: Any = transformers  # only partly typed

ROPE_FREQS, ROPE_LONG, ROPE_SHORT = (
    f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short")
)
ROPE_TENSORS = frozenset({ROPE_FREQS, ROPE_LONG, ROPE_SHORT})
"""Read into the configuration; the rest of a file's tensors are weights of the model."""

_COMPUTES_NOTHING = frozenset(
    {"rope.scaling.finetuned", "tensor_data_layout", "rope.dimension_count", "vocab_size"}
)
_LLAMA3 = (8192, 1.0, 4.0)
"""Original context, and the low and the high factor, of Llama 3.1, 3.2 and 3.3."""
_SAME = 1e-4
"""Relative: two frequencies are one. In float32 a file's factors are within 1e-6."""


class _Family(NamedTuple):
    """One of llama.cpp's architectures, as a model of transformers."""

    model_type: str
    own: Callable[[Header], dict[str, Any]]
    """What it adds to the settings that all have, or sets otherwise."""


def refuse_unserved(header: Header) -> None:
    """Refuse files whose weights are of no model served here.

    Raises:
        UserError: Says of which, and which are.
    """
    if header.architecture not in _FAMILIES:
        raise header.refusal(
            f"files of the architecture {header.architecture} are not served",
            "Served are " + ", ".join(sorted(_FAMILIES)),
        )
    if header.fields.get("general.type", "model") != "model":
        raise header.refusal(f"it holds no model, but: {header.fields['general.type']}")
    if header.fields.get("split.count", 1) > 1:
        raise header.refusal(
            f"it is one part of {header.fields['split.count']}",
            "Put the parts together with llama-gguf-split --merge",
        )


def read_settings(header: Header, vocabulary: Vocabulary) -> Any:
    """The configuration of the model in a file.

    Raises:
        UserError: It has a key that cannot be made right.
    """
    family = _FAMILIES[header.architecture]
    values = {**_common(header, vocabulary), **family.own(header)}
    if "rope_parameters" not in values:
        values["rope_parameters"] = _rope(header, values["head_dim"])
    _refuse_unknown(header)
    with quiet():
        return hf.AutoConfig.for_model(family.model_type, **values)


def _common(header: Header, vocabulary: Vocabulary) -> dict[str, Any]:
    heads, width = header.need("attention.head_count"), header.need("embedding_length")
    key_width = header.get("attention.key_length", width // heads)
    if header.get("attention.value_length", key_width) != key_width:
        raise header.refusal("its keys and values differ in width")
    ends = vocabulary.ends
    return {
        "vocab_size": header.tensors["token_embd.weight"].shape[0]
        if "token_embd.weight" in header.tensors
        else len(vocabulary.pieces),
        "hidden_size": width,
        "intermediate_size": header.need("feed_forward_length"),
        "num_hidden_layers": header.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": max(_kv_heads(header)),
        "head_dim": key_width,
        "max_position_embeddings": header.need("context_length"),
        "rms_norm_eps": header.need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": vocabulary.special_id("bos"),
        "eos_token_id": (ends[0] if len(ends) == 1 else ends) or None,
        "pad_token_id": vocabulary.special_id("padding"),
    }


def _kv_heads(header: Header) -> list[int]:
    """Key-value heads of every layer; 0: the layer has no attention.

    Raises:
        UserError: Layers with attention differ in them.
    """
    key = f"{header.architecture}.attention.head_count_kv"
    said = header.fields.get(key)
    if not isinstance(said, list) or header.architecture not in _WITHOUT_ATTENTION:
        return [header.need("attention.head_count_kv")]
    header.asked.add(key)
    if len(set(said) - {0}) != 1:
        raise header.refusal(f"{key} differs between layers of attention")
    return said


def _refuse_unknown(header: Header) -> None:
    start = f"{header.architecture}."
    known = header.asked | {start + name for name in _COMPUTES_NOTHING}
    for key, value in header.fields.items():
        # Experts of a dense model, a scale by 1.
        off = not value or (isinstance(value, float) and value == 1.0)
        if key.startswith(start) and key not in known and not off:
            raise header.refusal(f"nothing is known here of its key {key}")
    if header.get("attention.causal", True) is False:
        raise header.refusal("its attention is not causal")


def unread_tensors(header: Header, read: Iterable[str]) -> list[str]:
    """Tensors of the file that the model has no place for, given those that it has.

    Experts are parameters of their own there, whose names do not end in `.weight`.
    """
    places = {*read, *(f"{name}.weight" for name in read)}
    return sorted(header.tensors.keys() - places - ROPE_TENSORS)


def _rope(header: Header, width: int, *, partial: bool = False) -> dict[str, Any]:
    """How positions turn queries and keys of a width, as `rope_parameters`."""
    turned = header.get("rope.dimension_count", width)
    if turned != width and not partial:
        raise header.refusal(f"it turns {turned} of {width} dimensions")
    theta = {"rope_theta": float(header.get("rope.freq_base", 10000.0))}
    if turned != width:
        theta["partial_rotary_factor"] = turned / width
    factor = float(header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0)
    kind = header.get("rope.scaling.type", "linear")
    original = header.get("rope.scaling.original_context_length", header.need("context_length"))
    strength = float(header.get("rope.scaling.attn_factor", 1.0))
    fast, slow = (header.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow"))
    scaled = factor != 1.0 and kind != "none"
    longrope = ROPE_LONG in header.tensors or ROPE_SHORT in header.tensors
    if longrope or kind == "longrope":
        if scaled or not {ROPE_LONG, ROPE_SHORT} <= header.tensors.keys():
            raise header.refusal("its longrope lacks factors, or scales twice")
        longer = header.need("context_length") / original
        return {
            **theta,
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "factor": longer,
            "long_factor": header.vector(ROPE_LONG).tolist(),
            "short_factor": header.vector(ROPE_SHORT).tolist(),
            "attention_factor": strength,
        }
    if ROPE_FREQS in header.tensors:
        if scaled or strength != 1.0:
            raise header.refusal(f"it scales positions twice: {ROPE_FREQS} and rope.scaling")
        return {**theta, **_divided(header, theta["rope_theta"], turned)}
    if scaled and kind == "yarn":
        beta = {"beta_fast": fast, "beta_slow": slow}
        own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return {
            **theta,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **({"attention_factor": strength * own} if strength != 1.0 else {}),
            **{name: float(value) for name, value in beta.items() if value is not None},
        }
    if strength != 1.0:
        raise header.refusal(f"it has rope.scaling.attn_factor {strength:g} without yarn")
    if scaled and kind == "linear":
        return {**theta, "rope_type": "linear", "factor": factor}
    if scaled:
        raise header.refusal(f"its rope.scaling.type is {kind}")
    return {**theta, "rope_type": "default"}


def _divided(header: Header, theta: float, turned: int) -> dict[str, Any]:
    """What divides each frequency by the file's own number, as Llama 3.1's scaling.

    That divides long wavelengths by a factor, leaves short ones, and goes from one to the other in
    between, linearly in the number of turns within the original context.
    """
    divisors = header.vector(ROPE_FREQS).astype(np.float64)
    steps = np.arange(0, turned, 2) / turned
    if divisors.shape != steps.shape:
        raise header.refusal(f"{ROPE_FREQS} has {divisors.size} numbers for {steps.size} pairs")
    if np.ptp(divisors) <= _SAME * divisors[0]:
        return {"rope_type": "linear", "factor": float(divisors[0])}
    wavelengths = 2 * np.pi * theta**steps
    factor = float(divisors.max())
    shares = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    for context, low, high in (_LLAMA3, _fitted(shares, 1 / wavelengths)):
        share = np.clip((context / wavelengths - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - share) / factor + share), divisors, rtol=_SAME, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise header.refusal(f"{ROPE_FREQS} does not follow Llama 3.1's scaling of frequencies")


def _fitted(
    shares: np.ndarray[Any, Any], frequencies: np.ndarray[Any, Any]
) -> tuple[int, float, float]:
    """Original context, low and high factor of Llama 3.1's scaling, from what of each frequency is
    left undivided. Only their ratios count: the low one is 1."""
    between = (shares > _SAME) & (shares < 1 - _SAME)
    if between.sum() < 2:
        return _LLAMA3
    slope, start = np.polyfit(frequencies[between], shares[between], 1)
    return round(-slope / start), 1.0, 1.0 - 1.0 / float(start)


def _llama(header: Header) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }


def _nothing(header: Header) -> dict[str, Any]:
    return {}


def _experts(header: Header) -> dict[str, Any]:
    return {
        "num_experts": header.need("expert_count"),
        "num_experts_per_tok": header.need("expert_used_count"),
        "moe_intermediate_size": header.need("expert_feed_forward_length"),
    }


def _qwen2_experts(header: Header) -> dict[str, Any]:
    shared = header.need("expert_shared_feed_forward_length")
    return {**_experts(header), "shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3_experts(header: Header) -> dict[str, Any]:
    return {**_experts(header), "norm_topk_prob": True}


def _gemma2(header: Header) -> dict[str, Any]:
    return {
        **_gemma_scale(header, layers_of_27b=46),
        **_windows(header, pattern=2, default=4096),
        "attn_logit_softcapping": header.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.get("final_logit_softcapping", 30.0),
    }


def _gemma3(header: Header) -> dict[str, Any]:
    local = float(header.get("rope.freq_base_swa", 10000.0))
    return {
        **_gemma_scale(header, layers_of_27b=62),
        **_windows(header, pattern=6, default=0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": header.get("final_logit_softcapping") or None,
        "rope_parameters": {
            # The scaling is of layers that see the whole text.
            "full_attention": _rope(header, header.need("attention.key_length")),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _gemma_scale(header: Header, *, layers_of_27b: int) -> dict[str, Any]:
    """No key has it: llama.cpp knows the models of 27B by their layers."""
    width, heads = header.need("embedding_length"), header.need("attention.head_count")
    by_heads = header.need("block_count") == layers_of_27b
    return {
        "query_pre_attn_scalar": width // heads
        if by_heads
        else header.get("attention.key_length", width // heads)
    }


def _windows(header: Header, *, pattern: int, default: int) -> dict[str, Any]:
    """Which layers see a window: all but every `pattern`-th."""
    layers, window = header.need("block_count"), header.get("attention.sliding_window", default)
    key = f"{header.architecture}.attention.sliding_window_pattern"
    header.asked.add(key)
    said = header.fields.get(key, pattern)
    slides = said if isinstance(said, list) else [(n + 1) % said != 0 for n in range(layers)]
    if len(slides) != layers:
        raise header.refusal(f"{key} names {len(slides)} layers of {layers}")
    kinds = ["sliding_attention" if window and one else "full_attention" for one in slides]
    # transformers makes a mask of the window even where no layer sees one.
    return {"sliding_window": window or header.need("context_length"), "layer_types": kinds}


def _phi3(header: Header) -> dict[str, Any]:
    width = header.get(
        "attention.key_length",
        header.need("embedding_length") // header.need("attention.head_count"),
    )
    return {
        "rope_parameters": _rope(header, width, partial=True),
        "original_max_position_embeddings": header.get(
            "rope.scaling.original_context_length", header.need("context_length")
        ),
        "sliding_window": header.get("attention.sliding_window") or None,
    }


def _lfm2(header: Header) -> dict[str, Any]:
    kinds = ["full_attention" if heads else "conv" for heads in _kv_heads(header)]
    if len(kinds) != header.need("block_count"):
        raise header.refusal(f"{header.architecture}.attention.head_count_kv misses layers")
    return {
        "norm_eps": header.need("attention.layer_norm_rms_epsilon"),
        "layer_types": kinds,
        "conv_L_cache": header.need("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,  # the file's width is the adjusted one
    }


def _qwen35(header: Header) -> dict[str, Any]:
    width, layers = header.need("attention.key_length"), header.need("block_count")
    sections = f"{header.architecture}.rope.dimension_sections"
    header.asked.add(sections)
    extra = header.get("nextn_predict_layers", 0)  # blocks that predict further, left out
    values, every = header.need("ssm.time_step_rank"), header.need("full_attention_interval")
    return {
        "num_hidden_layers": layers - extra,
        "layer_types": [
            "linear_attention" if (n + 1) % every else "full_attention"
            for n in range(layers - extra)
        ],
        "linear_conv_kernel_dim": header.need("ssm.conv_kernel"),
        "linear_key_head_dim": header.need("ssm.state_size"),
        "linear_num_key_heads": header.need("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": header.need("ssm.inner_size") // values,
        "rope_parameters": {
            **_rope(header, width, partial=True),
            "mrope_section": [one for one in header.fields.get(sections, []) if one],
            "mrope_interleaved": True,
        },
    }


_WITHOUT_ATTENTION = {"lfm2"}
"""Architectures some of whose layers have none."""
_FAMILIES = {
    "llama": _Family("llama", _llama),
    "qwen2": _Family("qwen2", _nothing),
    "qwen2moe": _Family("qwen2_moe", _qwen2_experts),
    "qwen35": _Family("qwen3_5_text", _qwen35),
    "qwen3": _Family("qwen3", _nothing),
    "qwen3moe": _Family("qwen3_moe", _qwen3_experts),
    "gemma2": _Family("gemma2", _gemma2),
    "gemma3": _Family("gemma3_text", _gemma3),
    "lfm2": _Family("lfm2", _lfm2),
    "phi3": _Family("phi3", _phi3),
}
