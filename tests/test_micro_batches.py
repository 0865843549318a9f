"""What a step learns does not depend on how it is cut: losses, gradients, adapters, dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from srlm_lite.errors import UserError
from srlm_lite.methods.rlhf import RewardSection
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Anchor, Base, Consistency, Dpo, Lora, Rollout
from srlm_lite.training import arguments
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.dropout import Masks
from srlm_lite.training.reward import RewardModel, train_reward
from srlm_lite.training.rloo import train_rloo
from srlm_lite.training.sft import Example, train_sft

LORA = Lora(rank=2, alpha=4, targets=("q_proj", "up_proj", "lm_head"))
BATCH = 6
N = 10  # a step of six, and one of four: of 4 + 2 and 4, of 3 + 3 and 3 + 1
CUTS = (1, 2, 3, 6)


def ids(seed: int) -> tuple[int, ...]:
    """2 to 11 of them."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, 12, (1,), generator=generator))
    return tuple(torch.randint(3, 300, (count,), generator=generator).tolist())


EXAMPLES = [Example(ids(i), ids(100 + i)) for i in range(N)]
PAIRS = [PairExample(ids(i), ids(200 + i), ids(300 + i)) for i in range(N)]
WEIGHTED = [
    replace(pair, weight=0.5 + i % 3, smoothing=0.1 * (i % 4)) for i, pair in enumerate(PAIRS)
]


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> LoadedBase:
    section = Base(name=str(tiny_base_dir), quantization="none", dtype="float32", device="cpu")
    return load_base(section)


@pytest.fixture(scope="module")
def slot(base: LoadedBase) -> Slot:
    return Slot(base.model, targets=LORA.targets, rank=4)


def given(slot: Slot, seed: int) -> Adapter:
    """An adapter that is not nothing."""
    fresh = slot.fresh(LORA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (a, 0.05 * torch.randn(b.shape, generator=generator))
        for name, (a, b) in fresh.factors.items()
    }
    return Adapter(fresh.rank, fresh.alpha, factors)


class Gradients(TrainerCallback):
    """What the optimiser gets in each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = [one for one in kwargs["model"].parameters() if one.requires_grad]
        self.steps.append(torch.cat([one.grad.flatten().clone() for one in weights]))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gradients]:
    seen = Gradients()

    def run(trainer: Any, optim: Any, kept: Any = None) -> None:
        trainer.add_callback(seen)
        trainer.train()

    with monkeypatch.context() as patch:
        for module in ("dpo", "sft", "reward", "rloo"):
            patch.setattr(f"srlm_lite.training.{module}.run_training", run)
        yield seen


Trained = tuple[Adapter, dict[str, float]]


def same_however_cut(
    train: Callable[[int], tuple[Any, dict[str, float]]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    cuts: tuple[int, ...] = CUTS,
) -> None:
    """Gradients, which nothing clips, to 1e-5 of the largest; losses and all that is told."""
    found = []
    for micro in cuts:
        with watched(monkeypatch) as seen:
            _, facts = train(micro)
        facts.pop("tokens_at_once", None)  # it says how the step was cut
        found.append((seen.steps, facts))
    expected, told = found[-1]
    assert len(expected) == 2
    for gradients, facts in found[:-1]:
        assert facts == pytest.approx(told, rel=1e-5, abs=1e-5)
        for one, other in zip(gradients, expected, strict=True):
            largest = float(other.abs().max())
            assert largest > 1e-4
            assert float((one - other).abs().max()) < 1e-5 * max(1.0, largest)


SMALL_STEPS = {"learning_rate": 1e-6, "batch_size": BATCH, "max_grad_norm": 1e9}
"""Weights that hardly move, so that the second step's gradients are those of the same model."""


