"""Trajectory of a fine-tuning run: theta_0 and the points theta_1 .. theta_t, stored on disk as deltas to theta_0.

Each point is one safetensors file with one flat tensor per parameter, so any partition of the same parameters can be
read in chunks, without loading a whole point. The journal `points.jsonl` gets one line per point once its file is
complete, so the cost of a point does not depend on the number of points.
"""

import operator
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError, StorageError
from tinyspan.io.journals import read_lines
from tinyspan.io.manifests import MANIFEST, FileEntry, Manifest, check_file, read_manifest
from tinyspan.io.storage import reading
from tinyspan.io.tensors import Reader, open_tensors
from tinyspan.partition import Block, Partition
from tinyspan.sharding import local
from tinyspan.weights import follows_subspace, wide_dtype

__all__ = ["Trajectory"]

START = "start.safetensors"
JOURNAL = "points.jsonl"
CHUNK = 1 << 18  # elements of a parameter that are read at once


class Writer(Protocol):
    """An object that writes points in the background."""

    def wait(self) -> None:
        """Wait until all points are written."""


_writers: weakref.WeakValueDictionary[str, Writer] = weakref.WeakValueDictionary()  # by real path, in this process


class Trajectory:
    """Points of one run, read lazily from a folder.

    Methods that take a block accept a `Block` or its name.

    Args:
        folder: folder that a `TrajectoryRecorder` wrote.
        partition: another grouping of the recorded parameters; the recorded one by default. Parameters recorded in half
            precision may have the dtype float32 in it.
        points: positions of the points to use, in recorded order; negative positions count from the end. All points by
            default.

    Raises:
        InputError: the folder is not a trajectory, the partition names parameters that were not recorded, or a point
            does not exist.
        StorageError: a file is missing or has another size than in the manifest.

    Attributes:
        steps: the number of the optimizer step after which each point was recorded; the first step is 0, as in
            `enumerate`.
        partition: the blocks into which the recorded parameters are grouped.
        recorded: the partition that was recorded.
        folder: absolute path of the folder.
        manifest: what the folder contains.
        files: file name -> size and hash of theta_0 and of every recorded point.
    """

    def __init__(
        self, folder: str | Path, partition: Partition | None = None, points: Sequence[int] | None = None
    ) -> None:
        self.folder = Path(folder).absolute()  # files are read later, when the working directory may have changed
        wait_for_point(self.folder)
        self.manifest: Manifest = read_manifest(self.folder, "trajectory")
        self.recorded = stored_partition(self.folder, self.manifest)
        self._dtype = stored_dtype(self.folder, self.manifest)
        recorded, self._link = read_points(self.folder, self.manifest)
        with reading(self.folder / MANIFEST):
            self.files: dict[str, FileEntry] = {START: self.manifest.files[START]}
        self.files |= {point_name(index): entry for index, (_, entry) in enumerate(recorded)}
        for name, entry in self.files.items():
            check_file(self.folder, name, entry, content=False)
        self._recorded_steps = [step for step, _ in recorded]
        self._verified: set[str] = set()  # files whose content matches its hash
        self._choose(points)
        self._group(partition or self.recorded)

    def _choose(self, points: Sequence[int] | None) -> None:
        steps = self._recorded_steps
        chosen = None if points is None else list(points)
        if chosen and any(isinstance(one, bool) or str(getattr(one, "dtype", "")).endswith("bool") for one in chosen):
            raise InputError("expected the positions of points, got a mask; pass those of its true values")
        self._selection = None if chosen is None else [operator.index(point) for point in chosen]
        try:
            every = range(len(steps))
            positions = every if self._selection is None else [every[point] for point in self._selection]
        except IndexError as error:
            raise InputError(f"{self.folder} has {len(steps)} points, not all of {self._selection}") from error
        self.steps = [steps[position] for position in positions]
        self._names = [point_name(position) for position in positions]

    def _group(self, partition: Partition) -> None:
        recorded = {spec.name: spec for spec in self.recorded.parameters()}
        allowed = {*self.recorded.parameters(), *self.recorded.widened().parameters()}
        for spec in partition.parameters():
            if spec not in allowed:
                raise InputError(
                    f"{self.folder} holds no points of {spec.name!r} ({list(spec.shape)}, {spec.dtype}): "
                    "discover with a partition of the recorded parameters, or record again"
                )
        blocks = (Block(block.name, tuple(recorded[spec.name] for spec in block.parameters)) for block in partition)
        self.partition = Partition(tuple(blocks))

    def __len__(self) -> int:
        """Return t, the number of points after theta_0."""
        return len(self.steps)

    def __repr__(self) -> str:
        blocks = f"{len(self.partition)} blocks with {self.partition.numel:,} numbers"
        return f"Trajectory({str(self.folder)!r}: {len(self)} points of {blocks})"

    def with_partition(self, partition: Partition) -> "Trajectory":
        """Return the same points grouped into other blocks."""
        other = copy(self)
        other._group(partition)
        return other

    def with_points(self, points: Sequence[int]) -> "Trajectory":
        """Return a view with some of the recorded points: `[-1]` is the end of the run."""
        other = copy(self)
        other._choose(points)
        return other

    def mapped(self, block: Block | str) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield theta_0 [n] and the deltas theta_i - theta_0, t vectors [n], of every parameter of a block.

        The vectors are memory-mapped, in the stored dtypes: nothing is read until they are used. A file is compared
        with its hash before it is first mapped.

        Raises:
            InputError: no block has this name.
            StorageError: a file is damaged.
        """
        block = self._block(block)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
            readers = list(pool.map(self._open, [START, *self._names]))
        for spec in block.parameters:
            start, *deltas = (reader.get_tensor(spec.name) for reader in readers)
            yield start, deltas

    def chunks(self, block: Block | str, size: int = CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a block in chunks: theta_0 [n] and the deltas theta_i - theta_0 [t, n], with n <= `size`.

        At most one chunk is in memory. A file is compared with its hash before it is first read. Deltas stored in
        bfloat16 are returned in float32.

        Raises:
            InputError: no block has this name.
            StorageError: a file is damaged.
        """
        for start, deltas in self.mapped(block):
            for a in range(0, len(start), size):
                first, pieces = start[a : a + size], [delta[a : a + size] for delta in deltas]
                yield first, wide(torch.stack(pieces)) if pieces else first.new_empty(0, len(first))

    def start(self, block: Block | str) -> Tensor:
        """Return theta_0 of a block, given by its name or itself, as one vector [D_b].

        Raises:
            InputError: no block has this name.
            StorageError: the file is damaged.
        """
        return self._vector(START, self._block(block))

    def delta(self, block: Block | str, index: int = -1) -> Tensor:
        """Return theta_i - theta_0 of a block as one vector [D_b]; the last point by default.

        Raises:
            InputError: no block has this name, or there is no such point.
            StorageError: the file is damaged.
        """
        return wide(self._vector(self._point(index), self._block(block)))

    def matrix(self, block: Block | str) -> Tensor:
        """Return theta_i - theta_0 of all points of a block, one row per point, [t, D_b].

        All of it is in memory; `chunks` reads it piece by piece.

        Raises:
            InputError: no block has this name.
            StorageError: a file is damaged.

        Example:
            >>> import tempfile
            >>> from tinyspan import TrajectoryRecorder, by_pattern
            >>> model = nn.Linear(2, 1, bias=False)
            >>> recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), tempfile.mkdtemp())
            >>> for step in range(2):
            ...     with torch.no_grad():
            ...         _ = model.weight.add_(torch.tensor([[0.0, 2.0]]))
            ...     recorder.record(step)
            >>> recorder.trajectory().matrix("all").round(decimals=4)
            tensor([[0., 2.],
                    [0., 4.]])
        """
        block = self._block(block)
        rows = [self.delta(block, index) for index in range(len(self))]
        return torch.stack(rows) if rows else wide(self.start(block)).new_empty(0, block.numel)

    @torch.no_grad()
    def load_into(self, model: nn.Module, index: int | None = -1) -> None:
        """Write a point of the run into the weights of a model, in place.

        In each block the weights become theta_0 + (theta_i - theta_0), rounded to the model's dtype; this can differ
        from the weights of the run in the last bit. Parameters outside of the blocks, such as the head, are unchanged.

        Args:
            model: a model with the recorded parameters, in the recorded dtypes or in float32 instead of half precision.
            index: position of the point, as in `delta`; None for theta_0.

        Raises:
            InputError: there is no such point, or a SubspaceModel writes the weights of the model.
            MismatchError: the model lacks a parameter, or has it with another shape or dtype; nothing is changed.
            StorageError: a file is damaged.
        """
        name = None if index is None else self._point(index)
        if follows_subspace(model):
            raise InputError("a SubspaceModel writes this model's weights: merge() it first, or load another model")
        try:
            weights = self.partition.widened().select(model)
        except MismatchError:
            weights = self.partition.select(model)
        for block in self.partition:
            vector = wide(self.start(block))
            if name is not None:
                vector = vector + wide(self._vector(name, block)).to(vector)
            for parameter, value in block.unflatten(vector).items():
                local(weights[parameter]).copy_(value)

    def fingerprint(self) -> dict[str, str]:
        """Return the fingerprint of theta_0 for every block of `partition`."""
        if self.partition == self.recorded:
            return self.manifest.fingerprint
        start = self._open(START)
        return self.partition.fingerprint(
            {spec.name: start.get_tensor(spec.name) for spec in self.partition.parameters()}
        )

    def content_hash(self) -> str:
        """Return the hash that identifies this trajectory as a parent of a basis, followed by the selected points."""
        selection = "" if self._selection is None else f"#{','.join(map(str, self._selection))}"
        return self._link + selection

    def _open(self, name: str) -> Reader:
        if name not in self._verified:
            check_file(self.folder, name, self.files[name])
            require_parameters(self.folder, name, self.recorded, self._dtype)
            self._verified.add(name)
        return open_tensors(self.folder / name)

    def _block(self, block: Block | str) -> Block:
        if isinstance(block, Block):
            return block
        try:
            return self.partition[block]
        except KeyError as error:
            raise InputError(f"{self.folder} has {error.args[0]}") from error

    def _point(self, index: int) -> str:
        """Return the file name of a point, given by its position among the selected points."""
        try:
            return self._names[index]
        except IndexError as error:
            raise InputError(f"{self.folder} has {len(self)} points, and no point {index}") from error

    def _vector(self, name: str, block: Block) -> Tensor:
        reader = self._open(name)
        return torch.cat([reader.get_tensor(spec.name) for spec in block.parameters])


