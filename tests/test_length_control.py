"""Win rates, raw and length-controlled: by hand, and beside AlpacaEval's own program."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from srlm_lite.compare.annotations import compare_annotations, read_difficulties
from srlm_lite.errors import UserError
from srlm_lite.evaluate import length_control as module
from srlm_lite.evaluate.length_control import (
    length_controlled,
    why_lengths_do_not_tell,
    win_rate,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_win_rate_by_hand() -> None:
    # (1 + 1 + 0.5 + 0) / 4 = 0.625
    rate = win_rate([1.0, 1.0, 0.5, 0.0])
    assert rate.value == 62.5
    assert rate.low is not None and rate.high is not None
    assert 0 <= rate.low < 62.5 < rate.high <= 100
    one = win_rate([1.0])
    assert (one.value, one.low, one.high) == (100.0, None, None)


def test_the_interval_is_the_same_again_and_narrows_with_more_prompts() -> None:
    few, many = win_rate([1.0, 0.0] * 10), win_rate([1.0, 0.0] * 1000)
    assert win_rate([1.0, 0.0] * 10) == few
    assert few.low is not None and few.high is not None
    assert many.low is not None and many.high is not None
    # About 2 * 1.96 * 0.5 / sqrt(n) * 100: 43.8 of 20 prompts (in steps of 5), 4.4 of 2000.
    assert 35 <= few.high - few.low <= 55
    assert 3.5 < many.high - many.low < 5.5


def test_equal_lengths_leave_the_win_rate_up_to_the_penalty() -> None:
    """With one column of ones, the optimum of |q| + C * sum of log losses is known.

    Its derivative is sign(q) + C * N * (sigmoid(q) - m) = 0 at mean preference m, so that
    sigmoid(q) = m - sign(q) / (C * N).
    """
    found = length_controlled([1.0] * 70 + [0.0] * 30, [0] * 100)
    assert found is not None
    assert found.rate.value == pytest.approx(100 * (0.7 - 1 / (found.strength * 100)), abs=0.02)
    assert found.length == 0.0 and found.difficulty is None


@pytest.mark.parametrize(("quality", "length"), [(0.0, -2.0), (0.5, -1.0), (-1.0, 1.5)])
def test_a_known_preference_is_recovered(quality: float, length: float) -> None:
    """Preferences made by the formula itself; the model is mostly the longer one."""
    rng = Random(0)
    gaps = [rng.randint(-1200, 200) for _ in range(400)]
    mean = sum(gaps) / 400
    std = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 399)
    preferences = [sigmoid(quality + length * math.tanh(gap / std)) for gap in gaps]
    found = length_controlled(preferences, gaps)
    assert found is not None
    assert found.rate.value == pytest.approx(100 * sigmoid(quality), abs=0.3)
    assert found.length == pytest.approx(length, abs=0.05)
    # What the length gave away shows in the raw win rate.
    assert abs(win_rate(preferences).value - 100 * sigmoid(quality)) > 10
    assert found.rate.low is not None and found.rate.high is not None
    assert found.rate.low < found.rate.value < found.rate.high


def longer_throughout(scale: float) -> tuple[list[float], list[int]]:
    """200 prompts where the model is longer by about `scale` of what differences vary by."""
    rng = Random(3)
    gaps = [-round(200 * rng.gauss(scale, 1)) for _ in range(200)]
    return [float(rng.random() < 0.7) for _ in gaps], gaps


def test_lengths_do_not_tell_where_one_side_is_longer_throughout() -> None:
    preferences, gaps = longer_throughout(10)
    assert max(gaps) < 0
    assert why_lengths_do_not_tell(gaps) == "one side's replies are longer in all 200 prompts"
    assert why_lengths_do_not_tell([-gap for gap in gaps]) == why_lengths_do_not_tell(gaps)
    assert length_controlled(preferences, gaps) is None
    # One prompt of 200 the other way makes no measurement of it.
    assert "nearly all prompts" in str(why_lengths_do_not_tell([*gaps[1:], 100]))
    assert why_lengths_do_not_tell([0] * 20) is None  # equal lengths: nothing to control for


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 2.0])
def test_where_lengths_tell_the_rate_is_a_number(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the solver's seed; where they do not, seeds alone give rates 19 and more apart."""

    def by_seed(scale: float) -> list[float]:
        preferences, gaps = longer_throughout(scale)
        rates = []
        for seed in (123, 0, 1, 2):
            monkeypatch.setattr(module, "_SEED", seed)
            found = length_controlled(preferences, gaps)
            rates += [] if found is None else [found.rate.value]
        return rates

    monkeypatch.setattr(module, "_REFITS", 2)
    rates = by_seed(scale)
    assert len(rates) == 4 and max(rates) - min(rates) < 0.1
    if not scale:
        monkeypatch.setattr(module, "why_lengths_do_not_tell", lambda gaps: None)
        rates = by_seed(10)
        assert max(rates) - min(rates) > 10


