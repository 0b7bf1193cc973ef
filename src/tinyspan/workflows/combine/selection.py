"""The choice of a candidate: the simplest one that is not significantly worse than the best, by paired bootstrap."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyspan.workflows.combine.methods.base import METHODS
from tinyspan.workflows.combine.problem import Candidate, Evaluation, Part, Problem, TaskRows
from tinyspan.workflows.language import token_sums
from tinyspan.workflows.tasks.base import Array
from tinyspan.workflows.tasks.intervals import LEVEL, of_confusion

__all__ = ["Difference", "Resamples", "difference", "resample", "simplest_of_best"]

RESAMPLES, SLOW = 1_000, 200  # resamples; those of metrics without a fast form
CHUNK = 1_000_000  # numbers of drawn rows, or of cells of confusion matrices, in memory
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
        scores = _scores(rows, predictions, problem.labels(index, part), index)
        total += [rows.signed(score) for score in scores]
    means: Resamples = total / len(problem.tasks)
    return means


def _scores(rows: TaskRows, predictions: Array, labels: Array, seed: int) -> Resamples:
    """Return the task's metric on resampled rows; NaN where it is not defined.

    Of metrics without a fast form, 200 resamples are computed and repeated.
    """
    of_drawn = _metric_of_drawn(rows, predictions, labels)
    width = max(len(labels), predictions.shape[-1] ** 2 if rows.task.type == "classification" else 1)
    count, step = SLOW if of_drawn is None else RESAMPLES, max(1, CHUNK // width)
    generator = np.random.default_rng(seed)
    parts: list[Resamples] = []
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a resample with constant labels or predictions
        for first in range(0, count, step):
            drawn = generator.integers(len(labels), size=(min(step, count - first), len(labels)))
            if of_drawn is not None:
                parts.append(of_drawn(drawn))
            else:
                parts.append(np.array([rows.score(predictions[one], labels[one]) for one in drawn]))
    return np.resize(np.concatenate(parts), RESAMPLES)


def _metric_of_drawn(
    rows: TaskRows, predictions: Array, labels: Array
) -> Callable[[npt.NDArray[np.int64]], Resamples] | None:
    """Return the fast form of the metric, a function of the drawn rows [resamples, rows]; None if it has none."""
    metric, kind = rows.task.metric, rows.task.type
    if kind == "classification" and metric == "log_loss":
        losses = _losses(predictions, labels)
        return lambda drawn: losses[drawn].mean(1)
    if kind == "classification" and metric != "ece":
        return lambda drawn: of_confusion(_confusions(predictions, labels, drawn))[metric]
    if metric == "pearson":
        return lambda drawn: _correlations(predictions.squeeze(-1)[drawn], labels[drawn])
    if metric == "perplexity":
        sums, counts = token_sums(predictions, labels, shifted=not rows.task.encoder_decoder)
        return lambda drawn: np.exp(sums[drawn].sum(1) / counts[drawn].sum(1))
    return None


def _losses(logits: Array, labels: Array) -> Array:
    """Return -log p of each row's label."""
    shifted = logits.astype(float) - logits.max(-1, keepdims=True)
    losses: Array = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]
    return losses


def _confusions(logits: Array, labels: Array, drawn: npt.NDArray[np.int64]) -> Array:
    """Return the confusion matrix of every resample, [resamples, outputs, outputs]."""
    outputs = logits.shape[-1]
    cells = (labels.astype(int) * outputs + logits.argmax(-1))[drawn]
    cells += outputs**2 * np.arange(len(drawn))[:, None]
    counts = np.bincount(cells.ravel(), minlength=len(drawn) * outputs**2)
    return counts.reshape(-1, outputs, outputs).astype(float)


def _correlations(x: Array, y: Array) -> Resamples:
    """Return the correlation of each row of x with that of y."""
    x, y = (side - side.mean(1, keepdims=True) for side in (x.astype(float), y.astype(float)))
    correlations: Resamples = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return correlations


def difference(one: Resamples, other: Resamples, value: float) -> Difference:
    """Return the difference between two candidates with the interval that contains 95 % of the resamples.

    The bounds are NaN if the metric is not defined on any resample, as a correlation of constant predictions.

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
