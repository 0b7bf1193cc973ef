"""Basis of a subspace: per block a linear map V from k coordinates to the block's D_b numbers, on disk or in memory.

Its directions are found in the points of trajectories, drawn at random, or given; those of dense and sparse maps are
orthonormal, up to the rounding of the format in which they are stored.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.fastfood import FastfoodMap
from tinyspan.folders import UNFINISHED, check_folder, claimed, is_unfinished, prepare_folder, resumable
from tinyspan.hub import fetched, push
from tinyspan.maps import DenseMap, LinearMap, SparseMap, check_numbers, dense_map, linear_map, stored_rank
from tinyspan.partition import Block, Partition
from tinyspan.storage import (
    MANIFEST,
    FileEntry,
    Manifest,
    Reader,
    check_file,
    damage,
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
    "empty_basis",
    "fastfood_basis",
    "given_basis",
    "random_basis",
    "svd_basis",
]

STORED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)  # dtypes of directions
READ = 1 << 23  # numbers of all points read at once; in float64 they take 67 MB
Center = Literal["init", "mean", "none"]
Value = TypeVar("Value")


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
        on_hub: the repository it was loaded from or pushed to, and the commit: `user/name@commit`.
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
        self.on_hub: str | None = None
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
        in memory is hashed as `save_pretrained` would write it.
        """
        if self._content_hash is None:
            entries = {_file(index): self._entry(block) for index, block in enumerate(self.partition)}
            self._content_hash = self._manifest(entries).content_hash()
        return self._content_hash

    @property
    def is_sparse(self) -> bool:
        """Whether it was made with directions on some of the coordinates alone."""
        return not {"density", "coordinates"}.isdisjoint(self.construction)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write `manifest.json` and one safetensors file per block, and take the folder as this basis's location.

        Raises:
            InputError: the folder holds something else, or an earlier basis without `overwrite`.
        """
        manifest = self.write(folder, overwrite=overwrite)
        self.location, self._content_hash = Path(folder).absolute(), manifest.content_hash()

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Basis of tinyspan",
    ) -> str:
        """Upload the basis, with a model card, to the Hugging Face hub, and return the commit.

        Adapters saved from now on name the repository as the place of their basis.

        Args:
            repository: its id, `user/name`; made if it does not exist.
            private: whether it is made private.
            token: for writing, if it is not the one that is logged in.
            commit_message: of the upload.

        Raises:
            InputError: the hub refuses the name or the token.
            StorageError: the hub cannot be reached.
        """
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "basis"
            self.write(folder)
            name, commit = push(folder, repository, private=private, token=token, message=commit_message)
        self.on_hub = f"{name}@{commit}"
        return commit

    def write(self, folder: str | Path, *, overwrite: bool = False) -> Manifest:
        """Write a copy, as `save_pretrained` does, that this basis does not know of.

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
        return manifest

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | None = None) -> "Basis":
        """Open a saved basis; a block's map is read, and checked against its hash, on access.

        Args:
            name: a folder, or the id of a repository on the Hugging Face hub.
            revision: branch, tag or commit of a repository.
            token: of a private one.

        Raises:
            InputError: the folder is no basis, or there is neither folder nor repository of this name.
            StorageError: its manifest or a file is damaged, or the hub cannot be reached.
        """
        folder = fetched(name, revision, token).absolute()  # read later, when the current directory may be another
        manifest = read_manifest(folder, "basis")
        for file, entry in manifest.files.items():
            check_file(folder, file, entry, content=False)
        partition = stored_partition(folder, manifest)
        if manifest.files.keys() != {_file(index) for index in range(len(partition))}:
            raise StorageError(f"{folder / MANIFEST} is damaged: expected one file per block, {len(partition)} in all")
        ranks = {block.name: _stored_rank(folder / _file(index), block) for index, block in enumerate(partition)}
        stored = _StoredBlocks(folder, partition, manifest.files)
        loaded = cls(
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
        if not Path(name).is_dir():
            loaded.on_hub = f"{name}@{folder.name}"
        return loaded

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
    reader = open_tensors(path)
    with reading(path):
        shapes = {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118 - no mapping
        if len(shapes.pop("spectrum")) != 1:
            raise ValueError("the spectrum is no list of numbers")
        return stored_rank(block.numel, shapes)


class _StoredBlocks:
    """The blocks of a basis folder; a file is compared with its hash before it is first read."""

    def __init__(self, folder: Path, partition: Partition, files: Mapping[str, FileEntry]) -> None:
        self._folder, self._files = folder, files
        self._blocks = {block.name: (_file(index), block.numel) for index, block in enumerate(partition)}
        self._verified: set[str] = set()

    def _open(self, block: str) -> tuple[Path, Reader]:
        name, size = self._blocks[block]
        path = self._folder / name
        if name not in self._verified:
            with reading(self._folder / MANIFEST):
                entry = self._files[name]
            check_file(self._folder, name, entry)
            with reading(path):
                check_numbers(size, _read(open_tensors(path)))
            self._verified.add(name)
        return path, open_tensors(path)

    def linear_map(self, block: str) -> LinearMap:
        path, reader = self._open(block)
        with reading(path):
            tensors = _read(reader)
            tensors.pop("spectrum")
            return linear_map(self._blocks[block][1], tensors)

    def spectrum(self, block: str) -> Tensor:
        path, reader = self._open(block)
        with reading(path):
            values: Tensor = reader.get_tensor("spectrum")
        return values


def _read(reader: Reader) -> dict[str, Tensor]:
    return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - the reader is no mapping


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
    _check_dtype(dtype)
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
            indices = chosen[block.name] if chosen else _largest(_movement(runs, block), _share(density, block))
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
                name, done = _file(index), folder / UNFINISHED / f"{_file(index)}.json"
                kept = _kept(done, name)
                if everywhere(bool(kept) and not damage(folder, kept), group):
                    entries |= kept
                    found.ranks[block.name] = _stored_rank(folder / name, block)
                    continue
                values, found_map = map_of(block, memory.empty)
                memory.settle()
                found.ranks[block.name] = found_map.rank
                tensors = _stored(found_map, values)
                memory.user = background.submit(_write_block, folder / name, tensors, done, entries)
                del values, found_map, tensors  # the writer holds them, and nobody else
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


def random_basis(
    partition: Partition, rank: int, *, seed: int = 0, density: float = 1.0, dtype: torch.dtype = torch.float32
) -> Basis:
    """Return k random orthonormal directions per block: standard normal numbers, then orthonormalised.

    The control of Zhang et al. (2023), after Li et al. (2018). Each block draws from its own generator, seeded by
    `seed` and the block's name. Generators may differ between torch versions and devices: compare `content_hash`.

    Args:
        partition: the blocks.
        rank: k, of every block.
        seed: of the generators.
        density: share of each block's coordinates, drawn at random first, that get directions; the others have none.
        dtype: in which directions are stored; see `svd_basis`.

    Raises:
        InputError: the rank is below 1 or above the number of coordinates that get directions in a block.

    Example:
        >>> from tinyspan import by_pattern
        >>> basis = random_basis(by_pattern(torch.nn.Linear(4, 5), {"all": ".*"}), rank=3)
        >>> v = basis.maps["all"].directions
        >>> torch.allclose(v @ v.T, torch.eye(3), atol=1e-6)
        True
    """
    _check_fits(partition, rank)
    _check_dtype(dtype)
    _chosen(partition, density, None, rank)
    maps: dict[str, LinearMap] = {}
    for block in partition:
        generator, size, indices = _generator(seed, block), block.numel, None
        if density < 1:
            size = _share(density, block)
            indices = torch.randperm(block.numel, generator=generator)[:size].sort().values
        dense = dense_map(orthonormalize(torch.randn(rank, size, generator=generator)), dtype)
        maps[block.name] = dense if indices is None else SparseMap(block.numel, indices, dense)
    construction = {"constructor": "random", "rank": rank, "seed": seed, "dtype": str(dtype)[6:]}
    return Basis(partition, maps, construction=construction | ({} if density == 1 else {"density": density}))


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
    if not 0 < density <= 1:
        raise InputError(f"density must be above 0 and at most 1, the dense basis; got {density}")
    if coordinates is None:
        counts = {block.name: _share(density, block) for block in partition}
    else:
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
        counts = {block.name: len(coordinates[block.name]) for block in partition}
    name, fewest = min(counts.items(), key=lambda item: item[1])
    if rank is not None and rank > fewest:
        raise InputError(
            f"rank {rank} is above {fewest}, the number of coordinates that get directions in block {name!r}; "
            "raise the density or lower the rank"
        )
    return {} if coordinates is None else {name: given.cpu().long() for name, given in coordinates.items()}


def _share(density: float, block: Block) -> int:
    """Return how many of a block's coordinates a density keeps."""
    return max(1, round(density * block.numel))


def _digest(coordinates: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of coordinates, by which a construction names them."""
    digest = hashlib.sha256()
    for name in sorted(coordinates):
        digest.update(name.encode() + b"\0" + coordinates[name].numpy().tobytes())
    return digest.hexdigest()


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in STORED:
        raise InputError(f"directions are stored in {', '.join(str(one)[6:] for one in STORED)}, not in {dtype}")


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


def _file(index: int) -> str:
    return f"block-{index:03d}.safetensors"
