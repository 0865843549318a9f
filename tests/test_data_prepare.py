"""`srlm-lite data prepare`: what is kept, what is dropped and why, and what users get wrong."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
import types
import unicodedata
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import Told
from preparing import Loaded, Row, Seed, read, write
from typer.testing import CliRunner

from srlm_lite.cli.data import app
from srlm_lite.data.columns import Columns
from srlm_lite.data.ledger import REASONS, Ledger
from srlm_lite.data.oasst import read_trees
from srlm_lite.data.prepare import Options, prepare
from srlm_lite.data.ranked import score_target
from srlm_lite.data.row_store import RowStore
from srlm_lite.data.sources import DataSource, read_source
from srlm_lite.data.split import PlacedReply, RankedPrompt, Sharing
from srlm_lite.data.text import is_garbled, is_repetitive, normalised, prompt_problem
from srlm_lite.errors import UserError
from srlm_lite.progress import Silent, Task
from srlm_lite.records import Instruction, Prompt, RankedReply
from srlm_lite.run.files import read_records
from srlm_lite.stages.seed_data import read_ranked

DATA = Path(
    os.environ.get("SRLM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="no real data: set SRLM_TEST_DATA to a directory that holds it"
)


def tree(
    name: str,
    *ranks: int | None,
    state: str = "ready_for_export",
    approved: bool | None = True,
    **root: Any,
) -> Row:
    """A message tree with one reply for each rank, each with a second turn below it."""

    def message(message_id: str, parent_id: str | None, **fields: Any) -> Row:
        text = f"The text of message {message_id} is here"
        defaults = {"text": text, "lang": "en", "rank": None, "deleted": False, "replies": []}
        ids = {"message_id": message_id, "parent_id": parent_id, "tree_state": None}
        role = "prompter" if parent_id is None or message_id.endswith("u") else "assistant"
        return {**ids, "role": role, **defaults, **fields}

    replies = [
        message(
            f"{name}-{number}",
            name,
            rank=rank,
            replies=[message(f"{name}-{number}u", f"{name}-{number}")],
        )
        for number, rank in enumerate(ranks)
    ]
    prompt = message(name, None, replies=replies, review_result=approved, **root)
    return {"message_tree_id": name, "tree_state": state, "prompt": prompt}


def flattened(trees: list[Row]) -> list[Row]:
    """The rows of the flat table on the Hub, in no helpful order."""
    rows: list[Row] = []

    def add(message: Row, whole: Row) -> None:
        ids = {key: whole[key] for key in ("message_tree_id", "tree_state")}
        rows.append({**message, **ids})
        del rows[-1]["replies"]
        for reply in message["replies"]:
            add(reply, whole)

    for whole in trees:
        add(whole["prompt"], whole)
    random.Random(0).shuffle(rows)
    return rows


def scored(prompt: str, *scores: Any, **more: Any) -> list[Row]:
    return [
        {"prompt": prompt, "response": f"Reply {number} to {prompt}", "score": score, **more}
        for number, score in enumerate(scores)
    ]


def shared_out(prompts: list[RankedPrompt], ledger: Ledger, **shares: float) -> Seed:
    with RowStore() as store:
        sharing = Sharing(store, ledger)
        sharing.add(prompts)
        sharing.decide(**shares)
        parts = (list(sharing.ranked(part)) for part in ("eft_train", "eft_eval"))
        return Seed(list(sharing.instructions()), *parts)


def check_accounts(prepared: Loaded) -> None:
    """Every row is kept or dropped, for a reason that is explained; no prompt serves twice."""
    rows, seed = prepared.rows(), prepared.seed
    for ledger in (prepared.reply_ledger, prepared.prompt_ledger):
        assert ledger.seen == ledger.kept + ledger.dropped
        assert set(ledger.drops) <= set(REASONS)
    assert prepared.reply_ledger.kept == sum(
        len(part) for part in (seed.ift, seed.eft_train, seed.eft_eval)
    )
    assert prepared.prompt_ledger.kept == len(rows["prompts.jsonl"])
    ift, train, evaluation = (
        {normalised(row.prompt) for row in part}
        for part in (seed.ift, seed.eft_train, seed.eft_eval)
    )
    assert not ift & train and not ift & evaluation and not train & evaluation
    prompts = [normalised(prompt.text) for prompt in prepared.prompts]
    assert len(prompts) == len(set(prompts))
    assert not set(prompts) & (train | evaluation)
    by_prompt: dict[str, set[int]] = {}
    for row in (*seed.eft_train, *seed.eft_eval):
        by_prompt.setdefault(row.prompt_id, set()).add(row.rank)
    assert all(ranks == set(range(len(ranks))) and len(ranks) > 1 for ranks in by_prompt.values())


# Open Assistant trees


def test_trees_are_shared_out_as_in_the_paper(tmp_path: Path) -> None:
    trees = [tree(f"many{number}", 1, 0, 2) for number in range(8)] + [tree("one", 0)]
    prepared = read(write(tmp_path / "t.jsonl", trees), Options())
    check_accounts(prepared)
    # Half of the 8 with an order go to IFT, a quarter of the other 4 are held out; a prompt
    # with a single reply can only go to IFT.
    assert prepared.format == "oasst-trees"
    assert len(prepared.seed.ift) == 5
    assert len(prepared.seed.eft_train) == 3 * 3
    assert len(prepared.seed.eft_eval) == 1 * 3
    for row in prepared.seed.ift:
        number = 0 if row.prompt_id == "one" else 1
        assert row.response == f"The text of message {row.prompt_id}-{number} is here"
    assert [row.rank for row in prepared.seed.eft_eval] == [0, 1, 2]
    # 9 trees: 9 * 1 second turns of 3 or 1 replies; 4 IFT prompts leave 2 replies each.
    assert prepared.reply_ledger.drops == {"later_turn": 25, "not_best": 8}
    assert prepared.prompt_ledger.drops == {"in_eft": 4}


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ({"deleted": True}, "deleted"),
        ({"lang": "es"}, "other_language"),
        ({"text": "  "}, "empty"),
        ({"text": "What \x02 is this thing?"}, "garbled"),
        ({"state": "aborted_low_grade"}, "not_approved"),
        ({"state": "prompt_lottery_waiting", "approved": None}, "not_approved"),
        ({"state": "growing", "approved": False}, "not_approved"),
    ],
)
def test_a_bad_root_drops_its_tree(tmp_path: Path, root: Row, reason: str) -> None:
    trees = [tree("good", 0, 1), tree("bad", 0, 1, **root)]
    prepared = read(write(tmp_path / "t.jsonl", trees), Options(ift_share=1.0))
    check_accounts(prepared)
    assert prepared.prompt_ledger.drops == {reason: 1}
    assert prepared.reply_ledger.drops == {reason: 2, "later_turn": 4, "not_best": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"deleted": True}, "deleted"),
        ({"lang": "es"}, "other_language"),
        ({"rank": None}, "unranked"),
        ({"rank": float("nan")}, "unranked"),
        ({"text": ""}, "empty"),
        ({"text": "broken \ufffd text"}, "garbled"),
        ({"text": "a lone surrogate \ud83d here"}, "garbled"),
        ({"text": "The text of message t-0 is here"}, "duplicate"),
    ],
)
def test_a_bad_reply_is_dropped(tmp_path: Path, change: Row, reason: str) -> None:
    whole = tree("t", 0, 1, 2)
    whole["prompt"]["replies"][2].update(change)
    prepared = read(write(tmp_path / "t.jsonl", [whole]), Options(ift_share=0.0))
    check_accounts(prepared)
    assert prepared.reply_ledger.drops == {reason: 1, "later_turn": 3}
    assert len(prepared.seed.eft_train) == 2


def test_without_its_first_ranked_reply_a_prompt_is_no_ift(tmp_path: Path) -> None:
    ordered, single = tree("ordered", 1, 2), tree("single", 1)
    prepared = read(write(tmp_path / "t.jsonl", [ordered, single]), Options(ift_share=1.0))
    check_accounts(prepared)
    assert not prepared.seed.ift
    assert [row.rank for row in prepared.seed.eft_train] == [0, 1]
    assert prepared.reply_ledger.drops["no_rank_0"] == 1


def test_prompts_come_from_unfinished_trees_first(tmp_path: Path) -> None:
    trees = [tree("ready", 0), tree("waiting", state="prompt_lottery_waiting")]
    prepared = read(write(tmp_path / "t.jsonl", trees), Options())
    check_accounts(prepared)
    assert [prompt.prompt_id for prompt in prepared.prompts] == ["waiting", "ready"]
    assert prepared.prompts[0].source == "t"


def test_flat_rows_give_what_trees_give(tmp_path: Path) -> None:
    trees = [
        *(tree(f"many{number}", 0, 1, None) for number in range(6)),
        tree("foreign", 0, 1, lang="de"),
        tree("waiting", state="prompt_lottery_waiting"),
    ]
    nested = read(write(tmp_path / "trees.jsonl", trees), Options())
    (tmp_path / "flat").mkdir()
    flat = read(write(tmp_path / "flat" / "trees.jsonl", flattened(trees)), Options())
    check_accounts(flat)
    assert flat.format == nested.format == "oasst-trees"
    assert flat.rows() == nested.rows()
    assert flat.reply_ledger == nested.reply_ledger
    assert flat.prompt_ledger == nested.prompt_ledger


def test_messages_that_come_twice_or_hang_in_the_air() -> None:
    rows = flattened([tree("a", 0, 1)])
    lonely = {**rows[0], "message_id": "lonely", "parent_id": "gone"}
    replies, prompts = Ledger(), Ledger()
    source = DataSource("x", "x", [*rows, *rows, lonely])
    ranked, _ = read_trees(source, lang="en", replies=replies, prompts=prompts)
    assert len(ranked[0].replies) == 2
    # The tree has two replies and two second turns, each of which comes twice.
    assert replies.drops == {"duplicate": 4, "later_turn": 2, "orphan": 1}
    assert prompts.drops == {"duplicate": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"tree_state": ["ready_for_export"]},
        {"prompt": {"replies": 5}},
        {"prompt": {"replies": {"a": 1}}},
    ],
)
def test_a_tree_whose_parts_are_of_another_type(told: Told, tmp_path: Path, change: Row) -> None:
    good, bad = tree("good", 0, 1), tree("bad", 0, 1)
    bad |= {**change, "prompt": {**bad["prompt"], **change.get("prompt", {})}}
    with told.refused():
        read(write(tmp_path / "t.jsonl", [good, bad]), Options())


@pytest.mark.parametrize("parent", [["t"], 5])
def test_a_parent_that_is_no_id(told: Told, tmp_path: Path, parent: Any) -> None:
    rows = flattened([tree("t", 0)])
    rows[1]["parent_id"] = parent
    with told.refused():
        read(write(tmp_path / "t.jsonl", rows), Options())


# Ranked and scored replies


def test_scores_become_dense_ranks_with_ties(tmp_path: Path) -> None:
    rows = scored("Which one is best?", 0.5, 0.9, 0.5, "0.1", None, "n/a", True, float("nan"))
    prepared = read(write(tmp_path / "r.jsonl", rows), Options(ift_share=0.0))
    check_accounts(prepared)
    assert [(row.rank, row.quality) for row in prepared.seed.eft_train] == [
        (0, 0.9),
        (1, 0.5),
        (1, 0.5),
        (2, 0.1),
    ]
    assert prepared.reply_ledger.drops == {"no_score": 4}


def test_a_rank_column_goes_before_scores_and_lower_is_better(tmp_path: Path) -> None:
    rows = [{**row, "rank": rank} for row, rank in zip(scored("Which?", 9, 1), (2, 1), strict=True)]
    prepared = read(write(tmp_path / "r.jsonl", rows), Options(ift_share=0.0))
    assert [(row.rank, row.quality) for row in prepared.seed.eft_train] == [(0, 1.0), (1, 9.0)]
    by_score = Options(ift_share=0.0, columns=Columns(score="score"))
    prepared = read(write(tmp_path / "r.jsonl", rows), by_score)
    assert [(row.rank, row.quality) for row in prepared.seed.eft_train] == [(0, 9.0), (1, 1.0)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": " "}, "empty"),
        ({"prompt": None}, "empty"),
        ({"response": ""}, "empty"),
        ({"response": "nul \x00 here"}, "garbled"),
        ({"lang": "fr"}, "other_language"),
        ({"score": None}, "no_score"),
        ({"target": "No score at all"}, "bad_target"),
        ({"target": "Score: 3 it is, I think"}, "bad_target"),
        ({"response": "Reply 0 to Which?"}, "duplicate"),
    ],
)
def test_a_bad_row_is_dropped(tmp_path: Path, change: Row, reason: str) -> None:
    rows = scored("Which?", 3, 2, 1, target="Good.\nScore: 2", lang="en")
    rows[2].update(change)
    prepared = read(write(tmp_path / "r.jsonl", rows), Options(ift_share=0.0))
    check_accounts(prepared)
    assert prepared.reply_ledger.drops == {reason: 1}
    assert [row.target for row in prepared.seed.eft_train] == ["Good.\nScore: 2"] * 2


def test_one_text_under_two_ids_is_one_prompt(tmp_path: Path) -> None:
    rows = scored("Which one?", 1, 2, prompt_id="b") + scored("which  one", 1, prompt_id="a")
    prepared = read(write(tmp_path / "r.jsonl", rows), Options(ift_share=0.0))
    check_accounts(prepared)
    assert {row.prompt_id for row in prepared.seed.eft_train} == {"b"}
    assert prepared.reply_ledger.drops == {"duplicate": 1}


def test_one_id_for_two_prompts_is_refused(told: Told, tmp_path: Path) -> None:
    rows = scored("Which one?", 1, prompt_id="a") + scored("What else?", 1, prompt_id="a")
    with told.refused():
        read(write(tmp_path / "r.jsonl", rows), Options())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        # Counted anew for each prompt, as numbers.
        ((0, 1, 0, 1), {"a-0", "a-1", "b-0", "b-1"}),
        ((0, 1, 2, 3), {"0", "1", "2", "3"}),
        # Two replies to one prompt share theirs, which the prompt's id does not change.
        (("x", "x", "x", "y"), None),
    ],
)
def test_ids_of_replies_are_unique_over_the_file(
    tmp_path: Path, ids: tuple[Any, ...], expected: set[str] | None
) -> None:
    """A data directory in which two replies share an id is one that no run reads."""
    rows = scored("Which is it?", 1, 2, prompt_id="a") + scored("What is it?", 1, 2, prompt_id="b")
    rows = [{**row, "response_id": name} for row, name in zip(rows, ids, strict=True)]
    source = write(tmp_path / "r.jsonl", rows)
    prepare(source, tmp_path / "data", Options(ift_share=0.0, eval_share=0.0))
    groups = read_ranked(tmp_path / "data" / "eft_train.jsonl", None)
    found = {row.response_id for group in groups for row in group}
    assert found == expected if expected else len(found) == 4
    best = {group[0].prompt_id: group[0].response for group in groups}
    assert best == {"a": "Reply 1 to Which is it?", "b": "Reply 1 to What is it?"}


def test_a_row_that_comes_twice_leaves_the_ids_as_they_are(tmp_path: Path) -> None:
    rows = [{**row, "response_id": f"r{n}"} for n, row in enumerate(scored("Which?", 1, 2))]
    prepared = read(write(tmp_path / "r.jsonl", [*rows, rows[0]]), Options(ift_share=0.0))
    check_accounts(prepared)
    assert [row.response_id for row in prepared.seed.eft_train] == ["r1", "r0"]


@pytest.mark.parametrize("said", [None, ""])
def test_a_row_that_says_no_language_is_in_any(tmp_path: Path, said: str | None) -> None:
    rows = scored("Which?", 3, 2, lang=said)
    assert read(write(tmp_path / "r.jsonl", rows), Options()).reply_ledger.drops["not_best"] == 1
    prompts = read(write(tmp_path / "p.jsonl", [{"text": "Which is it?", "lang": said}]), Options())
    assert [prompt.text for prompt in prompts.prompts] == ["Which is it?"]


def test_other_column_names(tmp_path: Path) -> None:
    rows = [{"ask": "Which one?", "say": f"Reply {n}", "stars": n, "who": f"w{n}"} for n in (1, 2)]
    columns = Columns(prompt="ask", response="say", score="stars", id="who")
    prepared = read(write(tmp_path / "r.jsonl", rows), Options(ift_share=0.0, columns=columns))
    assert prepared.format == "ranked"
    assert [row.response_id for row in prepared.seed.eft_train] == ["w2", "w1"]
    # Nothing was guessed. The one prompt is EFT's, so none is left for anything else.
    assert prepared.notes == [
        f"{name} is empty" for name in ("ift.jsonl", "eft_eval.jsonl", "prompts.jsonl")
    ]


def test_guesses_are_said(tmp_path: Path) -> None:
    prepared = read(write(tmp_path / "r.jsonl", scored("Which one?", 1, 2)), Options())
    assert prepared.notes[:3] == [
        f"guessed: {name} from column '{name}'" for name in ("prompt", "response", "score")
    ]


def test_given_scores_become_targets(tmp_path: Path) -> None:
    rows = scored("Which one?", 0.0, 0.5, 1.0, 0.29)
    prepared = read(write(tmp_path / "r.jsonl", rows), Options(ift_share=0.0, given_scores=True))
    # Times 5, halves up: 5, 2.5 -> 3, 1.45 -> 1, 0.
    assert [row.target for row in prepared.seed.eft_train] == [
        "Score: 5",
        "Score: 3",
        "Score: 1",
        "Score: 0",
    ]


def test_score_targets_reach_both_ends_of_another_range(told: Told) -> None:
    limits: Any = {"score_range": (1.0, 10.0), "target_range": (1, 4)}
    assert [score_target(score, **limits) for score in (1, 4, 10)] == [
        "Score: 1",
        "Score: 2",
        "Score: 4",
    ]
    with told.refused():
        score_target(11, **limits)


USER = {"role": "user", "content": "Which one is it?"}
GOOD, POOR = ({"role": "assistant", "content": text} for text in ("The red one.", "Dunno."))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which one is it?", "chosen": "The red one.", "rejected": "Dunno."},
        {"chosen": [USER, GOOD], "rejected": [USER, POOR]},
        {"prompt": "Which one is it?", "chosen": [USER, GOOD], "rejected": [USER, POOR]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]},
        {
            "chosen": "\n\nHuman: Which one is it?\n\nAssistant: The red one.",
            "rejected": "\n\nHuman: Which one is it?\n\nAssistant: Dunno.",
        },
    ],
)
def test_pairs_in_every_dress(tmp_path: Path, row: Row) -> None:
    prepared = read(write(tmp_path / "p.jsonl", [row]), Options(ift_share=0.0))
    check_accounts(prepared)
    assert prepared.format == "ranked"
    assert [(row.prompt, row.response, row.rank) for row in prepared.seed.eft_train] == [
        ("Which one is it?", "The red one.", 0),
        ("Which one is it?", "Dunno.", 1),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, POOR]}, "other_prompt"),
        ({"chosen": [{**USER, "role": "system"}, GOOD], "rejected": [USER, POOR]}, "unanswerable"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": ""}, "unanswerable"),
        ({"prompt": "Which?", "chosen": 3, "rejected": "no"}, "not_text"),
        ({"prompt": "Which?", "chosen": "yes", "rejected": " "}, "empty"),
        ({"prompt": "Which?", "chosen": "yes", "rejected": "n\x00"}, "garbled"),
        ({"prompt": "Which?", "chosen": "a", "rejected": "b", "lang": "de"}, "other_language"),
    ],
)
def test_pairs_that_cannot_serve(tmp_path: Path, row: Row, reason: str) -> None:
    good = {"prompt": "Why is it so?", "chosen": "Because.", "rejected": "Eh?"}
    prepared = read(write(tmp_path / "p.jsonl", [good, row]), Options())
    check_accounts(prepared)
    assert prepared.reply_ledger.drops[reason] == 2


# Prompt lists


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" ", "empty"),
        ("Hi", "too_short"),
        ("word " * 401, "too_long"),
        ("Tell me \x07 about bells", "garbled"),
        ("Tell me about caf\ufffds", "garbled"),
        ("Tell me about <|im_end|> tokens", "chat_markers"),
        ("[INST] Tell me about tokens", "chat_markers"),
        ("What is it and what is it and what is it and what is it and", "repetition"),
        ("(ginger: food, spice) (has_effect) (heartburn: disorder)", "not_language"),
        ("=== /// --- *** ab", "not_language"),
    ],
)
def test_what_is_no_prompt(text: str, reason: str) -> None:
    assert prompt_problem(text, min_chars=10, max_chars=2000) == reason


@pytest.mark.parametrize(
    "text",
    [
        "What is the square root of 2529443937?",
        "Can you solve a math problem? 2^3 * 3^2 / (2+3) - 1",
        "Sing it with me: no, no, no, no, no, no!",
        "Комо почистить виниловую пластинку?",
        "हिन्दी में एक कविता लिखो",
        "Line one\n\tLine two, with a table | a | b |",
        "Why is 🫠 so popular an emoji?",
    ],
)
def test_what_is_a_prompt(text: str) -> None:
    assert prompt_problem(text, min_chars=10, max_chars=2000) is None


def test_what_no_one_writes_is_told_by_its_category() -> None:
    for number in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(number))
        garbled = category in ("Cc", "Cs", "Co") and chr(number) not in "\t\n\r"
        assert is_garbled(chr(number)) is (garbled or number == 0xFFFD), hex(number)


def test_repetition_begins_at_four_copies_and_ten_words() -> None:
    assert not is_repetitive("the cat sat on a mat " * 3)
    assert is_repetitive("the cat sat on a mat " * 4)
    assert not is_repetitive("no " * 9)
    assert is_repetitive("no " * 10)


def test_a_text_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    lines = ["How do bees fly?", "", "how do  bees fly", "Why is the sea salty?"]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    prepared = read(str(path), Options())
    assert prepared.format == "prompts"
    assert [prompt.text for prompt in prepared.prompts] == [lines[0], lines[3]]
    assert {prompt.source for prompt in prepared.prompts} == {"list"}
    assert prepared.prompt_ledger.summary() == {
        "seen": 4,
        "kept": 2,
        "dropped": {"duplicate": 1, "empty": 1},
    }


def test_prompts_of_their_own_file_never_include_eft(tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", scored("Which one is best?", 1, 2))
    prompts = write(
        tmp_path / "p.jsonl",
        [{"instruction": text} for text in ("Which one is best?", "What is the time in Rome?")],
    )
    prepared = read(source, Options(ift_share=0.0, prompts=prompts))
    check_accounts(prepared)
    assert [prompt.text for prompt in prepared.prompts] == ["What is the time in Rome?"]
    assert prepared.prompt_ledger.drops == {"in_eft": 1}


def test_a_prompt_list_in_our_own_format_keeps_its_ids(tmp_path: Path) -> None:
    rows = [{"prompt_id": "p7", "text": "What is the time in Rome?", "source": "x"}]
    prepared = read(write(tmp_path / "p.jsonl", rows), Options())
    assert prepared.prompts == [Prompt("p7", "What is the time in Rome?", "p")]


def test_rows_in_other_languages_are_no_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"Prompt number {n} here", "lang": lang} for n, lang in enumerate("ab")]
    prepared = read(write(tmp_path / "p.jsonl", rows), Options(lang="a"))
    check_accounts(prepared)
    assert prepared.prompt_ledger.drops == {"other_language": 1}
    assert len(read(str(tmp_path / "p.jsonl"), Options(lang=None)).prompts) == 2


# Properties

replies = st.lists(
    st.builds(
        lambda text, score: {"response": text, "score": score},
        st.sampled_from(["yes", "no", "maybe", "", "why\x00"]),
        st.one_of(st.none(), st.integers(0, 3)),
    ),
    max_size=4,
)
tables = st.dictionaries(st.sampled_from([f"Prompt number {n}" for n in range(12)]), replies)
shares = st.floats(0, 1)


def table_source(table: dict[str, list[Row]], order: random.Random) -> list[Row]:
    rows = [{"prompt": prompt, **reply} for prompt, group in table.items() for reply in group]
    order.shuffle(rows)
    return rows


@given(tables, shares, shares, st.randoms(use_true_random=False))
def test_every_row_is_accounted_for_in_whatever_order(
    table: dict[str, list[Row]], ift_share: float, eval_share: float, order: random.Random
) -> None:
    options = Options(ift_share=ift_share, eval_share=eval_share)
    results = []
    with TemporaryDirectory() as folder:
        for _ in range(2):
            source = table_source(table, order)
            if not source:
                return
            try:
                found = read(write(Path(folder) / "t.jsonl", source), options)
            except UserError as error:
                assert "no row kept" in str(error)
                found = None
            else:
                assert found.reply_ledger.seen == len(source)
                check_accounts(found)
            results.append(found)
    assert results[0] == results[1]


@given(st.integers(0, 30), shares, shares)
def test_shares_are_exact(count: int, ift_share: float, eval_share: float) -> None:
    pair = (PlacedReply("a", "yes", 0.0), PlacedReply("b", "no", 1.0))
    prompts = [RankedPrompt(f"p{n}", f"Prompt number {n}", pair) for n in range(count)]
    seed = shared_out(prompts, Ledger(), ift_share=ift_share, eval_share=eval_share)
    n_eft = (len(seed.eft_train) + len(seed.eft_eval)) // 2
    assert len(seed.ift) == int(ift_share * count + 0.5)
    assert len(seed.ift) + n_eft == count
    assert abs(len(seed.eft_eval) / 2 - eval_share * n_eft) <= 1


# The files


def test_the_directory_can_be_read_back(tmp_path: Path) -> None:
    source = write(
        tmp_path / "r.jsonl",
        [row for n in range(9) for row in scored(f"Which is best of {n}?", 1, 2)],
    )
    out = tmp_path / "new" / "data"
    facts = prepare(source, out, Options())
    counts = {
        "ift.jsonl": len(read_records(out / "ift.jsonl", Instruction)),
        "eft_train.jsonl": len(read_records(out / "eft_train.jsonl", RankedReply)),
        "eft_eval.jsonl": len(read_records(out / "eft_eval.jsonl", RankedReply)),
        "prompts.jsonl": len(read_records(out / "prompts.jsonl", Prompt)),
    }
    assert counts == {name: file["rows"] for name, file in facts["files"].items()}
    assert json.loads((out / "prepare.json").read_text()) == json.loads(json.dumps(facts))
    assert sorted(path.name for path in out.iterdir()) == sorted([*counts, "prepare.json"])
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def test_data_that_is_there_is_kept_unless_forced(told: Told, tmp_path: Path) -> None:
    ranked = write(tmp_path / "r.jsonl", scored("Which one is best?", 1, 2))
    listed = write(tmp_path / "p.jsonl", [{"prompt": "What is the time in Rome?"}])
    out = tmp_path / "data"
    out.mkdir()
    (out / "eval_prompts.jsonl").write_text("mine\n")
    prepare(ranked, out, Options())
    before = (out / "ift.jsonl").read_bytes()
    with told.refused():
        prepare(listed, out, Options())
    assert (out / "ift.jsonl").read_bytes() == before
    # Files of the earlier source would pass for this one's.
    prepare(listed, out, Options(), force=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "eval_prompts.jsonl",
        "prepare.json",
        "prompts.jsonl",
    ]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        prepare(write(tmp_path / "r.jsonl", scored("Which?", None)), tmp_path / "out", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


AT_WORK = """
import sys, time
from pathlib import Path
from srlm_lite.data.row_store import RowStore
with RowStore(Path(sys.argv[1])) as store:
    Path(sys.argv[2]).write_text(str(store.folder))
    time.sleep(600)
