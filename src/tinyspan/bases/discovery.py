"""Discovery of a basis: the principal directions of the points of trajectories.

Per block they are the leading right singular vectors of the points, or of a subset of their coordinates. Blocks are
written one at a time, so an interrupted call can be resumed.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from tinyspan.bases.basis import Basis, block_content, block_file, stored_kind_and_rank
from tinyspan.bases.constructors import check_density, check_dtype, check_enough, register_basis, share_of
from tinyspan.bases.point_matrix import (
    Center,
    PointMatrix,
    check_runs,
    selected_columns,
    squared_deltas,
    top_positions,
)
from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.io.folders import UNFINISHED, is_unfinished, prepare_folder, resumable
from tinyspan.io.manifests import (
    MANIFEST,
    FileEntry,
    damage,
    file_entry,
    package_versions,
    read_manifest,
    write_manifest,
)
from tinyspan.io.storage import read_json, reading, replacing, write_json
from tinyspan.io.tensors import save_tensors
from tinyspan.linalg import TensorColumns, everywhere, right_singular_vectors
from tinyspan.maps.base import LinearMap
from tinyspan.maps.dense import dense_map
from tinyspan.maps.sparse import SparseMap
from tinyspan.partition import Block, Partition
from tinyspan.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["svd_basis"]


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

    Per block the points are stacked into W [t, D] = U S V^T, and the first k columns of V are the directions (Zhang et
    al. 2023, section 3.2). `center` selects what is stacked:

    - `init`: theta_i - theta_0. The span contains the whole path, and theta_0 + V z can reach every point.
    - `mean`: theta_i - mean_i theta_i, the principal directions of the points; one direction fewer.
    - `none`: theta_i itself, exactly the paper's formula. The first direction is then nearly theta_0.

    With `density` below 1 the basis is sparse. In each block it uses this share of the coordinates, those in which the
    mean squared distance of the points from theta_0 is largest, and W is restricted to them before the decomposition.
    The points are read once to select the coordinates and once to read W's columns. A dense V is never computed.

    The algorithm accumulates the t x t Gram matrix in float64, over pieces that fit the CPU cache, and computes V with
    one product. The points are read twice and V is written once; with `folder` it is written while the next block is
    computed. Directions whose singular value is below 1e-6 of the largest are dropped with a warning, because squaring
    loses them. If one is below 1e-4, V is orthonormalised in one more pass. V in float32 is orthonormal to 1e-6 in any
    case.

    The points are never in memory together, except for the selected coordinates of a sparse basis, in float64. The Gram
    matrix is: it takes about 60 t^2 bytes and a time that grows with t^3 (3,000 points: 0.6 GB and half a minute per
    block on one core; 10,000: 6 GB). For a longer run, use a subset of the points:
    `trajectory.with_points(range(0, len(trajectory), 10))`.

    Args:
        trajectories: one trajectory, or several of the same model whose points are stacked.
        rank: number of directions; give either this or `explained_variance`.
        explained_variance: use the fewest directions that explain this share (0 to 1) of the sum of squares.
        center: see above.
        density: share of each block's coordinates on which the directions are nonzero, above 0 and at most 1.
        coordinates: explicit coordinates instead of `density`: block name -> ascending positions in the block's
            vector, [n].
        dtype: dtype of the stored directions: float32, float64, bfloat16 (half the size; relative error of each number
            up to 0.2 %), float16 (half the size; up to 0.05 %, more of very small numbers) or int8 (about a quarter of
            the size; see `dense_map`).
        folder: write every block to this folder as soon as it is computed, in the format of `save_pretrained`, so that
            the directions of at most one block are in memory. If an interrupted call with the same trajectories and
            arguments has written blocks to the folder, they are not computed again.
        overwrite: replace an earlier basis in the folder.
        progress: wraps the iteration over blocks, for a progress bar.
        group: process group in which each process has the trajectory of one shard of the same blocks, at the same
            steps. All processes make this call. They exchange one t x t matrix per block, and a second one if V takes
            another pass. Each process gets the same singular values and its shard of V: V^T V = I holds for the sum
            over all processes, so V^T g is the sum of their `rmatvec`. The backend must support CPU tensors, as gloo
            does. If one process fails, the others wait until the group's timeout.

    Raises:
        InputError: neither or both of `rank` and `explained_variance` are given, an argument is out of range, no block
            moves, or the folder cannot be used.
        MismatchError: the trajectories belong to different models or partitions, or the processes of a group have
            different steps or blocks.

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

        A group of one process, whose shard is the whole block:

        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> shard = svd_basis(recorder.trajectory(), rank=1, group=torch.distributed.group.WORLD)
        >>> torch.distributed.destroy_process_group()
        >>> torch.equal(shard.maps["all"].directions, basis.maps["all"].directions)
        True
    """
    runs = [trajectories] if isinstance(trajectories, Trajectory) else list(trajectories)
    check_runs(runs)
    check_dtype(dtype)
    if center not in get_args(Center):
        raise InputError(f"expected center to be one of {', '.join(get_args(Center))}, got {center!r}")
    selected = _check_coordinates(runs[0].partition, density, coordinates, rank)
    _check_cut(rank, explained_variance, sum(map(len, runs)) - (center == "mean"), center)
    if group is not None and (density < 1 or coordinates is not None):
        raise InputError("a group supports dense directions only: leave out density and coordinates, or the group")
    shard = {} if group is None else _check_shards(runs, group)
    basis = Basis(
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
            **({} if coordinates is None else {"coordinates": _digest(selected)}),
            **shard,
        },
        parents=[run.content_hash() for run in runs],
        model_name=runs[0].manifest.details.get("model"),
    )

    def map_of(block: Block, empty: Callable[..., Tensor] = torch.empty) -> tuple[Tensor, LinearMap]:
        matrix = PointMatrix(runs, block, center)
        keep = partial(_count_directions, rank=rank, explained_variance=explained_variance)
        if density < 1 or selected:
            indices = (
                selected[block.name]
                if selected
                else top_positions(squared_deltas(runs, block), share_of(density, block))
            )
            columns = TensorColumns(selected_columns(matrix, indices))
            values, directions = right_singular_vectors(columns, keep, dtype, block.name)
            return values, SparseMap(block.numel, indices, dense_map(directions, dtype))
        if center == "none":
            is_constant = not any(deltas.any() for run in runs for _, deltas in run.chunks(block))
            if everywhere(is_constant, group):
                message = f"block {block.name!r} does not move, so its one direction is theta_0 itself"
                warnings.warn(message, stacklevel=2)
        values, directions = right_singular_vectors(matrix, keep, dtype, block.name, empty=empty, group=group)
        return values, dense_map(directions, dtype)

    if folder is not None:
        return _write(basis, Path(folder), map_of, progress, overwrite, group)
    spectrum, maps = {}, {}
    for block in progress(basis.partition):
        spectrum[block.name], maps[block.name] = map_of(block)
        basis.ranks[block.name] = maps[block.name].rank
    _check_moved(basis)
    basis.spectrum, basis.maps = spectrum, maps
    return basis


