"""The proof of the adapter stack on a base of a million parameters: seconds, on any device."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Literal

import torch

from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Base, Dpo, Lora
from srlm_lite.shipped import recipes_dir
from srlm_lite.training.dpo import PairExample, train_dpo

_LORA = Lora(rank=4, alpha=8)
_DPO = Dpo(learning_rate=1e-3, batch_size=4, micro_batch_size=4, epochs=2, lora=_LORA)


def toy_base(
    *,
    quantization: Literal["none", "nf4"] = "none",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> LoadedBase:
    """The base of the toy recipes, which is part of the package."""
    folder = recipes_dir() / "toy" / "base"
    return load_base(
        Base(name=str(folder), quantization=quantization, dtype=dtype, device=device, window=256)
    )


def prove_stack(base: LoadedBase) -> dict[str, float]:
    """Train a delta on a random, non-zero anchor and check what every run checks, and the base.

    Returns:
        `step0_loss`, `step0_margin`, `last_loss`, and `seconds`.

    Raises:
        ProofError: The first loss is not ln 2 or the first margin not 0, training moved the anchor
            or the base, or it did not move the delta.
    """
    begin = time.monotonic()
    slot = Slot(base.model, targets=_LORA.targets, rank=2 * _LORA.rank)
    anchor = _random(slot.fresh(_LORA, seed=1))
    chat = ChatFormat.of(base)
    frozen = {
        name: weight.detach().clone()
        for name, weight in base.model.named_parameters()
        if "lora_" not in name
    }
    pairs = [
        PairExample(
            tuple(chat.prompt_ids(f"name the {topic}")),
            tuple(chat.target_ids(f"here is the {topic}")),
            tuple(chat.target_ids("no")),
        )
        for topic in ("sea", "moon", "garden", "kitchen")
    ]
    with tempfile.TemporaryDirectory(prefix="srlm-lite-proof-") as scratch:
        _, facts = train_dpo(
            slot,
            base,
            anchor=[anchor],
            delta=slot.fresh(_LORA, seed=2),
            reference=[anchor],
            pairs=pairs,
            dpo=_DPO,
            scratch=Path(scratch),
            seed=0,
        )
    for name, weight in base.model.named_parameters():
        if name in frozen and not torch.equal(weight, frozen[name]):
            raise ProofError(f"training changed the base's weights in {name}")
    kept = ("step0_loss", "step0_margin", "last_loss")
    return {**{key: facts[key] for key in kept}, "seconds": time.monotonic() - begin}


def _random(adapter: Adapter) -> Adapter:
    """The adapter with a B that changes much."""
    generator = torch.Generator().manual_seed(3)
    factors = {
        module: (a, 0.1 * torch.randn(b.shape, generator=generator))
        for module, (a, b) in adapter.factors.items()
    }
    return Adapter(adapter.rank, adapter.alpha, factors)
