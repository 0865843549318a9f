"""Training through TRL on the fused slot, and the proof of it, on a tiny Llama: fp32 and NF4."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from srlm_lite.errors import ProofError, UserError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Anchor, Base, Consistency, Dpo, Lora, LossName
from srlm_lite.training import dpo as dpo_module
from srlm_lite.training.arguments import (
    early_mean,
    late_mean,
    run_training,
    schedule_of,
    total_steps,
)
from srlm_lite.training.dpo import PairExample, PairTrainer, train_dpo
from srlm_lite.training.plain import train_plain_dpo
from srlm_lite.training.sft import Example, train_sft

LORA = Lora(rank=4, alpha=8)
DPO = Dpo(learning_rate=5e-3, epochs=3, batch_size=4, micro_batch_size=2, lora=LORA)
LN2 = math.log(2)


KINDS = [
    pytest.param(kind, id="-".join(kind), marks=marks)
    for kinds, marks in (
        ((("none", "float32"), ("nf4", "bfloat16")), ()),
        ((("nf4", "float32"), ("none", "bfloat16")), pytest.mark.slow),
    )
    for kind in kinds
]


@pytest.fixture(scope="module", params=KINDS)
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
    assert list(slot.model.peft_config) == ["default"]  # nothing lies beside it
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


def test_sft_on_a_frozen_anchor_leaves_it_as_it_was(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    """On an NF4 base TRL rounds all adapters to bf16, those that are not to change as well."""
    chat = ChatFormat.of(base)
    examples = [
        Example(tuple(chat.prompt_ids(f"question {i}")), tuple(chat.target_ids("It is grey.")))
        for i in range(4)
    ]
    trained, _ = train_sft(
        slot,
        base,
        slot.fresh(LORA, seed=2),
        examples,
        below=[anchor],
        optim=Anchor(learning_rate=1e-2, epochs=2, batch_size=4, micro_batch_size=4),
        dropout=0.0,
        scratch=tmp_path,
        seed=1,
    )
    slot.assert_unchanged([anchor])
    assert any(torch.count_nonzero(b) for _, b in trained.factors.values())


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
    read = PairTrainer.of_reference

    def of_the_base(self: PairTrainer, *args: Any) -> Any:
        slot.load([], train=True)
        found = read(self, *args)
        slot.load([anchor], train=True)
        return found

    monkeypatch.setattr(PairTrainer, "of_reference", of_the_base)
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


def test_a_loss_that_is_no_number_is_no_proof(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    """As of a base whose activations overflow: NaN is neither too far from ln 2 nor near it."""
    broken = Adapter(
        anchor.rank,
        anchor.alpha,
        {module: (a, torch.full_like(b, torch.nan)) for module, (a, b) in anchor.factors.items()},
    )
    with pytest.raises(ProofError, match=r"loss is nan \(must be ln 2"):
        train_dpo(
            slot,
            base,
            anchor=[broken],
            delta=slot.fresh(LORA, seed=2),
            reference=[broken],
            pairs=pairs(base, 4),
            dpo=DPO,
            scratch=tmp_path,
            seed=2,
        )


def test_a_training_that_diverges_is_said_to(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    """Clipped by a norm that is no number, no gradient is one, the anchor's zeros included."""
    with pytest.raises(UserError, match=r"learning_rate: training has diverged.* Lower it"):
        trained_on(pairs(base, 4), base, slot, anchor, tmp_path, learning_rate=1e30)


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


