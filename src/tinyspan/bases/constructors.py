"""Registered constructors of bases, and functions that several of them use.

The `construction` of a basis contains the name of its constructor and the arguments. A constructor that needs only the
partition and such arguments can be selected by name: in `tune --basis NAME`, or under `bases` in a suite. It is called
again to load an adapter whose basis was not saved.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError
from torch import nn

from tinyspan.errors import InputError
from tinyspan.partition import Block, Partition
from tinyspan.partitioning import PARTITIONS
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
    """A function that constructs a basis, with the arguments of its registration.

    Attributes:
        name: name of the constructor in the `construction` of its bases.
        build: the function; its first parameter is the partition if it `rebuilds`.
        method: name in results of the method that trains in such a basis.
        rebuilds: whether the same partition and arguments always give the same basis.
        partition: name of the partition of a model for a basis that is selected by name.
    """

    name: str
    build: "Callable[..., Basis]"
    method: str
    rebuilds: bool
    partition: str

    @property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """The parameters of the function, without the partition."""
        _, *rest = inspect.signature(self.build).parameters.values()
        return {parameter.name: parameter for parameter in rest}

    def hints(self) -> dict[str, Any]:
        """Return the types of these parameters; the other annotations may be names that only type checkers import.

        Raises:
            NameError: an annotation is such a name.
        """
        annotations = {name: parameter.annotation for name, parameter in self.arguments.items()}
        names = getattr(inspect.unwrap(self.build), "__globals__", {})
        return get_type_hints(SimpleNamespace(__annotations__=annotations), names)

    def takes(self, argument: str) -> bool:
        """Return whether the function has such a parameter."""
        return argument in self.arguments

    def needs(self, argument: str) -> bool:
        """Return whether the function has such a parameter without a default."""
        return self.takes(argument) and self.arguments[argument].default is inspect.Parameter.empty

    def read_arguments(self, construction: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the arguments in a manifest's `construction` to the types of the function's parameters.

        Raises:
            ValueError: the function has no such parameter, a value does not match its annotation, or an argument is
                missing.
        """
        hints, values = self.hints(), {}
        for name, value in construction.items():
            if name == "constructor":
                continue
            if not self.takes(name):
                raise ValueError(f"the constructor {self.name} has no argument {name!r:.100}")
            values[name] = _convert(value, hints[name])
        if missing := [name for name in self.arguments if self.needs(name) and name not in values]:
            raise ValueError(f"the constructor {self.name} lacks the argument {missing[0]}")
        return values

    def draw(self, model: nn.Module, rank: int | None, seed: int) -> "Basis":
        """Return a basis for a model; the rank and the seed are passed on if the function has these parameters."""
        arguments = {"rank": rank, "seed": seed}
        arguments = {name: value for name, value in arguments.items() if self.takes(name) and value is not None}
        return self.build(PARTITIONS[self.partition].build(model), **arguments)


CONSTRUCTORS: Registry[Constructor] = Registry("constructor of bases")


def register_basis(
    name: str,
    *,
    method: str | None = None,
    rebuilds: bool = True,
    partition: str = "layer",
    aliases: tuple[str, ...] = (),
) -> Callable[[Build], Build]:
    """Register a function that constructs bases.

    The first parameter of a function that `rebuilds` is the partition. Its basis has a `construction` with the name as
    `constructor` and all arguments that determine the numbers, as JSON types (a dtype as its name, such as `float32`).
    A parameter `rank` sets the rank of every block, and a parameter `seed` determines all random numbers (see
    `block_generator`).

    Args:
        name: name in `construction`, on the command line and in suites.
        method: name in results of the method that trains in such a basis; `name` by default.
        rebuilds: whether the same partition and arguments always give the same basis.
        partition: name of the partition of a model (`register_partition`) for a basis that is selected by name.
        aliases: other names on the command line.

    Raises:
        InputError: a name is already registered, or the function `rebuilds` and does not begin with a parameter for
            the partition, or has another one that cannot be passed by name, has no default and is not `rank`, or has
            no annotation or one that is neither `torch.dtype` nor a type of values that JSON has.
    """

    def register(build: Build) -> Build:
        constructor = Constructor(name, build, method or name, rebuilds, partition)
        if rebuilds:
            _check_signature(constructor)
        CONSTRUCTORS.add(name, constructor, aliases)
        return build

    return register


