"""Derivatives of a model's outputs with respect to all of z, and the matrices [K, K] computed from them.

K is the number of coordinates in z, over all members, in the order of
`torch.nn.utils.parameters_to_vector(subspace.z)`. With some hundreds of coordinates, a full Jacobian and an exact
Gauss-Newton matrix fit in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from tinyspan.errors import InputError

if TYPE_CHECKING:
    from tinyspan.model.subspace import SubspaceModel

__all__ = ["Method", "empirical_fisher", "gauss_newton", "jacobian"]

Method = Literal["reverse", "forward", "central"]
Loss = Callable[[Tensor, Tensor], Tensor]
STEP = 6e-6  # cube root of float64's rounding unit, which balances both errors of a central difference


def jacobian(
    subspace: "SubspaceModel", batch: Any, *, method: Method = "reverse", outputs: Callable[[Any], Tensor] | None = None
) -> Tensor:
    """Return the derivatives of the outputs on each row with respect to all of z, [rows, outputs, K].

    z of every block counts, frozen or not. With an empty basis K is 0.

    * `reverse`: exact. One forward pass per row, and one backward pass per output of it. As with `forward`, the weights
      are computed anew as a function of z.
    * `forward`: exact. K forward-mode passes over the batch, with at least twice the memory of inference. torch has no
      forward mode for fused attention on a CPU.
    * `central`: (f(z + s e_i) - f(z - s e_i)) / 2 s. 2 K forward passes without gradients, for any model. The error is
      `s^2 / 6` times a third derivative, plus rounding of about `eps |f| / s`, where s is `STEP (1 + |z_i|)` in float64
      and `5e-3 (1 + |z_i|)` in float32. About ten digits are correct in float64 and five in float32.

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
    _require_function_of_z(subspace)
    columns: dict[str, Callable[..., Tensor]] = {"reverse": _reverse, "forward": _forward, "central": _central}
    if method not in columns:
        raise InputError(f"expected the method to be one of {', '.join(columns)}, got {method!r}")
    outputs = outputs or _logits
    if not len(subspace.z):
        with torch.no_grad():
            return outputs(_call(subspace, batch)).flatten(1)[..., None][..., :0]
    return columns[method](subspace, batch, outputs)


