"""Analysis of directions: pure functions of trajectories, bases and update vectors."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from tinyspan.bases.basis import Basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.linalg import orthonormalize
from tinyspan.maps.dense import DenseMap
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Block, Partition
from tinyspan.trajectories.trajectory import Trajectory

__all__ = [
    "GAUSSIAN_SHARE",
    "Comparison",
    "ComponentNorm",
    "Moved",
    "Outliers",
    "Plane",
    "Share",
    "Surface",
    "compare",
    "component",
    "component_norms",
    "coordinates",
    "envelope",
    "explained_variance",
    "loss_surface",
    "outliers",
    "plane",
    "principal_angles",
    "score_interval",
    "span_share",
    "spectra",
    "standardized",
    "surface_around",
    "updates",
    "wilson_interval",
]

GAUSSIAN_SHARE = 0.0026998  # P(|x| > 3 sigma) of a normal distribution
Moved = Trajectory | SubspaceModel | OpenedAdapter
"""A recorded run, a model in a basis, or an adapter on disk, each of which has an update theta - theta_0."""


def explained_variance(spectrum: Tensor) -> Tensor:
    """Return the share of the sum of squares that the first 1, 2, ..., t singular values explain.

    If all singular values are zero, every share is 1.

    Example:
        >>> explained_variance(torch.tensor([2.0, 1.0, 1.0]))
        tensor([0.6667, 0.8333, 1.0000])
    """
    squares = spectrum.square()
    return squares.cumsum(0) / squares.sum() if squares.any() else torch.ones_like(spectrum)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the principal angles between two subspaces, ascending, in radians, as float64.

    Cosines are the singular values of A B^T. Where a cosine is above 1/sqrt(2), the angle is computed from the sine
    instead, a singular value of B - B A^T A, because arccos loses half the digits near 1 (Bjorck and Golub 1973).

    Args:
        first: orthonormal directions A [k1, D], as `Basis.maps[block].dense()` returns them.
        second: orthonormal directions B [k2, D].

    Raises:
        MismatchError: the vectors have different lengths.
        InputError: a direction is NaN or infinite.

    Example:
        >>> a, b = torch.eye(3)[:2], torch.eye(3)[1:]
        >>> principal_angles(a, b).rad2deg()
        tensor([ 0., 90.], dtype=torch.float64)
    """
    if first.shape[1] != second.shape[1]:
        raise MismatchError(f"directions of length {first.shape[1]} and {second.shape[1]} have no angles between them")
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise InputError("directions that are NaN or infinite have no angles between them")
    if first.shape[0] < second.shape[0]:
        first, second = second, first
    a, b = first.double(), second.double()
    overlap = b @ a.T
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(b - overlap @ a).flip(0).clamp(max=1.0)
    return torch.where(cosines.square() > 0.5, sines.arcsin(), cosines.arccos())


@dataclass(frozen=True)
class Share:
    """Share of the squared norm of a vector that lies in the span of a basis.

    Attributes:
        value: over all blocks, `sum_b |V_b^T g_b|^2 / sum_b |g_b|^2`.
        random: expected share for the same number of random directions, `sum_b (k_b / D_b) |g_b|^2 / sum_b |g_b|^2`.
        by_block: block name -> `|V_b^T g_b|^2 / |g_b|^2`, and 0 where g_b is zero.
    """

    value: float
    random: float
    by_block: dict[str, float]


