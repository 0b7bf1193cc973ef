"""The choice of a candidate: the simplest one that is not significantly worse than the best, by paired bootstrap."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyspan.workflows.combine.methods.base import METHODS
from tinyspan.workflows.combine.problem import Candidate, Evaluation, Part, Problem, TaskRows
from tinyspan.workflows.tasks.base import Array
from tinyspan.workflows.tasks.intervals import LEVEL

__all__ = ["Difference", "Resamples", "difference", "resample", "simplest_of_best"]

RESAMPLES = 1_000
Resamples = npt.NDArray[np.float64]


class Difference(NamedTuple):
    """A difference of two means over tasks, with its interval."""

    value: float
    low: float
    high: float


def resample(problem: Problem, evaluation: Evaluation, part: Part) -> Resamples:
    """Return the mean score of predictions on resampled rows, [1000].

    Rows are drawn with replacement within each task. The draws depend on the part alone, so that the differences
    between two candidates are paired.
    """
    total = np.zeros(RESAMPLES)
    for index, (rows, predictions) in enumerate(zip(problem.tasks, evaluation.predictions, strict=True)):
        sign = -1.0 if rows.task.lower_is_better else 1.0
        total += sign * _scores(rows, predictions, problem.labels(index, part), index)
    means: Resamples = total / len(problem.tasks)
    return means


def _scores(rows: TaskRows, predictions: Array, labels: Array, seed: int) -> Resamples:
    """Return the task's metric on resampled rows; NaN where it is not defined."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(labels), size=(RESAMPLES, len(labels)))
    if rows.task.metric == "accuracy":
        right: Resamples = (predictions.argmax(-1) == labels)[drawn].mean(1)
        return right
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a resample with constant labels or predictions
        if rows.task.metric == "pearson":
            return _correlations(predictions.squeeze(-1)[drawn], labels[drawn])
        return np.array([rows.score(predictions[one], labels[one]) for one in drawn])


def _correlations(x: Array, y: Array) -> Resamples:
    """Return the correlation of each row of x with that of y."""
    x, y = (side - side.mean(1, keepdims=True) for side in (x.astype(float), y.astype(float)))
    correlations: Resamples = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return correlations


def difference(one: Resamples, other: Resamples, value: float) -> Difference:
    """Return the difference between two candidates with the interval that contains 95 % of the resamples.

    Args:
        one: result of `resample`.
        other: that of the other candidate.
        value: difference of their scores on the rows themselves.
    """
    tail = 100 * (1 - LEVEL) / 2
    gaps = one - other
    gaps = gaps[np.isfinite(gaps)]
    low, high = np.percentile(gaps, [tail, 100 - tail]) if len(gaps) else (float("nan"), float("nan"))
    return Difference(value, float(low), float(high))


def simplest_of_best(
    candidates: Sequence[Candidate], evaluations: Sequence[Evaluation], samples: Sequence[Resamples]
) -> int:
    """Return the position of the simplest candidate whose difference to the best one has an interval that contains 0.

    A candidate with fewer learned numbers is simpler; among those with as many, the method's `simplicity` decides, and
    then the score.

    Args:
        candidates: the candidates.
        evaluations: their scores on the rows to choose on.
        samples: results of `resample` for these rows.
    """
    best = max(range(len(candidates)), key=lambda index: evaluations[index].mean)

    def within(index: int) -> bool:
        gap = difference(samples[best], samples[index], evaluations[best].mean - evaluations[index].mean)
        return index == best or gap.low <= 0

    def complexity(index: int) -> tuple[int, int, float]:
        one = candidates[index]
        return one.learned, METHODS[one.method].simplicity, -evaluations[index].mean

    return min(filter(within, range(len(candidates))), key=complexity)
