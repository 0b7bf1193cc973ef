"""Coefficients learned by forward passes alone: Levenberg-Marquardt with an exact Gauss-Newton matrix."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tinyspan.workflows.combine.learning import GRANULARITIES, Granularity, expanded, output_loss, reduced
from tinyspan.workflows.combine.methods.base import register_method
from tinyspan.workflows.combine.methods.gradient import learned_candidate, starting_coefficients
from tinyspan.workflows.combine.problem import Candidate, Problem

__all__ = ["gauss_newton_steps"]

STEP = 0.02  # of the central differences; coefficients are of order 1
TRIALS = 8  # steps that are tried at most
REFUSED = 4  # refused steps in a row at most
LARGEST = 100  # numbers; their Jacobian takes two forward passes over the rows for each
DAMPING = 1e-2  # first lambda, as a multiple of the mean diagonal of the matrix


@register_method(
    "gauss-newton",
    simplicity=9,
    applies=lambda problem: all(output_loss(rows) is not None for rows in problem.tasks),
)
def gauss_newton_steps(problem: Problem) -> Iterator[Candidate]:
    """Yield coefficients learned without a backward pass: one per model, and one per model and layer.

    The Jacobian of the logits is taken by central differences, 2 K forward passes for K numbers, and the loss is
    minimised with (J^T H J + lambda I) d = -J^T g, H and g being its derivatives with respect to the logits.
    """
    for granularity in GRANULARITIES:
        if reduced(starting_coefficients(problem), granularity).numel() > LARGEST:
            problem.say(f"left out: one number per {granularity} by forward passes, which are more than {LARGEST}")
            continue
        name = f"by forward passes per {granularity}"
        yield from learned_candidate(
            problem, name, "gauss-newton", granularity, partial(_learned, problem, granularity)
        )


def _learned(problem: Problem, granularity: Granularity, start: Tensor) -> Tensor:
    with problem.in_float32():
        return expanded(_minimise(problem, reduced(start, granularity)), problem.shape[0])


def _minimise(problem: Problem, numbers: Tensor) -> Tensor:
    """Return the numbers after at most eight trial steps of Levenberg and Marquardt."""
    damping, refused = DAMPING, 0
    loss, matrix, gradient = _quadratic(problem, numbers)
    for _ in range(TRIALS):
        scale = float(matrix.diagonal().mean()) * damping
        step = torch.linalg.solve(matrix + scale * torch.eye(len(matrix), dtype=matrix.dtype), -gradient)
        moved = numbers + step.view(numbers.shape).to(numbers)
        if (value := _loss(problem, moved)) < loss:
            numbers, damping, refused = moved, damping / 10, 0
            if loss - value < 1e-4 * loss:
                break
            loss, matrix, gradient = _quadratic(problem, numbers)
        else:
            damping, refused = damping * 10, refused + 1
            if refused == REFUSED:
                break
    return numbers


def _logits(problem: Problem, numbers: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return logits [rows, outputs] and labels of each task at some numbers."""
    problem.span.set(expanded(numbers, problem.shape[0]))
    problem.span.subspace.eval()
    answers = []
    for index in range(len(problem.tasks)):
        pairs = list(problem.logits(problem.span.subspace, index, "learn"))
        answers.append((torch.cat([a.flatten(1) for a, _ in pairs]).double(), torch.cat([b for _, b in pairs])))
    return answers


def _losses(problem: Problem) -> list[Callable[[Tensor, Tensor], Tensor]]:
    losses = [output_loss(rows) for rows in problem.tasks]
    assert all(loss is not None for loss in losses)
    return [loss for loss in losses if loss is not None]


def _loss(problem: Problem, numbers: Tensor) -> float:
    """Return the mean loss over the tasks."""
    total = 0.0
    for loss, (logits, labels) in zip(_losses(problem), _logits(problem, numbers), strict=True):
        total += float(torch.func.vmap(loss)(logits, labels).mean())
    return total / len(problem.tasks)


def _quadratic(problem: Problem, numbers: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the loss, its Gauss-Newton matrix [K, K] and its gradient [K], in float64."""
    flat = numbers.reshape(-1)
    columns: list[list[Tensor]] = [[] for _ in problem.tasks]
    for index in range(len(flat)):
        ends = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[index] += sign * STEP
            ends.append(_logits(problem, moved.view(numbers.shape)))
        for task, ((high, _), (low, _)) in enumerate(zip(*ends, strict=True)):
            columns[task].append((high - low) / (2 * STEP))
    value, matrix, gradient = 0.0, torch.zeros(len(flat), len(flat)).double(), torch.zeros(len(flat)).double()
    for loss, column, (logits, labels) in zip(_losses(problem), columns, _logits(problem, numbers), strict=True):
        jacobian = torch.stack(column, -1)  # [rows, outputs, K]
        slopes = torch.func.vmap(torch.func.grad(loss))(logits, labels)
        curvature = torch.func.vmap(torch.func.hessian(loss))(logits, labels)
        rows = len(labels) * len(problem.tasks)
        value += float(torch.func.vmap(loss)(logits, labels).sum()) / rows
        gradient += torch.einsum("no,nok->k", slopes, jacobian).cpu() / rows
        matrix += torch.einsum("noi,nop,npj->ij", jacobian, curvature, jacobian).cpu() / rows
    return value, matrix, gradient
