"""The matrix W [t, D] of a block: the points of all trajectories, one per row, read a few columns at a time."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tinyspan.errors import InputError, MismatchError
from tinyspan.linalg import Array, Columns, as_array, piecewise
from tinyspan.partition import Block
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["Center", "PointMatrix", "check_runs", "selected_columns", "squared_deltas", "top_positions"]

Center = Literal["init", "mean", "none"]


class PointMatrix(Columns):
    """W [t, D] of a block; its numbers are read from the files of the trajectories when they are needed.

    Raises:
        StorageError: a file is damaged.
    """

    def __init__(self, runs: Sequence[Trajectory], block: Block, center: Center) -> None:
        self._center = center
        self._starts, self._rows = list[_Vector](), list[list[_Vector]]()  # per parameter: of theta_0, of the deltas
        for parameter in zip(*(run.mapped(block) for run in runs), strict=True):
            self._starts.append(_vector(parameter[0][0]))
            self._rows.append([_vector(delta) for _, deltas in parameter for delta in deltas])
        self._firsts = [0, *accumulate(len(start) for start in self._starts)]  # columns where the parameters begin
        self.shape = (sum(len(run) for run in runs), self._firsts[-1])

    def read(self, start: int, out: Array) -> None:
        """Write the columns from `start` on into `out` [t, n] in float64."""
        stop = start + out.shape[1]
        for index in range(bisect_right(self._firsts, start) - 1, len(self._rows)):
            first, last = self._firsts[index : index + 2]
            if first >= stop:
                break
            a, b = max(start, first), min(stop, last)
            columns, values = slice(a - start, b - start), slice(a - first, b - first)
            for row, vector in zip(out, self._rows[index], strict=True):
                row[columns] = _numbers(vector[values])
            if self._center == "none":
                out[:, columns] += _numbers(self._starts[index][values])
        if self._center == "mean":
            mean = out.mean(0)
            out -= mean
            out[np.abs(out) <= 4 * np.finfo(np.float64).eps * np.abs(mean)] = 0.0  # remove rounding errors


_Vector = Array | Tensor


def _vector(tensor: Tensor) -> _Vector:
    """Return the vector of a file as an array, whose slices take less time than a tensor's, if numpy has its dtype."""
    return tensor if tensor.dtype == torch.bfloat16 else as_array(tensor)


def _numbers(vector: _Vector) -> Array:
    return as_array(vector) if isinstance(vector, Tensor) else vector


def squared_deltas(runs: Sequence[Trajectory], block: Block) -> Tensor:
    """Return the sum over all points of (theta_i - theta_0)^2 for every coordinate of a block, [D] in float64."""
    scores = np.empty(block.numel)

    def score(pieces: Iterator[tuple[int, Array]]) -> None:
        for start, piece in pieces:
            scores[start : start + piece.shape[1]] = np.square(piece).sum(0)

    piecewise(PointMatrix(runs, block, "init"), score)
    return torch.from_numpy(scores)


def top_positions(scores: Tensor, count: int) -> Tensor:
    """Return the ascending positions of the `count` largest positive scores; ties go to the lower position."""
    scores = scores.nan_to_num(nan=torch.inf)  # selected; the decomposition will raise an error
    threshold = scores.topk(count, sorted=False).values.min()
    above, equal = scores > threshold, (scores == threshold).nonzero().squeeze(1)
    above[equal[: count - int(above.sum())]] = True
    return (above & (scores > 0)).nonzero().squeeze(1)


def selected_columns(matrix: Columns, indices: Tensor) -> Tensor:
    """Return the columns `indices`, ascending, of a matrix [t, D] as a tensor [t, n] in float64."""
    positions = indices.numpy()
    selected = np.empty((matrix.shape[0], len(positions)))

    def select(pieces: Iterator[tuple[int, Array]]) -> None:
        for start, piece in pieces:
            first, last = np.searchsorted(positions, (start, start + piece.shape[1]))
            selected[:, first:last] = piece[:, positions[first:last] - start]

    piecewise(matrix, select)
    return torch.from_numpy(selected)


def check_runs(runs: Sequence[Trajectory]) -> None:
    """Check that all trajectories have points, and the same partition and theta_0.

    Raises:
        InputError: there is no trajectory, or one is empty.
        MismatchError: two of them belong to different models or partitions.
    """
    if not runs or not all(len(run) for run in runs):
        empty = "".join(f" in {run.folder}" for run in runs if not len(run))
        raise InputError(f"expected trajectories with at least one point each, got none{empty}; record some")
    first = runs[0]
    for other in runs[1:]:
        if other.partition != first.partition:
            raise MismatchError(
                f"{other.folder} has another partition than {first.folder}: {_difference(first, other)}; "
                "group it like the first with with_partition, or record it from the same model"
            )
        ours, theirs = first.fingerprint(), other.fingerprint()
        for block, digest in ours.items():
            if theirs[block] != digest:
                raise MismatchError(
                    f"{other.folder} starts from another theta_0 than {first.folder}: block {block!r} differs; "
                    "stack runs that start from the same weights"
                )


def _difference(first: Trajectory, other: Trajectory) -> str:
    """Return a phrase for the first difference between the partitions of two trajectories."""
    ours, theirs = (
        [(block.name, spec.name, list(spec.shape), spec.dtype) for block in run.partition for spec in block.parameters]
        for run in (first, other)
    )
    pairs = zip_longest(ours, theirs)
    pair = next((a, b) for a, b in pairs if a != b)
    expected, actual = ("nothing" if entry is None else "{1!r} {2} {3} in block {0!r}".format(*entry) for entry in pair)
    return f"expected {expected}, found {actual}"
