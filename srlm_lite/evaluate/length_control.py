"""What a win rate would be if both models answered at the same length.

A judge that likes long replies lets the longer model win. The length-controlled win rate models
the judge's preference as

    P(model beats baseline | x) = sigmoid(q + l tanh(d_x / std(d)) + h g_x)

with d_x the baseline's characters minus the model's on prompt x, and g_x how hard the prompt is;
it is the mean of that probability with the length term left out. The difficulty comes from many
models' results on the same prompts. For prompts of one's own there is none, and its term is left
out too: the minimal variant.

Source: Dubois et al. 2024, Length-Controlled AlpacaEval, arXiv:2404.04475, equation 2 and section
3. Penalty, folds and order of the rows are those of AlpacaEval's program (`glm_winrate.py`), whose
figures this reproduces to the last digit: see BENCHMARKS.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from srlm_lite.evaluate.intervals import share_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FEWEST = 10
"""With fewer prompts than this nothing is fitted."""

FOLDS = 5
GAMED_WEIGHT = 0.1
"""What a row of a gamed baseline counts, where a row of the model counts 1."""

_WEAK_PENALTY = 100.0
"""For intervals: a penalty that has pressed a weight to zero would leave it no room to vary."""

_MOST_INFLATED = 100.0

_SEED = 123
_REFITS = 200
"""For the interval: each costs a regression."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A figure with its 95% interval over prompts; win rates are shares of 100.

    One prompt alone has no interval.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class GamedRow:
    """A comparison of the baseline, prompted to be wordy or terse, with itself.

    Such rows tell the model what length alone does. `gap` is d / std(d) of its own model.
    """

    preference: float
    gap: float
    difficulty: float


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A length-controlled win rate, and the weights behind it.

    `quality`, `length` and `difficulty` are q, l and h of the module's head; `strength` is the
    inverse of the L1 penalty, as cross-validation chose it. The interval is of fits with hardly
    any penalty.
    """

    rate: Rate
    quality: float
    length: float
    difficulty: float | None
    strength: float


def win_rate(preferences: Sequence[float]) -> Rate:
    """The mean preference, times 100.

    Args:
        preferences: Probability, from 0 to 1, that the model beats the baseline on a prompt; a
            tie is 0.5.
    """
    ends = share_interval([(preference, 1.0) for preference in preferences])
    low, high = (100 * end for end in ends) if ends else (None, None)
    return Rate(100 * float(np.mean(preferences)), low, high)


def why_lengths_do_not_tell(gaps: Sequence[int]) -> str | None:
    """Why nothing can be said of replies of equal length; None where something can.

    No such replies have been seen where one side's are longer throughout. And where differences
    vary little beside their size, a judge's taste for length looks like one for the model: the
    regression parts the two by its solver's seed (rates from 50 to 80 on the same data, each with
    a narrow interval). The bound of that is on the variance inflation of the constant column:
    below it other seeds moved no rate of simulated data by more than 0.1.

    Args:
        gaps: As for `length_controlled`.
    """
    if all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps):
        return f"one side's replies are longer in all {len(gaps)} prompts"
    column = np.tanh(_standardised(gaps))
    spread = float(column.std())
    if spread and 1 + (float(column.mean()) / spread) ** 2 > _MOST_INFLATED:
        return "one side's replies are longer in nearly all prompts, by much the same"
    return None


def length_controlled(
    preferences: Sequence[float | None],
    gaps: Sequence[int],
    *,
    difficulties: Sequence[float] | None = None,
    gamed: Sequence[GamedRow] = (),
) -> LengthControlled | None:
    """The length-controlled win rate of a model against a baseline.

    Args:
        preferences: As for `win_rate`; None where it is not known. Such prompts teach nothing, but
            count in the spread of lengths and in the mean, as in AlpacaEval's program.
        gaps: The baseline's characters minus the model's, by prompt.
        difficulties: Of the prompts; without, the minimal variant.
        gamed: Rows that keep the length term honest; only with difficulties.

    Returns:
        None where there is nothing to fit: too few prompts, lengths that do not tell, or nearly
        always the same winner.
    """
    known = np.array([preference is not None for preference in preferences], dtype=bool)
    target = np.asarray([one for one in preferences if one is not None], dtype=float)
    if len(target) < FEWEST or why_lengths_do_not_tell(gaps):
        return None
    hard = None if difficulties is None else np.asarray(difficulties, dtype=float)
    columns = [np.tanh(_standardised(gaps)), np.ones(len(known))]
    level = [np.zeros(len(known)), np.ones(len(known))]
    if hard is not None:
        columns.insert(1, hard)
        level.insert(1, hard)
    features, same_length = np.column_stack(columns), np.column_stack(level)
    extra = _FittedRows.of_gamed(gamed if hard is not None else (), width=features.shape[1])
    fitted = _cross_validated(extra.followed_by(features[known], target))
    if fitted is None:
        return None
    weights, strength = np.asarray(fitted.coef_[0]), float(fitted.C_)

    places = np.flatnonzero(known)

    def refit(rows: Any) -> float:
        resampled = extra.followed_by(features[places[rows]], target[rows])
        if _one_sided(resampled.labelled()["sample_weight"]):
            return 100 * float(target[rows][0])
        return _mean_probability(same_length[places[rows]], _fitted(resampled))

    value = _mean_probability(same_length, weights)
    return LengthControlled(
        rate=Rate(value, *_refitted(refit, n=len(target))),
        quality=float(weights[-1]),
        length=float(weights[0]),
        difficulty=None if hard is None else float(weights[1]),
        strength=strength,
    )


@dataclass(frozen=True, slots=True)
class _FittedRows:
    """What is fitted: features (N, F), the preferences (N,), and what each row counts (N,)."""

    features: Floats
    target: Floats
    counts: Floats

    @classmethod
    def of_gamed(cls, gamed: Sequence[GamedRow], *, width: int) -> _FittedRows:
        # A gamed baseline has no quality of its own: it is the baseline.
        features = [[np.tanh(row.gap), row.difficulty, 0.0] for row in gamed]
        return cls(
            np.asarray(features, dtype=float).reshape(len(gamed), width),
            np.asarray([row.preference for row in gamed], dtype=float),
            np.full(len(gamed), GAMED_WEIGHT),
        )

    def followed_by(self, features: Floats, target: Floats) -> _FittedRows:
        return _FittedRows(
            np.concatenate([self.features, features]),
            np.concatenate([self.target, target]),
            np.concatenate([self.counts, np.ones(len(target))]),
        )

    def labelled(self) -> dict[str, Any]:
        """Every row twice, as a win and as a loss, each counting by its probability."""
        ones = np.ones(len(self.target), dtype=int)
        return {
            "X": np.concatenate([self.features, self.features]),
            "y": np.concatenate([ones, 0 * ones]),
            "sample_weight": np.concatenate(
                [self.target * self.counts, (1 - self.target) * self.counts]
            ),
        }


def _standardised(gaps: Sequence[int]) -> Floats:
    values = np.asarray(gaps, dtype=float)
    spread = values.std(ddof=1)
    return values / spread if spread else values * 0


def _cross_validated(rows: _FittedRows) -> Any | None:
    """The regression at the penalty that predicts left-out prompts best."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    labelled = rows.labelled()
    groups = np.tile(np.arange(len(rows.target)), 2)  # both copies of a row are in one fold
    folds = list(GroupKFold(FOLDS).split(labelled["X"], groups=groups))
    if any(_one_sided(labelled["sample_weight"][train]) for train, _ in folds):
        return None
    scorer = make_scorer(_log_loss, response_method="predict_proba", greater_is_better=False)
    with config_context(enable_metadata_routing=True), _quiet():
        model = LogisticRegressionCV(
            cv=folds,
            scoring=scorer.set_score_request(target=True, counts=True),
            l1_ratios=(1.0,),
            solver="liblinear",
            fit_intercept=False,
            random_state=_SEED,
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)
        return model.fit(**labelled, target=np.tile(rows.target, 2), counts=np.tile(rows.counts, 2))


def _one_sided(weights: Floats) -> bool:
    """Whether only wins, or only losses, count in rows that are there as both."""
    wins, losses = np.split(weights, 2)
    return not wins.any() or not losses.any()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that the weakest penalties make of data that a line can part."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _fitted(rows: _FittedRows) -> Floats:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=_WEAK_PENALTY, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=_SEED
    )
    with _quiet():
        return np.asarray(model.fit(**rows.labelled()).coef_[0])


def _log_loss(won: Floats, predicted: Floats, *, target: Floats, counts: Floats) -> float:
    """Log loss of the preferences themselves; wins and losses are only how they were fitted."""
    sure = np.clip(predicted, 1e-15, 1 - 1e-15)
    likelihood = target * np.log(sure) + (1 - target) * np.log(1 - sure)
    return -float(np.mean(likelihood * counts))


def _mean_probability(features: Floats, weights: Floats) -> float:
    from scipy.special import expit

    return 100 * float(expit(features @ weights).mean())


def _refitted(statistic: Callable[[Any], float], *, n: int) -> tuple[float, float]:
    """The 95% interval of a statistic of the rows 0 to n - 1, drawn with replacement."""
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.arange(n),),
        statistic,
        n_resamples=_REFITS,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
