"""Leading right singular vectors of a matrix W of few rows and very many columns, given piece by piece.

The columns may lie in several processes. All calls with a `group` are collective: every process of the group makes
them, in the same order, with its own columns.
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

CUTOFF = 1e-6  # of the largest singular value: directions below are dropped
ORTHOGONAL = 1e-4  # likewise: down to here one product gives vectors that are orthogonal to 1e-7
CACHED = 1 << 19  # numbers multiplied at once; in float64 they take 4 MB
NARROW = 512  # columns multiplied at once at least: of fewer, the calls cost more than the products


def piece_width(rows: int) -> int:
    """Return how many columns of a matrix with so many rows are best multiplied at once."""
    return max(NARROW, CACHED // max(rows, 1))


def in_float64(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield column pieces in float64, all in the same memory: each is valid until the next is asked for.

    Fresh memory for every piece would cost more than the products.
    """
    wide = torch.empty(0, 0, dtype=torch.float64)
    for piece in pieces:
        if wide.shape[1] < piece.shape[1]:
            wide = torch.empty(piece.shape, dtype=torch.float64)
        yield wide[:, : piece.shape[1]].copy_(piece)


def in_threads(rows: Tensor) -> Tensor:
    """Return the columns of a matrix [k, D] as a batch [n, k, D / n], whose products run in n threads.

    n is the greatest common divisor of D and the number of threads.
    """
    parts: Tensor = rows.unflatten(1, (gcd(torch.get_num_threads(), rows.shape[1]), -1))
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

    With G = W W^T = U S^2 U^T the vectors are V^T = S^-1 U^T W. Squaring costs half the digits: G is right to about
    1e-15 S_1^2, so vectors of singular values s come out orthogonal to 1e-15 (S_1 / s)^2, which a Cholesky factor of
    their own Gram matrix mends where it is too much.

    Args:
        chunks: yields W in float64, by pieces of its columns; each is used before the next is asked for. Called twice.
        size: D, the number of columns; with a group, of those in this process.
        keep: how many vectors are wanted, of the singular values.
        dtype: in which they will be stored; they come in float64 if it is that, else in float32.
        name: of the block, for messages.
        empty: gives the memory for the vectors, like `torch.empty`, once the first pass over W is done.
        group: processes that hold the other columns. One all-reduce of G, and one more where the vectors are mended,
            is all that they send each other; each gets its own columns of V^T.

    Raises:
        InputError: W holds NaN or infinite numbers, in any process.
    """
    gram = _gram(chunks(), group)
    if not torch.isfinite(gram).all():
        raise InputError(f"block {name!r}: the points hold NaN or infinite numbers; record them again")
    squares, left = (_of_first(factor, group) for factor in torch.linalg.eigh(gram))
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
    """Make rows orthonormal in place, in their order, through the Cholesky factor of their float64 Gram matrix.

    Twice, unless they nearly are: the first pass leaves an error of about the squared condition number times 1e-16,
    which the second removes.
    """
    pieces = directions.split(piece_width(len(directions)), dim=1)
    for _ in range(passes):
        factor = torch.linalg.cholesky(_of_first(_gram(in_float64(pieces), group), group))
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        _fill(directions, inverse, in_float64(pieces))
    return directions


def _gram(chunks: Iterable[Tensor], group: "ProcessGroup | None") -> Tensor:
    """Sum W W^T over the column chunks of W, with Kahan's correction: small singular values need every digit."""
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


def _square(rows: Tensor) -> Tensor:
    """Return rows @ rows.T: three quarters of it, since it is symmetric, and each thread for some of the columns."""
    parts = in_threads(rows)
    m = 3 * len(rows) // 4
    left, rest = (torch.bmm(parts[:, a:], parts[:, a:b].mT).sum(0) for a, b in ((0, m), (m, len(rows))))
    return torch.cat([left, torch.cat([left[m:].T, rest])], dim=1)


def _fill(out: Tensor, factor: Tensor, chunks: Iterable[Tensor]) -> None:
    """Write factor @ W into `out`, by the column chunks of W."""
    start, product = 0, torch.empty(0, 0, dtype=torch.float64)
    for rows in chunks:
        width = rows.shape[1]
        if product.shape[1] < width:
            product = torch.empty(len(factor), width, dtype=torch.float64)
        out[:, start : start + width] = torch.mm(factor, rows, out=product[:, :width])
        start += width


def _of_first(tensor: Tensor, group: "ProcessGroup | None") -> Tensor:
    """Return the same tensor in all processes of a group: that of its first."""
    if group is None:
        return tensor
    tensor = tensor.contiguous()
    torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, 0), group)
    return tensor


def everywhere(holds: bool, group: "ProcessGroup | None") -> bool:
    """Whether something holds in all processes of a group."""
    if group is None:
        return holds
    flag = torch.tensor(int(holds))
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group)
    return bool(flag)


def squared_norm(left: Tensor, right: Tensor) -> float:
    """Return `||L R||^2 = <L^T L, R R^T>` of factors [m, r] and [r, n]; the product is never made."""
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
