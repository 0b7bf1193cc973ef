"""The points of a trajectory on their way to disk: a thread writes them, and the space that they need is checked."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Thread, current_thread

import torch
from torch import Tensor

from tinyspan.errors import StorageError
from tinyspan.io.journals import append_line
from tinyspan.io.storage import reading
from tinyspan.io.tensors import write_tensors
from tinyspan.partition import Partition
from tinyspan.trajectories.trajectory import JOURNAL, point_name
from tinyspan.weights import wide_dtype

__all__ = ["PointWriter", "bytes_of", "check_room", "trajectory_bytes"]

HEADER = 128  # upper bound on the bytes of a parameter in a file header, without its name


class PointWriter:
    """The points in a folder; each new point is written by its own thread, one at a time.

    The object holds no reference to the recorder or the model, so a write keeps neither alive. The threads are not
    daemons: the interpreter waits for them when it exits. In a forked child a thread of the parent counts as finished.

    Args:
        folder: folder of the trajectory.
        release: called once the recorder is closed and all points are written.

    Attributes:
        steps: steps of the points on disk.
        link: hash of the journal so far, which the next line continues.
    """

    def __init__(self, folder: Path, release: Callable[[], None]) -> None:
        self.folder, self.steps, self.link = folder, list[int](), ""
        self._release = release
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._writing = self._closed = False

    def add(self, step: int, deltas: dict[str, Tensor]) -> None:
        """Start to write a point; the previous one must be complete."""
        self._writing = True
        self._thread = Thread(target=self._write, args=(step, deltas), name="tinyspan point", daemon=False)
        try:
            self._thread.start()
        except RuntimeError:  # the thread limit is reached, or the interpreter exits
            self._write(step, deltas)
            self.raise_error()

    def _write(self, step: int, deltas: dict[str, Tensor]) -> None:
        try:
            entry = write_tensors(self.folder / point_name(len(self.steps)), deltas)
            self.link = append_line(self.folder / JOURNAL, self.link, {"step": step, **entry.model_dump()})
            self.steps.append(step)
        except BaseException as error:
            self._error = error
        self._writing = False
        if self._closed:
            self._end()

    def wait(self) -> None:
        """Wait until all points are written."""
        if self._thread is not None and self._thread is not current_thread() and self._thread.is_alive():
            self._thread.join()

    def raise_error(self) -> None:
        """Raise the error of a failed write, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Release the folder once all points are written."""
        if self._writing and self._thread is current_thread():  # the garbage collector ran in the writing thread
            self._closed = True
        else:
            self.wait()
            self._end()

    def _end(self) -> None:
        self._release()
        if self._error is not None:
            warnings.warn(f"the last point was not recorded: {self._error}", stacklevel=2)


def trajectory_bytes(partition: Partition, points: int, dtype: torch.dtype | None = None) -> int:
    """Return an upper bound on the bytes of theta_0 and `points` points on disk, with headers, journal and manifest."""
    specs = list(partition.parameters())
    start = sum(spec.numel * spec.dtype.itemsize for spec in specs)
    point = sum(spec.numel * (dtype or wide_dtype(spec.dtype)).itemsize for spec in specs)
    header = sum(len(spec.name.encode()) + HEADER for spec in specs)
    return start + points * point + (points + 2) * (header + 4096)


def bytes_of(folder: Path) -> int:
    """Return the total size of the files in a folder in bytes; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def check_room(folder: Path, needed: int, present: int = 0) -> int:
    """Check that the disk has space for a folder, and return the free bytes.

    Args:
        folder: the folder; it may be absent.
        needed: size of the folder when it is complete, in bytes.
        present: bytes that it already contains, including files that will be replaced.

    Raises:
        StorageError: the disk has too little free space.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    with reading(place):
        free = shutil.disk_usage(place).free
    if needed - present > free:
        raise StorageError(
            f"{folder} has no room: it needs another {(needed - present) / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
            "free there. Make room, or record fewer points (a larger `every`), in half the bytes (`dtype` bfloat16), "
            "or fewer layers (another partition)"
        )
    return free
