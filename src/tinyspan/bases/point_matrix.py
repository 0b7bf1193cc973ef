"""The matrix W [t, D] of a block: the points of all trajectories, one per row, read in pieces of columns."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from tinyspan.errors import InputError, MismatchError
from tinyspan.linalg import piece_width
from tinyspan.partition import Block
from tinyspan.trajectories.trajectory import CHUNK, Trajectory

__all__ = ["Center", "centered_pieces", "check_runs", "top_positions", "selected_columns", "squared_deltas"]

READ = 1 << 23  # elements of all points that are read at once; 67 MB in float64
Center = Literal["init", "mean", "none"]


def centered_pieces(runs: Sequence[Trajectory], block: Block, center: Center) -> Iterator[Tensor]:
    """Yield column pieces [t, n] of the matrix W in float64, all in the same memory."""
    count = sum(len(run) for run in runs)
    size = max(1, min(CHUNK, READ // count, piece_width(count)))
    memory = torch.empty(count, size, dtype=torch.float64)
    parts = zip(runs, memory.split([len(run) for run in runs]), strict=True)
    for pieces in zip(*(run.chunks(block, size, part) for run, part in parts), strict=True):
        start, _ = pieces[0]
        piece = memory[:, : len(start)]
        if center == "mean":
            mean = piece.mean(0)
            piece -= mean
            piece[piece.abs() <= 4 * torch.finfo(torch.float64).eps * mean.abs()] = 0.0  # remove rounding errors
        elif center == "none":
            piece += start.double()
        yield piece


def squared_deltas(runs: Sequence[Trajectory], block: Block) -> Tensor:
    """Return the sum over all points of (theta_i - theta_0)^2 for every coordinate of a block, [D] in float64."""
    scores, start = torch.empty(block.numel, dtype=torch.float64), 0
    for piece in centered_pieces(runs, block, "init"):
        scores[start : start + piece.shape[1]] = piece.square().sum(0)
        start += piece.shape[1]
    return scores


def top_positions(scores: Tensor, count: int) -> Tensor:
    """Return the ascending positions of the `count` largest positive scores; ties go to the lower position."""
    scores = scores.nan_to_num(nan=torch.inf)  # selected; the decomposition will raise an error
    threshold = scores.topk(count, sorted=False).values.min()
    above, equal = scores > threshold, (scores == threshold).nonzero().squeeze(1)
    above[equal[: count - int(above.sum())]] = True
    return (above & (scores > 0)).nonzero().squeeze(1)


def selected_columns(pieces: Iterable[Tensor], indices: Tensor, points: int) -> Tensor:
    """Return the columns `indices`, [t, n] in float64, of a matrix [t, D] given in column pieces."""
    columns, first, start = torch.empty(points, len(indices), dtype=torch.float64), 0, 0
    for piece in pieces:
        last = int(torch.searchsorted(indices, start + piece.shape[1]))
        columns[:, first:last] = piece[:, indices[first:last] - start]
        first, start = last, start + piece.shape[1]
    return columns


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
