"""`srlm-lite export` as a user runs it: what it prints, and how it is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import exporting
import pytest
import torch
from commands import Cli
from exporting import make_run, random_adapter
from forked import Program
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from srlm_lite.export.export import Export, ExportWish
from srlm_lite.export.source import find_source
from srlm_lite.progress import Silent
from srlm_lite.run.files import sha256_file
from srlm_lite.run.run import RunDir


@pytest.fixture
def command(cli: Cli) -> Cli:
    """`srlm-lite export ARGS`."""
    return partial(cli, "export")


@pytest.fixture(scope="module")
def run(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    adapters = [random_adapter(tiny_base_dir, seed=seed) for seed in (0, 1)]
    path = tmp_path_factory.mktemp("export") / "run"
    return make_run(path, tiny_base_dir, adapters=adapters, dtype="float32")


def test_it_prints_parity_and_leaves_a_model(run: RunDir, command: Cli, tmp_path: Path) -> None:
    done = command("--adapters", run.path, "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "same most probable token" in done.stdout and "tolerance" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "parity.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert exporting.parity(tmp_path / "out")["dtype"] == "bfloat16"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]

    again = command("--adapters", run.path, "--out", tmp_path / "out", "--iteration", "7")
    assert (again.returncode, again.stdout) == (2, "")
    assert len(again.stderr.splitlines()) == 1
    assert "has no iteration 7. It has: anchor, 1" in again.stderr


def test_a_delta_that_rounding_drowns_is_said(
    run: RunDir, tiny_base_dir: Path, command: Cli, tmp_path: Path
) -> None:
    """Updates of a millionth; bfloat16 rounds weights to three digits or so."""
    adapters = [
        random_adapter(tiny_base_dir, seed=0),
        random_adapter(tiny_base_dir, seed=1, size=1e-6),
    ]
    small = make_run(tmp_path / "run", tiny_base_dir, adapters=adapters, dtype="float32")
    for of, dtype, drowns in (
        (small, "bfloat16", True),
        (small, "float32", False),
        (run, "bfloat16", False),
    ):
        out = tmp_path / f"{of is small}-{dtype}"
        done = command("--adapters", of.path, "--out", out, "--dtype", dtype)
        told = f"warning: rounding to {dtype} moves the logits more than the last adapter does"
        assert done.returncode == 0 and (told in done.stderr) is drowns, (dtype, done.stderr)


def wide_run(folder: Path, tokenizer: Path, *, layers: int) -> RunDir:
    """On a base of 25 MB a layer, in files of up to 10 MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base", max_shard_size="10MB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "base")
    adapters = [random_adapter(folder / "base", seed=seed, size=0.01) for seed in (0, 1)]
    return make_run(folder / "run", folder / "base", adapters=adapters, dtype="float32")


@pytest.fixture(scope="module")
def larger_run(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return wide_run(tmp_path_factory.mktemp("larger"), tiny_base_dir, layers=8)


def test_a_killed_export_never_looks_finished(larger_run: RunDir, tmp_path: Path) -> None:
    """SIGKILL as soon as the second file is whole; the same command then goes on."""
    out, draft = tmp_path / "out", tmp_path / ".out.partial"
    process = Program("-m", "srlm_lite", "export", "--adapters", larger_run.path, "--out", out)
    end = time.monotonic() + 60
    while len(list(draft.glob("*.safetensors"))) < 2 and time.monotonic() < end:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert not out.exists()
    whole = {file.name: file.stat().st_mtime_ns for file in draft.glob("*.safetensors")}
    assert len(whole) >= 2

    again = Export(find_source(larger_run.path, "last"), ExportWish(out), Silent())
    again.make()
    assert not draft.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    fresh = tmp_path / "fresh"
    Export(find_source(larger_run.path, "last"), ExportWish(fresh), Silent()).make()
    files = {file.name: sha256_file(file) for file in out.iterdir()}
    assert files == {file.name: sha256_file(file) for file in fresh.iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 10


def test_memory_stays_small_whatever_the_size(
    larger_run: RunDir, tiny_base_dir: Path, tmp_path: Path
) -> None:
    """Six layers more are 150 MB in files; in memory they cost next to nothing."""
    smaller_run = wide_run(tmp_path / "smaller", tiny_base_dir, layers=2)
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from srlm_lite.export.export import Export, ExportWish\n"
        "from srlm_lite.export.source import find_source\n"
        "from srlm_lite.progress import Silent\n"
        "def peak_after(run, out):\n"
        "    export = Export(find_source(Path(run), 'last'), ExportWish(Path(out)), Silent())\n"
        "    export.make()\n"
        "    rows = Path('/proc/self/status').read_text().splitlines()\n"
        "    peak = next(int(row.split()[1]) for row in rows if row.startswith('VmHWM'))\n"
        "    return peak * 1024, export.nbytes\n"
        "first, second, out = sys.argv[1:]\n"
        "print(json.dumps([peak_after(first, out + '1'), peak_after(second, out + '2')]))\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(smaller_run.path),
            str(larger_run.path),
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    (before, small), (after, large) = json.loads(done.stdout.splitlines()[-1])
    assert after - before < (large - small) / 3
