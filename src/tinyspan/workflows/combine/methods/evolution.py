"""Coefficients found by CMA-ES (Hansen 2016), for any metric, with forward passes alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tinyspan.workflows.combine.learning import expanded, reduced
from tinyspan.workflows.combine.methods.base import register_method
from tinyspan.workflows.combine.methods.gradient import starting_coefficients
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
    name = "by evolution per model"

    def compute() -> dict[str, Any]:
        import cmaes

        before = problem.passes
        start = reduced(starting_coefficients(problem), "model").double().numpy()
        search = cmaes.CMA(mean=start, sigma=SPREAD, seed=problem.seed)
        for _ in range(-(-CANDIDATES // search.population_size)):
            asked = [search.ask() for _ in range(search.population_size)]
            search.tell([(numbers, -_score(problem, numbers)) for numbers in asked])
        coefficients = expanded(torch.tensor(search.mean).float(), problem.shape[0])
        return {"coefficients": coefficients.tolist(), "passes": problem.passes - before}

    stored = problem.stored(name, compute)
    coefficients = torch.tensor(stored["coefficients"])
    yield Candidate(name, "evolution", coefficients, learned=problem.shape[1], passes=stored["passes"])


def _score(problem: Problem, numbers: "np.ndarray[Any, Any]") -> float:
    problem.span.set(expanded(torch.tensor(numbers).float(), problem.shape[0]))
    return problem.evaluation(problem.predictions(problem.span.subspace, "learn"), "learn").mean
