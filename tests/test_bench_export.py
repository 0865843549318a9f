"""`srlm-lite bench export`, on a base of a few layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from commands import Cli

from srlm_lite.bench import export as bench
from srlm_lite.model.checkpoint import Checkpoint
from srlm_lite.progress import Silent

SHAPE = {
    **bench.LARGE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.random_base(tmp_path_factory.mktemp("bench") / "base", SHAPE)


def job(base: Path, folder: Path, *, four_bit: bool) -> bench.ExportJob:
    paths = (folder / "anchor", folder / "delta")
    for seed, path in enumerate(paths):
        adapter = bench.random_adapter(base, seed=seed, share=0.01 / math.sqrt(2))
        adapter.save(path, base_name=str(base))
    return bench.ExportJob(base, paths, folder / "out", four_bit)


def test_an_update_has_the_norm_it_is_given(base: Path) -> None:
    adapter = bench.random_adapter(base, seed=0, share=0.02)
    assert len(adapter.factors) == 14  # seven targets in each of two layers
    for module, (a, b) in adapter.factors.items():
        weight = Checkpoint(base).read(f"{module}.weight").float()
        share = float((adapter.scaling * b @ a).norm() / weight.norm())
        assert share == pytest.approx(0.02, rel=1e-3)


def test_what_is_left_of_an_update(base: Path, tmp_path: Path) -> None:
    """Rounded once, 16 bits keep the update; NF4 rounded again does not."""
    ours = bench._ours(job(base, tmp_path / "a", four_bit=False))
    peft = bench._peft(job(base, tmp_path / "b", four_bit=False))
    ours4 = bench._ours(job(base, tmp_path / "c", four_bit=True))
    peft4 = bench._peft(job(base, tmp_path / "d", four_bit=True))
    assert peft["cosine"] < ours["cosine"] > 0.98
    assert ours4["cosine"] > 0.98 and ours4["projection"] == pytest.approx(1, abs=0.01)
    assert peft4["cosine"] < 0.3
    assert ours["tensor_error"] < 4e-4


def test_the_command(base: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one of its ways in a process of its own; each such process imports all anew."""
    apart = bench.apart
    monkeypatch.setattr(
        bench, "apart", lambda way, job: apart(way, job) if way is bench._peft else way(job)
    )
    done = cli("bench", "export", "--base", base, "--json", "--no-four-bit")
    assert done.returncode == 0
    # Of the process that it starts, too; how far it is is told where it takes over a minute.
    assert [line for line in done.stderr.splitlines() if not line.startswith("    export: ")] == []
    row: dict[str, Any] = json.loads(done.stdout)
    assert set(row["ways"]) == {"copy", "ours", "peft"}
    assert row["bytes"] == sum(i.nbytes for s in Checkpoint(base).shards.values() for i in s)


def test_the_command_merges_on_4_bits_too(
    base: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "apart", lambda way, job: way(job))
    done = cli("bench", "export", "--base", base)
    assert done.returncode == 0
    assert "norm ratio" in done.stdout and "ours, 4-bit" in done.stdout


def test_nothing_is_left_behind(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bench, "apart", lambda way, job: way(job))
    row = bench.bench_export(
        bench.RANDOM, update=0.01, four_bit=False, reporter=Silent(), shape=SHAPE
    )
    assert row["parameters"] == sum(
        math.prod(i.shape) for s in Checkpoint(base).shards.values() for i in s
    )
    assert list(tmp_path.iterdir()) == []
