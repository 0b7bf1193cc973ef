"""Discovery of a basis: the directions along which the points of trajectories lie.

Per block they are the leading right singular vectors of the points, or of some of their coordinates. What is found is
written block by block, so that an interrupted call goes on where it was.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tinyspan.bases.basis import Basis, block_file, stored_kind_and_rank, write_block
from tinyspan.bases.constructors import check_density, check_dtype, check_enough, register_basis, share_of
from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.io.folders import UNFINISHED, is_unfinished, prepare_folder, resumable
from tinyspan.io.storage import (
    MANIFEST,
    FileEntry,
    damage,
    package_versions,
    read_json,
    read_manifest,
    reading,
    write_json,
    write_manifest,
)
from tinyspan.linalg import everywhere, piece_width, right_singular_vectors
from tinyspan.maps.base import LinearMap
from tinyspan.maps.dense import dense_map
from tinyspan.maps.sparse import SparseMap
from tinyspan.partition import Block, Partition
from tinyspan.trajectories.trajectory import CHUNK, Trajectory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["svd_basis"]

READ = 1 << 23  # numbers of all points read at once; in float64 they take 67 MB
Center = Literal["init", "mean", "none"]


@register_basis("svd", method="intrinsic", rebuilds=False)
def svd_basis(
    trajectories: Trajectory | Sequence[Trajectory],
    rank: int | None = None,
    *,
    explained_variance: float | None = None,
    center: Center = "init",
    density: float = 1.0,
    coordinates: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Iterable[Block]], Iterable[Block]] = iter,
    group: "ProcessGroup | None" = None,
) -> Basis:
    """Return the leading right singular vectors of the points, block by block.

    Per block the points are stacked into W [t, D], W = U S V^T, and the first k columns of V are kept (Zhang et al.
    2023, section 3.2). What is stacked is `center`'s choice:

    - `init`: theta_i - theta_0. The span contains the whole path, and theta_0 + V z can reach every point.
    - `mean`: theta_i - mean_i theta_i, the principal directions of the points; one direction fewer.
    - `none`: theta_i itself, the paper's formula to the letter. The first direction is then nearly theta_0.

    With `density` below 1 the basis is sparse: in each block only that share of the coordinates is kept, those in which
    the points are furthest from theta_0 in the mean square, and W is cut to them before its singular vectors are taken.
    The points are then read once for the choice and once for W's columns; a dense V is never made.

    Computed from the t x t Gram matrix, accumulated in float64 over pieces that fit a processor's cache, and one
    product for V: the points are read twice, and V is written once, with `folder` while the next block's points are
    read for the first time. Directions whose singular value is below 1e-6 of the largest are dropped with a warning:
    squaring loses them. If one is below 1e-4, V takes one more pass to become orthonormal; stored in float32 it is so
    to 1e-6 in any case.

    The points are never in memory together, but the Gram matrix is: about 60 t^2 bytes and a time that grows with t^3
    (3,000 points: 0.6 GB and half a minute per block on one core; 10,000: 6 GB). Of a longer run, take some points:
    `trajectory.with_points(range(0, len(trajectory), 10))`.

    Args:
        trajectories: one, or several of the same model whose points are stacked.
        rank: how many directions to keep; this or `explained_variance`.
        explained_variance: keep the fewest directions that explain this share (0 to 1) of the sum of squares.
        center: see above.
        density: share of each block's coordinates that get directions, above 0 and at most 1.
        coordinates: instead of `density`, which ones: block name -> ascending positions in the block's vector, [n].
        dtype: in which directions are stored: float32, float64, bfloat16 (half the bytes; each number is off by up to
            0.2 %) or int8 (about a quarter; see `dense_map`).
        folder: write every block there as soon as it is found, so that no two blocks' directions are in memory
            together; as `save_pretrained` would, but for this. If the folder holds the blocks that an interrupted call
            with the same trajectories and arguments has found, these are not made again.
        overwrite: replace an earlier basis in that folder.
        progress: wraps the iteration over blocks, for a progress bar.
        group: processes whose trajectories hold one shard each of the same blocks at the same steps, and that all make
            this call. They send each other one t x t matrix per block, and a second one where V takes one more pass.
            Each gets the same singular values and its shard's rows of V: V^T V = I in the sum over all processes, and
            so V^T g is the sum of what `rmatvec` gives them. A backend for tensors in main memory, such as gloo. If one
            process fails, the others wait until the group's timeout.

    Raises:
        InputError: no or both cuts are given, one is out of range, no block moves, or the folder cannot be used.
        MismatchError: the trajectories belong to different models or partitions, or those of the processes of a group
            have other steps or blocks.

    Example:
        >>> import tempfile
        >>> from tinyspan import TrajectoryRecorder, by_pattern
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), tempfile.mkdtemp())
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(torch.tensor([[0.0, 2.0, 0.0]]))
        >>> recorder.record(step=0)
        >>> basis = svd_basis(recorder.trajectory(), rank=1)
        >>> [round(abs(x), 5) for x in basis.maps["all"].directions[0].tolist()]
        [0.0, 1.0, 0.0]

        A group of one process, which has the whole block as its shard:

        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> shard = svd_basis(recorder.trajectory(), rank=1, group=torch.distributed.group.WORLD)
        >>> torch.distributed.destroy_process_group()
        >>> torch.equal(shard.maps["all"].directions, basis.maps["all"].directions)
        True
    """
    runs = [trajectories] if isinstance(trajectories, Trajectory) else list(trajectories)
    _check_runs(runs)
    points = sum(len(run) for run in runs)
    check_dtype(dtype)
    chosen = _chosen(runs[0].partition, density, coordinates, rank)
    _check_cut(rank, explained_variance, points - (center == "mean"), center)
    if group is not None and (density < 1 or coordinates is not None):
        raise InputError("processes can only share dense directions: leave density and coordinates out, or group")
    shard = {} if group is None else _check_shards(runs, group)
    found = Basis(
        runs[0].partition,
        {},
        ranks=dict.fromkeys((block.name for block in runs[0].partition), 0),
        fingerprint=runs[0].fingerprint(),
        construction={
            "constructor": "svd",
            "center": center,
            "rank": rank,
            "explained_variance": explained_variance,
            "dtype": str(dtype)[6:],
            **({} if density == 1 else {"density": density}),
            **({} if coordinates is None else {"coordinates": _digest(chosen)}),
            **shard,
        },
        parents=[run.content_hash() for run in runs],
        model_name=runs[0].manifest.details.get("model"),
    )

    def map_of(block: Block, empty: Callable[..., Tensor] = torch.empty) -> tuple[Tensor, LinearMap]:
        chunks = partial(_centred, runs, block, center)
        keep = partial(_keep, rank=rank, explained_variance=explained_variance)
        if density < 1 or chosen:
            indices = chosen[block.name] if chosen else _largest(_movement(runs, block), share_of(density, block))
            columns = _columns(chunks(), indices, points)
            values, directions = right_singular_vectors(
                lambda: iter(columns.split(piece_width(points), dim=1)), len(indices), keep, dtype, block.name
            )
            return values, SparseMap(block.numel, indices, dense_map(directions, dtype))
        if center == "none":
            still = not any(deltas.any() for run in runs for _, deltas in run.chunks(block))
            if everywhere(still, group):
                message = f"block {block.name!r} does not move, so its one direction is theta_0 itself"
                warnings.warn(message, stacklevel=2)
        values, directions = right_singular_vectors(
            chunks, block.numel, keep, dtype, block.name, empty=empty, group=group
        )
        return values, dense_map(directions, dtype)

    if folder is not None:
        return _written(found, Path(folder), map_of, progress, overwrite, group)
    spectrum, maps = {}, {}
    for block in progress(found.partition):
        spectrum[block.name], maps[block.name] = map_of(block)
        found.ranks[block.name] = maps[block.name].rank
    _check_moved(found)
    found.spectrum, found.maps = spectrum, maps
    return found


def _written(
    found: Basis,
    folder: Path,
    map_of: Callable[[Block, Callable[..., Tensor]], tuple[Tensor, LinearMap]],
    progress: Callable[[Iterable[Block]], Iterable[Block]],
    overwrite: bool,
    group: "ProcessGroup | None",
) -> Basis:
    """Write the blocks of a basis one after the other, those that are not there yet, and return it as loaded.

    A block is written in the background until the next one needs the memory: there is one V at a time.
    """
    recipe = found._manifest({}).model_dump(include={"partition", "fingerprint", "parents", "construction"})
    if everywhere(overwrite and _is_made(folder, recipe), group):
        return Basis.from_pretrained(folder)
    recipe["versions"] = {name: package_versions().get(name) for name in ("tinyspan", "torch")}
    with resumable(folder, "basis", recipe, overwrite):
        if everywhere((folder / MANIFEST).is_file(), group):  # interrupted when all was done
            return Basis.from_pretrained(folder)
        entries: dict[str, FileEntry] = {}
        with ThreadPoolExecutor(1) as background:
            memory = _Memory()
            for index, block in enumerate(progress(found.partition)):
                name, done = block_file(index), folder / UNFINISHED / f"{block_file(index)}.json"
                kept = _kept(done, name)
                if everywhere(bool(kept) and not damage(folder, kept), group):
                    entries |= kept
                    found.ranks[block.name] = stored_kind_and_rank(folder / name, block)[1]
                    continue
                values, found_map = map_of(block, memory.empty)
                memory.settle()
                found.ranks[block.name] = found_map.rank
                memory.user = background.submit(_write_block, folder / name, found_map, values, done, entries)
                del values, found_map  # the writer holds them, and nobody else
            memory.settle()
        if not found.rank:
            prepare_folder(folder, "basis", overwrite=True)  # no blocks without a manifest are left there
            for note in (folder / UNFINISHED).glob("block-*"):
                note.unlink()
        _check_moved(found)
        write_manifest(folder, found._manifest(entries))
    return Basis.from_pretrained(folder)


class _Memory:
    """One tensor's memory, given out again when its user is done, since fresh memory costs as much as a product."""

    def __init__(self) -> None:
        self.user: Future[None] | None = None
        self._tensor = torch.empty(0)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor, like `torch.empty`."""
        self.settle()
        if (self._tensor.shape, self._tensor.dtype) != (shape, dtype):
            self._tensor = torch.empty(0)  # the old memory is free before there is new one
            self._tensor = torch.empty(shape, dtype=dtype)
        return self._tensor

    def settle(self) -> None:
        """Wait for the user, and raise what it raised."""
        if self.user is not None:
            self.user.result()
            self.user = None


def _write_block(path: Path, v: LinearMap, spectrum: Tensor, done: Path, entries: dict[str, FileEntry]) -> None:
    """Write a block's file, then the note that it is whole."""
    entries[path.name] = write_block(path, v, spectrum)
    write_json(done, {path.name: entries[path.name].model_dump()})


