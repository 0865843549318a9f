"""Training through TRL on the fused slot, and the proof of it, on a tiny Llama: fp32 and NF4."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from srlm_lite.config import Anchor, Base, Dpo, Lora
from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.training import dpo as dpo_module
from srlm_lite.training.arguments import total_steps
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.sft import Example, train_sft

LORA = Lora(rank=4, alpha=8)
DPO = Dpo(learning_rate=5e-3, epochs=3, batch_size=4, micro_batch_size=2, lora=LORA)
LN2 = math.log(2)


KINDS = [("none", "float32"), ("nf4", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16")]


@pytest.fixture(scope="module", params=KINDS, ids=["-".join(kind) for kind in KINDS])
def base(request: pytest.FixtureRequest, tiny_base_dir: Path) -> LoadedBase:
    quantization, dtype = request.param
    return load_base(Base(name=str(tiny_base_dir), quantization=quantization, dtype=dtype))


@pytest.fixture(scope="module")
def slot(base: LoadedBase) -> Slot:
    return Slot(base.model, targets=LORA.targets, rank=8)


@pytest.fixture(scope="module")
def anchor(base: LoadedBase, slot: Slot, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """A real anchor: non-zero, from SFT on the tiny base."""
    chat = ChatFormat.of(base)
    examples = [
        Example(
            tuple(chat.prompt_ids(f"question {i % 4}")), tuple(chat.target_ids("The moon is grey."))
        )
        for i in range(16)
    ]
    trained, facts = train_sft(
        slot,
        base,
        slot.fresh(LORA, seed=1),
        examples,
        optim=Anchor(learning_rate=1e-2, epochs=4, batch_size=8, micro_batch_size=4),
        dropout=0.1,
        scratch=tmp_path_factory.mktemp("scratch"),
        seed=1,
    )
    assert facts["steps"] == 8
    assert facts["last_loss"] < facts["first_loss"] - 0.5
    assert any(torch.count_nonzero(b) for _, b in trained.factors.values())
    return trained


def pairs(base: LoadedBase, n: int = 8) -> list[PairExample]:
    chat = ChatFormat.of(base)
    return [
        PairExample(
            tuple(chat.prompt_ids(f"question {i}")),
            tuple(chat.target_ids("It is small and grey.")),
            tuple(chat.target_ids("oil the chain")),
        )
        for i in range(n)
    ]


def same(one: Adapter, two: Adapter) -> bool:
    return not one.differs_from(two)


def test_step_0_is_ln_2_training_learns_and_the_anchor_stays(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    before = Adapter(
        anchor.rank,
        anchor.alpha,
        {m: (a.clone(), b.clone()) for m, (a, b) in anchor.factors.items()},
    )
    start = slot.fresh(LORA, seed=2)
    trained, facts = train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=start,
        reference=[anchor],
        pairs=pairs(base),
        dpo=DPO,
        scratch=tmp_path,
        seed=2,
    )
    assert facts["step0_loss"] == pytest.approx(LN2, abs=1e-5)
    assert facts["step0_margin"] == pytest.approx(0, abs=1e-5)
    assert facts["steps"] == 6
    assert facts["last_loss"] < LN2 - 0.05
    assert facts["reward_margin"] > 0
    assert same(anchor, before)
    assert trained.rank == 4 and not same(trained, start)
    assert list(slot.model.peft_config) == ["default"]  # TRL's copy is gone
    assert "forward" not in slot.model.__dict__  # and so is accelerate's wrapping
    assert not any(
        parameter.requires_grad
        for name, parameter in slot.model.named_parameters()
        if "lora" not in name
    )


def test_training_is_the_same_twice(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    def once() -> Adapter:
        return train_dpo(
            slot,
            base,
            anchor=[anchor],
            delta=slot.fresh(LORA, seed=2),
            reference=[anchor],
            pairs=pairs(base),
            dpo=DPO,
            scratch=tmp_path,
            seed=2,
        )[0]

    assert same(once(), once())


def test_going_on_from_the_previous_delta(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    """init: previous. Against itself the first loss is ln 2, against the anchor it is not."""
    common = {"anchor": [anchor], "pairs": pairs(base), "dpo": DPO, "scratch": tmp_path, "seed": 2}
    first, _ = train_dpo(slot, base, delta=slot.fresh(LORA, seed=2), reference=[anchor], **common)
    _, chained = train_dpo(slot, base, delta=first, reference=[anchor, first], **common)
    _, anchored = train_dpo(slot, base, delta=first, reference=[anchor], **common)
    assert chained["first_loss"] == pytest.approx(LN2, abs=1e-4)
    assert anchored["first_loss"] < LN2 - 0.05  # the policy starts ahead of this reference
    assert anchored["step0_loss"] == pytest.approx(LN2, abs=1e-5)  # which is proven all the same


def test_a_wrong_reference_stops_the_run(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stock TRL does to a stack: its reference is the base, without the anchor."""
    load = Slot.load

    def half(
        self: Slot, stack: list[Adapter], *, adapter: str = "default", **options: object
    ) -> None:
        load(self, [] if adapter == "ref" else stack, adapter=adapter, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Slot, "load", half)
    with pytest.raises(ProofError, match=r"must be ln 2"):
        train_dpo(
            slot,
            base,
            anchor=[anchor],
            delta=slot.fresh(LORA, seed=2),
            reference=[anchor],
            pairs=pairs(base),
            dpo=DPO,
            scratch=tmp_path,
            seed=2,
        )
    assert list(slot.model.peft_config) == ["default"]


def test_training_weights_are_float32(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    seen: set[torch.dtype] = set()

    def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
        seen.update(p.dtype for p in slot.model.parameters() if p.requires_grad)

    train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=slot.fresh(LORA, seed=2),
        reference=[anchor],
        pairs=pairs(base, 4),
        dpo=DPO.model_copy(update={"epochs": 1}),
        scratch=tmp_path,
        seed=2,
        on_step=on_step,
    )
    assert seen == {torch.float32}


def test_the_nll_term_is_added_to_the_loss(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    _, facts = train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=slot.fresh(LORA, seed=2),
        reference=[anchor],
        pairs=pairs(base, 4),
        dpo=DPO.model_copy(update={"nll_weight": 0.5}),
        scratch=tmp_path,
        seed=2,
    )
    assert facts["step0_loss"] == pytest.approx(LN2, abs=1e-5)  # DPO's part alone
    assert facts["first_loss"] > LN2 + 0.1


def test_the_number_of_steps() -> None:
    optim = Dpo(epochs=2, batch_size=16)
    assert total_steps(64, optim) == 8
    assert total_steps(65, optim) == 9  # 130 / 16 = 8.1: the last pairs get a step too
    assert total_steps(1, optim) == 1


def test_the_tolerance_catches_what_stock_trl_did() -> None:
    """0.6696 is the loss that a half reference gave with TRL 1.16."""
    assert abs(0.6696 - LN2) > dpo_module.PROOF_TOLERANCE
