"""Derivatives of a model's outputs with respect to all of z, and the matrices [K, K] computed from them.

K is the number of coordinates in z, over all members, in the order of
`torch.nn.utils.parameters_to_vector(subspace.z)`. With some hundreds of coordinates, a full Jacobian and an exact
Gauss-Newton matrix fit in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from tinyspan.errors import InputError

__all__ = ["Method", "empirical_fisher", "gauss_newton", "jacobian"]

Method = Literal["reverse", "forward", "central"]
Loss = Callable[[Tensor, Tensor], Tensor]
STEP = 6e-6  # cube root of float64's rounding unit, which balances both errors of a central difference


def jacobian(
    subspace: Any, batch: Any, *, method: Method = "reverse", outputs: Callable[[Any], Tensor] | None = None
) -> Tensor:
    """Return the derivatives of the outputs on each row with respect to all of z, [rows, outputs, K].

    * `reverse`: exact. One forward pass per row, and one backward pass per output of the row.
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
        InputError: the model is in training mode, or the method is unknown.
        NotImplementedError: torch has no forward-mode derivative of some operation, with `method="forward"`.

    Example:
        >>> from tinyspan import Basis, SubspaceModel, by_pattern
        >>> model = torch.nn.Linear(2, 1, bias=False).eval()
        >>> basis = Basis.from_directions(by_pattern(model, {"all": ".*"}), {"all": torch.eye(2)})
        >>> jacobian(SubspaceModel(model, basis).eval(), torch.tensor([[3.0, 4.0]]))
        tensor([[[3., 4.]]])
    """
    if subspace.training or subspace.model.training:
        raise InputError("the model is in training mode, in which dropout changes the function: call eval() first")
    columns: dict[str, Callable[..., Tensor]] = {"reverse": _reverse, "forward": _forward, "central": _central}
    if method not in columns:
        raise InputError(f"expected the method to be one of {', '.join(columns)}, got {method!r}")
    return columns[method](subspace, batch, outputs or _logits)


def gauss_newton(
    subspace: Any,
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
        InputError: a batch has no targets, or a condition of `jacobian`.
    """
    outputs = outputs or _logits
    size = sum(z.numel() for z in subspace.z)
    matrix: Tensor = subspace.z[0].new_zeros(size, size)
    for inputs, targets in map(_split, progress(loader)):
        columns = jacobian(subspace, inputs, method=method, outputs=outputs)
        with torch.no_grad():
            values = outputs(_call(subspace, inputs)).flatten(1).to(columns)
        curvature = torch.func.vmap(torch.func.hessian(loss))(values, targets)
        matrix += torch.einsum("noi,nop,npj->ij", columns, curvature.to(columns), columns)
    return matrix


def empirical_fisher(
    subspace: Any,
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
        InputError: the model is in training mode, or a batch has no targets.
    """
    outputs = outputs or _logits
    size = sum(z.numel() for z in subspace.z)
    matrix: Tensor = subspace.z[0].new_zeros(size, size)
    for inputs, targets in map(_split, progress(loader)):

        def losses(values: Any, targets: Tensor = targets) -> Tensor:
            return torch.stack([loss(*row) for row in zip(outputs(values).flatten(1), targets, strict=False)])

        gradients = torch.cat(
            [_gradients(subspace, row, targets[i : i + 1], losses) for i, row in enumerate(_rows(inputs))]
        )
        matrix += gradients.T @ gradients
    return matrix


def _gradients(subspace: Any, row: Any, targets: Tensor, losses: Callable[[Any, Tensor], Tensor]) -> Tensor:
    return _gradient(losses(_call(subspace, row), targets).sum(), subspace)[None]


def _reverse(subspace: Any, batch: Any, outputs: Callable[[Any], Tensor]) -> Tensor:
    rows = []
    for row in _rows(batch):
        with torch.enable_grad():
            values = outputs(_call(subspace, row)).reshape(-1)
        rows.append(torch.stack([_gradient(value, subspace, retain=True) for value in values]))
    return torch.stack(rows)


def _gradient(value: Tensor, subspace: Any, retain: bool = False) -> Tensor:
    """Return the gradient of a number with respect to all of z; zero for blocks on which it does not depend."""
    z = list(subspace.z)
    gradients = torch.autograd.grad(value, z, retain_graph=retain, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _forward(subspace: Any, batch: Any, outputs: Callable[[Any], Tensor]) -> Tensor:
    def values(z: Tensor) -> Tensor:
        return outputs(subspace.forward_at(z, *_arguments(batch)[0], **_arguments(batch)[1])).flatten(1)

    z = parameters_to_vector(subspace.z).detach()
    columns = [torch.func.jvp(values, (z,), (unit,))[1] for unit in torch.eye(len(z), dtype=z.dtype, device=z.device)]
    return torch.stack(columns, -1)


@torch.no_grad()
def _central(subspace: Any, batch: Any, outputs: Callable[[Any], Tensor]) -> Tensor:
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


def _difference(subspace: Any, batch: Any, outputs: Callable[[Any], Tensor], z: Tensor, index: int) -> Tensor:
    """Return the central difference in one coordinate of z, and restore that coordinate."""
    middle = z[index].clone()
    step = STEP if z.dtype == torch.float64 else 5e-3
    ends = []
    for sign in (1, -1):
        z[index] = middle + sign * step * (1 + middle.abs())
        ends.append((z[index].clone(), outputs(_call(subspace, batch)).flatten(1).clone()))
    z[index] = middle
    (above, high), (below, low) = ends
    return (high - low).to(z.dtype) / (above - below)


def _call(subspace: Any, inputs: Any) -> Any:
    args, kwargs = _arguments(inputs)
    return subspace(*args, **kwargs)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def _rows(inputs: Any) -> Iterator[Any]:
    """Yield the rows one by one, each as a batch of size one."""
    first = (
        next(value for value in inputs.values() if isinstance(value, Tensor)) if isinstance(inputs, Mapping) else inputs
    )
    for index in range(len(first)):
        if isinstance(inputs, Mapping):
            yield {
                name: value[index : index + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()
            }
        else:
            yield inputs[index : index + 1]


def _split(batch: Any) -> tuple[Any, Tensor]:
    """Return the inputs and the targets of a batch.

    Raises:
        InputError: the batch has no targets.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise InputError("expected batches of inputs and targets: a pair, or arguments by name with `labels` among them")


def _logits(values: Any) -> Tensor:
    logits: Tensor = values.logits if hasattr(values, "logits") else values
    return logits
