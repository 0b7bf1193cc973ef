"""Products with directions in bfloat16 or int8, which compiled kernels convert to the wide format in registers.

`torch.compile` generates the kernels: this takes one to three seconds on first use in a process, and ten on first use
on a machine. V is never copied into the wide format.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["fused_matvec", "fused_rmatvec"]

ROWS = 8  # directions that a kernel reads in parallel
VARIANTS = 64  # compiled variants of a kernel: formats, rank 1, contiguous or not, numbers of threads
_failures: dict[str, str] = {}  # device -> reason why kernels could not be compiled for it


def fused_matvec(directions: Tensor, scales: Tensor | None, z: Tensor) -> Tensor | None:
    """Return V z, or None if kernels cannot be compiled."""
    return _fused(_matvec, directions, scales, z)


def fused_rmatvec(directions: Tensor, scales: Tensor | None, g: Tensor) -> Tensor | None:
    """Return V^T g, or None if kernels cannot be compiled."""
    return _fused(_rmatvec, directions, scales, g)


def _matvec(directions: Tensor, scales: Tensor | None, z: Tensor) -> Tensor:
    """Return V z; a CPU kernel reads `ROWS` directions in parallel, an accelerator kernel all of them."""
    rank, size = directions.shape
    if directions.device.type != "cpu" or rank < ROWS:
        out = _compiled(_sum_columns)(directions, z)
    else:
        out = z.new_zeros(size)
        for a in range(0, rank, ROWS):
            first = min(a, rank - ROWS)  # the last group overlaps the previous one
            factors = z[first : first + ROWS]
            if first < a:
                factors = factors.clone()
                factors[: a - first] = 0
            out = _compiled(_add_directions)(directions[first : first + ROWS], factors, out)
    return out if scales is None else out.mul_(scales)


def _add_directions(directions: Tensor, z: Tensor, total: Tensor) -> Tensor:
    """Add multiples of `ROWS` directions to a sum in an unrolled inner loop.

    For a `sum` over a dimension the compiler generates a loop with large strides, which takes twice the time.
    """
    out = directions[0].to(z.dtype) * z[0]
    for index in range(1, ROWS):
        out = out + directions[index].to(z.dtype) * z[index]
    return total + out


def _sum_columns(directions: Tensor, z: Tensor) -> Tensor:
    return (directions.to(z.dtype) * z[:, None]).sum(0)


def _rmatvec(directions: Tensor, scales: Tensor | None, g: Tensor) -> Tensor:
    """Return V^T g."""
    return _compiled(_sum_rows)(directions, scales, g)


def _sum_rows(directions: Tensor, scales: Tensor | None, g: Tensor) -> Tensor:
    return (directions.to(g.dtype) * (g if scales is None else g * scales)).sum(1)


def _fused(function: Callable[..., Tensor], directions: Tensor, *arguments: Tensor | None) -> Tensor | None:
    """Call `_matvec` or `_rmatvec`; return None if their kernels cannot be compiled, or could not be compiled before.

    All exceptions are caught because each cause (no compiler, no space for its cache, too many variants) raises another
    type. The uncompiled functions would make a wide copy of V.
    """
    kind = directions.device.type
    if kind in _failures or os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return None
    try:
        from torch._dynamo import config

        if config.disable:
            return None
        with config.patch(fail_on_recompile_limit_hit=True, recompile_limit=VARIANTS):
            return function(directions, *arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        _failures[kind] = reason
        warnings.warn(
            f"torch.compile does not work here ({reason:.200}), so directions in bfloat16 and int8 are converted "
            "piece by piece, which takes longer",
            stacklevel=5,
        )
        return None


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True, fullgraph=True)
