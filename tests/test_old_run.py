"""A run of commit 513090d goes on, is measured, exported and reported by the code of today.

It is `tests/data/run-513090d`: the recipe `tiny`, unquantized and with adapters of rank 1, after
one of its iterations. Its directory stood elsewhere, and so did the recipes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import Cli, in_process

from srlm_lite import recipe as recipes
from srlm_lite.recipe import Recipe, as_begun, load_recipe, recipe_from
from srlm_lite.run.files import sha256_file
from srlm_lite.run.run import RunDir
from srlm_lite.settings import Before, marked
from srlm_lite.shipped import recipes_dir

KEPT = Path(__file__).parent / "data" / "run-513090d"
SETTINGS = [
    *("anchor.lora.rank=1", "dpo.lora.rank=1", "base.quantization=none", "judge.votes=2"),
    *("anchor.lora.targets=[q_proj,v_proj]", "dpo.lora.targets=[q_proj,v_proj]"),
    *("prompts.per_iteration=8", "rollout.n=3", "anchor.ift_limit=32", "anchor.eft_prompts=16"),
]
"""What it was begun with."""


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    return in_process(monkeypatch, capfd)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    shutil.copytree(KEPT, tmp_path / "run")
    return RunDir(tmp_path / "run")


def moved_here(run: RunDir) -> None:
    """Have the run name the recipes of this checkout, as one that was begun here does."""
    for file in (run.run_json, run.base_json):
        text = file.read_text()
        assert "/srv/srlm-lite/recipes" in text
        file.write_text(text.replace("/srv/srlm-lite/recipes", str(recipes_dir())))


def test_settings_that_came_since_are_no_other_configuration(run: RunDir) -> None:
    """Not one key more than it noted, so that hashes made of the identity stay as well."""
    named = load_recipe("tiny", SETTINGS)
    assert as_begun(named, run.facts()["recipe"], where="r").identity() == run.facts()["identity"]
    moved_here(run)
    assert run.recipe().identity() == run.facts()["identity"]
    assert run.recipe().digest() == run.facts()["digest"]


def test_it_goes_on_and_keeps_what_it_has(cli: Cli, run: RunDir) -> None:
    before = {file: sha256_file(file) for file in run.iteration(1).path.rglob("*.*")}
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    done = cli("iterate", "--recipe", "tiny", "--adapters", run.path, "--iterations", "2", *sets)
    assert done.returncode == 0, done.stderr
    assert "resuming tiny" in done.stderr
    assert run.last_done() == 2
    assert {file: sha256_file(file) for file in before} == before
    facts = json.loads(run.iteration(2).delta_place.training.read_text())
    assert facts["step0_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_it_is_measured_reported_and_exported(cli: Cli, run: RunDir, tmp_path: Path) -> None:
    moved_here(run)
    there = ("--adapters", run.path)
    assert cli("show", "run", *there).returncode == 0
    assert cli("report", *there).returncode == 0
    assert "M2" in run.report.read_text()
    # Another number of votes, so that it is computed anew.
    again = cli("evaluate", *there, "--iteration", "1", "--set", "evaluate.votes=1")
    assert again.returncode == 0, again.stderr
    done = cli("export", *there, "--iteration", "1", "--out", tmp_path / "m2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m2" / "model.safetensors").is_file()


def test_a_default_that_came_later_leaves_older_runs_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if `rollout.fold` and `dpo.beta` had come later, with other defaults than what was."""
    later = [("rollout.fold", Before(True)), ("dpo.beta", Before(0.3))]
    monkeypatch.setattr(
        recipes,
        "marked",
        lambda section, kind: iter(later) if kind is Before else marked(section, kind),
    )

    def noted(**sections: dict[str, Any]) -> Recipe:
        raw = {"name": "t", "base": {"name": "some/base"}, "data": {"dir": "nowhere"}, **sections}
        return recipe_from(raw, where="r")

    old: dict[str, Any] = noted().model_dump(mode="json")
    del old["rollout"]["fold"], old["dpo"]["beta"]
    kept = as_begun(noted(), old, where="r")
    assert (kept.rollout.fold, kept.dpo.beta) == (True, 0.3)
    # Neither stands in its identity, nor in that of a new run that says the same itself.
    assert "fold" not in kept.identity()["rollout"]
    assert kept.digest() == noted(rollout={"fold": True}, dpo={"beta": 0.3}).digest()
    # A new run has the new defaults, and is another configuration.
    assert noted().identity()["dpo"]["beta"] == 0.1
    # What is said aloud counts, and so does what a newer run has noted.
    assert as_begun(noted(dpo={"beta": 0.2}), old, where="r").dpo.beta == 0.2
    newer = noted().model_dump(mode="json")
    assert as_begun(noted(), newer, where="r").dpo.beta == 0.1


