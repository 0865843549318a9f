"""Today's model families through the loop: both proofs, exports equal to PEFT, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Cli
from driving import adapted, iterate, loaded, logits, peft_logits, stages
from families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_runs_and_is_exported_or_is_refused_in_one_line(
    name: str, family_base: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    family, base, run = FAMILIES[name], family_base(name), tmp_path / "run"
    targets = f"[{', '.join(family.targets)}]"
    lora = [f"{section}.lora.targets={targets}" for section in ("anchor", "dpo")]
    done = iterate(cli, base, run, lora)
    assert done.returncode == 0, done.stderr[-3000:]
    made = stages(run)
    assert made["delta"]["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert {module.rpartition(".")[2] for module in adapted(run)} == set(family.targets)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    done = cli("export", "--adapters", run, "--as", "adapter", "--out", adapter)
    assert done.returncode == 0, done.stderr[-3000:]
    done = cli("export", "--adapters", run, "--out", merged)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = peft_logits(base, adapter)
    moved = float((after - before).abs().max())
    assert moved > 0.05  # else an export that leaves everything out would be as good
    apart = float((logits(loaded(merged)) - after).abs().max())
    print("apart", apart, "moved", moved)
    assert apart < 0.25 * moved