"""


def at_work(near: Path, note: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A process that has put rows by, and the folder that it has for them."""
    program = subprocess.Popen([sys.executable, "-c", AT_WORK, near, note])
    while not (note.is_file() and note.read_text()):
        assert program.poll() is None
        time.sleep(0.01)
    return program, Path(note.read_text())


def test_what_a_killed_one_has_left_goes_and_what_another_works_in_stays(tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", scored("Which one is best?", 1, 2))
    place = tmp_path / "place"
    place.mkdir()
    killed, left = at_work(place, tmp_path / "killed")
    killed.kill()
    killed.wait()
    living, used = at_work(place, tmp_path / "living")
    try:
        assert not left.exists()  # the second one has looked already
        shutil.copytree(used, left)  # as if killed: files that nobody has locked
        prepare(source, place / "data", Options())
        assert sorted(place.iterdir()) == sorted([used, place / "data"])
        assert (used / "rows.sqlite").is_file()
    finally:
        living.kill()
        living.wait()


def test_data_that_another_has_written_meanwhile_are_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", scored("Which one is best?", 1, 2))
    out = tmp_path / "data"

    class Other(Silent):
        def start(self, label: str, total: int, unit: str) -> Task:
            out.mkdir(exist_ok=True)
            (out / "ift.jsonl").write_text("another's\n")
            return super().start(label, total, unit)

    with pytest.raises(UserError, match="already"):
        prepare(source, out, Options(), reporter=Other())
    assert {path.name: path.read_text() for path in out.iterdir()} == {"ift.jsonl": "another's\n"}


def test_the_directory_may_lie_on_another_disk(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other disk")
    source = write(tmp_path / "r.jsonl", scored("Which one is best?", 1, 2))
    with TemporaryDirectory(dir=elsewhere) as there:
        (tmp_path / "data").symlink_to(there)
        prepare(source, tmp_path / "data", Options())
        assert (Path(there) / "prepare.json").is_file()
        assert len(list(Path(there).iterdir())) == 5


def test_places_where_no_directory_can_be(told: Told, tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", scored("Which one is best?", 1, 2))
    (tmp_path / "loose").symlink_to(tmp_path / "nowhere")
    for out in (source, Path(source) / "below" / "it", tmp_path / "loose", Path("/proc/data")):
        with told.refused():
            prepare(str(source), Path(out), Options())
    assert {path.name for path in tmp_path.iterdir()} == {"r.jsonl", "loose"}


# What users get wrong


def failure(*arguments: str) -> str:
    """The one line that a mistake ends in."""
    result = CliRunner().invoke(app, ["prepare", *arguments])
    assert isinstance(result.exception, UserError), result.output
    line = str(result.exception)
    assert "\n" not in line
    return line


def test_mistakes_about_the_source(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))

    def line(name: str, content: bytes, *more: str) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return failure("--source", str(path), *out, *more).replace(f"{tmp_path}/", "")

    good = json.dumps(scored("Which one?", 1)[0]).encode()
    assert failure("--source", str(tmp_path / "no.jsonl"), *out).endswith(
        "no.jsonl: no such file. Give a file or a Hub id such as owner/name"
    )
    assert "a directory without a file that is read. JSON, JSON Lines" in failure(
        "--source", str(tmp_path), *out
    )
    assert line("a.jsonl", b"") == "a.jsonl: holds no rows"
    assert line("a.jsonl", good + b"\n\n{oops\n").startswith("a.jsonl:3: not JSON (")
    assert line("a.jsonl", b"[1, 2]\n").startswith("a.jsonl:1: not a JSON object. JSON Lines")
    assert line("a.jsonl", b"[" * 100_000).startswith("a.jsonl:1: not JSON (")
    assert line("a.jsonl", b"\xff\xfe\x00") == "a.jsonl: not UTF-8 text"
    assert line("a.jsonl.gz", b"plain").startswith("a.jsonl.gz: not a whole gzip file")
    assert line("a.jsonl.gz", gzip.compress(good * 99)[:-9]).startswith("a.jsonl.gz: not a whole")
    assert line("a.parquet", b"PAR1").startswith("a.parquet: not a whole .parquet file (")
    assert line("a.xlsx", b"PK").startswith("a.xlsx: .xlsx is not read. JSON, JSON Lines")
    assert not (tmp_path / "out").exists()


def test_mistakes_about_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"prompt": "Which?", "response": "This", "qualty": 1}])
    base = ("--source", path, "--out", str(tmp_path / "out"))
    assert failure(*base, "--score-column", "quality").endswith(
        "no column 'quality'; there: prompt, response, qualty. Did you mean --score-column qualty?"
    )
    assert failure(*base, "--format", "ranked").endswith(
        "no column orders the replies; there: prompt, response, qualty. "
        "Name it with --score-column or --rank-column"
    )
    assert failure(*base).endswith(
        "replies without a score or rank, beside numbers in qualty. Say which orders them with "
        "--score-column qualty or --rank-column, or that none does with --ignore-column qualty"
    )
    unknown = write(tmp_path / "u.jsonl", [{"turns": ["a"], "category": "b"}])
    base = ("--source", unknown, "--out", str(tmp_path / "out"))
    assert "u.jsonl: cannot tell the format. Columns: turns, category." in failure(*base)
    assert "no column for the prompt; there: turns, category" in failure(
        *base, "--format", "prompts"
    )
    assert "neither a message tree nor a message; its keys: turns, category" in failure(
        *base, "--format", "oasst-trees"
    )


