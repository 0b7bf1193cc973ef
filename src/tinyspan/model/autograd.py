"""V z and V^T g as differentiable operations that work under every transform of torch.

`matvec` and `rmatvec` are linear: in reverse mode the derivative of each is the other, and in forward mode each is its
own derivative. They nest, so second derivatives are again one of the two. Under `vmap` the map is applied to one vector
after the other.

`follow` makes the weights of a block, which were written in place, depend on z. As soon as their gradient g is
complete, autograd adds V^T g to the gradient of z and frees g, so the gradients of all blocks are never in memory
together.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tinyspan.maps.base import LinearMap

__all__ = [
    "flat",
    "follow",
    "matvec",
    "of_members",
    "rmatvec",
    "temporarily_outside_transforms",
    "through_scales",
    "without_autocast",
]


def matvec(v: LinearMap, z: Tensor) -> Tensor:
    """Return V z, [k] -> [D], differentiable with respect to z in reverse and forward mode.

    Example:
        >>> from tinyspan import DenseMap
        >>> v = DenseMap(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]))
        >>> torch.func.jacfwd(lambda z: matvec(v, z))(torch.zeros(2))
        tensor([[1., 0.],
                [2., 1.],
                [0., 3.]])
    """
    with without_autocast(z):
        return v.matvec(z) if _is_plain(z) else _apply(_MatVec, v, z)


def rmatvec(v: LinearMap, g: Tensor) -> Tensor:
    """Return V^T g, [D] -> [k], differentiable with respect to g in reverse and forward mode.

    Example:
        >>> from tinyspan import DenseMap
        >>> v = DenseMap(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]))
        >>> torch.func.vmap(lambda g: rmatvec(v, g))(torch.eye(3))
        tensor([[1., 0.],
                [2., 1.],
                [0., 3.]])
    """
    with without_autocast(g):
        return v.rmatvec(g.contiguous()) if _is_plain(g) else _apply(_RMatVec, v, g)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor takes no part in differentiation or transforms, so that no autograd function is needed."""
    return not (
        (tensor.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
        or forward_ad._current_level >= 0
    )


def _apply(function: Any, v: LinearMap, vector: Tensor) -> Tensor:
    # From `is_grads_batched`, which does not call the vmap rule of a function
    if torch._C._functorch.is_legacy_batchedtensor(vector):
        columns = torch.stack([v.matvec(unit) for unit in torch.eye(v.rank, dtype=vector.dtype, device=vector.device)])
        return vector @ columns if function is _MatVec else columns @ vector
    result: Tensor = function.apply(v, vector)
    return result


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which operations on the device of a tensor are not autocast."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _MatVec(torch.autograd.Function):
    """V z."""

    @staticmethod
    def forward(v: LinearMap, z: Tensor) -> Tensor:
        return v.matvec(z.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.v = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, rmatvec(ctx.v, gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return matvec(ctx.v, tangents[1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], v: LinearMap, z: Tensor) -> tuple[Tensor, int]:
        return torch.stack([matvec(v, one) for one in z.unbind(in_dims[1])]), 0


class _RMatVec(torch.autograd.Function):
    """V^T g."""

    @staticmethod
    def forward(v: LinearMap, g: Tensor) -> Tensor:
        return v.rmatvec(g.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.v = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, matvec(ctx.v, gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return rmatvec(ctx.v, tangents[1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], v: LinearMap, g: Tensor) -> tuple[Tensor, int]:
        return torch.stack([rmatvec(v, one) for one in g.unbind(in_dims[1])]), 0


# -- weights that were written in place -------------------------------------------------------------------------------


def temporarily_outside_transforms() -> AbstractContextManager[Any]:
    """Return a context in which functions are applied to plain tensors, even if the caller is inside transforms."""
    if not torch._C._are_functorch_transforms_active():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def follow(
    weights: Sequence[Tensor],
    z: Tensor,
    v: LinearMap,
    supports: Sequence[Tensor | None],
    sampled: Collection[int] = (),
    scales: Tensor | None = None,
    layers: Sequence[int] = (),
    moved: tuple[Tensor, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Make the weights of a block, whose values are theta_0 + V mean_i z_i already, depend on z and the scales.

    Args:
        weights: leaves of autograd that require no gradients, in the order of the block.
        z: [h, k].
        v: the map onto the coordinates of all weights that the basis changes.
        supports: for each weight the indices of these coordinates; None for all of them.
        sampled: numbers of the weights that also get a stand-in.
        scales: lambda, if the layers have scales.
        layers: for each weight the position of its layer in the scales.
        moved: V mean_i z_i and lambda as they were written, with scales.

    Returns:
        The stand-in of each of these weights by its number, zeros [n'] whose gradient reaches z like that of the
        coordinates.
    """
    numbers = sorted(sampled)
    results = _Follow.apply(v, supports, numbers, layers, moved, z, scales, *weights)
    return dict(zip(numbers, results[len(weights) :], strict=True))


class _Follow(torch.autograd.Function):
    """The same weights of a block as functions of z and the scales; see `follow`."""

    @staticmethod
    def forward(
        ctx: Any,
        v: LinearMap,
        supports: Sequence[Tensor | None],
        sampled: Sequence[int],
        layers: Sequence[int],
        moved: tuple[Tensor, Tensor] | None,
        z: Tensor,
        scales: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.mark_dirty(*weights)
        ctx.set_materialize_grads(False)
        ctx.v, ctx.supports, ctx.sampled, ctx.layers, ctx.moved = v, supports, sampled, layers, moved
        ctx.sizes = [weight.numel() if n is None else len(n) for weight, n in zip(weights, supports, strict=True)]
        ctx.z, ctx.scales, ctx.versions = z, scales, _versions(z, scales)
        zero = weights[0].new_zeros(1)
        return *weights, *(zero.expand(ctx.sizes[number]) for number in sampled)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        of_stand_ins = dict(zip(ctx.sampled, gradients[len(ctx.sizes) :], strict=True))
        present = next((g for g in gradients if g is not None), None)
        if present is None:
            return (None,) * (7 + len(ctx.sizes))
        parts = []
        for number, (support, size) in enumerate(zip(ctx.supports, ctx.sizes, strict=True)):
            part, of_stand_in = gradients[number], of_stand_ins.get(number)
            if part is not None:
                part = flat(part) if support is None else flat(part).index_select(0, support)
            if of_stand_in is not None:
                part = of_stand_in if part is None else part + of_stand_in
            parts.append(torch.zeros(size, dtype=present.dtype, device=present.device) if part is None else part)
        of_scales = None
        if ctx.scales is not None:
            parts, of_scales = through_scales(parts, *_displacement(ctx), ctx.layers)
        of_mean = rmatvec(ctx.v, torch.cat(parts) if len(parts) > 1 else parts[0])
        return *(None,) * 5, of_members(of_mean, len(ctx.z)), of_scales, *(None,) * len(ctx.sizes)


def _displacement(ctx: Any) -> tuple[Tensor, Tensor]:
    """Return V mean_i z_i and the scales; as functions of z and the scales if second derivatives are needed.

    Raises:
        RuntimeError: second derivatives are needed, and z has changed since the weights were written.
    """
    if not torch.is_grad_enabled():
        moved: tuple[Tensor, Tensor] = ctx.moved
        return moved
    if _versions(ctx.z, ctx.scales) != ctx.versions:
        raise RuntimeError(
            "z or the scales have been modified since the forward pass, so its second derivatives are lost; compute "
            "them before the optimizer's step"
        )
    return matvec(ctx.v, ctx.z.mean(0)), ctx.scales


def _versions(*tensors: Tensor | None) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]


def through_scales(
    parts: Sequence[Tensor], moved: Tensor, scales: Tensor, layers: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients lambda_l g_l with respect to V m, and <g_l, (V m)_l> with respect to the scales.

    Args:
        parts: for each weight the gradient g_l of its layer's part, as a vector.
        moved: V m of all weights.
        scales: lambda.
        layers: for each weight the position of its layer in the scales.
    """
    pieces = moved.split([len(part) for part in parts])
    dots = torch.stack([(part * piece).sum() for part, piece in zip(parts, pieces, strict=True)])
    of_scales = torch.zeros_like(scales).index_add(0, torch.tensor(layers, device=dots.device), dots)
    return [scales[layer] * part for layer, part in zip(layers, parts, strict=True)], of_scales


def flat(gradient: Tensor) -> Tensor:
    """Return a gradient, dense or sparse, as one vector."""
    return (gradient if gradient.layout == torch.strided else gradient.to_dense()).reshape(-1)


def of_members(of_mean: Tensor, members: int) -> Tensor:
    """Return the gradient of each z_i, from that of their mean."""
    return (of_mean if members == 1 else of_mean / members).expand(members, -1)
