"""Trajectory of a fine-tuning run: theta_0 and the points theta_1 .. theta_t, kept on disk as deltas to theta_0.

One safetensors file per point, one flat tensor per parameter in it, so that any partition of the same parameters can
be read from it, chunk by chunk, without loading a whole point. A journal, `points.jsonl`, gets one line per point after
its file is in place, so that a point costs the same however many there are.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, StorageError
from tinyspan.io.storage import (
    MANIFEST,
    FileEntry,
    Manifest,
    Reader,
    check_file,
    open_tensors,
    read_lines,
    read_manifest,
    reading,
)
from tinyspan.partition import Block, Partition
from tinyspan.weights import wide_dtype

__all__ = ["Trajectory"]

START = "start.safetensors"
JOURNAL = "points.jsonl"
CHUNK = 1 << 18  # numbers of a parameter read at once


class Writer(Protocol):
    """What writes points in the background."""

    def wait(self) -> None:
        """Wait until nothing is being written."""


_writers: weakref.WeakValueDictionary[str, Writer] = weakref.WeakValueDictionary()  # by real path, in this process


class Trajectory:
    """Points of one run, read lazily from a folder.

    Args:
        folder: what a `TrajectoryRecorder` wrote.
        partition: another grouping of the recorded parameters; the recorded one by default. Of parameters recorded in
            half precision it may name them in float32.
        points: use only these points, by position in the recorded order, negative from the end; by default all.

    Raises:
        InputError: the folder is no trajectory, the partition names parameters that were not recorded, or there is no
            such point.
        StorageError: a file is missing or has another size than its manifest says.
    """

    def __init__(
        self, folder: str | Path, partition: Partition | None = None, points: Sequence[int] | None = None
    ) -> None:
        self.folder = Path(folder).absolute()  # it is read later, when the current directory may be another
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
        self._verified: set[str] = set()  # files whose content was compared with its hash
        self._choose(points)
        self._group(partition or self.recorded)

    def _choose(self, points: Sequence[int] | None) -> None:
        known = self._recorded_steps
        self._chosen = None if points is None else list(points)
        try:
            positions = range(len(known)) if points is None else [range(len(known))[point] for point in points]
        except IndexError as error:
            raise InputError(f"{self.folder} has {len(known)} points, not all of {list(points or ())}") from error
        self.steps = [known[position] for position in positions]
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

    def chunks(self, block: Block, size: int = CHUNK, out: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pieces of a block in order: theta_0 [n] and the deltas theta_i - theta_0 [t, n], n <= `size`.

        At most one chunk is in memory. A file is compared with its hash before it is first read. Deltas stored in
        bfloat16 are given in float32. With `out` [t, size] all deltas are written there, in its dtype, so that a chunk
        is valid until the next is asked for.

        Raises:
            StorageError: a file is damaged.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves the interpreter free
            start, *points = pool.map(self._open, [START, *self._names])
        for spec in block.parameters:
            origin, *parts = (reader.get_tensor(spec.name) for reader in (start, *points))  # mapped, not read
            for a in range(0, spec.numel, size):
                first, pieces = origin[a : a + size], [part[a : a + size] for part in parts]
                if out is None:
                    yield first, wide(torch.stack(pieces)) if pieces else first.new_empty(0, len(first))
                else:
                    deltas = out[:, : len(first)]
                    for row, piece in zip(deltas, pieces, strict=True):
                        row.copy_(piece)
                    yield first, deltas

    def start(self, block: Block) -> Tensor:
        """Return theta_0 of a block as one vector [D_b]."""
        return self._vector(START, block)

    def delta(self, block: Block, index: int = -1) -> Tensor:
        """Return theta_i - theta_0 of a block as one vector [D_b]; the last point by default."""
        return wide(self._vector(self._names[index], block))

    def fingerprint(self) -> dict[str, str]:
        """Return the fingerprint of theta_0 for every block of `partition`."""
        if self.partition == self.recorded:
            return self.manifest.fingerprint
        start = self._open(START)
        return self.partition.fingerprint(
            {spec.name: start.get_tensor(spec.name) for spec in self.partition.parameters()}
        )

    def content_hash(self) -> str:
        """Return the hash by which a basis names this trajectory as its parent, followed by the points if chosen."""
        chosen = "" if self._chosen is None else f"#{','.join(map(str, self._chosen))}"
        return self._link + chosen

    def _open(self, name: str) -> Reader:
        if name not in self._verified:
            check_file(self.folder, name, self.files[name])
            require_parameters(self.folder, name, self.recorded, self._dtype)
            self._verified.add(name)
        return open_tensors(self.folder / name)

    def _vector(self, name: str, block: Block) -> Tensor:
        reader = self._open(name)
        return torch.cat([reader.get_tensor(spec.name) for spec in block.parameters])


def model_name(model: nn.Module) -> str | None:
    """Return the name a Hugging Face model was loaded by, if it has one."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


