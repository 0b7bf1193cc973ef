"""What is trained for one task, in memory: z, the scales of the layers, the ordinary parameters and the buffers."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinyspan.errors import MismatchError

__all__ = ["Trained", "require_fit", "weighted_sum"]


class Trained(NamedTuple):
    """All that two adapters on the same basis and model differ in.

    Attributes:
        z: block name -> [h, k_b].
        ordinary: name -> value of every ordinary parameter and buffer.
        scales: one number per layer, if the layers have any.
    """

    z: dict[str, Tensor]
    ordinary: dict[str, Tensor]
    scales: Tensor | None

    def clone(self) -> "Trained":
        """Return copies that training does not change."""
        return Trained(
            {name: value.detach().clone() for name, value in self.z.items()},
            {name: value.detach().clone() for name, value in self.ordinary.items()},
            None if self.scales is None else self.scales.detach().clone(),
        )


def require_fit(trained: Trained, own: Trained) -> None:
    """Refuse what does not fit in the place of a model's own; z of each block may be [k_b], for all members alike.

    Raises:
        MismatchError: a block is absent or unknown, an ordinary parameter is unknown, or a shape is another one.
    """
    if set(trained.z) != set(own.z):
        raise MismatchError(f"expected z for the blocks {sorted(own.z)}, got {sorted(trained.z)}")
    for name, value in trained.z.items():
        shape = own.z[name].shape
        if value.shape[-1:] != shape[-1:] or value.shape not in (shape, shape[1:]):
            raise MismatchError(
                f"z of block {name!r}: expected {list(shape)} or {list(shape[1:])}, got {list(value.shape)}"
            )
    for name, value in trained.ordinary.items():
        if name not in own.ordinary:
            raise MismatchError(f"{name!r} is no ordinary parameter of this model")
        if own.ordinary[name].shape != value.shape:
            raise MismatchError(
                f"{name!r}: expected shape {list(own.ordinary[name].shape)}, got {list(value.shape)}; "
                "was it trained for another task?"
            )
    if trained.scales is not None and (own.scales is None or own.scales.shape != trained.scales.shape):
        expected = "none" if own.scales is None else f"shape {list(own.scales.shape)}"
        raise MismatchError(f"scales: expected {expected}, got shape {list(trained.scales.shape)}")


def weighted_sum(
    chosen: Sequence[Trained],
    weights: Sequence[float],
    present: Trained,
    first: Mapping[str, Tensor],
    parameters: Collection[str],
) -> Trained:
    """Return z = sum_i w_i mean_j z_i^(j), and phi_0 + sum_i w_i (phi_i - phi_0) of what is trained beside.

    Args:
        chosen: adapters without scales.
        weights: w, one number each.
        present: any adapter of the same model, whose blocks, dtypes and devices the result has.
        first: phi_0 by name.
        parameters: names of the ordinary parameters; others are buffers, of which the first adapter's are taken.
    """
    z = {
        name: _weighted([one.z[name].reshape(-1, own.shape[1]).mean(0).to(own) for one in chosen], weights)
        for name, own in present.z.items()
    }
    ordinary = {}
    for name, own in present.ordinary.items():
        values, start = [one.ordinary[name].to(own) for one in chosen], first[name].to(own)
        if name in parameters:
            ordinary[name] = start + _weighted([value - start for value in values], weights)
        else:
            ordinary[name] = values[0]  # a buffer: no vector, and a variance must not become negative
    return Trained(z, ordinary, None)


def _weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum(0)
