"""transformers' continuous batching on the fused slot: the tokens of plain `generate`, on any
device, and never another stack's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from srlm_lite.bench.continuous import ContinuousBatching
from srlm_lite.bench.rollout import RolloutBench, bench_rollout
from srlm_lite.bench.workload import Workload
from srlm_lite.errors import SrlmError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.progress import Silent
from srlm_lite.settings import Base, Lora

TEXTS = ("moon", "How do I look after a bicycle?", "Read the reply and judge it, please. " * 12)
TARGETS = ("q_proj", "v_proj", "down_proj")
NEW = 12

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def skip_without(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


class Side:
    """A base on a device, with a slot and two stacks that answer otherwise."""

    def __init__(self, folder: Path, device: str, quantization: str) -> None:
        section: dict[str, Any] = {"name": str(folder), "dtype": "float32"}
        self.base: LoadedBase = load_base(Base(**section, device=device, quantization=quantization))
        self.chat = ChatFormat.of(self.base)
        self.slot = Slot(self.base.model, targets=TARGETS, rank=4)
        self.stacks = [[self.adapter(seed)] for seed in (1, 2)]
        self.model: Any = self.slot.model.get_base_model()
        self.prompts = [tuple(self.chat.prompt_ids(text)) for text in TEXTS]

    def adapter(self, seed: int) -> Adapter:
        fresh = self.slot.fresh(Lora(rank=4, alpha=4, targets=TARGETS), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        factors = {
            module: (a, torch.randn(b.shape, generator=generator))
            for module, (a, b) in fresh.factors.items()
        }
        return Adapter(4, 4.0, factors)

    def plain(self) -> list[list[int]]:
        """Greedy, one prompt at a time."""
        found = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=self.base.device)
            settings = GenerationConfig(
                do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None
            )
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
            found.append(output[0, ids.shape[1] :].tolist())
        return found

    def continuous(self) -> list[list[int]]:
        way = ContinuousBatching(self.model, pad_id=0, temperature=0.0, top_p=1.0)
        rows = way.sample(self.prompts, n=1, new_tokens=NEW, on_samples=lambda count: None)
        return [row[0] for row in rows]


@pytest.fixture(scope="module", params=["none", "nf4"])
def quantization(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_is_token_for_token_what_plain_generate_gives_on_every_stack(
    tiny_base_dir: Path, device: str, quantization: str
) -> None:
    """Ragged prompts, one of several blocks, in float32; a role switch, and back."""
    skip_without(device)
    side = Side(tiny_base_dir, device, quantization)
    seen = []
    for stack in (*side.stacks, side.stacks[0]):
        side.slot.load(stack)
        seen.append(side.plain())
        assert side.continuous() == seen[-1]
    assert seen[0] == seen[2] != seen[1]
    assert side.model.config._attn_implementation == "sdpa"  # as it was before


def test_a_manager_that_outlives_a_role_switch_would_answer_with_stale_keys(
    tiny_base_dir: Path,
) -> None:
    """Why each call makes its own: this is the trap, as the library sets it."""
    side = Side(tiny_base_dir, "cpu", "none")
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=-1
    )
    cache = ContinuousBatchingConfig(block_size=16, num_blocks=64, max_batch_tokens=512)

    def kept() -> list[int]:
        found = side.model.generate_batch(
            [list(side.prompts[2])],
            generation_config=settings,
            continuous_batching_config=cache,
            persistent_manager=True,
        )
        return list(next(iter(found.values())).generated_tokens)

    side.slot.load(side.stacks[0])
    assert kept() == side.plain()[2]
    side.slot.load(side.stacks[1])
    assert kept() != side.plain()[2]
    side.model.destroy_cached_continuous_batching_manager()
    assert side.continuous()[2] == side.plain()[2]


def test_a_sample_that_failed_is_no_sample(
    tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = Side(tiny_base_dir, "cpu", "none")
    monkeypatch.setattr(side.model, "generate_batch", lambda inputs, **options: {})
    with pytest.raises(SrlmError, match="continuous batching failed: it stopped"):
        side.continuous()


@pytest.mark.usefixtures("brief_rates")
def test_it_is_one_of_the_ways_of_the_benchmark(tiny_base_dir: Path) -> None:
    small = Workload(prompts=2, n=2, answer_tokens=8, votes=2, vote_tokens=8)
    settings = RolloutBench(base=str(tiny_base_dir), ways=("ours", "continuous"), workload=small)
    found = bench_rollout(settings, Silent())
    assert list(found["phases"]) == ["ours", "continuous"]
    assert found["continuous_batching_s"] > 0
