"""The shapes of the bases that the shipped recipes name, without any file of theirs.

A base from the Hub may be gated or out of reach, yet its shape is public. With this table a recipe
can be planned, and a model of its shape built, before anything is downloaded.
"""

from __future__ import annotations

from typing import Any

from srlm_lite.errors import UserError

_LLAMA_2 = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        **_LLAMA_2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama2-70b": {
        **_LLAMA_2,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
}
"""Settings of a configuration by the name of the shape: a `LlamaConfig`, or its `model_type`."""

_NAMES = {
    "smollm2-135m-instruct": "smollm2-135m",
    "huggingfacetb/smollm2-135m-instruct": "smollm2-135m",
    "huggingfacetb/smollm2-135m": "smollm2-135m",
    "meta-llama/llama-2-7b-hf": "llama2-7b",
    "meta-llama/llama-2-7b-chat-hf": "llama2-7b",
    "meta-llama/llama-2-70b-hf": "llama2-70b",
    "meta-llama/llama-2-70b-chat-hf": "llama2-70b",
    "meta-llama/llama-3.1-8b": "llama3.1-8b",
    "meta-llama/llama-3.1-8b-instruct": "llama3.1-8b",
    "google/gemma-3-270m": "gemma3-270m",
    "google/gemma-3-270m-it": "gemma3-270m",
}


def shape_of(base_name: str) -> str | None:
    """The shape of a base by its `base.name`, or None where the table lacks it."""
    return _NAMES.get(base_name.lower())


def config_of(shape: str, *, where: str = "") -> Any:
    """A shape of the table as a configuration of transformers; no weights, no files.

    Args:
        where: What named it, for the error.

    Raises:
        UserError: The table lacks it; lists what it has.
    """
    if shape not in SHAPES:
        known = ", ".join(sorted(SHAPES))
        raise UserError(f"no such shape: {shape}", where=where, way_out=f"Known: {known}")
    from transformers import AutoConfig

    # Of two configurations made from one table, neither may change the other's.
    settings: dict[str, Any] = {
        k: dict(v) if isinstance(v, dict) else v for k, v in SHAPES[shape].items()
    }
    return AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
