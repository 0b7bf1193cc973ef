"""Random orthonormal directions."""

import torch

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import (
    block_generator,
    check_density,
    check_dtype,
    check_enough,
    check_fits,
    register_basis,
    share_of,
)
from tinyspan.linalg import orthonormalize
from tinyspan.maps.base import LinearMap
from tinyspan.maps.dense import dense_map
from tinyspan.maps.sparse import SparseMap
from tinyspan.partition import Partition

__all__ = ["random_basis"]


@register_basis("random")
def random_basis(
    partition: Partition, rank: int, *, seed: int = 0, density: float = 1.0, dtype: torch.dtype = torch.float32
) -> Basis:
    """Return k random orthonormal directions per block: standard normal vectors, orthonormalised.

    This is the random baseline of Zhang et al. (2023), after Li et al. (2018). Each block has its own generator, seeded
    by `seed` and the block's name. Random numbers may differ between torch versions and devices: compare
    `content_hash`.

    Args:
        partition: the blocks.
        rank: k, the same for every block.
        seed: seed of the generators.
        density: share of each block's coordinates, selected at random, on which the directions are nonzero.
        dtype: dtype of the stored directions; see `svd_basis`.

    Raises:
        InputError: the rank is below 1 or above the number of coordinates that get directions in a block.

    Example:
        >>> from tinyspan import by_pattern
        >>> basis = random_basis(by_pattern(torch.nn.Linear(4, 5), {"all": ".*"}), rank=3)
        >>> v = basis.maps["all"].directions
        >>> torch.allclose(v @ v.T, torch.eye(3), atol=1e-6)
        True
    """
    check_fits(partition, rank)
    check_dtype(dtype)
    check_density(density)
    check_enough({block.name: share_of(density, block) for block in partition}, rank)
    maps: dict[str, LinearMap] = {}
    for block in partition:
        generator, size, indices = block_generator(seed, block), block.numel, None
        if density < 1:
            size = share_of(density, block)
            indices = torch.randperm(block.numel, generator=generator)[:size].sort().values
        drawn = torch.randn(rank, size, generator=generator)
        dense = dense_map(orthonormalize(drawn.double() if dtype == torch.float64 else drawn), dtype)
        maps[block.name] = dense if indices is None else SparseMap(block.numel, indices, dense)
    construction = {"constructor": "random", "rank": rank, "seed": seed, "dtype": str(dtype)[6:]}
    return Basis(partition, maps, construction=construction | ({} if density == 1 else {"density": density}))
