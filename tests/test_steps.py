"""Judging step by step: splitting, scores, partings and pairs, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import Told

from srlm_lite.forms.steps import (
    Aggregate,
    Parting,
    SplitBy,
    partings,
    split_steps,
    step_pair,
    step_score,
    whole_pair,
)
from srlm_lite.loop import iterate
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.records import (
    Candidate,
    JudgedStep,
    Judgement,
    PreferencePair,
    Prompt,
    Weighed,
)
from srlm_lite.run.files import read_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session


@pytest.mark.parametrize(
    ("text", "by", "steps"),
    [
        ("1 + 2 = 3\n3 + 4 = 7\nanswer: 7", "lines", ["1 + 2 = 3", "3 + 4 = 7", "answer: 7"]),
        ("\n\n a \n\n\n b\n", "lines", ["a", "b"]),
        ("", "lines", []),
        (" \n ", "lines", []),
        ("First 3.5 m. Then 2! So 5.5.", "sentences", ["First 3.5 m.", "Then 2!", "So 5.5."]),
        ("He has 3 (or 4.) He buys 2.", "sentences", ["He has 3 (or 4.)", "He buys 2."]),
        ("We add, e.g. two apples. Done.", "sentences", ["We add, e.g. two apples.", "Done."]),
        ("1. Add two.\n2. Stop", "sentences", ["1. Add two.", "2. Stop"]),
        ("By J. Smith. Right?\nYes", "sentences", ["By J. Smith.", "Right?", "Yes"]),
        ("no end", "sentences", ["no end"]),
    ],
)  # fmt: skip
def test_an_answer_is_split_into_steps(text: str, by: SplitBy, steps: list[str]) -> None:
    assert [step.strip() for step in split_steps(text, by)] == steps


@given(st.text(alphabet="ab.!? \n\t1(A"), st.sampled_from(["lines", "sentences"]))
def test_steps_are_the_text_and_none_is_blank(text: str, by: SplitBy) -> None:
    steps = split_steps(text, by)
    assert all(step.strip() for step in steps)
    assert "".join(steps) == (text if text.strip() else "")


@pytest.mark.parametrize(
    ("how", "score"), [("product", 0.9 * 0.5 * 0.8), ("minimum", 0.5), ("mean", 2.2 / 3)]
)
def test_the_score_of_an_answer(how: Aggregate, score: float) -> None:
    assert step_score([0.9, 0.5, 0.8], how) == pytest.approx(score)
    with pytest.raises(ValueError, match="without a step"):
        step_score([], how)


PROMPT = Prompt("p", "how many?", "test")


def judged(
    *answers: Sequence[tuple[str, float | None]],
) -> tuple[list[Candidate], dict[str, list[JudgedStep]]]:
    """Candidates of these steps, each with its probability of being right."""
    rows, steps = [], {}
    for i, answer in enumerate(answers):
        name = f"p#{i}"
        rows.append(Candidate("p", name, "\n".join(text for text, _ in answer), 9, "stop"))
        steps[name] = [JudgedStep(name, at, text, p) for at, (text, p) in enumerate(answer)]
    return rows, steps


def test_answers_part_where_only_one_of_them_goes_on_right() -> None:
    rows, steps = judged(
        [("a", 0.9), ("b", 0.8), ("c", 0.7)],
        [("a", 0.9), ("x", 0.1), ("y", 0.9)],
        [("a", 0.9), ("b", 0.8), ("z", 0.4)],
        [("n", 0.3), ("m", 0.9)],
        [("a", 0.9), ("x", 0.1), ("w", 0.2)],
    )
    # After nothing: a (.9) and n (.3). After a: b (.8) and x (.1). After a, b: c (.7) and z (.4).
    # What follows x and n, which are wrong, is compared with nothing.
    assert partings(rows, steps) == [
        Parting((), "a", "n", 0.9, 0.3, ("p#0", "p#1", "p#2", "p#4"), ("p#3",)),
        Parting(("a",), "b", "x", 0.8, 0.1, ("p#0", "p#2"), ("p#1", "p#4")),
        Parting(("a", "b"), "c", "z", 0.7, 0.4, ("p#0",), ("p#2",)),
    ]
    assert [one.before for one in partings(rows, steps, min_gap=0.5)] == [(), ("a",)]


def test_no_parting_of_two_right_or_two_wrong_steps() -> None:
    rows, steps = judged([("a", 0.9)], [("b", 0.6)])
    assert partings(rows, steps) == []
    rows, steps = judged([("a", 0.4)], [("b", 0.1)])
    assert partings(rows, steps) == []
    rows, steps = judged([("a", None)], [("b", 0.1)])
    assert partings(rows, steps) == []
    rows, steps = judged([("a", 0.5)], [("b", 0.49)])
    assert [one.gap for one in partings(rows, steps)] == [pytest.approx(0.01)]


def test_pairs_of_whole_answers_and_of_the_steps_alone() -> None:
    rows, steps = judged(
        [("a", 0.9), ("b", 0.8), ("c", 0.2)],
        [("a", 0.9), ("b", 0.8), ("d", 0.9)],
        [("a", 0.9), ("x", 0.1), ("y", 0.9)],
        [("a", 0.9), ("x", 0.1), ("w", 0.2)],
    )
    scored = list(zip(rows, (0.144, 0.648, 0.081, 0.018), strict=True))
    parting = partings(rows, steps)[0]
    assert parting.before == ("a",)
    whole = whole_pair(PROMPT, scored, parting)
    assert (whole.chosen_id, whole.rejected_id) == ("p#1", "p#3")
    assert (whole.chosen, whole.rejected) == ("a\nb\nd", "a\nx\nw")
    alone = step_pair(PROMPT, scored, parting, "lines", lambda text: (len(text),))
    assert (alone.chosen, alone.rejected) == ("a\nb", "a\nx")
    assert (alone.chosen_ids, alone.rejected_ids) == ((3,), (3,))
    assert (alone.chosen_score, alone.rejected_score) == (0.8, 0.1)


def test_pairs_of_steps_are_refused_where_a_method_makes_its_own(told: Told) -> None:
    for settings in (["method=temporal", "steps.pairs=steps"], ["steps.options=[right, 'right ']"]):
        with told.refused():
            load_recipe("toy-steps", settings)


# --- end to end -------------------------------------------------------------------------------


def small_recipe(*overrides: str) -> Recipe:
    lora = "{rank: 4, alpha: 8, targets: [q_proj, v_proj]}"
    return load_recipe(
        "toy-steps",
        [
            f"anchor.lora={lora}", f"dpo.lora={lora}", "anchor.use_eft=false", "iterations=1",
            "anchor.ift_limit=16", "anchor.epochs=1", "anchor.learning_rate=1e-5",
            "prompts.per_iteration=12", "rollout.chunk_prompts=12", "pairing.min_pairs=2",
            "evaluate.eft_prompts=1", "evaluate.policy_prompts=2", *overrides,
        ],
    )  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize("pairs", ["answers", "partings", "steps"])
def test_steps_are_judged_and_paired_from_end_to_end(pairs: str, tmp_path: Path) -> None:
    recipe = small_recipe(f"steps.pairs={pairs}", "steps.min_gap=0.05")
    run = RunDir(tmp_path / "out")
    run.open(recipe, {})
    iterate(Session(recipe, run))
    place = run.iteration(1)
    candidates = {row.candidate_id: row for row in read_records(place.candidates, Candidate)}
    judged: dict[str, list[JudgedStep]] = {}
    for row in read_records(place.file("judged_steps"), JudgedStep):
        judged.setdefault(row.candidate_id, []).append(row)
    seen: dict[tuple[str, ...], float | None] = {}
    for name, rows in judged.items():
        texts = [step.strip() for step in split_steps(candidates[name].text)]
        assert [row.text for row in rows] == texts
        for row in rows:
            # The same beginning of an answer to the same prompt is read once, and found the same.
            begun = (candidates[name].prompt_id, *texts[: row.step + 1])
            assert seen.setdefault(begun, row.p_right) == row.p_right
    assert len(read_records(place.file("step_weights"), Weighed)) == len(seen)
    votes = read_records(place.judgements, Judgement)
    assert [row.candidate_id for row in votes] == [
        name for name, row in candidates.items() if row.finish_reason == "stop"
    ]
    for vote in votes:
        known = [row.p_right for row in judged[vote.candidate_id]]
        assert vote.score == pytest.approx(math.prod(p or 0 for p in known), abs=1e-4)
    made = read_records(place.pairs, PreferencePair)
    assert len(made) >= 2
    for one in made:
        chosen, rejected = one.chosen.split("\n"), one.rejected.split("\n")
        if pairs == "steps":
            assert len(chosen) == len(rejected) and chosen[:-1] == rejected[:-1]
            assert one.chosen_ids and one.rejected_ids  # without an end
            assert one.chosen_score >= 0.5 > one.rejected_score
        elif pairs == "partings":
            at = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
            p = judged[one.chosen_id][at].p_right, judged[one.rejected_id][at].p_right
            assert (p[0] or 0) >= 0.5 > (p[1] or 0)
        else:
            assert one.chosen_score > one.rejected_score
    facts = {row["stage"]: row for row in run.read_metrics() if row["iteration"] == 1}
    assert facts["judgements"]["judged_steps"] == sum(map(len, judged.values()))
    assert facts["delta"]["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
