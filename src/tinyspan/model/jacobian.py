"""Derivatives of a model's outputs with respect to all of z.

K is the number of coordinates in z, over all members, in the order of
`torch.nn.utils.parameters_to_vector(subspace.z)`. With some hundreds of coordinates, a full Jacobian fits in memory.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from tinyspan.errors import InputError
from tinyspan.model.batches import arguments_of, by_row, logits_of, rows_of

if TYPE_CHECKING:
    from tinyspan.model.subspace import SubspaceModel

__all__ = [
    "Method",
    "called",
    "central_step",
    "derivatives_of_z",
    "elementary_attention",
    "gradient_of",
    "jacobian",
    "require_function_of_z",
    "require_method",
    "warn_of_no_dependence",
]

Method = Literal["reverse", "forward", "central"]
STEP = 6e-6  # cube root of float64's rounding unit, which balances both errors of a central difference


def jacobian(
    subspace: "SubspaceModel", batch: Any, *, method: Method = "reverse", outputs: Callable[[Any], Tensor] | None = None
) -> Tensor:
    """Return the derivatives of the outputs on each row with respect to all of z, [rows, outputs, K].

    z of every block counts, frozen or not. With an empty basis K is 0.

    * `reverse`: exact. One forward pass per row, and one backward pass per output of it. As with `forward`, the weights
      are computed anew as a function of z.
    * `forward`: exact. K forward-mode passes over the batch, with at least twice the memory of inference. Where the
      model calls torch's fused attention, which has no forward mode, it is computed by elementary operations.
    * `central`: (f(z + s e_i) - f(z - s e_i)) / 2 s. 2 K forward passes without gradients, for any model. The error is
      `s^2 / 6` times a third derivative, plus rounding of about `eps |f| / s`, where s is `STEP (1 + |z_i|)` in float64
      and `5e-3 (1 + |z_i|)` in float32. About ten digits are correct in float64, and three to five in float32.

    Args:
        subspace: a SubspaceModel in evaluation mode.
        batch: inputs of the model: a tensor, or keyword arguments by name. Tensors have one row per example.
        method: see above.
        outputs: function from what the model returns to the tensor [rows, ...]; by default its `logits`, or the tensor
            itself.

    Raises:
        InputError: the model is in training mode, merged or inside `disable_adapter`, or the method is unknown; with
            `reverse` and `forward`, the model is cut by `fully_shard` or checkpoints activations.
        NotImplementedError: torch has no forward-mode derivative of some operation, with `method="forward"`.

    Example:
        >>> from tinyspan import Basis, SubspaceModel, by_pattern
        >>> model = torch.nn.Linear(2, 1, bias=False).eval()
        >>> basis = Basis.from_directions(by_pattern(model, {"all": ".*"}), {"all": torch.eye(2)})
        >>> jacobian(SubspaceModel(model, basis).eval(), torch.tensor([[3.0, 4.0]]))
        tensor([[[3., 4.]]])
    """
    require_function_of_z(subspace)
    columns: dict[str, Callable[..., Tensor]] = {"reverse": _reverse, "forward": _forward, "central": _central}
    require_method(method, columns)
    outputs = outputs or logits_of
    if not len(subspace.z):
        with torch.no_grad():
            return by_row(outputs(called(subspace, batch)))[..., None][..., :0]
    return columns[method](subspace, batch, outputs)


def require_function_of_z(subspace: "SubspaceModel") -> None:
    """Refuse a model that does not compute one function of z.

    Raises:
        InputError: the model is in training mode, merged or inside `disable_adapter`.
    """
    subspace.engine.require_enabled()
    subspace.engine.require_following()
    if subspace.training or subspace.model.training:
        raise InputError("the model is in training mode, in which dropout changes the function: call eval() first")


def require_method(method: str, ways: Mapping[str, Any]) -> None:
    """Refuse a method that is none of the keys.

    Raises:
        InputError: the method is unknown.
    """
    if method not in ways:
        raise InputError(f"expected the method to be one of {', '.join(ways)}, got {method!r}")


def _reverse(subspace: "SubspaceModel", batch: Any, outputs: Callable[[Any], Tensor]) -> Tensor:
    return torch.stack([derivatives_of_z(subspace, row, outputs) for row in rows_of(batch)])


@torch.enable_grad()
def derivatives_of_z(subspace: "SubspaceModel", inputs: Any, values: Callable[[Any], Tensor]) -> Tensor:
    """Return the derivatives of numbers, computed from what the model returns, with respect to all of z, [numbers, K].

    The weights are a function of z here, not written in place: among several processes only this passes the gradients
    of z through autograd.
    """
    z = [own.detach().requires_grad_() for own in subspace.z]
    args, kwargs = arguments_of(inputs)
    numbers = values(subspace.engine.call_at(z, subspace.scales, args, kwargs)).reshape(-1)
    return torch.stack([gradient_of(number, z) for number in numbers])


def gradient_of(number: Tensor, z: list[Tensor]) -> Tensor:
    """Return the gradient of a number with respect to all of z, zero for blocks on which it does not depend."""
    if not z:
        return number.new_zeros(0)
    if not number.requires_grad:
        warn_of_no_dependence()
        return torch.cat([torch.zeros_like(own).reshape(-1) for own in z])
    gradients = torch.autograd.grad(number, z, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def warn_of_no_dependence() -> None:
    """Warn that derivatives are zero; backward passes cannot tell outputs that are detached."""
    warnings.warn("the outputs do not depend on z, so their derivatives are 0; are they detached?", stacklevel=3)


def _forward(subspace: "SubspaceModel", batch: Any, outputs: Callable[[Any], Tensor]) -> Tensor:
    def values(z: Tensor) -> Tensor:
        args, kwargs = arguments_of(batch)
        return by_row(outputs(subspace.forward_at(z, *args, **kwargs)))

    z = parameters_to_vector(subspace.z).detach()
    units = torch.eye(len(z), dtype=z.dtype, device=z.device)
    with elementary_attention():
        return torch.stack([torch.func.jvp(values, (z,), (unit,))[1].detach() for unit in units], -1)


@torch.no_grad()
def _central(subspace: "SubspaceModel", batch: Any, outputs: Callable[[Any], Tensor]) -> Tensor:
    z = [parameter.detach().clone() for parameter in subspace.z]
    columns = []
    try:
        for parameter in subspace.z:
            flat = parameter.view(-1)
            for index in range(len(flat)):
                columns.append(_difference(subspace, batch, outputs, flat, index))
    finally:
        for parameter, value in zip(subspace.z, z, strict=True):
            parameter.copy_(value)
        subspace.refresh()
    return torch.stack(columns, -1)


def _difference(
    subspace: "SubspaceModel", batch: Any, outputs: Callable[[Any], Tensor], z: Tensor, index: int
) -> Tensor:
    """Return the central difference in one number of z, and put that number back."""
    middle = z[index].clone()
    ends = []
    for sign in (1, -1):
        z[index] = middle + sign * central_step(middle)
        ends.append((z[index].clone(), by_row(outputs(called(subspace, batch))).clone()))
    z[index] = middle
    (above, high), (below, low) = ends
    return (high - low).to(z.dtype) / (above - below)


def central_step(number: Tensor) -> Tensor:
    """Return the step of a central difference at a number in z."""
    return (STEP if number.dtype == torch.float64 else 5e-3) * (1 + number.abs())


def elementary_attention() -> AbstractContextManager[None]:
    """Return a context in which torch's fused attention is computed by operations that have all derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


def called(subspace: "SubspaceModel", inputs: Any) -> Any:
    """Return what the model returns for a batch of inputs, at the present z."""
    args, kwargs = arguments_of(inputs)
    return subspace(*args, **kwargs)
