"""The training loss around the path of a recorded run."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tinyspan.analysis import Plane, Surface, surface_around
from tinyspan.errors import InputError
from tinyspan.model.subspace import SubspaceModel
from tinyspan.trajectories.trajectory import Trajectory
from tinyspan.workflows.hardware import default_device
from tinyspan.workflows.models import base_model
from tinyspan.workflows.training import Prepared, Settings

__all__ = ["GRID", "ROWS", "loss_around"]

ROWS = 32  # training rows whose loss is computed
GRID = (9, 7)  # grid values along the first and the second direction


def loss_around(
    folder: Path,
    flat: Plane,
    prepared: Prepared,
    settings: Settings,
    *,
    progress: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> Surface:
    """Return the training loss around the path of a recorded run, in the plane of the path.

    The blocks move in the plane. All other parameters, such as embeddings and head, keep their values at the end of the
    run. The loss is that of the first 32 training rows, at 63 points, so it takes 63 forward passes.

    Args:
        folder: folder that `record` wrote, with the fine-tuned model in `model/`.
        flat: the plane of its path.
        prepared: rows of the run's task, tokenized for the model.
        settings: settings of the run, for the precision.
        progress: wraps the iteration over the rows of the grid, for a progress bar.

    Raises:
        InputError: the folder contains no model, or there are no training rows.
    """
    if not (folder / "model").is_dir():
        raise InputError(f"{folder} has no model/, so the loss around its path cannot be computed; `record` writes one")
    if not prepared.train:
        raise InputError("the loss around a path needs training rows; prepare the task with train=True")
    device = default_device()
    model = base_model(str(folder / "model"), prepared.task, settings.seed, need_head=True)
    Trajectory(folder).load_into(model, None)
    subspace = SubspaceModel(model, flat.basis).to(device).eval()
    rows = [prepared.train[index] for index in range(min(ROWS, len(prepared.train)))]
    batch = prepared.collate(rows).to(device)

    @torch.no_grad()
    def loss() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
            return float(prepared.task.loss_of(subspace, batch))

    return surface_around(flat, subspace, loss, GRID, progress=progress)
