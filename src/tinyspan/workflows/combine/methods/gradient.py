"""Coefficients learned by gradient steps: from labels, or from the entropy of predictions without labels."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinyspan.errors import TinyspanError
from tinyspan.workflows.combine.learning import GRANULARITIES, Granularity, Objective, descend, reduced
from tinyspan.workflows.combine.methods.arithmetic import total_of
from tinyspan.workflows.combine.methods.base import register_method
from tinyspan.workflows.combine.problem import BACKWARD, Candidate, Problem

__all__ = ["entropy", "learned", "learned_candidate"]

START = 0.7  # scale of task arithmetic at which learning starts for several tasks; for one task it is the average


def starting_coefficients(problem: Problem) -> Tensor:
    """Return the coefficients at which learning starts, [B, M]."""
    return problem.uniform(total_of(problem, START if problem.own_bodies else 1.0))


def learned_candidate(
    problem: Problem, name: str, method: str, granularity: Granularity, learn: Callable[[Tensor], Tensor]
) -> Iterator[Candidate]:
    """Yield a candidate whose coefficients are learned once, and kept in the store of the problem.

    If they diverge, there is none.

    Args:
        problem: the models and rows.
        name: name of the candidate.
        method: name of the method.
        granularity: one number per model, or per model and layer.
        learn: the coefficients at which learning starts -> those that are learned, both [B, M].
    """

    def compute() -> dict[str, Any]:
        before = problem.passes
        try:
            coefficients = learn(starting_coefficients(problem))
        except TinyspanError as error:
            if type(error) is not TinyspanError:  # a subclass has other causes than coefficients that are not finite
                raise
            return {"diverged": str(error)}
        if not coefficients.isfinite().all():
            return {"diverged": "a coefficient is NaN or infinite"}
        return {"coefficients": coefficients.tolist(), "passes": problem.passes - before}

    stored = problem.stored(name, compute)
    if "diverged" in stored:
        problem.say(f"left out: {name}: {stored['diverged']}")
        return
    coefficients = torch.tensor(stored["coefficients"])
    yield Candidate(
        name, method, coefficients, learned=reduced(coefficients, granularity).numel(), passes=stored["passes"]
    )


@register_method("gradient", simplicity=8)
def learned(problem: Problem) -> Iterator[Candidate]:
    """Yield coefficients that minimise the loss: one per model, and one per model and layer."""

    def objective(index: int, batch: Any) -> Tensor:
        return problem.loss(problem.span.subspace, index, batch)

    for granularity in GRANULARITIES:
        learn = partial(_descended, problem, granularity, objective)
        yield from learned_candidate(problem, f"learned per {granularity}", "gradient", granularity, learn)


def _descended(problem: Problem, granularity: Granularity, objective: Objective, start: Tensor) -> Tensor:
    return descend(problem, start, granularity, objective)


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

    learn = partial(_descended, problem, "model and layer", objective)
    yield from learned_candidate(problem, "learned without labels", "entropy", "model and layer", learn)
