"""`base.backend: unsloth`: the same loop, the same proofs, in processes of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from srlm_lite.errors import UserError
from srlm_lite.model import unsloth_backend
from srlm_lite.model.stack import Adapter
from srlm_lite.recipe import load_recipe
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session

needs_unsloth = pytest.mark.unsloth

Iterate = Callable[..., Path]


@pytest.fixture(scope="module")
def iterate(tmp_path_factory: pytest.TempPathFactory) -> Iterate:
    """Runs the tiny recipe through the command; each set of settings once."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in done:
            out = tmp_path_factory.mktemp("unsloth") / "run"
            options = [word for each in settings for word in ("--set", each)]
            command = [sys.executable, "-m", "srlm_lite", "iterate", "--recipe", "tiny"]
            ended = subprocess.run(
                [*command, "--iterations", "1", "--adapters", str(out), *options],
                capture_output=True,
                text=True,
            )
            assert ended.returncode == 0, ended.stderr[-3000:]
            assert "nsloth" not in ended.stdout  # what it prints is no data
            done[settings] = out
        return done[settings]

    return run


def step0(out: Path) -> float:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [delta] = [row for row in rows if row["stage"] == "delta"]
    return float(delta["step0_loss"])


@needs_unsloth
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_anchor_rollout_and_dpo_on_a_cpu(iterate: Iterate, quantization: str) -> None:
    out = iterate("base.backend=unsloth", f"base.quantization={quantization}", "base.device=cpu")
    assert step0(out) == pytest.approx(0.693147, abs=1e-4)
    anchor = Adapter.load(out / "anchor")
    assert any(torch.count_nonzero(b) for _, b in anchor.factors.values())
    counts = json.loads((out / "iter_001" / "done.json").read_text())["counts"]
    assert counts["pairs"]["pairs"] >= 2
    assert "unsloth" in json.dumps(json.loads((out / "run.json").read_text())["recipe"])


@needs_unsloth
def test_on_a_cpu_it_gives_the_plain_backends_bytes(iterate: Iterate) -> None:
    """In float32, where Unsloth keeps to torch's own arithmetic."""
    common = ("base.quantization=none", "base.device=cpu")
    plain, ours = iterate(*common), iterate("base.backend=unsloth", *common)
    for name in ("candidates.jsonl", "judgements.jsonl", "pairs.jsonl"):
        assert (ours / "iter_001" / name).read_bytes() == (plain / "iter_001" / name).read_bytes()
    for adapter in ("anchor", "iter_001/delta"):
        assert not Adapter.load(ours / adapter).differs_from(Adapter.load(plain / adapter))


@needs_unsloth
def test_it_is_measured_beside_the_plain_backend() -> None:
    words = ["bench", "gpu", "--device", "cpu", "--backend", "unsloth", "--ways", "ours", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "srlm_lite", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["backend"] == "unsloth" and found["base"]["bytes_per_linear_weight"] < 0.53
    assert found["ways"]["ours"]["dpo"]["step0_loss"] == pytest.approx(0.693147, abs=1e-4)


@needs_unsloth
@pytest.mark.gpu
def test_a_loop_on_a_gpu(iterate: Iterate) -> None:
    """NF4 and Unsloth's kernels: SFT, sampling by its generate, DPO with its proof."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    out = iterate("base.backend=unsloth", "base.device=cuda", "base.dtype=bfloat16")
    assert step0(out) == pytest.approx(0.693147, abs=1e-3)
    counts = json.loads((out / "iter_001" / "done.json").read_text())["counts"]
    assert counts["pairs"]["pairs"] >= 2


def test_without_unsloth_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "unsloth" else found(name)
    )
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    recipe = load_recipe("tiny", ["base.backend=unsloth"])
    with pytest.raises(UserError, match=r"base\.backend: Unsloth is not installed\. pip install"):
        Session(recipe, RunDir(tmp_path))


def test_unsloth_after_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what it rewrites would be in use already."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    assert "transformers" in sys.modules
    with pytest.raises(UserError, match="has to be imported before transformers"):
        unsloth_backend.import_first()


def test_iterate_imports_it_before_it_plans(tmp_path: Path) -> None:
    """A plan asks transformers for the base's shape."""
    (tmp_path / "unsloth.py").write_text(
        "import sys\nraise RuntimeError('late' if 'transformers' in sys.modules else 'in time')"
    )
    words = ["iterate", "--recipe", "tiny", "--set", "base.backend=unsloth", "--adapters", "out"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "srlm_lite", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "srlm-lite: base.backend: Unsloth does not start: in time. Set base.backend=transformers"
    )
    assert not (tmp_path / "out").exists()


def test_an_unsloth_that_does_not_start_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unsloth.py").write_text(
        "raise NotImplementedError('no accelerator?\\nYou need a GPU.')"
    )
    code = (
        "from srlm_lite.model.unsloth_backend import import_first\n"
        "from srlm_lite.errors import UserError\n"
        "try:\n    import_first()\n"
        "except UserError as error:\n    print(error)"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parent.parent}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == (
        "base.backend: Unsloth does not start: no accelerator?. Set base.backend=transformers"
    )
