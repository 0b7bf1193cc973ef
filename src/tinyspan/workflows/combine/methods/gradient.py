"""Coefficients learned by gradient steps: from labels, or from the entropy of predictions without labels."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tinyspan.workflows.combine.learning import Granularity, Objective, descend, reduced
from tinyspan.workflows.combine.methods.arithmetic import total_of
from tinyspan.workflows.combine.methods.base import register_method
from tinyspan.workflows.combine.problem import BACKWARD, Candidate, Problem

__all__ = ["entropy", "learned", "learned_candidate"]

START = 0.7  # scale of task arithmetic at which learning starts for several tasks; for one task it is the average


def starting_coefficients(problem: Problem) -> Tensor:
    """Return the coefficients at which learning starts, [B, M]."""
    return problem.uniform(total_of(problem, START if problem.own_bodies else 1.0))


def learned_candidate(
    problem: Problem, name: str, method: str, granularity: Granularity, objective: Objective
) -> Candidate:
    """Return a candidate whose coefficients are learned once, and kept in the store of the problem."""

    def compute() -> dict[str, Any]:
        before = problem.passes
        coefficients = descend(problem, starting_coefficients(problem), granularity, objective)
        return {"coefficients": coefficients.tolist(), "passes": problem.passes - before}

    stored = problem.stored(name, compute)
    coefficients = torch.tensor(stored["coefficients"])
    return Candidate(
        name, method, coefficients, learned=reduced(coefficients, granularity).numel(), passes=stored["passes"]
    )


@register_method("gradient", simplicity=8)
def learned(problem: Problem) -> Iterator[Candidate]:
    """Yield coefficients that minimise the loss: one per model, and one per model and layer."""

    def objective(index: int, batch: Any) -> Tensor:
        return problem.loss(problem.span.subspace, index, batch)

    granularities: tuple[Granularity, ...] = ("model", "model and layer")
    for granularity in granularities:
        yield learned_candidate(problem, f"learned per {granularity}", "gradient", granularity, objective)


@register_method(
    "entropy", simplicity=10, applies=lambda problem: all(rows.task.type == "classification" for rows in problem.tasks)
)
def entropy(problem: Problem) -> Iterator[Candidate]:
    """Yield coefficients per model and layer that minimise the entropy of predictions (AdaMerging, Yang et al. 2024).

    The labels of the rows to learn from are not used.
    """

    def objective(index: int, batch: Any) -> Tensor:
        with problem.precision():
            logits: Tensor = problem.span.subspace(task=index, **problem.inputs(index, batch)).logits.float()
        problem.passes += (1 + BACKWARD) * len(logits)
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean()

    yield learned_candidate(problem, "learned without labels", "entropy", "model and layer", objective)