def _kept(done: Path, name: str) -> dict[str, FileEntry]:
    """Return what an interrupted call noted about a block's file when that was whole, if it did."""
    if not done.is_file():
        return {}
    try:
        with reading(done):
            return {name: FileEntry.model_validate(read_json(done)[name])}
    except StorageError as error:
        warnings.warn(f"{error}; its block is made again", stacklevel=3)
        return {}


def _is_made(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a folder holds the whole basis that a recipe describes, so that overwriting it would change nothing."""
    if is_unfinished(folder) or not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(folder, "basis")
    except TinyspanError:
        return False
    same = manifest.model_dump(include=set(recipe)) == recipe
    return same and not damage(folder, manifest.files)


def _check_moved(found: Basis) -> None:
    if not found.rank:
        where = "theta_0" if found.construction["center"] == "init" else "the others"
        raise InputError(
            f"no point differs from {where} in any block, so there are no directions; was the model trained between "
            "the points, at a rate that its number format can show?"
        )


def _centred(runs: Sequence[Trajectory], block: Block, center: Center) -> Iterator[Tensor]:
    """Yield float64 pieces [t, n] of the matrix whose singular vectors are wanted, all in the same memory."""
    count = sum(len(run) for run in runs)
    size = max(1, min(CHUNK, READ // count, piece_width(count)))
    memory = torch.empty(count, size, dtype=torch.float64)
    parts = zip(runs, memory.split([len(run) for run in runs]), strict=True)
    for pieces in zip(*(run.chunks(block, size, part) for run, part in parts), strict=True):
        start, _ = pieces[0]
        rows = memory[:, : len(start)]
        if center == "mean":
            mean = rows.mean(0)
            rows -= mean
            rows[rows.abs() <= 4 * torch.finfo(torch.float64).eps * mean.abs()] = 0.0  # rounding is no direction
        elif center == "none":
            rows += start.double()
        yield rows


def _movement(runs: Sequence[Trajectory], block: Block) -> Tensor:
    """Return, for every coordinate of a block, the sum over all points of (theta_i - theta_0)^2, [D] in float64."""
    scores, start = torch.empty(block.numel, dtype=torch.float64), 0
    for rows in _centred(runs, block, "init"):
        scores[start : start + rows.shape[1]] = rows.square().sum(0)
        start += rows.shape[1]
    return scores


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the ascending positions of the `count` largest scores above 0; of equal ones the first."""
    scores = scores.nan_to_num(nan=torch.inf)  # kept, and refused where the singular vectors are taken
    threshold = scores.topk(count, sorted=False).values.min()
    above, equal = scores > threshold, (scores == threshold).nonzero().squeeze(1)
    above[equal[: count - int(above.sum())]] = True
    return (above & (scores > 0)).nonzero().squeeze(1)


def _columns(pieces: Iterable[Tensor], indices: Tensor, points: int) -> Tensor:
    """Return some columns, [t, n] in float64, of the matrix [t, D] that comes in pieces."""
    columns, first, start = torch.empty(points, len(indices), dtype=torch.float64), 0, 0
    for rows in pieces:
        last = int(torch.searchsorted(indices, start + rows.shape[1]))
        columns[:, first:last] = rows[:, indices[first:last] - start]
        first, start = last, start + rows.shape[1]
    return columns


def _keep(values: Tensor, *, rank: int | None, explained_variance: float | None) -> int:
    """Return how many directions the cut keeps."""
    if rank is not None:
        return rank
    share = values.square().cumsum(0) / values.square().sum()
    assert explained_variance is not None
    return min(int((share < explained_variance).sum()) + 1, len(values))


def _check_cut(rank: int | None, explained_variance: float | None, available: int, center: str) -> None:
    if (rank is None) == (explained_variance is None):
        raise InputError("give either rank or explained_variance")
    if rank is not None and not 1 <= rank <= available:
        raise InputError(
            f"rank {rank} is not between 1 and {available}, the number of directions that the points have "
            f"with center={center!r}; record more points or lower the rank"
        )
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise InputError(f"explained_variance must be above 0 and at most 1, got {explained_variance}")


def _chosen(
    partition: Partition, density: float, coordinates: Mapping[str, Tensor] | None, rank: int | None
) -> Mapping[str, Tensor]:
    """Return the given coordinates, which must be some of every block, and at least so many as directions."""
    check_density(density)
    if coordinates is None:
        check_enough({block.name: share_of(density, block) for block in partition}, rank)
        return {}
    if density != 1:
        raise InputError("give either density or coordinates")
    for block in partition:
        given = coordinates.get(block.name)
        if given is None or given.dtype not in (torch.int32, torch.int64) or given.ndim != 1 or not len(given):
            found = "nothing" if given is None else f"{given.dtype} of shape {list(given.shape)}"
            raise InputError(f"coordinates of block {block.name!r}: expected whole numbers [n], got {found}")
        if given.min() < 0 or given.max() >= block.numel or (given[1:] <= given[:-1]).any():
            raise InputError(
                f"coordinates of block {block.name!r}: expected ascending ones from 0 to {block.numel - 1}"
            )
    check_enough({block.name: len(coordinates[block.name]) for block in partition}, rank)
    return {name: given.cpu().long() for name, given in coordinates.items()}


def _digest(coordinates: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of coordinates, by which a construction names them."""
    digest = hashlib.sha256()
    for name in sorted(coordinates):
        digest.update(name.encode() + b"\0" + coordinates[name].numpy().tobytes())
    return digest.hexdigest()


def _check_runs(runs: Sequence[Trajectory]) -> None:
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


def _check_shards(runs: Sequence[Trajectory], group: "ProcessGroup") -> dict[str, int]:
    """Compare the runs of the processes of a group, and return which shard this process has."""
    rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    shards: list[Any] = [None] * count
    ours = [run.steps for run in runs], [block.name for block in runs[0].partition]
    torch.distributed.all_gather_object(shards, ours, group)
    for other, theirs in enumerate(shards):
        for what, a, b in zip(("steps", "blocks"), shards[0], theirs, strict=True):
            if a != b:
                raise MismatchError(
                    f"process {other} of the group has the {what} {str(b)[:200]}, process 0 has {str(a)[:200]}; "
                    "give every process its shard of the same run"
                )
    return {"shard": rank, "shards": count}


def _difference(first: Trajectory, other: Trajectory) -> str:
    """Return where two partitions differ first."""
    ours, theirs = (
        [(block.name, spec.name, list(spec.shape), spec.dtype) for block in run.partition for spec in block.parameters]
        for run in (first, other)
    )
    pairs = zip_longest(ours, theirs)
    expected, found = next((a, b) for a, b in pairs if a != b)
    shown = ["nothing" if one is None else "{1!r} {2} {3} in block {0!r}".format(*one) for one in (expected, found)]
    return f"expected {shown[0]}, found {shown[1]}"
