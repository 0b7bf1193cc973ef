"""The dense map: directions one after the other, [k, D], in float32, float64, bfloat16 or int8.

What is computed with a reduced format is the exact map of the numbers as they are stored, and its exact adjoint. Large
maps are widened by compiled kernels (`kernels`); small ones, and all on machines without a compiler, piece by piece.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tinyspan.linalg import in_threads
from tinyspan.maps.base import LinearMap, register_map, require_shapes
from tinyspan.maps.kernels import fused_matvec, fused_rmatvec

__all__ = ["DenseMap", "dense_map"]

PIECE = 1 << 21  # numbers of V widened at once; in float32 they take 8 MB
FUSED = 1 << 22  # numbers from which on a map is worth a compiled kernel, in a reduced format, or several threads
ENTERED = 1 << 15  # numbers from which on a part of such a map is: below, entering the kernel takes longer
LEVELS = 127  # int8 holds -127 .. 127


@register_map("dense")
class DenseMap(LinearMap):
    """V held as its directions, a tensor [k, D] of which row i is the i-th column of V.

    Args:
        directions: floating-point numbers, or int8.
        scales: [D], of int8 directions: column i of V is `directions[i] * scales`. See `dense_map`.

    Example:
        >>> v = DenseMap(torch.eye(2, 3))
        >>> v.matvec(torch.tensor([1.0, 2.0])), v.rmatvec(torch.tensor([3.0, 4.0, 5.0]))
        (tensor([1., 2., 0.]), tensor([3., 4.]))
    """

    def __init__(self, directions: Tensor, scales: Tensor | None = None) -> None:
        self.directions, self.scales = directions, scales
        self.rank, self.size = directions.shape
        self._large = directions.numel() >= FUSED

    def matvec(self, z: Tensor) -> Tensor:
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
        if self._large and (moved := fused_matvec(self.directions, self.scales, z)) is not None:
            torch.add(start, moved, out=out)
            return
        for piece in self._pieces():
            moved = self.directions[:, piece].to(z.dtype).T @ z
            if self.scales is not None:
                moved *= self.scales[piece]
            torch.add(start[piece], moved, out=out[piece])

    def rmatvec(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g; one read of V."""
        if self.directions.dtype == g.dtype:
            if (parts := self._in_threads()) is None:
                return self.directions @ g
            return torch.bmm(g.view(len(parts), 1, -1), parts.mT).sum((0, 1))
        if self._large and (product := fused_rmatvec(self.directions, self.scales, g)) is not None:
            return product
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

    @classmethod
    def from_tensors(cls, size: int, tensors: Mapping[str, Tensor]) -> "DenseMap":
        """Return the map onto `size` numbers of which `tensors` returned these."""
        return cls(tensors["directions"], tensors.get("scales"))

    @classmethod
    def stored_rank(cls, size: int, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return k of the map onto `size` numbers whose `tensors` have these shapes."""
        rank = shapes["directions"][0]
        expected = {"directions": [rank, size]} | ({"scales": [size]} if "scales" in shapes else {})
        require_shapes(size, shapes, expected, rank <= size)
        return rank

    @classmethod
    def is_sound(cls, part: str, size: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a map can have the numbers of one of its tensors: directions with scales are int8."""
        if part == "directions" and "scales" in tensors:
            return tensors[part].dtype == torch.int8
        return super().is_sound(part, size, tensors)

    @classmethod
    def examples(cls, generator: torch.Generator) -> Iterator["DenseMap"]:
        """Yield small maps of several shapes and formats."""
        for rank, size in ((1, 1), (3, 10), (0, 4), (5, 5)):
            directions = torch.randn(rank, size, generator=generator, dtype=torch.float64)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
                yield dense_map(directions, dtype)

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
