"""Constructors of bases by name, and what several of them need.

A basis notes in its `construction` the name of its constructor and the arguments. A constructor that needs nothing but
the partition and such arguments can be named where a basis is needed: `tune --basis NAME`, or `bases` of a suite. It
is called again when an adapter is loaded whose basis was never saved.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter
from torch import nn

from tinyspan.errors import InputError
from tinyspan.partition import Block, Partition, by_layer
from tinyspan.registry import Registry

if TYPE_CHECKING:
    from tinyspan.bases.basis import Basis

__all__ = [
    "CONSTRUCTORS",
    "Constructor",
    "block_generator",
    "check_density",
    "check_dtype",
    "check_enough",
    "check_fits",
    "drawn_constructor",
    "drawn_names",
    "register_basis",
    "share_of",
]

STORED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)  # dtypes of directions
Build = TypeVar("Build", bound=Callable[..., "Basis"])


@dataclass(frozen=True)
class Constructor:
    """A function that makes a basis, and what is said of it where it is registered.

    Attributes:
        name: under which the `construction` of its bases names it.
        build: the function; its first parameter is the partition if it `rebuilds`.
        method: what results call training in such a basis.
        rebuilds: whether the same partition and arguments give the same basis again.
        partition: the blocks of a model that a basis is made of which is asked for by name.
    """

    name: str
    build: "Callable[..., Basis]"
    method: str
    rebuilds: bool
    partition: Callable[[nn.Module], Partition]

    @property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """The parameters but for the partition."""
        _, *rest = inspect.signature(self.build).parameters.values()
        return {parameter.name: parameter for parameter in rest}

    def takes(self, argument: str) -> bool:
        """Whether it has such a parameter."""
        return argument in self.arguments

    def needs(self, argument: str) -> bool:
        """Whether it has such a parameter, and no default for it."""
        return self.takes(argument) and self.arguments[argument].default is inspect.Parameter.empty

    def read_arguments(self, construction: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that a manifest's `construction` names, as the function takes them.

        Raises:
            ValueError: it has no such parameter, the value is of another type than its annotation, or one is missing.
        """
        hints, values = get_type_hints(self.build), {}
        for name, value in construction.items():
            if name == "constructor":
                continue
            if not self.takes(name):
                raise ValueError(f"the constructor {self.name} has no argument {name!r:.100}")
            values[name] = _typed(value, hints[name])
        if missing := [name for name in self.arguments if self.needs(name) and name not in values]:
            raise ValueError(f"the constructor {self.name} lacks the argument {missing[0]}")
        return values

    def draw(self, model: nn.Module, rank: int | None, seed: int) -> "Basis":
        """Return a basis for a model, with the rank and the seed if the function takes them."""
        given = {name: value for name, value in (("rank", rank), ("seed", seed)) if self.takes(name)}
        return self.build(self.partition(model), **{name: value for name, value in given.items() if value is not None})


CONSTRUCTORS: Registry[Constructor] = Registry("constructor of bases")


def register_basis(
    name: str,
    *,
    method: str | None = None,
    rebuilds: bool = True,
    partition: Callable[[nn.Module], Partition] = by_layer,
    aliases: tuple[str, ...] = (),
) -> Callable[[Build], Build]:
    """Register a function that makes bases.

    One that `rebuilds` takes the partition first. It gives the basis a `construction` with its name as `constructor`
    and all arguments that decide the numbers, as JSON has them (a dtype by its name: `float32`). If it has a parameter
    `rank`, every block gets that rank; if it has a parameter `seed`, that decides everything random (see
    `block_generator`).

    Args:
        name: under which `construction`, the command line and suites call it.
        method: what results call training in such a basis; its name by default.
        rebuilds: whether the same partition and arguments give the same basis again.
        partition: the blocks of a model that the basis is made of where it is asked for by name.
        aliases: other names on the command line.

    Raises:
        InputError: the name is taken, or a parameter other than `rank` of one that `rebuilds` has no default.
    """

    def register(build: Build) -> Build:
        constructor = Constructor(name, build, method or name, rebuilds, partition)
        if rebuilds and (others := [one for one in constructor.arguments if one != "rank" and constructor.needs(one)]):
            raise InputError(
                f"the constructor {name} needs a default for {others[0]}: it is called with its name alone"
            )
        for one in (name, *aliases):
            CONSTRUCTORS.add(one, constructor)
        return build

    return register


def drawn_constructor(name: object) -> Constructor | None:
    """Return the constructor of a name if it can make a basis of a partition and arguments alone, else None."""
    if not isinstance(name, str) or name not in CONSTRUCTORS:
        return None
    return CONSTRUCTORS[name] if CONSTRUCTORS[name].rebuilds else None


def drawn_names(argument: str | None = None) -> list[str]:
    """Return the names of the constructors that `drawn_constructor` knows, or of those that take an argument."""
    drawn = {name: constructor for name, constructor in CONSTRUCTORS.items() if constructor.rebuilds}
    return sorted(name for name, constructor in drawn.items() if argument is None or constructor.takes(argument))


def _typed(value: Any, hint: Any) -> Any:
    """Return a value of JSON as the type of a parameter.

    Raises:
        ValueError: it is of another type.
    """
    if hint is not torch.dtype:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    if dtype not in STORED:
        raise ValueError(f"expected a dtype of directions, found {value!r:.100}")
    return dtype


# -- what constructors share -----------------------------------------------------------------------------------------


def block_generator(seed: int, block: Block) -> torch.Generator:
    """Return the generator from which a block draws, seeded by `seed` and the block's name."""
    digest = hashlib.sha256(f"{seed} {block.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def share_of(density: float, block: Block) -> int:
    """Return how many of a block's coordinates a density keeps."""
    return max(1, round(density * block.numel))


def check_density(density: float) -> None:
    """Refuse a density out of range."""
    if not 0 < density <= 1:
        raise InputError(f"density must be above 0 and at most 1, the dense basis; got {density}")


def check_enough(counts: Mapping[str, int], rank: int | None) -> None:
    """Refuse a rank above the number of coordinates that get directions in some block."""
    name, fewest = min(counts.items(), key=lambda item: item[1])
    if rank is not None and rank > fewest:
        raise InputError(
            f"rank {rank} is above {fewest}, the number of coordinates that get directions in block {name!r}; "
            "raise the density or lower the rank"
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype in which directions are not stored."""
    if dtype not in STORED:
        raise InputError(f"directions are stored in {', '.join(str(one)[6:] for one in STORED)}, not in {dtype}")


def check_fits(partition: Partition, rank: int) -> None:
    """Refuse a rank below 1 or above the size of a block."""
    smallest = min(partition, key=lambda block: block.numel)
    if not 1 <= rank <= smallest.numel:
        raise InputError(
            f"rank must be between 1 and {smallest.numel}, the size of block {smallest.name!r}; got {rank}"
        )
