"""Basis of a subspace: per block a linear map V from k coordinates to the block's D_b numbers, on disk or in memory.

The directions are computed from the points of trajectories (see `discovery`), generated at random, or given by the
caller. Those of dense and sparse maps are orthonormal, up to rounding in the stored format.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from tinyspan.bases.constructors import register_basis
from tinyspan.errors import InputError, MismatchError, StorageError
from tinyspan.io.folders import check_folder, claimed, prepare_folder
from tinyspan.io.hub import fetched, push
from tinyspan.io.manifests import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_file,
    package_versions,
    read_manifest,
    write_manifest,
)
from tinyspan.io.storage import reading
from tinyspan.io.tensors import Reader, open_tensors, write_tensors
from tinyspan.linalg import orthonormalize
from tinyspan.maps.base import MAPS, LinearMap, kind_of, metadata_of
from tinyspan.maps.dense import DenseMap
from tinyspan.partition import Block, Partition
from tinyspan.trajectories.trajectory import stored_partition
from tinyspan.weights import finite

__all__ = ["Basis", "block_content", "block_file", "stored_kind_and_rank"]

Value = TypeVar("Value")


class Basis:
    """One linear map per block of a partition, with its provenance.

    Args:
        partition: the blocks.
        maps: block name -> map. With a mapping that loads on access, at most one block is in memory.
        spectrum: block name -> all singular values [t] of the matrix whose singular vectors are the directions,
            descending, in units of the weights; empty for a basis that was not computed from points.
        fingerprint: block name -> fingerprint of theta_0; empty for a basis that fits every model with this partition.
        construction: the constructor and its arguments.
        parents: content hashes of the trajectories.
        content_hash: content hash of the folder that the basis was loaded from or written to.
        ranks: block name -> k; by default the ranks of `maps`.
        kinds: block name -> kind of its map; by default the kinds of `maps`.
        model_name: name of the model to which the points belong; informational.
        versions: versions of the packages that wrote the basis; informational.

    Attributes:
        location: folder that the basis was loaded from or last saved to.
        source: folder that the maps are read from, also after the basis was saved to another one; None in memory.
        on_hub: repository and commit that the basis was loaded from or pushed to: `user/name@commit`.
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
        kinds: Mapping[str, str] | None = None,
        model_name: str | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.partition, self.maps = partition, maps
        self.ranks = dict(ranks) if ranks else {block.name: maps[block.name].rank for block in partition}
        self._kinds = kinds
        self.spectrum: Mapping[str, Tensor] = {} if spectrum is None else spectrum
        self.fingerprint = dict(fingerprint or {})
        self.construction = dict(construction or {})
        self.parents = list(parents)
        self.location, self._content_hash, self.model_name = location, content_hash, model_name
        self.source = location
        self.on_hub: str | None = None
        self.versions = dict(versions or {})

    def __repr__(self) -> str:
        constructor = self.construction.get("constructor", "unnamed")
        blocks = f"{len(self.partition)} blocks with {self.partition.numel:,} numbers"
        ranks = sorted({*self.ranks.values()})
        directions = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"Basis({constructor}: {directions} directions in each of {blocks})"

    @property
    def rank(self) -> int:
        """k, the largest rank of a block."""
        return max(self.ranks.values())

    @property
    def kinds(self) -> Mapping[str, str]:
        """Block name -> registered kind of its map."""
        return {name: v.kind for name, v in self.maps.items()} if self._kinds is None else self._kinds

    @property
    def is_orthonormal(self) -> bool | None:
        """Whether V^T V is the identity in every block; None if the kinds of the maps do not determine it."""
        flags = {MAPS[kind].is_orthonormal for kind in self.kinds.values()}
        return False if False in flags else None if None in flags else True

    def matvec(self, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return V z for every block, [k_b] -> [D_b]."""
        return {block.name: self.maps[block.name].matvec(z[block.name]) for block in self.partition}

    def rmatvec(self, g: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return V^T g for every block, [D_b] -> [k_b]."""
        return {block.name: self.maps[block.name].rmatvec(g[block.name]) for block in self.partition}

    def content_hash(self) -> str:
        """Return the SHA-256 by which adapters identify this basis.

        It depends on the blocks, the fingerprint of theta_0, the construction and the tensors of every map. A basis in
        memory is hashed as `save_pretrained` would write it.
        """
        if self._content_hash is None:
            entries = {block_file(index): self._entry(block) for index, block in enumerate(self.partition)}
            self._content_hash = self._manifest(entries).content_hash()
        return self._content_hash

    @property
    def is_sparse(self) -> bool:
        """Whether the directions are nonzero on a subset of the coordinates only."""
        return not {"density", "coordinates"}.isdisjoint(self.construction)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write `manifest.json` and one safetensors file per block, and set the location of the basis to the folder.

        Raises:
            InputError: the folder holds something else, or an earlier basis and `overwrite` is not set.
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

        Adapters that are saved afterwards refer to the repository as the source of their basis.

        Args:
            repository: id of the repository, `user/name`; it is created if it does not exist.
            private: whether a new repository is private.
            token: access token with write permission; by default the token of the logged-in user.
            commit_message: message of the commit.

        Raises:
            InputError: the hub rejects the name or the token.
            StorageError: the hub cannot be reached.
        """
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "basis"
            self.write(folder)
            name, commit = push(folder, repository, private=private, token=token, message=commit_message)
        self.on_hub = f"{name}@{commit}"
        return commit

    def write(self, folder: str | Path, *, overwrite: bool = False) -> Manifest:
        """Write a copy, as `save_pretrained` does, without changing the location of this basis.

        Raises:
            InputError: the folder holds something else, or an earlier basis and `overwrite` is not set.
        """
        folder = Path(folder).absolute()
        if self.source is not None and os.path.realpath(folder) == os.path.realpath(self.source):
            raise InputError(f"{folder} is where this basis is read from; save it to another folder")
        check_folder(folder, "basis", overwrite)
        with claimed(folder):
            prepare_folder(folder, "basis", overwrite)
            entries = {}
            for index, block in enumerate(self.partition):
                v, spectrum = self.maps[block.name], self._spectrum_of(block)
                entries[block_file(index)] = write_tensors(folder / block_file(index), *block_content(v, spectrum))
            manifest = self._manifest(entries)
            write_manifest(folder, manifest)
        return manifest

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | None = None) -> "Basis":
        """Open a saved basis. A block's map is read on access, and its file is compared with its hash first.

        Args:
            name: a folder, or the id of a repository on the Hugging Face hub.
            revision: branch, tag or commit of the repository.
            token: access token for a private repository.

        Raises:
            InputError: the folder is not a basis, or neither a folder nor a repository of this name exists.
            StorageError: the manifest or a file is damaged, or the hub cannot be reached.
        """
        folder = fetched(name, revision, token).absolute()  # read later, when the working directory may have changed
        manifest = read_manifest(folder, "basis")
        for file, entry in manifest.files.items():
            check_file(folder, file, entry, content=False)
        partition = stored_partition(folder, manifest)
        if manifest.files.keys() != {block_file(index) for index in range(len(partition))}:
            raise StorageError(f"{folder / MANIFEST} is damaged: expected one file per block, {len(partition)} in all")
        headers = {b.name: stored_kind_and_rank(folder / block_file(index), b) for index, b in enumerate(partition)}
        stored = _StoredBlocks(folder, partition, manifest.files)
        loaded = cls(
            partition,
            _LazyMapping(partition, stored.linear_map),
            spectrum=_LazyMapping(partition, stored.spectrum),
            fingerprint=manifest.fingerprint,
            construction=manifest.construction,
            parents=manifest.parents,
            location=folder,
            content_hash=manifest.content_hash(),
            ranks={block: rank for block, (_, rank) in headers.items()},
            kinds={block: kind for block, (kind, _) in headers.items()},
            model_name=manifest.details.get("model"),
            versions=manifest.versions,
        )
        if not Path(name).is_dir():
            loaded.on_hub = f"{name}@{folder.name}"
        return loaded

    @classmethod
    def from_directions(
        cls, partition: Partition, directions: Mapping[str, Tensor], *, fingerprint: Mapping[str, str] | None = None
    ) -> "Basis":
        """Return a basis of given directions [k_b, D_b], orthonormalised in their order.

        Args:
            partition: the blocks.
            directions: block name -> directions [k_b, D_b] of a floating-point dtype.
            fingerprint: block name -> fingerprint of theta_0; by default the basis fits every model with the partition.

        Raises:
            MismatchError: the directions of a block are missing or have another length.
            InputError: the directions of a block are linearly dependent, NaN, infinite, or of an integer dtype.

        Example:
            >>> from tinyspan import by_pattern
            >>> partition = by_pattern(torch.nn.Linear(2, 1), {"all": ".*"})
            >>> Basis.from_directions(partition, {"all": torch.tensor([[0.0, 3.0, 0.0]])}).maps["all"].directions
            tensor([[0., 1., 0.]])
        """
        maps = {}
        for block in partition:
            given = directions.get(block.name)
            if given is None or given.ndim != 2 or given.shape[1] != block.numel:
                other = "nothing" if given is None else f"shape {list(given.shape)}"
                raise MismatchError(f"block {block.name!r}: expected directions [k, {block.numel}], got {other}")
            if not given.is_floating_point() or not finite(given):
                other = "NaN or infinite ones" if given.is_floating_point() else str(given.dtype)
                raise InputError(
                    f"block {block.name!r}: expected directions of finite floating-point numbers, got {other}"
                )
            try:
                maps[block.name] = DenseMap(orthonormalize(given.detach().clone()))
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise InputError(f"block {block.name!r}: the directions are linearly dependent") from error
        return cls(partition, maps, fingerprint=fingerprint, construction={"constructor": "given"})

    def _spectrum_of(self, block: Block) -> Tensor:
        return self.spectrum.get(block.name, torch.zeros(0, dtype=torch.float64))

    def _entry(self, block: Block) -> FileEntry:
        v = self.maps[block.name]
        tensors, metadata = block_content(v, self._spectrum_of(block))
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
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


register_basis("given", rebuilds=False)(Basis.from_directions)


def block_content(v: LinearMap, spectrum: Tensor) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors and the metadata of a block's file."""
    return {**v.tensors(), "spectrum": spectrum}, metadata_of(v.kind)


def stored_kind_and_rank(path: Path, block: Block) -> tuple[str, int]:
    """Return the kind and the rank of a block's map from the header of its file.

    Raises:
        InputError: no class is registered for the kind.
        StorageError: the file is damaged, or its shapes do not fit the block.
    """
    reader = open_tensors(path)
    with reading(path):
        shapes = {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118 - not a mapping
        if len(shapes.pop("spectrum")) != 1:
            raise ValueError("the spectrum is not a vector")
        map_class = kind_of(shapes, reader.metadata())
        return map_class.kind, map_class.stored_rank(block.numel, shapes)


class _StoredBlocks:
    """The blocks in the folder of a basis; a file is compared with its hash before it is first read."""

    def __init__(self, folder: Path, partition: Partition, files: Mapping[str, FileEntry]) -> None:
        self._folder, self._files = folder, files
        self._blocks = {block.name: (block_file(index), block.numel) for index, block in enumerate(partition)}
        self._verified: set[str] = set()

    def _open(self, block: str) -> tuple[Path, Reader]:
        name, size = self._blocks[block]
        path = self._folder / name
        if name not in self._verified:
            with reading(self._folder / MANIFEST):
                entry = self._files[name]
            check_file(self._folder, name, entry)
            with reading(path):
                check_stored(size, open_tensors(path))
            self._verified.add(name)
        return path, open_tensors(path)

    def linear_map(self, block: str) -> LinearMap:
        path, reader = self._open(block)
        with reading(path):
            tensors = _read(reader)
            tensors.pop("spectrum")
            return kind_of(tensors, reader.metadata()).from_tensors(self._blocks[block][1], tensors)

    def spectrum(self, block: str) -> Tensor:
        path, reader = self._open(block)
        with reading(path):
            values: Tensor = reader.get_tensor("spectrum")
        return values


def check_stored(size: int, reader: Reader) -> None:
    """Check the values in a block's file.

    Raises:
        ValueError: a tensor has values that a map onto `size` numbers cannot have.
    """
    tensors = _read(reader)
    spectrum = tensors.pop("spectrum")
    if not spectrum.dtype.is_floating_point or not finite(spectrum):
        raise ValueError("spectrum holds NaN, infinite or impossible numbers")
    kind_of(tensors, reader.metadata()).check_numbers(size, tensors)


def _read(reader: Reader) -> dict[str, Tensor]:
    return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - the reader is not a mapping


class _LazyMapping(Mapping[str, Value]):
    """One value per block, read on access."""

    def __init__(self, partition: Partition, read: Callable[[str], Value]) -> None:
        self._names, self._read = [block.name for block in partition], read

    def __getitem__(self, block: str) -> Value:
        return self._read(block)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def block_file(index: int) -> str:
    """Return the name of a block's file."""
    return f"block-{index:03d}.safetensors"
