"""Partition of a model's parameters into named blocks, each read as one vector.

The library processes weights per block: a block's parameters are flattened and concatenated, in the order of the
model, into one vector with D_b numbers.

A function that partitions a model registers under a name, by which `discover --partition NAME` and the constructors of
bases find it.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError
from tinyspan.registry import Registry
from tinyspan.sharding import local, reshard
from tinyspan.weights import is_exact_in, require_plain, wide_dtype

__all__ = [
    "PARTITIONS",
    "Block",
    "NamedPartition",
    "ParameterSpec",
    "Partition",
    "build_partition",
    "by_layer",
    "by_module",
    "by_pattern",
    "register_partition",
    "regrouped",
    "require_partition",
    "trainable_by_layer",
    "whole_model",
]

HASH_THREADS = 4  # threads for fingerprints; hashlib releases the GIL
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
        >>> linear = torch.nn.Linear(2, 3)
        >>> block = by_pattern(linear, {"all": ".*"})["all"]
        >>> vector = block.flatten(dict(linear.named_parameters()))
        >>> vector.shape, block.numel
        (torch.Size([9]), 9)
        >>> {name: tuple(part.shape) for name, part in block.unflatten(vector).items()}
        {'weight': (3, 2), 'bias': (3,)}
    """

    name: str
    parameters: tuple[ParameterSpec, ...]

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
        >>> partition = by_pattern(torch.nn.Linear(2, 3), {"all": ".*"})
        >>> [(block.name, block.numel) for block in partition]
        [('all', 9)]
    """

    blocks: tuple[Block, ...]

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

        If `fully_shard` has sharded a parameter, the shape of this process's shard is compared; see `local`.

        Raises:
            MismatchError: the model lacks a parameter, has it with another shape or dtype, or ties two of them.
        """
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

        def digest(block: Block) -> str:
            sha256 = hashlib.sha256()
            for spec in block.parameters:
                sha256.update(f"{spec.name} {list(spec.shape)} {spec.dtype}\n".encode())
                values = local(tensors[spec.name]).detach().cpu().contiguous().reshape(-1)
                values = values.to(spec.dtype) if is_exact_in(values, spec.dtype) else values
                sha256.update(values.view(torch.uint8).numpy().data)
            return sha256.hexdigest()

        names = [block.name for block in self.blocks]
        if all(tensors[spec.name].device.type == "cpu" for spec in self.parameters()):
            # Accelerator streams are per thread. Starting a thread can fail at the thread limit or at exit.
            with suppress(RuntimeError), ThreadPoolExecutor(HASH_THREADS) as pool:
                return dict(zip(names, pool.map(digest, self.blocks), strict=True))
        return dict(zip(names, map(digest, self.blocks), strict=True))

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


Build = TypeVar("Build", bound=Callable[[nn.Module], Partition])


@dataclass(frozen=True)
class NamedPartition:
    """A function that partitions a model, and what is said of it where it is registered.

    Attributes:
        name: under which commands and constructors of bases call it.
        build: the function.
        regroup: returns its blocks from those of `by_layer` alone; None if that needs the model.
    """

    name: str
    build: Callable[[nn.Module], Partition]
    regroup: Callable[[Partition], Partition] | None


PARTITIONS: Registry[NamedPartition] = Registry("partition")


def register_partition(
    name: str, *, regroup: Callable[[Partition], Partition] | None = None
) -> Callable[[Build], Build]:
    """Register a function that partitions a model, with no other arguments, under a name.

    Args:
        name: under which commands and constructors of bases call it.
        regroup: returns the same blocks from those of `by_layer` alone, so that `discover --partition` can group a
            recorded trajectory.

    Raises:
        InputError: the name is taken.

    Example:
        >>> sorted(PARTITIONS)
        ['layer', 'model', 'module', 'trainable']
    """

    def register(build: Build) -> Build:
        PARTITIONS.add(name, NamedPartition(name, build, regroup))
        return build

    return register


