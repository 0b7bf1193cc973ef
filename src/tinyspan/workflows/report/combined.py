"""Sections of a page about a combination of models: the table, the coefficients, and the loss between two models."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from tinyspan import plots
from tinyspan.plots.axes import Axes
from tinyspan.workflows.combine.table import candidate_rows
from tinyspan.workflows.report.parts import picture, pictures_part, table_part, text_part

__all__ = ["combined_parts"]

Result = Mapping[str, Any]


def combined_parts(name: str, result: Result) -> Iterator[dict[str, Any]]:
    """Yield the parts of a page about one combination."""
    yield {"kind": "heading", "text": name}
    header, rows = candidate_rows(result)
    yield table_part(header, rows)
    yield text_part(
        "Scores are of the held-out rows; `chosen on` is the mean on the rows on which the candidates were compared. "
        "Passes are forward passes over one row that were spent on learning, where a backward pass counts as two. The "
        "last column is the difference to the best single model with its 95 % interval, from the same resampled rows. "
        "Marked are the simplest candidate whose difference to the best one is within noise on the rows to choose on, "
        "which was chosen, and the best single model there, with those that have the same score. "
        "Few of these rows make every difference noise, also one that the held-out rows show; more can be set aside.",
        soft=True,
    )
    pictures = [_table_picture(name, result)]
    shown = [entry for entry in result["candidates"] if entry["learned"] and "coefficients" in entry]
    chosen = next(entry for entry in result["candidates"] if entry["name"] == result["chosen"])
    if "coefficients" in chosen and chosen not in shown:
        shown.append(chosen)
    pictures += [_coefficients_picture(result, entry) for entry in shown]
    if result["geometry"]:
        pictures += list(_geometry_pictures(result["geometry"]))
    yield pictures_part(pictures)


def _table_picture(name: str, result: Result) -> dict[str, Any]:
    """Return the differences to the best single model with their intervals."""
    entries = [
        entry for entry in result["candidates"] if None not in entry["test"].get("difference_to_best_single", [None])
    ]

    def draw(ax: Axes | None = None) -> Axes:
        return plots.intervals(
            [entry["name"] for entry in entries],
            [entry["test"]["difference_to_best_single"] for entry in entries],
            ax,
            marked=result["chosen"],
        )

    return picture(
        draw,
        f"Differences of the candidates of {name} to the best single model, with 95 % intervals; chosen: "
        f"{result['chosen']}",
        "Held-out score against the best single model, with 95 % intervals; the chosen candidate is dark.",
        height=1.2 + 0.22 * len(entries),
        wide=len(entries) > 20,
    )


def _coefficients_picture(result: Result, entry: Result) -> dict[str, Any]:
    grid = np.array(entry["coefficients"])
    rows = plots.block_labels(result["blocks"])
    columns = [model["name"] for model in result["models"]]
    largest = float(np.abs(grid).max())
    return picture(
        partial(plots.heat_map, grid, rows, columns, cmap="RdBu_r"),
        f"Coefficients of {entry['name']} by block and model, from {grid.min():.2f} to {grid.max():.2f}",
        f"{entry['name']}: the coefficient of each model in each block; blue is negative, and the darkest red is "
        f"{largest:.2f}.",
        height=1.4 + 0.3 * len(rows),
        wide=len(columns) > 12,
    )


def _geometry_pictures(geometry: Result) -> Iterator[dict[str, Any]]:
    """Yield the loss on the line and in the plane between two models."""
    first, second = geometry["models"]
    line, flat = geometry["line"], geometry["plane"]
    on_it = np.array(line["losses"], dtype=float)  # NaN where the loss was not finite
    in_it = np.array(flat["losses"], dtype=float)

    def on_line(ax: Axes | None = None) -> Axes:
        return plots.loss_on_line(line["positions"], on_it.tolist(), (first, second), ax)

    ends = on_it[line["positions"].index(0.0)], on_it[line["positions"].index(1.0)]
    yield picture(
        on_line,
        f"Loss on the line from {first} ({ends[0]:.3f}) to {second} ({ends[1]:.3f}); lowest {np.nanmin(on_it):.3f}",
        f"Loss on the rows to learn from, on the line from {first} (0) to {second} (1).",
    )

    def in_plane(ax: Axes | None = None) -> Axes:
        return plots.loss_in_plane(flat["coefficients"], np.ma.masked_invalid(in_it), (first, second), ax)

    yield picture(
        in_plane,
        f"Loss in the plane of {first} and {second}, from {np.nanmin(in_it):.3f} to {np.nanmax(in_it):.3f}",
        f"The same loss at theta_0 plus a multiple of {first} (across) and one of {second} (up).",
        height=3.6,
    )
