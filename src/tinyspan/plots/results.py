"""Pictures of results: scores, curves, confusion, calibration, predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tinyspan import analysis
from tinyspan.errors import InputError
from tinyspan.plots.axes import COLOURS, CYCLE, Axes, Result, axes_of, bare, heat_map, plain, whole_numbers

__all__ = ["calibration", "confusion_matrix", "intervals", "learning_curves", "result_labels", "scatter", "scores"]


def scores(results: Result | Sequence[Result], ax: Axes | None = None, *, labels: Sequence[str] | None = None) -> Axes:
    """Draw the held-out score of each result as a bar, with a line over its 95 % interval where it has one.

    Args:
        results: one or several results with the same metric.
        ax: axis to draw on.
        labels: names of the results; by default see `result_labels`.

    Raises:
        InputError: there is no result, or the metrics differ.

    Example:
        >>> ax = scores([{"method": "full", "metric": "accuracy", "score": 0.8, "rows": {"validation": 100}}])
        >>> [float(bar.get_width()) for bar in ax.patches], ax.get_xlabel()
        ([0.8], 'held-out accuracy (lines: 95 % interval)')
    """
    rows = _listed(results)
    if len(metrics := sorted({row["metric"] for row in rows})) != 1:
        raise InputError(f"expected results with one metric, got {', '.join(metrics) or 'no result'}")
    labels = result_labels(rows) if labels is None else labels
    ax = axes_of(ax)
    intervals = [analysis.score_interval(row) for row in rows]
    for position, (row, colour, interval) in enumerate(zip(rows, _colours(rows), intervals, strict=True)):
        ax.barh(position, row["score"], color=colour, height=0.62)
        if interval is not None:
            ax.plot(interval, [position, position], color="black", linewidth=1.4, solid_capstyle="butt")
        furthest = max(row["score"], 0.0, *(interval or ()))
        ax.annotate(f"{row['score']:.3f}", (furthest, position), xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(rows)), map(plain, labels))
    ax.invert_yaxis()
    if all(
        0 <= end <= 1
        for row, interval in zip(rows, intervals, strict=True)
        for end in (row["score"], *(interval or ()))
    ):
        ax.set_xlim(0, 1.12)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xlabel(f"held-out {plain(metrics[0])}" + (" (lines: 95 % interval)" if any(intervals) else ""))
    return bare(ax)


def learning_curves(
    results: Result | Sequence[Result],
    ax: Axes | None = None,
    *,
    key: str = "score",
    labels: Sequence[str] | None = None,
) -> Axes:
    """Draw a value of the `history` of each result against the epoch; results without it have no line.

    Args:
        results: one or several results.
        ax: axis to draw on.
        key: `score`, `train_loss` or `validation_loss`.
        labels: names of the results; by default see `result_labels`.

    Raises:
        InputError: no result has the value after any epoch.

    Example:
        >>> history = [{"epoch": 1.0, "score": 0.6}, {"epoch": 2.0, "score": 0.7}]
        >>> ax = learning_curves({"method": "full", "metric": "accuracy", "history": history})
        >>> ax.lines[0].get_xydata().tolist()
        [[1.0, 0.6], [2.0, 0.7]]
    """
    rows = _listed(results)
    labels = result_labels(rows) if labels is None else labels
    curves = [[(entry["epoch"], entry[key]) for entry in row.get("history", ()) if key in entry] for row in rows]
    if not any(curves):
        raise InputError(f"no result has {key!r} in its history, so there is no curve")
    ax = axes_of(ax)
    for curve, label, colour in zip(curves, labels, _colours(rows), strict=True):
        if curve:
            ax.plot(*zip(*curve, strict=True), marker="o", markersize=4, color=colour, label=plain(label))
    metrics = {row["metric"] for row, curve in zip(rows, curves, strict=True) if curve}
    held_out = f"held-out {plain(metrics.pop())}" if len(metrics) == 1 else "held-out score"
    ax.set_ylabel({"score": held_out, "train_loss": "training loss", "validation_loss": "held-out loss"}.get(key, key))
    ax.set_xlabel("epoch")
    whole_numbers(ax)
    ax.legend(frameon=False, fontsize=9)
    return bare(ax)


def confusion_matrix(result: Result, ax: Axes | None = None) -> Axes:
    """Draw the confusion matrix of a classifier: rows are true labels, columns predictions, colours shares of the row.

    Args:
        result: result with `confusion_matrix` and `labels`.
        ax: axis to draw on.

    Raises:
        InputError: the result has no confusion matrix.

    Example:
        >>> ax = confusion_matrix({"labels": ["no", "yes"], "confusion_matrix": [[8, 2], [1, 9]]})
        >>> [text.get_text() for text in ax.texts]
        ['8', '2', '1', '9']
    """
    if not result.get("confusion_matrix"):
        raise InputError("the result has no confusion matrix; only results of classifiers have one")
    counts = np.array(result["confusion_matrix"], dtype=float)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    labels = [str(label) for label in result["labels"]]
    ax = heat_map(shares, labels, labels, ax, text=lambda row, column: f"{counts[row, column]:.0f}", bounds=(0, 1))
    ax.set_ylabel("label")
    ax.set_xlabel("prediction")
    return ax


def calibration(result: Result, ax: Axes | None = None) -> Axes:
    """Draw the accuracy of a classifier's predictions against their mean confidence, bin by bin.

    Bins without rows have no point, and the area of a point grows with the rows of its bin. A calibrated model lies on
    the dotted diagonal. The title has the expected calibration error, and the error before temperature scaling if a
    temperature was fitted.

    Args:
        result: result with `calibration`.
        ax: axis to draw on.

    Raises:
        InputError: the result has no calibration.

    Example:
        >>> bins = [[0.6, 0.5, 10], [0.9, 0.8, 30], [0.95, 0.0, 0]]
        >>> ax = calibration({"calibration": {"ece": 0.1, "bins": bins, "temperature": None}})
        >>> ax.collections[0].get_offsets().tolist(), ax.get_title()
        ([[0.6, 0.5], [0.9, 0.8]], 'expected calibration error 0.100')
    """
    stated = result.get("calibration")
    if not stated or not (bins := [row for row in stated["bins"] if row[2]]):
        raise InputError("the result has no calibration; only results of classifiers with probabilities have one")
    ax = axes_of(ax)
    confidence, accuracy, rows = (np.array(column, dtype=float) for column in zip(*bins, strict=True))
    ax.plot([0, 1], [0, 1], color="#888888", linestyle=":", linewidth=1)
    ax.plot(confidence, accuracy, color=CYCLE[1], linewidth=1)
    ax.scatter(confidence, accuracy, s=12 + 160 * rows / rows.max(), color=CYCLE[1], zorder=3)
    ax.set_xlim(min(0.45, confidence.min() - 0.05), 1.03)
    ax.set_ylim(min(0.45, accuracy.min() - 0.08), 1.05)
    ax.set_xlabel("mean confidence of the predictions")
    ax.set_ylabel("accuracy")
    title = f"expected calibration error {stated['ece']:.3f}"
    if stated.get("temperature") and "ece" in (before := stated.get("before") or {}):
        title += f",\n{before['ece']:.3f} before temperature {stated['temperature']:.2f}"
    ax.set_title(title, fontsize=10)
    return bare(ax)


def scatter(predictions: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Draw the predictions of a regression against the labels, with a dotted line where both are equal.

    Args:
        predictions: rows with the numbers `label` and `prediction`, as in `predictions.jsonl`.
        ax: axis to draw on.

    Raises:
        InputError: there is no row, or a row has no numbers.

    Example:
        >>> ax = scatter([{"label": 1.0, "prediction": 1.5}, {"label": 4.0, "prediction": 3.0}])
        >>> ax.collections[0].get_offsets().tolist()
        [[1.0, 1.5], [4.0, 3.0]]
    """
    try:
        points = np.array([[float(row["label"]), float(row["prediction"])] for row in predictions])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"expected rows with the numbers label and prediction: {error}") from error
    if not len(points):
        raise InputError("there is no prediction to draw")
    ax = axes_of(ax)
    ends = [float(points.min()), float(points.max())]
    ax.plot(ends, ends, color="#888888", linestyle=":", linewidth=1)
    ax.scatter(points[:, 0], points[:, 1], s=10, alpha=0.5, color=CYCLE[1], linewidths=0, rasterized=len(points) > 500)
    ax.set_xlabel("label")
    ax.set_ylabel("prediction")
    return bare(ax)


