"""What a linear map V of one block is: k coordinates to the block's D numbers, with its adjoint.

A kind of map is one class in one file, which `register_map` gives a name. Files of bases name the kind, and the class
reads them; nothing outside of these files asks of which class a map is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from tinyspan.registry import Registry
from tinyspan.weights import finite

__all__ = ["MAPS", "LinearMap", "are_positions", "kind_of", "metadata_of", "register_map", "require_shapes"]

KIND = "kind"  # under which the metadata of a block's file name the kind of its map


class LinearMap(ABC):
    """V of one block, from k = `rank` coordinates to D = `size` numbers; named as SciPy's `LinearOperator`.

    A subclass sets `rank` and `size`, and defines `matvec`, `rmatvec`, `tensors`, `converted`, `from_tensors`,
    `stored_rank` and `examples`. What else there is follows from these, and is overridden where the map can do better.

    A map that costs less on some of its rows alone defines `rows`; the model is then moved, and gradients are
    projected, parameter by parameter instead of block by block. A map that is zero in all but some of its rows defines
    `support` and `on_support`, and also `rows`; theta_0 is then kept, and weights are written, on the support alone.

    Attributes:
        kind: the name under which the class is registered.
        is_orthonormal: whether V^T V is the identity in every map of the kind (up to the rounding of the format of its
            numbers); None where it depends on the numbers, which are then taken for orthonormal.
        rank: k.
        size: D.
    """

    kind: ClassVar[str]
    is_orthonormal: ClassVar[bool | None] = None
    rank: int
    size: int

    # -- the product and its adjoint ----------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(D, k), the shape of V."""
        return self.size, self.rank

    @abstractmethod
    def matvec(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""

    @abstractmethod
    def rmatvec(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D], which may be the same tensor."""
        torch.add(start, self.matvec(z), out=out)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return V^T as numbers of a wide format, [k, D]."""
        device = next(iter(self.tensors().values())).device
        columns = [self.matvec(unit) for unit in torch.eye(self.rank, dtype=dtype, device=device)]
        return torch.stack(columns) if columns else torch.zeros(0, self.size, dtype=dtype, device=device)

    def fit_product(self, left: Tensor, right: Tensor) -> tuple[Tensor, float]:
        """Return `z = V^T vec(L R)` in float64 and `||vec(L R) - V z||^2`, of factors [m, r] and [r, n]; D = m n."""
        update = (left.double() @ right.double()).reshape(-1)
        z = self.rmatvec(update)
        return z, float((update - self.matvec(z)).square().sum())

    # -- a part of it -------------------------------------------------------------------------------------------------

    @property
    def support(self) -> Tensor | None:
        """The ascending coordinates [n] in which V is not zero, or None where it may be nonzero in all of them."""
        return None

    @property
    def on_support(self) -> "LinearMap":
        """V without the rows that are not in the support, a map onto n numbers; V itself if there is no support."""
        return self

    def rows(self, start: int, stop: int) -> "LinearMap | None":
        """Return the map onto the coordinates `start` .. `stop` alone, None if it would cost as much as the whole.

        Its support is the map's own between the two, counted from `start`, and None where the map has none.
        """
        return None

    # -- its numbers --------------------------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, and what a block's file holds, by name; `spectrum` is taken."""

    @abstractmethod
    def converted(self, fn: Callable[[Tensor], Tensor]) -> "LinearMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, size: int, tensors: Mapping[str, Tensor]) -> "LinearMap":
        """Return the map onto `size` numbers of which `tensors` returned these."""

    @classmethod
    @abstractmethod
    def stored_rank(cls, size: int, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return k of the map onto `size` numbers whose `tensors` have these shapes.

        Raises:
            ValueError: no map of the kind has them; see `require_shapes`.
        """

    @classmethod
    def check_numbers(cls, size: int, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors, whose shapes `stored_rank` has passed, with numbers that are of no map.

        Raises:
            ValueError: names the first such tensor.
        """
        for part in tensors:
            if not cls.is_sound(part, size, tensors):
                raise ValueError(f"{part} holds NaN, infinite or impossible numbers")

    @classmethod
    def is_sound(cls, part: str, size: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a map can have the numbers of one of its tensors: by default finite floating-point numbers."""
        return tensors[part].dtype.is_floating_point and finite(tensors[part])

    @classmethod
    @abstractmethod
    def examples(cls, generator: torch.Generator) -> "Iterator[LinearMap]":
        """Yield small maps of several shapes and formats, with which the contract tests try the kind."""


MAPS: Registry[type[LinearMap]] = Registry("kind of map")
Kind = TypeVar("Kind", bound=type[LinearMap])


def register_map(kind: str) -> Callable[[Kind], Kind]:
    """Register a class of maps under the name by which files of bases call it.

    Example:
        >>> sorted(MAPS)
        ['dense', 'fastfood', 'kronecker', 'sparse']
        >>> MAPS["dense"].kind
        'dense'
    """

    def register(cls: Kind) -> Kind:
        MAPS.add(kind, cls)
        cls.kind = kind
        return cls

    return register


FIRST_KINDS = {"slots": "fastfood", "left": "kronecker", "indices": "sparse", "directions": "dense"}


def kind_of(names: Collection[str], metadata: Mapping[str, str] | None) -> type[LinearMap]:
    """Return the class that reads a block's file.

    Files of the four first kinds do not name their kind; the names of their tensors tell it.

    Args:
        names: of the tensors in the file.
        metadata: of the file.

    Raises:
        InputError: no class is registered for the kind.
        ValueError: the file names no kind, and holds none of the first four.
    """
    kind = (metadata or {}).get(KIND) or next((kind for name, kind in FIRST_KINDS.items() if name in names), None)
    if kind is None:
        raise ValueError(f"the tensors {sorted(names)!r:.200} are of no map")
    return MAPS[kind]


def metadata_of(kind: str) -> dict[str, str] | None:
    """Return the metadata of a block's file: its kind, or None of the four first ones.

    Their files have been written without, and stay the same to the byte: adapters name a basis by the hash of them.
    """
    return None if kind in FIRST_KINDS.values() else {KIND: kind}


def require_shapes(
    size: int, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], sound: bool = True
) -> None:
    """Refuse stored shapes that are not the expected ones, or not `sound`.

    Raises:
        ValueError: the shapes are of no map.
    """
    if not sound or {part: list(shape) for part, shape in shapes.items()} != expected:
        raise ValueError(f"the shapes {dict(shapes)} are of no map onto {size} numbers")


def are_positions(values: Tensor, stop: int) -> bool:
    """Whether all values are whole numbers from 0 to `stop` - 1."""
    if values.dtype not in (torch.int32, torch.int64):
        return False
    return not len(values) or (int(values.min()) >= 0 and int(values.max()) < stop)
