"""The notebooks run, on a run of files and on a few replies."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from reporting import add_anchor, add_iteration, evaluation, new_run, some_pairs

from srlm_lite.recipe import load_recipe
from srlm_lite.records import Judgement
from srlm_lite.run.files import write_records
from srlm_lite.run.layout import StageDir
from srlm_lite.run.run import RunDir
from srlm_lite.stages.seed_data import data_file, read_ranked

nbformat: Any = pytest.importorskip("nbformat")
nbclient: Any = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def executed(name: str) -> str:
    """All that a notebook shows; a cell that fails fails the test."""
    notebook: Any = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(
        [str(output.text) for output in outputs if output.output_type == "stream"]
        + [str(text) for output in outputs for text in output.get("data", {}).values()]
    )


def judged_run(path: Path) -> RunDir:
    """A toy run of two iterations, with the votes of three judges on the toy world's replies."""
    run = new_run(path, "evaluate.eft_prompts=6")
    groups = read_ranked(data_file(load_recipe("toy"), "eft_eval.jsonl"), 6)
    random = Random(1)

    def vote(place: StageDir) -> None:
        votes = []
        for row in (row for group in groups for row in group):
            score = (row.quality or 0.0) + random.choice((-2.0, 0.0, 0.0, 2.0))
            votes.append(Judgement(row.response_id, 0, f"Score: {score:g}", score, "stop"))
        write_records(place.evaluation_dir / "judgements.jsonl", votes)

    add_anchor(run)
    vote(run.anchor)
    for t in (1, 2):
        vote(add_iteration(run, t, some_pairs(6, seed=t), measured=evaluation(gold=2.0 + t)))
    return run


def test_explore_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = judged_run(tmp_path / "out")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    monkeypatch.setenv("SRLM_RUN", str(run.path))
    shown = executed("explore_a_run")
    assert "toy: method self-rewarding, 2 of 2 iterations finished" in shown
    assert "people prefer, score" in shown and "the judge prefers, score" in shown
    assert shown.count("<svg") >= 5 and "var(--" not in shown
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert after == before


def test_your_own_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRLM_PROMPTS", "2")
    shown = executed("your_own_judge")
    assert "the template must hold {{prompt}} and {{response}} once each" in shown
    assert "&lt;/reply> S core: 4" in shown  # a candidate that would close its own quotation
    assert "| model, the recipe's rubric |" in shown and "| model, my rubric |" in shown
    assert "people prefer (" in shown  # what the scorer misses


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_shipped_small_and_without_outputs(name: str) -> None:
    text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 30_000
    assert not [word for word in ("/home/", "/root/", "/Users/") if word in text]
    assert not [cell for cell in json.loads(text)["cells"] if cell.get("outputs")]
