"""The report: what it gathers from a run, what it says of it, and that no text can break out."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reporting import (
    Reply,
    Told,
    add_anchor,
    add_iteration,
    evaluation,
    finish,
    new_run,
    some_pairs,
)
from typer.testing import CliRunner

from srlm_lite.cli.iterate import next_steps
from srlm_lite.cli.main import app
from srlm_lite.errors import UserError, program
from srlm_lite.evaluate.judge_metrics import collapsed_score
from srlm_lite.records import Judgement, Label, PreferencePair
from srlm_lite.report.answer import (
    LENGTH_GROWTH,
    anchor_beside_best,
    answer,
    best,
    duration,
    worries,
)
from srlm_lite.report.charts import MOST_POINTS, groups
from srlm_lite.report.draw import VARIABLES, svg
from srlm_lite.report.facts import Estimate, Facts, Pair, gather
from srlm_lite.report.html import MOST_BYTES, html
from srlm_lite.report.markdown import markdown
from srlm_lite.report.pack import pack, shortened
from srlm_lite.run.files import read_json, read_records, write_json, write_records
from srlm_lite.run.run import RunDir

NASTY = (
    "<script>window.hurt = 1</script>",
    "<img src=x onerror='window.hurt = 1'>",
    "</script><script>window.hurt = 1</script>",
    "<svg onload=window.hurt=1>",
    "\"><iframe srcdoc='<script>parent.hurt=1</script>'>",
    "<!-- {{ 7 * 7 }} {% raw %} &lt;b&gt; \u2028",
    "<a href='javascript:window.hurt=1'>a</a><base href='//hurt'><meta http-equiv=refresh>",
    "<style>* { background: url(//hurt) }</style><p style='color: hurt'>",
)


def make_run(path: Path) -> RunDir:
    """Anchor and two iterations: gold 2.0, 2.5, 2.3, each with a standard error of 0.1."""
    run = new_run(path / "out", command="srlm-lite iterate", versions={"torch": "2.13.0"})
    add_anchor(run)
    add_iteration(run, 1, some_pairs(30), measured=evaluation(gold=2.5), drops={"tied": 3})
    add_iteration(run, 2, some_pairs(20, seed=1), measured=evaluation(gold=2.3))
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of the test's own."""
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """The facts of such a run that nobody changes."""
    return gather(make_run(tmp_path_factory.mktemp("facts")))


@pytest.fixture(scope="module")
def page(facts: Facts) -> str:
    """Its report."""
    return html(facts)


# --- facts -------------------------------------------------------------------------------------


def test_a_difference_has_the_root_of_both_squares() -> None:
    # 1.96 sqrt(0.1^2 + 0.1^2) = 0.2772
    difference = Estimate.of(2.5, 0.1).minus(Estimate.of(2.0, 0.1))  # type: ignore[union-attr, arg-type]
    assert difference.value == pytest.approx(0.5)
    assert difference.low == pytest.approx(0.5 - 0.2772, abs=1e-4)
    assert difference.high == pytest.approx(0.5 + 0.2772, abs=1e-4)


def test_an_interval_of_the_evaluation_goes_before_the_standard_error(run: RunDir) -> None:
    measured = read_json(run.anchor.evaluation)
    measured["policy"]["intervals"] = {"gold_mean": [1.7, 2.4]}
    write_json(run.anchor.evaluation, measured)
    assert gather(run).models[0].gold == Estimate(2.0, 1.7, 2.4)


def test_facts_count_what_the_stages_made(facts: Facts) -> None:
    assert [model.name for model in facts.models] == ["M1", "M2", "M3"]
    assert [it.paired_prompts for it in facts.iterations] == [30, 20]
    assert facts.iterations[0].drops == {"tied": 3}  # zeros, and counts of candidates, left out
    assert sum(facts.iterations[0].votes.values()) == 30 * 2 * 2
    assert len(facts.iterations[0].scored) == 60
    assert facts.seconds == 60 + 2 * 6 * 10
    assert facts.is_finished and facts.finished == facts.planned == 2


