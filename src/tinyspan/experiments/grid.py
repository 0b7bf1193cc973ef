"""Run the cells of a study: finished ones never again, in any number of processes, with the time left."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from pydantic import ValidationError

from tinyspan.errors import InputError, StorageError, TinyspanError
from tinyspan.experiments.cells import Busy, Cell, Study, check_data
from tinyspan.experiments.programme import TABLES, cells_of
from tinyspan.experiments.progress import Display, quieten
from tinyspan.experiments.recipes import Suite
from tinyspan.storage import reading, write_json

__all__ = ["STUDY", "Executor", "read_study", "reproduce", "run_cells"]

STUDY = "study.json"
MAY_DIFFER = {"name", "note", "models", "tasks", "seeds", "dimensions"}  # between the tables of a study
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
            tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
            return {table: Suite.model_validate(suite) for table, suite in tables.items() if table in TABLES}
        except ValidationError as error:
            raise StorageError(f"{path} is damaged: {error}") from error


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
        InputError: the folder holds a study of other settings, a task's data are not there, or submitit is not.
        TinyspanError: cells failed; the others are finished.
    """
    unknown = [table for table in tables if table not in TABLES]
    if unknown:
        raise InputError(f"unknown table {unknown[0]!r}; expected some of {', '.join(TABLES)}")
    cells_of(tables, suite, lambda cell: None)
    check_data(suite, data)
    _describe(folder, tables, suite)
    study = Study(folder, suite, data, display)
    if workers == 1 and executor == "local":
        failed = run_cells(study, tables)
    else:
        failed = _dispatch(study, tables, workers, executor, dict(executor_options or {}))
    if failed:
        shown = "\n".join(f"  {cell.folder}: {reason}" for cell, reason in failed.items())
        raise TinyspanError(f"{len(failed)} cells failed; the same command tries them again:\n{shown}")


def run_cells(study: Study, tables: Sequence[str]) -> dict[Cell, str]:
    """Make the cells of tables in order, leaving out those that other processes work on, until all are finished.

    Returns:
        The cells that failed, and why.
    """
    failed: dict[Cell, str] = {}
    counter = Counter(study, tables)
    while True:
        cells = cells_of(tables, study.suite, study.results.score)
        pending = [cell for cell in cells if cell not in failed and study.results[cell] is None]
        if not pending:
            return failed
        for cell in pending:
            try:
                study.run(cell, cells[cell])
            except Busy:
                continue
            except TinyspanError as error:
                failed[cell] = str(error)
                study.display.say(f"failed: {cell.folder}: {error}")
            counter.look()
            break
        else:
            time.sleep(POLL)


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
    """Be one worker: what submitit runs.

    Raises:
        TinyspanError: cells failed.
    """
    if threads:
        torch.set_num_threads(threads)
    quieten()
    with Display() as display:
        failed = run_cells(Study(folder, Suite.model_validate(suite), data, display), tables)
    if failed:
        raise TinyspanError(f"{len(failed)} cells failed")


def _dispatch(
    study: Study, tables: Sequence[str], workers: int, executor: Executor, options: dict[str, Any]
) -> dict[Cell, str]:
    """Start workers through submitit, tell what they finish, and return the cells that none of them could make."""
    try:
        import submitit
    except ImportError as error:
        raise InputError("several workers need submitit: pip install 'tinyspan[grid]'") from error
    engine = submitit.AutoExecutor(folder=study.folder / "jobs", cluster=executor)
    engine.update_parameters(timeout_min=7 * 24 * 60, name="tinyspan")
    try:
        engine.update_parameters(**options)
    except (TypeError, NameError, ValueError) as error:
        raise InputError(f"submitit does not take these options for {executor}: {error}") from error
    threads = max(1, (os.cpu_count() or 1) // workers) if executor == "local" else 0
    counter = Counter(study, tables)
    with engine.batch():
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
    reasons = [str(job.exception()).strip().splitlines()[-1] for job in jobs if job.exception() is not None]
    cells = cells_of(tables, study.suite, study.results.score)
    return {cell: "; ".join(reasons) for cell in cells if study.results[cell] is None}


def _describe(folder: Path, tables: Sequence[str], suite: Suite) -> None:
    """Write down which tables the study is to have, made how.

    Raises:
        InputError: it has tables that were made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("# what can be made again\nshared/\njobs/\n.lock\n", encoding="utf-8")
    with FileLock(folder / ".lock"):
        known = read_study(folder) if (folder / STUDY).is_file() else {}
        ours = suite.model_dump(mode="json", exclude=MAY_DIFFER)
        for table, other in known.items():
            theirs = other.model_dump(mode="json", exclude=MAY_DIFFER)
            for name in ours:
                if theirs[name] != ours[name]:
                    raise InputError(
                        f"{folder} holds {table} made with {name} {theirs[name]}, this suite has {ours[name]}: "
                        "choose another folder, since finished cells would not belong together"
                    )
        known |= dict.fromkeys(tables, suite)
        dumped = {table: made.model_dump(mode="json") for table, made in known.items()}
        write_json(folder / STUDY, {"tables": dumped})
