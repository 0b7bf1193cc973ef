"""Pictures for notebooks: each function draws one picture on a matplotlib axis and returns the axis.

They take trajectories, bases, models in a basis, or results (the content of `result.json`). Without an axis they create
a figure with pyplot, which a notebook shows. They need the extra `lab`; matplotlib is imported when a picture is drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tinyspan import analysis
from tinyspan.analysis import GAUSSIAN_SHARE, Comparison, Moved, Plane, Surface
from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError
from tinyspan.extras import missing_extra
from tinyspan.partition import Block
from tinyspan.trajectories.trajectory import Trajectory

__all__ = [
    "angles",
    "block_labels",
    "calibration",
    "confusion_matrix",
    "cosines",
    "eigenvalues",
    "envelopes",
    "explained_variance",
    "heat_map",
    "intervals",
    "learning_curves",
    "loss_along",
    "loss_in_plane",
    "loss_on_line",
    "outliers",
    "path",
    "plane",
    "result_labels",
    "scatter",
    "scores",
    "spectrum",
    "update_norms",
]

Array = npt.NDArray[np.float64]
Axes = Any  # matplotlib.axes.Axes
Result = Mapping[str, Any]

COLOURS = {"full": "#3b3b3b", "intrinsic": "#d1495b", "random": "#3d7ea6", "freeze": "#8fb8ca", "given": "#7b5ea7"}
CYCLE = ("#d1495b", "#3d7ea6", "#edae49", "#66a182", "#7b5ea7", "#3b3b3b", "#8fb8ca", "#b56576")
MAX_NUMBERED = 400  # cells of a heat map with more have no numbers
MAX_LEGEND = 12  # lines of a legend


# -- results ----------------------------------------------------------------------------------------------------------


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
    ax = _axes(ax)
    intervals = [analysis.score_interval(row) for row in rows]
    for position, (row, colour, interval) in enumerate(zip(rows, _colours(rows), intervals, strict=True)):
        ax.barh(position, row["score"], color=colour, height=0.62)
        if interval is not None:
            ax.plot(interval, [position, position], color="black", linewidth=1.4, solid_capstyle="butt")
        furthest = max(row["score"], 0.0, *(interval or ()))
        ax.annotate(f"{row['score']:.3f}", (furthest, position), xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(rows)), map(_plain, labels))
    ax.invert_yaxis()
    if all(0 <= row["score"] <= 1 for row in rows):
        ax.set_xlim(0, 1.12)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xlabel(f"held-out {_plain(metrics[0])}" + (" (lines: 95 % interval)" if any(intervals) else ""))
    return _bare(ax)


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
    ax = _axes(ax)
    for curve, label, colour in zip(curves, labels, _colours(rows), strict=True):
        if curve:
            ax.plot(*zip(*curve, strict=True), marker="o", markersize=4, color=colour, label=_plain(label))
    metrics = {row["metric"] for row, curve in zip(rows, curves, strict=True) if curve}
    held_out = f"held-out {_plain(metrics.pop())}" if len(metrics) == 1 else "held-out score"
    ax.set_ylabel({"score": held_out, "train_loss": "training loss", "validation_loss": "held-out loss"}.get(key, key))
    ax.set_xlabel("epoch")
    _whole_numbers(ax)
    ax.legend(frameon=False, fontsize=9)
    return _bare(ax)


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
    ax = _axes(ax)
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
    return _bare(ax)


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
    ax = _axes(ax)
    ends = [float(points.min()), float(points.max())]
    ax.plot(ends, ends, color="#888888", linestyle=":", linewidth=1)
    ax.scatter(points[:, 0], points[:, 1], s=10, alpha=0.5, color=CYCLE[1], linewidths=0, rasterized=len(points) > 500)
    ax.set_xlabel("label")
    ax.set_ylabel("prediction")
    return _bare(ax)


# -- directions -------------------------------------------------------------------------------------------------------


def spectrum(source: Trajectory | Basis, ax: Axes | None = None) -> Axes:
    """Draw the singular values of theta_i - theta_0 in every block, relative to the first; the scale is logarithmic.

    A block that does not move has no line, and its name in the legend says so. The legend of more than 12 blocks names
    the first and the last.

    Args:
        source: trajectory, or basis that was computed from one.
        ax: axis to draw on.

    Raises:
        InputError: the basis has no singular values, or the trajectory does not move.

    Example:
        >>> import torch
        >>> from tinyspan import by_pattern
        >>> partition = by_pattern(torch.nn.Linear(3, 1, bias=False), {"all": ".*"})
        >>> basis = Basis.from_directions(partition, {"all": torch.eye(2, 3)})
        >>> basis.spectrum = {"all": torch.tensor([4.0, 1.0])}
        >>> spectrum(basis).lines[0].get_xydata().tolist()
        [[1.0, 1.0], [2.0, 0.25]]
    """
    ax = _spectra(source, ax, lambda values: values / values[0])
    ax.set_yscale("log")
    ax.set_ylabel("singular value / the first")
    return ax


def explained_variance(source: Trajectory | Basis, ax: Axes | None = None) -> Axes:
    """Draw the share of the sum of squares that the first 1, 2, ... directions of every block explain.

    Args:
        source: trajectory, or basis that was computed from one.
        ax: axis to draw on.

    Raises:
        InputError: the basis has no singular values, or the trajectory does not move.

    Example:
        >>> import torch
        >>> from tinyspan import by_pattern
        >>> partition = by_pattern(torch.nn.Linear(3, 1, bias=False), {"all": ".*"})
        >>> basis = Basis.from_directions(partition, {"all": torch.eye(2, 3)})
        >>> basis.spectrum = {"all": torch.tensor([2.0, 1.0])}
        >>> explained_variance(basis).lines[0].get_ydata().round(3).tolist()
        [0.8, 1.0]
    """
    ax = _spectra(source, ax, lambda values: analysis.explained_variance(values))
    ax.set_ylim(0, 1.03)
    ax.set_ylabel("share of variance explained")
    return ax


def _spectra(source: Trajectory | Basis, ax: Axes | None, height: Callable[[Tensor], Tensor]) -> Axes:
    values = analysis.spectra(source)
    if not values:
        raise InputError("the basis has no singular values; only a basis that was computed from points has them")
    ax, labels = _axes(ax), list(map(_plain, block_labels(list(values))))
    for index, (label, singular) in enumerate(zip(labels, values.values(), strict=True)):
        shown = len(labels) <= MAX_LEGEND or index in (0, len(labels) - 1)
        colour, own = _block_colour(index, len(labels)), label if shown else None
        if not singular.any():
            ax.plot([], [], color=colour, label=own and f"{own} (does not move)")
            continue
        order = range(1, len(singular) + 1)
        ax.plot(order, height(singular.double()).numpy(), marker="o", markersize=3, color=colour, label=own)
    ax.set_xlabel("number of directions")
    _whole_numbers(ax)
    ax.legend(frameon=False, fontsize=8, ncols=2 if len(labels) > 4 else 1)
    return _bare(ax)


def path(
    source: Trajectory | Plane,
    ax: Axes | None = None,
    *,
    surface: Surface | None = None,
    labels: Sequence[str] | None = None,
) -> Axes:
    """Draw the path of a run from theta_0 in the plane in which it moves most, over the loss if it is given.

    Losses that are NaN or infinite stay white.

    Args:
        source: a trajectory, or the result of `analysis.plane`.
        ax: axis to draw on.
        surface: losses in the plane; see `analysis.surface_around`.
        labels: names of the ends of the paths; by default `end of the run`.

    Raises:
        InputError: the trajectory spans no plane, or no loss is finite.

    Example:
        >>> import torch
        >>> from tinyspan import by_pattern, random_basis
        >>> basis = random_basis(by_pattern(torch.nn.Linear(2, 2), {"model": ".*"}), 2)
        >>> ax = path(Plane(basis, (torch.tensor([[0.0, 0.0], [1.0, 0.5]]),), 0.97))
        >>> ax.lines[0].get_xydata().tolist(), [text.get_text() for text in ax.texts]
        ([[0.0, 0.0], [1.0, 0.5]], ['theta_0', 'end of the run'])
    """
    flat = source if isinstance(source, Plane) else analysis.plane(source)
    ax = _axes(ax)
    from matplotlib.patheffects import withStroke

    if surface is not None:
        loss = np.ma.masked_invalid(surface.loss.numpy())
        if not loss.count():
            raise InputError("the loss around the path is NaN or infinite everywhere; was the run sound?")
        lowest, highest = loss.min(), np.quantile(loss.compressed(), 0.97)
        levels = np.linspace(lowest, highest if highest > lowest else lowest + 1.0, 18)
        grid = surface.first.numpy(), surface.second.numpy()
        filled = ax.contourf(*grid, loss, levels=levels, cmap="Blues_r", extend="max")
        ax.figure.colorbar(filled, ax=ax, label="training loss", pad=0.02, format="%.2f")
    halo = [withStroke(linewidth=3, foreground="white")]
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "path_effects": halo, "fontweight": "bold"}
    ends = ["end of the run"] * len(flat.paths) if labels is None else labels
    ax.annotate("theta_0", (0.0, 0.0), xytext=(0, 9), **style)
    for index, (points, label) in enumerate(zip(flat.paths, ends, strict=True)):
        colour = CYCLE[index % len(CYCLE)]
        ax.plot(*points.double().T.numpy(), "-o", color=colour, markersize=4, linewidth=1.6)
        ax.annotate(
            _plain(label), tuple(points[-1].tolist()), xytext=(0, 9), color=colour if index else "black", **style
        )
    ax.margins(0.14)
    ax.set_xlabel("along the first direction")
    ax.set_ylabel("along the second")
    of_paths = "path's" if len(flat.paths) == 1 else "paths'"
    ax.set_title(f"this plane holds {flat.explained:.0%} of the {of_paths} squared distances", fontsize=10)
    return _bare(ax)


def plane(*trajectories: Trajectory, ax: Axes | None = None, labels: Sequence[str] | None = None) -> Axes:
    """Draw the paths of several runs from the same theta_0 in the plane in which they move most together.

    Args:
        trajectories: the runs.
        ax: axis to draw on.
        labels: names of the runs; by default the names of their folders.

    Raises:
        InputError: the runs span no plane.
        MismatchError: the runs have different parameters or start from different weights.

    Example:
        >>> import torch
        >>> import tempfile
        >>> from tinyspan import TrajectoryRecorder, by_pattern
        >>> runs = []
        >>> for name, end in (("a", [3.0, 0.0]), ("b", [0.0, 1.0])):
        ...     model = torch.nn.Linear(2, 1, bias=False)
        ...     _ = model.weight.data.zero_()
        ...     recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), f"{tempfile.mkdtemp()}/{name}")
        ...     _ = model.weight.data.add_(torch.tensor([end]))
        ...     recorder.record(step=0)
        ...     runs.append(recorder.trajectory())
        >>> ax = plane(*runs)
        >>> [text.get_text() for text in ax.texts], abs(ax.lines[0].get_xydata()[-1]).round(3).tolist()
        (['theta_0', 'a', 'b'], [3.0, 0.0])
    """
    names = [run.folder.name for run in trajectories] if labels is None else labels
    return path(analysis.plane(*trajectories), ax, labels=names)


def angles(comparisons: Sequence[Comparison], ax: Axes | None = None) -> Axes:
    """Draw the principal angles between two runs in every block, in degrees.

    0 degrees is a direction that both contain; random directions in many dimensions are at almost 90 degrees.

    Args:
        comparisons: what `analysis.compare` returns.
        ax: axis to draw on.

    Raises:
        InputError: no block has an angle.

    Example:
        >>> import torch
        >>> row = Comparison("0", torch.tensor([10.0, 80.0]), None, (None, None), (0.1, 0.1), (None, None))
        >>> angles([row]).lines[0].get_xydata().tolist()
        [[0.0, 10.0], [0.0, 80.0]]
    """
    if not any(len(row.angles) for row in comparisons):
        raise InputError("there is no angle: in every block, one of the two has no directions")
    ax = _axes(ax)
    for position, row in enumerate(comparisons):
        heights = row.angles.tolist()
        ax.plot([position] * len(heights), heights, "o", markersize=5, color=CYCLE[1], alpha=0.75)
    ax.set_ylim(-3, 93)
    ax.set_yticks([0, 30, 60, 90])
    ax.set_ylabel("principal angles in degrees")
    return _blocks_below(ax, [row.block for row in comparisons])


def cosines(comparisons: Sequence[Comparison], ax: Axes | None = None) -> Axes:
    """Draw the cosine of the updates of two runs in every block, and the share of each in the other's directions.

    Args:
        comparisons: what `analysis.compare` returns.
        ax: axis to draw on.

    Raises:
        InputError: no block has two updates.

    Example:
        >>> import torch
        >>> row = Comparison("0", torch.tensor([10.0]), 0.5, (0.9, 0.8), (0.1, 0.1), (1.0, 2.0))
        >>> ax = cosines([row])
        >>> {line.get_label(): line.get_ydata().tolist() for line in ax.lines[:3]}
        {'cosine of the updates': [0.5], "share of a's in b": [0.9], "share of b's in a": [0.8]}
    """
    series = {
        "cosine of the updates": [row.cosine for row in comparisons],
        "share of a's in b": [row.shares[0] for row in comparisons],
        "share of b's in a": [row.shares[1] for row in comparisons],
    }
    if all(value is None for values in series.values() for value in values):
        raise InputError("there is no update to compare; a basis alone has none")
    ax = _axes(ax)
    for (label, values), colour in zip(series.items(), CYCLE, strict=False):
        heights = np.array([np.nan if value is None else value for value in values])
        if not np.isnan(heights).all():
            ax.plot(np.arange(len(heights)), heights, marker="o", markersize=4, color=colour, label=label)
    ax.axhline(0, color="#888888", linestyle=":", linewidth=1)
    lowest = min(value for values in series.values() for value in values if value is not None)
    ax.set_ylim(min(-0.05, lowest - 0.05), 1.05)
    ax.set_ylabel("cosine, share of the squared norm")
    ax.legend(frameon=False, fontsize=8)
    return _blocks_below(ax, [row.block for row in comparisons])


# -- curvature --------------------------------------------------------------------------------------------------------


def eigenvalues(result: Result, ax: Axes | None = None) -> Axes:
    """Draw the eigenvalues of the Hessian at every point of a run, or at the only point in descending order.

    Along a run the largest (the sharpness) and the lowest have thick lines, and all others thin ones; the dashed line
    is the largest eigenvalue of the Gauss-Newton matrix. The vertical scale is logarithmic on both sides of zero, and
    linear below a thousandth of the largest.

    Args:
        result: the content of `curvature.json`.
        ax: axis to draw on.

    Example:
        >>> point = {"gauss_newton": [3.0, 1.0], "hessian": [2.0, -1.0]}
        >>> ax = eigenvalues({"points": [{"step": 0, **point}, {"step": 5, **point, "hessian": [4.0, 1.0]}]})
        >>> {line.get_label(): line.get_xydata().tolist() for line in ax.lines[:1]}
        {'largest (sharpness)': [[0.0, 2.0], [5.0, 4.0]]}
    """
    ax = _axes(ax)
    points = result["points"]
    hessian = np.array([point["hessian"] for point in points], dtype=float)
    gauss_newton = None if points[0]["gauss_newton"] is None else np.array([point["gauss_newton"] for point in points])
    if len(points) == 1:
        order = np.arange(1, hessian.shape[1] + 1)
        ax.plot(order, hessian[0], "o", markersize=5, color=CYCLE[0], label="Hessian")
        if gauss_newton is not None:
            ax.plot(order, gauss_newton[0], "x", markersize=5, color=CYCLE[1], label="Gauss-Newton")
        ax.set_xlabel("eigenvalue, in descending order")
    else:
        steps = [point["step"] for point in points]
        style: dict[str, Any] = {"marker": "o", "markersize": 4}
        ax.plot(steps, hessian[:, 0], color=CYCLE[0], label="largest (sharpness)", **style)
        if hessian.shape[1] > 1:
            ax.plot(steps, hessian[:, -1], color=CYCLE[1], label="lowest", **style)
        if gauss_newton is not None:
            ax.plot(steps, gauss_newton[:, 0], color=CYCLE[0], linestyle="--", label="largest, Gauss-Newton")
        for index, inner in enumerate(hessian.T[1:-1]):
            ax.plot(steps, inner, color="#9a9a9a", linewidth=0.7, zorder=1, label=None if index else "others")
        ax.set_xlabel("optimizer steps from theta_0")
    _whole_numbers(ax)
    ax.axhline(0, color="#888888", linestyle=":", linewidth=1, zorder=1)
    largest = float(np.abs(hessian).max()) or 1.0
    ax.set_yscale("symlog", linthresh=largest / 1000, linscale=0.5)
    ax.set_ylabel("eigenvalues of the Hessian")
    ax.legend(frameon=False, fontsize=8)
    return _bare(ax)


def loss_along(result: Result, ax: Axes | None = None) -> Axes:
    """Draw the loss along eigenvectors of the Hessian through the last point, with its quadratic approximation dashed.

    Args:
        result: the content of `curvature.json`.
        ax: axis to draw on.

    Example:
        >>> line = {"number": 1, "eigenvalue": 2.0, "steps": [-1.0, 0.0, 1.0]}
        >>> ax = loss_along({"lines": [{**line, "loss": [1.9, 1.0, 2.1], "quadratic": [2.0, 1.0, 2.0]}]})
        >>> ax.lines[0].get_label(), ax.lines[0].get_ydata().tolist(), ax.lines[1].get_ydata().tolist()
        ('eigenvalue 1: 2', [1.9, 1.0, 2.1], [2.0, 1.0, 2.0])
    """
    ax = _axes(ax)
    for line, colour in zip(result["lines"], CYCLE, strict=False):
        loss = np.array([np.nan if value is None else value for value in line["loss"]], dtype=float)
        label = f"eigenvalue {line['number']}: {line['eigenvalue']:.3g}"
        ax.plot(line["steps"], loss, marker="o", markersize=3.5, color=colour, label=label)
        ax.plot(line["steps"], line["quadratic"], linestyle="--", linewidth=1.2, color=colour)
    ax.set_xlabel("distance in z along the eigenvector")
    ax.set_ylabel("mean loss (dashed: quadratic)")
    ax.legend(frameon=False, fontsize=8)
    return _bare(ax)


# -- updates ----------------------------------------------------------------------------------------------------------


def update_norms(moved: Moved, ax: Axes | None = None) -> Axes:
    """Draw how far the weights of every component moved, block by block, as a multiple of the average weight.

    A cell is the root mean square of the update of one parameter, divided by that of all blocks together. Cells of the
    average are white, and those of twice the average or more have the darkest red.

    Args:
        moved: a trajectory, a `SubspaceModel`, or the opened folder of an adapter.
        ax: axis to draw on.

    Raises:
        InputError: there is no update, or it is zero.

    Example:
        >>> import torch
        >>> from tinyspan import SubspaceModel, by_pattern
        >>> model = torch.nn.Linear(1, 1)
        >>> partition = by_pattern(model, {"all": ".*"})
        >>> subspace = SubspaceModel(model, Basis.from_directions(partition, {"all": torch.tensor([[4.0, 3.0]])}))
        >>> subspace.set_state({"all": torch.tensor([5.0])})
        >>> [text.get_text() for text in update_norms(subspace).texts]  # 4 and 3, where the root mean square is 3.54
        ['1.1', '0.8']
    """
    rows = analysis.component_norms(moved)
    total, count = sum(row.norm**2 for row in rows), sum(row.numel for row in rows)
    if not total:
        raise InputError("the update is zero, so it sits nowhere")
    average = (total / count) ** 0.5
    cells = {(row.block, row.component): row.per_weight / average for row in rows}
    ax = _components(cells, ax, bounds=(0, 2), cmap="RdBu_r")
    ax.set_title("change of a weight (root mean square),\nas a multiple of the average over all", fontsize=9)
    return ax


def outliers(moved: Moved, ax: Axes | None = None) -> Axes:
    """Draw the share of coordinates of an update beyond 3 standard deviations, as a multiple of a Gaussian's 0.27 %.

    Standard deviations are those of the block; see `analysis.outliers`. Cells of four times the share of a Gaussian
    vector or more have the darkest red.

    Args:
        moved: a trajectory, a `SubspaceModel`, or the opened folder of an adapter.
        ax: axis to draw on.

    Raises:
        InputError: there is no update.

    Example:
        >>> import torch
        >>> from tinyspan import SubspaceModel, by_pattern
        >>> model = torch.nn.Linear(20, 1)
        >>> partition = by_pattern(model, {"all": ".*"})
        >>> directions = torch.cat([torch.zeros(1, 20), torch.ones(1, 1)], dim=1)
        >>> subspace = SubspaceModel(model, Basis.from_directions(partition, {"all": directions}))
        >>> subspace.set_state({"all": torch.ones(1)})
        >>> [text.get_text() for text in outliers(subspace).texts]  # none of 20 weights, the bias
        ['0', '370']
    """

    def shares(block: Block, update: Tensor) -> dict[str, float]:
        counts = analysis.outliers(update, block, largest=0).by_parameter
        return {spec.name: counts[spec.name] / spec.numel / GAUSSIAN_SHARE for spec in block.parameters}

    cells = {
        (block.name, analysis.component(block, name)): ratio
        for block, update in analysis.updates(moved)
        for name, ratio in shares(block, update).items()
    }
    ax = _components(cells, ax, bounds=(0, 4), cmap="Reds")
    ax.set_title("share of coordinates beyond 3 sigma,\nas a multiple of a Gaussian's 0.27 %", fontsize=9)
    return ax


def envelopes(moved: Moved | Mapping[str, Array], ax: Axes | None = None, *, ceiling: float | None = None) -> Axes:
    """Draw the largest `|x - mean| / std` along the update of every block, the first block on top.

    A dotted line marks 3 standard deviations.

    Args:
        moved: a trajectory, a `SubspaceModel`, or the opened folder of an adapter; or name -> envelope of each block,
            as `analysis.envelope` returns it.
        ax: axis to draw on.
        ceiling: height of a block in standard deviations; higher values are cut off, and every block is labelled with
            its largest value. By default the largest of all.

    Raises:
        InputError: there is no update.

    Example:
        >>> ax = envelopes({"0": np.array([1.0, 4.0]), "1": np.array([2.0, 3.0])})
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['1', '0']
    """
    if isinstance(moved, Mapping):
        names, profiles = list(moved), [np.asarray(profile, dtype=float) for profile in moved.values()]
    else:
        parts = [(block.name, analysis.envelope(update).numpy()) for block, update in analysis.updates(moved)]
        names, profiles = block_labels([name for name, _ in parts]), [profile for _, profile in parts]
    ax = _axes(ax)
    highest = max(float(profile.max()) for profile in profiles) or 1.0
    height = highest if ceiling is None else ceiling
    for index, profile in enumerate(profiles):
        base = len(profiles) - 1 - index
        heights = base + 0.9 * np.minimum(profile, height) / height
        colour = _block_colour(index, len(profiles))
        ax.fill_between(np.linspace(0, 1, len(profile)), base, heights, color=colour, lw=0)
        ax.plot([0, 1], [base + 0.9 * 3 / height] * 2, color="black", lw=0.6, ls=":")
        if ceiling is not None:
            ax.text(1.02, base + 0.1, f"{profile.max():.0f} sigma", fontsize=7, color="#666666")
    ax.set_yticks(np.arange(len(profiles)) + 0.4, [_plain(name) for name in reversed(names)], fontsize=8)
    ax.tick_params(left=False)
    ax.spines["left"].set_visible(False)
    ax.set_xticks([0, 1], ["first weight", "last weight"])
    if ceiling is None:
        ax.set_title(f"largest |update| along each block\n(dots: 3 sigma, highest: {highest:.1f})", fontsize=9)
    return _bare(ax)


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
    ax = _axes(ax)
    for row, (name, (value, low, high)) in enumerate(zip(names, values, strict=True)):
        colour = "black" if name == marked else "#8a8a8a"
        ax.plot([low, high], [row, row], color=colour, linewidth=1.5)
        ax.plot([value], [row], "o", color=colour, markersize=4)
    ax.axvline(0, color="#c44e52", linewidth=0.8)
    ax.set_yticks(range(len(names)), [_plain(name) for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return _bare(ax)


def loss_on_line(
    positions: Sequence[float], losses: Sequence[float], ends: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """Draw the loss on the line between two models, which lie at the positions 0 and 1.

    Args:
        positions: positions on the line.
        losses: the loss at each.
        ends: names of the models.
        ax: axis to draw on.

    Example:
        >>> loss_on_line([0.0, 0.5, 1.0], [0.7, 0.5, 0.6], ("a", "b")).get_ylabel()
        'loss'
    """
    ax = _axes(ax)
    ax.plot(positions, losses, "o-", color=_block_colour(0, 2), markersize=4)
    ax.set_ylabel("loss")
    ax.set_xticks([0, 0.5, 1], [_plain(ends[0]), "middle", _plain(ends[1])])
    return _bare(ax)


def loss_in_plane(coefficients: Sequence[float], losses: Array, names: tuple[str, str], ax: Axes | None = None) -> Axes:
    """Draw the loss at theta_0 + x delta_1 + y delta_2 as contours, with theta_0, both models and their average.

    Args:
        coefficients: values of x and of y.
        losses: (y, x).
        names: names of the models.
        ax: axis to draw on.

    Example:
        >>> ax = loss_in_plane([0.0, 1.0], np.array([[0.7, 0.6], [0.6, 0.5]]), ("a", "b"))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('a', 'b')
    """
    ax = _axes(ax)
    ax.contourf(coefficients, coefficients, losses, levels=12, cmap="Greys_r")
    ax.contour(coefficients, coefficients, losses, levels=12, colors="white", linewidths=0.4)
    points = {"$\\theta_0$": (0, 0), _plain(names[0]): (1, 0), _plain(names[1]): (0, 1), "average": (0.5, 0.5)}
    for name, (x, y) in points.items():
        ax.plot([x], [y], "o", color="#c44e52", markersize=5)
        ax.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=8, color="#c44e52")
    ax.set_xlabel(_plain(names[0]))
    ax.set_ylabel(_plain(names[1]))
    return ax


# -- parts ------------------------------------------------------------------------------------------------------------


def heat_map(
    grid: Array,
    rows: Sequence[str],
    columns: Sequence[str],
    ax: Axes | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    cmap: str = "Reds",
    text: Callable[[int, int], str] | None = None,
) -> Axes:
    """Draw a matrix as a heat map with its values; cells that are NaN stay white and empty.

    Args:
        grid: (rows, columns); a grid of more than 400 cells has no numbers in it.
        rows: names of the rows.
        columns: names of the columns.
        ax: axis to draw on.
        bounds: values at the ends of the colours; by default plus and minus the largest magnitude.
        cmap: name of the colours in matplotlib.
        text: function of row and column that returns the text of a cell; by default its value.

    Example:
        >>> ax = heat_map(np.array([[1.0, np.nan]]), ["a"], ["b", "c"])
        >>> [text.get_text() for text in ax.texts]
        ['1.00']
    """
    ax = _axes(ax)
    largest = float(np.nanmax(np.abs(grid))) or 1.0
    low, high = bounds or (-largest, largest)
    image = ax.imshow(grid, aspect="auto", cmap=cmap, vmin=low, vmax=high)

    def value(row: int, column: int) -> str:
        return _number(grid[row, column], max(largest, high))

    small = grid.size > 60
    if grid.size <= MAX_NUMBERED:
        for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            red, green, blue, _ = image.cmap(image.norm(grid[row, column]))
            ink = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
            ax.text(
                column, row, (text or value)(row, column), ha="center", va="center", color=ink, size=7 if small else 9
            )
    thin = [max(1, -(-len(names) // 40)) for names in (rows, columns)]
    rows, columns = list(map(_plain, rows)), list(map(_plain, columns))
    ax.set_yticks(range(0, len(rows), thin[0]), rows[:: thin[0]], fontsize=8)
    long = max(map(len, columns), default=0) * len(columns) > 45
    ax.set_xticks(range(0, len(columns), thin[1]), columns[:: thin[1]], fontsize=8, rotation=90 if long else 0)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def block_labels(names: Sequence[str]) -> list[str]:
    """Return short names of blocks: without the parts that all have in common, except the one before a number.

    Example:
        >>> block_labels(["bert.encoder.layer.0", "bert.encoder.layer.1"])
        ['layer.0', 'layer.1']
        >>> block_labels(["model"])
        ['model']
    """
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    if common and all(part[common].isdecimal() for part in parts):
        common -= 1
    return [".".join(part[common:]) for part in parts]


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


def _axes(ax: Axes | None) -> Axes:
    """Return the axis, or that of a new figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "a picture") from error
    _, ax = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")
    return ax


