"""More votes only where they can still matter: the rule by hand, and as the judge draws them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean

import pytest
from test_sampling import Scripted, make_session

from srlm_lite.forms.adaptive import Rule, Votes, pooled_variance
from srlm_lite.records import Candidate, Prompt
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.stages.judges import judged


def rule(total: int, variance: float = 0.25, least: int = 2) -> Rule:
    return Rule(total, least, (0.0, 5.0), variance)


def test_votes_that_cannot_change_anything_are_not_drawn() -> None:
    """With one of three votes to come a 5, 5 ends at 10/3 at least, and a 0, 1 at 6/3 at most.

    That no vote can turn it holds whatever the variance.
    """
    assert rule(3, variance=100.0).wanting({"a": (5, 5), "b": (0, 1)}) == []


def test_the_chance_of_another_order_by_hand() -> None:
    """One vote of three to come; a: 4, 4 and b: 3, 3, neither with deviations of its own.

    The variance of each is (1 x .25 + 0) / (1 + 1) = .125; of its end (1/3)^2 x .125 x (1/2 + 1) =
    1/48. So b overtakes a with a chance of cdf(-1 / sqrt(2 / 48)), under one in a million; as 4 is
    the most likely vote on a, not even exact bounds (11/3 for b) are near. With 3.7 for b's place
    it is cdf(-.3 / .204) = .071 for best, and as much for worst: the leader of each is asked.
    """
    ends = rule(3)
    assert ends.wanting({"a": (4, 4), "b": (3, 3)}) == []
    assert NormalDist().cdf(-0.3 / (2 / 48) ** 0.5) == pytest.approx(0.071, abs=1e-3)
    assert ends.wanting({"a": (4, 4), "b": (3.7, 3.7)}) == ["a", "b"]


def test_only_those_in_doubt_are_asked_again() -> None:
    """a is the best for sure; c and d may both be the worst; b is neither.

    Of the two the first one is asked, then the other, whose end is less sure by then.
    """
    votes: dict[str, Votes] = {"a": (5, 5), "b": (3, 3), "c": (1, 1), "d": (1, 1)}
    assert rule(11).wanting(votes) == ["c"]
    assert rule(11).wanting({**votes, "c": (1, 1, 1)}) == ["d"]


def test_of_equals_the_first_stands_where_the_scale_leaves_no_room() -> None:
    """Both are at the top; once all votes on a are in, b can be no better, and a stays best."""
    assert rule(3).wanting({"a": (5, 5), "b": (5, 5), "c": (0, 0)}) == ["a"]
    assert rule(3).wanting({"a": (5, 5, 5), "b": (5, 5), "c": (0, 0)}) == []
    # The one behind may be better where there is room above: it is asked in its turn.
    assert rule(3).wanting({"a": (4, 4, 4), "b": (4, 4), "c": (0, 0)}) == ["b"]


def test_what_cannot_be_read_gets_votes_until_it_counts() -> None:
    votes: Mapping[str, Votes] = {"a": (5, 5), "b": (None, 0), "c": (None, None, None)}
    assert rule(3).wanting(votes) == ["b"]
    assert rule(4).wanting(votes) == ["b", "c"]


def test_a_candidate_alone_and_one_with_all_its_votes_need_none() -> None:
    assert rule(3).wanting({"a": (5, 1)}) == []
    assert rule(2).wanting({"a": (3, 3), "b": (3, 3)}) == []


def test_the_variance_is_that_around_each_candidate_s_own_mean() -> None:
    """(0.5 + 0 + 2) / (1 + 1 + 1); one vote tells nothing of it, nor does an unread one."""
    votes: Mapping[str, Votes] = {"a": (3, 4), "b": (1, 1), "c": (2, 4, None), "d": (5,)}
    assert pooled_variance(votes) == pytest.approx(2.5 / 3)
    assert pooled_variance({"a": (1,)}) == 1.0


def test_fewer_votes_and_hardly_another_pair() -> None:
    """Over 400 prompts of a judge whose votes vary by a point: the same best and worst but for few.

    At most RISK of the prompts is what the rule is to err in, of eleven votes at most a half drawn.
    """
    rng = Random(0)
    drawn = total = other = 0
    for _ in range(400):
        truth = [rng.uniform(0, 5) for _ in range(4)]
        every = {
            str(i): [float(min(5, max(0, round(rng.gauss(mean, 0.7))))) for _ in range(11)]
            for i, mean in enumerate(truth)
        }
        counts = dict.fromkeys(every, 2)
        while True:
            votes = {name: every[name][:n] for name, n in counts.items()}
            wanting = rule(11, variance=0.5).wanting(votes)
            if not wanting:
                break
            for name in wanting:
                counts[name] += 1
        drawn, total = drawn + sum(counts.values()), total + 44
        full, part = ({n: fmean(some) for n, some in v.items()} for v in (every, votes))
        best, worst = max(part, key=part.__getitem__), min(part, key=part.__getitem__)
        other += full[best] < max(full.values()) or full[worst] > min(full.values())
    assert drawn / total < 0.5
    assert other / 400 < 0.05


def test_the_judge_draws_in_rounds_and_the_same_votes(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts: one clear, one in doubt, one whose votes cannot be read at first."""
    said = {
        "clear good": [5, 5, 5, 5],
        "clear bad": [0, 0, 0, 0],
        "close one": [3, 4, 3, 4],
        "close other": [4, 3, 4, 4],
    }
    rows = [
        Candidate(text.split()[0], f"{text.split()[0]}#{i}", text, 1, "stop")
        for i, text in enumerate(said)
    ]
    prompts = [Prompt(name, f"about {name}") for name in ("clear", "close")]

    def session(**judge: object) -> Session:
        made = make_session(tiny_base_dir, tmp_path / "out", votes=4, **judge)
        engine = BySeed(said)
        monkeypatch.setattr(made, "engine", lambda stack, role: engine)
        return made

    place = RunDir(tmp_path / "files")
    place.path.mkdir()

    def votes(
        name: str, **judge: object
    ) -> tuple[dict[str, list[float | None]], dict[str, object]]:
        found, facts = judged(
            session(**judge),
            (),
            prompts,
            rows,
            place=lambda what: place.path / f"{name}_{what}.jsonl",
            stage="test",
            seed_path=(0,),
        )
        by_name: dict[str, list[float | None]] = {}
        for row in found:
            by_name.setdefault(row.candidate_id, []).append(row.score)
        return by_name, facts

    every, facts = votes("all")
    assert facts == {} and {len(some) for some in every.values()} == {4}
    some, facts = votes("some", adaptive_votes=True)
    assert [len(some[row.candidate_id]) for row in rows] == [2, 2, 3, 4]
    assert all(every[name][: len(found)] == found for name, found in some.items())
    assert facts == {"votes_drawn": 0.6875}
    # What is on disk is taken as it is.
    again, _ = votes("some", adaptive_votes=True)
    assert again == some
    assert sorted(path.name for path in place.path.glob("some_*")) == [
        "some_judgements.jsonl",
        "some_votes_1.jsonl",
        "some_votes_2.jsonl",
        "some_votes_3.jsonl",
        "some_votes_4.jsonl",
    ]


class BySeed(Scripted):
    """Says of each reply the score that belongs to the vote, told by the place of its seed."""

    def __init__(self, said: Mapping[str, list[int]]) -> None:
        from srlm_lite.seeds import derive_seed

        names = {text: f"{text.split()[0]}#{i}" for i, text in enumerate(said)}
        self._scores = {
            derive_seed(0, "first", names[text], vote): score
            for text, scores in said.items()
            for vote, score in enumerate(scores)
        }
        super().__init__(lambda prompt: "")

    def sample(self, requests: object, limits: object, **_: object) -> list[list[object]]:
        from srlm_lite.rollout.protocol import Sample

        return [
            [Sample(f"Score: {self._scores[seed]}", (), "stop", 3) for seed in request.seeds]
            for request in requests  # type: ignore[attr-defined]
        ]
