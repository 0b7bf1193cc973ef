"""V z and V^T g as differentiable operations that work under every transform of torch.

`matvec` and `rmatvec` are linear: in reverse mode the derivative of each is the other, and in forward mode each is its
own derivative. They nest, so second derivatives are again one of the two. Under `vmap` the map is applied to one vector
after the other.

`follow_part` and `follow_block` make weights that were written in place depend on z. Autograd then passes on a weight's
gradient g as soon as it is complete, adds V^T g to the gradient of z, and frees g, so the gradients of all weights are
never in memory together.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tinyspan.maps.base import LinearMap

__all__ = ["follow_block", "follow_part", "matvec", "rmatvec", "temporarily_outside_transforms"]


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
    with _without_autocast(z):
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
    with _without_autocast(g):
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


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
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


def follow_part(weight: Tensor, z: Tensor, v: LinearMap, support: Tensor | None, *, sampled: bool) -> Tensor | None:
    """Make a weight, whose values are theta_0 + V mean_i z_i already, depend on z, [h, k].

    Args:
        weight: a leaf of autograd that requires no gradient.
        z: coordinates of the block.
        v: the map onto the coordinates that the basis changes.
        support: indices of these coordinates; None for all of them.
        sampled: also return a stand-in tensor for these coordinates.

    Returns:
        The stand-in, zeros [n'], whose gradient reaches z like that of the coordinates; None unless `sampled`.
    """
    results = _FollowPart.apply(weight, z, v, support, sampled)
    return results[1] if sampled else None


def follow_block(
    weights: Sequence[Tensor],
    z: Tensor,
    v: LinearMap,
    scales: Tensor | None,
    layers: Sequence[int],
    moved: tuple[Tensor, Tensor] | None,
) -> None:
    """Make all weights of a block, which have been written already, depend on z and on the scales of their layers.

    Args:
        weights: the weights of the block, in its order; leaves of autograd that do not require gradients.
        z: [h, k].
        v: the block's map.
        scales: lambda, if the layers have scales.
        layers: for each weight the position of its layer in the scales.
        moved: V mean_i z_i and lambda as they were written, with scales.
    """
    _FollowBlock.apply(v, layers, moved, z, scales, *weights)


class _FollowPart(torch.autograd.Function):
    """The same weight as a function of z; see `follow_part`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, z: Tensor, v: LinearMap, support: Tensor | None, sampled: bool) -> Any:
        ctx.mark_dirty(weight)
        ctx.set_materialize_grads(False)
        ctx.v, ctx.support, ctx.members = v, support, len(z)
        return (weight, weight.new_zeros(1).expand(v.size)) if sampled else weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, sampled = gradients[0], gradients[1] if len(gradients) > 1 else None
        g = None if whole is None else _flat(whole)
        if g is not None and ctx.support is not None:
            g = g[ctx.support]
        if sampled is not None:
            g = sampled if g is None else g + sampled
        return None, None if g is None else _of_members(rmatvec(ctx.v, g), ctx.members), None, None, None


class _FollowBlock(torch.autograd.Function):
    """The same weights of a block as functions of z and the scales; see `follow_block`."""

    @staticmethod
    def forward(
        ctx: Any,
        v: LinearMap,
        layers: Sequence[int],
        moved: tuple[Tensor, Tensor] | None,
        z: Tensor,
        scales: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.mark_dirty(*weights)
        ctx.set_materialize_grads(False)
        ctx.v, ctx.layers, ctx.moved, ctx.shapes = v, layers, moved, [weight.shape for weight in weights]
        ctx.z, ctx.scales, ctx.versions = z, scales, _versions(z, scales)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        present = next((g for g in gradients if g is not None), None)
        if present is None:
            return (None,) * (5 + len(gradients))
        parts = [
            present.new_zeros(shape.numel()) if g is None else _flat(g)
            for g, shape in zip(gradients, ctx.shapes, strict=True)
        ]
        of_scales = None
        if ctx.scales is not None:
            moved, scales = _displacement(ctx)
            pieces = moved.split([shape.numel() for shape in ctx.shapes])
            dots = torch.stack([(part * piece).sum() for part, piece in zip(parts, pieces, strict=True)])
            layers = torch.tensor(ctx.layers, device=dots.device)
            of_scales = torch.zeros_like(scales).index_add(0, layers, dots)
            parts = [scales[layer] * part for layer, part in zip(ctx.layers, parts, strict=True)]
        of_z = _of_members(rmatvec(ctx.v, torch.cat(parts)), len(ctx.z))
        return None, None, None, of_z, of_scales, *(None for _ in gradients)


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


def _flat(gradient: Tensor) -> Tensor:
    return (gradient if gradient.layout == torch.strided else gradient.to_dense()).reshape(-1)


def _of_members(of_mean: Tensor, members: int) -> Tensor:
    """Return the gradient of each z_i, from that of their mean."""
    return (of_mean if members == 1 else of_mean / members).expand(members, -1)