def span_share(basis: Basis, vector: Mapping[str, Tensor], ranks: Mapping[str, int] | None = None) -> Share:
    """Return the share of `|g|^2` in the span of each block's first k_b directions, per block and in total.

    Directions are assumed to be orthonormal, which holds to about 1 % in bfloat16 and int8. The expected share of a
    random subspace of k of D dimensions is k / D for any vector.

    Args:
        basis: the basis with V_b of every block.
        vector: block name -> g_b [D_b], such as a gradient.
        ranks: block name -> k_b; all directions by default.

    Raises:
        InputError: g is zero, NaN or infinite, or the columns of the basis are not orthonormal, as for Fastfood.

    Example:
        >>> from tinyspan import Basis, by_pattern
        >>> partition = by_pattern(torch.nn.Linear(4, 1, bias=False), {"all": ".*"})
        >>> basis = Basis.from_directions(partition, {"all": torch.eye(2, 4)})
        >>> span_share(basis, {"all": torch.tensor([3.0, 0.0, 0.0, 4.0])})
        Share(value=0.36, random=0.5, by_block={'all': 0.36})
    """
    squares: dict[str, tuple[float, float, float]] = {}  # in the span, expected for random directions, total
    for block in basis.partition:
        v = basis.maps[block.name]
        if v.is_orthonormal is False:
            raise InputError(f"the columns of a {v.kind} basis are not orthonormal, so it has no share of a vector")
        g = vector[block.name].to(next(iter(v.tensors().values())).device)
        rank, total = v.rank if ranks is None else ranks[block.name], float(g.double().square().sum())
        inside = float(v.rmatvec(g)[:rank].double().square().sum())
        squares[block.name] = inside, total * rank / block.numel, total
    inside, expected, total = (sum(parts) for parts in zip(*squares.values(), strict=True))
    if not 0 < total < math.inf:
        raise InputError(f"expected a vector other than zero, of finite numbers; its squares sum to {total}")
    by_block = {name: part / whole if whole else 0.0 for name, (part, _, whole) in squares.items()}
    return Share(inside / total, expected / total, by_block)


def standardized(vector: Tensor) -> Tensor:
    """Return (x - mean(x)) / std(x) in float64, [D]; zeros if all coordinates are equal.

    Raises:
        InputError: a coordinate is NaN or infinite.
    """
    centred = vector.double() - vector.double().mean()
    deviation = centred.square().mean().sqrt()
    if not torch.isfinite(deviation):
        raise InputError(f"a vector of {len(vector)} numbers has no standard deviation: some are NaN or infinite")
    return centred / deviation if deviation > 0 else torch.zeros_like(centred)


@dataclass(frozen=True)
class Outliers:
    """Coordinates of a vector that are more than a number of standard deviations from its mean.

    Attributes:
        count: number of outliers.
        share: share of outliers among all coordinates; `GAUSSIAN_SHARE` for a Gaussian vector at 3 sigma.
        kurtosis: fourth moment over the squared second moment; 3 for a Gaussian, 0 if all coordinates are equal.
        by_parameter: parameter name -> number of outliers among its coordinates.
        largest: the most distant coordinates, as (parameter, index in it, distance in standard deviations).
        indices: positions of all outliers in the block's vector, ascending.
    """

    count: int
    share: float
    kurtosis: float
    by_parameter: dict[str, int]
    largest: list[tuple[str, int, float]]
    indices: Tensor


def outliers(vector: Tensor, block: Block, *, sigmas: float = 3.0, largest: int = 10) -> Outliers:
    """Find the outlier dimensions of an update V z by the rule of Zhang et al. (2023), section 4.5.

    A coordinate is an outlier if `|x - mean(x)| > sigmas * std(x)`, with mean and standard deviation over the block.

    Args:
        vector: update of one block, [D_b].
        block: the block with its parameters, such as `basis.partition["layers.0"]`; a name alone is not enough.
        sigmas: threshold in standard deviations.
        largest: number of coordinates in `Outliers.largest`.

    Raises:
        InputError: a coordinate is NaN or infinite, or `block` is no block.

    Example:
        >>> from tinyspan import by_pattern
        >>> block = by_pattern(torch.nn.Linear(20, 1), {"all": ".*"})["all"]
        >>> vector = torch.zeros(21)
        >>> vector[20] = 1.0
        >>> outliers(vector, block).by_parameter
        {'weight': 0, 'bias': 1}
    """
    if not isinstance(block, Block):
        raise InputError(f"expected a Block, got {block!r:.100}; a partition has its blocks by name: partition[name]")
    distance = standardized(vector)
    if not distance.any():
        return Outliers(0, 0.0, 0.0, {spec.name: 0 for spec in block.parameters}, [], torch.zeros(0, dtype=torch.long))
    outside = distance.abs() > sigmas
    order = distance.abs().topk(min(largest, len(vector))).indices.tolist()
    return Outliers(
        count=int(outside.sum()),
        share=float(outside.double().mean()),
        kurtosis=float(distance.pow(4).mean()),
        by_parameter={spec.name: int(outside[a:b].sum()) for spec, a, b in block.spans()},
        largest=[(*_locate(block, position), float(distance[position])) for position in order],
        indices=outside.nonzero().squeeze(1),
    )


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
    whole = [trajectory.with_partition(trajectory.recorded.as_one_block()) for trajectory in trajectories]
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
    subspace: SubspaceModel, loss: Callable[[], float], first: Sequence[float], second: Sequence[float]
) -> Tensor:
    """Evaluate a loss on a grid of the two coordinates of a rank-2, one-block `SubspaceModel`.

    Args:
        subspace: model in the basis of the plane; its z is restored afterwards.
        loss: returns the loss of the model at the current z.
        first: grid values of the first coordinate, [n1].
        second: grid values of the second coordinate, [n2].

    Returns:
        Losses [n2, n1]; rows correspond to the second coordinate, as contour plots expect.
    """
    (block,), (z,) = subspace.basis.partition, subspace.z
    before = z.detach().clone()
    values = torch.empty(len(second), len(first), dtype=torch.float64)
    for row, y in enumerate(second):
        for column, x in enumerate(first):
            subspace.set_state({block.name: torch.tensor([x, y])})
            values[row, column] = loss()
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
    values = loss_surface(subspace, loss, first.tolist(), list(progress(second.tolist())))
    return Surface(first, second, values)