@pytest.mark.parametrize(
    ("pairs", "settings", "consistency"),
    [
        (PAIRS, {}, None),
        (PAIRS, {"nll_weight": 0.7}, None),
        (WEIGHTED, {"nll_weight": 0.7, "label_smoothing": 0.1, "ld_alpha": 0.4}, None),
        (WEIGHTED, {"gradient_checkpointing": True}, Consistency(consistency_weight=0.5)),
    ],
    ids=["plain", "nll", "weighted", "scir"],
)
def test_dpo(
    pairs: list[PairExample],
    settings: dict[str, Any],
    consistency: Consistency | None,
    base: LoadedBase,
    slot: Slot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    anchor, delta = given(slot, 1), given(slot, 2)

    def train(micro: int) -> Trained:
        return train_dpo(
            slot,
            base,
            anchor=[anchor],
            delta=delta,
            reference=[anchor],
            pairs=pairs,
            dpo=Dpo(**SMALL_STEPS, **settings, micro_batch_size=micro),
            consistency=consistency,
            scratch=tmp_path,
            seed=3,
        )

    same_however_cut(train, monkeypatch)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sft_and_what_it_drops_out(
    dropout: float,
    checkpointing: bool,
    base: LoadedBase,
    slot: Slot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = given(slot, 1)

    def train(micro: int) -> Trained:
        optim = Anchor(**SMALL_STEPS, micro_batch_size=micro, gradient_checkpointing=checkpointing)
        return train_sft(
            slot, base, adapter, EXAMPLES, optim=optim, dropout=dropout, scratch=tmp_path, seed=3
        )

    same_however_cut(train, monkeypatch)


def test_the_reward_model(
    base: LoadedBase, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head alone is held: the adapter's gradient is 0 while the head is."""
    lora = Lora(rank=2, alpha=4, targets=("q_proj", "up_proj"))
    adapter = slot.fresh(lora, seed=1)

    def train(micro: int) -> tuple[Any, dict[str, float]]:
        optim = RewardSection(**{**SMALL_STEPS, "learning_rate": 1e-3}, micro_batch_size=micro)
        return train_reward(
            slot,
            base,
            anchor=[given(slot, 2)],
            adapter=adapter,
            pairs=PAIRS,
            optim=optim,
            scratch=tmp_path,
            seed=3,
        )

    found = []
    for micro in CUTS:
        with watched(monkeypatch) as seen:
            model, facts = train(micro)
        facts.pop("tokens_at_once")
        found.append((model, facts, seen.steps))
    whole, told, gradients = found[-1]
    assert isinstance(whole, RewardModel) and float(whole.head.abs().max()) > 0
    for model, facts, steps in found[:-1]:
        assert torch.allclose(steps[0], gradients[0], atol=1e-5)
        assert torch.allclose(model.head, whole.head, atol=1e-5)
        assert facts == pytest.approx(told, rel=1e-4, abs=1e-5)


def test_rloo(
    base: LoadedBase, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Lora(rank=2, alpha=4, targets=("q_proj", "up_proj"))
    anchor = slot.fresh(lora, seed=1)
    head = torch.randn(1, base.model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    reward = RewardModel(slot.fresh(lora, seed=4), head)
    chat = ChatFormat.of(base)

    def train(micro: int) -> tuple[Any, dict[str, float]]:
        _, drawn, facts = train_rloo(
            slot,
            base,
            chat,
            anchor=[anchor],
            delta=slot.fresh(lora, seed=2),
            reference=[anchor],
            reward=reward,
            prompts=[ids(i) for i in range(4)],
            optim=Dpo(**SMALL_STEPS, micro_batch_size=micro, epochs=1),
            rollout=Rollout(n=3, max_new_tokens=6, temperature=1.0, top_p=1.0),
            kl_weight=0.1,
            drop_truncated=False,
            scratch=tmp_path,
            seed=3,
        )
        return drawn, facts

    same_however_cut(train, monkeypatch)


def test_a_mask_belongs_to_its_sequence() -> None:
    masks = Masks(0.25, seed=1)
    lengths = {7: 5, 3: 2, 4: 4}

    def drawn(step: int, order: list[int], layer: str = "a") -> dict[int, Tensor]:
        """Padded to rows; a text's last token is not computed."""
        width = max(lengths[one] for one in order) - 1
        texts = [(one, lengths[one], row * width) for row, one in enumerate(order)]
        masks.expect(step, texts, len(order) * width)
        dropped = masks.of(layer, torch.zeros(len(order), width, 400))
        return {one: dropped[row, : lengths[one] - 1] for row, one in enumerate(order)}

    def in_one_row(order: list[int]) -> dict[int, Tensor]:
        texts, at = [], 0
        for one in order:
            texts.append((one, lengths[one], at))
            at += lengths[one] - 1
        masks.expect(0, texts, at)
        dropped = masks.of("a", torch.zeros(1, at, 400))[0]
        return {one: dropped[start : start + length - 1] for one, length, start in texts}

    together, alone = drawn(0, [7, 3, 4]), {**drawn(0, [4, 3]), **drawn(0, [7])}
    assert all(rows.equal(together[one]) for one, rows in in_one_row([4, 7, 3]).items())
    for one in lengths:
        assert together[one].equal(alone[one])
    assert float(together[7].float().mean()) == pytest.approx(0.25, abs=0.05)
    for others in (drawn(1, [7]), drawn(0, [7], layer="b")):
        assert not others[7].equal(together[7])
    assert not drawn(0, [4])[4][:1].equal(together[3])


def test_a_layer_that_computes_other_rows_than_tokens_cannot_drop_out() -> None:
    """As an expert of its own, which gets the tokens that are routed to it."""
    masks = Masks(0.1, seed=1)
    masks.expect(0, [(0, 6, 0), (1, 6, 5)], 10)
    assert masks.of("experts.0.up_proj", torch.zeros(10, 3)).shape == (10, 3)  # all, flattened
    with pytest.raises(UserError, match=r"^lora\.dropout: experts\.0\.up_proj does not compute"):
        masks.of("experts.0.up_proj", torch.zeros(6, 3))


def test_a_base_s_own_dropout_is_off_in_training_and_is_there_again(base: LoadedBase) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, attn_pdrop=0.5)
    model = GPT2LMHeadModel(config)
    model.train()
    inputs = torch.arange(12)[None]
    with torch.no_grad():
        assert not model(inputs).logits.equal(model(inputs).logits)
        with arguments.one_adapter_in_training(model):
            model.train()
            assert model(inputs).logits.equal(model(inputs).logits)
        model.train()
        assert not model(inputs).logits.equal(model(inputs).logits)
    assert (config.attn_pdrop, config.resid_pdrop) == (0.5, 0.1)
