"""One block of a model that moves: its weights are theta_0 + V m, and of their gradient g only V^T g is kept.

Of a sparse map only the coordinates that it moves are kept from theta_0, written and projected. A map that cannot be
cut into rows is applied once per block: the gradients of the block's weights are gathered in one vector, which is
projected when the last of them has come, or at the end of the backward pass if some never come.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyspan.errors import MismatchError
from tinyspan.maps.base import LinearMap
from tinyspan.model.autograd import follow_block, follow_part, matvec
from tinyspan.partition import Block, ParameterSpec, Partition

__all__ = ["MovingBlock", "Part", "kept_start", "layer_positions"]


class Part(NamedTuple):
    """One weight's share of a block: V's rows for it, those that are zero left out.

    Attributes:
        spec: the weight.
        v: the map onto the coordinates that move.
        support: which these are, of the weight's own, ascending; None for all of them.
        rows: where theta_0 of these lies among what is kept of the block's theta_0.
    """

    spec: ParameterSpec
    v: LinearMap
    support: Tensor | None
    rows: slice


class MovingBlock:
    """A block's weights as a function of m, and the gradient of m as a function of theirs.

    With scales of the layers, theta_l = theta_0,l + lambda_l (V m)_l. Weights are told by name, each as this process
    holds it; `start` is what `kept_start` has returned.

    Args:
        block: the block.
        v: its map.
        layer_of: parameter name -> position of its layer in the scales; empty without scales.
        scales: lambda at first, if the layers have any.
        start: see above.

    Attributes:
        parts: one per weight that moves; None where the block is treated as a whole.
    """

    def __init__(
        self, block: Block, v: LinearMap, layer_of: Mapping[str, int], scales: Tensor | None, start: Tensor
    ) -> None:
        self.block, self.v, self._layer_of = block, v, layer_of
        self._moved = None if scales is None else (torch.zeros_like(start), scales)  # V m and lambda, as last written
        self._gathered: tuple[Tensor, set[int]] | None = None  # gradient so far, first rows of those it still waits for
        self.parts = self._cut()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what belongs to a backward pass, and the rows of V that the parts have."""
        return {**self.__dict__, "_gathered": None, "parts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.parts = self._cut()

    def _cut(self) -> list[Part] | None:
        """Cut the map into the weights' parts, or return None where the block has to be treated as a whole."""
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
        """Follow a conversion of the model; the map stays in the format it is in."""
        self.v = self.v.converted(lambda t: t.to(fn(t[:0]).device))
        self.parts = self._cut()
        if self._moved is not None:
            moved, scales = self._moved
            self._moved = fn(moved), fn(scales)

    @property
    def names(self) -> list[str]:
        """Names of the weights that move."""
        specs = self.block.parameters if self.parts is None else [part.spec for part in self.parts]
        return [spec.name for spec in specs]

    # -- weights ----------------------------------------------------------------------------------------------------

    def write(self, weights: Mapping[str, Tensor], start: Tensor, mean: Tensor, scales: Tensor) -> None:
        """Write theta_0 + V m into the weights, at m = `mean`."""
        if self.parts is None:
            for name, theta in self.block.unflatten(self._displaced(start, mean, scales)).items():
                weights[name].copy_(theta)
            return
        for part in self.parts:
            weight, origin = weights[part.spec.name], start[part.rows]
            in_place = part.support is None and weight.is_contiguous()
            theta = weight.view(-1) if in_place else torch.empty_like(origin)
            part.v.displace(origin, mean, theta)
            if not in_place:
                _put(weight, theta, part.support)

    def _displaced(self, start: Tensor, mean: Tensor, scales: Tensor) -> Tensor:
        """Return the weights as one vector, the map applied once."""
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
        """Put theta_0 back into the weights, of a sparse map into the coordinates that move."""
        for part in self.parts or ():
            _put(weights[part.spec.name], start[part.rows], part.support)
        if self.parts is None:
            for name, value in self.block.unflatten(start).items():
                weights[name].copy_(value)

    def base_weights(self, weights: Mapping[str, Tensor], start: Tensor) -> dict[str, Tensor]:
        """Return theta_0 of every weight, in its shape."""
        if len(start) < self.block.numel:  # of a sparse basis only what moves is kept; the rest has not moved
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
        """Return theta_0 + V m of the weights that move, as a function of m = `mean` and the scales.

        Nothing is written: this is the definition that the weights written in place are tested against.
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
        """Let the weights that `write` has written depend on z and the scales, so that autograd knows the way.

        Args:
            weights: leaves of autograd that require no gradient.
            z: [h, k].
            scales: lambda, if the layers have any.
            sampled: numbers of the parts of which only the gradients of the coordinates that move are computed.

        Returns:
            What stands for these coordinates, by the number of the part.
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
        """Whether gradients of some weights have been gathered, and wait for those of others."""
        return self._gathered is not None

    def gather(self, gradient: Tensor, rows: slice, start: Tensor) -> bool:
        """Add the gradient of one weight to those of the others, and return whether they have come from all."""
        if self._gathered is None:
            self._gathered = torch.zeros_like(start), {first for _, first, _ in self.block.spans()}
        whole, missing = self._gathered
        whole[rows] += gradient
        missing.discard(rows.start)
        return not missing

    def take_gathered(self) -> tuple[Tensor, Tensor | None]:
        """Return the gradient g of V m, and that of the scales, if there are any, from what has been gathered.

        That of the scales is <g_l, (V m)_l>, of V m (lambda_l g_l)_l.
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

    def drop_gathered(self) -> None:
        """Drop what a backward pass that failed has left behind."""
        self._gathered = None


def kept_start(block: Block, v: LinearMap, weights: Mapping[str, Tensor], *, scaled: bool) -> Tensor:
    """Return what has to be kept of a block's theta_0: of a sparse map, unless scaled, the coordinates that move."""
    start = block.flatten(weights)
    return start if v.support is None or scaled else start[v.support]


def layer_positions(layers: Partition, partition: Partition) -> dict[str, int]:
    """Return for every parameter the position of its layer in the scales.

    Raises:
        MismatchError: the layers hold other parameters than the blocks of the partition.
    """
    ours, theirs = ({spec.name for spec in one.parameters()} for one in (partition, layers))
    if ours != theirs:
        raise MismatchError(
            "layer_scales: expected the parameters that lie in the basis's blocks, no others and none fewer; "
            f"{sorted(ours ^ theirs)[0]!r} lies in one of the two alone"
        )
    return {spec.name: position for position, layer in enumerate(layers) for spec in layer.parameters}


def _put(weight: Tensor, values: Tensor, support: Tensor | None) -> None:
    """Write values into a weight, or into some of its coordinates alone."""
    if support is None:
        weight.copy_(values.view(weight.shape))
    elif weight.is_contiguous():
        weight.view(-1).index_copy_(0, support, values)
    else:
        weight.index_put_(torch.unravel_index(support, weight.shape), values)
