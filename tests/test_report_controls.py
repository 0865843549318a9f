"""A run beside its controls: what they are called, and what they say of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from messages import Told as Refusals
from reporting import add_iteration, evaluation, finish, new_run, some_pairs
from typer.testing import CliRunner

from srlm_lite.cli.main import app
from srlm_lite.report.controls import Beside, comparisons, controls_of, rows, verdict
from srlm_lite.report.facts import Estimate, Facts, gather
from srlm_lite.report.html import html
from srlm_lite.report.markdown import markdown
from srlm_lite.run.run import RunDir

CONTROLS: dict[str, tuple[tuple[str, ...], str]] = {
    "random": (("pairing.source=random",), "pairs drawn blindly"),
    "flipped": (("pairing.source=flipped",), "the judge's pairs turned round"),
    "sft": (("dpo.loss=sft",), "SFT on the chosen replies alone"),
    "one pass": (
        ("iterations=1", "prompts.per_iteration=400"), "one pass over all 400 prompts",
    ),
    "cold": (("iterations=0", "evaluate.temperature=0.5"), "the anchor at temperature 0.5"),
    "cold chain": (
        ("iterations=0", "evaluate.temperature=0.5", "dpo.init=anchor"),
        "the anchor at temperature 0.5",
    ),
    "rebased": (
        ("dpo.init=anchor",),
        "rebased: each delta from the anchor; on all pairs so far",
    ),
    "other": (("dpo.beta=0.2", "rollout.n=3"), "rollout.n 3; dpo.beta 0.2"),
}  # fmt: skip


def made(
    path: Path, *overrides: str, gold: tuple[float, ...] = (2.0, 2.5, 2.9), weights: bytes = b"same"
) -> RunDir:
    """A run with these gold scores, each with a standard error of 0.1, as far as it has models."""
    run = new_run(path, *overrides)
    run.anchor.path.mkdir(parents=True)
    (run.anchor.path / "adapter_model.safetensors").write_bytes(weights)
    finish(run.anchor, evaluation(gold=gold[0], best_of={"n": 4, "gold_mean": 2.3, "gold_se": 0.1}))
    for t in range(1, run.recipe().iterations + 1):
        add_iteration(run, t, some_pairs(5, seed=t), measured=evaluation(gold=gold[t]))
    return run


def beside(run: RunDir, *others: RunDir) -> Facts:
    return replace(gather(run), controls=tuple(gather(one, texts=False) for one in others))


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_called_by_what_it_does_otherwise(name: str, tmp_path: Path) -> None:
    overrides, called = CONTROLS[name]
    facts = beside(made(tmp_path / "run"), made(tmp_path / "control", *overrides))
    [control] = controls_of(facts)
    assert (control.name, control.doubts) == (called, [])
    assert control.kind == ("other" if name in ("rebased", "other") else "control")


def test_what_makes_figures_no_comparison_is_said(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    others = [
        made(tmp_path / "a", weights=b"other"),
        made(tmp_path / "b", "seed=1", "evaluate.policy_prompts=10"),
        made(tmp_path / "c", "evaluate.temperature=0.5"),
        made(tmp_path / "d"),
    ]
    others[3].iteration(2).done.unlink()
    found = controls_of(beside(run, *others))
    assert [one.doubts for one in found] == [
        ["it has another anchor"],
        ["measured otherwise: seed, evaluate.policy_prompts"],
        ["measured otherwise: evaluate.temperature"],
        ["it is not finished"],
    ]
    assert found[0].name == "the same settings"


def test_what_the_controls_say(tmp_path: Path) -> None:
    """0.9 and 0.6 ahead are more than 1.96 sqrt(0.1^2 + 0.1^2) = 0.277, and 0.1 is not."""
    run = made(tmp_path / "run")
    blind = made(tmp_path / "r", "pairing.source=random", gold=(2.0, 1.9, 1.8))
    facts = beside(run, blind)
    told = comparisons(facts)
    # Of the control the best counts as well; where no iteration is better than M1, one of those.
    assert [one.text for one in told] == [
        "pairs drawn blindly: 1.90 against 2.90 here, +1.00 (95% interval +0.72 to +1.28)",
        "no training: M1's pick, as judge, of 4 answers: 2.30 against 2.90 here, "
        "+0.60 (95% interval +0.32 to +0.88)",
    ]
    assert verdict(told) == "More than chance above every control: the rise is the loop's own."
    once = made(tmp_path / "o", "iterations=1", "prompts.per_iteration=400", gold=(2.0, 2.8))
    bound = made(tmp_path / "g", "pairing.source=gold", gold=(2.0, 3.0, 4.0))
    facts = beside(run, blind, once, bound)
    found = verdict(comparisons(facts))
    assert found.startswith("Not above one pass over all 400 prompts by more than chance:")
    # The bound is told of, and held against nobody.
    assert any(one.text.startswith("pairs by the gold scorer") for one in comparisons(facts))
    # Another way to learn that gets as far takes nothing from the run.
    facts = beside(run, blind, made(tmp_path / "a", "dpo.init=anchor"))
    assert "+0.00" in comparisons(facts)[1].text
    assert verdict(comparisons(facts)).startswith("More than chance above every control")
    assert verdict([]).startswith("None of these runs is a control")


def test_a_control_may_have_the_anchor_s_pick(tmp_path: Path) -> None:
    """It was measured of the control's anchor, the same one, and there only."""
    run = made(tmp_path / "run")
    measured = evaluation(gold=2.0)
    run.anchor.done.unlink()
    finish(run.anchor, measured)
    picked = made(tmp_path / "p", "iterations=0", "evaluate.best_of=4")
    facts = beside(run, picked)
    [control] = controls_of(facts)
    assert (control.name, control.doubts) == ("the anchor", [])
    assert [one.name for one in comparisons(facts)][1].startswith("no training: M1's pick")
    other = made(tmp_path / "o", "iterations=0", "evaluate.best_of=4", weights=b"other")
    assert len(comparisons(beside(run, other))) == 1


