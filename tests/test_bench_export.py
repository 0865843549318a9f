"""`srlm-lite bench export`, on a base of a few layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from commands import Cli

from srlm_lite.bench import export as bench
from srlm_lite.bench import gguf
from srlm_lite.export import llama_cpp
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


def test_llama_cpp_beside_the_stack(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of 16 bits shows in 8 places; a base without a tokenizer has nothing to measure."""
    monkeypatch.setattr(gguf, "QUESTIONS", gguf.QUESTIONS[:2])
    monkeypatch.setattr(gguf, "TOKENS", 4)
    paths = []
    for seed in (0, 1):
        paths.append(tmp_path / str(seed))
        bench.random_adapter(tiny_base_dir, seed=seed, share=0.05).save(paths[-1], base_name="x")
    row = gguf.bench_gguf(tiny_base_dir, paths, tmp_path, Silent())
    assert row is not None and (row["prompts"], row["tokens"]) == (2, 8)
    assert {"f16", "bf16", "q8_0"} <= row["types"].keys()
    f16 = row["types"]["f16"]
    assert f16["bytes"] == (tmp_path / "f16.gguf").stat().st_size
    assert f16["read"]["top1_agreement"] == 1 and f16["read"]["mean_kl"] < 1e-5
    assert row["types"]["q8_0"]["read"]["mean_kl"] > f16["read"]["mean_kl"]
    if llama_cpp.installed():
        assert f16["llama_cpp"]["top1_agreement"] == 1


def test_a_base_without_a_tokenizer_has_no_gguf_file(base: Path, tmp_path: Path) -> None:
    assert gguf.bench_gguf(base, (), tmp_path, Silent()) is None
