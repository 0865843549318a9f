"""`make gpu` and `make wheels`: what they write, as far as a machine without a GPU can show."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from packaging.utils import canonicalize_name
from typer.main import get_command

from srlm_lite.bench.gpu import WAYS
from srlm_lite.cli.main import app

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, wheels = load("gpu_report"), load("gpu_wheels")

HEAD: dict[str, Any] = {
    "date": "2026-11-25",
    "machine": {"processor": "A CPU", "cores": 8, "gpus": [{"name": "A GPU", "gigabytes": 80}]},
    "versions": {"torch": "2.13.0"},
}
PHASE = {"seconds": 2.0, "tokens_per_s": 512.0, "floor_share": 0.25, "peak_bytes": 5_000_000_000}
TINY = {
    **HEAD,
    "shape": "tiny",
    "parameters": 7_000_000_000,
    "base": {"seconds": 3.0, "bytes": 1, "in_use_bytes": 4e9, "peak_bytes": 4.5e9},
    "ways": {"ours": {"candidates": PHASE, "dpo": {**PHASE, "seconds_per_step": 1.5}}},
    "machine_rates": {"matmul_flops_per_s": {"a": 7e14}, "copy_bytes_per_s": 4.2e12},
    "job": {
        "prompts": 16,
        "n": 4,
        "answer_tokens": 256,
        "votes": 3,
        "vote_tokens": 96,
        "batch": 4,
        "micro_batch": 1,
        "reply_tokens": 512,
    },
}
PLAN = {
    **HEAD,
    "recipe": "llama2-70b",
    "phases": {
        "DPO": {"predicted_bytes": 54e9, "measured_bytes": 53e9, "error": 1 / 53, "seconds": 38.0}
    },
}


def write(folder: Path, **files: Any) -> None:
    for name, found in files.items():
        (folder / f"{name}.json").write_text(json.dumps(found))


def test_the_section_says_what_was_measured_and_what_failed(tmp_path: Path) -> None:
    write(
        tmp_path,
        **{"gpu-tiny-ours": TINY, "gpu-llama2-70b": {"failed": "out of memory", "wall_s": 3.0}},
        **{"gpu-tiny-plain": TINY | {"ways": {"plain": {"candidates": PHASE}}}},
        **{"plan-llama2-70b-DPO": PLAN, "plan-llama2-70b-load": {"failed": "no CUDA device"}},
        tests={"passed": 9, "failed": ["tests.test_gpu::test_x"], "skipped": 1, "exit_code": 1},
        doctor={"machine": [{"name": "GPU 0", "text": "A GPU, 80 GB; CUDA 13.0, driver 580"}]},
    )
    text = report.section(tmp_path)
    assert text.startswith("2026-11-25: A GPU; A CPU, 8 cores.\nGPU 0: A GPU, 80 GB; CUDA 13.0")
    assert "Versions: torch 2.13.0." in text
    assert "9 passed, 1 failed, 1 skipped" in text and "`tests.test_gpu::test_x`" in text
    assert "| tiny | ours | candidates | 2 | 512 | 0.250 | 5.00 |" in text
    assert "| tiny | ours | a DPO step | 1.5 | 512 | 0.250 | 5.00 |" in text
    assert "- `llama2-70b` failed: out of memory" in text
    assert "| tiny | plain | candidates | 2 | 512 | 0.250 | 5.00 |" in text
    assert text.count("7.00 billion weights built in 3.0 s, 4.00 GB in use") == 1
    assert "| llama2-70b | DPO | 54.00 | 53.00 | +1.9% | 38 |" in text
    assert "- `plan-llama2-70b-load` failed: no CUDA device" in text


def test_every_part_is_a_command_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed as the command line would parse it, and not run."""
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: object())
    wanted = Namespace(shapes="tiny,llama2-70b", plans="llama2-70b", device="cpu", no_rollout=False)
    parts = report.parts_of(wanted)
    assert "gpu-tiny-folded" in parts and "gpu-llama2-70b-folded" not in parts
    assert list(parts).index("plan-llama2-70b-DPO") < list(parts).index("rollout")
    assert report.WAYS == WAYS
    for words in parts.values():
        command: Any = get_command(app)
        rest = [*words, "--json"]
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        command.make_context(words[-1], rest)


