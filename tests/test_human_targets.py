"""Judge targets from the human order alone."""

from __future__ import annotations

from srlm_lite.judging import Rubric, parse_score
from srlm_lite.records import RankedReply
from srlm_lite.stages.anchor import human_targets

RUBRIC = Rubric("r", "{{prompt}} {{response}}", min=0, max=5)


def reply(name: str, rank: int, quality: float | None = None) -> RankedReply:
    return RankedReply("p", "prompt", name, "response", rank, quality)


def scores(*replies: RankedReply, rubric: Rubric = RUBRIC) -> list[float]:
    scored = human_targets([replies], rubric)
    for row, score in scored:
        assert parse_score(row.target or "", rubric) == score
    return [score for _, score in scored]


def test_quality_is_scaled_from_the_data_to_the_rubric() -> None:
    """.2 to .8 onto 0 to 5: .2 -> 0, .5 -> 2.5, rounded to even 2, .8 -> 5."""
    assert scores(reply("a", 0, 0.8), reply("b", 1, 0.5), reply("c", 2, 0.2)) == [5, 2, 0]


def test_rank_stands_in_for_quality() -> None:
    """Ranks 0, 1, 3: shares 1, 2/3, 0 of 5 are 5, 3.3 -> 3, 0."""
    assert scores(reply("a", 0), reply("b", 1), reply("c", 3)) == [5, 3, 0]


def test_a_finer_step_is_used() -> None:
    half = Rubric("r", "{{prompt}} {{response}}", min=0, max=5, step=0.5)
    assert scores(reply("a", 0), reply("b", 1), reply("c", 3), rubric=half) == [5, 3.5, 0]


def test_equal_replies_get_the_best_score() -> None:
    assert scores(reply("a", 0), reply("b", 0)) == [5, 5]
    assert scores(reply("a", 0, 0.4), reply("b", 0, 0.4)) == [5, 5]
