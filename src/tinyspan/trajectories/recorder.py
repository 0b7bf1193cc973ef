"""Recording a trajectory while a model is trained.

A recorder takes the deltas at once and lets a thread write them while training goes on.
"""

import shutil
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from threading import Thread, current_thread

import torch
from torch import Tensor, nn

from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.io.folders import check_folder, claimed, prepare_folder
from tinyspan.io.storage import (
    MANIFEST,
    Manifest,
    append_line,
    check_file,
    cut_lines,
    open_tensors,
    package_versions,
    read_manifest,
    reading,
    sweep,
    write_manifest,
    write_tensors,
)
from tinyspan.partition import Partition
from tinyspan.sharding import local, reshard
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

HEADER = 128  # bytes that a parameter takes in a file's header at most, without its name


class _Points:
    """The points in a folder, to which threads add one at a time, each of which ends with its point.

    They know nothing of recorder and model, so that a write keeps neither alive. Being no daemons, they are waited for
    when the interpreter ends. In a forked child a thread of its parent counts as ended.

    Args:
        folder: of the trajectory.
        release: called when nobody records any more, and nothing is being written.

    Attributes:
        steps: of the points on disk.
        link: the hash that the next line of the journal continues.
    """

    def __init__(self, folder: Path, release: Callable[[], None]) -> None:
        self.folder, self.steps, self.link = folder, list[int](), ""
        self._release = release
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._writing = self._left = False

    def add(self, step: int, deltas: dict[str, Tensor]) -> None:
        """Begin to write a point; the one before must be written."""
        self._writing = True
        self._thread = Thread(target=self._write, args=(step, deltas), name="tinyspan point", daemon=False)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads, or the interpreter ends
            self._write(step, deltas)
            self.tell()

    def _write(self, step: int, deltas: dict[str, Tensor]) -> None:
        try:
            entry = write_tensors(self.folder / point_name(len(self.steps)), deltas)
            self.link = append_line(self.folder / JOURNAL, self.link, {"step": step, **entry.model_dump()})
            self.steps.append(step)
        except BaseException as error:
            self._error = error
        self._writing = False
        if self._left:
            self._end()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None and self._thread is not current_thread() and self._thread.is_alive():
            self._thread.join()

    def tell(self) -> None:
        """Raise what a write failed with, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def leave(self) -> None:
        """Release when all is written: nobody records any more."""
        if self._writing and self._thread is current_thread():  # where the collector found the recorder
            self._left = True
        else:
            self.wait()
            self._end()

    def _end(self) -> None:
        self._release()
        if self._error is not None:
            warnings.warn(f"the last point was not recorded: {self._error}", stacklevel=2)


class TrajectoryRecorder:
    """Write theta_0 now, and a point whenever `record` is called.

    A point is taken at once and written by a thread of its own, while training goes on: 50 steps of training take about
    as long with one as without. At most one is being written; the next `record` waits for it. What a write fails with
    is raised by the next `record`, `flush` or `finish`. Flush before you save a state of training, so that it is never
    ahead of the points on disk.

    With `dtype=torch.bfloat16` the deltas (not theta_0) take half the bytes, and each number is rounded by up to 2^-8
    of itself (0.17 % in the root mean square). Directions down to the singular value s turn by about 4e-4 s_1 / s rad,
    s_1 being the largest: those below s_1 / 1000 are mostly rounding. Where every direction counts, leave it.

    Record a model in float32, trained under autocast. Weights in half precision are recorded with a warning, since
    every point is rounded as they are. The model that is then trained in the basis is the recorded one in float32.

    Args:
        model: the model about to be trained; its present weights are theta_0.
        partition: which parameters to record.
        folder: must not exist, or be empty, or hold an earlier trajectory and `overwrite` be given.
        every: of the calls of `record` with steps 0, 1, 2, ..., write a point only every so many.
        overwrite: replace an earlier trajectory.
        dtype: of the stored deltas: `torch.bfloat16`, or None for float32 (float64 where the weights are).
        points: how many points to expect, if that is known: refuse to begin where there is no room for them.

    Raises:
        InputError: the folder cannot be used, `every` is below 1, `dtype` is another, or theta_0 is NaN, infinite or on
            the meta device.
        MismatchError: the model lacks a parameter of the partition.
        StorageError: there is no room for so many points, or the folder cannot be written.

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
        check_folder(Path(folder), "trajectory", overwrite)
        require_sound(partition.select(model))
        check_deltas(dtype)
        warn_of_rounding({spec.name: spec.dtype for spec in partition.parameters()})
        if points is not None:  # what an earlier output takes becomes free
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
        if every < 1:
            raise InputError(f"every must be at least 1, got {every}")
        self.folder, self.every, self.partition = Path(folder).absolute(), every, partition
        self._dtype = dtype
        self._model, self._known = model, partition.select(model)
        self._shapes = {name: local(weight).shape for name, weight in self._known.items()}
        self._earlier = 0  # how many of the points are of the interrupted run
        self._passed: int | None = 0  # how many of these the run has behind it, if that is known
        with ExitStack() as stack:  # nobody else writes here until the run is sealed or this recorder is gone
            stack.enter_context(claimed(self.folder))
            wait_for_point(self.folder)
            self._points = _Points(self.folder, stack.pop_all().close)
            self._release = weakref.finalize(self, self._points.leave)
        announce(self.folder, self._points)

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters as they are now: `load_state_dict(..., assign=True)` puts others in their place.

        Where a module has been wrapped since, so that a name is gone, the one that had it is followed.
        """
        reshard(self._model)
        own = self._model.named_parameters(remove_duplicate=False)
        self._known |= {name: parameter for name, parameter in own if name in self._known}
        return self._known

    @property
    def steps(self) -> list[int]:
        """Steps of the points on disk; waits for the one that is being written."""
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
        """Go on with the trajectory of an interrupted run.

        A point that was recorded before and is recorded again is left as it is if it is the same. If it differs, since
        the run went on from before it and took another way, it and all later points are replaced; so are, if `done` is
        known, points after it that the run passes by (another `every`) or does not reach. If the model stands where a
        point was due that did not reach the disk, the point is written now.

        Args:
            model: at the state from which its training goes on.
            partition: as in the interrupted run.
            folder: of its trajectory.
            every: as for a new recorder.
            done: how many steps the model has behind it, if that is known: with 0 it must hold theta_0, else the point
                recorded after its last step, if there is one.
            dtype: as in the interrupted run.
            points: how many points the whole run is to have, as for a new recorder; those on disk need no room.

        Raises:
            InputError: the folder holds no trajectory.
            MismatchError: its partition or dtype is another one, or it is of another run than the model.
            StorageError: it is damaged, or there is no room for so many points.
        """
        recorder = cls.__new__(cls)
        check_deltas(dtype)
        recorder._open(model, partition, folder, every, dtype)
        manifest = read_manifest(recorder.folder, "trajectory")
        for place in (recorder.folder, recorder.folder / "points"):
            sweep(place)
        if manifest.partition != partition.to_json():
            raise MismatchError(f"{folder} was recorded with another partition; record into another folder")
        if (stored := stored_dtype(recorder.folder, manifest)) != dtype:
            raise MismatchError(
                f"{folder} was recorded with dtype={stored}, now dtype={dtype} is given: go on with the same, or "
                "record into another folder"
            )
        if done == 0 and manifest.fingerprint != partition.fingerprint(recorder._parameters):
            raise MismatchError(f"{folder} starts from another theta_0; record into another folder")
        earlier, recorder._points.link = read_points(recorder.folder, manifest)
        with reading(recorder.folder / MANIFEST):
            check_file(recorder.folder, START, manifest.files[START])  # every delta to come is taken from it
        require_parameters(recorder.folder, START, partition, dtype)
        for link in (path for path in (recorder.folder / JOURNAL, recorder.folder / "points") if path.is_symlink()):
            raise StorageError(f"{link} is a link, through which points would be written; put a copy in its place")
        for index, (_, entry) in enumerate(earlier):
            check_file(recorder.folder, point_name(index), entry, content=False)
        if points is not None:
            kept = sum(entry.bytes for entry in (manifest.files[START], *(entry for _, entry in earlier)))
            check_room(recorder.folder, trajectory_bytes(partition, points, dtype), kept)
        recorder._points.steps, recorder._manifest = [step for step, _ in earlier], manifest
        recorder._earlier = len(earlier)
        recorder._passed = None if done is None else bisect_left(recorder._points.steps, done)
        if done and done - 1 in recorder.steps:
            name = point_name(recorder.steps.index(done - 1))
            if not recorder._holds(name, recorder._deltas(done - 1, recorder._parameters)):
                raise MismatchError(
                    f"{folder} is of another run: its point after step {done} is not where this model is; record "
                    "into another folder"
                )
        cut_lines(recorder.folder / JOURNAL, 0)  # what was being written when the run was killed
        if done and done % every == 0 and (not recorder.steps or recorder.steps[-1] < done - 1):
            recorder.append(done - 1, recorder._parameters)
            recorder.flush()
        return recorder

    def record(self, step: int) -> None:
        """Take the present weights as the next point, if it is this step's turn, and have them written meanwhile.

        Args:
            step: counts from 0, as `enumerate` does; with `every=50` the points are taken after steps 49, 99, ...

        Raises:
            TinyspanError: a weight is NaN or infinite; the points written before stay whole.
            StorageError: the point before could not be written, for instance because the disk is full; it is lost, no
                point of this step is taken, and those before stay whole.
        """
        self._points.tell()
        if (step + 1) % self.every == 0:
            self.append(step, self._parameters)

    def append(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take given weights as the next point, wherever they come from, and have them written meanwhile.

        `every` does not matter. Of a resumed recorder a step that was recorded before is compared with that point, as
        `resume` tells.

        Args:
            step: after all steps recorded by this run, which is not sealed yet.
            values: every parameter of the partition by name, in its shape; others are ignored. What they were rounded
                to, in bfloat16 say, is what is recorded.

        Raises:
            InputError: the step does not come after the last one.
            MismatchError: a parameter is missing, has another shape, or holds no floating-point numbers.
            TinyspanError: a weight is NaN or infinite; the points written before stay whole.
            StorageError: the point before could not be written; as for `record`.
        """
        self.flush()
        deltas = self._deltas(step, values)
        index = bisect_left(self.steps, step, hi=self._earlier)
        if self._passed is not None and self._passed < index:
            self._forget(index := self._passed)  # nobody knows whether the run came by there
        if index < self._earlier:
            if self.steps[index] == step and self._holds(point_name(index), deltas):
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
            StorageError: the last one could not be written; those before stay whole.
        """
        self._points.wait()
        self._points.tell()

    def finish(self, step: int) -> None:
        """Write the present weights as the last point, unless the last one is of this step already, and seal the run.

        Raises:
            TinyspanError: a weight is NaN or infinite; the points written before stay whole.
            StorageError: this point or the one before could not be written; likewise.
        """
        self._end(step)
        self.seal()

    def _end(self, step: int, values: Mapping[str, Tensor] | None = None) -> None:
        """Write the last point, unless it is there: these weights, or the present ones."""
        self.flush()
        if self.steps[-1:] != [step] or len(self.steps) == self._earlier:  # a point of before is compared
            self.append(step, values or self._parameters)

    def seal(self) -> None:
        """Note in the manifest that these are all points, so that a lost one is noticed.

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
        """theta_0, mapped into memory once: safetensors leaves 64 bytes behind whenever a tensor is asked for."""
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

    def _holds(self, name: str, deltas: Mapping[str, Tensor]) -> bool:
        reader = open_tensors(self.folder / name)
        with reading(self.folder / name):
            return all(torch.equal(reader.get_tensor(key), value) for key, value in deltas.items())

    def _forget(self, keep: int) -> None:
        """Take all but the first so many points away, the last one first."""
        self._unseal()
        (self.folder / point_name(len(self.steps))).unlink(missing_ok=True)
        for index in reversed(range(keep, len(self.steps))):
            cut_lines(self.folder / JOURNAL, 1)
            (self.folder / point_name(index)).unlink(missing_ok=True)
        points, self._points.link = read_points(self.folder, self._manifest)
        self._points.steps, self._earlier = [step for step, _ in points], keep
        self._passed = None if self._passed is None else min(self._passed, keep)

    def trajectory(self) -> Trajectory:
        """Open what has been recorded so far.

        Raises:
            StorageError: the last point could not be written.
        """
        self.flush()
        return Trajectory(self.folder)


