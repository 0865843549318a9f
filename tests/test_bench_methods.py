"""The bench of the methods: what it reads out of runs, and two small runs through the command."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from commands import Cli

from srlm_lite.bench.lending import (
    same_evaluation,
    same_first_grades,
    same_first_iteration,
    same_reading,
)
from srlm_lite.bench.methods import (
    ANCHORS,
    CASES,
    GROUPS,
    SHARED,
    SMALLER,
    Case,
    MethodsBench,
    _place,
    _recipe,
    above,
    bench_methods,
    cases_of,
    summary,
)
from srlm_lite.bench.methods_plot import COLORS, apart, plot
from srlm_lite.errors import TooFewPairs, UserError
from srlm_lite.loop import iterate
from srlm_lite.methods import METHODS
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.run.files import read_json
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session


def model(gold: float, **more: Any) -> dict[str, Any]:
    return {"gold": gold, "by_criterion": {"unique": gold / 5, "topic": 1.0}, **more}


def test_every_case_is_a_recipe_and_every_method_has_a_case() -> None:
    loaded = {n: load_recipe(c.recipe, [*SMALLER, *c.overrides]) for n, c in CASES.items()}
    assert {recipe.method for recipe in loaded.values()} == set(METHODS)
    assert all(recipe.evaluate.gold for recipe in loaded.values())
    for name, case in CASES.items():
        # An anchor is shared only by cases whose own would be the same.
        if case.anchor is not None:
            other = load_recipe(ANCHORS[case.anchor].recipe, SMALLER)
            assert (loaded[name].anchor, loaded[name].data.extra) == (
                other.anchor,
                other.data.extra,
            ), name


def test_what_cases_have_in_common() -> None:
    """The anchor's evaluation, and the first answers with their grades."""

    def recipe(case: Case, *more: str) -> Recipe:
        return load_recipe(case.recipe, [*SMALLER, *case.overrides, *more])

    shared = recipe(ANCHORS[SHARED])
    users = {name: recipe(case) for name, case in CASES.items() if case.anchor == SHARED}
    measured_apart = {name for name, one in users.items() if not same_evaluation(shared, one)}
    # Five answers to a prompt: batches of another size. And votes that count by probability.
    assert measured_apart == {"dno", "expected scores"}
    alike = {name for name, one in users.items() if same_first_grades(shared, one)}
    apart = {"dpo", "spin", "rlhf", "cream", "cream, judge", "temporal", "dno"}
    # Those have stages of their own.
    assert alike == set(users) - apart - {"expected scores"}
    # What such a stage reads makes a difference, what it does not read makes none.
    toy = CASES["self-rewarding"]
    for setting in ("seed=1", "rollout.n=3", "judge.votes=3", "evaluate.samples=2"):
        assert not same_evaluation(shared, recipe(toy, setting)), setting
    for setting in ("prompts.per_iteration=50", "pairing.drop_truncated=false"):
        assert not same_first_grades(shared, recipe(toy, setting)), setting
    other_data = {name for name, one in users.items() if not same_reading(shared, one)}
    assert other_data == {"dpo", "spin", "rlhf"}
    assert same_reading(shared, recipe(toy, "anchor.init=anchor", "rollout.n=3"))
    assert not same_reading(shared, recipe(toy, "anchor.ift_limit=10"))
    assert same_first_grades(shared, recipe(toy, "dpo.beta=0.3", "pairing.rho=0.3", "iterations=1"))


def test_what_a_second_delta_learns_makes_no_difference_to_the_first() -> None:
    settings = MethodsBench(Path("out"))
    recipes = {
        name: _recipe(settings, case, 0, Path("anchor"), 3)
        for name, case in CASES.items()
        if case.anchor == SHARED
    }
    plain = recipes["self-rewarding"]
    alike = {name for name, one in recipes.items() if same_first_iteration(one, plain)}
    rebased = {"all pairs so far", "all pairs, same steps"}
    disputed = {"all pairs, disputed dropped", "all pairs, disputed smoothed"}
    assert alike == {"self-rewarding", "init: anchor", *rebased, *disputed}
    # By another reference, and at another rate, it is another delta.
    for setting in ("dpo.reference=init", "dpo.learning_rate=1e-2", "pairing.rho=0.3"):
        other = load_recipe("toy", [*SMALLER, "anchor.init=anchor", setting])
        assert not same_first_iteration(other, plain), setting


