"""Directions: the variance they explain, the angles between two spans, and the share of a vector in a span."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyspan.bases.basis import Basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["Share", "explained_variance", "principal_angles", "quiet_svd", "span_share", "spectra"]


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


def spectra(source: Trajectory | Basis) -> dict[str, Tensor]:
    """Return block name -> all singular values of theta_i - theta_0 in descending order, [t] in float64.

    For a basis they are the singular values from which its directions were computed, and blocks without are left out.

    Raises:
        InputError: no point of the trajectory differs from theta_0.
    """
    if isinstance(source, Trajectory):
        source = quiet_svd(source, 1)
    return {name: values for name, values in source.spectrum.items() if len(values)}


def quiet_svd(trajectory: Trajectory, rank: int, dtype: torch.dtype = torch.float32) -> Basis:
    """Return the SVD basis of a trajectory, without its warnings about directions that it drops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return svd_basis(trajectory, rank, dtype=dtype)