def test_the_section_replaces_itself_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "BENCHMARKS.md"
    file.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    report.put_section(file, "new\n")
    once = file.read_text()
    assert once == f"before\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nafter\n"
    report.put_section(file, "new\n")
    assert file.read_text() == once
    file.write_text("no marks")
    with pytest.raises(SystemExit, match="marks of this section are missing"):
        report.put_section(file, "new\n")
    assert file.read_text() == "no marks"


def test_without_a_gpu_nothing_is_run_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    into = tmp_path / "BENCHMARKS.md"
    into.write_text(f"{report.BEGIN}\n{report.END}\n")
    words = ["gpu_report.py", "--out", str(tmp_path / "gpu"), "--into", str(into)]
    monkeypatch.setattr(sys, "argv", words)
    assert report.main() == 2
    assert capsys.readouterr().err.startswith("torch sees no GPU here")
    assert into.read_text() == f"{report.BEGIN}\n{report.END}\n"
    assert not (tmp_path / "gpu").exists()


def test_tests_of_an_extra_run_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "is_installed", lambda extra: False)
    assert report.marks() == "gpu and not vllm and not unsloth"
    monkeypatch.setattr(report, "is_installed", lambda extra: extra == "vllm")
    assert report.marks() == "gpu and not unsloth"


def test_benchmarks_has_a_place_for_it() -> None:
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert text.index(report.BEGIN) < text.index(report.END)


@pytest.mark.parametrize(
    ("code", "timeout", "failed"),
    [
        ("print('{\"a\": 1}')", 60, None),
        ("import sys; sys.exit('srlm-lite: no CUDA device was found')", 60, "srlm-lite: no CUDA"),
        ("import time; time.sleep(60)", 0.5, "did not end in 0 s"),
        ("print('{}')", 0.0, "did not end in 0 s"),  # the budget was used up before
    ],
)
def test_a_part_that_fails_is_kept_as_failed(
    tmp_path: Path, code: str, timeout: float, failed: str | None
) -> None:
    file = tmp_path / "part.json"
    ended_well = report.run_part("part", [sys.executable, "-c", code], file, timeout)
    found = json.loads(file.read_text())
    assert ended_well == (failed is None)
    if failed is None:
        assert found["a"] == 1
    else:
        assert found["failed"].startswith(failed)


def test_a_part_that_is_out_of_time_ends_with_what_it_has_started(tmp_path: Path) -> None:
    started = tmp_path / "started"
    code = (
        "import subprocess, sys, time\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(started)!r}, 'w').write(str(one.pid))\n"
        "time.sleep(60)"
    )
    assert not report.run_part("part", [sys.executable, "-c", code], tmp_path / "part.json", 5.0)
    pid = int(started.read_text())
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} goes on")


def test_no_test_file_needs_what_a_gpu_machine_lacks() -> None:
    """All of them are imported there, for the few tests that run."""
    there = set(wheels.closure(["srlm-lite", *wheels.TESTS], python="3.12", skip=[]))
    owners = metadata.packages_distributions()
    own = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"srlm_lite"}
    for path in sorted((ROOT / "tests").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else names
            for top in {str(name).partition(".")[0] for name in names} - own:
                if top not in sys.stdlib_module_names:
                    needed = {canonicalize_name(name) for name in owners.get(top, [top])}
                    assert needed & there, f"{path.name} imports {top}"


def test_the_wheels_are_what_the_package_needs_and_no_cuda() -> None:
    found = wheels.closure(["srlm-lite", "pytest"], python="3.12", skip=list(wheels.SKIP))
    assert {"transformers", "trl", "peft", "bitsandbytes", "pydantic-core", "pytest"} <= set(found)
    assert not {"torch", "triton", "mypy", "vllm"} & set(found)
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-"))]
    fewer = wheels.closure(["srlm-lite"], python="3.12", skip=["torch", "hugging*"])
    assert "huggingface-hub" not in fewer and "pytest" not in fewer