def test_one_pass_takes_the_prompts_of_all_iterations() -> None:
    settings = MethodsBench(Path("out"), iterations=3, overrides=("prompts.per_iteration=20",))
    case = CASES["one pass"]
    recipe = _recipe(settings, case, 1, Path("anchor"), 3)
    assert (recipe.iterations, recipe.prompts.per_iteration, recipe.seed) == (1, 60, 1)
    assert _recipe(settings, case, 1, None, 0).iterations == 0
    # For another number of iterations it is another run.
    assert _place(settings, "one pass", 1).path == Path("out/one-pass-for-3-1")
    plain = CASES["self-rewarding"]
    assert _recipe(settings, plain, 1, None, 3).prompts.per_iteration == 20


def test_cases_by_name() -> None:
    assert cases_of(None) == tuple(CASES)
    assert cases_of("gold pairs; cream, judge") == ("gold pairs", "cream, judge")
    with pytest.raises(UserError, match=r"--cases: no such case: xyz\. There are: self-rewarding;"):
        cases_of("cream;xyz")


def test_cases_on_another_recipe() -> None:
    name = "smollm2-135m-demo"
    known = cases_of(None, name)
    assert {"self-rewarding", "one pass", "ipo"} <= set(known) < set(CASES)
    assert not {"dpo", "scpo", "pairwise"} & set(known)  # of recipes of their own
    settings = MethodsBench(Path("out"), cases=("self-rewarding", "one pass"), recipe=name)
    shipped = load_recipe(name)
    chain, rebased, once = (
        _recipe(settings, CASES[case], 2, Path("anchor"), 3)
        for case in ("self-rewarding", "all pairs so far", "one pass")
    )
    assert (chain.base, chain.judge, chain.evaluate) == (
        shipped.base,
        shipped.judge,
        shipped.evaluate,
    )
    # The same case as on the toy, whatever the recipe says.
    assert (shipped.dpo.init, chain.dpo.init, rebased.dpo.init) == ("anchor", "previous", "anchor")
    assert (chain.seed, chain.iterations, chain.prompts.per_iteration) == (2, 3, 40)
    assert (once.iterations, once.prompts.per_iteration) == (1, 120)
    assert same_first_grades(chain, rebased)
    # On the toy itself the chain is what its recipe says: runs made before go on.
    toy = MethodsBench(Path("out"))
    plain = _recipe(toy, CASES["self-rewarding"], 0, None, 3)
    assert plain == load_recipe("toy", [*SMALLER, "seed=0", "iterations=3"])
    assert (plain.dpo.init, plain.dpo.reference) == ("previous", "anchor")


