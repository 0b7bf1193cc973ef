"""Recording of a trajectory while a model is trained.

A recorder computes the deltas immediately; `points` writes them to disk while training continues.
"""

import operator
import warnings
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.io.folders import check_folder, claimed, prepare_folder
from tinyspan.io.journals import cut_lines
from tinyspan.io.manifests import MANIFEST, Manifest, check_file, package_versions, read_manifest, write_manifest
from tinyspan.io.storage import reading, sweep
from tinyspan.io.tensors import open_tensors, write_tensors
from tinyspan.partition import Partition, require_partition
from tinyspan.sharding import local, reshard
from tinyspan.trajectories.points import PointWriter, bytes_of, check_room, trajectory_bytes
from tinyspan.trajectories.trajectory import (
    JOURNAL,
    START,
    Trajectory,
    announce,
    model_name,
    point_name,
    read_points,
    require_parameters,
    stored_dtype,
    wait_for_point,
    wide,
)
from tinyspan.weights import finite, require_sound, wide_dtype

__all__ = ["TrajectoryRecorder"]


class TrajectoryRecorder:
    """Write theta_0 on creation, and a point whenever `record` is called.

    The deltas of a point are computed immediately and written by a separate thread while training continues: 50 steps
    of training take about as long with a point as without. At most one point is being written; the next `record` waits
    for it. The error of a failed write is raised by the next `record`, `flush` or `finish`. Call `flush` before you
    save a training state, so that the state is never ahead of the points on disk.

    With `dtype=torch.bfloat16` the deltas (not theta_0) take half the space, and each value has a relative rounding
    error of up to 2^-8 (0.17 % in the root mean square). A direction with the singular value s turns by about
    4e-4 s_1 / s rad, where s_1 is the largest singular value; directions below s_1 / 1000 are mostly rounding errors.
    Keep the default where every direction counts.

    Record a model in float32 that is trained under autocast. Recording half-precision weights issues a warning, because
    every point has their rounding error. The model that is later trained in the basis is the recorded one in float32.

    Args:
        model: model to be trained; its current weights are theta_0.
        partition: parameters to record.
        folder: folder of the trajectory; it must be absent or empty, or hold an earlier trajectory if `overwrite` is
            set.
        every: number of steps between two points, where `record` is called with steps 0, 1, 2, ...
        overwrite: replace an earlier trajectory.
        dtype: dtype of the stored deltas: `torch.bfloat16`, or None for float32 (float64 for float64 weights).
        points: expected number of points, if known; the disk space for them is checked before recording starts.

    Raises:
        InputError: the folder cannot be used, `every` is not a number of at least 1, `partition` is a function,
            `dtype` is not supported, or theta_0 is NaN, infinite or on the meta device.
        MismatchError: the model lacks a parameter of the partition.
        StorageError: the disk has too little space for the points, or the folder cannot be written.

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
        dtype: torch.dtype | None = None,
        points: int | None = None,
    ) -> None:
        check_interval(every)
        require_partition(partition)
        check_folder(Path(folder), "trajectory", overwrite)
        require_sound(partition.select(model))
        check_deltas(dtype)
        warn_of_rounding({spec.name: spec.dtype for spec in partition.parameters()})
        if points is not None:  # the space of an earlier output will be freed
            check_room(Path(folder), trajectory_bytes(partition, points, dtype), bytes_of(Path(folder)))
        self._open(model, partition, folder, every, dtype)
        prepare_folder(self.folder, "trajectory", overwrite)
        self._manifest = Manifest(
            kind="trajectory",
            partition=partition.to_json(),
            fingerprint=partition.fingerprint(self._parameters),
            construction={} if dtype is None else {"dtype": str(dtype)[6:]},
            details={"model": model_name(model)},
            versions=package_versions(),
        )
        start = {name: local(value).detach().reshape(-1) for name, value in self._parameters.items()}
        self._manifest.files[START] = write_tensors(self.folder / START, start)
        write_manifest(self.folder, self._manifest)
        self._points.link = self._manifest.content_hash()

    def _open(
        self, model: nn.Module, partition: Partition, folder: str | Path, every: int, dtype: torch.dtype | None
    ) -> None:
        self.folder, self.every, self.partition = Path(folder).absolute(), every, partition
        self._dtype = dtype
        self._model, self._selected = model, partition.select(model)
        self._shapes = {name: local(weight).shape for name, weight in self._selected.items()}
        self._earlier = 0  # number of points of the interrupted run
        self._passed: int | None = 0  # number of these before the current step of this run, None if unknown
        with ExitStack() as stack:  # locked until the run is sealed or this recorder is deleted
            stack.enter_context(claimed(self.folder))
            wait_for_point(self.folder)
            self._points = PointWriter(self.folder, stack.pop_all().close)
            self._release = weakref.finalize(self, self._points.close)
        announce(self.folder, self._points)

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """The model's current parameters: `load_state_dict(..., assign=True)` replaces the tensors.

        If a name no longer exists because its module was wrapped, the parameter that had the name is used.
        """
        reshard(self._model)
        own = self._model.named_parameters(remove_duplicate=False)
        self._selected |= {name: parameter for name, parameter in own if name in self._selected}
        return self._selected

    @property
    def steps(self) -> list[int]:
        """Steps of the points on disk; waits for a point that is being written."""
        self._points.wait()
        return self._points.steps

    @classmethod
    def resume(
        cls,
        model: nn.Module,
        partition: Partition,
        folder: str | Path,
        *,
        every: int = 1,
        done: int | None = None,
        dtype: torch.dtype | None = None,
        points: int | None = None,
    ) -> "TrajectoryRecorder":
        """Resume the trajectory of an interrupted run.

        If a point is recorded again with the same weights, it is kept. If its weights differ because the resumed
        training took another path, this point and all later ones are replaced. If `done` is given, later points that
        the run skips (because of another `every`) or does not reach are deleted too. Points after the last step of the
        resumed run (`finish`, `end`) are deleted in any case. If the current weights are a point that was due but was
        not written to disk, it is written now.

        Args:
            model: model in the state from which training resumes.
            partition: partition of the interrupted run.
            folder: folder of its trajectory.
            every: number of steps between two points.
            done: number of steps that the model has been trained, if known. With 0 its weights must be theta_0;
                otherwise they must equal the point recorded after the last of these steps, if one exists.
            dtype: dtype of the interrupted run.
            points: expected number of points of the whole run; points on disk need no further space.

        Raises:
            InputError: the folder is not a trajectory.
            MismatchError: the trajectory has another partition or dtype, or belongs to another run than the model.
            StorageError: the trajectory is damaged, or the disk has too little space for the points.
        """
        recorder = cls.__new__(cls)
        check_interval(every)
        require_partition(partition)
        check_deltas(dtype)
        read_manifest(Path(folder), "trajectory")  # or the lock would create a folder that does not exist
        recorder._open(model, partition, folder, every, dtype)
        manifest = read_manifest(recorder.folder, "trajectory")
        for place in (recorder.folder, recorder.folder / "points"):
            sweep(place)
        if manifest.partition != partition.to_json():
            raise MismatchError(f"{folder} was recorded with another partition; record into another folder")
        if (stored := stored_dtype(recorder.folder, manifest)) != dtype:
            raise MismatchError(
                f"{folder} was recorded with dtype={stored}, now dtype={dtype} is given: use the same dtype, or "
                "record into another folder"
            )
        if done == 0 and manifest.fingerprint != partition.fingerprint(recorder._parameters):
            raise MismatchError(f"{folder} starts from another theta_0; record into another folder")
        earlier, recorder._points.link = read_points(recorder.folder, manifest)
        with reading(recorder.folder / MANIFEST):
            check_file(recorder.folder, START, manifest.files[START])  # all further deltas are computed from it
        require_parameters(recorder.folder, START, partition, dtype)
        for link in (path for path in (recorder.folder / JOURNAL, recorder.folder / "points") if path.is_symlink()):
            raise StorageError(f"{link} is a link, through which points would be written; replace it by a copy")
        for index, (_, entry) in enumerate(earlier):
            check_file(recorder.folder, point_name(index), entry, content=False)
        if points is not None:
            stored_bytes = sum(entry.bytes for entry in (manifest.files[START], *(entry for _, entry in earlier)))
            check_room(recorder.folder, trajectory_bytes(partition, points, dtype), stored_bytes)
        recorder._points.steps, recorder._manifest = [step for step, _ in earlier], manifest
        recorder._earlier = len(earlier)
        recorder._passed = None if done is None else bisect_left(recorder._points.steps, done)
        if done and done - 1 in recorder.steps:
            name = point_name(recorder.steps.index(done - 1))
            if not recorder._equals(name, recorder._deltas(done - 1, recorder._parameters)):
                raise MismatchError(
                    f"{folder} is of another run: its point at step {done - 1} has other weights than this model; "
                    "record into another folder"
                )
        cut_lines(recorder.folder / JOURNAL, 0)  # delete a line whose write was interrupted
        if done and done % every == 0 and (not recorder.steps or recorder.steps[-1] < done - 1):
            recorder.append(done - 1, recorder._parameters)
            recorder.flush()
        return recorder

    def record(self, step: int) -> None:
        """Record the current weights as the next point if one is due after this step; they are written in background.

        Args:
            step: number of the step, from 0, as in `enumerate`; with `every=50` steps 49, 99, ... are recorded.

        Raises:
            TinyspanError: a weight is NaN or infinite; earlier points are unaffected.
            StorageError: the previous point could not be written, for example because the disk is full. That point is
                lost and this step is not recorded; earlier points are unaffected.
        """
        self._points.raise_error()
        if (step + 1) % self.every == 0:
            self.append(step, self._parameters)

    def append(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Record the given weights as the next point, regardless of `every`; they are written in background.

        In a resumed recorder, a step that was recorded before is compared with its point, as described in `resume`.

        Args:
            step: number of the step; it must follow all steps recorded by this run.
            values: parameter name -> weights, for every parameter of the partition; other names are ignored. Rounded
                weights, such as bfloat16, are recorded as they are.

        Raises:
            InputError: the step does not follow the last one.
            MismatchError: a parameter is missing, has another shape, or has no floating-point dtype.
            TinyspanError: a weight is NaN or infinite; earlier points are unaffected.
            StorageError: the previous point could not be written, as for `record`.
        """
        step = operator.index(step)  # such as of numpy, which JSON lacks
        self.flush()
        deltas = self._deltas(step, values)
        index = bisect_left(self.steps, step, hi=self._earlier)
        if self._passed is not None and self._passed < index:
            self._forget(index := self._passed)  # this run may not have reached these points
        if index < self._earlier:
            if self.steps[index] == step and self._equals(point_name(index), deltas):
                self._passed = None if self._passed is None else index + 1
                return
            self._forget(index)
        if self.steps and step <= self.steps[-1]:
            raise InputError(f"step {step} does not come after step {self.steps[-1]}, the last one recorded")
        self._unseal()
        self._points.add(step, deltas)

    def flush(self) -> None:
        """Wait until every point is on disk.

        Raises:
            StorageError: the last point could not be written; earlier points are unaffected.
        """
        self._points.wait()
        self._points.raise_error()

    def finish(self, step: int) -> None:
        """Write the current weights as the last point, unless this step is already recorded, and seal the trajectory.

        Raises:
            TinyspanError: a weight is NaN or infinite; earlier points are unaffected.
            StorageError: this point or the previous one could not be written; earlier points are unaffected.
        """
        self.end(step)
        self.seal()

    def end(self, step: int, values: Mapping[str, Tensor] | None = None) -> None:
        """Record the last point of the run, unless this step is already recorded, without sealing the trajectory.

        In a resumed recorder, later points of the interrupted run are deleted.

        Args:
            step: number of the last step.
            values: weights at the end of the run, as for `append` and from `snapshot`; the current ones by default.

        Raises:
            TinyspanError: a weight is NaN or infinite; earlier points are unaffected.
            StorageError: the previous point could not be written; earlier points are unaffected.
        """
        self.flush()
        if self.steps[-1:] != [step] or len(self.steps) == self._earlier:  # an earlier run's point is compared
            self.append(step, values or self._parameters)
        if (count := bisect_right(self.steps, step)) < len(self.steps):
            self._forget(count)

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies on the CPU of the current weights, which `append` and `end` take after the model has changed.

        If the model is sharded, these are the weights of this process's shard.
        """
        return {name: local(weight).detach().to("cpu", copy=True) for name, weight in self._parameters.items()}

    def restart(self) -> None:
        """Delete all points and keep theta_0, to record a run that starts again.

        Raises:
            StorageError: the last point could not be written.
        """
        self.flush()
        self._forget(0)

    def seal(self) -> None:
        """Store the number of points and their hash in the manifest, so that a lost point is detected.

        Raises:
            StorageError: the last point, or the manifest, could not be written.
        """
        self.flush()
        if self._passed is not None and self._passed < self._earlier:
            self._forget(self._passed)
        self._manifest.details["points"] = {"count": len(self.steps), "hash": self._points.link}
        write_manifest(self.folder, self._manifest)
        self._release()

    def _unseal(self) -> None:
        if self._manifest.details.pop("points", None) is not None:
            write_manifest(self.folder, self._manifest)

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        """theta_0, memory-mapped once: safetensors leaks 64 bytes for every tensor that is read."""
        reader = open_tensors(self.folder / START)
        return {spec.name: reader.get_tensor(spec.name) for spec in self.partition.parameters()}

    def _deltas(self, step: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        deltas = {}
        for spec in self.partition.parameters():
            if spec.name not in values:
                raise MismatchError(f"step {step}: expected weights of the parameter {spec.name!r}, got none")
            given, expected = local(values[spec.name]), self._shapes[spec.name]
            if given.shape != expected or not given.is_floating_point():
                raise MismatchError(
                    f"step {step}: expected {spec.name!r} as floating-point numbers of shape {tuple(expected)}, got "
                    f"{given.dtype} of shape {tuple(given.shape)}"
                )
            value = given.detach().cpu().reshape(-1)
            if not finite(value):
                raise TinyspanError(
                    f"step {step}: parameter {spec.name!r} is NaN or infinite; "
                    f"the {len(self.steps)} points before it are kept. In training, lower the learning rate"
                )
            start = wide(self._start[spec.name])
            deltas[spec.name] = (wide(value) - start).to(self._dtype or start.dtype)
        return deltas

    def _equals(self, name: str, deltas: Mapping[str, Tensor]) -> bool:
        """Return whether a point on disk has these deltas."""
        reader = open_tensors(self.folder / name)
        with reading(self.folder / name):
            return all(torch.equal(reader.get_tensor(key), value) for key, value in deltas.items())

    def _forget(self, keep: int) -> None:
        """Delete all points but the first `keep`, in reverse order."""
        self._unseal()
        (self.folder / point_name(len(self.steps))).unlink(missing_ok=True)
        for index in reversed(range(keep, len(self.steps))):
            cut_lines(self.folder / JOURNAL, 1)
            (self.folder / point_name(index)).unlink(missing_ok=True)
        points, self._points.link = read_points(self.folder, self._manifest)
        self._points.steps, self._earlier = [step for step, _ in points], keep
        self._passed = None if self._passed is None else min(self._passed, keep)

    def trajectory(self) -> Trajectory:
        """Open the trajectory of all points recorded so far.

        Raises:
            StorageError: the last point could not be written.
        """
        self.flush()
        return Trajectory(self.folder)


def warn_of_rounding(dtypes: Mapping[str, torch.dtype], stacklevel: int = 3) -> None:
    """Warn that recorded weights are rounded if any of them has half precision.

    Args:
        dtypes: parameter name -> dtype of the weights.
        stacklevel: as for `warnings.warn`; the default is the caller of the calling function.
    """
    rounded = {name: dtype for name, dtype in dtypes.items() if wide_dtype(dtype) != dtype}
    if rounded:
        name, dtype = next(iter(rounded.items()))
        warnings.warn(
            f"{len(rounded)} of {len(dtypes)} recorded parameters are in half precision, the first is {name!r} in "
            f"{dtype}: every point is rounded by up to {torch.finfo(dtype).eps / 2:.2%} of each weight, and smaller "
            "steps are lost. Train float32 weights (from_pretrained(..., dtype=torch.float32), or model.float()) under "
            "autocast, and record those",
            stacklevel=stacklevel,
        )


def check_interval(every: object, otherwise: str = "") -> None:
    """Check the number of steps between two points.

    Args:
        every: the number.
        otherwise: what the caller accepts besides a number, for the message.

    Raises:
        InputError: it is not a whole number of at least 1.
    """
    if not isinstance(every, Integral) or every < 1:
        raise InputError(f"expected every to be {otherwise}a number of steps of at least 1, got {every!r}")


def check_deltas(dtype: torch.dtype | None) -> None:
    """Check the dtype of stored deltas.

    Raises:
        InputError: the dtype is neither None nor bfloat16.
    """
    if dtype not in (None, torch.bfloat16):
        raise InputError(f"deltas are stored with dtype=None (float32, or float64) or torch.bfloat16, got {dtype}")