def _check_signature(constructor: Constructor) -> None:
    """Refuse a function that cannot be called again with the arguments in a manifest.

    Raises:
        InputError: see `register_basis`.
    """
    name, kinds = constructor.name, inspect.Parameter
    first = next(iter(inspect.signature(constructor.build).parameters.values()), None)
    if first is None or first.kind not in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
        raise InputError(f"the constructor {name} must take the partition as its first positional parameter")
    for key, parameter in constructor.arguments.items():
        if parameter.kind not in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY):
            shown = str(parameter).partition(":")[0]
            raise InputError(
                f"the constructor {name} has the parameter {shown} ({parameter.kind.description}): expected parameters "
                "that can each be passed by name"
            )
        if parameter.annotation is kinds.empty:
            raise InputError(
                f"the constructor {name} needs an annotation for {key}: what a manifest says is checked against it"
            )
        if key != "rank" and constructor.needs(key):
            raise InputError(
                f"the constructor {name} needs a default for {key}: it can be selected by name without arguments"
            )
    try:
        hints = constructor.hints()
    except NameError as error:
        raise InputError(
            f"the constructor {name} has an annotation that cannot be evaluated ({error}): import what it names also "
            "when the program runs"
        ) from error
    for key, hint in hints.items():
        if hint is torch.dtype:
            continue
        try:
            TypeAdapter(hint)
        except PydanticUserError as error:
            raise InputError(
                f"the constructor {name} has the annotation {hint} for {key}: expected torch.dtype, or a type of "
                "values that JSON has, as in a manifest"
            ) from error


def drawn_constructor(name: object) -> Constructor | None:
    """Return the constructor of this name if it needs only a partition and arguments in JSON types, else None."""
    if not isinstance(name, str) or name not in CONSTRUCTORS:
        return None
    return CONSTRUCTORS[name] if CONSTRUCTORS[name].rebuilds else None


def drawn_names(argument: str | None = None) -> list[str]:
    """Return the names for which `drawn_constructor` returns a constructor, or of those with a given parameter."""
    constructors = {name: constructor for name, constructor in CONSTRUCTORS.items() if constructor.rebuilds}
    return sorted(name for name, constructor in constructors.items() if argument is None or constructor.takes(argument))


def _convert(value: Any, hint: Any) -> Any:
    """Convert a JSON value to the type of a parameter.

    Raises:
        ValueError: the value does not match the type.
    """
    if hint is not torch.dtype:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    if dtype not in STORED:
        raise ValueError(f"expected a dtype of directions, found {value!r:.100}")
    return dtype


# -- shared by constructors -------------------------------------------------------------------------------------------


def block_generator(seed: int, block: Block) -> torch.Generator:
    """Return the random generator of a block, seeded by `seed` and the block's name."""
    digest = hashlib.sha256(f"{seed} {block.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def share_of(density: float, block: Block) -> int:
    """Return the number of a block's coordinates that get directions at a density."""
    return max(1, round(density * block.numel))


def check_density(density: float) -> None:
    """Raise an InputError if a density is out of range."""
    if not 0 < density <= 1:
        raise InputError(f"density={density} is not above 0 and at most 1, which is a dense basis")


def check_enough(counts: Mapping[str, int], rank: int | None) -> None:
    """Raise an InputError if the rank is above the number of coordinates that get directions in a block."""
    name, smallest = min(counts.items(), key=lambda item: item[1])
    if rank is not None and rank > smallest:
        raise InputError(
            f"rank={rank} is above {smallest}, the number of coordinates that get directions in block {name!r}; "
            "raise the density or lower the rank"
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Raise an InputError if directions cannot be stored in a dtype."""
    if dtype not in STORED:
        raise InputError(f"directions are stored in {', '.join(str(stored)[6:] for stored in STORED)}, not in {dtype}")


def check_fits(partition: Partition, rank: int) -> None:
    """Raise an InputError if the rank is below 1 or above the size of a block."""
    smallest = min(partition, key=lambda block: block.numel)
    if not 1 <= rank <= smallest.numel:
        raise InputError(f"rank={rank} is not between 1 and {smallest.numel}, the size of block {smallest.name!r}")