def test_mistakes_about_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", scored("Which?", 1, 1) + scored("What else?", 1, 1))
    base = ("--source", path, "--out", str(tmp_path / "out"))
    listed = write(tmp_path / "p.jsonl", [{"prompt": "Which one is it?"}])
    assert failure(*base, "--lang", "xx", "--given-scores") == (
        "--score-range: must run from a lower to a higher score"
    )
    assert "--given-scores: needs scored replies" in failure(
        "--source", listed, "--out", str(tmp_path / "out"), "--given-scores"
    )
    assert "--prompts: the source is a prompt list already" in failure(
        "--source", listed, "--out", str(tmp_path / "out"), "--prompts", listed
    )
    (tmp_path / "file").write_text("")
    assert failure("--source", path, "--out", str(tmp_path / "file")).endswith(
        "is a file, not a directory"
    )
    foreign = write(tmp_path / "f.jsonl", scored("Which?", 1, None, lang="de"))
    assert failure("--source", foreign, "--out", str(tmp_path / "out")).endswith(
        "f.jsonl: no row kept of 2: 2 other_language (in another language). "
        "--lang any keeps every language"
    )
    missing = failure(*base, "--prompts", str(tmp_path / "gone.txt"))
    assert missing.endswith("gone.txt: no such file. Give a file or a Hub id such as owner/name")