@pytest.mark.parametrize(
    ("recipe", "cases", "message"),
    [
        ("smollm2-135m", "self-rewarding", "--recipe smollm2-135m: this recipe has no gold scorer"),
        ("smollm2-135m-demo", "dpo; ipo", "but of recipes of their own: dpo. Name others"),
        ("smollm2-135m-demo", "ipo; no judge data", "each train one: no judge data. Name others"),
    ],
)
def test_cases_that_cannot_be_run_on_a_recipe(recipe: str, cases: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        MethodsBench(Path("out"), cases=cases_of(cases, recipe), recipe=recipe)


def test_mean_and_spread_over_seeds() -> None:
    # Rises 1.0 and 0.6: mean 0.8, standard deviation 0.2828.
    runs = [
        {"models": [model(2.0), model(3.0, pairs=10, warnings={"w": ""}, chars=80)], "seconds": 4},
        {"models": [model(2.4), model(3.0, pairs=20, warnings={}, chars=90)], "seconds": 6},
    ]
    found = summary(runs)
    assert found["gold"] == [2.2, 3.0]
    assert found["gold_spread"] == [pytest.approx(0.2828, abs=1e-4), 0.0]
    assert (found["rise"], found["rise_spread"]) == (0.8, pytest.approx(0.2828, abs=1e-4))
    assert (found["pairs"], found["chars"]) == ([None, 15], [None, 85])
    assert (found["warned"], found["seconds"]) == (1, 5)
    assert found["by_criterion"] == [{"unique": 0.44, "topic": 1.0}, {"unique": 0.6, "topic": 1.0}]
    assert found["greedy_by_criterion"] == [{}, {}]  # not measured
    assert summary(runs[:1])["rise_spread"] is None
    # A run that stopped after its anchor: no rise, but a mean of what there is.
    found = summary([*runs, {"models": [model(2.5)], "seconds": 2, "stopped": "no pairs"}])
    assert found["gold"] == [2.3, 3.0]
    assert (found["rise"], found["stopped"], found["seconds"]) == (0.8, 1, 4)


def test_how_far_a_case_is_above_another_by_seed() -> None:
    # Gaps 0.5, 0.3, 0.1: mean 0.3, standard deviation 0.2, t 4.303: 4.303 * 0.2 / sqrt(3) = 0.4969.
    case, other = (
        [{"models": [model(1.0), model(gold)]} for gold in golds]
        for golds in ((3.0, 2.9, 2.8), (2.5, 2.6, 2.7))
    )
    found = above(case, other)
    assert found == {
        "mean": 0.3,
        "low": pytest.approx(-0.1969, abs=1e-4),
        "high": pytest.approx(0.7969, abs=1e-4),
    }
    assert above(case[:1], other[:1]) == {"mean": 0.5, "low": None, "high": None}
    assert above(case, []) is None
    case[2]["stopped"] = "no pairs"
    assert above(case, other) == above(case[:2], other[:2])


def test_the_plot_names_every_case_in_the_panel_of_its_group() -> None:
    gold = {"gold": [2.0, 2.5], "gold_spread": [0.1, None]}
    result = {
        "seeds": 3,
        "base": {"summary": {"gold": 1.9}},
        "cases": {name: {"summary": gold} for name in CASES},
    }
    drawn = plot(result)
    assert drawn == plot(result)  # the same bytes
    texts = [
        element.text
        for element in ElementTree.fromstring(drawn[drawn.index("<svg") :]).iter()
        if element.tag.endswith("}text")
    ]
    assert {*CASES, *GROUPS, "M0", "M1", "M2"} <= set(texts)
    # In a panel of its own, and in grey in the others.
    assert texts.count("self-rewarding") == len(GROUPS)
    assert texts.count("dpo") == 1
    assert max(map(len, GROUPS.values())) <= len(COLORS)


KILLED = """
import os, signal, sys
from pathlib import Path
from srlm_lite.bench.methods import MethodsBench, _workers

def worker(reporter):
    return os.getpid()

if __name__ == "__main__":
    with _workers(MethodsBench(Path("unused"), jobs=2), None) as begin:
        print(begin(worker)(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_worker_outlives_a_killed_bench(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout)
    deadline = time.monotonic() + 20
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_labels_keep_apart_in_their_order() -> None:
    assert apart({"a": 1.0, "b": 3.0}, 0.5) == {"a": 1.0, "b": 3.0}
    # 1.0 and 1.2 share out the room around 1.1.
    assert apart({"b": 1.2, "a": 1.0}, 0.5) == pytest.approx({"a": 0.85, "b": 1.35})
    # Those two then touch the third: mean 1.3.
    assert apart({"a": 1.0, "b": 1.2, "c": 1.7}, 0.5) == pytest.approx(
        {"a": 0.8, "b": 1.3, "c": 1.8}
    )


SMALL = ("anchor.ift_limit=48", "anchor.eft_prompts=48", "anchor.epochs=1",
         "anchor.lora={rank: 4, alpha: 8, targets: [q_proj, v_proj]}",
         "dpo.lora={rank: 4, alpha: 8, targets: [q_proj, v_proj]}", "prompts.per_iteration=6",
         "pairing.min_pairs=1", "judge.votes=1", "judge.min_votes=1",
         "rollout.max_new_tokens=32", "pairing.drop_truncated=false",
         "evaluate.policy_prompts=3", "evaluate.eft_prompts=2")  # fmt: skip


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_the_bench_runs_and_goes_on(jobs: str, tmp_path: Path, cli: Cli) -> None:
    names = ("self-rewarding", "random pairs", "dpo", "init: anchor")
    options = [word for setting in SMALL for word in ("--set", setting)]
    done = cli("bench", "methods", "--json", "--iterations", "1", "--jobs", jobs,
               "--out", tmp_path / "out", "--cases", "; ".join(names),
               "--plot", tmp_path / "plot.svg", *options)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    # Goes on, in this process: the runs are done, and only read.
    second = bench_methods(
        MethodsBench(tmp_path / "out", cases=names, iterations=1, overrides=SMALL)
    )
    again = json.loads(json.dumps(second))
    assert (first["cases"], first["base"]) == (again["cases"], again["base"])
    assert set(first["cases"]) == set(names)
    # Of fewer iterations than there are, no more is told.
    fewer = bench_methods(
        MethodsBench(tmp_path / "out", cases=names, iterations=0, overrides=SMALL)
    )
    for name, case in fewer["cases"].items():
        [only] = case["runs"][0]["models"]
        assert only["gold"] == first["cases"][name]["runs"][0]["models"][0]["gold"]
        assert case["runs"][0]["seconds"] == 0
    models = {name: first["cases"][name]["runs"][0]["models"] for name in names}
    one, other = models["self-rewarding"], models["dpo"]
    assert models["init: anchor"] == one  # one iteration in common
    assert one[0]["gold"] == other[0]["gold"]  # the same anchor
    assert one[1]["pairs"] >= 1 and one[0]["ranker_accuracy"] is not None
    assert other[0]["ranker_accuracy"] is None  # humans have ranked
    for models in (one, other):
        assert models[0]["divergence"] == 0  # the anchor itself
        assert models[1]["divergence"] == pytest.approx(0, abs=0.05)  # a step or two
        assert models[1]["divergence"] != 0
    assert {"gold", "greedy", "by_criterion"} <= first["base"]["runs"][0].keys()
    assert 0 <= one[1]["consistency"] <= 1
    assert first["cold_anchor"]["gold"][0] is not None
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    _is_as_if_run_alone(tmp_path / "out", "random pairs", "anchor-0", tmp_path / "alone")
    # Where cases run side by side, it may begin before the other's first iteration is done.
    lender = "self-rewarding-0" if jobs == "1" else None
    _is_as_if_run_alone(tmp_path / "out", "init: anchor", lender, tmp_path / "rebased")
    # A run that stops for want of pairs does not end the bench; it is told as far as it came.
    too_few = (*SMALL, "pairing.min_pairs=100")
    both = ("self-rewarding", "init: anchor")
    stopping = MethodsBench(tmp_path / "out", cases=both, iterations=2, overrides=too_few)
    for name, found in bench_methods(stopping)["cases"].items():
        [stopped] = found["runs"]
        assert "fewer than pairing.min_pairs = 100" in stopped["stopped"]
        assert stopped["models"] == first["cases"][name]["runs"][0]["models"]
    # By then their M2 has answered and graded, once for both, as it would have for each.
    plain, rebased = (_place(stopping, name, 0) for name in both)
    alone = RunDir(tmp_path / "rebased")
    recipe = _recipe(stopping, CASES[both[1]], 0, tmp_path / "out" / "anchor-0" / "anchor", 2)
    with pytest.raises(TooFewPairs):
        iterate(Session(recipe, alone))
    told = [
        [row for row in run.read_metrics() if row["iteration"] == 2]
        for run in (plain, rebased, alone)
    ]
    assert [row["stage"] for row in told[0]] == ["prompts", "candidates", "judgements"]
    assert told[0] == told[1] != told[2]  # but for the seconds
    for stage in ("prompts", "candidates", "judgements"):
        files = [getattr(run.iteration(2), stage) for run in (plain, rebased, alone)]
        assert len({file.read_bytes() for file in files}) == 1, stage


def _is_as_if_run_alone(out: Path, name: str, lender: str | None, alone: Path) -> None:
    """A case that took files from another run has the bytes that it would have made."""
    case, own = CASES[name], (f"anchor.init={out}/anchor-0/anchor", "iterations=1")
    recipe = load_recipe(case.recipe, [*SMALLER, *case.overrides, *SMALL, *own])
    run = RunDir(alone)
    run.open(recipe, {})
    iterate(Session(recipe, run))
    lent = _place(MethodsBench(out), name, 0)
    for mine, its in ((run.anchor, lent.anchor), (run.iteration(1), lent.iteration(1))):
        assert read_json(mine.done)["sha256"] == read_json(its.done)["sha256"]
    shared = RunDir(out / lender).read_metrics() if lender else []
    stages = {row["stage"]: row for row in lent.read_metrics() if row["iteration"] == 1}
    for row in shared:
        if row["iteration"] == 1:
            assert stages[row["stage"]] == row  # with the seconds that it took there
    assert [row["stage"] for row in lent.read_metrics()] == [
        row["stage"] for row in run.read_metrics()
    ]
