"""The state of an adapter: z, the scales of the layers, directly trained parameters and buffers."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinyspan.errors import MismatchError

__all__ = ["AdapterState", "require_fit", "weighted_sum"]


class AdapterState(NamedTuple):
    """All tensors in which two adapters of the same basis and model differ.

    Attributes:
        z: block name -> [h, k_b].
        directly_trained: name -> value of every directly trained parameter and persistent buffer.
        scales: one number per layer, if the layers have scales.
    """

    z: dict[str, Tensor]
    directly_trained: dict[str, Tensor]
    scales: Tensor | None

    def detached(self) -> "AdapterState":
        """Return the same tensors outside of the graph of autograd."""
        return AdapterState(
            {name: value.detach() for name, value in self.z.items()},
            {name: value.detach() for name, value in self.directly_trained.items()},
            None if self.scales is None else self.scales.detach(),
        )

    def clone(self) -> "AdapterState":
        """Return a copy that training does not change."""
        return AdapterState(
            {name: value.detach().clone() for name, value in self.z.items()},
            {name: value.detach().clone() for name, value in self.directly_trained.items()},
            None if self.scales is None else self.scales.detach().clone(),
        )

    def in_dtypes_of(self, base: "AdapterState") -> "AdapterState":
        """Return the same state with directly trained values in the dtypes of the state of the base model."""
        dtypes = {name: value.dtype for name, value in base.directly_trained.items()}
        values = {name: value.to(dtypes.get(name, value.dtype)) for name, value in self.directly_trained.items()}
        return self._replace(directly_trained=values)


def require_fit(state: AdapterState, own: AdapterState) -> None:
    """Check that a state fits a model's own; z of a block may be [k_b], one vector for all members.

    Raises:
        MismatchError: a block is absent or unknown, a directly trained parameter is unknown, or a shape differs.
    """
    if set(state.z) != set(own.z):
        raise MismatchError(f"expected z for the blocks {sorted(own.z)}, got {sorted(state.z)}")
    for name, value in state.z.items():
        shape = own.z[name].shape
        if value.shape not in (shape, shape[1:]):
            raise MismatchError(
                f"z of block {name!r}: expected {list(shape)} or {list(shape[1:])}, got {list(value.shape)}"
            )
    for name, value in state.directly_trained.items():
        if name not in own.directly_trained:
            raise MismatchError(f"{name!r} is not a directly trained parameter of this model")
        if own.directly_trained[name].shape != value.shape:
            raise MismatchError(
                f"{name!r}: expected shape {list(own.directly_trained[name].shape)}, got {list(value.shape)}; "
                "was it trained for another task?"
            )
    if state.scales is not None and (own.scales is None or own.scales.shape != state.scales.shape):
        expected = "none" if own.scales is None else f"shape {list(own.scales.shape)}"
        raise MismatchError(f"scales: expected {expected}, got shape {list(state.scales.shape)}")


def weighted_sum(
    chosen: Sequence[AdapterState],
    weights: Sequence[float],
    present: AdapterState,
    base: Mapping[str, Tensor],
    parameters: Collection[str],
) -> AdapterState:
    """Return z = sum_i w_i mean_j z_i^(j), and phi_0 + sum_i w_i (phi_i - phi_0) for directly trained parameters.

    Args:
        chosen: adapters without scales.
        weights: w, one per adapter.
        present: any adapter of the same model, which determines blocks, dtypes and devices of the result.
        base: phi_0 by name.
        parameters: names of the directly trained parameters; the others are buffers, which come from the first
            adapter.
    """
    z = {
        name: _combine([one.z[name].reshape(-1, own.shape[1]).mean(0).to(own) for one in chosen], weights)
        for name, own in present.z.items()
    }
    directly_trained = {}
    for name, own in present.directly_trained.items():
        values, start = [one.directly_trained[name].to(own) for one in chosen], base[name].to(own)
        if name in parameters:
            directly_trained[name] = start + _combine([value - start for value in values], weights)
        else:
            directly_trained[name] = values[0].clone()  # a buffer: no vector, and a variance must not become negative
    return AdapterState(z, directly_trained, None)


def _combine(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum(0)
