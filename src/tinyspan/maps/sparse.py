"""The sparse map: directions on some of the coordinates alone, zero everywhere else."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tinyspan.maps.base import LinearMap, are_positions, register_map, require_shapes
from tinyspan.maps.dense import DenseMap

__all__ = ["SparseMap"]


@register_map("sparse")
class SparseMap(LinearMap):
    """V that is zero but for some of its rows: k columns of n numbers, at the coordinates `indices`.

    Args:
        size: D.
        indices: where, [n], ascending.
        on_support: V without its zero rows, a map onto n numbers.

    Example:
        >>> v = SparseMap(4, torch.tensor([1, 3]), DenseMap(torch.eye(2)))
        >>> v.matvec(torch.tensor([5.0, 6.0])), v.rmatvec(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        (tensor([0., 5., 0., 6.]), tensor([2., 4.]))
    """

    def __init__(self, size: int, indices: Tensor, on_support: DenseMap) -> None:
        self.rank, self.size = on_support.rank, size
        self.indices, self._on_support = indices.long(), on_support

    def matvec(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""
        out = torch.zeros(self.size, dtype=z.dtype, device=z.device)
        return out.index_copy_(0, self.indices, self.on_support.matvec(z))

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D]."""
        moved = start.index_select(0, self.indices)
        self.on_support.displace(moved, z, moved)
        out.copy_(start).index_copy_(0, self.indices, moved)

    def rmatvec(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""
        return self.on_support.rmatvec(g.index_select(0, self.indices))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return V^T with its zeros, as numbers of a wide format, [k, D]."""
        out = torch.zeros(self.rank, self.size, dtype=dtype, device=self.indices.device)
        out[:, self.indices] = self.on_support.dense(dtype)
        return out

    @property
    def support(self) -> Tensor:
        """The ascending coordinates [n] in which V is not zero."""
        return self.indices

    @property
    def on_support(self) -> DenseMap:
        """V without its zero rows, a map onto n numbers."""
        return self._on_support

    def rows(self, start: int, stop: int) -> "SparseMap":
        """Return the map onto the coordinates `start` .. `stop` alone."""
        first, last = torch.searchsorted(self.indices, torch.tensor([start, stop], device=self.indices.device)).tolist()
        return SparseMap(stop - start, self.indices[first:last] - start, self.on_support.rows(first, last))

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""
        narrow = torch.int32 if self.size <= torch.iinfo(torch.int32).max else torch.int64
        return {"indices": self.indices.to(narrow), **self.on_support.tensors()}

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "SparseMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""
        return SparseMap(self.size, fn(self.indices), self.on_support.converted(fn))

    @classmethod
    def from_tensors(cls, size: int, tensors: Mapping[str, Tensor]) -> "SparseMap":
        """Return the map onto `size` numbers of which `tensors` returned these."""
        return cls(size, tensors["indices"], DenseMap.from_tensors(len(tensors["indices"]), tensors))

    @classmethod
    def stored_rank(cls, size: int, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return k of the map onto `size` numbers whose `tensors` have these shapes."""
        (n,) = shapes["indices"]
        require_shapes(size, {"indices": shapes["indices"]}, {"indices": [n]}, n <= size)
        return DenseMap.stored_rank(n, {part: shape for part, shape in shapes.items() if part != "indices"})

    @classmethod
    def is_sound(cls, part: str, size: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a map can have the numbers of one of its tensors: indices ascend below `size`."""
        if part != "indices":
            return DenseMap.is_sound(part, size, tensors)
        indices = tensors[part]
        return are_positions(indices, size) and bool((indices[1:] > indices[:-1]).all())

    @classmethod
    def examples(cls, generator: torch.Generator) -> Iterator["SparseMap"]:
        """Yield small maps of several shapes and formats, on all, some and none of the coordinates."""
        for on_support in DenseMap.examples(generator):
            for size in (on_support.size, on_support.size + 7):
                indices = torch.randperm(size, generator=generator)[: on_support.size].sort().values
                yield cls(size, indices, on_support)
        yield cls(3, torch.zeros(0, dtype=torch.int64), DenseMap(torch.zeros(0, 0)))
