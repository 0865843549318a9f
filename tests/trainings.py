"""Trainings that one process and two are to do alike; also a script, for each of several processes.

python tests/trainings.py BASE OUT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from srlm_lite.config import Anchor, Base, Dpo, Lora
from srlm_lite.model.base import load_base
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.processes import Processes, place
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.sft import Example, train_sft

LORA = Lora(rank=4, alpha=8)


def tokens(seed: int) -> tuple[int, ...]:
    """3 to 12 ids."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(3, 13, (1,), generator=generator))
    return tuple(torch.randint(3, 300, (n,), generator=generator).tolist())


def trainings(folder: Path) -> dict[str, tuple[Adapter, dict[str, float]]]:
    """An SFT and two DPO runs, none of which divides evenly by batches or processes."""
    base = load_base(Base(name=str(folder), device="cpu", dtype="float32"))
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
    given = slot.fresh(LORA, seed=2)
    generator = torch.Generator().manual_seed(3)
    given = Adapter(
        given.rank,
        given.alpha,
        {
            name: (a, 0.02 * torch.randn(b.shape, generator=generator))
            for name, (a, b) in given.factors.items()
        },
    )
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


if __name__ == "__main__":
    processes = Processes(place())
    with processes.joined(cpu=True):
        done = trainings(Path(sys.argv[1]))
        digests = processes.gather({name: adapter.digest() for name, (adapter, _) in done.items()})
        if processes.place.leads:
            torch.save((done, digests), sys.argv[2])