def updates(moved: Moved) -> Iterator[tuple[Block, Tensor]]:
    """Yield every block with its update, theta - theta_0 [D_b] at the end of the run, or V mean_i z_i.

    Args:
        moved: a trajectory, a `SubspaceModel`, or the opened folder of an adapter.

    Raises:
        InputError: the trajectory has no points, the basis of the adapter has moved, or the adapter has layer scales.
        StorageError: a file is damaged.
    """
    if isinstance(moved, Trajectory):
        if not len(moved):
            raise InputError(f"{moved.folder} has no points, so it has no update")
        yield from ((block, moved.delta(block)) for block in moved.partition)
    elif isinstance(moved, SubspaceModel):
        delta = moved.delta()
        yield from ((block, block.flatten(delta)) for block in moved.basis.partition)
    else:
        if "layer_scales" in moved.manifest.construction:
            raise InputError(f"{moved} has layer scales; open it with SubspaceModel.from_pretrained")
        basis = moved.basis()
        moved.require_z(basis.ranks)
        z = moved.read(()).z
        for block in basis.partition:
            v = basis.maps[block.name]
            yield block, v.matvec(z[block.name].mean(0)) if v.rank else torch.zeros(block.numel)


@dataclass(frozen=True)
class Comparison:
    """The directions and updates of two runs in one block.

    Let A [k_a, D] and B [k_b, D] be the orthonormal directions of the two, and a and b [D] their updates.

    Attributes:
        block: name of the block.
        angles: principal angles between the spans of A and B in degrees, ascending, [min(k_a, k_b)].
        cosine: `a . b / (|a| |b|)`; None if an update is zero or not given.
        shares: `|B a|^2 / |a|^2` and `|A b|^2 / |b|^2`, the share of each update in the span of the other's
            directions; None if the update is zero or not given.
        chance: k_b / D and k_a / D, the expected shares for random directions.
        norms: `|a|` and `|b|`; None if not given.
    """

    block: str
    angles: Tensor
    cosine: float | None
    shares: tuple[float | None, float | None]
    chance: tuple[float, float]
    norms: tuple[float | None, float | None]


