"""`srlm-lite serve`: the models of a toy run behind OpenAI's protocol, asked by OpenAI's client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_server import free_port
from commands import Cli
from exporting import make_run, random_adapter
from forked import Program
from messages import Told

from srlm_lite.cli.serve import _sampled_here, _stacks
from srlm_lite.recipe import Recipe
from srlm_lite.records import RankedReply
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.run.files import read_records
from srlm_lite.run.run import RunDir
from srlm_lite.serve.http import MOST_BYTES, UNLIKELY, Server, is_local
from srlm_lite.serve.request import Refused, read_ask
from srlm_lite.serve.worker import Growing, Worker
from srlm_lite.session import Session
from srlm_lite.shipped import recipes_dir
from srlm_lite.stages.replies import reply_of
from srlm_lite.stages.sampling import judge_replies

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

TOY = recipes_dir() / "toy"
QUESTION = "give me facts about the whale"
KEY = "a key"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# --- what needs no model -----------------------------------------------------------------------


def body(**more: Any) -> dict[str, Any]:
    return {"model": "1", "messages": [user("Hi")], **more}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [user(" ")]}, "messages"),
        ({"messages": [user("a"), user("b")]}, "messages"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "b"}]}, "messages[0]"),
        ({"messages": [{**user("a"), "name": "x"}]}, "messages[0].name"),
        ({"messages": [user("\ud800")]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-300}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"seed": 0.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_k": 40}, "top_k"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        read_ask(body(**more))
    assert refused.value.status == 400 and refused.value.body["error"]["param"] == param


def test_what_changes_nothing_is_taken() -> None:
    """Among it what the engine `openai` sends beyond the protocol."""
    neutral = {"top_k": -1, "repetition_penalty": 1.0, "frequency_penalty": 0, "tools": []}
    assert read_ask(body(**neutral, user="me", temperature=None)) == read_ask(body())


def test_messages_are_read_as_a_conversation() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    back = {"role": "assistant", "content": "c", "refusal": None, "reasoning_content": "thought"}
    told = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}, back]
    ask = read_ask(body(messages=[*told, user("d")]))
    said = [(one["role"], one["content"]) for one in ask.messages]
    assert said == [("system", "s"), ("user", "ab"), ("assistant", "c"), ("user", "d")]
    assert not ask.bare
    none = read_ask(body(messages=[{"role": "system", "content": ""}, user("d")]))
    assert none.bare and len(none.messages) == 1


@pytest.mark.parametrize(
    ("stops", "pieces"),
    [
        ((), ["one", "\ntwo", "\nthree"]),
        (("two",), ["one"]),
        (("e\nt",), ["on"]),  # what may begin a stop waits until it does not
        (("three\nx",), ["one", "\ntwo"]),
    ],
)
def test_a_growing_reply_shows_nothing_that_is_cut_later(
    stops: tuple[str, ...], pieces: list[str]
) -> None:
    shown: list[str] = []
    grown = Growing(stops, shown.append)
    for text in ("one\n", "one\ntwo\n", "one\ntwo\nthree\n"):
        if not grown.stopped:
            grown.more(text)
    assert shown == pieces and grown.stopped == (stops in (("two",), ("e\nt",)))


def test_local_addresses() -> None:
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))
    assert not any(map(is_local, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


# --- a run of three models ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    base = TOY / "base"
    adapters = [random_adapter(base, seed=seed, size=0.02) for seed in (0, 1, 2)]
    folder = tmp_path_factory.mktemp("serve") / "run"
    return make_run(
        folder,
        base,
        adapters=adapters,
        dtype="float32",
        window=256,
        more={"rollout": {"temperature": 1.0, "max_new_tokens": 40}},
    )


@pytest.fixture(scope="module")
def session(run: RunDir) -> Session:
    """The run's own, beside that of the server."""
    return Session(run.recipe(), run)


@pytest.fixture(scope="module")
def graded_here(
    run: RunDir, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, float | None]]:
    """Before the server: two engines at work in one process attend by one table of transformers."""
    return graded(run, tmp_path_factory.mktemp("graded") / "here.jsonl")


