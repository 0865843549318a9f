"""Options weighed by one prefill: the model's own probabilities, and what can be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import completion, scripted
from messages import Told

from srlm_lite.declared import Sizes, Weighs
from srlm_lite.forms import form_of
from srlm_lite.forms.base import JudgeAtWork, JudgeQuestion
from srlm_lite.forms.grade import expected
from srlm_lite.judging import Rubric, load_rubric, unasked
from srlm_lite.recipe import load_recipe
from srlm_lite.records import Candidate, Prompt, RankedReply, Weighed
from srlm_lite.rollout.openai_engine import refuse_untold
from srlm_lite.rollout.protocol import Token
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import OpenAI
from srlm_lite.stages.anchor import score_lines
from srlm_lite.stages.weighing import chunks_of, options_of, told_by, told_in, weigh

SCORES = [f"Score: {score}" for score in range(6)]


def session_of(out: Path, *overrides: str) -> Session:
    return Session(load_recipe("toy", list(overrides)), RunDir(out))


def answer(text: str) -> Candidate:
    return Candidate("p", "p#0", text, 3, "stop")


# The toy base knows digits one by one, so scores from 0 to 5 are a token each.


@pytest.mark.model
def test_what_is_weighed_is_the_model_s_own_distribution(tmp_path: Path) -> None:
    """Against one forward pass of the model over question and `Score:`, for each option."""
    import torch

    session = session_of(tmp_path)
    texts = [
        session.rubric.render(prompt="list facts about the oak", response=response)
        for response in ("1. oak has history", "gladly, here you go.\n1. it gives joy", "no")
    ]
    questions = [JudgeQuestion(f"q{i}", text, about="p" * (i < 2)) for i, text in enumerate(texts)]
    found = weigh(session, (), questions, SCORES, path=tmp_path / "w.jsonl", stage="t", setting="t")
    chat = session.chat
    begun = chat.target_ids("Score: 0")[:2]
    for one in questions:
        ids = torch.tensor([[*chat.prompt_ids(one.text), *begun]])
        with torch.no_grad():
            logits = session.slot.model(input_ids=ids).logits[0, -1].float()
        p = logits.softmax(-1)
        own = [float(p[chat.target_ids(option)[2]]) for option in SCORES]
        assert found[one.name].p == pytest.approx(own, abs=2e-4)
        assert sum(own) <= 1 + 1e-6
    # What is on disk is read, and not computed again.
    session.engine = None  # type: ignore[assignment,method-assign]
    again = weigh(session, (), questions, SCORES, path=tmp_path / "w.jsonl", stage="t", setting="t")
    assert again == found


@pytest.mark.model
def test_options_that_one_token_does_not_tell_apart_are_refused(tmp_path: Path, told: Told) -> None:
    chat = session_of(tmp_path).chat
    options = options_of(chat, SCORES, setting="judge.rubric")
    assert len(options.begun) == 2
    assert options.texts == ("0", "1", "2", "3", "4", "5")
    # To this base 1 and 10 both begin with the token 1.
    with told.refused():
        options_of(chat, ["Score: 1", "Score: 10", "Score: 2"], setting="judge.rubric")
    # But of these two the one ends where the other goes on.
    assert len(options_of(chat, ["Score: 1", "Score: 10"], setting="t").begun) == 3


@pytest.mark.model
def test_a_question_that_does_not_fit_has_no_probabilities(tmp_path: Path) -> None:
    session = session_of(tmp_path, "base.window=64")
    questions = [JudgeQuestion("short", "facts"), JudgeQuestion("long", "facts " * 80)]
    found = weigh(session, (), questions, SCORES, path=tmp_path / "w.jsonl", stage="t", setting="t")
    assert found["short"].p is not None
    assert found["long"] == Weighed("long", None)


def test_questions_about_one_thing_stay_together() -> None:
    questions = [
        JudgeQuestion(f"{about}{i}", "", about) for i in range(3) for about in ("a", "b", "c")
    ]
    parts = chunks_of(questions, 6)
    assert [[one.name for one in part] for part in parts] == [
        ["a0", "a1", "a2", "b0", "b1", "b2"],
        ["c0", "c1", "c2"],
    ]
    # One thing with more questions than a part has room for is still one part.
    assert [len(part) for part in chunks_of(questions, 2)] == [3, 3, 3]
    loose = [JudgeQuestion(str(i), "") for i in range(5)]
    assert [len(part) for part in chunks_of(loose, 2)] == [2, 2, 1]


def token(text: str, **alternatives: float) -> Token:
    return Token(text, tuple((name, math.log(p)) for name, p in alternatives.items()))


def test_whitespace_before_an_option_does_not_count() -> None:
    found = told_in(token("A", **{"A": 0.5, " A": 0.25, "B": 0.125}), ("A", "B", "C"))
    assert found == (0.75, 0.125, 0.0)


def test_a_server_s_reply_is_read_where_the_options_part() -> None:
    options = ("Winner: A", "Winner: B")
    reply = [token("Winner", Winner=0.9, I=0.1), token(":", **{":": 1.0})]
    last = token(" B", **{" B": 0.6, " A": 0.3, " neither": 0.1})
    assert told_by([*reply, last], options) == (0.3, 0.6)
    # It begins with something else, or is not heard out.
    assert told_by([token("I", Winner=0.1, I=0.9), last], options) == (0.0, 0.0)
    assert told_by(reply, options) == (0.0, 0.0)
    assert told_by([], options) == (0.0, 0.0)


def test_an_expected_score_is_the_mean_by_probability() -> None:
    """(.2 x 1 + .6 x 4) / .8 = 3.25; the likeliest is 4."""
    row = expected(answer("x"), Weighed("p#0", (0.0, 0.2, 0.0, 0.0, 0.6, 0.0)), range(6))
    assert (row.score, row.sampled_score, row.text) == (3.25, 4.0, "Score: 4")


@pytest.mark.parametrize(
    ("p", "reason"), [(None, "length"), ((0.004, 0.003), "stop"), ((0.0, 0.0), "stop")]
)
def test_a_judge_that_would_say_something_else_has_given_no_score(p: Any, reason: str) -> None:
    row = expected(answer("x"), Weighed("p#0", p), (0, 1))
    assert (row.score, row.text, row.finish_reason) == (None, "", reason)


def asking(url: str) -> OpenAI:
    return OpenAI(url=url, model="m", retries=0)


def test_a_server_that_tells_no_probabilities_is_refused_before_a_run(told: Told) -> None:
    with (
        scripted(lambda number, body: completion("yes")) as server,
        told.refused(),
    ):
        refuse_untold(asking(server.url), way_out="Let the judge write its reply")
    assert server.bodies[0]["top_logprobs"] == 2


def test_a_server_that_tells_them_is_asked_for_the_verdict_alone(tmp_path: Path) -> None:
    """What it says first, with what else it might have said, is the probability of each option."""
    entry = {"token": "B", "logprob": -0.5, "top_logprobs": [
        {"token": "B", "logprob": math.log(0.6)}, {"token": "A", "logprob": math.log(0.3)},
    ]}  # fmt: skip
    reply = completion("B", logprobs={"content": [entry]})
    with scripted(lambda number, body: reply) as server:
        refuse_untold(asking(server.url), way_out="")
        session = session_of(
            tmp_path, "judge.engine=openai", f"openai.url={server.url}", "openai.model=m"
        )
        questions = [JudgeQuestion("a>b", "Which?", "p"), JudgeQuestion("b>a", "And now?", "p")]
        found = weigh(
            session, (), questions, ["A", "B"], path=tmp_path / "w.jsonl", stage="t", setting="t"
        )
    assert [one.p for one in found.values()] == [(0.3, 0.6)] * 2
    asked = [body["messages"][-1]["content"] for body in server.bodies[1:]]
    assert sorted(text.split("\n")[0] for text in asked) == ["And now?", "Which?"]
    assert all(text.endswith("\nA\nB") for text in asked)


def test_a_judge_without_a_rationale_learns_the_score_line_alone() -> None:
    rows = [
        RankedReply("p", "q", "a", "x", 0, target="It says much.\nScore: 4"),
        RankedReply("p", "q", "b", "y", 1, target="Little.\n**Score: 1/5**"),
    ]
    lines = score_lines(rows, load_rubric("toy"))
    assert [row.target for row in lines] == ["Score: 4", "Score: 1"]


class Reads(JudgeAtWork):
    """A judge that goes on with the first option, or with the last one after a good answer."""

    where = "here"

    def __init__(self, *overrides: str) -> None:
        self.recipe = load_recipe("toy", ["judge.rationale=false", *overrides])
        self.options: Sequence[str] = ()

    @property
    def rubric(self) -> Rubric:
        return load_rubric("toy")

    def weigh(
        self, questions: Sequence[JudgeQuestion], options: Sequence[str], **_: Any
    ) -> dict[str, Weighed]:
        self.options = options
        found = {}
        for one in questions:
            at = -1 if "good" in one.text else 0
            p = [0.0] * len(options)
            p[at], p[1] = 0.6, 0.2
            found[one.name] = Weighed(one.name, None if "long" in one.text else tuple(p))
        return found

    def vote(self, *args: Any) -> Any:
        raise AssertionError("nothing is written")

    ask = length = read = vote

    def write(self, name: str, rows: Sequence[Any]) -> None:
        assert name == "judgements"


def test_without_a_rationale_each_candidate_is_read_once() -> None:
    """(5 x .6 + 1 x .2) / .8 = 4 for the good one, (0 x .6 + 1 x .2) / .8 = .25 for the other."""
    judge = Reads()
    rows = [
        Candidate("p", f"p#{i}", text, 1, "stop") for i, text in enumerate(["good", "x", "long"])
    ]
    form = form_of(judge.recipe)
    found, facts = form.judge(judge, [Prompt("p", "about it")], rows)
    assert [row.score for row in found] == [4.0, 0.25, None]
    assert [row.sampled_score for row in found] == [5.0, 0.0, None]
    assert judge.options == SCORES and facts == {}
    # One judgement is all there is, whatever the recipe says of votes.
    assert (form.min_votes, form.weighs) == (1, True)
    assert unasked(found) == {"p#2"}
    [phase] = form.phases(Sizes(256, 20, 64, 90, 100, 72, 0), prompts=10, answers=40, at_once=8)
    assert isinstance(phase, Weighs) and phase.texts == 40


def test_votes_that_adapt_are_refused_where_there_are_none(told: Told) -> None:
    with told.refused():
        load_recipe("toy", ["judge.rationale=false", "judge.adaptive_votes=true"])