def point_name(index: int) -> str:
    """Return the file name of a point; the index counts from 0, the names from 1."""
    return f"points/{index + 1:06d}.safetensors"


def stored_partition(folder: Path, manifest: Manifest) -> Partition:
    """Return the partition that a manifest tells, each of whose blocks has a fingerprint, or none of them.

    Raises:
        StorageError: it tells none.
    """
    path = folder / MANIFEST
    try:
        partition = Partition.from_json(manifest.partition)
    except InputError as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    expected, found = {block.name for block in partition}, {*manifest.fingerprint}
    if manifest.kind == "adapter":
        found.discard("frozen parameters")
    if found and expected != found:
        raise StorageError(
            f"{path} is damaged: {min(expected ^ found)!r} is a block, or has a fingerprint, but not both"
        )
    return partition


def stored_dtype(folder: Path, manifest: Manifest) -> torch.dtype | None:
    """Return the dtype of the deltas that a manifest tells; None where it tells none, and they are wide.

    Raises:
        StorageError: it tells one that is not written.
    """
    name = manifest.construction.get("dtype")
    if name not in (None, "bfloat16"):
        raise StorageError(
            f"{folder / MANIFEST} is damaged: expected deltas in bfloat16 or no dtype, found {name!r:.50}"
        )
    return None if name is None else torch.bfloat16


def require_parameters(folder: Path, name: str, partition: Partition, stored: torch.dtype | None) -> None:
    """Refuse a file that does not hold what was recorded, flat: theta_0 in the model's dtypes, deltas in `stored`."""
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
    """Return step and file entry of every point in the journal, and the hash of all, which continues the manifest's.

    Raises:
        StorageError: the journal is damaged, or lacks points.
    """
    path = folder / JOURNAL
    lines, link = read_lines(path, manifest.content_hash())
    with reading(path):
        points = [(line.pop("step"), FileEntry.model_validate(line)) for line in lines]
    steps = [step for step, _ in points]
    if any(type(step) is not int for step in steps) or steps != sorted({*steps}):
        raise StorageError(f"{path} is damaged: the steps are no ascending numbers")
    sealed = manifest.details.get("points")
    if sealed is not None and sealed != {"count": len(points), "hash": link}:
        raise StorageError(f"{path} is damaged: {folder / MANIFEST} tells of other points than its {len(points)}")
    if (folder / point_name(len(points) + 1)).exists():  # one more may be there, of a run that was killed meanwhile
        raise StorageError(f"{path} is damaged: it tells of {len(points)} points and there are more")
    return points, link


def announce(folder: Path, writer: Writer) -> None:
    """Have whoever opens a folder in this process wait for its writer first."""
    _writers[os.path.realpath(folder)] = writer


def wait_for_point(folder: Path) -> None:
    """Wait for the point that a recorder of this process is writing into a folder."""
    writer = _writers.get(os.path.realpath(folder))
    if writer is not None:
        writer.wait()


def wide(value: Tensor) -> Tensor:
    """Half-precision numbers as float32, so that a delta keeps its digits."""
    return value.to(wide_dtype(value.dtype))
