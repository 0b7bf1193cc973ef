"""Leading right singular vectors of a matrix W with few rows and very many columns, given in pieces.

The columns may be distributed over several processes. All calls with a `group` are collective: every process of the
group makes them in the same order, with its own columns.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinyspan.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "everywhere",
    "in_float64",
    "in_threads",
    "orthonormalize",
    "piece_width",
    "right_singular_vectors",
    "squared_norm",
]

CUTOFF = 1e-6  # relative to the largest singular value: directions below are dropped
ORTHOGONAL = 1e-4  # likewise: above, the vectors from one product are orthogonal to 1e-7
CACHED = 1 << 19  # elements multiplied at once; 4 MB in float64
NARROW = 512  # minimum number of columns multiplied at once; with fewer, call overhead dominates


def piece_width(rows: int) -> int:
    """Return the number of columns that are multiplied at once, for a matrix with a number of rows."""
    return max(NARROW, CACHED // max(rows, 1))


def in_float64(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield column pieces in float64, all in the same memory; each is valid until the next one is requested.

    Allocating memory for every piece would take longer than the products.
    """
    wide = torch.empty(0, 0)
    for piece in pieces:
        if wide.shape[1] < piece.shape[1]:
            wide = torch.empty(piece.shape, dtype=torch.float64)
        yield wide[:, : piece.shape[1]].copy_(piece)


def in_threads(matrix: Tensor) -> Tensor:
    """Return the columns of a matrix [k, D] as a batch [n, k, D / n], whose products run in n threads.

    n is the greatest common divisor of D and the number of threads.
    """
    parts: Tensor = matrix.unflatten(1, (gcd(torch.get_num_threads(), matrix.shape[1]), -1))
    return parts.transpose(0, 1)


def right_singular_vectors(
    chunks: Callable[[], Iterator[Tensor]],
    size: int,
    keep: Callable[[Tensor], int],
    dtype: torch.dtype,
    name: str,
    *,
    empty: Callable[..., Tensor] = torch.empty,
    group: "ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Return all singular values [t] and the leading right singular vectors [k, D] of a matrix W [t, D].

    With G = W W^T = U S^2 U^T the vectors are V^T = S^-1 U^T W. Squaring halves the number of correct digits: G has an
    error of about 1e-15 S_1^2, so vectors with singular value s are orthogonal to 1e-15 (S_1 / s)^2. Where this is too
    inaccurate, they are orthonormalised with a Cholesky factor of their own Gram matrix.

    Args:
        chunks: returns an iterator over column pieces of W in float64; each piece is used before the next one is
            requested. Called twice.
        size: D, the number of columns; with a group, the number of columns in this process.
        keep: returns the number of vectors for given singular values.
        dtype: dtype in which the vectors will be stored; they are returned in float64 for float64, else in float32.
        name: name of the block in messages.
        empty: allocates memory for the vectors, like `torch.empty`; called after the first pass over W.
        group: process group with the other columns. The processes exchange one all-reduce of G, and another one if the
            vectors are orthonormalised; each process gets its own columns of V^T.

    Raises:
        InputError: W has NaN or infinite values, in any process.
    """
    gram = _gram(chunks(), group)
    if not torch.isfinite(gram).all():
        raise InputError(f"block {name!r}: the points hold NaN or infinite numbers; record them again")
    squares, left = (_broadcast(factor, group) for factor in torch.linalg.eigh(gram))
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
    directions = empty(k, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    _fill(directions, whiten, chunks())
    if values[k - 1] < ORTHOGONAL * values[0] or dtype == torch.float64:
        orthonormalize(directions, passes=1, group=group)
    return values, directions


def orthonormalize(directions: Tensor, passes: int = 2, group: "ProcessGroup | None" = None) -> Tensor:
    """Orthonormalise directions [k, D] in place, in order, with the Cholesky factor of their float64 Gram matrix.

    Two passes are needed unless the directions are nearly orthonormal: the first pass leaves an error of about 1e-16
    times the squared condition number, which the second one removes.
    """
    pieces = directions.split(piece_width(len(directions)), dim=1)
    for _ in range(passes):
        factor = torch.linalg.cholesky(_broadcast(_gram(in_float64(pieces), group), group))
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        _fill(directions, inverse, in_float64(pieces))
    return directions


def _gram(chunks: Iterable[Tensor], group: "ProcessGroup | None") -> Tensor:
    """Return W W^T, accumulated over column pieces with Kahan summation: small singular values need full precision."""
    products = map(_square, chunks)
    total = next(products)
    lost = torch.zeros_like(total)
    for product in products:
        addend = product - lost
        grown = total + addend
        lost = (grown - total) - addend
        total = grown
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


def _square(matrix: Tensor) -> Tensor:
    """Return W W^T; the columns are split among threads, and one block is copied by symmetry instead of computed."""
    parts = in_threads(matrix)
    m = 3 * len(matrix) // 4
    left, rest = (torch.bmm(parts[:, a:], parts[:, a:b].mT).sum(0) for a, b in ((0, m), (m, len(matrix))))
    return torch.cat([left, torch.cat([left[m:].T, rest])], dim=1)


def _fill(out: Tensor, factor: Tensor, chunks: Iterable[Tensor]) -> None:
    """Write factor @ W into `out`, one column piece of W at a time."""
    start, product = 0, torch.empty(0, 0)
    for piece in chunks:
        width = piece.shape[1]
        if product.shape[1] < width:
            product = torch.empty(len(factor), width, dtype=torch.float64)
        out[:, start : start + width] = torch.mm(factor, piece, out=product[:, :width])
        start += width


def _broadcast(tensor: Tensor, group: "ProcessGroup | None") -> Tensor:
    """Return the tensor of the first process of a group in all of its processes."""
    if group is None:
        return tensor
    tensor = tensor.contiguous()
    torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, 0), group)
    return tensor


def everywhere(holds: bool, group: "ProcessGroup | None") -> bool:
    """Return whether a condition holds in all processes of a group."""
    if group is None:
        return holds
    flag = torch.tensor(int(holds))
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group)
    return bool(flag)


def squared_norm(left: Tensor, right: Tensor) -> float:
    """Return `||L R||^2 = <L^T L, R R^T>` for factors [m, r] and [r, n], without computing the product."""
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
