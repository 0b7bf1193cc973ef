"""What the directions mean: pure functions over trajectories, bases and update vectors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyspan.bases.basis import Basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.maps.dense import DenseMap
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Block
from tinyspan.trajectories.trajectory import Trajectory

__all__ = [
    "GAUSSIAN_SHARE",
    "Outliers",
    "Plane",
    "Share",
    "explained_variance",
    "loss_surface",
    "outliers",
    "plane",
    "principal_angles",
    "span_share",
    "standardized",
]

GAUSSIAN_SHARE = 0.0026998  # P(|x| > 3 sigma) of a normal distribution


def explained_variance(spectrum: Tensor) -> Tensor:
    """Return the share of the sum of squares that the first 1, 2, ..., t singular values explain.

    Where all are zero there is nothing to explain, and every share is 1.

    Example:
        >>> explained_variance(torch.tensor([2.0, 1.0, 1.0]))
        tensor([0.6667, 0.8333, 1.0000])
    """
    squares = spectrum.square()
    return squares.cumsum(0) / squares.sum() if squares.any() else torch.ones_like(spectrum)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the principal angles between two subspaces, ascending, in radians, as float64.

    Cosines are the singular values of A B^T; where one is above 1/sqrt(2) the angle is taken from the sine instead,
    the singular values of B - B A^T A, since arccos loses half the digits near 1 (Bjorck and Golub 1973).

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
    """How much of a vector lies in the spans of a basis.

    Attributes:
        value: over all blocks, `sum_b |V_b^T g_b|^2 / sum_b |g_b|^2`.
        random: what to expect of as many random directions, `sum_b (k_b / D_b) |g_b|^2 / sum_b |g_b|^2`.
        by_block: block name -> `|V_b^T g_b|^2 / |g_b|^2`, and 0 where g_b is zero.
    """

    value: float
    random: float
    by_block: dict[str, float]


def span_share(basis: Basis, vector: Mapping[str, Tensor], ranks: Mapping[str, int] | None = None) -> Share:
    """Return the share of `|g|^2` that lies in the span of each block's first k_b directions, and in all of them.

    Directions count as orthonormal, which those of bfloat16 and int8 are to about 1 %. A random subspace of k of D
    dimensions holds k / D of any vector in expectation.

    Args:
        basis: V_b of every block.
        vector: block name -> g_b [D_b], such as a gradient.
        ranks: block name -> k_b, if not all directions are wanted.

    Raises:
        InputError: g is zero, NaN or infinite, or the columns of the basis are not orthonormal, as those of Fastfood.

    Example:
        >>> from tinyspan import Basis, by_pattern
        >>> partition = by_pattern(torch.nn.Linear(4, 1, bias=False), {"all": ".*"})
        >>> basis = Basis.from_directions(partition, {"all": torch.eye(2, 4)})
        >>> span_share(basis, {"all": torch.tensor([3.0, 0.0, 0.0, 4.0])})
        Share(value=0.36, random=0.5, by_block={'all': 0.36})
    """
    squares: dict[str, tuple[float, float, float]] = {}  # in the span, expected of a random one, in all
    for block in basis.partition:
        v = basis.maps[block.name]
        if v.is_orthonormal is False:
            raise InputError(f"the columns of a {v.kind} basis are not orthonormal, so it has no share of a vector")
        g = vector[block.name].to(next(iter(v.tensors().values())).device)
        rank, total = v.rank if ranks is None else ranks[block.name], float(g.double().square().sum())
        found = float(v.rmatvec(g)[:rank].double().square().sum())
        squares[block.name] = found, total * rank / block.numel, total
    found, expected, total = (sum(parts) for parts in zip(*squares.values(), strict=True))
    if not 0 < total < math.inf:
        raise InputError(f"expected a vector other than zero, of finite numbers; its squares sum to {total}")
    by_block = {name: part / whole if whole else 0.0 for name, (part, _, whole) in squares.items()}
    return Share(found / total, expected / total, by_block)


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
    """Coordinates of a vector further than a number of standard deviations from its mean.

    Attributes:
        count: how many.
        share: of all coordinates; a Gaussian vector has `GAUSSIAN_SHARE` at 3 sigma.
        kurtosis: fourth moment over the squared second; 3 for a Gaussian, told as 0 if all coordinates are equal.
        by_parameter: parameter name -> how many of its coordinates are outliers.
        largest: the coordinates furthest out, as (parameter, index in it, distance in standard deviations).
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

    A coordinate is one if `|x - mean(x)| > sigmas * std(x)`, mean and standard deviation over the block.

    Args:
        vector: the update of one block, [D_b].
        block: names its coordinates.
        sigmas: the threshold.
        largest: how many coordinates to list.

    Raises:
        InputError: a coordinate is NaN or infinite.

    Example:
        >>> from tinyspan import by_pattern
        >>> block = by_pattern(torch.nn.Linear(20, 1), {"all": ".*"})["all"]
        >>> vector = torch.zeros(21)
        >>> vector[20] = 1.0
        >>> outliers(vector, block).by_parameter
        {'weight': 0, 'bias': 1}
    """
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
    """The plane through theta_0 of a trajectory's two main directions, over all blocks together.

    Attributes:
        basis: of rank 2, one block.
        path: coordinates of theta_0 .. theta_t in it, [t + 1, 2]; theta_0 is the origin, theta_t has none below 0.
        explained: share of the squared distances from theta_0 that the plane holds.
    """

    basis: Basis
    path: Tensor
    explained: float


def plane(trajectory: Trajectory) -> Plane:
    """Return the plane in which a trajectory moves most.

    Raises:
        InputError: the trajectory has fewer than two points, or runs straight.
    """
    if len(trajectory) < 2:
        raise InputError(f"a plane needs at least 2 points, {trajectory.folder} has {len(trajectory)}")
    whole = trajectory.with_partition(trajectory.recorded.as_one_block())
    (block,) = whole.partition
    basis = svd_basis(whole, rank=2)
    if basis.rank < 2:
        raise InputError(f"the path in {trajectory.folder} is straight, so it spans no plane")
    v, path, position = DenseMap(basis.maps[block.name].dense()), torch.zeros(len(whole) + 1, 2), 0
    for _, deltas in whole.chunks(block):
        narrowed = v.rows(position, position + deltas.shape[1])
        path[1:] += torch.stack([narrowed.rmatvec(delta.float()) for delta in deltas])
        position += deltas.shape[1]
    signs = torch.where(path[-1] < 0, -1.0, 1.0)
    basis.maps = {block.name: DenseMap(v.directions.mul_(signs[:, None]))}
    path *= signs
    return Plane(basis, path, float(explained_variance(basis.spectrum[block.name])[1]))


def loss_surface(
    subspace: SubspaceModel, loss: Callable[[], float], first: Sequence[float], second: Sequence[float]
) -> Tensor:
    """Evaluate a loss on a grid of the two coordinates of a rank-2, one-block `SubspaceModel`.

    Args:
        subspace: in the plane; its z is put back afterwards.
        loss: computes the loss of the model as it stands.
        first: the first coordinate's grid values, n1 of them.
        second: the second coordinate's, n2.

    Returns:
        Losses [n2, n1]; rows follow the second coordinate, as contour plots want it.
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


def _locate(block: Block, position: int) -> tuple[str, int]:
    for spec, a, b in block.spans():
        if a <= position < b:
            return spec.name, position - a
    raise InputError(f"block {block.name!r} has {block.numel} coordinates, not {position}")
