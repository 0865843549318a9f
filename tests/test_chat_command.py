"""`srlm-lite chat` in a pipe."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Cli
from exporting import make_run, random_adapter

from srlm_lite.cli import chat
from srlm_lite.model import base as base_module
from srlm_lite.model.chat import ChatFormat
from srlm_lite.recipe import recipe_from
from srlm_lite.records import FinishReason
from srlm_lite.rollout.protocol import Limits, Request, Sample
from srlm_lite.run.files import write_json
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.stages.conversation import Conversation
from srlm_lite.telling import for_terminal

QUESTION = "How do I look after a bicycle?"


@pytest.fixture
def run(tiny_base_dir: Path, tmp_path: Path) -> RunDir:
    adapters = [random_adapter(tiny_base_dir, seed=seed, size=0.1) for seed in (0, 1, 2)]
    return make_run(tmp_path / "run", tiny_base_dir, adapters=adapters, dtype="float32")


@pytest.fixture
def talk(run: RunDir, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Any:
    """The command with these lines on stdin: its stdout and stderr, and its exit code."""

    def command(*lines: str, iteration: str = "last") -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        done = cli("chat", "--adapters", run.path, "--iteration", iteration)
        return done.stdout, done.stderr, done.returncode

    return command


def greedy(run: RunDir, number: int | None, messages: list[dict[str, str]]) -> str:
    """What the stack of an iteration (None: the base) answers."""
    session = Session(recipe_from(run.facts()["recipe"], where="test"), run)
    ids = session.chat.render(messages, generation=True)
    engine = session.engine([] if number is None else session.stack(number))
    limits = Limits(temperature=0, top_p=1, max_new_tokens=16)
    [[sample]] = engine.sample([Request(prompt_ids=tuple(ids), seeds=(0,))], limits)
    return sample.text.strip()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_it_answers_as_the_model_of_that_iteration(run: RunDir, talk: Any) -> None:
    answers = {name: talk(QUESTION, iteration=name)[0] for name in ("base", "anchor", "1", "2")}
    for name, number in (("base", None), ("anchor", 0), ("1", 1), ("2", 2)):
        answer = greedy(run, number, [user(QUESTION)])
        assert answers[name] == for_terminal(answer) + "\n", name  # noise may hold an escape
    assert len(set(answers.values())) == 4


def test_it_switches_without_loading_anything_again(
    run: RunDir, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    right = base_module.load_base

    def counted(section: Any, **how: Any) -> Any:
        loads.append(section)
        return right(section, **how)

    monkeypatch.setattr(base_module, "load_base", counted)
    out, err, code = talk(
        QUESTION, "/reset", "/iter anchor", QUESTION, "/reset", "/iter 2", QUESTION
    )
    assert code == 0 and len(loads) == 1
    monkeypatch.undo()
    one, two = (greedy(run, number, [user(QUESTION)]) for number in (2, 0))
    assert out == for_terminal(f"{one}\n{two}\n{one}\n")
    assert "M3 of" in err and "M1 of" in err


def test_it_remembers_the_conversation(run: RunDir, talk: Any) -> None:
    out, _, _ = talk(QUESTION, "And a car?")
    first = greedy(run, 2, [user(QUESTION)])
    turns = [user(QUESTION), {"role": "assistant", "content": first}, user("And a car?")]
    assert out == for_terminal(f"{first}\n{greedy(run, 2, turns)}\n")


def test_the_model_grades_its_last_answer(
    run: RunDir, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random judge writes noise; what it is asked is the rubric around the last answer."""
    asked: list[str] = []
    right = ChatFormat.prompt_ids

    def noted(self: ChatFormat, text: str) -> list[int]:
        asked.append(text)
        return right(self, text)

    monkeypatch.setattr(ChatFormat, "prompt_ids", noted)
    monkeypatch.setattr("srlm_lite.stages.conversation.parse_score", lambda *_, **__: 4.0)
    run_json = run.run_json.read_text().replace('"window": 512', '"window": 2048')
    run.run_json.write_text(run_json)
    out, err, code = talk("/judge", QUESTION, "/judge")
    assert code == 0
    assert "there is no answer to judge yet" in err and "score 4" in err
    assert QUESTION in asked[-1] and out.splitlines()[0] in asked[-1]


