"""Pictures of updates: their length in each parameter, and their outliers."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from tinyspan import analysis
from tinyspan.analysis import GAUSSIAN_SHARE, Moved
from tinyspan.errors import InputError
from tinyspan.partition import Block
from tinyspan.plots.axes import Array, Axes, axes_of, bare, block_colour, block_labels, heat_map, plain

__all__ = ["envelopes", "outliers", "update_norms"]


def update_norms(moved: Moved, ax: Axes | None = None) -> Axes:
    """Draw how far the weights of every component moved, block by block, as a multiple of the average weight.

    A cell is the root mean square of the update of one parameter, divided by that of all blocks together. Cells of the
    average are white, and those of twice the average or more have the darkest red.

    Args:
        moved: a trajectory, a `SubspaceModel`, or the opened folder of an adapter.
        ax: axis to draw on.

    Raises:
        InputError: there is no update, or it is zero, NaN or infinite.

    Example:
        >>> import torch
        >>> from tinyspan import Basis, SubspaceModel, by_pattern
        >>> model = torch.nn.Linear(1, 1)
        >>> partition = by_pattern(model, {"all": ".*"})
        >>> subspace = SubspaceModel(model, Basis.from_directions(partition, {"all": torch.tensor([[4.0, 3.0]])}))
        >>> subspace.set_state({"all": torch.tensor([5.0])})
        >>> [text.get_text() for text in update_norms(subspace).texts]  # 4 and 3, where the root mean square is 3.54
        ['1.1', '0.8']
    """
    rows = analysis.component_norms(moved)
    total, count = sum(row.norm**2 for row in rows), sum(row.numel for row in rows)
    if not 0 < total < math.inf:
        raise InputError(f"the update is {'NaN or infinite' if total else 'zero'}, so it sits nowhere")
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
        >>> from tinyspan import Basis, SubspaceModel, by_pattern
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
    ax = axes_of(ax)
    highest = max(float(profile.max()) for profile in profiles) or 1.0
    height = max(highest, 3.0) if ceiling is None else ceiling  # below, the line of 3 would lie in the next block
    for index, profile in enumerate(profiles):
        base = len(profiles) - 1 - index
        heights = base + 0.9 * np.minimum(profile, height) / height
        colour = block_colour(index, len(profiles))
        ax.fill_between(np.linspace(0, 1, len(profile)), base, heights, color=colour, lw=0)
        ax.plot([0, 1], [base + 0.9 * 3 / height] * 2, color="black", lw=0.6, ls=":")
        if ceiling is not None:
            ax.text(1.02, base + 0.1, f"{profile.max():.0f} sigma", fontsize=7, color="#666666")
    ax.set_yticks(np.arange(len(profiles)) + 0.4, [plain(name) for name in reversed(names)], fontsize=8)
    ax.tick_params(left=False)
    ax.spines["left"].set_visible(False)
    ax.set_xticks([0, 1], ["first weight", "last weight"])
    if ceiling is None:
        ax.set_title(f"largest |update| along each block\n(dots: 3 sigma, highest: {highest:.1f})", fontsize=9)
    return bare(ax)


def _components(cells: Mapping[tuple[str, str], float], ax: Axes | None, **colours: Any) -> Axes:
    """Draw a value per block and component as a heat map; blocks are columns."""
    blocks = list(dict.fromkeys(block for block, _ in cells))
    components = list(dict.fromkeys(name for _, name in cells))
    grid = np.array([[cells.get((block, name), np.nan) for block in blocks] for name in components])
    return heat_map(grid, components, block_labels(blocks), ax, **colours)
