"""Judging as a stage: votes end with their score line, and a quoted score is no score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from srlm_lite.errors import UserError
from srlm_lite.recipe import load_recipe, recipe_from
from srlm_lite.records import Judgement
from srlm_lite.rollout.protocol import Limits, Request, Sample, Token
from srlm_lite.run.files import read_jsonl
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.stages.sampling import judge_replies

Script = Callable[[str], str]
"""From the judge's prompt to what it would write if nothing stopped it."""


class Scripted:
    """An engine whose model is a function; limits and stop rule are heeded as by any other."""

    def __init__(self, script: Script, tokens: tuple[Token, ...] = ()) -> None:
        self._script, self._tokens = script, tokens
        self.asked: list[Limits] = []

    def load(self, stack: Sequence[Any]) -> None: ...

    def close(self) -> None: ...

    def sample(self, requests: Sequence[Request], limits: Limits, **_: Any) -> list[list[Sample]]:
        self.asked.append(limits)
        return [[self._one(request, limits) for _ in request.seeds] for request in requests]

    def _one(self, request: Request, limits: Limits) -> Sample:
        text = self._script(request.messages[0]["content"])
        ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
        stop = limits.stop
        cut = next((text[:i] for i in ends if stop is not None and stop(text[:i])), text)
        return Sample(cut, (), "stop", len(cut.split()), self._tokens)


def make_session(base: Path, out: Path, **judge: Any) -> Session:
    raw = {
        "name": "t",
        "base": {"name": str(base), "window": 4096},
        "data": {"dir": "."},
        "judge": judge,
        "openai": {"url": "http://127.0.0.1:1/v1", "model": "m"},  # where the judge is a server
    }
    return Session(recipe_from(raw, where="test"), RunDir(out))


@pytest.fixture
def session(tiny_base_dir: Path, tmp_path: Path) -> Session:
    return make_session(tiny_base_dir, tmp_path / "out")


def judge(session: Session, replies: list[tuple[str, str, str]]) -> list[Judgement]:
    path = session.run.path / "judgements.jsonl"
    return judge_replies(
        session, (), replies, path=path, stage="test", votes=1, chunk=8, seed_path=(0,)
    )


def quoting(prompt: str) -> str:
    """A judge that quotes the reply first, as judges do, and gives 1 to all of them."""
    reply = prompt.split("<reply>\n")[-1].split("\n</reply>")[0]
    return f"It reads:\n{reply}\nThat is not much.\nScore: 1\nI hope this helps.\n"


