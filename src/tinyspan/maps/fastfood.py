"""A random linear map that is never written out: Fastfood (Le et al. 2013), read along its first k columns."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tinyspan.maps.base import LinearMap, are_positions, register_map, require_shapes

__all__ = ["FastfoodMap", "power_of_two", "walsh_hadamard"]

AXIS = 5  # the transform multiplies by Hadamard matrices of at most 2^5 rows, the fastest size on one CPU core
PIECE = 1 << 20  # numbers that are summed at once in float64


@register_map("fastfood")
class FastfoodMap(LinearMap):
    """The first D rows and k columns of `V = H G Pi H B / (sqrt(D) |G|)`, in O(n) memory and O(n log n) time.

    n is the smallest power of two that is at least D; H is the n x n Hadamard matrix in Sylvester's order; B holds
    random signs, Pi is a random permutation and G a diagonal of standard normal numbers (Le, Sarlos and Smola 2013).
    Aghajanyan et al. (2021) train language models in this map.

    Before it is divided, each entry of V is the sum of G's n numbers with signs, which makes E V^T V the identity and
    `E |V z|^2 = |z|^2`. Where D is a power of two every column has norm 1 exactly. Columns are orthogonal only on
    average.

    z has k numbers and the other n - k are zero: H B z repeats H_m B z, m the smallest power of two that is at least
    k, n / m times. So Pi is kept as `slots`, the position in that short vector which each of the n places reads, and
    one transform of length n is left per call.

    Args:
        size: D.
        signs: diagonal of B, [k].
        slots: integers below m, [n].
        gauss: diagonal of `G / (sqrt(D) |G|)`, [n].

    Example:
        >>> v = FastfoodMap.draw(3, 5, torch.Generator().manual_seed(0))
        >>> z, g = torch.tensor([1.0, 2.0, 3.0]), torch.arange(5.0)
        >>> v.matvec(z).shape, v.rmatvec(g).shape
        (torch.Size([5]), torch.Size([3]))
        >>> torch.allclose(v.matvec(z) @ g, z @ v.rmatvec(g))
        True
    """

    is_orthonormal = False

    def __init__(self, size: int, signs: Tensor, slots: Tensor, gauss: Tensor) -> None:
        self.rank, self.size = len(signs), size
        self.signs, self.slots, self.gauss = signs, slots, gauss

    @classmethod
    def draw(cls, rank: int, size: int, generator: torch.Generator) -> "FastfoodMap":
        """Draw G, Pi and B in this order; needs 1 <= rank <= size."""
        n, m = power_of_two(size), power_of_two(rank)
        gauss = torch.randn(n, generator=generator, dtype=torch.float32)
        gauss /= size**0.5 * torch.linalg.vector_norm(gauss, dtype=torch.float64)
        slots = torch.randperm(n, generator=generator, dtype=torch.int32).bitwise_and_(m - 1)
        signs = 2 * torch.randint(2, (rank,), generator=generator, dtype=torch.float32) - 1
        return cls(size, signs, slots, gauss)

    def matvec(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""
        short = walsh_hadamard(pad(self.signs.to(z.dtype) * z, (0, power_of_two(self.rank) - self.rank)))
        return walsh_hadamard(short.index_select(0, self.slots) * self.gauss.to(z.dtype))[: self.size]

    def rmatvec(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""
        long = walsh_hadamard(pad(g, (0, len(self.gauss) - self.size))) * self.gauss.to(g.dtype)
        short = torch.zeros(power_of_two(self.rank), dtype=torch.float64, device=g.device)  # sums of n / m numbers
        for slots, piece in zip(self.slots.split(PIECE), long.split(PIECE), strict=True):
            short.index_add_(0, slots, piece.double())
        return self.signs.to(g.dtype) * walsh_hadamard(short)[: self.rank].to(g.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""
        return {"signs": self.signs, "slots": self.slots, "gauss": self.gauss}

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "FastfoodMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""
        return FastfoodMap(self.size, fn(self.signs), fn(self.slots), fn(self.gauss))

    @classmethod
    def from_tensors(cls, size: int, tensors: Mapping[str, Tensor]) -> "FastfoodMap":
        """Return the map onto `size` numbers of which `tensors` returned these."""
        return cls(size, tensors["signs"], tensors["slots"], tensors["gauss"])

    @classmethod
    def stored_rank(cls, size: int, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return k of the map onto `size` numbers whose `tensors` have these shapes."""
        rank, n = shapes["signs"][0], power_of_two(size)
        require_shapes(size, shapes, {"signs": [rank], "slots": [n], "gauss": [n]}, 1 <= rank <= size)
        return rank

    @classmethod
    def is_sound(cls, part: str, size: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a map can have the numbers of one of its tensors: slots are positions in the short vector."""
        if part == "slots":
            return are_positions(tensors[part], power_of_two(len(tensors["signs"])))
        return super().is_sound(part, size, tensors)

    @classmethod
    def examples(cls, generator: torch.Generator) -> Iterator["FastfoodMap"]:
        """Yield small maps of several shapes."""
        for rank, size in ((1, 1), (1, 9), (3, 5), (7, 8), (12, 40)):
            yield cls.draw(rank, size, generator)


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return H_n x for a vector of n = 2^b numbers, not normalised: applied twice it gives n x.

    H_n is the Kronecker product of smaller Hadamard matrices, so x is read as an array of a few axes, each of which is
    multiplied by its own. Every product takes the first axis and leaves it as the last, until the order is the old one.

    Example:
        >>> walsh_hadamard(torch.tensor([1.0, 0.0, 2.0, 0.0]))
        tensor([ 3.,  3., -1., -1.])
    """
    bits = len(x).bit_length() - 1
    axes = -(-bits // AXIS)
    for axis in range(axes):
        size = 1 << (bits * (axis + 1) // axes - bits * axis // axes)
        x = x.reshape(size, -1).T @ _hadamard(size).to(x)
    return x.reshape(-1)


def _hadamard(size: int) -> Tensor:
    """Return H_n in Sylvester's order for n = 2^b, [n, n]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
