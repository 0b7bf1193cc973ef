"""Figures: each function plots tables that are already computed, and returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.stats import norm

from tinyspan.errors import InputError
from tinyspan.io.storage import replacing
from tinyspan.lab.summary import Summary

__all__ = [
    "comparison",
    "curves",
    "dimension",
    "extremes",
    "heat",
    "path_in_plane",
    "reaching",
    "save",
    "spectrum",
    "updates",
    "wilson_interval",
]

Array = npt.NDArray[np.float64]

COLOURS = {"full": "#3b3b3b", "intrinsic": "#d1495b", "random": "#3d7ea6", "freeze": "#8fb8ca", "given": "#7b5ea7"}
STYLE = {"edgecolor": "none"}


def wilson_interval(score: float, rows: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share, measured on this number of rows.

    Raises:
        InputError: the score is not a share, for example a negative correlation.

    Example:
        >>> low, high = wilson_interval(0.5, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    if not 0 <= score <= 1 or rows < 1:
        raise InputError(f"expected a share between 0 and 1 of at least one row, got {score} of {rows}")
    z = float(norm.ppf(0.5 + level / 2))
    middle = (score + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * np.sqrt(score * (1 - score) / rows + z * z / (4 * rows * rows))
    return float(middle - half), float(middle + half)


def comparison(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the held-out accuracy with its 95 % interval, and the number of trained parameters, as bars per method."""
    figure, axes = _figure(8.2, 0.62 * len(results) + 1.2)
    for position, result in enumerate(reversed(results)):
        score, colour = result["score"], COLOURS[result["method"]]
        low, high = wilson_interval(score, result["rows"]["validation"])
        axes.barh(position, score, color=colour, height=0.62, **STYLE)
        axes.plot([low, high], [position, position], color="black", linewidth=1.4, solid_capstyle="butt")
        axes.text(max(high, score) + 0.012, position, f"{score:.3f}", va="center", fontweight="bold")
        axes.text(0.012, position, _parameter_label(result), va="center", color="white", fontsize=9)
    axes.set_yticks(range(len(results)), [result["method"] for result in reversed(results)])
    axes.axvline(0.5, color="white", linewidth=1, linestyle=":")  # chance
    axes.set_xlim(0, 1)
    axes.set_xlabel("held-out accuracy (lines: 95 % interval over the sentences; dots: chance)")
    return figure


