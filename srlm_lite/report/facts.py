"""Facts of a run, gathered from its files: whatever is there by now, of any method.

Nothing here draws or formats. A file is read once it is complete, so a run may be going on
meanwhile; what an older run does not have is left empty.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srlm_lite.evaluate.judge_metrics import histogram
from srlm_lite.judging import by_candidate, mean_scores
from srlm_lite.methods import DEFAULT, sections_of_others
from srlm_lite.pairing import JUDGE, replay_age
from srlm_lite.recipe import paths_in
from srlm_lite.records import (
    Candidate,
    Contest,
    Judgement,
    Label,
    PreferencePair,
    Prompt,
    TrainingStep,
)
from srlm_lite.report.words import Words, words
from srlm_lite.run.files import read_json, read_records
from srlm_lite.run.layout import IterationDir, StageDir
from srlm_lite.run.run import RunDir
from srlm_lite.telling import without_secrets_in

Z95 = 1.96
"""Standard errors to either side of a mean that make its 95% interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, mean: float | None, error: float | None) -> Estimate | None:
        """From a mean and its standard error, as `eval.json` has them."""
        if mean is None:
            return None
        if error is None:
            return cls(mean)
        return cls(mean, mean - Z95 * error, mean + Z95 * error)

    def minus(self, other: Estimate) -> Estimate:
        """The difference, its interval as if the two were independent: too wide, if anything."""
        value = self.value - other.value
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return Estimate(value)
        width = (((self.high - self.low) / 2) ** 2 + ((other.high - other.low) / 2) ** 2) ** 0.5
        return Estimate(value, value - width, value + width)


def figure(figures: Mapping[str, Any], key: str, error: float | None = None) -> Estimate | None:
    """A figure of an evaluation, with the interval that stands beside it in `intervals`.

    Args:
        error: Its standard error, for evaluations without that interval.
    """
    mean = figures.get(key)
    bounds = (figures.get("intervals") or {}).get(key)
    if mean is None or not bounds:
        return Estimate.of(mean, error)
    return Estimate(mean, bounds[0], bounds[1])