def test_a_pair_s_weight_counts_in_the_nll_term_too(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    """All at half their weight: half the loss, DPO's ln 2 and the NLL alike. One alone: its own."""

    def first_loss(*weights: float) -> float:
        _, facts = train_dpo(
            slot,
            base,
            anchor=[anchor],
            delta=slot.fresh(LORA, seed=2),
            reference=[anchor],
            pairs=[
                replace(pair, weight=weight)
                for pair, weight in zip(pairs(base, 4), weights, strict=True)
            ],
            dpo=DPO.model_copy(update={"nll_weight": 0.5, "epochs": 1}),
            scratch=tmp_path,
            seed=2,
        )
        return facts["first_loss"]

    whole = first_loss(1, 1, 1, 1)
    assert first_loss(0.5, 0.5, 0.5, 0.5) == pytest.approx(whole / 2, abs=1e-3)
    alone = [first_loss(*(float(i == j) for j in range(4))) for i in range(4)]
    assert sum(alone) == pytest.approx(whole, abs=2e-3)


# --- weights and smoothing --------------------------------------------------------------------


def test_the_loss_of_a_weighted_and_smoothed_pair() -> None:
    # m = ln 3: sigmoid 3/4 and 1/4, so -log is 0.287682 and 1.386294.
    # s 0.25: 0.75 * 0.287682 + 0.25 * 1.386294 = 0.562335; w 2: 1.124670. m = 0: ln 2 for any s.
    margin = torch.tensor([math.log(3), math.log(3), math.log(3), 0.0])
    weight = torch.tensor([1.0, 1.0, 2.0, 1.0])
    smoothing = torch.tensor([0.0, 1.0, 0.25, 0.4])
    loss = dpo_module.preference_loss((margin, torch.zeros(4)), weight, smoothing)
    assert loss.tolist() == pytest.approx([0.287682, 1.386294, 1.124670, LN2], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "beta", "right", "turned"),
    [
        # Rewards ln 3 and 0: their sigmoids are 3/4 and 1/2, that of the difference 3/4.
        ("sigmoid", 0.1, 0.287682, 1.386294),
        ("sigmoid_norm", 5.0, 0.287682, 1.386294),
        # (ln 3 / 0.5 - 1 / (2 * 0.5))^2 = 1.197225^2, and (-2.197225 - 1)^2.
        ("ipo", 0.5, 1.433347, 10.222246),
        ("apo_zero", 0.1, 1 - 0.75 + 0.5, 1 - 0.5 + 0.75),
        ("apo_down", 0.1, 0.75 + 1 - 0.75, 0.5 + 1 - 0.25),
        # gamma ln 3: -log sigmoid(0), and -log sigmoid(-2 ln 3) = ln(1 + 9).
        ("simpo", 2.0, LN2, 2.302585),
        ("sft", 0.1, 0.0, 0.0),
    ],
)
def test_losses_by_hand(name: LossName, beta: float, right: float, turned: float) -> None:
    kind = dpo_module.LOSSES[name]
    rewards = torch.tensor([math.log(3)] * 2), torch.zeros(2)
    found = dpo_module.preference_loss(
        rewards, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.25]),
        loss=kind, beta=beta, gamma=math.log(3),
    )  # fmt: skip
    mixed = 2 * (0.75 * right + 0.25 * turned)
    assert found.tolist() == pytest.approx([right, mixed], abs=1e-5)
    # What the proof holds a training to.
    equal = Dpo(loss=name, beta=beta).loss_of_equals
    zero = torch.zeros(1)
    at_zero = float(kind.of(zero, zero, beta, 0.0))
    assert equal == (pytest.approx(at_zero) if kind.has_reference and name != "sft" else None)


def test_simpo_is_trl_s() -> None:
    """Its loss on log-likelihoods per token; its margin is gamma over beta there.

    But for label smoothing: TRL turns the margin round with the pair, which gives the rejected
    reply a head start of gamma; here a pair turned round has to be ahead by gamma as well.
    """
    from trl.experimental.cpo import CPOTrainer

    told = SimpleNamespace(
        alpha=0.0, loss_type="simpo", beta=2.5, simpo_gamma=0.75, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    chosen, rejected = torch.tensor([-1.2, -0.4, -3.0]), torch.tensor([-1.3, -0.9, -0.1])
    theirs, *rewards = CPOTrainer.cpo_loss(told, chosen, rejected)
    ours = dpo_module.preference_loss(
        (2.5 * chosen, 2.5 * rejected), torch.ones(3), torch.zeros(3),
        loss=dpo_module.LOSSES["simpo"], beta=2.5, gamma=0.75,
    )  # fmt: skip
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-6)
    assert [one.tolist() for one in rewards] == [(2.5 * chosen).tolist(), (2.5 * rejected).tolist()]


