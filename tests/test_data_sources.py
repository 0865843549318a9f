"""Where `data prepare` reads from, several sources at once, and what is held out of what."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Cli
from messages import Told
from preparing import Loaded, Row, measured, read, write

from srlm_lite.data.columns import Columns
from srlm_lite.data.prepare import Options, prepare
from srlm_lite.data.sources import read_source
from srlm_lite.data.text import words_of
from srlm_lite.errors import UserError

CASES = Path(
    os.environ.get(
        "SRLM_TEST_CASES", Path(__file__).resolve().parents[2] / "shared" / "cases" / "data"
    )
)
THINGS = ("bicycle", "cactus", "violin", "kettle", "tent", "lawn")
ROWS: list[Row] = [
    {"prompt": f"How do I look after a {thing}?", "response": text, "score": score}
    for thing in THINGS
    for text, score in ((f"Clean the {thing}, and see that it is dry.", 5), ("Buy another.", 1))
]


def as_text(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zipped(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("folder/rows.jsonl", content)
        packed.writestr("README.md", "What this is.")


def zstandard(content: bytes) -> bytes:
    import pyarrow

    # Two frames, as programs that append write them.
    half = len(content) // 2
    parts = (content[:half], content[half:])
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in parts)


def parquet(path: Path, rows: list[Row]) -> None:
    import pyarrow
    from pyarrow import parquet as files

    files.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)


def arrow(path: Path, rows: list[Row]) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


def saved(path: Path, rows: list[Row]) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(path)


def saved_splits(path: Path, rows: list[Row]) -> None:
    import datasets

    parts = {"train": rows, "test": rows[:2]}
    found = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    datasets.DatasetDict(found).save_to_disk(path)


def folder(path: Path, rows: list[Row]) -> None:
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("What this is.")
    (path / ".hidden.jsonl").write_text("{}")
    for number in range(3):
        name = f"train-{number:05}-of-00003.parquet"
        parquet(path / "data" / name, rows[4 * number : 4 * number + 4])
    parquet(path / "data" / "test-00000-of-00001.parquet", rows[:2])


KINDS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(as_text(ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "one_line.json": lambda path: path.write_text(json.dumps(ROWS)),
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "within.json": lambda path: path.write_text(json.dumps({"version": "1", "data": ROWS})),
    "within_pretty.json": lambda path: path.write_text(json.dumps({"data": ROWS}, indent=2)),
    "lines.json": lambda path: path.write_bytes(as_text(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(as_text(ROWS))),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(as_text(ROWS))),
    "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(as_text(ROWS))),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstandard(as_text(ROWS))),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.zip": lambda path: zipped(path, as_text(ROWS)),
    "rows.parquet": lambda path: parquet(path, ROWS),
    "rows.arrow": lambda path: arrow(path, ROWS),
    "saved": lambda path: saved(path, ROWS),
    "splits": lambda path: saved_splits(path, ROWS),
    "folder": lambda path: folder(path, ROWS),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    KINDS[name](tmp_path / "in" / name)
    expected = read(write(tmp_path / "rows.jsonl", ROWS), Options())
    found = read(str(tmp_path / "in" / name), Options())
    assert {key: rows for key, rows in found.rows().items() if key != "prompts.jsonl"} == {
        key: rows for key, rows in expected.rows().items() if key != "prompts.jsonl"
    }
    assert [one.text for one in found.prompts] == [one.text for one in expected.prompts]
    source = read_source(str(tmp_path / "in" / name))
    source.profile()
    assert source.count == (None if name == "rows.arrow" else len(ROWS))


def separated(path: Path, mark: str) -> str:
    lines = [["prompt_id", "prompt", "response", "score"]]
    lines += [["007", "Is it so?", f'"NA{mark} or so"', "5"], ["007", "Is it so?", "NA", "1"]]
    lines += [["008", '"In two\nlines, so?"', "null", "3"], ["008", "", "nothing", ""]]
    path.write_text("\n".join(mark.join(line) for line in lines) + "\n")
    return str(path)


@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ","), ("rows.tsv", "\t"), ("a.csv", ";")])
def test_cells_stay_as_they_are_written(tmp_path: Path, name: str, mark: str) -> None:
    """007 is no number, and NA and null are replies as good as others."""
    found = read(separated(tmp_path / name, mark), Options(ift_share=0.0, eval_share=0.0))
    assert [(row.prompt_id, row.response, row.quality) for row in found.seed.eft_train] == [
        ("007", f"NA{mark} or so", 5.0),
        ("007", "NA", 1.0),
    ]
    [one] = found.seed.ift
    assert (one.prompt_id, one.prompt, one.response) == ("008", "In two\nlines, so?", "null")


@pytest.mark.parametrize("text", ["2024-05-01", "2024-05-01T10:00:00Z"])
def test_a_text_that_looks_like_a_date_stays_one(tmp_path: Path, text: str) -> None:
    rows = [{"prompt": "When was it?", "response": text, "prompt_id": 2**70}]
    [one] = read(write(tmp_path / "r.jsonl", rows), Options()).seed.ift
    assert (one.response, one.prompt_id) == (text, str(2**70))


def test_dialogues_of_an_older_dataset(tmp_path: Path) -> None:
    """A sequence of objects is an object of sequences to `datasets`, in its files too."""
    import datasets

    said = {"role": ["user", "assistant"], "content": ["How do I look after it?", "Wash it."]}
    other = {**said, "content": [said["content"][0], "No."]}
    text = datasets.Value("string")
    turns = datasets.Sequence({"role": text, "content": text})
    made = datasets.Dataset.from_dict(
        {"chosen": [said], "rejected": [other]},
        features=datasets.Features({"chosen": turns, "rejected": turns}),
    )
    made.to_parquet(tmp_path / "rows.parquet")
    found = read(str(tmp_path / "rows.parquet"), Options(ift_share=0.0))
    assert [(row.prompt, row.response) for row in found.seed.eft_train] == [
        (said["content"][0], "Wash it."),
        (said["content"][0], "No."),
    ]


def test_messages_whose_keys_differ_in_a_table(tmp_path: Path) -> None:
    """Parquet fills in what a message lacks: null is not said."""
    turns: list[Row] = [{"role": "user", "content": "How do I look after it?", "name": "a"}]
    turns += [{"role": "assistant", "content": "Wash it.", "tool_calls": None}]
    parquet(tmp_path / "rows.parquet", [{"messages": turns, "n_turns": 2}])
    assert [one.response for one in read(str(tmp_path / "rows.parquet"), Options()).seed.ift] == [
        "Wash it."
    ]


def test_a_column_that_comes_late_is_not_lost(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"instruction": f"Say how to look after it, {n}.", "output": "Wash it."}
        for n in range(3000)
    ]
    rows += [{"instruction": "Say it.", "input": "a kettle", "output": "Descale it."}]
    found = read(write(tmp_path / "rows.jsonl", rows), Options())
    assert "Say it.\n\na kettle" in {one.prompt for one in found.seed.ift}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.json", b'[{"prompt": "Why?"}, {"prompt": "Wh'),
        ("open.json", b'[{"prompt": "Why is it?"},\n{"prompt": "Where?"}\n'),
        ("inner.json", b'[{"prompt": "Why?"}, 3]'),
        ("twice.csv", b"prompt,prompt\na,b\n"),
        ("ragged.csv", b"prompt,response\nWhy?,Because,it is\n"),
        ("cut.jsonl.zst", zstandard(as_text(ROWS))[:-3]),
        ("cut.jsonl.xz", lzma.compress(as_text(ROWS))[:-9]),
        ("plain.zip", b"prompt"),
        ("latin.csv", "prompt\ncafé\n".encode("latin-1")),
        ("table.parquet.gz", b"x"),
        ("head.csv", b"prompt,response\n"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_file_that_cannot_be_read(told: Told, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with told.refused():
        read(str(tmp_path / name), Options())


def test_a_folder_that_says_nothing_clear(told: Told, tmp_path: Path) -> None:
    for name in ("empty", "mixed", "splits"):
        (tmp_path / name).mkdir()
    write(tmp_path / "mixed" / "a.jsonl", ROWS)
    (tmp_path / "mixed" / "b.csv").write_text("prompt\nWhy?\n")
    write(tmp_path / "splits" / "test.jsonl", ROWS)
    for name in ("empty", "mixed", "splits"):
        with told.refused():
            read(str(tmp_path / name), Options())
    found = read(str(tmp_path / "splits"), Options(hub_split="test"))
    assert found.reply_ledger.seen == len(ROWS)
    saved_splits(tmp_path / "saved", ROWS)
    with told.refused():
        read(str(tmp_path / "saved"), Options(hub_split="validation"))


# Several sources


def texts(found: Loaded, name: str) -> set[str]:
    return {getattr(row, "prompt", "") or row.text for row in found.files.get(name, [])}


def four(tmp_path: Path, **more: Any) -> Loaded:
    """A source for each part, each in another shape."""
    dialogues = [
        {"messages": [{"role": "user", "content": f"Tell me of a {thing}."},
                      {"role": "assistant", "content": f"A {thing} is fine."}]}
        for thing in THINGS
    ]  # fmt: skip
    pairs = [
        {"question": f"How is a {thing} made?", "chosen": "By hand.", "rejected": "Dunno"}
        for thing in THINGS
    ]
    options = {
        "ift": write(tmp_path / "a.jsonl", dialogues),
        "ranked": write(tmp_path / "b.jsonl", ROWS),
        "eval": write(tmp_path / "d.jsonl", pairs),
    }
    lines = [f"What is a {thing} good for?" for thing in (*THINGS, *THINGS)]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    return read(None, Options(prompts=str(tmp_path / "c.txt"), **{**options, **more}))


def test_each_part_from_a_source_of_its_own(tmp_path: Path) -> None:
    found = four(tmp_path)
    assert texts(found, "ift.jsonl") == {f"Tell me of a {thing}." for thing in THINGS}
    assert texts(found, "eft_train.jsonl") == {row["prompt"] for row in ROWS}
    assert texts(found, "eft_eval.jsonl") == {f"How is a {thing} made?" for thing in THINGS}
    assert len(found.prompts) == 6
    assert "b: guessed: score from column 'score'" in found.notes
    ledger = found.reply_ledger
    assert ledger.seen == ledger.kept == 6 + 12 + 12 and not ledger.dropped


def test_prompts_to_hold_out(tmp_path: Path) -> None:
    held = [{"prompt": "tell me: of a  KETTLE!"}, {"prompt": "What is a lawn good for"}]
    found = four(tmp_path, eval=write(tmp_path / "e.jsonl", held))
    assert texts(found, "eval_prompts.jsonl") == {row["prompt"] for row in held}
    # The same words, whatever their case, punctuation and spaces, are not learned from.
    assert len(texts(found, "ift.jsonl")) == 5 and len(found.prompts) == 5
    assert found.reply_ledger.drops["held_out"] == 1
    assert found.prompt_ledger.drops["held_out"] == 2  # its line comes twice
    # Nothing else is given for the judge, so a share of the ranked prompts is held out.
    assert found.seed.eft_eval


def test_ranked_replies_alone_are_shared_out(tmp_path: Path) -> None:
    source = write(tmp_path / "b.jsonl", ROWS)
    assert read(None, Options(ranked=source)).files == read(source, Options()).files


def test_answers_of_ranked_replies(tmp_path: Path) -> None:
    source = write(tmp_path / "b.jsonl", ROWS)
    for found in (read(None, Options(ift=source)), read(source, Options(format="ift"))):
        assert texts(found, "ift.jsonl") == {row["prompt"] for row in ROWS}
        assert not found.seed.eft_train


def test_ids_of_two_sources_stay_apart(tmp_path: Path) -> None:
    def numbered(name: str) -> str:
        rows = [{**row, "prompt": f"{name} {row['prompt']}", "prompt_id": number // 2}
                for number, row in enumerate(ROWS)]  # fmt: skip
        return write(tmp_path / f"{name}.jsonl", rows)

    options = Options(ranked=numbered("and"), ift_share=0.0, eval_share=0.0)
    found = read(numbered("first"), options)
    ids = {(row.prompt_id, row.prompt) for row in found.seed.eft_train}
    assert len(ids) == len({prompt_id for prompt_id, _ in ids}) == 12


def test_near_copies_of_a_held_out_prompt_are_not_learned_from(tmp_path: Path) -> None:
    rows = [
        {**row, "prompt": row["prompt"].replace(" a ", mark)}
        for mark in (" a ", ", a ", " - A - ")
        for row in ROWS
    ]
    found = read(write(tmp_path / "r.jsonl", rows), Options())
    held = {words_of(row.prompt) for row in found.seed.eft_eval}
    assert held
    learned = [*found.seed.ift, *found.seed.eft_train]
    assert not held & {words_of(row.prompt) for row in learned}
    assert not held & {words_of(prompt.text) for prompt in found.prompts}


def test_a_column_is_named_for_the_source_that_has_it(told: Told, tmp_path: Path) -> None:
    rows = [{"ask": f"What of {n}?", "say": str(n), "stars": n} for n in range(9)]
    source = write(tmp_path / "r.jsonl", rows)
    columns = Columns(prompt="ask", response="say", score="stars")
    with pytest.raises(UserError, match=r"a\.jsonl: no column 'ask'"):
        four(tmp_path, columns=columns)
    found = four(tmp_path, ranked=source, columns=columns)
    assert len(found.seed.ift) == 6
    with told.refused():  # pairs are in an order already
        pairs = [{"prompt": "Why is it?", "chosen": "a", "rejected": "b", "stars": 3}]
        read(write(tmp_path / "p.jsonl", pairs), Options(columns=Columns(score="stars")))
    with told.refused():
        read(source, Options(columns=columns, ignore=("star",)))
    with told.refused():
        read(None, Options())


def test_the_account_of_several_sources_fits_a_terminal(cli: Cli, tmp_path: Path) -> None:
    four(tmp_path)
    given = {"--ift": "a.jsonl", "--ranked": "b.jsonl", "--prompts": "c.txt", "--eval": "d.jsonl"}
    os.chdir(tmp_path)
    words = [word for pair in given.items() for word in pair]
    done = cli("data", "prepare", *words, "--out", "out")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "4 sources -> out",
        "  ift     a.jsonl (dialogues)",
        "  ranked  b.jsonl (graded)",
        "  eval    d.jsonl (pairs)",
        "  prompts c.txt (prompts)",
    ]
    assert lines[-2].startswith("next: srlm-lite data show out")
    assert lines[-1] == "then: srlm-lite iterate --set data.dir=out --adapters out/mine"
    assert max(map(len, (*lines, *done.stderr.splitlines()))) <= 80


def test_what_was_held_out_before_goes_with_the_rest(tmp_path: Path) -> None:
    source, out = write(tmp_path / "b.jsonl", ROWS), tmp_path / "out"
    held = write(tmp_path / "e.jsonl", [{"prompt": "What is a lawn good for"}])
    prepare(source, out, Options(eval=held))
    assert (out / "eval_prompts.jsonl").is_file()
    prepare(source, out, Options(), force=True)
    assert not (out / "eval_prompts.jsonl").exists()


def test_an_array_in_one_long_line(tmp_path: Path) -> None:
    """It is read piece by piece, wherever the pieces end."""
    rows = [{"prompt": f"What is {n}?", "response": "word " * n, "score": n} for n in range(1, 400)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert list(read_source(str(tmp_path / "rows.json")).rows) == rows
    (tmp_path / "rows.json").write_text(json.dumps(rows).replace('"What is 300?"', "oops"))
    with pytest.raises(UserError, match=r"item 300: not JSON \(Expecting value\)"):
        list(read_source(str(tmp_path / "rows.json")).rows)


def test_nothing_stays_behind_when_it_fails(tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", [*ROWS, {"prompt": ["Why?"], "response": "a", "score": 1}])
    (tmp_path / "r.jsonl").open("a").write("{oops\n")
    with pytest.raises(UserError):
        prepare(source, tmp_path / "out", Options())
    with pytest.raises(UserError):
        prepare(write(tmp_path / "q.jsonl", ROWS[:1]), tmp_path / "x" / "out", Options(lang="x",
                given_scores=True))  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.jsonl", "r.jsonl"]


# Size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Eight times the rows take no more than what the database itself keeps."""
    few, many = measured(4_000, tmp_path), measured(32_000, tmp_path)
    assert (few["rows"], many["rows"]) == (4_000, 32_000)
    assert few["libraries"] == many["libraries"] == []
    # At 1,000,000 rows it is not much more: the database keeps 64 MB of what it has in memory.
    assert many["file_mb"] > 30 and many["peak_mb"] < 250
    assert many["peak_mb"] - few["peak_mb"] < 110


