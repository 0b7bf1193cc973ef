"""Scheduler of a study: computes each cell once, in any number of processes, and estimates the remaining time.

A cell is one training or measurement. Its output is in its own folder, and the remaining work follows from the files
alone.
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

from tinyspan.errors import InputError, Interrupted, StorageError, TinyspanError
from tinyspan.extras import missing_extra
from tinyspan.io.folders import RESULT, Busy, claimed, is_unfinished
from tinyspan.io.storage import read_json, reading, replacing, sweep, write_json
from tinyspan.workflows.progress import Display

__all__ = ["CellResults", "CellStudy", "Executor", "once", "run_cells", "run_study"]

FAILURE = "failure.txt"
POLL = 2.0  # seconds between checks for cells that other processes have finished
SCHEDULED = ("score", "metric", "diverged")  # entries of a result that decide which cells follow, or describe it
Executor = Literal["local", "slurm"]


class InFolder(Protocol):
    """A cell: hashable, with a folder of its own."""

    @property
    def folder(self) -> Path:
        """Path of the cell's folder in its study."""


AnyCell = TypeVar("AnyCell", bound=InFolder)
Part = TypeVar("Part")


class CellResults(Generic[AnyCell]):
    """The results of finished cells in a study's folder; each is read once.

    Args:
        folder: folder of the study.
        entries: names of the entries to keep in memory; by default all.
    """

    def __init__(self, folder: Path, entries: Collection[str] | None = None) -> None:
        self.folder, self.entries = folder, entries
        self._results: dict[AnyCell, dict[str, Any]] = {}

    def __getitem__(self, cell: AnyCell) -> dict[str, Any] | None:
        """Return a cell's result, or those of `entries` that it has, or None if it is not finished.

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
            if self.entries is not None:
                result = {name: result[name] for name in self.entries if name in result}
            self._results[cell] = result
        return self._results.get(cell)

    def check(self, cell: AnyCell, path: Path, result: Mapping[str, Any]) -> None:
        """Check that a result belongs to this cell and this study."""


class CellStudy(ABC, Generic[AnyCell]):
    """A folder of cells. Each is computed once, by any of the processes that work on the study.

    Args:
        results: results of the finished cells.
        display: progress display.
    """

    def __init__(self, results: CellResults[AnyCell], display: Display) -> None:
        self.folder, self.results, self.display = results.folder, results, display

    @abstractmethod
    def cells(self) -> Collection[AnyCell]:
        """Return all cells that are known to be needed, in the order of computation; results may add more."""

    @abstractmethod
    def make(self, cell: AnyCell) -> dict[str, Any]:
        """Train or measure, and return the content of `result.json`.

        Raises:
            Busy: another process is computing a part that the cell needs.
        """

    def tidy(self, cell: AnyCell) -> None:
        """Delete what a finished cell no longer needs."""

    def describe(self, result: Mapping[str, Any]) -> str:
        """Return a short description of a result."""
        return f"{result.get('metric', 'score')} {result['score']:.4f}" if "score" in result else "no score"

    def running(self, cell: AnyCell) -> bool:
        """Whether a process is computing the cell now."""
        if not (self.folder / cell.folder).is_dir():
            return False
        try:
            with claimed(self.folder / cell.folder):
                return False
        except Busy:
            return True

    def run(self, cell: AnyCell) -> None:
        """Compute a cell, unless it is finished, and write its result.

        Raises:
            Busy: another process is computing the cell or a part it needs.
        """
        folder = self.folder / cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder):
            sweep(folder)
            if self.results[cell] is not None:
                return
            began = time.perf_counter()
            result = {**self.make(cell), "cell_seconds": round(time.perf_counter() - began, 1)}
            write_json(folder / RESULT, result)
            self.tidy(cell)

    def failure(self, cell: AnyCell) -> str | None:
        """Return in one line why a cell failed since the study was last started."""
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
    """Compute the missing cells of a study, whose folder may contain some already.

    Args:
        study: study with the cells.
        worker: function that each of several workers calls: `run_cells` of the same study. It is pickled.
        workers: number of processes; each computes the next cell on which no other process works.
        executor: executor of submitit: `local` starts processes here (one worker runs in this process), `slurm` submits
            jobs.
        executor_options: arguments of submitit's `update_parameters`, such as `slurm_partition`.

    Raises:
        InputError: submitit is not installed or cannot use the executor, or local workers would need an accelerator.
        Interrupted: the user interrupted the work; the finished cells are kept.
        TinyspanError: cells failed; the others are finished.
    """
    if workers > 1 and executor == "local" and torch.cuda.is_available():
        raise InputError(
            "local workers would not see the accelerator: start this command once per device instead, with "
            "CUDA_VISIBLE_DEVICES=0, 1, ... and the same output folder; they share the cells"
        )
    for failure in study.folder.rglob(FAILURE):  # of cells that appear later, too
        with suppress(Busy), claimed(failure.parent):
            failure.unlink(missing_ok=True)
    for cell in study.cells():
        study.tidy(cell)
    try:
        if workers == 1 and executor == "local":
            run_cells(study)
        else:
            _dispatch(study, worker, workers, executor, dict(executor_options or {}))
    except KeyboardInterrupt as error:
        raise Interrupted(f"{study.folder} keeps the finished cells; the same command goes on from there") from error
    left = [cell for cell in study.cells() if study.results[cell] is None]
    if left:
        shown = "\n".join(f"  {cell.folder}: {study.failure(cell) or 'not made'}" for cell in left)
        raise TinyspanError(f"{len(left)} cells failed; repeat the command to retry them:\n{shown}")


def run_cells(study: CellStudy[AnyCell]) -> None:
    """Compute the cells of a study in order, except those that failed or that other processes are computing.

    The error of a failed cell is written to `failure.txt` in its folder, and the other cells are computed.
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
            elif len(study.cells()) == len(cells):  # otherwise another process has finished a cell that adds more
                return


