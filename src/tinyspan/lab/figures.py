"""Figures of a study: functions that plot computed tables and return a matplotlib figure; `picture` saves it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure

from tinyspan import plots
from tinyspan.io.storage import replacing
from tinyspan.lab.cells import Results
from tinyspan.lab.summary import Summary
from tinyspan.plots.axes import COLOURS, CYCLE

__all__ = ["dimension", "heat", "picture", "reaching", "save", "updates"]

Array = npt.NDArray[np.float64]


def heat(
    grid: Array, rows: Sequence[str], columns: Sequence[str], label: str, of_rows: str = "", of_columns: str = ""
) -> Figure:
    """Plot a matrix as a heat map with its values and a colour bar; cells that are NaN stay white.

    Args:
        grid: (rows, columns).
        rows: names of the rows.
        columns: names of the columns.
        label: label of the colour bar.
        of_rows: label of the row axis.
        of_columns: label of the column axis.
    """
    figure = Figure(figsize=(1.9 + 0.75 * len(columns), 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = plots.heat_map(grid, rows, columns, figure.subplots(), cmap="RdBu")
    axes.set_ylabel(of_rows)
    axes.set_xlabel(of_columns)
    figure.colorbar(axes.images[0], ax=axes, label=label)
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
    for colour, (name, tried) in zip(CYCLE, curves.items(), strict=False):
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
        named = {f"layer {index + 1}": profile for index, profile in enumerate(layers)}
        plots.envelopes(named, axes, ceiling=ceiling)
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


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def picture(results: Results, name: str, figure: Figure, alternative: str) -> str:
    """Save a figure next to the page, and return the line that shows it."""
    save(figure, results.folder / "figures", name)
    return f"![{alternative}](figures/{quote(name)}.png)"
