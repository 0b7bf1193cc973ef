"""The Kronecker map: the product of two small matrices, one for each side of a weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tinyspan.linalg import squared_norm
from tinyspan.maps.base import LinearMap, register_map, require_shapes

__all__ = ["KroneckerMap"]


@register_map("kronecker")
class KroneckerMap(LinearMap):
    """V of one matrix of m x n weights: V z = L Z R, where Z is z as a matrix [p, q]; V = L (x) R^T, k = p q.

    It takes p m + q n numbers to store instead of k m n, and V^T G = L^T G R^T costs less than a pass over V would.
    V is orthonormal if the columns of L and the rows of R are.

    Args:
        left: L, [m, p].
        right: R, [q, n].

    Example:
        >>> v = KroneckerMap(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
        >>> v.matvec(torch.tensor([5.0])), v.rmatvec(torch.arange(6.0))
        (tensor([0., 5., 0., 0., 0., 0.]), tensor([1.]))
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self._matrix = (left.shape[0], right.shape[1])
        self.rank, self.size = left.shape[1] * right.shape[0], left.shape[0] * right.shape[1]

    def matvec(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""
        out = torch.zeros(self.size, dtype=z.dtype, device=z.device)
        self.displace(out, z, out)
        return out

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D]."""
        left = self.left.to(z.dtype) @ z.view(self.left.shape[1], self.right.shape[0])
        torch.addmm(start.view(self._matrix), left, self.right.to(z.dtype), out=out.view(self._matrix))

    def rmatvec(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""
        return (self.left.T.to(g.dtype) @ g.view(self._matrix) @ self.right.T.to(g.dtype)).reshape(-1)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return V^T as numbers of a wide format, [k, D]."""
        return torch.kron(self.left.T.to(dtype).contiguous(), self.right.to(dtype).contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""
        return {"left": self.left, "right": self.right}

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "KroneckerMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""
        return KroneckerMap(fn(self.left), fn(self.right))

    def fit_product(self, left: Tensor, right: Tensor) -> tuple[Tensor, float]:
        """Return `z = V^T vec(B A)` in float64 and `||vec(B A) - V z||^2`, of factors B and A; B A is never made.

        With `B = L (L^T B) + B'` and `A = (A R^T) R + A'` the residual `B' A + L (L^T B) A'` is a sum of orthogonal
        parts.
        """
        own_left, own_right, b, a = (tensor.double() for tensor in (self.left, self.right, left, right))
        inner, outer = own_left.T @ b, a @ own_right.T
        residual = squared_norm(b - own_left @ inner, a) + squared_norm(inner, a - outer @ own_right)
        return (inner @ outer).reshape(-1), residual

    @classmethod
    def from_tensors(cls, size: int, tensors: Mapping[str, Tensor]) -> "KroneckerMap":
        """Return the map onto `size` numbers of which `tensors` returned these."""
        return cls(tensors["left"], tensors["right"])

    @classmethod
    def stored_rank(cls, size: int, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return k of the map onto `size` numbers whose `tensors` have these shapes."""
        (m, p), (q, n) = shapes["left"], shapes["right"]
        require_shapes(size, shapes, {"left": [m, p], "right": [q, n]}, m * n == size and p <= m and q <= n)
        return p * q

    @classmethod
    def examples(cls, generator: torch.Generator) -> Iterator["KroneckerMap"]:
        """Yield small maps of several shapes."""
        for m, p, q, n in ((1, 1, 1, 1), (3, 2, 1, 4), (4, 3, 2, 2), (2, 1, 3, 5)):
            for dtype in (torch.float64, torch.float32):
                left, right = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((m, p), (q, n)))
                yield cls(left, right)
