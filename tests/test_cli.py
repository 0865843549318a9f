"""The command line: what it prints, where, and how a mistake ends."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Cli, Done
from messages import Told
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from typer.main import get_command

from srlm_lite import __version__
from srlm_lite.cli import iterate, main, wrapping
from srlm_lite.cli.progress import ConsoleReporter, TimeLeft, _Bar, _duration, _Eta, summary
from srlm_lite.cli.tables import closing_table, plain_table
from srlm_lite.cli.wrapping import fitted
from srlm_lite.errors import UserError
from srlm_lite.preflight.inputs import check_inputs
from srlm_lite.recipe import load_recipe, recipe_from, shipped_recipes
from srlm_lite.records import Candidate, Judgement, Label, PreferencePair, Prompt, Revision
from srlm_lite.run.files import write_json, write_records
from srlm_lite.run.layout import IterationDir, StageDir
from srlm_lite.run.run import RunDir
from srlm_lite.shipped import recipes_dir

GOLD = "srlm_lite.tasks.toy:gold"


def shell(*args: str | Path, before: str = "", **env: str) -> Done:
    """The command in a process of its own."""
    command = shlex.join([sys.executable, "-m", "srlm_lite", *map(str, args)])
    done = subprocess.run(
        ["bash", "-c", f"{before}\n{command}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )
    return Done(done.returncode, done.stdout, done.stderr)


def mistake(done: Done) -> str:
    """What a user's mistake prints: one line on stderr, nothing on stdout, exit code 2."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    # `iterate` says what it starts before it comes upon its data.
    told = [line for line in done.stderr.splitlines() if not line.startswith("starting ")]
    assert len(told) == 1, done.stderr
    assert told[0].startswith("srlm-lite: ")
    return told[0].removeprefix("srlm-lite: ")


# --- a run made by hand -----------------------------------------------------------------------


def evaluation(gold: float | None, accuracy: float | None = 0.75) -> dict[str, Any]:
    policy: dict[str, Any] = {"mean_length_chars": 123.4, "greedy": {}}
    if gold is not None:
        policy = {**policy, "gold_mean": gold, "gold_se": 0.08, "greedy": {"gold_mean": gold + 1}}
    judge = {
        "pairwise_accuracy": accuracy,
        "tie_rate": 0.125,
        "parse_rate": 0.98,
        "score_histogram": {"3": 4, "unreadable": 1},
        "calibration": None,  # of data without a human quality
    }
    return {"judge": judge, "policy": policy}


def finish(place: StageDir, gold: float | None, **counts: Any) -> None:
    write_json(place.evaluation, evaluation(gold))
    place.finish(iteration=0, seconds=90.0, counts=counts)


def make_run(path: Path, *, gold: str | None = GOLD) -> RunDir:
    """An anchor, one iteration that is done, and one that has sampled its candidates."""
    run = RunDir(path)
    recipe = {
        "name": "by-hand",
        "base": {"name": "some/base"},
        "data": {"dir": "nowhere"},
        "evaluate": {"gold": gold},
    }
    run.open(recipe_from(recipe, where="test"), {"versions": {}})
    run.add_metrics({"iteration": 0, "stage": "anchor", "seconds": 1.0})
    write_json(run.anchor.training, {})
    finish(run.anchor, 2.5 if gold else None)
    one = run.iteration(1)
    write_records(one.prompts, [Prompt("p1", "What is [bold]this[/bold]?")])
    candidates = [
        Candidate("p1", "p1#0", "A good answer\nof two lines.", 7, "stop"),
        Candidate("p1", "p1#1", "A bad one ½", 3, "stop"),
        Candidate("p1", "p1#2", "Cut", 1, "length"),
    ]
    write_records(one.candidates, candidates)
    judgements = [
        Judgement("p1#0", 0, "Clear.\nScore: 4", 4.0),
        Judgement("p1#0", 1, "Clear?\nScore: 4.5", 4.5),
        Judgement("p1#1", 0, "Thin.\nScore: 1", 1.0),
        Judgement("p1#1", 1, "Hm.", None, "length", True),
    ]
    write_records(one.judgements, judgements)
    pair = PreferencePair(
        "p1",
        "What is [bold]this[/bold]?",
        "p1#0",
        "p1#1",
        candidates[0].text,
        candidates[1].text,
        4.25,
        1.0,
    )
    write_records(one.pairs, [pair] * 5)
    finish(one, 3.0 if gold else None, pairs={"pairs": 5})
    write_records(run.iteration(2).candidates, candidates[:1])
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run") / "out")


# --- mistakes ---------------------------------------------------------------------------------