def _attempt(study: CellStudy[AnyCell], cell: AnyCell) -> None:
    """Compute a cell, or record why it failed, so that it is not retried endlessly.

    The reason is written while the cell is claimed: the next process that claims it deletes incomplete files.

    Raises:
        Busy: another process is computing the cell or a part it needs.
        InputError, StorageError: the cell's folder cannot be written, so the reason cannot be recorded.
    """
    with claimed(study.folder / cell.folder):
        if study.failure(cell) is not None:
            return  # finished by another process in the meantime
        try:
            study.run(cell)
        except Busy:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            study.display.say(f"failed: {cell.folder}: {reason}")
            with replacing(study.folder / cell.folder / FAILURE) as temporary:
                temporary.write_text(f"{reason}\n\n{traceback.format_exc()}", "utf-8")
    gc.collect()  # a Trainer is part of a reference cycle with its model, which may take gigabytes


class Counter(Generic[AnyCell]):
    """Reports how many cells are done, running and left, and the estimated time."""

    def __init__(self, study: CellStudy[AnyCell]) -> None:
        self.study, cells = study, study.cells()
        self._seen = dict.fromkeys(cells)  # results may make others unnecessary, of which one may be running
        self.done = {cell for cell in cells if study.results[cell] is not None}
        self._first, self._began = len(self.done), time.perf_counter()
        study.display.say(f"{len(cells)} cells, {len(self.done)} of them finished already")

    def look(self) -> None:
        """Print a line for every cell that has been finished since the last call."""
        cells = self.study.cells()
        self._seen |= dict.fromkeys(cells)
        for cell in self._seen:
            if cell not in self.done and (result := self.study.results[cell]) is not None:
                self.done.add(cell)
                self._say(f"{cell.folder}: {self.study.describe(result)}", cells)

    def _say(self, text: str, cells: Collection[AnyCell]) -> None:
        left = [cell for cell in cells if cell not in self.done]
        running = sum(self.study.running(cell) for cell in left)
        finished = len(self.done) - self._first
        seconds = (time.perf_counter() - self._began) / finished * len(left)
        estimate = f", about {seconds / 60:.0f} min left" if left else ""
        counts = f"{len(self.done)} done, {running} running, {len(left) - running} to do"
        self.study.display.say(f"{text}  ({counts}{estimate})")


def _dispatch(
    study: CellStudy[AnyCell], worker: Callable[[], object], workers: int, executor: Executor, options: dict[str, Any]
) -> None:
    """Start workers through submitit, and report the cells that they finish."""
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
    try:
        with _interruptible(), engine.batch():
            jobs = [engine.submit(worker) for _ in range(workers)]
    except submitit.core.utils.FailedJobError as error:
        raise InputError(
            f"{executor} did not accept the jobs: {error}; see --executor-option, such as timeout_min=1440"
        ) from error
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
    for job in jobs:
        if job.exception() is not None:
            study.display.say(f"worker {job.job_id} ended early ({job.state}); its log is {job.paths.stderr}")


def once(folder: Path, mark: str, make: Callable[[], Part], load: Callable[[], Part]) -> Part:
    """Load a part, or compute it if the file `mark`, which is written last, is missing; one process at a time.

    A part that can no longer be loaded, because another of its files was deleted or another version generates other
    random directions, is computed again.
    """
    with claimed(folder):
        if (folder / mark).is_file() and not is_unfinished(folder):
            try:
                return load()
            except StorageError as error:
                warnings.warn(f"{error}; it is computed again", stacklevel=2)
            except InputError:
                pass  # deleted, or of another version
        return make()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Restore SIGINT in new processes, since submitit cancels them with it, even if this process ignores it."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN and current_thread() is main_thread()
    if ignored:
        signal.signal(signal.SIGINT, lambda *_: None)  # in a new program, a handler is replaced by the default action
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
