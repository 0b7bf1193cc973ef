"""Derivatives of a model's outputs and losses with respect to all of z, and the matrices [K, K] computed from them.

K is the number of coordinates in z, over all members, in the order of
`torch.nn.utils.parameters_to_vector(subspace.z)`. With some hundreds of coordinates, a full Jacobian, the Hessian and
the Gauss-Newton matrix fit in memory. One batch of a loader is in memory at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tinyspan.errors import InputError
from tinyspan.model.batches import arguments_of, by_row, logits_of, rows_of, split_batch
from tinyspan.model.jacobian import (
    Method,
    called,
    central_step,
    derivatives_of_z,
    elementary_attention,
    gradient_of,
    jacobian,
    require_function_of_z,
    require_method,
    warn_of_no_dependence,
)

if TYPE_CHECKING:
    from tinyspan.model.subspace import SubspaceModel

__all__ = ["HessianMethod", "Loss", "empirical_fisher", "gauss_newton", "hessian", "row_gradients"]

HessianMethod = Literal["reverse", "central"]
Loss = Callable[[Tensor, Tensor], Tensor]


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
    outputs = outputs or logits_of
    matrix = _zeros(subspace)
    for inputs, targets in map(split_batch, progress(loader)):
        columns = jacobian(subspace, inputs, method=method, outputs=outputs)
        with torch.no_grad():
            values = by_row(outputs(called(subspace, inputs))).to(columns)
        matrix += torch.einsum("noi,noj->ij", columns, _curved(loss, values, targets, columns))
    return matrix


def _curved(loss: Loss, values: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
    """Return H_n J_n of each example, [rows, outputs, K]; the Hessians H_n themselves are not computed."""
    if not columns.shape[-1]:
        return columns

    def gradients(values: Tensor) -> Tensor:
        slopes: Tensor = torch.func.vmap(torch.func.grad(loss))(values, targets)
        return slopes

    def product(column: Tensor) -> Tensor:
        derivative: Tensor = torch.func.jvp(gradients, (values,), (column,))[1]
        return derivative

    products: Tensor = torch.func.vmap(product, in_dims=-1, out_dims=-1)(columns)
    return products


def hessian(
    subspace: "SubspaceModel",
    loader: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    method: HessianMethod = "reverse",
    outputs: Callable[[Any], Tensor] | None = None,
    symmetric: bool = True,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Return sum_n d^2 l_n / dz^2, [K, K]: l_n is the loss on example n as a function of all of z.

    z of every block counts, frozen or not. With an empty basis K is 0.

    * `reverse`: exact. Per batch one gradient, and K backward passes through it. The graph of a gradient takes several
      times the memory of training on the batch. Where the model calls torch's fused attention, which has no second
      derivatives, it is computed by elementary operations.
    * `central`: (g(z + s e_i) - g(z - s e_i)) / 2 s, of exact gradients g. 2 K gradients per batch, with the memory of
      training, for any model that has first derivatives. The error is `s^2 / 6` times a fourth derivative of the loss,
      plus rounding of about `eps |g| / s`, with the steps s of `jacobian`.

    Args:
        subspace: a SubspaceModel in evaluation mode.
        loader: see `gauss_newton`.
        loss: see `gauss_newton`.
        method: see above.
        outputs: see `jacobian`.
        symmetric: return the mean of the computed matrix and its transpose. Without it, the difference between the two
            shows how large the error of `central`, and the rounding error of `reverse`, are.
        progress: wraps the iteration over batches, for a progress bar.

    Raises:
        InputError: the method is unknown, a batch has no targets or another number of them than rows or outputs, or a
            condition of `jacobian` with `method="reverse"`.

    Example:
        >>> from tinyspan import Basis, SubspaceModel, by_pattern
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> basis = Basis.from_directions(by_pattern(model, {"all": ".*"}), {"all": torch.eye(2)})
        >>> loader = [(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0]]))]
        >>> squared = lambda values, target: (values - target).square().sum() / 2
        >>> hessian(SubspaceModel(model, basis).eval(), loader, loss=squared)  # x x^T
        tensor([[ 9., 12.],
                [12., 16.]])
    """
    require_function_of_z(subspace)
    ways: dict[str, Callable[..., Tensor]] = {"reverse": _reverse_hessian, "central": _central_hessian}
    require_method(method, ways)
    matrix = _zeros(subspace)
    for inputs, targets in map(split_batch, progress(loader)):
        matrix += ways[method](subspace, partial(_batch_loss, subspace, inputs, targets, loss, outputs or logits_of))
    return (matrix + matrix.T) / 2 if symmetric else matrix


