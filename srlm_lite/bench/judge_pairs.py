"""`srlm-lite bench judge --pairs` and `--disturbed`: how good is this judge, and at what price?

A judge is asked about replies of which it is known which are better: of a preference file, or made
by disturbing instructions. Every way of asking it stands beside the others, on the same replies. Of
a run's judge it is also told how it takes to its own model's answers where the quality is held
fixed: by the gold scorer, or by the anchor's grades.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from srlm_lite.bench.judges import BenchJudge
from srlm_lite.bench.named import named
from srlm_lite.data.preferences import JudgeTest, JudgeTests, read_judge_tests
from srlm_lite.declared import NoSettings
from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.evaluate.judge_tests import (
    GradedAnswer,
    KnownPair,
    accuracy_difference,
    all_above,
    best_credit,
    credit_of,
    pair_figures,
    prompt_shares,
    self_preference,
    style_figures,
)
from srlm_lite.forms import DEFAULT_FORM, FORMS, form_of
from srlm_lite.forms.grade import GradeForm
from srlm_lite.forms.tournament import verdict
from srlm_lite.judging import as_sampled, mean_scores, unasked, whole_scores
from srlm_lite.records import Candidate, Contest, Judgement, Prompt
from srlm_lite.run.files import read_records
from srlm_lite.run.layout import IterationDir, StageDir
from srlm_lite.settings import FormName
from srlm_lite.stages.disturbed import Disturbed, disturbed_pairs
from srlm_lite.stages.judges import judged
from srlm_lite.stages.likelihood import candidate_likelihoods
from srlm_lite.stages.seed_data import policy_prompts, prompt_file, read_prompts

if TYPE_CHECKING:
    from srlm_lite.session import Session


@dataclass(frozen=True, slots=True)
class Way:
    """One way of asking a judge, and what it made of all replies.

    Attributes:
        scores: By the reply's id; None cannot be read.
        unasked: Replies whose question does not fit the window.
        cost: `seconds`, and by reply `seconds_per_reply`, `read` and `written` tokens; empty where
            the way is part of another one's sampling.
        consistent: Of two replies, whether the verdict is the same in both orders.
    """

    scores: Mapping[str, float | None]
    unasked: int = 0
    cost: Mapping[str, float | None] = field(default_factory=dict)
    consistent: Mapping[tuple[str, str], bool] = field(default_factory=dict)


def forms_of(text: str | None) -> tuple[FormName, ...]:
    """The forms of judging named in a list with commas, the default one first; None: all.

    Raises:
        UserError: One that does not exist.
    """
    if text is None:
        return tuple(FORMS)
    return named(text, FORMS, what="form of judging", where="--forms")


def bench_judge_on_pairs(
    judge: BenchJudge, path: Path, prompts: int | None, forms: Sequence[FormName] = tuple(FORMS)
) -> dict[str, Any]:
    """All figures of a judge on a preference file.

    Args:
        prompts: At most so many of its prompts, spread over the file.
        forms: By which it is asked.

    Raises:
        UserError: As `read_judge_tests`.
    """
    found = read_judge_tests(path)
    some = found.at_most(prompts)
    source = {
        "pairs": str(path),
        "format": found.format,
        "tests": len(some),
        "of": len(found.tests),
        "dropped": dict(found.dropped),
    }
    return _result(judge, source, some, forms)


def bench_judge_on_disturbed(
    judge: BenchJudge, count: int, forms: Sequence[FormName] = tuple(FORMS)
) -> dict[str, Any]:
    """The same on pairs that the judge's own model makes of the run's prompts.

    Raises:
        UserError: No pair could be made.
    """
    prompts = _prompts(judge, count)
    made = disturbed_pairs(
        judge.session,
        judge.policy,
        prompts,
        folder=judge.scratch / "disturbed",
        seed_path=(judge.recipe.seed, "bench-disturbed"),
    )
    if not made.groups:
        told = ", ".join(f"{some} {reason}" for reason, some in made.drops.items())
        raise UserError(
            f"the model made no pair of {len(prompts)} prompts ({told})",
            where=f"anchor.disturb_template = {judge.recipe.anchor.disturb_template}",
            way_out="A base this small may have to be taught such questions, with rows of "
            "data.extra; or name a preference file with --pairs",
        )
    tests = JudgeTests("disturbed", tuple(map(_as_test, made.groups)), {})
    source: dict[str, Any] = {
        "disturbed": len(prompts),
        "tests": len(tests.tests),
        "dropped": dict(made.drops),
        "template": judge.recipe.anchor.disturb_template,
    }
    agreed = _gold_agreement(judge.recipe.evaluate.gold, made)
    return _result(judge, {**source, **agreed, "examples": _examples(made)}, tests.tests, forms)


def _prompts(judge: BenchJudge, count: int) -> list[Prompt]:
    """The run's own prompts, spread over their list; else held-out ones."""
    recipe = judge.recipe
    path = prompt_file(recipe) if recipe.prompts.source == "file" else None
    every = read_prompts(path) if path is not None and path.is_file() else policy_prompts(recipe)
    fitting = [prompt for prompt in every if judge.session.leaves_room(prompt)]
    if count >= len(fitting):
        return fitting
    return [fitting[place * len(fitting) // count] for place in range(count)]


def _as_test(group: Sequence[Any]) -> JudgeTest:
    winner, loser = group
    return JudgeTest(winner.prompt_id, winner.prompt, (winner.response, loser.response), ((0, 1),))


def _gold_agreement(name: str | None, made: Disturbed) -> dict[str, Any]:
    """How many of the pairs are in the gold order, where the recipe has a gold scorer."""
    if name is None:
        return {}
    gold = load_gold(name)
    credits = [
        credit_of(*(gold.total(row.prompt, row.response) for row in group)) or 0.0
        for group in made.groups
    ]
    return {"gold_agreement": round(fmean(credits), 4)}


def _examples(made: Disturbed, count: int = 3) -> list[dict[str, str]]:
    return [
        {
            "prompt": winner.prompt,
            "disturbed": made.instructions[winner.prompt_id],
            "winner": winner.response,
            "loser": loser.response,
        }
        for winner, loser in made.groups[:count]
    ]


# --- asking ---------------------------------------------------------------------------------------


def reply_id(test: JudgeTest, place: int) -> str:
    """The id under which a test's reply is judged."""
    return f"{test.name}#{place}"


def _result(
    judge: BenchJudge,
    source: Mapping[str, Any],
    tests: Sequence[JudgeTest],
    forms: Sequence[FormName],
) -> dict[str, Any]:
    refused: dict[str, str] = {}
    ways = dict(_ways(judge, tests, forms, refused))
    if not ways:
        raise UserError(
            f"this judge cannot be asked by any of them: {next(iter(refused.values()))}",
            where="--forms",
        )
    pairs = {name: pairs_of(tests, way) for name, way in ways.items()}
    first = next(iter(pairs))
    figures = {
        name: {
            **pair_figures(pairs[name]),
            **prompt_figures(tests, way),
            "styles": style_figures(pairs[name]),
            "unasked": way.unasked,
            "cost": dict(way.cost),
            "to_first": None if name == first else accuracy_difference(pairs[name], pairs[first]),
        }
        for name, way in ways.items()
    }
    return {
        "recipe": judge.recipe.name,
        "judge": judge.name,
        "rubric": judge.session.rubric.name,
        "source": dict(source),
        "replies": sum(len(test.replies) for test in tests),
        "forms": figures,
        "not_asked": refused,
        "self_preference": _own_answers(judge),
    }


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a judge is asked about, as candidates to prompts."""

    prompts: Sequence[Prompt]
    candidates: Sequence[Candidate]


def _of_tests(tests: Sequence[JudgeTest]) -> _Asked:
    return _Asked(
        [Prompt(test.name, test.prompt) for test in tests],
        [
            Candidate(test.name, reply_id(test, place), text, 0, "stop")
            for test in tests
            for place, text in enumerate(test.replies)
        ],
    )


def _ways(
    judge: BenchJudge,
    tests: Sequence[JudgeTest],
    forms: Sequence[FormName],
    refused: dict[str, str],
) -> Iterator[tuple[str, Way]]:
    """Every way of asking: one sampled grade first, several, expected ones, and the other forms.

    Args:
        forms: No others are asked; grades come with and without a rationale.
        refused: Is told of ways in which this base cannot be asked, and why.
    """
    asked = _of_tests(tests)
    others: list[tuple[str, FormName, dict[str, Any]]] = []
    if "grade" in forms:
        yield from _grades(judge, asked)
        others.append(("grade, no rationale", "grade", {"rationale": False}))
    others += [(name, name, {}) for name in forms if name != "grade"]
    for name, form, settings in others:
        try:
            rows, cost = _judged(judge, asked, name, form=form, **settings)
        except UserError as problem:
            judge.session.reporter.warn(f"{name}: {problem}")
            refused[name] = str(problem)
            continue
        consistent = _consistent(judge, name)
        yield name, Way(_means(rows), len(unasked(rows)), cost, consistent)


def _grades(judge: BenchJudge, asked: _Asked) -> Iterator[tuple[str, Way]]:
    """Written grades: one vote and all of them, sampled and expected, of the same sampling."""
    recipe = judge.recipe.judge
    rows, cost = _judged(judge, asked, "grade", score=_score(judge.session))
    left = len(unasked(rows))
    kinds = [("grade", [as_sampled(row) for row in rows])]
    if any(row.sampled_score is not None for row in rows):
        kinds.append(("grade, expected", rows))
    for name, some in kinds:
        if recipe.votes > 1:
            yield f"{name}, 1 vote", Way(_means([row for row in some if row.vote == 0]), left)
        votes = f"{recipe.votes} vote{'s' * (recipe.votes > 1)}"
        yield f"{name}, {votes}", Way(_means(some), left, cost)


def _means(rows: Sequence[Judgement]) -> dict[str, float | None]:
    return mean_scores(rows, min_votes=1)


def _score(session: Session) -> str:
    """Expected scores, where every whole score of the rubric is one token."""
    if session.engine_kind("judge").remote:
        return session.recipe.judge.score  # it may tell probabilities, and may not

    def is_token(score: int) -> bool:
        ids = session.chat.target_ids(f"Score: {score}")
        return str(score) in (session.chat.spell([one]).strip() for one in ids)

    return "expected" if all(map(is_token, whole_scores(session.rubric))) else "sampled"


def _judged(
    judge: BenchJudge, asked: _Asked, name: str, **settings: Any
) -> tuple[list[Judgement], dict[str, float | None]]:
    """The judgements of one way of asking, and what they cost.

    Raises:
        UserError: This base cannot be asked so.
    """
    session, folder = judge.session, _folder(judge, name)
    folder.mkdir(parents=True, exist_ok=True)
    session.engine(judge.stack, "judge")  # loaded before the clock starts
    read, written, started = session.read, session.written, time.perf_counter()
    settings = {"form": "grade", "rationale": True, **settings}
    with _asking(session, **settings):
        rows, _ = judged(
            session,
            judge.stack,
            asked.prompts,
            asked.candidates,
            place=lambda file: folder / f"{file}.jsonl",
            shared=lambda file: judge.scratch / f"{file}.jsonl",
            stage=name,
            seed_path=(session.recipe.seed, "bench-judge", name),
            every_vote=True,
        )
    seconds, count = time.perf_counter() - started, max(1, len(asked.candidates))
    local = not session.engine_kind("judge").remote
    return rows, {
        "seconds": round(seconds, 2),
        "seconds_per_reply": round(seconds / count, 4),
        "read": round((session.read - read) / count, 1) if local else None,
        "written": round((session.written - written) / count, 1),
    }


def _folder(judge: BenchJudge, name: str) -> Path:
    return judge.scratch / name.replace(" ", "_").replace(",", "")


def _consistent(judge: BenchJudge, name: str) -> dict[tuple[str, str], bool]:
    """Whether both orders have the same verdict, for every two replies that a form has compared."""
    path = _folder(judge, name) / "comparisons.jsonl"
    found: dict[tuple[str, str], bool] = {}
    for one in read_records(path, Contest) if path.is_file() else []:
        first, last = one.p_shown_first, one.p_shown_last
        if first is not None and last is not None:
            same = verdict(first) == verdict(last)
            found[one.first_id, one.second_id] = found[one.second_id, one.first_id] = same
    return found


@contextmanager
def _asking(session: Session, **settings: Any) -> Iterator[None]:
    """A session whose judge is asked in another way, for a while."""
    recipe = session.recipe
    judge = recipe.judge.model_copy(update=settings)
    session.recipe = recipe.model_copy(update={"judge": judge})
    try:
        yield
    finally:
        session.recipe = recipe


def pairs_of(tests: Sequence[JudgeTest], way: Way) -> list[KnownPair]:
    """What a way of asking made of each known pair."""
    found = []
    for test in tests:
        ids = [reply_id(test, place) for place in range(len(test.replies))]
        for better, worse in test.pairs:
            scores = (way.scores.get(ids[better]), way.scores.get(ids[worse]))
            styles = (test.styles[better], test.styles[worse]) if test.styles else None
            found.append(
                KnownPair(
                    test.name,
                    credit_of(*scores),
                    len(test.replies[better]) - len(test.replies[worse]),
                    test.subset,
                    way.consistent.get((ids[better], ids[worse])),
                    styles,
                )
            )
    return found


def prompt_figures(tests: Sequence[JudgeTest], way: Way) -> dict[str, Any]:
    """Shares of prompts: `best` replies on top, and `all_above` where several are right."""
    credits: dict[str, list[tuple[str, float]]] = {"best": [], "all_above": []}
    for test in tests:
        right = sorted({better for better, _ in test.pairs})
        wrong = sorted({worse for _, worse in test.pairs})
        scores = [
            [way.scores.get(reply_id(test, place)) for place in places] for places in (right, wrong)
        ]
        if test.kind == "best" and len(right) == 1:
            credits["best"].append((test.subset, best_credit(*scores)))
        elif test.kind == "ties":
            credits["all_above"].append((test.subset, all_above(*scores)))
    return prompt_shares(credits)


# --- its own answers ------------------------------------------------------------------------------


def _own_answers(judge: BenchJudge) -> dict[str, Any] | None:
    """How the judge takes to its model's sampled answers of the evaluation; None without any.

    Beside them stand those of another model of the run to the same prompts: the anchor's, or for
    the anchor the last iteration's. The reference is gold, or the grades of the anchor, a judge
    that stays what it is.
    """
    run, number = judge.session.run, judge.number
    if number is None or judge.session.engine_kind("policy").remote:
        return None
    place: StageDir = run.iteration(number) if number else run.anchor
    other: StageDir = run.anchor if number else run.iteration(run.last_done())
    recipe = judge.recipe
    limit = recipe.evaluate.judged_answers
    sides = {True: _answers(place, limit), False: _answers(other, limit)}
    if other.path == place.path:
        sides[False] = []
    if not sides[True]:
        return None
    prompts = {one.prompt_id: one for one in policy_prompts(recipe)}
    references = {
        own: _references(judge, where, sides[own], prompts)
        for own, where in ((True, place), (False, other))
    }
    if not references[True]:
        return None
    shown = [
        replace(row, candidate_id=f"{own}:{row.candidate_id}")
        for own, side in sides.items()
        for row in side
        if row.candidate_id in references[own]
    ]
    asked = _Asked(list(prompts.values()), shown)
    form = form_of(recipe)
    settings: dict[str, Any] = {"form": recipe.judge.form, "rationale": recipe.judge.rationale}
    if form.compares:  # what one alone is worth, only a grade says
        form, settings = GradeForm(recipe, NoSettings()), {}
    if recipe.judge.rationale and form.name == DEFAULT_FORM:
        settings["score"] = _score(judge.session)
    rows, _ = _judged(judge, asked, "grades of answers", **settings)
    scores = _means(rows)
    if all(score is None for score in scores.values()):
        return None
    confidence = candidate_likelihoods(
        judge.session,
        judge.policy,
        list(prompts.values()),
        sides[True],
        path=judge.scratch / "likelihoods_own.jsonl",
    )
    rubric = judge.session.rubric
    least, most = form.scale(rubric)
    scale = (rubric.min, rubric.max) if recipe.evaluate.gold else (least, most)
    low, high = _range(references, *scale)
    graded = []
    for own, side in sides.items():
        for row in side:
            score = scores.get(f"{own}:{row.candidate_id}")
            reference = references[own].get(row.candidate_id)
            if score is None or reference is None:
                continue
            likely = confidence.get(row.candidate_id) if own else None
            graded.append(
                GradedAnswer(
                    row.prompt_id,
                    (score - least) / (most - least),
                    (reference - low) / (high - low) if high > low else 0.5,
                    own,
                    None if likely is None else likely.logp / likely.n_tokens,
                )
            )
    return {
        "form": form.name,
        "reference": recipe.evaluate.gold or "anchor's grades",
        "answers_of_others": _name(other) if sides[False] else None,
        **self_preference(graded),
    }


def _name(place: StageDir) -> str:
    return f"iteration {place.number}" if isinstance(place, IterationDir) else "anchor"


def _answers(place: StageDir, limit: int) -> list[Candidate]:
    path = place.evaluation_dir / "answers_sampled.jsonl"
    rows = read_records(path, Candidate) if path.is_file() else []
    return [row for row in rows[:limit] if row.text]


def _references(
    judge: BenchJudge,
    place: StageDir,
    answers: Sequence[Candidate],
    prompts: Mapping[str, Prompt],
) -> dict[str, float]:
    """By answer: gold, or what the anchor gave it when its model was evaluated."""
    name = judge.recipe.evaluate.gold
    if name is not None:
        gold = load_gold(name)
        return {
            row.candidate_id: gold.total(prompts[row.prompt_id].text, row.text) for row in answers
        }
    path = place.evaluation_dir / "grades_anchor.jsonl"
    if not judge.number or not path.is_file():
        return {}  # the anchor held against itself says nothing
    known = {row.candidate_id for row in answers}
    means = _means(read_records(path, Judgement))
    return {name: mean for name, mean in means.items() if mean is not None and name in known}


def _range(
    references: Mapping[bool, Mapping[str, float]], low: float, high: float
) -> tuple[float, float]:
    """The scale of the references: this one where they lie on it, else from least to most."""
    values = [value for side in references.values() for value in side.values()]
    if low <= min(values) and max(values) <= high:
        return low, high
    return min(values), max(values)
