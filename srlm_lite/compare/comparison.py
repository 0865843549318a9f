"""Head to head of two models: their replies to the same prompts, and who wins each.

Everything lies in the run directory under names that end in a digest of what decides it, so a
stopped comparison goes on, a finished one is read, and models that meet again answer only once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from srlm_lite.compare.models import FileModel, RunModel, digest_of, file_name
from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.evaluate.head_to_head import (
    Outcome,
    head_to_head,
    of_scores,
    of_verdicts,
    tally,
)
from srlm_lite.forms import DEFAULT_FORM, form_of
from srlm_lite.judging import mean_scores
from srlm_lite.questions import PairQuestion, Verdict, load_question
from srlm_lite.records import Annotation, Candidate, Contest, Prompt
from srlm_lite.run.files import read_json, read_records, write_json, write_records
from srlm_lite.run.layout import ComparisonDir
from srlm_lite.session import Session
from srlm_lite.settings import Sampling, as_before
from srlm_lite.stages.judges import judged
from srlm_lite.stages.sampling import ask, limits_of, sample_candidates
from srlm_lite.window import room_for_prompt

Judging = Literal["pointwise", "pairwise"]
Model = RunModel | FileModel


@dataclass(frozen=True, slots=True)
class CompareJudge:
    """Who decides, and how. `model` is None for a server.

    Pointwise is as the run judges candidates (`judge.form`); where that compares them, so does it.
    """

    name: str
    digest: str
    session: Session
    model: RunModel | None
    judging: Judging

    @property
    def settings(self) -> dict[str, Any]:
        """What its verdicts depend on, beside its weights."""
        recipe = self.session.recipe
        if self.judging == "pairwise":
            template = load_question("pairwise", recipe.compare.template)
            return {**recipe.compare.model_dump(), "template": template}
        form = form_of(recipe)
        own = {} if form.section is None else {form.section: form.own.model_dump()}
        return {**as_before(recipe.judge), **own, "rubric": self.session.rubric.template}

    def facts(self) -> dict[str, Any]:
        """What the result says of it."""
        recipe = self.session.recipe
        facts: dict[str, Any] = {"name": self.name, "judging": self.judging}
        if self.judging == "pairwise":
            return {**facts, "template": recipe.compare.template}
        form = form_of(recipe)
        if form.name != DEFAULT_FORM:
            judging = "pairwise" if form.compares else "pointwise"
            return {"name": self.name, "judging": judging, "form": form.name}
        return {**facts, "rubric": self.session.rubric.name, "votes": recipe.judge.votes}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against a baseline on prompts, before a judge; where it goes is in its name."""

    session: Session
    model: Model
    baseline: Model
    prompts: Sequence[Prompt]
    source: str
    judge: CompareJudge

    @property
    def place(self) -> ComparisonDir:
        name = file_name(self.model.name, "vs", self.baseline.name, "by", self.judge.name)
        decides = [
            self.replies_digest(self.model),
            self.replies_digest(self.baseline),
            self.judge.digest,
            self.judge.settings,
            self.session.recipe.evaluate.gold,
        ]
        return self.session.run.comparisons.comparison(f"{name}-{digest_of(*decides)}")

    def replies_digest(self, model: Model) -> str:
        """What a model's replies depend on."""
        texts = [(one.prompt_id, one.text, *(one.messages or ())) for one in self.prompts]
        if isinstance(model, FileModel):
            return digest_of(texts, model.replies(self.prompts))
        recipe = self.session.recipe
        return digest_of(texts, model.digest, _sampling(recipe.rollout), recipe.seed)


def compare(comparison: Comparison) -> dict[str, Any]:
    """Let the models answer, let the judge decide; the result, as written to the run directory.

    Raises:
        UserError: No prompt fits the models' windows.
    """
    place = comparison.place
    if place.result.is_file():
        return read_json(place.result)
    comparison.judge.session.reach("judge")
    prompts, too_long = _fitting(comparison)
    model = _replies(comparison, comparison.model, prompts)
    baseline = _replies(comparison, comparison.baseline, prompts)
    decide = _pairwise if comparison.judge.judging == "pairwise" else _pointwise
    if decide is _pointwise and form_of(comparison.judge.session.recipe).compares:
        decide = _in_form
    annotations = [
        Annotation(
            prompt_id=prompt.prompt_id,
            instruction=prompt.text,
            output_1=baseline[prompt.prompt_id].text,
            output_2=model[prompt.prompt_id].text,
            generator_1=comparison.baseline.name,
            generator_2=comparison.model.name,
            annotator=comparison.judge.name,
            **decision,
        )
        for prompt, decision in zip(
            prompts, decide(comparison, prompts, model, baseline), strict=True
        )
    ]
    write_records(place.annotations, annotations)
    result = {
        "model": comparison.model.name,
        "baseline": comparison.baseline.name,
        "judge": comparison.judge.facts(),
        "source": comparison.source,
        "too_long": too_long,
        **head_to_head([_outcome(row) for row in annotations]),
        "identical": sum(row.output_1 == row.output_2 for row in annotations),
        **_order_facts(annotations),
        "truncated": {
            "model": sum(row.finish_reason == "length" for row in model.values()),
            "baseline": sum(row.finish_reason == "length" for row in baseline.values()),
        },
        "gold": _gold(comparison.session.recipe.evaluate.gold, annotations),
    }
    write_json(place.result, result, noted=True)
    return result