@pytest.fixture(scope="module")
def server(run: RunDir, graded_here: object) -> Iterator[Server]:
    worker = Worker(Session(_sampled_here(run.recipe()), run), _stacks(run, None))
    with Server("127.0.0.1", 0, worker, key=KEY) as server:
        worker.start()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
    assert worker.end(30)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def sampled(session: Session, number: int | None, **how: Any) -> str:
    """What the run's engine draws from the model of an iteration; None: the base."""
    limits = Limits(**{"temperature": 0, "top_p": 1, "max_new_tokens": 40, **how.pop("limits", {})})
    ids = session.chat.render(how.get("messages", [user(QUESTION)]), generation=True)
    engine = session.engine([] if number is None else session.stack(number))
    [[sample]] = engine.sample([Request(tuple(ids), (how.get("seed", 0),))], limits)
    return reply_of(session.chat, "", sample).text


def ask(client: openai.OpenAI, model: str, **more: Any) -> Any:
    given = {"messages": [user(QUESTION)], "temperature": 0, **more}
    return client.chat.completions.create(model=model, **given)


def test_the_models_are_listed_by_their_names(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["base", "anchor", "1", "2"]
    assert client.models.retrieve("anchor").id == "anchor"


def test_each_model_answers_greedily_as_the_engine_of_the_run(
    client: openai.OpenAI, session: Session
) -> None:
    """Asked at the same time, they are not mixed up."""
    models: dict[str, int | None] = {"base": None, "anchor": 0, "1": 1, "2": 2}
    with ThreadPoolExecutor(8) as pool:
        said = dict(zip(models, pool.map(lambda name: ask(client, name), models), strict=True))
    right = {name: sampled(session, number) for name, number in models.items()}
    assert {name: one.choices[0].message.content for name, one in said.items()} == right
    assert len(set(right.values())) == 4
    one = said["2"]
    assert (one.model, one.object) == ("2", "chat.completion")
    assert one.usage.prompt_tokens == len(session.chat.prompt_ids(QUESTION))
    assert 0 < one.usage.completion_tokens <= 40
    full = one.usage.completion_tokens == 40
    assert one.choices[0].finish_reason == ("length" if full else "stop")


def test_a_seed_draws_the_same_again_and_as_in_the_engine(
    client: openai.OpenAI, session: Session
) -> None:
    def texts(**more: Any) -> list[str]:
        found = ask(client, "1", **{"temperature": 1, "top_p": 0.9, "seed": 7, **more})
        return [choice.message.content for choice in found.choices]

    limits = {"temperature": 1, "top_p": 0.9}
    assert texts() == [sampled(session, 1, seed=7, limits=limits)]
    several = texts(n=3)
    assert several[0] == texts()[0] and len(set(several)) > 1
    assert texts(n=3) == several
    assert len({texts(seed=None)[0] for _ in range(4)}) > 1
    with ThreadPoolExecutor(8) as pool:  # beside others it draws what it draws alone
        beside = list(pool.map(lambda seed: texts(seed=seed)[0], [7, 8, 9, 7, 10, 11]))
    assert beside[0] == beside[3] == several[0] and len(set(beside)) > 1


def test_waiting_requests_are_sampled_together(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    right = TransformersEngine.sample

    def counted(self: Any, requests: Any, limits: Any, **more: Any) -> Any:
        sizes.append(len(requests))
        time.sleep(0.2)  # for the others to come in
        return right(self, requests, limits, **more)

    monkeypatch.setattr(TransformersEngine, "sample", counted)
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda seed: ask(client, "1", seed=seed, max_tokens=4), range(9)))
    assert sum(sizes) == 9 and len(sizes) <= 4


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 1, "seed": 3}, {"stop": ["the"]}])
def test_a_stream_gives_the_same_text(client: openai.OpenAI, more: dict[str, Any]) -> None:
    whole = ask(client, "2", **more)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    for event in ask(client, "2", stream=True, stream_options={"include_usage": True}, **more):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert texts == {one.index: one.message.content for one in whole.choices}
    assert reasons == {one.index: one.finish_reason for one in whole.choices}
    assert usage is not None and usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_comes_line_by_line(client: openai.OpenAI) -> None:
    """Answers of the toy base have several lines."""
    pieces = [
        event.choices[0].delta.content
        for event in ask(client, "base", stream=True)
        if event.choices and event.choices[0].delta.content
    ]
    assert len(pieces) > 1 and pieces[0].count("\n") == 0


