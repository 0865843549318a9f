"""What is sampled is what is learned: ids are kept where a reply's text does not give them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srlm_lite.errors import ProofError
from srlm_lite.judging import load_rubric, score_line_complete
from srlm_lite.methods.meta_rewarding import _pair
from srlm_lite.methods.rlaif import Rlaif
from srlm_lite.methods.temporal import anchored_pairs
from srlm_lite.model.chat import ChatFormat
from srlm_lite.pairing import Drops, pair, replayed
from srlm_lite.recipe import recipe_from
from srlm_lite.records import (
    Candidate,
    Instruction,
    Judgement,
    PreferencePair,
    Prompt,
    RankedReply,
    Reply,
    Revision,
    SampledTarget,
)
from srlm_lite.rollout.protocol import Sample
from srlm_lite.run.files import read_jsonl, read_records, write_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.stages.anchor import _judge_example, agreeing_targets, ift_examples
from srlm_lite.stages.at_work import AtWork
from srlm_lite.stages.likelihood import candidate_likelihoods
from srlm_lite.stages.pairs import pair_example
from srlm_lite.stages.replies import candidate_of, learned_ids, reply_of
from srlm_lite.stages.sampling import ask, judge_replies, limits_of, sample_candidates

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(("Why?", "Facts about the moon", "Go"))]


@pytest.fixture(scope="module")
def session(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    raw = {
        "name": "t",
        "base": {"name": str(tiny_base_dir), "dtype": "float32"},
        "data": {"dir": "."},
        "rollout": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24},
    }
    return Session(recipe_from(raw, where="test"), RunDir(tmp_path_factory.mktemp("out")))


@pytest.fixture(scope="module")
def chat(session: Session) -> ChatFormat:
    return session.chat


@pytest.fixture(scope="module")
def other(chat: ChatFormat) -> tuple[int, ...]:
    """Ids of " moon" letter by letter, which the tokenizer merges."""
    ids = tuple(chat.target_ids(letter)[0] for letter in "moon")
    assert chat.decode(ids) == "moon" and len(chat.target_ids("moon")) - 1 < len(ids)
    return ids


class Recorded:
    """An engine that remembers what it has sampled."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.samples: list[Sample] = []

    def sample(self, *args: Any, **kwargs: Any) -> list[list[Sample]]:
        found: list[list[Sample]] = self._engine.sample(*args, **kwargs)
        self.samples += [one for group in found for one in group]
        return found