@pytest.mark.parametrize(
    "broken", [{"prompt": {"replies": []}}, {"prompt": {"message_id": "a", "replies": []}}]
)
def test_a_broken_tree_is_named(told: Told, tmp_path: Path, broken: Row) -> None:
    path = write(tmp_path / "t.jsonl", [tree("good", 0), broken])
    with told.refused():
        read(path, Options())


# The Hub


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = flattened([tree("a", 0, 1)])
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[Row]:
        asked.append((name, config, split))
        return rows

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = Options(ift_share=1.0, hub_split="validation+test", hub_config="c")
    prepared = read("OpenAssistant/oasst2", options)
    assert asked == [("OpenAssistant/oasst2", "c", part) for part in ("validation", "test")]
    assert len(prepared.seed.ift) == 1
    assert prepared.prompts[0].source == "OpenAssistant/oasst2"


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub import HfApi

    def refuse(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(UserError, match=r"^a/b: no such file, and the Hub is out of reach \(Name"):
        read_source("a/b")


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError])
def test_a_hub_that_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def load_dataset(name: str, config: str | None, *, split: str) -> None:
        raise error("No such split\nand more\nlines")

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"the Hub does not give it \(No such split\)"):
        read_source("a/b")


def test_a_hub_dataset_of_several_configurations(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(name: str, config: str | None, *, split: str) -> None:
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\n"
            "Example of usage:\n\t`load_dataset('o/n', 'a')`"
        )

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with told.refused():
        read_source("o/n")