def intervals(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    ax: Axes | None = None,
    *,
    marked: str | None = None,
) -> Axes:
    """Draw differences with their intervals, one line each from above, and a line at 0.

    Args:
        names: names of the rows.
        values: for each a value and the lower and upper end of its interval.
        ax: axis to draw on.
        marked: name of the row that is drawn dark.

    Example:
        >>> ax = intervals(["a", "b"], [[0.1, 0.0, 0.2], [-0.1, -0.2, 0.1]], marked="a")
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['a', 'b']
    """
    ax = axes_of(ax)
    for row, (name, (value, low, high)) in enumerate(zip(names, values, strict=True)):
        colour = "black" if name == marked else "#8a8a8a"
        ax.plot([low, high], [row, row], color=colour, linewidth=1.5)
        ax.plot([value], [row], "o", color=colour, markersize=4)
    ax.axvline(0, color="#c44e52", linewidth=0.8)
    ax.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return bare(ax)


def result_labels(results: Sequence[Result]) -> list[str]:
    """Return names of results: the methods, with task and seed, or a number, where several have the same.

    Example:
        >>> rows = [{"method": "full", "task": "sst2", "seed": seed} for seed in (0, 1)]
        >>> result_labels([*rows, {"method": "freeze", "task": "sst2", "seed": 0}])
        ['full, sst2, seed 0', 'full, sst2, seed 1', 'freeze']
    """
    makers: tuple[Callable[[Result], str], ...] = (
        lambda row: str(row["method"]),
        lambda row: f"{row['method']}, {row.get('task')}",
        lambda row: f"{row['method']}, {row.get('task')}, seed {row.get('seed')}",
    )
    labels = [makers[0](row) for row in results]
    for make in makers[1:]:
        labels = [make(row) if labels.count(label) > 1 else label for row, label in zip(results, labels, strict=True)]
    return [
        f"{label} ({labels[:index].count(label) + 1})" if labels.count(label) > 1 else label
        for index, label in enumerate(labels)
    ]


def _listed(results: Result | Sequence[Result]) -> list[Result]:
    return [results] if isinstance(results, Mapping) else list(results)


def _colours(results: Sequence[Result]) -> list[str]:
    """Return the colours of the methods, or of a cycle if a method comes twice or has none."""
    methods = [row["method"] for row in results]
    if len({*methods}) == len(methods) and all(method in COLOURS for method in methods):
        return [COLOURS[method] for method in methods]
    return [CYCLE[index % len(CYCLE)] for index in range(len(methods))]
