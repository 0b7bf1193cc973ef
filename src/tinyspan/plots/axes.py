"""What all pictures share: axes, colours, labels, and a matrix as a heat map."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyspan.extras import missing_extra

__all__ = [
    "COLOURS",
    "CYCLE",
    "MAX_NUMBERED",
    "Array",
    "Axes",
    "Result",
    "axes_of",
    "bare",
    "block_colour",
    "block_labels",
    "blocks_below",
    "heat_map",
    "plain",
    "whole_numbers",
]

Array = npt.NDArray[np.float64]
Axes = Any  # matplotlib.axes.Axes
Result = Mapping[str, Any]
COLOURS = {"full": "#3b3b3b", "intrinsic": "#d1495b", "random": "#3d7ea6", "freeze": "#8fb8ca", "given": "#7b5ea7"}
CYCLE = ("#d1495b", "#3d7ea6", "#edae49", "#66a182", "#7b5ea7", "#3b3b3b", "#8fb8ca", "#b56576")
MAX_NUMBERED = 400  # cells of a heat map with more have no numbers


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
    ax = axes_of(ax)
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
    rows, columns = list(map(plain, rows)), list(map(plain, columns))
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


def axes_of(ax: Axes | None) -> Axes:
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


def bare(ax: Axes) -> Axes:
    """Return an axis without its lines above and on the right."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def whole_numbers(ax: Axes) -> None:
    """Mark whole numbers alone on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def blocks_below(ax: Axes, names: Sequence[str]) -> Axes:
    """Write the names of blocks below an axis, and return it."""
    labels, thin = list(map(plain, block_labels(names))), max(1, len(names) // 40)
    long = sum(map(len, labels)) > 45
    ax.set_xticks(range(0, len(names), thin), labels[::thin], fontsize=8, rotation=90 if long else 0)
    ax.set_xlim(-0.5, len(names) - 0.5)
    return bare(ax)


def plain(text: str) -> str:
    r"""Return a text in which matplotlib finds no formula: between two `$` it would."""
    return text.replace("$", r"\$")


def _number(value: float, largest: float) -> str:
    return f"{value:.0f}" if largest >= 100 else f"{value:.1f}" if largest >= 2 else f"{value:.2f}"


def block_colour(index: int, count: int) -> Any:
    """Return the colour of a block, from dark for the first to light for the last."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * index / max(count - 1, 1))