def test_unread_prompts_count_as_in_alpaca_eval() -> None:
    """They teach nothing, but are in the spread of the lengths and in the mean over prompts."""
    rng = Random(5)
    gaps = [rng.randint(-500, 500) for _ in range(120)]
    std = math.sqrt(sum((gap - sum(gaps) / 120) ** 2 for gap in gaps) / 119)
    hard = [rng.gauss(0, 1) for _ in gaps]
    known = [sigmoid(0.4 - math.tanh(gap / std) + one) for gap, one in zip(gaps, hard, strict=True)]
    preferences: list[float | None] = [None if i % 4 == 0 else p for i, p in enumerate(known)]
    found = length_controlled(preferences, gaps, difficulties=hard)
    assert found is not None and found.difficulty is not None
    assert found.length == pytest.approx(-1, abs=0.05)  # it is in units of the whole's spread
    level = [sigmoid(found.quality + found.difficulty * one) for one in hard]
    assert found.rate.value == pytest.approx(100 * sum(level) / 120, abs=1e-9)


def test_difficulty_is_a_term_of_its_own() -> None:
    rng = Random(1)
    gaps = [rng.randint(-500, 500) for _ in range(400)]
    hard = [rng.gauss(0, 1) for _ in gaps]
    std = math.sqrt(sum((gap - sum(gaps) / 400) ** 2 for gap in gaps) / 399)
    preferences = [
        sigmoid(0.3 - math.tanh(gap / std) + 0.8 * one) for gap, one in zip(gaps, hard, strict=True)
    ]
    found = length_controlled(preferences, gaps, difficulties=hard)
    assert found is not None and found.difficulty == pytest.approx(0.8, abs=0.05)
    expected = sum(sigmoid(0.3 + 0.8 * one) for one in hard) / 4
    assert found.rate.value == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize(
    "preferences",
    [[1.0, 0.0] * 4, [1.0] * 50, [0.0] * 50, [1.0] * 49 + [0.0]],
    ids=["eight prompts", "only wins", "only losses", "one loss"],
)
def test_nothing_is_fitted_where_there_is_nothing_to_fit(preferences: Sequence[float]) -> None:
    assert length_controlled(preferences, list(range(len(preferences)))) is None


# --- files of annotations ---------------------------------------------------------------------


def write(path: Path, rows: Sequence[dict[str, Any]], *, array: bool = False) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if array else lines)
    return path


def annotation(preference: Any, **others: Any) -> dict[str, Any]:
    return {"output_1": "four", "output_2": "sixsix", "preference": preference, **others}


@pytest.mark.parametrize("array", [False, True])
def test_annotations_are_counted(tmp_path: Path, array: bool) -> None:
    """1 and 1.2 are losses, 2 and 1.9 wins, 1.5 and the old 0 ties, null is no answer."""
    path = tmp_path / "annotations"
    rows = [annotation(value) for value in (1, 1.2, 2.0, 1.9, 1.5, 0, None)]
    found = compare_annotations(write(path, rows, array=array))
    assert [found[name]["count"] for name in ("wins", "ties", "losses")] == [2, 2, 2]
    assert (found["prompts"], found["unreadable"]) == (7, 1)
    # (0 + 0.2 + 1 + 0.9 + 0.5 + 0.5) / 6
    assert found["win_rate"]["value"] == pytest.approx(100 * 3.1 / 6, abs=1e-6)
    assert found["mean_chars"] == {"model": 6.0, "baseline": 4.0}
    assert found["length_controlled"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (annotation(2.5), r"row 2: `preference` is 2\.5, not a number from 1 to 2"),
        (annotation("m"), r"row 2: `preference` is 'm'"),
        (annotation(True), r"row 2: `preference` is True"),
        ({"output_1": "a", "preference": 1}, "row 2: lacks output_1, output_2 or preference"),
        (annotation(1, generator_2="other"), r"is about several models \(generator_2\)"),
        (annotation(1, generator_2=["m"]), r"row 2: `generator_2` is \['m'\], not a model's name"),
    ],
)
def test_a_row_that_is_none(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare_annotations(write(tmp_path / "file", [annotation(1), row]))


@pytest.mark.parametrize(("text", "message"), [("", "no annotations"), ("{]", "not JSON")])
def test_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=message):
        compare_annotations(tmp_path / "file")
    with pytest.raises(UserError, match="no such file"):
        compare_annotations(tmp_path / "nowhere")


