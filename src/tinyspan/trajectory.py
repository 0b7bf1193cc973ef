"""Trajectory of a fine-tuning run: theta_0 and the points theta_1 .. theta_t, kept on disk as deltas to theta_0.

One safetensors file per point, one flat tensor per parameter in it, so that a point is appended by one atomic write
and any partition of the same parameters can be read from it, chunk by chunk, without loading a whole point.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.partition import Block, ParameterSpec, Partition
from tinyspan.storage import (
    MANIFEST,
    Manifest,
    Reader,
    check_file,
    check_folder,
    open_tensors,
    package_versions,
    prepare_folder,
    read_checkpoint,
    read_manifest,
    reading,
    write_json,
    write_tensors,
)

__all__ = ["Trajectory", "TrajectoryRecorder", "trajectory_from_checkpoints"]

START = "start.safetensors"
CHUNK = 1 << 18  # numbers of a parameter read at once: 32 points of float64 take 67 MB


class Trajectory:
    """Points of one run, read lazily from a folder.

    Args:
        folder: what a `TrajectoryRecorder` wrote.
        partition: another grouping of the recorded parameters; the recorded one by default.
        points: use only these points, by position in the recorded order, negative from the end; by default all.

    Raises:
        InputError: the folder is no trajectory, the partition names parameters that were not recorded, or there is no
            such point.
        StorageError: a file is missing or has another size than its manifest says.
    """

    def __init__(
        self, folder: str | Path, partition: Partition | None = None, points: Sequence[int] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder, "trajectory")
        for name, entry in self.manifest.files.items():
            check_file(self.folder, name, entry, content=False)
        self.recorded = Partition.from_json(self.manifest.partition)
        self.partition = partition or self.recorded
        with reading(self.folder / MANIFEST):
            steps: list[int] = list(self.manifest.details["steps"])
        names = point_names(len(steps))
        if set(self.manifest.files) != {START, *names}:
            raise StorageError(f"{self.folder / MANIFEST} is damaged: its files are not those of {len(steps)} points")
        self._chosen = None if points is None else list(points)
        try:
            positions = range(len(steps)) if points is None else [range(len(steps))[point] for point in points]
        except IndexError as error:
            raise InputError(f"{self.folder} has {len(steps)} points, not all of {list(points or ())}") from error
        self.steps = [steps[position] for position in positions]
        self._names = [names[position] for position in positions]
        known = set(self.recorded.parameters())
        for spec in self.partition.parameters():
            if spec not in known:
                raise InputError(
                    f"{self.folder} holds no points of {spec.name!r} ({list(spec.shape)}, {spec.dtype}): "
                    "discover with a partition of the recorded parameters, or record again"
                )

    def __len__(self) -> int:
        """Return t, the number of points after theta_0."""
        return len(self.steps)

    def with_partition(self, partition: Partition) -> "Trajectory":
        """Return the same points grouped into other blocks."""
        return Trajectory(self.folder, partition, self._chosen)

    def with_points(self, points: Sequence[int]) -> "Trajectory":
        """Return a view with some of the recorded points: `[-1]` is the end of the run."""
        return Trajectory(self.folder, self.partition, points)

    def chunks(self, block: Block, size: int = CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pieces of a block in order: theta_0 [n] and the deltas theta_i - theta_0 [t, n], n <= `size`.

        At most one chunk is in memory.
        """
        start, points = self._open(START), [self._open(name) for name in self._names]
        for spec in block.parameters:
            slices = [reader.get_slice(spec.name) for reader in points]
            origin = start.get_slice(spec.name)
            for a in range(0, spec.numel, size):
                b = min(a + size, spec.numel)
                yield origin[a:b], torch.stack([part[a:b] for part in slices])

    def start(self, block: Block) -> Tensor:
        """Return theta_0 of a block as one vector [D_b]."""
        return self._vector(START, block)

    def delta(self, block: Block, index: int = -1) -> Tensor:
        """Return theta_i - theta_0 of a block as one vector [D_b]; the last point by default."""
        return self._vector(self._names[index], block)

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
        return self.manifest.content_hash() + chosen

    def _open(self, name: str) -> Reader:
        return open_tensors(self.folder / name)

    def _vector(self, name: str, block: Block) -> Tensor:
        reader = self._open(name)
        return torch.cat([reader.get_tensor(spec.name) for spec in block.parameters])


