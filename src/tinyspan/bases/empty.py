"""No directions at all."""

import torch

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import register_basis
from tinyspan.maps.dense import DenseMap
from tinyspan.partition import Partition

__all__ = ["empty_basis"]


@register_basis("empty", method="freeze", aliases=("none",))
def empty_basis(partition: Partition) -> Basis:
    """Return a basis without directions: the blocks stay at theta_0, the paper's `freeze` baseline."""
    maps = {block.name: DenseMap(torch.zeros(0, block.numel)) for block in partition}
    return Basis(partition, maps, construction={"constructor": "empty"})
