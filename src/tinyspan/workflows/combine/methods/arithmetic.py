"""Task arithmetic (Ilharco et al. 2023): theta_0 + s sum_m delta_m."""

from collections.abc import Iterator

from tinyspan.workflows.combine.methods.base import along_scales, register_method
from tinyspan.workflows.combine.problem import Candidate, Problem

__all__ = ["task_arithmetic", "total_of"]


def total_of(problem: Problem, scale: float) -> float:
    """Return the sum of the coefficients at a scale: M s for models of several tasks, s for models of one task.

    Differences of models of one task point to the same place, so that their sum would be M times too far.
    """
    return scale * problem.shape[1] if problem.own_bodies else scale


@register_method("task-arithmetic", simplicity=5)
def task_arithmetic(problem: Problem) -> Iterator[Candidate]:
    """Yield sums of the differences at increasing scales; the grid ends where the score has become worse twice.

    For models of one task, the scale multiplies the average of the differences.
    """
    yield from along_scales(
        problem,
        lambda scale: Candidate(
            f"task arithmetic, {scale:g}", "task-arithmetic", problem.uniform(total_of(problem, scale))
        ),
    )
