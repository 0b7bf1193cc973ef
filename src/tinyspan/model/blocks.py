"""One block of a model as a function of m: its weights are theta_0 + V m, and their gradient g is reduced to V^T g.

A block is treated as one vector: one product writes its weights, and one product projects its gradient when those of
all its weights are complete. For a sparse map, the vector has only the coordinates that the map changes; only these are
stored from theta_0, written and projected.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyspan.errors import MismatchError
from tinyspan.maps.base import LinearMap
from tinyspan.model.autograd import follow, matvec, rmatvec, through_scales
from tinyspan.partition import Block, ParameterSpec, Partition

__all__ = ["MovingBlock", "Part", "layer_positions", "stored_start"]


class Part(NamedTuple):
    """One weight's part of a block.

    Attributes:
        spec: the weight.
        support: indices of the coordinates that the basis changes in the weight, ascending; None for all of them.
        rows: slice of these coordinates in the vector of the block.
    """

    spec: ParameterSpec
    support: Tensor | None
    rows: slice


class MovingBlock:
    """A block's weights as a function of m, and the gradient with respect to m as a function of their gradients.

    With layer scales, theta_l = theta_0,l + lambda_l (V m)_l. Weights are given by name, each as this process stores
    it; `start` is the tensor that `stored_start` returned.

    Args:
        block: the block.
        v: its map.
        layer_of: parameter name -> position of its layer in the scales; empty without scales.
        scales: initial lambda, if the layers have scales.
        start: see above.

    Attributes:
        parts: one per weight that the basis changes.
    """

    def __init__(
        self, block: Block, v: LinearMap, layer_of: Mapping[str, int], scales: Tensor | None, start: Tensor
    ) -> None:
        self.block, self.v, self._layer_of = block, v, layer_of
        self._moved = None if scales is None else (torch.zeros_like(start), scales)  # V m and lambda, as last written
        self._gathered: tuple[Tensor, set[int]] | None = None  # gradient so far, numbers of the parts still to come
        self._views: tuple[Tensor, list[Tensor]] | None = None  # last buffer, and each weight's part of it
        self.parts = self._split()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of a backward pass, and what is computed from V."""
        return {**self.__dict__, "_gathered": None, "_views": None, "parts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.parts = self._split()

    def _split(self) -> list[Part]:
        """Return the parts of the weights that the basis changes."""
        spans, support = list(self.block.spans()), self._support
        if support is None:
            return [Part(spec, None, slice(a, b)) for spec, a, b in spans]
        ends = torch.tensor([b for _, _, b in spans], device=support.device)
        stops = torch.searchsorted(support, ends).tolist()
        ranges = zip(spans, [0, *stops], stops, strict=False)
        return [Part(spec, support[i:j] - a, slice(i, j)) for (spec, a, _), i, j in ranges if j > i]

    @property
    def _support(self) -> Tensor | None:
        """Indices in the block of the coordinates that are written; None for all of them, as with scales."""
        return self.v.support if self._moved is None else None

    @property
    def _map(self) -> LinearMap:
        """The map onto the coordinates that are written."""
        return self.v.on_support if self._moved is None else self.v

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a conversion of the model to the block; the map keeps its format."""
        self.v = self.v.converted(lambda t: t.to(fn(t[:0]).device))
        if self._moved is not None:
            moved, scales = self._moved
            self._moved = fn(moved), fn(scales)
        self.parts = self._split()

    @property
    def names(self) -> list[str]:
        """Names of the weights that the basis changes."""
        return [part.spec.name for part in self.parts]

    @property
    def _layers(self) -> list[int]:
        """Position of each weight's layer in the scales."""
        return [self._layer_of[name] for name in self.names]

    # -- weights ----------------------------------------------------------------------------------------------------

    def write(self, weights: Mapping[str, Tensor], start: Tensor, mean: Tensor, scales: Tensor, buffer: Tensor) -> None:
        """Write theta_0 + V m into the weights, at m = `mean`, through a buffer that is at least as long as `start`."""
        if self._views is None or self._views[0] is not buffer:
            self._views = buffer, [self._shaped(part, buffer[part.rows]) for part in self.parts]
        theta, values = buffer[: len(start)], self._views[1]
        if self._moved is None:
            self._map.displace(start, mean, theta)
        else:
            moved = self.v.matvec(mean)
            for spec, a, b in self.block.spans():
                torch.addcmul(start[a:b], moved[a:b], scales[self._layer_of[spec.name]], out=theta[a:b])
            self._moved = moved, scales
        self._copy(weights, values)

    def release_buffer(self) -> None:
        """Forget the buffer into which the weights were written last."""
        self._views = None

    def _copy(self, weights: Mapping[str, Tensor], values: list[Tensor]) -> None:
        """Copy values into the weights, each in the shape that `_shaped` has given it."""
        if self._support is None:
            torch._foreach_copy_([weights[part.spec.name] for part in self.parts], values)
            return
        for part, of_part in zip(self.parts, values, strict=True):
            weight = weights[part.spec.name]
            assert part.support is not None
            if weight.is_contiguous():
                weight.view(-1).index_copy_(0, part.support, of_part)
            else:
                weight.index_put_(torch.unravel_index(part.support, weight.shape), of_part)

    @staticmethod
    def _shaped(part: Part, values: Tensor) -> Tensor:
        """Return the values of a part in the shape of the weight; a vector for some of its coordinates."""
        return values.view(part.spec.shape) if part.support is None else values

    def restore(self, weights: Mapping[str, Tensor], start: Tensor) -> None:
        """Write theta_0 into the weights; for a sparse map, into the coordinates that it changes."""
        self._copy(weights, [self._shaped(part, start[part.rows]) for part in self.parts])

    def base_weights(self, weights: Mapping[str, Tensor], start: Tensor) -> dict[str, Tensor]:
        """Return theta_0 of every weight, in its shape."""
        # A sparse basis stores only the coordinates it changes; the others are theta_0
        if self._support is None:
            return self.block.unflatten(start.clone())
        return self.block.unflatten(self.block.flatten(weights).index_copy_(0, self._support, start))

    def delta(self, mean: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Return V m of every weight, in its shape, at m = `mean`."""
        deltas = self.block.unflatten(self.v.matvec(mean))
        if self._moved is None:
            return deltas
        return {name: delta * scales[self._layer_of[name]] for name, delta in deltas.items()}

    def theta(
        self, weights: Mapping[str, Tensor], start: Tensor, mean: Tensor, scales: Tensor | None
    ) -> dict[str, Tensor]:
        """Return theta_0 + V m of the changed weights as a function of m = `mean` and the scales.

        Nothing is written; the weights that are written in place are tested against this definition.
        """
        values = {}
        for part, moved in zip(self.parts, self._moved_by_part(mean), strict=True):
            name = part.spec.name
            theta = start[part.rows] + (moved if scales is None else scales[self._layer_of[name]] * moved)
            if part.support is not None:
                theta = weights[name].detach().reshape(-1).index_put((part.support,), theta)
            values[name] = theta.view(part.spec.shape)
        return values

    def _moved_by_part(self, mean: Tensor) -> Sequence[Tensor]:
        """Return V m of every weight as a function of m; with a map of its own each, if that costs no more.

        The gradients of the weights then reach m one by one, and are not joined to a vector as long as the block.
        """
        maps = [self._map.rows(part.rows.start, part.rows.stop) for part in self.parts]
        if all(v is not None for v in maps):
            return [matvec(v, mean) for v in maps if v is not None]
        sizes = [part.rows.stop - part.rows.start for part in self.parts]
        pieces: Sequence[Tensor] = matvec(self._map, mean).split(sizes)
        return pieces

    # -- gradients --------------------------------------------------------------------------------------------------

    def follow(
        self, weights: Mapping[str, Tensor], z: Tensor, scales: Tensor | None, sampled: Collection[int]
    ) -> dict[int, Tensor]:
        """Make the weights that `write` has written depend on z and the scales in the graph of autograd.

        Args:
            weights: leaves of autograd that require no gradient.
            z: [h, k].
            scales: lambda, if the layers have scales.
            sampled: numbers of the parts for which only the gradients of the changed coordinates are computed.

        Returns:
            Stand-ins for these coordinates, by the number of the part.
        """
        if not self.parts:
            return {}
        return follow(
            [weights[name] for name in self.names],
            z,
            self._map,
            [part.support for part in self.parts],
            sampled,
            scales,
            [] if scales is None else self._layers,
            self._moved,
        )

    @property
    def is_waiting(self) -> bool:
        """Whether gradients of some weights are gathered and those of others are pending."""
        return self._gathered is not None

    def gather(self, gradient: Tensor, number: int, start: Tensor) -> bool:
        """Add the gradient of the weight of one part to the gathered ones, and return whether they are complete."""
        if self._gathered is None:
            self._gathered = torch.zeros_like(start), set(range(len(self.parts)))
        part, (whole, missing) = self.parts[number], self._gathered
        whole[part.rows] += gradient if part.support is None else gradient[part.support]
        missing.discard(number)
        return not missing

    def pop_gathered(self) -> tuple[Tensor, Tensor | None]:
        """Return the gradients with respect to m and the scales, if there are any, of what has been gathered."""
        assert self._gathered is not None
        gradient, _ = self._gathered
        self._gathered = None
        if self._moved is None:
            return rmatvec(self._map, gradient), None
        gradients = [gradient[part.rows] for part in self.parts]
        parts, of_scales = through_scales(gradients, *self._moved, self._layers)
        return rmatvec(self._map, torch.cat(parts)), of_scales

    def discard_gathered(self) -> None:
        """Discard what a failed backward pass has left behind."""
        self._gathered = None


def stored_start(block: Block, v: LinearMap, weights: Mapping[str, Tensor], *, scaled: bool) -> Tensor:
    """Return the part of a block's theta_0 to store: for a sparse map without scales, the coordinates it changes."""
    start = block.flatten(weights)
    return start if v.support is None or scaled else start[v.support]


def layer_positions(layers: Partition, partition: Partition) -> dict[str, int]:
    """Return the position of each parameter's layer in the scales.

    Raises:
        MismatchError: the layers hold other parameters than the blocks of the partition.
    """
    ours, theirs = ({spec.name for spec in one.parameters()} for one in (partition, layers))
    if ours != theirs:
        raise MismatchError(
            "layer_scales: expected exactly the parameters that lie in the basis's blocks, but "
            f"{sorted(ours ^ theirs)[0]!r} lies in only one of the two"
        )
    return {spec.name: position for position, layer in enumerate(layers) for spec in layer.parameters}
