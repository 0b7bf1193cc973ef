"""Learning of coefficients: the loss as a function of them, its gradient, and a loop of gradient steps."""

from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from tinyspan.workflows.combine.problem import Problem, TaskRows

__all__ = [
    "BY_MODEL",
    "GRANULARITIES",
    "Granularity",
    "decay",
    "descend",
    "expanded",
    "number_of_steps",
    "output_loss",
    "reduced",
    "training_steps",
]

Granularity = Literal["model", "model and layer"]
BY_MODEL: Granularity = "model"
GRANULARITIES: tuple[Granularity, ...] = (BY_MODEL, "model and layer")
RATE = 0.05  # learning rate of coefficients, which are of order 1
EPOCHS, STEPS = 6, 60  # passes over the rows, and the minimum number of steps if there are few rows
BATCH = 16
Objective = Callable[[int, Any], Tensor]


def expanded(numbers: Tensor, blocks: int) -> Tensor:
    """Return coefficients [B, M]: numbers [M] are repeated for every block."""
    return numbers.expand(blocks, -1) if numbers.dim() == 1 else numbers


def reduced(coefficients: Tensor, granularity: Granularity) -> Tensor:
    """Return the numbers that are learned, [M] or [B, M]; the mean over blocks for one number per model."""
    return coefficients.mean(0) if granularity == BY_MODEL else coefficients.clone()


def number_of_steps(problem: Problem) -> int:
    """Return the number of steps of 6 passes over the rows to learn from, or 60 if these are more."""
    longest = max(len(task.parts["learn"]) for task in problem.tasks)
    return max(EPOCHS * -(-longest // BATCH), STEPS)


def training_steps(problem: Problem) -> Iterator[list[tuple[int, Any]]]:
    """Yield the batches of each step: index of a task and a batch of its rows, in random order."""
    generator = torch.Generator().manual_seed(problem.seed)
    passes = (problem.shuffled(generator, BATCH) for _ in count())
    return islice(chain.from_iterable(passes), number_of_steps(problem))


def decay(problem: Problem, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule in which the learning rate decays linearly to 0 over these steps."""
    total = number_of_steps(problem)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)


def descend(problem: Problem, start: Tensor, granularity: Granularity, objective: Objective) -> Tensor:
    """Minimise the mean over tasks of an objective with Adam, and return the coefficients [B, M].

    The learning rate decays linearly from 0.05 to 0 over 6 passes over the rows, or over 60 steps if these are more.

    Args:
        problem: the models and rows.
        start: coefficients [B, M] from which learning starts.
        granularity: one number per model, or per model and layer.
        objective: index of a task and a batch -> number; it calls the model at the present coefficients.
    """
    numbers = reduced(start, granularity).requires_grad_()
    optimizer = torch.optim.Adam([numbers], lr=RATE)
    schedule = decay(problem, optimizer)
    problem.span.subspace.eval()
    for step in training_steps(problem):
        problem.span.set(expanded(numbers.detach(), problem.shape[0]))
        for index, batch in step:
            (objective(index, batch) / len(problem.tasks)).backward()
        gradient = problem.span.gradient()
        numbers.grad = gradient.sum(0) if numbers.dim() == 1 else gradient
        optimizer.step()
        schedule.step()
    return expanded(numbers.detach(), problem.shape[0]).clone()


def output_loss(rows: TaskRows) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the loss of one row as a function of its logits and its label, for task types that have a simple one.

    Returns:
        The loss of `Problem.loss`, without class weights; None for another type.
    """
    if rows.task.type == "classification":
        return cross_entropy
    if rows.task.type == "multi-label":
        return binary_cross_entropy_with_logits
    if rows.task.type == "regression":
        scale = rows.loss_scale
        return lambda logits, label: (logits - label).square().mean() / scale
    return None