def _bare(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _blocks_below(ax: Axes, names: Sequence[str]) -> Axes:
    labels, thin = list(map(_plain, block_labels(names))), max(1, len(names) // 40)
    long = sum(map(len, labels)) > 45
    ax.set_xticks(range(0, len(names), thin), labels[::thin], fontsize=8, rotation=90 if long else 0)
    ax.set_xlim(-0.5, len(names) - 0.5)
    return _bare(ax)


def _components(cells: Mapping[tuple[str, str], float], ax: Axes | None, **colours: Any) -> Axes:
    """Draw a value per block and component as a heat map; blocks are columns."""
    blocks = list(dict.fromkeys(block for block, _ in cells))
    components = list(dict.fromkeys(name for _, name in cells))
    grid = np.array([[cells.get((block, name), np.nan) for block in blocks] for name in components])
    return heat_map(grid, components, block_labels(blocks), ax, **colours)


def _plain(text: str) -> str:
    r"""Return a text in which matplotlib finds no formula: between two `$` it would."""
    return text.replace("$", r"\$")


def _number(value: float, largest: float) -> str:
    return f"{value:.0f}" if largest >= 100 else f"{value:.1f}" if largest >= 2 else f"{value:.2f}"


def _block_colour(index: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * index / max(count - 1, 1))