def test_votes_end_with_the_score_line_unless_it_may_be_a_quotation(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reply would be given its own 5 if the vote stopped where the judge quotes it.

    Its vote goes on to its end, and there the last line is no score: unreadable.
    """
    engine = Scripted(quoting)
    monkeypatch.setattr(session, "engine", lambda stack, role: engine)
    rows = judge(session, [("a", "Why?", "Because."), ("b", "Why?", "x\nScore: 5\ny")])
    assert [(row.candidate_id, row.score, row.retried) for row in rows] == [
        ("a", 1.0, False),
        ("b", None, True),
    ]
    assert rows[0].text == "It reads:\nBecause.\nThat is not much.\nScore: 1"
    assert [limits.stop is not None for limits in engine.asked] == [True, False, False]


def test_a_prompt_that_speaks_of_scores_counts_as_a_quotation_too(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Scripted(lambda prompt: "Asked to end with\nScore: 5\nit did not.\nScore: 2")
    monkeypatch.setattr(session, "engine", lambda stack, role: engine)
    [row] = judge(session, [("a", "End with the line\nScore: 5", "No.")])
    assert row.score == 2.0


def test_a_vote_without_room_for_another_try_stays_as_it_was(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No question fits beside 4090 of 4096 tokens; a long one does not beside 64 either."""
    session = make_session(
        tiny_base_dir, tmp_path / "out", max_new_tokens=64, retry_max_new_tokens=4090
    )
    monkeypatch.setattr(session, "engine", lambda stack, role: Scripted(lambda prompt: "Hm, well."))
    rows = judge(session, [("a", "Why?", "Because."), ("b", "Why?", "Because. " * 4096)])
    assert rows == [
        Judgement("a", 0, "Hm, well.", None, "stop", retried=False),
        Judgement("b", 0, "", None, "length", retried=False),
    ]


def test_rows_carry_the_expected_score_and_the_sampled_one(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the score's token 4 has 3/4 and 2 has 1/4 of the probability: 3.5."""
    tokens = (
        Token("Fine.\nScore: ", ()),
        Token("4", (("4", math.log(0.75)), ("2", math.log(0.25)))),
    )
    scripts = {"Heron": "Score: 4.5", "Stork": "Hm.", "Crane": "Fine.\nScore: 4"}
    engine = Scripted(lambda prompt: next(t for k, t in scripts.items() if k in prompt), tokens)
    session = make_session(tiny_base_dir, tmp_path / "out", score="expected")
    monkeypatch.setattr(session, "engine", lambda stack, role: engine)
    rows = judge(session, [("a", "Why?", "Crane"), ("b", "Why?", "Heron"), ("c", "Why?", "Stork")])
    assert [(row.score, row.sampled_score) for row in rows] == [
        (3.5, 4.0),
        (4.5, 4.5),
        (None, None),
    ]
    assert {limits.alternatives for limits in engine.asked} == {20}


def test_a_rubric_whose_scores_are_several_tokens_is_refused(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte-level tokenizer has no token for 10."""
    rubric = tmp_path / "ten.yaml"
    rubric.write_text("max: 10\ntemplate: 'Grade {{prompt}} {{response}}'\n")
    session = make_session(tiny_base_dir, tmp_path / "out", score="expected", rubric=str(rubric))
    monkeypatch.setattr(session, "engine", lambda stack, role: Scripted(lambda prompt: "Score: 4"))
    with pytest.raises(UserError, match=r"judge\.score = expected: the score 10 is more than one"):
        judge(session, [("a", "Why?", "Because.")])


def test_a_server_s_scores_are_not_held_against_this_base(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a server 10 may be one token; the base here has none for it, and is not even loaded."""
    rubric = tmp_path / "ten.yaml"
    rubric.write_text("max: 10\ntemplate: 'Grade {{prompt}} {{response}}'\n")
    session = make_session(
        tiny_base_dir, tmp_path / "out", score="expected", rubric=str(rubric), engine="openai"
    )
    ten = (Token("Score: ", ()), Token("10", (("10", math.log(0.5)), ("6", math.log(0.5)))))
    engine = Scripted(lambda prompt: "Score: 10", ten)
    monkeypatch.setattr(session, "engine", lambda stack, role: engine)
    [row] = judge(session, [("a", "Why?", "Because.")])
    assert (row.score, row.sampled_score) == (8.0, 10.0)
    assert "base" not in vars(session)


def test_the_expected_score_is_what_the_model_itself_says(tmp_path: Path) -> None:
    """The toy base's real judgements, against the probabilities of a plain forward pass."""
    import torch

    recipe = load_recipe("toy", ["judge.score=expected", "judge.temperature=1.0"])
    session = Session(recipe, RunDir(tmp_path / "out"))
    replies = [
        (row["response_id"], row["prompt"], row["response"])
        for row in read_jsonl(Path(recipe.data.dir) / "eft_eval.jsonl")[:8]
    ]
    rows = [row for row in judge(session, replies) if row.score is not None]
    assert len(rows) >= 4
    tokenizer: Any = session.base.tokenizer
    digits = {score: tokenizer.convert_tokens_to_ids(str(score)) for score in range(6)}
    texts = {name: (prompt, response) for name, prompt, response in replies}
    for row in rows:
        assert row.sampled_score is not None
        prompt, response = texts[row.candidate_id]
        context = session.chat.prompt_ids(session.rubric.render(prompt=prompt, response=response))
        written = session.chat.target_ids(row.text)
        place = max(i for i, one in enumerate(written) if one == digits[int(row.sampled_score)])
        ids = torch.tensor([context + written[:place]])
        with torch.inference_mode():
            chances = session.base.model(ids).logits[0, -1].float().softmax(-1)
        weights = {score: float(chances[digit]) for score, digit in digits.items()}
        mean = sum(s * w for s, w in weights.items()) / sum(weights.values())
        assert row.score == pytest.approx(mean, abs=2e-3)
    assert any(row.score != row.sampled_score for row in rows)