def regrouped(recorded: Partition, name: str) -> Partition:
    """Return the parameters of a recorded partition in the blocks of a registered one.

    Raises:
        InputError: no partition of this name is registered, it cannot be made without the model, or its `regroup`
            returns other parameters.
    """
    if (regroup := PARTITIONS[name].regroup) is None:
        names = ", ".join(sorted(other for other, entry in PARTITIONS.items() if entry.regroup is not None))
        raise InputError(
            f"the partition {name!r} is made from a model, and cannot group a recorded trajectory; expected one of "
            f"{names}"
        )
    partition = regroup(recorded)
    if different := set(recorded.parameters()) ^ set(partition.parameters()):
        name_of_first = min(spec.name for spec in different)
        raise InputError(
            f"regroup of the partition {name!r} must return the recorded parameters in other blocks; the first "
            f"parameter that is lost, added or changed is {name_of_first!r}"
        )
    return partition


@register_partition("layer", regroup=lambda layers: layers)
def by_layer(model: nn.Module) -> Partition:
    """Return one block per layer of the model's stacks: the partition of Zhang et al. (2023), section 3.2.

    A stack is an outermost `ModuleList` (or a `Sequential` of at least two modules of one class) whose members have
    parameters and submodules. For a model with two stacks (encoder and decoder), the layers of both are returned.
    Embeddings, poolers and heads are in no block. If `fully_shard` has sharded the model, each process partitions its
    own shard; this holds for all partitions.

    Raises:
        InputError: the model has no such stack.

    Example:
        >>> layer = lambda: torch.nn.TransformerEncoderLayer(4, 1, 8)
        >>> partition = by_layer(torch.nn.Sequential(layer(), layer()))
        >>> [block.name for block in partition]
        ['0', '1']
    """
    return build_partition(model, _in_layers(model))


