"""The run directory: journals that survive any stop, atomic files, and who may go on with a run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from messages import Told

from srlm_lite.errors import UserError
from srlm_lite.recipe import Recipe, load_recipe, recipe_from
from srlm_lite.records import Candidate, Judgement, Prompt, RankedReply
from srlm_lite.run.files import (
    read_json,
    read_jsonl,
    read_records,
    sha256_file,
    write_atomically,
    write_json,
    write_records,
)
from srlm_lite.run.journal import Journal
from srlm_lite.run.run import RunDir
from srlm_lite.run.sums import is_harmed, sums_of
from srlm_lite.shipped import recipes_dir

CHUNKS = [["a", "b"], ["c"], ["d", "e"]]
TEXTS = {
    "a": "plain",
    "b": 'quote " and \\ and\nnew line',
    "c": "ünï ½ 漢\u2028字",
    "d": "",
    "e": "\r\n",
}


def made(index: int) -> list[Prompt]:
    return [Prompt(key, TEXTS[key], "test") for key in CHUNKS[index]]


def filled(journal: Journal, chunks: Any, make: Any, **told: Any) -> list[Any]:
    """The journal with all chunks; `make` makes the rows of chunk i."""
    return journal.stream(chunks, lambda missing: map(make, missing), **told)


def journal(path: Path) -> Journal:
    return Journal(path, Prompt, lambda row: row.prompt_id)


class Killed(BaseException):
    """Stands for the process being killed."""


def recording(calls: list[int], *, kill_at: int | None = None) -> Callable[[int], list[Prompt]]:
    def compute(index: int) -> list[Prompt]:
        if index == kill_at:
            raise Killed
        calls.append(index)
        return made(index)

    return compute


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The bytes of a journal that was never disturbed."""
    path = tmp_path / "undisturbed.jsonl"
    filled(journal(path), CHUNKS, made)
    return path.read_bytes()


# --- Journal ----------------------------------------------------------------------------------


def test_a_journal_holds_every_chunk_in_order(whole: bytes) -> None:
    rows = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
    assert [row["prompt_id"] for row in rows] == ["a", "b", "c", "d", "e"]
    assert [row["text"] for row in rows] == [TEXTS[key] for key in "abcde"]


def test_the_file_grows_by_whole_chunks(tmp_path: Path, whole: bytes) -> None:
    path, sizes = tmp_path / "j.jsonl", []
    filled(
        journal(path), CHUNKS, made, on_chunk=lambda i, computed: sizes.append(path.stat().st_size)
    )
    lines = whole.splitlines(keepends=True)
    # Two rows, then one more, then two more; each chunk is on disk when it is announced.
    assert sizes == [sum(map(len, lines[:2])), sum(map(len, lines[:3])), len(whole)]


