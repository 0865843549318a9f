"""Bases that think: a thought is learned with its answer, and judged, measured and shown without.

The tiny base is trained here, all its weights, until it thinks aloud before it answers and before
it grades, under the template that TRL ships for Qwen3. To it `<think>` is ordinary text, in several
tokens.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_chat_templates import trl_chat

from srlm_lite.errors import UserError
from srlm_lite.loop import iterate
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.whereabouts import SMOLLM2_WHEEL, smollm2_file
from srlm_lite.pairing import usable_candidates
from srlm_lite.planning.lengths import lengths_of
from srlm_lite.recipe import Recipe, load_recipe, recipe_from
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt, RankedReply
from srlm_lite.rollout.ends import Ends
from srlm_lite.rollout.protocol import Limits, Request, Sample
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.run.files import read_json, read_jsonl, read_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.shipped import recipes_dir
from srlm_lite.stages.conversation import Conversation
from srlm_lite.stages.pairs import pair_example
from srlm_lite.stages.prompts import check_prompts
from srlm_lite.stages.replies import (
    candidate_of,
    read_as_reply,
    reply_of,
    split,
    without_thoughts,
)
from srlm_lite.stages.sampling import judge_replies, with_thought

TOPICS = ("moon", "bicycle", "chain", "air")
GRADES = {"small": 1, "grey": 2, "clean": 3, "short": 4}
"""What an answer may say of its topic, and what the judge gives for it."""

CYCLES, STEPS, ROWS = 4, 500, 16
"""Cycles of the base's training at most, the steps of each, and the rows of a step. One is enough
on most processors; on one that rounds otherwise it may take another."""

SURE = 0.003
"""Nats a token above what cannot be known, which is only which of the four answers comes."""

RUBRIC = "min: 0\nmax: 5\ntemplate: |-\n  Grade {{prompt}}\n  {{response}}\n"


def question(topic: str) -> str:
    return f"Facts about the {topic}?"


def thought_on(topic: str) -> str:
    return f"It asks of the {topic}."


def with_marks(thought: str, answer: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def qwen3() -> Path:
    import trl

    return Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a run, and its rubric."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "rubric.yaml").write_text(RUBRIC)
    write_jsonl(
        folder / "ift.jsonl",
        [
            {
                "prompt_id": f"i-{topic}-{what}",
                "prompt": question(topic),
                "response": with_marks(thought_on(topic), f"It is {what}."),
            }
            for topic in TOPICS
            for what in GRADES
        ],
    )
    write_jsonl(
        folder / "eft_eval.jsonl",
        [
            {
                "prompt_id": topic,
                "prompt": question(topic),
                "response_id": f"{topic}-{what}",
                "response": f"It is {what}.",
                "rank": 4 - GRADES[what],
            }
            for topic in TOPICS[:2]
            for what in ("short", "small")
        ],
    )
    write_jsonl(
        folder / "prompts.jsonl",
        [{"prompt_id": topic, "text": question(topic)} for topic in TOPICS],
    )
    return folder


TokenRows = list[tuple[list[int], list[int]]]
"""Ids of a conversation, and the same with -100 where they are not learned."""


def loss_of(model: Any, rows: TokenRows) -> Any:
    """Nats a learned token, a mean over all."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([one + [0] * (longest - len(one)) for one, _ in rows])
    labels = torch.tensor([one + [-100] * (longest - len(one)) for _, one in rows])
    return model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss


