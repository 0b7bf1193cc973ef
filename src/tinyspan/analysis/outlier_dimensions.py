"""Outlier dimensions of an update, and where it is large."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinyspan.errors import InputError, MismatchError
from tinyspan.partition import Block

__all__ = ["GAUSSIAN_SHARE", "Outliers", "envelope", "outliers", "standardized"]

GAUSSIAN_SHARE = 0.0026998  # P(|x| > 3 sigma) of a normal distribution


def standardized(vector: Tensor) -> Tensor:
    """Return (x - mean(x)) / std(x) in float64, [D]; zeros if all coordinates are equal.

    Raises:
        InputError: a coordinate is NaN or infinite.
    """
    centred = vector.double() - vector.double().mean()
    deviation = centred.square().mean().sqrt()
    if not torch.isfinite(deviation):
        raise InputError(f"a vector of {len(vector)} numbers has no standard deviation: some are NaN or infinite")
    return centred / deviation if deviation > 0 else torch.zeros_like(centred)


@dataclass(frozen=True)
class Outliers:
    """Coordinates of a vector that are more than a number of standard deviations from its mean.

    Attributes:
        count: number of outliers.
        share: share of outliers among all coordinates; `GAUSSIAN_SHARE` for a Gaussian vector at 3 sigma.
        kurtosis: fourth moment over the squared second moment; 3 for a Gaussian, 0 if all coordinates are equal.
        by_parameter: parameter name -> number of outliers among its coordinates.
        largest: the most distant coordinates, as (parameter, index in it, distance in standard deviations).
        indices: positions of all outliers in the block's vector, ascending.
    """

    count: int
    share: float
    kurtosis: float
    by_parameter: dict[str, int]
    largest: list[tuple[str, int, float]]
    indices: Tensor


def outliers(vector: Tensor, block: Block, *, sigmas: float = 3.0, largest: int = 10) -> Outliers:
    """Find the outlier dimensions of an update V z by the rule of Zhang et al. (2023), section 4.5.

    A coordinate is an outlier if `|x - mean(x)| > sigmas * std(x)`, with mean and standard deviation over the block.

    Args:
        vector: update of one block, [D_b].
        block: the block with its parameters, such as `basis.partition["layers.0"]`; a name alone is not enough.
        sigmas: threshold in standard deviations.
        largest: number of coordinates in `Outliers.largest`.

    Raises:
        InputError: a coordinate is NaN or infinite, or `block` is no block.
        MismatchError: the vector has another length than the block.

    Example:
        >>> from tinyspan import by_pattern
        >>> block = by_pattern(torch.nn.Linear(20, 1), {"all": ".*"})["all"]
        >>> vector = torch.zeros(21)
        >>> vector[20] = 1.0
        >>> outliers(vector, block).by_parameter
        {'weight': 0, 'bias': 1}
    """
    if not isinstance(block, Block):
        raise InputError(f"expected a Block, got {block!r:.100}; a partition has its blocks by name: partition[name]")
    if vector.shape != (block.numel,):
        raise MismatchError(f"block {block.name!r}: expected a vector [{block.numel}], got shape {list(vector.shape)}")
    distance = standardized(vector)
    if not distance.any():
        return Outliers(0, 0.0, 0.0, {spec.name: 0 for spec in block.parameters}, [], torch.zeros(0, dtype=torch.long))
    outside = distance.abs() > sigmas
    order = distance.abs().topk(min(largest, len(vector))).indices.tolist()
    return Outliers(
        count=int(outside.sum()),
        share=float(outside.double().mean()),
        kurtosis=float(distance.pow(4).mean()),
        by_parameter={spec.name: int(outside[a:b].sum()) for spec, a, b in block.spans()},
        largest=[(*_locate(block, position), float(distance[position])) for position in order],
        indices=outside.nonzero().squeeze(1),
    )


def envelope(vector: Tensor, segments: int = 400) -> Tensor:
    """Return the largest `|x - mean(x)| / std(x)` of consecutive segments of a vector, [at most `segments`].

    Raises:
        InputError: a coordinate is NaN or infinite.

    Example:
        >>> envelope(torch.tensor([0.0, 0.0, 0.0, 4.0]), segments=2).round(decimals=3)
        tensor([0.5770, 1.7320], dtype=torch.float64)
    """
    return torch.stack([piece.max() for piece in standardized(vector).abs().chunk(segments)])


def _locate(block: Block, position: int) -> tuple[str, int]:
    for spec, a, b in block.spans():
        if a <= position < b:
            return spec.name, position - a
    raise InputError(f"block {block.name!r} has {block.numel} coordinates, not {position}")
