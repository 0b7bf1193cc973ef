"""Every model alone: the candidates that a combination has to beat."""

from collections.abc import Iterator

import torch

from tinyspan.workflows.combine.methods.base import register_method
from tinyspan.workflows.combine.problem import Candidate, Problem

__all__ = ["single"]


@register_method("single", simplicity=0)
def single(problem: Problem) -> Iterator[Candidate]:
    """Yield each model; for several tasks, its encoder under the heads of all of them."""
    for index, name in enumerate(problem.models):
        coefficients = torch.zeros(problem.shape)
        coefficients[:, index] = 1
        yield Candidate(name, "single", coefficients)
