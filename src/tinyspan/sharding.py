"""Parameters of which every process holds a part, as `fully_shard` (FSDP2) cuts them."""

import sys
from typing import Any

from torch import Tensor, nn

from tinyspan.errors import InputError

__all__ = ["is_cut", "is_sharded", "local", "reshard"]


def local(tensor: Tensor) -> Tensor:
    """Return the part of a parameter that this process holds: a view of its rows if `fully_shard` has cut it, else all.

    Raises:
        InputError: the parameter is distributed in another way, so that processes hold parts of it in common.
    """
    if not is_sharded(tensor):
        return tensor
    shard: Any = tensor.detach()
    if any(not placement.is_shard() for placement in shard.placements):
        raise InputError(
            f"a parameter is distributed over the processes as {shard.placements}: expected every process to hold rows "
            "of its own; use fully_shard on a one-dimensional mesh"
        )
    part: Tensor = shard.to_local()
    return part


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which every process holds a part."""
    return hasattr(tensor, "to_local")


def is_cut(model: nn.Module) -> bool:
    """Return whether processes hold parts of a model's parameters, also while a forward pass has left whole copies."""
    return bool(_cut_modules(model)) or any(map(is_sharded, model.parameters()))


def reshard(model: nn.Module) -> None:
    """Drop the whole copies of weights that a forward pass over shards has left."""
    for module in _cut_modules(model):
        module.reshard()


def _cut_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` has cut."""
    if "torch.distributed.fsdp" not in sys.modules:  # nobody has called it, and it takes time to import
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
