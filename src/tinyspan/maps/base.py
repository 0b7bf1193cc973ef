"""The interface of a linear map V of one block, from k coordinates to the block's D numbers, with its adjoint.

Each kind of map is one class in one file, registered under a name by `register_map`. The files of a basis contain the
name, and the class reads them. Other modules do not depend on the class of a map.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from tinyspan.registry import Registry
from tinyspan.weights import finite

__all__ = ["MAPS", "LinearMap", "are_positions", "kind_of", "metadata_of", "register_map", "require_shapes"]

KIND = "kind"  # metadata key of a block's file for the kind of its map


class LinearMap(ABC):
    """V of one block, from k = `rank` coordinates to D = `size` numbers, with the method names of SciPy's operators.

    A subclass sets `rank` and `size`, and defines `matvec`, `rmatvec`, `tensors`, `converted`, `from_tensors`,
    `stored_rank` and `examples`. The other methods have default implementations, which a subclass may override with
    faster ones.

    A map whose products are cheaper on a range of its rows defines `rows`; comparisons then read trajectories piece by
    piece, and derivatives of a function of z need no vector as long as the block. A map with rows that are always zero
    defines `support`, `on_support` and `rows`; theta_0 is then stored, and weights are written, only on the support.

    Attributes:
        kind: name under which the class is registered.
        is_orthonormal: whether V^T V is the identity for every map of the kind, up to rounding in the stored format;
            None if it depends on the values, which are then assumed to be orthonormal.
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rank} directions of {self.size:,} numbers)"

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`; `start` and `out`, both [D], may be the same tensor."""
        torch.add(start, self.matvec(z), out=out)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return V^T as a dense tensor [k, D] in float32 or float64."""
        device = next(iter(self.tensors().values())).device
        columns = [self.matvec(unit) for unit in torch.eye(self.rank, dtype=dtype, device=device)]
        return torch.stack(columns) if columns else torch.zeros(0, self.size, dtype=dtype, device=device)

    def fit_product(self, left: Tensor, right: Tensor) -> tuple[Tensor, float]:
        """Return `z = V^T vec(L R)` in float64 and `||vec(L R) - V z||^2`, for factors [m, r] and [r, n]; D = m n."""
        update = (left.double() @ right.double()).reshape(-1)
        z = self.rmatvec(update)
        return z, float((update - self.matvec(z)).square().sum())

    # -- rows --------------------------------------------------------------------------------------------------------

    @property
    def support(self) -> Tensor | None:
        """Ascending indices [n] of the rows of V that can be nonzero; None if all rows can be."""
        return None

    @property
    def on_support(self) -> "LinearMap":
        """V restricted to its support, a map onto n numbers; V itself if `support` is None."""
        return self

    def rows(self, start: int, stop: int) -> "LinearMap | None":
        """Return the map of rows `start` .. `stop` - 1 of V; None if its products cost as much as those of V.

        The support of the result is the part of `support` in this range, counted from `start`, or None like `support`.
        """
        return None

    # -- tensors ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define the map and are stored in a block's file; the name `spectrum` is reserved."""

    @abstractmethod
    def converted(self, fn: Callable[[Tensor], Tensor]) -> "LinearMap":
        """Return the map with `fn` applied to its tensors, for example a move to a device."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, size: int, tensors: Mapping[str, Tensor]) -> "LinearMap":
        """Return the map onto `size` numbers that is defined by these tensors; inverse of `tensors`."""

    @classmethod
    @abstractmethod
    def stored_rank(cls, size: int, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the rank k of a map onto `size` numbers from the shapes of its tensors.

        Raises:
            ValueError: a map of this kind cannot have these shapes; see `require_shapes`.
        """

    @classmethod
    def check_numbers(cls, size: int, tensors: Mapping[str, Tensor]) -> None:
        """Check the values of tensors whose shapes were accepted by `stored_rank`.

        Raises:
            ValueError: a tensor has values that a map of this kind cannot have.
        """
        for part in tensors:
            if not cls.is_sound(part, size, tensors):
                raise ValueError(f"{part} holds NaN, infinite or impossible numbers")

    @classmethod
    def is_sound(cls, part: str, size: int, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the values of one tensor are valid: by default finite floating-point numbers."""
        return tensors[part].dtype.is_floating_point and finite(tensors[part])

    @classmethod
    @abstractmethod
    def examples(cls, generator: torch.Generator) -> "Iterator[LinearMap]":
        """Yield small maps of several shapes and formats, for the contract tests."""


MAPS: Registry[type[LinearMap]] = Registry("kind of map")
Kind = TypeVar("Kind", bound=type[LinearMap])


def register_map(kind: str) -> Callable[[Kind], Kind]:
    """Register a class of maps under the name that the files of a basis contain.

    Example:
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

    Files of the first four kinds do not contain the name of their kind; it follows from the names of their tensors.

    Args:
        names: names of the tensors in the file.
        metadata: metadata of the file.

    Raises:
        InputError: no class is registered for the kind.
        ValueError: the file contains neither the name of a kind nor the tensors of one of the first four kinds.
    """
    kind = (metadata or {}).get(KIND) or next((kind for name, kind in FIRST_KINDS.items() if name in names), None)
    if kind is None:
        raise ValueError(f"the tensors {sorted(names)!r:.200} do not belong to a linear map")
    return MAPS[kind]


def metadata_of(kind: str) -> dict[str, str] | None:
    """Return the metadata of a block's file: its kind, or None for the first four kinds.

    Files of these kinds were first written without metadata. They must stay identical byte by byte, because adapters
    identify a basis by the hash of its files.
    """
    return None if kind in FIRST_KINDS.values() else {KIND: kind}


def require_shapes(
    size: int, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], sound: bool = True
) -> None:
    """Check the shapes of stored tensors.

    Args:
        size: D, for the message.
        shapes: name of the tensor -> stored shape.
        expected: name of the tensor -> expected shape.
        sound: whether all further conditions on the shapes hold.

    Raises:
        ValueError: the shapes differ from the expected ones, or `sound` is false.
    """
    if not sound or {part: list(shape) for part, shape in shapes.items()} != expected:
        raise ValueError(f"the shapes {dict(shapes)} do not belong to a linear map onto {size} numbers")


def are_positions(values: Tensor, stop: int) -> bool:
    """Return whether all values are integers from 0 to `stop` - 1."""
    if values.dtype not in (torch.int32, torch.int64):
        return False
    return not len(values) or (int(values.min()) >= 0 and int(values.max()) < stop)
