"""The interval of a score."""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from tinyspan.errors import InputError

__all__ = ["score_interval", "wilson_interval"]


def wilson_interval(score: float, rows: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share, measured on this number of rows.

    Raises:
        InputError: the score is not a share, for example a negative correlation.

    Example:
        >>> low, high = wilson_interval(0.5, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    if not 0 <= score <= 1 or rows < 1:
        raise InputError(f"expected a share between 0 and 1 of at least one row, got {score} of {rows}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle = (score + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(score * (1 - score) / rows + z * z / (4 * rows * rows))
    return middle - half, middle + half


def score_interval(result: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the 95 % interval of the score of a result: the stored one, or Wilson's for an accuracy; None otherwise.

    Example:
        >>> result = {"metric": "accuracy", "score": 0.5, "rows": {"validation": 100}}
        >>> [round(bound, 3) for bound in score_interval(result)]
        [0.404, 0.596]
        >>> score_interval({**result, "intervals": {"accuracy": [0.4, 0.6]}})
        (0.4, 0.6)
    """
    stored = (result.get("intervals") or {}).get(result["metric"])
    if stored is not None:
        return float(stored[0]), float(stored[1])
    rows = (result.get("rows") or {}).get("validation")
    return wilson_interval(result["score"], rows) if result["metric"] == "accuracy" and rows else None