def curves(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot held-out accuracy and training loss after every epoch."""
    figure = Figure(figsize=(8.2, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "score", "held-out accuracy"), (right, "train_loss", "training loss")):
        for result in results:
            history = result["history"]
            axes.plot(
                [row["epoch"] for row in history],
                [row[key] for row in history],
                marker="o",
                markersize=4,
                color=COLOURS[result["method"]],
                label=result["method"],
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.set_xticks(sorted({round(row["epoch"]) for result in results for row in result["history"]}))
        _bare(axes)
    left.legend(frameon=False, fontsize=9)
    return figure


def spectrum(values: Mapping[str, Array]) -> Figure:
    """Plot singular values of every layer's trajectory, relative to the first, and the explained share of variance.

    A layer that does not change has neither; it is listed in the legend only.
    """
    figure = Figure(figsize=(8.2, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, singular) in enumerate(values.items()):
        colour = _layer_colour(index, len(values))
        if not singular.any():
            left.plot([], [], color=colour, label=f"{name} (does not move)")
            continue
        order = np.arange(1, len(singular) + 1)
        left.semilogy(order, singular / singular[0], marker="o", markersize=3, color=colour, label=name)
        share = np.cumsum(singular**2) / np.sum(singular**2)
        right.plot(order, share, marker="o", markersize=3, color=colour)
    left.set_ylabel("singular value / the first")
    right.set_ylabel("share of variance explained")
    right.set_ylim(0, 1.03)
    for axes in (left, right):
        axes.set_xlabel("number of directions")
        _bare(axes)
    left.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def path_in_plane(path: Array, first: Array, second: Array, loss: Array, explained: float) -> Figure:
    """Plot the path in the plane of its first two principal directions, over the training loss in this plane.

    Points where the loss is NaN or infinite stay white.

    Raises:
        InputError: the loss is not finite at any point.
    """
    figure, axes = _figure(6.6, 4.6)
    loss = np.ma.masked_invalid(loss)
    if not loss.count():
        raise InputError("the loss around the path is NaN or infinite everywhere; was the run sound?")
    lowest, highest = loss.min(), np.quantile(loss.compressed(), 0.97)
    levels = np.linspace(lowest, highest if highest > lowest else lowest + 1.0, 18)
    filled = axes.contourf(first, second, loss, levels=levels, cmap="Blues_r", extend="max")
    figure.colorbar(filled, ax=axes, label="training loss", pad=0.02, format="%.2f")
    axes.plot(path[:, 0], path[:, 1], "-o", color=COLOURS["intrinsic"], markersize=4, linewidth=1.6)
    halo = [withStroke(linewidth=3, foreground="white")]
    for label, point in (("pre-trained", path[0]), ("fine-tuned", path[-1])):
        axes.annotate(
            label, point, xytext=(0, 9), textcoords="offset points", ha="center", fontweight="bold", path_effects=halo
        )
    axes.set_xlabel("along the first direction")
    axes.set_ylabel("along the second")
    axes.set_title(f"this plane holds {explained:.0%} of the path's squared distances", fontsize=10)
    return figure


def extremes(profiles: Mapping[str, Array], counts: Array, components: Sequence[str], expected: float) -> Figure:
    """Plot where the update V z is large: its envelope along every layer, and outliers by layer and component.

    Args:
        profiles: layer -> the largest |V z| of consecutive segments of equal length, in standard deviations.
        counts: share of each component's coordinates beyond 3 standard deviations, [components, layers].
        components: names of the components.
        expected: the share for a Gaussian vector.
    """
    layers = list(profiles)
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.15])
    ceiling = max(profile.max() for profile in profiles.values()) or 1.0
    _ridges(left, list(profiles.values()), ceiling, layers)
    left.set_title(f"largest |V z| along each layer\n(dots: 3 sigma, highest: {ceiling:.1f})", fontsize=9)

    ratio = counts / expected
    image = right.imshow(ratio, aspect="auto", cmap="Reds", norm=Normalize(0, max(2.0, float(np.nanmax(ratio)))))
    for row in range(ratio.shape[0]):
        for column in range(ratio.shape[1]):
            value = ratio[row, column]
            ink = "white" if value > 0.6 * image.norm.vmax else "black"
            right.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
    right.set_yticks(range(len(components)), components, fontsize=8)
    right.set_xticks(range(len(layers)), [layer.split()[-1] for layer in layers], fontsize=8)
    right.set_xlabel("layer")
    right.set_title("share of coordinates beyond 3 sigma,\nas a multiple of a Gaussian's 0.27 %", fontsize=9)
    return figure


def heat(
    grid: Array, rows: Sequence[str], columns: Sequence[str], label: str, of_rows: str = "", of_columns: str = ""
) -> Figure:
    """Plot a matrix as a heat map with its values; cells that are NaN stay white.

    Args:
        grid: (rows, columns).
        rows: names of the rows.
        columns: names of the columns.
        label: label of the colour bar.
        of_rows: label of the row axis.
        of_columns: label of the column axis.
    """
    figure = Figure(figsize=(1.9 + 0.75 * len(columns), 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bound = float(np.nanmax(np.abs(grid))) or 1.0
    image = axes.imshow(grid, aspect="auto", cmap="RdBu", norm=Normalize(-bound, bound))
    for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
        value = grid[row, column]
        ink = "white" if abs(value) > 0.6 * bound else "black"
        axes.text(column, row, f"{value:.1f}" if bound > 2 else f"{value:.2f}", ha="center", va="center", color=ink)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel(of_rows)
    axes.set_xlabel(of_columns)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def dimension(scores: Mapping[str, Sequence[tuple[int, Summary]]], full: Summary) -> Figure:
    """Plot the average score against the rank, for every kind of basis, with full fine-tuning as a line."""
    figure, axes = _figure(6.4, 3.6)
    for kind, summaries in scores.items():
        points = [(rank, score.mean, score.half or 0.0) for rank, score in summaries if score.mean is not None]
        if points:
            ranks, means, halves = zip(*points, strict=True)
            axes.errorbar(ranks, means, halves, marker="o", capsize=3, color=COLOURS[kind], label=kind)
    if full.mean is not None:
        axes.axhline(full.mean, color=COLOURS["full"], linestyle=":", label="full")
    axes.set_xscale("log", base=2)
    ticks = sorted({rank for summaries in scores.values() for rank, _ in summaries})
    axes.set_xticks(ticks, [str(rank) for rank in ticks])
    axes.set_xlabel("k, numbers per layer")
    axes.set_ylabel("average held-out score")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def reaching(curves: Mapping[str, Sequence[tuple[int, float]]], full: float, share: float) -> Figure:
    """Plot the score against the number of trained coordinates per family, with the share of full to reach."""
    figure, axes = _figure(6.8, 3.6)
    for colour, (name, tried) in zip(("#d1495b", "#3d7ea6", "#edae49", "#66a182"), curves.items(), strict=True):
        if tried:
            axes.plot(*zip(*tried, strict=True), marker="o", markersize=4, color=colour, label=name)
    axes.axhline(full, color=COLOURS["full"], label="full")
    axes.axhline(share * full, color=COLOURS["full"], linestyle=":", label=f"{100 * share:g} % of full")
    axes.set_xscale("log")
    axes.set_xlabel("numbers trained in z")
    axes.set_ylabel("held-out score")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def updates(profiles: Mapping[str, Sequence[Array]], ceiling: float = 12.0) -> Figure:
    """Plot the envelope of |update| along every layer in standard deviations, one column for each kind of update.

    Values above the ceiling are cut off, and labelled with their height.
    """
    figure = Figure(figsize=(2.6 * len(profiles) + 0.8, 5.2), layout="constrained")
    columns = figure.subplots(1, len(profiles), sharey=True, squeeze=False)[0]
    for axes, (name, layers) in zip(columns, profiles.items(), strict=True):
        cut = [np.minimum(profile, ceiling) for profile in layers]
        _ridges(axes, cut, ceiling, [f"layer {index + 1}" for index in range(len(layers))])
        for index, profile in enumerate(layers):
            base, furthest = len(layers) - 1 - index, profile.max()
            axes.text(1.02, base + 0.1, f"{furthest:.0f} sigma", fontsize=7, color="#666666")
        axes.set_title(name, fontsize=9)
    return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG and SVG, without dates and random ids, so that files are reproducible.

    Raises:
        StorageError: a file cannot be written.
    """
    with rc_context({"svg.hashsalt": "tinyspan"}):
        with replacing(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        with replacing(folder / f"{name}.svg") as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _parameter_label(result: Mapping[str, Any]) -> str:
    in_z, direct = result["subspace_parameters"], result["ordinary_parameters"]
    if result["method"] == "full":
        return f"all {direct:,} weights"
    return f"layers: {in_z:,} numbers in z" if in_z else "layers: nothing"


def _ridges(axes: Any, profiles: Sequence[Array], ceiling: float, names: Sequence[str]) -> None:
    """Plot one envelope above the other, the first on top, with a dotted line at 3 standard deviations."""
    for index, profile in enumerate(profiles):
        base = len(profiles) - 1 - index
        heights = base + 0.9 * profile / ceiling
        colour = _layer_colour(index, len(profiles))
        axes.fill_between(np.linspace(0, 1, len(profile)), base, heights, color=colour, lw=0)
        axes.plot([0, 1], [base + 0.9 * 3 / ceiling] * 2, color="black", lw=0.6, ls=":")
    axes.set_yticks(np.arange(len(profiles)) + 0.4, list(reversed(names)))
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_xticks([0, 1], ["first weight", "last weight"])
    _bare(axes)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _bare(axes)
    return figure, axes


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _layer_colour(index: int, count: int) -> Any:
    return colormaps["viridis"](0.85 * index / max(count - 1, 1))
