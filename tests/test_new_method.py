"""A method is one file: the walk-through of `docs/methods.md`, done as it says.

In a copy of the package the page's file, its row and its recipe are added, and nothing else. It
then runs, plans, reports and exports; and the tests that look at every method take it as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from exporting import random_adapter
from toy_run import SETTINGS

from srlm_lite.recipe import load_recipe
from srlm_lite.records import Candidate, Judgement, PreferencePair
from srlm_lite.run.files import read_records
from srlm_lite.run.run import RunDir

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
METHOD, _, RECIPE = re.findall(r"^```(?:python|yaml)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)

SMALL = (
    *SETTINGS,
    "iterations=1",
    "anchor.eft_prompts=1",
    "prompts.per_iteration=4",
    "rollout.max_new_tokens=32",
    "pairing.drop_truncated=false",
    "pairing.min_pairs=1",
    "evaluate.eft_prompts=1",
    "evaluate.policy_prompts=1",
)

COMMANDS = """
import json, sys
from srlm_lite.cli.main import run
for words in json.loads(sys.argv[1]):
    sys.argv = ["srlm-lite", *words]
    print("\\f", end="", flush=True)
    try:
        run()
    except SystemExit as end:
        if end.code:
            raise
"""
"""Several commands in one process, what each prints after a form feed."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which somebody has followed the page."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("srlm_lite", "recipes", "tests", "docs", ".ci"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("pyproject.toml", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    (root / "srlm_lite" / "methods" / "second_best.py").write_text(METHOD)
    (root / "recipes" / "toy-second-best.yaml").write_text(RECIPE)
    rows = root / "srlm_lite" / "methods" / "__init__.py"
    told = rows.read_text().replace("    Rlhf,\n)", "    Rlhf,\n    SecondBest,\n)")
    after = "from srlm_lite.methods.self_rewarding"
    line = "from srlm_lite.methods.second_best import SecondBest\n"
    rows.write_text(told.replace(after, line + after, 1))
    return root


def within(package: Path, *words: str) -> str:
    """What Python prints in that checkout."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=package, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_runs_plans_reports_and_exports(package: Path, tmp_path: Path) -> None:
    recipe = ("--recipe", "toy-second-best", *(w for one in SMALL for w in ("--set", one)))
    anchor, out = tmp_path / "anchor", RunDir(tmp_path / "out")
    base = Path(load_recipe("toy").base.name)  # it can answer and grade without an anchor
    random_adapter(base, seed=0, size=0.02).save(anchor, base_name=str(base))
    there, page, model = ("--adapters", str(out.path)), tmp_path / "report.html", tmp_path / "model"
    commands = (
        ("plan", *recipe, "--json"),
        ("iterate", *recipe, "--set", f"anchor.init={anchor}", *there),
        ("show", "run", *there),
        ("report", *there, "--out", str(page)),
        ("export", *there, "--out", str(model)),
    )
    said = within(package, "-c", COMMANDS, json.dumps(commands)).split("\f")[1:]
    plan, _, shown, *_ = said
    assert {"candidates", "judge", "DPO"} <= json.loads(plan)["phases"].keys()
    assert shown.startswith("toy-second-best: second-best, seed")
    place = out.iteration(1)
    votes: dict[str, list[float]] = {}
    for row in read_records(place.judgements, Judgement):
        if row.score is not None:
            votes.setdefault(row.candidate_id, []).append(row.score)
    score = {name: fmean(scores) for name, scores in votes.items()}
    pairs = read_records(place.pairs, PreferencePair)
    assert pairs
    by_prompt: dict[str, dict[str, float]] = {}
    for row in read_records(place.candidates, Candidate):  # of equal texts the first one counts
        if row.candidate_id in score:
            by_prompt.setdefault(row.prompt_id, {}).setdefault(row.text, score[row.candidate_id])
    for one in pairs:
        ranked = sorted(by_prompt[one.prompt_id].values(), reverse=True)
        assert (one.chosen_score, one.rejected_score) == (ranked[1], ranked[-1])

    assert "second-best" in page.read_text() and "place of the chosen answer" in page.read_text()
    card = (model / "README.md").read_text()
    assert "of a run of the method `second-best`" in card
    assert "DPO on the second best of them. Made with srlm-lite." in card
    assert "second_best:\n  place: 2\n" in (model / "recipe.yaml").read_text()


@pytest.mark.slow
def test_the_tests_of_all_methods_take_it(package: Path) -> None:
    """What a contributor is promised: a file, a row, a recipe; the page is written anew."""
    within(package, ".ci/docs.py")
    assert "| `toy-second-best` | `second-best` |" in (package / "docs" / "methods.md").read_text()
    asked = (
        "tests/test_settings.py",
        "tests/test_methods.py::test_every_method_has_a_recipe_and_an_unknown_one_is_told",
        "tests/test_methods.py::test_a_method_says_what_it_is",
        "tests/test_methods.py::test_a_method_s_settings_count_for_that_method_alone",
        "tests/test_bench_methods.py::test_every_case_is_a_recipe_and_every_method_has_a_case",
        "tests/test_bench_methods.py::test_what_cases_have_in_common",
        "tests/test_plan.py::test_every_method_has_phases",
        "tests/test_export.py::test_the_card_names_what_the_method_does",
        "tests/test_recipe.py::test_the_promised_recipes_are_shipped",
        "tests/test_recipe.py::test_shipped_recipes_have_their_data_or_say_how_to_make_it",
    )
    told = within(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not gpu", *asked)
    assert "passed" in told


def test_another_package_adds_one(tmp_path: Path) -> None:
    """By an entry point; one that is broken is told in a line."""
    (tmp_path / "second_best.py").write_text(METHOD)
    (tmp_path / "second-best.yaml").write_text(RECIPE)
    info = tmp_path / "second_best-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: second-best\nVersion: 1.0\n")
    named = info / "entry_points.txt"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def check(entry: str) -> subprocess.CompletedProcess[str]:
        named.write_text(f"[srlm_lite.methods]\nsecond-best = {entry}\n")
        words = ["recipes", "check", "second-best.yaml"]
        return subprocess.run(
            [sys.executable, "-m", "srlm_lite", *words], cwd=tmp_path, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip

    assert check("second_best:SecondBest").returncode == 0
    for entry, said in (
        ("second_best:Third", "this method cannot be imported (AttributeError: "),
        ("nowhere:Nothing", "this method cannot be imported (ModuleNotFoundError: "),
        ("second_best:RECIPE", "this method cannot be imported"),
        ("second_best:SecondBestSettings", "is not a method"),
        ("srlm_lite.methods.spin:Spin", "two methods are called spin"),
    ):
        done = check(entry)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