def model_name(model: nn.Module) -> str | None:
    """Return the name from which a Hugging Face model was loaded, or None."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


def point_name(index: int) -> str:
    """Return the file name of a point; the index starts at 0, the numbers in the names at 1."""
    return f"points/{index + 1:06d}.safetensors"


def stored_partition(folder: Path, manifest: Manifest) -> Partition:
    """Return the partition in a manifest.

    Raises:
        StorageError: the partition is malformed, or only some of its blocks have a fingerprint.
    """
    path = folder / MANIFEST
    try:
        partition = Partition.from_json(manifest.partition)
    except InputError as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    blocks, fingerprinted = {block.name for block in partition}, {*manifest.fingerprint}
    if manifest.kind == "adapter":
        fingerprinted.discard("frozen parameters")
    if fingerprinted and blocks != fingerprinted:
        raise StorageError(
            f"{path} is damaged: {min(blocks ^ fingerprinted)!r} is a block, or has a fingerprint, but not both"
        )
    return partition


def stored_dtype(folder: Path, manifest: Manifest) -> torch.dtype | None:
    """Return the dtype of the deltas in a manifest; None if it has none and the deltas are float32 or float64.

    Raises:
        StorageError: the manifest has another dtype than bfloat16.
    """
    name = manifest.construction.get("dtype")
    if name not in (None, "bfloat16"):
        raise StorageError(
            f"{folder / MANIFEST} is damaged: expected deltas in bfloat16 or no dtype, found {name!r:.50}"
        )
    return None if name is None else torch.bfloat16


def require_parameters(folder: Path, name: str, partition: Partition, stored: torch.dtype | None) -> None:
    """Check that a file holds one flat tensor per parameter: theta_0 in the model's dtypes, deltas in `stored`.

    Raises:
        StorageError: a tensor is missing, or has another size or dtype.
    """
    path = folder / name
    reader = open_tensors(path)
    with reading(path):
        for spec in partition.parameters():
            part = reader.get_slice(spec.name)
            dtype = spec.dtype if name == START else stored or wide_dtype(spec.dtype)
            if part.get_shape() != [spec.numel] or part[:0].dtype != dtype:
                raise StorageError(
                    f"{path} is damaged: expected {spec.numel} numbers of {dtype} for {spec.name!r}, "
                    f"found shape {part.get_shape()} of {part[:0].dtype}"
                )


def read_points(folder: Path, manifest: Manifest) -> tuple[list[tuple[int, FileEntry]], str]:
    """Return step and file entry of every point in the journal, and the hash of the manifest and all points.

    Raises:
        StorageError: the journal is damaged, or points are missing from it.
    """
    path = folder / JOURNAL
    lines, link = read_lines(path, manifest.content_hash())
    with reading(path):
        points = [(line.pop("step"), FileEntry.model_validate(line)) for line in lines]
    steps = [step for step, _ in points]
    if any(type(step) is not int for step in steps) or steps != sorted({*steps}):
        raise StorageError(f"{path} is damaged: the steps are not ascending integers")
    sealed = manifest.details.get("points")
    if sealed is not None and sealed != {"count": len(points), "hash": link}:
        raise StorageError(f"{path} is damaged: {folder / MANIFEST} lists other points than its {len(points)}")
    if (folder / point_name(len(points) + 1)).exists():  # a killed run may leave one point without a line
        raise StorageError(f"{path} is damaged: it lists {len(points)} points and the folder holds more")
    return points, link


def announce(folder: Path, writer: Writer) -> None:
    """Register the writer of a folder: opening the folder in this process waits for it first."""
    _writers[os.path.realpath(folder)] = writer


def wait_for_point(folder: Path) -> None:
    """Wait until a recorder of this process has written its current point into a folder."""
    writer = _writers.get(os.path.realpath(folder))
    if writer is not None:
        writer.wait()


def wide(value: Tensor) -> Tensor:
    """Convert half precision to float32, so that subtraction does not round; leave other dtypes unchanged."""
    return value.to(wide_dtype(value.dtype))
