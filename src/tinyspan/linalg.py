"""Leading right singular vectors of a matrix W with few rows and very many columns, read a few columns at a time.

The columns may be distributed over several processes. All calls with a `group` are collective: every process of the
group makes them in the same order, with its own columns.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinyspan.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Array",
    "Columns",
    "TensorColumns",
    "as_array",
    "everywhere",
    "in_threads",
    "orthonormalize",
    "piecewise",
    "right_singular_vectors",
    "squared_norm",
]

Array = npt.NDArray[Any]
Result = TypeVar("Result")

CUTOFF = 1e-6  # relative to the largest singular value: directions below are dropped
DEPENDENT = 5e-7  # part of a direction outside the span of those before it; rounding leaves up to 1.4e-7 in float32
ORTHOGONAL = 1e-4  # likewise: above, the vectors from one product are orthogonal to 1e-7
CACHED = 1 << 18  # elements read and multiplied at once by a thread; 2 MB in float64
NARROW = 512  # minimum number of columns read at once; with fewer, call overhead dominates
PADDING = 8  # unused columns of a piece: rows at distances of a power of two would share the same lines of the cache
FEW = 128  # rows; up to here products are cut into small ones, and the columns are distributed over threads
SMALL = 1 << 18  # multiplications of a small product: up to here OpenBLAS copies no factor and starts no threads
STRIP = 8  # rows of a symmetric product computed at once


class Columns(ABC):
    """A matrix W [t, D] whose columns are read when they are needed, by several threads at the same time.

    Attributes:
        shape: (t, D).
    """

    shape: tuple[int, int]

    @abstractmethod
    def read(self, start: int, out: Array) -> None:
        """Write the columns from `start` on into `out` [t, n] in float64."""


class TensorColumns(Columns):
    """The columns of a tensor [t, D]."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix.detach()
        self.shape = (matrix.shape[0], matrix.shape[1])

    def read(self, start: int, out: Array) -> None:
        """Write the columns from `start` on into `out` [t, n] in float64."""
        np.copyto(out, as_array(self._matrix[:, start : start + out.shape[1]]))


def as_array(tensor: Tensor) -> Array:
    """Return a tensor as an array, which shares its memory if it can; bfloat16, which numpy lacks, in float32."""
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array


