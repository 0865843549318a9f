"""Self-consistency preference optimisation: answers, votes, pairs and collapse, by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from messages import Told

from srlm_lite.evaluate.answers import (
    choice,
    count_votes,
    load_extractor,
    number,
    vote_figures,
)
from srlm_lite.evaluate.gate import findings
from srlm_lite.loop import iterate
from srlm_lite.methods.scpo import shares, voted_pairs
from srlm_lite.pairing import usable_candidates
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.records import Candidate, FinishReason, PreferencePair, Prompt, VoteCount
from srlm_lite.run.files import read_json, read_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Gate
from srlm_lite.tasks import arithmetic


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("12 + 5 = 17\nanswer: 17", "17"),
        ("It costs $1,234.50.", "1234.5"),
        ("1234.50", "1234.5"),
        ("\\boxed{42}", "42"),
        ("That is -3.", "-3"),
        ("7-3 apples", "3"),
        ("0.0", "0"),
        ("100", "100"),
        ("a share of .5", "0.5"),
        ("007", "7"),
        ("12,34", "34"),  # no thousands: the last number
        ("none", None),
        ("model v2 and x86", None),
        ("", None),
    ],
)
def test_the_last_number(reply: str, said: str | None) -> None:
    assert number(reply) == said


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("First I thought the answer is A. But no: the answer is **D**.", "D"),
        ("\\boxed{E}", "E"),
        ("\\boxed{\\text{E}}", "E"),
        ("So it is this one:\nB", "B"),
        ("(C)", "C"),
        ("I think a bird is one.", None),
        ("The answer is Bob.", None),
        ("", None),
    ],
)
def test_the_letter_of_an_option(reply: str, said: str | None) -> None:
    assert choice(reply) == said


def candidates(prompt: str, *texts: str, cut: int | None = None) -> list[Candidate]:
    def reason(i: int) -> FinishReason:
        return "length" if i == cut else "stop"

    return [Candidate(prompt, f"{prompt}#{i}", text, 3, reason(i)) for i, text in enumerate(texts)]


P = Prompt("p", "how many?", "test")


def test_votes_are_shares_of_all_samples() -> None:
    rows = candidates("p", "= 4", "so 4", "5", "no idea", "4.0", "6", cut=5)
    [row] = count_votes([P], rows, number)
    assert row == VoteCount(
        "p", 6, {"4": 3, "5": 1},
        {"p#0": "4", "p#1": "4", "p#2": "5", "p#3": None, "p#4": "4", "p#5": None},
    )  # fmt: skip
    assert row.share == 3 / 6
    assert shares([row]) == {
        "p#0": 0.5, "p#1": 0.5, "p#2": 1 / 6, "p#3": None, "p#4": 0.5, "p#5": None
    }  # fmt: skip
    assert VoteCount.from_row(json.loads(json.dumps(row.to_row()))) == row


def pairs_of(
    *texts: str, threshold: float, weighted: bool = True
) -> tuple[list[PreferencePair], dict[str, int]]:
    rows = candidates("p", *texts)
    usable, drops = usable_candidates(
        [P], rows, shares(count_votes([P], rows, number)), drop_truncated=True
    )
    made = voted_pairs([P], usable, drops, threshold=threshold, weighted=weighted)
    return made, {reason: count for reason, count in drops.prompts.items() if count}


def test_the_most_frequent_answer_is_chosen_and_the_rarest_rejected() -> None:
    # Of eight samples 5 say 7, 2 say 8 and 1 says 9: (5 - 1) / 8 = 0.5.
    texts = ("8", "7", "= 7", "9", "so 7", "7.", "= 8", "7 ")
    made, drops = pairs_of(*texts, threshold=0.5)
    [one] = made
    assert (one.chosen_id, one.rejected_id) == ("p#1", "p#3")
    assert (one.chosen_score, one.rejected_score, one.weight) == (5 / 8, 1 / 8, 0.5)
    assert drops == {}
    assert pairs_of(*texts, threshold=0.5, weighted=False)[0][0].weight == 1.0
    assert pairs_of(*texts, threshold=5 / 8)[0]  # as many as the threshold suffices
    assert pairs_of(*texts, threshold=0.7) == ([], {"unsure": 1})


def test_no_pair_where_all_have_as_many_votes() -> None:
    assert pairs_of("7", "= 7", "so 7", threshold=0.5) == ([], {"tied": 1})
    assert pairs_of("7", "8", "9", threshold=0.1) == ([], {"tied": 1})
    assert pairs_of("7", "7", threshold=0.5) == ([], {"duplicate": 1})
    assert pairs_of("a", "b", threshold=0.5) == ([], {"unreadable": 1})


def test_how_sure_votes_are_and_how_varied_answers() -> None:
    rows = [
        VoteCount("a", 4, {"1": 4}, {}),
        VoteCount("b", 4, {"2": 2, "3": 1}, {}),
        VoteCount("c", 4, {"1": 3, "5": 1}, {}),
        VoteCount("d", 4, {}, {}),
    ]
    assert vote_figures(rows) == {
        "vote_share": round((1 + 0.5 + 0.75 + 0) / 4, 4),
        "answers": (1 + 2 + 2 + 0) / 4,
        "unanimous": 0.25,
        "unread": round(1 - 11 / 16, 4),
        # Most frequent: 1, 2, 1. -(2/3) ln(2/3) - (1/3) ln(1/3) = 0.6365.
        "answer_entropy": round(2 / 3 * math.log(1.5) + math.log(3) / 3, 4),
        "majority_answers": 2,
    }
    assert vote_figures([])["vote_share"] is None


def votes(share: float, entropy: float) -> dict[str, object]:
    judge = {"score_histogram": {}, "pairs": 0, "parse_rate": None}
    return {"judge": judge, "policy": {}, "votes": {"vote_share": share, "answer_entropy": entropy}}


def collapsed(*evaluations: dict[str, object], gate: Gate | None = None) -> list[str]:
    return [
        found.text for found in findings(evaluations, gate or Gate()) if found.gate == "vote_share"
    ]


def test_a_collapse_is_agreement_on_few_answers() -> None:
    anchor: dict[str, object] = {**votes(0, 0), "votes": None}
    first = votes(0.6, 3.0)
    assert collapsed(anchor, first, votes(0.97, 2.9)) == []  # sure, of many answers
    assert collapsed(anchor, first, votes(0.9, 1.0)) == []
    assert collapsed(anchor, first, votes(0.9, 1.0), gate=Gate(vote_share=0.9)) != []
    [told] = collapsed(anchor, first, votes(0.99, 1.2))
    assert "fell from 3.00 to 1.20 nats" in told
    assert collapsed(anchor, votes(0.99, 0.1)) == []  # nothing to fall from


def test_an_extractor_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    (tmp_path / "own_scpo_answers.py").write_text(
        "def last(reply):\n    return reply.split()[-1] if reply else None\n"
        "def bad(reply):\n    return 3\n"
        "def fails(reply):\n    return reply[99]\n"
        "def two(a, b):\n    return a\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = load_extractor("own_scpo_answers:last", where="scpo.answer")
    assert (own("it is blue"), own("")) == ("blue", None)
    for name in ("bad", "fails"):
        with told.refused():
            load_extractor(f"own_scpo_answers:{name}", where="scpo.answer")("it is blue")
    for name in ("own_scpo_answers:two", "own_scpo_answers:none", "words"):
        with told.refused():
            load_extractor(name, where="scpo.answer")


# --- end to end -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two small iterations on the arithmetic base as it is, with an anchor that hardly moves it."""
    directory = RunDir(tmp_path_factory.mktemp("scpo") / "out")
    directory.open(small_recipe(), {})
    iterate(Session(small_recipe(), directory))
    return directory


