"""Pictures for notebooks: each function draws one picture on a matplotlib axis and returns the axis.

They take trajectories, bases, models in a basis, or results (the content of `result.json`). Without an axis they create
a figure with pyplot, which a notebook shows. They need the extra `lab`; matplotlib is imported when a picture is drawn.
"""

from tinyspan.plots.axes import block_labels, heat_map
from tinyspan.plots.directions import angles, cosines, explained_variance, path, plane, spectrum
from tinyspan.plots.losses import eigenvalues, loss_along, loss_in_plane, loss_on_line
from tinyspan.plots.results import (
    calibration,
    confusion_matrix,
    intervals,
    learning_curves,
    result_labels,
    scatter,
    scores,
)
from tinyspan.plots.updates import envelopes, outliers, update_norms

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
