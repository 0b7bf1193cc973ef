"""Run the cells of a study: finished ones never again, in any number of processes, with the time left."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Literal

import torch
from filelock import FileLock
from pydantic import ValidationError

from tinyspan.errors import InputError, StorageError, TinyspanError
from tinyspan.extras import missing_extra
from tinyspan.io.folders import HOLDER, LOCK, Busy, check_place, claimed
from tinyspan.io.storage import first_error, read_json, reading, replacing, sweep, write_json, writing
from tinyspan.lab.cells import Cell, Study, check_inputs
from tinyspan.lab.suite import MAY_DIFFER, Suite
from tinyspan.lab.tables import TABLES, cells_of
from tinyspan.workflows.progress import Display, quieten

__all__ = ["STUDY", "Executor", "read_study", "reproduce", "run_cells"]

STUDY = "study.json"
FAILURE = "failure.txt"
POLL = 2.0  # seconds between looks at what other processes have finished
Executor = Literal["local", "slurm"]


def read_study(folder: Path) -> dict[str, Suite]:
    """Return the tables that were asked of a study, each with its suite.

    Raises:
        InputError: the folder is no study.
        StorageError: its description is damaged.
    """
    path = folder / STUDY
    if not path.is_file():
        raise InputError(f"{folder} has no {STUDY}; expected a folder that `tinyspan reproduce` wrote")
    with reading(path):
        try:
            tables = read_json(path, sealed=False)["tables"]
            known = {table: Suite.model_validate(suite) for table, suite in tables.items() if table in TABLES}
        except ValidationError as error:
            raise StorageError(f"{path} is damaged: {first_error(error)}") from error
    if not known:
        raise StorageError(f"{path} is damaged: it names no table")
    return known


def reproduce(
    folder: Path,
    tables: Sequence[str],
    suite: Suite,
    data: Path | None,
    display: Display,
    *,
    workers: int = 1,
    executor: Executor = "local",
    executor_options: Mapping[str, Any] | None = None,
) -> None:
    """Make what is missing of the cells that tables need; the folder may hold some already.

    Args:
        folder: of the study.
        tables: names in `TABLES`.
        suite: how to make them.
        data: holds one folder per task.
        display: shows progress.
        workers: processes; each takes the next cell that no other works on.
        executor: submitit's: `local` starts processes here (not for one worker, which is this process), `slurm` jobs.
        executor_options: passed to submitit's `update_parameters`, such as `slurm_partition`.

    Raises:
        InputError: the folder holds something else or a study of other settings, a model or a task's data are not
            there, or submitit is not.
        TinyspanError: cells failed; the others are finished.
    """
    unknown = [table for table in tables if table not in TABLES]
    if unknown:
        raise InputError(f"unknown table {unknown[0]!r}; expected some of {', '.join(TABLES)}")
    if workers > 1 and executor == "local" and torch.cuda.is_available():
        raise InputError(
            "local workers would not see the accelerator: start this command once per device instead, with "
            "CUDA_VISIBLE_DEVICES=0, 1, ... and the same output folder; they share the cells"
        )
    _describe(folder, tables, suite, check=lambda: check_inputs(suite, data))
    study = Study(folder, suite, data, display)
    for cell in cells_of(tables, suite, study.results.score):
        if (failure := folder / cell.folder / FAILURE).is_file():
            with suppress(Busy), claimed(failure.parent):
                failure.unlink(missing_ok=True)
        study.tidy(cell)
    if workers == 1 and executor == "local":
        run_cells(study, tables)
    else:
        _dispatch(study, tables, workers, executor, dict(executor_options or {}))
    left = [cell for cell in cells_of(tables, suite, study.results.score) if study.results[cell] is None]
    if left:
        shown = "\n".join(f"  {cell.folder}: {_failure(study, cell) or 'not made'}" for cell in left)
        raise TinyspanError(f"{len(left)} cells failed; the same command tries them again:\n{shown}")


def run_cells(study: Study, tables: Sequence[str]) -> None:
    """Make the cells of tables in order, leaving out those that failed or that other processes work on.

    What makes a cell fail is left in its folder, as `failure.txt`, and the others are made.
    """
    counter = Counter(study, tables)
    while True:
        cells, busy = cells_of(tables, study.suite, study.results.score), False
        for cell in cells:
            if study.results[cell] is not None or _failure(study, cell) is not None:
                continue
            try:
                _attempt(study, cell, cells[cell])
            except Busy:
                busy = True
                continue
            counter.look()
            break
        else:
            if not busy:
                return
            time.sleep(POLL)


def _attempt(study: Study, cell: Cell, table: str) -> None:
    """Make a cell, or leave why it failed, or else it would be tried for ever.

    The reason is written while the cell is held: who claims a cell next sweeps half-written files away.

    Raises:
        Busy: another process works on the cell or on a part it needs.
        InputError, StorageError: the cell's folder cannot be written, and so the reason neither.
    """
    with claimed(study.folder / cell.folder):
        if _failure(study, cell) is not None:
            return  # since we looked
        try:
            study.run(cell, table)
        except Busy:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            study.display.say(f"failed: {cell.folder}: {reason}")
            with replacing(study.folder / cell.folder / FAILURE) as temporary:
                temporary.write_text(f"{reason}\n\n{traceback.format_exc()}", "utf-8")


def _failure(study: Study, cell: Cell) -> str | None:
    """Return why a cell failed since the study was last started, in a line."""
    try:
        return (study.folder / cell.folder / FAILURE).read_text("utf-8", "replace").partition("\n")[0]
    except FileNotFoundError:
        return None


class Counter:
    """Tells how many cells are done, running and left, and how long they will take."""

    def __init__(self, study: Study, tables: Sequence[str]) -> None:
        self.study, self.tables = study, tables
        cells = self._cells()
        self.done = {cell for cell in cells if study.results[cell] is not None}
        self._first, self._began = len(self.done), time.perf_counter()
        study.display.say(f"{len(cells)} cells, {len(self.done)} of them finished already")

    def _cells(self) -> dict[Cell, str]:
        return cells_of(self.tables, self.study.suite, self.study.results.score)

    def look(self) -> None:
        """Print a line for every cell that has been finished since the last look."""
        cells = self._cells()
        for cell in cells:
            if cell not in self.done and (result := self.study.results[cell]) is not None:
                self.done.add(cell)
                self._say(f"{cell.folder}: {result['metric']} {result['score']:.4f}", cells)

    def _say(self, text: str, cells: Mapping[Cell, str]) -> None:
        left = len(cells) - len(self.done)
        running = sum(self.study.running(cell) for cell in cells if cell not in self.done)
        made = len(self.done) - self._first
        seconds = (time.perf_counter() - self._began) / made * left
        estimate = f", about {seconds / 60:.0f} min left" if left else ""
        self.study.display.say(f"{text}  ({len(self.done)} done, {running} running, {left - running} to do{estimate})")


def work(folder: Path, tables: Sequence[str], suite: Mapping[str, Any], data: Path | None, threads: int) -> None:
    """Be one worker: what submitit runs."""
    if threads:
        torch.set_num_threads(threads)
    quieten()
    with Display() as display:
        run_cells(Study(folder, Suite.model_validate(suite), data, display), tables)


def _dispatch(study: Study, tables: Sequence[str], workers: int, executor: Executor, options: dict[str, Any]) -> None:
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
    threads = max(1, (os.cpu_count() or 1) // workers) if executor == "local" else 0
    counter = Counter(study, tables)
    with _interruptible(), engine.batch():
        jobs = [
            engine.submit(work, study.folder, list(tables), study.suite.model_dump(mode="json"), study.data, threads)
            for _ in range(workers)
        ]
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


def _describe(folder: Path, tables: Sequence[str], suite: Suite, check: Callable[[], None]) -> None:
    """Write down which tables the study is to have, made how; nothing is written if they cannot be made.

    Raises:
        InputError: the folder holds something else, or tables made with other settings, or cannot be written.
        StorageError: the disk is full.
    """
    check_place(folder)
    known = read_study(folder) if (folder / STUDY).is_file() else {}
    begun = (LOCK, f".{STUDY}.")  # what a start that came to nothing left
    if not known and folder.is_dir() and any(not path.name.startswith(begun) for path in folder.iterdir()):
        raise InputError(f"{folder} holds something else than a study; choose another folder")
    for table, other in known.items():
        ours, theirs = suite.model_dump(mode="json"), other.model_dump(mode="json")
        for name in ours.keys() - set(MAY_DIFFER):
            if theirs[name] != ours[name]:
                raise InputError(
                    f"{folder} holds {table} made with {name} {theirs[name]}, this suite has {ours[name]}: "
                    "choose another folder, since finished cells would not belong together"
                )
    for table in tables:
        cells_of([table], suite, lambda cell: None)
    check()
    with writing(folder / STUDY):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK):
            for place in (folder, folder / "figures"):
                sweep(place)
            known = read_study(folder) if (folder / STUDY).is_file() else {}
            known |= {table: _joined(known[table], suite) if table in known else suite for table in tables}
            dumped = {table: _without_places(made).model_dump(mode="json") for table, made in known.items()}
            write_json(folder / STUDY, {"tables": dumped})
            if not (folder / ".gitignore").exists():
                ignored = ("# what can be made again", "shared/", "jobs/", LOCK, HOLDER, FAILURE, "")
                (folder / ".gitignore").write_text("\n".join(ignored), "utf-8")


def _joined(one: Suite, other: Suite) -> Suite:
    """Return a suite with the models, tasks, dimensions, bases and seeds of two."""
    return one.model_copy(
        update={
            "models": one.models | other.models,
            "tasks": tuple(dict.fromkeys(one.tasks + other.tasks)),
            "dimensions": tuple(sorted({*one.dimensions, *other.dimensions})),
            "bases": tuple(dict.fromkeys(one.bases + other.bases)),
            "seeds": max(one.seeds, other.seeds),
        }
    )


def _without_places(suite: Suite) -> Suite:
    """Return the suite without the folders of this machine: a study is shared."""
    models = {name: name if Path(location).exists() else location for name, location in suite.models.items()}
    return suite.model_copy(update={"models": models})