def _sampling(section: Sampling) -> dict[str, Any]:
    return {name: getattr(section, name) for name in Sampling.model_fields}


def _fitting(comparison: Comparison) -> tuple[list[Prompt], int]:
    """The prompts that leave both models room for a reply, and how many do not."""
    reply = comparison.session.recipe.rollout.max_new_tokens
    prompts = list(comparison.prompts)
    for model in (comparison.model, comparison.baseline):
        if isinstance(model, FileModel):
            continue
        thought, chat = model.session.thought_tokens(), model.session.chat
        room = room_for_prompt(model.session.recipe.base.window, answer=reply, thought=thought)
        prompts = [one for one in prompts if len(chat.policy_ids(one)) <= room]
    if not prompts:
        raise UserError(
            "none of the prompts fits the window of both models", where=comparison.source
        )
    return prompts, len(comparison.prompts) - len(prompts)


def _replies(
    comparison: Comparison, model: Model, prompts: Sequence[Prompt]
) -> dict[str, Candidate]:
    if isinstance(model, FileModel):
        texts = model.replies(prompts)
        return {
            name: Candidate(name, f"{name}#0", text.strip(), 0, "stop")
            for name, text in texts.items()
        }
    recipe = comparison.session.recipe
    name = file_name(model.name, comparison.replies_digest(model))
    rows = sample_candidates(
        model.session,
        model.stack(),
        prompts,
        path=comparison.session.run.comparisons.replies(name),
        stage=f"replies, {model.name}",
        sampling=recipe.rollout,
        n=1,
        seed_path=(recipe.seed, "compare", "replies"),
    )
    return {row.prompt_id: row for row in rows}


Decision = dict[str, Any]
"""The fields of an annotation that the judge fills."""


def _pairwise(
    comparison: Comparison,
    prompts: Sequence[Prompt],
    model: Mapping[str, Candidate],
    baseline: Mapping[str, Candidate],
) -> list[Decision]:
    judge = comparison.judge
    recipe = judge.session.recipe
    asked = PairQuestion(load_question("pairwise", recipe.compare.template))
    questions = []
    for prompt in prompts:
        ours, theirs = model[prompt.prompt_id].text, baseline[prompt.prompt_id].text
        if ours == theirs:
            continue  # a tie, whatever the judge says
        for order, (first, second) in (("model first", (ours, theirs)), ("last", (theirs, ours))):
            question = asked.ask(prompt.text, first, second)
            questions.append((f"{prompt.prompt_id}:{order}", question))
    replies = ask(
        judge.session,
        [] if judge.model is None else judge.model.stack("judge"),
        questions,
        path=comparison.place.verdicts,
        stage="verdicts",
        limits=limits_of(
            Sampling(
                temperature=recipe.compare.temperature,
                top_p=1.0,
                max_new_tokens=recipe.compare.max_new_tokens,
            )
        ),
        seed_path=(comparison.session.recipe.seed, "compare", "verdicts"),
    )

    def verdict(prompt: Prompt, order: str) -> Verdict | None:
        reply = replies.get(f"{prompt.prompt_id}:{order}")
        if reply is None:
            return "tie"
        return asked.read(reply.text, finish_reason=reply.finish_reason)

    both = [(verdict(prompt, "model first"), verdict(prompt, "last")) for prompt in prompts]
    return [{"preference": _preference(of_verdicts(*pair)), "verdicts": pair} for pair in both]


