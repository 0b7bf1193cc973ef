"""The training loss around the path of a recorded run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinyspan.analysis import Plane, Surface, surface_around
from tinyspan.errors import InputError
from tinyspan.model.subspace import SubspaceModel
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.hardware import default_device
from tinyspan.workflows.heads import undo_temperature
from tinyspan.workflows.models import base_model, result_of_run
from tinyspan.workflows.results import settings_of
from tinyspan.workflows.rows import Prepared
from tinyspan.workflows.run_rows import rows_of_run
from tinyspan.workflows.settings import Settings

if TYPE_CHECKING:
    from tinyspan.workflows.report.items import Item

__all__ = ["GRID", "ROWS", "RunSurface", "loss_around"]

ROWS = 32  # training rows whose loss is computed
GRID = (9, 7)  # grid values along the first and the second direction


Progress = Callable[[Sequence[float]], Iterable[float]]


@dataclass(frozen=True)
class RunSurface:
    """Computes the loss around the path of a run of `record`, with rows as its `result.json` says.

    Attributes:
        data: the rows, if they come from a file or folder that has moved, or that the run's result does not name.
        text: text columns of a language task, if they have other names.
        progress: wraps the iteration over the rows of the grid, for a progress bar.
    """

    data: Path | None = None
    text: Sequence[str] = ()
    progress: Progress = iter

    def __call__(self, item: "Item", flat: Plane) -> Surface:
        """Return the loss in a plane around the path of a run; see `loss_around`.

        Raises:
            InputError: the folder has no result or model, or the rows are not available.
        """
        _require_model(item.folder)
        prepared = rows_of_run(str(item.folder / "model"), item, self.data, self.text)
        return loss_around(item.folder, flat, prepared, settings_of(item), progress=self.progress)


def loss_around(
    folder: Path,
    flat: Plane,
    prepared: Prepared,
    settings: Settings,
    *,
    progress: Progress = iter,
) -> Surface:
    """Return the training loss around the path of a recorded run, in the plane of the path.

    The blocks move in the plane. All other parameters, such as embeddings and head, keep their values at the end of the
    run. The loss is that of 32 training rows, at 63 points, so it takes 63 forward passes.

    Args:
        folder: folder that `record` wrote, with the fine-tuned model in `model/`.
        flat: the plane of its path.
        prepared: rows of the run's task, tokenized for the model.
        settings: settings of the run, for the precision.
        progress: wraps the iteration over the rows of the grid, for a progress bar.

    Raises:
        InputError: the folder contains no model, or there are no training rows.
    """
    _require_model(folder)
    if not prepared.train:
        raise InputError("the loss around a path needs training rows; prepare the task with train=True")
    device = default_device()
    model = base_model(str(folder / "model"), prepared.task, settings.seed, need_head=True)
    Trajectory(folder).load_into(model, None)
    undo_temperature(model, result_of_run(str(folder / "model")))
    subspace = SubspaceModel(model, flat.basis).to(device).eval()
    batch = prepared.collate(_chosen_rows(prepared)).to(device)

    @torch.no_grad()
    def loss() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
            return float(prepared.task.loss_of(subspace, batch, prepared.labels))

    with prepared.task.training_units(subspace):
        return surface_around(flat, subspace, loss, GRID, progress=progress)


def _chosen_rows(prepared: Prepared) -> list[Any]:
    """Return the first training rows of a random order; the data may be sorted by label."""
    rows: Any = prepared.train
    return [rows[index] for index in prepared.random_order()[:ROWS]]


def _require_model(folder: Path) -> None:
    if not (folder / "model").is_dir():
        raise InputError(f"{folder} has no model/, so the loss around its path cannot be computed; `record` writes one")
