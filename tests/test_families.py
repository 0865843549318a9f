"""Today's model families through the loop: both proofs, exports equal to PEFT, or a refusal."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Cli
from driving import adapted, iterate, loaded, logits, peft_logits, stages, watch_sampling
from families import ADAPTER, DOCS, FAMILIES, MERGED, QUANTIZED, page

from srlm_lite.planning.probe import shape_of_base
from srlm_lite.run.files import read_json
from srlm_lite.settings import Base


def names(targets: tuple[str, ...]) -> list[str]:
    told = f"[{', '.join(targets)}]"
    return [f"{section}.lora.targets={told}" for section in ("anchor", "dpo")]


TELLING = {
    "llama": "the plain case",
    "gemma2": "capped scores, windows, norms behind the layers",
    "gemma3": "text and vision",
    "gpt2": "transposed weights, plain `generate`",
    "qwen3_next": "linear attention beside experts",
    "deepseek_v3": "latent attention, a router's bias",
    "gpt_oss": "experts that are fused in the files too",
    "mamba": "no attention at all",
    "granitehybrid_moe": "scans, experts, scaled logits",
    "recurrent_gemma": "prompts of equal length alone are sampled together",
}
"""Families whose code takes ways of its own here; the others are slow: variations of these."""


@pytest.mark.parametrize(
    "name",
    [name if name in TELLING else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_a_family_runs_and_is_exported_or_is_refused_in_one_line(
    name: str,
    family_base: Callable[[str], Path],
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, base, run = FAMILIES[name], family_base(name), tmp_path / "run"
    ways = watch_sampling(monkeypatch)
    done = iterate(cli, base, run, names(family.targets))
    if family.refused:
        assert done.returncode == 2, done.stderr[-3000:]
        last = done.stderr.splitlines()[-1]
        assert last.startswith("srlm-lite: ") and family.refused in last
        assert not (run / "anchor" / "adapter_model.safetensors").exists()
        return
    assert done.returncode == 0, done.stderr[-3000:]
    made = stages(run)
    assert made["anchor"]["step0_nll"] > 0  # held to the model's own loss, or the run had ended
    assert made["delta"]["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert made["delta"]["step0_margin"] == pytest.approx(0, abs=1e-3)
    assert {module.rpartition(".")[2] for module in adapted(run)} == set(family.targets)
    assert bool(shape_of_base(Base(name=str(base))).experts) == family.experts
    assert ways == {family.sampled}
    for kind in (MERGED, ADAPTER):
        # In 16 bits a token near a tie may go to another expert, and the logits with it.
        exact = ("--dtype", "float32") if kind == MERGED else ()
        done = cli("export", "--adapters", run, "--as", kind, "--out", tmp_path / kind, *exact)
        assert done.returncode == (0 if kind in family.exports else 2), done.stderr[-3000:]
    before, after = peft_logits(base, tmp_path / ADAPTER)
    moved = float((after - before).abs().max())
    assert moved > 0.5  # else an export that leaves all of it out would be as good
    if MERGED in family.exports:
        apart = float((logits(loaded(tmp_path / MERGED)) - after).abs().max())
        assert apart < 1e-4 * moved


@pytest.mark.parametrize(("name", "kept"), QUANTIZED.items())
def test_a_checkpoint_in_few_bits_is_refused_before_the_anchor(
    name: str, kept: str, family_base: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    base = shutil.copytree(family_base(name), tmp_path / "base")
    settings = read_json(base / "config.json")
    settings["quantization_config"] = {"quant_method": kept}
    (base / "config.json").write_text(json.dumps(settings))
    done = iterate(cli, base, tmp_path / "run", names(FAMILIES[name].targets))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "is quantized already" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "anchor" / "adapter_model.safetensors").exists()


def test_the_page_of_bases_says_what_these_tests_hold() -> None:
    assert DOCS.read_text() == page(), "write it anew: make docs"