@pytest.mark.parametrize("command", ["iterate", "report", "evaluate", "export"])
@pytest.mark.parametrize("harm", ["edited", "truncated", "deleted"])
def test_a_file_of_a_finished_stage_that_is_not_as_written(
    cli: Cli, run: RunDir, tmp_path: Path, command: str, harm: str
) -> None:
    moved_here(run)
    harmed = [run.iteration(1).pairs, run.anchor.evaluation_dir / "answers_greedy.jsonl"]
    for file in harmed:
        if harm == "deleted":
            file.unlink()
        elif harm == "truncated":
            file.write_bytes(file.read_bytes()[:-40])
        else:
            file.write_text(file.read_text().replace(".", "!", 1))
    extra = {"export": ("--iteration", "1", "--out", tmp_path / "m2")}.get(command, ())
    done = cli(command, "--adapters", run.path, *extra)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    state = "missing" if harm == "deleted" else "changed"
    assert all(f"{file} ({state})" in done.stderr for file in harmed)
    assert "Restore them" in done.stderr


# --- of commit ec4f683: a delta each for policy and judge ---------------------------------------

KEPT_LATER = KEPT.with_name("run-ec4f683")
"""One iteration of `meta-rewarding` on the recipe `tiny`: pairs of answers trained the policy's
delta, pairs of judgements the judge's."""


@pytest.fixture
def later(tmp_path: Path) -> RunDir:
    shutil.copytree(KEPT_LATER, tmp_path / "later")
    run = RunDir(tmp_path / "later")
    moved_here(run)
    return run


def test_a_run_of_the_commit_before_forms_were_noted_is_what_it_was(later: RunDir) -> None:
    assert "format" not in later.facts() and later.last_done() == 1
    assert later.recipe().identity() == later.facts()["identity"]
    assert later.recipe().digest() == later.facts()["digest"]
    assert later.iteration(1).judge_place.training.is_file()
    later.check(later.recipe())


def test_it_is_shown_and_reported(cli: Cli, later: RunDir) -> None:
    there = ("--adapters", later.path)
    for words in (("show", "run"), ("show", "pairs"), ("show", "judgements"), ("report",)):
        assert cli(*words, *there).returncode == 0, words
    assert "M2" in later.report.read_text()


@pytest.mark.parametrize("what", ["run", "pairs", "judgements"])
def test_what_show_shows_is_held_to_what_was_written(cli: Cli, later: RunDir, what: str) -> None:
    """Found by the campaign: an eval.json of another run, in the table of `show run`."""
    file = later.iteration(1).evaluation if what == "run" else later.iteration(1).pairs
    file.write_text(file.read_text().replace("1", "2", 1))
    done = cli("show", what, "--adapters", later.path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{file} (changed)" in done.stderr


@pytest.mark.slow
@pytest.mark.model
def test_it_goes_on_with_a_judge_of_its_own_and_is_exported(
    cli: Cli, later: RunDir, tmp_path: Path
) -> None:
    before = {file: sha256_file(file) for file in later.iteration(1).path.rglob("*.*")}
    there = ("--adapters", later.path)
    done = cli("iterate", *there, "--iterations", "2")
    assert done.returncode == 0, done.stderr
    assert "resuming tiny" in done.stderr and later.last_done() == 2
    assert {file: sha256_file(file) for file in before} == before
    assert later.facts()["format"] == 1
    done = cli("export", *there, "--iteration", "2", "--out", tmp_path / "m3", "--as", "adapter")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m3" / "adapter_model.safetensors").is_file()