def test_votes_that_disagree() -> None:
    record = PreferencePair("p", "", "a", "b", "", "", 3.0, 1.0)
    votes = {
        name: tuple(row for row in _votes(name, scores))
        for name, scores in {"a": (4.0, 2.5), "b": (1.0, None, 1.5), "c": (None, 2.0)}.items()
    }
    assert Pair(1, record, votes["a"], votes["b"]).disagreement == 1.5
    assert Pair(1, record, votes["b"], votes["c"]).disagreement == 0.5
    assert Pair(1, record, votes["c"]).disagreement is None  # a single vote agrees with itself
    assert Pair(1, record).gap == 2.0


def _votes(name: str, scores: tuple[float | None, ...]) -> list[Any]:
    return [Judgement(name, i, "", score) for i, score in enumerate(scores)]


def test_a_replayed_pair_has_the_votes_of_its_own_iteration(run: RunDir) -> None:
    old = read_records(run.iteration(1).pairs, PreferencePair)[0]
    place = run.iteration(2)
    replay = PreferencePair(**{**old.to_row(), "origin": "replay, 1 back"})
    write_records(place.pairs, [*read_records(place.pairs, PreferencePair), replay])
    facts = gather(run)
    assert facts.pairs[-1].chosen_votes == facts.pairs[0].chosen_votes != ()
    assert facts.iterations[1].paired_prompts == 20  # a replay is no prompt with a new pair
    assert [pair.source for pair in facts.iterations[1].pairs] == [""] * 20 + ["replay, 1 back"]


# --- the answer --------------------------------------------------------------------------------


def test_yes_with_the_best_not_the_last(facts: Facts) -> None:
    found = answer(facts)
    assert found.improved == "yes"
    assert "2.00 (M1) to 2.50 (M2): +0.50 (95% interval +0.22 to +0.78)" in found.headline
    assert "M2, iteration 1" in found.export[0] and "M3 is the last one" in found.export[0]
    assert any("best of 2 iterations" in text for text in found.by_how_much)
    assert "report --control" in found.by_how_much[-1]
    held = answer(replace(facts, controls=(facts,)))
    assert not any("--control" in text for text in held.by_how_much)
    assert "3.0 min" in found.cost[0] and "50 pairs" in found.cost[-1]


@pytest.mark.parametrize(
    ("gold", "error", "improved"),
    [
        (2.2, 0.1, "unclear"),
        (1.9, 0.1, "unclear"),
        (1.5, 0.1, "no"),
        (2.5, None, "unclear"),
        (None, None, "unknown"),
    ],
)
def test_no_more_is_said_than_was_measured(
    tmp_path: Path, gold: float | None, error: float | None, improved: str
) -> None:
    run = new_run(tmp_path / "out")
    add_anchor(run)
    add_iteration(run, 1, some_pairs(5), measured=evaluation(gold=gold, error=error))
    facts = gather(run)
    found = answer(facts)
    assert found.improved == improved
    assert not found.headline.startswith("Yes")
    if gold == 1.5:
        assert found.export[0].startswith("None: no iteration has a higher gold score than M1")
    chosen = best(facts)
    assert chosen is not None and chosen.number == 1