def gauss_newton(
    subspace: "SubspaceModel",
    loader: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    method: Method = "reverse",
    outputs: Callable[[Any], Tensor] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Return sum_n J_n^T H_n J_n, [K, K]: H_n is the Hessian of the loss with respect to the outputs on example n.

    With cross entropy, and with half the squared error, it is the Fisher information of the model's own predictive
    distribution, summed over the examples.

    Args:
        subspace: a SubspaceModel in evaluation mode.
        loader: batches, each a pair of inputs and targets, or keyword arguments by name with the targets in `labels`.
        loss: function from the outputs [outputs] and the target of one example to a number.
        method: method of the Jacobian; see `jacobian`.
        outputs: see `jacobian`.
        progress: wraps the iteration over batches, for a progress bar.

    Raises:
        InputError: a batch has no targets, or not one per row, or a condition of `jacobian`.
    """
    outputs = outputs or _logits
    matrix = _zeros(subspace)
    for inputs, targets in map(_split, progress(loader)):
        columns = jacobian(subspace, inputs, method=method, outputs=outputs)
        with torch.no_grad():
            values = outputs(_call(subspace, inputs)).flatten(1).to(columns)
        curvature = torch.func.vmap(torch.func.hessian(loss))(values, targets)
        matrix += torch.einsum("noi,nop,npj->ij", columns, curvature.to(columns), columns)
    return matrix


def empirical_fisher(
    subspace: "SubspaceModel",
    loader: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    outputs: Callable[[Any], Tensor] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Return sum_n g_n g_n^T, [K, K]: g_n is the gradient of the loss on example n with respect to z.

    The targets are those of the loader. For the Fisher information, an expectation over the model's own predictions,
    see `gauss_newton`.

    Args:
        subspace: a SubspaceModel in evaluation mode.
        loader: see `gauss_newton`.
        loss: see `gauss_newton`.
        outputs: see `jacobian`.
        progress: wraps the iteration over batches, for a progress bar.

    Raises:
        InputError: a batch has no targets or another number of them than rows, the outputs have several rows for one
            example, or as of `jacobian` with `method="reverse"`.
    """
    _require_function_of_z(subspace)
    outputs = outputs or _logits
    matrix = _zeros(subspace)
    for inputs, targets in map(_split, progress(loader)):
        pairs = zip(_rows(inputs), targets, strict=True)
        gradients = torch.cat([_of_z(subspace, row, partial(_loss, loss, outputs, target)) for row, target in pairs])
        matrix += gradients.T @ gradients
    return matrix


def _require_function_of_z(subspace: "SubspaceModel") -> None:
    """Refuse a model that does not compute one function of z.

    Raises:
        InputError: the model is in training mode, merged or inside `disable_adapter`.
    """
    subspace.engine.require_enabled()
    subspace.engine.require_following()
    if subspace.training or subspace.model.training:
        raise InputError("the model is in training mode, in which dropout changes the function: call eval() first")


def _zeros(subspace: "SubspaceModel") -> Tensor:
    """Return zeros [K, K] in the dtype of z, or of the model's weights if the basis is empty."""
    size = sum(z.numel() for z in subspace.z)
    like: Tensor = next(iter([*subspace.z, *subspace.model.parameters()]))
    return like.new_zeros(size, size)


def _loss(loss: Loss, outputs: Callable[[Any], Tensor], target: Tensor, result: Any) -> Tensor:
    """Return the loss on one example, of which the model has returned the result.

    Raises:
        InputError: the outputs have several rows.
    """
    values = outputs(result)
    if len(values) != 1:
        raise InputError(f"expected outputs of shape [rows, ...] with one row per example, got {len(values)} for one")
    return loss(values.flatten(), target)


def _reverse(subspace: "SubspaceModel", batch: Any, outputs: Callable[[Any], Tensor]) -> Tensor:
    return torch.stack([_of_z(subspace, row, outputs) for row in _rows(batch)])


@torch.enable_grad()
def _of_z(subspace: "SubspaceModel", inputs: Any, values: Callable[[Any], Tensor]) -> Tensor:
    """Return the derivatives of numbers, computed from what the model returns, with respect to all of z, [numbers, K].

    The weights are a function of z here, not written in place: among several processes only this passes the gradients
    of z through autograd.
    """
    z = [own.detach().requires_grad_() for own in subspace.z]
    args, kwargs = _arguments(inputs)
    numbers = values(subspace.engine.call_at(z, subspace.scales, args, kwargs)).reshape(-1)
    return torch.stack([_gradient(number, z) for number in numbers])


def _gradient(number: Tensor, z: list[Tensor]) -> Tensor:
    """Return the gradient of a number with respect to all of z, zero for a block on which it does not depend."""
    if not z:
        return number.new_zeros(0)
    gradients = torch.autograd.grad(number, z, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _forward(subspace: "SubspaceModel", batch: Any, outputs: Callable[[Any], Tensor]) -> Tensor:
    def values(z: Tensor) -> Tensor:
        args, kwargs = _arguments(batch)
        return outputs(subspace.forward_at(z, *args, **kwargs)).flatten(1)

    z = parameters_to_vector(subspace.z).detach()
    units = torch.eye(len(z), dtype=z.dtype, device=z.device)
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
    step = STEP if z.dtype == torch.float64 else 5e-3
    ends = []
    for sign in (1, -1):
        z[index] = middle + sign * step * (1 + middle.abs())
        ends.append((z[index].clone(), outputs(_call(subspace, batch)).flatten(1).clone()))
    z[index] = middle
    (above, high), (below, low) = ends
    return (high - low).to(z.dtype) / (above - below)


def _call(subspace: "SubspaceModel", inputs: Any) -> Any:
    args, kwargs = _arguments(inputs)
    return subspace(*args, **kwargs)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def _rows(inputs: Any) -> Iterator[Any]:
    """Yield one row after the other, each as a batch of one."""
    for index in range(_count(inputs)):
        if isinstance(inputs, Mapping):
            yield {
                name: value[index : index + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()
            }
        else:
            yield inputs[index : index + 1]


def _count(inputs: Any) -> int:
    """Return how many rows there are."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return len(next(value for value in tensors if isinstance(value, Tensor)))


def _split(batch: Any) -> tuple[Any, Tensor]:
    """Return the inputs and the targets of a batch.

    Raises:
        InputError: the batch has no targets, or not one per row.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs, targets = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    else:
        raise InputError(
            "expected batches of inputs and targets: a pair, or arguments by name with `labels` among them"
        )
    if len(targets) != _count(inputs):
        raise InputError(f"expected one target per row, got {len(targets)} targets for {_count(inputs)} rows")
    return inputs, targets


def _logits(values: Any) -> Tensor:
    logits: Tensor = values.logits if hasattr(values, "logits") else values
    return logits