def small_recipe() -> Recipe:
    lora = "{rank: 4, alpha: 8, targets: [q_proj, v_proj]}"
    return load_recipe(
        "toy-scpo",
        [
            f"anchor.lora={lora}", f"dpo.lora={lora}", "anchor.use_eft=false",
            "anchor.ift_limit=16", "anchor.epochs=1", "anchor.learning_rate=1e-5", "iterations=2",
            "prompts.per_iteration=12", "rollout.chunk_prompts=12", "pairing.min_pairs=2",
            "scpo.thresholds=[0.25, 0.375]", "evaluate.eft_prompts=1", "evaluate.votes=1",
            "evaluate.policy_prompts=2",
        ],
    )  # fmt: skip


@pytest.mark.model
def test_votes_teach_from_end_to_end(voted: RunDir) -> None:
    for t, threshold in ((1, 0.25), (2, 0.375)):
        place = voted.iteration(t)
        prompts = read_records(place.prompts, Prompt)
        written = [one for one in prompts if one.prompt_id.startswith(f"scpo-{t}-")]
        assert len(prompts) == 12 + len(written) and 6 < len(written) <= 12
        assert all(arithmetic.words(one.text)[-1] == "?" for one in written)
        rows = read_records(place.votes, VoteCount)
        assert [row.prompt_id for row in rows] == [one.prompt_id for one in prompts]
        assert all(row.samples == 8 for row in rows)
        answers = {name: said for row in rows for name, said in row.answers.items()}
        pairs = read_records(place.pairs, PreferencePair)
        for one in pairs:
            assert one.chosen_score >= threshold
            assert one.weight == one.chosen_score - one.rejected_score > 0
            assert answers[one.chosen_id] == number(one.chosen) != number(one.rejected)
        facts = {row["stage"]: row for row in voted.read_metrics() if row["iteration"] == t}
        assert facts["pairs"]["pairs"] == len(pairs)
        assert (
            facts["judgements"]["vote_share"] == read_json(place.evaluation)["votes"]["vote_share"]
        )
        assert facts["judgements"]["gold_of_majority"].keys() == {"answer", "steps"}
        assert facts["delta"]["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.model
def test_a_stopped_run_votes_again_with_the_same_bytes(voted: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "out")
    shutil.copytree(voted.path, copy.path)
    place = copy.iteration(2)
    for file in sorted(place.path.rglob("*")):
        if file.is_file() and file.name not in ("prompts.jsonl", "new_problems.jsonl"):
            file.unlink()
    # As if killed while the last new problems were written.
    asked = place.asked("new_problems")
    place.prompts.unlink()
    asked.write_bytes(asked.read_bytes()[:-20])
    iterate(Session(small_recipe(), copy))
    for name in ("prompts.jsonl", "votes.jsonl", "pairs.jsonl", "training_steps.jsonl"):
        assert (place.path / name).read_bytes() == (voted.iteration(2).path / name).read_bytes()