def test_a_complete_journal_computes_nothing(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(whole)
    calls: list[int] = []
    told: list[tuple[int, bool]] = []
    rows = filled(
        journal(path), CHUNKS, recording(calls), on_chunk=lambda i, c: told.append((i, c))
    )
    assert calls == []
    assert told == [(0, False), (1, False), (2, False)]
    assert rows == [row for index in range(3) for row in made(index)]
    assert path.read_bytes() == whole


def test_resuming_after_a_cut_at_every_byte(tmp_path: Path, whole: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    ends = [sum(map(len, lines[:rows])) for rows in (2, 3, 5)]  # of the chunks, in bytes
    path = tmp_path / "j.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        calls: list[int] = []
        rows = filled(journal(path), CHUNKS, recording(calls))
        assert path.read_bytes() == whole, f"cut at byte {cut}"
        assert rows == [row for index in range(3) for row in made(index)]
        # Chunks whose last byte was there are kept; all the others are computed, and only they.
        kept = sum(end <= cut for end in ends)
        assert calls == list(range(kept, 3)), f"cut at byte {cut}"


@pytest.mark.parametrize("kills", [(0,), (1,), (2,), (0, 1, 2), (2, 2, 1)])
def test_killed_while_computing_it_ends_with_the_same_bytes(
    tmp_path: Path, whole: bytes, kills: Sequence[int]
) -> None:
    path = tmp_path / "j.jsonl"
    for kill_at in kills:
        # A kill before a chunk that is complete already does not happen: nothing is computed.
        try:
            filled(journal(path), CHUNKS, recording([], kill_at=kill_at))
        except Killed:
            with path.open("ab") if path.exists() else path.open("wb") as file:
                file.write(b'{"prompt_id": "torn')
    filled(journal(path), CHUNKS, made)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "tail",
    [
        b"\n",
        b"\0\0\0\0\n",
        b"5\n",
        b"null\n",
        b"[]\n",
        b'"text"\n',
        b"{}\n",
        b'{"prompt_id": "d"}\n',
        b'{"prompt_id": "d", "text": 5}\n{"prompt_id": "e", "text": "\\r\\n"}\n',
        b"\xff\xfe\n",
        b'{"prompt_id": "z", "text": "", "source": ""}\n',
        b'{"prompt_id": "d", "text": "", "source": ""}\n',  # half a chunk
    ],
)
def test_what_is_not_a_whole_expected_chunk_is_cut_off(
    tmp_path: Path, whole: bytes, tail: bytes
) -> None:
    path = tmp_path / "j.jsonl"
    first_two = b"".join(whole.splitlines(keepends=True)[:3])
    path.write_bytes(first_two + tail)
    calls: list[int] = []
    filled(journal(path), CHUNKS, recording(calls))
    assert calls == [2]
    assert path.read_bytes() == whole


def test_rows_behind_the_last_chunk_are_cut_off(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(whole + b'{"prompt_id": "f", "text": "", "source": ""}\n')
    filled(journal(path), CHUNKS, recording([], kill_at=0))
    assert path.read_bytes() == whole


def test_a_foreign_first_chunk_makes_all_of_it_new(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    calls: list[int] = []
    filled(journal(path), CHUNKS, recording(calls))
    assert calls == [0, 1, 2]
    assert path.read_bytes() == whole


def test_the_same_rows_in_smaller_chunks_are_kept(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(whole)
    calls: list[int] = []
    filled(journal(path), [["a"], ["b"], ["c", "d"], ["e"]], recording(calls))
    assert calls == []


def test_a_chunk_with_other_rows_than_announced_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with pytest.raises(RuntimeError, match="chunk 1 came back with other rows"):
        filled(journal(path), CHUNKS, lambda index: made(0))
    assert [row["prompt_id"] for row in read_jsonl(path)] == ["a", "b"]


def test_a_journal_keeps_none_and_defaults_apart(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    rows = [Judgement("c", 0, "?", None, "length", True), Judgement("c", 1, "Score: 0", 0.0)]
    keys = [["c:0", "c:1"]]
    told = Journal(path, Judgement, lambda row: f"{row.candidate_id}:{row.vote}")
    filled(told, keys, lambda index: rows)
    assert filled(told, keys, recording([], kill_at=0)) == rows
    assert [row["score"] for row in read_jsonl(path)] == [None, 0.0]


# --- what is harmed ---------------------------------------------------------------------------


def flipped(data: bytes, at: int) -> bytes:
    """One bit of it the other way round."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_bit_that_flips_anywhere_in_a_journal_is_noticed(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    filled(journal(path), CHUNKS, made)
    for at in range(len(whole)):
        path.write_bytes(flipped(whole, at))
        for read in (lambda: filled(journal(path), CHUNKS, made), lambda: read_jsonl(path)):
            with pytest.raises(UserError, match="is not the file that the run has written"):
                read()
    path.write_bytes(whole)
    assert len(read_records(path, Prompt)) == 5


def test_what_is_cut_off_a_journal_is_made_again_and_what_is_left_is_held_to_its_sums(
    tmp_path: Path, whole: bytes
) -> None:
    path = tmp_path / "j.jsonl"
    filled(journal(path), CHUNKS, made)
    sums = sums_of(path).read_bytes()
    ends = [int(line.split()[0]) for line in sums.splitlines()]
    assert ends[-1] == len(whole) and len(ends) == len(CHUNKS)
    for cut in {*range(0, len(whole), 13), *(end + more for end in ends for more in (-1, 0))}:
        path.write_bytes(whole[:cut])
        sums_of(path).write_bytes(sums)
        assert not is_harmed(path)
        filled(journal(path), CHUNKS, made)
        assert (path.read_bytes(), sums_of(path).read_bytes()) == (whole, sums)
        if cut >= ends[0]:
            path.write_bytes(flipped(whole[:cut], ends[0] - 2))
            assert is_harmed(path)


@pytest.mark.parametrize(
    "left", [b"", b"\0" * 80, b"12", b"1 zz\n", b"99999999 " + b"a" * 64 + b"\n"]
)
def test_sums_that_say_nothing_and_none_at_all_stand_in_no_way(
    tmp_path: Path, whole: bytes, left: bytes
) -> None:
    """As after a power failure, or of a run of an earlier version."""
    path = tmp_path / "j.jsonl"
    path.write_bytes(whole)
    filled(journal(path), CHUNKS, recording([], kill_at=0))
    sums = sums_of(path).read_bytes()
    sums_of(path).write_bytes(left)
    filled(journal(path), CHUNKS, recording([], kill_at=0))
    assert sums_of(path).read_bytes() == sums


def test_a_kill_between_a_chunk_and_its_sum(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    filled(journal(path), CHUNKS, made)
    sums = sums_of(path).read_bytes()
    sums_of(path).write_bytes(sums[: sums.rindex(b"\n", 0, -1) + 9])
    filled(journal(path), CHUNKS, recording([], kill_at=0))
    assert sums_of(path).read_bytes() == sums


def test_files_of_a_stage_under_way_are_held_to_what_was_noted(told: Told, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    place = run.iteration(1)
    seen: dict[Path, tuple[int, int, str]] = {}
    write_json(place.drops, {"tied": 1})
    filled(journal(place.prompts), CHUNKS, made)
    place.note(seen)
    place.drops.write_text('{"tied": 2}')
    with told.refused():
        run.hold_to_files()
    place.drops.unlink()  # what is missing is made again
    run.hold_to_files()
    place.prompts.write_bytes(flipped(place.prompts.read_bytes(), 20))
    with told.refused():
        run.hold_to_files()
    place.prompts.unlink()
    filled(journal(place.prompts), CHUNKS, made)
    write_json(place.drops, {"tied": 1})
    place.note(seen)
    run.hold_to_files()
    place.finish()
    assert sorted(file.name for file in place.path.iterdir()) == [
        "done.json", "drops.json", "prompts.jsonl",
    ]  # fmt: skip
    run.hold_to_files()


def test_metrics_of_which_a_bit_has_flipped_are_one_line(told: Told, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.add_metrics({"iteration": 1, "stage": "pairs", "pairs": 12})
    run.metrics.write_text(run.metrics.read_text().replace("12", "13"))
    with told.refused():
        run.read_metrics()


def test_a_result_that_no_done_json_knows_has_its_own_sum(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"win_rate": 0.5}, noted=True)
    assert read_json(path) == {"win_rate": 0.5}
    path.write_text(path.read_text().replace("0.5", "0.7"))
    with pytest.raises(UserError, match="is not the file that the run has written"):
        read_json(path)
    write_json(path, {"win_rate": 0.6}, noted=True)
    assert read_json(path) == {"win_rate": 0.6}


# --- files ------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"value": "old"})

    def no_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", no_disk)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"value": "new"})
    assert read_json(path) == {"value": "old"}


def test_an_atomic_write_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "one")
    write_atomically(tmp_path / "a.txt", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two"


def test_records_survive_the_way_through_a_file(tmp_path: Path) -> None:
    rows = [
        Candidate("p", "p#0", "two\nlines\u2028and a half ½", 5, "stop"),
        Candidate("p", "p#1", "", 0, "length"),
    ]
    write_records(tmp_path / "c.jsonl", rows)
    assert read_records(tmp_path / "c.jsonl", Candidate) == rows
    assert (tmp_path / "c.jsonl").read_bytes().count(b"\n") == 2


def test_unknown_keys_are_ignored_and_defaults_filled(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt_id": "1", "text": "t", "from_elsewhere": [1, 2]}\n')
    assert read_records(path, Prompt) == [Prompt("1", "t", "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": \n', ":3: not JSON"),
        (b'{"a": 1}\n[1]\n', ":2: expected a JSON object"),
        (b'{"a": 1}\nnull\n', ":2: expected a JSON object"),
        (b'{"a": "\xff"}\n', ": not UTF-8 text"),
        (b'{"a": 1}\n{"a": ["b \\uD800 c"]}\n', ":2: holds half a character"),
        (b'{"a": ' + 5000 * b"9" + b"}\n", ":1: not JSON (Exceeds the limit"),
        (b'{"a": ' + 99999 * b"[" + b"}\n", ":1: not JSON (maximum recursion depth"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert f"{path}{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_named(told: Told, tmp_path: Path) -> None:
    with told.refused():
        read_jsonl(tmp_path / "absent.jsonl")
    with told.refused():
        read_jsonl(tmp_path)


def test_a_file_from_windows_reads_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_an_escaped_character_in_two_halves_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}\n')
    assert read_jsonl(path) == [{"a": "\U0001f600"}]


def test_a_row_that_lacks_a_key_is_named(told: Told, tmp_path: Path) -> None:
    path = tmp_path / "eft.jsonl"
    row = {"prompt_id": "p", "prompt": "q", "response_id": "r", "response": "a"}
    path.write_text(json.dumps({**row, "rank": 0}) + "\n" + json.dumps(row) + "\n")
    with told.refused():  # quality and target are optional
        read_records(path, RankedReply)


# --- a run ------------------------------------------------------------------------------------


def recipe(**changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "test",
        "base": {"name": "some/base"},
        "data": {"dir": "nowhere"},
        "iterations": 2,
    }
    return recipe_from({**raw, **changes}, where="test")


def test_open_writes_what_the_run_is(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "out")
    run.open(recipe(seed=7), {"versions": {"python": "3"}, "command": "srlm-lite iterate"})
    facts = run.facts()
    assert facts["seed"] == 7
    assert facts["digest"] == recipe(seed=7).digest()
    assert facts["recipe"]["dpo"]["beta"] == 0.1
    assert facts["command"] == "srlm-lite iterate"
    assert recipe_from(facts["recipe"], where="run.json") == recipe(seed=7)


def test_the_same_configuration_goes_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    write_json(run.anchor.training, {})
    run.open(recipe(), {})
    assert run.anchor.training.is_file()


def test_more_iterations_and_another_name_are_the_same_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    run.open(recipe(iterations=5, description="longer"), {})
    assert run.facts()["recipe"]["iterations"] == 5


def test_another_configuration_is_refused_by_its_keys(told: Told, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    write_json(run.anchor.training, {})
    before = run.run_json.read_bytes()
    other = recipe(dpo={"beta": 0.2, "lora": {"rank": 4}}, seed=1)
    with told.refused() as caught:
        run.open(other, {})
    message = str(caught.value)
    assert all(f"{key} (" in message for key in ("dpo.beta", "dpo.lora.rank", "seed"))
    assert "rollout" not in message
    assert run.run_json.read_bytes() == before


def test_a_run_that_has_computed_nothing_may_still_be_another_one(
    told: Told, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    run.hold_to_base({"name": "wrong/base", "revision": "abc"})
    assert not run.is_begun
    run.open(recipe(seed=1), {})
    assert run.facts()["seed"] == 1
    run.hold_to_base({"name": "right/base", "revision": "def"})
    write_json(run.anchor.training, {})
    assert run.is_begun
    with told.refused():
        run.open(recipe(), {})


def test_what_a_run_leaves_that_found_a_mistake_before_it_learned_stands_in_nobodys_way(
    tmp_path: Path,
) -> None:
    """A target that the base does not have is met when the base is in memory, and has been read."""
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    run.hold_to_base({"name": "some/base", "revision": "abc"})
    run.tensorboard.mkdir()
    write_json(run.tracking, {})
    write_json(run.anchor.reading, {})
    (run.anchor.path / ".reading.json.tmp").write_text("{")
    run.add_metrics({"iteration": 0, "stage": "base"})
    (run.path / "notes.txt").write_text("mine")
    assert not run.is_begun
    run.glance(recipe(seed=1))
    run.open(recipe(seed=1), {})
    assert sorted(path.name for path in run.path.iterdir()) == ["notes.txt", "run.json"]


@pytest.mark.parametrize("work", [
    "anchor/eft_judgements.jsonl", "anchor/ift_only/adapter_model.safetensors",
    "anchor/adapter_model.safetensors", ".checkpoint/step_1/state.json", "iter_001/prompts.jsonl",
    "reward/head.safetensors", "compare/replies/a.jsonl",
])  # fmt: skip
def test_what_took_work_is_not_given_up_for_another_run(tmp_path: Path, work: str) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    (run.path / work).parent.mkdir(parents=True)
    (run.path / work).write_text("")
    with pytest.raises(UserError, match="another configuration"):
        run.open(recipe(seed=1), {})
    with pytest.raises(UserError, match="another configuration"):
        run.glance(recipe(seed=1))
    assert (run.path / work).is_file()


def test_a_glance_reads_no_file_of_a_finished_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    write_json(run.anchor.training, {})
    run.anchor.finish()
    run.anchor.training.write_text("harmed")
    run.glance(recipe())
    with pytest.raises(UserError, match="changed"):
        run.check(recipe())


def test_a_glance_finds_a_place_where_nothing_can_be_written(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """root may write everywhere: only what the system says of the place is put in its mouth."""
    place = tmp_path / "closed"
    place.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place)
    with told.refused():
        RunDir(place / "deep" / "out").glance(recipe())
    (tmp_path / "file").write_text("")
    with told.refused():
        RunDir(tmp_path / "file" / "out").glance(recipe())
    RunDir(tmp_path / "out").glance(recipe())
    assert not (tmp_path / "out").exists()


def test_of_many_differences_a_few_are_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    write_json(run.anchor.training, {})
    with pytest.raises(UserError) as caught:
        run.open(load_recipe("toy-meta"), {})
    message = str(caught.value)
    assert re.search(r"; and \d+ more\. ", message)
    assert message.count(" there, ") == 6


def files_in(place: Path) -> dict[str, str]:
    """Its files and what they hold, but for the lock and a draft that a kill has left."""
    there = (path for path in place.rglob("*") if path.is_file())
    found = (path for path in there if path.name != ".lock" and path.suffix != ".tmp")
    return {str(path.relative_to(place)): path.read_text() for path in found}


def a_run_with_work(place: Path) -> RunDir:
    run = RunDir(place)
    run.open(recipe(), {})
    (run.path / "note.txt").write_text("mine")
    for name in ("anchor", "iter_001"):
        (run.path / name).mkdir()
        (run.path / name / "prompts.jsonl").write_text(name)
    return run


def test_fresh_starts_over_and_drops_the_run_once_the_new_one_has_settled(tmp_path: Path) -> None:
    run = a_run_with_work(tmp_path / "out")
    with run.locked(), run.or_as_before():
        run.open(recipe(seed=1), {}, fresh=True)
        run.settle()
    assert sorted(files_in(run.path)) == ["note.txt", "run.json"]
    assert run.facts()["seed"] == 1


def test_a_new_run_that_fails_before_it_has_settled_gives_the_old_one_back(tmp_path: Path) -> None:
    run = a_run_with_work(tmp_path / "out")
    before = files_in(run.path)
    with pytest.raises(UserError), run.locked(), run.or_as_before():
        run.open(recipe(seed=1), {}, fresh=True)
        (run.path / "anchor").mkdir()
        assert not (run.path / "iter_001").exists()
        raise UserError("no such layer")
    assert files_in(run.path) == before
    assert not (run.path / ".before").exists()


def test_one_that_fails_later_is_the_run(tmp_path: Path) -> None:
    run = a_run_with_work(tmp_path / "out")
    with pytest.raises(UserError), run.locked(), run.or_as_before():
        run.open(recipe(seed=1), {}, fresh=True)
        run.settle()
        raise UserError("memory does not suffice")
    assert run.facts()["seed"] == 1


def test_an_interrupted_one_goes_on_and_the_last_whole_one_is_kept_until_one_settles(
    tmp_path: Path,
) -> None:
    run = a_run_with_work(tmp_path / "out")
    before = files_in(run.path)
    for seed in (1, 2):
        with pytest.raises(KeyboardInterrupt), run.locked(), run.or_as_before():
            run.open(recipe(seed=seed), {}, fresh=True)
            raise KeyboardInterrupt
    assert run.facts()["seed"] == 2
    with pytest.raises(UserError), run.locked(), run.or_as_before():
        run.open(recipe(seed=2), {})
        raise UserError("no such layer")
    assert files_in(run.path) == before


@pytest.mark.parametrize("moves", range(4))
@pytest.mark.parametrize("back", [False, True])
def test_what_was_killed_while_it_moved_a_run_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, back: bool
) -> None:
    """It has three entries to move; the last kill is behind them, before the new run is written."""
    run = a_run_with_work(tmp_path / "out")
    before = files_in(run.path)
    replace, done = Path.replace, [0]

    def killed(path: Path, target: Path) -> Path:
        if path.name.startswith(".run.json") or done[0] == moves:
            raise Killed
        done[0] += 1
        return replace(path, target)

    if back:
        run.open(recipe(seed=1), {}, fresh=True)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        if back:
            patched.setattr(Path, "rmdir", lambda path: killed(path, path))
        with pytest.raises(Killed), run.or_as_before():
            if back:
                raise UserError("no such layer")
            run.open(recipe(seed=1), {}, fresh=True)
    run.check(recipe(seed=1), fresh=True)  # what is asked before the lock is had
    with run.locked():
        assert files_in(run.path) == before


def test_a_run_killed_while_it_first_wrote_begins_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "out")
    with run.locked():
        (run.path / ".run.json.tmp").write_text('{"recipe": ')
    with run.locked():
        run.open(recipe(seed=7), {})
    assert run.facts()["seed"] == 7
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_of_other_files_is_left_alone(told: Told, tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with told.refused():
        RunDir(tmp_path).open(recipe(), {}, fresh=fresh)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / "run.json").exists()


def test_a_file_is_no_run_directory(told: Told, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with told.refused():
        RunDir(path).open(recipe(), {})
    with told.refused():
        RunDir(path).facts()


def test_a_lock_is_left_in_no_other_place(told: Told, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for place in (tmp_path, tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "out"):
        with told.refused(), RunDir(place).locked():
            raise AssertionError(place)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc, where none can be made")
def test_where_no_directory_can_be_made_there_is_no_run(told: Told) -> None:
    with (
        told.refused(),
        RunDir(Path("/proc/x")).locked(),
    ):
        raise AssertionError


@pytest.mark.parametrize("content", [
    "", "{", "[]", "5", '{"other": "tool"}', '{"recipe": {}}', '{"recipe": {}, "identity": {}}',
    '{"recipe": {}, "identity": {"base": {}}}', '{"recipe": {}, "identity": {"base": {"name": 1}}}',
])  # fmt: skip
def test_a_broken_or_foreign_run_json_is_one_line(told: Told, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with told.refused():
        RunDir(tmp_path).facts()
    with told.refused():
        RunDir(tmp_path).open(recipe(), {})


@pytest.mark.parametrize("form", [2, "two", None])
def test_a_run_of_a_later_version_is_refused_whatever_else_it_says(
    told: Told, tmp_path: Path, form: object
) -> None:
    run = RunDir(tmp_path)
    run.open(recipe(), {"versions": {"srlm-lite": "9.0"}})
    facts = read_json(run.run_json)
    assert facts["format"] == 1
    facts["recipe"]["dpo"]["of_tomorrow"] = True
    write_json(run.run_json, {**facts, "format": form})
    for ask in (
        run.facts,
        run.recipe,
        lambda: run.glance(recipe()),
        lambda: run.open(recipe(), {}),
    ):
        with told.refused():
            ask()
    del facts["format"], facts["recipe"]["dpo"]["of_tomorrow"]  # as of one from before
    write_json(run.run_json, facts)
    run.open(recipe(), {})


def test_a_run_json_that_contradicts_itself_is_refused(told: Told, tmp_path: Path) -> None:
    """A digit of its recipe or of its identity has flipped: each is there to check the other."""
    run = RunDir(tmp_path)
    run.open(recipe(), {})
    before = run.run_json.read_text()
    assert before.count('"beta": 0.1') == 2
    for text in (before.replace('"beta": 0.1', '"beta": 0.3', 1),
                 '"beta": 0.3'.join(before.rsplit('"beta": 0.1', 1))):  # fmt: skip
        run.run_json.write_text(text)
        with told.refused():
            run.facts()
    run.run_json.write_text(before)
    run.facts()


def test_iterations_are_counted_up_to_the_first_gap(told: Told, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number in (1, 2, 4):
        run.iteration(number).path.mkdir()
    run.iteration(1).finish()
    assert [place.number for place in run.iterations()] == [1, 2]
    assert run.iteration(12).path.name == "iter_012"
    with told.refused():
        run.last_done()
    run.iteration(4).path.rmdir()
    assert run.last_done() == 1
    assert RunDir(tmp_path / "absent").last_done() == 0


def test_a_run_does_not_go_on_over_a_gap(told: Told, tmp_path: Path) -> None:
    """What is made anew need not be what the iterations after it were made from."""
    run = RunDir(tmp_path / "run")
    run.open(recipe(), {})
    trainings = [run.anchor.training, *(run.iteration(t).delta_place.training for t in (1, 2))]
    for training in trainings:
        write_json(training, {})
        run.open(recipe(), {})
    for training in trainings[:2]:
        training.unlink()
        with told.refused():
            run.open(recipe(), {})
        write_json(training, {})
    trainings[2].unlink()  # nothing was made from that one
    run.open(recipe(), {})
    assert run.last_done() == 0
    shutil.rmtree(run.iteration(1).path)
    with told.refused():
        run.last_done()
    run.open(recipe(), {}, fresh=True)


def test_done_json_names_every_artefact_with_its_hash(told: Told, tmp_path: Path) -> None:
    place = RunDir(tmp_path).iteration(1)
    write_json(place.drops, {"tied": 1})
    (place.delta).mkdir()
    (place.delta / "adapter_model.safetensors").write_bytes(b"weights")
    (place.path / ".pairs.jsonl.tmp").write_text("left by a kill")
    assert not place.is_done
    place.finish(iteration=1, seconds=2.5, counts={"pairs": {"pairs": 9}})
    done = read_json(place.done)
    assert place.is_done
    assert done == {
        "iteration": 1,
        "seconds": 2.5,
        "counts": {"pairs": {"pairs": 9}},
        "sha256": {
            "delta/adapter_model.safetensors": hashlib.sha256(b"weights").hexdigest(),
            "drops.json": sha256_file(place.drops),
        },
    }
    place.done.write_text("{}")
    with told.refused():
        place.verify(place.drops)
    place.finish(iteration=1)
    assert "done.json" not in read_json(place.done)["sha256"]


# --- metrics ----------------------------------------------------------------------------------


def test_metrics_rows_come_back_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.read_metrics() == []
    rows = [{"iteration": 1, "stage": "pairs", "text": "½\n"}, {"iteration": 2, "stage": "delta"}]
    for row in rows:
        run.add_metrics(row)
    assert run.read_metrics() == rows
    assert stat.S_ISREG(run.metrics.stat().st_mode)


@pytest.mark.parametrize("content", [b"{oops\n", b"\xff\n", b"5\n", b"{}\n"])
def test_damaged_metrics_are_one_line(told: Told, tmp_path: Path, content: bytes) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_bytes(content)
    with told.refused():
        run.read_metrics()


@pytest.mark.parametrize("content", [None, b"{oops", b"\xff", b"[1]"])
def test_a_damaged_file_of_the_run_is_one_line(
    told: Told, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "eval.json"
    if content is not None:
        path.write_bytes(content)
    with told.refused() as caught:
        read_json(path)
    assert caught.value.where == str(path)


def test_metrics_go_on_after_a_cut_at_every_byte(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [{"iteration": 1, "stage": "pairs"}, {"iteration": 1, "stage": "½"}]
    more = {"iteration": 2, "stage": "next"}
    for row in rows:
        run.add_metrics(row)
    content, sums = run.metrics.read_bytes(), sums_of(run.metrics).read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(len(content) + 1):
        run.metrics.write_bytes(content[:cut])
        sums_of(run.metrics).write_bytes(sums)
        kept = rows[: (cut >= first) + (cut == len(content))]
        assert run.read_metrics() == kept
        run.add_metrics(more)
        assert run.read_metrics() == [*kept, more]


def test_two_processes_do_not_work_in_one_directory(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "out")
    with run.locked():
        code = (
            "from pathlib import Path; from srlm_lite.run.run import RunDir\n"
            f"with RunDir(Path({str(run.path)!r})).locked(): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        with pytest.raises(UserError, match="another srlm-lite is working here"):
            run.glance(recipe())
    assert other.returncode != 0
    assert "another srlm-lite is working here" in other.stderr
    run.glance(recipe())
    with run.locked():  # free again
        pass


def test_a_lock_alone_does_not_make_a_directory_look_used(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "out")
    with run.locked():
        run.open(load_recipe("tiny"), {})
        (run.path / "note.txt").write_text("mine")
        (run.path / "iter_001").mkdir()
        run.open(load_recipe("tiny", ["seed=1"]), {}, fresh=True)
        run.settle()
    # --fresh deletes what a run wrote, and nothing that somebody put beside it.
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "note.txt", "run.json"]


def test_a_row_with_a_value_of_another_type_is_named(told: Told, tmp_path: Path) -> None:
    path = tmp_path / "eft.jsonl"
    row = {"prompt_id": "p", "prompt": "q", "response_id": "r", "response": "a"}
    path.write_text(json.dumps({**row, "rank": 0}) + "\n" + json.dumps({**row, "rank": "first"}))
    with told.refused():
        read_records(path, RankedReply)


def test_a_run_stays_on_the_weights_it_was_begun_on(told: Told, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    source = {"name": "some/base", "kind": "hub", "revision": "abc"}
    run.hold_to_base(source)
    run.hold_to_base(source)
    with told.refused():
        run.hold_to_base({**source, "revision": "def"})
    with told.refused():
        run.hold_to_base({**source, "sha256": "0" * 64})
    run.base_json.write_text("{}")
    with told.refused():
        run.hold_to_base(source)


def test_a_run_goes_on_from_another_installation(told: Told, tmp_path: Path) -> None:
    """The shipped base lies elsewhere then; what was noted of it is where it lies now."""
    recipe, run = load_recipe("toy"), RunDir(tmp_path)
    run.open(recipe, {})
    write_json(run.anchor.training, {})
    here = str(recipes_dir())
    run.run_json.write_text(run.run_json.read_text().replace(here, "/another/place/recipes"))
    assert run.facts()["recipe"]["base"]["name"] == "/another/place/recipes/toy/base"
    run.open(recipe, {})
    assert run.facts()["recipe"]["base"]["name"] == recipe.base.name
    # As runs were noted before: by the whole path, and with how a server is reached.
    facts = run.facts()
    facts["identity"]["base"]["name"] = "/another/place/recipes/toy/base"
    facts["identity"]["openai"] |= {"timeout_s": 1.0, "retries": 0}
    write_json(run.run_json, facts)
    run.open(recipe, {})
    facts["identity"]["base"]["name"] = "/another/place/base"
    write_json(run.run_json, facts)
    with told.refused():
        run.open(recipe, {})
