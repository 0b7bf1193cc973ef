"""Leading right singular vectors of a matrix with few rows and very many columns, given by pieces of its columns."""

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tinyspan.errors import InputError

__all__ = ["CACHED", "orthonormalize", "right_singular_vectors"]

CUTOFF = 1e-6  # of the largest singular value: directions below are dropped
ORTHOGONAL = 1e-4  # likewise: down to here one product gives vectors that are orthogonal to 1e-7
CACHED = 1 << 19  # numbers multiplied at once; in float64 they take 4 MB


def right_singular_vectors(
    chunks: Callable[[], Iterator[Tensor]],
    size: int,
    keep: Callable[[Tensor], int],
    dtype: torch.dtype,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Return all singular values [t] and the leading right singular vectors [k, D] of a matrix given by its chunks.

    With G = W W^T = U S^2 U^T the vectors are V^T = S^-1 U^T W. Squaring costs half the digits: G is right to about
    1e-15 S_1^2, so vectors of singular values s come out orthogonal to 1e-15 (S_1 / s)^2, which a Cholesky factor of
    their own Gram matrix mends where it is too much.
    """
    gram = _gram(chunks())
    if not torch.isfinite(gram).all():
        raise InputError(f"block {name!r}: the points hold NaN or infinite numbers; record them again")
    squares, left = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp(min=0).sqrt()
    if values[0] == 0:
        warnings.warn(f"block {name!r} does not move, so it gets no directions", stacklevel=3)
        return values, torch.empty(0, size)
    wanted, sound = keep(values), int((values > CUTOFF * values[0]).sum())
    if wanted > sound:
        warnings.warn(
            f"block {name!r}: {wanted - sound} of {wanted} directions dropped, "
            f"their singular values are below {CUTOFF:g} of the largest",
            stacklevel=3,
        )
    k = min(wanted, sound)
    whiten = left.flip(1)[:, :k].T / values[:k, None]
    directions = torch.empty(k, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    start = 0
    for rows in chunks():
        directions[:, start : start + rows.shape[1]] = whiten @ rows
        start += rows.shape[1]
    if values[k - 1] < ORTHOGONAL * values[0] or dtype == torch.float64:
        orthonormalize(directions, passes=1)
    return values, directions


def _gram(chunks: Iterable[Tensor]) -> Tensor:
    """Sum W W^T over the column chunks of W, with Kahan's correction: small singular values need every digit."""
    chunks = iter(chunks)
    rows = next(chunks)
    total = rows @ rows.T
    lost = torch.zeros_like(total)
    for rows in chunks:
        addend = torch.addmm(lost, rows, rows.T, beta=-1)
        grown = total + addend
        lost = (grown - total) - addend
        total = grown
    return total


def orthonormalize(directions: Tensor, passes: int = 2) -> Tensor:
    """Make rows orthonormal in place, in their order, through the Cholesky factor of their float64 Gram matrix.

    Twice, unless they nearly are: the first pass leaves an error of about the squared condition number times 1e-16,
    which the second removes.
    """
    for _ in range(passes):
        pieces = directions.split(max(1, CACHED // max(len(directions), 1)), dim=1)
        factor = torch.linalg.cholesky(_gram(piece.double() for piece in pieces))
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        for piece in pieces:
            piece.copy_(inverse @ piece.double())
    return directions
