"""What is asked before a run writes anything, through the real commands."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from chat_server import free_port
from commands import Cli, Done
from safetensors.torch import load_file, save_file
from toy_run import make_toy_run

from srlm_lite import tracking
from srlm_lite.hardware import device_name
from srlm_lite.model.base import load_base, spoken
from srlm_lite.planning import machine as planning
from srlm_lite.planning.machine import plan_for
from srlm_lite.planning.plan import Hardware, Plan
from srlm_lite.planning.rates import rates_key, remember
from srlm_lite.planning.times import in_words
from srlm_lite.preflight.checks import CHECKS, NEEDS, OF_WORK
from srlm_lite.processes import LAUNCHER
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.run.files import write_json
from srlm_lite.run.run import RunDir
from srlm_lite.settings import Base


def asked(cli: Cli, out: Path, *settings: str, more: Sequence[str] = ()) -> dict[str, str]:
    """Check to `state: text`, of `iterate --dry-run --json`; it must have written nothing."""
    sets = [word for setting in settings for word in ("--set", setting)]
    before = sorted(out.rglob("*")) if out.exists() else None
    done = cli(
        "iterate", "--recipe", "tiny", "--adapters", out, "--dry-run", "--json", *sets, *more
    )
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    bad = any(one["state"] == "bad" for one in found["checks"])
    assert found["can_start"] is not bad and done.returncode == (2 if bad else 0)
    return {one["check"]: f"{one['state']}: {one['text']}" for one in found["checks"]}


def refused(cli: Cli, out: Path, *settings: str) -> str:
    """The one line in which `iterate` itself refuses; it must have written nothing."""
    sets = [word for setting in settings for word in ("--set", setting)]
    done: Done = cli("iterate", "--recipe", "tiny", "--adapters", out, *sets)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert not out.exists()
    return lines[0].removeprefix("srlm-lite: ")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return shutil.copytree(load_recipe("tiny").data.dir, tmp_path / "data")


NOTHING_TO_ASK = ("anchor", "tracking", "server", "capabilities", "time")


def test_a_run_that_can_start_says_so_and_what_to_type(
    cli: Cli, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srlm_lite.planning.times.rates_folder", lambda: tmp_path)
    done = cli("iterate", "--recipe", "tiny", "--adapters", out, "--dry-run")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "-" if name in NOTHING_TO_ASK else "ok" for name in CHECKS
    ]
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("next: srlm-lite iterate --recipe tiny --adapters ")
    assert "--dry-run" not in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("check", "settings", "told"),
    [
        ("engines", ["rollout.engine=vllm"], "vLLM is not installed"),
        ("judge", ["judge.rubric=nowhere"], "neither a file nor one of the shipped rubrics"),
        ("judge", ["pairing.min_gap=5"], "no two scores of the rubric"),
        ("files", ["base.chat_template=nowhere"], "neither a file nor one of the shipped chat_"),
        ("files", ["anchor.init=nowhere"], "anchor.init = nowhere: no such directory"),
        ("files", ["evaluate.gold=nowhere:gold"], "cannot be imported"),
        ("data", ["data.dir=nowhere"], "no such data directory"),
        (
            "method",
            ["method=dno", "dno.grading=side-by-side", "dno.template=nowhere"],
            "one of the shipped templates",
        ),
        ("method", ["rollout.temperature=0"], "a pair is two that differ"),
        (
            "method",
            ["pairing.min_pairs=73"],
            "12 prompts with 4 samples each make 72 pairs at most",
        ),
        ("window", ["rollout.max_new_tokens=256"], "leaves no room for a prompt"),
        ("prompts", ["prompts.per_iteration=9000"], "has 960 prompts, and 18000 are wanted"),
        ("prompts", ["prompts.file=nowhere.jsonl"], "no such file"),
        ("base", ["base.name=/no/base"], "there is nothing at /no/base"),
        ("base", ["base.name=some-org/base"], "the Hub cannot be reached"),
        ("device", ["base.device=cuda"], "CUDA"),
        ("layers", ["dpo.lora.targets=[q_proj, c_attn]"], "c_attn"),
    ],
)
def test_what_fails_is_told_by_the_dry_run_and_by_the_run(
    cli: Cli, out: Path, check: str, settings: list[str], told: str
) -> None:
    if told == "vLLM is not installed" and "vllm" in sys.modules:
        pytest.skip("vLLM is here")
    answer = asked(cli, out, *settings)[check]
    assert answer.startswith("bad: ") and told in answer
    assert f"bad: {refused(cli, out, *settings)}" == answer


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda base: [one.unlink() for one in base.glob("token*")], "has no tokenizer that"),
        (lambda base: (base / "config.json").write_text("[1]"), "cannot be loaded"),
        (
            lambda base: (base / "config.json").write_text('{"model_type": "qwen9"}'),
            "knows no architecture qwen9",
        ),
    ],
)
def test_a_base_that_no_library_reads_is_told_of_before_it_is_loaded(
    cli: Cli, out: Path, tmp_path: Path, harm: Callable[[Path], object], told: str
) -> None:
    base = Path(shutil.copytree(load_recipe("tiny").base.name, tmp_path / "base"))
    harm(base)
    assert told in asked(cli, out, f"base.name={base}")["base files"]


def test_methods_whose_pairs_are_no_two_samples_may_be_greedy(cli: Cli, out: Path) -> None:
    ranked = f"data.ranked={load_recipe('toy-spin').data.ranked}"
    answers = asked(cli, out, "method=spin", ranked, "rollout.temperature=0")
    assert answers["method"] == "ok: spin"


@pytest.mark.slow  # the harness reads thousands of files to know its tasks
def test_a_task_that_the_harness_does_not_know(cli: Cli, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "own").mkdir()
    settings = ["evaluate.tasks=[gsm9k]", f"evaluate.tasks_dir={tmp_path / 'own'}"]
    assert "no such task: gsm9k" in asked(cli, out, *settings)["capabilities"]
    assert "no such task: gsm9k" in refused(cli, out, *settings)
    assert asked(cli, out)["capabilities"] == "not asked: no tasks are named"


def test_prompts_that_leave_no_room_are_counted_in_tokens_of_the_base(
    cli: Cli, out: Path, data: Path
) -> None:
    rows = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    long = [{**row, "text": 300 * "long "} for row in rows[:-20]]  # 2 x 12 are wanted
    lines = [json.dumps(row) + "\n" for row in [*long, *rows[-20:]]]
    (data / "prompts.jsonl").write_text("".join(lines))
    answers = asked(cli, out, f"data.dir={data}")
    assert "has 20 prompts that fit the window of 256 tokens" in answers["prompts that fit"]
    assert answers["prompts"].startswith("ok: ")
    assert "prompts.reuse=true" in refused(cli, out, f"data.dir={data}")


def test_judge_data_without_targets_or_scores_is_told_of_before_a_base_is_loaded(
    cli: Cli, out: Path, data: Path
) -> None:
    path = data / "eft_train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "target": None}) + "\n" for row in rows))
    assert "have no target" in asked(cli, out, f"data.dir={data}")["judge data"]
    told = asked(cli, out, f"data.dir={data}", "anchor.eft_targets=human")["judge data"]
    assert told == "not asked: its targets are made"
    path.write_text("".join(json.dumps({**row, "target": "good"}) + "\n" for row in rows))
    assert "score the rubric allows" in refused(cli, out, f"data.dir={data}")


@pytest.mark.parametrize("rows", ["[{}]", "3", "[" * 100_000 + "]" * 100_000])
def test_data_whose_rows_are_none_end_no_other_check(
    cli: Cli, out: Path, data: Path, rows: str
) -> None:
    (data / "ift.jsonl").write_text(rows + "\n")
    answers = asked(cli, out, f"data.dir={data}")
    assert answers["data"].startswith("bad: ") and answers["memory"].startswith("ok: ")


def test_a_held_out_prompt_among_the_training_s(cli: Cli, out: Path, data: Path) -> None:
    first = json.loads((data / "eval_prompts.jsonl").read_text().splitlines()[0])
    with (data / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt_id": "leak", "text": first["text"]}) + "\n")
    assert "1 of its prompts are also in" in asked(cli, out, f"data.dir={data}")["held-out"]


def test_how_long_it_takes_is_told_where_rates_are_known(
    cli: Cli, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srlm_lite.planning.times.rates_folder", lambda: tmp_path)
    assert asked(cli, out)["time"] == "not asked: unknown: no rate of this device is known"
    recipe = load_recipe("tiny")
    plan = plan_for(recipe)
    key = rates_key(recipe, device=device_name("cpu"), itemsize=plan.itemsize)
    rates = {"candidates": 1000.0, "judge": 1000.0, "DPO": 1000.0}
    remember(tmp_path, key, rates)
    tokens = sum(one.tokens or 0 for one in plan.phases if one.name in rates)
    told = asked(cli, out)["time"]
    assert told.startswith(f"ok: {in_words(tokens / 1000)} at most, anchor SFT, evaluation apart, ")
    assert told.endswith("at rates measured on this device (srlm-lite plan says by what)")


def test_thoughts_that_a_base_would_learn_as_text(cli: Cli, out: Path, data: Path) -> None:
    path = data / "ift.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, opening, closing in zip(
        rows, ("<think>", "[THINK]"), ("</think>", "[/THINK]"), strict=False
    ):
        row["response"] = f"{opening}hm{closing} {row['response']}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = asked(cli, out, f"data.dir={data}")["thoughts"]
    assert told == "warning: 2 are taught as text"
    assert asked(cli, out, f"data.dir={data}", "anchor.use_ift=false")["thoughts"].startswith(
        "ok: "
    )
    assert asked(cli, out)["thoughts"] == "ok: none are taught"


def test_an_anchor_of_another_base_is_told_of_before_anything_is_loaded(
    cli: Cli, out: Path, tmp_path: Path
) -> None:
    kept = Path(__file__).parent / "data" / "run-513090d" / "anchor"
    lora = "{rank: 1, targets: [q_proj, v_proj]}"
    given = [f"anchor.init={kept}", f"dpo.lora={lora}", f"anchor.lora={lora}"]
    assert asked(cli, out, *given)["anchor"].startswith("ok: rank 1, for ")
    other = ["dpo.lora={rank: 1, targets: [q_proj]}", "anchor.lora={rank: 1, targets: [q_proj]}"]
    assert "v_proj, which the base does not have or" in refused(cli, out, given[0], *other)
    wide = shutil.copytree(kept, tmp_path / "wide")
    tensors = load_file(wide / "adapter_model.safetensors")
    widened = {name: one.repeat(1, 2) if "lora_A" in name else one for name, one in tensors.items()}
    save_file(widened, wide / "adapter_model.safetensors")
    assert "is for a layer of " in refused(cli, out, f"anchor.init={wide}", *given[1:])
    (wide / "adapter_model.safetensors").write_bytes(b"harmed")
    assert "damaged" in refused(cli, out, f"anchor.init={wide}", *given[1:])


def test_replies_that_no_judge_could_be_asked_about(cli: Cli, out: Path) -> None:
    told = asked(cli, out, "rollout.max_new_tokens=200")["judging"]
    assert told.startswith("warning: ") and "may be sampled" in told
    assert asked(cli, out)["judging"].startswith("ok: ")


def test_without_weights_a_text_ends_where_it_ends_with_them(tiny_base_dir: Path) -> None:
    tokenizer, ends = spoken(tiny_base_dir)
    loaded = load_base(Base(name=str(tiny_base_dir), device="cpu"))
    assert ends == loaded.eos_ids
    assert tokenizer.pad_token_id == loaded.tokenizer.pad_token_id


def test_a_chat_template_that_fails(cli: Cli, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text("{% for m in messages %}{{ m.content")
    answer = asked(cli, out, f"base.chat_template={path}")
    assert answer["chat template"].startswith("bad: ")
    assert answer["prompts that fit"] == "not asked: see chat template, conversations"


def test_what_cannot_fit_the_memory(cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "machine_memory", lambda: 600_000_000)
    assert "GB at its longest" in asked(cli, out, "base.device=cpu")["memory"]
    assert "--no-plan runs it all the same" in refused(cli, out, "base.device=cpu")
    answers = asked(cli, out, "base.device=cpu", more=["--no-plan"])
    assert answers["memory"] == "not asked: not asked (--no-plan)"


@pytest.mark.parametrize(("short", "state"), [(10**9, "bad"), (1, "warning"), (0, "ok")])
def test_what_the_disk_has_no_room_for(
    cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch, short: int, state: str
) -> None:
    wanted = plan_for(load_recipe("tiny")).disk["run"]
    usage = SimpleNamespace(free=max(0, wanted - short))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert asked(cli, out)["disk"].startswith(f"{state}: ")


def test_a_tracker_that_is_not_installed(
    cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_is_installed", lambda name: False)
    told = asked(cli, out, "tracking.report_to=[wandb]")["tracking"]
    assert told.startswith("bad: tracking.report_to = wandb: is not installed")


def test_the_directory_of_another_run(cli: Cli, out: Path) -> None:
    RunDir(out).open(load_recipe("tiny", ["seed=7"]), {})
    assert asked(cli, out)["directory"] == "ok: a new run"  # nothing is computed yet
    write_json(RunDir(out).anchor.training, {})
    assert "differing: seed (7 there, 0 " in asked(cli, out)["directory"]
    assert asked(cli, out, more=["--fresh"])["directory"] == "ok: a new run"


def test_a_finished_run_is_not_asked_for_what_it_needs_no_more(cli: Cli, out: Path) -> None:
    make_toy_run(out, models=2).anchor.training.write_text("{}")
    done = cli("iterate", "--adapters", out, "--dry-run", "--json")
    found = {one["check"]: one["state"] for one in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0
    assert {found[name] for name in OF_WORK} == {"not asked"}
    assert found["directory"] == "ok"


def test_processes_that_the_method_cannot_employ(
    cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHER:
        monkeypatch.setenv(name, "8" if name == "WORLD_SIZE" else "0")
    assert asked(cli, out)["processes"].startswith("warning: 8")
    told = asked(cli, out, "method=rlhf", "rollout.temperature=1", "dpo.batch_size=4")
    assert told["processes"].startswith("bad: method: rlhf trains in one process")


def test_a_base_that_a_launcher_spreads_is_planned_as_such_or_refused(
    out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two processes (FSDP2): each holds half of its layers."""
    shards: list[int] = []

    def planned(recipe: Recipe, hardware: Hardware) -> Plan:
        shards.append(hardware.shards)
        return plan_for(recipe, hardware)

    def asked_by_both(*settings: str) -> dict[str, str]:
        told = dict.fromkeys(LAUNCHER, "0") | {"WORLD_SIZE": "2"}
        for name, value in {**told, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
            monkeypatch.setenv(name, value)
        return asked(cli, out, *settings)

    monkeypatch.setattr(planning, "plan_for", planned)
    told = asked_by_both()
    assert told["processes"] == "ok: 2" and told["memory"].startswith("ok: ")
    assert shards == [2]
    told = asked_by_both("rollout.engine=vllm")
    assert told["processes"].startswith("bad: rollout.engine: ")
    assert "FSDP spreads it" in told["processes"]
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert asked(cli, out)["processes"] == "ok: 2" and shards[-1] == 1


# --- the server -------------------------------------------------------------------------------


@contextmanager
def listing(
    models: list[str] | None,
    *,
    knows: str = "",
    status: int = 200,
    says: tuple[int, object] = (200, {"choices": [{"message": {"content": "Yes."}}]}),
) -> Iterator[str]:
    """The URL of a server that lists these models; None: it has no such list.

    Args:
        knows: The model that it answers for, and what it says then.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            rows = None if models is None else {"data": [{"id": name} for name in models]}
            self._answer(status if rows else 404, rows or {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(*(says if body["model"] == knows else (404, {})))

        def _answer(self, code: int, body: object) -> None:
            sent = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def judged_by(url: str) -> list[str]:
    return ["judge.engine=openai", "openai.model=judge", f"openai.url={url}"]


def test_a_server_that_is_not_there(cli: Cli, out: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    told = asked(cli, out, *judged_by(url))["server"]
    assert told.startswith(f"bad: openai.url = {url}: cannot be reached (")
    assert "Start the server" in refused(cli, out, *judged_by(url))


@pytest.mark.parametrize(
    ("models", "knows", "told"),
    [
        (["judge", "other"], "", "ok: {url} has judge"),
        (["other"], "judge", "ok: {url} answers"),
        (["other"], "", "bad: openai.url = {url}: knows no model judge (404); it lists other."),
        (None, "judge", "ok: {url} answers"),
        (None, "", "bad: openai.url = {url}: knows no model judge (404). Correct openai.model"),
    ],
)
def test_a_server_and_its_model(
    cli: Cli, out: Path, models: list[str] | None, knows: str, told: str
) -> None:
    with listing(models, knows=knows) as url:
        assert asked(cli, out, *judged_by(url))["server"].startswith(told.format(url=url))


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ((503, {"error": "loading"}), "ok: {url} is there, and busy (503)"),
        ((429, {}), "ok: {url} is there, and busy (429)"),
        ((400, {"error": "no chat here"}), "refuses a question to judge with 400: no chat here"),
        ((200, {"hello": "world"}), "bad: openai.url = {url}: does not answer with a chat compl"),
        ((200, "<html>"), "does not answer with a chat completion. Correct openai.url, up to"),
    ],
)
def test_what_the_run_would_be_refused_for_after_its_anchor(
    cli: Cli, out: Path, says: tuple[int, object], told: str
) -> None:
    with listing(None, knows="judge", says=says) as url:
        assert told.format(url=url) in asked(cli, out, *judged_by(url))["server"]


def test_a_server_that_hangs_up_after_an_error_is_asked_on_another_connection(
    cli: Cli, out: Path
) -> None:
    """As `transformers serve` does, whose list of models fails for one that it has by its path."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        asked_on: list[int] = []

        def serve() -> None:
            for number in range(2):
                with listener.accept()[0] as one:
                    asked_on.append(number)
                    said = one.recv(65536)
                    while said.startswith(b"POST") and not said.rstrip().endswith(b"}"):
                        said += one.recv(65536)
                    status = b"500 Error" if said.startswith(b"GET") else b"200 OK"
                    body = b'{"choices": [{"message": {"content": "Yes."}}]}'
                    length = str(len(body)).encode()
                    one.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: " + length)
                    one.sendall(b"\r\n\r\n" + body)

        Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        assert asked(cli, out, *judged_by(url))["server"] == f"ok: {url} answers"
        assert asked_on == [0, 1]


def test_a_server_that_refuses_the_key(cli: Cli, out: Path) -> None:
    with listing(["x"], status=401) as url:
        told = asked(cli, out, *judged_by(url))["server"]
    assert "refuses the key" in told or "knows no model" in told


# --- at once ----------------------------------------------------------------------------------

LATE = {"torch", "transformers", "peft", "trl", "datasets", "accelerate"}
"""What takes seconds to import."""

ONE_PROCESS = """
import contextlib, io, json, sys
from srlm_lite.cli.main import run
for words in json.loads(sys.stdin.read()):
    sys.argv, said = words, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            run()
        except SystemExit as end:
            assert end.code == 2, (words, end.code, said.getvalue())
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps([said.getvalue(), loaded]))
"""


def test_what_can_be_told_without_torch_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    """All of it in one process, which has not loaded it when the last command has refused."""
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for name, settings in (("another", ["seed=7"]), ("busy", [])):
        run = RunDir(tmp_path / name)
        run.open(load_recipe("tiny", settings), {})
        for file in (run.anchor.training, *run.anchor.adapter_files):
            write_json(file, {})
        run.anchor.finish()
    absent = f"http://127.0.0.1:{free_port()}/v1"
    judge = ["judge.engine=openai", "openai.model=m"]
    mixture = shutil.copytree(load_recipe("tiny").base.name, tmp_path / "mixture")
    config = json.loads((mixture / "config.json").read_text())
    (mixture / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    kept = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    shutil.copytree(load_recipe("tiny").base.name, kept)
    (tmp_path / "pickled").mkdir()
    for file in ("config.json", "pytorch_model.bin"):
        (tmp_path / "pickled" / file).write_text("{}")
    in_few_bits = shutil.copytree(mixture, tmp_path / "awq")
    awq = {**config, "quantization_config": {"quant_method": "awq"}}
    (in_few_bits / "config.json").write_text(json.dumps(awq))
    asked_for = [
        ("file", [], "is a file, not a directory"),
        ("other", [], "holds files, but no run"),
        ("busy", [], "another srlm-lite is working here"),
        ("another", [], "another configuration; differing: seed"),
        ("new", ["dpo.bet=1"], "unknown key `dpo.bet`"),
        ("new", ["data.dir=nowhere"], "no such data directory"),
        ("new", ["judge.rubric=nowhere"], "shipped rubrics"),
        ("new", ["rollout.engine=vllm"], "vLLM is not installed"),
        ("new", ["anchor.init=nowhere"], "no such directory"),
        ("new", ["base.name=/no/base"], "there is nothing at /no/base"),
        ("new", ["base.name=some-org/base"], "the Hub cannot be reached"),
        ("new", ["base.name=https://huggingface.co/some-org/base"], "Hub id it is some-org/base"),
        (
            "new",
            [f"base.name={kept.parent}"],
            "has no config.json. A model directory holds config",
        ),
        ("new", [f"base.name={kept.parent.parent}"], f"One is {kept}"),
        ("new", [f"base.name={tmp_path / 'pickled'}"], "only pickled ones"),
        ("new", [f"base.name={in_few_bits}"], "is quantized already (awq)"),
        ("new", [*judge, f"openai.url={absent}"], "cannot be reached"),
        ("new", [*judge, "openai.url=http://me:word@host/v1"], "holds a user or password"),
        ("new", ["dpo.lora.targets=[q_porj]"], "no linear layer named q_porj. It has down_proj"),
        ("new", [f"base.name={mixture}", "dpo.lora.targets=[q_porj]"], "named q_porj. Its layers"),
    ]
    commands = [
        (["srlm-lite", "iterate", "--recipe", "tiny", "--adapters", str(tmp_path / name)]
         + [word for setting in settings for word in ("--set", setting)], told)
        for name, settings, told in asked_for
    ]  # fmt: skip
    there = ["--adapters", str(tmp_path / "another")]
    for words, told in (
        (["plan", "--recipe", "tiny", "--set", "dpo.bet=1"], "unknown key"),
        (["plan", "--recipe", "tiny", "--set", "base.name=some-org/base"], "cannot be reached"),
        (["plan", "--recipe", "tiny", "--set", "base.name=./nothing"], "nothing at ./nothing"),
        (["plan", "--recipe", "tiny", "--set", "dpo.lora.targets=[q_porj]"], "named q_porj. It"),
        (["export", *there, "--iteration", "7", "--out", "x"], "has no iteration 7"),
        (["evaluate", *there, "--iteration", "7"], "has no iteration 7"),
        (["compare", *there, "7", "anchor"], "has no iteration 7"),
        (["chat", *there, "--iteration", "7"], "has no iteration 7"),
        (["serve", *there, "--iteration", "7"], "has no iteration 7"),
        (["report", "--adapters", str(tmp_path / "other")], "holds no run"),
    ):
        commands.append((["srlm-lite", *words], told))
    with RunDir(tmp_path / "busy").locked():
        done = subprocess.run(
            [sys.executable, "-c", ONE_PROCESS],
            input=json.dumps([words for words, _ in commands]),
            capture_output=True,
            text=True,
        )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    for (words, told), (said, loaded) in zip(commands, found, strict=True):
        assert told in said and said.count("\n") == 1, (words, said)
        assert not set(loaded) & LATE, (words, set(loaded) & LATE)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_a_device_that_is_not_there_is_told_by_torch_alone(tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    words = ["srlm-lite", "iterate", "--recipe", "tiny", "--adapters", new]
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS],
        input=json.dumps([[*words, "--set", "base.device=cuda"]]),
        capture_output=True,
        text=True,
    )
    said, loaded = json.loads(done.stdout)
    assert said.startswith("srlm-lite: base.device: ") and said.count("\n") == 1
    assert set(loaded) & LATE == {"torch"} and not Path(new).exists()


# --- the doctor, and the table of checks ------------------------------------------------------


def test_the_doctor_asks_the_same_of_a_recipe(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from srlm_lite.doctor import machine, packages, proof

    monkeypatch.setattr(proof, "proof_findings", lambda: [])
    monkeypatch.setattr(packages, "package_findings", lambda: [])
    monkeypatch.setattr(machine, "machine_findings", lambda folder: [])
    done = cli("doctor", "--json", "--recipe", "tiny", "--set", "data.dir=nowhere")
    found = json.loads(done.stdout)["recipe tiny"]
    assert done.returncode == 2
    states = {one["name"]: one["state"] for one in found}
    assert list(states) == list(CHECKS)
    assert states["data"] == "bad" and states["base"] == "ok" and states["directory"] == "absent"
    assert cli("doctor", "--recipe", "tiny").returncode == 0
    assert cli("doctor", "--set", "seed=1").returncode == 2


def test_json_goes_with_a_dry_run(cli: Cli, out: Path) -> None:
    done = cli("iterate", "--recipe", "tiny", "--adapters", out, "--json")
    assert done.returncode == 2 and "--json: goes with --dry-run" in done.stderr


def test_a_check_waits_for_checks_that_are_asked_before_it() -> None:
    order = list(CHECKS)
    for name, needs in NEEDS.items():
        assert all(order.index(need) < order.index(name) for need in needs), name
