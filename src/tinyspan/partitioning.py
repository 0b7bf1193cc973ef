"""Partition a model by layer, by module, by pattern or as one block.

A function that partitions a model registers under a name, by which `discover --partition NAME` and the constructors of
bases find it.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from tinyspan.errors import InputError
from tinyspan.partition import Block, ParameterSpec, Partition
from tinyspan.registry import Registry
from tinyspan.sharding import local, require_visible, reshard
from tinyspan.weights import require_apart, require_plain

__all__ = [
    "PARTITIONS",
    "NamedPartition",
    "build_partition",
    "by_layer",
    "by_module",
    "by_pattern",
    "register_partition",
    "regrouped",
    "trainable_by_layer",
    "whole_model",
]

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
        >>> {"layer", "model", "module", "trainable"} <= {*PARTITIONS}
        True
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
        >>> import torch
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
        >>> import torch
        >>> layer = lambda: torch.nn.TransformerEncoderLayer(4, 1, 8)
        >>> model = torch.nn.Sequential(layer(), layer()).requires_grad_(False)
        >>> model[1].linear1.requires_grad_(True).in_features
        4
        >>> [(block.name, block.numel) for block in trainable_by_layer(model)]
        [('1', 40)]
    """
    trained = {name: id(one) for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}
    assignments = [(block, name) for block, name in _in_layers(model) if name in trained]
    if not assignments:
        raise InputError(f"no parameter in the layers of {type(model).__name__} is trained: requires_grad is False")
    inside = {trained[name] for _, name in assignments}
    if outside := [name for name, identity in trained.items() if identity not in inside and ".lora_" in name]:
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
        >>> import torch
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
        InputError: the model has no parameter of a name, a parameter is quantized, in float8 or no floating-point
            number, two parameters share memory without being one, DeepSpeed or FSDP1 hides the weights, or the pairs
            make no partition.

    Example:
        >>> import torch
        >>> partition = build_partition(torch.nn.Linear(2, 3), [("all", "weight"), ("all", "bias")])
        >>> [(block.name, block.numel) for block in partition]
        [('all', 9)]
    """
    require_visible(model)
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
    partition = Partition(tuple(Block(name, tuple(specs)) for name, specs in blocks.items()))
    require_apart({spec.name: parameters[spec.name] for spec in partition.parameters()})
    return partition
