"""What a prompt samples does not depend on its neighbours, also where a model sees padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Slot
from srlm_lite.rollout.plain import hides_padding
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.session import Session, positions_of_its_own
from srlm_lite.settings import Base
from srlm_lite.training.likelihood import log_likelihoods
from srlm_lite.training.sft import Example

hf: Any = transformers

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent": (
        "RecurrentGemmaConfig",
        {"lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 64},
        "linear_y",
    ),
    "lightning": (
        "MiniMaxConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 8,
        },
        "o_proj",
    ),
    "convolutions": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "out_proj",
    ),
    "state space": (
        "FalconH1Config",
        {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_expand": 1},
        "q_proj",
    ),
    "delta rule": (
        "Qwen3NextConfig",
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 0,
            "mlp_only_layers": [0, 1],
        },
        "q_proj",
    ),
}
SEEN = ("recurrent", "lightning")
"""Kinds that padding changes: by a convolution that reaches into it, and in steps from a cache."""

LENGTHS = (2, 9, 30, 9, 17)
GREEDY = Limits(temperature=0.0, top_p=1.0, max_new_tokens=6, ignore_end=True)


@pytest.fixture(scope="module")
def tiny(tiny_base_dir: Path) -> LoadedBase:
    return load_base(Base(name=str(tiny_base_dir), dtype="float32"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(kind: str, tiny: LoadedBase) -> LoadedBase:
    """Random weights; the embedding of padding, that a fresh model has at zero, among them."""
    name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(hf, name)(**{**SMALL, **settings})
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in path:
                parameter.mul_(4)
        model.get_input_embeddings().weight[0].normal_(std=0.5)
    return replace(tiny, model=model)


@pytest.fixture(scope="module")
def slot(base: LoadedBase, kind: str) -> Slot:
    return Slot(base.model, targets=(KINDS[kind][2],), rank=2)


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(3, 512, (n,), generator=generator).tolist()) for n in LENGTHS]


def test_a_prompt_samples_the_same_whatever_is_beside_it(
    base: LoadedBase,
    slot: Slot,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = TransformersEngine(slot, ChatFormat.of(base), batch_rows=16)
    engine.load(())
    monkeypatch.setattr(engine, "_branches", False)
    shapes: list[tuple[int, ...]] = []
    generate = base.model.generate

    def spied(**kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return generate(**kwargs)

    asked = [Request(prompt, (0,)) for prompt in prompts()]
    alone = [engine.sample([one], GREEDY)[0] for one in asked]
    assert engine._pads is None  # a prompt by itself needs no padding
    with monkeypatch.context() as patch:
        patch.setattr(base.model, "generate", spied)
        together = engine.sample(asked, GREEDY)
    assert together == alone
    assert shapes[:2] == [(1, 2), (2, 30)]  # the proof
    rest = shapes[2:]
    said = [message for _, _, message in caplog.record_tuples if "padding" in message]
    if kind in SEEN:
        assert rest == [(1, 30), (1, 17), (2, 9), (1, 2)]
        assert said == [
            "padding changes what this model samples; sampling prompts of equal length together "
            "alone, slower"
        ]
    else:
        assert rest == [(5, 30)]
        assert not said


def test_padding_is_told_from_rounding_in_16_bits(base: LoadedBase, kind: str) -> None:
    model = base.model.to(torch.bfloat16)
    try:
        found = hides_padding(model, ChatFormat.of(base), prompts()[1], prompts()[2])
    finally:
        model.to(torch.float32)
    assert found == (kind not in SEEN)


def test_likelihoods_do_not_depend_on_padding(base: LoadedBase, slot: Slot) -> None:
    """It lies to the right there, where nothing that counts looks."""
    examples = [Example(prompt, prompt[::-1]) for prompt in prompts()]
    together = log_likelihoods(slot, base, (), examples, batch_rows=8)
    alone = [log_likelihoods(slot, base, (), [one], batch_rows=1)[0] for one in examples]
    assert together == pytest.approx(alone, rel=1e-4)
    assert len({round(value) for value in alone}) > 2


HALF = 8  # of a head's width: a frequency for each two numbers
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16},
    **{"short_factor": [1.0] * HALF, "long_factor": [4.0] * HALF},
}


@pytest.mark.parametrize(
    ("kind", "more", "own"),
    [
        ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, 16),
        (
            "Llama",
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                "max_position_embeddings": 16,
            },
            16,
        ),
        ("Llama", {}, None),
    ],
)
def test_a_run_is_warned_where_a_base_s_positions_go_by_the_longest_text_of_a_batch(
    kind: str, more: dict[str, Any], own: int | None
) -> None:
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**{**SMALL, "initializer_range": 0.3, **more})
    model = getattr(hf, f"{kind}ForCausalLM")(config).eval()
    short, positions = torch.arange(3, 11), torch.arange(40)

    def logits(longest: int) -> torch.Tensor:
        """What the short text gets beside one of that length, padded to it."""
        ids = torch.zeros(2, longest, dtype=torch.long)
        ids[0, : len(short)], ids[1] = short, torch.arange(longest) + 3
        with torch.no_grad():
            mask = (ids > 0).long()
            found = model(ids, attention_mask=mask, position_ids=positions[None, :longest])
        return torch.as_tensor(found.logits[0, : len(short)])

    assert positions_of_its_own(config) == own
    torch.testing.assert_close(logits(16), logits(8), atol=1e-4, rtol=0)
    assert torch.allclose(logits(17), logits(8), atol=1e-2) is (own is None)
    told: list[str] = []
    for window in (16, 17):
        recipe = SimpleNamespace(base=SimpleNamespace(window=window))
        session: Any = SimpleNamespace(recipe=recipe, reporter=SimpleNamespace(warn=told.append))
        Session._warn_of_positions(session, SimpleNamespace(model=model))  # type: ignore[arg-type]
    told = [line for line in told if "neighbours" in line]
    assert len(told) == (0 if own is None else 1)
    assert all(line.endswith("base.window=16 avoids that") for line in told)
