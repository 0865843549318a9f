"""No secret is shown, and nothing that a terminal obeys: whoever is quoted, and wherever to."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chat_server import completion, free_port, scripted
from commands import Cli, Done
from forked import Program
from messages import Told
from reporting import Reply, add_anchor, add_iteration, evaluation, new_run
from reporting import Told as ToldPair

from srlm_lite import telling
from srlm_lite.cli import chat, doctor, main, serve
from srlm_lite.cli.preflight import preflight_json, preflight_text
from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.doctor import machine, packages, proof
from srlm_lite.doctor.finding import Finding
from srlm_lite.errors import SrlmError, UserError
from srlm_lite.export.card import public_recipe
from srlm_lite.preflight.checks import Answer
from srlm_lite.preflight.launch import Launch
from srlm_lite.recipe import load_recipe, overridden
from srlm_lite.rollout.openai_engine import OpenAIEngine, key_of, reach
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.run.files import read_json, write_json
from srlm_lite.serve.http import Server
from srlm_lite.serve.request import Refused
from srlm_lite.serve.worker import Job
from srlm_lite.settings import OpenAI
from srlm_lite.telling import for_terminal, json_for_terminal, secret_in_url, without_secrets

KEY = "planted-7f3a9c-key"
"""It has no known form: it is known by the variable that it stands in."""
PASSWORD = "planted-5e21d0-word"
"""It stands in a URL alone."""

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

OBEYED = "a\x1b[0mb\x9b0mc\x1b]8;;\x1b\\d\x07\r\u202ee"
"""Sequences that a terminal obeys, each of which changes nothing: styles reset, a link closed."""
SPELLED = r"a\x1b[0mb\x9b0mc\x1b]8;;\x1b\d\x07\x0d\u202ee"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "_hidden", set())


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, KEY)


# --- what is a secret -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"refuses {KEY}!", "refuses ***!"),
        ("GET http://me:word@host/v1", "GET http://***@host/v1"),
        ("https://host/v1?api_key=abc&api-version=3", "https://host/v1?api_key=***&api-version=3"),
        ("http://host/?x=1&access_token=abc)", "http://host/?x=1&access_token=***)"),
        ("Authorization: Bearer abc1defgh", "Authorization: Bearer ***"),
        ("serve --api-key 'a b' --port 1", "serve --api-key *** --port 1"),
        (f"hf_{'a' * 30} and sk-{'b' * 20}", "*** and ***"),
        # and what is none
        ("dpo.beta=0.1 --set judge.votes=3", "dpo.beta=0.1 --set judge.votes=3"),
        ("Basic settings, bearer of news", "Basic settings, bearer of news"),
        ("write to me@host.org, see http://host/a@b", "write to me@host.org, see http://host/a@b"),
        ("`key` (is 'token'): unknown", "`key` (is 'token'): unknown"),
        ("tokens=12 token_ids hf_model sk-learn", "tokens=12 token_ids hf_model sk-learn"),
    ],
)
def test_what_is_shown_of_a_text(planted: None, text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_values_of_other_variables_are_words_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    monkeypatch.setenv("KEY_FILE", "/home/me/keys")
    monkeypatch.setenv("MY_TOKEN", "short")
    for text in ("parallelism", "/home/me/keys", "in short"):
        assert without_secrets(text) == text


def test_a_key_in_a_variable_of_any_name_is_hidden_once_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    assert key_of(OpenAI(url="http://h/v1", model="m", key_variable="MY_JUDGE")) == KEY
    assert without_secrets(f"no {KEY}") == "no ***"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://me:word@host/v1", "a user or password"),
        ("http://me@host/v1", "a user or password"),
        ("http://host/v1?api_key=abc", "the parameter api_key"),
        ("http://host/v1?x=1&subscription-key=", "the parameter subscription-key"),
        ("http://host/v1?api-version=2026-01-01", None),
        ("http://host:8000/v1", None),
    ],
)
def test_what_of_a_url_is_a_secret(url: str, found: str | None) -> None:
    assert secret_in_url(url) == found


# --- who shows it -----------------------------------------------------------------------------


def test_errors_logs_progress_and_tracebacks_show_no_secret(
    planted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{KEY} http://me:{PASSWORD}@host {OBEYED}"
    shown = f"*** http://***@host {SPELLED}"
    assert str(SrlmError(text)) == shown
    assert str(UserError(KEY, where=text, way_out=KEY)).endswith(": ***. ***")
    assert not CONTROL.search(str(UserError(text)))  # one line, so that a return is a space
    console = ConsoleReporter()
    console.say(text)
    console.warn(text)
    record = logging.LogRecord("n", logging.INFO, "f", 1, "%s", (text,), None)
    said = [*capsys.readouterr().err.splitlines(), telling.Discreet().format(record)]
    assert len(said) == 3 and all(shown in line for line in said)
    try:
        raise ValueError(text)
    except ValueError:
        main._tell_of_a_fault(*sys.exc_info())  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert "ValueError" in told and shown in told


def test_what_follows_http_in_a_log_is_shown_without_its_password(
    cli: Cli, tmp_path: Path, planted: None
) -> None:
    """httpx logs every URL that is asked."""
    with scripted(lambda number, body: completion("Yes.")) as server:
        url = server.url.replace("http://", f"http://me:{PASSWORD}@")
        out = tmp_path / "out"
        judge = ("--set", "judge.engine=openai", "--set", "openai.model=m")
        done = cli("-v", "iterate", "--recipe", "tiny", "--adapters", out, *judge,
                   "--set", f"openai.url={url}")  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "holds a user or password" in done.stderr
    assert PASSWORD not in done.stderr and not out.exists()


def test_a_key_where_its_variable_s_name_belongs_is_neither_shown_nor_noted(
    told: Told, cli: Cli, tmp_path: Path
) -> None:
    for key in (f"hf_{'a' * 30}", f"sk-{'b' * 30}", "no name"):
        sets = ("--set", f"openai.key_variable={key}")
        done = cli("iterate", "--recipe", "tiny", "--adapters", tmp_path / "out", *sets)
        told(done.stderr.strip())
        assert done.returncode == 2 and key not in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_the_doctor_shows_no_secret(
    planted: None, cli: Cli, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """Whoever is quoted: a recipe, its name, a library that does not start, and what breaks."""
    text = f"{KEY} http://me:{PASSWORD}@host {OBEYED}"
    broken = Finding("bad", text, text, text, {text: text})
    for module, found in (
        (machine, "machine_findings"),
        (proof, "proof_findings"),
        (packages, "package_findings"),
    ):
        monkeypatch.setattr(module, found, lambda *at: [broken])
    seen = Answer("base", "warning", text, (text,))
    monkeypatch.setattr(doctor, "answers", lambda launch: [seen, Answer("disk", "bad", text)])
    monkeypatch.setattr(doctor, "load_recipe", lambda name, overrides: name)
    done = cli("doctor", "--recipe", text, *(["--json"] if as_json else []))
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "***@host" in said and said.count("***") > 10
    assert KEY not in said and PASSWORD not in said and not CONTROL.search(said)


def test_a_dry_run_shows_none_either(planted: None) -> None:
    text = f"{KEY} http://me:{PASSWORD}@host {OBEYED}"
    found = [Answer("base", "warning", text, (text,)), Answer("disk", "bad", text)]
    launch = Launch(load_recipe("tiny").model_copy(update={"name": text}))
    for said in (preflight_text(found), preflight_json(launch, found)):
        assert said.count("***@host") >= 2 and not CONTROL.search(said)
        assert KEY not in said and PASSWORD not in said


class Broken:
    """Answers each request with an error that quotes secrets."""

    def __init__(self, *errors: Exception) -> None:
        self.stacks = {"base": [], "1": []}
        self._errors = iter(errors)

    def put(self, job: Job) -> None:
        job.future.set_exception(next(self._errors))


def test_a_server_quotes_no_secret_to_its_clients_nor_in_its_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own key, which stands in no variable, and what its errors say, in answers and in lines
    of `-v`; a thread that ends with an error tells of it alike."""
    assert serve._key(KEY) == KEY
    monkeypatch.setenv("HF_TOKEN", f"{KEY}-hub")
    text = f"{KEY}-hub {KEY} http://me:{PASSWORD}@host"
    errors = (RuntimeError(text), SrlmError(text), UserError(text), Refused(text))
    handler = main._log_to_stderr()
    log = logging.getLogger("srlm_lite.serve")
    monkeypatch.setattr(log, "level", logging.INFO)
    log.addHandler(handler)
    asked = {"messages": [{"role": "user", "content": "q"}]}
    try:
        with Server("127.0.0.1", 0, Broken(*errors), key=KEY) as server:  # type: ignore[arg-type]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            ask = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"})
            answers = [
                ask.get(f"/{KEY}?api_key={PASSWORD}"),
                ask.get("/models", headers={"Authorization": f"Bearer {KEY}-hub"}),
                ask.post("/chat/completions", json={**asked, "model": KEY}),
                ask.post("/chat/completions", json={**asked, "model": "1", KEY: 1}),
                *(ask.post("/chat/completions", json={**asked, "model": "1"}) for _ in errors),
            ]
            server.shutdown()
    finally:
        log.removeHandler(handler)
    monkeypatch.setattr(threading, "excepthook", main._tell_of_a_thread_s_fault)
    ending = threading.Thread(target=lambda: int(text))
    ending.start()
    ending.join()
    assert [one.status_code for one in answers] == [404, 401, 404, 400, 500, 500, 400, 400]
    logged = capfd.readouterr().err
    assert "GET /v1/***?api_key=***" in logged and "base 10: '*** *** http://***@host'" in logged
    for said in (*(one.text for one in answers), logged):
        assert KEY not in said and PASSWORD not in said


