"""Merges of sparsified differences, TIES (Yadav et al. 2023) and DARE (Yu et al. 2024), through PEFT.

A head that the base does not have is averaged.
"""

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tinyspan.workflows.combine.methods.base import along_scales, register_method
from tinyspan.workflows.combine.problem import Candidate, Problem
from tinyspan.workflows.combine.span import NEW
from tinyspan.workflows.hardware import seeded

__all__ = ["dare", "ties"]

KEPT = 0.2  # share of the largest numbers that TIES keeps
DROPPED = 0.9  # share of the numbers that DARE drops at random; the others are divided by 1 - 0.9
Merge = Callable[[list[Tensor], Tensor], Tensor]


def _are_several(problem: Problem) -> bool:
    """Whether the models are different fine-tunings, for which these methods were published."""
    return problem.shape[1] > 1 and not problem.is_run


@register_method("ties", simplicity=6, applies=_are_several, needs="peft")
def ties(problem: Problem) -> Iterator[Candidate]:
    """Yield TIES at increasing scales: the largest 20 % of each difference, their elected sign, and the disjoint mean.

    The largest numbers are taken per block, where the paper takes them from the whole difference.
    """
    from peft.utils import merge_utils

    def merge(differences: list[Tensor], weights: Tensor) -> Tensor:
        merged: Tensor = merge_utils.ties(differences, weights, KEPT)
        return merged

    return along_scales(problem, lambda scale: _candidate(problem, "TIES", "ties", scale, merge))


@register_method("dare", simplicity=7, applies=_are_several, needs="peft")
def dare(problem: Problem) -> Iterator[Candidate]:
    """Yield DARE with task arithmetic at increasing scales: 90 % of each difference dropped, the others times 10."""
    from peft.utils import merge_utils

    def merge(differences: list[Tensor], weights: Tensor) -> Tensor:
        merged: Tensor = merge_utils.dare_linear(differences, weights, 1 - DROPPED)
        return merged

    factor = 1 if problem.own_bodies else 1 / problem.shape[1]  # as in task arithmetic
    return along_scales(problem, lambda scale: _candidate(problem, "DARE", "dare", scale, merge, factor))


def _candidate(problem: Problem, name: str, method: str, scale: float, merge: Merge, factor: float = 1.0) -> Candidate:
    """Return the candidate with the merged differences times a scale."""

    def update(block: str, differences: Tensor) -> Tensor:
        if block == NEW:  # differences to their own mean, of which no part is more important than another
            return torch.zeros_like(differences[0])
        weights = torch.full((len(differences),), scale * factor)
        with seeded(zlib.crc32(f"{block} {problem.seed}".encode())):
            return merge(list(differences), weights)

    return Candidate(f"{name}, {scale:g}", method, update=update)