def test_beside_a_better_anchor_the_best_iteration_is_one_that_is_sound(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out")
    add_anchor(run, evaluation(gold=None, anchor_score=3.0))
    far = evaluation(gold=None, anchor_score=4.9, divergence=3.0)
    add_iteration(run, 1, some_pairs(5), measured=far)
    near = evaluation(gold=None, anchor_score=2.95, divergence=0.1)
    add_iteration(run, 2, some_pairs(5), measured=near)
    facts = gather(run)
    chosen = best(facts)
    assert chosen is not None and chosen.number == 2
    assert answer(facts).export == (
        "None: no iteration that is sound has a higher score by the anchor than M1.",
        "The best of them is M3, iteration 2.",
    )


def test_worries_are_those_of_the_evaluation_and_of_length(run: RunDir) -> None:
    place = run.iteration(2)
    measured = evaluation(gold=1.0, accuracy=0.5, mean_length_chars=80.0 * LENGTH_GROWTH + 1)
    measured["judge"]["score_histogram"] = {"3": 99, "4": 1, "unreadable": 0}
    assert collapsed_score(measured["judge"]["score_histogram"]) == "3"
    write_json(place.evaluation, measured)
    text = "\n".join(worries(gather(run)))
    for told in ("collapsed", "accuracy fell from 0.90 to 0.50", "gold score fell", "80 to 105"):
        assert told in text
    assert "M3: " in text and "M2: " not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.2, "5 s"), (125, "2.1 min"), (5400, "1.5 h"), (360000, "100.0 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- charts ------------------------------------------------------------------------------------


def test_every_chart_has_its_table_and_draws(facts: Facts) -> None:
    charts = [chart for group in groups(facts) for chart in group.charts]
    slugs = [chart.slug for chart in charts]
    assert len(set(slugs)) == len(slugs)
    assert {"gold", "agreement", "kept", "seconds", "dpo-loss", "length-1"} <= set(slugs)
    for chart in charts:
        head, *rows = chart.table
        assert rows and all(len(row) == len(head) for row in rows), chart.slug
        drawn = svg(chart)
        ElementTree.fromstring(drawn)
        assert not [color for color in VARIABLES if color in drawn], chart.slug
        assert "var(--series-1)" in drawn


def test_the_tables_have_the_figures(facts: Facts) -> None:
    tables = {chart.slug: chart.table for group in groups(facts) for chart in group.charts}
    # 2.5 ± 1.96 * 0.1
    assert ("M2", "2.50", "2.30 to 2.70", "2.50", "2.30 to 2.70") in tables["gold"]
    assert ("iteration 1", "30", "3") in tables["kept"]
    assert tables["seconds"][2] == ("iteration 1", *["0.0"], *["10.0"] * 6)
    assert tables["dpo-loss"][1] == ("1", "0.6900", "0.6900")
    # 10 + 12 + 8 + 2 votes
    assert tables["scores-M3"] == (
        ("score", "held-out replies (32 votes)"),
        ("1", "0.312"),
        ("2", "0.375"),
        ("4", "0.250"),
        ("unreadable", "0.062"),
    )


def test_a_scatter_of_many_draws_some_and_counts_all(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out")
    add_anchor(run)
    add_iteration(run, 1, some_pairs(400))
    chart = next(c for g in groups(gather(run)) for c in g.charts if c.slug == "length-1")
    assert len(chart.series[0].x) == MOST_POINTS
    assert [row[1] for row in chart.table[1:]] == ["160"] * 5  # 800 candidates in fifths


# --- runs that are old, partial, or of other methods -------------------------------------------


def whole(run: RunDir) -> str:
    """Page and summary of a run."""
    facts = gather(run)
    return html(facts) + markdown(facts)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = whole(new_run(tmp_path / "out"))
    assert "Nothing is measured yet" in page and "There is no model yet" in page
    assert "No iteration has preference pairs yet" in page


def test_a_run_with_its_anchor_only(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out")
    add_anchor(run)
    page = whole(run)
    assert "there is only the anchor" in page and "Not finished: 0 of 2" in page


def test_a_run_still_going(run: RunDir) -> None:
    """In an iteration under way, what grows is left alone: its last line may be half a line."""
    place = run.iteration(2)
    for file in (place.pairs, place.drops, place.evaluation, place.done):
        file.unlink()
    place.judgements.write_text('{"candidate_id": "p2-0#0", "vo')
    facts = gather(run)
    assert facts.models[2].evaluation == {} and facts.iterations[1].pairs == ()
    page = whole(run)
    assert "Not finished: 1 of 2 iterations are done; of iteration 2: prompts" in page
    assert "M2, iteration 1: it has the highest gold score" in page


def test_a_run_without_gold(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out", "evaluate.gold=null")
    add_anchor(run, evaluation(gold=None))
    add_iteration(run, 1, some_pairs(12), measured=evaluation(gold=None))
    page = whole(run)
    assert "the recipe names no gold scorer" in page
    assert "nothing that was measured says that it is the best" in page
    assert 'id="gold-title"' not in page and 'id="agreement-title"' in page


def test_a_run_without_a_judge_or_with_one_that_nobody_can_read(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out", "method=spin")
    add_anchor(run)
    add_iteration(run, 1, some_pairs(12), judged=False)
    unread = [Told("p", Reply(f"a {i}", [None, None]), Reply("b", [None, 2.0])) for i in range(12)]
    add_iteration(run, 2, unread)
    facts = gather(run)
    assert facts.iterations[0].votes == {} and facts.iterations[0].scored == ()
    assert facts.iterations[1].votes == {"2": 12, "unreadable": 36}
    whole(run)


def slugs(facts: Facts) -> set[str]:
    """The slugs of the charts."""
    return {chart.slug for group in groups(facts) for chart in group.charts}


def test_a_judge_behind_a_server_is_no_models_own(tmp_path: Path) -> None:
    server = ("judge.engine=openai", "openai.model=j", "openai.url=http://127.0.0.1:9/v1")
    for name, settings in (("own", ()), ("external", server)):
        run = new_run(tmp_path / name, *settings)
        add_anchor(run)
        made = {group.slug: group for group in groups(gather(run))}
        external = name == "external"
        title = made["scores"].charts[0].title
        assert title == ("the judge, at M1" if external else "M1 as judge")
        for slug in ("scores", "judging"):
            assert ("the judge, a server" in made[slug].intro) is external


def test_a_run_of_rlhf(tmp_path: Path) -> None:
    """Rewards have no words and no scale, there are no pairs, and RLOO is no DPO."""
    run = new_run(tmp_path / "out", "method=rlhf")
    add_anchor(run)
    place = add_iteration(run, 1, some_pairs(12), steps=0)
    rewards = read_records(place.judgements, Judgement)
    write_records(place.judgements, [replace(row, text="", vote=0) for row in rewards])
    write_records(place.pairs, [])
    told = {"steps": 9, "step0_kl": 0.0, "first_reward": 1.0, "last_reward": 2.5, "kl": 0.1}
    write_json(place.delta_place.training, told)
    run.metrics.unlink()
    run.add_metrics({"iteration": 0, "stage": "anchor", "seconds": 1.0})
    drawn = {"drawn": 24, "gold_pairwise_accuracy": 0.5, **told}
    run.add_metrics({"iteration": 1, "stage": "delta", "seconds": 9.0, **drawn})
    facts = gather(run)
    assert facts.iterations[0].votes == {} and len(facts.iterations[0].scored) == 24
    assert {"rloo-reward", "rloo-divergence", "length-1"} <= slugs(facts)
    assert slugs(facts).isdisjoint({"dpo-end", "dpo-loss", "kept"})
    tables = {chart.slug: chart.table for group in groups(facts) for chart in group.charts}
    assert tables["rloo-reward"][1] == ("iteration 1", "1.000", "2.500")
    assert tables["seconds"][0] == ("", "anchor", "RLOO")
    assert tables["agreement"][0][-1] == "reward model on the policy's answers, by gold"
    assert tables["length-1"][0] == ("characters", "candidates", "mean reward")
    assert "24 answers drawn in training" in answer(facts).cost[-1]
    page = whole(run)
    assert "This method makes none: the policy learns from the rewards" in page
    assert "votes a candidate" not in page and "weight of the divergence" in page
    assert "implicit ones" not in page


def test_a_run_of_rlaif(tmp_path: Path) -> None:
    """SFT on revisions, then pairs labelled by principles."""
    run = new_run(tmp_path / "out", "method=rlaif")
    add_anchor(run)
    first = add_iteration(run, 1, [], steps=0)
    write_json(first.delta_place.training, {"steps": 3, "first_loss": 2.0, "last_loss": 1.0})
    second = add_iteration(run, 2, some_pairs(3), judged=False)
    pair = read_records(second.pairs, PreferencePair)[0]
    label = Label(pair.prompt_id, pair.rejected_id, pair.chosen_id, "be kind", 0.2)
    write_records(second.labels, [label])
    page = whole(run)
    assert [row["by"] for row in packed_rows(page)] == ["be kind", "", ""]
    assert 'data-score="probability of being better"' in page
    assert "the anchor labels them by written principles" in page
    assert "dpo-end" not in slugs(gather(run))  # SFT has a loss too
    assert "SFT, then DPO" in page


@pytest.mark.parametrize(
    ("method", "score", "unread"),
    [
        ("dpo", "minus human rank", "candidates a prompt"),
        ("spin", "", "beta"),
        ("cream", "log-likelihood above the base&#39;s", "answers a prompt"),
    ],
)
def test_a_run_of_a_method_without_a_judge(
    tmp_path: Path, method: str, score: str, unread: str
) -> None:
    run = new_run(tmp_path / "out", f"method={method}")
    add_anchor(run)
    add_iteration(run, 1, some_pairs(12), judged=False)
    page = whole(run)
    assert f'data-score="{score}"' in page
    for name in (unread, "votes a candidate", "pairs by"):
        assert f"<dt>{name}</dt>" not in page
    assert "None gap" not in page
    assert "own candidates" not in page and "length-1" not in slugs(gather(run))


def test_pairs_of_judgements_are_no_answers(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out", "method=meta-rewarding")
    add_anchor(run)
    long = Told("which judgement?", Reply("x" * 500, [1.0]), Reply("y" * 500, [0.0]), "judge")
    pairs = [Told("q", Reply("a" * 20, [4.0]), Reply("b" * 10, [1.0])), long]
    add_iteration(run, 1, pairs)
    facts = gather(run)
    tables = {chart.slug: chart.table for group in groups(facts) for chart in group.charts}
    assert tables["length-by-model"][1][-2:] == ("20", "10")
    assert [row["g"] is None for row in packed_rows(html(facts))] == [False, True]


def test_a_run_from_before_steps_were_kept(run: RunDir) -> None:
    for place in run.iterations():
        place.delta_place.steps.unlink()
    run.metrics.unlink()
    charts = {chart.slug: chart for group in groups(gather(run)) for chart in group.charts}
    assert charts["dpo-end"].table[1] == ("iteration 1", "0.6600", "0.8000", "0.0500")
    assert "dpo-loss" not in charts and "seconds" not in charts
    whole(run)


def test_a_run_whose_evaluation_lacks_figures(run: RunDir) -> None:
    write_json(run.anchor.evaluation, {"judge": {}, "policy": {}})
    measured = evaluation()
    del measured["judge"]["kendall"], measured["policy"]["greedy"]
    write_json(run.iteration(1).evaluation, {**measured, "ifeval": {"strict": {"prompt": 0.25}}})
    page = whole(run)
    assert "ifeval, strict, prompt" in page


def test_a_measured_base_stands_before_the_anchor(run: RunDir) -> None:
    run.base_evaluation.path.mkdir()
    finish(run.base_evaluation, evaluation(gold=1.0))
    facts = gather(run)
    assert [model.name for model in facts.models] == ["base", "M1", "M2", "M3"]
    assert "2.00 (M1)" in answer(facts).headline  # the run starts from the anchor
    assert "| base |" in markdown(facts)


def test_without_gold_the_anchor_s_grades_are_told_as_such(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out", "evaluate.gold=null")
    for number, score in enumerate((2.0, 3.0, 2.9)):
        graded = {"anchor_score": score, "anchor_score_se": 0.1, "score_scale": [0, 5]}
        measured = evaluation(gold=None, **graded)
        if number:
            add_iteration(run, number, some_pairs(5), measured=measured)
        else:
            add_anchor(run, measured)
    found = answer(gather(run))
    assert (
        found.improved == "unknown" and "grades M2's answers +1.00 against M1's" in found.headline
    )
    assert found.export == (
        "M2, iteration 1: it has the highest score by the anchor; M3 is the last one.",
        "Within chance of it: M3.",  # 0.1 < 2 sqrt(0.1^2 + 0.1^2)
    )


def add_duel(
    run: RunDir, name: str, judge: str, low: float, high: float, *, value: float = 60.0, n: int = 20
) -> None:
    """M2 against the anchor, on n prompts."""
    rate = {"value": value, "low": low, "high": high}
    result = {
        "model": "iteration 1",
        "baseline": "anchor",
        "judge": {"name": judge},
        "source": "held-out prompts of the run",
        "prompts": n,
        "wins": {"count": 10},
        "ties": {"count": 4},
        "losses": {"count": 6},
        "win_rate": rate,
        "length_controlled": {**rate, "value": 55.0},
        "gold": None,
    }
    place = run.comparisons.comparison(name)
    place.path.mkdir(parents=True)
    write_json(place.result, result)


def test_without_gold_a_head_to_head_answers(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out", "evaluate.gold=null")
    add_anchor(run, evaluation(gold=None))
    add_iteration(run, 1, some_pairs(5), measured=evaluation(gold=None))
    add_duel(run, "a", "iteration 1", 40.0, 75.0)
    found = answer(gather(run))
    assert (found.improved, found.headline) == (
        "unclear",
        "Not shown: M2 wins 60% of the prompts against M1 (95% interval 40 to 75), judged by "
        "iteration 1.",
    )
    assert any("may like its own style" in text for text in found.by_how_much)
    add_duel(run, "b", "gpt@https://judge.example/v1", 51.0, 69.0)  # a judge from outside
    found = answer(gather(run))
    assert found.improved == "yes" and "gpt@" in found.headline
    assert found.by_how_much[0] == "length-controlled: 55%"
    assert not any("own style" in text for text in found.by_how_much)
    (run.comparisons.comparison("half").path).mkdir()  # one that is not finished
    facts = gather(run)
    chart = next(c for g in groups(facts) for c in g.charts if c.slug == "duels-1")
    assert [one.name for one in chart.series] == [
        "by iteration 1",
        "by iteration 1, length-controlled",
        "by gpt@https://judge.example/v1",
        "by gpt@https://judge.example/v1, length-controlled",
    ]
    assert chart.table[1][:3] == ("M2", "60.0", "40.0 to 75.0")
    page = html(facts)
    assert "10 / 4 / 6" in page and "60.0 (51.0 to 69.0)" in page


def test_of_two_head_to_heads_the_one_on_more_prompts_answers(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out", "evaluate.gold=null")
    add_anchor(run, evaluation(gold=None))
    add_iteration(run, 1, some_pairs(5), measured=evaluation(gold=None))
    for name, value, n in (("a", 90.0, 4), ("b", 60.0, 200), ("c", 100.0, 8)):
        add_duel(run, name, "gpt@https://judge.example/v1", 51.0, 99.0, value=value, n=n)
    facts = gather(run)
    assert answer(facts).headline.startswith("Yes: M2 wins 60% of the prompts")
    chart = next(c for g in groups(facts) for c in g.charts if c.slug == "duels-1")
    assert chart.table[1][1] == "60.0"


def test_a_gold_scorer_that_is_gone_is_said(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out", "evaluate.gold=no_such_module:gold")
    add_anchor(run)
    add_iteration(run, 1, some_pairs(3))
    page = html(gather(run))
    assert "the scorer cannot be used here" in page
    assert [row["g"] for row in packed_rows(page)] == [None] * 3


# --- the page ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and ids of a page, as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def packed_rows(page: str) -> list[dict[str, Any]]:
    """The pairs that a page carries."""
    data = re.search(r'id="data">([^<]*)</script>', page)
    assert data and re.fullmatch(r"[A-Za-z0-9+/=]+", data[1])
    rows: list[dict[str, Any]] = json.loads(gzip.decompress(base64.b64decode(data[1])))
    return rows


def test_the_page_carries_the_pairs_whole(facts: Facts, page: str) -> None:
    rows = packed_rows(page)
    assert len(rows) == 50
    pair = facts.pairs[0]
    assert (rows[0]["c"], rows[0]["cs"]) == (pair.record.chosen, pair.record.chosen_score)
    assert rows[0]["cv"] == [[vote.score, None, vote.text] for vote in pair.chosen_votes]
    assert all(len(row["g"]) == 2 for row in rows)  # the toy's gold scorer is at hand


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    run = new_run(
        tmp_path / "out",
        f"description={json.dumps(NASTY[0])}",
        command=NASTY[1],
        versions={NASTY[2]: NASTY[3]},
    )
    nasty = [Told(text, Reply(text, [3.0, 1.0], text), Reply(text, [0.0], text)) for text in NASTY]
    add_anchor(run)
    criteria = {name: 1.0 for name in NASTY[:4]}
    add_iteration(run, 1, nasty, measured=evaluation(gold_by_criterion=criteria))
    page = html(gather(run))
    parsed = Page(page)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("script") == 2
    assert {"img", "iframe", "object", "embed"}.isdisjoint(names)
    handlers = [key for _, given in parsed.tags for key in given if key.startswith("on")]
    assert handlers == []
    assert "hurt" not in "".join(str(value) for _, given in parsed.tags for value in given.values())
    styles = re.findall(r"<style[^>]*>(.*?)</style>", page, flags=re.DOTALL)
    assert styles and all("hurt" not in style for style in styles) and "base" not in names
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
    assert all("hurt" not in script for script in scripts)
    assert [row["p"] for row in packed_rows(page)] == list(NASTY)


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    parsed = Page(page)
    policy = next(
        given["content"]
        for _, given in parsed.tags
        if "content-security-policy" in str(given.get("http-equiv")).lower()
    )
    assert policy is not None and policy.startswith("default-src 'none'")
    [script] = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.count("unsafe") == 1
    for tag, given in parsed.tags:
        if tag != "svg":
            links = [given.get(key) for key in ("src", "href", "xlink:href", "srcset", "action")]
            assert all(not link or link.startswith(("#", "data:,")) for link in links), tag
    assert "@import" not in page and 'http-equiv="refresh"' not in page


def test_the_page_is_sound_markup(page: str) -> None:
    parsed = Page(page)
    ids = [given["id"] for _, given in parsed.tags if "id" in given]
    assert len(set(ids)) == len(ids)
    for _, given in parsed.tags:
        for key in ("aria-labelledby", "for"):
            assert given.get(key) is None or given[key] in ids
        if (given.get("href") or "").startswith("#"):
            assert str(given["href"])[1:] in ids


def test_nothing_in_the_page_depends_on_when_it_was_made(facts: Facts, page: str) -> None:
    svg.cache_clear()
    assert html(facts) == page


def test_absolute_paths_stay_at_home(facts: Facts, page: str) -> None:
    assert str(Path(facts.settings["base"]["name"]).parent) not in page
    assert str(facts.where) not in page


def test_ten_thousand_pairs_fit_in_five_megabytes(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out", "evaluate.gold=null")  # to score them all takes seconds
    add_anchor(run)
    add_iteration(run, 1, some_pairs(10_000, words=35))
    facts = gather(run)
    page = html(facts)
    assert len(page.encode()) < MOST_BYTES == 5_000_000
    rows = packed_rows(page)
    assert len(rows) == 10_000
    assert "cut in the middle" in page
    assert "srlm-lite show pairs --adapters out --limit 0 --iteration T" in page
    # The lengths are of the whole texts.
    assert rows[0]["cl"] == len(facts.pairs[0].record.chosen) > len(rows[0]["c"]) - 40


def test_what_does_not_fit_is_cut_and_then_left_out() -> None:
    record = PreferencePair("p", "q " * 500, "a", "b", "chosen", "rejected", 3.0, 1.0)
    pairs = [Pair(i, record) for i in range(64)]
    roomy, tight = pack(pairs, room=100_000), pack(pairs, room=300)
    assert (roomy.shown, roomy.text_limit) == (64, None)
    assert tight.total == 64 and 1 <= tight.shown < 64 and tight.text_limit == 120
    short = [Pair(i, replace(record, prompt=f"why {i}?")) for i in range(1000)]
    few = pack(short, room=2000)  # no text is long enough to be cut
    assert few.total == 1000 and 1 <= few.shown < 1000 and few.text_limit is None
    assert len(few.data) <= 2000
    assert shortened("x" * 90 + "the end", 30) == "x" * 20 + " [... 67 characters ...] xxxthe end"
    assert shortened("short", 30) == "short"


# --- the command -------------------------------------------------------------------------------


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["report", *words])


def test_the_command_writes_the_page_and_says_where(run: RunDir, tmp_path: Path) -> None:
    done = invoke("--adapters", str(run.path))
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{run.report}\n"
    assert "Yes: gold score" in done.stderr
    other = tmp_path / "elsewhere.html"
    invoke("--adapters", str(run.path), "--out", str(other))
    assert other.read_text() == run.report.read_text()


def test_the_command_prints_markdown_and_writes_nothing(run: RunDir) -> None:
    done = invoke("--adapters", str(run.path), "--markdown")
    assert done.exit_code == 0 and not run.report.exists()
    assert "- **Improved?** Yes: gold score 2.00 (M1) to 2.50 (M2)" in done.stdout
    assert "| M2 | 30 | 2.50 (2.30 to 2.70) | 0.90 | 0.10 | 0.95 | 80 |" in done.stdout


def test_the_command_replaces_no_other_file(run: RunDir, tmp_path: Path) -> None:
    before = run.run_json.read_text()
    for out in (run.run_json, tmp_path, tmp_path / "nowhere" / "report.html"):
        done = invoke("--adapters", str(run.path), "--out", str(out))
        assert isinstance(done.exception, UserError), out
    assert run.run_json.read_text() == before


def test_the_command_wants_a_run(tmp_path: Path) -> None:
    assert isinstance(invoke("--adapters", str(tmp_path)).exception, UserError)


def test_the_end_of_a_run_says_what_to_type_next(tmp_path: Path) -> None:
    run = new_run(tmp_path / "my out")
    add_anchor(run)
    (only,) = next_steps(run)
    assert only[0] == f"next: srlm-lite show run --adapters '{run.path}'"
    add_iteration(run, 1, some_pairs(2), measured=evaluation(gold=3.0))
    add_iteration(run, 2, some_pairs(2), measured=evaluation(gold=2.5))
    report, pairs, export = (line.strip() for line, _ in next_steps(run))
    there = f"--adapters '{run.path}'"
    assert report == f"next: srlm-lite report {there}"
    assert pairs == f"srlm-lite show pairs {there}"
    # The first iteration is the better one.
    assert export == f"srlm-lite export {there} --iteration 1 --out '{run.path}-m2'"
    assert anchor_beside_best(gather(run)) == "behind"
    assert next_steps(run)[-1][1] == "its best iteration, as weights"


def test_the_end_of_a_run_that_made_nothing_better_says_so(tmp_path: Path) -> None:
    run = new_run(tmp_path / "out")
    add_anchor(run, evaluation(gold=3.0))
    add_iteration(run, 1, some_pairs(2), measured=evaluation(gold=2.5))
    assert anchor_beside_best(gather(run)) == "ahead"
    assert next_steps(run)[-1][1] == "its best iteration, as weights; M1 scored higher"


@pytest.mark.parametrize("golds", [(3.0, 3.0), (3.0, 2.9), (2.9, 3.0)])
def test_m1_scored_higher_only_beyond_the_error(tmp_path: Path, golds: tuple[float, float]) -> None:
    """Both with a standard error of .08: two errors of the difference are .23."""
    run = new_run(tmp_path / "out")
    first, second = (evaluation(gold=gold) for gold in golds)
    for one in (first, second):
        one["policy"]["gold_se"] = 0.08
    add_anchor(run, first)
    add_iteration(run, 1, some_pairs(2), measured=second)
    assert anchor_beside_best(gather(run)) == "alike"
    told = "its best iteration, as weights; by its score not told apart from M1"
    assert next_steps(run)[-1][1] == told


def test_commands_are_named_as_this_shell_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [os.path.abspath("envs/x/bin/srlm-lite"), "iterate"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == "envs/x/bin/srlm-lite"
    monkeypatch.setattr(sys, "argv", ["/lib/srlm_lite/__main__.py", "iterate"])
    assert program() == "srlm-lite"