def _write(
    basis: Basis,
    folder: Path,
    map_of: Callable[[Block, Callable[..., Tensor]], tuple[Tensor, LinearMap]],
    progress: Callable[[Iterable[Block]], Iterable[Block]],
    overwrite: bool,
    group: "ProcessGroup | None",
) -> Basis:
    """Compute and write the missing blocks of a basis, and return the basis as loaded from the folder.

    One V is in memory at a time: it is copied to its file in the background until the next one needs the memory.
    """
    settings = basis._manifest({}).model_dump(include={"partition", "fingerprint", "parents", "construction"})
    if everywhere(overwrite and _is_complete(folder, settings), group):
        return Basis.from_pretrained(folder)
    settings["versions"] = {name: package_versions().get(name) for name in ("tinyspan", "torch")}
    with resumable(folder, "basis", settings, overwrite):
        if everywhere((folder / MANIFEST).is_file(), group):  # interrupted after the last block
            return Basis.from_pretrained(folder)
        entries: dict[str, FileEntry] = {}
        with _BlockWriter(folder, entries) as writer:
            for index, block in enumerate(progress(basis.partition)):
                name = block_file(index)
                files = _read_note(folder, name)
                if everywhere(bool(files) and not damage(folder, files), group):
                    entries |= files
                    basis.ranks[block.name] = stored_kind_and_rank(folder / name, block)[1]
                    continue
                values, v = map_of(block, writer.empty)
                writer.settle()
                basis.ranks[block.name] = v.rank
                writer.write(name, v, values)
                del values, v  # only the writer holds a reference
            writer.finish()
        if not basis.rank:
            prepare_folder(folder, "basis", overwrite=True)  # leave no blocks without a manifest
            for path in (folder / UNFINISHED).glob("block-*"):
                path.unlink()
        _check_moved(basis)
        write_manifest(folder, basis._manifest(entries))
    return Basis.from_pretrained(folder)


