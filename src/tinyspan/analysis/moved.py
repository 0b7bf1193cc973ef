"""Updates theta - theta_0 of runs, models and adapters, and how two of them compare."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from tinyspan.analysis.directions import principal_angles, quiet_svd
from tinyspan.bases.basis import Basis
from tinyspan.errors import InputError, MismatchError
from tinyspan.linalg import orthonormalize
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Block, Partition
from tinyspan.trajectories.trajectory import Trajectory

__all__ = ["Comparison", "ComponentNorm", "Moved", "compare", "component", "component_norms", "updates"]

Moved = Trajectory | SubspaceModel | OpenedAdapter
"""A recorded run, a model in a basis, or an adapter on disk, each of which has an update theta - theta_0."""


def updates(moved: Moved) -> Iterator[tuple[Block, Tensor]]:
    """Yield every block with its update on the CPU, theta - theta_0 [D_b] at the end of the run, or V mean_i z_i.

    Args:
        moved: a trajectory, a `SubspaceModel`, or the opened folder of an adapter.

    Raises:
        InputError: the trajectory has no points, the basis of the adapter has moved, or the adapter has layer scales.
        StorageError: a file is damaged.
    """
    if isinstance(moved, Trajectory):
        if not len(moved):
            raise InputError(f"{moved.folder} has no points, so it has no update")
        yield from ((block, moved.delta(block)) for block in moved.partition)
    elif isinstance(moved, SubspaceModel):
        delta = moved.delta()
        yield from ((block, block.flatten(delta).cpu()) for block in moved.basis.partition)
    else:
        if "layer_scales" in moved.manifest.construction:
            raise InputError(f"{moved} has layer scales; open it with SubspaceModel.from_pretrained")
        basis = moved.basis()
        moved.require_z(basis.ranks)
        z = moved.read(()).z
        for block in basis.partition:
            v = basis.maps[block.name]
            yield block, v.matvec(z[block.name].mean(0)) if v.rank else torch.zeros(block.numel)


@dataclass(frozen=True)
class Comparison:
    """The directions and updates of two runs in one block.

    Let A [k_a, D] and B [k_b, D] be the orthonormal directions of the two, and a and b [D] their updates.

    Attributes:
        block: name of the block.
        angles: principal angles between the spans of A and B in degrees, ascending, [min(k_a, k_b)].
        cosine: `a . b / (|a| |b|)`; None if an update is zero or not given.
        shares: `|B a|^2 / |a|^2` and `|A b|^2 / |b|^2`, the share of each update in the span of the other's
            directions; None if the update is zero or not given.
        chance: k_b / D and k_a / D, the expected shares for random directions.
        norms: `|a|` and `|b|`; None if not given.
    """

    block: str
    angles: Tensor
    cosine: float | None
    shares: tuple[float | None, float | None]
    chance: tuple[float, float]
    norms: tuple[float | None, float | None]


def compare(a: Moved | Basis, b: Moved | Basis, rank: int | None = None) -> list[Comparison]:
    """Compare the directions and the updates of two runs, bases or adapters block by block; see `Comparison`.

    The directions of a trajectory are the right singular vectors of theta_i - theta_0, as of `svd_basis`; those below
    1e-6 of the largest are left out. The directions of a basis or an adapter are the columns of V, orthonormalised. A
    basis alone has no update. One block is in memory at a time, in float64.

    Args:
        a: a trajectory, basis, `SubspaceModel` or opened adapter.
        b: likewise, with the same blocks.
        rank: use the first k directions of each; all by default.

    Raises:
        InputError: `rank` is below 1, or an input has no update; see `updates`.
        MismatchError: the blocks differ, or the two start from different weights theta_0.
        StorageError: a file is damaged.

    Example:
        >>> from tinyspan import by_pattern
        >>> partition = by_pattern(torch.nn.Linear(3, 1, bias=False), {"all": ".*"})
        >>> a = Basis.from_directions(partition, {"all": torch.tensor([[1.0, 0.0, 0.0]])})
        >>> b = Basis.from_directions(partition, {"all": torch.tensor([[1.0, 1.0, 0.0]])})
        >>> [row.angles.round(decimals=4).tolist() for row in compare(a, b)]
        [[45.0]]
    """
    if rank is not None and rank < 1:
        raise InputError(f"expected a rank of at least 1, got {rank}")
    _require_comparable(a, b)
    in_a, in_b = _spanned(a), _spanned(b)
    rows = []
    for (block, of_a), (_, of_b) in zip(_updates_if_any(a), _updates_if_any(b), strict=True):
        first, second = _directions(in_a, block, rank), _directions(in_b, block, rank)
        one, other = (None if vector is None else vector.double() for vector in (of_a, of_b))
        norms = tuple(None if vector is None else float(vector.norm()) for vector in (one, other))
        cosine = None
        if one is not None and other is not None and norms[0] and norms[1]:
            cosine = float(one @ other) / (norms[0] * norms[1])
        shares = tuple(
            float((v @ vector).square().sum()) / norm**2 if vector is not None and norm else None
            for v, vector, norm in ((second, one, norms[0]), (first, other, norms[1]))
        )
        chance = len(second) / block.numel, len(first) / block.numel
        angles = principal_angles(first, second).rad2deg()
        rows.append(Comparison(block.name, angles, cosine, shares, chance, norms))  # type: ignore[arg-type]
    return rows


def _partition(source: Moved | Basis) -> Partition:
    return source.basis.partition if isinstance(source, SubspaceModel) else source.partition


def _fingerprint(source: Moved | Basis) -> Mapping[str, str]:
    """Return block -> fingerprint of theta_0; empty if the source fits every model."""
    if isinstance(source, Trajectory):
        return source.fingerprint()
    if isinstance(source, OpenedAdapter):
        return source.manifest.fingerprint
    return source.basis.fingerprint if isinstance(source, SubspaceModel) else source.fingerprint


def _require_comparable(a: Moved | Basis, b: Moved | Basis) -> None:
    """Check that two sources have the same blocks, of the same theta_0 if both know it.

    Raises:
        MismatchError: the blocks or the weights differ; the message names the first difference.
    """
    for ours, theirs in zip_longest(_partition(a), _partition(b)):
        names = ["no block" if block is None else block.name for block in (ours, theirs)]
        if names[0] != names[1]:
            raise MismatchError(f"the two cannot be compared: one has {names[0]} where the other has {names[1]}")
        if [(p.name, p.shape) for p in ours.parameters] != [(p.name, p.shape) for p in theirs.parameters]:
            raise MismatchError(f"the two cannot be compared: block {names[0]!r} has other parameters in each")
    of_a, of_b = _fingerprint(a), _fingerprint(b)
    blocks = [block.name for block in _partition(a) if block.name in of_a and block.name in of_b]
    if different := [block for block in blocks if of_a[block] != of_b[block]]:
        raise MismatchError(
            f"the two cannot be compared: they start from different weights theta_0, first in block {different[0]!r}"
        )


def _updates_if_any(source: Moved | Basis) -> Iterator[tuple[Block, Tensor | None]]:
    return ((block, None) for block in source.partition) if isinstance(source, Basis) else updates(source)


def _spanned(source: Moved | Basis) -> Trajectory | Basis:
    """Return what the directions of a source come from."""
    if isinstance(source, OpenedAdapter):
        return source.basis()
    return source.basis if isinstance(source, SubspaceModel) else source


def _directions(source: Trajectory | Basis, block: Block, rank: int | None) -> Tensor:
    """Return the first k orthonormal directions of a block, [k, D] in float64."""
    if isinstance(source, Basis):
        v = source.maps[block.name].dense(torch.float64)[:rank].cpu()
        return orthonormalize(v.clone()) if len(v) else v
    alone = source.with_partition(Partition((source.partition[block.name],)))
    if not any(deltas.any() for _, deltas in alone.chunks(block.name)):
        return torch.zeros(0, block.numel, dtype=torch.float64)
    basis = quiet_svd(alone, min(rank or len(source), len(source)), torch.float64)
    directions: Tensor = basis.maps[block.name].dense(torch.float64)
    return directions


@dataclass(frozen=True)
class ComponentNorm:
    """Length of an update in one parameter of a block.

    Attributes:
        block: name of the block.
        component: name of the parameter without the block's.
        norm: `|u_c|`, the Euclidean norm of the update of the parameter.
        numel: number of elements n of the parameter.
    """

    block: str
    component: str
    norm: float
    numel: int

    @property
    def per_weight(self) -> float:
        """Root mean square change of a weight, `|u_c| / sqrt(n)`."""
        return self.norm / math.sqrt(self.numel)


def component_norms(moved: Moved) -> list[ComponentNorm]:
    """Return the norm of the update of every parameter, in the order of the blocks.

    Raises:
        InputError: there is no update; see `updates`.

    Example:
        >>> import tempfile
        >>> from tinyspan import TrajectoryRecorder, by_pattern
        >>> model = torch.nn.Linear(2, 1)
        >>> recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), tempfile.mkdtemp())
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(model.weight + torch.tensor([[3.0, 4.0]]))
        >>> recorder.record(step=0)
        >>> [(row.component, round(row.norm, 4), row.numel) for row in component_norms(recorder.trajectory())]
        [('weight', 5.0, 2), ('bias', 0.0, 1)]
    """
    return [
        ComponentNorm(block.name, component(block, spec.name), float(vector[start:stop].double().norm()), spec.numel)
        for block, vector in updates(moved)
        for spec, start, stop in block.spans()
    ]


def component(block: Block, parameter: str) -> str:
    """Return the name of a parameter without the name of its block."""
    return parameter.removeprefix(f"{block.name}.")