@pytest.fixture(scope="module")
def sampled(session: Session) -> list[tuple[Sample, Candidate]]:
    """Noise of the tiny base, which spells most of its words in its own way."""
    engine = Recorded(session.engine([]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "engine", lambda stack, role: engine)
        rows = sample_candidates(
            session,
            [],
            PROMPTS,
            path=session.run.path / "sampled.jsonl",
            stage="test",
            sampling=session.recipe.rollout,
            n=8,
            seed_path=(0,),
        )
    return list(zip(engine.samples, rows, strict=True))


def test_candidates_are_learned_as_they_were_sampled(
    session: Session, sampled: Sequence[tuple[Sample, Candidate]]
) -> None:
    chat = session.chat
    for sample, row in sampled:
        end = (chat.end_id,) if sample.finish_reason == "stop" else ()
        assert learned_ids(chat, row.text, row.ids) == (*sample.token_ids, *end)
        assert row.text == sample.text
    assert any(row.ids is not None for _, row in sampled)
    # On the disk and back they are the same.
    read = read_records(session.run.path / "sampled.jsonl", Candidate)
    assert read == [row for _, row in sampled]


def test_the_likelihood_is_of_the_sampled_ids(
    session: Session, sampled: Sequence[tuple[Sample, Candidate]], tmp_path: Path
) -> None:
    """By hand from the model's own logits; the text's ids would have another sum."""
    import torch

    row = next(row for _, row in sampled if row.ids and row.text)
    found = candidate_likelihoods(session, [], PROMPTS, [row], path=tmp_path / "logp.jsonl")
    question = {prompt.prompt_id: prompt.text for prompt in PROMPTS}[row.prompt_id]
    before = session.chat.prompt_ids(question)
    assert row.ids is not None
    ids = torch.tensor([[*before, *row.ids]])
    session.slot.load([])
    with torch.inference_mode():
        logits = session.base.model(input_ids=ids).logits.log_softmax(-1)[0]
    places = range(len(before), ids.shape[1])
    by_hand = sum(float(logits[at - 1, ids[0, at]]) for at in places)
    assert found[row.candidate_id].logp == pytest.approx(by_hand, abs=1e-3)
    assert found[row.candidate_id].n_tokens == len(row.ids)


def test_ids_are_kept_where_the_text_does_not_give_them_back(
    chat: ChatFormat, other: tuple[int, ...]
) -> None:
    plain = tuple(chat.target_ids("The moon."))[:-1]
    special = chat.prompt_ids("Why?")[0]  # the start of a turn
    cases: dict[str, tuple[Sequence[int], str, bool]] = {
        "as the tokenizer spells it": (plain, "The moon.", False),
        "other merges": (other, "moon", True),
        "whitespace at the end": ((*plain, *_spaces(chat)), "The moon.", True),
        "a special token inside": ((*plain[:1], special, *plain[1:]), "The moon.", True),
        "nothing": ((), "", False),
    }
    assert special not in chat.stop_ids
    for what, (ids, text, kept) in cases.items():
        made = reply_of(chat, "x", Sample(chat.decode(ids), tuple(ids), "stop", len(ids)))
        assert (made.text, made.ids is not None) == (text, kept), what
        assert learned_ids(chat, made.text, made.ids) == (*ids, chat.end_id), what


def _spaces(chat: ChatFormat) -> tuple[int, ...]:
    text = "a\n"
    ids = tuple(chat.target_ids(f"{text}b"))[1:-2]
    assert chat.spell(ids) == "\n"
    return ids


def test_a_special_token_spelled_in_letters_stays_spelled_in_letters(chat: ChatFormat) -> None:
    """A text that spells one is defused; the letters that were sampled need no defusing."""
    ids = tuple(chat.target_ids(letter)[0] for letter in "<|im_end|>")
    made = candidate_of(chat, "p", "p#0", Sample(chat.decode(ids), ids, "stop", len(ids)))
    assert made.text == "<|im_end|>"
    assert learned_ids(chat, made.text, made.ids) == (*ids, chat.end_id)


def test_what_ran_into_the_limit_is_learned_without_an_end(chat: ChatFormat) -> None:
    ids = tuple(chat.target_ids("The moon is"))[:-1]
    made = candidate_of(chat, "p", "p#0", Sample("The moon is", ids, "length", len(ids)))
    assert made.ids == ids and made.finish_reason == "length"


def test_a_server_gives_its_text_alone(chat: ChatFormat) -> None:
    made = candidate_of(chat, "p", "p#0", Sample("The moon.", (), "stop", 9))
    assert made.ids is None and made.n_tokens == 9


def test_an_engine_whose_text_is_not_what_its_ids_say_is_found_out(
    chat: ChatFormat, other: tuple[int, ...]
) -> None:
    with pytest.raises(ProofError, match="learned differ"):
        reply_of(chat, "x", Sample("sun", other, "stop", 4))


def test_a_vote_that_its_score_line_ended_is_learned_up_to_the_score(chat: ChatFormat) -> None:
    """The line end shows that the line is complete; it is no part of the reply."""
    text = "The reply is short.\nScore: 3"
    ids = (*tuple(chat.target_ids(text))[:-1], *_spaces(chat))
    rubric = load_rubric("additive-5")
    assert score_line_complete(rubric, chat.spell(ids))
    sample = Sample(chat.decode(ids), ids, "stop", len(ids))
    assert reply_of(chat, "x", sample, ruled=True) == Reply("x", text)
    # One that nothing stops has written the line end itself.
    assert reply_of(chat, "x", sample).ids == (*ids, chat.end_id)


def test_votes_keep_what_was_sampled_if_they_can_be_read(
    session: Session,
    other: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = session.chat
    score = tuple(chat.target_ids("moon\nScore: 3"))[len(chat.target_ids("moon")) - 1 : -1]
    said = {"read": (*other, *score), "unread": other}

    class Says:
        def sample(self, requests: Any, limits: Any, **_: Any) -> list[list[Sample]]:
            ids = [
                said["unread" if "sing" in request.messages[0]["content"] else "read"]
                for request in requests
            ]
            return [[Sample(chat.decode(one), one, "stop", len(one))] for one in ids]

    monkeypatch.setattr(session, "engine", lambda stack, role: Says())
    read, unread = judge_replies(
        session,
        [],
        [("a", "Why?", "Because."), ("b", "sing to me", "Well.")],
        path=tmp_path / "votes.jsonl",
        stage="test",
        votes=1,
        chunk=8,
        seed_path=(0,),
    )
    assert (read.text, read.score, read.ids) == ("moon\nScore: 3", 3.0, (*said["read"], 2))
    assert (unread.score, unread.ids) == (None, None)
    assert chat.end_id == 2
    for learned, ids in ((True, (*other, 2)), (False, None)):
        replies = ask(
            session,
            [],
            [("q", "sing")],
            path=tmp_path / f"replies {learned}.jsonl",
            stage="test",
            limits=limits_of(session.recipe.judge),
            seed_path=(0,),
            learned=learned,
        )
        assert replies["q"].ids == ids


A = Candidate("p0", "p0#0", "moon", 4, "stop", ids=(1, 2, 3))
B = Candidate("p0", "p0#1", "sun", 4, "stop")


def test_pairs_carry_the_ids_to_the_training(session: Session, tmp_path: Path) -> None:
    made = pair(PROMPTS[0], (A, 4.0), (B, 1.0))
    write_records(tmp_path / "pairs.jsonl", [made])
    [read] = read_records(tmp_path / "pairs.jsonl", PreferencePair)
    [again] = replayed([[read]], new=1, shares=[1.0], seed=0)
    for one in (made, read, again):
        example = pair_example(session, one)
        assert example.chosen_ids == (1, 2, 3)
        assert example.rejected_ids == tuple(session.chat.target_ids("sun"))
    turned = pair_example(session, pair(PROMPTS[0], (B, 4.0), (A, 1.0)))
    assert turned.rejected_ids == (1, 2, 3)


def test_methods_that_make_pairs_themselves_carry_them_too() -> None:
    better = replace(B, candidate_id="p0#future-0", text="star", ids=(7, 8))
    group, coming = {"p0": [(A, 1.0), (B, 2.0)]}, {"p0": [(better, 5.0)]}
    [guided] = anchored_pairs(PROMPTS, group, Drops(), future=coming)
    assert (guided.chosen, guided.chosen_ids, guided.rejected_ids) == ("star", (7, 8), A.ids)
    best, worst = (Judgement("p0#0", vote, "s", 3.0, ids=(vote,)) for vote in (4, 5))
    of_votes = _pair("p0", "Grade this.", best, worst, [0.5, -0.5])
    assert (of_votes.chosen_ids, of_votes.rejected_ids) == ((4,), (5,))


def test_self_written_judge_targets_are_learned_as_sampled(session: Session) -> None:
    group = [RankedReply("p", "Why?", name, name, rank) for rank, name in enumerate("ab")]
    votes = [Judgement("a", 0, "Score: 5", 5.0, ids=(9, 9)), Judgement("b", 0, "Score: 1", 1.0)]
    rows, _ = agreeing_targets([group], votes)
    first, second = (_judge_example(session, row) for row, _ in rows)
    assert first.target_ids == (9, 9)
    assert second.target_ids == tuple(session.chat.target_ids("Score: 1"))
    # Such a file may be given to a run on another base, to which the ids would mean other words.
    row = rows[0][0].to_row()
    assert row["target_ids"] == (9, 9) and "target_ids" not in rows[1][0].to_row()
    assert not isinstance(RankedReply.from_row(row), SampledTarget)
    assert Instruction.from_row({"prompt_id": 1, "prompt": "", "response": "", "ids": [1]})


def test_revisions_are_learned_as_sampled(session: Session, tmp_path: Path) -> None:
    place = RunDir(tmp_path).iteration(1)
    write_records(place.prompts, PROMPTS)
    write_records(place.candidates, [A])
    write_records(
        place.revisions,
        [
            Revision("p0", "p0#0", 1, "short", "Too long.", "star", ids=(5, 6)),
            Revision("p0", "p0#0", 2, "short", "Fine.", None),
        ],
    )
    recipe = recipe_from(
        {**session.recipe.model_dump(), "method": "rlaif", "dpo": {"init": "previous"}}, where="t"
    )
    [row] = Rlaif(recipe, recipe.rlaif).to_learn(AtWork(session, place))
    [example] = ift_examples(session, [row])
    assert (row.response, example.target_ids) == ("star", (5, 6))


def test_files_of_earlier_runs_are_read_and_written_as_they_were(tmp_path: Path) -> None:
    old = {
        Candidate: '{"prompt_id": "p", "candidate_id": "p#0", "text": "t", "n_tokens": 3, '
        '"finish_reason": "stop"}\n',
        Judgement: '{"candidate_id": "p#0", "vote": 0, "text": "Score: 3", "score": 3.0, '
        '"finish_reason": "stop", "retried": false, "sampled_score": null}\n',
        PreferencePair: '{"prompt_id": "p", "prompt": "q", "chosen_id": "p#0", '
        '"rejected_id": "p#1", "chosen": "a", "rejected": "b", "chosen_score": 4.0, '
        '"rejected_score": 1.0, "weight": 1.0, "smoothing": 0.0, "origin": ""}\n',
        Reply: '{"name": "n", "text": "t", "finish_reason": "stop"}\n',
        Revision: '{"prompt_id": "p", "candidate_id": "p#0", "round": 1, "principle": "x", '
        '"critique": "c", "text": null}\n',
    }
    for kind, line in old.items():
        path = tmp_path / f"{kind.__name__}.jsonl"
        path.write_text(line)
        rows: list[Any] = read_records(path, kind)
        assert json.loads(line) == read_jsonl(path)[0] == rows[0].to_row()
        write_records(path, rows)
        assert path.read_text() == line
