"""MT-Bench of a model: it answers both turns of each question, and a server grades the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_lite.compare.models import RunModel, digest_of, file_name
from srlm_lite.conversation import messages_of
from srlm_lite.errors import UserError
from srlm_lite.evaluate.mt_bench import (
    TEMPERATURES,
    WITH_REFERENCE,
    WRITTEN,
    Grade,
    mt_bench,
    read_rating,
)
from srlm_lite.questions import load_question
from srlm_lite.quoting import fill
from srlm_lite.records import Candidate, Prompt
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.run.files import read_json, read_jsonl, write_json
from srlm_lite.run.layout import MtBenchDir
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Advance, Session
from srlm_lite.stages.chunks import chunked, journaled
from srlm_lite.stages.replies import candidate_of
from srlm_lite.stages.sampling import ask, draw, with_thought
from srlm_lite.window import leaves_room

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

TAGS = ("user", "assistant", "reference")
"""What may stand around the texts of a conversation in the judge's question."""


@dataclass(frozen=True, slots=True)
class Question:
    """Two user turns; `references` are right answers to them, where they are known."""

    question_id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None


def read_questions(path: Path, references: Path | None) -> list[Question]:
    """Questions in MT-Bench's format, and the reference answers of another file.

    Args:
        path: JSONL with `question_id`, `category` and two `turns`.
        references: JSONL with `question_id` and `choices[0].turns`. Only those for math, coding
            and reasoning are used.

    Raises:
        UserError: A row is of another form, or two share an id.
    """
    right: dict[str, tuple[str, str]] = {}
    for number, row in enumerate([] if references is None else read_jsonl(references), start=1):
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        turns = _two_texts(first.get("turns") if isinstance(first, dict) else None)
        if turns is None or "question_id" not in row:
            raise UserError(
                f"row {number} lacks question_id or choices[0].turns", where=str(references)
            )
        right[str(row["question_id"])] = turns
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        turns, name = _two_texts(row.get("turns")), str(row.get("question_id", ""))
        category = row.get("category")
        if turns is None or not name or not isinstance(category, str):
            raise UserError(
                f"row {number} lacks question_id, category or two turns", where=str(path)
            )
        if name in questions:
            raise UserError(f"two questions have the id {name}", where=str(path))
        reference = right.get(name) if category in WITH_REFERENCE else None
        questions[name] = Question(name, category, turns, reference)
    if not questions:
        raise UserError("holds no questions", where=str(path))
    return list(questions.values())


def _two_texts(value: Any) -> tuple[str, str] | None:
    texts = value if isinstance(value, list) and len(value) == 2 else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return texts[0], texts[1]


def run_mt_bench(
    model: RunModel, questions: Sequence[Question], judge: Session
) -> tuple[dict[str, Any], Path]:
    """The model's MT-Bench by a judge behind a server, and the folder that holds all of it.

    Args:
        judge: Its engine in the judge's role is the server.
    """
    place = _place(model, questions, judge)
    if place.result.is_file():
        return read_json(place.result), place.path
    judge.reach("judge")
    first = _answers(model, questions, {}, place)
    second = _answers(model, questions, first, place)
    grades = _grades(judge, questions, (first, second), place)
    answers = [*first.values(), *second.values()]
    result = {
        "model": model.name,
        "judge": {
            "name": judge.recipe.openai.model,
            "url": judge.recipe.openai.url,
            "template": judge.recipe.mt_bench.template,
        },
        "questions": len(questions),
        "with_reference": sum(question.references is not None for question in questions),
        **mt_bench(grades),
        "truncated": sum(row.n_tokens > 0 and row.finish_reason == "length" for row in answers),
        "did_not_fit": sum(row.n_tokens == 0 and row.finish_reason == "length" for row in answers),
    }
    write_json(place.result, result, noted=True)
    return result, place.path


def _place(model: RunModel, questions: Sequence[Question], judge: Session) -> MtBenchDir:
    recipe = judge.recipe
    decides = [
        model.digest,
        model.session.recipe.seed,
        _max_new_tokens(model.session),
        _top_p(model.session),
        questions,
        recipe.openai.url,
        recipe.openai.model,
        load_question("mt-bench", recipe.mt_bench.template),
        recipe.mt_bench.judge_max_new_tokens,
    ]
    name = file_name(model.name, "by", str(recipe.openai.model), digest_of(*decides))
    return judge.run.mt_bench(name)


