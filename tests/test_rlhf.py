"""The reward model and RLOO on the fused slot, and their proofs, on a tiny Llama: fp32 and NF4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from srlm_lite.errors import ProofError, UserError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Base, Dpo, Lora, Rollout
from srlm_lite.training import rloo as rloo_module
from srlm_lite.training.arguments import total_steps
from srlm_lite.training.dpo import PairExample
from srlm_lite.training.likelihood import log_likelihoods
from srlm_lite.training.reward import RewardModel, Scorer, reward_replies, train_reward
from srlm_lite.training.rloo import DrawnReply, train_rloo
from srlm_lite.training.sft import Example

LORA = Lora(rank=4, alpha=8)
REWARD = Dpo(learning_rate=5e-3, epochs=2, batch_size=4, micro_batch_size=2)
STEP = Dpo(learning_rate=5e-3, batch_size=8, micro_batch_size=8, lora=LORA)
ROLLOUT = Rollout(n=4, temperature=1.0, top_p=1.0, max_new_tokens=6)
KINDS = [("none", "float32"), ("nf4", "bfloat16")]


@pytest.fixture(scope="module", params=KINDS, ids=["-".join(kind) for kind in KINDS])
def base(request: pytest.FixtureRequest, tiny_base_dir: Path) -> LoadedBase:
    quantization, dtype = request.param
    return load_base(Base(name=str(tiny_base_dir), quantization=quantization, dtype=dtype))


@pytest.fixture(scope="module")
def slot(base: LoadedBase) -> Slot:
    return Slot(base.model, targets=LORA.targets, rank=8)


def drawn_adapter(slot: Slot, seed: int) -> Adapter:
    """An adapter that changes something: B is drawn too."""
    fresh, generator = slot.fresh(LORA, seed=seed), torch.Generator().manual_seed(seed)
    factors = {
        module: (a, 0.05 * torch.randn(b.shape, generator=generator))
        for module, (a, b) in fresh.factors.items()
    }
    return Adapter(fresh.rank, fresh.alpha, factors)


@pytest.fixture(scope="module")
def anchor(slot: Slot) -> Adapter:
    return drawn_adapter(slot, 1)


def prompts(base: LoadedBase, n: int = 2) -> list[tuple[int, ...]]:
    chat = ChatFormat.of(base)
    return [tuple(chat.prompt_ids(f"question {i}")) for i in range(n)]


@pytest.fixture(scope="module")
def trained(
    base: LoadedBase, slot: Slot, anchor: Adapter, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RewardModel, dict[str, float]]:
    """A reward model that has learned to like bicycles."""
    chat = ChatFormat.of(base)
    good, bad = (tuple(chat.target_ids(text)) for text in ("oil the chain", "The moon is grey."))
    pairs = [PairExample(ids, good, bad) for ids in prompts(base, 8)]
    return train_reward(
        slot,
        base,
        anchor=[anchor],
        adapter=slot.fresh(LORA, seed=2),
        pairs=pairs,
        optim=REWARD,
        scratch=tmp_path_factory.mktemp("scratch"),
        seed=3,
    )


def run(
    slot: Slot,
    base: LoadedBase,
    anchor: Adapter,
    reward: RewardModel,
    scratch: Path,
    *,
    delta: Adapter,
    drop_truncated: bool = False,
) -> tuple[Adapter, list[DrawnReply], dict[str, float]]:
    return train_rloo(
        slot,
        base,
        ChatFormat.of(base),
        anchor=[anchor],
        delta=delta,
        reference=[anchor],
        reward=reward,
        prompts=prompts(base),
        optim=STEP,
        rollout=ROLLOUT,
        kl_weight=0.5,
        drop_truncated=drop_truncated,
        scratch=scratch,
        seed=4,
    )


def test_the_reward_model_starts_at_ln_2_learns_and_leaves_the_base_as_it_was(
    base: LoadedBase, slot: Slot, anchor: Adapter, trained: tuple[RewardModel, dict[str, float]]
) -> None:
    model, facts = trained
    # sigmoid(0 - 0) = 1/2, and -log(1/2) = ln 2.
    assert facts["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert facts["steps"] == 4 and facts["last_loss"] < math.log(2) - 0.02
    assert model.head.shape == (1, 64) and model.head.dtype == torch.float32
    assert model.adapter.differs_from(slot.fresh(LORA, seed=2))
    names = [name for name, _ in slot.model.named_parameters()]
    assert len(names) == len(set(names)) and not any("head" in name.lower() for name in names
                                                     if "lm_head" not in name)  # fmt: skip
    chat = ChatFormat.of(base)
    likes, dislikes = (
        Example(prompts(base)[0], tuple(chat.target_ids(text)))
        for text in ("oil the chain", "The moon is grey.")
    )
    both = reward_replies(slot, base, [anchor], model, [likes, dislikes], batch_rows=2)
    alone = reward_replies(slot, base, [anchor], model, [likes], batch_rows=1)
    assert both[0] > both[1]
    assert alone[0] == pytest.approx(both[0], abs=2e-2 if base.dtype == torch.bfloat16 else 1e-5)


def test_a_reward_is_the_head_s_product_with_the_last_hidden_state(
    base: LoadedBase, slot: Slot, anchor: Adapter
) -> None:
    slot.load([anchor])
    head = torch.linspace(-1, 1, 64)[None]
    ids = torch.tensor([[*prompts(base)[0], 5, 7]])
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.zeros_like(padded)
    mask[:, : ids.shape[1]] = 1
    with torch.inference_mode():
        states = slot.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        reward = Scorer(slot, head)(padded, mask).logits
    by_hand = sum(float(w * x) for w, x in zip(head[0], states[0, -1].float(), strict=True))
    assert reward.shape == (1, 1)
    assert float(reward) == pytest.approx(
        by_hand, abs=5e-2 if base.dtype == torch.bfloat16 else 1e-4
    )


def test_a_reward_model_comes_back_from_disk(
    trained: tuple[RewardModel, dict[str, float]], tmp_path: Path
) -> None:
    model, _ = trained
    model.save(tmp_path, tmp_path / "head.safetensors", base_name="b")
    again = RewardModel.load(tmp_path, tmp_path / "head.safetensors")
    assert torch.equal(again.head, model.head) and not again.adapter.differs_from(model.adapter)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"head\.safetensors: no head of a reward model"):
        RewardModel.load(tmp_path, tmp_path / "head.safetensors")


def test_the_advantage_by_hand(
    base: LoadedBase,
    slot: Slot,
    anchor: Adapter,
    trained: tuple[RewardModel, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rewards 1, 2, 3 and 6 of a prompt's replies, less 0.5 times the log-ratio to the anchor."""
    seen: list[float] = []
    compute = rloo_module._PolicyTrainer._compute_loss

    def noting(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        seen.extend(inputs["advantages"].tolist())
        return compute(self, model, inputs)  # type: ignore[no-untyped-call]

    def known(scorer: Any, examples: Sequence[Example], **others: Any) -> list[float]:
        return [(1.0, 2.0, 3.0, 6.0)[i % 4] for i in range(len(examples))]

    monkeypatch.setattr(rloo_module._PolicyTrainer, "_compute_loss", noting)
    monkeypatch.setattr(rloo_module, "rewards", known)
    delta = drawn_adapter(slot, 9)
    end = ChatFormat.of(base).end_id
    _, drawn, facts = run(slot, base, anchor, trained[0], tmp_path, delta=delta)
    assert facts["step0_kl"] == pytest.approx(0, abs=1e-3)
    assert [one.reward for one in drawn] == [1, 2, 3, 6] * 2
    assert {one.step for one in drawn} == {0}
    examples = [
        Example(prompts(base)[one.prompt], (*one.reply_ids, *([end] if one.finished else [])))
        for one in drawn
    ]
    policy, reference = (
        log_likelihoods(slot, base, stack, examples, batch_rows=8)
        for stack in ([anchor, delta], [anchor])
    )
    gained = [
        (one.reward or 0.0) - 0.5 * (p - r)
        for one, p, r in zip(drawn, policy, reference, strict=True)
    ]
    expected = [
        gained[i] - sum(gained[j] for j in group if j != i) / 3
        for group in (range(4), range(4, 8))
        for i in group
    ]
    rounding = 0.3 if base.dtype == torch.bfloat16 else 1e-3
    assert max(abs(p - r) for p, r in zip(policy, reference, strict=True)) > 0.05
    assert sorted(seen) == pytest.approx(sorted(expected), abs=rounding)


def test_rloo_starts_without_divergence_learns_and_leaves_all_else_alone(
    base: LoadedBase,
    slot: Slot,
    anchor: Adapter,
    trained: tuple[RewardModel, dict[str, float]],
    tmp_path: Path,
) -> None:
    before = {m: (a.clone(), b.clone()) for m, (a, b) in anchor.factors.items()}
    start = slot.fresh(LORA, seed=5)
    delta, drawn, facts = run(slot, base, anchor, trained[0], tmp_path, delta=start)
    assert facts["step0_kl"] == pytest.approx(0, abs=1e-5)
    assert facts["kl"] == pytest.approx(0, abs=1e-3)  # its one step began there
    assert len(drawn) == 8 and facts["steps"] == 1
    assert delta.differs_from(start)
    assert not anchor.differs_from(Adapter(anchor.rank, anchor.alpha, before))
    assert list(slot.model.peft_config) == ["default"]  # copy and reward model are gone
    assert "forward" not in slot.model.__dict__
    again, _, _ = run(slot, base, anchor, trained[0], tmp_path, delta=start)
    assert not again.differs_from(delta)


def test_a_wrong_reference_stops_the_run(
    base: LoadedBase,
    slot: Slot,
    anchor: Adapter,
    trained: tuple[RewardModel, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Slot.load

    def half(
        self: Slot, stack: list[Adapter], *, adapter: str = "default", **options: object
    ) -> None:
        load(self, [] if adapter == "ref" else stack, adapter=adapter, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Slot, "load", half)
    with pytest.raises(ProofError, match="policy and reference differ by"):
        run(slot, base, anchor, trained[0], tmp_path, delta=slot.fresh(LORA, seed=5))
    assert list(slot.model.peft_config) == ["default"]


def test_a_changed_reward_model_stops_the_run(slot: Slot, anchor: Adapter) -> None:
    with (
        pytest.raises(ProofError, match="changed the frozen adapter reward"),
        slot.beside("reward", [anchor]),
    ):
        parameter = next(
            one for name, one in slot.model.named_parameters() if "lora_B.reward" in name
        )
        parameter.data[0, 0] += 1e-3
    assert list(slot.model.peft_config) == ["default"]


def test_replies_without_an_end_have_no_reward(
    base: LoadedBase,
    slot: Slot,
    anchor: Adapter,
    trained: tuple[RewardModel, dict[str, float]],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"all 8 replies ran into the token limit.* Raise it"):
        run(
            slot, base, anchor, trained[0], tmp_path,
            delta=slot.fresh(LORA, seed=5), drop_truncated=True,
        )  # fmt: skip


def test_an_epoch_of_rloo_is_of_whole_steps() -> None:
    # 7 prompts of 4 replies are 28, and 3 steps of 8; the 4 replies of the last prompt fill none.
    optim = Dpo(epochs=2, batch_size=8)
    assert rloo_module.answers_of_epoch(7, optim, ROLLOUT) == 24
    assert total_steps(rloo_module.answers_of_epoch(7, optim, ROLLOUT), optim) == 6


def test_every_end_ends_a_reply() -> None:
    class Ends:
        stop_ids = (2, 9)

    ended = rloo_module._PolicyTrainer._ended
    assert ended(Ends(), [4, 9, 5, 2]) == [4, 9]  # type: ignore[arg-type]
    assert ended(Ends(), [4, 5]) == [4, 5]  # type: ignore[arg-type]
