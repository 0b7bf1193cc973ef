"""Means over seeds with confidence intervals, and Markdown tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

__all__ = ["Summary", "markdown", "missing", "summarize"]


@dataclass(frozen=True)
class Summary:
    """A mean over seeds.

    Attributes:
        mean: mean over the finished seeds; None without any.
        half: half the width of Student's 95 % interval; None with fewer than two seeds.
        seeds: number of finished seeds.
        wanted: number of seeds in the study.
    """

    mean: float | None
    half: float | None
    seeds: int
    wanted: int

    def shown(self, form: str = "{:.1f}") -> str:
        """Return the mean, its interval, and the number of finished seeds if some are missing."""
        if self.mean is None:
            return "missing"
        interval = "" if self.half is None else f" ± {form.format(self.half)}"
        absent = "" if self.seeds == self.wanted else f" ({self.seeds}/{self.wanted})"
        return form.format(self.mean) + interval + absent

    def signed(self) -> str:
        """Return the same as `shown`, with the sign of the mean."""
        return self.shown("{:+.1f}").replace("± +", "± ")

    def __str__(self) -> str:
        return self.shown()


def summarize(values: Sequence[float | None]) -> Summary:
    """Return the mean of one value per seed with Student's 95 % interval, t * s / sqrt(n); None is a missing seed.

    Example:
        >>> print(summarize([1.0, 2.0, 3.0]))
        2.0 ± 2.5
    """
    present = np.array([value for value in values if value is not None], dtype=float)
    n = len(present)
    half = float(student.ppf(0.975, n - 1) * present.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Summary(float(present.mean()) if n else None, half, n, len(values))


def missing(summary: Summary) -> bool:
    """Whether no seed is finished."""
    return summary.mean is None


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