def compare(a: Moved | Basis, b: Moved | Basis, rank: int | None = None) -> list[Comparison]:
    """Compare the directions and the updates of two runs, bases or adapters block by block; see `Comparison`.

    The directions of a trajectory are the right singular vectors of theta_i - theta_0, as of `svd_basis`; those below
    1e-6 of the largest are left out. The directions of a basis or an adapter are the columns of V, orthonormalised. A
    basis alone has no update. One block is in memory at a time, in float64.

    Args:
        a: a trajectory, basis, `SubspaceModel` or opened adapter.
        b: likewise, with the same blocks.
        rank: use the first k directions of each; all by default.

    Raises:
        InputError: `rank` is below 1, or an input has no update; see `updates`.
        MismatchError: the blocks differ, or the two start from different weights theta_0.
        StorageError: a file is damaged.

    Example:
        >>> from tinyspan import by_pattern
        >>> partition = by_pattern(torch.nn.Linear(3, 1, bias=False), {"all": ".*"})
        >>> a = Basis.from_directions(partition, {"all": torch.tensor([[1.0, 0.0, 0.0]])})
        >>> b = Basis.from_directions(partition, {"all": torch.tensor([[1.0, 1.0, 0.0]])})
        >>> [row.angles.round(decimals=4).tolist() for row in compare(a, b)]
        [[45.0]]
    """
    if rank is not None and rank < 1:
        raise InputError(f"expected a rank of at least 1, got {rank}")
    _require_comparable(a, b)
    in_a, in_b = _spanned(a), _spanned(b)
    rows = []
    for (block, of_a), (_, of_b) in zip(_updates_if_any(a), _updates_if_any(b), strict=True):
        first, second = _directions(in_a, block, rank), _directions(in_b, block, rank)
        one, other = (None if vector is None else vector.double() for vector in (of_a, of_b))
        norms = tuple(None if vector is None else float(vector.norm()) for vector in (one, other))
        cosine = None
        if one is not None and other is not None and norms[0] and norms[1]:
            cosine = float(one @ other) / (norms[0] * norms[1])
        shares = tuple(
            float((v @ vector).square().sum()) / norm**2 if vector is not None and norm else None
            for v, vector, norm in ((second, one, norms[0]), (first, other, norms[1]))
        )
        chance = len(second) / block.numel, len(first) / block.numel
        angles = principal_angles(first, second).rad2deg()
        rows.append(Comparison(block.name, angles, cosine, shares, chance, norms))  # type: ignore[arg-type]
    return rows


def _partition(source: Moved | Basis) -> Partition:
    return source.basis.partition if isinstance(source, SubspaceModel) else source.partition


def _fingerprint(source: Moved | Basis) -> Mapping[str, str]:
    """Return block -> fingerprint of theta_0; empty if the source fits every model."""
    if isinstance(source, Trajectory):
        return source.fingerprint()
    if isinstance(source, OpenedAdapter):
        return source.manifest.fingerprint
    return source.basis.fingerprint if isinstance(source, SubspaceModel) else source.fingerprint


def _require_comparable(a: Moved | Basis, b: Moved | Basis) -> None:
    """Check that two sources have the same blocks, of the same theta_0 if both know it.

    Raises:
        MismatchError: the blocks or the weights differ; the message names the first difference.
    """
    for ours, theirs in zip_longest(_partition(a), _partition(b)):
        names = ["no block" if block is None else block.name for block in (ours, theirs)]
        if names[0] != names[1]:
            raise MismatchError(f"the two cannot be compared: one has {names[0]} where the other has {names[1]}")
        if [(p.name, p.shape) for p in ours.parameters] != [(p.name, p.shape) for p in theirs.parameters]:
            raise MismatchError(f"the two cannot be compared: block {names[0]!r} has other parameters in each")
    of_a, of_b = _fingerprint(a), _fingerprint(b)
    blocks = [block.name for block in _partition(a) if block.name in of_a and block.name in of_b]
    if different := [block for block in blocks if of_a[block] != of_b[block]]:
        raise MismatchError(
            f"the two cannot be compared: they start from different weights theta_0, first in block {different[0]!r}"
        )


def _updates_if_any(source: Moved | Basis) -> Iterator[tuple[Block, Tensor | None]]:
    return ((block, None) for block in source.partition) if isinstance(source, Basis) else updates(source)


def _spanned(source: Moved | Basis) -> Trajectory | Basis:
    """Return what the directions of a source come from."""
    if isinstance(source, OpenedAdapter):
        return source.basis()
    return source.basis if isinstance(source, SubspaceModel) else source


def _directions(source: Trajectory | Basis, block: Block, rank: int | None) -> Tensor:
    """Return the first k orthonormal directions of a block, [k, D] in float64."""
    if isinstance(source, Basis):
        v = source.maps[block.name].dense(torch.float64)[:rank]
        return orthonormalize(v.clone()) if len(v) else v
    alone = source.with_partition(Partition((source.partition[block.name],)))
    if not any(deltas.any() for _, deltas in alone.chunks(block.name)):
        return torch.zeros(0, block.numel, dtype=torch.float64)
    basis = _quiet_svd(alone, min(rank or len(source), len(source)), torch.float64)
    directions: Tensor = basis.maps[block.name].dense(torch.float64)
    return directions