def row_gradients(
    subspace: "SubspaceModel",
    loader: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    outputs: Callable[[Any], Tensor] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Return the gradient of the loss on each example with respect to all of z, [rows, K], in the order of the loader.

    One forward and one backward pass per example. z of every block counts, frozen or not.

    Args:
        subspace: a SubspaceModel in evaluation mode.
        loader: see `gauss_newton`.
        loss: see `gauss_newton`.
        outputs: see `jacobian`.
        progress: wraps the iteration over batches, for a progress bar.

    Raises:
        InputError: a batch has no targets or another number of them than rows, the outputs have several rows for one
            example, or as of `jacobian` with `method="reverse"`.

    Example:
        >>> from tinyspan import Basis, SubspaceModel, by_pattern
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> basis = Basis.from_directions(by_pattern(model, {"all": ".*"}), {"all": torch.eye(2)})
        >>> loader = [(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.zeros(2, 1))]
        >>> row_gradients(SubspaceModel(model, basis).eval(), loader, loss=lambda values, target: values.sum())
        tensor([[3., 4.],
                [1., 0.]])
    """
    require_function_of_z(subspace)
    gradients = list(_gradients_of_batches(subspace, loader, loss, outputs or logits_of, progress))
    return torch.cat([_zeros(subspace)[:0], *gradients])


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
    see `gauss_newton`. The arguments and errors are those of `row_gradients`.

    Args:
        subspace: a SubspaceModel in evaluation mode.
        loader: see `gauss_newton`.
        loss: see `gauss_newton`.
        outputs: see `jacobian`.
        progress: wraps the iteration over batches, for a progress bar.
    """
    require_function_of_z(subspace)
    matrix = _zeros(subspace)
    for gradients in _gradients_of_batches(subspace, loader, loss, outputs or logits_of, progress):
        matrix += gradients.T @ gradients
    return matrix


def _gradients_of_batches(
    subspace: "SubspaceModel",
    loader: Iterable[Any],
    loss: Loss,
    outputs: Callable[[Any], Tensor],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Iterator[Tensor]:
    """Yield the gradients of the loss on the examples of each batch, [rows, K]."""
    for inputs, targets in map(split_batch, progress(loader)):
        pairs = zip(rows_of(inputs), targets, strict=True)
        losses = ((row, partial(_loss, loss, outputs, target)) for row, target in pairs)
        yield torch.cat([derivatives_of_z(subspace, row, of_row) for row, of_row in losses])


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
    values = by_row(outputs(result))
    if len(values) != 1:
        raise InputError(f"expected outputs of shape [rows, ...] with one row per example, got {len(values)} for one")
    return loss(values.flatten(), target)


def _batch_loss(
    subspace: "SubspaceModel",
    inputs: Any,
    targets: Tensor,
    loss: Loss,
    outputs: Callable[[Any], Tensor],
    z: list[Tensor],
) -> Tensor:
    """Return the sum of the losses on the examples of a batch, as a function of z.

    Raises:
        InputError: the outputs have another number of rows than there are targets.
    """
    args, kwargs = arguments_of(inputs)
    values = by_row(outputs(subspace.engine.call_at(z, subspace.scales, args, kwargs)))
    if len(values) != len(targets):
        raise InputError(
            f"expected outputs of shape [rows, ...] with one row per example, got {len(values)} for {len(targets)}"
        )
    return torch.stack([loss(row, target) for row, target in zip(values, targets, strict=True)]).sum()


@torch.enable_grad()
def _reverse_hessian(subspace: "SubspaceModel", total: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return the Hessian of a function of z by backward passes through its gradient, [K, K]."""
    z = [own.detach().requires_grad_() for own in subspace.z]
    if not z:
        return _zeros(subspace)
    with elementary_attention():
        value = total(z)
        if not value.requires_grad:
            warn_of_no_dependence()
            return _zeros(subspace)
        gradients = torch.autograd.grad(value, z, create_graph=True, materialize_grads=True)
    first = torch.cat([gradient.reshape(-1) for gradient in gradients])
    if not first.requires_grad:  # of a function that is linear in z
        return _zeros(subspace)
    return torch.stack([gradient_of(number, z) for number in first])


@torch.enable_grad()
def _central_hessian(subspace: "SubspaceModel", total: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return the Hessian of a function of z by central differences of its gradient, [K, K]."""
    if not len(subspace.z):
        return _zeros(subspace)
    sizes = [own.numel() for own in subspace.z]
    middle = torch.cat([own.detach().reshape(-1) for own in subspace.z])

    def gradient(vector: Tensor) -> Tensor:
        parts = zip(vector.split(sizes), subspace.z, strict=True)
        z = [part.reshape(own.shape).clone().requires_grad_() for part, own in parts]
        return gradient_of(total(z), z)

    rows = []
    for index, step in enumerate(central_step(middle)):
        above, below = middle.clone(), middle.clone()
        above[index] += step
        below[index] -= step
        rows.append((gradient(above) - gradient(below)) / (above[index] - below[index]))
    return torch.stack(rows)