def test_difficulties_alone_or_with_gamed_rows(tmp_path: Path) -> None:
    alone = tmp_path / "alone.csv"
    alone.write_text("index,instruction_difficulty\n0,0.5\n1,-1\n")
    assert read_difficulties(alone) == ({0: 0.5, 1: -1.0}, [])
    both = tmp_path / "both.csv"
    both.write_text(
        "model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
        "wordy,0.9,0,-1.5,0.5,False\nwordy,,1,-1,-1,False\n"
    )
    known, gamed = read_difficulties(both)
    assert known == {0: 0.5, 1: -1.0}
    assert [(row.preference, row.gap, row.difficulty) for row in gamed] == [(0.9, -1.5, 0.5)]
    with pytest.raises(UserError, match=r"no difficulty of prompt 2 \(1 are missing\)"):
        compare_annotations(write(tmp_path / "file", [annotation(1)] * 3), alone)


@pytest.mark.parametrize("index", [None, "a", [0], 0.5, float("inf"), True])
def test_an_index_that_is_no_place(tmp_path: Path, index: Any) -> None:
    difficulties = tmp_path / "difficulties.csv"
    difficulties.write_text("index,instruction_difficulty\n0,0.5\n1,-1\n")
    rows = [annotation(1, index=0), annotation(1, index=index)]
    with pytest.raises(UserError, match=r"file, row 2: `index` is .*, not a prompt's place"):
        compare_annotations(write(tmp_path / "file", rows), difficulties)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "needs the columns"),
        ("", "needs the columns"),
        (
            "index,instruction_difficulty\n0,1\n1,hard\n",
            "row 2: .*_difficulty` is 'hard', no number",
        ),
        ("index,instruction_difficulty\n0,nan\n", "row 1: .*_difficulty` is 'nan', no number"),
        ("index,instruction_difficulty\n0\n", "row 1: .*_difficulty` is None, no number"),
        ("index,instruction_difficulty\na,1\n", "row 1: `index` is 'a', not a prompt's place"),
    ],
)
def test_a_difficulty_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_difficulties(path)
    with pytest.raises(UserError, match="No such file"):
        read_difficulties(tmp_path / "nowhere")


# --- beside AlpacaEval's own program ----------------------------------------------------------
#
# The figures are what `get_length_controlled_winrate` of alpaca-eval 0.6.6 printed on the same
# files, with scikit-learn 1.9.1; the published raw win rates are in its leaderboard.


def made_up(path: Path) -> Path:
    """A file of the form of df_gamed.csv, by formulae: AlpacaEval's is to be had from the Hub."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        columns = "model preference index std_delta_len instruction_difficulty not_gamed_baseline"
        rows.writerow(columns.split())
        for name, sign in (("wordy", 1), ("terse", -1)):
            for i in range(805):
                gap, hard = -sign * (0.5 + (13 * i % 17) / 10), (37 * i % 101 - 50) / 25
                rows.writerow([name, 0.5 + 0.3 * sign * math.sin(i), i, gap, hard, False])
    return path


def without_gamed(path: Path, target: Path) -> Path:
    """The same with the difficulties alone."""
    rows = list(csv.DictReader(path.open(newline="")))
    lines = [f"{row['index']},{row['instruction_difficulty']}" for row in rows[:805]]
    target.write_text("\n".join(["index,instruction_difficulty", *lines]))
    return target


@pytest.mark.parametrize(
    ("model", "raw", "counts", "minimal", "difficulty", "full"),
    [
        (
            "vicuna-13b",
            5.831103184496894,
            (44, 2, 759),
            14.084036613267582,
            14.161503818178359,
            8.268594613201795,
        ),
        (
            "gemma-7b-it",
            6.937294379677018,
            (50, 1, 754),
            13.002420970519585,
            13.009226531894571,
            9.18454235682333,
        ),
    ],
)
def test_the_figures_are_alpaca_evals(
    shared_data: Path,
    tmp_path: Path,
    model: str,
    raw: float,
    counts: tuple[int, int, int],
    minimal: float,
    difficulty: float,
    full: float,
) -> None:
    path = shared_data / "alpaca_eval" / f"{model}.annotations.jsonl"
    with_gamed = made_up(tmp_path / "gamed.csv")
    files = {
        "minimal": None,
        "with difficulty, without gamed baselines": without_gamed(with_gamed, tmp_path / "d.csv"),
        "full": with_gamed,
    }
    for (variant, file), expected in zip(files.items(), (minimal, difficulty, full), strict=True):
        found = compare_annotations(path, file)
        assert found["model"] == model and found["baseline"] == "gpt4_1106_preview"
        assert found["win_rate"]["value"] == pytest.approx(raw, abs=1e-7)
        assert tuple(found[name]["count"] for name in ("wins", "ties", "losses")) == counts
        assert found["length_controlled"]["variant"] == variant
        assert found["length_controlled"]["value"] == pytest.approx(expected, abs=1e-6)
