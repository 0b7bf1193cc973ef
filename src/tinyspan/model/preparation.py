"""Checks of a model and a basis before they become a SubspaceModel, and what is computed from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError
from tinyspan.model.base import (
    check_disjoint,
    describe_basis,
    directly_trained_names,
    fingerprint_of,
    require_same,
    select_weights,
)
from tinyspan.model.blocks import layer_positions
from tinyspan.model.processes import group_of, require_alike
from tinyspan.partition import Block, Partition
from tinyspan.sharding import is_sharded, reshard
from tinyspan.weights import follows_subspace

__all__ = ["Preparation", "prepare"]


@dataclass(frozen=True)
class Preparation:
    """A model that fits a basis, with the arguments of the SubspaceModel.

    Attributes:
        model: see `SubspaceModel`, as for the next six.
        basis: basis of the model's partition.
        modules_to_save: modules to train directly.
        ensemble: number of vectors that are averaged.
        init_std: standard deviation of the initial z.
        seed: seed of the initial z.
        layer_scales: layers with a scale.
        blocks: the blocks that have directions.
        weights: the weights in the blocks of the partition, by name.
        names: names of the directly trained parameters.
        fingerprint: see `fingerprint_of`.
        layer_of: parameter name -> position of its layer in the scales.
        everyone: the processes over which `fully_shard` has sharded the model; None if it is not sharded.
        group: the processes that each hold rows of the weights in `blocks`; None if these are not sharded.
    """

    model: nn.Module
    basis: Basis
    modules_to_save: list[str]
    ensemble: int
    init_std: float
    seed: int
    layer_scales: Partition | None
    blocks: list[Block]
    weights: Mapping[str, nn.Parameter]
    names: list[str]
    fingerprint: dict[str, str]
    layer_of: Mapping[str, int]
    everyone: Any
    group: Any


def prepare(
    model: nn.Module,
    basis: Basis,
    *,
    modules_to_save: Sequence[str],
    ensemble: int,
    init_std: float,
    seed: int,
    layer_scales: Partition | None,
) -> Preparation:
    """Check the arguments of a SubspaceModel, and the model against the basis; nothing is changed.

    Raises:
        MismatchError: see `SubspaceModel`.
        InputError: see `SubspaceModel`.
    """
    if ensemble < 1 or not 0 <= init_std < math.inf:
        raise InputError(f"expected ensemble >= 1 and a finite init_std >= 0, got {ensemble} and {init_std}")
    if follows_subspace(model):
        raise InputError("the model already follows a SubspaceModel; merge() that one, or set_state() its z")
    reshard(model)
    everyone = group_of([parameter for parameter in model.parameters() if is_sharded(parameter)][:1])
    if everyone is not None:
        arguments = {"modules_to_save": sorted(modules_to_save), "ensemble": ensemble, "init_std": init_std}
        construction = {name: value for name, value in basis.construction.items() if name != "shard"}
        of_basis = {"the ranks of the basis": basis.ranks, "how the basis was made": construction}
        require_alike(everyone, {**arguments, "seed": seed, "layer_scales": len(layer_scales or ()), **of_basis})
    weights = select_weights(model, basis.partition, describe_basis(basis), basis.versions)
    names = directly_trained_names(model, modules_to_save)
    check_disjoint(model, names, weights)
    fingerprint = fingerprint_of(model, basis.partition, weights, names)
    if basis.fingerprint:
        of_blocks = {block: fingerprint[block] for block in basis.fingerprint}
        require_same(basis.fingerprint, of_blocks, describe_basis(basis))
    layer_of = {} if layer_scales is None else layer_positions(layer_scales, basis.partition)
    blocks = [block for block in basis.partition if basis.ranks[block.name] > 0]
    group = group_of(weights[spec.name] for block in blocks for spec in block.parameters)
    if everyone is not None and group is None:  # the changed weights are whole in each process, as a LoRA is
        starts = {f"theta_0 of {block.name!r}": fingerprint[block.name] for block in blocks}
        require_alike(everyone, {**starts, "what the basis was made of": basis.parents})
    return Preparation(
        model,
        basis,
        list(modules_to_save),
        ensemble,
        init_std,
        seed,
        layer_scales,
        blocks,
        weights,
        names,
        fingerprint,
        layer_of,
        everyone,
        group,
    )