# The cases


def case(name: str, **options: Any) -> Loaded:
    return read(str(CASES / name), Options(ift_share=0.0, eval_share=0.0, **options))


@pytest.mark.skipif(
    not CASES.is_dir(), reason="no cases: set SRLM_TEST_CASES to a directory that holds them"
)
@pytest.mark.parametrize(
    ("name", "replies", "is_conversation"),
    [
        ("alpaca_scored.jsonl", 2, False),
        ("grouped_replies.jsonl", 3, False),
        ("completions_list.jsonl", 2, False),
        ("system_column.jsonl", 2, True),
        ("pairs_of_one_prompt.jsonl", 4, False),
        ("messages_sft.jsonl", 0, False),
        ("ranked.csv", 2, False),
        ("array_pretty.json", 2, False),
        ("system_message.jsonl", 2, True),
        ("multi_turn_pairs.jsonl", 2, True),
    ],
)
def test_cases(name: str, replies: int, is_conversation: bool) -> None:
    found = case(name)
    if not replies:
        assert len(found.seed.ift) == 6 and not found.seed.eft_train
        return
    rows = found.seed.eft_train
    by_prompt: dict[str, list[int]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row.rank)
        assert bool(row.messages) is is_conversation
    order = [0, 1, 1, 1] if replies == 4 else list(range(replies))
    assert list(by_prompt.values()) == [order] * 6
    if "system" in name:
        assert all((row.messages or ({},))[0].get("role") == "system" for row in rows)
    if name.startswith("alpaca"):
        assert "Say how to look after this thing.\n\na kettle" in by_prompt