def test_a_mistake_is_one_line_in_a_real_shell(told: Told, tmp_path: Path) -> None:
    told(mistake(shell("show", "run", "--adapters", tmp_path)))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "/etc/run"),
        SafetensorError("Error while serializing: I/O error: too long (os error 28)"),
    ],
)
def test_what_the_disk_refuses_is_the_users_to_put_right(told: Told, error: Exception) -> None:
    refused = main.refused_by_the_disk(error)
    assert refused is not None
    told(refused)


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "Bad descriptor"), ValueError("wrong")])
def test_a_fault_of_the_program_is_not(error: Exception) -> None:
    assert main.refused_by_the_disk(error) is None


@pytest.mark.parametrize("options", [(), ("--fresh",)], ids=["plain", "fresh"])
def test_an_interruption_says_how_to_go_on(
    told: Told,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    """It leaves out `--fresh`, with which the same command would delete what is done."""

    def interrupted(wish: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(iterate, "run_iterate", interrupted)
    done = cli("iterate", "--adapters", tmp_path / "out", *options)
    assert (done.returncode, done.stdout) == (130, "")
    told(done.stderr)


def test_sigterm_ends_a_command_as_ctrl_c_does(
    told: Told, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm ends a job; the exit code is a shell's, 128 + 15."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(iterate, "run_iterate", lambda wish: os.kill(os.getpid(), signal.SIGTERM))
    done = cli("iterate", "--adapters", tmp_path / "out")
    assert (done.returncode, done.stdout) == (143, "")
    told(done.stderr)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_working_directory_that_is_gone_is_one_line(told: Told, tmp_path: Path) -> None:
    there = shlex.quote(str(tmp_path / "gone"))
    done = shell("recipes", "check", "tiny", before=f"mkdir {there}; cd {there}; rmdir {there}")
    told(mistake(done))


def test_a_disk_that_refuses_is_one_line_in_a_real_shell(told: Told, tmp_path: Path) -> None:
    name = "x" * 300  # longer than any file system's names
    told(mistake(shell("iterate", "--recipe", "tiny", "--adapters", tmp_path / name)))


def test_an_unknown_recipe_suggests_the_right_one(told: Told, cli: Cli, tmp_path: Path) -> None:
    told(mistake(cli("iterate", "--recipe", "tooy", "--adapters", tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("override", ["dpo.bta=1", "beta=1", "dpo.beta", "dpo.beta=-1"])
def test_a_wrong_override(told: Told, cli: Cli, tmp_path: Path, override: str) -> None:
    out = tmp_path / "out"
    told(mistake(cli("iterate", "--recipe", "toy", "--adapters", out, "--set", override)))
    assert not out.exists()


def test_no_placeholder_is_its_options_name() -> None:
    """typer 0.27 then calls the option itself so: `--GPUS` in place of `--gpus`."""
    commands = [get_command(main.app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for option in command.params:
            assert (option.metavar or "").lower() != option.name, (command.name, option.opts)
    assert len(commands) > 20


def test_a_negative_number_of_iterations(told: Told, cli: Cli, tmp_path: Path) -> None:
    there = ("--adapters", tmp_path / "out")
    told(mistake(cli("iterate", "--recipe", "toy", *there, "--iterations=-1")))


def test_a_missing_data_directory(told: Told, cli: Cli, tmp_path: Path) -> None:
    nowhere = "data.dir=nowhere"
    out = tmp_path / "out"
    told(mistake(cli("iterate", "--recipe", "toy", "--adapters", out, "--set", nowhere)))


@pytest.mark.parametrize(
    ("base", "told"),
    [("/no/base", "there is nothing at /no/base"), ("some-org/base", "the Hub cannot be reached")],
)
def test_a_base_that_cannot_be_had_leaves_nothing(
    cli: Cli, tmp_path: Path, base: str, told: str
) -> None:
    out, named = tmp_path / "out", f"base.name={base}"
    line = mistake(cli("iterate", "--recipe", "toy", "--adapters", out, "--set", named))
    assert told in line
    assert not out.exists()


def test_a_directory_with_other_files(told: Told, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    told(mistake(cli("iterate", "--recipe", "toy", "--adapters", tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_of_another_configuration(cli: Cli, tmp_path: Path) -> None:
    make_run(tmp_path / "out")
    line = mistake(cli("iterate", "--recipe", "toy", "--adapters", tmp_path / "out"))
    assert "holds a run of another configuration; differing: " in line
    assert 'base.name ("some/base" there, ' in line
    assert "--fresh" in line


@pytest.mark.parametrize(
    "command",
    [
        ["show", "run"],
        ["show", "pairs"],
        ["show", "judgements"],
        ["show", "candidates"],
        ["evaluate"],
    ],
)
def test_a_directory_without_a_run(
    told: Told, cli: Cli, tmp_path: Path, command: list[str]
) -> None:
    told(mistake(cli(*command, "--adapters", tmp_path)))


def test_an_iteration_that_is_not_there(told: Told, cli: Cli, run: RunDir) -> None:
    for command in (("show", "pairs"), ("evaluate",)):
        told(mistake(cli(*command, "--adapters", run.path, "--iteration", "7")))
    told(mistake(cli("show", "judgements", "--adapters", run.path, "--iteration", "anchor")))
    told(mistake(cli("bench", "judge", "--adapters", run.path, "--iteration", "anchor")))


def test_files_of_the_run_that_somebody_has_emptied_are_one_line(
    told: Told, cli: Cli, tmp_path: Path
) -> None:
    made = make_run(tmp_path)
    there = ("--adapters", made.path)
    done, measured = made.anchor.done.read_bytes(), made.anchor.evaluation.read_bytes()
    made.anchor.done.write_text("{}")
    for command in (("show", "run"), ("report",)):
        told(mistake(cli(*command, *there)))
    made.anchor.done.write_bytes(done)
    made.anchor.evaluation.write_text("{}")
    for command in (("show", "run"), ("report",), ("evaluate", "--iteration", "anchor")):
        told(mistake(cli(*command, *there)))
    made.anchor.evaluation.write_bytes(measured)
    made.iteration(1).candidates.unlink()
    told(mistake(cli("show", "judgements", "--iteration", "1", *there)))


def test_an_iteration_without_pairs_yet(told: Told, cli: Cli, run: RunDir) -> None:
    told(mistake(cli("show", "pairs", "--adapters", run.path)))


def test_a_run_without_iterations(told: Told, cli: Cli, tmp_path: Path) -> None:
    RunDir(tmp_path).open(
        recipe_from({"name": "t", "base": {"name": "b"}, "data": {"dir": "d"}}, where="t"), {}
    )
    told(mistake(cli("show", "candidates", "--adapters", tmp_path)))


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e-300"])
def test_a_temperature_at_which_nothing_can_be_drawn(
    told: Told, cli: Cli, run: RunDir, value: str
) -> None:
    told(mistake(cli("chat", "--adapters", run.path, f"--temperature={value}")))


@pytest.mark.parametrize("command", [["recipes", "show"], ["recipes", "check"]])
def test_recipes_commands_know_mistakes_too(told: Told, cli: Cli, command: list[str]) -> None:
    told(mistake(cli(*command, "lama2-70b")))


def test_a_wrong_recipe_file_is_found_by_check(told: Told, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbase: {name: b}\ndata: {dir: d}\ndpo: {bta: 1}\n")
    told(mistake(cli("recipes", "check", path)))


@pytest.mark.parametrize(
    "args",
    [
        ["itreate"],
        ["iterate"],
        ["iterate", "--adapters"],
        ["iterate", "--adapters", "x", "--iterations", "many"],
        ["show", "pairs", "--adapters", "x", "--limit", "-1"],
        ["show", "everything", "--adapters", "x"],
        ["plan", "--gpu", "1x24GB"],
        ["compare", "1", "2", "3"],
        ["export", "--adapters", "x", "--out", "y", "--as", "onnx"],
    ],
)
def test_a_wrong_call_is_one_line(told: Told, cli: Cli, args: list[str]) -> None:
    told(mistake(cli(*args)))


def test_a_command_without_a_word_is_its_help(cli: Cli) -> None:
    done = cli("recipes")
    assert done.returncode == 2 and "check" in done.stdout and done.stderr == ""


# --- show -------------------------------------------------------------------------------------


def test_show_pairs_prints_both_replies_and_the_judges_words(cli: Cli, run: RunDir) -> None:
    done = cli("show", "pairs", "--adapters", run.path, "--iteration", "1", "--limit", "1")
    assert done.returncode == 0
    assert done.stdout == (
        "--- p1   4.25 against 1\n"
        "What is [bold]this[/bold]?\n"
        "\n"
        "chosen (p1#0; votes 4, 4.5)\n"
        "  A good answer\n"
        "  of two lines.\n"
        "  the judge:\n"
        "    Clear.\n"
        "    Score: 4\n"
        "\n"
        "rejected (p1#1; votes 1, unreadable)\n"
        "  A bad one ½\n"
        "  the judge:\n"
        "    Thin.\n"
        "    Score: 1\n"
        "\n"
    )
    assert done.stderr == "1 of 5; --limit 0 shows all\n"


@pytest.mark.parametrize(("limit", "rows"), [("0", 5), ("2", 2), ("9", 5)])
def test_show_pairs_as_json_is_the_rows(cli: Cli, run: RunDir, limit: str, rows: int) -> None:
    done = cli(
        "show", "pairs", "--adapters", run.path, "--iteration", "1", "--limit", limit, "--json"
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == rows
    assert found[0] == json.loads(run.iteration(1).pairs.read_text().splitlines()[0])
    assert "½" in done.stdout


def test_show_judgements(cli: Cli, run: RunDir) -> None:
    done = cli("show", "judgements", "--adapters", run.path, "--iteration", "1")
    assert "--- p1#1 vote 0   score 1\n  A bad one ½\n  the judge:\n    Thin.\n" in done.stdout
    assert "--- p1#1 vote 1   score unreadable\n" in done.stdout
    rows = cli("show", "judgements", "--adapters", run.path, "--iteration", "1", "--json").stdout
    assert [json.loads(row)["score"] for row in rows.splitlines()] == [4.0, 4.5, 1.0, None]


def test_show_candidates_defaults_to_the_last_iteration(cli: Cli, run: RunDir) -> None:
    done = cli("show", "candidates", "--adapters", run.path)
    assert done.stdout.count("---") == 1
    done = cli("show", "candidates", "--adapters", run.path, "--iteration", "1")
    assert "--- p1#2   1 tokens, ended by length\n  Cut\n" in done.stdout
    by_word = cli("show", "candidates", "--adapters", run.path, "--iteration", "last")
    assert by_word.stdout == cli("show", "candidates", "--adapters", run.path).stdout
    rows = cli("show", "candidates", "--adapters", run.path, "--json").stdout
    assert json.loads(rows)["candidate_id"] == "p1#0"


def test_show_passes_over_the_half_line_of_a_run_that_is_going_on(cli: Cli, tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    with run.iteration(2).candidates.open("a") as file:
        file.write('{"prompt_id": "p2", "candi')
    done = cli("show", "candidates", "--adapters", run.path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("---") == 1


def method_run(path: Path, method: str, *rest: str) -> tuple[RunDir, IterationDir]:
    """A run of a method with an iteration of one prompt and two candidates."""
    run = RunDir(path / "out")
    run.open(load_recipe("toy", [f"method={method}", *rest]), {"versions": {}})
    place = run.iteration(1)
    write_records(place.prompts, [Prompt("p", "Why?")])
    write_records(place.candidates, [_candidate("p#0", "Because."), _candidate("p#1", "No.")])
    return run, place


def _candidate(name: str, text: str) -> Candidate:
    return Candidate("p", name, text, 2, "stop")


def _pair(better: float, worse: float, chosen: str = "p#0", origin: str = "") -> PreferencePair:
    return PreferencePair(
        "p", "Why?", chosen, "p#1", "Because.", "No.", better, worse, origin=origin
    )


@pytest.mark.parametrize(
    ("method", "pair", "heading", "chosen", "why"),
    [
        (
            "dpo",
            _pair(-0.0, -2.0, "r7"),
            "p   minus human rank 0 against -2",
            "chosen (r7)",
            "humans have ranked the replies",
        ),
        (
            "spin",
            _pair(1.0, 0.0, "p#human"),
            "p",
            "chosen (p#human)",
            "a human's answer counts as better than the model's",
        ),
        (
            "cream",
            _pair(-3.5, -8.0),
            "p   log-likelihood above the base's -3.5 against -8",
            "chosen (p#0)",
            "their likelihood ranks them",
        ),
    ],
)
def test_show_of_methods_without_a_judge(
    cli: Cli, tmp_path: Path, method: str, pair: PreferencePair, heading: str, chosen: str, why: str
) -> None:
    run, place = method_run(tmp_path, method)
    write_records(place.judgements, [])
    write_records(place.pairs, [pair])
    done = cli("show", "pairs", "--adapters", run.path)
    assert done.stdout == (
        f"--- {heading}\nWhy?\n\n{chosen}\n  Because.\n\nrejected (p#1)\n  No.\n\n"
    )
    done = cli("show", "judgements", "--adapters", run.path)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"this run's candidates are not graded: {why}\n"
    assert "p#1   2 tokens" in cli("show", "candidates", "--adapters", run.path).stdout


def test_show_of_rlhf_has_rewards_without_words(cli: Cli, tmp_path: Path) -> None:
    run, place = method_run(tmp_path, "rlhf")
    rewards = [Judgement("p#0", 0, "", 1.25), Judgement("p#1", 0, "", None, "length")]
    write_records(place.judgements, rewards)
    write_records(place.pairs, [])
    done = cli("show", "judgements", "--adapters", run.path)
    assert done.stdout == (
        "--- p#0   reward 1.25\n  Because.\n\n--- p#1   reward unreadable\n  No.\n\n"
    )
    done = cli("show", "pairs", "--adapters", run.path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "the policy learns from the rewards of its own answers" in done.stderr


def test_show_of_rlaif_has_revisions_then_labels(cli: Cli, tmp_path: Path) -> None:
    run, place = method_run(tmp_path, "rlaif")
    for made in (place.judgements, place.pairs):
        write_records(made, [])
    write_records(
        place.revisions,
        [
            Revision("p", "p#0", 1, "kind", "Too short.", "Because of rain."),
            Revision("p", "p#1", 1, "true", "It", None),
        ],
    )
    done = cli("show", "judgements", "--adapters", run.path)
    assert done.stdout == (
        "--- p#0 round 1   principle kind\n  Because.\n  the critique:\n    Too short.\n"
        "  the revision:\n    Because of rain.\n\n"
        "--- p#1 round 1   principle true\n  No.\n  the critique:\n    It\n"
        "  the revision:\n    (unusable)\n\n"
    )
    rows = cli("show", "judgements", "--adapters", run.path, "--json").stdout
    assert [json.loads(row)["principle"] for row in rows.splitlines()] == ["kind", "true"]
    done = cli("show", "pairs", "--adapters", run.path)
    assert "in its first iteration the policy learns from revisions" in done.stderr

    place.revisions.unlink()  # as in the iterations after it
    write_records(place.labels, [Label("p", "p#0", "p#1", "kind", 0.75)])
    write_records(place.pairs, [_pair(0.75, 0.25)])
    done = cli("show", "judgements", "--adapters", run.path)
    assert done.stdout == (
        "--- p   principle kind, the first is better: 0.75\np#0\n  Because.\n\np#1\n  No.\n\n"
    )
    done = cli("show", "pairs", "--adapters", run.path)
    assert "--- p   probability of being better 0.75 against 0.25, principle kind\n" in done.stdout
    assert "votes" not in done.stdout and "the judge:" not in done.stdout


def test_show_pairs_says_where_a_pair_is_from(cli: Cli, tmp_path: Path) -> None:
    """From judgements, an earlier iteration, a model to come: each with its own votes."""
    run, old = method_run(tmp_path, "meta-rewarding")
    write_records(old.judgements, [Judgement("p#0", 0, "Old words.", 4.0)])
    write_records(old.pairs, [])
    new = run.iteration(2)
    write_records(new.candidates, [_candidate("p#0", "Because."), _candidate("p#1", "No.")])
    write_records(new.judgements, [Judgement("p#0", 0, "New words.", 2.0)])
    write_records(new.future_candidates, [_candidate("p#future-0", "So.")])
    write_records(new.future_judgements, [Judgement("p#future-0", 0, "Words to come.", 5.0)])
    pairs = [
        _pair(2.0, 1.0),
        _pair(4.0, 1.0, origin="replay, 1 back"),
        _pair(0.9, -0.9, "p#0:3", origin="judge"),
        _pair(5.0, 1.0, "p#future-0"),
    ]
    write_records(new.pairs, pairs)
    told = cli("show", "pairs", "--adapters", run.path, "--limit", "0").stdout.split("--- ")[1:]
    assert [one.splitlines()[0] for one in told] == [
        "p   2 against 1",
        "p   4 against 1, replay, 1 back",
        "p   rating by the meta-judge 0.9 against -0.9, a pair of judgements",
        "p   5 against 1",
    ]
    words = ("New words.", "Old words.", None, "Words to come.")
    for one, said in zip(told, words, strict=True):
        assert (said in one) if said else ("the judge:" not in one)
    assert "future-0 vote 0   score 5\n  So.\n" in (
        cli("show", "judgements", "--adapters", run.path).stdout
    )
    assert "So." in cli("show", "candidates", "--adapters", run.path).stdout


def test_show_run(cli: Cli, run: RunDir) -> None:
    done = cli("show", "run", "--adapters", run.path)
    assert done.stdout.startswith("by-hand: self-rewarding, seed 0, base some/base\n")
    assert "M2, iteration 1" in done.stdout
    facts = json.loads(cli("show", "run", "--adapters", run.path, "--json").stdout)
    assert facts["recipe"]["name"] == "by-hand"
    assert facts["stages"] == [{"iteration": 0, "stage": "anchor", "seconds": 1.0}]


def test_evaluate_prints_what_has_been_measured(cli: Cli, run: RunDir) -> None:
    done = cli("evaluate", "--adapters", run.path, "--iteration", "anchor", "--json")
    assert json.loads(done.stdout) == evaluation(2.5)
    done = cli("evaluate", "--adapters", run.path, "--iteration", "anchor")
    assert re.search(r"^ gold +2\.50 ±0\.08", done.stdout, re.MULTILINE)
    assert "\nvotes by score: 3: 4, unreadable: 1\n" in done.stdout
    assert "calibration" not in done.stdout and "people's quality" not in done.stdout


# --- the closing table ------------------------------------------------------------------------


def table_of(run: RunDir) -> list[list[str]]:
    recipe = recipe_from(run.facts()["recipe"], where="run.json")
    lines = closing_table(run, recipe).splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_the_table_has_a_row_for_each_model_that_is_done(run: RunDir) -> None:
    rows = table_of(run)
    columns = ["model", "pairs", "gold", "greedy", "judge", "ties", "readable"]
    assert rows[1] == [*columns, "chars", "min"]
    # 90 s are 1.5 minutes; the anchor comes of no pairs; iteration 2 is not done.
    assert rows[3] == ["M1, anchor", "2.50 ±0.08", "3.50", "0.75", "0.12", "0.98", "123", "1.5"]
    assert rows[4] == [
        "M2, iteration 1",
        "5",
        *["3.00 ±0.08", "4.00", "0.75", "0.12", "0.98", "123", "1.5"],
    ]
    assert rows[5] == [""]
    told = " ".join(word for row in rows[6:] for word in row)
    for word in ("gold:", GOLD, "judge:", "ties, readable:", "chars:", "greedy:"):
        assert word in told


def test_without_a_gold_scorer_there_is_no_gold(tmp_path: Path) -> None:
    rows = table_of(make_run(tmp_path / "out", gold=None))
    assert rows[1] == ["model", "pairs", "judge", "ties", "readable", "chars", "min"]
    assert rows[4] == ["M2, iteration 1", "5", "0.75", "0.12", "0.98", "123", "1.5"]
    assert not any("gold" in word for row in rows for word in row)


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    write_json(run.anchor.evaluation, {**evaluation(None, accuracy=None), "policy": {}})
    assert table_of(run)[3] == ["M1, anchor", "-", "-", "-", "0.12", "0.98", "-", "1.5"]


def test_a_new_run_has_an_empty_table(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open(recipe_from({"name": "t", "base": {"name": "b"}, "data": {"dir": "d"}}, where="t"), {})
    assert table_of(run)[1][0] == "model"


def test_the_table_on_stdout_has_no_colour_codes(cli: Cli, run: RunDir) -> None:
    done = shell("show", "run", "--adapters", run.path, NO_COLOR="", FORCE_COLOR="1")
    assert "\x1b" not in done.stdout


# --- the rest ---------------------------------------------------------------------------------


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"{__version__}\n"


def test_help_names_every_command(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    assert cli("--verbose").stdout.strip() == done.stdout.strip()
    for command in ("iterate", "data", "evaluate", "show", "recipes"):
        assert re.search(rf"\b{command}\b", done.stdout)


def test_recipes_list_has_a_line_for_each(cli: Cli) -> None:
    lines = cli("recipes", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes()
    assert all(len(line.split()) > 3 for line in lines)


def test_recipes_show_prints_the_file_and_check_fills_in_defaults(cli: Cli) -> None:
    path = recipes_dir() / "llama2-70b.yaml"
    assert cli("recipes", "show", "llama2-70b").stdout == path.read_text().rstrip() + "\n"
    checked = yaml.safe_load(cli("recipes", "check", "llama2-70b").stdout)
    assert checked["dpo"]["max_grad_norm"] == 1.0
    assert recipe_from(checked, where="stdout").name == "llama2-70b"


def test_check_ends_with_a_verdict_and_says_which_files_are_missing(
    told: Told, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("recipes", "check", "toy")
    assert done.returncode == 0
    told(done.stderr.splitlines()[-1])
    assert re.search(r"^  ok +data +400 IFT rows", done.stderr, re.MULTILINE)
    Path("mine.yaml").write_text(
        "name: mine\nbase: {name: ./base}\ndata: {dir: nowhere}\njudge: {rubric: additive-5}\n"
    )
    done = cli("recipes", "check", "mine.yaml")
    assert done.returncode == 2 and yaml.safe_load(done.stdout)["name"] == "mine"
    told(done.stderr.splitlines()[-1])
    fails = re.findall(r"^  fails +(\w+)", done.stderr, re.MULTILINE)
    assert fails == ["data", "prompts", "base"]
    assert "there is nothing at ./base" in done.stderr and "ok      judge" in done.stderr


@pytest.mark.parametrize("name", shipped_recipes())
def test_what_show_prints_and_new_begins_is_the_same_recipe(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe(name)
    Path("shown.yaml").write_text(cli("recipes", "show", name).stdout)
    assert load_recipe("shown.yaml") == shipped
    done = cli("recipes", "new", "mine.yaml", "--from", name)
    assert (done.returncode, done.stderr) == (0, "next: srlm-lite recipes check mine.yaml\n")
    assert load_recipe("mine.yaml") == shipped.model_copy(update={"name": "mine"})
    # Every setting of the file stands there to change; those of what it extends are of that file.
    lines = Path("mine.yaml").read_text().splitlines()
    whole = "\n".join(line.removeprefix("# ") for line in lines if line not in lines[:4])
    own = yaml.safe_load((recipes_dir() / f"{name}.yaml").read_text())
    own = {key: value for key, value in own.items() if key not in ("name", "description")}
    assert yaml.safe_load(whole) == own


def test_new_replaces_no_file_and_begins_with_shipped_recipes_alone(
    told: Told, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("precious")
    told(mistake(cli("recipes", "new", "mine.yaml", "--from", "toy")))
    told(mistake(cli("recipes", "new", "other.yaml", "--from", "mine.yaml")))
    told(mistake(cli("recipes", "new", "other.yaml", "--from", "tooy")))
    told(mistake(cli("recipes", "new", "no/where.yaml", "--from", "toy")))
    assert Path("mine.yaml").read_text() == "precious"
    assert not Path("other.yaml").exists()


@pytest.mark.parametrize("width", [60, 80])
def test_lines_of_a_run_are_broken_between_words(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    reporter = ConsoleReporter()
    console = Console(file=out, force_terminal=True, width=width, color_system=None, soft_wrap=True)
    monkeypatch.setattr(reporter, "_rich", console)
    warning = "answers grew from 60 to 120 characters on average: look at the report, and at them"
    reporter.warn(warning)
    facts = {"candidates": 800, "mean_tokens": 40, "truncated": 3}
    reporter.finish(1, "candidates", facts, 12.0)
    reporter.say(f"wrote {warning}")
    command = (
        "next: srlm-lite export --adapters out/mine --iteration 12 --out out/mine-m13 --dry-run"
    )
    reporter.command(command, "its best iteration, as weights")
    reporter.command("next: srlm-lite", "what for")
    lines = out.getvalue().splitlines()
    words = " ".join(out.getvalue().split())
    assert warning in words and summary("candidates", facts) in words
    assert command in lines and lines[-1] == "next: srlm-lite  # what for"  # to be copied whole
    assert max(len(line) for line in lines if line != command) <= width


def test_a_table_that_is_too_wide_comes_in_several_with_its_names() -> None:
    columns = ["model", *("abcdefgh" * 2)]
    rows = [[f"M{number}", *["1234"] * 16] for number in range(3)]
    whole, narrow = plain_table(columns, rows), plain_table(columns, rows, width=40)
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 40
    assert whole.count("M1") == 1 and narrow.count("M1") == narrow.count("model") == 4
    assert narrow.count("1234") == whole.count("1234") == 48
    assert plain_table(columns, rows, width=200) == whole


def test_lines_are_whole_in_a_pipe_and_words_are_never_broken() -> None:
    text = "  a line of words\n" + "x" * 50
    assert fitted(text, None) == fitted(text, 20) == text  # no terminal, or too narrow a one
    assert fitted("  one two three four five six seven", 30) == (
        "  one two three four five six\n    seven"
    )
    assert fitted("x" * 50, 40) == "x" * 50


def test_a_mistake_is_broken_between_words_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = "out/mine: holds no run (no run.json). Start one with: srlm-lite iterate --adapters out"
    assert wrapping.after_name(line) == line
    monkeypatch.setattr(wrapping, "of_stderr", lambda: 60)
    first, *rest = wrapping.after_name(line).splitlines()
    assert len(f"srlm-lite: {first}") <= 60 and all(len(part) <= 60 for part in rest)
    assert " ".join([first, *(part.strip() for part in rest)]) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1:00 min"), (3599, "59:59 min"), (7260, "2:01 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


def test_a_log_file_is_told_now_and_then_how_far_a_long_stage_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter((0.0, 0.1, 30.0, 59.0, 60.0, 100.0, 130.0, 3000.0, 3100.0, 3200.0))
    monkeypatch.setattr("srlm_lite.cli.progress.time.monotonic", lambda: next(times))
    with ConsoleReporter() as console:
        task = console.start("judgements", 1000, "judgements")
        task.advance(400)  # on disk already
        for _ in range(5):
            task.advance(50)
        task.note("loss 0.500")
        task.advance(150)
        for _ in range(2):  # 200 s are under a tenth of the 53 minutes so far
            task.advance(50)
    assert capsys.readouterr().err.splitlines() == [
        # 150 in 59.9 s: what was on disk took no time
        "    judgements: 550/1000 judgements after 1:00 min, ETA 3:00 min",
        "    judgements: 650/1000 judgements after 2:10 min, ETA 3:02 min",
        "    judgements: 800/1000 judgements after 50:00 min, ETA 25:00 min, loss 0.500",
    ]


def test_the_rest_of_a_training_that_goes_on_is_told_by_its_own_steps() -> None:
    """Four of ten steps were there; the fifth takes two seconds, so five more take ten."""
    time_left = TimeLeft(10, 0.0)
    time_left.advance(4, 3.0)
    time_left.restart(3.0)
    assert time_left.left(3.5) is None
    time_left.advance(1, 5.0)
    assert time_left.left(5.0) == 10.0


def test_the_rest_is_told_of_steps_that_take_minutes() -> None:
    time_left = TimeLeft(10, 0.0)
    assert time_left.left(100.0) is None
    time_left.advance(2, 0.5)  # on disk already
    assert time_left.left(150.0) is None
    time_left.advance(1, 200.5)
    assert time_left.left(200.5) == 7 * 200
    assert time_left.left(300.5) == 7 * 200 - 100
    assert time_left.left(900.5) == 6 * 200  # late: at any moment
    for step in range(1, 6):
        time_left.advance(1, 200.5 + 100 * step)  # quicker than before
    assert time_left.left(700.5) == pytest.approx(2 * 700 / 6)


def test_the_rest_is_told_by_the_newest_units() -> None:
    time_left = TimeLeft(2000, 0.0)
    for second in range(1, 301):
        time_left.advance(1, float(second))
    for second in range(301, 501):  # longer texts
        time_left.advance(2, float(second))
    assert time_left.left(500.0) == pytest.approx(1300 / 2)


def test_a_bar_shows_the_rest_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("srlm_lite.cli.progress.time.monotonic", lambda: now)
    progress = Progress(_Eta(), disable=True)
    time_left = TimeLeft(4, now)
    task = progress.add_task("DPO", total=4, time_left=time_left)
    assert str(_Eta().render(progress.tasks[0])) == "-"
    now = 90.0
    _Bar(progress, task, time_left).advance()
    assert str(_Eta().render(progress.tasks[0])) == "4:30 min"


@pytest.mark.parametrize(
    ("stage", "facts", "text"),
    [
        ("anchor", {"taken_from": "x/anchor"}, "shipped with the recipe (x/anchor)"),
        (
            "base",
            {"answers": {"bits_per_byte": 1.234, "shuffled": {"bits_per_byte": 4.5}}},
            "1.23 bits a byte of answers (letters shuffled: 4.50)",
        ),
        ("base", {}, "no instruction data to read"),
        (
            "anchor",
            {"ift": 9, "eft": 8, "too_long": 2, "steps": 5, "first_loss": 1.0, "last_loss": 0.5},
            "9 IFT + 8 EFT rows (2 of them too long for base.window), 5 steps, loss 1.000 -> 0.500",
        ),
        ("prompts", {"prompts": 64, "too_long": 0}, "64 prompts"),
        (
            "delta",
            {
                "steps": 5,
                "first_loss": 0.69314,
                "step0_loss": 0.69314,
                "last_loss": 0.5,
                "reward_accuracy": 0.75,
            },
            "5 steps, loss 0.6931 (ln 2) -> 0.5000, reward accuracy 0.75",
        ),
        (  # it goes on from the last delta, against the anchor
            "delta",
            {
                "steps": 5,
                "first_loss": 0.638,
                "step0_loss": 0.69314,
                "last_loss": 0.6089,
                "reward_accuracy": 0.75,
            },
            "5 steps, loss 0.6380 -> 0.6089, reward accuracy 0.75",
        ),
        (
            "prompts",
            {"prompts": 6, "too_long": 1},
            "6 prompts (1 of the list too long for base.window)",
        ),
        (
            "delta",
            {"answers": 7, "too_long": 1, "steps": 5, "first_loss": 1.0, "last_loss": 0.5},
            "SFT on 7 answers (1 more too long for base.window), 5 steps, loss 1.000 -> 0.500",
        ),
        (
            "judgements",
            {"judgements": 12, "parse_rate": 0.9167, "mean_score": None},
            "12 votes, 91.7% readable, none readable",
        ),
        (
            "pairs",
            {"pairs": 9, "drops": {"tied": 3, "too_long": 1}},
            "9 preference pairs; no pair: 3 tied, 1 too_long",
        ),
        (
            "pairs",
            {"pairs": 9, "drops": {}, "gold_agreement": {"right": 5, "reversed": 3, "tied": 1}},
            "9 preference pairs; gold says 5 right, 3 reversed",
        ),
        (
            "evaluation",
            evaluation(3.0),
            "gold 3.00, judge pairwise accuracy 0.75, mean length 123 characters",
        ),
        (
            "evaluation",
            {"judge": {"pairwise_accuracy": None}, "policy": {}},
            "",
        ),
    ],
)
def test_finished_stages_in_one_line(stage: str, facts: dict[str, Any], text: str) -> None:
    assert summary(stage, facts) == text


def test_inputs_are_checked_before_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory of a mistyped setting would refuse the corrected command."""
    for setting, told in (
        ("data.dir=nowhere", "no such data directory"),
        ("judge.rubric=nowhere", "neither a file nor one of the shipped rubrics"),
        ("evaluate.gold=nowhere:gold", "cannot be imported"),
        ("prompts.file=nowhere.jsonl", "no such file"),
        ("base.chat_template=nowhere", "neither a file nor one of the shipped chat_templates"),
        ("anchor.init=nowhere", "anchor.init = nowhere: no such directory"),
        ("rollout.max_new_tokens=256", "leaves no room for a prompt in base.window = 256"),
        ("base.window=64", "judge.max_new_tokens = 64: leaves no room for a prompt"),
    ):
        recipe = load_recipe("tiny", [setting])
        with pytest.raises(UserError, match=told):
            check_inputs(recipe)
    check_inputs(load_recipe("tiny"))
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    server = ["judge.engine=openai", "openai.url=http://127.0.0.1:1/v1", "openai.model=m"]
    with pytest.raises(UserError, match="OPENAI_API_KEY: holds characters"):
        check_inputs(load_recipe("tiny", server))