def _in_form(
    comparison: Comparison,
    prompts: Sequence[Prompt],
    model: Mapping[str, Candidate],
    baseline: Mapping[str, Candidate],
) -> list[Decision]:
    """By a judge whose form compares candidates: the two replies are a prompt's candidates."""
    judge, place = comparison.judge, comparison.place
    both = [
        replace(replies[one.prompt_id], candidate_id=f"{one.prompt_id}, {whose}")
        for one in prompts
        for whose, replies in (("model", model), ("baseline", baseline))
    ]
    judged(
        judge.session,
        [] if judge.model is None else judge.model.stack("judge"),
        prompts,
        [row for row in both if row.text],
        place=place.file,
        stage="verdicts",
        seed_path=(comparison.session.recipe.seed, "compare", "verdicts"),
        every_vote=True,
    )
    contests = {row.prompt_id: row for row in read_records(place.file("comparisons"), Contest)}

    def decision(prompt: Prompt) -> Decision:
        name = prompt.prompt_id
        found, texts = contests.get(name), (model[name].text, baseline[name].text)
        if found is None:  # one of them is empty, or they are the same text
            told = 0.5 if bool(texts[0]) == bool(texts[1]) else float(bool(texts[0]))
            return {"preference": _preference(told)}
        first = _named(found.p_shown_first, ("A", "B"))
        last = _named(found.p_shown_last, ("B", "A"))
        return {"preference": _preference(of_verdicts(first, last)), "verdicts": (first, last)}

    return [decision(prompt) for prompt in prompts]


def _named(p_model: float | None, letters: tuple[Verdict, Verdict]) -> Verdict | None:
    """A verdict by how likely the model wins; the letters are the model's and the baseline's."""
    if p_model is None:
        return None
    return "tie" if p_model == 0.5 else letters[p_model < 0.5]


def _pointwise(
    comparison: Comparison,
    prompts: Sequence[Prompt],
    model: Mapping[str, Candidate],
    baseline: Mapping[str, Candidate],
) -> list[Decision]:
    ours = _scores(comparison, comparison.model, prompts, model)
    theirs = _scores(comparison, comparison.baseline, prompts, baseline)
    decisions = []
    for prompt in prompts:
        name = prompt.prompt_id
        both = (ours[model[name].candidate_id], theirs[baseline[name].candidate_id])
        # Two votes on one text may differ; the text does not.
        same = model[name].text == baseline[name].text
        preference = 0.5 if same else of_scores(*both)
        decisions.append({"preference": _preference(preference), "scores": both})
    return decisions


def _scores(
    comparison: Comparison,
    of: Model,
    prompts: Sequence[Prompt],
    replies: Mapping[str, Candidate],
) -> dict[str, float | None]:
    judge = comparison.judge
    recipe = judge.session.recipe
    digest = digest_of(comparison.replies_digest(of), judge.digest, judge.settings)
    path = comparison.session.run.comparisons.judgements(
        file_name(of.name, "by", judge.name, digest)
    )
    rows, _ = judged(
        judge.session,
        [] if judge.model is None else judge.model.stack("judge"),
        prompts,
        [replies[one.prompt_id] for one in prompts],
        place=lambda name: path if name == "judgements" else path.with_stem(f"{path.stem}_{name}"),
        stage=f"judgements, {of.name}",
        seed_path=(comparison.session.recipe.seed, "compare", "judgements"),
        every_vote=True,
    )
    return mean_scores(rows, min_votes=form_of(recipe).min_votes)


def _preference(value: float | None) -> float | None:
    return None if value is None else value + 1


def _outcome(row: Annotation) -> Outcome:
    preference = None if row.preference is None else row.preference - 1
    return Outcome(preference, len(row.output_2), len(row.output_1))


def _order_facts(annotations: Sequence[Annotation]) -> dict[str, Any]:
    """In how many prompts the order decided a pairwise judge's verdict, and how often A won."""
    both = [row.verdicts for row in annotations if row.verdicts is not None]
    if not both:
        return {}
    readable = [pair for pair in both if None not in pair]
    winners = [verdict for pair in both for verdict in pair if verdict in ("A", "B")]
    consistent = [("A", "B"), ("B", "A"), ("tie", "tie")]
    return {
        "inconsistent": sum(pair not in consistent for pair in readable),
        "first_wins": round(winners.count("A") / len(winners), 4) if winners else None,
    }


def _gold(name: str | None, annotations: Sequence[Annotation]) -> dict[str, Any] | None:
    """What the gold scorer says of the same replies, and how often the judge agrees with it."""
    if name is None:
        return None
    gold = load_gold(name)
    ours = [gold.total(row.instruction, row.output_2) for row in annotations]
    theirs = [gold.total(row.instruction, row.output_1) for row in annotations]
    decided = [
        (row.preference > 1.5) == (a > b)
        for row, a, b in zip(annotations, ours, theirs, strict=True)
        if row.preference not in (None, 1.5) and a != b
    ]
    return {
        "model": round(fmean(ours), 4),
        "baseline": round(fmean(theirs), 4),
        **tally([of_scores(a, b) for a, b in zip(ours, theirs, strict=True)]),
        "agreement": round(fmean(decided), 4) if decided else None,
        "agreement_prompts": len(decided),
    }