@register_partition("trainable")
def trainable_by_layer(model: nn.Module) -> Partition:
    """Return the blocks of `by_layer`, restricted to the trained parameters (`requires_grad`).

    For a model with a PEFT adapter these are the adapter's parameters, so the cost of the trajectory and the directions
    depends on the size of the adapter, not of the model. The other weights may be half precision or quantized. A head
    that PEFT trains directly is in no block, as in the other partitions.

    Raises:
        InputError: the model has no stack of layers, or no parameter in its layers is trained.

    Example:
        >>> layer = lambda: torch.nn.TransformerEncoderLayer(4, 1, 8)
        >>> model = torch.nn.Sequential(layer(), layer()).requires_grad_(False)
        >>> model[1].linear1.requires_grad_(True).in_features
        4
        >>> [(block.name, block.numel) for block in trainable_by_layer(model)]
        [('1', 40)]
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assignments = [(block, name) for block, name in _in_layers(model) if name in trained]
    if not assignments:
        raise InputError(f"no parameter in the layers of {type(model).__name__} is trained: requires_grad is False")
    if outside := [name for name in trained - {name for _, name in assignments} if ".lora_" in name]:
        warnings.warn(
            f"{min(outside)!r} is trained but lies in no layer, so it will be frozen; leave its module out of the "
            "adapter, or choose the blocks yourself with by_pattern",
            stacklevel=2,
        )
    return build_partition(model, assignments)


@register_partition("module", regroup=Partition.per_module)
def by_module(model: nn.Module) -> Partition:
    """Return one block per module that has parameters inside the layers of `by_layer` (query, key, LayerNorm, ...).

    Raises:
        InputError: the model has no stack of layers.
    """
    return by_layer(model).per_module()


@register_partition("model", regroup=Partition.as_one_block)
def whole_model(model: nn.Module) -> Partition:
    """Return all layers of `by_layer` as one block, for one global subspace over the same parameters.

    Embeddings and heads are excluded, as in the other partitions; `by_pattern(model, {"all": ".*"})` includes them.

    Raises:
        InputError: the model has no stack of layers.
    """
    return by_layer(model).as_one_block()


def by_pattern(model: nn.Module, patterns: Mapping[str, str]) -> Partition:
    """Return one block per pattern, with all parameters whose full name matches the regular expression.

    The expression must match the whole name, as in `re.fullmatch`: `attention` matches no parameter of an encoder, and
    `.*attention.*` matches all that have the word in their names.

    Args:
        model: any module.
        patterns: block name -> regular expression.

    Raises:
        InputError: a pattern matches no whole name or is not a regular expression, or two patterns match the same
            parameter.

    Example:
        >>> partition = by_pattern(torch.nn.Linear(2, 3), {"weights": ".*weight", "biases": ".*bias"})
        >>> [(block.name, block.numel) for block in partition]
        [('weights', 6), ('biases', 3)]
    """
    names = [name for name, _ in model.named_parameters()]
    pairs = []
    for block, pattern in patterns.items():
        try:
            matched = [name for name in names if re.fullmatch(pattern, name)]
        except re.error as error:
            raise InputError(
                f"the pattern {pattern!r} of block {block!r} is not a regular expression: {error}"
            ) from error
        if not matched:
            within = next((name for name in names if re.search(pattern, name)), None)
            advice = (
                f"names look like {', '.join(names[:3])}"
                if within is None
                else f"it matches only a part of names such as {within!r}; try {f'.*{pattern}.*'!r}"
            )
            raise InputError(
                f"the pattern {pattern!r} of block {block!r} matches no parameter's whole name, as it must; {advice}"
            )
        pairs += [(block, name) for name in matched]
    return build_partition(model, pairs)


def _in_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of the layer and the parameter for every parameter in the stacks."""
    layers = list(_layers(model))
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no stack of repeated layers; "
            "choose the blocks yourself with by_pattern(model, {'block': 'regular expression'})"
        )
    return [(prefix, f"{prefix}.{name}") for prefix, layer in layers for name, _ in layer.named_parameters()]


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the members of the outermost stacks with their full names."""
    if _is_stack(module):
        yield from ((f"{prefix}{name}", child) for name, child in module.named_children())
        return
    for name, child in module.named_children():
        yield from _layers(child, f"{prefix}{name}.")


def _is_stack(module: nn.Module) -> bool:
    members = list(module.children())
    if isinstance(module, nn.ModuleList):
        repeated = len(members) > 0
    elif isinstance(module, nn.Sequential):
        repeated = len(members) > 1 and len({type(member) for member in members}) == 1
    else:
        return False
    return repeated and all(
        any(True for _ in member.parameters()) and any(True for _ in member.children()) for member in members
    )


def build_partition(model: nn.Module, assignments: Iterable[tuple[str, str]]) -> Partition:
    """Return the partition of (block, parameter) pairs; a tied parameter is assigned to the first block that has it.

    Args:
        model: any module.
        assignments: name of a block and full name of a parameter, in the order of the blocks and of their parameters.

    Raises:
        InputError: the model has no parameter of a name, a parameter is quantized or no floating-point number, or the
            pairs make no partition.

    Example:
        >>> partition = build_partition(torch.nn.Linear(2, 3), [("all", "weight"), ("all", "bias")])
        >>> [(block.name, block.numel) for block in partition]
        [('all', 9)]
    """
    reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    blocks: dict[str, list[ParameterSpec]] = {}
    first_name: dict[int, str] = {}
    for block, name in assignments:
        if name not in parameters:
            raise InputError(f"{type(model).__name__} has no parameter {name!r}, which is assigned to block {block!r}")
        parameter = parameters[name]
        if first_name.setdefault(id(parameter), name) != name:
            continue
        require_plain(name, parameter)
        blocks.setdefault(block, []).append(ParameterSpec(name, tuple(local(parameter).shape), parameter.dtype))
    return Partition(tuple(Block(name, tuple(specs)) for name, specs in blocks.items()))


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
