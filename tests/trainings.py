"""What one process and two are to do alike; also a script, for each of several processes.

python tests/trainings.py BASE OUT cpu|cuda
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.sharding import held
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.processes import Processes, place
from srlm_lite.recipe import recipe_from
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session, follow
from srlm_lite.settings import Anchor, Base, Dpo, Lora
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.sft import Example, train_sft

Device = Literal["cpu", "cuda"]
Quantization = Literal["none", "nf4"]

LORA = Lora(rank=4, alpha=8)
CASES: dict[str, tuple[Quantization, bool]] = {
    "whole": ("none", False),
    "sharded": ("none", True),
    "sharded nf4": ("nf4", True),
}
"""What the base is held in, and whether two processes spread it."""


def tokens(seed: int) -> tuple[int, ...]:
    """3 to 12 ids."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(3, 13, (1,), generator=generator))
    return tuple(torch.randint(3, 300, (n,), generator=generator).tolist())


def section(folder: Path, quantization: Quantization, device: Device) -> Base:
    return Base(name=str(folder), device=device, dtype="float32", quantization=quantization)


def trainings(base: LoadedBase) -> dict[str, tuple[Adapter, dict[str, float]]]:
    """An SFT and two DPO runs, none of which divides evenly by batches or processes."""
    slot = Slot(base.model, targets=LORA.targets, rank=8)
    scratch = Path(tempfile.mkdtemp())
    examples = [Example(tokens(i), tokens(100 + i)) for i in range(11)]
    pairs = [
        PairExample(
            tokens(i), tokens(200 + i), tokens(300 + i), weight=1 + i % 3, smoothing=0.1 * (i % 2)
        )
        for i in range(11)
    ]
    plain = [PairExample(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs]
    found = {}
    found["anchor"] = train_sft(
        slot,
        base,
        slot.fresh(LORA, seed=1),
        examples,
        optim=Anchor(learning_rate=1e-3, epochs=2, batch_size=4, micro_batch_size=2),
        dropout=0.0,
        scratch=scratch,
        seed=7,
    )
    # The trained anchor differs in its last bits; both start from the same.
    given = given_anchor(slot)
    settings = {
        "plain": (plain, Dpo(learning_rate=1e-3, batch_size=4, micro_batch_size=2, epochs=2)),
        # One micro-batch a step: it has to be split.
        "weighted": (
            pairs,
            Dpo(
                learning_rate=1e-3,
                batch_size=4,
                micro_batch_size=4,
                nll_weight=0.5,
                label_smoothing=0.1,
                ld_alpha=0.5,
                gradient_checkpointing=True,
            ),
        ),
    }
    for name, (those, dpo) in settings.items():
        found[name] = train_dpo(
            slot,
            base,
            anchor=[given],
            delta=slot.fresh(LORA, seed=4),
            reference=[given],
            pairs=those,
            dpo=dpo,
            scratch=scratch,
            seed=11,
        )
    return found


def given_anchor(slot: Slot) -> Adapter:
    """An anchor that is not nothing."""
    fresh = slot.fresh(LORA, seed=2)
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: (a, 0.02 * torch.randn(b.shape, generator=generator))
        for name, (a, b) in fresh.factors.items()
    }
    return Adapter(fresh.rank, fresh.alpha, factors)


def logits(base: LoadedBase) -> Tensor:
    """Logits of the bare base, for one text."""
    with torch.no_grad():
        ids = torch.tensor([tokens(1)], device=base.device)
        found: Tensor = base.model(input_ids=ids).logits.cpu()
    return found


def session_of(folder: Path, device: Device, processes: Processes) -> Session:
    raw = {
        "name": "sampling",
        "base": section(folder, "nf4", device).model_dump(),
        "data": {"dir": "."},
        "anchor": {"lora": LORA.model_dump()},
        "dpo": {"lora": LORA.model_dump()},
        "rollout": {"batch_rows": 4},
    }
    return Session(
        recipe_from(raw, where="test"), RunDir(Path(tempfile.mkdtemp())), None, processes
    )


def drawn(session: Session) -> list[tuple[int, ...]]:
    """What the first process samples by itself, without sharing it out."""
    requests = [Request(tokens(i), (i, 100 + i)) for i in range(3)]
    limits = Limits(temperature=1.0, top_p=0.9, max_new_tokens=8)
    samples = session.engine([given_anchor(session.slot)]).sample(requests, limits)
    return [one.token_ids for group in samples for one in group]


def parts(base: LoadedBase) -> tuple[int, int]:
    """Bytes of the decoder layers that this process holds, and that there are."""
    layers: Any = base.model.get_decoder()
    weights = list(layers.layers.parameters())
    return sum(held(one).nbytes for one in weights), sum(one.nbytes for one in weights)


def main(folder: Path, out: Path, device: Device) -> None:
    processes = Processes(place())
    done: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    with processes.joined(cpu=device == "cpu"):
        for name, (quantization, sharded) in CASES.items():
            base = load_base(section(folder, quantization, device), sharded=sharded)
            shares[name] = parts(base)
            done[name] = logits(base), trainings(base)
        of_all = processes.gather((shares, {name: digests(one) for name, (_, one) in done.items()}))
        if not processes.place.leads:
            follow(processes)
            return
        session = session_of(folder, device, processes)
        with session.leading():
            texts = drawn(session)
        torch.save((done, of_all, texts), out)


def digests(trained: Mapping[str, tuple[Adapter, Any]]) -> dict[str, str]:
    return {name: adapter.digest() for name, (adapter, _) in trained.items()}


if __name__ == "__main__":
    _, base_folder, target, where = sys.argv
    main(Path(base_folder), Path(target), "cuda" if where == "cuda" else "cpu")
