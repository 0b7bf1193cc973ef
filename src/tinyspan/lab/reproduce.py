"""Make what is missing of the paper's tables, in a study that says what it was made with."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import ValidationError

from tinyspan.errors import InputError, StorageError
from tinyspan.io.folders import HOLDER, LOCK, check_place
from tinyspan.io.storage import first_error, read_json, reading, sweep, write_json, writing
from tinyspan.lab.cells import Study, check_inputs
from tinyspan.lab.scheduler import FAILURE, Executor, run_cells, run_study
from tinyspan.lab.suite import MAY_DIFFER, Suite
from tinyspan.lab.tables import TABLES, cells_of
from tinyspan.workflows.progress import Display, quieten

__all__ = ["STUDY", "read_study", "reproduce"]

STUDY = "study.json"


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
    _describe(folder, tables, suite, check=lambda: check_inputs(suite, data))
    threads = max(1, (os.cpu_count() or 1) // workers) if executor == "local" else 0
    run_study(
        Study(folder, suite, data, display, partial(cells_of, tables, suite)),
        workers=workers,
        executor=executor,
        executor_options=executor_options,
        worker=partial(work, folder, tables, suite.model_dump(mode="json"), data, threads),
    )


def work(folder: Path, tables: Sequence[str], suite: Mapping[str, Any], data: Path | None, threads: int) -> None:
    """Be one worker: what submitit runs."""
    if threads:
        torch.set_num_threads(threads)
    quieten()
    made_with = Suite.model_validate(suite)
    with Display() as display:
        run_cells(Study(folder, made_with, data, display, partial(cells_of, tables, made_with)))


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