class TrajectoryRecorder:
    """Write theta_0 now, and a point whenever `record` is called.

    Args:
        model: the model about to be trained; its present weights are theta_0.
        partition: which parameters to record.
        folder: must not exist, or be empty, or hold an earlier trajectory and `overwrite` be given.
        every: of the calls of `record` with steps 0, 1, 2, ..., write a point only every so many.
        overwrite: replace an earlier trajectory.

    Raises:
        InputError: the folder cannot be used, `every` is below 1, or theta_0 is NaN or infinite.
        MismatchError: the model lacks a parameter of the partition.

    Example:
        >>> import tempfile
        >>> from tinyspan import by_pattern
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> recorder = TrajectoryRecorder(model, by_pattern(model, {"all": ".*"}), tempfile.mkdtemp())
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> recorder.record(step=0)
        >>> trajectory = recorder.trajectory()
        >>> trajectory.delta(trajectory.partition["all"])
        tensor([1., 1., 0.])
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        folder: str | Path,
        *,
        every: int = 1,
        overwrite: bool = False,
    ) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1, got {every}")
        self.folder, self.every, self.partition = Path(folder), every, partition
        self._parameters = partition.select(model)
        for name, value in self._parameters.items():
            if not torch.isfinite(value).all():
                raise InputError(f"{name!r} is NaN or infinite before any training; load a sound base model")
        prepare_folder(self.folder, "trajectory", overwrite)
        self._manifest = Manifest(
            kind="trajectory",
            partition=partition.to_json(),
            fingerprint=partition.fingerprint(self._parameters),
            details={"steps": [], "model": model_name(model)},
            versions=package_versions(),
        )
        self._write(START, {name: value.detach().reshape(-1) for name, value in self._parameters.items()})

    def record(self, step: int) -> None:
        """Write the present weights as the next point, if it is this step's turn.

        Args:
            step: counts from 0, as `enumerate` does; with `every=50` the points are taken after steps 49, 99, ...

        Raises:
            TinyspanError: a weight is NaN or infinite; the points written before stay whole.
        """
        if (step + 1) % self.every == 0:
            self._append(step, self._parameters)

    def finish(self, step: int) -> None:
        """Write the present weights as the last point, unless the last one is of this step already.

        Raises:
            TinyspanError: a weight is NaN or infinite; the points written before stay whole.
        """
        if self._manifest.details["steps"][-1:] != [step]:
            self._append(step, self._parameters)

    def _append(self, step: int, values: Mapping[str, Tensor]) -> None:
        steps = self._manifest.details["steps"]
        if steps and step <= steps[-1]:
            raise InputError(f"step {step} does not come after step {steps[-1]}, the last one recorded")
        start = open_tensors(self.folder / START)
        deltas = {}
        for spec in self.partition.parameters():
            value = values[spec.name].detach().cpu().reshape(-1)
            if not torch.isfinite(value).all():
                raise TinyspanError(
                    f"step {step}: parameter {spec.name!r} is NaN or infinite; "
                    f"the {len(steps)} points before it are kept. Lower the learning rate"
                )
            deltas[spec.name] = _wide(value) - _wide(start.get_tensor(spec.name))
        self._write(point_names(len(steps) + 1)[-1], deltas, step)

    def trajectory(self) -> Trajectory:
        """Open what has been recorded so far."""
        return Trajectory(self.folder)

    def _write(self, name: str, tensors: Mapping[str, Tensor], step: int | None = None) -> None:
        self._manifest.files[name] = write_tensors(self.folder / name, tensors)
        if step is not None:
            self._manifest.details["steps"].append(step)
        write_json(self.folder / MANIFEST, self._manifest.model_dump())


def trajectory_from_checkpoints(
    model: nn.Module,
    partition: Partition,
    checkpoints: Sequence[str | Path],
    folder: str | Path,
    *,
    overwrite: bool = False,
) -> Trajectory:
    """Make a trajectory of checkpoint folders that an earlier run left, in the order given.

    Args:
        model: holds theta_0, the weights the run started from; it is not changed.
        partition: of `model`.
        checkpoints: folders with `model.safetensors` or `pytorch_model.bin`, whole or sharded. Parameter names may
            lack the prefix of the base model (`encoder.layer.0...` for `bert.encoder.layer.0...`) or have it in excess.
        folder: where to write.
        overwrite: replace an earlier trajectory.

    Raises:
        InputError: no checkpoint is given, or one is no checkpoint folder.
        MismatchError: a checkpoint lacks a parameter of the partition, or has it with another shape.
        StorageError: a file is damaged.
    """
    if not checkpoints:
        raise InputError("expected at least one checkpoint folder, got none")
    check_folder(Path(folder), "trajectory", overwrite, [Path(checkpoint) for checkpoint in checkpoints])
    for checkpoint in checkpoints:  # refused before anything is written
        _checkpoint(model, partition, Path(checkpoint))
    recorder = TrajectoryRecorder(model, partition, folder, overwrite=overwrite)
    for step, checkpoint in enumerate(checkpoints):
        recorder._append(step, _checkpoint(model, partition, Path(checkpoint)))
    return recorder.trajectory()


def model_name(model: nn.Module) -> str | None:
    """Return the name a Hugging Face model was loaded by, if it has one."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


