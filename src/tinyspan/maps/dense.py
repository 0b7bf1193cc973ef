"""The dense map: a tensor of directions [k, D] in float32, float64, bfloat16 or int8.

Products with a reduced format use the stored values without further rounding, in both the map and its adjoint. Large
maps are converted to the wide format by compiled kernels (`kernels`). Smaller maps, for which compiling takes longer
than it saves, and all maps on machines without a compiler, are converted piece by piece.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tinyspan.linalg import in_threads
from tinyspan.maps.base import LinearMap, register_map, require_shapes
from tinyspan.maps.kernels import fused_matvec, fused_rmatvec

__all__ = ["DenseMap", "dense_map"]

PIECE = 1 << 20  # elements of V converted at once; 4 MB in float32
FUSED = 1 << 22  # elements from which on several threads, or on an accelerator compiled kernels, are faster
COMPILED = 1 << 24  # elements of a reduced format on a CPU from which on kernels save more time than compiling takes
ENTERED = 1 << 15  # the same for the rows of a large map; below, calling the kernel takes longer
LEVELS = 127  # largest absolute value of int8 directions


@register_map("dense")
class DenseMap(LinearMap):
    """V as a tensor of its directions [k, D]; `directions[i]` is the i-th column of V.

    Args:
        directions: tensor [k, D] of a floating-point dtype or int8.
        scales: scales [D] of int8 directions: column i of V is `directions[i] * scales`. See `dense_map`.

    Example:
        >>> v = DenseMap(torch.eye(2, 3))
        >>> v.matvec(torch.tensor([1.0, 2.0])), v.rmatvec(torch.tensor([3.0, 4.0, 5.0]))
        (tensor([1., 2., 0.]), tensor([3., 4.]))
    """

    def __init__(self, directions: Tensor, scales: Tensor | None = None) -> None:
        self.directions, self.scales = directions, scales
        self.rank, self.size = directions.shape
        is_reduced = directions.dtype.itemsize < 4 and directions.device.type == "cpu"
        self._large = directions.numel() >= (COMPILED if is_reduced else FUSED)

    def matvec(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""
        out = torch.zeros(self.size, dtype=z.dtype, device=z.device)
        self.displace(out, z, out)
        return out

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D], in one pass over V."""
        if self.directions.dtype == z.dtype:
            if (parts := self._in_threads()) is None:
                torch.addmv(start, self.directions.T, z, out=out)
            else:
                split = (len(parts), 1, parts.shape[2])
                torch.baddbmm(start.view(split), z.expand(len(parts), 1, -1), parts, out=out.view(split))
            return
        if self._large and (product := fused_matvec(self.directions, self.scales, z)) is not None:
            torch.add(start, product, out=out)
            return
        for piece, wide in self._wide_pieces(z.dtype):
            if self.scales is None:
                torch.addmv(start[piece], wide.T, z, out=out[piece])
            else:
                torch.addcmul(start[piece], wide.T @ z, self.scales[piece], out=out[piece])

    def rmatvec(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g, in one pass over V."""
        if self.directions.dtype == g.dtype:
            if (parts := self._in_threads()) is None:
                return self.directions @ g
            return torch.bmm(g.view(len(parts), 1, -1), parts.mT).sum((0, 1))
        if self._large and (product := fused_rmatvec(self.directions, self.scales, g)) is not None:
            return product
        out = torch.zeros(self.rank, dtype=g.dtype, device=g.device)
        for piece, wide in self._wide_pieces(g.dtype):
            scaled = g[piece] if self.scales is None else g[piece] * self.scales[piece]
            out += wide @ scaled
        return out

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return V^T as a dense tensor [k, D] in float32 or float64; a copy unless the directions have this dtype."""
        wide = self.directions.to(dtype)
        return wide if self.scales is None else wide.mul_(self.scales)

    def rows(self, start: int, stop: int) -> "DenseMap":
        """Return the map of rows `start` .. `stop` - 1 of V, a view."""
        scales = None if self.scales is None else self.scales[start:stop]
        narrowed = DenseMap(self.directions[:, start:stop], scales)
        narrowed._large = self._large and narrowed.directions.numel() >= ENTERED
        return narrowed

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define the map, by name."""
        scales = {} if self.scales is None else {"scales": self.scales}
        return {"directions": self.directions, **scales}

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "DenseMap":
        """Return the map with `fn` applied to its tensors, for example a move to a device."""
        return DenseMap(fn(self.directions), None if self.scales is None else fn(self.scales))

    @classmethod
    def from_tensors(cls, size: int, tensors: Mapping[str, Tensor]) -> "DenseMap":
        """Return the map onto `size` numbers that is defined by these tensors; inverse of `tensors`."""
        return cls(tensors["directions"], tensors.get("scales"))

    @classmethod
    def stored_rank(cls, size: int, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the rank k of a map onto `size` numbers from the shapes of its tensors."""
        rank = shapes["directions"][0]
        expected = {"directions": [rank, size]} | ({"scales": [size]} if "scales" in shapes else {})
        require_shapes(size, shapes, expected, rank <= size)
        return rank

    @classmethod
    def is_sound(cls, part: str, size: int, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the values of one tensor are valid: directions with scales are int8."""
        if part == "directions" and "scales" in tensors:
            return tensors[part].dtype == torch.int8
        return super().is_sound(part, size, tensors)

    @classmethod
    def examples(cls, generator: torch.Generator) -> Iterator["DenseMap"]:
        """Yield small maps of several shapes and formats."""
        for rank, size in ((1, 1), (3, 10), (0, 4), (5, 5)):
            directions = torch.randn(rank, size, generator=generator, dtype=torch.float64)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8):
                yield dense_map(directions, dtype)

    def _in_threads(self) -> Tensor | None:
        """Return V^T split into one part per thread; None if there is one thread or the map is too small.

        Torch computes a matrix-vector product in one thread, but a batch of them in several.
        """
        if not self._large or self.directions.device.type != "cpu":
            return None
        parts = in_threads(self.directions)
        return parts if len(parts) > 1 else None

    def _wide_pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield pieces of V and their directions, without scales, in a dtype; each is valid until the next one.

        All are in the same memory: allocating new memory for each would take as long as the product.
        """
        memory = self.directions.new_empty(0, 0, dtype=dtype)
        for piece in self._pieces():
            narrow = self.directions[:, piece]
            if memory.shape[1] < narrow.shape[1]:
                memory = narrow.new_empty(narrow.shape, dtype=dtype)
            yield piece, memory[:, : narrow.shape[1]].copy_(narrow)

    def _pieces(self) -> Iterator[slice]:
        width = max(1, PIECE // max(1, self.rank))
        return (slice(a, a + width) for a in range(0, self.size, width))


def dense_map(directions: Tensor, dtype: torch.dtype) -> DenseMap:
    """Return the map of float32 or float64 directions [k, D], stored in a dtype; the map may share the tensor's memory.

    In int8 each coordinate has one scale `s_j = max_i |V_ji| / 127`, stored in bfloat16, and V_ji is rounded to an
    integer multiple of s_j. This takes k + 2 bytes per coordinate, and the error of each value is less than s_j / 2
    (or, where s_j is rounded down and the largest value is clamped, 0.004 of that value).
    """
    if dtype != torch.int8:
        return DenseMap(directions.to(dtype))
    rank, size = directions.shape
    place = directions.device
    stored = DenseMap(
        torch.empty(rank, size, dtype=torch.int8, device=place), torch.empty(size, dtype=torch.bfloat16, device=place)
    )
    assert stored.scales is not None
    for piece in stored._pieces():
        wide = directions[:, piece]
        scales = (wide.abs().amax(0) / LEVELS).bfloat16() if rank else torch.zeros(wide.shape[1], device=place)
        scales[scales == 0] = 1.0
        stored.scales[piece] = scales
        stored.directions[:, piece] = (wide / scales).round_().clamp_(-LEVELS, LEVELS)
    return stored
