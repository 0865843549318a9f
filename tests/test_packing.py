"""That texts as trees in one row are computed as by plain forward passes, with gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_trees import RUBRIC, visible
from torch import Tensor

from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.stack import Slot
from srlm_lite.settings import Base, Dpo, Lora
from srlm_lite.training import steps as steps_module
from srlm_lite.training.branching import Branches
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.tokens import TargetTokens
from srlm_lite.training.trees import Forest, Text

hf: Any = transformers

PROMPTS = [(*RUBRIC, 1, 2, 3), (*RUBRIC, 4), (5, 6, 7, 8)]
TEXTS = [(prompt, tuple(range(9 + i, 13 + 2 * i))) for prompt in PROMPTS for i in range(3)]


@pytest.mark.parametrize("kind", ["parts", "masked", "capped"])
def test_attention_within_trees_is_that_under_a_mask(kind: str) -> None:
    """Outputs and gradients, against one attention with all scores."""
    row = Forest(TEXTS).row(range(len(TEXTS)))
    tokens = len(row.ids)
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (
        torch.randn(1, heads, tokens, 8, generator=generator).requires_grad_()
        for heads in (6, 2, 2, 6)
    )
    branches = Branches()
    branches.expect(row.parts, torch.tensor(row.positions))
    if kind == "masked":
        found = branches._masked(query, key, value, None, 0.3, None, None)
    else:
        cap = 1e6 if kind == "capped" else None
        module: Any = None
        found = branches.attend(module, query, key, value, None, 0.3, cap)[0].transpose(1, 2)
    mask = torch.tensor(visible(row.parts, tokens))
    repeated = (states.repeat_interleave(3, dim=1) for states in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=mask, scale=0.3
    )
    assert torch.allclose(found, expected, atol=1e-5)
    slopes = [
        torch.autograd.grad((one * gradient.detach()).sum(), (query, key, value))
        for one in (found, expected)
    ]
    for one, other in zip(*slopes, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


LORA = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> LoadedBase:
    section = Base(name=str(tiny_base_dir), quantization="none", dtype="float32", device="cpu")
    return load_base(section)


def grown(slot: Slot, model_lora: Lora) -> Any:
    """An adapter that is not nothing."""
    adapter = slot.fresh(model_lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    for _, b in adapter.factors.values():
        b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return adapter


def in_a_row(slot: Slot, model: Any, texts: list[Text]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Log-likelihoods of all targets, and their gradients."""
    row, branches = Forest(texts).row(range(len(texts))), Branches()
    given = torch.tensor([row.ids])
    positions, columns = torch.tensor([row.positions]), torch.tensor(row.sources)
    scored = torch.zeros_like(columns), columns, torch.tensor(row.targets)
    branches.expect(row.parts, positions[0])
    weights = [one for one in slot.model.parameters() if one.requires_grad]
    scorer = TargetTokens(slot.model, row.ids)
    with branches.attending(model), scorer.answering():
        found = slot.model(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            position_ids=positions,
            scored=scored,
            use_cache=False,
        ).logits
        gradients = torch.autograd.grad(found.sum(), weights)
    assert branches.asked
    return found.detach(), gradients


def one_by_one(slot: Slot, texts: list[Text]) -> tuple[Tensor, tuple[Tensor, ...]]:
    weights = [one for one in slot.model.parameters() if one.requires_grad]
    found = []
    for prompt, target in texts:
        logits = slot.model(input_ids=torch.tensor([[*prompt, *target]]), use_cache=False).logits
        chances = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        found.append(chances.gather(1, torch.tensor(target)[:, None])[:, 0])
    scores = torch.cat(found)
    return scores.detach(), torch.autograd.grad(scores.sum(), weights)


COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    # A window of 8, which rubrics of 20 tokens reach beyond; scores that are capped; sinks.
    "Gemma2Config": {"sliding_window": 8, "attn_logit_softcapping": 2.0},
    "GptOssConfig": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "MistralConfig": {"sliding_window": 8},
    "DeepseekV3Config": {
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "first_k_dense_replace": 2,
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_likelihoods_and_gradients_are_those_of_plain_passes(name: str) -> None:
    config = getattr(hf, name)(**COMMON | FAMILIES[name])
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    model.eval()
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    lora = Lora(rank=2, alpha=4, targets=tuple(there & {"q_proj", "v_proj", "q_b_proj"}))
    slot = Slot(model, targets=lora.targets, rank=2)
    slot.load([grown(slot, lora)], train=True)
    assert steps_module.may_pack(slot)
    found, gradients = in_a_row(slot, model, TEXTS)
    expected, plain = one_by_one(slot, TEXTS)
    assert torch.allclose(found, expected, atol=1e-4)
    largest = max(float(one.abs().max()) for one in plain)
    for one, other in zip(gradients, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * max(1.0, largest))


PAIRS = [
    PairExample((*RUBRIC, 1 + i), tuple(range(30, 36 + i)), tuple(range(50, 54 + i)))
    for i in range(4)
]


def trained(base: LoadedBase, slot: Slot, scratch: Path, **settings: Any) -> Any:
    anchor = grown(slot, LORA)
    return train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=slot.fresh(LORA, seed=2),
        reference=[anchor],
        pairs=PAIRS,
        dpo=Dpo(
            **{"batch_size": 4, "micro_batch_size": 4, **settings}, learning_rate=1e-3, lora=LORA
        ),
        scratch=scratch,
        seed=1,
    )[1]


@pytest.fixture(scope="module")
def slot(base: LoadedBase) -> Slot:
    return Slot(base.model, targets=LORA.targets, rank=4)


def test_a_base_whose_layers_attend_otherwise_is_padded_and_learns_the_same(
    base: LoadedBase, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    packed = trained(base, slot, tmp_path, epochs=2)

    def of_its_own(self: Branches, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        return args[1].transpose(1, 2), None  # no attention at all

    with monkeypatch.context() as patch:
        patch.setattr(Branches, "attend", of_its_own)
        patch.setattr(Branches, "_as_sdpa", of_its_own)
        padded = trained(base, slot, tmp_path, epochs=2)
    assert (packed.pop("packed"), padded.pop("packed")) == (1, 0)
    assert padded == pytest.approx(packed, rel=1e-4, abs=1e-5)
    assert "texts are padded, not packed" in caplog.text


def test_where_memory_does_not_suffice_a_step_is_done_anew_in_smaller_rows(
    base: LoadedBase, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(base, slot, tmp_path)
    read = steps_module.StepTrainer.scores
    rows: list[int] = []

    def limited(self: Any, model: Any, batch: Any) -> Any:
        if torch.is_grad_enabled():
            rows.append(batch.inputs["input_ids"].numel())
            if rows[-1] > 50:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, model, batch)

    monkeypatch.setattr(steps_module.StepTrainer, "scores", limited)
    less = trained(base, slot, tmp_path)
    assert rows[0] > 50 >= max(rows[-2:])
    assert less.pop("tokens_at_once") < whole.pop("tokens_at_once")
    # In other rows than the reference's a margin of 0 is one of rounding, which may be above 0.
    assert (whole.pop("reward_accuracy"), less.pop("reward_accuracy")) <= (0, 1)
    assert less == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_memory_that_runs_out_before_the_first_step_is_halved_too(
    base: LoadedBase, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the reference is read in the rows of the first step."""
    whole = trained(base, slot, tmp_path)
    read, failed = steps_module.StepTrainer.of_rows, []

    def limited(self: Any, rows: Any) -> Any:
        if not failed:
            failed.append(len(rows))
            raise MemoryError
        return read(self, rows)

    monkeypatch.setattr(steps_module.StepTrainer, "of_rows", limited)
    less = trained(base, slot, tmp_path)
    assert failed == [1] and less.pop("tokens_at_once") < whole.pop("tokens_at_once")
    assert less == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_a_reference_is_computed_once_and_taken_up_after_a_stop(
    base: LoadedBase, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: dict[str, Any] = {"batch_size": 2, "micro_batch_size": 2, "epochs": 2}
    whole = trained(base, slot, tmp_path, **halves)
    assert not list(tmp_path.iterdir())  # of a training that is done nothing is kept
    computed: list[int] = []
    read = steps_module.StepTrainer.likelihoods

    def counting(self: Any, texts: Any) -> Any:
        computed.append(len(texts))
        return read(self, texts)

    class Stop(Exception):
        pass

    def stops(self: Any, model: Any, step: Any) -> Any:
        raise Stop

    monkeypatch.setattr(steps_module.StepTrainer, "likelihoods", counting)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(steps_module.StepTrainer, "_learned", stops)
        trained(base, slot, tmp_path, **halves)
    assert computed == [4]  # of the other step; the first one's are read in its own rows, always
    assert trained(base, slot, tmp_path, **halves) == whole
    assert computed == [4]
