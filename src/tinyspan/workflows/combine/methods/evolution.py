"""Coefficients found by CMA-ES (Hansen 2016), for any metric, with forward passes alone."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyspan.workflows.combine.learning import BY_MODEL, expanded, reduced
from tinyspan.workflows.combine.methods.base import register_method
from tinyspan.workflows.combine.methods.gradient import learned_candidate
from tinyspan.workflows.combine.problem import Candidate, Problem

__all__ = ["evolution"]

SPREAD = 0.2  # standard deviation of the first coefficients around the start
CANDIDATES = 60  # number of models that are scored


@register_method("evolution", simplicity=11, needs="cmaes")
def evolution(problem: Problem) -> Iterator[Candidate]:
    """Yield the coefficients, one per model, with the best metric on the rows to learn from, after 60 models.

    The mean of the last distribution is taken, not the best model that was seen, whose score is the more by chance the
    more models were tried.
    """
    yield from learned_candidate(problem, "by evolution per model", "evolution", BY_MODEL, partial(_searched, problem))


def _searched(problem: Problem, start: Tensor) -> Tensor:
    """Return the mean of the last distribution, for every block."""
    import cmaes

    search = cmaes.CMA(mean=reduced(start, BY_MODEL).double().numpy(), sigma=SPREAD, seed=problem.seed)
    for _ in range(-(-CANDIDATES // search.population_size)):
        asked = [search.ask() for _ in range(search.population_size)]
        search.tell([(numbers, -_score(problem, numbers)) for numbers in asked])
    return expanded(torch.tensor(search.mean).float(), problem.shape[0])


def _score(problem: Problem, numbers: "np.ndarray[Any, Any]") -> float:
    problem.span.set(expanded(torch.tensor(numbers).float(), problem.shape[0]))
    return problem.evaluation(problem.predictions(problem.span.subspace, "learn"), "learn").mean