@dataclass(frozen=True, slots=True)
class Curve:
    """A DPO training: its steps, where the run kept them, and the facts at its end."""

    name: str
    """The name of the delta that it trains."""
    steps: tuple[TrainingStep, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair of an iteration, with the votes on both replies."""

    iteration: int
    record: PreferencePair
    chosen_votes: tuple[Judgement, ...] = ()
    rejected_votes: tuple[Judgement, ...] = ()
    principle: str = ""
    """By which the two were compared, where the method goes by principles."""
    contest: Contest | None = None
    """What the judge made of the two against each other, where it compares candidates."""

    def to_row(self) -> dict[str, Any]:
        """Its row in `pairs.jsonl`."""
        return self.record.to_row()

    @property
    def source(self) -> str:
        """Where it is from, in words; empty for the iteration's own answers."""
        origin = self.record.origin
        return origin.replace(JUDGE, "a pair of judgements", 1)

    @property
    def compared(self) -> str:
        """What the judge made of the two against each other, in words; empty if it did not."""
        if self.contest is None:
            return ""
        return f"against the rejected one the chosen one {self.contest.told(self.record.chosen_id)}"

    @property
    def gap(self) -> float:
        """Score of the chosen reply above that of the rejected one."""
        return self.record.chosen_score - self.record.rejected_score

    @property
    def disagreement(self) -> float | None:
        """How far the readable votes on one reply lie apart, at most; None without two of them."""
        spans = []
        for votes in (self.chosen_votes, self.rejected_votes):
            scores = [vote.score for vote in votes if vote.score is not None]
            if len(scores) > 1:
                spans.append(max(scores) - min(scores))
        return max(spans, default=None)


@dataclass(frozen=True, slots=True)
class IterationFacts:
    """What the stages of one iteration made, before the model that it ends with."""

    number: int
    n_prompts: int = 0
    pairs: tuple[Pair, ...] = ()
    drops: Mapping[str, int] = field(default_factory=dict)
    """Prompts without a pair, by reason."""
    scored: tuple[tuple[int, float], ...] = ()
    """Characters and mean score of each candidate that has one."""
    votes: Mapping[str, int] = field(default_factory=dict)
    """How often the judge gave each score to the candidates, and `unreadable`."""
    curves: tuple[Curve, ...] = ()

    @property
    def paired_prompts(self) -> int:
        """Prompts that gave at least one new pair of answers."""
        return len({pair.record.prompt_id for pair in self.pairs if not pair.record.origin})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model of the run: the bare base, the anchor, or what an iteration ended with."""

    number: int | None
    """The iteration's number; 0 is the anchor, None the bare base."""
    evaluation: Mapping[str, Any]
    """`eval.json`; empty before there is one."""
    stages: Mapping[str, Mapping[str, Any]]
    """Rows of `metrics.jsonl` that led to it, by stage."""
    is_done: bool
    iteration: IterationFacts | None = None
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """The counts in `done.json`, by stage."""

    @property
    def name(self) -> str:
        """M1 is the anchor."""
        return "base" if self.number is None else f"M{self.number + 1}"

    @property
    def title(self) -> str:
        """Name and origin."""
        if self.number is None:
            return "base, without adapters"
        return f"{self.name}, " + (f"iteration {self.number}" if self.number else "anchor")

    @property
    def judge(self) -> Mapping[str, Any]:
        """Its figures as a judge."""
        return dict(self.evaluation.get("judge") or {})

    @property
    def policy(self) -> Mapping[str, Any]:
        """Its figures as a policy."""
        return dict(self.evaluation.get("policy") or {})

    @property
    def n_pairs(self) -> int | None:
        """New pairs of the policy's answers that it was trained on."""
        for facts in (self.stages, self.counts):
            if "pairs" in facts.get("pairs", {}):
                return int(facts["pairs"]["pairs"])
        return None

    @property
    def gold(self) -> Estimate | None:
        """Gold score of sampled answers."""
        return figure(self.policy, "gold_mean", self.policy.get("gold_se"))

    @property
    def greedy_gold(self) -> Estimate | None:
        """Gold score of greedy answers."""
        greedy = self.policy.get("greedy") or {}
        return figure(greedy, "gold_mean", greedy.get("gold_se"))

    @property
    def best_of_gold(self) -> Estimate | None:
        """Gold score of the answers that its judge picked of several (`evaluate.best_of`)."""
        best = self.policy.get("best_of") or {}
        return figure(best, "gold_mean", best.get("gold_se"))

    @property
    def anchor_score(self) -> Estimate | None:
        """What the anchor, as judge, thinks of its answers."""
        return figure(self.policy, "anchor_score", self.policy.get("anchor_score_se"))

    @property
    def self_score(self) -> Estimate | None:
        """What it thinks of its own answers."""
        return figure(self.policy, "self_score", self.policy.get("self_score_se"))

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(float(row.get("seconds", 0.0)) for row in self.stages.values())


@dataclass(frozen=True, slots=True)
class Duel:
    """A head to head: the model's win rate against the baseline, in percent."""

    model: str
    """`iteration 2`, `anchor`, `base`, or of another run or file."""
    baseline: str
    judge: str
    result: Mapping[str, Any]
    """All of it."""

    @property
    def iteration(self) -> int | None:
        """The model's iteration, where it is one of this run's."""
        match = re.fullmatch(r"iteration (\d+)", self.model)
        return int(match[1]) if match else None

    @property
    def prompts(self) -> int:
        """That both have answered."""
        return int(self.result.get("prompts", 0))

    @property
    def win_rate(self) -> Estimate | None:
        """A tie is half a win."""
        return _rate(self.result.get("win_rate"))

    @property
    def length_controlled(self) -> Estimate | None:
        """As if both replies were equally long."""
        return _rate(self.result.get("length_controlled"))


def _rate(found: Mapping[str, Any] | None) -> Estimate | None:
    if not found or found.get("value") is None:
        return None
    return Estimate(found["value"], found.get("low"), found.get("high"))


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a report says of a run."""

    where: Path
    settings: Mapping[str, Any]
    """The recipe as run, as in `run.json`."""
    run: Mapping[str, Any]
    """`run.json`."""
    models: tuple[ModelFacts, ...]
    """Those of which there is anything yet, in order; the base where it has been measured."""
    duels: tuple[Duel, ...] = ()
    """Head to heads of its models and others, as `srlm-lite compare` has left them."""
    anchor_sha256: str = ""
    """The hash of the anchor's adapter; empty before there is one."""
    controls: tuple[Facts, ...] = ()
    """Other runs to hold it against, without their texts."""

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.settings.get("name", "run"))

    @property
    def method(self) -> str:
        return str(self.settings.get("method", DEFAULT))

    @property
    def words(self) -> Words:
        """What the method's figures are."""
        return words(self.settings)

    @property
    def gold_name(self) -> str | None:
        """The gold scorer."""
        name = (self.settings.get("evaluate") or {}).get("gold")
        return None if name is None else str(name)

    @property
    def iterations(self) -> list[IterationFacts]:
        """Those that have begun."""
        return [model.iteration for model in self.models if model.iteration]

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of all iterations."""
        return [pair for iteration in self.iterations for pair in iteration.pairs]

    @property
    def measured(self) -> list[ModelFacts]:
        """The anchor and what came of it, as far as there is an evaluation."""
        return [model for model in self.models if model.evaluation and model.number is not None]

    @property
    def planned(self) -> int:
        """Iterations that the recipe wants."""
        return int(self.settings.get("iterations", 0))

    @property
    def finished(self) -> int:
        """Iterations that are done."""
        return sum(model.is_done for model in self.models if model.number)

    @property
    def is_finished(self) -> bool:
        """Whether the run has made all that its recipe asks for."""
        anchored = any(model.number == 0 and model.is_done for model in self.models)
        return anchored and self.finished >= self.planned

    @property
    def seconds(self) -> float:
        """Seconds of all stages that are finished."""
        return sum(model.seconds for model in self.models)


def gather(run: RunDir, *, last: int | None = None, texts: bool = True) -> Facts:
    """Read a run directory.

    Args:
        last: The last iteration to look at; all by default.
        texts: False leaves out what is many texts: candidates, votes and pairs.

    Raises:
        UserError: There is no run, or a file of it cannot be read.
    """
    facts = run.facts()
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for row in run.read_metrics():
        rows.setdefault(int(row["iteration"]), {})[str(row["stage"])] = row
    models = []
    if run.base_evaluation.evaluation.is_file():
        models.append(_model(None, run.base_evaluation, {}))
    if run.anchor.path.is_dir():
        models.append(_model(0, run.anchor, rows.get(0, {})))
    votes: dict[int, dict[str, tuple[Judgement, ...]]] = {}
    for place in run.iterations():
        if last is None or place.number <= last:
            stages = rows.get(place.number, {})
            iteration = _iteration(place, votes) if texts else IterationFacts(place.number)
            models.append(_model(place.number, place, stages, iteration))
    results = [read_json(place.result) for place in run.comparisons.finished()]
    duels = tuple(Duel(one["model"], one["baseline"], one["judge"]["name"], one) for one in results)
    return Facts(
        run.path, facts["recipe"], facts, tuple(models), duels, anchor_sha256=run.anchor.sha256
    )


def _model(
    number: int | None,
    place: StageDir,
    stages: Mapping[str, Mapping[str, Any]],
    iteration: IterationFacts | None = None,
) -> ModelFacts:
    evaluation = {}
    if place.evaluation.is_file():
        evaluation = read_json(place.evaluation, judge=dict, policy=dict)
    counts = read_json(place.done, counts=dict)["counts"] if place.is_done else {}
    return ModelFacts(number, evaluation, stages, place.is_done, iteration, counts)


def _iteration(
    place: IterationDir, votes: dict[int, dict[str, tuple[Judgement, ...]]]
) -> IterationFacts:
    """An iteration, with candidates and votes that have led to pairs: before, files still grow.

    Args:
        votes: By iteration and candidate; this iteration's are added.
    """
    prompts = read_records(place.prompts, Prompt) if place.prompts.is_file() else []
    curves = tuple(_curves(place))
    if not place.pairs.is_file():
        return IterationFacts(place.number, len(prompts), curves=curves)
    judged = read_records(place.judgements, Judgement) if place.judgements.is_file() else []
    future = place.future_judgements
    votes[place.number] = by_candidate(
        [*judged, *(read_records(future, Judgement) if future.is_file() else [])]
    )
    is_graded = any(row.text for row in judged)  # a reward comes without words, and has no scale
    candidates = [row for path in place.judged_candidates for row in read_records(path, Candidate)]
    scores = mean_scores(judged, min_votes=1)
    scored = [(len(row.text), scores.get(row.candidate_id)) for row in candidates]
    return IterationFacts(
        number=place.number,
        n_prompts=len(prompts),
        pairs=tuple(_pairs(place, read_records(place.pairs, PreferencePair), votes)),
        drops=_drops(place),
        scored=tuple((chars, score) for chars, score in scored if score is not None),
        votes=histogram(judged) if is_graded else {},
        curves=curves,
    )


def iteration_pairs(run: RunDir, number: int) -> list[Pair]:
    """The pairs of an iteration with the votes on their replies, those of replays included.

    Raises:
        UserError: It has no pairs yet, or a file of it cannot be read.
    """
    place = run.iteration(number)
    records = read_records(place.pairs, PreferencePair)
    votes = {
        t: by_candidate(
            row for path in run.iteration(t).all_judgements for row in read_records(path, Judgement)
        )
        for t in sorted({number - replay_age(record) for record in records})
    }
    return _pairs(place, records, votes)


def _pairs(
    place: IterationDir,
    records: Sequence[PreferencePair],
    votes: Mapping[int, Mapping[str, tuple[Judgement, ...]]],
) -> list[Pair]:
    found = []
    labels = read_records(place.labels, Label) if place.labels.is_file() else []
    principles = {frozenset((row.first_id, row.second_id)): row.principle for row in labels}
    held = read_records(place.comparisons, Contest) if place.comparisons.is_file() else []
    contests = {frozenset(row.ids): row for row in held}
    for record in records:
        known = votes.get(place.number - replay_age(record), {})
        found.append(
            Pair(
                place.number,
                record,
                known.get(record.chosen_id, ()),
                known.get(record.rejected_id, ()),
                principles.get(both := frozenset((record.chosen_id, record.rejected_id)), ""),
                contests.get(both),
            )
        )
    return found


def _drops(place: IterationDir) -> dict[str, int]:
    counts = read_json(place.drops) if place.drops.is_file() else {}
    return {reason: count for reason, count in counts.items() if isinstance(count, int) and count}


def _curves(place: IterationDir) -> list[Curve]:
    return [
        Curve(
            one.name,
            tuple(read_records(one.steps, TrainingStep)) if one.steps.is_file() else (),
            read_json(one.training),
        )
        for one in place.delta_places
        if one.training.is_file()
    ]


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the names of files and directories in place of their absolute paths.

    A secret that an earlier version let stand in it, in a URL say, is left out.
    """
    public = copy.deepcopy(dict(settings))
    for section, key, _ in paths_in(public):
        if Path(section[key]).is_absolute():
            section[key] = Path(section[key]).name
    hidden: dict[str, Any] = without_secrets_in(public)
    return hidden


def used_settings(facts: Facts) -> dict[str, Any]:
    """The public settings without the sections of other methods."""
    others = sections_of_others(facts.method)
    return {
        key: value for key, value in public_settings(facts.settings).items() if key not in others
    }
