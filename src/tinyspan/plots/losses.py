"""Pictures of the loss: its eigenvalues, along eigenvectors, on lines and planes between models."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyspan.plots.axes import CYCLE, Array, Axes, Result, axes_of, bare, block_colour, plain, whole_numbers

__all__ = ["eigenvalues", "loss_along", "loss_in_plane", "loss_on_line"]


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
    ax = axes_of(ax)
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
    whole_numbers(ax)
    ax.axhline(0, color="#888888", linestyle=":", linewidth=1, zorder=1)
    largest = float(np.abs(hessian).max()) or 1.0
    ax.set_yscale("symlog", linthresh=largest / 1000, linscale=0.5)
    ax.set_ylabel("eigenvalues of the Hessian")
    ax.legend(frameon=False, fontsize=8)
    return bare(ax)


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
    ax = axes_of(ax)
    for line, colour in zip(result["lines"], CYCLE, strict=False):
        loss = np.array([np.nan if value is None else value for value in line["loss"]], dtype=float)
        label = f"eigenvalue {line['number']}: {line['eigenvalue']:.3g}"
        ax.plot(line["steps"], loss, marker="o", markersize=3.5, color=colour, label=label)
        ax.plot(line["steps"], line["quadratic"], linestyle="--", linewidth=1.2, color=colour)
    ax.set_xlabel("distance in z along the eigenvector")
    ax.set_ylabel("mean loss (dashed: quadratic)")
    ax.legend(frameon=False, fontsize=8)
    return bare(ax)


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
    ax = axes_of(ax)
    ax.plot(positions, losses, "o-", color=block_colour(0, 2), markersize=4)
    ax.set_ylabel("loss")
    ax.set_xticks([0, 0.5, 1], [plain(ends[0]), "middle", plain(ends[1])])
    return bare(ax)


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
    ax = axes_of(ax)
    ax.contourf(coefficients, coefficients, losses, levels=12, cmap="Greys_r")
    ax.contour(coefficients, coefficients, losses, levels=12, colors="white", linewidths=0.4)
    points = {"$\\theta_0$": (0, 0), plain(names[0]): (1, 0), plain(names[1]): (0, 1), "average": (0.5, 0.5)}
    for name, (x, y) in points.items():
        ax.plot([x], [y], "o", color="#c44e52", markersize=5)
        ax.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=8, color="#c44e52")
    ax.set_xlabel(plain(names[0]))
    ax.set_ylabel(plain(names[1]))
    return ax
