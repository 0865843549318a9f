"""Tiny random bases of today's model families, for tests; made by this module alone.

Each has the settings by which its family differs from Llama, two layers, random weights of bf16 as
published checkpoints have, and the toy base's tokenizer of whole words. They write noise in
milliseconds: for tests of what is loaded, trained, sampled and exported, not of quality.

What a run of each ends in stands here as well. `test_families.py` holds every run to it, and
`docs/bases.md` is written from it.

    python tests/families.py FOLDER [NAME...]    builds bases there
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_VOCABULARY = 140
"""Ids of the toy base's tokenizer."""

_ENDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
_TEXT: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    **_ENDS,
}
_WINDOW = 24
"""Positions: shorter than every sequence of a test, so that windows bind."""

_GRANITE = {
    "logits_scaling": 8.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.75,
    "attention_multiplier": 0.0625,
    "tie_word_embeddings": False,
}
_MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SLIDING = {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


TREE = "tree"
PLAIN = "plain `generate`"
ALIKE = "plain `generate`, prompts of equal length together"
MERGED = "merged"
ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Family:
    """How to build its tiny base, what it stands for, and what a run on it ends in.

    `config` is a class of transformers, `settings` what differs from Llama's shape; with `vision`
    they are of the text model within a checkpoint of text and images. `targets` are the layers
    that its run adapts.
    """

    config: str
    stands_for: str
    targets: tuple[str, ...] = _DENSE
    settings: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    outer: dict[str, Any] = field(default_factory=dict)
    sampled: str = TREE
    exports: tuple[str, ...] = (MERGED, ADAPTER)
    experts: bool = False
    """Whether experts lie fused in memory: they stay in 16 bits, and carry no adapter."""
    refused: str = ""
    """What the one line says that a run ends in before its anchor; empty where it runs."""


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "Llama 2, Llama 3.1 8B, Yi, TinyLlama"),
    "llama_tied": Family(
        "LlamaConfig", "Llama 3.2 1B and 3B, SmolLM2", settings={"tie_word_embeddings": True}
    ),
    "mistral": Family(
        "MistralConfig", "Mistral 7B v0.1, Zephyr", settings={"sliding_window": _WINDOW}
    ),
    "qwen2": Family("Qwen2Config", "Qwen2.5, Qwen2", settings={"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", "Qwen3 0.6B to 32B", settings={"tie_word_embeddings": True}),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "Qwen3-Next 80B-A3B",
        _ATTENTION,
        settings={**_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": 32},
        sampled=PLAIN,
        experts=True,
    ),
    "qwen3_5": Family(
        "Qwen3_5TextConfig",
        "Qwen3.5's text model alone",
        settings=_LINEAR_ATTENTION,
        sampled=PLAIN,
    ),
    "qwen3_5_vl": Family(
        "Qwen3_5Config",
        "Qwen3.5 and 3.6 dense, as published",
        settings={
            **_LINEAR_ATTENTION,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 0.5,
            },
        },
        vision={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "temporal_patch_size": 1,
            "spatial_merge_size": 1,
            "num_position_embeddings": 16,
        },
        outer={
            "image_token_id": 139,
            "video_token_id": 138,
            "vision_start_token_id": 137,
            "vision_end_token_id": 136,
        },
        sampled=PLAIN,
    ),
    "gemma": Family("GemmaConfig", "Gemma 1", settings={"tie_word_embeddings": True}),
    "gemma2": Family("Gemma2Config", "Gemma 2", settings={"query_pre_attn_scalar": 16, **_SLIDING}),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        "Gemma 3 270M and 1B",
        settings={"query_pre_attn_scalar": 16, **_SLIDING},
    ),
    "gemma3": Family(
        "Gemma3Config",
        "Gemma 3 4B, 12B and 27B, as published",
        settings={"query_pre_attn_scalar": 16, **_SLIDING},
        vision={**_VISION, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        outer={
            "mm_tokens_per_image": 4,
            "image_token_index": 139,
            "boi_token_index": 138,
            "eoi_token_index": 137,
        },
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig",
        "Gemma 4's text model alone",
        settings={
            **_SLIDING,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": _VOCABULARY,
            "hidden_size_per_layer_input": 16,
        },
    ),
    "phi3": Family(
        "Phi3Config",
        "Phi-3, Phi-3.5 mini, Phi-4",
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "phi": Family(
        "PhiConfig",
        "Phi-1.5, Phi-2",
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        settings={"partial_rotary_factor": 0.5},
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        "Pythia, GPT-NeoX",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        settings={"rotary_pct": 0.25},
    ),
    "gpt2": Family(
        "GPT2Config",
        "GPT-2",
        ("c_attn", "c_proj", "c_fc"),
        settings={"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    ),
    "gptj": Family(
        "GPTJConfig",
        "GPT-J 6B",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        settings={"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
        sampled=PLAIN,
    ),
    "opt": Family(
        "OPTConfig",
        "OPT",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        settings={"ffn_dim": 96, "word_embed_proj_dim": 64},
        sampled=PLAIN,
    ),
    "bloom": Family(
        "BloomConfig",
        "BLOOM",
        ("query_key_value", "dense_h_to_4h"),
        settings={"n_layer": 2, "n_head": 4},
        sampled=PLAIN,
    ),
    "falcon": Family(
        "FalconConfig",
        "Falcon 7B",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        settings={"alibi": False, "multi_query": True},
        sampled=PLAIN,
    ),
    "stablelm": Family("StableLmConfig", "StableLM 2", settings={"partial_rotary_factor": 0.25}),
    "starcoder2": Family(
        "Starcoder2Config",
        "StarCoder2",
        (*_ATTENTION, "c_fc", "c_proj"),
        settings={"sliding_window": _WINDOW},
    ),
    "nemotron": Family(
        "NemotronConfig", "Nemotron 4, Minitron", (*_ATTENTION, "up_proj", "down_proj")
    ),
    "olmo2": Family("Olmo2Config", "OLMo 2"),
    "olmo3": Family("Olmo3Config", "OLMo 3", settings=_SLIDING),
    "olmoe": Family(
        "OlmoeConfig",
        "OLMoE",
        _ATTENTION,
        settings={"num_experts": 4, "num_experts_per_tok": 2},
        experts=True,
    ),
    "granite": Family("GraniteConfig", "Granite 3 dense", settings=_GRANITE),
    "granitemoe": Family(
        "GraniteMoeConfig",
        "Granite 3 MoE",
        _ATTENTION,
        settings={**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
        experts=True,
    ),
    "granitehybrid": Family(
        "GraniteMoeHybridConfig",
        "Granite 4 H dense",
        (*_ATTENTION, "in_proj", "input_linear", "output_linear"),
        settings={
            **_GRANITE,
            **_MAMBA_2,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 96,
            "layer_types": ["mamba", "attention"],
        },
        sampled=PLAIN,
    ),
    "granitehybrid_moe": Family(
        "GraniteMoeHybridConfig",
        "Granite 4 H Tiny and Small",
        (*_ATTENTION, "in_proj"),
        settings={
            **_GRANITE,
            **_MAMBA_2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 96,
            "layer_types": ["mamba", "attention"],
        },
        sampled=PLAIN,
        experts=True,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "Qwen1.5-MoE A2.7B, Qwen2 57B-A14B",
        _ATTENTION,
        settings={**_EXPERTS, "shared_expert_intermediate_size": 48},
        experts=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3 30B-A3B and 235B-A22B",
        _ATTENTION,
        settings=_EXPERTS,
        experts=True,
    ),
    "mixtral": Family(
        "MixtralConfig",
        "Mixtral 8x7B",
        _ATTENTION,
        settings={"num_local_experts": 4, "num_experts_per_tok": 2},
        experts=True,
    ),
    "phimoe": Family(
        "PhimoeConfig",
        "Phi-3.5 MoE",
        _ATTENTION,
        settings={"num_local_experts": 4, "num_experts_per_tok": 2},
        experts=True,
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "DeepSeek-V2 Lite",
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        settings=_DEEPSEEK,
        sampled=PLAIN,
        experts=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepSeek-V3 and R1, from 16 bits; Moonlight",
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        settings=_DEEPSEEK,
        sampled=PLAIN,
        experts=True,
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "gpt-oss 20B and 120B, from 16 bits",
        _ATTENTION,
        settings={**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        experts=True,
    ),
    "glm4": Family(
        "Glm4Config", "GLM-4 9B and 32B 0414", (*_ATTENTION, "gate_up_proj", "down_proj")
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        "GLM-4.5 and 4.6",
        _ATTENTION,
        settings={
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": True,
        },
        experts=True,
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig",
        "GLM-4.7 Flash",
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        settings=_DEEPSEEK,
        sampled=PLAIN,
        experts=True,
    ),
    "dots1": Family(
        "Dots1Config",
        "dots.llm1",
        _ATTENTION,
        settings={
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        experts=True,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeTextConfig",
        "Qwen3.5 35B-A3B's text model alone",
        _ATTENTION,
        settings={**_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": 32},
        sampled=PLAIN,
        experts=True,
    ),
    "minimax": Family(
        "MiniMaxConfig",
        "MiniMax-Text-01",
        _ATTENTION,
        settings={
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        sampled=ALIKE,
        experts=True,
    ),
    "ernie4_5": Family("Ernie4_5Config", "ERNIE 4.5 0.3B", settings={"tie_word_embeddings": True}),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig",
        "ERNIE 4.5 21B-A3B",
        _ATTENTION,
        settings={
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
        experts=True,
    ),
    "arcee": Family("ArceeConfig", "AFM 4.5B", (*_ATTENTION, "up_proj", "down_proj")),
    "apertus": Family("ApertusConfig", "Apertus 8B", (*_ATTENTION, "up_proj", "down_proj")),
    "hunyuan": Family("HunYuanDenseV1Config", "Hunyuan 0.5B to 7B"),
    "ministral3": Family("Ministral3Config", "Ministral 3's text model alone"),
    "seed_oss": Family("SeedOssConfig", "Seed-OSS 36B"),
    "exaone4": Family("Exaone4Config", "EXAONE 4", settings=_SLIDING),
    "smollm3": Family(
        "SmolLM3Config",
        "SmolLM3 3B",
        settings={"tie_word_embeddings": True, "no_rope_layers": [1, 0]},
    ),
    "minicpm3": Family(
        "MiniCPM3Config",
        "MiniCPM3 4B",
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *_DENSE[4:]),
        settings={
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "dim_model_base": 16,
            "tie_word_embeddings": False,
            "scale_emb": 2,
            "scale_depth": 2.8,
        },
        sampled=PLAIN,
    ),
    "cohere": Family("CohereConfig", "Command R, Aya 23", settings={"logit_scale": 0.0625}),
    "cohere2": Family(
        "Cohere2Config",
        "Command R7B, Command A",
        settings={"logit_scale": 0.25, **_SLIDING},
    ),
    "falcon_h1": Family(
        "FalconH1Config",
        "Falcon-H1",
        (*_DENSE, "in_proj"),
        settings={
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 1,
            "mamba_chunk_size": 16,
            "lm_head_multiplier": 0.0390625,
            "embedding_multiplier": 5.5,
        },
        sampled=PLAIN,
    ),
    "lfm2": Family(
        "Lfm2Config",
        "LFM2 350M to 2.6B",
        ("q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3"),
        settings={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        sampled=PLAIN,
    ),
    "mamba": Family(
        "MambaConfig",
        "Mamba 130M to 2.8B",
        ("in_proj",),
        settings={"state_size": 8},
        sampled=PLAIN,
    ),
    "mamba2": Family(
        "Mamba2Config",
        "Mamba 2",
        ("in_proj",),
        settings={
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 16,
        },
        sampled=PLAIN,
    ),
    "bamba": Family(
        "BambaConfig",
        "Bamba 9B",
        (*_DENSE, "in_proj"),
        settings={**_MAMBA_2, "attn_layer_indices": [1]},
        sampled=PLAIN,
    ),
    "jamba": Family(
        "JambaConfig",
        "Jamba",
        (*_ATTENTION, "in_proj", "x_proj"),
        settings={
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        sampled=PLAIN,
        experts=True,
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        "Nemotron-H, Nemotron Nano 2",
        (*_ATTENTION, "in_proj", "up_proj", "down_proj"),
        settings={
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 16,
            "layer_types": ["linear_attention", "full_attention", "mlp"],
            "num_hidden_layers": 3,
        },
        sampled=PLAIN,
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaConfig",
        "RecurrentGemma 2B and 9B",
        (*_DENSE, "linear_x", "linear_y", "linear_out"),
        settings={
            "lru_width": 64,
            "attention_window_size": _WINDOW,
            "block_types": ["recurrent", "attention"],
        },
        sampled=ALIKE,
    ),
}


QUANTIZED = {"gpt_oss": "mxfp4", "deepseek_v3": "fp8"}
"""Families whose published files hold weights in few bits, and how."""


def build_family(name: str, folder: Path, tokenizer: Any = None) -> Path:
    """The folder of its tiny base below this one, built unless it is there.

    Several processes may ask at once: each builds aside, and the first to finish gives it its name.

    Args:
        tokenizer: In place of the toy base's, with a chat template; for a folder of its own.
    """
    path = folder / name
    if path.is_dir():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        _build(FAMILIES[name], aside, tokenizer)
        aside.chmod(0o755)  # a temporary folder is closed to others
        aside.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _build(family: Family, folder: Path, tokenizer: Any) -> None:
    import torch
    import transformers

    from srlm_lite.shipped import recipes_dir

    torch.manual_seed(0)
    hf: Any = transformers
    config = _config(family, hf)
    if tokenizer is None and config.model_type == "qwen2":
        tokenizer = _qwen2_tokenizer(hf)
    if tokenizer is None:
        ends = _ENDS
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(recipes_dir() / "toy" / "base" / file, folder / file)
    else:
        ends = {key: getattr(tokenizer, key) for key in _ENDS}
        config.get_text_config().vocab_size = len(tokenizer)
        for part in (config, config.get_text_config()):
            for key, token_id in ends.items():
                setattr(part, key, token_id)
        tokenizer.save_pretrained(folder)
    kind = hf.AutoModelForImageTextToText if family.vision else hf.AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    _draw(model)
    model.generation_config = hf.GenerationConfig(**ends)
    model.to(torch.bfloat16).save_pretrained(folder)


def _qwen2_tokenizer(hf: Any) -> Any:
    """Qwen's way of cutting, with tokens of the toy data: transformers opens no other beside this
    model type."""
    from tokenizers import pre_tokenizers, trainers

    from srlm_lite.shipped import recipes_dir

    toy = recipes_dir() / "toy"
    tokenizer = hf.Qwen2Tokenizer()
    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (toy / "data" / "eft_train.jsonl").read_text(encoding="utf-8").splitlines()
    trained = tokenizer.backend_tokenizer
    trained.train_from_iterator(texts, trainer)
    pad, unk, bos, eos, *marks = special
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token=pad,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=marks,
        chat_template=(toy / "base" / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def _config(family: Family, hf: Any) -> Any:
    settings = {**_TEXT, **family.settings}
    if family.vision:
        return getattr(hf, family.config)(
            text_config=settings, vision_config=family.vision, **family.outer, **_ENDS
        )
    try:
        return getattr(hf, family.config)(**settings)
    except (AttributeError, NotImplementedError, TypeError):  # it works out its own head_dim
        return getattr(hf, family.config)(
            **{key: value for key, value in settings.items() if key != "head_dim"}
        )


def _draw(model: Any) -> None:
    """Weights with which every part counts: as drawn by the library, texts hardly matter.

    Rows of embeddings and matrices keep the size of what passes through them; then the head is
    scaled so that the logits of random ids spread by 2, whatever the family makes of them.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "A_log" in name:
                continue
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.train(False)
        head = model.get_output_embeddings().weight
        ids = torch.randint(5, 130, (2, 32))
        for _ in range(3):  # tied rows are the input as well, and caps are no straight line
            spread = float(model(input_ids=ids).logits.std())
            head.mul_(2 / spread)


DOCS = Path(__file__).parent.parent / "docs" / "bases.md"

_HEAD = """# Bases

<!-- Written by `make docs`; do not edit. -->

What srlm-lite does with the model families of today. Each row is a test, on a CPU, in NF4: a tiny
base of random weights with the family's shape goes through an iteration with both proofs (the
anchor's first loss is the model's own, DPO's is ln 2 at a margin of 0), is exported, loaded by
transformers alone, and held against PEFT's model of the same adapter on the base. Those whose code
takes ways of its own run on every commit, the others with `make slow`.
So a row says that the code of the family is served, not how well a published model of it learns;
the real models that are named have that architecture in transformers {version}.

- **Targets**: the layers that the test adapts, by the names that `lora.targets` takes. The default
  is Llama's: {default}. A target that the base lacks is refused with those that it has.
- **Sampling**: the tree keeps a prompt's keys and values once for all its candidates; plain
  `generate` is slower, and samples from the same distribution.
- **Exports**: the forms that `srlm-lite export --as` gives, each equal to PEFT on the base.
- **Experts** of a mixture lie fused in one parameter a layer: they stay in 16 bits, which
  `srlm-lite plan` counts, and carry no adapter; attention and dense layers do.

## How to name one, and what a run does with it

[`base.name`](settings.md#basename) is a Hub id, a directory or a `.gguf` file.

- Replies are sampled behind the very ids that they are learned behind, whatever the chat template
  writes around them; a template that does not allow that is refused. Where the text of a reply does
  not give its ids back, they are kept and learned as sampled.
- Bases that think (Qwen3, GLM, gpt-oss, DeepSeek-R1's and so on): the policy learns thought and
  answer, and the judge, the gold scorer and every figure see the answer. A thought may be
  `rollout.max_thought_tokens` long; one that never closes is a truncated answer. Without thoughts:
  `--set base.chat_template_kwargs="{{enable_thinking: false}}"`. That section reaches every
  rendering and goes with an export.
- The adapters of a mixture of experts go on its attention and dense layers, those of a
  vision-language checkpoint on its text model. What could not be exported is refused before the
  anchor; merged files have the tensors' names of the base's own.
- A GGUF file is converted once, tokenizer and all, from what it says itself; what it says and this
  version cannot do is refused.
- Before the anchor a run tells how many bits a byte the base needs for its answers and prompts, and
  warns where it does no better on them than on shuffled letters.

## Families

| family | for example | targets | sampling | exports | experts |
|---|---|---|---|---|---|
"""


_REFUSED = """
## Refused

Before the anchor, in one line.

| base | for example | why |
|---|---|---|
| weights in few bits already | gpt-oss (MXFP4) and DeepSeek-V3 (FP8) as published, GPTQ, AWQ | \
what is trained on them could neither be merged into them nor held against them; the same model in \
16 bits is served, with `base.quantization=nf4` |
"""


def page() -> str:
    """`docs/bases.md`."""
    import transformers

    text = _HEAD.format(
        version=".".join(transformers.__version__.split(".")[:2]),
        default=", ".join(f"`{name}`" for name in _DENSE),
    )
    served = {name: family for name, family in FAMILIES.items() if not family.refused}
    for name, family in served.items():
        targets = "the default"
        if family.targets != _DENSE:
            targets = ", ".join(f"`{target}`" for target in family.targets)
        cells = (
            f"`{name}`",
            family.stands_for,
            targets,
            family.sampled,
            ", ".join(family.exports),
            "16 bits" if family.experts else "",
        )
        text += "| " + " | ".join(cells) + " |\n"
    text += _REFUSED
    for name, family in FAMILIES.items():
        if family.refused:
            text += f"| `{name}` | {family.stands_for} | {family.refused} |\n"
    return text


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    for each in sys.argv[2:] or FAMILIES:
        print(build_family(each, Path(sys.argv[1])))
