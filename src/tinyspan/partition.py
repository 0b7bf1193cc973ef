"""Partition of a model's parameters into named blocks, each read as one vector.

The library processes weights per block: a block's parameters are flattened and concatenated, in the order of the
model, into one vector with D_b numbers.

`partitioning` has the functions that return the partition of a model.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError
from tinyspan.sharding import local, reshard
from tinyspan.weights import is_exact_in, wide_dtype

__all__ = ["Block", "ParameterSpec", "Partition", "require_partition"]

HASH_THREADS = 4  # threads for fingerprints; hashlib releases the GIL
SHOWN = 4  # maximum number of names of blocks in the representation of a partition
MAX_BLOCK_NUMEL = 1 << 48  # larger than any model; beyond 2^63 the sizes overflow in torch


@dataclass(frozen=True)
class ParameterSpec:
    """Name, shape and dtype of one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements of the parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """A group of parameters of a model, read as one vector of length `numel`.

    Example:
        >>> from tinyspan import by_pattern
        >>> linear = torch.nn.Linear(2, 3)
        >>> block = by_pattern(linear, {"all": ".*"})["all"]
        >>> vector = block.flatten(dict(linear.named_parameters()))
        >>> vector.shape, block.numel
        (torch.Size([9]), 9)
        >>> {name: tuple(part.shape) for name, part in block.unflatten(vector).items()}
        {'weight': (3, 2), 'bias': (3,)}
        >>> block
        Block('all': 2 parameters with 9 numbers)
    """

    name: str
    parameters: tuple[ParameterSpec, ...]

    def __repr__(self) -> str:
        return f"Block({self.name!r}: {len(self.parameters)} parameters with {self.numel:,} numbers)"

    @property
    def numel(self) -> int:
        """D_b, the length of the block's vector."""
        return sum(spec.numel for spec in self.parameters)

    def spans(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        """Yield every parameter with its start and stop position in the block's vector."""
        start = 0
        for spec in self.parameters:
            yield spec, start, start + spec.numel
            start += spec.numel

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the block's parameters, from `tensors` by name, into one vector [D_b].

        Raises:
            MismatchError: a parameter is absent or has another shape.
        """
        parts = []
        for spec in self.parameters:
            if spec.name not in tensors:
                raise MismatchError(f"block {self.name!r} needs the parameter {spec.name!r}, which is absent")
            part = local(tensors[spec.name]).detach()
            if tuple(part.shape) != spec.shape:
                raise MismatchError(
                    f"parameter {spec.name!r}: expected shape {list(spec.shape)}, got {list(part.shape)}"
                )
            parts.append(part.reshape(-1))
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector [D_b] into views with the names and shapes of the block's parameters.

        Raises:
            MismatchError: the vector has another length.
        """
        if vector.shape != (self.numel,):
            raise MismatchError(
                f"block {self.name!r}: expected a vector of {self.numel} numbers, got shape {list(vector.shape)}"
            )
        return {spec.name: vector[start:stop].view(spec.shape) for spec, start, stop in self.spans()}


@dataclass(frozen=True)
class Partition:
    """Ordered, disjoint blocks of a model's parameters.

    Example:
        >>> from tinyspan import by_pattern
        >>> partition = by_pattern(torch.nn.Linear(2, 3), {"all": ".*"})
        >>> [(block.name, block.numel) for block in partition]
        [('all', 9)]
        >>> partition
        Partition(1 blocks, 2 parameters with 9 numbers: all)
    """

    blocks: tuple[Block, ...]

    def __repr__(self) -> str:
        names = [block.name for block in self.blocks]
        shown = ", ".join(names if len(names) <= SHOWN else [*names[: SHOWN - 1], "...", names[-1]])
        count = sum(len(block.parameters) for block in self.blocks)
        return f"Partition({len(names)} blocks, {count} parameters with {self.numel:,} numbers: {shown})"

    def __post_init__(self) -> None:
        _refuse_overlap(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, name: str) -> Block:
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(f"no block {name!r}; the blocks are {[block.name for block in self.blocks]}")

    @property
    def numel(self) -> int:
        """Number of elements of all blocks together."""
        return sum(block.numel for block in self.blocks)

    def parameters(self) -> Iterator[ParameterSpec]:
        """Yield the parameters of all blocks in order."""
        for block in self.blocks:
            yield from block.parameters

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the model's parameters that lie in a block, by name, in the partition's order.

        If `fully_shard` has sharded a parameter, the shape of this process's shard is compared; see `local`. Weights
        that a forward pass left gathered are freed first: what is written into them would be lost.

        Raises:
            MismatchError: the model lacks a parameter, has it with another shape or dtype, or ties two of them.
        """
        reshard(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        first_name: dict[int, str] = {}
        for spec in self.parameters():
            if spec.name not in own:
                others = own.keys() - {other.name for other in self.parameters()}  # candidates for a renamed parameter
                nearest = "".join(f"; the nearest is {name!r}" for name in get_close_matches(spec.name, others, 1))
                raise MismatchError(f"the model has no parameter {spec.name!r}, which the partition names{nearest}")
            actual = ParameterSpec(spec.name, tuple(local(own[spec.name]).shape), own[spec.name].dtype)
            if actual != spec:
                raise MismatchError(
                    f"parameter {spec.name!r}: expected shape {list(spec.shape)} and {spec.dtype}, "
                    f"the model has {list(actual.shape)} and {actual.dtype}"
                )
            if (first := first_name.setdefault(id(own[spec.name]), spec.name)) != spec.name:
                raise MismatchError(
                    f"the model ties {first!r} and {spec.name!r}: the partition expects two parameters; create "
                    "the partition from this model, where a tied parameter lies in the first block that has it"
                )
        return {spec.name: own[spec.name] for spec in self.parameters()}

    def widened(self) -> "Partition":
        """Return the same blocks with float32 in place of half precision, as in the model that is trained."""
        return Partition(
            tuple(
                Block(block.name, tuple(replace(spec, dtype=wide_dtype(spec.dtype)) for spec in block.parameters))
                for block in self.blocks
            )
        )

    def fingerprint(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the SHA-256 of each block's parameter names, shapes, dtypes and values.

        Two models with equal fingerprints have bitwise equal weights in every block. The dtype is that of the
        partition: a wider tensor has the same fingerprint as the narrower one if their values are equal.

        Args:
            tensors: parameter name -> values, in any shape.
        """

        def digest(block: Block) -> tuple[str, str]:
            sha256 = hashlib.sha256()
            for spec in block.parameters:
                sha256.update(f"{spec.name} {list(spec.shape)} {spec.dtype}\n".encode())
                values = local(tensors[spec.name]).detach().cpu().contiguous().reshape(-1)
                values = values.to(spec.dtype) if is_exact_in(values, spec.dtype) else values
                sha256.update(values.view(torch.uint8).numpy().data)
            return block.name, sha256.hexdigest()

        if all(tensors[spec.name].device.type == "cpu" for spec in self.parameters()):
            # Accelerator streams are per thread. Starting a thread can fail at the thread limit or at exit.
            with suppress(RuntimeError), ThreadPoolExecutor(HASH_THREADS) as pool:
                return dict(pool.map(digest, self.blocks))
        return dict(map(digest, self.blocks))

    def per_module(self) -> "Partition":
        """Return the same parameters with one block per module that has parameters."""
        return self._regroup(lambda parameter: parameter.rpartition(".")[0])

    def as_one_block(self) -> "Partition":
        """Return the same parameters as one block named `model`."""
        return self._regroup(lambda parameter: "model")

    def _regroup(self, block_of: Callable[[str], str]) -> "Partition":
        blocks: dict[str, list[ParameterSpec]] = {}
        for spec in self.parameters():
            blocks.setdefault(block_of(spec.name), []).append(spec)
        return Partition(tuple(Block(name, tuple(specs)) for name, specs in blocks.items()))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the partition as JSON types."""
        return [
            {
                "name": block.name,
                "parameters": [[spec.name, list(spec.shape), str(spec.dtype)[6:]] for spec in block.parameters],
            }
            for block in self.blocks
        ]

    @classmethod
    def from_json(cls, blocks: Iterable[Mapping[str, Any]]) -> "Partition":
        """Return a partition from the result of `to_json`.

        Raises:
            InputError: the lists do not have this format.
        """
        try:
            return cls(
                tuple(
                    Block(
                        _name(block["name"]),
                        tuple(
                            ParameterSpec(_name(name), _shape(shape), _dtype(dtype))
                            for name, shape, dtype in block["parameters"]
                        ),
                    )
                    for block in blocks
                )
            )
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"not a partition: {error}") from error


def require_partition(partition: object) -> None:
    """Check that an argument is a partition, not a function that returns one.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(partition, Partition):
        name = getattr(partition, "__name__", None) or type(partition).__name__
        call = f"; call it with the model, {name}(model)" if callable(partition) else ""
        raise InputError(f"expected a Partition, got {name}{call}")


def _refuse_overlap(blocks: tuple[Block, ...]) -> None:
    owner: dict[str, str] = {}
    if len({block.name for block in blocks}) < len(blocks):
        raise InputError("two blocks have the same name")
    for block in blocks:
        if not block.parameters:
            raise InputError(f"block {block.name!r} is empty")
        for spec in block.parameters:
            if spec.name in owner:
                raise InputError(f"parameter {spec.name!r} lies in two blocks, {owner[spec.name]!r} and {block.name!r}")
            owner[spec.name] = block.name
        if block.numel > MAX_BLOCK_NUMEL:
            raise InputError(f"block {block.name!r} has more than 2^48 numbers")
    if not blocks:
        raise InputError("a partition needs at least one block")


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"expected a name, found {name!r:.100}")
    return name


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or len(sizes) > 64 or any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError(f"{sizes!r:.100} is not the shape of a tensor")
    return tuple(sizes)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name!r:.100} is not a floating-point dtype")
    return dtype
