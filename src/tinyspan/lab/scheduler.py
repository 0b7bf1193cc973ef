"""Run the cells of a study: finished ones never again, in any number of processes, with the time left.

A cell is one training or measurement. What it leaves is in a folder of its own, and what is left to do follows from the
files alone.
"""

import gc
import signal
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

from tinyspan.errors import InputError, StorageError, TinyspanError
from tinyspan.extras import missing_extra
from tinyspan.io.folders import Busy, claimed, is_unfinished
from tinyspan.io.storage import read_json, reading, replacing, sweep, write_json
from tinyspan.workflows.progress import Display
from tinyspan.workflows.runs import RESULT

__all__ = ["CellResults", "CellStudy", "Executor", "once", "run_cells", "run_study"]

FAILURE = "failure.txt"
POLL = 2.0  # seconds between looks at what other processes have finished
Executor = Literal["local", "slurm"]


class InFolder(Protocol):
    """A cell: hashable, with a folder of its own."""

    @property
    def folder(self) -> Path:
        """Where the cell lies in its study."""


AnyCell = TypeVar("AnyCell", bound=InFolder)
Part = TypeVar("Part")


class CellResults(Generic[AnyCell]):
    """The results of finished cells in a study's folder; each is read once.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results: dict[AnyCell, dict[str, Any]] = {}

    def __getitem__(self, cell: AnyCell) -> dict[str, Any] | None:
        """Return a cell's result, None if it is not finished.

        Raises:
            StorageError: the file is damaged.
        """
        if cell in self._results:
            return self._results[cell]
        path = self.folder / cell.folder / RESULT
        if path.is_file():
            with reading(path):
                result = read_json(path, sealed=False)
                self.check(cell, path, result)
            self._results[cell] = result
        return self._results.get(cell)

    def check(self, cell: AnyCell, path: Path, result: Mapping[str, Any]) -> None:
        """Refuse a result that is another cell's, or of another study."""


class CellStudy(ABC, Generic[AnyCell]):
    """A folder of cells. Each is made once, by any of the processes that work on the study.

    Args:
        results: of the cells that are finished.
        display: shows progress.
    """

    def __init__(self, results: CellResults[AnyCell], display: Display) -> None:
        self.folder, self.results, self.display = results.folder, results, display

    @abstractmethod
    def cells(self) -> Collection[AnyCell]:
        """Return all cells that are known to be needed, the first to make first; results may ask for more."""

    @abstractmethod
    def make(self, cell: AnyCell) -> dict[str, Any]:
        """Train or measure, and return what `result.json` holds.

        Raises:
            Busy: another process works on a part that the cell needs.
        """

    def tidy(self, cell: AnyCell) -> None:
        """Take away what a finished cell needs no longer."""

    def describe(self, result: Mapping[str, Any]) -> str:
        """Return a result in a few words."""
        return f"{result.get('metric', 'score')} {result['score']:.4f}" if "score" in result else "no score"

    def running(self, cell: AnyCell) -> bool:
        """Whether some process works on the cell now."""
        if not (self.folder / cell.folder).is_dir():
            return False
        try:
            with claimed(self.folder / cell.folder):
                return False
        except Busy:
            return True

    def run(self, cell: AnyCell) -> dict[str, Any]:
        """Make a cell, unless it is finished, and return its result.

        Raises:
            Busy: another process works on the cell or on a part it needs.
        """
        folder = self.folder / cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder):
            sweep(folder)
            if (finished := self.results[cell]) is not None:
                return finished
            began = time.perf_counter()
            result = {**self.make(cell), "cell_seconds": round(time.perf_counter() - began, 1)}
            write_json(folder / RESULT, result)
            self.tidy(cell)
            gc.collect()  # a Trainer refers to itself, and to a model that may take gigabytes
            return result

    def failure(self, cell: AnyCell) -> str | None:
        """Return why a cell failed since the study was last started, in a line."""
        try:
            return (self.folder / cell.folder / FAILURE).read_text("utf-8", "replace").partition("\n")[0]
        except FileNotFoundError:
            return None


def run_study(
    study: CellStudy[AnyCell],
    *,
    worker: Callable[[], object],
    workers: int = 1,
    executor: Executor = "local",
    executor_options: Mapping[str, Any] | None = None,
) -> None:
    """Make what is missing of a study, whose folder may hold some cells already.

    Args:
        study: its cells.
        worker: what each of several workers does: `run_cells` of the same study. It is pickled.
        workers: processes; each takes the next cell that no other works on.
        executor: submitit's: `local` starts processes here (not for one worker, which is this process), `slurm` jobs.
        executor_options: passed to submitit's `update_parameters`, such as `slurm_partition`.

    Raises:
        InputError: submitit is not installed, or cannot use the executor, or local workers would need an accelerator.
        TinyspanError: cells failed; the others are finished.
    """
    if workers > 1 and executor == "local" and torch.cuda.is_available():
        raise InputError(
            "local workers would not see the accelerator: start this command once per device instead, with "
            "CUDA_VISIBLE_DEVICES=0, 1, ... and the same output folder; they share the cells"
        )
    for cell in study.cells():
        if (failure := study.folder / cell.folder / FAILURE).is_file():
            with suppress(Busy), claimed(failure.parent):
                failure.unlink(missing_ok=True)
        study.tidy(cell)
    if workers == 1 and executor == "local":
        run_cells(study)
    else:
        _dispatch(study, worker, workers, executor, dict(executor_options or {}))
    left = [cell for cell in study.cells() if study.results[cell] is None]
    if left:
        shown = "\n".join(f"  {cell.folder}: {study.failure(cell) or 'not made'}" for cell in left)
        raise TinyspanError(f"{len(left)} cells failed; the same command tries them again:\n{shown}")


