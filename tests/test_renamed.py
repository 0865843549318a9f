"""Names that transformers has changed, by the release that is installed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPast

from srlm_lite.model.renamed import cache_of, checkpointing_name, with_cache


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_cache_is_given_and_found(model: Any) -> None:
    """Without it the second half would be read as if it were the whole."""
    ids = torch.arange(3, 13)[None]
    expected = model(ids, use_cache=False).logits[0, -1]
    first = model(ids[:, :5], use_cache=True)
    held = cache_of(first)
    assert held is not None and held.get_seq_length() == 5
    rest = model(ids[:, 5:], use_cache=True, **with_cache(model, held))
    assert cache_of(rest) is held
    assert torch.allclose(rest.logits[0, -1], expected, atol=1e-5)
    assert cache_of(model(ids, use_cache=False)) is None


def test_by_no_name_that_is_warned_of(model: Any, recwarn: pytest.WarningsRecorder) -> None:
    model(torch.arange(3, 13)[None], use_cache=True, **with_cache(model, None))
    getattr(model, checkpointing_name(model, "{}_enable"))()
    assert getattr(model, checkpointing_name(model, "is_{}"))
    getattr(model, checkpointing_name(model, "{}_disable"))()
    assert not getattr(model, checkpointing_name(model, "is_{}"))
    TrainingArguments(use_cpu=True, **{checkpointing_name(TrainingArguments): False})
    assert not [str(one.message) for one in recwarn if one.category is FutureWarning]


def test_either_release_is_asked_by_its_own_name() -> None:
    class Older:
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

        def gradient_checkpointing_enable(self) -> None: ...

    class Newer:
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

        def gradient_checkpointing_enable(self) -> None: ...

        def activation_checkpointing_enable(self) -> None: ...

    held = object()
    assert with_cache(Older(), held) == {"past_key_values": held}
    assert with_cache(Newer(), held) == {"cache": held}
    assert checkpointing_name(Older(), "{}_enable") == "gradient_checkpointing_enable"
    assert checkpointing_name(Newer(), "{}_enable") == "activation_checkpointing_enable"
    assert checkpointing_name(TrainingArguments) in inspect.signature(TrainingArguments).parameters
    kept = DynamicCache()
    for name in ("past_key_values", "cache"):
        assert cache_of({"logits": 1, name: kept}) is kept
    assert cache_of(BaseModelOutputWithPast(past_key_values=kept)) is kept