def trajectory_bytes(partition: Partition, points: int, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that theta_0 and so many points take on disk; headers, journal and manifest rounded up."""
    specs = list(partition.parameters())
    start = sum(spec.numel * spec.dtype.itemsize for spec in specs)
    point = sum(spec.numel * (dtype or wide_dtype(spec.dtype)).itemsize for spec in specs)
    header = sum(len(spec.name.encode()) + HEADER for spec in specs)
    return start + points * point + (points + 2) * (header + 4096)


def bytes_of(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def check_room(folder: Path, needed: int, there: int = 0) -> int:
    """Refuse to fill a folder for which the disk has no room, and return the bytes that are free.

    Args:
        folder: may be absent.
        needed: the bytes that it will hold.
        there: how many of them it holds already, or holds and will be replaced.

    Raises:
        StorageError: says how much is needed, how much is free, and how to need less.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    with reading(place):
        free = shutil.disk_usage(place).free
    if needed - there > free:
        raise StorageError(
            f"{folder} has no room: it needs another {(needed - there) / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
            "free there. Make room, or record fewer points (a larger `every`), in half the bytes (`dtype` bfloat16), "
            "or fewer layers (another partition)"
        )
    return free


def warn_of_rounding(dtypes: Mapping[str, torch.dtype], stacklevel: int = 3) -> None:
    """Warn that the weights of points are rounded, if any has half precision.

    Args:
        dtypes: of the weights, by parameter name.
        stacklevel: as for `warnings.warn`; by default the caller of the function that calls this.
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


def check_deltas(dtype: torch.dtype | None) -> None:
    """Refuse a dtype in which deltas are not stored.

    Raises:
        InputError: it is neither None nor bfloat16.
    """
    if dtype not in (None, torch.bfloat16):
        raise InputError(f"deltas are stored with dtype=None (float32, or float64) or torch.bfloat16, got {dtype}")
