"""Commands of the studies: reproduce, dimension, render, suites, and the demo."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tinyspan.cli.application import command, open_display
from tinyspan.cli.options import Output, Overwrite, Seed
from tinyspan.errors import InputError, TinyspanError

SuiteName = Annotated[str, typer.Option(help="Name of a suite (see `tinyspan suites`), or a YAML file.")]
Models = Annotated[str | None, typer.Option(help="Models instead of the suite's: A,B or NAME=FOLDER,...")]
Tasks = Annotated[str | None, typer.Option(help="Tasks instead of the suite's: A,B,...")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Number of seeds instead of the suite's.")]
DataFolders = Annotated[Path | None, typer.Option(help="Folder with one folder per GLUE task; default: from the hub.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes or jobs that share the work.")]
ExecutorName = Annotated[Literal["local", "slurm"], typer.Option(help="Where workers run, through submitit.")]
ExecutorOptions = Annotated[
    list[str] | None, typer.Option(help="Option of submitit, such as slurm_partition=gpu; may be repeated.")
]


@command
def reproduce(
    tables: Annotated[list[str], typer.Argument(help="table1 to table5, figure2 to figure4, dimension, or all.")],
    output: Output,
    suite: SuiteName = "small",
    models: Models = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    data: DataFolders = None,
    workers: Workers = 1,
    executor: ExecutorName = "local",
    executor_option: ExecutorOptions = None,
) -> None:
    """Compute tables and figures of the paper; an interrupted study continues where it stopped."""
    from tinyspan.lab.suite import load_suite

    chosen = load_suite(suite, models=_models(models), tasks=tasks.split(",") if tasks else None, seeds=seeds)
    from tinyspan.lab.rendering import render as draw
    from tinyspan.lab.reproduce import reproduce as compute
    from tinyspan.lab.tables import TABLES, possible_tables

    asked, options = possible_tables(chosen) if "all" in tables else tables, executor_options(executor_option)
    if "all" in tables and (left := [table for table in TABLES if table not in asked]):
        print(f"Left out, since the suite cannot have them: {', '.join(left)}", file=sys.stderr)
    failed = None
    with open_display() as display:
        try:
            compute(output, asked, chosen, data, display, workers=workers, executor=executor, executor_options=options)
        except InputError:
            raise
        except TinyspanError as error:  # the finished parts are rendered all the same
            failed = error
    try:
        print(f"Open {draw(output)}")
    except TinyspanError:
        if failed is None:
            raise
    if failed is not None:
        raise failed


@command
def dimension(
    output: Output,
    suite: SuiteName = "small",
    models: Models = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    data: DataFolders = None,
    workers: Workers = 1,
    executor: ExecutorName = "local",
    executor_option: ExecutorOptions = None,
) -> None:
    """Find d90, the smallest dimension that reaches 90 % of full fine-tuning: intrinsic, random, DID and SAID."""
    reproduce(["dimension"], output, suite, models, tasks, seeds, data, workers, executor, executor_option)


@command
def render(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `reproduce` wrote, finished or not.")],
    paper: Annotated[
        Path | None, typer.Option(help="Write a page with the paper's tables beside those of all folders.")
    ] = None,
) -> None:
    """Draw the tables and figures of studies from their result files."""
    from tinyspan.lab.comparison import compare
    from tinyspan.lab.rendering import render as draw

    with open_display():
        for folder in folders:
            print(f"Open {draw(folder)}")
        if paper is not None:
            print(f"Open {compare(folders, paper)}")


@command
def suites(
    name: Annotated[str | None, typer.Argument(help="Print the file of this suite, to copy and edit.")] = None,
) -> None:
    """List the suites of `reproduce`, or print one."""
    from tinyspan.lab.suite import load_suite, suite_names, suite_text

    if name is not None:
        print(suite_text(name), end="")
        return
    for suite in suite_names():
        print(f"{suite:<6}  {load_suite(suite).note}")


@command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("runs/demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare full, freeze, random and intrinsic training on real text in a few minutes, and write a report."""
    from tinyspan.lab.demo import run_demo

    with open_display() as display:
        results = run_demo(output, display, seed=seed, overwrite=overwrite)
    for result in results:
        print(f"{result['method']:>10}  {result['score']:.3f}  {result['subspace_parameters']:>4} numbers in z")
    print(f"Open {output / 'report.html'}")


def _models(text: str | None) -> dict[str, str] | list[str] | None:
    """Parse `A,B` or `NAME=FOLDER,...`."""
    if text is None:
        return None
    pairs = [(name, place or name) for name, _, place in (entry.partition("=") for entry in text.split(","))]
    if len(models := dict(pairs)) < len(pairs):
        raise InputError(f"--models contains a name twice: {text}")
    return models if "=" in text else list(models)


def executor_options(entries: list[str] | None) -> dict[str, Any]:
    """Parse entries `name=value`; integers become int."""
    options: dict[str, Any] = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        if not equals:
            raise InputError(f"--executor-option takes name=value, got {entry!r}")
        options[name] = int(value) if value.removeprefix("-").isdecimal() else value
    return options