def test_a_stop_is_no_part_of_the_reply(client: openai.OpenAI) -> None:
    text = ask(client, "base").choices[0].message.content
    word = text.split()[3]
    cut = ask(client, "base", stop=word).choices[0]
    assert cut.message.content == text[: text.index(word)].strip()
    assert cut.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI, session: Session) -> None:
    choice = ask(client, "1", logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    # The toy base's tokens are words, and the spaces between them are no one's.
    spelt = "".join("".join(one.token for one in tokens).split())
    assert spelt == "".join(choice.message.content.split())
    # Greedily, what is drawn is the most probable.
    assert all(one.logprob == one.top_logprobs[0].logprob for one in tokens)
    assert all(len(one.top_logprobs) == 3 and UNLIKELY < one.logprob <= 0 for one in tokens)
    ids = session.chat.prompt_ids(QUESTION)
    limits = Limits(temperature=0, top_p=1, max_new_tokens=1, alternatives=3)
    engine = session.engine(session.stack(1))
    [[sample]] = engine.sample([Request(tuple(ids), (0,))], limits)
    best = sample.tokens[0].alternatives[0][1]
    assert tokens[0].logprob == pytest.approx(best, abs=1e-5)


def test_a_conversation_is_rendered_by_the_template(
    client: openai.OpenAI, session: Session
) -> None:
    talk = [user(QUESTION), {"role": "assistant", "content": "the whale is large"}]
    talk.append(user("give me facts about the river"))
    said = ask(client, "1", messages=talk).choices[0].message.content
    assert said == sampled(session, 1, messages=talk) != sampled(session, 1)


def test_the_recipe_s_system_message_stands_where_there_is_no_other(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    """The toy base's template has none; this one writes them."""
    adapters = [random_adapter(tiny_base_dir, seed=0)]
    run = make_run(tmp_path / "run", tiny_base_dir, adapters=adapters, system="Be brief.")
    session = Session(run.recipe(), run)
    worker = Worker(session, {"base": []})

    def ids(*messages: dict[str, str]) -> list[int]:
        return worker._ids(read_ask(body(messages=list(messages))))

    def rendered(*messages: dict[str, str]) -> list[int]:
        return session.chat.render(list(messages), generation=True)

    brief, own = ({"role": "system", "content": text} for text in ("Be brief.", "Be kind."))
    assert ids(user("Hi")) == rendered(brief, user("Hi")) != rendered(user("Hi"))
    assert ids(own, user("Hi")) == rendered(own, user("Hi"))
    assert ids({"role": "system", "content": ""}, user("Hi")) == rendered(user("Hi"))


@pytest.mark.parametrize(
    ("more", "kind", "code"),
    [
        ({"model": "7"}, openai.NotFoundError, "model_not_found"),
        ({"presence_penalty": 1}, openai.BadRequestError, "unsupported_parameter"),
        ({"max_tokens": 300}, openai.BadRequestError, "context_length_exceeded"),
    ],
)
def test_errors_are_those_that_clients_know(
    client: openai.OpenAI, more: dict[str, Any], kind: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(kind) as error:
        ask(client, **{"model": "1", **more})
    assert error.value.code == code
    if code == "model_not_found":
        assert "there are base, anchor, 1, 2" in str(error.value)


def test_without_the_key_nothing_is_answered(server: Server) -> None:
    with openai.OpenAI(base_url=server.url, api_key="another", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            ask(stranger, "1")


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("GET", "/nowhere", {}, b"", 404),
        ("POST", "/v1/completions", {}, b"{}", 404),
        ("POST", "/v1/chat/completions", {}, b"{", 400),
        ("POST", "/v1/chat/completions", {}, b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", {}, b"[]", 400),
        ("POST", "/v1/chat/completions", {}, b"\xff", 400),
        ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, b"{}", 415),
        ("POST", "/v1/chat/completions", {}, b" " * (MOST_BYTES + 1), 413),
        ("GET", "/v1/models", {"Host": "evil.example"}, b"", 403),
        ("DELETE", "/v1/models", {}, b"", 501),
    ],
)
def test_whatever_comes_in_is_answered_in_one_shape(
    server: Server, method: str, path: str, headers: dict[str, str], content: bytes, status: int
) -> None:
    said = httpx.request(
        method,
        server.url.removesuffix("/v1") + path,
        headers={
            "Authorization": f"Bearer {KEY}",
            "Content-Type": "application/json",
            **headers,
        },
        content=content,
    )
    assert said.status_code == status
    assert set(said.json()["error"]) == {"message", "type", "param", "code"}


def test_clients_that_leave_do_no_harm(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in the midst of its request, one of a reply, one of a stream; the next is answered."""
    host, port = server.server_address[:2]
    for sent in (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{", b"\0\r\n"):
        with socket.create_connection((host, port)) as connection:
            connection.sendall(sent)
    for stream in (False, True):
        connection = http.client.HTTPConnection(str(host), int(port))
        text = json.dumps({**body(), "stream": stream, "max_tokens": 40})
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", text, headers)
        connection.close()
    assert ask(client, "1").choices[0].message.content


def test_one_failure_is_told_and_the_next_request_is_answered(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("the secret of the house")

    with monkeypatch.context() as patched:
        patched.setattr(TransformersEngine, "sample", broken)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as error:
                ask(client, "1", stream=stream)
            assert "RuntimeError" in str(error.value) and "secret" not in str(error.value)
    assert ask(client, "1").choices[0].message.content


def graded(run: RunDir, path: Path, **changes: Any) -> list[tuple[str, float | None]]:
    """What model 1 of the run says of twelve replies, and its grades."""
    rows = read_records(TOY / "data" / "eft_eval.jsonl", RankedReply)[:12]
    raw = run.recipe().model_dump(mode="json")
    judge = {"rubric": "toy", "temperature": 0.0, "max_new_tokens": 72}
    raw["judge"] |= {**judge, **changes.pop("judge", {})}
    session = Session(Recipe.model_validate({**raw, **changes}), RunDir(run.path))
    found = judge_replies(
        session,
        session.stack(1),
        [(row.response_id, row.prompt, row.response) for row in rows],
        path=path,
        stage="test",
        votes=1,
        chunk=20,
        seed_path=("test",),
    )
    return [(row.text, row.score) for row in found]


def test_a_judge_behind_it_gives_the_grades_of_the_judge_in_the_run(
    graded_here: list[tuple[str, float | None]],
    server: Server,
    run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`judge.engine: openai` asks this server for the model that the other session has loaded."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    there = {"url": server.url, "model": "1"}
    told = graded(run, tmp_path / "there.jsonl", judge={"engine": "openai"}, openai=there)
    assert told == graded_here
    scores = [score for _, score in graded_here if score is not None]
    assert len(scores) >= 6 and len(set(scores)) > 1


# --- the command -------------------------------------------------------------------------------


def test_it_serves_until_it_is_interrupted(run: RunDir) -> None:
    """As a person starts it; Ctrl-C ends it with code 0."""
    port = free_port()
    options = ["--adapters", run.path, "--port", str(port), "--iteration", "last"]
    environment = {**os.environ, "SRLM_API_KEY": ""}
    process = Program("-m", "srlm_lite", "serve", *options, env=environment)
    try:
        while process.poll() is None:
            try:
                found = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).json()
            except httpx.TransportError:
                time.sleep(0.1)
            else:
                break
        assert [one["id"] for one in found["data"]] == ["2"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert (process.returncode, out) == (0, "")
        assert f"serving 2 of {run.path} at http://127.0.0.1:{port}/v1; Ctrl-C ends it" in err
        assert "Traceback" not in err
    finally:
        process.kill()


def test_what_cannot_be_served_is_one_line(run: RunDir, cli: Cli, told: Told) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = cli("serve", "--adapters", run.path, "--port", port)
        assert done.returncode == 2 and f"--port {port}: cannot listen there" in done.stderr
    for args in (["--iteration", "9"], ["--api-key", "clé"]):
        done = cli("serve", "--adapters", run.path, *args)
        assert (done.returncode, done.stdout) == (2, "")
        told(done.stderr.strip().replace(str(run.path), "RUN"))