def wide_session(run: RunDir) -> Session:
    """The run's session, with a window that has room for the judge's question."""
    facts = run.facts()
    facts["recipe"]["base"]["window"] = 2048
    return Session(recipe_from(facts["recipe"], where="test"), run)


def test_a_grading_that_was_cut_off_has_no_score(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run: what it would have ended in is not known, whatever its last line is so far."""
    session = wide_session(run)
    reasons: list[FinishReason] = ["stop", "stop", "length"]

    class Engine:
        def sample(self, requests: Any, limits: Limits) -> list[list[Sample]]:
            return [[Sample("It is good.\nScore: 4", (), reasons.pop(0), 8)]]

    monkeypatch.setattr(session, "engine", lambda stack: Engine())
    shown: list[str] = []
    conversation = Conversation(session)
    conversation.answer(QUESTION, shown.append)
    assert [conversation.judge(shown.append) for _ in range(2)] == [4.0, None]
    assert shown == ["It is good.\nScore: 4"] * 3


def test_a_grading_ends_with_its_score_line_as_in_a_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = wide_session(run)
    texts = [["Wash it."], ["Short.", "Score: 4", "And so on,"]]

    class Engine:
        def sample(self, requests: Any, limits: Limits) -> list[list[Sample]]:
            text = ""
            for line in texts.pop(0):
                text += f"{line}\n"
                if limits.stop is not None and limits.stop(text):
                    return [[Sample(text, (), "stop", 8)]]
            return [[Sample(text, (), "length", 8)]]

    monkeypatch.setattr(session, "engine", lambda stack: Engine())
    conversation, shown = Conversation(session), list[str]()
    conversation.answer(QUESTION, shown.append)
    assert conversation.judge(shown.append) == 4.0
    assert "".join(shown).endswith("Score: 4")


def test_where_the_judge_has_a_delta_of_its_own_that_one_grades(
    tiny_base_dir: Path, run: RunDir, talk: Any
) -> None:
    facts = run.facts()
    facts["recipe"] |= {"method": "meta-rewarding", "meta_rewarding": {"roles": "separate"}}
    facts["recipe"]["judge"] |= {"temperature": 0.0}
    facts["recipe"]["base"]["window"] = 2048
    facts["identity"] = recipe_from(facts["recipe"], where="test").identity()
    write_json(run.run_json, facts)
    place = run.iteration(2).judge_place
    before = talk(QUESTION, "/judge")[0]  # it has learned nothing: the judge is the anchor
    random_adapter(tiny_base_dir, seed=7, size=0.1).save(place.adapter, base_name="tiny")
    write_json(place.training, {})
    run.iteration(2).finish()
    after = talk(QUESTION, "/judge")[0]
    answer = greedy(run, 2, [user(QUESTION)])
    answer = for_terminal(answer)
    assert before.startswith(f"{answer}\n") and after.startswith(f"{answer}\n")
    assert before != after


def test_slips_do_not_end_it(talk: Any) -> None:
    out, err, code = talk("/iter 7", "/nonsense", "x " * 2000, "/help", "/quit", QUESTION)
    assert code == 0 and out == ""
    assert "has no iteration 7. It has: anchor, 1, 2" in err
    assert "no command /nonsense" in err
    assert "the message is too long" in err


def test_ctrl_c_stops_an_answer_and_not_the_conversation(
    run: RunDir, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while the model speaks; what it was about to say is no part of the talk."""
    right, signals = chat._show, iter([signal.SIGINT])

    def interrupted(piece: str) -> None:
        for number in signals:
            signal.raise_signal(number)
        right(piece)

    monkeypatch.setattr(chat, "_show", interrupted)
    # A shell starts what it puts into the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        out, err, code = talk("Never mind.", "/judge", QUESTION)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 0
    assert "stopped, and forgotten" in err and "there is no answer to judge yet" in err
    assert out == f"\n{greedy(run, 2, [user(QUESTION)])}\n"


def test_sigterm_ends_the_conversation(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_show", lambda piece: signal.raise_signal(signal.SIGTERM))
    _, err, code = talk("Never mind.", QUESTION)
    assert code == 143
    assert "(SIGTERM)" in err and "stopped, and forgotten" not in err


def test_no_such_model_is_one_line(talk: Any) -> None:
    out, err, code = talk(QUESTION, iteration="9")
    assert (out, code) == ("", 2)
    assert err.startswith("srlm-lite: ") and len(err.splitlines()) == 1
