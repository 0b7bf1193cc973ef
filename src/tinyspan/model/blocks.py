"""One block of a model as a function of m: its weights are theta_0 + V m, and their gradient g is reduced to V^T g.

For a sparse map, only the coordinates that it changes are stored from theta_0, written and projected. A map that cannot
be split by rows is applied once per block: the gradients of the block's weights are gathered in one vector, which is
projected when the last gradient is complete, or at the end of the backward pass if some weights get none.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyspan.errors import MismatchError
from tinyspan.maps.base import LinearMap
from tinyspan.model.autograd import follow_block, follow_part, matvec
from tinyspan.partition import Block, ParameterSpec, Partition

__all__ = ["MovingBlock", "Part", "stored_start", "layer_positions"]


class Part(NamedTuple):
    """One weight's part of a block: the rows of V for this weight, without the rows that are zero.

    Attributes:
        spec: the weight.
        v: the map onto the coordinates that the basis changes.
        support: indices of these coordinates in the weight, ascending; None for all of them.
        rows: slice of their theta_0 in the stored theta_0 of the block.
    """

    spec: ParameterSpec
    v: LinearMap
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
        parts: one per weight that the basis changes; None if the block is treated as a whole.
    """

    def __init__(
        self, block: Block, v: LinearMap, layer_of: Mapping[str, int], scales: Tensor | None, start: Tensor
    ) -> None:
        self.block, self.v, self._layer_of = block, v, layer_of
        self._moved = None if scales is None else (torch.zeros_like(start), scales)  # V m and lambda, as last written
        self._gathered: tuple[Tensor, set[int]] | None = None  # gradient so far, first rows of those it still waits for
        self.parts = self._split_map()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of a backward pass, and the parts, which are views of V."""
        return {**self.__dict__, "_gathered": None, "parts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.parts = self._split_map()

    def _split_map(self) -> list[Part] | None:
        """Split the map into the parts of the weights, or return None if the block has to be treated as a whole."""
        v, block = self.v, self.block
        if self._moved is None and len(block.parameters) == 1 and v.support is None:
            return [Part(block.parameters[0], v, None, slice(0, block.numel))]
        if self._moved is not None:
            return None
        parts, first = [], 0
        for spec, a, b in block.spans():
            if (of_weight := v.rows(a, b)) is None:
                return None
            last = first + of_weight.on_support.size
            if last > first:
                parts.append(Part(spec, of_weight.on_support, of_weight.support, slice(first, last)))
            first = last
        return parts

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a conversion of the model to the block; the map keeps its format."""
        self.v = self.v.converted(lambda t: t.to(fn(t[:0]).device))
        self.parts = self._split_map()
        if self._moved is not None:
            moved, scales = self._moved
            self._moved = fn(moved), fn(scales)

    @property
    def names(self) -> list[str]:
        """Names of the weights that the basis changes."""
        specs = self.block.parameters if self.parts is None else [part.spec for part in self.parts]
        return [spec.name for spec in specs]

    # -- weights ----------------------------------------------------------------------------------------------------

    def write(self, weights: Mapping[str, Tensor], start: Tensor, mean: Tensor, scales: Tensor) -> None:
        """Write theta_0 + V m into the weights, at m = `mean`."""
        if self.parts is None:
            for name, theta in self.block.unflatten(self._compute_weights(start, mean, scales)).items():
                weights[name].copy_(theta)
            return
        for part in self.parts:
            weight, origin = weights[part.spec.name], start[part.rows]
            in_place = part.support is None and weight.is_contiguous()
            theta = weight.view(-1) if in_place else torch.empty_like(origin)
            part.v.displace(origin, mean, theta)
            if not in_place:
                _write_values(weight, theta, part.support)

    def _compute_weights(self, start: Tensor, mean: Tensor, scales: Tensor) -> Tensor:
        """Return the weights as one vector, with one application of the map."""
        theta = start.clone()
        if self._moved is None:
            self.v.displace(theta, mean, theta)
            return theta
        moved = self.v.matvec(mean)
        for spec, a, b in self.block.spans():
            theta[a:b] += scales[self._layer_of[spec.name]] * moved[a:b]
        self._moved = moved, scales
        return theta

    def restore(self, weights: Mapping[str, Tensor], start: Tensor) -> None:
        """Write theta_0 into the weights; for a sparse map, into the coordinates that it changes."""
        for part in self.parts or ():
            _write_values(weights[part.spec.name], start[part.rows], part.support)
        if self.parts is None:
            for name, value in self.block.unflatten(start).items():
                weights[name].copy_(value)

    def base_weights(self, weights: Mapping[str, Tensor], start: Tensor) -> dict[str, Tensor]:
        """Return theta_0 of every weight, in its shape."""
        # A sparse basis stores only the coordinates it changes; the others are theta_0
        if len(start) < self.block.numel:
            assert self.v.support is not None
            start = self.block.flatten(weights).index_copy_(0, self.v.support, start)
        return self.block.unflatten(start)

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
        if self.parts is None:
            moved = matvec(self.v, mean)
            return {
                spec.name: (start[a:b] + self._scale(spec.name, scales) * moved[a:b]).view(spec.shape)
                for spec, a, b in self.block.spans()
            }
        values = {}
        for part in self.parts:
            theta = start[part.rows] + matvec(part.v, mean)
            if part.support is not None:
                whole = weights[part.spec.name].detach().reshape(-1)
                theta = whole.index_put((part.support,), theta)
            values[part.spec.name] = theta.view(part.spec.shape)
        return values

    def _scale(self, name: str, scales: Tensor | None) -> Tensor | float:
        return 1.0 if scales is None else scales[self._layer_of[name]]

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
        if self.parts is None:
            names = [spec.name for spec in self.block.parameters]
            layers = [] if scales is None else [self._layer_of[name] for name in names]
            follow_block([weights[name] for name in names], z, self.v, scales, layers, self._moved)
            return {}
        stand_ins = {}
        for number, part in enumerate(self.parts):
            weight, is_sampled = weights[part.spec.name], number in sampled
            stand_in = follow_part(weight, z, part.v, part.support, sampled=is_sampled)
            if stand_in is not None:
                stand_ins[number] = stand_in
        return stand_ins

    @property
    def is_waiting(self) -> bool:
        """Whether gradients of some weights are gathered and those of others are pending."""
        return self._gathered is not None

    def gather(self, gradient: Tensor, rows: slice, start: Tensor) -> bool:
        """Add the gradient of one weight to the gathered ones, and return whether they are complete."""
        if self._gathered is None:
            self._gathered = torch.zeros_like(start), {first for _, first, _ in self.block.spans()}
        whole, missing = self._gathered
        whole[rows] += gradient
        missing.discard(rows.start)
        return not missing

    def pop_gathered(self) -> tuple[Tensor, Tensor | None]:
        """Return the gathered gradient g with respect to V m, and that with respect to the scales, if there are any.

        The gradient of a scale is <g_l, (V m)_l>; that of V m is (lambda_l g_l)_l.
        """
        assert self._gathered is not None
        gradient, _ = self._gathered
        self._gathered = None
        if self._moved is None:
            return gradient, None
        moved, scales = self._moved
        of_scales = torch.zeros_like(scales)
        for spec, a, b in self.block.spans():
            layer = self._layer_of[spec.name]
            of_scales[layer] += torch.dot(gradient[a:b], moved[a:b])
            gradient[a:b] *= scales[layer]
        return gradient, of_scales

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


def _write_values(weight: Tensor, values: Tensor, support: Tensor | None) -> None:
    """Write values into a weight, or into the coordinates in `support` only."""
    if support is None:
        weight.copy_(values.view(weight.shape))
    elif weight.is_contiguous():
        weight.view(-1).index_copy_(0, support, values)
    else:
        weight.index_put_(torch.unravel_index(support, weight.shape), values)
