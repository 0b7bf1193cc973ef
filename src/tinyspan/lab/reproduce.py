"""Compute the missing cells of the paper's tables, in a study folder that stores its settings."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import ValidationError

from tinyspan.errors import InputError, StorageError
from tinyspan.io.folders import HOLDER, LOCK, check_place
from tinyspan.io.manifests import first_error
from tinyspan.io.storage import read_json, reading, sweep, write_json, writing
from tinyspan.lab.cells import Study, check_inputs
from tinyspan.lab.scheduler import FAILURE, Executor, run_cells, run_study
from tinyspan.lab.suite import MAY_DIFFER, Suite
from tinyspan.lab.tables import TABLES, cells_of
from tinyspan.workflows.progress import Display, quieten

__all__ = ["STUDY", "read_study", "reproduce"]

STUDY = "study.json"


def read_study(folder: Path) -> dict[str, Suite]:
    """Return the tables of a study, each with its suite.

    Raises:
        InputError: the folder is not a study.
        StorageError: the description of the study is damaged.
    """
    path = folder / STUDY
    if not path.is_file():
        raise InputError(f"{folder} has no {STUDY}; expected a folder that `tinyspan reproduce` wrote")
    with reading(path):
        try:
            tables = read_json(path, sealed=False)["tables"]
            suites = {
                table: Suite.model_validate({"regression_start": "zero", **suite})  # older studies lack it
                for table, suite in tables.items()
                if table in TABLES
            }
        except ValidationError as error:
            raise StorageError(f"{path} is damaged: {first_error(error)}") from error
    if not suites:
        raise StorageError(f"{path} is damaged: it contains no table")
    return suites


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
    """Compute the missing cells of the tables; the folder may contain some already.

    Args:
        folder: folder of the study.
        tables: names in `TABLES`.
        suite: settings of the cells.
        data: folder with one folder per task.
        display: shows progress.
        workers: number of processes; each computes the next cell on which no other process works.
        executor: executor of submitit: `local` starts processes here (one worker runs in this process), `slurm` submits
            jobs.
        executor_options: arguments of submitit's `update_parameters`, such as `slurm_partition`.

    Raises:
        InputError: the folder holds something else or a study with other settings, or a model, a task's data or
            submitit is not available.
        TinyspanError: cells failed; the others are finished.
    """
    unknown = [table for table in tables if table not in TABLES]
    if unknown:
        raise InputError(f"unknown table {unknown[0]!r}; expected some of {', '.join(TABLES)}")
    _describe(folder, tables, suite, check=lambda: check_inputs(suite, data))
    threads = max(1, torch.get_num_threads() // workers) if executor == "local" else 0
    run_study(
        Study(folder, suite, data, display, partial(cells_of, tables, suite)),
        workers=workers,
        executor=executor,
        executor_options=executor_options,
        worker=partial(work, folder, tables, suite.model_dump(mode="json"), data, threads),
    )


def work(folder: Path, tables: Sequence[str], suite: Mapping[str, Any], data: Path | None, threads: int) -> None:
    """Run one worker; submitit calls this."""
    if threads:
        torch.set_num_threads(threads)
    quieten()
    made_with = Suite.model_validate(suite)
    with Display() as display:
        run_cells(Study(folder, made_with, data, display, partial(cells_of, tables, made_with)))


def _describe(folder: Path, tables: Sequence[str], suite: Suite, check: Callable[[], Mapping[str, str]]) -> None:
    """Write the tables and settings of a study; nothing is written if they cannot be computed.

    Raises:
        InputError: the folder holds something else, or tables with other settings or models, or cannot be written.
        StorageError: the disk is full.
    """
    check_place(folder)
    suites = read_study(folder) if (folder / STUDY).is_file() else {}
    begun = (LOCK, f".{STUDY}.")  # files of a start that failed
    if not suites and folder.is_dir() and any(not path.name.startswith(begun) for path in folder.iterdir()):
        raise InputError(f"{folder} holds something other than a study; choose another folder")
    _require_same(folder, suites, suite)
    for table in tables:
        cells_of([table], suite, lambda cell: None)
    models = check()
    with writing(folder / STUDY):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, fallback_to_soft=False):
            for place in (folder, folder / "figures"):
                sweep(place)
            suites = read_study(folder) if (folder / STUDY).is_file() else {}
            _require_same(folder, suites, suite)  # another process may have begun the study in the meantime
            models = {**_require_models(folder, models), **models}
            suites |= {table: _join(suites[table], suite) if table in suites else suite for table in tables}
            dumped = {table: _without_paths(one).model_dump(mode="json") for table, one in suites.items()}
            write_json(folder / STUDY, {"tables": dumped, "models": models})
            if not (folder / ".gitignore").exists():
                ignored = ("# what can be made again", "shared/", "jobs/", LOCK, HOLDER, FAILURE, "")
                (folder / ".gitignore").write_text("\n".join(ignored), "utf-8")


def _require_same(folder: Path, suites: Mapping[str, Suite], suite: Suite) -> None:
    """Check that the tables of a study have the settings of a suite.

    Raises:
        InputError: they have not.
    """
    for table, other in suites.items():
        ours, theirs = suite.model_dump(mode="json"), other.model_dump(mode="json")
        for name in ours.keys() - set(MAY_DIFFER):
            if (made := theirs[name]) != ours[name]:
                raise InputError(
                    f"{folder} holds {table} made with {name} {made}, this suite has {ours[name]}: choose another "
                    f"folder, since finished cells would not be comparable, or write `{name}: {made}` into the suite"
                )


def _require_models(folder: Path, models: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the models of a study, by name; studies of earlier versions have none.

    Raises:
        InputError: a model of this name has other weights.
    """
    if not (folder / STUDY).is_file():
        return {}
    with reading(folder / STUDY):
        stored = dict(read_json(folder / STUDY, sealed=False).get("models", {}))
    for name, digest in models.items():
        if stored.get(name, digest) != digest:
            raise InputError(
                f"{folder} holds cells of another model of the name {name!r}, whose weights differ: give this one "
                "another name (models: {NAME: FOLDER}, or --models NAME=FOLDER), or choose another folder"
            )
    return stored


def _join(one: Suite, other: Suite) -> Suite:
    """Return a suite with the models, tasks, dimensions, bases and seeds of both."""
    return one.model_copy(
        update={
            "models": one.models | other.models,
            "tasks": tuple(dict.fromkeys(one.tasks + other.tasks)),
            "dimensions": tuple(sorted({*one.dimensions, *other.dimensions})),
            "bases": tuple(dict.fromkeys(one.bases + other.bases)),
            "seeds": max(one.seeds, other.seeds),
        }
    )


def _without_paths(suite: Suite) -> Suite:
    """Return the suite without local paths, since studies are shared."""
    models = {name: name if Path(location).exists() else location for name, location in suite.models.items()}
    return suite.model_copy(update={"models": models})