def refusing(secret: str) -> Iterator[tuple[int, object]]:
    """What servers say that quote what they were sent."""
    for status in (400, 401, 403, 404, 500):
        yield status, {"error": {"message": f"not with {secret}, {OBEYED}"}}


def test_a_server_that_quotes_the_key(planted: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    request = Request(messages=({"role": "user", "content": "q"},), prompt_ids=(), seeds=(1,))
    for status, body in refusing(KEY):
        with scripted(lambda number, asked, a=(status, {}, body): a) as server:  # type: ignore[misc]
            settings = OpenAI(url=server.url, model="not-listed", retries=0)
            said = []
            for ask in (
                lambda s=settings: reach(s),
                lambda s=settings: OpenAIEngine(s).sample(
                    [request], Limits(max_new_tokens=4, temperature=0, top_p=1)
                ),
            ):
                try:
                    said.append(str(ask()))
                except SrlmError as error:
                    said.append(str(error))
            assert str(status) in said[1]
            for line in said:
                assert KEY not in line and not CONTROL.search(line)
    assert not [line for line in caplog.messages if KEY in without_secrets(line)]


# --- files ------------------------------------------------------------------------------------


def test_a_run_notes_no_secret_of_its_command_line(planted: None, tmp_path: Path) -> None:
    command = f"srlm-lite iterate --set openai.url=http://me:{PASSWORD}@h/v1 --api-key {KEY}"
    run = new_run(tmp_path / "out", command=command)
    text = run.run_json.read_text()
    assert KEY not in text and PASSWORD not in text
    assert run.facts()["command"].endswith("--set openai.url=http://***@h/v1 --api-key ***")


def test_a_run_that_an_earlier_version_let_have_one_shows_it_nowhere(
    planted: None, cli: Cli, tmp_path: Path
) -> None:
    run = new_run(tmp_path / "out")
    pair = ToldPair("p", Reply("a", [3.0]), Reply("b", [0.0]))
    add_anchor(run)
    add_iteration(run, 1, [pair], measured=evaluation())
    facts = read_json(run.run_json)
    for noted in ("recipe", "identity"):
        facts[noted]["openai"] |= {"url": f"http://me:{PASSWORD}@host/v1?api_key={PASSWORD}"}
    write_json(run.run_json, {**facts, "command": f"srlm-lite iterate --api-key {KEY}"})
    page = tmp_path / "page.html"
    shown = [
        cli("report", "--adapters", run.path, "--out", page),
        cli("report", "--adapters", run.path, "--markdown"),
        cli("show", "run", "--adapters", run.path),
        cli("show", "run", "--adapters", run.path, "--json"),
        cli("show", "pairs", "--adapters", run.path),
        cli("iterate", "--recipe", "toy", "--adapters", run.path, "--set", "seed=1"),
    ]
    assert [done.returncode for done in shown] == [0, 0, 0, 0, 0, 2]
    texts = [done.stdout + done.stderr for done in shown]
    texts += [page.read_text(), json.dumps(public_recipe(run.recipe()))]
    for text in texts:
        assert KEY not in text and PASSWORD not in text
    assert "http://***@host/v1?api_key=***" in texts[-1]


# --- terminals --------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_spelled() -> None:
    assert for_terminal(OBEYED) == SPELLED
    assert for_terminal("one\ttwo\nthree\r\nfour ½ 漢 שלום") == "one\ttwo\nthree\nfour ½ 漢 שלום"
    assert for_terminal("half \ud800") == r"half \ud800"
    assert json.loads(json_for_terminal({"text": OBEYED})) == {"text": OBEYED}
    assert not CONTROL.search(json_for_terminal({"text": OBEYED}))


@pytest.mark.parametrize("as_json", [False, True])
def test_no_command_lets_a_model_s_words_at_the_terminal(
    cli: Cli, tmp_path: Path, as_json: bool
) -> None:
    run = new_run(tmp_path / "out", "description=x")
    pair = ToldPair(OBEYED, Reply(OBEYED, [3.0], OBEYED), Reply(OBEYED, [0.0], OBEYED))
    add_anchor(run)
    add_iteration(run, 1, [pair])
    data = tmp_path / "data"
    data.mkdir()
    row = {"prompt_id": OBEYED, "prompt": OBEYED, "response": OBEYED}
    (data / "ift.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    raw = {"prompt": "q", "response": "a", OBEYED: "c"}
    (data / "raw.jsonl").write_text(json.dumps(raw) + "\n")
    there, flag = ("--adapters", run.path), (["--json"] if as_json else [])
    for words in (
        ("show", "pairs", *there),
        ("show", "judgements", *there),
        ("show", "candidates", *there),
        ("show", "run", *there),
        ("data", "show", data),
        ("data", "prepare", "--source", data / "raw.jsonl", "--out", tmp_path / "prepared"),
    ):
        done = cli(*words, *flag)
        assert done.stdout, (words, done)
        assert not CONTROL.search(done.stdout + done.stderr), words
    if not as_json:
        assert SPELLED in cli("show", "pairs", *there).stdout


def test_a_chat_lets_them_there_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    for character in OBEYED:  # as they come, piece by piece
        chat._show(character)
    chat._say(OBEYED)
    said = capsys.readouterr()
    assert said.out == SPELLED and said.err == f"{SPELLED}\n"


def test_a_recipe_from_elsewhere_neither(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"extends: tiny\nname: {json.dumps(OBEYED)}\n{json.dumps(OBEYED)}: 1\n")
    for words in (("recipes", "check", path), ("plan", "--recipe", path)):
        done = cli(*words)
        assert done.returncode == 2 and not CONTROL.search(done.stdout + done.stderr)


def test_overrides_of_a_run_s_url_decide_nothing_secret() -> None:
    """It can be read, so that a run of before can: it is refused where a run begins."""
    raw = {"name": "t", "base": {"name": "some/base"}, "data": {"dir": "nowhere"}}
    recipe = overridden(raw, [f"openai.url=http://me:{PASSWORD}@h/v1"], where="r")
    assert PASSWORD in str(recipe.openai.url)


# --- all of it --------------------------------------------------------------------------------


def answers_of_a_server(run: Path) -> tuple[list[str], Done]:
    """What `serve` says to its clients, with and without the key, and how it ended."""
    port = free_port()
    options = ("--adapters", run, "--port", str(port), "--iteration", "1")
    key = os.environ["SRLM_API_KEY"]
    served = Program("-m", "srlm_lite", "-v", "serve", *options)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=120) as ask:
            while True:
                try:
                    answers = [ask.get(f"/models?api_key={PASSWORD}")]
                    break
                except httpx.TransportError:
                    assert served.poll() is None, served.communicate()
                    time.sleep(0.2)
            ask.headers["Authorization"] = f"Bearer {key}"
            asked = {"model": "1", "messages": [{"role": "user", "content": "q"}], "max_tokens": 2}
            answers += [
                ask.get(f"/{key}?token={PASSWORD}"),
                ask.post("/chat/completions", json=asked),
                ask.post("/chat/completions", json={**asked, "model": key}),
                ask.post("/chat/completions", json={**asked, f"{key}": PASSWORD}),
                ask.post("/chat/completions", content=f"http://me:{PASSWORD}@host"),
            ]
        assert [one.status_code for one in answers] == [401, 404, 200, 404, 400, 415]
        served.send_signal(signal.SIGINT)
        out, err = served.communicate()
        assert "GET /v1/***?token=*** " in err and "POST /v1/chat/completions" in err
        return [one.text for one in answers], Done(served.returncode or 0, out, err)
    finally:
        served.kill()


@pytest.mark.slow
@pytest.mark.model
def test_a_secret_planted_everywhere_is_in_no_file_and_in_nothing_that_is_said(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose judge fails on its way, quoting the key; and all that is made of it."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SRLM_API_KEY", "OPENAI_API_KEY", "OF_MY_JUDGE"):
        monkeypatch.setenv(name, f"{KEY}-{name.lower()}")
    out, said, asked = tmp_path / "out", [], 0
    small = (
        *("base.quantization=none", "iterations=1", "anchor.ift_limit=8", "anchor.eft_prompts=4"),
        *("prompts.per_iteration=4", "rollout.chunk_prompts=2", "judge.engine=openai"),
        *("judge.votes=1", "judge.min_votes=1", "pairing.min_pairs=1", "evaluate.eft_prompts=2"),
        *("evaluate.votes=1", "evaluate.policy_prompts=1", "openai.model=judge"),
        *("openai.retries=0", "openai.parallel=1", "openai.key_variable=OF_MY_JUDGE"),
    )

    def judge(number: int, body: dict[str, object]) -> tuple[int, dict[str, str], object]:
        nonlocal asked
        asked += 1
        key = server.headers[-1]["Authorization"].removeprefix("Bearer ")
        assert key == f"{KEY}-of_my_judge"
        if asked == 6:
            return 500, {}, {"error": f"no more with {key} of http://me:{PASSWORD}@here/v1"}
        return completion(f"It is said.\nScore: {number % 6}")

    with scripted(judge) as server:
        sets = [word for one in (*small, f"openai.url={server.url}") for word in ("--set", one)]
        words = ("-v", "iterate", "--recipe", "tiny", "--adapters", out, *sets)
        ended = [cli(*words), cli(*words)]
        there = ("--adapters", out)
        ended += [
            cli("iterate", *there, "--dry-run"),
            cli("plan", "--recipe", "tiny", *sets),
            cli("report", *there),
            cli("report", *there, "--markdown"),
            cli("show", "run", *there, "--json"),
            cli("show", "judgements", *there, "--limit", "0"),
            cli("evaluate", *there, "--iteration", "1", "--json"),
            cli("compare", *there, "1", "anchor", "--limit", "1"),
            cli("export", *there, "--iteration", "1", "--out", tmp_path / "merged"),
            cli("export", *there, "--out", tmp_path / "m", "--push-to-hub", "me/m", "--dry-run"),
            cli("-v", "doctor", "--recipe", "tiny", *sets),
            cli("doctor", "--json", "--recipe", "tiny", *sets),
        ]
    served, ended_at_last = answers_of_a_server(out)
    ended.append(ended_at_last)
    codes = [one.returncode for one in ended]
    assert codes == [1, *[0] * (len(ended) - 1)], [one.stderr[-300:] for one in ended]
    assert "500: no more with ***" in ended[0].stderr
    said = [*served, *(text for one in ended for text in (one.stdout, one.stderr))]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert (tmp_path / "merged" / "README.md") in files and out / "report.html" in files
    for secret in (KEY, PASSWORD):
        assert not [text for text in said if secret in text]
        assert not [str(file) for file in files if secret.encode() in file.read_bytes()]