def test_without_intervals_nothing_is_told_apart() -> None:
    assert not Beside("x", Estimate(3.0), Estimate(1.0)).told_apart


def test_without_gold_the_anchor_s_grades_speak(tmp_path: Path) -> None:
    def graded(path: Path, *overrides: str, score: float, weights: bytes = b"same") -> RunDir:
        run = made(path, *overrides, weights=weights)
        for place in (run.anchor, *run.iterations()):
            policy: dict[str, Any] = {"anchor_score": score, "anchor_score_se": 0.1}
            place.done.unlink()
            finish(place, evaluation(gold=None, **policy))
        return run

    run = graded(tmp_path / "run", score=3.0)
    blind = graded(tmp_path / "r", "pairing.source=random", score=2.0)
    [one] = comparisons(beside(run, blind))
    assert (one.mine.value, one.theirs.value) == (3.0, 2.0)
    # Another anchor grades by another measure.
    other = graded(tmp_path / "o", "pairing.source=random", score=2.0, weights=b"other")
    assert comparisons(beside(run, other)) == []


def test_the_table_counts_what_led_to_each_model(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    for t in (1, 2):
        run.add_metrics({"iteration": t, "stage": "prompts", "seconds": 1.0, "prompts": 20})
        row = {"iteration": t, "stage": "pairs", "seconds": 1.0, "pairs": 18}
        run.add_metrics(row | ({"replayed": 18} if t == 2 else {}))
        run.add_metrics({"iteration": t, "stage": "delta", "seconds": 1.0, "steps": 3 * t})
    found = rows(beside(run, made(tmp_path / "r", "pairing.source=random")))
    assert [row[:5] for row in found[:3]] == [
        ("this run", "M1", "", "", ""),
        ("this run", "M2", "20", "18", "3"),
        ("this run", "M3", "40", "54", "9"),
    ]
    assert found[0][5:8] == ("2.00", "2.00", "2.30")
    assert [row[0] for row in found[3:]] == ["pairs drawn blindly"] * 3


def test_page_and_summary_have_them(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    facts = beside(run, made(tmp_path / "r", "pairing.source=random", gold=(2.0, 1.9, 1.8)))
    page, summary = html(facts), markdown(facts)
    for text in (page, summary):
        assert "the rise is the loop&#39;s own" in text or "the rise is the loop's own" in text
        assert "pairs drawn blindly: 1.90 against 2.90 here" in text
    assert 'href="#controls"' in page and re.search(r"## Controls\n", summary)
    alone = html(gather(run)), markdown(gather(run))
    assert not any("ontrols" in text for text in alone)


def test_the_command(tmp_path: Path, told: Refusals) -> None:
    run = made(tmp_path / "run")
    control = made(tmp_path / "r", "pairing.source=random", gold=(2.0, 1.9, 1.8))
    command = ["report", "--adapters", str(run.path), "--control"]
    done = CliRunner().invoke(app, [*command, str(control.path)])
    assert done.exit_code == 0
    assert "More than chance above every control" in done.stderr
    assert "Beside its controls" in run.report.read_text()
    with told.refused():
        app([*command, str(run.path)], standalone_mode=False)
    with told.refused():
        app([*command, str(tmp_path / "nowhere")], standalone_mode=False)
