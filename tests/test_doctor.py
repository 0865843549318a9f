"""`srlm-lite doctor`: says what is so, in words and colours, and ends with 1 where nothing runs."""

from __future__ import annotations

import io
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Cli
from packaging.requirements import Requirement
from rich.console import Console

from srlm_lite import hardware
from srlm_lite.cli import doctor
from srlm_lite.doctor import machine, packages, proof
from srlm_lite.doctor.finding import Finding
from srlm_lite.doctor.recipes import recipe_finding
from srlm_lite.errors import ProofError, UserError
from srlm_lite.model import whereabouts
from srlm_lite.model.base import base_is_here
from srlm_lite.planning import machine as planning
from srlm_lite.planning.machine import plan_for
from srlm_lite.recipe import load_recipe
from srlm_lite.rollout.memory import memory_of
from srlm_lite.settings import Base
from srlm_lite.training import selftest

# --- packages ---------------------------------------------------------------------------------


def findings_of(requirement: str, tested: dict[str, str]) -> list[Finding]:
    found = packages.package_findings([Requirement(requirement)], tested)
    return [finding for finding in found if finding.name not in packages.IMPORTED]


def test_a_package_is_held_against_range_and_tested_version() -> None:
    own = packages.installed_version("pydantic")
    [ok] = findings_of("pydantic>=2", {"pydantic": str(own)})
    assert (ok.state, ok.name) == ("ok", "versions") and "as tested" in ok.text
    [other] = findings_of("pydantic>=2", {"pydantic": "2.0.0"})
    assert (other.state, other.text) == ("warning", f"{own}, tested with 2.0.0")
    [outside] = findings_of("pydantic>=1,<2", {"pydantic": "1.10.0"})
    assert outside.state == "bad" and "is outside <2,>=1" in outside.text
    assert outside.way_out == "pip install 'pydantic==1.10.0'"
    [absent] = findings_of("no-such-package>=3", {})
    assert (absent.state, absent.text) == ("bad", "not installed")
    assert absent.way_out == "pip install 'no-such-package>=3'"


def test_a_library_that_does_not_start_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_lib.py").write_text("raise RuntimeError('operator torchvision::nms')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "IMPORTED", ("broken_lib",))
    [finding] = packages.package_findings([], {})
    assert finding.state == "bad" and "cannot be imported: operator" in finding.text
    assert finding.way_out == "pip uninstall torchvision"


def test_the_tested_versions_are_the_constraints() -> None:
    tested = packages.tested_versions()
    assert tested["trl"] == "1.14.0" and "types-pyyaml" in tested
    assert {Requirement(r).name for r in ("torch", "peft")} <= {r.name for r in packages.declared()}
    assert "pytest" not in {requirement.name for requirement in packages.declared()}