@pytest.mark.parametrize("name", [name for name in dpo_module.LOSSES if name != "sigmoid"])
def test_every_loss_is_proven_and_learns(
    name: LossName, base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if base.dtype != torch.float32:
        pytest.skip("one dtype tells")
    dpo = DPO.model_copy(update={"loss": name, "beta": 0.5})
    steps: list[dict[str, float]] = []

    def train() -> dict[str, float]:
        return train_dpo(
            slot, base, anchor=[anchor], delta=slot.fresh(LORA, seed=2), reference=[anchor],
            pairs=pairs(base, 4), dpo=dpo, scratch=tmp_path, seed=2,
            on_step=lambda step, of, logs: steps.append(logs),
        )[1]  # fmt: skip

    facts = train()
    assert facts["step0_margin"] == pytest.approx(0, abs=1e-5)
    slot.load([anchor])
    per_token = [
        [-nll(slot.model, one.prompt_ids, reply) / len(reply) for one in pairs(base, 4)]
        for reply in (pairs(base, 1)[0].chosen_ids, pairs(base, 1)[0].rejected_ids)
    ]
    if name == "simpo":
        margins = [0.5 * (a - b) - 0.5 for a, b in zip(*per_token, strict=True)]
        must = sum(math.log1p(math.exp(-one)) for one in margins) / 4
    else:
        must = dpo.loss_of_equals or 0.0
    # The proof reads some of the pairs, the first step all four.
    assert facts["step0_loss"] == pytest.approx(must, abs=1e-2 if name == "simpo" else 1e-4)
    of_sft = -sum(per_token[0]) / 4 if name == "sft" else 0.0
    assert facts["first_loss"] == pytest.approx(must + of_sft, abs=1e-4)
    assert facts["last_loss"] < facts["first_loss"]
    assert name in ("sft", "simpo") or steps[-1]["rewards/margins"] > 0.05
    # With likelihoods of another model in the reference's, or the policy's, place it stops.
    monkeypatch.setattr(dpo_module, "PROOF_TOLERANCE", 1e-9)
    if name == "simpo":
        read = PairTrainer.scores
        monkeypatch.setattr(PairTrainer, "scores", lambda *args: 1.01 * read(*args))
        wrong = r"own by plain passes|the simpo loss is|the model's own"
    else:
        find = PairTrainer.of_reference
        monkeypatch.setattr(
            PairTrainer, "of_reference", lambda *args: [1.01 * one for one in find(*args)]
        )
        wrong = r"must be .*: the reference is not the intended stack"
    with pytest.raises(ProofError, match=wrong):
        train()


def nll(model: Any, prompt: tuple[int, ...], target: tuple[int, ...]) -> float:
    """Nats of a target after its prompt, from one plain pass."""
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
    first = len(prompt) - 1
    return -float(sum(chances[first + i, token] for i, token in enumerate(target)))


def test_the_consistency_loss_by_hand() -> None:
    # p = 0.8, q = 0.5: 0.3 ln(0.8 / 0.5) - 0.3 ln(0.2 / 0.5) = 0.141001 + 0.274887 = 0.415888.
    # H(0.8) + H(0.5) = 0.500402 + 0.693147 = 1.193549. DPO at m = ln 3: 0.287682.
    terms = Consistency(consistency_weight=0.5, confidence_weight=0.1, threshold=0.6)
    both = 0.5 * 0.415888 + 0.1 * 1.193549
    # The implicit reward contradicts, q = 0.25: (0.55)(ln 3.2) - 0.55 ln(0.2 / 0.75); H 0.562335.
    against = 0.5 * 0.55 * (1.163151 + 1.321756) + 0.1 * (0.500402 + 0.562335)
    loss, mask = dpo_module.consistency_loss(
        margin=torch.tensor([math.log(3)] * 3),
        implicit=torch.tensor([0.0, 0.0, -math.log(3)]),
        weight=torch.tensor([1.0, 2.0, 1.0]),
        smoothing=torch.tensor([0.2, 0.2, 0.2]),
        terms=terms,
    )
    assert mask.tolist() == [1, 1, 0]
    assert loss.tolist() == pytest.approx(
        [0.287682 + both, 2 * (0.287682 + both), against], abs=1e-5
    )
    # A judge that is not sure enough keeps a pair from DPO as well.
    _, mask = dpo_module.consistency_loss(
        torch.zeros(1), torch.zeros(1), torch.ones(1), torch.tensor([0.45]), terms
    )
    assert mask.tolist() == [0]


def test_the_consistency_terms_teach_where_dpo_may_not(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    def facts(preference: float) -> dict[str, float]:
        return train_dpo(
            slot,
            base,
            anchor=[anchor],
            delta=slot.fresh(LORA, seed=2),
            reference=[anchor],
            pairs=[replace(pair, smoothing=1 - preference) for pair in pairs(base, 4)],
            dpo=DPO.model_copy(update={"epochs": 2}),
            consistency=Consistency(consistency_weight=1.0, confidence_weight=0.0),
            scratch=tmp_path,
            seed=2,
        )[1]

    agreed, disputed = facts(0.9), facts(0.1)
    assert agreed["step0_loss"] == disputed["step0_loss"] == pytest.approx(LN2, abs=1e-5)
    assert (agreed["agreement"], disputed["agreement"]) == (1.0, 0.0)
    assert agreed["reward_margin"] > 0 > disputed["reward_margin"]


def trained_on(
    examples: list[PairExample],
    base: LoadedBase,
    slot: Slot,
    anchor: Adapter,
    tmp_path: Path,
    **settings: object,
) -> tuple[Adapter, dict[str, float]]:
    return train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=slot.fresh(LORA, seed=2),
        reference=[anchor],
        pairs=examples,
        dpo=DPO.model_copy(update={"epochs": 2, **settings}),
        scratch=tmp_path,
        seed=2,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nll_weight": 0.5},
        {"ld_alpha": 0.5},
        {"loss": "sigmoid_norm", "beta": 5.0},
        {"loss": "ipo", "nll_weight": 0.5},
        {"loss": "apo_zero"},
        {"loss": "apo_down"},
        {"loss": "sft"},
    ],
)
def test_losses_and_gradients_are_trl_s_where_both_apply(
    base: LoadedBase, slot: Slot, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Where all micro-batches are of one size, and all replies of one length."""
    if base.dtype != torch.float32 or getattr(base.model, "is_loaded_in_4bit", False):
        pytest.skip("in bfloat16, TRL's adapters on NF4, rounding differs by more than it tells")
    dpo = DPO.model_copy(update={"epochs": 3, "learning_rate": 1e-3, **settings})
    start = slot.fresh(Lora(rank=8, alpha=8), seed=2)
    common: dict[str, Any] = {"pairs": pairs(base, 4), "dpo": dpo, "scratch": tmp_path, "seed": 2}
    ours: list[dict[str, float]] = []
    trl: list[dict[str, float]] = []
    train_dpo(
        slot,
        base,
        anchor=[],
        delta=start,
        reference=[],
        **common,
        on_step=lambda step, steps, logs: ours.append(logs),
    )
    train_plain_dpo(
        slot,
        base,
        stack=[start],
        **common,
        on_step=lambda step, steps, logs: trl.append(logs),
    )
    assert len(ours) == len(trl) == 3
    for one, other in zip(ours, trl, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-4), key


def test_a_pair_surely_wrong_is_learned_the_other_way_round(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    wrong = [replace(pair, smoothing=1.0) for pair in pairs(base, 4)]
    _, facts = trained_on(wrong, base, slot, anchor, tmp_path)
    assert facts["step0_loss"] == pytest.approx(LN2, abs=1e-5)  # the proof knows no weights
    assert facts["last_loss"] < LN2 - 0.02
    assert facts["reward_margin"] < 0


def test_label_smoothing_makes_a_margin_worth_less(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    _, plain = trained_on(pairs(base, 4), base, slot, anchor, tmp_path)
    _, smooth = trained_on(pairs(base, 4), base, slot, anchor, tmp_path, label_smoothing=0.4)
    # Adam takes the same steps whatever the scale; -0.6 log s(m) - 0.4 log s(-m) falls slower.
    assert plain["last_loss"] < smooth["last_loss"] < LN2


def test_pairs_of_no_weight_teach_nothing(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path: Path
) -> None:
    weightless = [replace(pair, weight=0.0) for pair in pairs(base, 4)]
    with pytest.raises(ProofError, match="changed nothing"):
        trained_on(weightless, base, slot, anchor, tmp_path)


def test_a_training_that_is_out_of_memory_says_with_what_the_run_goes_on() -> None:
    class Full:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def train(self) -> None:
            raise self.error

    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(UserError) as caught:
        run_training(Full(cuda), Dpo(batch_size=12, micro_batch_size=6))
    assert str(caught.value) == (
        "dpo.micro_batch_size: memory does not suffice to train on 6 sequences at once. The run "
        "goes on with --set dpo.micro_batch_size=4 or dpo.gradient_checkpointing=true"
    )
    cpu = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
    )
    with pytest.raises(UserError, match=r"Another run with a smaller base\.window may fit"):
        run_training(Full(cpu), Anchor(micro_batch_size=1, gradient_checkpointing=True))
    with pytest.raises(RuntimeError, match="another"):
        run_training(Full(RuntimeError("another")), DPO)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_a_schedule_warms_up_and_ends_where_its_section_says(schedule: Any, ratio: float) -> None:
    if schedule == "constant" and ratio == 0.2:
        with pytest.raises(ValueError, match="a constant schedule has no final_learning_rate_"):
            Dpo(schedule=schedule, final_learning_rate_ratio=ratio)
        return
    optim = Dpo(learning_rate=1e-3, schedule=schedule, final_learning_rate_ratio=ratio)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=optim.learning_rate)
    told = schedule_of(optim)
    steps = get_scheduler(
        told["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=2,
        num_training_steps=10,
        scheduler_specific_kwargs=told.get("lr_scheduler_kwargs"),
    )
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(10):
        optimizer.step()
        steps.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    last = 1e-3 if schedule == "constant" else ratio * 1e-3
    assert rates[-1] == pytest.approx(last, abs=1e-12)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_the_number_of_steps() -> None:
    optim = Dpo(epochs=2, batch_size=16)
    assert total_steps(64, optim) == 8
    assert total_steps(65, optim) == 10  # 5 an epoch, the last one of a single pair
    assert total_steps(10, optim) == 2  # less than a batch is a step too
    assert total_steps(1, Dpo(epochs=0.1, batch_size=16)) == 1
    assert total_steps(160, Dpo(epochs=1.1, batch_size=16)) == 11  # 11.000000000000002 of a float


def test_every_pair_is_seen_once_an_epoch(
    base: LoadedBase,
    slot: Slot,
    anchor: Adapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five pairs in batches of four: a step of one pair ends each of three epochs."""
    seen: Counter[int] = Counter()
    compute = PairTrainer.loss

    def noting(self: Any, model: Any, batch: Any, examples: list[int], shares: Any) -> Any:
        if torch.is_grad_enabled():  # the proof's passes do not train
            seen.update(examples)
        return compute(self, model, batch, examples, shares)

    monkeypatch.setattr(PairTrainer, "loss", noting)
    _, facts = trained_on(pairs(base, 5), base, slot, anchor, tmp_path, epochs=3)
    assert facts["steps"] == 6
    assert list(seen.values()) == [3] * 5


def test_first_and_last_are_means_over_a_quarter_of_the_steps() -> None:
    rows = [{"loss": float(loss)} for loss in (9, 7, 5, 5, 4, 4, 3, 1)]
    assert (early_mean(rows, "loss"), late_mean(rows, "loss")) == (8, 2)
    assert (early_mean(rows[:3], "loss"), late_mean(rows[:3], "loss")) == (9, 5)


def test_the_tolerance_catches_what_stock_trl_did() -> None:
    """0.6696 is the loss that a half reference gave with TRL 1.16."""
    assert abs(0.6696 - LN2) > dpo_module.PROOF_TOLERANCE
