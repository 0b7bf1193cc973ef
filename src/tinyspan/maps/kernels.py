"""Products with directions in bfloat16 or int8, whose numbers compiled kernels widen in registers.

The kernels are made by `torch.compile` of a few lines: about a second when a process first needs them, ten when this
machine does. No wide copy of V ever exists.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["fused_matvec", "fused_rmatvec"]

ROWS = 8  # directions that a kernel reads side by side
VARIANTS = 64  # of a kernel: formats, ranks of 1, whole or cut, numbers of threads
_dead: dict[str, str] = {}  # device -> why kernels cannot be compiled for it, once that is known


def fused_matvec(directions: Tensor, scales: Tensor | None, z: Tensor) -> Tensor | None:
    """Return V z, or None where kernels cannot be compiled."""
    return _fused(_matvec, directions, scales, z)


def fused_rmatvec(directions: Tensor, scales: Tensor | None, g: Tensor) -> Tensor | None:
    """Return V^T g, or None where kernels cannot be compiled."""
    return _fused(_rmatvec, directions, scales, g)


def _matvec(directions: Tensor, scales: Tensor | None, z: Tensor) -> Tensor:
    """Return V z. A processor reads some directions side by side, an accelerator all, having threads enough."""
    rank, size = directions.shape
    if directions.device.type != "cpu" or rank < ROWS:
        moved = _compiled(_sum_columns)(directions, z)
    else:
        moved = z.new_zeros(size)
        for a in range(0, rank, ROWS):
            first = min(a, rank - ROWS)  # the last group holds some that were added before: not again
            multiples = z[first : first + ROWS]
            if first < a:
                multiples = multiples.clone()
                multiples[: a - first] = 0
            moved = _compiled(_add_rows)(directions[first : first + ROWS], multiples, moved)
    return moved if scales is None else moved.mul_(scales)


def _add_rows(directions: Tensor, z: Tensor, sum_so_far: Tensor) -> Tensor:
    """Add the multiples of so many directions as `ROWS`: the loop over them is the inner one, and unrolled.

    Of a sum over a dimension the compiler makes a loop with large strides, which takes twice the time.
    """
    moved = directions[0].to(z.dtype) * z[0]
    for row in range(1, ROWS):
        moved = moved + directions[row].to(z.dtype) * z[row]
    return sum_so_far + moved


def _sum_columns(directions: Tensor, z: Tensor) -> Tensor:
    return (directions.to(z.dtype) * z[:, None]).sum(0)


def _rmatvec(directions: Tensor, scales: Tensor | None, g: Tensor) -> Tensor:
    """Return V^T g."""
    return _compiled(_sum_rows)(directions, scales, g)


def _sum_rows(directions: Tensor, scales: Tensor | None, g: Tensor) -> Tensor:
    return (directions.to(g.dtype) * (g if scales is None else g * scales)).sum(1)


def _fused(function: Callable[..., Tensor], directions: Tensor, *arguments: Tensor | None) -> Tensor | None:
    """Call `_matvec` or `_rmatvec`; from the first time on that their kernels cannot be compiled, return None.

    Whatever keeps torch from compiling (no compiler, no room for its cache, too many variants, being told not to) has a
    type of its own; not compiled, they would make a wide copy of V.
    """
    kind = directions.device.type
    if kind in _dead or os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
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
        _dead[kind] = reason
        warnings.warn(
            f"torch.compile does not work here ({reason:.200}), so directions in bfloat16 and int8 are widened piece "
            "by piece, which takes longer",
            stacklevel=5,
        )
        return None


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True, fullgraph=True)