def run_cells(study: CellStudy[AnyCell]) -> None:
    """Make the cells of a study in order, leaving out those that failed or that other processes work on.

    What makes a cell fail is left in its folder, as `failure.txt`, and the others are made.
    """
    counter = Counter(study)
    while True:
        cells, busy = study.cells(), False
        for cell in cells:
            if study.results[cell] is not None or study.failure(cell) is not None:
                continue
            try:
                _attempt(study, cell)
            except Busy:
                busy = True
                continue
            counter.look()
            break
        else:
            if busy:
                time.sleep(POLL)
            elif len(study.cells()) == len(cells):  # else another process has finished what asks for more
                return


def _attempt(study: CellStudy[AnyCell], cell: AnyCell) -> None:
    """Make a cell, or leave why it failed, or else it would be tried for ever.

    The reason is written while the cell is held: who claims a cell next sweeps half-written files away.

    Raises:
        Busy: another process works on the cell or on a part it needs.
        InputError, StorageError: the cell's folder cannot be written, and so the reason neither.
    """
    with claimed(study.folder / cell.folder):
        if study.failure(cell) is not None:
            return  # since we looked
        try:
            study.run(cell)
        except Busy:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            study.display.say(f"failed: {cell.folder}: {reason}")
            with replacing(study.folder / cell.folder / FAILURE) as temporary:
                temporary.write_text(f"{reason}\n\n{traceback.format_exc()}", "utf-8")


class Counter(Generic[AnyCell]):
    """Tells how many cells are done, running and left, and how long they will take."""

    def __init__(self, study: CellStudy[AnyCell]) -> None:
        self.study, cells = study, study.cells()
        self.done = {cell for cell in cells if study.results[cell] is not None}
        self._first, self._began = len(self.done), time.perf_counter()
        study.display.say(f"{len(cells)} cells, {len(self.done)} of them finished already")

    def look(self) -> None:
        """Print a line for every cell that has been finished since the last look."""
        cells = self.study.cells()
        for cell in cells:
            if cell not in self.done and (result := self.study.results[cell]) is not None:
                self.done.add(cell)
                self._say(f"{cell.folder}: {self.study.describe(result)}", cells)

    def _say(self, text: str, cells: Collection[AnyCell]) -> None:
        left = [cell for cell in cells if cell not in self.done]
        running = sum(self.study.running(cell) for cell in left)
        made = len(self.done) - self._first
        seconds = (time.perf_counter() - self._began) / made * len(left)
        estimate = f", about {seconds / 60:.0f} min left" if left else ""
        counts = f"{len(self.done)} done, {running} running, {len(left) - running} to do"
        self.study.display.say(f"{text}  ({counts}{estimate})")


def _dispatch(
    study: CellStudy[AnyCell], worker: Callable[[], object], workers: int, executor: Executor, options: dict[str, Any]
) -> None:
    """Start workers through submitit, and tell what they finish."""
    try:
        import submitit
    except ImportError as error:
        raise missing_extra("submitit", "a study with several workers") from error
    try:
        engine = submitit.AutoExecutor(folder=study.folder / "jobs", cluster=executor)
        engine.update_parameters(timeout_min=7 * 24 * 60, name="tinyspan")
        engine.update_parameters(**options)
    except (RuntimeError, TypeError, NameError, ValueError) as error:
        raise InputError(f"submitit cannot use {executor} with these options: {error}") from error
    counter = Counter(study)
    with _interruptible(), engine.batch():
        jobs = [engine.submit(worker) for _ in range(workers)]
    study.display.say(f"{workers} workers started; their output is in {study.folder / 'jobs'}")
    try:
        while not all(job.done() for job in jobs):
            time.sleep(POLL)
            counter.look()
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()
    counter.look()


def once(folder: Path, mark: str, make: Callable[[], Part], load: Callable[[], Part]) -> Part:
    """Load a part that is whole, as the file `mark`, written last, tells, or make it; one process at a time.

    A part that no longer loads, because something beside the mark was deleted or another version draws other random
    directions, is made again.
    """
    with claimed(folder):
        if (folder / mark).is_file() and not is_unfinished(folder):
            try:
                return load()
            except StorageError as error:
                warnings.warn(f"{error}; it is made again", stacklevel=2)
            except InputError:
                pass  # deleted, or of another version
        return make()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let processes that start now heed SIGINT, by which submitit cancels them, even if we ignore it (`command &`)."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN and current_thread() is main_thread()
    if ignored:
        signal.signal(signal.SIGINT, lambda *_: None)  # a new program begins with the default in place of a handler
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
