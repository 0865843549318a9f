"""Layers that a training computes in fewer operations, held against their own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.stack import Slot
from srlm_lite.settings import Base, Dpo, Lora
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.layers import Layers
from srlm_lite.training.tokens import _scores

hf: Any = transformers

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LORA = Lora(rank=3, alpha=5, targets=("q_proj", "down_proj"))


def model_of(name: str) -> tuple[Any, Slot]:
    """A random model whose norms are not all ones, with an adapter that is not nothing."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(getattr(hf, name)(**SHAPE)).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn(weight.shape)
    slot = Slot(model, targets=LORA.targets, rank=4)
    adapter = slot.fresh(LORA, seed=1)
    for _, b in adapter.factors.values():
        b.copy_(0.1 * torch.randn(b.shape))
    slot.load([adapter], train=True)
    return model, slot


def computed(slot: Slot, embedded: Tensor) -> list[Tensor]:
    """Logits, and the gradients of what goes in and of the adapter."""
    given = embedded.clone().requires_grad_()
    weights = [one for one in slot.model.parameters() if one.requires_grad]
    logits = slot.model(inputs_embeds=given, use_cache=False).logits
    return [logits, *torch.autograd.grad(logits.tanh().sum(), [given, *weights])]


@pytest.mark.parametrize(
    ("family", "norms"), [("LlamaConfig", 3), ("Qwen3Config", 5), ("Gemma2Config", 0)]
)
def test_layers_give_the_values_and_gradients_of_their_own_code(family: str, norms: int) -> None:
    """Gemma's norms have another form, 1 + w, and are left alone; Qwen 3's are in heads too."""
    model, slot = model_of(family)
    layers, embedded = Layers(slot), torch.randn(2, 5, SHAPE["hidden_size"])
    assert len(layers._forwards) == 2 + norms
    own = computed(slot, embedded)
    with layers.in_fewer_operations():
        found = computed(slot, embedded)
        assert "forward" in vars(layers._forwards[0][0])
    assert not any("forward" in vars(module) for module in model.modules())
    for one, other in zip(found, own, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert not torch.equal(one, torch.zeros_like(one))
    layers.leave()
    assert not layers.some


def test_what_is_dropped_of_an_adapter_s_input_is_not_dropped_of_the_base_s() -> None:
    _, slot = model_of("LlamaConfig")

    class Halves(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * torch.tensor([1.0, 0.0]).repeat(inputs.shape[-1] // 2)

    embedded = torch.randn(2, 5, SHAPE["hidden_size"])
    whole = computed(slot, embedded)
    with slot.dropping_out(lambda name: Halves()):
        own = computed(slot, embedded)
        with Layers(slot).in_fewer_operations():
            found = computed(slot, embedded)
    assert not torch.allclose(own[0], whole[0], atol=1e-5)
    for one, other in zip(found, own, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_log_likelihoods_and_their_slopes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 50, generator=generator)).requires_grad_()
    targets, slopes = torch.arange(7), torch.randn(7, generator=generator)
    expected = logits.log_softmax(dim=1)[torch.arange(7), targets]
    found = _scores(logits, targets)
    assert torch.allclose(found, expected, atol=1e-6)
    (own,) = torch.autograd.grad(expected @ slopes, logits)
    (of_ours,) = torch.autograd.grad(found @ slopes, logits)
    assert torch.allclose(of_ours, own, atol=1e-6)


def test_in_16_bits_the_first_step_s_loss_is_ln_2_whatever_its_rows(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    """The reference is read in the rows of the first step, of which this has several."""
    section = Base(name=str(tiny_base_dir), quantization="none", dtype="bfloat16", device="cpu")
    base: LoadedBase = load_base(section)
    lora = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj", "down_proj"))
    slot = Slot(base.model, targets=lora.targets, rank=4)
    anchor = slot.fresh(lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    for _, b in anchor.factors.values():
        b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    pairs = [
        PairExample((1, 2, 3 + i), tuple(range(9 + i, 30 + i)), tuple(range(40, 50 + 2 * i)))
        for i in range(12)
    ]
    _, facts = train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=slot.fresh(lora, seed=2),
        reference=[anchor],
        pairs=pairs,
        dpo=Dpo(batch_size=8, micro_batch_size=8, micro_batch_tokens=100, lora=lora, beta=1.0),
        scratch=tmp_path,
        seed=1,
    )
    assert facts["packed"] and facts["tokens_at_once"] == 100
    assert facts["step0_margin"] == 0
    assert facts["first_loss"] == pytest.approx(0.6931472, abs=1e-7)
