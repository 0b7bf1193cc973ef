"""The plane in which runs move most, and the loss on it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyspan.analysis.directions import explained_variance
from tinyspan.bases.basis import Basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.errors import InputError
from tinyspan.maps.dense import DenseMap
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Block
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["Plane", "Surface", "coordinates", "loss_surface", "plane", "surface_around"]


@dataclass(frozen=True)
class Plane:
    """A plane through theta_0, and the paths of one or several runs in it.

    Attributes:
        basis: basis of rank 2 with one block.
        paths: coordinates of theta_0 .. theta_t in the plane for each run, [t + 1, 2]; theta_0 is the origin, and the
            coordinates of the end of the first run are not negative.
        explained: share of the squared distances of all points from theta_0 that the plane explains.
    """

    basis: Basis
    paths: tuple[Tensor, ...]
    explained: float


def plane(*trajectories: Trajectory) -> Plane:
    """Return the plane in which a trajectory moves most, or several trajectories from the same theta_0.

    It is spanned by the two leading right singular vectors of theta_i - theta_0 over all points and blocks.

    Raises:
        InputError: there are fewer than two points, or all points lie on one straight line through theta_0.
        MismatchError: the trajectories have different parameters or start from different weights.

    Example:
        >>> import tempfile
        >>> from tinyspan import TrajectoryRecorder, by_pattern
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), tempfile.mkdtemp())
        >>> for step, move in enumerate(([3.0, 0.0, 0.0], [0.0, 1.0, 0.0])):
        ...     with torch.no_grad():
        ...         _ = model.weight.add_(torch.tensor([move]))
        ...     recorder.record(step)
        >>> flat = plane(recorder.trajectory())
        >>> [round(float(length), 4) for length in flat.paths[0].norm(dim=1)], round(flat.explained, 4)
        ([0.0, 3.0, 3.1623], 1.0)
    """
    names = ", ".join(str(trajectory.folder) for trajectory in trajectories)
    if (count := sum(map(len, trajectories))) < 2:
        raise InputError(f"a plane needs at least 2 points, {names or 'no trajectory'} has {count}")
    whole = [trajectory.with_partition(trajectory.partition.as_one_block()) for trajectory in trajectories]
    basis = svd_basis(whole, rank=2)
    (block,) = basis.partition
    if basis.rank < 2:
        raise InputError(f"the path in {names} is straight, so it spans no plane")
    v = DenseMap(basis.maps[block.name].dense())
    paths = [coordinates(trajectory, block, v) for trajectory in whole]
    signs = torch.where(paths[0][-1] < 0, -1.0, 1.0)
    basis.maps = {block.name: DenseMap(v.directions.mul_(signs[:, None]))}
    explained = float(explained_variance(basis.spectrum[block.name])[1])
    return Plane(basis, tuple(path * signs for path in paths), explained)


def coordinates(trajectory: Trajectory, block: Block, v: DenseMap) -> Tensor:
    """Return z_i = V^T (theta_i - theta_0) of theta_0 and all points of a block, [t + 1, k].

    For orthonormal directions, theta_0 + V z_i is the closest point to theta_i in their span.

    Args:
        trajectory: the points.
        block: a block of the trajectory's partition.
        v: directions of the block.

    Raises:
        StorageError: a file is damaged.

    Example:
        >>> import tempfile
        >>> from tinyspan import TrajectoryRecorder, by_pattern
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), tempfile.mkdtemp())
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(torch.tensor([[3.0, 4.0]]))
        >>> recorder.record(step=0)
        >>> run = recorder.trajectory()
        >>> coordinates(run, run.partition["all"], DenseMap(torch.tensor([[0.0, 1.0]]))).round(decimals=4)
        tensor([[0.],
                [4.]])
    """
    path, position = torch.zeros(len(trajectory) + 1, v.rank), 0
    for _, deltas in trajectory.chunks(block):
        narrowed = v.rows(position, position + deltas.shape[1])
        if len(deltas):
            path[1:] += torch.stack([narrowed.rmatvec(delta.float()) for delta in deltas])
        position += deltas.shape[1]
    return path


def loss_surface(
    subspace: SubspaceModel,
    loss: Callable[[], float],
    first: Sequence[float],
    second: Sequence[float],
    *,
    progress: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> Tensor:
    """Evaluate a loss on a grid of the two coordinates of a rank-2, one-block `SubspaceModel`.

    Args:
        subspace: model in the basis of the plane; its z is restored afterwards.
        loss: returns the loss of the model at the current z.
        first: grid values of the first coordinate, [n1].
        second: grid values of the second coordinate, [n2].
        progress: wraps the iteration over `second`, for a progress bar.

    Returns:
        Losses [n2, n1]; rows correspond to the second coordinate, as contour plots expect.
    """
    (block,), (z,) = subspace.basis.partition, subspace.z
    before = z.detach().clone()
    values = torch.empty(len(second), len(first), dtype=torch.float64)
    try:
        for row, y in enumerate(progress(second)):
            for column, x in enumerate(first):
                subspace.set_state({block.name: torch.tensor([x, y])})
                values[row, column] = loss()
    finally:
        subspace.set_state({block.name: before})
    return values


@dataclass(frozen=True)
class Surface:
    """Losses on a grid of a plane.

    Attributes:
        first: grid values of the first coordinate, [n1].
        second: grid values of the second coordinate, [n2].
        loss: losses [n2, n1], in float64.
    """

    first: Tensor
    second: Tensor
    loss: Tensor


def surface_around(
    plane: Plane,
    subspace: SubspaceModel,
    loss: Callable[[], float],
    shape: tuple[int, int] = (9, 7),
    *,
    progress: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> Surface:
    """Evaluate a loss around the paths in a plane; the grid exceeds them by 30 % on every side.

    Args:
        plane: the plane with the paths.
        subspace: model in the basis of the plane; see `loss_surface`.
        loss: returns the loss of the model at the current z.
        shape: numbers of grid values of the first and the second coordinate.
        progress: wraps the iteration over the values of the second coordinate, for a progress bar.
    """
    points = torch.cat(plane.paths).double()
    low, high = points.min(0).values, points.max(0).values
    margin = 0.3 * (high - low)
    first, second = (
        torch.linspace(float(a), float(b), count, dtype=torch.float64)
        for a, b, count in zip(low - margin, high + margin, shape, strict=True)
    )
    values = loss_surface(subspace, loss, first.tolist(), second.tolist(), progress=progress)
    return Surface(first, second, values)
