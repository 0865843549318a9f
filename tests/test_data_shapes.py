"""Tables as people publish them: what each shape gives, and what is refused before it is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from messages import Told
from preparing import Loaded, Row, read, write

from srlm_lite.conversation import digest_of, transcript
from srlm_lite.data.columns import NAMES, Columns, digest
from srlm_lite.data.ledger import REASONS
from srlm_lite.data.order import places_of
from srlm_lite.data.prepare import Options, prepare
from srlm_lite.data.shapes import SHAPES, SeenColumns, shape_of
from srlm_lite.data.sources import read_source
from srlm_lite.data.turns import Unusable, turns_in

Q, GOOD, POOR = "How do I look after a kettle?", "Descale it twice a year.", "Scrub it with sand."
WORST = "Throw it away."
MORE, SHORT = "Say it shorter.", "Descale it."


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


TURNS = [user(Q), assistant(GOOD), user(MORE)]
UNDER = [system("Be brief."), user(Q)]


def prepared(tmp_path: Path, *rows: Row, **options: Any) -> Loaded:
    source = write(tmp_path / "rows.jsonl", list(rows))
    return read(source, Options(**{"ift_share": 0.0, "eval_share": 0.0, **options}))


def in_order(found: Loaded) -> list[tuple[Any, str, int]]:
    """What was asked, each reply, its rank."""
    assert set(found.reply_ledger.drops) <= set(REASONS)
    ledger = found.reply_ledger
    assert ledger.seen == ledger.kept + ledger.dropped
    return [
        (list(row.messages) if row.messages else row.prompt, row.response, row.rank)
        for row in found.seed.eft_train
    ]


BETTER_FIRST = [(Q, GOOD, 0), (Q, POOR, 1)]
HH = f"\n\nHuman: {Q}\n\nAssistant: {GOOD}\n\nHuman: {MORE}\n\nAssistant: "
OPENAI = {
    "input": {"messages": [user(Q)], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [assistant(GOOD)],
    "non_preferred_output": [assistant(POOR)],
}
SAFE_RLHF = {
    "prompt": Q,
    "response_0": POOR,
    "response_1": GOOD,
    "is_response_0_safe": True,
    "is_response_1_safe": True,
    "better_response_id": 1,
    "safer_response_id": 0,
}
SHP = {
    "post_id": "x",
    "domain": "askculinary_train",
    "history": Q,
    "human_ref_A": GOOD,
    "human_ref_B": POOR,
    "labels": 1,
    "score_A": 40,
    "score_B": 4,
    "score_ratio": 10.0,
}
ARENA = {
    "question_id": "q",
    "model_a": "m",
    "model_b": "n",
    "winner": "model_b",
    "conversation_a": [user(Q), assistant(POOR)],
    "conversation_b": [user(Q), assistant(GOOD)],
    "turn": 1,
    "language": "English",
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": Q},
    "quotes_0": {"title": [], "extract": []},
    "answer_0": GOOD,
    "score_0": 0.5,
    "quotes_1": {"title": [], "extract": []},
    "answer_1": POOR,
    "score_1": -0.5,
}
ULTRAFEEDBACK = {
    "source": "x",
    "instruction": Q,
    "models": ["a", "b"],
    "completions": [
        {
            "model": "a",
            "response": text,
            "annotations": {
                "helpfulness": {"Rating": rating, "Rationale": "r"},
                "honesty": {"Rating": "3", "Rationale": "r"},
            },
        }
        for text, rating in ((POOR, "1"), (GOOD, "5"))
    ],
    "correct_answers": ["None"],
}
NECTAR = {
    "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
    "answers": [
        {"answer": POOR, "model": "b", "rank": 2.0},
        {"answer": GOOD, "model": "a", "rank": 1.0},
    ],
    "turns": 1,
    "num_responses": 2,
    "source": ["x"],
    "good_natured": True,
}
SUMMARIES = {
    "info": {"id": "t3", "post": Q, "title": "t", "subreddit": "s"},
    "summaries": [{"text": POOR, "policy": "sup"}, {"text": GOOD, "policy": "ref"}],
    "choice": 1,
    "worker": "w",
}
ORCA = {"system": "", "question": Q, "chosen": GOOD, "rejected": POOR}
TULU = {
    "id": "1",
    "source": "x",
    "prompt": Q,
    "chosen": [user(Q), assistant(GOOD)],
    "rejected": [user(Q), assistant(POOR)],
    "chosen_model": "a",
    "rejected_model": "b",
}
BINARIZED = {**TULU, "messages": TULU["chosen"], "score_chosen": 8.0, "score_rejected": 3.0}
FACTORY = {
    "conversations": [{"from": "human", "value": Q}],
    "chosen": {"from": "gpt", "value": GOOD},
    "rejected": {"from": "gpt", "value": POOR},
}


@pytest.mark.parametrize(
    ("shape", "row", "expected"),
    [
        ("pairs", {"prompt": Q, "chosen": GOOD, "rejected": POOR}, BETTER_FIRST),
        ("pairs", {"question": Q, "response_j": GOOD, "response_k": POOR}, BETTER_FIRST),
        ("pairs", {"Prompt": Q, "Chosen": GOOD, "Rejected": POOR}, BETTER_FIRST),
        ("pairs", {"instruction": Q, "input": "", "chosen": GOOD, "rejected": POOR}, BETTER_FIRST),
        ("pairs", OPENAI, BETTER_FIRST),
        ("pairs", ORCA, BETTER_FIRST),
        ("pairs", TULU, BETTER_FIRST),
        ("pairs", BINARIZED, BETTER_FIRST),
        ("pairs", FACTORY, BETTER_FIRST),
        (
            "pairs",  # with its prompt apart, and the answer once more
            {"prompt": NECTAR["prompt"], "response": GOOD, "chosen": GOOD, "rejected": POOR},
            BETTER_FIRST,
        ),
        (
            "pairs",
            {"chosen": HH + SHORT, "rejected": HH + POOR},
            [(TURNS, SHORT, 0), (TURNS, POOR, 1)],
        ),
        (
            "pairs",
            {"prompt": TURNS, "chosen": [assistant(SHORT)], "rejected": [assistant(POOR)]},
            [(TURNS, SHORT, 0), (TURNS, POOR, 1)],
        ),
        (
            "pairs",
            {**ORCA, "system": "Be brief."},
            [(UNDER, GOOD, 0), (UNDER, POOR, 1)],
        ),
        (
            "pairs",
            {"chosen": [*UNDER, assistant(GOOD)], "rejected": [*UNDER, assistant(POOR)]},
            [(UNDER, GOOD, 0), (UNDER, POOR, 1)],
        ),
        (
            "pairs",
            {"prompt": Q, "chosen": GOOD, "rejected": [POOR, WORST]},
            [(Q, GOOD, 0), (Q, POOR, 1), (Q, WORST, 1)],
        ),
        (
            "pairs",  # dialogues as an older feature of `datasets` stores them
            {
                side: {"role": ["user", "assistant"], "content": [Q, text]}
                for side, text in (("chosen", GOOD), ("rejected", POOR))
            },
            BETTER_FIRST,
        ),
        ("sides", SAFE_RLHF, BETTER_FIRST),
        ("sides", SHP, BETTER_FIRST),
        ("sides", ARENA, BETTER_FIRST),
        ("sides", WEBGPT, BETTER_FIRST),
        (
            "sides",
            {"prompt": Q, "response_a": GOOD, "response_b": POOR, "winner": "A"},
            BETTER_FIRST,
        ),
        (
            "sides",
            {
                "prompt": Q,
                "response_a": GOOD,
                "response_b": POOR,
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            },
            BETTER_FIRST,
        ),
        (
            "sides",
            {"instruction": Q, "output_1": POOR, "output_2": GOOD, "preference": 2},
            BETTER_FIRST,
        ),
        (
            "sides",
            {"instruction": Q, "output_1": GOOD, "output_2": POOR, "preference": 1.02},
            BETTER_FIRST,
        ),
        (
            "sides",
            {
                "domain": "general",
                "context": [user(Q)],
                "response1": GOOD,
                "response2": POOR,
                "overall_preference": -2,
            },
            BETTER_FIRST,
        ),
        (
            "sides",
            {"prompt": Q, "answer_1": POOR, "answer_2": WORST, "answer_3": GOOD}
            | {"rank_1": 2, "rank_2": 3, "rank_3": 1},
            [*BETTER_FIRST, (Q, WORST, 2)],
        ),
        (
            "sides",  # as a table of text has it: turns in lists, as JSON
            {"id": 5, "model_a": "m", "model_b": "n", "prompt": json.dumps([Q])}
            | {"response_a": json.dumps([POOR]), "response_b": json.dumps([GOOD])}
            | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
            BETTER_FIRST,
        ),
        (
            "sides",
            {"question": Q, "response_A": POOR, "response_B": GOOD, "label": "B>>A"},
            BETTER_FIRST,
        ),
        (
            "dialogues against",
            {"messages": [*TURNS, assistant(SHORT)], "rejected_response": POOR},
            [(TURNS, SHORT, 0), (TURNS, POOR, 1)],
        ),
        ("list", ULTRAFEEDBACK, BETTER_FIRST),
        ("list", NECTAR, BETTER_FIRST),
        ("list", SUMMARIES, BETTER_FIRST),
        (
            "list",
            {"prompt": Q, "responses": [POOR, GOOD, WORST], "scores": [2.0, 4.5, 0.5]},
            [*BETTER_FIRST, (Q, WORST, 2)],
        ),
        ("list", {"prompt": Q, "candidates": [POOR, GOOD], "ranks": [2, 1]}, BETTER_FIRST),
        (
            "list",
            {"instruction": Q, "generations": [POOR, GOOD], "rating": [1, 9]},
            BETTER_FIRST,
        ),
        (
            "list",
            {"prompt": Q, "replies": [{"text": POOR, "score": 1}, {"text": GOOD, "score": 2}]},
            BETTER_FIRST,
        ),
    ],
)
def test_one_row_gives_an_order(
    tmp_path: Path, shape: str, row: Row, expected: list[tuple[Any, str, int]]
) -> None:
    found = prepared(tmp_path, row)
    assert in_order(found) == expected
    source = read_source(str(tmp_path / "rows.jsonl"))
    told = shape_of(SeenColumns("x", source.profile(), Columns()), {one.format for one in SHAPES})
    assert told is not None and told[0].name == shape


SCORED = [{"text": GOOD, "score": 5}, {"text": POOR, "score": 1}]
ASPECTS = {"helpfulness": 4, "correctness": 1, "coherence": 2}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"instruction": Q, "input": "It leaks.", "output": s["text"], "score": s["score"]}
             for s in SCORED],
            [(f"{Q}\n\nIt leaks.", GOOD, 0), (f"{Q}\n\nIt leaks.", POOR, 1)],
        ),
        (
            [{"prompt": Q, "completion": GOOD, "label": True},
             {"prompt": Q, "completion": POOR, "label": False}],
            BETTER_FIRST,
        ),
        (
            [{"prompt": [user(Q)], "completion": [assistant(GOOD)], "label": True},
             {"prompt": [user(Q)], "completion": [assistant(POOR)], "label": False}],
            BETTER_FIRST,
        ),
        (
            [{"messages": [user(Q), assistant(GOOD)], "label": True},
             {"messages": [user(Q), assistant(POOR)], "label": False}],
            BETTER_FIRST,
        ),
        (
            [{"messages": [*TURNS, assistant(SHORT)], "score": 2},
             {"messages": [*TURNS, assistant(POOR)], "score": 1}],
            [(TURNS, SHORT, 0), (TURNS, POOR, 1)],
        ),
        (  # a chosen reply and all that it was preferred to
            [{"prompt": Q, "chosen": GOOD, "rejected": text} for text in (WORST, POOR)],
            [(Q, GOOD, 0), (Q, POOR, 1), (Q, WORST, 1)],
        ),
    ],
)  # fmt: skip
def test_rows_of_one_prompt_give_an_order(
    tmp_path: Path, rows: list[Row], expected: list[tuple[Any, str, int]]
) -> None:
    for given in (rows, rows[::-1]):
        assert sorted(in_order(prepared(tmp_path, *given)), key=lambda one: one[1:]) == sorted(
            expected, key=lambda one: one[1:]
        )


SHAREGPT = {
    "id": "1",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": Q},
        {"from": "gpt", "value": GOOD},
    ],
}
ANTHROPIC = {
    "system": "Be brief.",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": Q}]},
        {"role": "assistant", "content": [{"type": "text", "text": GOOD}]},
    ],
}
GEMINI = {
    "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
    "contents": [
        {"role": "user", "parts": [{"text": Q}]},
        {"role": "model", "parts": [{"text": GOOD}]},
    ],
}
DOLLY = {"instruction": Q, "context": "It leaks.", "response": GOOD, "category": "open_qa"}


@pytest.mark.parametrize(
    ("row", "asked", "response"),
    [
        ({"messages": [user(Q), assistant(GOOD)]}, Q, GOOD),
        ({"prompt": Q, "messages": [user(Q), assistant(GOOD)], "prompt_id": "p"}, Q, GOOD),
        ({"messages": [*TURNS, assistant(SHORT)]}, TURNS, SHORT),
        (SHAREGPT, UNDER, GOOD),
        (ANTHROPIC, UNDER, GOOD),
        ({**ANTHROPIC, "system": [{"type": "text", "text": "Be brief."}]}, UNDER, GOOD),
        (GEMINI, UNDER, GOOD),
        ({"conversation": [{"input": Q, "output": GOOD}]}, Q, GOOD),
        (
            {"source": "x", "conversation": [{"input": Q, "output": GOOD},
                                             {"input": MORE, "output": SHORT}]},
            TURNS,
            SHORT,
        ),
        ({"instruction": Q, "input": "", "output": GOOD}, Q, GOOD),
        (DOLLY, f"{Q}\n\nIt leaks.", GOOD),
        ({"instruction": MORE, "history": [[Q, GOOD]], "output": SHORT}, TURNS, SHORT),
        ({"text": f"### Human: {Q}### Assistant: {GOOD}"}, Q, GOOD),
        (
            {"text": f"Human: {Q}\nAssistant: {GOOD}\nHuman: {MORE}\nAssistant: {SHORT}"},
            TURNS,
            SHORT,
        ),
        ({"question": Q, "answer": GOOD, "id": 3}, Q, GOOD),
    ],
)  # fmt: skip
def test_answers_to_learn_from(tmp_path: Path, row: Row, asked: Any, response: str) -> None:
    found = prepared(tmp_path, row)
    assert found.format == "ift"
    [one] = found.seed.ift
    assert one.response == response
    if isinstance(asked, str):
        assert (one.prompt, one.messages) == (asked, None)
        assert one.prompt_id in (digest(asked), "p")
    else:
        assert [list(one.messages or ()), one.prompt] == [asked, transcript(asked)]
        assert one.prompt_id == digest_of(asked)


def test_a_dialogue_that_ends_with_the_user_is_a_prompt(tmp_path: Path) -> None:
    found = prepared(tmp_path, {"messages": TURNS}, {"messages": [user(Q), assistant(GOOD)]})
    assert [list(one.messages or ()) for one in found.prompts] == [TURNS, []]
    assert [one.prompt for one in found.seed.ift] == [Q]


def test_a_reply_that_people_found_bad_is_not_learned_from(tmp_path: Path) -> None:
    rows = [{"prompt": Q, "completion": POOR, "label": False}]
    rows += [{"prompt": MORE, "completion": SHORT, "label": True}]
    found = prepared(tmp_path, *rows)
    assert [one.response for one in found.seed.ift] == [SHORT]
    assert found.reply_ledger.drops == {"no_rank_0": 1}


def test_ties_and_what_cannot_be_placed(tmp_path: Path) -> None:
    tie = {**ARENA, "winner": "tie (bothbad)", "conversation_a": [user("Why?"), assistant("No")],
           "conversation_b": [user("Why?"), assistant("Eh")]}  # fmt: skip
    found = prepared(tmp_path, ARENA, tie)
    assert in_order(found) == BETTER_FIRST
    assert found.reply_ledger.drops == {"tied": 2}


def test_pairs_that_no_order_joins(tmp_path: Path) -> None:
    """Nobody compared the replies of the two pairs, so one pair stays, as ever the same one."""
    rows = [{"prompt": Q, "chosen": GOOD, "rejected": POOR}]
    rows += [{"prompt": Q, "chosen": SHORT, "rejected": WORST}]
    kept = {tuple(in_order(prepared(tmp_path, *each))) for each in (rows, rows[::-1])}
    assert len(kept) == 1 and len(kept.pop()) == 2
    assert prepared(tmp_path, *rows).reply_ledger.drops == {"other_order": 2}


def test_a_pair_of_the_same_reply_is_an_answer(tmp_path: Path) -> None:
    found = prepared(tmp_path, {"prompt": Q, "chosen": GOOD, "rejected": GOOD})
    assert [one.response for one in found.seed.ift] == [GOOD]
    assert found.reply_ledger.summary() == {"seen": 2, "kept": 1, "dropped": {"duplicate": 1}}


def test_what_no_file_can_hold_is_dropped(tmp_path: Path) -> None:
    """An id, which is made whole; and a target, whose other half nobody knows."""
    half = {"prompt_id": "a\ud83d", "prompt": Q, "response": POOR, "score": 0}
    rows = [{**half, "response": GOOD, "score": 1}, half]
    rows += [{**half, "response": WORST, "target": "So \ud83d.\nScore: 1"}]
    source = write(tmp_path / "rows.jsonl", rows)
    facts = prepare(source, tmp_path / "out", Options(ift_share=0.0))
    assert facts["replies"]["dropped"] == {"bad_target": 1}
    assert '"a?"' in (tmp_path / "out" / "eft_train.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("pairs", "places"),
    [
        (["ab"], {"a": 0, "b": 1}),
        (["ab", "ac"], {"a": 0, "b": 1, "c": 1}),
        (["ac", "bc"], {"a": 0, "b": 0, "c": 1}),
        (["ab", "ac", "bc"], {"a": 0, "b": 1, "c": 2}),
        (["ab", "bc"], {"a": 0, "b": 1, "c": 2}),  # a over c follows
        (["ab", "ac", "cd"], {"a": 0, "b": 1, "c": 1}),  # d and b: nobody knows
        (["ab", "cd"], {"a": 0, "b": 1}),
        (["ab", "ba"], {}),
        (["ab", "bc", "ca"], {"a": 0, "b": 1}),
        (["aa"], {"a": 0}),
        (["aa", "ab"], {"a": 0, "b": 1}),
        ([], {}),
    ],
)
def test_places_say_no_more_than_pairs(pairs: list[str], places: dict[str, int]) -> None:
    assert places_of((one[0], one[1]) for one in pairs) == places


def test_a_score_of_a_side_is_its_quality_where_it_is_named(tmp_path: Path) -> None:
    found = prepared(tmp_path, BINARIZED)
    assert [row.quality for row in found.seed.eft_train] == [None, None]
    left = "id, source, chosen_model, rejected_model, messages, score_chosen, score_rejected"
    assert f"not used: {left}" in found.notes
    within = [{**one, "votes": 3} for one in NECTAR["answers"]]
    found = prepared(tmp_path, {**NECTAR, "answers": within})
    left = "turns, num_responses, source, good_natured, answers.model, answers.votes"
    assert f"not used: {left}" in found.notes
    found = prepared(tmp_path, BINARIZED, columns=Columns(score="score_chosen"))
    assert [row.quality for row in found.seed.eft_train] == [8.0, 3.0]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": Q, "response": GOOD, **ASPECTS}, {"columns": Columns(score="helpfulness")}),
        ({"prompt": Q, "response": GOOD, **ASPECTS}, {"ignore": tuple(ASPECTS)}),
        ({"prompt": Q, "responses": [GOOD, POOR]}, {"ignore": ("responses",)}),
        ({"prompt": Q, "all_texts": 3, "modelResponses": [GOOD, POOR], "places": [1, 0]},
         {"columns": Columns(response="modelResponses", rank="places")}),
        ({"prompt": Q, "gold_answer": GOOD}, {"columns": Columns(response="gold_answer")}),
        ({"prompt": Q, "response_0": GOOD, "response_1": POOR},
         {"ignore": ("response_0", "response_1")}),
        ({"prompt": Q, "response": GOOD, "answer": POOR}, {"columns": Columns(response="answer"),
                                                          "ignore": ("response",)}),
        ({"prompt": Q, "input": ["It", "leaks"], "response": GOOD}, {"ignore": ("input",)}),
        ({"prompt": Q, "response_0": GOOD, "response_1": POOR, "label": 3}, None),
        ({"prompt": Q, "response": POOR, "is_safe": False}, {"ignore": ("is_safe",)}),
        ({"prompt": Q, "response": POOR, "rank": "first"}, {"ignore": ("rank",)}),
        ({"prompt": Q, "chosen": GOOD, "rejected": POOR, "completion": WORST},
         {"ignore": ("completion",)}),
        ({"trajectory": [user(Q)], "chosen": GOOD, "rejected": POOR},
         {"columns": Columns(prompt="trajectory")}),
        ({"instruction": Q, "output": [GOOD, POOR]}, {"ignore": ("output",)}),
        ({"prompt": Q, "system": 3, "response": GOOD}, {"ignore": ("system",)}),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(
    told: Told, tmp_path: Path, row: Row, options: dict[str, Any] | None
) -> None:
    with told.refused():
        prepared(tmp_path, row)
    if options is not None:
        found = prepared(tmp_path, row, **options)
        assert found.reply_ledger.kept or found.prompts


def test_a_system_message_and_a_column_of_another(tmp_path: Path) -> None:
    row = {"system": "Be long.", "messages": [*UNDER, assistant(GOOD)]}
    good = {"system": "Be brief.", "messages": [*UNDER, assistant(POOR)]}
    found = prepared(tmp_path, row, good)
    assert found.reply_ledger.drops == {"two_systems": 1}
    assert [one.response for one in found.seed.ift] == [POOR]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "tool", "content": "4"}, "tools"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tools"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
         "not_text"),
        ({"role": "user", "content": 4}, "not_text"),
    ],
)  # fmt: skip
def test_turns_that_are_more_than_text(turn: Row, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        turns_in([turn], role="user")
    assert caught.value.reason == reason


def test_keys_that_a_table_fills_in_say_nothing() -> None:
    """Parquet has every key in every message: those of others are null."""
    turn = {"role": "user", "content": Q, "tool_calls": None, "name": None, "from": None}
    assert turns_in([turn], role="user") == [user(Q)]


@pytest.mark.parametrize(
    "text", ['["a", "b"]', '{"messages": 3}', "[note] Why?", "{}", "[", "Human: Why?"]
)
def test_a_prompt_that_looks_like_more_stays_a_text(text: str) -> None:
    assert turns_in(text, role="user") == [user(text)]


def test_a_dialogue_in_a_cell_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cell = json.dumps([*TURNS, assistant(SHORT)]).replace('"', '""')
    path.write_text(f'id,messages\n007,"{cell}"\n')
    [one] = read(str(path), Options()).seed.ift
    assert (list(one.messages or ()), one.response) == (TURNS, SHORT)


def test_every_name_is_of_one_row_of_the_table() -> None:
    assert [one.name for one in SHAPES] == list(dict.fromkeys(one.name for one in SHAPES))
    for names in NAMES.values():
        assert len(set(names)) == len(names)
