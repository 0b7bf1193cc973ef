"""Random directions that are never written out."""

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import block_generator, check_fits, register_basis
from tinyspan.maps.fastfood import FastfoodMap
from tinyspan.partition import Partition, whole_model

__all__ = ["fastfood_basis"]


@register_basis("fastfood", partition=whole_model)
def fastfood_basis(partition: Partition, rank: int, *, seed: int = 0) -> Basis:
    """Return a random map per block whose memory and time do not grow with its rank: see `FastfoodMap`.

    With `whole_model` as the partition this is DID, the intrinsic dimension of Aghajanyan et al. (2021): one z for all
    layers. Their SAID is the same with `SubspaceModel(..., layer_scales=by_layer(model))`. Columns have norm 1 in
    expectation, so that rates of z compare with those of an orthonormal basis. Seeds work as in `random_basis`.

    Raises:
        InputError: the rank is below 1 or above the size of a block.

    Example:
        >>> import torch
        >>> from tinyspan import by_pattern
        >>> basis = fastfood_basis(by_pattern(torch.nn.Linear(31, 32), {"all": ".*"}), rank=100)
        >>> {name: tuple(tensor.shape) for name, tensor in basis.maps["all"].tensors().items()}
        {'signs': (100,), 'slots': (1024,), 'gauss': (1024,)}
        >>> z = torch.eye(100)[7]
        >>> round(float(basis.matvec({"all": z})["all"].norm()), 5)
        1.0
    """
    check_fits(partition, rank)
    maps = {block.name: FastfoodMap.draw(rank, block.numel, block_generator(seed, block)) for block in partition}
    return Basis(partition, maps, construction={"constructor": "fastfood", "rank": rank, "seed": seed})
