"""Linear maps V of one block, from k coordinates to the block's D numbers: `expand(z)` = V z, `project(g)` = V^T g.

A dense map holds its directions one after the other, [k, D], in float32, float64, bfloat16 or int8. A sparse one holds
them on some of the coordinates alone; everywhere else V is zero. Both can be narrowed to some of their rows. A
Kronecker map is the product of two small matrices, one for each side of a weight. The Fastfood map, of `fastfood`,
stores no directions.

What is computed with a reduced format is the exact map of the numbers as they are stored, and its exact adjoint. They
are widened in registers, by kernels that `torch.compile` makes of a few lines: about a second when a process first
needs them, ten when this machine does. Small maps, and machines without a compiler, widen piece by piece instead. No
wide copy of V ever exists.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from tinyspan.linalg import in_threads
from tinyspan.maps.fastfood import FastfoodMap, power_of_two
from tinyspan.weights import finite

__all__ = [
    "DenseMap",
    "KroneckerMap",
    "LinearMap",
    "SparseMap",
    "check_numbers",
    "dense_map",
    "linear_map",
    "stored_rank",
]

PIECE = 1 << 21  # numbers of V widened at once; in float32 they take 8 MB
FUSED = 1 << 22  # numbers from which on a map is worth a compiled kernel, in a reduced format, or several threads
ENTERED = 1 << 15  # numbers from which on a part of such a map is: below, entering the kernel takes longer
ROWS = 8  # directions that a kernel reads side by side
VARIANTS = 64  # of a kernel: formats, ranks of 1, whole or cut, numbers of threads
LEVELS = 127  # int8 holds -127 .. 127
_dead: dict[str, str] = {}  # device -> why kernels cannot be compiled for it, once that is known


class LinearMap(Protocol):
    """V of one block, from k = `rank` coordinates to D = `size` numbers.

    A map that costs less on some of its rows alone also has `rows(start, stop)`; the model is then moved, and gradients
    are projected, parameter by parameter instead of block by block.
    """

    rank: int
    size: int

    def expand(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D]."""

    def project(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "LinearMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""


class DenseMap:
    """V held as its directions, a tensor [k, D] of which row i is the i-th column of V.

    Args:
        directions: floating-point numbers, or int8.
        scales: [D], of int8 directions: column i of V is `directions[i] * scales`. See `dense_map`.

    Example:
        >>> v = DenseMap(torch.eye(2, 3))
        >>> v.expand(torch.tensor([1.0, 2.0])), v.project(torch.tensor([3.0, 4.0, 5.0]))
        (tensor([1., 2., 0.]), tensor([3., 4.]))
    """

    def __init__(self, directions: Tensor, scales: Tensor | None = None) -> None:
        self.directions, self.scales = directions, scales
        self.rank, self.size = directions.shape
        self._large = directions.numel() >= FUSED

    def expand(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""
        out = torch.zeros(self.size, dtype=z.dtype, device=z.device)
        self.displace(out, z, out)
        return out

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D]; one read of V."""
        if self.directions.dtype == z.dtype:
            if (parts := self._in_threads()) is None:
                torch.addmv(start, self.directions.T, z, out=out)
            else:
                split = (len(parts), 1, parts.shape[2])
                torch.baddbmm(start.view(split), z.expand(len(parts), 1, -1), parts, out=out.view(split))
            return
        if self._large and (moved := _fused(_expanded, self.directions, self.scales, z)) is not None:
            torch.add(start, moved, out=out)
            return
        for piece in self._pieces():
            moved = self.directions[:, piece].to(z.dtype).T @ z
            if self.scales is not None:
                moved *= self.scales[piece]
            torch.add(start[piece], moved, out=out[piece])

    def project(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g; one read of V."""
        if self.directions.dtype == g.dtype:
            if (parts := self._in_threads()) is None:
                return self.directions @ g
            return torch.bmm(g.view(len(parts), 1, -1), parts.mT).sum((0, 1))
        if self._large and (found := _fused(_projected, self.directions, self.scales, g)) is not None:
            return found
        out = torch.zeros(self.rank, dtype=g.dtype, device=g.device)
        for piece in self._pieces():
            scaled = g[piece] if self.scales is None else g[piece] * self.scales[piece]
            out += self.directions[:, piece].to(g.dtype) @ scaled
        return out

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return V^T as numbers of a wide format, [k, D]; a copy unless the directions are stored so."""
        wide = self.directions.to(dtype)
        return wide if self.scales is None else wide.mul_(self.scales)

    def rows(self, start: int, stop: int) -> "DenseMap":
        """Return the map onto the coordinates `start` .. `stop` alone, a view."""
        scales = None if self.scales is None else self.scales[start:stop]
        narrowed = DenseMap(self.directions[:, start:stop], scales)
        narrowed._large = self._large and narrowed.directions.numel() >= ENTERED
        return narrowed

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""
        scales = {} if self.scales is None else {"scales": self.scales}
        return {"directions": self.directions, **scales}

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "DenseMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""
        return DenseMap(fn(self.directions), None if self.scales is None else fn(self.scales))

    def _in_threads(self) -> Tensor | None:
        """Return V^T in parts, one a thread; None where there is one thread, or not enough to do.

        A product with a vector runs in one thread.
        """
        if not self._large or self.directions.device.type != "cpu":
            return None
        parts = in_threads(self.directions)
        return parts if len(parts) > 1 else None

    def _pieces(self) -> Iterator[slice]:
        width = max(1, PIECE // max(1, self.rank))
        return (slice(a, a + width) for a in range(0, self.size, width))


class SparseMap:
    """V that is zero but for some of its rows: k columns of n numbers, at the coordinates `indices`.

    Args:
        size: D.
        indices: where, [n], ascending.
        on_support: V without its zero rows, a map onto n numbers.

    Example:
        >>> v = SparseMap(4, torch.tensor([1, 3]), DenseMap(torch.eye(2)))
        >>> v.expand(torch.tensor([5.0, 6.0])), v.project(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        (tensor([0., 5., 0., 6.]), tensor([2., 4.]))
    """

    def __init__(self, size: int, indices: Tensor, on_support: DenseMap) -> None:
        self.rank, self.size = on_support.rank, size
        self.indices, self.on_support = indices.long(), on_support

    def expand(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""
        out = torch.zeros(self.size, dtype=z.dtype, device=z.device)
        return out.index_copy_(0, self.indices, self.on_support.expand(z))

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D]."""
        moved = start.index_select(0, self.indices)
        self.on_support.displace(moved, z, moved)
        out.copy_(start).index_copy_(0, self.indices, moved)

    def project(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""
        return self.on_support.project(g.index_select(0, self.indices))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return V^T with its zeros, as numbers of a wide format, [k, D]."""
        out = torch.zeros(self.rank, self.size, dtype=dtype, device=self.indices.device)
        out[:, self.indices] = self.on_support.dense(dtype)
        return out

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return from where to where `indices` lie in `start` .. `stop`."""
        first, last = torch.searchsorted(self.indices, torch.tensor([start, stop], device=self.indices.device)).tolist()
        return first, last

    def rows(self, start: int, stop: int) -> "SparseMap":
        """Return the map onto the coordinates `start` .. `stop` alone."""
        first, last = self.span(start, stop)
        return SparseMap(stop - start, self.indices[first:last] - start, self.on_support.rows(first, last))

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""
        narrow = torch.int32 if self.size <= torch.iinfo(torch.int32).max else torch.int64
        return {"indices": self.indices.to(narrow), **self.on_support.tensors()}

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "SparseMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""
        return SparseMap(self.size, fn(self.indices), self.on_support.converted(fn))


class KroneckerMap:
    """V of one matrix of m x n weights: V z = L Z R, where Z is z as a matrix [p, q]; V = L (x) R^T, k = p q.

    It takes p m + q n numbers to store instead of k m n, and V^T G = L^T G R^T costs less than a pass over V would.
    V is orthonormal if the columns of L and the rows of R are.

    Args:
        left: L, [m, p].
        right: R, [q, n].

    Example:
        >>> v = KroneckerMap(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
        >>> v.expand(torch.tensor([5.0])), v.project(torch.arange(6.0))
        (tensor([0., 5., 0., 0., 0., 0.]), tensor([1.]))
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.shape = (left.shape[0], right.shape[1])
        self.rank, self.size = left.shape[1] * right.shape[0], left.shape[0] * right.shape[1]

    def expand(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""
        out = torch.zeros(self.size, dtype=z.dtype, device=z.device)
        self.displace(out, z, out)
        return out

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D]."""
        left = self.left.to(z.dtype) @ z.view(self.left.shape[1], self.right.shape[0])
        torch.addmm(start.view(self.shape), left, self.right.to(z.dtype), out=out.view(self.shape))

    def project(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""
        return (self.left.T.to(g.dtype) @ g.view(self.shape) @ self.right.T.to(g.dtype)).reshape(-1)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return V^T as numbers of a wide format, [k, D]."""
        return torch.kron(self.left.T.to(dtype).contiguous(), self.right.to(dtype).contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""
        return {"left": self.left, "right": self.right}

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "KroneckerMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""
        return KroneckerMap(fn(self.left), fn(self.right))


def _expanded(directions: Tensor, scales: Tensor | None, z: Tensor) -> Tensor:
    """Return V z. A processor reads some directions side by side, an accelerator all, having threads enough."""
    rank, size = directions.shape
    if directions.device.type != "cpu" or rank < ROWS:
        moved = _compiled(_sum_columns)(directions, z)
    else:
        moved = z.new_zeros(size)
        for a in range(0, rank, ROWS):
            first = min(a, rank - ROWS)  # the last group holds some that were added before: not again
            multiples = z[first : first + ROWS]
            if first < a:
                multiples = multiples.clone()
                multiples[: a - first] = 0
            moved = _compiled(_add_rows)(directions[first : first + ROWS], multiples, moved)
    return moved if scales is None else moved.mul_(scales)


def _add_rows(directions: Tensor, z: Tensor, sum_so_far: Tensor) -> Tensor:
    """Add the multiples of so many directions as `ROWS`: the loop over them is the inner one, and unrolled.

    Of a sum over a dimension the compiler makes a loop with large strides, which takes twice the time.
    """
    moved = directions[0].to(z.dtype) * z[0]
    for row in range(1, ROWS):
        moved = moved + directions[row].to(z.dtype) * z[row]
    return sum_so_far + moved


def _sum_columns(directions: Tensor, z: Tensor) -> Tensor:
    return (directions.to(z.dtype) * z[:, None]).sum(0)


def _projected(directions: Tensor, scales: Tensor | None, g: Tensor) -> Tensor:
    """Return V^T g."""
    return _compiled(_sum_rows)(directions, scales, g)


def _sum_rows(directions: Tensor, scales: Tensor | None, g: Tensor) -> Tensor:
    return (directions.to(g.dtype) * (g if scales is None else g * scales)).sum(1)


def _fused(function: Callable[..., Tensor], directions: Tensor, *arguments: Tensor | None) -> Tensor | None:
    """Call `_expanded` or `_projected`; from the first time on that their kernels cannot be compiled, return None.

    Whatever keeps torch from compiling (no compiler, no room for its cache, too many variants, being told not to) has a
    type of its own; not compiled, they would make a wide copy of V.
    """
    kind = directions.device.type
    if kind in _dead or os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return None
    try:
        from torch._dynamo import config

        if config.disable:
            return None
        with config.patch(fail_on_recompile_limit_hit=True, recompile_limit=VARIANTS):
            return function(directions, *arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        _dead[kind] = reason
        warnings.warn(
            f"torch.compile does not work here ({reason:.200}), so directions in bfloat16 and int8 are widened piece "
            "by piece, which takes longer",
            stacklevel=4,
        )
        return None


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def dense_map(directions: Tensor, dtype: torch.dtype) -> DenseMap:
    """Return the map of float32 or float64 directions [k, D], stored in a dtype; the tensor may be reused for it.

    In int8 each coordinate has one scale `s_j = max_i |V_ji| / 127`, itself kept in bfloat16, and V_ji is rounded to
    a whole number of s_j. That is k + 2 bytes a coordinate, and less than s_j / 2 of error in each number (or, where
    rounding s_j down cuts the largest one off, 0.004 of that).
    """
    if dtype != torch.int8:
        return DenseMap(directions.to(dtype))
    rank, size = directions.shape
    place = directions.device
    found = DenseMap(
        torch.empty(rank, size, dtype=torch.int8, device=place), torch.empty(size, dtype=torch.bfloat16, device=place)
    )
    assert found.scales is not None
    for piece in found._pieces():
        wide = directions[:, piece]
        scales = (wide.abs().amax(0) / LEVELS).bfloat16() if rank else torch.zeros(wide.shape[1], device=place)
        scales[scales == 0] = 1.0
        found.scales[piece] = scales
        found.directions[:, piece] = (wide / scales).round_().clamp_(-LEVELS, LEVELS)
    return found


def linear_map(size: int, tensors: Mapping[str, Tensor]) -> LinearMap:
    """Return the map onto `size` numbers that `tensors()` told of."""
    if "slots" in tensors:
        return FastfoodMap(size, *(tensors[part] for part in ("signs", "slots", "gauss")))
    if "left" in tensors:
        return KroneckerMap(tensors["left"], tensors["right"])
    dense = DenseMap(tensors["directions"], tensors.get("scales"))
    return SparseMap(size, tensors["indices"], dense) if "indices" in tensors else dense


def stored_rank(size: int, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return k of the map onto `size` numbers whose `tensors()` have these shapes.

    Raises:
        ValueError: no map has them.
    """
    if "slots" in shapes:
        rank, n, smallest = shapes["signs"][0], power_of_two(size), 1
        expected = {"signs": [rank], "slots": [n], "gauss": [n]}
    elif "left" in shapes:
        (m, p), (q, columns), n, smallest = shapes["left"], shapes["right"], size, 0
        rank, expected = p * q, {"left": [m, p], "right": [q, columns]}
        if m * columns != size or p > m or q > columns:
            raise ValueError(f"the shapes {dict(shapes)} are of no map onto {size} numbers")
    else:
        rank, n, smallest = shapes["directions"][0], shapes["directions"][-1], 0
        expected = {"directions": [rank, n if "indices" in shapes else size]}
        expected |= {part: [n] for part in ("scales", "indices") if part in shapes}
    if {part: list(shape) for part, shape in shapes.items()} != expected or not smallest <= rank <= size or n < rank:
        raise ValueError(f"the shapes {dict(shapes)} are of no map onto {size} numbers")
    return int(rank)


def check_numbers(size: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers that are of no map: NaN, infinite, or places that do not exist.

    Raises:
        ValueError: names the first such tensor.
    """
    for part, values in tensors.items():
        if part in ("slots", "indices"):
            stop = power_of_two(len(tensors["signs"])) if part == "slots" else size
            sound = values.dtype in (torch.int32, torch.int64)
            if sound and len(values):
                sound = int(values.min()) >= 0 and int(values.max()) < stop
            if sound and part == "indices":
                sound = bool((values[1:] > values[:-1]).all())
        elif part == "directions" and "scales" in tensors:
            sound = values.dtype == torch.int8
        else:
            sound = values.dtype.is_floating_point and finite(values)
        if not sound:
            raise ValueError(f"{part} holds NaN, infinite or impossible numbers")