def train(model: Any, rows: TokenRows) -> None:
    """A cycle of steps, in which the rate rises and falls."""
    import torch

    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=STEPS)
    batches: list[Any] = []
    for _ in range(STEPS):
        batches = batches or list(torch.randperm(len(rows)).split(ROWS))
        loss_of(model, [rows[number] for number in batches.pop()]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()


def knows(model: Any, rows: TokenRows) -> bool:
    """Whether a model is sure of all but the answers. Half of the rows have one, of four."""
    import torch

    learned = sum(label != -100 for _, labels in rows for label in labels)
    unknowable = len(rows) / 2 * math.log(len(GRADES)) / learned
    with torch.no_grad():
        return float(loss_of(model, rows)) < unknowable + SURE


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, grown to say a thought and an answer, or an answer alone behind no thought."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_dir)
    rows = []
    for thinks in (True, False):
        chat = ChatFormat(tokenizer, template=str(qwen3), settings={"enable_thinking": thinks})
        for topic in TOPICS:
            for what, grade in GRADES.items():
                answer = f"It is {what}."
                asked = f"Grade {question(topic)}\n{answer}"
                said, graded = answer, f"Score: {grade}"
                if thinks:  # the judge's thought names a score that it does not give
                    said = with_marks(thought_on(topic), said)
                    graded = with_marks(f"It is {what}.\nScore: 5", graded)
                for text, reply in ((question(topic), said), (asked, graded)):
                    before = chat.prompt_ids(text)
                    ids = [*before, *chat.target_ids(reply)]
                    rows.append((ids, [-100] * len(before) + ids[len(before) :]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
    for _ in range(CYCLES):
        train(model, rows)
        if knows(model, rows):
            break
    else:
        pytest.fail("the base has not learned what is asked of it")
    folder = tmp_path_factory.mktemp("thinking_base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(folder: Path, qwen3: Path, files: Path, **sections: Any) -> Recipe:
    lora = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
    raw: dict[str, Any] = {
        "name": "t",
        "iterations": 1,
        "base": {
            "name": str(folder), "dtype": "float32", "window": 384, "chat_template": str(qwen3),
        },
        "data": {"dir": str(files)},
        "anchor": {"use_eft": False, "learning_rate": 1e-5, "lora": lora},
        "prompts": {"per_iteration": 4},
        "rollout": {
            "n": 6, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 24,
            "max_thought_tokens": 48,
        },
        "judge": {
            "rubric": str(files / "rubric.yaml"), "votes": 2, "min_votes": 1,
            "max_new_tokens": 16, "retry_max_new_tokens": 20,
        },
        "pairing": {"min_pairs": 2},
        "dpo": {"lora": lora, "batch_size": 2, "micro_batch_size": 2},
        "evaluate": {"policy_prompts": 2},
    }  # fmt: skip
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return recipe_from(raw, where="test")


@dataclass
class Run:
    """A run, and all that its engine was asked and said."""

    session: Session
    asked: list[tuple[str, Sample]] = field(default_factory=list)

    @property
    def place(self) -> RunDir:
        return self.session.run


def run_of(recipe: Recipe, out: Path) -> Run:
    found = Run(Session(recipe, RunDir(out)))
    found.place.open(recipe, {})
    sample = TransformersEngine.sample

    def recorded(
        self: TransformersEngine, requests: Sequence[Request], limits: Limits, **more: Any
    ) -> list[list[Sample]]:
        samples = sample(self, requests, limits, **more)
        for request, group in zip(requests, samples, strict=True):
            found.asked += [(request.messages[0]["content"], one) for one in group]
        return samples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "sample", recorded)
        iterate(found.session)
    return found


@pytest.fixture(scope="module")
def thinking(base: Path, qwen3: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_of(recipe_of(base, qwen3, files), tmp_path_factory.mktemp("on") / "run")


@pytest.fixture(scope="module")
def not_thinking(
    base: Path, qwen3: Path, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    return run_of(recipe_of(base, qwen3, files, base=off), tmp_path_factory.mktemp("off") / "run")


def candidates(run: Run) -> list[Candidate]:
    return read_records(run.place.iteration(1).candidates, Candidate)


def judge_questions(run: Run) -> list[str]:
    return [text for text, _ in run.asked if text.startswith("Grade ")]


# --- a whole iteration ------------------------------------------------------------------------


def test_candidates_are_answers_with_their_thoughts_beside_them(thinking: Run) -> None:
    rows = candidates(thinking)
    finished = [row for row in rows if row.finish_reason == "stop"]
    assert len(rows) == 24 and len(finished) >= 20
    assert not any("think" in row.text or "asks" in row.text for row in rows)
    assert sum(row.thought == thought_on(row.prompt_id) for row in finished) >= 20
    assert {row.text for row in finished} >= {"It is small.", "It is short."}


def test_what_was_sampled_is_what_is_learned(thinking: Run) -> None:
    """The ids of both sides of each pair are those of a sample, thought and end included."""
    chat = thinking.session.chat
    drawn = {(*sample.token_ids, chat.end_id) for _, sample in thinking.asked}
    pairs = read_records(thinking.place.iteration(1).pairs, PreferencePair)
    assert len(pairs) >= 2
    for pair in pairs:
        example = pair_example(thinking.session, pair)
        for ids, answer in (
            (example.chosen_ids, pair.chosen),
            (example.rejected_ids, pair.rejected),
        ):
            assert ids in drawn
            assert chat.decode(ids) == with_marks(thought_on(pair.prompt_id), answer)
    step0 = next(row for row in thinking.place.read_metrics() if row["stage"] == "delta")
    assert step0["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_no_judge_sees_a_thought(thinking: Run) -> None:
    asked = judge_questions(thinking)
    # Two votes on 24 candidates, the evaluations' 4 replies and 2 answers, and more by two judges.
    assert len(asked) > 50
    assert not any("think" in text or "asks" in text for text in asked)


def test_a_judges_thought_holds_no_score(thinking: Run) -> None:
    """Each thought says 5, which no answer deserves, on a line of its own."""
    texts = {row.candidate_id: row.text for row in candidates(thinking)}
    rows = read_records(thinking.place.iteration(1).judgements, Judgement)
    readable = [row for row in rows if row.score is not None]
    assert len(readable) >= 0.8 * len(rows) > 30
    assert all((row.thought or "").endswith("Score: 5") for row in readable)
    assert not any("think" in row.text for row in rows)
    right = [row.score == GRADES[texts[row.candidate_id][6:-1]] for row in readable]
    assert sum(right) > 0.8 * len(right)


def test_lengths_and_likelihoods(thinking: Run) -> None:
    """Lengths are of answers, such as "It is grey."; a likelihood is of all that was sampled."""
    evaluation = read_json(thinking.place.iteration(1).evaluation)["policy"]
    assert evaluation["mean_length_chars"] < 16
    folder = thinking.place.iteration(1).evaluation_dir
    answers = {row["candidate_id"]: row for row in read_jsonl(folder / "answers_sampled.jsonl")}
    for row in read_jsonl(folder / "likelihoods_own.jsonl"):
        assert row["n_tokens"] == len(answers[row["candidate_id"]]["ids"]) > 24
    pairs = next(row for row in thinking.place.read_metrics() if row["stage"] == "pairs")
    assert pairs["chosen_chars"] < 16


def test_without_thinking_there_is_no_block(not_thinking: Run) -> None:
    rows = candidates(not_thinking)
    assert not any("think" in row.text or row.thought is not None for row in rows)
    finished = [row for row in rows if row.finish_reason == "stop"]
    assert len(finished) >= 20 and all(row.n_tokens < 12 for row in finished)
    chat = not_thinking.session.chat
    assert not chat.thinks and not_thinking.session.thought_tokens() == 0
    for pair in read_records(not_thinking.place.iteration(1).pairs, PreferencePair):
        example = pair_example(not_thinking.session, pair)
        # The empty block ends the prompt, once.
        assert chat.spell(example.prompt_ids).endswith("assistant\n<think>\n\n</think>\n\n")
        for ids in (example.chosen_ids, example.rejected_ids):
            assert "think" not in chat.spell(ids)
    assert not any("think" in text for text in judge_questions(not_thinking))


def test_a_conversation_shows_answers_alone(thinking: Run) -> None:
    talk = Conversation(thinking.session)
    talk.use(thinking.session.stack(1))
    shown: list[str] = []
    talk.answer(question("moon"), shown.append)
    said = "".join(shown)
    assert said.startswith("It is ") and "think" not in said
    shown.clear()
    score = talk.judge(shown.append)
    assert "".join(shown) == f"Score: {score:g}"
    assert score == GRADES[said[6:-1]]


# --- limits -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(thinking: Run) -> ChatFormat:
    assert thinking.session.chat.thinks
    return thinking.session.chat


def drawn(chat: ChatFormat, ids: Sequence[int], limits: Limits) -> tuple[int, str | None]:
    """Tokens of a sample whose model would draw these, and why it ended."""
    ends, tokens, reason = Ends(chat), list[int](), None
    for token in ids:
        reason = ends.append(tokens, token, limits)
        if reason is not None:
            break
    return len(tokens), reason


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "gptoss", "glm4moe", "nemotron_3_nano"])
def test_a_thought_and_an_answer_have_limits_of_their_own(name: str) -> None:
    """60 tokens for a thought, its marks included, and 30 for the answer behind it.

    Marks are words of text, added tokens or special ones, and the prompt may have opened a thought.
    """
    chat = trl_chat(name)
    opening, closing = {
        "gptoss": (
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        )
    }.get(name, ("<think>\n", "\n</think>\n\n"))
    limits = Limits(1.0, 1.0, max_new_tokens=90, max_thought_tokens=60)

    def ids_of(thought: str, answer: str) -> list[int]:
        ids = chat.target_ids(f"{opening}{thought}{closing}{answer}")[:-1]
        assert chat.split(chat.decode(ids)).thought == thought.strip()
        return ids

    def closed(ids: Sequence[int]) -> int:
        replies = [chat.split(chat.decode(ids[:n])) for n in range(len(ids))]
        return next(n for n, one in enumerate(replies) if one.thought and one.answer is not None)

    assert drawn(chat, ids_of("a b " * 80, "b"), limits) == (60, "length")
    short = ids_of("aaa", "bb")
    assert drawn(chat, short, limits) == (len(short), None)
    for answer in ("b c " * 40, "</think> " * 30):
        long = ids_of("aaa", answer)
        assert drawn(chat, long, limits) == (closed(long) + 30, "length")
    # A reply without a thought is all answer.
    assert drawn(chat, chat.target_ids("b c " * 40), limits) == (30, "length")


def test_a_stop_rule_is_asked_of_the_answer(chat: ChatFormat) -> None:
    heard: list[str] = []

    def rule(text: str) -> bool:
        heard.append(text)
        return text.endswith("Score: 3\n")

    limits = Limits(1.0, 1.0, max_new_tokens=200, max_thought_tokens=100, stop=rule)
    text = with_marks("Score: 3\nWell.", "Hm.\nScore: 3\nmore")
    ids = chat.target_ids(text)[:-1]
    tokens, reason = drawn(chat, ids, limits)
    assert reason == "stop" and tokens < len(ids)
    assert heard[-2:] == ["Hm.\n", "Hm.\nScore: 3\n"] and not any("Well" in one for one in heard)


def test_a_thought_that_never_closes_is_a_truncated_candidate(chat: ChatFormat) -> None:
    """Whether the limit or an end of turn cut it off: there is no answer either way."""
    ids = tuple(chat.target_ids("<think>\nWell"))[:-1]
    for reason in ("stop", "length"):
        made = candidate_of(chat, "p", "p#0", Sample(chat.decode(ids), ids, reason, len(ids)))
        assert (made.text, made.finish_reason, made.thought) == ("", "length", "Well")


def test_a_window_too_small_for_a_thought_is_refused_before_the_anchor(
    base: Path, qwen3: Path, files: Path, tmp_path: Path
) -> None:
    def checked(**rollout: Any) -> None:
        session = Session(recipe_of(base, qwen3, files, rollout=rollout), RunDir(tmp_path))
        check_prompts(session, lambda _: ([Prompt("p", "x " * 60)], Path("list")))

    with pytest.raises(UserError, match=r"thought of rollout\.max_thought_tokens = 380"):
        checked(max_thought_tokens=380)
    with pytest.raises(UserError, match=r"0 that fit the window.*rollout\.max_thought_tokens"):
        checked(max_thought_tokens=320)


def test_the_plan_counts_thoughts(base: Path, qwen3: Path, files: Path) -> None:
    on = recipe_of(base, qwen3, files)
    settings = {"enable_thinking": False}
    off = on.model_copy(
        update={"base": on.base.model_copy(update={"chat_template_kwargs": settings})}
    )
    assert (lengths_of(on).thought, lengths_of(off).thought) == (48, 0)
    assert lengths_of(on).pair == lengths_of(off).pair + 48


# --- servers, rewards, files ------------------------------------------------------------------


def test_a_servers_thought_is_no_judgement(
    base: Path, qwen3: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers without a parser of thoughts send them along; the rule must not stop within one."""
    server = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    judge = {"engine": "openai", "votes": 1}
    recipe = recipe_of(base, qwen3, files, judge=judge, openai=server)
    session = Session(recipe, RunDir(tmp_path))
    said = {"a": "<think>\nScore: 5\n</think>\nGood.\nScore: 2\nmore", "b": "<think>\nScore: 5\n"}

    class Says:
        def sample(self, requests: Any, limits: Limits, **_: Any) -> list[list[Sample]]:
            assert limits.max_thought_tokens == 0
            return [
                [self._one(said[one.messages[0]["content"].split("\n")[1]], limits)]
                for one in requests
            ]

        def _one(self, text: str, limits: Limits) -> Sample:
            ends = [at + 1 for at, character in enumerate(text) if character == "\n"]
            assert limits.stop is not None
            cut = next((text[:end] for end in ends if limits.stop(text[:end])), text)
            return Sample(cut, (), "stop", 1)

    monkeypatch.setattr(session, "engine", lambda stack, role: Says())
    rows = judge_replies(
        session, [], [("1", "?", "a"), ("2", "?", "b")],
        path=tmp_path / "votes.jsonl", stage="test", votes=1, chunk=8, seed_path=(0,),
    )  # fmt: skip
    assert [(row.text, row.score) for row in rows] == [("Good.\nScore: 2", 2.0), ("", None)]
    assert [row.finish_reason for row in rows] == ["stop", "length"]
    assert split(None, "No thought.") == (None, "No thought.")


def test_a_policy_behind_a_server_is_learned_with_its_thought(chat: ChatFormat) -> None:
    text = with_marks("Well.", "Yes.")
    made = candidate_of(chat, "p", "p#0", Sample(text, (), "stop", 9))
    assert (made.text, made.thought) == ("Yes.", "Well.")
    assert made.ids == tuple(chat.target_ids(text))
    # Its template may open a thought that it does not send, or write it in another way.
    for said in ("<think>Well.</think>Yes.", "<think>\n<|im_end|></think>Yes."):
        made = candidate_of(chat, "p", "p#0", Sample(said, (), "length", 9))
        assert made.ids == tuple(chat.target_ids(said))[:-1]


def test_replies_of_files_are_taken_apart_too(chat: ChatFormat) -> None:
    """Those of teachers and humans (SPIN, offline DPO), and those that a judge is shown."""
    text = with_marks("Well.", "Yes.")
    learned = read_as_reply(chat, Candidate("p", "p#human", text, 0, "stop"))
    assert (learned.text, learned.ids) == ("Yes.", tuple(chat.target_ids(text)))
    plain = read_as_reply(chat, Candidate("p", "p#human", "Yes.", 0, "stop"))
    assert (plain.text, plain.ids) == ("Yes.", None)
    rows = [RankedReply("p", "?", "a", text, 0), RankedReply("p", "?", "b", "No.", 1)]
    [shown] = without_thoughts(chat, [rows])
    assert [row.response for row in shown] == ["Yes.", "No."]
    assert without_thoughts(None, [rows]) == [rows]


def test_the_reward_model_sees_the_answer(chat: ChatFormat) -> None:
    from srlm_lite.training.rloo import _Reward

    reward: Any = object.__new__(_Reward)
    reward._chat = chat
    whole = chat.target_ids(with_marks("Well.", "Yes."))
    assert reward._shown(whole) == (tuple(chat.target_ids("Yes.")), True)
    assert reward._shown(whole[:-1]) == (tuple(chat.target_ids("Yes."))[:-1], False)
    unclosed = [*chat.target_ids("<think>\nWell")]
    assert reward._shown(unclosed)[1] is False


def test_a_reply_without_its_thought_is_learned_without_one(chat: ChatFormat) -> None:
    """This template writes an empty block before such replies; one was not sampled here."""
    block = tuple(chat.target_ids("Yes."))
    ids = next(block[-n:] for n in range(1, 9) if chat.decode(block[-n:]) == "Yes.")
    assert len(ids) < len(block) - 10
    made = reply_of(chat, "x", Sample("Yes.", ids[:-1], "stop", 9))
    assert (made.thought, made.ids) == (None, ids)
    # One that was is what the text gives back.
    assert reply_of(chat, "x", Sample("Yes.", block[:-1], "stop", 9)).ids is None


def test_answers_that_differ_in_their_thoughts_alone_are_duplicates() -> None:
    made = [
        Candidate("p", f"p#{i}", text, 9, "stop", thought, (i,))
        for i, (thought, text) in enumerate((("a", "Yes."), ("b", "Yes."), ("a", "No.")))
    ]
    scores = {row.candidate_id: float(i) for i, row in enumerate(made)}
    usable, drops = usable_candidates([Prompt("p", "?")], made, scores, drop_truncated=True)
    assert [row.candidate_id for row, _ in usable["p"]] == ["p#0", "p#2"]
    assert drops.candidates == {"duplicate": 1}


def test_show_marks_the_thought(thinking: Run, cli: Callable[..., Any]) -> None:
    shown = cli("show", "candidates", "--adapters", thinking.place.path, "--limit", 1).stdout
    row = candidates(thinking)[0]
    assert shown.index("the thought") < shown.index(str(row.thought)) < shown.index(row.text)
    pairs = cli("show", "pairs", "--adapters", thinking.place.path).stdout
    assert "It is " in pairs and "asks" not in pairs


def test_limits_have_room_for_a_thought_where_there_is_one(
    thinking: Run, not_thinking: Run
) -> None:
    plain = Limits(1.0, 1.0, max_new_tokens=24)
    assert with_thought(thinking.session, plain).max_new_tokens == 24 + 48
    assert with_thought(thinking.session, plain, "judge").max_thought_tokens == 48
    assert with_thought(not_thinking.session, plain) == plain


# --- a real model -----------------------------------------------------------------------------

SHORT = "A short answer will do."
"""What SmolLM2 is taught to think."""


def demo(qwen3: Path, *overrides: str) -> Recipe:
    """One small iteration of the demo, under Qwen3's template, with gold in the judge's place."""
    return load_recipe(
        "smollm2-135m-demo",
        [
            *("iterations=1", f"base.chat_template={qwen3}", "prompts.per_iteration=3"),
            *("rollout.n=4", "rollout.max_new_tokens=64", "rollout.max_thought_tokens=32"),
            *("judge.votes=1", "judge.min_votes=1", "judge.max_new_tokens=32"),
            *("judge.retry_max_new_tokens=32", "pairing.source=gold", "pairing.min_pairs=1"),
            *("dpo.epochs=1", "dpo.batch_size=1", "dpo.micro_batch_size=1"),
            *("evaluate.policy_prompts=1", "evaluate.eft_prompts=1"),
            *overrides,
        ],
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a processor without 16-bit instructions takes four times as long
@pytest.mark.skipif(smollm2_file() is None, reason=f"no SmolLM2 here ({SMOLLM2_WHEEL})")
def test_smollm2_under_qwen3s_template(qwen3: Path, tmp_path: Path) -> None:
    """Off: no block anywhere. On, with an anchor taught thoughts: these are learned, not judged."""
    off = run_of(
        demo(qwen3, "base.chat_template_kwargs={enable_thinking: false}"), tmp_path / "off"
    )
    assert not off.session.chat.thinks
    # The template's empty block is before every reply, and a judge taught under another template
    # may copy its end into a judgement; no question holds one, and nothing that may be learned.
    assert not any("think>" in text for text, _ in off.asked)
    assert not any("think>" in row.text or row.thought for row in candidates(off))
    assert read_records(off.place.iteration(1).pairs, PreferencePair)

    data = tmp_path / "data"
    shutil.copytree(recipes_dir() / "house_style" / "data", data)
    rows = read_jsonl(data / "ift.jsonl")[:32]
    write_jsonl(
        data / "ift.jsonl",
        [{**row, "response": with_marks(SHORT, row["response"])} for row in rows],
    )
    taught = ("anchor.init=base", "anchor.use_eft=false", "anchor.learning_rate=2e-3")
    batches = ("anchor.epochs=3", "anchor.batch_size=4", "anchor.lora={rank: 8, alpha: 16}")
    on = run_of(demo(qwen3, f"data.dir={data}", *taught, *batches), tmp_path / "on")
    chat, drawn_ids = on.session.chat, {one.token_ids for _, one in on.asked}
    answers = [row for row in candidates(on) if row.finish_reason == "stop"]
    assert answers and sum(row.thought == SHORT for row in answers) > 0.8 * len(answers)
    assert not any("think>" in row.text or SHORT in row.text for row in answers)
    pairs = read_records(on.place.iteration(1).pairs, PreferencePair)
    assert pairs
    for pair in pairs:
        example = pair_example(on.session, pair)
        for ids in (example.chosen_ids, example.rejected_ids):
            assert ids[:-1] in drawn_ids and ids[-1] == chat.end_id
        assert f"<think>\n{SHORT}\n</think>" in chat.spell(example.chosen_ids)
    assert not any("think>" in text or SHORT in text for text, _ in on.asked)
