"""Basis of a subspace: per block a linear map V from k coordinates to the block's D_b numbers.

A map has two operations, `expand(z)` = V z and `project(g)` = V^T g. The directions of the dense map are orthonormal
and stored one after the other, [k, D_b]; it can be narrowed to some of its rows. The Fastfood map stores no directions.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.fastfood import FastfoodMap, power_of_two
from tinyspan.folders import UNFINISHED, check_folder, claimed, is_unfinished, prepare_folder, resumable
from tinyspan.partition import Block, Partition
from tinyspan.storage import (
    MANIFEST,
    FileEntry,
    Manifest,
    Reader,
    check_file,
    damage,
    finite,
    open_tensors,
    package_versions,
    read_json,
    read_manifest,
    reading,
    write_json,
    write_manifest,
    write_tensors,
)
from tinyspan.svd import everywhere, orthonormalize, piece_width, right_singular_vectors
from tinyspan.trajectory import CHUNK, Trajectory, stored_partition

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Basis",
    "DenseMap",
    "LinearMap",
    "empty_basis",
    "fastfood_basis",
    "given_basis",
    "random_basis",
    "svd_basis",
]

READ = 1 << 23  # numbers of all points read at once; in float64 they take 67 MB
Center = Literal["init", "mean", "none"]
Value = TypeVar("Value")


class LinearMap(Protocol):
    """V of one block, from k = `rank` coordinates to D = `size` numbers.

    A map that costs less on some of its rows alone also has `rows(start, stop)`; the model is then moved, and gradients
    are projected, parameter by parameter instead of block by block.
    """

    rank: int
    size: int

    def expand(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D]."""

    def project(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "LinearMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""


class DenseMap:
    """V held as its directions, a tensor [k, D] of which row i is the i-th column of V.

    Example:
        >>> v = DenseMap(torch.eye(2, 3))
        >>> v.expand(torch.tensor([1.0, 2.0])), v.project(torch.tensor([3.0, 4.0, 5.0]))
        (tensor([1., 2., 0.]), tensor([3., 4.]))
    """

    def __init__(self, directions: Tensor) -> None:
        self.directions = directions
        self.rank, self.size = directions.shape

    def expand(self, z: Tensor) -> Tensor:
        """Return V z, [k] -> [D], in the dtype of z."""
        out = torch.zeros(self.size, dtype=z.dtype, device=z.device)
        self.displace(out, z, out)
        return out

    def displace(self, start: Tensor, z: Tensor, out: Tensor) -> None:
        """Write start + V z into `out`, both [D]; one read of V."""
        if self.directions.dtype == z.dtype:
            torch.addmv(start, self.directions.T, z, out=out)
            return
        for a in range(0, self.size, CHUNK):  # converted piece by piece, so that no wide copy of V exists
            piece = slice(a, a + CHUNK)
            torch.addmv(start[piece], self.directions[:, piece].to(z.dtype).T, z, out=out[piece])

    def project(self, g: Tensor) -> Tensor:
        """Return V^T g, [D] -> [k], in the dtype of g."""
        if self.directions.dtype == g.dtype:
            return self.directions @ g
        out = torch.zeros(self.rank, dtype=g.dtype, device=g.device)
        for a in range(0, self.size, CHUNK):
            out += self.directions[:, a : a + CHUNK].to(g.dtype) @ g[a : a + CHUNK]
        return out

    def rows(self, start: int, stop: int) -> "DenseMap":
        """Return the map onto the coordinates `start` .. `stop` alone, a view."""
        return DenseMap(self.directions[:, start:stop])

    def tensors(self) -> dict[str, Tensor]:
        """Return what the map is made of, by name."""
        return {"directions": self.directions}

    def converted(self, fn: Callable[[Tensor], Tensor]) -> "DenseMap":
        """Return the same map with `fn`, such as a move to a device, applied to its tensors."""
        return DenseMap(fn(self.directions))


class Basis:
    """One linear map per block of a partition, and where it came from.

    Args:
        partition: the blocks.
        maps: block name -> map. A mapping that loads on access keeps at most one block in memory.
        spectrum: block name -> all singular values [t] of the matrix the directions were taken from, descending, in
            units of the weights; empty for a basis that was not taken from points.
        fingerprint: of theta_0 per block; empty for a basis that fits every model with this partition.
        construction: the constructor and its arguments.
        parents: content hashes of the trajectories.
        content_hash: of the folder it was loaded from or written to.
        ranks: block name -> k; asked of the maps by default.
        model_name: of the model the points belong to, for people.
        versions: of the packages that wrote it, for people.

    Attributes:
        location: the folder it was loaded from or written to.
    """

    def __init__(
        self,
        partition: Partition,
        maps: Mapping[str, LinearMap],
        *,
        spectrum: Mapping[str, Tensor] | None = None,
        fingerprint: Mapping[str, str] | None = None,
        construction: Mapping[str, Any] | None = None,
        parents: Sequence[str] = (),
        location: Path | None = None,
        content_hash: str | None = None,
        ranks: Mapping[str, int] | None = None,
        model_name: str | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.partition, self.maps = partition, maps
        self.ranks = dict(ranks) if ranks else {block.name: maps[block.name].rank for block in partition}
        self.spectrum: Mapping[str, Tensor] = {} if spectrum is None else spectrum
        self.fingerprint = dict(fingerprint or {})
        self.construction = dict(construction or {})
        self.parents = list(parents)
        self.location, self._content_hash, self.model_name = location, content_hash, model_name
        self.versions = dict(versions or {})

    @property
    def rank(self) -> int:
        """k, the largest rank of a block."""
        return max(self.ranks.values())

    def expand(self, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return V z for every block, [k_b] -> [D_b]."""
        return {block.name: self.maps[block.name].expand(z[block.name]) for block in self.partition}

    def project(self, g: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return V^T g for every block, [D_b] -> [k_b]."""
        return {block.name: self.maps[block.name].project(g[block.name]) for block in self.partition}

    def content_hash(self) -> str:
        """Return the SHA-256 by which adapters name this basis.

        It depends on the blocks, theta_0's fingerprint, the construction and the numbers of every map. A basis
        in memory is hashed as `save` would write it.
        """
        if self._content_hash is None:
            entries = {_file(index): self._entry(block) for index, block in enumerate(self.partition)}
            self._content_hash = self._manifest(entries).content_hash()
        return self._content_hash

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write `manifest.json` and one safetensors file per block.

        Raises:
            InputError: the folder holds something else, or an earlier basis without `overwrite`.
        """
        folder = Path(folder).absolute()
        if self.location is not None and os.path.realpath(folder) == os.path.realpath(self.location):
            raise InputError(f"{folder} is where this basis is read from; save it to another folder")
        check_folder(folder, "basis", overwrite)
        with claimed(folder):
            prepare_folder(folder, "basis", overwrite)
            entries = {}
            for index, block in enumerate(self.partition):
                entries[_file(index)] = write_tensors(folder / _file(index), self._tensors(block))
            manifest = self._manifest(entries)
            write_manifest(folder, manifest)
        self.location, self._content_hash = folder, manifest.content_hash()

    @classmethod
    def load(cls, folder: str | Path) -> "Basis":
        """Open a saved basis; a block's map is read, and checked against its hash, on access.

        Raises:
            InputError: the folder is no basis.
            StorageError: its manifest or a file is damaged.
        """
        folder = Path(folder).absolute()  # blocks are read later, when the current directory may be another
        manifest = read_manifest(folder, "basis")
        for name, entry in manifest.files.items():
            check_file(folder, name, entry, content=False)
        partition = stored_partition(folder, manifest)
        if manifest.files.keys() != {_file(index) for index in range(len(partition))}:
            raise StorageError(f"{folder / MANIFEST} is damaged: expected one file per block, {len(partition)} in all")
        ranks = {block.name: _stored_rank(folder / _file(index), block) for index, block in enumerate(partition)}
        stored = _StoredBlocks(folder, partition, manifest.files)
        return cls(
            partition,
            _OnAccess(partition, stored.linear_map),
            spectrum=_OnAccess(partition, stored.spectrum),
            fingerprint=manifest.fingerprint,
            construction=manifest.construction,
            parents=manifest.parents,
            location=folder,
            content_hash=manifest.content_hash(),
            ranks=ranks,
            model_name=manifest.details.get("model"),
            versions=manifest.versions,
        )

    def _tensors(self, block: Block) -> dict[str, Tensor]:
        spectrum = self.spectrum.get(block.name, torch.zeros(0, dtype=torch.float64))
        return _stored(self.maps[block.name], spectrum)

    def _entry(self, block: Block) -> FileEntry:
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors(block).items()})
        return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def _manifest(self, entries: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            kind="basis",
            partition=self.partition.to_json(),
            fingerprint=self.fingerprint,
            parents=self.parents,
            construction=self.construction,
            details={"model": self.model_name},
            files=entries,
            versions=package_versions(),
        )


def _stored(linear_map: LinearMap, spectrum: Tensor) -> dict[str, Tensor]:
    """Return what a block's file holds."""
    return {**linear_map.tensors(), "spectrum": spectrum}


def _stored_rank(path: Path, block: Block) -> int:
    """Return the rank of a block's map as the header of its file tells, whose shapes must fit the block."""
    reader, size = open_tensors(path), block.numel
    with reading(path):
        shapes = {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118 - no mapping
        rank = int(shapes["signs" if _is_fastfood(reader) else "directions"][0])
        expected = {"directions": [rank, size]}
        if _is_fastfood(reader):
            n = power_of_two(size)
            expected = {"signs": [rank], "slots": [n], "gauss": [n]}
        expected["spectrum"] = shapes["spectrum"][:1]
        if shapes != expected or not _is_fastfood(reader) <= rank <= size:
            raise StorageError(f"{path} is damaged: the shapes {shapes} are of no map onto {size} numbers")
    return rank


class _StoredBlocks:
    """The blocks of a basis folder; a file is compared with its hash before it is first read."""

    def __init__(self, folder: Path, partition: Partition, files: Mapping[str, FileEntry]) -> None:
        self._folder, self._files = folder, files
        self._blocks = {block.name: (_file(index), block.numel) for index, block in enumerate(partition)}
        self._verified: set[str] = set()

    def _open(self, name: str) -> Reader:
        if name not in self._verified:
            with reading(self._folder / MANIFEST):
                entry = self._files[name]
            check_file(self._folder, name, entry)
            self._require_numbers(self._folder / name)
            self._verified.add(name)
        return open_tensors(self._folder / name)

    def _require_numbers(self, path: Path) -> None:
        """Refuse numbers that are of no map: NaN, infinite, or slots that do not exist."""
        reader = open_tensors(path)
        with reading(path):
            for part in reader.keys():  # noqa: SIM118 - the reader is no mapping
                values = reader.get_tensor(part)
                if part == "slots":
                    m = power_of_two(reader.get_slice("signs").get_shape()[0])
                    sound = values.dtype == torch.int32 and int(values.min()) >= 0 and int(values.max()) < m
                else:
                    sound = values.dtype.is_floating_point and finite(values)
                if not sound:
                    raise StorageError(f"{path} is damaged: {part} holds NaN, infinite or impossible numbers")

    def linear_map(self, block: str) -> LinearMap:
        name, size = self._blocks[block]
        reader = self._open(name)
        with reading(self._folder / name):
            if _is_fastfood(reader):
                return FastfoodMap(size, *(reader.get_tensor(part) for part in ("signs", "slots", "gauss")))
            return DenseMap(reader.get_tensor("directions"))

    def spectrum(self, block: str) -> Tensor:
        name, _ = self._blocks[block]
        reader = self._open(name)
        with reading(self._folder / name):
            values: Tensor = reader.get_tensor("spectrum")
        return values


class _OnAccess(Mapping[str, Value]):
    """One value per block, read when it is asked for."""

    def __init__(self, partition: Partition, read: Callable[[str], Value]) -> None:
        self._names, self._read = [block.name for block in partition], read

    def __getitem__(self, block: str) -> Value:
        return self._read(block)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def svd_basis(
    trajectories: Trajectory | Sequence[Trajectory],
    rank: int | None = None,
    *,
    explained_variance: float | None = None,
    center: Center = "init",
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
        dtype: of the stored directions.
        folder: write every block there as soon as it is found, so that no two blocks' directions are in memory
            together; as `save` would, but for this. If the folder holds the blocks that an interrupted call with the
            same trajectories and arguments has found, these are not made again.
        overwrite: replace an earlier basis in that folder.
        progress: wraps the iteration over blocks, for a progress bar.
        group: processes whose trajectories hold one shard each of the same blocks at the same steps, and that all make
            this call. They send each other one t x t matrix per block, and a second one where V takes one more pass.
            Each gets the same singular values and its shard's rows of V: V^T V = I in the sum over all processes, and
            so V^T g is the sum of what `project` gives them. A backend for tensors in main memory, such as gloo. If one
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
    _check_cut(rank, explained_variance, points - (center == "mean"), center)
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
            **shard,
        },
        parents=[run.content_hash() for run in runs],
        model_name=runs[0].manifest.details.get("model"),
    )

    def directions_of(block: Block, empty: Callable[..., Tensor] = torch.empty) -> tuple[Tensor, Tensor]:
        if center == "none":
            still = not any(deltas.any() for run in runs for _, deltas in run.chunks(block))
            if everywhere(still, group):
                message = f"block {block.name!r} does not move, so its one direction is theta_0 itself"
                warnings.warn(message, stacklevel=2)
        return right_singular_vectors(
            lambda: _centred(runs, block, center),
            block.numel,
            lambda values: _keep(values, rank, explained_variance),
            dtype,
            block.name,
            empty=empty,
            group=group,
        )

    if folder is not None:
        return _written(found, Path(folder), directions_of, progress, overwrite, group)
    spectrum, maps = {}, {}
    for block in progress(found.partition):
        spectrum[block.name], directions = directions_of(block)
        maps[block.name], found.ranks[block.name] = DenseMap(directions), len(directions)
    _check_moved(found)
    found.spectrum, found.maps = spectrum, maps
    return found


def _written(
    found: Basis,
    folder: Path,
    directions_of: Callable[[Block, Callable[..., Tensor]], tuple[Tensor, Tensor]],
    progress: Callable[[Iterable[Block]], Iterable[Block]],
    overwrite: bool,
    group: "ProcessGroup | None",
) -> Basis:
    """Write the blocks of a basis one after the other, those that are not there yet, and return it as loaded.

    A block is written in the background until the next one needs the memory: there is one V at a time.
    """
    recipe = found._manifest({}).model_dump(include={"partition", "fingerprint", "parents", "construction"})
    if everywhere(overwrite and _is_made(folder, recipe), group):
        return Basis.load(folder)
    recipe["versions"] = {name: package_versions().get(name) for name in ("tinyspan", "torch")}
    with resumable(folder, "basis", recipe, overwrite):
        if everywhere((folder / MANIFEST).is_file(), group):  # interrupted when all was done
            return Basis.load(folder)
        entries: dict[str, FileEntry] = {}
        with ThreadPoolExecutor(1) as background:
            memory = _Memory()
            for index, block in enumerate(progress(found.partition)):
                name, done = _file(index), folder / UNFINISHED / f"{_file(index)}.json"
                kept = _kept(done, name)
                if everywhere(bool(kept) and not damage(folder, kept), group):
                    entries |= kept
                    found.ranks[block.name] = open_tensors(folder / name).get_slice("directions").get_shape()[0]
                    continue
                values, directions = directions_of(block, memory.empty)
                memory.settle()
                found.ranks[block.name] = len(directions)
                tensors = _stored(DenseMap(directions), values)
                memory.user = background.submit(_write_block, folder / name, tensors, done, entries)
            memory.settle()
        if not found.rank:
            prepare_folder(folder, "basis", overwrite=True)  # no blocks without a manifest are left there
            for note in (folder / UNFINISHED).glob("block-*"):
                note.unlink()
        _check_moved(found)
        write_manifest(folder, found._manifest(entries))
    return Basis.load(folder)


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


def _write_block(path: Path, tensors: Mapping[str, Tensor], done: Path, entries: dict[str, FileEntry]) -> None:
    """Write a block's file, then the note that it is whole."""
    entries[path.name] = write_tensors(path, tensors)
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


def random_basis(partition: Partition, rank: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Basis:
    """Return k random orthonormal directions per block: standard normal numbers, then orthonormalised.

    The control of Zhang et al. (2023), after Li et al. (2018). Each block draws from its own generator, seeded by
    `seed` and the block's name. Generators may differ between torch versions and devices: compare `content_hash`.

    Raises:
        InputError: the rank is below 1 or above the size of a block.

    Example:
        >>> from tinyspan import by_pattern
        >>> basis = random_basis(by_pattern(torch.nn.Linear(4, 5), {"all": ".*"}), rank=3)
        >>> v = basis.maps["all"].directions
        >>> torch.allclose(v @ v.T, torch.eye(3), atol=1e-6)
        True
    """
    _check_fits(partition, rank)
    maps = {}
    for block in partition:
        directions = torch.randn(rank, block.numel, generator=_generator(seed, block))
        maps[block.name] = DenseMap(orthonormalize(directions).to(dtype))
    construction = {"constructor": "random", "rank": rank, "seed": seed, "dtype": str(dtype)[6:]}
    return Basis(partition, maps, construction=construction)


def fastfood_basis(partition: Partition, rank: int, *, seed: int = 0) -> Basis:
    """Return a random map per block whose memory and time do not grow with its rank: see `FastfoodMap`.

    With `whole_model` as the partition this is DID, the intrinsic dimension of Aghajanyan et al. (2021): one z for all
    layers. Their SAID is the same with `SubspaceModel(..., layer_scales=by_layer(model))`. Columns have norm 1 in
    expectation, so that rates of z compare with those of an orthonormal basis. Seeds work as in `random_basis`.

    Raises:
        InputError: the rank is below 1 or above the size of a block.

    Example:
        >>> from tinyspan import by_pattern
        >>> basis = fastfood_basis(by_pattern(torch.nn.Linear(31, 32), {"all": ".*"}), rank=100)
        >>> {name: tuple(tensor.shape) for name, tensor in basis.maps["all"].tensors().items()}
        {'signs': (100,), 'slots': (1024,), 'gauss': (1024,)}
        >>> z = torch.eye(100)[7]
        >>> round(float(basis.expand({"all": z})["all"].norm()), 5)
        1.0
    """
    _check_fits(partition, rank)
    maps = {block.name: FastfoodMap.draw(rank, block.numel, _generator(seed, block)) for block in partition}
    return Basis(partition, maps, construction={"constructor": "fastfood", "rank": rank, "seed": seed})


def given_basis(
    partition: Partition, directions: Mapping[str, Tensor], *, fingerprint: Mapping[str, str] | None = None
) -> Basis:
    """Return a basis of directions [k_b, D_b] that the caller computed, orthonormalised in their order.

    Raises:
        MismatchError: a block is absent or has another length.
        InputError: the directions of a block are linearly dependent, or NaN, infinite or whole numbers.

    Example:
        >>> from tinyspan import by_pattern
        >>> partition = by_pattern(torch.nn.Linear(2, 1), {"all": ".*"})
        >>> given_basis(partition, {"all": torch.tensor([[0.0, 3.0, 0.0]])}).maps["all"].directions
        tensor([[0., 1., 0.]])
    """
    maps = {}
    for block in partition:
        given = directions.get(block.name)
        if given is None or given.ndim != 2 or given.shape[1] != block.numel:
            found = "nothing" if given is None else f"shape {list(given.shape)}"
            raise MismatchError(f"block {block.name!r}: expected directions [k, {block.numel}], got {found}")
        if not given.is_floating_point() or not torch.isfinite(given).all():
            found = "NaN or infinite ones" if given.is_floating_point() else str(given.dtype)
            raise InputError(f"block {block.name!r}: expected directions of finite floating-point numbers, got {found}")
        try:
            maps[block.name] = DenseMap(orthonormalize(given.clone()))
        except RuntimeError as error:
            raise InputError(f"block {block.name!r}: the directions are linearly dependent") from error
    return Basis(partition, maps, fingerprint=fingerprint, construction={"constructor": "given"})


def empty_basis(partition: Partition) -> Basis:
    """Return a basis without directions: the blocks stay at theta_0, the paper's `freeze` baseline."""
    maps = {block.name: DenseMap(torch.zeros(0, block.numel)) for block in partition}
    return Basis(partition, maps, construction={"constructor": "empty"})


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


def _keep(values: Tensor, rank: int | None, explained_variance: float | None) -> int:
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


def _check_fits(partition: Partition, rank: int) -> None:
    smallest = min(partition, key=lambda block: block.numel)
    if not 1 <= rank <= smallest.numel:
        raise InputError(
            f"rank must be between 1 and {smallest.numel}, the size of block {smallest.name!r}; got {rank}"
        )


def _generator(seed: int, block: Block) -> torch.Generator:
    """Return the generator from which a block draws, seeded by `seed` and the block's name."""
    digest = hashlib.sha256(f"{seed} {block.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


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


def _is_fastfood(reader: Reader) -> bool:
    return "slots" in reader.keys()  # noqa: SIM118 - the reader is no mapping


def _file(index: int) -> str:
    return f"block-{index:03d}.safetensors"