@dataclass(frozen=True)
class ComponentNorm:
    """Length of an update in one parameter of a block.

    Attributes:
        block: name of the block.
        component: name of the parameter without the block's.
        norm: `|u_c|`, the Euclidean norm of the update of the parameter.
        numel: number of elements n of the parameter.
    """

    block: str
    component: str
    norm: float
    numel: int

    @property
    def per_weight(self) -> float:
        """Root mean square change of a weight, `|u_c| / sqrt(n)`."""
        return self.norm / math.sqrt(self.numel)


def component_norms(moved: Moved) -> list[ComponentNorm]:
    """Return the norm of the update of every parameter, in the order of the blocks.

    Raises:
        InputError: there is no update; see `updates`.

    Example:
        >>> import tempfile
        >>> from tinyspan import TrajectoryRecorder, by_pattern
        >>> model = torch.nn.Linear(2, 1)
        >>> recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), tempfile.mkdtemp())
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(model.weight + torch.tensor([[3.0, 4.0]]))
        >>> recorder.record(step=0)
        >>> [(row.component, round(row.norm, 4), row.numel) for row in component_norms(recorder.trajectory())]
        [('weight', 5.0, 2), ('bias', 0.0, 1)]
    """
    return [
        ComponentNorm(block.name, component(block, spec.name), float(vector[start:stop].double().norm()), spec.numel)
        for block, vector in updates(moved)
        for spec, start, stop in block.spans()
    ]


def component(block: Block, parameter: str) -> str:
    """Return the name of a parameter without the name of its block."""
    return parameter.removeprefix(f"{block.name}.")


def envelope(vector: Tensor, segments: int = 400) -> Tensor:
    """Return the largest `|x - mean(x)| / std(x)` of consecutive segments of a vector, [at most `segments`].

    Raises:
        InputError: a coordinate is NaN or infinite.

    Example:
        >>> envelope(torch.tensor([0.0, 0.0, 0.0, 4.0]), segments=2).round(decimals=3)
        tensor([0.5770, 1.7320], dtype=torch.float64)
    """
    return torch.stack([piece.max() for piece in standardized(vector).abs().chunk(segments)])


def spectra(source: Trajectory | Basis) -> dict[str, Tensor]:
    """Return block name -> all singular values of theta_i - theta_0 in descending order, [t] in float64.

    For a basis they are the singular values from which its directions were computed, and blocks without are left out.

    Raises:
        InputError: no point of the trajectory differs from theta_0.
    """
    if isinstance(source, Trajectory):
        source = _quiet_svd(source, 1)
    return {name: values for name, values in source.spectrum.items() if len(values)}


def _quiet_svd(trajectory: Trajectory, rank: int, dtype: torch.dtype = torch.float32) -> Basis:
    """Return the SVD basis of a trajectory, without its warnings about directions that it drops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return svd_basis(trajectory, rank, dtype=dtype)


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
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle = (score + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(score * (1 - score) / rows + z * z / (4 * rows * rows))
    return middle - half, middle + half


def score_interval(result: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the 95 % interval of the score of a result: the stored one, or Wilson's for an accuracy; None otherwise.

    Example:
        >>> result = {"metric": "accuracy", "score": 0.5, "rows": {"validation": 100}}
        >>> [round(bound, 3) for bound in score_interval(result)]
        [0.404, 0.596]
        >>> score_interval({**result, "intervals": {"accuracy": [0.4, 0.6]}})
        (0.4, 0.6)
    """
    stored = (result.get("intervals") or {}).get(result["metric"])
    if stored is not None:
        return float(stored[0]), float(stored[1])
    rows = (result.get("rows") or {}).get("validation")
    return wilson_interval(result["score"], rows) if result["metric"] == "accuracy" and rows else None


def _locate(block: Block, position: int) -> tuple[str, int]:
    for spec, a, b in block.spans():
        if a <= position < b:
            return spec.name, position - a
    raise InputError(f"block {block.name!r} has {block.numel} coordinates, not {position}")
