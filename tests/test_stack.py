"""The adapter stack: exact fusion, a frozen anchor, files that PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from srlm_lite.errors import ProofError, UserError
from srlm_lite.model import stack as stack_module
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.stack import CONFIG, WEIGHTS, Adapter, Slot, fuse, split
from srlm_lite.recipe import load_recipe
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Base, Lora

TARGETS = ("q_proj", "v_proj", "down_proj")
LORA = Lora(rank=4, alpha=8, targets=TARGETS)


def adapter(seed: int, *, rank: int, alpha: float, modules: tuple[str, ...] = ("m",)) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        rank=rank,
        alpha=alpha,
        factors={
            module: (
                torch.randn(rank, 5, generator=generator),
                torch.randn(7, rank, generator=generator),
            )
            for module in modules
        },
    )


def update(one: Adapter, module: str = "m") -> Tensor:
    a, b = one.factors[module]
    return one.scaling * (b.double() @ a.double())


adapters = st.builds(
    adapter,
    st.integers(0, 2**31),
    rank=st.integers(1, 6),
    alpha=st.sampled_from([1.0, 3.0, 8.0, 32.0]),
)


@given(st.lists(adapters, min_size=1, max_size=4))
@settings(deadline=None)
def test_the_fused_update_is_the_sum_of_the_updates(stack: list[Adapter]) -> None:
    expected = torch.stack([update(one) for one in stack]).sum(dim=0)
    torch.testing.assert_close(update(fuse(stack)), expected, rtol=1e-5, atol=1e-5)


@given(adapters, st.integers(1, 6), st.integers(0, 2**31))
@settings(deadline=None)
def test_fusing_and_splitting_is_exact_for_the_adapter_on_top(
    anchor: Adapter, rank: int, seed: int
) -> None:
    delta = adapter(seed, rank=rank, alpha=7.0)
    _, back = split(fuse([anchor, delta]), [anchor.rank, rank], [anchor.scaling, delta.scaling])
    assert back.rank == delta.rank
    assert back.scaling == pytest.approx(delta.scaling)
    assert torch.equal(back.factors["m"][0], delta.factors["m"][0])
    assert torch.equal(back.factors["m"][1], delta.factors["m"][1])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
@settings(deadline=None)
def test_fusing_and_splitting_is_exact_for_all_at_equal_scaling(
    ranks: list[int], seed: int
) -> None:
    stack = [adapter(seed + i, rank=rank, alpha=2.0 * rank) for i, rank in enumerate(ranks)]
    parts = split(fuse(stack), ranks, [2.0] * len(ranks))
    for before, after in zip(stack, parts, strict=True):
        assert not after.differs_from(before)


def test_a_module_that_one_adapter_lacks_is_zero_there() -> None:
    low, high = adapter(1, rank=2, alpha=2, modules=("m", "n")), adapter(2, rank=3, alpha=3)
    fused = fuse([low, high])
    torch.testing.assert_close(update(fused, "n"), update(low, "n"), rtol=1e-5, atol=1e-6)


def test_linear_combination_would_be_wrong() -> None:
    one, two = adapter(1, rank=2, alpha=2), adapter(2, rank=2, alpha=2)
    (a1, b1), (a2, b2) = one.factors["m"], two.factors["m"]
    linear = (b1 + b2).double() @ (a1 + a2).double()
    assert not torch.allclose(linear, update(one) + update(two), atol=0.1)


def test_an_empty_stack_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match="empty stack"):
        fuse([])


@pytest.fixture
def base(tiny_base_dir: Path) -> LoadedBase:
    return load_base(Base(name=str(tiny_base_dir), dtype="float32"))


@pytest.fixture
def slot(base: LoadedBase) -> Slot:
    return Slot(base.model, targets=TARGETS, rank=10)


def noisy(slot: Slot, lora: Lora, seed: int) -> Adapter:
    """An adapter that does something: B is not zero."""
    fresh = slot.fresh(lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: (a, torch.randn(b.shape, generator=generator) * 0.05)
        for module, (a, b) in fresh.factors.items()
    }
    return Adapter(rank=fresh.rank, alpha=fresh.alpha, factors=factors)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20).reshape(2, 8)).logits


def test_the_slot_computes_what_peft_computes_with_stacked_adapters(
    slot: Slot, tiny_base_dir: Path, tmp_path: Path
) -> None:
    anchor, delta = noisy(slot, LORA, 1), noisy(slot, LORA.model_copy(update={"alpha": 12.0}), 2)
    for name, one in (("anchor", anchor), ("delta", delta)):
        one.save(tmp_path / name, base_name=str(tiny_base_dir))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(plain, tmp_path / "anchor", adapter_name="anchor")
    peft.load_adapter(tmp_path / "delta", adapter_name="delta")
    peft.base_model.set_adapter(["anchor", "delta"])
    slot.load([anchor, delta])
    torch.testing.assert_close(logits(slot.model), logits(peft), rtol=1e-4, atol=1e-5)


def test_an_empty_slot_is_the_base(slot: Slot, tiny_base_dir: Path) -> None:
    slot.load([noisy(slot, LORA, 1)])
    slot.load([])
    plain = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
    assert torch.equal(logits(slot.model), logits(plain))


def test_switching_roles_back_and_forth_leaves_no_trace(slot: Slot) -> None:
    anchor, delta = noisy(slot, LORA, 1), noisy(slot, LORA, 2)
    slot.load([anchor])
    before = logits(slot.model)
    slot.load([anchor, delta])
    assert not torch.equal(logits(slot.model), before)
    slot.load([anchor])
    assert torch.equal(logits(slot.model), before)


def test_a_stack_is_copied_again_only_when_something_else_was_in_the_slot(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[list[Adapter]] = []
    fuse_ = stack_module.fuse
    monkeypatch.setattr(stack_module, "fuse", lambda stack: fused.append(stack) or fuse_(stack))
    one, other = [noisy(slot, LORA, 1)], [noisy(slot, LORA, 2)]
    slot.load(one)
    expected = logits(slot.model)
    slot.load(one)
    assert fused == [one]
    slot.load(other)
    slot.load(one)
    assert torch.equal(logits(slot.model), expected)
    slot.load(one, train=True)
    for parameter in slot.model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    slot.load(one)
    assert fused == [one, other, one, one, one]
    assert torch.equal(logits(slot.model), expected)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_folding_computes_the_same_and_leaves_no_trace(
    tiny_base_dir: Path, quantization: Any
) -> None:
    section = Base(name=str(tiny_base_dir), dtype="float32", quantization=quantization)
    bases = [load_base(section) for _ in range(2)]
    beside, folded = (
        Slot(base.model, targets=TARGETS, rank=10, fold=fold)
        for base, fold in zip(bases, (False, True), strict=True)
    )
    before = {name: p.clone() for name, p in folded.model.named_parameters() if "base" in name}
    anchor, delta = noisy(beside, LORA, 1), noisy(beside, LORA, 2)
    for stack in ([anchor], [anchor, delta], [], [anchor]):
        beside.load(stack)
        folded.load(stack)
        torch.testing.assert_close(logits(folded.model), logits(beside.model), rtol=1e-4, atol=1e-5)
        kinds = {type(layer.base_layer) is nn.Linear for layer in folded._layers.values()}
        assert kinds == ({True} if stack or quantization == "none" else {False})
    folded.load([anchor, delta], train=True)
    after = dict(folded.model.named_parameters())
    for name, parameter in before.items():
        if "lora" not in name:
            assert torch.equal(after[name], parameter), name
    beside.load([anchor, delta], train=True)
    torch.testing.assert_close(logits(folded.model), logits(beside.model), rtol=0, atol=0)


def test_a_stack_that_is_loaded_to_sample_can_be_trained_next(slot: Slot) -> None:
    """torch lets no tensor made in inference mode require a gradient, and PEFT asks for that."""
    with torch.inference_mode():
        slot.load([noisy(slot, Lora(rank=2, alpha=4), 1)])
    with slot.beside("reward", [noisy(slot, Lora(rank=2, alpha=4), 2)]):
        pass
    assert not any(one.is_inference() for one in slot.model.parameters())


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(slot: Slot) -> None:
    slot.load([])
    bare = logits(slot.model)
    one, two = slot.fresh(LORA, seed=3), slot.fresh(LORA, seed=3)
    slot.load([one])
    torch.testing.assert_close(logits(slot.model), bare, rtol=0, atol=0)
    assert not one.differs_from(two)
    assert one.differs_from(slot.fresh(LORA, seed=4))


def test_a_fresh_adapter_is_on_the_layers_that_its_targets_name(tiny_base_dir: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_base_dir)
    targets = ("q_proj", "mlp.down_proj", "model.layers.1.self_attn.v_proj")
    slot = Slot(base, targets=targets, rank=8)
    expected = {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    expected.add("model.layers.1.self_attn.v_proj")
    assert set(slot.fresh(Lora(rank=4, targets=targets), seed=1).factors) == expected
    assert set(slot.modules) == expected
    alone = slot.fresh(Lora(rank=4, targets=("mlp.down_proj",)), seed=1)
    assert set(alone.factors) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


def test_only_the_deltas_rows_receive_a_gradient(slot: Slot) -> None:
    anchor, delta = noisy(slot, LORA, 1), noisy(slot, LORA, 2)
    slot.load([anchor, delta], train=True)
    ids = torch.arange(4, 20).reshape(2, 8)
    with slot.training_only(anchor.rank, delta):
        slot.model(input_ids=ids, labels=ids).loss.backward()
    rows = {name: p.grad for name, p in slot.model.named_parameters() if p.requires_grad}
    assert rows
    for name, gradient in rows.items():
        assert gradient is not None
        by_rank = gradient if "lora_A" in name else gradient.T
        assert torch.count_nonzero(by_rank[:4]) == 0  # the anchor's
        assert torch.count_nonzero(by_rank[4:8]) > 0  # the delta's
        assert torch.count_nonzero(by_rank[8:]) == 0  # room that nobody uses


def test_touching_the_anchor_is_noticed(slot: Slot) -> None:
    anchor, delta = noisy(slot, LORA, 1), noisy(slot, LORA, 2)
    slot.load([anchor, delta], train=True)
    slot.assert_unchanged([anchor])
    name, parameter = next((n, p) for n, p in slot.model.named_parameters() if p.requires_grad)
    assert "lora_A" in name
    parameter.data[0, 0] += 1e-7
    with pytest.raises(ProofError, match="changed the anchor"):
        slot.assert_unchanged([anchor])


def test_the_delta_is_read_back_bit_for_bit(slot: Slot) -> None:
    anchor = noisy(slot, Lora(rank=4, alpha=3, targets=TARGETS), 1)
    delta = noisy(slot, LORA, 2)
    slot.load([anchor, delta], train=True)
    back = slot.read(anchor.rank, delta.rank, list(delta.factors))
    assert not back.differs_from(delta)
    assert back.scaling == delta.scaling


def test_a_stack_that_does_not_fit_is_refused(slot: Slot) -> None:
    with pytest.raises(UserError, match="rank 12 exceeds the slot's 10"):
        slot.load([slot.fresh(Lora(rank=12, targets=TARGETS), seed=1)])
    with pytest.raises(UserError, match="does not have or the recipe does not target"):
        slot.load([adapter(1, rank=2, alpha=2, modules=("layers.9.q_proj",))])
    mine = slot.fresh(Lora(rank=2, targets=TARGETS), seed=1)
    (a, b), module = mine.factors[slot.modules[0]], slot.modules[0]
    for a_shape, b_shape in (((2, 1), b.shape), (a.shape, (1, 2))):  # both of which would spread
        other = Adapter(2, 2, {**mine.factors, module: (torch.ones(a_shape), torch.ones(b_shape))})
        with pytest.raises(UserError, match=f"the adapter's {module} is for a layer of"):
            slot.load([mine, other])


def test_saving_and_loading_is_lossless(slot: Slot, tmp_path: Path) -> None:
    one = noisy(slot, LORA, 1)
    one.save(tmp_path / "a", base_name="b")
    modes = {(tmp_path / "a" / name).stat().st_mode for name in (CONFIG, WEIGHTS)}
    assert len(modes) == 1  # whoever may read the settings may read the weights
    back = Adapter.load(tmp_path / "a")
    assert (back.rank, back.alpha) == (one.rank, one.alpha)
    assert not back.differs_from(one)


def test_an_adapter_that_is_absent_damaged_or_of_another_kind_is_refused(
    slot: Slot, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no adapter here"):
        Adapter.load(tmp_path)
    slot.fresh(LORA, seed=1).save(tmp_path, base_name="b")
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"bias"', '"use_dora": true, "bias"'))
    with pytest.raises(UserError, match="not use_dora"):
        Adapter.load(tmp_path)
    config.write_text(config.read_text().replace('"use_dora": true, ', ""))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        Adapter.load(tmp_path)
    config.write_bytes(b"\xff")
    with pytest.raises(UserError, match="damaged"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "key", "shape", "message"),
    [
        (
            {"r": 3},
            "m.lora_A.weight",
            (2, 4),
            r"weights for m are \[2, 4\] and \[5, 2\], and r is 3",
        ),
        ({}, "m.lora_A.weight", (1, 4), r"weights for m are \[1, 4\] and \[5, 2\], and r is 2"),
        ({}, "m.lora_B.weight", (2,), r"weights for m are \[2, 4\] and \[2\], and r is 2"),
        ({}, "m.lora_B.weight", None, r"weights for m are \[2, 4\] and \[0\], and r is 2"),
        ({}, "m.lora_A.weight", None, r"not one that holds .*m\.lora_B\.weight"),
        ({"r": None}, "m.lora_A.weight", (2, 4), "or not their r and alpha"),
        ({"lora_alpha": "8"}, "m.lora_A.weight", (2, 4), "or not their r and alpha"),
        ([], "m.lora_A.weight", (2, 4), "is no JSON object"),
    ],
)
def test_an_adapter_that_is_not_what_it_says_is_refused(
    tmp_path: Path, settings: Any, key: str, shape: tuple[int, ...] | None, message: str
) -> None:
    tensors = {"m.lora_A.weight": torch.ones(2, 4), "m.lora_B.weight": torch.ones(5, 2)}
    del tensors[key]
    if shape is not None:
        tensors[key] = torch.ones(shape)
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / WEIGHTS)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    told = {**plain, **settings} if isinstance(settings, dict) else settings
    (tmp_path / CONFIG).write_text(json.dumps(told))
    with pytest.raises(UserError, match=message):
        Adapter.load(tmp_path)


def test_an_adapter_of_weights_that_are_no_numbers_is_refused(slot: Slot, tmp_path: Path) -> None:
    one = noisy(slot, LORA, 1)
    one.factors[slot.modules[1]][1][0, 0] = float("nan")
    one.save(tmp_path, base_name="b")
    with pytest.raises(UserError, match="are no numbers"):
        Adapter.load(tmp_path)


def test_an_adapter_that_a_finished_stage_has_not_written_is_refused(
    slot: Slot, tmp_path: Path
) -> None:
    """Another one put in its place would be what the next iteration learns from."""
    session = Session(load_recipe("tiny"), RunDir(tmp_path))
    anchor, iteration = session.run.anchor, session.run.iteration(1)
    for seed, (stage, folder) in enumerate(
        ((anchor, anchor.adapter), (iteration, iteration.delta))
    ):
        slot.fresh(LORA, seed=seed).save(folder, base_name="b")
        stage.finish()
    assert len(session.stack(1)) == 2
    slot.fresh(LORA, seed=9).save(iteration.delta, base_name="b")
    with pytest.raises(UserError, match=r"its hash differs from done\.json"):
        session.stack(1)
    assert len(session.stack(0)) == 1
    iteration.done.unlink()  # it may yet be written anew
    assert len(session.stack(1)) == 2
    (anchor.adapter / CONFIG).unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json: is missing"):
        session.stack(0)


def test_an_adapter_with_more_than_plain_lora_is_refused(slot: Slot, tmp_path: Path) -> None:
    """What is left out silently would make another model of it."""
    one = noisy(slot, LORA, 1)
    one.save(tmp_path, base_name="b")
    tensors = load_file(tmp_path / WEIGHTS)
    plain = json.loads((tmp_path / CONFIG).read_text())

    def refused(words: str, more: dict[str, Tensor], **config: object) -> None:
        save_file(tensors | more, tmp_path / WEIGHTS, metadata={"format": "pt"})
        (tmp_path / CONFIG).write_text(json.dumps(plain | config))
        with pytest.raises(UserError, match=words):
            Adapter.load(tmp_path)

    for name in ("embed_tokens.lora_embedding_A", "lm_head.weight", "q.lora_B.bias"):
        refused(rf"not one that holds .*{name}", {f"base_model.model.model.{name}": torch.ones(2)})
    refused(r"not init_lora_weights=pissa_niter_16", {}, init_lora_weights="pissa_niter_16")
    refused(r"not alora_invocation_tokens", {}, alora_invocation_tokens=[1])
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps(plain | {"init_lora_weights": True}))
    assert not Adapter.load(tmp_path).differs_from(one)
