"""Parameters that are sharded over processes by `fully_shard` (FSDP2)."""

import sys
from typing import Any

from torch import Tensor, nn

from tinyspan.errors import InputError

__all__ = ["is_cut", "is_sharded", "local", "require_visible", "reshard"]


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a parameter, a view, or the parameter itself if it is not sharded.

    Raises:
        InputError: the parameter is not sharded along one dimension, so processes do not hold disjoint shards.
    """
    if not is_sharded(tensor):
        return tensor
    shard: Any = tensor.detach()
    if any(not placement.is_shard() for placement in shard.placements):
        raise InputError(
            f"a parameter is distributed over the processes as {shard.placements}: expected every process to hold its "
            "own shard; use fully_shard on a one-dimensional mesh"
        )
    part: Tensor = shard.to_local()
    return part


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, which is distributed over processes."""
    return hasattr(tensor, "to_local")


def is_cut(model: nn.Module) -> bool:
    """Return whether a model is sharded over processes, even if a forward pass left its parameters gathered."""
    return bool(_cut_modules(model)) or any(map(is_sharded, model.parameters()))


def require_visible(model: nn.Module) -> None:
    """Check that this process sees the weights.

    Raises:
        InputError: DeepSpeed (ZeRO-3) or FSDP1 keeps them in pieces that are no tensors of their own.
    """
    hidden = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FullyShardedDataParallel

        hidden = hidden or any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if hidden:
        raise InputError(
            "DeepSpeed ZeRO-3 or FSDP1 keeps the weights of this model in pieces that cannot be read: expected one "
            "process, DDP or fully_shard (FSDP2)"
        )


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass of a sharded model left."""
    for module in _cut_modules(model):
        module.reshard()


def _cut_modules(model: nn.Module) -> list[Any]:
    """Return the modules to which `fully_shard` was applied."""
    if "torch.distributed.fsdp" not in sys.modules:  # then `fully_shard` was never called; the import is slow
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