# --- machine ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("driver", "built", "state", "text"),
    [
        (None, None, "warning", "none: small bases run on the CPU"),
        ("580.1", None, "bad", "driver 580.1 is here, but torch"),
        ("470.2", "13.0", "bad", "driver 470.2 is here, but torch (CUDA 13.0) finds no device"),
    ],
)
def test_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, built: str | None, state: str, text: str
) -> None:
    monkeypatch.setattr(machine, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    [finding] = machine.gpu_findings()
    assert finding.state == state and finding.text.startswith(text)
    assert (finding.way_out is None) == (driver is None)


def test_a_container_s_limit_counts_as_the_machine_s_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plan, in the batch that an engine forms by itself, and here."""
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "LIMIT", limit)
    for said, counts in (("1000000000\n", 10**9), ("max\n", None)):
        limit.write_text(said)
        memory = planning.machine_memory()
        assert memory == counts if counts else memory > 10**9
        assert memory_of(torch.device("cpu")) == memory
        facts = machine.memory_finding().facts
        assert facts is not None and facts["total_bytes"] == memory
        assert int(str(facts["free_bytes"])) <= memory


@pytest.mark.parametrize(("free", "state"), [(1e9, "bad"), (9e9, "warning"), (90e9, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, state: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1e12, 0, int(free)))
    assert machine.disk_finding(tmp_path).state == state


# --- recipes ----------------------------------------------------------------------------------


def test_a_recipe_that_could_start_is_ready() -> None:
    assert recipe_finding(load_recipe("tiny")).state == "ok"


def test_a_recipe_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    finding = recipe_finding(load_recipe("tiny", ["base.name=some-org/no-base", "data.dir=rows"]))
    assert finding.state == "bad"
    assert "its base is not here, and the Hub cannot be reached" in finding.text
    assert finding.text.endswith("its data directory, rows, is not here")
    assert finding.way_out is not None and "srlm-lite data prepare" in finding.way_out


def test_a_recipe_says_what_it_takes_and_whether_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "machine_memory", lambda: 600_000_000)
    recipe = load_recipe("tiny", ["base.device=cpu"])
    finding = recipe_finding(recipe)
    assert finding.state == "bad" and "does not fit" in finding.text
    assert finding.way_out == "Name a smaller base, or a machine with more memory"
    monkeypatch.setattr(planning, "machine_memory", lambda: 25_000_000_000)
    finding = recipe_finding(recipe)
    assert finding.state == "ok" and finding.facts is not None
    assert finding.facts["fits"] is True
    assert finding.facts["peak_bytes"] == plan_for(recipe).peak
    slow = recipe_finding(load_recipe("llama3.1-8b", ["base.device=cpu"]))
    assert "a CPU is too slow for it" in slow.text
    doctor.show(Console(), {"recipes": [finding]}, usable=True)
    shown = capsys.readouterr().out
    assert f"tiny {plan_for(recipe).peak / 1e9:.1f}" in shown and "of 25.0 here" in shown


def cached(folder: Path, files: dict[str, str]) -> Path:
    """A snapshot in the layout of the Hub's cache."""
    repository = folder / "models--some-org--base"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    return snapshot


def test_a_base_in_the_hubs_cache_is_here_when_all_of_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = whereabouts.snapshot_download
    monkeypatch.setattr(
        whereabouts, "snapshot_download", lambda *a, **k: download(*a, **k, cache_dir=tmp_path)
    )
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config.json": "{}", "model.safetensors.index.json": index}
    snapshot = cached(tmp_path, {**files, "model-1.safetensors": ""})
    assert not base_is_here(Base(name="some-org/base"))
    (snapshot / "model-2.safetensors").write_text("")
    assert base_is_here(Base(name="some-org/base"))
    with pytest.raises(UserError, match=r"no config\.json"):
        base_is_here(Base(name=str(tmp_path)))


# --- the proof --------------------------------------------------------------------------------


def test_the_proof_sees_a_base_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    base = selftest.toy_base(dtype="float32")
    train = selftest.train_dpo

    def moving(slot: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(slot, *args, **kwargs)
        next(base.model.parameters()).data[0] += 1
        return result

    monkeypatch.setattr(selftest, "train_dpo", moving)
    with pytest.raises(ProofError, match=r"changed the base's weights in .*embed_tokens"):
        selftest.prove_stack(base)


def test_a_proof_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(base: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(selftest, "prove_stack", failing)
    plain, nf4 = proof.proof_findings()
    assert (plain.state, nf4.state) == ("bad", "warning")
    assert plain.text == "RuntimeError: no kernel image"
    assert nf4.way_out is not None


# --- the command ------------------------------------------------------------------------------


@pytest.mark.model
def test_the_command(cli: Cli) -> None:
    done = cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["usable"] is True
    assert set(found) > {"packages", "extras", "machine", "proof of the stack", "recipes"}
    plain, nf4 = found["proof of the stack"]
    for way in (plain, nf4):
        assert way["state"] == "ok"
        assert way["facts"]["step0_loss"] == pytest.approx(0.693147, abs=1e-5)
        assert way["facts"]["step0_margin"] == pytest.approx(0, abs=1e-5)
    recipes = {finding["name"]: finding for finding in found["recipes"]}
    assert recipes["tiny"]["state"] == "ok"
    assert "llama2-70b" in recipes


def test_where_a_part_of_it_is_bad_it_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    bad = Finding("bad", "unquantized", "first loss 0.669600")
    monkeypatch.setattr(proof, "proof_findings", lambda: [bad])
    monkeypatch.setattr(packages, "package_findings", lambda: [Finding("ok", "versions", "all")])
    done = cli("doctor")
    shown = done.stdout
    assert done.returncode == 1
    assert "fails   unquantized" in shown and shown.rstrip().endswith("not usable like this")


def test_a_torch_that_does_not_start_ends_the_visit(
    monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    bad = Finding("bad", "torch", "cannot be imported: libcudart.so.13")
    monkeypatch.setattr(packages, "package_findings", lambda: [bad])
    monkeypatch.setattr(machine, "machine_findings", lambda folder: pytest.fail("went on"))
    assert cli("doctor").returncode == 1


def test_the_screen_is_wide_enough_for_80_columns() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system="standard")
    long = Finding("warning", "GPU", "word " * 40, "a way out")
    same = [Finding("ok", name, "ready") for name in ("tiny", "toy")]
    same += [Finding("bad", name, "its base is not here " * 3) for name in ("large", "huge")]
    doctor.show(console, {"machine": [long], "recipes": same}, usable=True)
    lines = out.getvalue().splitlines()
    assert "\x1b[33mwarning" in out.getvalue() and "\x1b[32mok" in out.getvalue()
    plain = [Console(file=io.StringIO(), width=200).render_str(line).plain for line in lines]
    assert any("tiny, toy" in line for line in plain)
    assert any("2 recipes  large, huge: its base is" in line for line in plain)
    import re

    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines) <= 80


def test_a_recipe_s_figure_stays_on_its_line() -> None:
    facts = {"peak_bytes": 1_400_000_000, "memory_bytes": 25_000_000_000}
    names = [f"toy-{'abcdefghij'[:n]}" for n in range(1, 11)]
    found = [Finding("ok", name, "ready", facts=dict(facts)) for name in names]
    for width in range(60, 90):
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=width, color_system=None)
        doctor.show(console, {"recipes": found}, usable=True)
        for name in names:
            assert f"{name} 1.4" in out.getvalue(), (width, name)