def _max_new_tokens(session: Session) -> int:
    recipe = session.recipe
    wanted = recipe.mt_bench.max_new_tokens
    if wanted is None:
        return recipe.rollout.max_new_tokens
    return min(wanted, recipe.base.window // 2)


def _top_p(session: Session) -> float:
    return session.recipe.mt_bench.top_p or session.recipe.rollout.top_p


def answer_limits(session: Session, category: str) -> Limits:
    """How an answer to a category is drawn."""
    return Limits(
        temperature=TEMPERATURES.get(category, 0.0),
        top_p=_top_p(session),
        max_new_tokens=_max_new_tokens(session),
    )


def _answers(
    model: RunModel,
    questions: Sequence[Question],
    before: Mapping[str, Candidate],
    place: MtBenchDir,
) -> dict[str, Candidate]:
    """Answers to turn 1, or with those to turn 2; an answer without room for it is empty."""
    session, turn = model.session, 2 if before else 1
    rows = journaled(
        session,
        _Turn(model.stack(), turn, before),
        [
            part
            for _, same in groupby(questions, lambda one: TEMPERATURES.get(one.category, 0.0))
            for part in chunked(list(same), session.recipe.rollout.chunk_prompts)
        ],
        kind=Candidate,
        names=lambda question: [f"{question.question_id}#{turn}"],
        path=place.answers(turn),
        stage=f"answers, turn {turn}",
        unit="answers",
        role="policy",
    )
    return {row.prompt_id: row for row in rows}


@dataclass(frozen=True, slots=True)
class _Turn:
    """Answers to a chunk of questions whose categories are sampled alike."""

    stack: Sequence[Adapter]
    turn: int
    before: Mapping[str, Candidate]

    def __call__(
        self, session: Session, item: Sequence[Question], advance: Advance
    ) -> list[Candidate]:
        limits = with_thought(session, answer_limits(session, item[0].category))
        window = session.recipe.base.window
        requests = {one.question_id: self._request(session, one) for one in item}
        fitting = {
            name: request
            for name, request in requests.items()
            if leaves_room(len(request.prompt_ids), window, answer=limits.max_new_tokens)
        }
        drawn = draw(session, self.stack, "policy", fitting, limits, advance)
        advance(len(item) - len(fitting))
        found = {
            name: candidate_of(session.chat, name, f"{name}#{self.turn}", sample)
            for name, sample in drawn.items()
        }
        return [
            found.get(name, Candidate(name, f"{name}#{self.turn}", "", 0, "length"))
            for name in requests
        ]

    def _request(self, session: Session, question: Question) -> Request:
        name = question.question_id
        messages = messages_of(question.turns[0])
        if self.before:
            messages += [
                {"role": "assistant", "content": self.before[name].text},
                {"role": "user", "content": question.turns[1]},
            ]
        seed = derive_seed(session.recipe.seed, "mt-bench", self.turn, name)
        turns = session.chat.policy_turns(Prompt(name, "", messages=tuple(messages)))
        return Request(tuple(session.chat.render(turns, generation=True)), (seed,), turns)


def _grades(
    judge: Session,
    questions: Sequence[Question],
    answers: Sequence[Mapping[str, Candidate]],
    place: MtBenchDir,
) -> list[Grade]:
    section = judge.recipe.mt_bench
    template = load_question("mt-bench", section.template)
    asked = [
        (f"{question.question_id}#{turn}", judge_question(template, question, answers[:turn]))
        for question in questions
        for turn in (1, 2)
    ]
    replies = ask(
        judge,
        [],
        asked,
        path=place.grades,
        stage="grades",
        limits=Limits(temperature=0.0, top_p=1.0, max_new_tokens=section.judge_max_new_tokens),
        seed_path=(judge.recipe.seed, "mt-bench", "grades"),
    )
    return [
        Grade(
            question.question_id,
            question.category,
            turn,
            read_rating(reply.text, finish_reason=reply.finish_reason),
        )
        for question in questions
        for turn in (1, 2)
        for reply in [replies[f"{question.question_id}#{turn}"]]
    ]


def judge_question(
    template: str, question: Question, answers: Sequence[Mapping[str, Candidate]]
) -> str:
    """What the judge is asked about the last of these answers, with all that stands before it."""
    shape, texts = [], {"turn": str(len(answers))}
    for number, given in enumerate(answers, start=1):
        texts[f"user{number}"] = question.turns[number - 1]
        texts[f"answer{number}"] = given[question.question_id].text
        shape.append(f"<user {number}>\n{{{{user{number}}}}}\n</user {number}>")
        if question.references is not None:
            texts[f"reference{number}"] = question.references[number - 1]
            shape.append(f"<reference answer {number}>\n{{{{reference{number}}}}}")
            shape.append(f"</reference answer {number}>")
        shape.append(f"<assistant's answer {number}>\n{{{{answer{number}}}}}")
        shape.append(f"</assistant's answer {number}>")
    whole = template.replace("{{conversation}}", "\n".join(shape))
    return fill(whole, texts, WRITTEN, tags=TAGS)
