"""Bootstrap intervals of metrics over rows (Efron 1979), from sums of per-row statistics.

Every metric here is a function of sums over rows. A resample draws n of n rows with replacement, so each row gets a
count w_i, and the metric of the resample is that of the sums sum_i w_i s_i: two matrix products replace thousands of
evaluations of a metric.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tinyspan.analysis.intervals import wilson_interval
from tinyspan.workflows.tasks.metrics import calibration_error, calibration_statistics

__all__ = [
    "LEVEL",
    "classification_intervals",
    "confusion_of",
    "entity_intervals",
    "of_confusion",
    "multi_label_intervals",
    "regression_intervals",
]

Array = npt.NDArray[np.float64]
Intervals = dict[str, list[float]]

LEVEL = 0.95  # of the intervals, between percentiles of the resamples
RESAMPLES = 1_000
SEED = 0  # of the resamples, so that a result is the same each time
CHUNK = 4_000_000  # numbers of counts in memory


def classification_intervals(log_probabilities: Array, labels: npt.NDArray[np.int64]) -> Intervals:
    """Return intervals of the metrics of `classification_scores`.

    That of the accuracy is Wilson's, since resampling rows that are all right leaves no width. That of the calibration
    error e is the basic bootstrap's, 2 e - [high, low], up to e at least: e is a sum of absolute values, which
    resampling increases.

    Args:
        log_probabilities: [rows, outputs].
        labels: [rows], positions of the outputs.
    """
    rows, outputs = log_probabilities.shape
    confusion = confusion_of(labels, log_probabilities.argmax(-1), outputs)
    generator, step = _generator(), max(1, CHUNK // outputs**2)
    parts = []
    for first in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - first)
        cells = generator.multinomial(rows, confusion.ravel() / rows, size=size).reshape(-1, outputs, outputs)
        parts.append(of_confusion(cells.astype(float)))
    samples = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    losses = -log_probabilities[np.arange(rows), labels]
    samples["log_loss"] = _resampled(losses[:, None], lambda sums: sums[:, 0] / rows)
    gaps = calibration_statistics(np.exp(log_probabilities), labels)
    samples["ece"] = _resampled(gaps, lambda sums: np.abs(sums).sum(-1) / rows)
    found = _percentiles(samples)
    right = float((log_probabilities.argmax(-1) == labels).mean())
    found |= {name: [*wilson_interval(right, rows)] for name in ("accuracy", "f1_micro")}
    low, high = found["ece"]
    error = calibration_error(np.exp(log_probabilities), labels)
    found["ece"] = [max(0.0, 2 * error - high), max(error, 2 * error - low)]
    return found


def regression_intervals(predictions: Array, labels: Array) -> Intervals:
    """Return intervals of the metrics of `regression_scores`.

    Args:
        predictions: [rows].
        labels: [rows].
    """
    from scipy.stats import rankdata

    rows = len(labels)
    x, y = predictions.astype(float), labels.astype(float)
    x, y = x - x.mean(), y - y.mean()  # sums of squares of numbers far from zero would lose digits
    offset = float(predictions.astype(float).mean() - labels.astype(float).mean())
    samples: dict[str, Array] = {"pearson": np.empty(0), "spearman": np.empty(0)}
    squares = (x - y + offset) ** 2
    samples["rmse"] = _resampled(squares[:, None], lambda sums: np.sqrt(sums[:, 0] / rows))
    statistics = np.stack([x, y, x * x, y * y, x * y], -1)
    samples["pearson"] = _resampled(statistics, lambda sums: _correlation(sums, rows))
    generator, step = _generator(), max(1, CHUNK // rows)
    parts = []
    for first in range(0, RESAMPLES, step):
        drawn = generator.integers(rows, size=(min(step, RESAMPLES - first), rows))
        a, b = (rankdata(side[drawn], axis=1) - (rows + 1) / 2 for side in (x, y))
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)))
    samples["spearman"] = np.concatenate(parts)
    return _percentiles(samples)


def multi_label_intervals(predictions: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Intervals:
    """Return intervals of the metrics of `multi_label_scores`.

    That of the exact matches is Wilson's, as for an accuracy. In the macro average of a resample, labels that occur in
    the rows and not in the resample are left out, since an F1 of 0 would shift the interval below the metric.

    Args:
        predictions: [rows, outputs], 0 or 1.
        labels: [rows, outputs], 0 or 1.
    """
    rows, outputs = labels.shape
    found, wrong, missed = predictions * labels, predictions * (1 - labels), (1 - predictions) * labels
    statistics = np.concatenate([found, wrong, missed], -1).astype(float)
    occurring = float((predictions + labels).any(0).mean())  # share of the labels; the F1 of the others is 0

    def f1(sums: Array) -> tuple[Array, Array]:
        parts = sums.reshape(-1, 3, outputs)
        counted = parts.any(1).sum(-1).astype(float)
        each = _ratio(2 * parts[:, 0], 2 * parts[:, 0] + parts[:, 1] + parts[:, 2])
        total = parts.sum(-1)
        macro = occurring * _ratio(each.sum(-1), counted)
        return _ratio(2 * total[:, 0], 2 * total[:, 0] + total[:, 1] + total[:, 2]), macro

    exact = float((predictions == labels).all(-1).mean())
    bounds = _percentiles(
        {
            "f1_micro": _resampled(statistics, lambda sums: f1(sums)[0]),
            "f1_macro": _resampled(statistics, lambda sums: f1(sums)[1]),
        }
    )
    return bounds | {"exact_match": [*wilson_interval(exact, rows)]}


def entity_intervals(statistics: Array) -> Intervals:
    """Return intervals of the metrics of `token_scores`.

    Args:
        statistics: [rows, 5], the numbers of found, wrong and missed entities, of right tags and of words; without
            entities the first three are 0.
    """
    samples = {"token_accuracy": _resampled(statistics[:, 3:], lambda sums: _ratio(sums[:, 0], sums[:, 1]))}
    if statistics[:, :3].any():
        entities = statistics[:, :3]
        precision = lambda sums: _ratio(sums[:, 0], sums[:, 0] + sums[:, 1])  # noqa: E731
        recall = lambda sums: _ratio(sums[:, 0], sums[:, 0] + sums[:, 2])  # noqa: E731
        samples["entity_f1"] = _resampled(entities, lambda s: _ratio(2 * s[:, 0], 2 * s[:, 0] + s[:, 1] + s[:, 2]))
        samples["entity_precision"] = _resampled(entities, precision)
        samples["entity_recall"] = _resampled(entities, recall)
    return _percentiles(samples)


def confusion_of(
    labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64], outputs: int
) -> npt.NDArray[np.int64]:
    """Return the confusion matrix [outputs, outputs]: rows are labels, columns predictions."""
    pairs = labels.astype(int) * outputs + predictions
    return np.bincount(pairs, minlength=outputs * outputs).reshape(outputs, outputs)


def of_confusion(cells: Array) -> dict[str, Array]:
    """Return the metrics of confusion matrices [resamples, outputs, outputs]."""
    rows = cells.sum((1, 2))
    right = np.diagonal(cells, axis1=1, axis2=2)
    truth, predicted = cells.sum(2), cells.sum(1)
    accuracy = right.sum(1) / rows
    present = (truth + predicted) > 0
    f1 = (_ratio(2 * right, truth + predicted) * present).sum(1) / present.sum(1)
    balanced = _ratio(right, truth).sum(1) / (truth > 0).sum(1)
    squares = rows**2
    covariance = right.sum(1) * rows - (truth * predicted).sum(1)
    spread = np.sqrt((squares - (predicted**2).sum(1)) * (squares - (truth**2).sum(1)))
    return {
        "accuracy": accuracy,
        "balanced_accuracy": balanced,
        "f1_macro": f1,
        "f1_micro": accuracy,
        "matthews": _ratio(covariance, spread),
    }


def _correlation(sums: Array, rows: int) -> Array:
    x, y, xx, yy, xy = sums.T / rows
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: Array = (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y))
    return correlation


def _resampled(statistics: Array, metric: Callable[[Array], Array]) -> Array:
    """Return the metric of the sums of every resample."""
    return np.concatenate([metric(counts @ statistics) for counts in _counts(len(statistics))])


def _counts(rows: int) -> Iterator[Array]:
    """Yield how often each row is drawn, [resamples, rows] in chunks."""
    generator, step = _generator(), max(1, CHUNK // rows)
    for first in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - first)
        drawn = generator.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(float)


def _generator() -> np.random.Generator:
    return np.random.default_rng(SEED)


def _ratio(one: Array, other: Array) -> Array:
    """Return one / other, and 0 where other is 0."""
    ratio: Array = np.divide(one, other, out=np.zeros_like(one, dtype=float), where=other > 0)
    return ratio


def _percentiles(samples: dict[str, Array]) -> Intervals:
    """Return the middle 95 % of the resamples in which a metric is defined."""
    tail = 100 * (1 - LEVEL) / 2
    defined = {name: values[np.isfinite(values)] for name, values in samples.items()}
    return {
        name: [float(bound) for bound in np.percentile(values, [tail, 100 - tail])]
        for name, values in defined.items()
        if len(values)
    }