# The command


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["prepare", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_the_account_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.gz"
    rows = scored("Which one is it?", 1, 2, None) + scored("What else is there?", 1)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    stdout, stderr = run("--source", str(path), "--out", str(tmp_path / "a"), "--ift-share", "0")
    lines = stdout.splitlines()
    assert lines[0] == f"{path} (ranked) -> {tmp_path / 'a'}"
    assert [" ".join(line.split()) for line in lines[1:5]] == [
        "ift.jsonl 1 rows, 1 prompts",
        "eft_train.jsonl 2 rows, 1 prompts",
        "eft_eval.jsonl 0 rows, 0 prompts",
        "prompts.jsonl 1 rows, 1 prompts",
    ]
    assert "replies: 4 seen, 3 kept, 1 dropped" in lines
    assert f"        1  no_score: {REASONS['no_score']}" in lines
    assert "prompts: 2 seen, 1 kept, 1 dropped" in lines
    assert stderr.splitlines()[0].startswith("note: guessed: prompt from column 'prompt'")
    stdout, _ = run("--source", str(path), "--out", str(tmp_path / "b"), "--json")
    assert json.loads(stdout) == json.loads((tmp_path / "b" / "prepare.json").read_text())


def test_an_order_that_is_given_is_the_only_one(tmp_path: Path) -> None:
    rows = [{"prompt": "Which?", "answer": f"a{n}", "b": n, "rank": n} for n in (1, 2)]
    source = write(tmp_path / "r.jsonl", rows)
    prepared = read(source, Options(ift_share=0.0, columns=Columns(score="b")))
    assert [row.response for row in prepared.seed.eft_train] == ["a2", "a1"]
    assert "not used: rank" in prepared.notes


# Real data


@needs_data
def test_real_trees(tmp_path: Path) -> None:
    source = DATA / "oasst2_trees.jsonl"
    prepared = read(str(source), Options())
    check_accounts(prepared)
    assert prepared.format == "oasst-trees"
    assert len(prepared.seed.ift) > 20
    assert len({row.prompt_id for row in prepared.seed.eft_eval}) > 3
    trees = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line]
    flat = read(write(tmp_path / "oasst2_trees.jsonl", flattened(trees)), Options())
    assert flat.rows() == prepared.rows()
    assert flat.reply_ledger == prepared.reply_ledger


@needs_data
def test_real_scored_replies(tmp_path: Path) -> None:
    source, out = DATA / "oasst2_quality.jsonl", tmp_path / "out"
    stdout, _ = run(
        *("--source", str(source), "--format", "ranked", "--score-column", "quality"),
        *("--out", str(out), "--json"),
    )
    facts = json.loads(stdout)
    assert facts["replies"]["seen"] == 2502
    assert facts["replies"]["dropped"]["no_score"] == 39
    assert facts["files"]["eft_eval.jsonl"]["prompts"] > 50
    check_accounts(read(str(source), Options(columns=Columns(score="quality"))))


@needs_data
def test_real_prompts() -> None:
    prepared = read(str(DATA / "prompts_generated.jsonl"), Options())
    check_accounts(prepared)
    drops = prepared.prompt_ledger.drops
    assert prepared.prompt_ledger.seen == 8029
    # The garbage in this file is a handful of knowledge-graph tuples; repeats are many.
    assert drops == Counter(duplicate=157, not_language=6)
