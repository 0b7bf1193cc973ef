"""Metrics of labels and predictions, by name."""

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef

from tinyspan.errors import InputError
from tinyspan.workflows.tasks.base import Task

__all__ = ["METRICS", "score_of"]

Scores = npt.NDArray[np.float64]


def _pearson(labels: Scores, predictions: Scores) -> float:
    """Pearson's r, and 0 where it is undefined because one side is constant, as in scikit-learn's Matthews' phi."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(pearsonr(labels.astype(float), predictions.astype(float)).statistic)


METRICS: dict[str, Callable[[Scores, Scores], float]] = {
    "accuracy": lambda labels, predictions: float(accuracy_score(labels, predictions)),
    "matthews": lambda labels, predictions: float(matthews_corrcoef(labels, predictions)),
    "pearson": _pearson,
}


def score_of(task: Task, labels: Scores, predictions: Scores) -> float:
    """Return a task's metric; a correlation in which one side is constant is 0, with a warning.

    Raises:
        InputError: the task has no labels, so its metric is not in `METRICS`.
    """
    if task.metric not in METRICS:
        raise InputError(f"{task.name} has no labels: its score is the {task.metric} of tokens")
    for name, side in (("labels", labels), ("predictions", predictions)):
        if task.metric != "accuracy" and np.ptp(side) == 0:
            warnings.warn(
                f"{task.name}: the {len(side)} held-out {name} are all {side[0]:g}, for which {task.metric} is not "
                "defined; it is reported as 0",
                stacklevel=2,
            )
            return 0.0
    return METRICS[task.metric](labels, predictions)