def piecewise(matrix: Columns, work: Callable[[Iterator[tuple[int, Array]]], Result]) -> list[Result]:
    """Return the result of `work` in every thread, each of which gets some of the pieces of a matrix.

    There are as many threads as torch uses; a matrix with more than `FEW` rows is processed in one, and its products in
    the threads of BLAS. Which piece is in which thread depends only on the shape and the number of threads. A piece is
    a pair of its first column and its numbers [t, n] in float64, which are valid until the next one is requested.
    numpy does not warn about NaN and infinite values in `work`.
    """
    rows, size = matrix.shape
    width = max(NARROW, CACHED // max(rows, 1))
    starts = range(0, size, width)

    has_failed = Event()  # in one thread, so that the others stop

    def in_one_thread(share: range) -> Result:
        memory = _padded(rows, min(width, size))

        def pieces() -> Iterator[tuple[int, Array]]:
            for start in share:
                if has_failed.is_set():
                    return
                piece = memory[:, : min(width, size - start)]
                matrix.read(start, piece)
                yield start, piece

        try:
            with np.errstate(all="ignore"):
                return work(pieces())
        except BaseException:
            has_failed.set()
            raise

    count = min(torch.get_num_threads(), len(starts)) if rows <= FEW else 1
    if count <= 1:
        return [in_one_thread(starts)]
    with ThreadPoolExecutor(count) as pool:
        try:
            return list(pool.map(in_one_thread, (starts[first::count] for first in range(count))))
        except BaseException:  # also an interruption of this thread
            has_failed.set()
            raise


def _padded(rows: int, columns: int) -> Array:
    memory: Array = np.empty((rows, columns + PADDING))[:, :columns]
    return memory


def in_threads(matrix: Tensor) -> Tensor:
    """Return the columns of a matrix [k, D] as a batch [n, k, D / n], whose products run in n threads.

    n is the greatest common divisor of D and the number of threads.
    """
    parts: Tensor = matrix.unflatten(1, (gcd(torch.get_num_threads(), matrix.shape[1]), -1))
    return parts.transpose(0, 1)


def right_singular_vectors(
    matrix: Columns,
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
        matrix: W, which is read twice; with a group, the columns of W in this process.
        keep: returns the number of vectors for given singular values.
        dtype: dtype in which the vectors will be stored; they are returned in float64 for float64, else in float32.
        name: name of the block in messages.
        empty: allocates memory for the vectors, like `torch.empty`; called after the first pass over W.
        group: process group with the other columns. The processes exchange one all-reduce of G, and another one if the
            vectors are orthonormalised; each process gets its own columns of V^T.

    Raises:
        InputError: W has NaN or infinite values, in any process.
    """
    gram, size = _gram(matrix, group), matrix.shape[1]
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
    _fill(directions, whiten, matrix)
    if values[k - 1] < ORTHOGONAL * values[0] or dtype == torch.float64:
        orthonormalize(directions, passes=1, group=group)
    return values, directions


def orthonormalize(directions: Tensor, passes: int = 2, group: "ProcessGroup | None" = None) -> Tensor:
    """Orthonormalise directions [k, D] in place, in order, with the Cholesky factor of their float64 Gram matrix.

    Two passes are needed unless the directions are nearly orthonormal: the first pass leaves an error of about 1e-16
    times the squared condition number, which the second one removes.

    Raises:
        torch.linalg.LinAlgError: a direction depends linearly on those before it, up to `DEPENDENT` of its length.
    """
    for _ in range(passes):
        gram = _broadcast(_gram(TensorColumns(directions), group), group)
        factor = torch.linalg.cholesky(gram)
        if (factor.diagonal() <= DEPENDENT * gram.diagonal().sqrt()).any():
            raise torch.linalg.LinAlgError("the directions are linearly dependent")  # type: ignore[attr-defined]
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        _fill(directions, inverse, TensorColumns(directions))
    return directions


def _gram(matrix: Columns, group: "ProcessGroup | None") -> Tensor:
    """Return W W^T, summed over column pieces with Kahan summation: small singular values need full precision."""

    def summed(pieces: Iterator[tuple[int, Array]]) -> Array:
        total, lost = np.zeros(shape), np.zeros(shape)
        for _, piece in pieces:
            addend = _square(piece)
            addend -= lost
            grown = total + addend
            np.subtract(grown, total, out=lost)
            lost -= addend
            total = grown
        return total

    shape = (matrix.shape[0], matrix.shape[0])
    gram = torch.from_numpy(np.sum(piecewise(matrix, summed), axis=0))
    if group is not None:
        torch.distributed.all_reduce(gram, group=group)
    return gram


def _square(piece: Array) -> Array:
    """Return W W^T for a piece W [t, n]; with few rows, from small products of strips of rows.

    A strip is multiplied by the rows from it on, and the rest is copied by symmetry. Small products do not copy their
    factors, which takes longer than to multiply them. A product of the same rows twice would be computed by another,
    slower routine, so the last strip is multiplied by one row more.
    """
    rows = len(piece)
    if rows > FEW:
        product: Array = piece @ piece.T
        return product
    strip, lower = max(1, min(STRIP, rows // 2)), np.zeros((rows, rows))
    for part in _parts(piece, SMALL // (strip * max(rows, 1))):
        for a in range(0, rows, strip):
            first = max(0, min(a, rows - strip - 1))
            products = part[:, first:] @ part[:, a : a + strip].transpose(0, 2, 1)
            lower[first:, a : a + strip] += products.sum(0)
    lower = np.tril(lower)
    return lower + np.tril(lower, -1).T


def _fill(out: Tensor, factor: Tensor, matrix: Columns) -> None:
    """Write factor @ W into `out`, one column piece of W at a time; `out` may be the memory of W."""
    left = np.ascontiguousarray(factor.numpy())

    def multiplied(pieces: Iterator[tuple[int, Array]]) -> None:
        memory = _padded(0, 0)
        for start, piece in pieces:
            rows, width = piece.shape
            if memory.shape[1] < width:
                memory = _padded(len(left), width)
            product = memory[:, :width]
            small = SMALL // max(1, len(left) * rows) if rows <= FEW else width
            for target, part in zip(_parts(product, small), _parts(piece, small), strict=True):
                np.matmul(left, part, out=target)
            columns = out[:, start : start + width]
            if columns.dtype == torch.bfloat16 or columns.device.type != "cpu":
                columns.copy_(torch.from_numpy(product))
            else:
                np.copyto(columns.numpy(), product, casting="same_kind")

    piecewise(matrix, multiplied)


def _parts(matrix: Array, width: int) -> Sequence[Array]:
    """Return views of a matrix [t, n] as batches [m, t, width] of some of its columns, without empty ones."""
    rows, columns = matrix.shape
    whole = columns - columns % width
    batch = matrix[:, :whole].reshape(rows, whole // width, width).transpose(1, 0, 2)
    return [part for part in (batch, matrix[None, :, whole:]) if part.size]


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
