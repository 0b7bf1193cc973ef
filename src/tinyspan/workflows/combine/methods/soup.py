"""Greedy soup (Wortsman et al. 2022): models are added to an average as long as it gets no worse."""

from collections.abc import Iterator

import torch

from tinyspan.workflows.combine.methods.base import register_method
from tinyspan.workflows.combine.methods.single import single
from tinyspan.workflows.combine.problem import Candidate, Problem

__all__ = ["greedy_soup"]


@register_method("greedy-soup", simplicity=4, applies=lambda problem: not problem.own_bodies)
def greedy_soup(problem: Problem) -> Iterator[Candidate]:
    """Yield the soup: the models in the order of their scores on the rows to choose on, each kept if it does not harm.

    The rows to choose on take the place of the held-out validation set of the paper (recipe 1).
    """
    blocks, count = problem.shape

    def average(members: list[int]) -> Candidate:
        weights = torch.zeros(count)
        weights[members] = 1 / len(members)
        return Candidate(f"average of {sorted(members)}", "greedy-soup", weights.expand(blocks, -1))

    scores = [problem.evaluate(candidate, "choose").mean for candidate in single(problem)]
    order = sorted(range(count), key=lambda index: -scores[index])
    members, best = order[:1], scores[order[0]]
    for index in order[1:]:
        value = problem.evaluate(average([*members, index]), "choose").mean
        if value >= best:
            members, best = [*members, index], value
    yield Candidate(f"greedy soup of {len(members)}", "greedy-soup", average(members).coefficients)