def point_names(count: int) -> list[str]:
    """Return the file names of the first `count` points."""
    return [f"points/{index:06d}.safetensors" for index in range(1, count + 1)]


def _checkpoint(model: nn.Module, partition: Partition, folder: Path) -> dict[str, Tensor]:
    """Read the partition's parameters from a checkpoint folder, under any name the model ties to them."""
    tensors = dict(read_checkpoint(folder))
    by_suffix: dict[str, list[str]] = {}
    for key in tensors:
        for suffix in _suffixes(key):
            by_suffix.setdefault(suffix, []).append(key)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    own = partition.select(model)
    found: dict[str, Tensor] = {}
    taken: dict[str, str] = {}
    for spec in partition.parameters():
        key = _find(spec, aliases[id(own[spec.name])], tensors, by_suffix, folder)
        if taken.setdefault(key, spec.name) != spec.name:
            raise MismatchError(f"{folder}: {key!r} would serve as {taken[key]!r} and as {spec.name!r}")
        found[spec.name] = tensors[key]
    return found


def _find(
    spec: ParameterSpec,
    aliases: list[str],
    tensors: Mapping[str, Tensor],
    by_suffix: Mapping[str, list[str]],
    folder: Path,
) -> str:
    """Find one parameter's key: its name, else the longest of its suffixes that one key alone has or is."""
    for alias in aliases:
        matches = [alias] if alias in tensors else by_suffix.get(alias, [])
        matches = matches or [suffix for suffix in _suffixes(alias) if suffix in tensors][:1]
        if len(matches) == 1:
            value = tensors[matches[0]]
            if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                raise MismatchError(
                    f"{folder}: {matches[0]!r} has shape {list(value.shape)} and {value.dtype}, "
                    f"expected {list(spec.shape)} and {spec.dtype}; load theta_0 in the checkpoints' dtype"
                )
            return matches[0]
    raise MismatchError(f"{folder} has no tensor for the parameter {spec.name!r}; is it a checkpoint of this model?")


def _suffixes(name: str) -> list[str]:
    """Return `b.c` and `c` for `a.b.c`, the longest first, without the last part alone."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts) - 1)]


def _wide(value: Tensor) -> Tensor:
    """Half-precision weights as float32, so that a delta keeps its digits."""
    return value.float() if value.dtype.itemsize < 4 else value
