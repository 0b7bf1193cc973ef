"""Averages of weights: of all models, of the last checkpoints of a run, and exponentially weighted."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinyspan.workflows.combine.methods.base import register_method
from tinyspan.workflows.combine.problem import Candidate, Problem

__all__ = ["exponential_average", "exponential_weights", "tail_average", "uniform_average"]

DECAYS = (0.5, 0.7, 0.8, 0.9)


@register_method("uniform-average", simplicity=1)
def uniform_average(problem: Problem) -> Iterator[Candidate]:
    """Yield the mean of all models."""
    yield Candidate("average of all", "uniform-average", problem.uniform())


@register_method("tail-average", simplicity=2, applies=lambda problem: problem.is_run)
def tail_average(problem: Problem) -> Iterator[Candidate]:
    """Yield the means of the last 2, 4, 8, ... checkpoints."""
    count = problem.shape[1]
    length = 2
    while length < count:
        weights = torch.zeros(count)
        weights[-length:] = 1 / length
        yield Candidate(f"average of the last {length}", "tail-average", weights.expand(problem.shape))
        length *= 2


@register_method("exponential-average", simplicity=3, applies=lambda problem: problem.is_run)
def exponential_average(problem: Problem) -> Iterator[Candidate]:
    """Yield exponential moving averages of the checkpoints, with decays from 0.5 to 0.9."""
    for decay in DECAYS:
        weights = exponential_weights(problem.shape[1], decay)
        yield Candidate(f"moving average, {decay:g}", "exponential-average", weights.expand(problem.shape))


def exponential_weights(count: int, decay: float) -> Tensor:
    """Return the weights of e_t = decay e_(t-1) + (1 - decay) theta_t, e_1 = theta_1, at the last of `count` models.

    Example:
        >>> exponential_weights(3, 0.5)
        tensor([0.2500, 0.2500, 0.5000])
    """
    powers: Sequence[float] = [decay ** (count - 1)] + [
        (1 - decay) * decay ** (count - 1 - index) for index in range(1, count)
    ]
    return torch.tensor(powers)