class _BlockWriter:
    """Writes blocks in the background: one is copied to its file while the file before is hashed and flushed.

    Args:
        folder: folder of the basis.
        entries: file name -> size and hash of every block; those that are written are added.
    """

    def __init__(self, folder: Path, entries: dict[str, FileEntry]) -> None:
        self._folder, self._entries, self._memory = folder, entries, torch.empty(0)
        self._copier, self._finisher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._copying, self._finishing = list[Future[None]](), list[Future[None]]()

    def __enter__(self) -> "_BlockWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._copier.shutdown()  # waits; the copies then have their turn at the other thread
        self._finisher.shutdown()

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor, like `torch.empty`, once the block before is copied.

        Its memory is used again for the next block, since writing to new memory takes longer.
        """
        self.settle()
        if (self._memory.shape, self._memory.dtype) != (shape, dtype):
            self._memory = torch.empty(0)  # free the old memory first
            self._memory = torch.empty(shape, dtype=dtype)
        return self._memory

    def write(self, name: str, v: LinearMap, spectrum: Tensor) -> None:
        """Write a block's file, then a note with its size and hash; the block before must be copied."""
        self._copying.append(self._copier.submit(self._copy, name, v, spectrum))

    def settle(self) -> None:
        """Wait until the blocks are copied and all but the last one are finished, and raise their errors."""
        while self._copying:
            self._copying.pop().result()
        while len(self._finishing) > 1:
            self._finishing.pop(0).result()

    def finish(self) -> None:
        """Wait until all blocks are written, and raise their errors."""
        self.settle()
        for future in self._finishing:
            future.result()

    def _copy(self, name: str, v: LinearMap, spectrum: Tensor) -> None:
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self._folder / name))
            save_tensors(temporary, *block_content(v, spectrum))
            self._finishing.append(self._finisher.submit(self._finish, name, temporary, stack.pop_all()))

    def _finish(self, name: str, temporary: Path, renaming: ExitStack) -> None:
        with renaming:
            entry = file_entry(temporary)
        write_json(_note(self._folder, name), {name: entry.model_dump()})
        self._entries[name] = entry


def _note(folder: Path, name: str) -> Path:
    """Return the path of the note about a block's file, by which an interrupted call is resumed."""
    return folder / UNFINISHED / f"{name}.json"


def _read_note(folder: Path, name: str) -> dict[str, FileEntry]:
    """Return size and hash of a block's file from the note of an interrupted call, if there is one."""
    note = _note(folder, name)
    if not note.is_file():
        return {}
    try:
        with reading(note):
            return {name: FileEntry.model_validate(read_json(note)[name])}
    except StorageError as error:
        warnings.warn(f"{error}; its block is computed again", stacklevel=3)
        return {}


def _is_complete(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether a folder holds the complete basis with these settings, so that overwriting would not change it."""
    if is_unfinished(folder) or not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(folder, "basis")
    except TinyspanError:
        return False
    is_same = manifest.model_dump(include=set(settings)) == settings
    return is_same and not damage(folder, manifest.files)


def _check_moved(basis: Basis) -> None:
    if not basis.rank:
        where = "theta_0" if basis.construction["center"] == "init" else "the others"
        raise InputError(
            f"no point differs from {where} in any block, so there are no directions; was the model trained between "
            "the points, at a rate that its number format can show?"
        )


def _count_directions(values: Tensor, *, rank: int | None, explained_variance: float | None) -> int:
    """Return the number of directions that `rank` or `explained_variance` asks for."""
    if rank is not None:
        return rank
    share = values.square().cumsum(0) / values.square().sum()
    assert explained_variance is not None
    return min(int((share < explained_variance).sum()) + 1, len(values))


def _check_cut(rank: int | None, explained_variance: float | None, available: int, center: str) -> None:
    if (rank is None) == (explained_variance is None):
        raise InputError(f"give either rank= or explained_variance=, got {rank} and {explained_variance}")
    if rank is not None and not 1 <= rank <= available:
        raise InputError(
            f"rank={rank} is not between 1 and {available}, the number of directions that the points have "
            f"with center={center!r}; record more points (a smaller interval in `record --every`) or lower the rank"
        )
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise InputError(f"explained_variance={explained_variance} is not above 0 and at most 1")


def _check_coordinates(
    partition: Partition, density: float, coordinates: Mapping[str, Tensor] | None, rank: int | None
) -> Mapping[str, Tensor]:
    """Check density and coordinates, and return the coordinates of every block; empty if none are given."""
    check_density(density)
    if coordinates is None:
        check_enough({block.name: share_of(density, block) for block in partition}, rank)
        return {}
    if density != 1:
        raise InputError("give either density= or coordinates=")
    for block in partition:
        given = coordinates.get(block.name)
        if given is None or given.dtype not in (torch.int32, torch.int64) or given.ndim != 1 or not len(given):
            actual = "nothing" if given is None else f"{given.dtype} of shape {list(given.shape)}"
            raise InputError(f"coordinates of block {block.name!r}: expected integers [n], got {actual}")
        if given.min() < 0 or given.max() >= block.numel or (given[1:] <= given[:-1]).any():
            raise InputError(
                f"coordinates of block {block.name!r}: expected ascending positions from 0 to {block.numel - 1}"
            )
    check_enough({block.name: len(coordinates[block.name]) for block in partition}, rank)
    return {name: given.cpu().long() for name, given in coordinates.items()}


def _digest(coordinates: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of coordinates, which identifies them in a construction."""
    digest = hashlib.sha256()
    for name in sorted(coordinates):
        digest.update(name.encode() + b"\0" + coordinates[name].numpy().tobytes())
    return digest.hexdigest()


def _check_shards(runs: Sequence[Trajectory], group: "ProcessGroup") -> dict[str, int]:
    """Check that all processes of a group have the same steps and blocks, and return this process's shard number."""
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
