"""Pictures of directions: spectra, paths, angles."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tinyspan import analysis
from tinyspan.analysis import Comparison, Plane, Surface
from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError
from tinyspan.plots.axes import (
    CYCLE,
    Axes,
    axes_of,
    bare,
    block_colour,
    block_labels,
    blocks_below,
    plain,
    whole_numbers,
)
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["angles", "cosines", "explained_variance", "path", "plane", "spectrum"]

MAX_LEGEND = 12  # lines of a legend


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
    ax, labels = axes_of(ax), list(map(plain, block_labels(list(values))))
    for index, (label, singular) in enumerate(zip(labels, values.values(), strict=True)):
        shown = len(labels) <= MAX_LEGEND or index in (0, len(labels) - 1)
        colour, own = block_colour(index, len(labels)), label if shown else None
        if not singular.any():
            ax.plot([], [], color=colour, label=own and f"{own} (does not move)")
            continue
        order = range(1, len(singular) + 1)
        ax.plot(order, height(singular.double()).numpy(), marker="o", markersize=3, color=colour, label=own)
    ax.set_xlabel("number of directions")
    whole_numbers(ax)
    ax.legend(frameon=False, fontsize=8, ncols=2 if len(labels) > 4 else 1)
    return bare(ax)


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
    ax = axes_of(ax)
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
            plain(label), tuple(points[-1].tolist()), xytext=(0, 9), color=colour if index else "black", **style
        )
    ax.margins(0.14)
    ax.set_xlabel("along the first direction")
    ax.set_ylabel("along the second")
    of_paths = "path's" if len(flat.paths) == 1 else "paths'"
    ax.set_title(f"this plane holds {flat.explained:.0%} of the {of_paths} squared distances", fontsize=10)
    return bare(ax)


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
    ax = axes_of(ax)
    for position, row in enumerate(comparisons):
        heights = row.angles.tolist()
        ax.plot([position] * len(heights), heights, "o", markersize=5, color=CYCLE[1], alpha=0.75)
    ax.set_ylim(-3, 93)
    ax.set_yticks([0, 30, 60, 90])
    ax.set_ylabel("principal angles in degrees")
    return blocks_below(ax, [row.block for row in comparisons])


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
    ax = axes_of(ax)
    for (label, values), colour in zip(series.items(), CYCLE, strict=False):
        heights = np.array([np.nan if value is None else value for value in values])
        if not np.isnan(heights).all():
            ax.plot(np.arange(len(heights)), heights, marker="o", markersize=4, color=colour, label=label)
    ax.axhline(0, color="#888888", linestyle=":", linewidth=1)
    lowest = min(value for values in series.values() for value in values if value is not None)
    ax.set_ylim(min(-0.05, lowest - 0.05), 1.05)
    ax.set_ylabel("cosine, share of the squared norm")
    ax.legend(frameon=False, fontsize=8)
    return blocks_below(ax, [row.block for row in comparisons])
